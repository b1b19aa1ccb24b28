# SPDX-License-Identifier: Apache-2.0
"""ENTRY, in sight of the whole prompt: methods that choose by the first decoder layer's attention before it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..compat import cache_of
from ..tokens import Selection
from .answers import checked_cut
from .cache import managed
from .decoder import open_frame, shifted, take_over
from .layers import prefill_view
from .precision import own_precision
from .run import Run

if TYPE_CHECKING:
    from ..adapters.base import Adapter
    from ..method import Method


@torch.no_grad()
def arrive(
    run: Run, kwargs: dict[str, Any], adapter: Adapter, methods: list[Method], equipment: Mapping[int, Any],
    given: dict[str, Any],
) -> None:  # fmt: skip
    """Let ``methods`` choose among the visual tokens of the prompt whose embeddings are in ``kwargs``.

    Fills ``run.selection`` when something leaves. ``equipment``: what each method's :meth:`Method.equip` gave, by id;
    ``given``: the arguments of the model around the language model.
    """
    if run.layout is None:
        return
    embeds, run.cache = kwargs["inputs_embeds"], cache_of(kwargs)
    attention_mask = open_frame(run, kwargs, adapter, given, "original")
    if run.cache is not None and run.cache.get_seq_length() and not managed(run.cache):
        take_over(run, adapter, attention_mask)
    shift = run.cache.layers[0].shift if managed(run.cache) else None
    embeddings = adapter.one_table(adapter.rotary(embeds, shifted(run.frame.positions, shift)))
    # the states in front of layer 0 are to it what a layer's output is to the next
    view = prefill_view(run, -1, embeds, embeds, embeddings, adapter)
    for method in methods:
        with own_precision(embeds.device):
            chosen = method.arrival(view, run.state(method), equipment.get(id(method)))
        answer = checked_cut(chosen, run.frame, method, "arrival")
        if answer is None or answer.counts == list(run.layout.n):
            continue
        mask = answer.mask[run.layout.batch_index, run.layout.column]
        run.selection = Selection.from_mask(run.layout, mask)
        run.layout.projected = run.layout.view_sizes  # it chose behind the projector
