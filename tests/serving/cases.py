# SPDX-License-Identifier: Apache-2.0
"""A tiny random model of every served family, one prompt with one image for it, and the geometry that is counted by."""

from __future__ import annotations

from models import prompts, tiny_llava
from models_next import SIZES, prompts_next, tiny_next
from models_qwen import prompts_qwen, tiny_qwen
from models_tiles import FAMILIES as TILED
from models_tiles import Family
from models_tiles import prompts as prompts_tiles
from models_video import prompts_video, tiny_onevision

from vlmcompress import flex

#: what goes to ``get_image_features``
DOOR = ("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images")


def llava():
    return tiny_llava(), prompts([[3, "image", 5]], 36), ()


def llava_next(size: str = "square"):
    model = tiny_next()
    return model, prompts_next(model, [[3, size, 5]]), SIZES[size]


def llava_onevision(size: str = "square"):
    model = tiny_onevision()
    return model, prompts_video(model, [[3, size, 5]]), SIZES[size]


def internvl():
    model = TILED["internvl"].build()
    return model, prompts_tiles(TILED["internvl"], model, [[3, (2, 1), 5]]), (3,)


def qwen2_5_vl():
    return tiny_qwen(family="qwen2_5_vl"), prompts_qwen([[3, (4, 6), 5]], family="qwen2_5_vl"), (1, 8, 12)


def qwen3_vl():
    return tiny_qwen(family="qwen3_vl"), prompts_qwen([[3, (4, 6), 5]], family="qwen3_vl"), (1, 8, 12)


def flexible(family: str):
    """The same with a TokenFLEX projector, and a prompt with a place for every patch."""
    model, inputs, shape = CASES[family]()
    flex.install(model, counts=(4, 9))
    if family == "internvl":  # no pixel shuffle any more
        inputs = prompts_tiles(Family(TILED[family].build, tokens=64, tiled=True), model, [[3, (2, 1), 5]])
    return model, inputs, shape


CASES = {case.__name__: case for case in (llava, llava_next, llava_onevision, internvl, qwen2_5_vl, qwen3_vl)}

EXACT = {"exact_budget": True}
#: methods that can be served everywhere ...
METHODS = {
    "vtc-cls": {"keep": 10, "newlines": False},
    "grid": {"keep": 10},
    "pool": {"keep": 12},
    "globalcom2": {"keep": 0.4, **EXACT},
    "todre": {"keep": 9, "stage2": "never"},
    "none": {},
}
#: ... and those for which patches have to be tokens, or images one view
LLAVA_ONLY = {
    "flowcut": {"keep": 10},
    "resize": {"keep": 0.25},
    "random": {"keep": 10},
    "tome": {"keep": 12},
    "tower-cls": {"keep": 12},
}


def given_of(inputs: dict, family: str) -> dict:
    """The arguments of ``get_image_features`` in a model's inputs."""
    given = {name: inputs[name] for name in DOOR if name in inputs}
    if family == "internvl":
        given["placeholders"] = inputs["input_ids"] == 3
    return given
