# SPDX-License-Identifier: Apache-2.0
"""The prompts of each family in the matrix: one image, a ragged batch padded on the left, two images, a video."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import models
import models_next
import models_qwen
import models_tiles
import models_video
import torch

Inputs = dict[str, torch.Tensor]
PROMPTS = ("one", "ragged", "two images", "video")


@dataclass(frozen=True)
class Stories:
    """``build(attention)`` a tiny random model; ``write(model, spec)`` inputs of the rows in ``specs[prompt]``."""

    build: Callable[[str], Any]
    write: Callable[[Any, list[list]], Inputs]
    specs: dict[str, list[list]]
    #: ids that a random model would answer with, though they stand for pictures
    special: tuple[int, ...] = (models.IMAGE,)


def _specs(a: Any, b: Any, video: Any = None) -> dict[str, list[list]]:
    found = {"one": [[5, a, 7]], "ragged": [[5, a, 7], [9, b, 4]], "two images": [[5, a, 3, b, 4]]}
    return {**found, "video": [[5, video, 7]]} if video else found


def _qwen(name: str) -> Stories:
    return Stories(
        lambda attention: models_qwen.tiny_qwen(attention, family=name),
        lambda model, spec: models_qwen.prompts_qwen(spec, family=name),
        _specs((4, 6), (4, 4), (2, 4, 6)),
        (models_qwen.IMAGE, models_qwen.VIDEO, models_qwen.START, models_qwen.END),
    )


def _tiles(name: str) -> Stories:
    family = models_tiles.FAMILIES[name]
    a, b = ((2, 2), (1, 2)) if family.tiled else ((0, 0), (0, 0))
    video = ("video", 3) if name in models_tiles.VIDEOS else None
    return Stories(family.build, partial(models_tiles.prompts, family), _specs(a, b, video))


STORIES = {
    "llava": Stories(
        lambda attention: models.tiny_llava(attention=attention, eos_token_id=None),
        lambda model, spec: models.prompts(spec, 36),
        _specs("image", "image"),
    ),
    "llava_next": Stories(
        lambda attention: models_next.tiny_next(attention=attention, eos_token_id=None),
        models_next.prompts_next,
        _specs("wide", "square"),
    ),
    **{
        name: Stories(
            build,
            models_video.prompts_video,
            _specs("wide", "square", ("video", 3)),
            (models.IMAGE, models_video.VIDEO),
        )
        for name, build in models_video.BUILDERS.items()
    },
    **{name: _qwen(name) for name in models_qwen.FAMILIES},
    **{name: _tiles(name) for name in ("internvl", "smolvlm", "idefics3", "gemma3", "paligemma")},
}
