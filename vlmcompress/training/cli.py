# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress train``: make the small models that the project ships."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Train the small models that the project ships.", no_args_is_help=True)

Work = Annotated[
    Path | None, typer.Option(help="Folder for checkpoints and logs; default: OUTPUT with -work appended.")
]
Output = Annotated[Path, typer.Option(help="Folder for model, processor and loss plot.")]
Seed = Annotated[int, typer.Option(help="Seed of weights and data.")]
Resume = Annotated[bool, typer.Option(help="Go on from the checkpoints under WORK, where there are any.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads for torch.")]
Share = Annotated[float, typer.Option(help="Share of the steps of each stage, for a quick look.")]


@app.command("tiny-llava")
def tiny_llava(
    output: Output,
    work: Work = None,
    seed: Seed = 0,
    resume: Resume = True,
    threads: Threads = None,
    share: Share = 1.0,
) -> None:
    """Train tiny-llava in three stages, on a GPU where there is one (about an hour on two CPU cores)."""
    from .tiny_llava import Recipe, train_tiny_llava

    names = ("tower_steps", "language_steps", "easy_steps", "last_steps")
    recipe = _shortened(Recipe(seed=seed, threads=threads), names, share)
    typer.echo(f"Wrote {train_tiny_llava(recipe, output, work or _work(output), resume)}")


@app.command("tiny-llava-next")
def tiny_llava_next(
    output: Output,
    base: Annotated[Path, typer.Option(help="Folder of the tiny-llava to start from.")],
    work: Work = None,
    seed: Seed = 0,
    resume: Resume = True,
    threads: Threads = None,
    share: Share = 1.0,
) -> None:
    """Train tiny-llava-next from tiny-llava (about 45 minutes on two CPU cores)."""
    from .tiny_llava_next import NextRecipe, train_tiny_llava_next

    if not (base / "config.json").is_file():
        raise typer.BadParameter(f"there is no model folder {base}", param_hint="--base")
    recipe = _shortened(NextRecipe(seed=seed, threads=threads), ("steps", "small_steps"), share)
    typer.echo(f"Wrote {train_tiny_llava_next(recipe, base, output, work or _work(output), resume)}")


@app.command()
def boards(
    output: Annotated[
        Path, typer.Option(help="Folder of the results; arms that it holds already are not trained again.")
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    threads: Threads = None,
    share: Share = 1.0,
) -> None:
    """TokenFLEX's claim on a board game: a flexible projector against fixed ones (5 minutes an arm on a free core)."""
    from .boards import BoardStudy, run

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    report = run(_shortened(BoardStudy(), ("steps",), share), list(range(seeds)), output)
    typer.echo((output / "report.md").read_text())
    if not all(report["gates"].values()):
        raise typer.Exit(1)


def _shortened(recipe, names: tuple[str, ...], share: float):
    """The recipe with ``share`` of the steps that the fields ``names`` count."""
    if not 0 < share <= 1:
        raise typer.BadParameter(f"share must be in (0, 1], got {share}", param_hint="--share")
    return replace(recipe, **{name: max(1, round(share * getattr(recipe, name))) for name in names})


def _work(output: Path) -> Path:
    return output.with_name(output.name + "-work")


if __name__ == "__main__":
    app()
