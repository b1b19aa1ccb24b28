# SPDX-License-Identifier: Apache-2.0
"""``compress`` puts a method on one model object; the :class:`Handle` it returns tells what happened and takes it off."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from .adapters.base import Adapter, adapter_for
from .hooks.cache import by_modality, managed
from .hooks.wiring import Wiring
from .ledger import VisualTokens
from .method import POSITIONS, Composition, Method, create
from .projectors import check_loaded
from .report import Report

_ATTRIBUTE = "_vlmcompress_handle"


def compress(
    model: nn.Module,
    method: str | Method | Composition,
    *,
    positions: str = "published",
    replace: bool = False,
    **options: Any,
) -> Handle:
    """Make a stock Hugging Face vision-language model keep fewer visual tokens, in place.

    Image encoders without a language model (CLIP and SigLIP of transformers, open_clip, vision transformers of timm) take
    the methods that act in the tower; their handle is an :class:`vlmcompress.towers.EncoderHandle`.

    Logits keep the caller's sequence length; hidden states and attentions that a call asks for have the lengths that its
    layers worked on.

    Args:
        model: a stock model of a supported family (a PEFT wrapper around one is fine).
        method: a registered name (see ``vlmcompress.methods()``), a method instance, or methods joined with ``+``.
        positions: position ids of the survivors: "published" (what the method's released code does; M-RoPE models keep
            theirs), "original" or "contiguous".
        replace: take off the method that is on the model now instead of raising.
        **options: the method's hyper-parameters when it is given by name, ``keep`` above all: an int is visual tokens
            per image or video, a float in (0, 1] a share of them.

    Returns:
        A handle: ``handle.last``, ``handle.report()``, ``handle.remove()``; usable in a ``with`` statement.

    Raises:
        ValueError: unknown method or option, impossible budget, unsupported model or pair, model already compressed.
            The model is then exactly as it was.
    """
    composition = create(method, **options)
    if positions not in POSITIONS:
        raise ValueError(f"positions is one of {', '.join(POSITIONS)}, not {positions!r}.")
    base = _base_model(model)
    adapter = adapter_for(base)
    check_loaded(base)
    for part in composition.methods:
        adapter.check_method(part)
        part.check_family(adapter)
    current = current_handle(base)
    if current is not None and not replace:
        raise ValueError(
            f"This model is already compressed with '{current.method.name}'; call handle.remove() first or pass "
            "replace=True."
        )
    kind = Handle
    if adapter.joins_views:
        from .towers import EncoderHandle

        kind = EncoderHandle
    # a method may still refuse while its handle is made, so the one that is on the model stays until then
    handle = kind(base, adapter, composition, positions)
    if current is not None:
        current.remove()
    handle._put_on()
    return handle


def restore(model: nn.Module) -> Handle:
    """Compress ``model`` again as its saved configuration says (``config.vlmcompress``).

    Raises ``ValueError`` when the configuration holds no such entry.
    """
    base = _base_model(model)
    saved = getattr(getattr(base, "config", None), "vlmcompress", None)
    if not saved:
        raise ValueError("This model's configuration has no vlmcompress entry; save it while it is compressed.")
    try:
        parts = [(entry["method"], dict(entry["options"])) for entry in saved["methods"]]
        positions = saved["positions"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            "This configuration's vlmcompress entry was not written by save_pretrained of a compressed model; call "
            "compress with the method and its options."
        ) from None
    composition = Composition.of(*(create(name, **options) for name, options in parts))
    del base.config.vlmcompress
    try:
        return compress(base, composition, positions=positions)
    except ValueError:
        base.config.vlmcompress = saved
        raise


def current_handle(model: Any) -> Handle | None:
    """The handle of the method that is on ``model`` now, if there is one."""
    return _base_model(model).__dict__.get(_ATTRIBUTE)


def _base_model(model: Any) -> Any:
    if isinstance(model, nn.Module):
        model = model._modules.get("_orig_mod", model)  # what torch.compile wraps
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, nn.Module):
        raise ValueError(f"compress takes a model, not {type(model).__name__}.")
    return model


def _saved(method: Method) -> dict[str, Any]:
    """``method`` as a configuration holds it."""
    found = {"method": method.name, "options": method.options()}
    try:
        json.dumps(found)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The options of '{method.name or type(method).__name__}' cannot be saved in the model's configuration ({error}); "
            "leave out in its options() what is no JSON."
        ) from error
    return found


def _refuse_copies(protocol: Any) -> Any:
    raise ValueError(
        "A compressed model cannot be copied or pickled; call handle.remove() first, or save_pretrained and then "
        "vlmcompress.restore on what was loaded."
    )


def _forget_compiled() -> None:
    """Let ``torch.compile`` start anew: code compiled earlier does not notice that hooks have come or gone."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


class Handle:
    """One method on one model. Made by :func:`compress`."""

    def __init__(self, model: Any, adapter: Adapter, method: Composition, positions: str):
        self.model, self.adapter, self.method, self.positions = model, adapter, method, positions
        self._wiring = self._wire()
        self._entry = {"methods": [_saved(m) for m in method.methods], "positions": positions}
        self._entry_before: Any = None

    def _put_on(self) -> None:
        self.model.__dict__[_ATTRIBUTE] = self
        # looked up on the object, before a copy is begun whose hooks would go on acting on this model
        self.model.__dict__["__reduce_ex__"] = _refuse_copies
        if isinstance(self.model, PreTrainedModel):
            self._entry_before = getattr(self.model.config, "vlmcompress", None)
            self.model.config.vlmcompress = self._entry
        self._wiring.install()
        _forget_compiled()

    def _wire(self) -> Any:
        """The hooks of this handle, not yet put on."""
        return Wiring(self.model, self.adapter, self.method, self.positions)

    # reading ----------------------------------------------------------------------------------------------------
    @property
    def last(self) -> VisualTokens:
        """The ledger of the last prefill that brought an image. Raises ``ValueError`` before there was one."""
        if self._wiring.last is None:
            raise ValueError(
                "No visual token has passed through this model yet; run it on a prompt with an image first."
            )
        return self._wiring.last

    def report(self) -> Report:
        """Tokens, FLOPs and KV bytes of the last prefill; prints as a table. Raises ``ValueError`` before there was one."""
        return Report.from_ledger(self.model.config, self.last, dtype=self.model.dtype)

    def cache_entries(self, cache: Cache) -> list[tuple[float, float]]:
        """Entries of visual tokens and of text in ``cache``, per decoder layer: as it is now, while or after generating.

        Summed over the batch and averaged over heads. ``cache``: what the model returned. Raises ``ValueError`` for a
        cache that no method on this model has worked on.
        """
        if not managed(cache) or not self._wiring.acts_on_cache:
            raise ValueError("No method that acts on the cache has worked on this one.")
        return [(float(visual.sum()), float(text.sum())) for visual, text in by_modality(cache)]

    # taking off -------------------------------------------------------------------------------------------------
    def remove(self) -> None:
        """Take everything off; the model is as before ``compress``. Raises ``ValueError`` when already removed."""
        if self.model.__dict__.get(_ATTRIBUTE) is not self:
            raise ValueError("This compression has already been removed from its model.")
        self._wiring.remove()
        _forget_compiled()
        del self.model.__dict__[_ATTRIBUTE], self.model.__dict__["__reduce_ex__"]
        config: Any = getattr(self.model, "config", None)
        if getattr(config, "vlmcompress", None) is self._entry:  # models may share one configuration
            del config.vlmcompress
            if self._entry_before:
                config.vlmcompress = self._entry_before
        self._entry.clear()  # another handle that found it there shall not put it back

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.model.__dict__.get(_ATTRIBUTE) is self:
            self.remove()

    def __repr__(self) -> str:
        state = "on" if self.model.__dict__.get(_ATTRIBUTE) is self else "removed from"
        return f"<vlmcompress '{self.method.name}' {state} {type(self.model).__name__}>"
