# SPDX-License-Identifier: Apache-2.0
"""Small vectors of our own, so that a clone without the reference vectors still notices a method that chooses differently.

``PYTHONPATH=tests python tests/parity/own.py`` writes ``own.json`` anew. Do so only while the methods agree with the
reference vectors (the other files of this folder), for these numbers are what our code answered at that time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import vlmcompress
import vlmcompress.flex

sys.path.insert(0, str(Path(__file__).parents[1] / "matrix"))
from cells import FAMILIES, OPTIONS, answers

RECORD = Path(__file__).with_name("own.json")
#: one view, tiles, and merged patches with three-dimensional positions
RECORDED = ("llava", "llava_next", "qwen2_5_vl")


@torch.no_grad()
def replay(method: str, family: str, options: dict[str, Any]) -> dict[str, Any]:
    """What a method does to a batch of two prompts of different length on a tiny model with the weights of seed 0.

    ``kept``: indices per prompt and image that entered the language model, ``last``: those that its last layer saw;
    ``cache``: entries per layer; ``answers``: three greedy tokens per prompt.
    """
    case = FAMILIES[family]
    model = case.build()
    model.generation_config.eos_token_id = None
    batch = case.batch(model)
    if method.startswith("tokenflex"):
        torch.manual_seed(0)
        vlmcompress.flex.install(model, counts=(4, 9))
    with vlmcompress.compress(model, method, **options) as handle:
        said = answers(model, batch)
        ledger = handle.last

    def alive(layer: int) -> list[list[list[int]]]:
        return [[image.kept_at(layer).tolist() for image in sample.images] for sample in ledger.samples]

    return {
        "kept": alive(0),
        "last": alive(ledger.n_layers - 1),
        "cache": ledger.cache_lengths,
        "answers": said.tolist(),
    }


def record() -> None:
    """Every method on every family of :data:`RECORDED` that it works on."""
    lines = []
    for method, options in sorted(OPTIONS.items()):
        for family in RECORDED:
            if vlmcompress.support(method, family)[0]:
                case = {"method": method, "family": family, "options": options}
                lines.append(json.dumps(case | replay(**case)))
    RECORD.write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    record()
