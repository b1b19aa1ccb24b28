# SPDX-License-Identifier: Apache-2.0
"""What every decoder layer showed to the tokens of each call, read off the layers themselves while a method works.

The number of every cache entry's token is kept in the cache's own books, so it is evicted, reordered by beams and hidden
together with the entry; nothing here knows a method.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

import vlmcompress
from vlmcompress.compat import cache_of
from vlmcompress.hooks.cache import PrunableLayer, picks

BOOK = "token of the caller"


@dataclass
class Call:
    """One call of the language model on ``columns`` new tokens of the caller, behind ``offset`` others.

    ``embeds`` [R, S', D]: what entered it; ``added[l]``, of the same shape: what goes on top of layer l's output;
    ``past[l]`` [R, 1 or H_kv, offset] bool: older tokens that layer l showed, None where it showed all it had taken in.
    """

    offset: int
    columns: int
    embeds: Tensor
    added: list[Tensor]
    past: list[Tensor | None] = field(default_factory=list)


class Watch:
    """Hooks on a compressed model; ``calls`` grows with every call of its language model."""

    def __init__(self, handle: vlmcompress.Handle):
        self.calls: list[Call] = []
        self._wiring, text = handle._wiring, handle.adapter.language_model
        self._hooks = [text.register_forward_pre_hook(self._start, with_kwargs=True)]
        for index, layer in enumerate(handle.adapter.decoder_layers):
            self._hooks.append(layer.register_forward_pre_hook(self._look(index), with_kwargs=True))
            self._hooks.append(layer.self_attn.register_forward_hook(self._number(index), with_kwargs=True))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _start(self, module, args, kwargs) -> None:
        embeds, run = kwargs["inputs_embeds"], self._wiring._run
        offset = self.calls[-1].offset + self.calls[-1].columns if self.calls else 0
        columns = run.columns if run is not None else embeds.shape[1]
        self.calls.append(Call(offset, columns, embeds, self._added(kwargs, embeds)))

    def _added(self, kwargs, embeds: Tensor) -> list[Tensor]:
        """DeepStack's features, whether the model or the method's hooks will add them."""
        run = self._wiring._run
        if run is not None and run.injected is not None:
            table, rows = run.injected
            return [row[table.gather(1, run.frame.index)] for row in rows]
        found = []
        for feature in kwargs.get("deepstack_visual_embeds") or []:
            found.append(torch.zeros_like(embeds))
            found[-1][kwargs["visual_pos_masks"]] = feature
        return found

    def _store(self, kwargs, index: int) -> PrunableLayer | None:
        cache = cache_of(kwargs)
        layer = cache.layers[index] if cache is not None and index < len(cache.layers) else None
        return layer if isinstance(layer, PrunableLayer) else None

    def _look(self, index: int):
        def hook(module, args, kwargs) -> None:
            call, store = self.calls[-1], self._store(kwargs, index)
            if not call.offset or store is None:
                call.past.append(None)
                return
            book = store.books[BOOK]
            seen = torch.ones_like(book, dtype=torch.bool) if store.visible is None else store.visible
            if store.selected is not None:
                book, seen = picks(book, store.selected), picks(seen, store.selected)
            heads = max(book.shape[1], seen.shape[1])
            # what is not seen lands in a spare column
            places = torch.where(seen, book, call.offset).expand(-1, heads, -1)
            table = torch.zeros(len(book), heads, call.offset + 1, dtype=torch.bool)
            call.past.append(table.scatter(2, places, True)[..., :-1])

        return hook

    def _number(self, index: int):
        def hook(module, args, kwargs, output) -> None:
            store, run = self._store(kwargs, index), self._wiring._run
            if store is None or run is None:
                return
            new = run.frame.index + self.calls[-1].offset
            book = store.books.get(BOOK)
            if book is None:
                book = torch.full((*store.keys.shape[:1], 1, store.stored), -1)
            book = book.clone()
            book[..., store.stored - new.shape[1] :] = new[:, None]
            store.books[BOOK] = book

        return hook
