# SPDX-License-Identifier: Apache-2.0
"""Gemma 3: SigLIP, patches averaged to 256 tokens, image tokens that see each other, sliding-window layers."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.masking_utils import create_masks_for_generate
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model, get_block_sequence_ids_for_mask

from ..dtypes import LongTensor
from ..method import Stage
from ..registry import register_adapter
from ..tokens import Frame, Layout
from .base import Adapter
from .prefix import kept_blocks, mask_arguments
from .raster import raster_blocks, raster_layout

_CAUSAL_ONLY = (
    "it acts inside the language model, whose image tokens see each other in both directions and whose sliding-window "
    "layers cannot give up entries"
)


@register_adapter("gemma3")
class Gemma3Adapter(Adapter):
    """``Gemma3ForConditionalGeneration``; the tower has no CLS token.

    The projector averages square blocks of patches, so scores of patches are summed over the block that makes a token.
    Inside the language model the tokens of one image see each other in both directions. What is left of an image goes
    on doing so: the masks are built once more for the sequence that enters. A sliding window counts the tokens that are
    there, so it reaches further back when some have left.

    The pan-and-scan crops of the processor are images of their own to the model, and so they are here.
    """

    joins_patches = True
    refused: ClassVar[dict[Stage, str]] = {Stage.PREFILL: _CAUSAL_ONLY, Stage.CACHE: _CAUSAL_ONLY}

    @property
    def whole_projector(self) -> None:
        """None: the stock projector pools patches itself, and no other one takes its place."""

    @property
    def projector(self) -> nn.Module:
        # the average stands in front of it, and the product behind it acts row by row
        return self.inner.multi_modal_projector.mm_soft_emb_norm

    @property
    def projector_end(self) -> nn.Module:
        return self.inner.multi_modal_projector

    @property
    def feature_layer(self) -> int:
        return len(self.tower_layers) - 1

    @property
    def side(self) -> int:
        """Patches that are averaged along each axis."""
        return self.inner.multi_modal_projector.kernel_size

    @property
    def patches_per_token(self) -> int:
        return self.side**2

    def patch_order(self, grid: tuple[int, int]) -> LongTensor:
        return raster_blocks(grid, self.side)

    def geometry(self, given: dict[str, Any]) -> Layout:
        pixels, side = given["pixel_values"], self.inner.multi_modal_projector.tokens_per_side
        return raster_layout(len(pixels), (side, side), pixels.device)

    def check_method(self, method) -> None:
        super().check_method(method)
        projector = self.inner.multi_modal_projector
        if projector.kernel_size * projector.tokens_per_side != projector.patches_per_image:
            raise ValueError(
                f"This Gemma 3 averages {projector.patches_per_image} patches a side to {projector.tokens_per_side} tokens, "
                "which do not divide evenly; compression cannot tell which patches a token stands for."
            )

    # language model ---------------------------------------------------------------------------------------------
    def caller_mask(self, kwargs: dict[str, Any], given: dict[str, Any]) -> Tensor | None:
        return given.get("attention_mask")

    def language_mask(
        self, mask: Tensor | None, kwargs: dict[str, Any], frame: Frame, given: dict[str, Any]
    ) -> dict[str, Tensor]:
        types = given.get("token_type_ids")
        if types is None:
            build, blocks = create_masks_for_generate, None
        else:
            build = create_masks_for_vision_model
            blocks = kept_blocks(get_block_sequence_ids_for_mask(types, frame.index.device), kwargs, given, frame)
        return build(**mask_arguments(build, self.text_config, mask, kwargs, blocks))
