# SPDX-License-Identifier: Apache-2.0
"""ENTRY methods on tiled images against a slow reference: the stock model on the full sequence, dropped tokens hidden by
a mask, no cache; the first answer and a second turn."""

from __future__ import annotations

import pytest
import torch
from models import IMAGE, cached
from models_next import prompts_next, tiny_next

import vlmcompress

torch.set_num_threads(1)
#: a random model would otherwise answer with image placeholders
GREEDY = dict(max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE])
METHODS = [
    ("globalcom2", {"keep": 0.25}),
    ("globalcom2", {"keep": 33, "newlines": "occupied"}),
    ("vtc-cls", {"keep": 30}),
    ("grid", {"keep": 0.2}),
    ("no-vision", {}),
]
names = [name + "".join(f"-{v}" for v in o.values()) for name, o in METHODS]
PROMPTS = {
    "one": [[5, "wide", 7]],
    "ragged": [[5, "square", 3], [2, "row", 3, "tall", 1], [8, "column", 4]],
    "with text only": [[4, "tall", 3], [9]],
}


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    return tiny_next(attention=request.param, eos_token_id=None)


def reference(model, inputs, gone, policy, ids):
    """Logits of the stock model on ``ids`` (the prompt and what follows it) in which ``gone`` columns are invisible."""
    extra = ids.shape[1] - gone.shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, extra), value=1).bool()
    gone = torch.nn.functional.pad(gone, (0, extra))
    features = torch.cat(model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output)
    embeds = model.get_input_embeddings()(ids).masked_scatter((ids == IMAGE)[..., None], features)
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    if policy == "contiguous":
        positions = positions - (gone.long().cumsum(1) - gone.long())
    seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril() & (mask & ~gone)[:, None]
    seen |= torch.eye(ids.shape[1], dtype=torch.bool)
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
    states = model.model.language_model(inputs_embeds=embeds, attention_mask=additive, position_ids=positions)
    return model.lm_head(states.last_hidden_state)


def greedy(model, inputs, gone, policy, ids):
    for _ in range(GREEDY["max_new_tokens"]):
        logits = reference(model, inputs, gone, policy, ids)[:, -1]
        logits[:, IMAGE] = float("-inf")
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize("policy", ["original", "contiguous"])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(("name", "options"), METHODS, ids=names)
@torch.no_grad()
def test_equals_reference(model, name, options, prompt, policy):
    inputs = prompts_next(model, PROMPTS[prompt])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    more = torch.randint(4, 97, (len(ids), 3), generator=torch.Generator().manual_seed(3))
    with vlmcompress.compress(model, name, positions=policy, **options) as handle:
        logits = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
        gone = torch.zeros_like(ids, dtype=torch.bool)
        for row, sample in enumerate(handle.last.samples):
            columns = (ids[row] == IMAGE).nonzero()[:, 0].split([i.n_original for i in sample.images])
            for image, place in zip(sample.images, columns, strict=True):
                gone[row, place] = True
                gone[row, place[image.kept]] = False
        first = model.generate(**inputs, return_dict_in_generate=True, **GREEDY)
        turn = torch.cat([first.sequences, more], 1)
        longer = torch.nn.functional.pad(mask, (0, turn.shape[1] - ids.shape[1]), value=1)
        second = model.generate(input_ids=turn, attention_mask=longer, **cached(first), **GREEDY)
    expected = reference(model, inputs, gone, policy, ids)
    here = mask.bool() & ~gone
    torch.testing.assert_close(logits[here], expected[here], atol=1e-4, rtol=1e-4)
    assert first.sequences.equal(greedy(model, inputs, gone, policy, ids))
    assert second.equal(greedy(model, inputs, gone, policy, turn))
