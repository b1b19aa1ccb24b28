# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL and Qwen3-VL images in a real engine: survivors keep their positions, answers are those of transformers."""

from __future__ import annotations

import pytest
import torch
from serving.engine import folders
from serving.engine.asking import NEW_TOKENS, Request, answers, by_engine, by_transformers, questions
from serving.engine.conftest import ASSETS
from serving.engine.test_families import noise
from serving.engine.widened import widen_qwen
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmcompress

MARK = "<|vision_start|><|image_pad|><|vision_end|>"
#: square, wide, tall, two images (the second one taller), text alone
PROMPTS = [
    Request(f"{MARK} what color is the star", [noise((64, 64))]),
    Request(f"is there {MARK} what color is the star", [noise((130, 40))]),
    Request(f"{MARK} is there a ring", [noise((40, 130))]),
    Request(f"{MARK} how many {MARK} are red", [noise((60, 50)), noise((32, 100))]),
    Request("is there a ring", []),
]
ENTRY = {"method": "vtc-cls", "keep": 0.5}


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def folder(request, tmp_path_factory):
    return getattr(folders, request.param)(tmp_path_factory.mktemp("models") / "qwen")


@pytest.fixture(scope="module")
def reference(folder):
    """Greedy tokens and their log-probabilities by the compressed model of transformers, and by the uncompressed one."""
    processor, model = AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()

    @torch.no_grad()
    def ask(request: Request) -> tuple[list[int], list[float]]:
        inputs = processor(text=request.text, images=request.images or None, return_tensors="pt")
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=NEW_TOKENS, output_logits=True, return_dict_in_generate=True
        )
        new = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        steps = [logits[0].log_softmax(-1)[token].item() for logits, token in zip(output.logits, new, strict=True)]
        return new, steps

    plain = [ask(request) for request in PROMPTS]
    with vlmcompress.compress(model, **ENTRY):
        return [ask(request) for request in PROMPTS], plain


def switched_on(llm):
    """vLLM's runner for CPUs never asks a model for changed positions, its runners for GPUs do: say it by hand."""
    llm.collective_rpc(lambda worker: setattr(worker.model_runner, "is_multimodal_pruning_enabled", True))
    return llm


@pytest.mark.parametrize("chunk", [512, 10, 13])
def test_answers_and_log_probabilities(start, folder, reference, chunk):
    expected, plain = reference
    llm = switched_on(start(folder, ENTRY, max_num_batched_tokens=chunk, max_num_seqs=2, max_model_len=512))
    for _ in range(2):  # the second time from kept prefixes and kept images
        outputs = by_engine(llm, PROMPTS, logprobs=2)
        for output, (tokens, steps) in zip(outputs, expected, strict=True):
            found = output.outputs[0]
            for step, (token, value) in enumerate(zip(tokens, steps, strict=True)):
                assert found.logprobs[step][token].logprob == pytest.approx(value, abs=2e-5)
                if found.token_ids[step] != token:  # two tokens as likely as each other, from where the answers part
                    assert found.logprobs[step][found.token_ids[step]].logprob == pytest.approx(value, abs=2e-5)
                    break
    assert [steps for _, steps in expected] != [steps for _, steps in plain]


def test_placeholders_follow_the_size(start, folder):
    llm = switched_on(start(folder, {"method": "grid", "keep": 9}, max_model_len=512, enable_mm_embeds=True))
    image = llm.llm_engine.model_config.hf_config.image_token_id
    outputs = by_engine(llm, PROMPTS)
    assert [output.prompt_token_ids.count(image) for output in outputs] == [9, 9, 9, 18, 0]
    ready = {"image_embeds": torch.zeros(9, 64 * image_width(llm)), "image_grid_thw": torch.tensor([[1, 6, 6]])}
    with pytest.raises(ValueError, match="send pixels instead of embeddings"):
        by_engine(llm, [Request(PROMPTS[0].text, ready)])
    assert by_engine(llm, PROMPTS[:1])[0].outputs[0].token_ids == outputs[0].outputs[0].token_ids


def test_answers_of_sixty_questions(start, tmp_path):
    """The small model that this project ships, whose answers mean something."""
    source = ASSETS / "models" / "tiny-qwen2.5-vl"
    llm = switched_on(start(widen_qwen(source, tmp_path / "wide"), {"method": "vtc-cls", "keep": 0.25}))
    processor, model = AutoProcessor.from_pretrained(source), AutoModelForImageTextToText.from_pretrained(source).eval()
    requests = questions(processor, 60)
    outputs = by_engine(llm, requests)
    assert {output.prompt_token_ids.count(model.config.image_token_id) for output in outputs} == {36}
    uncompressed = by_transformers(model, processor, requests)
    with vlmcompress.compress(model, "vtc-cls", keep=0.25):
        assert answers(outputs) == by_transformers(model, processor, requests)
    assert answers(outputs) != uncompressed


def image_width(llm) -> int:
    """Groups of channels in one token: DeepStack's follow behind the token itself."""
    vision = llm.llm_engine.model_config.hf_config.vision_config
    return 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
