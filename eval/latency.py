# SPDX-License-Identifier: Apache-2.0
"""Clocks: interleaved, warm, medians. CUDA events on a GPU, ``perf_counter`` elsewhere."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one case over its warm runs."""

    median: float
    p10: float
    p90: float
    runs: int

    @classmethod
    def of(cls, milliseconds: list[float]) -> Timing:
        p10, median, p90 = np.percentile(milliseconds, [10, 50, 90]).tolist()
        return cls(median, p10, p90, len(milliseconds))

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def refuse_zeros(inputs: Mapping[str, object]) -> None:
    """Raise ``ValueError`` when a floating-point input is all zeros: zeros make some kernels unrealistically fast."""
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not value.any():
            raise ValueError(f"Refusing to time on all-zero inputs: '{name}' holds nothing but zeros.")


def milliseconds(run: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Time of one call, device work included."""
    if torch.device(device).type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def clock(device: torch.device | str = "cpu") -> Callable[[], float]:
    """What tells milliseconds between two moments of a run.

    With one CPU thread it is the processor time of this process, which other processes on the machine do not disturb;
    with several, and on a GPU (whose work it waits for), the time of day.
    """
    if torch.device(device).type == "cuda":

        def after_device_work() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter() * 1e3

        return after_device_work
    read = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    return lambda: read() * 1e3


def interleaved(
    cases: Mapping[str, Callable[[], float]],
    *,
    rounds: int = 10,
    warmup: int = 2,
    tick: Callable[[], None] | None = None,
) -> dict[str, list[float]]:
    """Run every case once per round and return each case's measurements.

    A case returns its own measurement (usually :func:`milliseconds`), so what it sets up is outside the clock. Each
    round starts at another case: drift of the machine meets all cases alike.
    """
    names = list(cases)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            value = cases[name]()
            if turn >= warmup:
                found[name].append(value)
            if tick is not None:
                tick()
    return found


def peak_bytes(run: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Most memory that one call holds above what was allocated before it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _Live() as mode:
        run()
    return mode.peak


class _Live(TorchDispatchMode):
    """Counts the bytes of storages that operations made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._meet((args, kwargs), counted=False)
        out = func(*args, **(kwargs or {}))
        self._meet(out, counted=True)
        return out

    def _meet(self, values: Any, *, counted: bool) -> None:
        for tensor in tree_leaves(values):
            if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
                continue
            if tensor.is_mkldnn:  # its memory belongs to oneDNN and is no storage
                held, key, size = tensor, tensor._cdata, tensor.numel() * tensor.element_size()
            else:
                held = tensor.untyped_storage()
                key, size = held._cdata, held.nbytes()
            if key in self.known:
                continue
            size *= counted
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(held, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class _Shapes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.shapes.update(tuple(t.shape) for t in tree_leaves(out) if isinstance(t, Tensor))
        return out


@contextlib.contextmanager
def tensor_shapes() -> Iterator[set[tuple[int, ...]]]:
    """Collect the shape of every tensor that an operation returns, to see what a method forms on its way."""
    with _Shapes() as mode:
        yield mode.shapes
