# SPDX-License-Identifier: Apache-2.0
"""What a method costs on a model of true size, without its weights.

Three parts are put together:

* the real modules on torch's meta device under ``FlopCounterMode``: tower, projector, every decoder layer at the number
  of tokens that it processes, lm_head and one decoded token;
* the ledger of a narrow twin (`narrow.py`) with the method attached, for the tokens that are left at every layer, and
  for the compressor's own cost;
* the formula of `flops.py` for vision layers that a TOWER method has shortened, which the meta device cannot run
  alone. The formula must meet the count on the unshortened tower within 1 %, or nothing is printed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from ..adapters.base import Adapter, adapter_for
from ..attach import compress
from ..hooks.decoder import cache_keyword
from ..ledger import VisualTokens
from . import flops as formula
from . import narrow, profiles, synthetic

#: how far the formula may be from the count of the real modules
TOLERANCE = 0.01


@dataclass(frozen=True)
class StageCount:
    """Floating-point operations by stage and bytes of the cache, for one picture and ``text_tokens`` of text.

    ``decoder[l]``: decoder layer l of the prefill; ``lm_head``: at one position; ``decode_step``: one further token,
    its lm_head inside; ``kv_bytes[l]``: keys and values of layer l behind the prefill; ``visual_tokens[l]``: visual
    tokens that layer l processed.
    """

    tower: float
    projector: float
    compressor: float
    decoder: tuple[float, ...]
    lm_head: float
    decode_step: float
    kv_bytes: tuple[float, ...]
    visual_tokens: tuple[int, ...]
    macs: float
    flops: float

    @property
    def full(self) -> float:
        """Everything that one prefill multiplies."""
        return self.tower + self.projector + self.compressor + sum(self.decoder) + self.lm_head

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"full": self.full}


@dataclass(frozen=True)
class TrueSizeCount:
    """The uncompressed model beside the compressed one. ``parameters``: of the model; ``varies``: whether how many
    tokens stay depends on the picture and not only on its size, so that these numbers are those of a noise picture."""

    parameters: int
    text_tokens: int
    uncompressed: StageCount
    compressed: StageCount
    varies: bool


def count(
    config: Any,
    method: str,
    options: dict[str, Any],
    *,
    image: tuple[int, int] = (672, 672),
    text_tokens: int = 60,
    bytes_per_number: float = 2,
) -> TrueSizeCount:
    """Count ``method`` with ``options`` on the architecture ``config`` for one picture of ``image`` (height, width).

    Raises ``ValueError`` for a family, method or option that does not work, and when formula and count disagree.
    """
    shape = formula.ModelShape.from_config(config)
    model = _on_meta(config)
    ledgers = [_ledger(config, step, method, options, image, text_tokens) for step in narrow.STEPS]
    ledger = ledgers[0]
    own = narrow.compressor_flops([it.compressor_flops for it in ledgers], narrow.STEPS, narrow.factor(config))
    (after,), (before,) = profiles.compressed(shape, ledger), profiles.uncompressed(shape, ledger)
    tower, projector = _vision(model, image)
    text = _TextCounter(adapter_for(model))
    native = formula.full_count(shape, before)
    _agree("vision tower and projector", native.tower + native.projector, tower + projector)

    def stages(profile: formula.Profile, entries: list[float], compressor: float) -> StageCount:
        profile = replace(profile, compressor=compressor)
        counted = formula.full_count(shape, profile)
        return StageCount(
            tower=tower if profile.tower == before.tower else counted.tower,
            projector=projector if profile.projected == before.projected else counted.projector,
            compressor=compressor,
            decoder=tuple(text.layer(i, int(n + profile.text)) for i, n in enumerate(profile.visual)),
            lm_head=text.lm_head(),
            decode_step=sum(text.decode_layer(i, int(n)) for i, n in enumerate(entries)) + text.lm_head(),
            kv_bytes=tuple(n * formula.kv_numbers(config.get_text_config()) * bytes_per_number for n in entries),
            visual_tokens=tuple(int(n) for n in profile.visual),
            macs=formula.macs(shape, profile),
            flops=formula.flops(shape, profile),
        )

    full_entries = [n + before.text for n in before.visual]
    return TrueSizeCount(
        parameters=sum(p.numel() for p in model.parameters()),
        text_tokens=int(before.text),
        uncompressed=stages(before, full_entries, 0.0),
        compressed=stages(after, profiles.cache_entries(ledger)[0], own),
        varies=len({(tuple(it.layer_tokens), tuple(it.tower_tokens)) for it in ledgers}) > 1,
    )


def _on_meta(config: Any) -> Any:
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config).eval()


@torch.no_grad()
def _ledger(
    config: Any, step: int, method: str, options: dict[str, Any], image: tuple[int, int], text_tokens: int
) -> VisualTokens:
    """The ledger of one prefill of the twin."""
    from transformers import AutoModelForImageTextToText

    with torch.random.fork_rng():
        torch.manual_seed(step)
        twin = AutoModelForImageTextToText.from_config(narrow.narrow(config, step), dtype=torch.float32).eval()
    with compress(twin, method, **options) as handle:
        twin(**synthetic.prompt(twin, image, text_tokens), logits_to_keep=1, use_cache=True)
        assert handle.last is not None
        return handle.last


@torch.no_grad()
def _vision(model: Any, image: tuple[int, int]) -> tuple[float, float]:
    """FLOPs of the real tower and of the real projectors."""
    given = synthetic.pixels(model.config, image)
    door = {k: v.to("meta") if v.is_floating_point() else v for k, v in given.items()}
    door |= synthetic.packed_arguments(model.config, given)
    adapter = adapter_for(model)
    projectors = [adapter.projector, *adapter.side_projectors]
    with FlopCounterMode(display=False) as counter, _metered(projectors, counter) as spent:
        model.model.get_image_features(**door)
    return counter.get_total_flops() - sum(spent), sum(spent)


class _TextCounter:
    """Counts the real decoder layers on the meta device, each number of tokens once."""

    def __init__(self, adapter: Adapter):
        self.adapter = adapter
        self.prefills: dict[int, list[float]] = {}
        self.steps: dict[int, list[float]] = {}

    def layer(self, index: int, tokens: int) -> float:
        """Decoder layer ``index`` on a prompt of ``tokens`` tokens."""
        if tokens not in self.prefills:
            self.prefills[tokens] = self._run(tokens, self._cache())
        return self.prefills[tokens][index]

    def decode_layer(self, index: int, entries: int) -> float:
        """Decoder layer ``index`` on one token behind a cache of ``entries`` entries."""
        if entries not in self.steps:
            cache = self._cache()
            self._run(entries, cache)
            self.steps[entries] = self._run(1, cache)
        return self.steps[entries][index]

    def lm_head(self) -> float:
        with FlopCounterMode(display=False) as counter:
            self.adapter.model.lm_head(self._hidden(1))
        return counter.get_total_flops()

    def _run(self, tokens: int, cache: DynamicCache) -> list[float]:
        module = self.adapter.language_model
        with FlopCounterMode(display=False) as counter, _metered(self.adapter.decoder_layers, counter) as spent:
            module(inputs_embeds=self._hidden(tokens), use_cache=True, **{cache_keyword(module): cache})
        return spent

    def _cache(self) -> DynamicCache:
        return DynamicCache(config=self.adapter.text_config)

    def _hidden(self, tokens: int) -> torch.Tensor:
        return torch.empty(
            1, tokens, self.adapter.text_config.hidden_size, device="meta", dtype=self.adapter.model.dtype
        )


def _agree(part: str, computed: float, counted: float) -> None:
    if abs(computed - counted) > TOLERANCE * counted:
        raise ValueError(
            f"The formula puts the {part} at {computed / 1e9:,.1f} GFLOPs and its real modules at "
            f"{counted / 1e9:,.1f}; a count that is off by more than {TOLERANCE:.0%} is not shown."
        )


@contextmanager
def _metered(modules: Any, counter: FlopCounterMode) -> Iterator[list[float]]:
    """What each call of each module adds to the counter."""
    spent: list[float] = []
    begun: list[float] = []
    handles = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(lambda *_: begun.append(counter.get_total_flops())))
        handles.append(module.register_forward_hook(lambda *_: spent.append(counter.get_total_flops() - begun.pop())))
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()
