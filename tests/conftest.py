# SPDX-License-Identifier: Apache-2.0
"""Fixtures that the evaluation's and the command line's tests share."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

torch.set_num_threads(1)  # two test processes share two cores


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A saved LLaVA with random weights, tokenizer and processor: 36 visual tokens at 48 px."""
    from vlmcompress.training.processor import VOCAB_SIZE, build_processor

    folder = tmp_path_factory.mktemp("models") / "tiny-random"
    processor = build_processor(48, 8)
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2, image_size=48,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=3,
        ),
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=36,
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def picture(tmp_path_factory):
    """A PNG of 60 × 90 pixels of noise."""
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)).save(path)
    return path
