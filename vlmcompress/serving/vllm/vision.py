# SPDX-License-Identifier: Apache-2.0
"""What the served families share: the tower and the projector of transformers in the places of vLLM's own, and counting."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import StageMissingLayer, WeightsMapper

from ...registry import ADAPTERS
from ..counting import TokenCounter
from ..half import vision_half
from ..settings import Settings, check_projector
from ..tokens import VisualEncoder

#: transformers 5 saves a LLaVA tower under shorter names than the checkpoints of the hub have, which vLLM wants
RESAVED = WeightsMapper(
    orig_to_new_regex={
        re.compile(r"^(model\.)?vision_tower\.(?=embeddings\.|encoder\.|pre_layrnorm\.|post_layernorm\.|head\.)"):
            "vision_tower.vision_model.",
    }
)  # fmt: skip


#: parts of a tower behind the features, which some checkpoints leave out
_BEHIND = ("post_layernorm", ".head.")


class CompressedVision(nn.Module):
    """Mixin in front of a model class of vLLM whose tower and projector have the names that transformers gives them."""

    encoder: VisualEncoder | None = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        settings = settings_of(config)
        # a server of ready-made embeddings (--limit-mm-per-prompt image=0) loads no tower
        if isinstance(next(iter(self._towers())), StageMissingLayer):
            return
        check_projector(config, settings)
        if settings is None:
            return
        half = vision_half(config)
        for name, part in _vision_parts(half).items():
            delattr(self, name)
            setattr(self, name, part)
        self.encoder = VisualEncoder(half, settings.method)

    def _towers(self) -> Iterable[nn.Module]:
        return (module for name, module in self.named_children() if name in ("vision_tower", "visual"))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        if self.encoder is None:
            return super().load_weights(weights)
        parts = _vision_parts(self.encoder.model)
        targets = {name: tensor for name, tensor in self.state_dict().items() if name.partition(".")[0] in parts}
        loaded: set[str] = set()

        def rest() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                if name.removeprefix("model.").partition(".")[0] not in parts:
                    yield name, tensor
                    continue
                if tensor.itemsize < 2:
                    raise ValueError(
                        f"The checkpoint's {name} is of {tensor.dtype}; what compresses a tower needs it unquantised "
                        "(the language model may be quantised)."
                    )
                home = _home(name.removeprefix("model."), targets)
                if home is not None:  # else a part that stock transformers does not have either
                    _copy(targets[home], tensor, home)
                    loaded.add(home)

        done = super().load_weights(rest()) | loaded
        unneeded = {name for name in targets if name not in done and any(part in name for part in _BEHIND)}
        lost = sorted(targets.keys() - done - unneeded - {name for name, _ in self.named_buffers()})
        if lost:
            raise ValueError(
                f"The checkpoint lacks {len(lost)} tensors of the tower and the projector, as {lost[0]} (or has them "
                "quantised)."
            )
        return done | unneeded


def _vision_parts(half: nn.Module) -> dict[str, nn.Module | nn.Parameter]:
    """Modules and parameters of a vision half that are not its language model, by name."""
    inner = half.model
    parts: dict[str, Any] = {name: child for name, child in inner.named_children() if name != "language_model"}
    return parts | dict(inner.named_parameters(recurse=False))


def _home(name: str, targets: dict[str, Tensor]) -> str | None:
    """The tensor of ours that ``name`` of a checkpoint stands for, whatever version of transformers has written it."""
    first, _, rest = name.partition(".")
    for candidate in (name, f"{first}.{rest.removeprefix('vision_model.')}", f"{first}.vision_model.{rest}"):
        if candidate in targets:
            return candidate
    return None


@torch.no_grad()
def _copy(target: Tensor, tensor: Tensor, name: str) -> None:
    if target.shape != tensor.shape:
        raise ValueError(f"The checkpoint's {name} has the shape {list(tensor.shape)}, and not {list(target.shape)}.")
    target.copy_(tensor)


def images_only(compressed: type, ours: type, stock: type) -> Callable[[Any], Any]:
    """What makes the dummy inputs: ``ours`` (images alone) for an info of the class ``compressed``, else ``stock``."""
    return lambda info: (ours if isinstance(info, compressed) else stock)(info)


def settings_of(config: Any) -> Settings | None:
    """The settings in a served model's configuration; None where it has none. Raises ``ValueError`` for bad ones."""
    return Settings.of(config, mrope=ADAPTERS.get(config.model_type).mrope)


def counter_of(config: Any) -> TokenCounter | None:
    """What counts the tokens of images for a model's configuration; None where nothing is compressed."""
    settings = settings_of(config)
    return None if settings is None else _counter(_Hashed(config, settings))


class _Hashed:
    """A configuration and its settings that compare by what they say."""

    def __init__(self, config: Any, settings: Settings):
        self.config, self.settings = config, settings
        self._key = (type(config), config.to_json_string(use_diff=False), settings)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and self._key == other._key


@lru_cache(maxsize=16)
def _counter(key: _Hashed) -> TokenCounter:
    return TokenCounter(key.config, key.settings.method)
