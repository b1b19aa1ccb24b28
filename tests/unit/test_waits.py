# SPDX-License-Identifier: Apache-2.0
"""How often the host would wait for a GPU, and how many operations are launched, beyond what the stock model does.

Counted on the CPU, where the same calls are made.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from models import prompts, tiny_llava
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vlmcompress

OURS = str(Path(vlmcompress.__file__).parent)
LAYERS = 6
#: what reads a tensor's values, or sends a list to the device
READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu", "numpy", "tensor")


class Waits(TorchFunctionMode):
    """Counts calls made by this library that wait for the device."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        index = args[1] if name in ("__getitem__", "__setitem__") else ()
        index = index if isinstance(index, tuple) else (index,)
        masked = any(isinstance(i, list) or (isinstance(i, torch.Tensor) and i.dtype == torch.bool) for i in index)
        caller = sys._getframe(1).f_code.co_filename
        if (name in READS or masked) and caller.startswith(OURS):
            self.seen[name, Path(caller).name] += 1
        return function(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Counts the operations that are launched, and the elements of the largest result; views are none."""

    def __init__(self):
        super().__init__()
        self.number = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.number += 1
            self.largest = max([self.largest, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
        return result


@pytest.fixture
def model():
    return tiny_llava(num_hidden_layers=LAYERS)


def inputs(*rows):
    return prompts(list(rows), 36)


@pytest.mark.parametrize(("method", "most"), [("vtc-cls", 5), ("fastv", 5), ("flowcut", 10)])
@torch.no_grad()
def test_a_prompt_waits_a_handful_of_times(model, method, most):
    with vlmcompress.compress(model, method, keep=9), Waits() as waits:
        model(**inputs([5, "image", 7], ["image", 5, 6, 7, "image", 8]))
    # the prompt's placeholders are read twice, the features are checked once, and padding makes the lengths unknown
    assert 0 < waits.seen.total() <= most, waits.seen


@torch.no_grad()
def decoded(model) -> tuple[int, Counter]:
    """Operations and waits of one decoded token."""
    cache = model(**inputs([5, "image", 7], [5, "image", 7]), use_cache=True).past_key_values
    with Waits() as waits, Operations() as operations:
        model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)
    return operations.number, waits.seen


@pytest.mark.parametrize("method", ["vtc-cls", "flowcut", "fastv"])
def test_a_decoded_token_waits_for_nothing(model, method):
    stock, _ = decoded(model)
    with vlmcompress.compress(model, method, keep=9):
        compressed, waits = decoded(model)
    assert not waits
    # books in front of the layers; in each layer storage may be laid out anew
    assert compressed <= stock + 8 + 4 * LAYERS


@torch.no_grad()
def test_a_choice_from_the_cache_copies_only_what_is_chosen(model):
    """TokenSelect keeps everything: neither the keys, nor its own copy of them, nor the values are copied for a token."""
    with vlmcompress.compress(model, "tokenselect", select=9, sinks=2, local=5, reuse=None):
        cache = model(**inputs([5, "image", 900], [5, "image", 900]), use_cache=True).past_key_values
        token = torch.tensor([[5], [6]])
        model(input_ids=token, past_key_values=cache)  # lays out room
        with Operations() as operations:
            model(input_ids=token, past_key_values=cache)
    keys = cache.layers[0].keys
    assert operations.largest < keys.numel() // 2
