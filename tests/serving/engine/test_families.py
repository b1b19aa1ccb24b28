# SPDX-License-Identifier: Apache-2.0
"""The other families in a real engine: answers and placeholders are those of the compressed model of transformers."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from serving.engine import folders
from serving.engine.asking import Request, answers, by_engine, by_transformers
from serving.engine.conftest import ASSETS
from serving.engine.widened import widen
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmcompress

SIZES = [(60, 50), (30, 90), (96, 96), (130, 40), (64, 63)]
_QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
MARK = {"internvl": "<IMG_CONTEXT>", "qwen2_5_vl": _QWEN, "qwen3_vl": _QWEN}


def noise(size: tuple[int, int]) -> Image.Image:
    width, height = size
    pixels = np.random.default_rng(width * height).integers(
        0, 255, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8
    )
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def folder_of(family: str, base) -> tuple:
    """The folder that the engine loads, and the one that transformers loads."""
    if family == "llava_next":
        source = ASSETS / "models" / "tiny-llava-next"
        return widen(source, base / family), source
    made = getattr(folders, family.replace("llava_", ""))(base / family)
    return made, made


def requests_of(family: str, *, several: bool) -> list[Request]:
    mark = MARK.get(family, "<image>")
    found = [Request(f"{mark} what color is the star", [noise(size)]) for size in SIZES]
    found.append(Request("is there a ring", []))
    if several:
        found.append(Request(f"{mark} how many {mark} are red", [noise(SIZES[0]), noise(SIZES[1])]))
    return found


def compare(start, tmp_path, family: str, entry: dict, *, several: bool, tokens: list[int] | None = None, **engine):
    served, plain = folder_of(family, tmp_path)
    llm = start(served, entry, max_model_len=2048, max_num_batched_tokens=2048, **engine)
    processor = AutoProcessor.from_pretrained(plain)
    model = AutoModelForImageTextToText.from_pretrained(plain).eval()
    requests = requests_of(family, several=several)
    outputs = by_engine(llm, requests)
    options = {name: value for name, value in entry.items() if name != "method"}
    uncompressed = by_transformers(model, processor, requests)
    with vlmcompress.compress(model, entry["method"], positions="contiguous", **options):
        expected = by_transformers(model, processor, requests)
    assert answers(outputs) == expected
    assert expected != uncompressed
    image = llm.llm_engine.model_config.hf_config.image_token_id
    counts = [output.prompt_token_ids.count(image) for output in outputs]
    if tokens is not None:
        assert counts[: len(tokens)] == tokens
    return counts


@pytest.mark.parametrize("method", ["vtc-cls", "todre"])
def test_llava_next(start, tmp_path, method):
    more = {"newlines": False} if method == "vtc-cls" else {"stage2": "never"}
    compare(start, tmp_path, "llava_next", {"method": method, "keep": 30, **more}, several=True, tokens=[30] * 5)


def test_llava_next_by_a_share(start, tmp_path):
    entry = {"method": "globalcom2", "keep": 0.2, "exact_budget": True}
    counts = compare(start, tmp_path, "llava_next", entry, several=False)
    assert len(set(counts[:5])) > 1  # follows the size


def test_llava_onevision(start, tmp_path):
    entry = {"method": "vtc-cls", "keep": 20, "newlines": False}
    compare(start, tmp_path, "llava_onevision", entry, several=False, tokens=[20] * 5)


def test_internvl(start, tmp_path):
    entry = {"method": "vtc-cls", "keep": 12}
    compare(start, tmp_path, "internvl", entry, several=True, tokens=[12] * 5)
