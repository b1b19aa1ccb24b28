# SPDX-License-Identifier: Apache-2.0
"""The command line. Every bad input ends in one plain sentence on stderr and a non-zero exit code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="vlmcompress",
    help="Visual-token compression for stock Hugging Face vision-language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

#: module → the extra that brings it
EXTRAS = {
    "scipy": "eval",
    "matplotlib": "eval",
    "datasets": "eval",
    "pyarrow": "eval",
    "pydantic": "eval",
    "lmms_eval": "eval",
    "easy_vqa": "eval",
    "accelerate": "train",
    "open_clip": "train",
    "timm": "eval",
    "peft": "train",
    "gradio": "demo",
    "vllm": "serve",
    "fastapi": "serve-hf",
    "uvicorn": "serve-hf",
    "openai": "serve-hf",
    "prometheus_client": "serve-hf",
}

INTERRUPTED = 130


def _device(name: str) -> str:
    """``name`` where tensors can be made there; a usage error in one sentence otherwise."""
    if name == "cpu":
        return name
    import torch

    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # every back-end has its own
        raise typer.BadParameter(f"nothing can be computed on '{name}' here: {str(error).splitlines()[0]}") from None
    return name


Keep = Annotated[
    str | None, typer.Option(help="Visual tokens per image, or a share of them; default: a quarter (0.25).")
]
Device = Annotated[str, typer.Option(callback=_device, help="As PyTorch names it: cpu, cuda, cuda:1, mps ...")]


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    image: Annotated[Path, typer.Argument(help="Picture.")],
    question: Annotated[str, typer.Argument(help="Question about it.")],
    method: Annotated[str, typer.Option(help="See `vlmcompress methods`.")] = "vtc-cls",
    keep: Keep = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="Further options, NAME=VALUE.")] = None,
    out: Annotated[Path | None, typer.Option(help="PNG of the kept patches over the picture.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Default: what the model's folder says, or 64.")
    ] = None,
    device: Device = "cpu",
) -> None:
    """Answer one question about one picture, and show what was kept."""
    from .commands.run import answer_one

    answer_one(model, image, question, method, keep, option or [], out, max_new_tokens, device)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    methods: Annotated[
        str, typer.Option(help="Comma-separated; the uncompressed model is always measured.")
    ] = "standard",
    keep: Annotated[str, typer.Option(help="Comma-separated budgets: tokens per image, or shares.")] = "0.33,0.22,0.11",
    row: Annotated[
        list[str] | None, typer.Option("--row", help="A further row, 'NAME OPTION=VALUE ...'; may be repeated.")
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="Comma-separated names of ours or of lmms-eval, see `vlmcompress tasks`; NAME:QUESTIONS sets the "
            "number of one task."
        ),
    ] = "scenes,easy-vqa",
    limit: Annotated[int, typer.Option(min=1, help="Questions per task, a fixed subset.")] = 400,
    full: Annotated[bool, typer.Option("--full", help="All questions.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of results; what it already holds is not run again.")] = Path(
        "out/eval"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of methods that draw at random.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 4,
    rounds: Annotated[int, typer.Option(min=0, help="Timed runs per row; 0 leaves the clocks out.")] = 10,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; few are faster on a busy machine.")] = None,
    device: Device = "cpu",
) -> None:
    """Accuracy, FLOPs, time and memory of methods × budgets, with the baselines that a claim must beat."""
    from .commands.evaluate import Settings, evaluate

    _set_threads(threads)
    asked = None if full else limit
    evaluate(
        Settings(
            model, methods, keep, tasks, asked, out, seeds, batch_size, max_new_tokens, rounds, device, tuple(row or ())
        )
    )


@app.command()
def flops(
    model: Annotated[
        str, typer.Argument(help="Model folder, hub id or one of the shipped architectures (llava-1.5-7b ...).")
    ],
    method: Annotated[str, typer.Option(help="See `vlmcompress methods`.")] = "vtc-cls",
    keep: Annotated[str | None, typer.Option(help="Visual tokens per image, or a share of them (0.25).")] = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="Further options, NAME=VALUE.")] = None,
    image: Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels.")] = "672x672",
    text: Annotated[int, typer.Option(min=1, help="Text tokens of the prompt.")] = 60,
    json: Annotated[Path | None, typer.Option(help="File for the numbers.")] = None,
) -> None:
    """Count a method on an architecture of true size, by stage and under three conventions; no weights are needed."""
    from .commands.flops import Settings, flops

    flops(Settings(model, method, keep, option or [], image, text, json))


@app.command()
def reproduce(
    table: Annotated[
        str | None, typer.Argument(help="A published table, or the CSV file of one; left out: which there are.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model folder or hub id instead of the table's checkpoint.")] = None,
    rows: Annotated[
        str, typer.Option(help="Comma-separated, such as 'flowcut 64'; the uncompressed one comes too.")
    ] = "",
    benchmarks: Annotated[str, typer.Option(help="Comma-separated; default: all that can be measured.")] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions of each task.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of results; finished rows are not run again.")] = Path(
        "out/reproduce"
    ),
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    processes: Annotated[int, typer.Option(min=1, help="Started by accelerate, one GPU each.")] = 1,
    device: str = "cuda",
) -> None:
    """Run a published table through lmms-eval: theirs, ours, the difference, a verdict."""
    from .commands.reproduce import Machine, Settings, list_tables
    from .commands.reproduce import reproduce as run

    if table is None:
        list_tables()
        return
    code = run(Settings(table, model, rows, benchmarks, out, Machine(device, batch_size, limit, processes)))
    raise typer.Exit(code)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="What `vlmcompress eval --out` filled.")],
    out: Annotated[Path, typer.Option(help="The page; its charts go beside it as PNG.")] = Path("out/report.html"),
    model: Annotated[
        str | None, typer.Option(help="The measured model, to draw what methods kept where they disagree.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Questions to draw.")] = 4,
) -> None:
    """One HTML page from folders of results: frontiers, tables, token profiles, kept patches."""
    from .eval.page import write

    for path in write(folders, out, model=model, samples=samples):
        typer.echo(f"Written: {path}")


@app.command()
def tasks(
    folder: Annotated[bool, typer.Option("--folder", help="Only the folder for `lmms-eval --include_path`.")] = False,
) -> None:
    """List the tasks that `eval` measures accuracy on."""
    from .commands.tasks import list_tasks

    list_tasks(folder)


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Argument(help="Model folder or hub id; default: the shipped tiny-llava.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860 on.")
    ] = None,
    device: Device = "cpu",
    share: Annotated[bool, typer.Option("--share", help="A public address, through the servers of gradio.")] = False,
    results: Annotated[Path | None, typer.Option(help="Folder whose */report.json the table shows.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
) -> None:
    """See in the browser what a method keeps, what it costs and what it changes; on 127.0.0.1, without telemetry."""
    from .commands.demo import demo

    _set_threads(threads)
    demo(model, port, device, share, results)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    method: Annotated[str, typer.Option(help="See `vlmcompress methods`.")] = "vtc-cls",
    keep: Keep = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="Further options, NAME=VALUE.")] = None,
    positions: Annotated[str, typer.Option(help="Position ids of the kept tokens.")] = "published",
    host: str = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests in the queue; more are answered with 503.")] = 64,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the weights, as in transformers.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
) -> None:
    """Serve one compressed model by OpenAI's chat API, on transformers: for methods that vLLM cannot run."""
    from .commands.serve import serve

    _set_threads(threads)
    serve(model, method, keep, option or [], positions, host, port, device, dtype, max_waiting)


@app.command()
def methods(
    support: Annotated[bool, typer.Option("--support", help="Methods × families as a Markdown page.")] = False,
) -> None:
    """List the methods, where they act and the options they take."""
    if support:
        from .commands.support import markdown

        typer.echo(markdown(), nl=False)
        return
    from .commands.methods import list_methods

    list_methods()


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


class Bench(str, Enum):
    """What ``vlmcompress bench`` measures."""

    LIMIT = "limit"
    METHODS = "methods"
    CACHE = "cache"
    STAGES = "stages"
    GPU = "gpu"
    ENCODERS = "encoders"
    SELECTION = "selection"
    PROJECTOR = "projector"
    SERVE = "serve"


@app.command()
def bench(
    what: Annotated[
        Bench,
        typer.Argument(
            help="limit: distance to the speed limit; methods: all of them; cache: its policies; stages: every part of one "
            "answer; gpu: 7B shapes by part, kernel and batch; serve: vLLM under load; encoders: clustered and pruned "
            "ViT-B/16; selection: choosing spread-out tokens; projector: TokenFLEX beside a tower."
        ),
    ] = (Bench.LIMIT),
    out: Annotated[Path, typer.Option(help="Folder of the JSON file.")] = Path("results"),
    rounds: Annotated[int, typer.Option(min=1)] = 10,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    device: Device = "cpu",
) -> None:
    """Speed and memory on large random models: against natively short prompts, by method, by cache policy, by stage."""
    from .commands.bench import bench
    from .commands.bench_cache import bench_cache
    from .commands.bench_encoders import bench_encoders
    from .commands.bench_gpu import bench_gpu
    from .commands.bench_methods import bench_methods
    from .commands.bench_projector import bench_projector
    from .commands.bench_selection import bench_selection
    from .commands.bench_serve import bench_serve
    from .commands.bench_stages import bench_stages

    _set_threads(threads)
    kinds: dict[Bench, Callable[[Path, int, str], Any]] = {
        Bench.LIMIT: bench,
        Bench.METHODS: bench_methods,
        Bench.CACHE: bench_cache,
        Bench.STAGES: bench_stages,
        Bench.GPU: bench_gpu,
        Bench.ENCODERS: bench_encoders,
        Bench.SELECTION: bench_selection,
        Bench.PROJECTOR: bench_projector,
        Bench.SERVE: bench_serve,
    }
    kinds[what](out, rounds, device)


@app.command()
def retrieval(
    model: Annotated[str, typer.Argument(help="Folder of an open_clip model for 64 × 64 pixels.")],
    row: Annotated[
        list[str] | None,
        typer.Option("--row", help="'NAME OPTION=VALUE ...' instead of the default rows; may be repeated."),
    ] = None,
    videos: Annotated[int, typer.Option(min=2, help="Videos with captions that all differ.")] = 500,
    out: Annotated[Path, typer.Option(help="File of the results.")] = Path("out/retrieval.json"),
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
) -> None:
    """Search among video scenes by caption, and among captions by video, with methods in the model's tower."""
    from .commands.retrieval import retrieval as run

    _set_threads(threads)
    run(model, row or [], videos, out)


@app.command(
    "train",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def train(context: typer.Context) -> None:
    """Train the small models that this project ships (`vlmcompress train --help`)."""
    from .training.cli import app as training

    training(context.args, prog_name="vlmcompress train", standalone_mode=False)


def explain(error: BaseException) -> str | None:
    """One sentence for an error that a user can cause; ``None`` for a defect of ours, which keeps its traceback."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        extra = EXTRAS.get(error.name.split(".")[0])
        if extra is None:
            return None
        return f"This needs the package {error.name.split('.')[0]}; install it with: pip install 'vlmcompress[{extra}]'"
    if isinstance(error, ImportError) and "vlmcompress[" in str(error):
        return str(error)
    if hasattr(error, "format_message"):  # a usage error; typer brings a click of its own in some versions
        return error.format_message()
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    if isinstance(error, (ValueError, OSError)):
        return " ".join(str(error).split())
    return None


def main(args: Sequence[str] | None = None) -> Any:
    """Entry point of the script ``vlmcompress``."""
    from transformers.utils import logging as messages

    # this process is ours: bars and advice of the libraries would hide the one sentence that matters
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    for name in ("torch.utils._pytree", "bitsandbytes"):  # the first for torchao; where they are installed
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        code = app(args, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        print(sentence, file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
    if code == INTERRUPTED:  # newer versions of typer return it, older ones raise
        print("Interrupted; everything finished is kept.", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
