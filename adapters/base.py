# SPDX-License-Identifier: Apache-2.0
"""What the hooks need to know about a model family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..dtypes import LongTensor
from ..hooks.masks import check_layer_masks, require_mask_support
from ..method import Stage
from ..registry import ADAPTERS, ENCODERS
from ..tokens import Frame, Layout

if TYPE_CHECKING:
    from ..method import Method


#: what the call of a model names its pixels
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of this model's family, bound to the model. Raises ``ValueError`` when there is none."""
    known = ADAPTERS.items()
    for encoder in ENCODERS.items().values():
        if encoder.claims(model):
            return encoder(model)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"compress takes a model of Hugging Face, open_clip or timm that has an adapter, not {type(model).__name__}."
        )
    model_type = model.config.model_type
    if model_type not in known:
        text_only = not hasattr(model.config, "vision_config")
        what = "is a text-only model" if text_only else "is of a family without an adapter"
        raise ValueError(f"{type(model).__name__} ('{model_type}') {what}; supported: {', '.join(known)}.")
    if not hasattr(model, "lm_head"):
        raise ValueError(
            f"{type(model).__name__} has no language-model head; load it with AutoModelForImageTextToText."
        )
    return known[model_type](model)


class Adapter:
    """Where things are in one model. Subclasses serve one ``model_type`` each.

    The defaults fit models built like LLaVA: ``model.model`` holds ``vision_tower``, ``multi_modal_projector`` and
    ``language_model``; the tower has separate q, k and v projections.
    """

    model_type: ClassVar[str] = ""
    #: position ids are three-dimensional (time, row, column)
    mrope: ClassVar[bool] = False
    #: every row of the projector's input becomes one row of its output, so that only the chosen rows need projecting
    tokenwise_projector: ClassVar[bool] = True
    #: the tokens of all views follow each other in the prompt as the projector made them, nothing between
    plain_views: ClassVar[bool] = False
    #: an image may come as several views whose number depends on its size
    tiled: ClassVar[bool] = False
    #: the projector joins several patches to one token ...
    joins_patches: ClassVar[bool] = False
    #: ... this many
    patches_per_token: int = 1
    #: the patches that the projector joins to one token can only leave the tower together
    whole_tokens: ClassVar[bool] = False
    #: the tower takes the patches of all views as one sequence [S, C] without padding
    packed_tower: ClassVar[bool] = False
    #: frames of one video may leave a vision layer as fewer, joined views
    joins_views: ClassVar[bool] = False
    #: stages that this family cannot serve, each with the reason
    refused: ClassVar[dict[Stage, str]] = {}

    def __init__(self, model: PreTrainedModel):
        self.model = model

    # modules ----------------------------------------------------------------------------------------------------
    @property
    def inner(self) -> nn.Module:
        """The model without its language-model head; its forward gets ``input_ids`` and ``pixel_values``."""
        return self.model.model

    @property
    def language_model(self) -> nn.Module:
        return self.inner.language_model

    @property
    def decoder_layers(self) -> Sequence[nn.Module]:
        return self.language_model.layers

    @property
    def text_config(self) -> Any:
        return self.language_model.config

    @property
    def tower(self) -> nn.Module:
        return self.inner.vision_tower

    @property
    def tower_layers(self) -> Sequence[nn.Module]:
        encoder = getattr(self.tower, "vision_model", self.tower).encoder
        return encoder.layers

    @property
    def whole_projector(self) -> nn.Module | None:
        """The projector as the model calls it; None where it is a part of the tower."""
        return getattr(self.inner, "multi_modal_projector", None)

    @property
    def projector(self) -> nn.Module:
        """The part of the projector that makes one token of each row of its input: all of it, unless it pools first."""
        return getattr(self.whole_projector, "per_token", self.whole_projector)

    @property
    def projector_end(self) -> nn.Module:
        """The module whose output is the features; what stands between it and :attr:`projector` must not meet NaN."""
        return self.projector

    @property
    def pools(self) -> bool:
        """Whether the projector pools the patches of a view to fewer or more tokens right now."""
        target = getattr(self.whole_projector, "output_grid", None)
        return target is not None and target != self.whole_projector.grid

    def token_grid(self, patches: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the tokens that the projector makes of one view of ``patches`` (rows, columns)."""
        return getattr(self.whole_projector, "output_grid", None) or patches

    # tower ------------------------------------------------------------------------------------------------------
    @property
    def has_cls(self) -> bool:
        return self.tower_prefix > 0

    @property
    def tower_prefix(self) -> int:
        """Special tokens in front of the patches."""
        return int(hasattr(getattr(self.tower, "vision_model", self.tower).embeddings, "class_embedding"))

    @property
    def tower_heads(self) -> int:
        """Attention heads of a vision layer."""
        return self.tower_layers[0].self_attn.num_heads

    @property
    def tower_qk_norm(self) -> bool:
        """Whether the tower norms its queries and keys behind their projections."""
        return False

    @property
    def tower_scale(self) -> float:
        """Factor on the tower's attention logits."""
        return self.tower_layers[0].self_attn.head_dim ** -0.5

    @property
    def feature_layer(self) -> int:
        """0-based vision layer whose output goes to the projector (the deepest one where there are several)."""
        return max(self.feature_layers)

    @property
    def feature_layers(self) -> list[int]:
        """All vision layers (0-based) whose output goes to the projector, where the configuration chooses them."""
        chosen = getattr(getattr(self.model, "config", None), "vision_feature_layer", ())
        return [i % (len(self.tower_layers) + 1) - 1 for i in ([chosen] if isinstance(chosen, int) else chosen)]

    @property
    def global_layers(self) -> Sequence[int]:
        """Vision layers (0-based, ascending) in which every patch sees its whole view; the others attend in windows."""
        return range(len(self.tower_layers))

    def tower_norm(self, index: int) -> nn.Module:
        """The norm in front of one vision layer's attention."""
        return self.tower_layers[index].layer_norm1

    def tower_masked(self, index: int) -> nn.Module:
        """The module of one vision layer that takes an ``attention_mask``: the layer itself or its attention."""
        return self.tower_layers[index]

    def masked_arguments(self, args: tuple, kwargs: dict, mask: Tensor | None) -> tuple[tuple, dict]:
        """Arguments of :meth:`tower_masked` with the additive key ``mask`` [V, 1, 1, n] (None: nothing is masked)."""
        if mask is not None:
            require_mask_support(self.tower.config)
        if len(args) > 1:
            return (args[0], mask, *args[2:]), kwargs
        return args, {**kwargs, "attention_mask": mask}

    def patch_order(self, grid: tuple[int, int]) -> LongTensor | None:
        """Where the projector joins patches that do not follow each other: their places, token by token, [N · group].

        ``grid``: (rows, columns) of one view's tokens. Such a model lays the tower's output out as a picture before it
        joins patches, so what a method left is put back in its places first (see ``raster_blocks``). None: the
        patches of a token follow each other. On the CPU: the caller moves it.
        """
        return None

    def tower_projections(self, index: int) -> dict[str, nn.Module]:
        """The Linear modules of one vision layer whose outputs :meth:`split_qkv` reads."""
        attention = self.tower_layers[index].self_attn
        return {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj}

    def split_qkv(self, index: int, taps: dict[str, Any]) -> tuple[Any, Any, Any]:
        """Queries, keys and values [V, H, n, d] from the recorded outputs of :meth:`tower_projections`.

        Each a tensor, or a function that makes it where that costs something: most methods read one of them.

        ``taps["arguments"]`` holds the keyword arguments that the layer got. Packed towers give [S, H, d].
        """
        heads = self.tower_layers[index].self_attn.num_heads
        q, k, v = (taps[name].unflatten(-1, (heads, -1)).transpose(1, 2) for name in "qkv")
        return q, k, v

    def unrotated_keys(self, index: int, taps: dict[str, Any]) -> Tensor | None:
        """Keys of one vision layer before any rotary embedding, in the form of :meth:`split_qkv`; None: its keys are."""
        return None

    def tower_arguments(self, kwargs: dict[str, Any], rows: LongTensor, counts: LongTensor) -> dict[str, Any]:
        """Packed towers: a layer's arguments when only ``rows`` [S'] of the full pack are left.

        ``counts`` [G]: lengths of the runs of them that attend among themselves (views, or their windows).
        """
        raise NotImplementedError

    def shrink_pixels(self, args: tuple, kwargs: dict, grid: tuple[int, int]) -> tuple[tuple, dict]:
        """Tower arguments with the views resized to ``grid`` patches (rows, columns)."""
        pixels = args[0] if args else kwargs["pixel_values"]
        patch = self.tower.config.patch_size
        height, width = patch if isinstance(patch, (list, tuple)) else (patch, patch)
        size = (grid[0] * height, grid[1] * width)
        dtype = pixels.dtype
        small = nn.functional.interpolate(pixels.float(), size=size, mode="bicubic", antialias=True).to(dtype)
        kwargs = {**kwargs, **self.position_arguments(small, grid)}
        if args:
            return (small, *args[1:]), kwargs
        return args, {**kwargs, "pixel_values": small}

    def position_arguments(self, pixels: Tensor, grid: tuple[int, int]) -> dict[str, Any]:
        """What the tower wants to hear with ``pixels`` [V, 3, H, W] of ``grid`` patches instead of its usual ones."""
        return {"interpolate_pos_encoding": True}

    # projector --------------------------------------------------------------------------------------------------
    @property
    def side_projectors(self) -> Sequence[nn.Module]:
        """Further modules that turn the patches of some vision layers into features of tokens, on the way."""
        return ()

    def projector_rows(self, inputs: Tensor) -> Tensor:
        """The projector's input as [V, N, C]: one row per visual token that it will yield. Packed towers: [S, C]."""
        return inputs

    def projector_input(self, rows: Tensor, stock: Tensor) -> Tensor:
        """Rows [.., k, C] in the form that the projector takes; ``stock`` is the input it would have got."""
        return rows

    def projector_output(self, table: Tensor) -> Tensor:
        """[V, N, C'] ([S, C'] of a packed tower) in the form that the outer model expects from the projector."""
        return table

    # language model ---------------------------------------------------------------------------------------------
    def rotary(self, hidden: Tensor, positions: LongTensor) -> tuple[Tensor, Tensor]:
        """Rotary tables (cos, sin) in the form that the decoder's layers take."""
        return self.language_model.rotary_emb(hidden, position_ids=positions)

    def one_table(self, embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Such tables as [B, S, d] each."""
        return embeddings

    def layer_positions(self, positions: LongTensor) -> LongTensor:
        """``position_ids`` as the decoder's layers get them."""
        return positions

    def caller_mask(self, kwargs: dict[str, Any], given: dict[str, Any]) -> Tensor | None:
        """The caller's 2-D mask in a call of the language model by ``kwargs`` and of :attr:`inner` by ``given``."""
        return kwargs.get("attention_mask")

    def language_mask(
        self, mask: Tensor | None, kwargs: dict[str, Any], frame: Frame, given: dict[str, Any]
    ) -> Tensor | dict[str, Tensor] | None:
        """What the language model takes for the 2-D ``mask`` (None: nothing is padding) of cache and ``frame``.

        ``kwargs``: its other arguments, for the tokens of ``frame``.
        """
        return mask

    def follow(self, kwargs: dict[str, Any], index: LongTensor) -> None:
        """Gather further per-token arguments of the language model by ``index`` [B, S'], in place."""

    def take_injected(self, kwargs: dict[str, Any]) -> tuple[Tensor, list[Tensor]] | None:
        """Take from the language model's arguments what it would add to visual tokens behind its first layers.

        Returns which tokens get something, [B, S] bool, and per layer one row for each of them, [T, D]; None for nothing.
        Only asked for while a method acts between decoder layers: the sum is then made here, so that tokens may leave
        before it is complete.
        """
        return None

    # geometry ---------------------------------------------------------------------------------------------------
    #: methods of :attr:`inner` that turn pixels into features, by what they show; families with videos name both
    doors: ClassVar[dict[str, str]] = {"image": "get_image_features"}

    def geometry(self, given: dict[str, Any]) -> Layout:
        """Layout (not placed) of the images in one call of the image door, whose arguments are ``given`` by name."""
        raise NotImplementedError

    #: the geometry of a door's call depends on the prompt, which is then among its arguments as :meth:`prompt_of` has it
    reads_prompt: ClassVar[bool] = False

    def prompt_of(self, given: dict[str, Any], cache: Any) -> dict[str, Any]:
        """The new part of the prompt in a call of :attr:`inner` or of ``generate`` on ``cache``, by name.

        ``input_ids`` [B, S] or ``inputs_embeds``, and ``placeholders`` [B, S] bool: the columns of image placeholders.
        """
        for name in ("input_ids", "inputs", "inputs_embeds"):
            prompt = given.get(name)
            if prompt is not None:
                name = "inputs_embeds" if prompt.ndim == 3 else "input_ids"
                seen = cache.get_seq_length() if cache is not None else 0
                found = {name: prompt[:, seen if seen < prompt.shape[1] else 0 :]}
                return {**found, "placeholders": self.placeholders(found)}
        return {}

    def video_geometry(self, given: dict[str, Any]) -> Layout:
        """Layout (not placed) of the videos in one call of the video door: a view is a frame, or what is left of several.

        ``kind`` is "video" throughout; the budget of a method counts per video.
        """
        raise NotImplementedError

    def pixels(self, given: dict[str, Any]) -> Tensor | None:
        """The pixels in one call of a door: [V, 3, H, W] per view, or [patches, ...] where the tower takes a pack."""
        if given.get("pixel_values") is not None:
            return given["pixel_values"]
        videos = given.get("pixel_values_videos")
        return videos.flatten(0, 1) if videos is not None and videos.ndim == 5 else videos

    def brings(self, given: dict[str, Any]) -> list[str]:
        """Of what, "image" or "video", a call of :attr:`inner` brings pixels or ready-made features."""
        ready = given.get("mm_encoder_outputs") or {}
        found = [kind for kind, name in PIXELS.items() if given.get(name) is not None or ready.get(kind) is not None]
        if "video" in found and "video" not in self.doors:
            raise ValueError("Videos are not compressed on this family; remove the handle to run them, or pass images.")
        return found

    def placeholders(self, given: dict[str, Any], kind: str = "image") -> Tensor:
        """[B, S] bool: columns of the chunk that hold placeholders of ``kind``, in one call of :attr:`inner`."""
        token = getattr(self.model.config, f"{kind}_token_id")
        ids = given.get("input_ids")
        if ids is not None:
            return ids == token
        embeds = given["inputs_embeds"]
        return (embeds == self.model.get_input_embeddings()(torch.tensor(token, device=embeds.device))).all(-1)

    #: attributes of :attr:`inner` that a forward pass leaves behind for the next one
    remembers: ClassVar[tuple[str, ...]] = ()

    def single_frames(self, given: dict[str, Any]) -> list[dict[str, Tensor]]:
        """Arguments that show one view of the videos in a call of the video door, each as a video of its own."""
        frames = given["pixel_values_videos"].flatten(0, 1)
        return [{"pixel_values_videos": frame[None, None]} for frame in frames]

    def prompt_arguments(self, ids: LongTensor) -> dict[str, Tensor]:
        """What :attr:`model` wants to be told of the prompt ``ids`` [B, S] besides them."""
        return {}

    # support ----------------------------------------------------------------------------------------------------
    @classmethod
    def supports(cls, method: type[Method] | Method) -> tuple[bool, str]:
        """Whether a method's stages (a class speaks for its defaults) are served here, and if not, why."""
        for stage in Stage:
            if stage in method.stages and stage in cls.refused:
                return False, cls.refused[stage]
        if method.reads_first_layer and Stage.PREFILL in cls.refused:
            return False, cls.refused[Stage.PREFILL]
        if cls.joins_patches and Stage.TOWER in method.stages and not method.joins_patches:
            return False, "it acts on single patches, and this family's projector joins several to a token"
        return True, ""

    def check_method(self, method: Method) -> None:
        """Raise ``ValueError`` when this model cannot serve ``method``."""
        works, reason = self.supports(method)
        if not works:
            raise ValueError(f"'{method.name}' does not work on '{self.model_type}': {reason}.")
        if method.reads_first_layer and self._slides(slice(1)):
            raise ValueError(
                f"'{method.name}' reads the first decoder layer's attention, which sees a sliding window only here."
            )
        if Stage.CACHE in method.stages or (Stage.PREFILL in method.stages and method.cut_layers(self)):
            if self._slides(slice(None)):
                raise ValueError(
                    f"'{method.name}' drops tokens inside the language model, but this one has sliding-window layers "
                    "whose cache cannot give up entries; use a method that finishes before it (vtc-cls, grid, ...)."
                )
            check_layer_masks(self.text_config, method.name)

    def _slides(self, layers: slice) -> bool:
        """Whether one of these decoder layers attends inside a sliding window."""
        kinds = getattr(self.text_config, "layer_types", None) or ["sliding_attention"]
        return bool(getattr(self.text_config, "sliding_window", None)) and "sliding_attention" in kinds[layers]
