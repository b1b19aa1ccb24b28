# SPDX-License-Identifier: Apache-2.0
"""Thresholds of ``tokenflex-adaptive`` for an average budget, as a row for ``vlmcompress eval``.

``python -m vlmcompress.training.flex_thresholds assets/models/tiny-flex --average 36``; the pictures are scenes never used
elsewhere and easy-VQA's training split, half of each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SEED = 81_000_000  # apart from training, validation and the test sets


def main(
    model: Annotated[
        Path, typer.Argument(help="Folder of a model with a TokenFLEX projector for pictures of one view.")
    ],
    average: Annotated[float, typer.Option(help="Tokens per picture, on average.")] = 36,
    counts: Annotated[str, typer.Option(help="Counts to choose from.")] = "9,36,144",
    pictures: Annotated[int, typer.Option(min=2, help="Pictures to look at.")] = 1024,
) -> None:
    """Print the row that spends AVERAGE tokens per picture on the validation pictures."""
    import numpy as np

    from ..eval.loading import load
    from ..methods.tokenflex_adaptive import calibrate_adaptive
    from .hires import easy_vqa_pairs
    from .scenes import make_scene

    loaded, processor = load(str(model))
    numbers = [int(part) for part in counts.split(",")]
    pairs, rng = easy_vqa_pairs(), np.random.default_rng(SEED)
    images = [make_scene(SEED, i).image for i in range(pictures // 2)]
    images += [pairs[i][0] for i in rng.choice(len(pairs), pictures - len(images), replace=False)]
    batches = [processor.image_processor(images[i : i + 64], return_tensors="pt") for i in range(0, len(images), 64)]
    found = calibrate_adaptive(loaded, batches, average, numbers)
    shown = (f"{name}=({','.join(f'{v:g}' for v in getattr(found, name))})" for name in ("counts", "thresholds"))
    typer.echo(f"tokenflex-adaptive {' '.join(shown)}")


if __name__ == "__main__":
    typer.run(main)
