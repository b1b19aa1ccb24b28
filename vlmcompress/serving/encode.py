# SPDX-License-Identifier: Apache-2.0
"""An encoder of its own: tower, method and projector in Hugging Face classes, for servers that take ready embeddings.

The server then loads no vision tower (``--enable-mm-embeds --limit-mm-per-prompt '{"image": 0}'`` in vLLM) and counts an
image's tokens by the rows it is sent.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

from ..checkpoints import loader_of, without_report
from ..method import Composition, Method, create
from .counting import runs
from .half import deepened, shell_config
from .tokens import VisualEncoder

#: families whose ready embeddings a server counts by their rows
FAMILIES = ("llava", "llava_next", "llava_onevision", "internvl")


class Encoder:
    """Turns images into the tokens that a compressed model feeds to its language model.

    Args:
        model: a stock model of one of :data:`FAMILIES`; only its tower and projector run.
        processor: its processor.
        method: a registered name, a method or a composition; stages TOWER and ENTRY.
        **options: the method's hyper-parameters when it is given by name.

    Raises ``ValueError`` for a family or a method that cannot be served this way.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, method: str | Method | Composition, **options: Any):
        family = model.config.model_type
        if family not in FAMILIES:
            raise ValueError(
                f"A server counts ready embeddings of '{family}' by the image's size and not by their rows, so that "
                f"fewer cannot be sent; use the plug-in for vLLM. Families that can: {', '.join(FAMILIES)}."
            )
        self.model, self.processor = model, processor
        self._tokens = VisualEncoder(model, create(method, **options), counted=False)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        method: str | Method | Composition,
        *,
        device: str = "cpu",
        dtype: torch.dtype | str = "auto",
        revision: str | None = None,
        **options: Any,
    ) -> Encoder:
        """Load the tower and the projector of a checkpoint, and leave its language model on disk.

        Args:
            name: model folder or hub id.
            method, **options: as for the class.
            device, dtype: of the tower; "auto" is the checkpoint's own.
            revision: of the hub's repository.

        Raises ``ValueError`` for a family or a method that cannot be served this way.
        """
        config = AutoConfig.from_pretrained(name, revision=revision)
        if config.model_type in FAMILIES:
            with without_report():
                model = loader_of(config)(
                    name, config=shell_config(config), dtype=dtype, revision=revision, ignore_mismatched_sizes=True
                )
        else:
            raise ValueError(
                f"'{config.model_type}' is none of the families that can be encoded: {', '.join(FAMILIES)}."
            )
        processor = AutoProcessor.from_pretrained(name, revision=revision)
        return cls(deepened(model, config).to(device), processor, method, **options)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.model.config.get_text_config().hidden_size

    def __call__(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Tokens of every image, [k_i, width] each, on the CPU; what vLLM takes as ``multi_modal_data["image"]``."""
        if not images:
            return []
        return [tokens.cpu() for tokens in self._tokens(self._given(images))]

    def _given(self, images: Sequence[Image.Image]) -> dict[str, Any]:
        """The arguments of the model's ``get_image_features``; every image as if it were alone in its prompt."""
        token = self.processor.image_token
        parts = [self.processor(text=token, images=[image.convert("RGB")], return_tensors="pt") for image in images]
        device, dtype = self.model.device, self.model.dtype
        views = [part["pixel_values"].to(device, dtype) for part in parts]
        if self.model.config.model_type == "internvl":
            cells = self.model.config.image_seq_length
            return {"pixel_values": torch.cat(views), "placeholders": runs([len(v) * cells for v in views])}
        if "image_sizes" not in parts[0]:
            return {"pixel_values": torch.cat(views)}
        padded = torch.nn.utils.rnn.pad_sequence([v[0] for v in views], batch_first=True)
        given = {"pixel_values": padded, "image_sizes": torch.cat([part["image_sizes"] for part in parts])}
        if self.model.config.model_type == "llava_onevision":
            given["batch_num_images"] = torch.ones(len(parts), dtype=torch.long)
        return given


def content_part(tokens: Tensor) -> dict[str, str]:
    """Part of a chat message's ``content`` that brings one image's ``tokens`` [k, width] to an OpenAI-like server."""
    return {"type": "image_embeds", "image_embeds": packed(tokens)}


def packed(tokens: Tensor) -> str:
    """A tensor as text: base64 of what ``torch.save`` writes."""
    buffer = io.BytesIO()
    torch.save(tokens.contiguous().clone(), buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def unpacked(text: str) -> Tensor:
    """The way back from :func:`packed`. Raises ``ValueError`` for anything else."""
    try:
        tensor = torch.load(io.BytesIO(base64.b64decode(text, validate=True)), weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise ValueError("This is no tensor that torch.save has written, in base64.") from error
    if not isinstance(tensor, Tensor):
        raise ValueError(f"This holds a {type(tensor).__name__}, and not a tensor.")
    return tensor
