# SPDX-License-Identifier: Apache-2.0
"""Methods beside the uncompressed model on one prompt: the clock against what the FLOPs promise, and what the parts cost.

Everything is a ratio of runs that alternate in one process (:func:`~vlmcompress.eval.latency.clock` says what is told).
Weights are random, for latency does not depend on them; the pictures are noise, never zeros.
"""

from __future__ import annotations

import contextlib
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..adapters.base import adapter_for
from ..attach import compress
from ..method import Method
from .latency import Timing, clock, interleaved, refuse_zeros
from .limit import IMAGE_TOKEN, TEXT_TOKENS, cpu_shape, timed_method

STOCK = "uncompressed"
Tick = Callable[[], None]


def tiled_shape() -> Any:
    """:func:`~vlmcompress.eval.limit.cpu_shape` as a LLaVA-NeXT, whose images are a thumbnail and crops."""
    from transformers import LlavaNextConfig

    plain = cpu_shape()
    return LlavaNextConfig(
        vision_config=plain.vision_config, text_config=plain.text_config, image_token_id=IMAGE_TOKEN,
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672]],
    )  # fmt: skip


def tiled_prompt(model: Any, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One picture of noise of 2 × 2 crops (and the thumbnail) between two halves of the text."""
    generator = torch.Generator().manual_seed(0)
    side = model.config.vision_config.image_size
    cells = side // model.config.vision_config.patch_size
    tokens = cells**2 + 2 * cells * (2 * cells + 1)  # a newline behind each row of the crops
    text = torch.randint(5, IMAGE_TOKEN, (1, TEXT_TOKENS), generator=generator)
    image = torch.full((1, tokens), model.config.image_token_id)
    ids = torch.cat([text[:, : TEXT_TOKENS // 2], image, text[:, TEXT_TOKENS // 2 :]], 1).to(device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 5, 3, side, side, generator=generator).to(device, dtype),
        "image_sizes": torch.tensor([[2 * side, 2 * side]]),
    }


def prefill(model: Any, inputs: Mapping[str, torch.Tensor]) -> Any:
    """The first step of ``generate``: everything up to the logits of the last position."""
    return model(**inputs, use_cache=True, logits_to_keep=1)


@contextlib.contextmanager
def attached(model: Any, method: Method | None) -> Iterator[Any]:
    """``compress``, or the stock model for None."""
    if method is None:
        yield None
        return
    with compress(model, method) as handle:
        yield handle


@torch.inference_mode()
def compare(
    model: Any, inputs: Mapping[str, torch.Tensor], methods: Mapping[str, Method], rounds: int, tick: Tick
) -> dict[str, Any]:
    """Whole prefills (tower, projector, language model, last logits) of the stock model and of every method.

    Per method: ``speedup``, the median over the rounds of uncompressed / compressed; ``predicted``, the same ratio of
    the FLOPs (convention "full", the method's own inside); ``of_predicted``, their quotient; ``own_ms``, what the
    method computes itself at each stage, hooks around it not counted.
    """
    refuse_zeros(inputs)
    now = clock(model.device)
    reports: dict[str, Any] = {}
    own: dict[str, list[dict[str, float]]] = defaultdict(list)

    def once() -> float:
        begin = now()
        prefill(model, inputs)
        return now() - begin

    def case(name: str, method: Method | None) -> Callable[[], float]:
        def run() -> float:
            if method is None:
                return once()
            clocked, stages = timed_method(method, str(model.device))
            with compress(model, clocked) as handle:
                spent = once()
                reports[name] = handle.report()
            own[name].append({stage: sum(calls) for stage, calls in stages.items() if calls})
            return spent

        return run

    cases = {STOCK: case(STOCK, None)} | {name: case(name, method) for name, method in methods.items()}
    found = interleaved(cases, rounds=rounds, warmup=1, tick=tick)
    table = {}
    for name, method in methods.items():
        report, speedup = reports[name], _paired(found[STOCK], found[name])
        predicted = report.flops_before["full"] / report.flops["full"]
        table[name] = {
            "options": method.options(),
            "tokens_in": report.tokens,
            "tokens_out": report.layer_tokens[-1],
            "layer_average": report.layer_averaged_tokens,
            "prefill_ms": Timing.of(found[name]).as_dict(),
            "speedup": speedup,
            "predicted": predicted,
            "of_predicted": speedup / predicted,
            "own_ms": {s: statistics.median(run[s] for run in own[name][1:]) for s in own[name][0]},
        }
    return {STOCK: {"prefill_ms": Timing.of(found[STOCK]).as_dict()}, "methods": table}


def _paired(above: list[float], below: list[float]) -> float:
    """Median of the ratios of each round: a busy second hits both."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


class _Gaps:
    """Milliseconds that each decoder layer spends outside attention and feed-forward block.

    Stock, that is adding residuals and norms; compressed, also all that a method and its hooks do there: watching,
    scoring, cutting, and masks and positions for the shorter sequence.
    """

    def __init__(self, model: Any):
        self.now, self.spent, self._since = clock(model.device), defaultdict(float), 0.0
        adapter = adapter_for(model)
        layers, norm = adapter.decoder_layers, adapter.language_model.norm
        self._handles = []
        for index, layer in enumerate(layers):
            following = layers[index + 1].self_attn if index + 1 < len(layers) else norm
            for start, end in ((layer.self_attn, layer.mlp), (layer.mlp, following)):
                self._between(index, start, end)

    def _between(self, index: int, start: nn.Module, end: nn.Module) -> None:
        def begin(*_: Any) -> None:
            self._since = self.now()

        def finish(*_: Any) -> None:
            self.spent[index] += self.now() - self._since

        self._handles += [start.register_forward_hook(begin), end.register_forward_pre_hook(finish)]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@torch.inference_mode()
def cut_cost(
    model: Any, inputs: Mapping[str, torch.Tensor], methods: Mapping[str, Method], rounds: int, tick: Tick
) -> dict[str, Any]:
    """What one cut between decoder layers costs, as a share of the uncompressed whole prefill of the same round.

    That is the time a compressed prefill spends between its blocks, less what the stock model spends there on as many
    tokens, divided by the number of cuts.
    """
    gaps, layers = _Gaps(model), len(adapter_for(model).decoder_layers)
    text = int((inputs["input_ids"] != model.config.image_token_id).sum())
    spent: dict[str, list[list[float]]] = defaultdict(list)
    reports: dict[str, Any] = {}

    def case(name: str, method: Method | None) -> Callable[[], float]:
        def run() -> float:
            gaps.spent.clear()
            with attached(model, method) as handle:
                begin = gaps.now()
                prefill(model, inputs)
                whole = gaps.now() - begin
                if handle is not None:
                    reports[name] = handle.report()
            spent[name].append([gaps.spent[layer] for layer in range(layers)])
            return whole

        return run

    try:
        cases = {STOCK: case(STOCK, None)} | {name: case(name, method) for name, method in methods.items()}
        found = interleaved(cases, rounds=rounds, warmup=1, tick=tick)
    finally:
        gaps.remove()
    table = {}
    for name, report in reports.items():
        tokens = report.layer_tokens
        cuts = sum(a != b for a, b in pairwise(tokens))
        share = [(n + text) / (report.tokens_before + text) for n in tokens]
        shares, costs = [], []
        for ours, stock, whole in zip(spent[name][1:], spent[STOCK][1:], found[STOCK], strict=True):
            extra = sum(a - b * s for a, b, s in zip(ours, stock, share, strict=True)) / max(cuts, 1)
            costs.append(extra)
            shares.append(extra / whole)
        table[name] = {"cuts": cuts, "ms_per_cut": statistics.median(costs), "of_prefill": statistics.median(shares)}
    return table


@torch.inference_mode()
def tower_cost(
    model: Any, pixels: torch.Tensor, methods: Mapping[str, Method], rounds: int, tick: Tick
) -> dict[str, Any]:
    """Vision tower with a method's hooks in it against the stock tower: median ratio of the rounds."""
    spent: list[float] = []
    now = clock(model.device)

    def timed(*_: Any) -> None:
        spent.append(now())

    tower = adapter_for(model).tower
    handles = [tower.register_forward_pre_hook(timed), tower.register_forward_hook(timed)]

    def case(method: Method | None) -> Callable[[], float]:
        def run() -> float:
            spent.clear()
            with attached(model, method):
                model.model.get_image_features(pixel_values=pixels)
            return spent[1] - spent[0]

        return run

    try:
        cases = {STOCK: case(None)} | {name: case(method) for name, method in methods.items()}
        found = interleaved(cases, rounds=rounds, warmup=1, tick=tick)
    finally:
        for handle in handles:
            handle.remove()
    table: dict[str, Any] = {STOCK: {"tower_ms": Timing.of(found[STOCK]).as_dict()}}
    for name, method in methods.items():
        table[name] = {
            "options": method.options(),
            "tower_ms": Timing.of(found[name]).as_dict(),
            "over_stock": _paired(found[name], found[STOCK]),
        }
    return table
