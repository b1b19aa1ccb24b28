# SPDX-License-Identifier: Apache-2.0
"""TokenFLEX on stock models: put the projector in, choose the count, save and load without remote code.

The number of placeholders in a prompt decides how many tokens an image gets. :func:`set_tokens` makes a processor write
any number of them; :func:`use` (or ``compress(model, "tokenflex", keep=...)``) serves the prompts of an untouched one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from .adapters.base import Adapter, adapter_for
from .attach import Handle, compress, current_handle
from .checkpoints import load_with_projector
from .ops.pool import target_grid
from .projectors.tokenflex import TokenFlexProjector

#: the paper's counts and how often a batch is trained at each
COUNTS, PROBABILITIES = (64, 144, 256), (0.2, 0.3, 0.5)
_ENTRY = "tokenflex"


@dataclass(frozen=True)
class FlexConfig:
    """What ``config.tokenflex`` holds: the projector's shape and how it is trained.

    ``probabilities`` default to the paper's for three counts (the larger the likelier) and to equal ones for any other
    number; ``num_image_tokens`` defaults to the largest count. Raises ``ValueError`` in one sentence for what cannot be.
    """

    counts: tuple[int, ...] = COUNTS
    probabilities: tuple[float, ...] | None = None
    num_image_tokens: int | None = None
    pooling: str = "adaptive"
    hidden_ratio: int = 3
    bias: bool = True
    norm_eps: float = 1e-5
    apply_post_layernorm: bool = False

    def __post_init__(self) -> None:
        counts = tuple(self.counts)
        if not counts or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in counts):
            raise ValueError(
                f"counts are the token counts to train at, whole numbers of at least 1, not {self.counts!r}."
            )
        if list(counts) != sorted(set(counts)):
            raise ValueError(f"counts go up, each named once, not {self.counts!r}.")
        default = PROBABILITIES if len(counts) == len(PROBABILITIES) else (1 / len(counts),) * len(counts)
        shares = default if self.probabilities is None else tuple(self.probabilities)
        if len(shares) != len(counts) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(
                f"probabilities are {len(counts)} shares that add up to 1, one for each count, not {shares}."
            )
        object.__setattr__(self, "counts", counts)
        object.__setattr__(self, "probabilities", shares)
        object.__setattr__(self, "num_image_tokens", self.num_image_tokens or max(counts))

    def fit(self, grid: tuple[int, int]) -> None:
        """Raise ``ValueError`` for a count that a grid of (rows, columns) patches cannot be pooled to."""
        for count in (*self.counts, self.num_image_tokens):
            target_grid(count, *grid)


def install(model: PreTrainedModel, counts: Sequence[int] = COUNTS, **options: Any) -> TokenFlexProjector:
    """Replace the projector of a stock model by a fresh TokenFLEX projector, in place.

    Args:
        model: LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision or InternVL, not compressed at the moment.
        counts: token counts per view that training draws from; any other count works at inference too.
        **options: further fields of :class:`FlexConfig`: ``probabilities``, ``num_image_tokens``, ``pooling``
            ("resize" for released weights), ``hidden_ratio``, ``bias``, ``norm_eps``, and ``apply_post_layernorm``:
            pass the features through the tower's own final norm first, which LLaVA's hidden states lack.

    Returns:
        The projector, in the model's dtype and on its device. Its weights are random: train them.

    Raises:
        ValueError: counts that do not fit the grid of patches, a model of another build, a compressed model. The model
            is then as it was.
    """
    return _attach(model, FlexConfig(tuple(counts), **options))


def use(model: PreTrainedModel, tokens: int | None = None, *, positions: str = "published") -> Handle:
    """Give every image (every view of tiled ones) ``tokens`` visual tokens from now on.

    Prompts stay those of the untouched processor. Takes the place of an earlier ``use``; nothing is loaded again. The
    default is the model's own ``num_image_tokens``. Raises ``ValueError`` for a count that does not fit or that the
    prompt could not hold, and for a model without a TokenFLEX projector.
    """
    projector = _projector_of(model)
    rows, cols = projector.grid
    tokens = _settings(model).num_image_tokens if tokens is None else tokens
    target_grid(tokens, rows, cols)
    if tokens > rows * cols:
        raise ValueError(
            f"A view has {rows * cols} patches and its prompt as many places, too few for {tokens} tokens; to repeat "
            "patches, write the prompts with a processor that went through vlmcompress.flex.set_tokens."
        )
    from .methods.tokenflex import TokenFlex

    current = current_handle(model)
    ours = current is not None and current.method.name == _ENTRY
    return compress(model, TokenFlex(keep=tokens, per_view=True), positions=positions, replace=ours)


def set_tokens(processor: Any, tokens: int) -> None:
    """Make a stock LLaVA or InternVL processor write ``tokens`` placeholders per view, in place.

    Only settings of the stock class are used, so that ``save_pretrained`` and ``AutoProcessor`` keep it. Raises
    ``ValueError`` for a count below 1 or a processor whose placeholders follow from the size of the picture.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"A token count is a whole number, at least 1, not {tokens!r}.")
    kind = type(processor).__name__
    if kind == "InternVLProcessor":
        processor.image_seq_length = tokens
        return
    if kind != "LlavaProcessor":
        raise ValueError(f"{kind} counts its placeholders by the size of a picture; use vlmcompress.flex.use instead.")
    crop = processor.image_processor.crop_size
    # one patch as large as the picture, and the rest as tokens that are always added
    processor.patch_size = min(crop["height"], crop["width"])
    cut = processor.vision_feature_select_strategy == "default"
    processor.num_additional_image_tokens = tokens - 1 + cut


def from_pretrained(name: str, **options: Any) -> PreTrainedModel:
    """Load a model that was saved with a TokenFLEX projector, through its stock class.

    ``options`` are those of ``from_pretrained``. Raises ``ValueError`` for a checkpoint without ``tokenflex`` in its
    configuration or without the projector's weights.
    """
    config = options.pop("config", None) or AutoConfig.from_pretrained(name)
    entry = getattr(config, _ENTRY, None)
    if not entry:
        raise ValueError(
            f"'{name}' has no TokenFLEX projector (its configuration has no 'tokenflex'); load it with its own class and "
            "call vlmcompress.flex.install."
        )
    return load_with_projector(name, config, lambda model: _attach(model, FlexConfig(**entry)), **options)


def _attach(model: PreTrainedModel, settings: FlexConfig) -> TokenFlexProjector:
    adapter = adapter_for(model)
    check_replaceable(model, adapter)
    grid = patch_grid(model.config.vision_config)
    settings.fit(grid)
    stock = adapter.whole_projector
    projector = TokenFlexProjector(
        vision_width(model.config), adapter.text_config.hidden_size, grid=grid, pooling=settings.pooling,
        hidden_ratio=settings.hidden_ratio, bias=settings.bias, norm_eps=settings.norm_eps,
    )  # fmt: skip
    if settings.apply_post_layernorm:
        projector.set_tower_norm(_final_norm(adapter.tower))
    like = next(stock.parameters(), model.get_input_embeddings().weight)
    adapter.inner.multi_modal_projector = projector.to(like.device, like.dtype)
    projector.train(model.training)
    if hasattr(model.config, "downsample_ratio"):
        model.config.downsample_ratio = 1.0
    if adapter.plain_views:
        projector.num_image_tokens = settings.num_image_tokens
        model.config.image_seq_length = settings.num_image_tokens
        follow_prompts(model)
    model.config.tokenflex = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items()}
    return projector


def follow_prompts(model: PreTrainedModel) -> None:
    """Set the projector's count from every prompt's placeholders, in a forward pass and ahead of ``generate``'s."""
    if "generate" not in model.__dict__:
        model.model.register_forward_pre_hook(_before_inner, with_kwargs=True)
        # generate makes the image features before any forward pass that knows the prompt
        model.generate = MethodType(generate, model)


def generate(self: PreTrainedModel, inputs: Tensor | None = None, *args: Any, **kwargs: Any):
    """The model's own ``generate``, with the projector set to the prompt's number of placeholders."""
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    _follow(self.model, ids, kwargs.get("pixel_values"))
    return type(self).generate(self, inputs, *args, **kwargs)


def _before_inner(module: nn.Module, args: tuple, kwargs: dict) -> None:
    given = dict(zip(("input_ids", "pixel_values"), args, strict=False)) | kwargs
    _follow(module, given.get("input_ids"), given.get("pixel_values"))


def _follow(inner: nn.Module, ids: Tensor | None, pixels: Tensor | None) -> None:
    if ids is None or pixels is None:
        return
    per_row = (ids == inner.config.image_token_id).sum(1).tolist()
    count, rest = divmod(sum(per_row), len(pixels))
    if not count:
        return
    if rest or any(n % count for n in per_row):
        raise ValueError(
            f"The rows of the prompt have {', '.join(map(str, per_row))} image placeholders for {len(pixels)} views; in one "
            "batch every view takes the same number of tokens."
        )
    projector = inner.multi_modal_projector
    target_grid(count, *projector.grid)
    projector.num_image_tokens = count


def check_replaceable(model: PreTrainedModel, adapter: Adapter) -> None:
    """Raise ``ValueError`` unless the projector of ``model`` can be exchanged."""
    if current_handle(model) is not None:
        raise ValueError("This model is compressed; call handle.remove() before its projector is exchanged.")
    name = type(model).__name__
    if adapter.whole_projector is None:
        raise ValueError(
            f"{name} has no projector of its own that could be exchanged: it joins patches to tokens itself."
        )
    if adapter.tower_prefix and getattr(model.config, "vision_feature_select_strategy", "default") != "default":
        raise ValueError(
            f"This {name} feeds the CLS token to its projector (vision_feature_select_strategy is not 'default'), which has "
            "no place in a grid of patches."
        )
    patch_grid(model.config.vision_config)


def patch_grid(vision: Any) -> tuple[int, int]:
    """(rows, columns) of the patches of one view. Raises ``ValueError`` for a tower that takes pictures of any size."""
    sizes = [getattr(vision, name, None) for name in ("image_size", "patch_size")]
    if None in sizes or vision.model_type == "pixtral":
        raise ValueError(
            f"The tower '{vision.model_type}' takes pictures of any size; a fixed grid of patches is needed."
        )
    image, patch = (tuple(s) if isinstance(s, (list, tuple)) else (s, s) for s in sizes)
    return image[0] // patch[0], image[1] // patch[1]


def vision_width(config: Any) -> int:
    """Numbers per patch that the projector gets: the tower's width, once for every layer that is read."""
    layers = getattr(config, "vision_feature_layer", -1)
    return config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))


def _final_norm(tower: nn.Module) -> nn.Module:
    for part in (tower, getattr(tower, "vision_model", tower)):
        norm = getattr(part, "post_layernorm", None)
        if norm is not None:
            return norm
    raise ValueError(f"{type(tower).__name__} has no final norm for apply_post_layernorm.")


def _projector_of(model: PreTrainedModel) -> TokenFlexProjector:
    from .methods.tokenflex import check_projector
    from .projectors import check_loaded

    check_loaded(model)
    adapter = adapter_for(model)
    check_projector(_ENTRY, adapter)
    return adapter.whole_projector


def _settings(model: PreTrainedModel) -> FlexConfig:
    return FlexConfig(**model.config.tokenflex)
