# SPDX-License-Identifier: Apache-2.0
"""A cache layer whose decoding steps append, and give up single entries, in place.

The stock layer copies all it holds at every token, and an eviction would copy it once more. Both are most of what a policy
costs behind a short cache.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ..dtypes import LongTensor

#: entries of room behind the last one when the storage is laid out anew
SPARE = 16


class GrowingLayer(DynamicLayer):
    """``keys`` and ``values`` [B, H_kv, n, d] are the front of storage with room for more while decoding.

    Where gradients flow, or several tokens come at once, it does what the stock layer does. Whoever replaces ``keys`` or
    ``values`` (beams, cropping, a gather) need not care: the next token finds that they are not in the storage any more.
    """

    _room: tuple[Tensor, Tensor] | None = None
    #: what ``keys`` and ``values`` were when the storage was last written
    _front: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Take in the new entries; returns all keys and values."""
        if key_states.shape[-2] != 1 or not self.is_initialized or self.keys.numel() == 0 or self._learns(key_states):
            self._room = None
            return super().update(key_states, value_states, *args, **kwargs)
        n = self.keys.shape[-2]
        if not self._settled() or self._room[0].shape[-2] <= n:  # type: ignore[index]
            self._room = (_roomy(self.keys), _roomy(self.values))
        assert self._room is not None
        keys, values = self._room
        # this runs once per layer and token: narrow takes half the time of an index
        keys.narrow(2, n, 1).copy_(key_states)
        values.narrow(2, n, 1).copy_(value_states)
        self._show(n + 1)
        return self.keys, self.values

    def _show(self, n: int) -> None:
        """Let ``keys`` and ``values`` be the first ``n`` entries of the storage."""
        keys, values = self._room  # type: ignore[misc]
        self.keys, self.values = self._front = keys.narrow(2, 0, n), values.narrow(2, 0, n)

    def without(self, gone: LongTensor) -> bool:
        """Close the gap that entry ``gone`` [B, H_kv] leaves in every head, in place; False where that cannot be done."""
        if self.keys.device.type != "cpu" or not self._settled() or self._learns(self.keys):
            return False
        n, places = self.keys.shape[-2], gone.flatten().tolist()
        assert self._room is not None
        for room in self._room:
            entry = room.shape[3] * room.element_size()
            for head, place in enumerate(places):
                start = room.data_ptr() + (head * room.shape[2] + place) * entry
                # one entry up; unlike a copy between tensors this minds the overlap
                ctypes.memmove(start, start + entry, (n - 1 - place) * entry)
        self._show(n - 1)
        return True

    def _settled(self) -> bool:
        """Whether ``keys`` and ``values`` are the front of the storage still, and it may be written to."""
        if (
            self._room is None
            or self._front is None
            or self.keys is not self._front[0]
            or self.values is not self._front[1]
        ):
            return False
        return torch.is_inference_mode_enabled() or not self._room[0].is_inference()

    def _learns(self, states: Tensor) -> bool:
        return torch.is_grad_enabled() and (states.requires_grad or self.keys.requires_grad)


def _roomy(held: Tensor) -> Tensor:
    """A copy of ``held`` [B, H, n, d] with room for more entries behind it."""
    batch, heads, n, width = held.shape
    room = held.new_empty(batch, heads, n + 1 + SPARE, width)
    room[:, :, :n] = held
    return room
