# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress train``: make the small models that the project ships."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Train the small models that the project ships.", no_args_is_help=True)


@app.callback()
def main() -> None:
    """Keeps the name of the command in the call while there is only one."""


@app.command("tiny-llava")
def tiny_llava(
    output: Annotated[Path, typer.Option(help="Folder for model, processor and loss plot.")],
    work: Annotated[
        Path | None, typer.Option(help="Folder for checkpoints and logs; default: OUTPUT with -work appended.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoints under WORK, where there are any.")] = True,
    threads: Annotated[int | None, typer.Option(help="CPU threads for torch.")] = None,
    share: Annotated[float, typer.Option(help="Share of the steps of each stage, for a quick look.")] = 1.0,
) -> None:
    """Train tiny-llava in three stages, on a GPU where there is one (about an hour on two CPU cores)."""
    from .tiny_llava import Recipe, train_tiny_llava

    if not 0 < share <= 1:
        raise typer.BadParameter(f"share must be in (0, 1], got {share}")
    recipe = Recipe(seed=seed, threads=threads)
    names = ("tower_steps", "language_steps", "easy_steps", "last_steps")
    recipe = replace(recipe, **{name: max(1, round(share * getattr(recipe, name))) for name in names})
    work = work or output.with_name(output.name + "-work")
    typer.echo(f"Wrote {train_tiny_llava(recipe, output, work, resume)}")


if __name__ == "__main__":
    app()
