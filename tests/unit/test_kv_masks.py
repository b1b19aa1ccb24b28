# SPDX-License-Identifier: Apache-2.0
"""H2O's official mask simulation without a recent window, against sums by hand."""

from __future__ import annotations

import math

import pytest
import torch
from models import IMAGE, prompts, tiny_llava
from scripted import Scripted

import vlmcompress


@pytest.mark.parametrize("recent", [0, 0.05])  # a share that rounds to nothing is no window either
@torch.no_grad()
def test_without_a_window_a_token_does_not_see_itself(recent):
    """The next query sees the best entries alone, and no entry's score is lost."""
    torch.manual_seed(0)
    prompt, steps, heavy = 12, 5, 4
    q, k, v = (torch.randn(1, 2, prompt + steps, 8) for _ in range(3))
    run = Scripted(q, k, v)
    logits = q @ k.mT / math.sqrt(8)
    causal = torch.ones(prompt, prompt).tril().bool()
    score = logits[0, :, :prompt, :prompt].masked_fill(~causal, float("-inf")).softmax(-1).sum(1)
    with run.compress("h2o", heavy=heavy, recent=recent, masked=True):
        run.feed(0, prompt)
        for new in range(prompt, prompt + steps):
            seen = torch.zeros(2, new + 1, dtype=torch.bool).scatter(1, score.topk(heavy).indices, True)
            row = logits[0, :, new, : new + 1].masked_fill(~seen, float("-inf")).softmax(-1)
            out = run.feed(new, new + 1)[0, :, 0]
            torch.testing.assert_close(out, (row[:, None] @ v[0, :, : new + 1])[:, 0], atol=1e-5, rtol=1e-5)
            score = torch.nn.functional.pad(score, (0, 1)) + row
            torch.testing.assert_close(run.store.books["score"][0], score, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_both_kernels_and_padding(attention):
    model = tiny_llava(attention=attention, eos_token_id=None)
    greedy = dict(max_new_tokens=5, do_sample=False, suppress_tokens=[IMAGE])
    with vlmcompress.compress(model, "h2o", heavy=9, recent=0, masked=True):
        answer = model.generate(**prompts([[5, "image", 7]], 36), **greedy)
        with pytest.raises(ValueError, match="takes no padding"):
            model.generate(**prompts([[5, "image", 7], [2, "image", 3]], 36), **greedy)
    model.set_attn_implementation("eager" if attention == "sdpa" else "sdpa")
    with vlmcompress.compress(model, "h2o", heavy=9, recent=0, masked=True):
        assert model.generate(**prompts([[5, "image", 7]], 36), **greedy).equal(answer)
