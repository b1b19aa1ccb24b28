# SPDX-License-Identifier: Apache-2.0
"""State of one forward pass, from the caller's arguments to the ledger."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..dtypes import LongTensor
from ..ledger import VisualTokens
from ..ops.places import on_device
from ..tokens import Frame, Layout, Selection

if TYPE_CHECKING:
    from ..method import Method

#: keyword under which a run travels through the decoder's layers, so that a re-run of a layer finds its own run
RUN_KEYWORD = "vlmcompress_run"


@dataclass
class TowerState:
    """What the tower's hooks know: which original cell every present patch stands for."""

    ids: LongTensor  # [V, n]
    cells: int  # N
    valid: Tensor | None = None  # [V, n]
    owner: LongTensor | None = None  # [V, N] place of every original cell among the present ones, -1 dropped
    bias: Tensor | None = None  # [V, n] added to attention logits per key
    edited: bool = False
    tokens: list[int] = field(default_factory=list)
    view_tokens: list[LongTensor | None] = field(default_factory=list)  # per layer [V]; None: all views alike
    view_pairs: list[LongTensor] = field(default_factory=list)  # packed towers: per layer [V] pairs of query and key
    group: int = 1  # patches that the projector joins to a token; ids are then patches, group · token + place in it
    sizes: list[int] = field(default_factory=list)  # [V] patches of each view before anything was dropped
    newlines: bool = True  # whether newlines of rows with a kept token stay
    leading: bool = False  # whether tokens stand in their image's first places instead of their own
    flat: bool = False  # whether views follow each other in the tower's order, without newlines
    #: towers in raster order whose patches are joined: place in the raster of patch group · token + place in it, [N · group]
    raster: LongTensor | None = None
    on_grid: bool = False  # whether the patches stand in the full raster again
    window: LongTensor | None = None  # [V, N] attention window of every cell, where the tower has windows
    order: LongTensor | None = None  # [S] row of ours at each place of the tower's pack, see packed.order_of
    full_order: LongTensor | None = None  # the same before anything was dropped
    views: list[int] = field(default_factory=list)  # sequences that each vision layer took
    frames: int | None = None  # views of each video that follow each other; None where views are images
    alive: Tensor | None = None  # [V] views that are no padding of a shorter video
    view: LongTensor | None = None  # [V, n] view that every present patch comes from, once views were joined


@dataclass
class Vision:
    """One pass through the vision tower and the projector, which may happen before the language model's prompt is known.

    ``layout`` is not placed yet; ``features`` [V, n, C] are the projector's input rows, ``unpooled`` [V, patches, C] its
    output where the model pools that and a method asks for it.
    """

    layout: Layout
    pixel_values: Tensor | None = None
    tower: TowerState | None = None
    features: Tensor | None = None
    unpooled: Tensor | None = None
    project: Callable[[Tensor], Tensor] | None = None  # what makes tokens of such rows, while the projector runs
    selection: Selection | None = None
    selected: bool = False
    states: dict[int, dict] = field(default_factory=lambda: defaultdict(dict))
    handles: list[Any] = field(default_factory=list)

    def state(self, method: Method) -> dict:
        """The dict that ``method`` owns during one forward pass, from the tower to the cache.

        Two keys have a meaning for everybody: ``"scores"`` [I, n_max], the ranking shown in heat maps, and ``"flops"``,
        the floating-point operations that the method itself has added.
        """
        return self.states[id(method)]

    def release(self) -> None:
        """Take off the hooks that live for this pass only."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


@dataclass
class Run:
    """One forward pass of the language model.

    ``layout`` (placed) is None when the pass brings no new image; ``tower``: what the tower's hooks counted.
    ``chunk_valid`` [B, S]: real tokens of the caller's chunk, None for all.
    """

    layout: Layout | None = None
    selection: Selection | None = None
    states: dict[int, dict] = field(default_factory=lambda: defaultdict(dict))
    frames: list[Frame] = field(default_factory=list)
    columns: int = 0
    chunk_valid: Tensor | None = None
    base_positions: LongTensor | None = None
    entry_positions: LongTensor | None = None
    cache: Any = None
    #: vectors that methods put in the place of tokens behind the projector: batch row and column [T], vectors [T, D]
    replaced: list[tuple[LongTensor, LongTensor, Tensor]] = field(default_factory=list)
    tower: TowerState | None = None
    prepared: dict = field(default_factory=dict)
    committed: set[int] = field(default_factory=set)
    #: layers whose cache has given up entries during this pass
    evicted: set[int] = field(default_factory=set)
    layer_inputs: dict[int, tuple] = field(default_factory=dict)
    #: [B, 1, H · d] a decoded token as the query projection of each decoder layer left it
    projected: dict[int, Tensor] = field(default_factory=dict)
    cache_lengths: list[int] | None = None
    cache_modality: list[tuple[Tensor, Tensor]] | None = None
    #: what is added to visual tokens behind the first decoder layers: row of each column [B, S] and per layer the rows
    injected: tuple[LongTensor, list[Tensor]] | None = None

    @classmethod
    def of(cls, vision: Vision, placeholders: Tensor) -> Run:
        """The run of a prompt with images, or with videos, that the tower has seen."""
        layout = vision.layout.placed(placeholders)
        if vision.selection is None:
            return cls(layout, states=vision.states, tower=vision.tower)
        selection = vision.selection.of(layout.source)
        run = cls(layout, selection, vision.states, tower=vision.tower)
        if vision.selection.features is not None:
            features = vision.selection.features[on_device(layout.source, selection.keep.device)]
            # newlines keep the model's own embedding: no patch made them
            real = selection.real & (layout.cell.gather(1, selection.keep) >= 0)
            rows = layout.batch_index.expand_as(selection.keep)[real]
            run.replaced.append((rows, layout.column.gather(1, selection.keep)[real], features[real]))
        return run

    @property
    def frame(self) -> Frame:
        return self.frames[-1]

    def inject(self, taken: tuple[Tensor, list[Tensor]] | None) -> None:
        """Keep what an adapter took from the arguments of a call on the first frame."""
        if taken is None:
            return
        mask, features = taken
        # tokens without a feature take the row of zeros behind the last one
        number = (mask.flatten().cumsum(0) - 1).view_as(mask).masked_fill(~mask, -1)
        table = torch.full((len(mask), self.columns), -1, dtype=torch.long, device=mask.device)
        rows = [torch.nn.functional.pad(feature, (0, 0, 0, 1)) for feature in features]
        self.injected = table.scatter(1, self.frame.index, number), rows

    def with_injected(self, index: int, hidden: Tensor) -> Tensor | None:
        """Output [B, S_f, D] of decoder layer ``index`` with what is added behind it; None where nothing is."""
        if self.injected is None or index >= len(self.injected[1]):
            return None
        table, rows = self.injected
        return hidden + rows[index].to(hidden)[table.gather(1, self.frame.index)]

    def state(self, method: Method) -> dict:
        """See :meth:`Vision.state`."""
        return self.states[id(method)]

    def ledger(self, n_layers: int) -> VisualTokens:
        assert self.layout is not None
        states = self.states.values()
        return VisualTokens(
            layout=self.layout,
            n_layers=n_layers,
            frames=self.frames,
            selection=self.selection,
            scores=next((s["scores"] for s in states if s.get("scores") is not None), None),
            tower_tokens=self.tower.tokens if self.tower else [],
            tower_views=self.tower.view_tokens if self.tower else [],
            tower_pairs=self.tower.view_pairs if self.tower else [],
            positions=self.entry_positions,
            compressor_flops=int(sum(s.get("flops", 0) for s in states)),
            cache_lengths=self.cache_lengths,
            cache_modality=self.cache_modality,
        )


def chunk_of(attention_mask: Tensor | None, columns: int) -> Tensor | None:
    """[B, columns] bool: the caller's mask for the new tokens; None where the caller gave none."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        raise ValueError(
            "A compressed model needs the usual 2-D attention_mask [batch, tokens] (or none): "
            "a ready-made 4-D or block mask cannot follow tokens that leave."
        )
    if attention_mask.shape[1] < columns:
        raise ValueError(f"The attention_mask covers {attention_mask.shape[1]} of the {columns} tokens of this call.")
    return attention_mask[:, attention_mask.shape[1] - columns :].bool()
