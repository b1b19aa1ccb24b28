# SPDX-License-Identifier: Apache-2.0
"""Distance to the speed limit: a compressed prefill against the same model given a prompt that natively is that short.

The clock runs from the end of the vision tower to the logits of the last position, so everything that compression adds
there is inside: choosing, gathering, the ledger, the projector of the kept tokens. Weights are random, for latency does
not depend on them; the picture is noise, never zeros.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from ..method import HOOKS, Method, create
from .latency import Timing, clock, interleaved, refuse_zeros, tensor_shapes

#: a 336 px picture and 60 text tokens
TEXT_TOKENS, IMAGE_TOKEN = 60, 32000
#: :func:`cpu_shape` and its prompt in words, for reports
CPU_SHAPE = f"CLIP-L/14-336, Llama 8 layers × 2048, one 336 px image, {TEXT_TOKENS} text tokens, random weights"


def cpu_shape() -> Any:
    """Config of the shape measured without a GPU: CLIP-L/14-336 and a Llama of 8 layers, 2048 wide."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=2048, intermediate_size=5504, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=16,
        vocab_size=32064,
    )  # fmt: skip
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN)


def prompt(config: Any, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One picture of noise between two halves of the text."""
    generator = torch.Generator().manual_seed(0)
    side = config.vision_config.image_size
    tokens = (side // config.vision_config.patch_size) ** 2
    text = torch.randint(5, IMAGE_TOKEN, (1, TEXT_TOKENS), generator=generator)
    image = torch.full((1, tokens), config.image_token_id)
    ids = torch.cat([text[:, : TEXT_TOKENS // 2], image, text[:, TEXT_TOKENS // 2 :]], 1).to(device)
    pixels = torch.randn(1, 3, side, side, generator=generator).to(device, dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


class _Marks:
    """Times within one forward: when it began, when the tower was done, when it ended, in milliseconds."""

    def __init__(self, tower: torch.nn.Module, device: str):
        self.cuda = device.startswith("cuda")
        self.at_tower: Any = None
        self.hook = tower.register_forward_hook(lambda *_: setattr(self, "at_tower", self.now()))

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        if not self.cuda:
            return (end - start) * 1e3
        torch.cuda.synchronize()
        return start.elapsed_time(end)


def watched_method(method: Any, around: Callable[[str], AbstractContextManager]) -> Any:
    """The same method with ``around(stage)`` entered around everything that it computes at a stage."""

    def watched(name: str) -> Callable:
        original = getattr(type(method), name)

        def call(self, *args):
            with around(name):
                return original(self, *args)

        return call

    parts = {name: watched(name) for name in HOOKS if getattr(type(method), name) is not getattr(Method, name)}
    return type(type(method).__name__, (type(method),), parts)(**method.options())


def timed_method(method: Any, device: str) -> tuple[Any, dict[str, list[float]]]:
    """The same method with a clock around what it computes; per stage the milliseconds of every call are collected."""
    spent: dict[str, list[float]] = defaultdict(list)
    now = clock(device)

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        begin = now()
        yield
        spent[name].append(now() - begin)

    return watched_method(method, timed), spent


@torch.inference_mode()
def measure(
    model: Any, inputs: dict[str, Any], method: str, keeps: Sequence[int], rounds: int, tick: Callable[[], None]
) -> dict[str, Any]:
    """Milliseconds of tower, rest of the prefill and the method itself, and their ratios to the limit."""
    from ..attach import compress

    refuse_zeros(inputs)
    device = str(model.device)
    inner, marks = model.model, _Marks(model.model.vision_tower, device)
    cases: dict[str, Callable[[], float]] = {}
    towers: dict[str, list[float]] = {"stock": []}
    own: dict[int, list[float]] = {}

    def stock() -> float:
        start = marks.now()
        model(**inputs, use_cache=True, logits_to_keep=1)
        end = marks.now()
        towers["stock"].append(marks.between(start, marks.at_tower))
        return marks.between(marks.at_tower, end)

    def compressed(keep: int) -> Callable[[], float]:
        plain = create(method, keep=keep).methods[0]
        towers[f"keep {keep}"], own[keep] = [], []

        def case() -> float:
            clocked, spent = timed_method(plain, device)
            with compress(model, clocked):
                start = marks.now()
                model(**inputs, use_cache=True, logits_to_keep=1)
                end = marks.now()
            towers[f"keep {keep}"].append(marks.between(start, marks.at_tower))
            own[keep].append(sum(map(sum, spent.values())))
            return marks.between(marks.at_tower, end)

        return case

    def native(keep: int) -> Callable[[], float]:
        embeddings = inner.get_input_embeddings()
        text = embeddings(inputs["input_ids"][inputs["input_ids"] != model.config.image_token_id][None])
        width = model.config.vision_config.hidden_size
        patches = torch.randn(1, keep, width, generator=torch.Generator().manual_seed(1)).to(text)
        half = TEXT_TOKENS // 2

        def case() -> float:
            start = marks.now()
            visual = inner.multi_modal_projector(patches)
            embeds = torch.cat([text[:, :half], visual, text[:, half:]], 1)
            model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
            return marks.between(start, marks.now())

        return case

    cases["stock"] = stock
    for keep in keeps:
        cases[f"compressed {keep}"], cases[f"native {keep}"] = compressed(keep), native(keep)
    found = interleaved(cases, rounds=rounds, warmup=1, tick=tick)
    marks.hook.remove()
    return _ratios(found, towers, own, keeps, rounds)


def _ratios(found: dict, towers: dict, own: dict, keeps: Sequence[int], rounds: int) -> dict[str, Any]:
    tower = statistics.median(towers["stock"][-rounds:])
    result: dict[str, Any] = {
        "tower_ms": Timing.of(towers["stock"][-rounds:]).as_dict(),
        "after_tower_ms": Timing.of(found["stock"]).as_dict(),
        "keep": {},
    }
    for keep in keeps:
        ours, limit = found[f"compressed {keep}"], found[f"native {keep}"]
        method = statistics.median(own[keep][-rounds:])
        result["keep"][str(keep)] = {
            "compressed_ms": Timing.of(ours).as_dict(),
            "native_ms": Timing.of(limit).as_dict(),
            # pairs of the same round: a busy second hits both
            "overhead": statistics.median(a / b for a, b in zip(ours, limit, strict=True)),
            "speedup_after_tower": statistics.median(found["stock"]) / statistics.median(ours),
            "method_ms": method,
            "method_over_tower": method / tower,
            "tower_with_hooks_over_stock": statistics.median(towers[f"keep {keep}"][-rounds:]) / tower,
        }
    return result


@torch.inference_mode()
def largest_new_tensor(model: Any, inputs: dict[str, Any], method: str, keep: int) -> dict[str, Any]:
    """Largest tensor that only the compressed prefill forms, beside heads × N × N of the tower."""
    from ..attach import compress

    with tensor_shapes() as stock:
        model(**inputs, use_cache=True, logits_to_keep=1)
    with compress(model, method, keep=keep), tensor_shapes() as ours:
        model(**inputs, use_cache=True, logits_to_keep=1)
    new = max((shape for shape in ours - stock), key=lambda s: torch.Size(s).numel(), default=())
    vision = model.config.vision_config
    n = (vision.image_size // vision.patch_size) ** 2 + 1
    return {
        "shape": list(new),
        "numbers": torch.Size(new).numel(),
        "heads_n_n": vision.num_attention_heads * n * n,
        "forms_heads_n_n": any(len(s) >= 3 and s[-1] >= n - 1 and s[-2] >= n - 1 for s in ours - stock),
    }


def attach_remove_ms(model: Any, method: str, keep: int, repeats: int = 20) -> dict[str, float]:
    """Median milliseconds of ``compress`` and of ``remove``."""
    from ..attach import compress

    on, off = [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        handle = compress(model, method, keep=keep)
        middle = time.perf_counter()
        handle.remove()
        off.append(time.perf_counter() - middle)
        on.append(middle - begin)
    return {"attach": statistics.median(on) * 1e3, "remove": statistics.median(off) * 1e3}


def import_seconds(repeats: int = 5) -> dict[str, float]:
    """Median seconds that importing vlmcompress adds in fresh processes.

    ``over_transformers``: after ``import torch, transformers``, which loads no model code; ``over_a_model_class``:
    after the class that every user of a model imports next.
    """
    code = (
        "import time, torch, transformers; {first}; begin = time.perf_counter(); import vlmcompress; "
        "print(time.perf_counter() - begin)"
    )
    before = {"over_transformers": "pass", "over_a_model_class": "from transformers import PreTrainedModel"}
    found = {}
    for name, first in before.items():
        runs = [
            float(subprocess.run([sys.executable, "-c", code.format(first=first)], capture_output=True, text=True,
                                 check=True).stdout)
            for _ in range(repeats)
        ]  # fmt: skip
        found[name] = statistics.median(runs)
    return found
