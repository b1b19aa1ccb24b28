# SPDX-License-Identifier: Apache-2.0
"""Families that the plug-in has no class for: refused when the server starts, and served as ever without an entry."""

from __future__ import annotations

import pytest
from serving.engine import folders
from serving.engine.asking import answers, by_engine, by_transformers
from serving.engine.test_qwen import PROMPTS
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm import ModelRegistry
from vllm.plugins import load_general_plugins

from vlmcompress.serving.vllm import REFUSED, SERVED
from vlmcompress.serving.vllm.refused import Refusing


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folders.qwen2_vl(tmp_path_factory.mktemp("models") / "qwen2")


@pytest.mark.parametrize("architecture", REFUSED)
def test_the_class_is_vllms_own_behind_a_check(architecture):
    load_general_plugins()
    loaded = ModelRegistry.models[architecture].load_model_cls()
    check, stock = loaded.__bases__
    assert check is Refusing and stock.__name__ == architecture and stock.__module__.startswith("vllm.")


def test_an_entry_stops_the_start_and_names_what_works(start, folder):
    with pytest.raises(ValueError, match="Qwen2VLForConditionalGeneration cannot be served compressed") as told:
        start(folder, {"method": "grid", "keep": 9}, max_model_len=512)
    sentence = str(told.value)
    assert all(name in sentence for name in SERVED) and "`vlmcompress serve`" in sentence and "\n" not in sentence


def test_without_an_entry_the_model_is_served(start, folder):
    llm = start(folder, max_model_len=512)
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert answers(by_engine(llm, PROMPTS)) == by_transformers(model, processor, PROMPTS)
