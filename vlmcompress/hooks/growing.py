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


class Room:
    """Storage of a tensor [B, H, n, ...] with room behind its last entry, written to in place.

    Whoever replaces the tensor that :meth:`append` returned need not care: the next entry finds that it is not the front of
    the storage any more, and all is laid out anew.
    """

    storage: Tensor | None = None
    #: the first entries, as they were given out last
    front: Tensor | None = None

    def append(self, held: Tensor, entry: Tensor) -> Tensor:
        """``held`` and behind it one ``entry`` [B, H, 1, ...]."""
        n = held.shape[2]
        if not self.holds(held) or self.storage.shape[2] <= n:  # type: ignore[union-attr]
            self.storage = held.new_empty(*held.shape[:2], n + 1 + SPARE, *held.shape[3:])
            self.storage.narrow(2, 0, n).copy_(held)
        assert self.storage is not None
        # this runs once per layer and token: narrow takes half the time of an index
        self.storage.narrow(2, n, 1).copy_(entry)
        return self.first(n + 1)

    def first(self, n: int) -> Tensor:
        """The first ``n`` entries."""
        assert self.storage is not None
        self.front = self.storage.narrow(2, 0, n)
        return self.front

    def holds(self, held: Tensor) -> bool:
        """Whether ``held`` is the front of the storage still, and it may be written to."""
        if self.storage is None or held is not self.front:
            return False
        return torch.is_inference_mode_enabled() or not self.storage.is_inference()


class GrowingLayer(DynamicLayer):
    """``keys`` and ``values`` [B, H_kv, n, d] are the front of storage with room for more while decoding.

    Where gradients flow, or several tokens come at once, it does what the stock layer does.
    """

    #: of keys and values
    _rooms: tuple[Room, Room] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Take in the new entries; returns all keys and values."""
        if key_states.shape[-2] != 1 or not self.is_initialized or self.keys.numel() == 0 or self._learns(key_states):
            self._rooms = None
            return super().update(key_states, value_states, *args, **kwargs)
        if self._rooms is None:
            self._rooms = Room(), Room()
        keys, values = self._rooms
        self.keys, self.values = keys.append(self.keys, key_states), values.append(self.values, value_states)
        return self.keys, self.values

    def without(self, gone: LongTensor) -> bool:
        """Close the gap that entry ``gone`` [B, H_kv] leaves in every head, in place; False where that cannot be done."""
        if self.keys.device.type != "cpu" or self._rooms is None or self._learns(self.keys):
            return False
        keys, values = self._rooms
        if not keys.holds(self.keys) or not values.holds(self.values):
            return False
        n, places = self.keys.shape[-2], gone.flatten().tolist()
        for room in self._rooms:
            storage = room.storage
            assert storage is not None
            entry = storage.shape[3] * storage.element_size()
            for head, place in enumerate(places):
                start = storage.data_ptr() + (head * storage.shape[2] + place) * entry
                # one entry up; unlike a copy between tensors this minds the overlap
                ctypes.memmove(start, start + entry, (n - 1 - place) * entry)
        self.keys, self.values = keys.first(n - 1), values.first(n - 1)
        return True

    def _learns(self, states: Tensor) -> bool:
        return torch.is_grad_enabled() and (states.requires_grad or self.keys.requires_grad)
