# SPDX-License-Identifier: Apache-2.0
"""Time and memory by stage: one ``generate`` per round, with marks around the modules it passes.

tower → projector → method → prefill → decoded tokens, all of one run, so that the parts are those of the whole. Marks
are CUDA events on a GPU, recorded without waiting, and ``perf_counter`` elsewhere. Weights may be random: latency does
not depend on them. Inputs are noise, never zeros.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..adapters.base import adapter_for
from ..method import Method
from .decoding import cache_bytes
from .latency import Timing, interleaved, milliseconds, peak_bytes, refuse_zeros
from .limit import watched_method
from .speed import STOCK, Tick, attached, prefill

PARTS = ("tower", "projector", "method", "prefill", "decode", "end_to_end")


class Spans:
    """Named stretches of one run, in milliseconds, in the order in which they began."""

    def __init__(self, device: torch.device | str):
        self._cuda = torch.device(device).type == "cuda"
        self._open: list[tuple[str, Any]] = []
        self._found: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self, name: str) -> None:
        self._open.append((name, self._now()))

    def end(self, only: str | None = None) -> None:
        """Close the stretch that began last; with ``only``, if that is its name."""
        if only is None or (self._open and self._open[-1][0] == only):
            name, start = self._open.pop()
            self._found[name].append((start, self._now()))

    @contextmanager
    def around(self, name: str) -> Iterator[None]:
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    @contextmanager
    def watching(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Mark every call of each module; the marks lie outside the hooks that a method has there already."""
        handles = []
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self.begin(name), prepend=True))
            handles.append(module.register_forward_hook(lambda *_: self.end()))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> dict[str, list[float]]:
        """What has been found since the last call, once the device is done."""
        if self._cuda:
            torch.cuda.synchronize()
        found = {
            name: [a.elapsed_time(b) if self._cuda else (b - a) * 1e3 for a, b in stretches]
            for name, stretches in self._found.items()
        }
        self._found.clear()
        self._open.clear()
        return found


@torch.inference_mode()
def measure(
    model: Any, inputs: Mapping[str, torch.Tensor], methods: Mapping[str, Method], *, rounds: int, new_tokens: int = 8,
    tick: Tick = lambda: None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Per case ("uncompressed" and each method): clocks of every part, peak memory and bytes of the cache.

    ``tower`` and ``projector`` have the method's hooks in them; ``method`` is what the method itself computes, wherever
    it acts, decoding included; ``prefill`` ends with the logits of the first token and holds tower and projector;
    ``decode`` is one later call of the model; ``end_to_end`` all of ``generate`` for ``new_tokens`` tokens.
    ``peak_bytes`` is what one prefill holds above the weights; ``cache_bytes`` what its keys and values take. Putting a
    method on is outside the clock.

    Raises ``ValueError`` for inputs of zeros and for fewer than two new tokens.
    """
    refuse_zeros(inputs)
    if new_tokens < 2:
        raise ValueError(f"A decoded token is timed behind the first one: new_tokens is at least 2, not {new_tokens}.")
    adapter, spans = adapter_for(model), Spans(model.device)
    modules = {"tower": adapter.tower, "projector": adapter.projector, "model": model}
    runs: dict[str, list[dict[str, float]]] = defaultdict(list)
    cases = {STOCK: None, **methods}
    memory = {name: _memory(model, inputs, method) for name, method in cases.items()}

    def case(name: str, method: Method | None) -> Callable[[], float]:
        watched = method and watched_method(method, lambda stage: spans.around("method"))

        def run() -> float:
            with attached(model, watched), spans.watching(modules):
                first = model.register_forward_hook(lambda *_: spans.end("prefill"))
                spans.begin("prefill")
                try:
                    whole = milliseconds(lambda: _generate(model, inputs, new_tokens), model.device)
                finally:
                    first.remove()
                runs[name].append(_parts(spans.take(), whole))
            return whole

        return run

    interleaved({n: case(n, m) for n, m in cases.items()}, rounds=rounds, warmup=1, tick=tick)
    table = {}
    for name, found in runs.items():
        warm = found[1:]
        clocks = {part: Timing.of([run[part] for run in warm]).as_dict() for part in PARTS}
        table[name] = {"options": methods[name].options() if name in methods else {}, "ms": clocks, **memory[name]}
    stock = runs[STOCK][1:]
    for name, row in table.items():
        pairs = list(zip(stock, runs[name][1:], strict=True))
        row["speedup"] = {
            part: statistics.median(a[part] / b[part] for a, b in pairs) for part in ("prefill", "decode", "end_to_end")
        }
    return table


def _generate(model: Any, inputs: Mapping[str, torch.Tensor], new: int) -> Any:
    return model.generate(**inputs, do_sample=False, max_new_tokens=new, min_new_tokens=new)


def _parts(found: dict[str, list[float]], whole: float) -> dict[str, float]:
    later = found["model"][1:]
    return {
        "tower": sum(found.get("tower", [])),
        "projector": sum(found.get("projector", [])),
        "method": sum(found.get("method", [])),
        "prefill": found["prefill"][0],
        "decode": statistics.median(later),
        "end_to_end": whole,
    }


def _memory(model: Any, inputs: Mapping[str, torch.Tensor], method: Method | None) -> dict[str, Any]:
    held: dict[str, Any] = {}

    def run() -> None:
        held["cache"] = prefill(model, inputs).past_key_values

    with attached(model, method) as handle:
        peak = peak_bytes(run, model.device)
        tokens = handle.report().layer_averaged_tokens if handle is not None else None
    return {"layer_average": tokens, "peak_bytes": peak, "cache_bytes": cache_bytes(held["cache"])}
