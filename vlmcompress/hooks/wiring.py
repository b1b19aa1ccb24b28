# SPDX-License-Identifier: Apache-2.0
"""The hooks of one handle on one model object: they carry each call past the stages and write the ledger."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..adapters.base import PIXELS, Adapter
from ..compat import cache_keyword, cache_of, checkpoints, named_pixels, refuse_replays
from ..ledger import VisualTokens
from ..method import Composition, Method, Stage
from .arrival import arrive
from .cache import by_modality, managed, note_lengths
from .decoder import blank_labels, dropped_columns, enter, restore_length
from .entry import check_features, choose, tokenwise, watch_projector
from .eviction import settle
from .join import join
from .layers import after_layer, before_layer, uneven, watch_parts
from .masks import check_layer_masks
from .run import RUN_KEYWORD, Run, Vision
from .takeover import check_cache
from .tower import watch_tower


class Wiring:
    """What ``compress`` puts on a model. State of a call lives in here and on the cache, per thread.

    ``last``: the ledger of the last prefill that brought an image or video, None before there was one.
    """

    def __init__(self, model: PreTrainedModel, adapter: Adapter, method: Composition, positions: str):
        self.model, self.adapter, self.method, self.positions = model, adapter, method, positions
        self.last: VisualTokens | None = None
        self._local = threading.local()
        self._tower_lock = threading.Lock()
        self._equipment = {id(m): m.equip(adapter) for m in method.methods}
        self._before = method.at(Stage.TOWER, Stage.ENTRY)
        self._asking = {kind: [m for m in self._before if kind in m.asks(adapter)] for kind in adapter.doors}
        # some methods cut inside the language model on some families only
        self._prefill = [m for m in method.at(Stage.PREFILL) if m.cut_layers(adapter)]
        self._cache = method.at(Stage.CACHE)
        self._choosers = [m for m in self._cache if type(m).attend is not Method.attend]
        self._cuts = {id(m): frozenset(m.cut_layers(adapter)) for m in self._prefill}
        self._policies = {id(m): self.policy(m, inside=True) for m in method.methods}
        self._signatures = {m: inspect.signature(m.forward) for m in (model, adapter.inner)}
        self._hooks: list[Any] = []
        self._stood_in: list[tuple[nn.Module, str, Any]] = []
        watches = self._layerwise or any(m.tower_layers(adapter) for m in self._before)
        self._reads_prompt = adapter.reads_prompt or any(self._asking.values())
        self._layer_watcher = method.name if watches else None
        inside = self._layerwise or any(m.reads_first_layer for m in self._before)
        self._evicting = method.name if inside else None

    def policy(self, method: Method, inside: bool = False) -> str:
        """Position policy of one method's cut: "original" or "contiguous"; ``inside``: between decoder layers."""
        if self.positions != "published":
            return self.positions
        if self.adapter.mrope:
            return "original"
        return (method.published_cut_positions if inside else "") or method.published_positions

    @property
    def acts_on_cache(self) -> bool:
        return bool(self._cache)

    @property
    def _layerwise(self) -> bool:
        return bool(self._prefill or self._cache)

    def install(self) -> None:
        """Put the hooks on."""

        hook = self._unless_aside

        def add(module: nn.Module, before, after=None) -> None:
            self._hooks.append(module.register_forward_pre_hook(hook(before), with_kwargs=True))
            if after is not None:
                self._hooks.append(
                    module.register_forward_hook(hook(after), with_kwargs=True, always_call=True, prepend=True)
                )

        for kind, door in self.adapter.doors.items():
            self._open_door(kind, door)
        if self._reads_prompt:
            self._note_prompts()
        add(self.model, self._before_model, self._after_model)
        add(self.adapter.inner, self._before_inner, self._after_inner)
        add(self.adapter.language_model, self._before_language_model, self._after_language_model)
        if not self._layerwise:
            return
        for index, layer in enumerate(self.adapter.decoder_layers):
            self._hooks.append(layer.register_forward_pre_hook(hook(self._before_layer(index)), with_kwargs=True))
            self._hooks.append(layer.register_forward_hook(hook(self._after_layer(index)), prepend=True))
            for method in self._prefill:
                if index in method.watch_layers(self.adapter):
                    self._hooks += watch_parts(layer, index, method, lambda: self._watching, hook)
            if self._cache:
                projection = layer.get_submodule("self_attn.q_proj")
                self._hooks.append(projection.register_forward_hook(hook(self._after_queries(index, layer))))

    def remove(self) -> None:
        """Take everything off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for owner, name, before in reversed(self._stood_in):
            if before is None:
                del owner.__dict__[name]
            else:
                owner.__dict__[name] = before
        self._stood_in.clear()

    def _stand_in(self, owner: nn.Module, name: str, function: Callable) -> None:
        """Put ``function`` in the place of a method of this one object, until :meth:`remove`."""
        self._stood_in.append((owner, name, owner.__dict__.get(name)))
        owner.__dict__[name] = _eager(function)

    @property
    def _is_aside(self) -> bool:
        return getattr(self._local, "aside", False)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """The stock model for this thread: nothing of ours acts or is written down, and no trace of a call remains."""
        inner = self.adapter.inner
        left = {name: getattr(inner, name) for name in self.adapter.remembers}
        self._local.aside = True
        try:
            yield
        finally:
            self._local.aside = False
            for name, value in left.items():
                setattr(inner, name, value)

    def _unless_aside(self, hook: Callable) -> Callable:
        def outer(*args: Any):
            return None if self._is_aside else hook(*args)

        return _eager(outer)

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
        if module is not self.model:
            raise ValueError(
                "This is a copy of the compressed model, as torch.nn.DataParallel makes for every GPU, and its hooks would "
                "act on the original; train with DistributedDataParallel (torchrun, accelerate) instead."
            )
        given = self._bound(module, args, kwargs)
        self._local.labels = self._local.items = None
        labels, items = given.get("labels"), given.get("num_items_in_batch")
        if labels is None:
            return None
        # copies: the labels of dropped visual positions are blanked, and not counted, once they are known
        self._local.labels = given["labels"] = labels.clone()
        if items is not None:
            items = torch.as_tensor(items, dtype=torch.float32, device=labels.device).clone()
            self._local.items = given["num_items_in_batch"] = items
        return (), given

    def _after_model(self, module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        self._local.labels = self._local.items = None

    def _note_prompts(self) -> None:
        """Stand in for ``generate``, which makes the image features before the forward pass that tells their prompt."""
        stock: Any = self.model.generate

        @functools.wraps(stock)
        def generate(*args: Any, **kwargs: Any):
            if self._is_aside:
                return stock(*args, **kwargs)
            given = inspect.signature(stock).bind_partial(*args, **kwargs).arguments
            given = {**given.get("kwargs", {}), "inputs": given.get("inputs")}
            self._local.prompt = self.adapter.prompt_of(given, cache_of(given))
            try:
                return stock(*args, **kwargs)
            finally:
                self._local.prompt = None

        self._stand_in(self.model, "generate", generate)

    @property
    def _prompt(self) -> dict[str, Any]:
        """What is known of the prompt while a door is open."""
        if not self._reads_prompt:
            return {}
        given = getattr(self._local, "given", None)
        if given is not None:
            return self.adapter.prompt_of(given, None)
        return getattr(self._local, "prompt", None) or {}

    @contextmanager
    def _in_tower(self) -> Iterator[None]:
        """One thread at a time: hooks of one pass must not see another thread's images."""
        with self._tower_lock:
            self._local.inside_door = True
            try:
                yield
            finally:
                self._local.inside_door = False

    def _open_door(self, kind: str, name: str) -> None:
        """Stand in for one feature method of this model object (``generate`` calls it ahead of the forward pass)."""
        inner = self.adapter.inner
        geometry = self.adapter.video_geometry if kind == "video" else self.adapter.geometry
        stock = getattr(inner, name)

        @functools.wraps(stock)
        def features(*args: Any, **kwargs: Any):
            if getattr(self._local, "inside_door", False):  # some families send videos on through the image door
                return stock(*args, **kwargs)
            if self._is_aside:
                with self._in_tower():
                    return stock(*args, **kwargs)
            given = {**inspect.signature(stock).bind_partial(*args, **kwargs).arguments}
            given.update(given.pop("kwargs", {}))
            given = {**self._prompt, **named_pixels(given, PIXELS[kind])}
            vision = Vision(geometry(given), pixel_values=self.adapter.pixels(given))
            for method in self._asking[kind]:
                with self._aside():
                    method.ask(given, given.get("input_ids"), vision.state(method), self._equipment[id(method)])
            with self._in_tower():
                try:
                    if self._before:
                        watch_tower(vision, self._before, self.adapter)
                        watch_projector(vision, self._before, self.adapter)
                    result = stock(*args, **kwargs)
                finally:
                    vision.release()
            self._visions[kind] = vision
            return result

        self._stand_in(inner, name, features)

    def _before_inner(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = self._bound(module, args, kwargs)
        self._local.run, self._local.given = None, given
        refuse_replays(self.model, self._layer_watcher)
        if self._layerwise:
            check_layer_masks(self.adapter.text_config, self.method.name)
        cache = cache_of(given)
        if cache is not None and self.adapter.brings(given):
            check_cache(cache, self._evicting)
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
        if cache_of(kwargs) is not None and checkpoints(self.adapter.language_model):
            # made ahead by some families, and left empty
            kwargs = {**kwargs, cache_keyword(self.adapter.language_model): None}
        run = self._start(embeds)
        if readers := [m for m in self._before if m.reads_first_layer]:
            arrive(run, kwargs, self.adapter, readers, self._equipment, self._local.given)
        policy = self.policy(self._before[0]) if self._before else "original"
        changed = enter(run, kwargs, self.adapter, policy, self._layerwise, self._local.given)
        if not run.frames:
            return None
        self._local.run = run
        # a decoded token that every layer treats as the stock model does passes the layers untouched
        if self._layerwise and (run.layout is not None or self._cache or uneven(run, self.adapter)):
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
                note_lengths(run.cache)
            if run.layout is not None and self._cache:
                run.cache_modality = by_modality(run.cache)
        if run.layout is not None:
            self.last = run.ledger(len(self.adapter.decoder_layers))
            labels = getattr(self._local, "labels", None)
            if labels is not None:
                blank_labels(labels, dropped_columns(run), self._local.items)
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

    def _after_queries(self, index: int, layer: nn.Module):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            run = self._run
            # an adapter (LoRA) put around the projection later has more to say than what it holds
            if run is not None and output.shape[1] == 1 and module is layer.get_submodule("self_attn.q_proj"):
                # a copy: fused rotary kernels write into what they are given
                run.projected[index] = output.detach().clone()

        return hook

    def _after_layer(self, index: int):
        prefill = [m for m in self._prefill if index in self._cuts[id(m)]]

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
