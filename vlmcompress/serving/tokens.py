# SPDX-License-Identifier: Apache-2.0
"""The compressed visual tokens of images, from a model's vision tower, a method and the projector; no language model runs.

The tower's and the projector's hooks are those of :func:`vlmcompress.compress`, so a served token is the one that the
compressed Hugging Face model would have fed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..adapters.base import adapter_for
from ..hooks.entry import choose, tokenwise, watch_projector
from ..hooks.run import Vision
from ..hooks.tower import watch_tower
from ..method import Composition, Stage
from ..tokens import Layout, Selection
from .settings import check_servable


class VisualEncoder:
    """One method on the vision side of one stock model.

    Args:
        model: a model of a supported family; its language model may be an empty shell (see :func:`vision_half`).
        method: methods of the stages TOWER and ENTRY.
        counted: how many tokens an image keeps must follow from its size.

    Raises ``ValueError`` for a method that cannot be served on this family.
    """

    def __init__(self, model: PreTrainedModel, method: Composition, *, counted: bool = True):
        self.model, self.method = model, method
        self.adapter = adapter_for(model)
        for part in method.methods:
            self.adapter.check_method(part)
            check_servable(part, self.adapter, counted=counted)
            part.check_family(self.adapter)
        self._before = method.at(Stage.TOWER, Stage.ENTRY)

    @torch.inference_mode()
    def __call__(self, given: dict[str, Any]) -> list[Tensor]:
        """Tokens of every image, [k_i, C] each, in the order in which the compressed model feeds them.

        ``given``: the arguments of the model's ``get_image_features`` by name (``pixel_values`` and what goes with it).
        Where the family adds features of vision layers to decoder layers (DeepStack), they follow behind as further
        channels, one group of C per decoder layer.
        """
        return self.choose(given)[0]

    def choose(self, given: dict[str, Any]) -> tuple[list[Tensor], Layout, Selection | None]:
        """What :meth:`__call__` returns, the geometry of the images and what was chosen (None: everything)."""
        adapter = self.adapter
        vision = Vision(adapter.geometry(given), pixel_values=adapter.pixels(given))
        try:
            if self._before:
                watch_tower(vision, self._before, adapter)
                watch_projector(vision, self._before, adapter)
            arguments = {name: value for name, value in given.items() if name != "placeholders"}
            output = adapter.inner.get_image_features(**arguments, return_dict=True)
        finally:
            vision.release()
        if self._before:
            choose(vision, self._before, adapter)
        rows = _flat(output.pooler_output)
        for layer in getattr(output, "deepstack_features", None) or ():
            rows = torch.cat([rows, _flat(layer)], dim=-1)
        return self._pick(rows, vision), vision.layout, vision.selection

    def _pick(self, rows: Tensor, vision: Vision) -> list[Tensor]:
        """The chosen rows of every image out of ``rows`` [T, C], those of all images one behind the other."""
        layout, selection = vision.layout, vision.selection
        if len(rows) != sum(layout.n):
            raise ValueError(
                f"The tower made {len(rows)} visual tokens of these images, and their sizes say {sum(layout.n)}."
            )
        images = list(rows.split(layout.n))
        if selection is None:
            return images
        source = selection.keep if selection.copies is None else selection.copies
        picked = [image[keep[:n]] for image, keep, n in zip(images, source, selection.counts, strict=True)]
        if selection.features is None or tokenwise(vision, self.adapter):
            return picked
        # vectors that a method made behind the projector; newlines keep the model's own embedding
        cells = layout.cell.gather(1, selection.keep)
        made = zip(picked, selection.features, cells, selection.counts, strict=True)
        return [torch.where(cell[:n, None] < 0, row, new[:n].to(row)) for row, new, cell, n in made]


def _flat(features: Any) -> Tensor:
    """Features as the families return them (a list per image, [V, N, C] or [T, C]) → [T, C]."""
    if not isinstance(features, Tensor):
        return torch.cat([_flat(part) for part in features])
    return features.flatten(0, -2)
