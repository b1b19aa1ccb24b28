# SPDX-License-Identifier: Apache-2.0
"""``compress`` puts a method on one model object; the :class:`Handle` it returns tells what happened and takes it off."""

from __future__ import annotations

import functools
import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from .adapters.base import PIXELS, Adapter, adapter_for
from .compat import cache_of, refuse_replays
from .hooks.cache import by_modality, check_cache, managed
from .hooks.decoder import blank_labels, dropped_columns, enter, restore_length
from .hooks.entry import check_features, choose, tokenwise, watch_projector
from .hooks.eviction import settle
from .hooks.join import join
from .hooks.layers import after_layer, before_layer, watch_parts
from .hooks.run import RUN_KEYWORD, Run, Vision
from .hooks.tower import watch_tower
from .ledger import VisualTokens
from .method import POSITIONS, Composition, Method, Stage, create
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
    if current is not None:
        if not replace:
            raise ValueError(
                f"This model is already compressed with '{current.method.name}'; call handle.remove() first or pass "
                "replace=True."
            )
        current.remove()
    return Handle(base, adapter, composition, positions)


def restore(model: nn.Module) -> Handle:
    """Compress ``model`` again as its saved configuration says (``config.vlmcompress``).

    Raises ``ValueError`` when the configuration holds no such entry.
    """
    base = _base_model(model)
    saved = getattr(base.config, "vlmcompress", None)
    if not saved:
        raise ValueError("This model's configuration has no vlmcompress entry; save it while it is compressed.")
    parts = [create(entry["method"], **entry["options"]) for entry in saved["methods"]]
    del base.config.vlmcompress
    try:
        return compress(base, Composition.of(*parts), positions=saved["positions"])
    except ValueError:
        base.config.vlmcompress = saved
        raise


def current_handle(model: Any) -> Handle | None:
    """The handle of the method that is on ``model`` now, if there is one."""
    return _base_model(model).__dict__.get(_ATTRIBUTE)


def _base_model(model: Any) -> PreTrainedModel:
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"compress takes a Hugging Face model, not {type(model).__name__}.")
    return model


class Handle:
    """One method on one model. Made by :func:`compress`."""

    def __init__(self, model: PreTrainedModel, adapter: Adapter, method: Composition, positions: str):
        self.model, self.adapter, self.method, self.positions = model, adapter, method, positions
        self._local = threading.local()
        self._tower_lock = threading.Lock()
        self._last: VisualTokens | None = None
        self._before = method.at(Stage.TOWER, Stage.ENTRY)
        # some methods cut inside the language model on some families only
        self._prefill = [m for m in method.at(Stage.PREFILL) if m.cut_layers(adapter)]
        self._cache = method.at(Stage.CACHE)
        self._choosers = [m for m in self._cache if type(m).attend is not Method.attend]
        self._cuts = {m: frozenset(m.cut_layers(adapter)) for m in self._prefill}
        self._policies = {id(m): self._policy(m, inside=True) for m in method.methods}
        self._signatures = {m: inspect.signature(m.forward) for m in (model, adapter.inner)}
        self._hooks: list[Any] = []
        model.__dict__[_ATTRIBUTE] = self
        model.config.vlmcompress = {
            "methods": [{"method": m.name, "options": m.options()} for m in method.methods],
            "positions": positions,
        }
        watches = self._layerwise or any(m.tower_layers(adapter) for m in self._before)
        self._layer_watcher = method.name if watches else None
        self._install()

    # reading ----------------------------------------------------------------------------------------------------
    @property
    def last(self) -> VisualTokens:
        """The ledger of the last prefill that brought an image. Raises ``ValueError`` before there was one."""
        if self._last is None:
            raise ValueError(
                "No visual token has passed through this model yet; run it on a prompt with an image first."
            )
        return self._last

    def report(self) -> Report:
        """Tokens, FLOPs and KV bytes of the last prefill; prints as a table. Raises ``ValueError`` before there was one."""
        return Report.from_ledger(self.model.config, self.last, dtype=self.model.dtype)

    def cache_entries(self, cache: Cache) -> list[tuple[float, float]]:
        """Entries of visual tokens and of text in ``cache``, per decoder layer: as it is now, while or after generating.

        Summed over the batch and averaged over heads. ``cache``: what the model returned. Raises ``ValueError`` for a
        cache that no method on this model has worked on.
        """
        if not managed(cache) or not self._cache:
            raise ValueError("No method that acts on the cache has worked on this one.")
        return [(float(visual.sum()), float(text.sum())) for visual, text in by_modality(cache)]

    # taking off -------------------------------------------------------------------------------------------------
    def remove(self) -> None:
        """Take everything off; the model is as before ``compress``. Raises ``ValueError`` when already removed."""
        if self.model.__dict__.get(_ATTRIBUTE) is not self:
            raise ValueError("This compression has already been removed from its model.")
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for door in self.adapter.doors.values():
            del self.adapter.inner.__dict__[door]
        if self.adapter.reads_prompt:
            del self.model.__dict__["generate"]
        del self.model.__dict__[_ATTRIBUTE]
        del self.model.config.vlmcompress

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.model.__dict__.get(_ATTRIBUTE) is self:
            self.remove()

    def __repr__(self) -> str:
        state = "on" if self.model.__dict__.get(_ATTRIBUTE) is self else "removed from"
        return f"<vlmcompress '{self.method.name}' {state} {type(self.model).__name__}>"

    # hooks ------------------------------------------------------------------------------------------------------
    def _policy(self, method: Method, inside: bool = False) -> str:
        if self.positions != "published":
            return self.positions
        if self.adapter.mrope:
            return "original"
        return (method.published_cut_positions if inside else "") or method.published_positions

    @property
    def _layerwise(self) -> bool:
        return bool(self._prefill or self._cache)

    def _install(self) -> None:
        def add(module: nn.Module, before, after=None) -> None:
            self._hooks.append(module.register_forward_pre_hook(_eager(before), with_kwargs=True))
            if after is not None:
                self._hooks.append(
                    module.register_forward_hook(_eager(after), with_kwargs=True, always_call=True, prepend=True)
                )

        for kind, door in self.adapter.doors.items():
            self._open_door(kind, door)
        if self.adapter.reads_prompt:
            self._note_prompts()
        add(self.model, self._before_model, self._after_model)
        add(self.adapter.inner, self._before_inner, self._after_inner)
        add(self.adapter.language_model, self._before_language_model, self._after_language_model)
        if not self._layerwise:
            return
        for index, layer in enumerate(self.adapter.decoder_layers):
            self._hooks.append(layer.register_forward_pre_hook(_eager(self._before_layer(index)), with_kwargs=True))
            self._hooks.append(layer.register_forward_hook(_eager(self._after_layer(index)), prepend=True))
            for method in self._prefill:
                if index in method.watch_layers(self.adapter):
                    self._hooks += watch_parts(layer, index, method, lambda: self._watching, _eager)

    @property
    def _run(self) -> Run | None:
        return getattr(self._local, "run", None)

    @property
    def _visions(self) -> dict[str, Vision]:
        """What has passed through the doors and waits for the language model, by kind."""
        return self._local.__dict__.setdefault("visions", {})

    @property
    def _watching(self) -> Run | None:
        run = self._run
        return run if run is not None and run.layout is not None and run.frames else None

    def _bound(self, module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
        """All arguments by name; ``args`` empty for the calls that generation and the outer model make."""
        if not args:
            return kwargs
        bound = self._signatures[module].bind_partial(*args, **kwargs).arguments
        return {**bound.pop("kwargs", {}), **bound}

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict):
        given = self._bound(module, args, kwargs)
        self._local.labels = None
        labels = given.get("labels")
        if labels is None:
            return None
        # a copy, in which the labels of dropped visual positions are blanked once they are known
        self._local.labels = given["labels"] = labels.clone()
        return (), given

    def _after_model(self, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        self._local.labels = None

    def _note_prompts(self) -> None:
        """Stand in for ``generate``, which makes the image features before the forward pass that tells their prompt."""
        stock: Any = self.model.generate

        @functools.wraps(stock)
        def generate(*args: Any, **kwargs: Any):
            given = inspect.signature(stock).bind_partial(*args, **kwargs).arguments
            given = {**given.get("kwargs", {}), "inputs": given.get("inputs")}
            self._local.prompt = self.adapter.prompt_of(given, cache_of(given))
            try:
                return stock(*args, **kwargs)
            finally:
                self._local.prompt = None

        self.model.__dict__["generate"] = _eager(generate)

    @property
    def _prompt(self) -> dict[str, Any]:
        """What is known of the prompt while a door is open."""
        if not self.adapter.reads_prompt:
            return {}
        given = getattr(self._local, "given", None)
        if given is not None:
            return self.adapter.prompt_of(given, None)
        return getattr(self._local, "prompt", None) or {}

    def _open_door(self, kind: str, name: str) -> None:
        """Stand in for one feature method of this model object (``generate`` calls it ahead of the forward pass)."""
        inner = self.adapter.inner
        geometry = self.adapter.video_geometry if kind == "video" else self.adapter.geometry
        stock = getattr(inner, name)

        @functools.wraps(stock)
        def features(*args: Any, **kwargs: Any):
            if getattr(self._local, "inside_door", False):  # some families send videos on through the image door
                return stock(*args, **kwargs)
            given = {**inspect.signature(stock).bind_partial(*args, **kwargs).arguments}
            given.update(given.pop("kwargs", {}))
            given = {**self._prompt, **given}
            vision = Vision(geometry(given), pixel_values=self.adapter.pixels(given))
            # hooks of one pass must not see another thread's images
            with self._tower_lock:
                self._local.inside_door = True
                try:
                    if self._before:
                        watch_tower(vision, self._before, self.adapter)
                        watch_projector(vision, self._before, self.adapter)
                    result = stock(*args, **kwargs)
                finally:
                    self._local.inside_door = False
                    vision.release()
            self._visions[kind] = vision
            return result

        inner.__dict__[name] = _eager(features)

    def _before_inner(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = self._bound(module, args, kwargs)
        self._local.run, self._local.given = None, given
        refuse_replays(self.model, self._layer_watcher)
        cache = cache_of(given)
        if cache is not None and self.adapter.brings(given):
            check_cache(cache)
        for kind, name in PIXELS.items():
            if given.get(name) is not None:
                self._visions.pop(kind, None)

    def _after_inner(self, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        self._local.run = self._local.given = None

    def _start(self, embeds: Tensor) -> Run:
        """The run of this forward pass, with what the tower has prepared for it."""
        given, parts = self._local.given, []
        for kind in self.adapter.brings(given):
            vision = self._visions.get(kind)
            if vision is None:
                raise ValueError(
                    f"The {kind} features of this call were made before the model was compressed; pass "
                    f"{PIXELS[kind]} instead."
                )
            if self._before:
                choose(vision, self._before, self.adapter)
            part = Run.of(vision, self.adapter.placeholders(given, kind))
            if part.layout is not None and part.selection is not None and tokenwise(vision, self.adapter):
                check_features(part.layout, part.selection, embeds)
            parts.append(part)
        return join(parts) if parts else Run()

    def _before_language_model(self, module: nn.Module, args: tuple, kwargs: dict):
        embeds = kwargs.get("inputs_embeds")
        if args or embeds is None or getattr(self._local, "given", None) is None:
            return None
        run = self._start(embeds)
        policy = self._policy(self._before[0]) if self._before else "original"
        changed = enter(run, kwargs, self.adapter, policy, self._layerwise, self._local.given)
        if not run.frames:
            return None
        self._local.run = run
        if self._layerwise:
            changed = {**(changed or kwargs), RUN_KEYWORD: run}
            run.inject(self.adapter.take_injected(changed))
        return None if changed is None else (args, changed)

    def _after_language_model(self, module: nn.Module, args: tuple, kwargs: dict, output):
        run = self._run
        if run is None or not run.frames or output is None:
            return None
        if managed(run.cache):
            for index, layer in enumerate(run.cache.layers):
                if index not in run.committed:
                    layer.commit(run.frame, run.columns)
            if run.layout is not None:
                settle(run, self._cache, self.adapter, self._policies)
            run.cache_lengths = [layer.stored for layer in run.cache.layers]
            if run.layout is not None and self._cache:
                run.cache_modality = by_modality(run.cache)
        if run.layout is not None:
            self._last = run.ledger(len(self.adapter.decoder_layers))
            labels = getattr(self._local, "labels", None)
            if labels is not None:
                blank_labels(labels, dropped_columns(run))
        if run.frame.index.shape[1] == run.columns and run.selection is None and len(run.frames) == 1:
            return None
        if isinstance(output, tuple):
            return (restore_length(run, output[0]), *output[1:])
        output["last_hidden_state"] = restore_length(run, output["last_hidden_state"])
        return output

    def _before_layer(self, index: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict):
            run = kwargs.get(RUN_KEYWORD)
            if run is None:
                return None
            self._local.run = run
            kwargs = {k: v for k, v in kwargs.items() if k != RUN_KEYWORD}
            hidden = args[0] if args else kwargs["hidden_states"]
            return args, before_layer(run, index, hidden, kwargs, self.adapter, self._choosers)

        return hook

    def _after_layer(self, index: int):
        prefill = [m for m in self._prefill if index in self._cuts[m]]

        def hook(module: nn.Module, args: tuple, output):
            run = self._run
            if run is None or index not in run.layer_inputs:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
            shorter = after_layer(run, index, hidden, prefill, self._cache, self.adapter, self._policies)
            if shorter is None:
                return None
            return (shorter, *output[1:]) if isinstance(output, tuple) else shorter

        return hook


def _eager(hook):
    """Keep ``torch.compile`` out of a hook: the graph breaks there and goes on behind it."""
    return torch.compiler.disable(hook, recursive=True)
