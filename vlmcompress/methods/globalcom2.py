# SPDX-License-Identifier: Apache-2.0
"""GlobalCom²: the thumbnail of a tiled image commands how much is kept of every crop, and which tokens.

Liu et al., "Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution Large
Vision-Language Models", AAAI 2026, arXiv 2501.05179.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..dtypes import LongTensor
from ..method import Method, Stage, check_keep, tokens_to_keep
from ..ops.scores import negative_cosine
from ..ops.select import largest_remainder
from ..ops.tiles import combined_scores, crop_weights, enlarge, from_canvas, misplaced_rows, richness, to_canvas
from ..registry import register_method
from ..views import EntryTokens, Selection, TowerLayer

if TYPE_CHECKING:
    from ..adapters.base import Adapter


@dataclass
class _Image:
    """One image: its views, what its crops weigh, and the cells ranked in each view; a video has frames for crops."""

    number: int
    overview: int | None
    crops: list[int]
    tiles: tuple[int, int]
    n: int  # tokens in all
    newlines: int  # rows of the picture
    cells: int  # of the thumbnail, 0 without one
    sizes: list[int]  # unpadded cells of every crop
    weights: list[float]

    @property
    def views(self) -> list[int]:
        return self.crops if self.overview is None else [self.overview, *self.crops]


@register_method("globalcom2")
@dataclass(frozen=True)
class GlobalCom2(Method):
    """Top tokens of the thumbnail, and of every crop as many as the thumbnail finds it rich.

    A token's score is the logit of its view's CLS query in the tower's last layer, before the softmax, averaged over
    heads (section 3.2 of the paper). The thumbnail keeps a share R of its tokens. A crop keeps
    ``min(1, R · (1 + sigma - mean(sigma)))`` of its unpadded ones, sigma the softmax over the crops' summed thumbnail
    scores; its ranking adds its own scores and the thumbnail's, enlarged onto it, each at unit length (section 3.3).

    Differs from the official code: the score is one folded dot product per token instead of 24 attention maps; every
    image of a batch is scored by itself (the code is wrong from the second image on); survivors stay in the model's own
    order and at their true cells. ``keep=1.0`` keeps everything and at least one token always stays, which holds for
    the code in neither case. An image of one view (LLaVA-1.5) counts as its own thumbnail: the top CLS scores stay.
    Towers without a CLS token rank by minus the cosine to the view's mean patch; the paper describes it, the code has
    it not, and we take it in front of the projector (see ``cosine``). Where the projector joins patches to a token, their
    scores are averaged (ours).

    The frames of a video play the crops, as the paper sketches it (no code was released): its mean token stands in for
    the thumbnail, the softmax runs over the frames' summed scores against that mean, and a token ranks by minus its
    cosine to the mean of its frame plus minus that to the mean of the video, both of what the projector takes (of its
    tokens where the model pools behind it).

    Args:
        keep: a float is the paper's retention ratio R of the patches, newline tokens on top; an int is an exact number
            of tokens per image, newlines counted.
        tau: temperature of the softmax over crops.
        alpha: weight of the thumbnail's scores in a crop's ranking; one half is the paper's plain sum.
        layout: "hf" keeps the model's order and its newlines; "official" reproduces the code to the letter, edge cases
            at 0 and 1 included: thumbnail tokens by descending score, crop tokens at their rank among the unpadded
            ones, a newline after every row of the padded grid.
        cosine: towers without a CLS token, and videos: what the cosine compares, "patches" in front of the projector or
            "tokens" behind it, which runs the projector once more.
        exact_budget: also meet a float's share of all tokens, newlines counted, exactly: largest remainder over what the
            crops would keep.
        newlines: "all" keeps every row's newline as the code does, "occupied" only those of rows that keep a patch.
    """

    keep: int | float = 0.25
    tau: float = 10.0
    alpha: float = 0.5
    layout: str = "hf"
    cosine: str = "patches"
    exact_budget: bool = False
    newlines: str = "all"

    summary: ClassVar[str] = "tiled images: the thumbnail commands what is kept of every crop"
    paper: ClassVar[str] = "arXiv 2501.05179"
    stages: ClassVar[frozenset[Stage]] = frozenset({Stage.ENTRY})
    #: a share is cut to whole tokens crop by crop
    fixed_budget: ClassVar[bool] = False

    def validate(self) -> None:
        check_keep(self.keep)
        if not self.tau > 0:
            raise ValueError(f"tau is a temperature above 0, not {self.tau}.")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is a weight between 0 and 1, not {self.alpha}.")
        if self.layout not in ("hf", "official"):
            raise ValueError(f"layout is 'hf' or 'official', not {self.layout!r}.")
        if self.cosine not in ("patches", "tokens"):
            raise ValueError(f"cosine is 'patches' or 'tokens', not {self.cosine!r}.")
        if self.newlines not in ("all", "occupied"):
            raise ValueError(f"newlines is 'all' or 'occupied', not {self.newlines!r}.")
        if self.layout == "official" and self.newlines == "occupied":
            raise ValueError("layout='official' has a newline after every row; newlines='occupied' goes with 'hf'.")

    def tower_layers(self, adapter: Adapter) -> Collection[int]:
        if adapter.has_cls:  # the last layer's input is all that its CLS logits need
            return (max(0, len(adapter.tower_layers) - 2),)
        return (adapter.feature_layer,) if self.cosine == "patches" else ()

    def tower(self, layer: TowerLayer, state: dict) -> None:
        views, n, width = layer.patches.shape
        state["flops"] = views * (4 * width**2 + 2 * n * width)
        if layer.has_cls:
            row = layer.cls_logits(following=layer.index + 1 < layer.depth)
        else:
            row = negative_cosine(layer.patches, layer.valid)
        # the mean, so that a crop's sum weighs no more for patches that are joined
        state["row"] = layer.per_token(row).detach() / layer.group

    def entry(self, tokens: EntryTokens, state: dict) -> Selection | None:
        row, layout = state.pop("row", None), tokens.layout
        present = tokens.view_cells()
        if row is None:
            row = negative_cosine(self._compared(tokens), present)
            state["flops"] = 2 * row.numel() * tokens.projected.shape[-1]
        images = self._images(tokens, row, present)
        scores = row.masked_fill(~present, float("-inf"))
        tiled = [image for image in images if image.crops and image.overview is not None]
        crops = [v for image in tiled for v in image.crops]
        for image in images:
            if image.overview is None:
                scores[image.crops] = sum(self._video_scores(tokens, image.crops, present)).masked_fill(
                    ~present[image.crops], float("-inf")
                )
        if crops:
            spread = torch.cat([self._spread(tokens, image, row, present) for image in tiled])
            scores[crops] = combined_scores(row[crops], spread, present[crops], self.alpha)
        state["scores"] = tokens.of_views(_comparable(scores, layout.thumbnail), fill=float("-inf"))
        rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
        if all(self._whole(image) for image in images):
            return None
        counts = [0] * len(row)
        newlines = layout.valid & ~layout.patch
        for image in images:
            mine = self._counts(image, tokens, rank)
            for view, count in zip(image.views, mine[-len(image.views) :], strict=True):
                counts[view] = count
        kept = rank < torch.tensor(counts, device=rank.device)[:, None]
        if self.layout == "official":
            return _official(tokens, images, scores, present, kept)
        mask = tokens.of_views(kept, fill=False)
        if self.newlines == "all":
            return Selection.from_mask(layout, mask | newlines)
        mask = layout.with_newlines(mask)
        for image in images if self._exact else ():
            # the odd token that a budget leaves goes to newlines of empty rows, from the top
            spare = self._budget(image) - int(mask[image.number].sum())
            empty = (newlines & ~mask)[image.number].nonzero()[:, 0]
            mask[image.number, empty[:spare]] = True
        return Selection.from_mask(layout, mask)

    # budgets ----------------------------------------------------------------------------------------------------
    @property
    def _exact(self) -> bool:
        return self.exact_budget or isinstance(self.keep, int)

    def _budget(self, image: _Image) -> int:
        """Tokens of an image that an exact budget lets through."""
        return tokens_to_keep(self.keep, image.n)

    def _whole(self, image: _Image) -> bool:
        if self._exact:
            return self._budget(image) == image.n
        return self.keep == 1.0 and self.layout == "hf"

    def _counts(self, image: _Image, tokens: EntryTokens, rank: LongTensor) -> list[int]:
        """Tokens to keep of the thumbnail and of every crop."""
        cells = image.cells
        if self._whole(image):
            return [cells, *image.sizes]
        if not self._exact:
            ratios = [min(1.0, self.keep * w) for w in image.weights]
            counts = [int(cells * self.keep), *(int(n * r) for n, r in zip(image.sizes, ratios, strict=True))]
            if any(counts) or self.layout == "official":
                return counts
            if image.overview is not None:
                return [1, *counts[1:]]
            best = max(range(len(image.weights)), key=image.weights.__getitem__)
            return [0, *(int(frame == best) for frame in range(len(image.crops)))]
        shares = [cells, *(n * w for n, w in zip(image.sizes, image.weights, strict=True))]
        caps, budget = [cells, *image.sizes], self._budget(image)
        if self.newlines == "all" or image.overview is None:
            rows = image.newlines if self.layout == "hf" else image.tiles[0] * tokens.layout.view_grid[0]
            if budget <= rows:
                raise ValueError(
                    f"{budget} tokens leave no room for a patch beside the {rows} newlines of this image; keep more, "
                    "or only the newlines of rows that keep a patch (newlines='occupied')."
                )
            return largest_remainder(shares, budget - rows, caps)
        low, high = max(1, budget - image.newlines), min(budget, sum(caps))
        crops = rank[image.crops]
        while low < high:
            middle = (low + high + 1) // 2
            counts = largest_remainder(shares, middle, caps)
            chosen = crops < torch.tensor(counts[1:], device=rank.device)[:, None]
            rows = int(to_canvas(chosen, image.tiles, tokens.layout.view_grid).any(1).sum()) if image.crops else 0
            low, high = (middle, high) if middle + rows <= budget else (low, middle - 1)
        return largest_remainder(shares, low, caps)

    # scores -----------------------------------------------------------------------------------------------------
    def _images(self, tokens: EntryTokens, row: Tensor, present: Tensor) -> list[_Image]:
        layout = tokens.layout
        views: list[list[int]] = [[] for _ in layout.n]
        for view, owner in enumerate(layout.view_image.tolist()):
            views[owner].append(view)
        small = [True] * len(row) if layout.thumbnail is None else layout.thumbnail.tolist()
        sizes = present.sum(1).tolist()
        images = []
        for i, mine in enumerate(views):
            if layout.kind[i] == "video":
                images.append(self._video(tokens, i, mine, present))
                continue
            overview = [v for v in mine if small[v]]
            if len(overview) != 1:
                raise ValueError(
                    "'globalcom2' needs one view that shows the whole image (a thumbnail, or the only view); this input "
                    "has several equal views, such as the frames of a video."
                )
            crops = [v for v in mine if not small[v]]
            tiles = layout.tiles[i] if crops else (0, 0)
            held = [sizes[v] for v in crops]
            weights = crop_weights(row[overview[0]], layout.view_grid, tiles, self.tau).tolist() if crops else []
            newlines = layout.n[i] - sizes[overview[0]] - sum(held)
            images.append(
                _Image(i, overview[0], crops, tiles, layout.n[i], newlines, sizes[overview[0]], held, weights)
            )
        return images

    def _video(self, tokens: EntryTokens, number: int, frames: list[int], present: Tensor) -> _Image:
        if self.layout == "official":
            raise ValueError("layout='official' is the released code's, which has no videos; layout='hf' does them.")
        sizes, n = present[frames].sum(1).tolist(), tokens.layout.n[number]
        weights = richness(self._video_scores(tokens, frames, present)[1].sum(1), self.tau).tolist()
        return _Image(number, None, frames, (0, 0), n, n - sum(sizes), 0, sizes, weights)

    def _compared(self, tokens: EntryTokens) -> Tensor:
        """[V, N, C] what the cosine of towers without a CLS token, and of videos, compares."""
        return tokens.rows if self.cosine == "patches" else tokens.layout.to_views(tokens.projected)

    def _video_scores(self, tokens: EntryTokens, frames: list[int], present: Tensor) -> tuple[Tensor, Tensor]:
        """[T, N] fp32 each: minus the cosine of every token to the mean of its frame, and to the mean of the video."""
        x, real = self._compared(tokens)[frames], present[frames]
        return negative_cosine(x, real), negative_cosine(x.flatten(0, 1)[None], real.flatten()[None]).view(real.shape)

    @staticmethod
    def _spread(tokens: EntryTokens, image: _Image, row: Tensor, present: Tensor) -> Tensor:
        """[n, N] the thumbnail's scores enlarged onto the unpadded picture, cut into the crops' cells."""
        layout = tokens.layout
        picture = to_canvas(present[image.crops], image.tiles, layout.view_grid)
        enlarged = enlarge(row[image.overview], layout.view_grid, layout.grid[image.number])
        canvas = torch.zeros(picture.shape, device=row.device).masked_scatter(picture, enlarged)
        return from_canvas(canvas, image.tiles, layout.view_grid)


def _comparable(scores: Tensor, thumbnail: Tensor | None) -> Tensor:
    """Scores [V, N] in which thumbnails, like crops, have unit length, so that a heat map shows both."""
    if thumbnail is None:
        return scores
    unit = scores / scores.masked_fill(scores.isinf(), 0).norm(dim=1, keepdim=True).clamp_min(1e-12)
    return torch.where(thumbnail[:, None], unit, scores)


def _official(tokens: EntryTokens, images: list[_Image], scores: Tensor, present: Tensor, kept: Tensor) -> Selection:
    """The released code's sequence; extra newlines take the places of dropped patches in the prompt."""
    layout, grid = tokens.layout, tokens.layout.view_grid
    number = layout.to_views(torch.arange(layout.cell.shape[1], device=kept.device).expand_as(layout.cell), fill=-1)
    fed, copied = [], []
    for image in images:
        overview = scores[image.overview].argsort(descending=True, stable=True)[: int(kept[image.overview].sum())]
        order = number[image.overview, overview]
        source = order
        if image.crops:
            which, key = misplaced_rows(present[image.crops], kept[image.crops], image.tiles, grid)
            height, width = image.tiles[0] * grid[0], image.tiles[1] * grid[1]
            mine = layout.valid[image.number]
            newline = (mine & ~layout.patch[image.number]).nonzero()[:, 0]
            dropped = mine.clone()
            dropped[torch.cat([order, number[image.crops].flatten()[which], newline])] = False
            lent = dropped.nonzero()[: height - len(newline), 0]
            if len(newline) + len(lent) < height:
                raise ValueError(
                    f"layout='official' puts {height} newlines into this image, more than the model has places left "
                    "beside the kept patches; keep less or use layout='hf'."
                )
            rows = torch.arange(height, device=key.device) * (width + 1) + width
            sequence = torch.cat([key, rows]).argsort()
            patches = number[image.crops].flatten()[which]
            order = torch.cat([order, torch.cat([patches, newline, lent])[sequence]])
            again = newline[-1:].expand(len(lent))
            source = torch.cat([source, torch.cat([patches, newline, again])[sequence]])
        fed.append(order)
        copied.append(source)
    keep, copies = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (fed, copied))
    return Selection(keep, [len(f) for f in fed], copies=copies)
