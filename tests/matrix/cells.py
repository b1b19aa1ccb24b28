# SPDX-License-Identifier: Apache-2.0
"""The cells of the matrix of methods and families: tiny models, what each method is told, and what comes of it.

``python tests/matrix/cells.py`` runs all and rewrites ``vlmcompress/support.json``, which ``vlmcompress.support`` reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import models_next
import models_qwen
import models_tiles
import models_video
import torch

import vlmcompress
import vlmcompress.flex

RECORD = Path(vlmcompress.__file__).parent / "support.json"
#: what each method is told on models whose images are about 20 to 80 tokens
OPTIONS: dict[str, dict[str, Any]] = {
    "a2sf": {"budget": 0.5},
    "centerclip": {"keep": 4},
    "explainability": {"keep": 0.3, "predictor": "identity"},
    "fastv": {"keep": 4, "layer": 1},
    "flowcut": {"keep": 4},
    "globalcom2": {"keep": 0.3},
    "grid": {"keep": 0.3},
    "h2o": {"heavy": 0.3, "recent": 0.2},
    "keep-last": {"budget": 16, "sinks": 2},
    "keyformer": {"budget": 0.5, "noise": False},
    "lazyeviction": {"budget": 16, "window": 1},
    "mustdrop": {"merge": False, "layers": (0, 1), "keep": 0.7},
    "no-vision": {},
    "none": {},
    "output-cache": {"first": 1},
    "pool": {"keep": 0.3},
    "quota": {"keep": 0.3, "scores": "even"},
    "random": {"keep": 0.3},
    "resize": {"keep": 0.3},
    "todre": {"keep": 0.3, "pivot": "center"},
    "token-correlation": {"sampler": "topk", "keep": 0.5},
    "tokenflex": {"keep": 4},
    "tokenflex-adaptive": {"counts": (4, 9), "thresholds": (0.4,)},
    "tokenselect": {"select": 8, "sinks": 2, "local": 4},
    "tome": {"keep": 4},
    "tower-cls": {"keep": 4},
    "transprune": {"layers": (1, 2), "fractions": (0.6, 0.3)},
    "vtc-cls": {"keep": 0.3, "layers": 2},
}

#: what these draw depends on the place in the batch
DRAWING = ("random", "keyformer")


@dataclass(frozen=True)
class Family:
    """A tiny random model, a left-padded batch of two prompts for it, and each of them alone."""

    build: Callable[[], Any]
    batch: Callable[[Any], dict[str, torch.Tensor]]
    alone: Callable[[Any, dict[str, torch.Tensor], int], dict[str, torch.Tensor]]


def _llava() -> Family:
    spec: list[list[int | str]] = [[5, "image", 7], [9, "image", 4]]
    return Family(
        models.tiny_llava,
        lambda model: models.prompts(spec, 36),
        lambda model, batch, row: models.row_alone(batch, spec, row),
    )


def _next() -> Family:
    return Family(
        models_next.tiny_next,
        lambda model: models_next.prompts_next(model, [[5, "wide", 7], [3, "square", 4]]),
        lambda model, batch, row: models_next.one_row(batch, row, slice(row, row + 1)),
    )


def _frames(name: str, video: bool) -> Family:
    spec: list[list] = [[5, ("video", 3), 7], [9, ("video", 3), 4]] if video else [[5, "wide", 7], [9, "square", 4]]
    return Family(
        models_video.BUILDERS[name],
        lambda model: models_video.prompts_video(model, spec),
        lambda model, batch, row: models_video.row_of(batch, spec, row),
    )


def _qwen(name: str, video: bool) -> Family:
    parts = [(2, 4, 6), (2, 4, 4)] if video else [(4, 6), (4, 4)]
    return Family(
        lambda: models_qwen.tiny_qwen(family=name),
        lambda model: models_qwen.prompts_qwen([[5, parts[0], 7], [9, parts[1], 4]], family=name),
        lambda model, batch, row: models_qwen.row_of(batch, row),
    )


def _tiles(name: str, video: bool = False) -> Family:
    family = models_tiles.FAMILIES[name]
    tiles = [(2, 2), (1, 2)] if family.tiled else [(0, 0), (0, 0)]
    parts = [("video", 4), ("video", 3)] if video else tiles
    spec: list[list] = [[5, parts[0], 7], [9, parts[1], 4]]
    return Family(
        family.build,
        lambda model: models_tiles.prompts(family, model, spec),
        lambda model, batch, row: models_tiles.one_row(batch, spec, row),
    )


FAMILIES = {
    "llava": _llava(),
    "llava_next": _next(),
    **{name: _frames(name, False) for name in models_video.BUILDERS},
    **{f"{name} video": _frames(name, True) for name in models_video.BUILDERS},
    **{name: _qwen(name, False) for name in models_qwen.FAMILIES},
    **{f"{name} video": _qwen(name, True) for name in models_qwen.FAMILIES},
    **{name: _tiles(name) for name in ("internvl", "smolvlm", "idefics3", "gemma3", "paligemma")},
    **{f"{name} video": _tiles(name, True) for name in models_tiles.VIDEOS},
}


@torch.no_grad()
def outcome(method: str, family: str) -> str:
    """Run one cell: "" when the method works and answers a batch as it answers each prompt alone, else why it refuses."""
    case = FAMILIES[family]
    model = case.build()
    model.generation_config.eos_token_id = None
    try:
        batch = case.batch(model)
        if method.startswith("tokenflex"):
            vlmcompress.flex.install(model, counts=(4, 9))
        with vlmcompress.compress(model, method, **OPTIONS[method]) as handle:
            together = answers(model, batch)
            ledger = handle.last
            assert len(ledger.samples) == 2 and all(sample.images for sample in ledger.samples)
            if method in DRAWING:
                return ""
            for row in range(2):
                alone = answers(model, case.alone(model, batch, row))
                assert alone[0].tolist() == together[row].tolist()
                kept = [image.kept.tolist() for image in ledger.samples[row].images]
                assert [image.kept.tolist() for image in handle.last.samples[0].images] == kept
    except ValueError as refusal:
        return reason(refusal, method, model)
    assert "vlmcompress" not in model.config.to_dict()
    return ""


def reason(refusal: ValueError, method: str, model: Any) -> str:
    """The refusal's sentence, for a table in which method and family are named already."""
    why = str(refusal).removeprefix(f"'{method}' does not work on '{model.config.model_type}': ").rstrip(".")
    return why.replace(f"'{method}'", "it").replace(type(model).__name__, "the model")


def answers(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    out = model.generate(**inputs, do_sample=False, max_new_tokens=3, min_new_tokens=3)
    return out[:, inputs["input_ids"].shape[1] :]


if __name__ == "__main__":
    found = {method: {family: outcome(method, family) for family in sorted(FAMILIES)} for method in sorted(OPTIONS)}
    RECORD.write_text(json.dumps(found, indent=1) + "\n")
