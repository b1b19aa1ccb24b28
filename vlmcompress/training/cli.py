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
    """Train tiny-llava-next from tiny-llava (about 20 minutes on two quiet CPU cores)."""
    from .tiny_llava_next import NextRecipe, train_tiny_llava_next

    _must_be_model(base)
    recipe = _shortened(NextRecipe(seed=seed, threads=threads), ("steps", "small_steps"), share)
    typer.echo(f"Wrote {train_tiny_llava_next(recipe, base, output, work or _work(output), resume)}")


@app.command("tiny-clip")
def tiny_clip(
    output: Output,
    base: Annotated[Path, typer.Option(help="Folder of the tiny-llava whose tower it starts from.")],
    segments: Annotated[
        int | None, typer.Option(min=1, help="Train with CenterCLIP in place: sequences per video; default: without.")
    ] = None,
    keep: Annotated[int, typer.Option(min=1, help="Centres per segment, where there are segments.")] = 16,
    work: Work = None,
    seed: Seed = 0,
    resume: Resume = True,
    threads: Threads = None,
    share: Share = 1.0,
) -> None:
    """Train tiny-clip, an open_clip model for videos and captions (about 5 minutes on two quiet CPU cores)."""
    from .tiny_clip import ClipRecipe, train_tiny_clip

    _must_be_model(base)
    recipe = _shortened(ClipRecipe(seed=seed, segments=segments, keep=keep, threads=threads), ("steps",), share)
    typer.echo(f"Wrote {train_tiny_clip(recipe, base, output, work or _work(output), resume)}")


@app.command("tiny-qwen2.5-vl")
def tiny_qwen(
    output: Output,
    base: Annotated[Path, typer.Option(help="Folder of the tiny-llava to start from.")] = Path(
        "assets/models/tiny-llava"
    ),
    work: Work = None,
    seed: Seed = 0,
    resume: Resume = True,
    threads: Threads = None,
    share: Share = 1.0,
) -> None:
    """Train tiny-qwen2.5-vl from tiny-llava's language model (on a GPU where there is one)."""
    from .tiny_qwen import QwenRecipe, train_tiny_qwen

    _must_be_model(base)
    recipe = _shortened(QwenRecipe(seed=seed, threads=threads), ("copy_steps", "answer_steps", "easy_steps"), share)
    typer.echo(f"Wrote {train_tiny_qwen(recipe, base, output, work or _work(output), resume)}")


@app.command()
def tokenflex(
    base: Annotated[str, typer.Option(help="Model folder or hub id; one with the projector goes on with it.")],
    output: Annotated[Path, typer.Option(help="Folder for model, processor and log.")],
    stage: Annotated[str, typer.Option(help="align: projector only; vision, instruct: everything.")] = "instruct",
    data: Annotated[Path | None, typer.Option(help="Conversations in LLaVA's JSON format; default: scenes.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures that DATA names.")] = None,
    counts: Annotated[str, typer.Option(help="Token counts to draw from.")] = "64,144,256",
    probabilities: Annotated[str | None, typer.Option(help="Shares of the counts; default: the paper's.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="Conversations per process and micro-batch.")] = 16,
    accumulate: Annotated[int, typer.Option(min=1, help="Micro-batches per step.")] = 1,
    rate: Annotated[float | None, typer.Option(help="Learning rate; default: the stage's.")] = None,
    tower_rate: Annotated[float | None, typer.Option(help="Of the tower; default: the stage's.")] = None,
    pooling: Annotated[str, typer.Option(help="adaptive, or resize for released weights.")] = "adaptive",
    post_layernorm: Annotated[
        bool, typer.Option(help="Pass features through the tower's final norm (SigLIP).")
    ] = False,
    prior: Annotated[float, typer.Option(min=0, help="Alpha of the PRIOR loss; 0: plain.")] = 0.0,
    reference: Annotated[str | None, typer.Option(help="Text-only model for PRIOR; default: BASE, blind.")] = None,
    loss_weighting: Annotated[str, typer.Option(help="token, or sqrt as released.")] = "token",
    easy_vqa: Annotated[
        bool, typer.Option(help="Every fourth picture from easy-VQA, where DATA is not given.")
    ] = False,
    gradient_checkpointing: bool = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read data.")] = 1,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoints under OUTPUT-work.")] = True,
    threads: Threads = None,
) -> None:
    """Train one stage of a model with any number of visual tokens; start it with torchrun for several processes."""
    from .tokenflex import FlexRun, train_tokenflex

    _set_threads(threads)
    shares = None if probabilities is None else _numbers(probabilities, float)
    run = FlexRun(
        base, output, stage, data, images, _numbers(counts, int), shares, pooling=pooling,
        apply_post_layernorm=post_layernorm, steps=steps, batch=batch, accumulate=accumulate, rate=rate,
        tower_rate=tower_rate, prior=prior, reference=reference, loss_weighting=loss_weighting, seed=seed,
        easy_vqa=easy_vqa, gradient_checkpointing=gradient_checkpointing, workers=workers, resume=resume,
    )  # fmt: skip
    typer.echo(f"Wrote {train_tokenflex(run)}")


@app.command()
def explainability(
    base: Annotated[str, typer.Option(help="Model folder or hub id that the predictor is for.")],
    output: Annotated[Path, typer.Option(help="File of the predictor; MODEL/relevance/image.safetensors is found.")],
    work: Annotated[Path | None, typer.Option(help="Folder of labels and checkpoints; default: OUTPUT-work.")] = None,
    tasks: Annotated[str, typer.Option(help="scenes (drawn anew) or tasks with a training split.")] = "scenes",
    samples: Annotated[int, typer.Option(min=64, help="Questions answered right that are explained.")] = 10_240,
    epochs: Annotated[int, typer.Option(min=1)] = 25,
    validation: Annotated[int, typer.Option(min=1, help="Samples of them held out.")] = 1024,
    seed: Seed = 0,
    resume: Resume = True,
    threads: Threads = None,
) -> None:
    """Train the relevance predictor of one model for the method `explainability` (an hour on one busy CPU core)."""
    from .explainability import RelevanceRecipe, train_explainability

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    recipe = RelevanceRecipe(
        base, names, samples, epochs=epochs, validation=validation, seed=seed, threads=threads
    )  # fmt: skip
    typer.echo(f"Wrote {train_explainability(recipe, output, work or _work(output), resume)}")


def _numbers(text: str, kind: type) -> tuple:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"A list of numbers goes like 64,144,256, not '{text}'.") from None


@app.command("tokenflex-study")
def tokenflex_study(
    base: Annotated[str, typer.Option(help="Folder of the tiny-llava to start from.")],
    output: Annotated[Path, typer.Option(help="Folder of the results; what it holds already is not done again.")],
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds.")] = 3,
    limit: Annotated[int, typer.Option(min=0, help="Questions per task; 0: all.")] = 1200,
    threads: Threads = None,
    share: Share = 1.0,
) -> None:
    """A flexible model against models of one count, each used at every count (hours on two CPU cores)."""
    from .flex_study import FlexStudy, run_study

    _set_threads(threads)
    study = _shortened(FlexStudy(base, limit=limit or None), ("warm_steps", "steps"), share)
    run_study(study, list(range(seeds)), output)
    typer.echo((output / "report.md").read_text())


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

    _set_threads(threads)
    report = run(_shortened(BoardStudy(), ("steps",), share), list(range(seeds)), output)
    typer.echo((output / "report.md").read_text())
    if not all(report["gates"].values()):
        raise typer.Exit(1)


def _shortened(recipe, names: tuple[str, ...], share: float):
    """The recipe with ``share`` of the steps that the fields ``names`` count."""
    if not 0 < share <= 1:
        raise typer.BadParameter(f"share must be in (0, 1], got {share}", param_hint="--share")
    return replace(recipe, **{name: max(1, round(share * getattr(recipe, name))) for name in names})


def _must_be_model(base: Path) -> None:
    if not (base / "config.json").is_file():
        raise typer.BadParameter(f"there is no model folder {base}", param_hint="--base")


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _work(output: Path) -> Path:
    return output.with_name(output.name + "-work")


if __name__ == "__main__":
    app()
