# SPDX-License-Identifier: Apache-2.0
"""QueCC on a stock LLaVA: installing, asking, saving and loading, what is refused."""

from __future__ import annotations

import pytest
import torch
from models import IMAGE, prompts, tiny_llava
from models_next import tiny_next
from transformers import AutoModelForImageTextToText

import vlmcompress
from vlmcompress import quecc
from vlmcompress.projectors.quecc import layers_for

SPEC = [[2, "image", 7], [3, "image", 2, "image", 4]]
GREEDY = dict(max_new_tokens=4, do_sample=False, suppress_tokens=[IMAGE])


def fresh(tokens: int = 9, **options):
    model = tiny_llava(eos_token_id=None)
    torch.manual_seed(1)
    quecc.install(model, tokens, **options)
    return model


def batch(tokens: int, spec=SPEC):
    inputs = prompts(spec, tokens)
    inputs["pixel_values"] = prompts(spec, 36)["pixel_values"]
    return inputs


def questions(rows: int = 2, seed: int = 0):
    ids = torch.randint(4, 97, (rows, 5), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"query_input_ids": ids, "query_attention_mask": mask}


class Words:
    """A tokenizer of numbers: what :func:`vlmcompress.quecc.query` needs of one."""

    def __call__(self, texts, padding, return_tensors):
        rows = [[hash(word) % 90 + 4 if not word.isdigit() else int(word) for word in text.split()] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@pytest.mark.parametrize("tokens", [36, 9, 4, 1])
@torch.no_grad()
def test_the_question_steers_every_count_but_the_full_one(tokens):
    model = fresh(tokens)
    one, other = (model(**batch(tokens), **questions(seed=s)).logits[:, -1] for s in (0, 1))
    assert one.isfinite().all()
    if tokens == 36:  # regions of one patch: attention over one element
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    else:
        assert (one - other).abs().max() > 1e-3
    assert model.model.multi_modal_projector.question is None


@torch.no_grad()
def test_generate_inside_query_equals_the_forward_pass():
    model, inputs = fresh(), batch(9, [[2, "image", 7], [3, "image", 2]])
    ids = questions()["query_input_ids"]
    ids[0, :2] = 0
    texts = [" ".join(str(int(i)) for i in row if i) for row in ids]
    wanted = model(**inputs, **questions()).logits[:, -1]
    wanted[:, IMAGE] = float("-inf")
    with quecc.query(model, Words(), texts):
        answer = model.generate(**inputs, **GREEDY)
        assert answer[:, -4].equal(wanted.argmax(-1))
    with pytest.raises(ValueError, match="QueCC reads the question"):
        model(**inputs)


@torch.no_grad()
def test_rows_with_several_images_and_batches_agree_with_single_rows():
    model, inputs = fresh(), batch(9)
    logits = model(**inputs, **questions()).logits[:, -1]
    asked = questions()
    real = inputs["attention_mask"][0].bool()
    alone = model(
        input_ids=inputs["input_ids"][:1, real], pixel_values=inputs["pixel_values"][:1],
        query_input_ids=asked["query_input_ids"][:1, 2:], query_attention_mask=torch.ones(1, 3, dtype=torch.long),
    ).logits[:, -1]  # fmt: skip
    torch.testing.assert_close(alone, logits[:1], atol=1e-5, rtol=1e-4)
    mixed = {k: v.flip(0) for k, v in asked.items()}
    assert (model(**inputs, **mixed).logits[:, -1] - logits).abs().max() > 1e-3  # the wrong question for each


@torch.no_grad()
def test_generate_with_several_images_and_none_in_a_row():
    spec = [[2, "image", 3, "image", 2], [3], [3, "image", 2]]
    model, inputs = fresh(), batch(9, spec)
    ids = torch.randint(4, 97, (3, 5), generator=torch.Generator().manual_seed(0))
    texts = [" ".join(map(str, row)) for row in ids.tolist()]
    wanted = model(**inputs, query_input_ids=ids, query_attention_mask=torch.ones_like(ids)).logits[:, -1]
    with quecc.query(model, Words(), texts, images=[2, 0, 1]):
        found = model.generate(**inputs, **GREEDY, output_logits=True, return_dict_in_generate=True).logits[0]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    with (
        pytest.raises(ValueError, match="2 numbers for 3 questions"),
        quecc.query(model, Words(), texts, images=[2, 1]),
    ):
        pass


@torch.no_grad()
def test_what_a_row_without_a_question_asks():
    model, inputs = fresh(4), batch(4, [[2, "image", 3]])
    found = []
    for texts, options in ((["7 8"], {}), ([" "], {"fallback": "7 8"}), ([""], {})):
        with quecc.query(model, Words(), texts, **options):
            found.append(model(**inputs).logits)
    assert found[0].equal(found[1]) and not found[0].equal(found[2])


@torch.no_grad()
def test_query_none_needs_no_question_and_mean_differs():
    inputs = batch(4)
    none = fresh(4, query="none")
    assert none(**inputs).logits.equal(none(**inputs, **questions()).logits)
    last, mean = fresh(4), fresh(4, query="mean")
    mean.load_state_dict(last.state_dict())
    assert (last(**inputs, **questions()).logits - mean(**inputs, **questions()).logits).abs().max() > 1e-4


def test_gradients_reach_the_projector_and_not_the_language_model_through_the_question():
    model = fresh(4).train()
    inputs = batch(4)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    model(**inputs, **questions(), labels=labels).loss.backward()
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert not quecc.question_vectors(model, **questions()).requires_grad and model.training


@torch.no_grad()
def test_saves_and_loads(tmp_path):
    model, inputs = fresh(4, layers=(1, 3), norm_eps=0.1, dropout=0.5), batch(4)
    wanted = model(**inputs, **questions()).logits
    model.save_pretrained(tmp_path)
    again = quecc.from_pretrained(tmp_path).eval()
    assert again(**inputs, **questions()).logits.equal(wanted)
    assert not fresh(4, layers=(1, 3))(**inputs, **questions()).logits.equal(wanted)  # another norm_eps
    again.model.multi_modal_projector.train()
    assert not again(**inputs, **questions()).logits.equal(wanted)  # dropout
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'quecc' projector, but .* load it with vlmcompress\.quecc\.from_pretrained"):
        vlmcompress.compress(stock, "random", keep=2)
    tiny_llava().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no QueCC projector"):
        quecc.from_pretrained(tmp_path)


@torch.no_grad()
def test_methods_behind_it():
    model, inputs = fresh(9), batch(9)
    with vlmcompress.compress(model, "fastv", keep=3) as handle:
        model(**inputs, **questions())
        assert handle.last.layer_tokens[0] == 27 and handle.last.layer_tokens[-1] == 9
        assert "FLOPs are not known for the projector 'quecc'" in str(handle.report())
    with vlmcompress.compress(model, "random", keep=4) as handle:
        model(**inputs, **questions())
        assert handle.last.layer_tokens[0] == 12


def test_question_of_a_prompt():
    prompt = "USER: <image>\nWhat is this?\nAnswer briefly. ASSISTANT: a dog"
    assert quecc.question_of(prompt) == "What is this?\nAnswer briefly."
    assert (
        quecc.question_of("USER: <image>\nWhat is this?") == "What is this?"
    )  # the official code cuts off the last letter
    assert quecc.question_of("no picture") == "image" == quecc.question_of("<image>\n ASSISTANT: x")
    assert quecc.question_of("<image>\nfirst ASSISTANT: a <image>\nlast ASSISTANT: b") == "last"
    encoded = quecc.encode_questions(Words(), ["  ", "7 8"])
    assert encoded["query_input_ids"].shape == (2, 2)


def test_layers_of_other_depths():
    assert [layers_for(n) for n in (24, 12, 4)] == [(12, 16, 22, 23), (6, 8, 11), (2, 3)]


def test_bad_input():
    model = tiny_llava()
    stock = model.model.multi_modal_projector
    for options, message in (
        ({"tokens": 5}, "makes 36, 9, 4, 1 tokens of 6 × 6 patches, not 5"), ({"heads": 5}, "32 does not split into 5"),
        ({"layers": (1, 9)}, "hidden states 0 to 4"), ({"layers": (3, 1)}, "ascending"), ({"layers": ()}, "ascending"),
        ({"query": "all"}, "query is one of"), ({"dropout": 1}, "0 to below 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            quecc.install(model, **{"tokens": 9, **options})
    assert model.model.multi_modal_projector is stock and not hasattr(model.config, "quecc")
    with pytest.raises(ValueError, match="cuts them into tiles"):
        quecc.install(tiny_next(), 9)
    with pytest.raises(ValueError, match="no QueCC projector"), quecc.query(model, Words(), ["1"]):
        pass
    ours = fresh(4)
    with pytest.raises(ValueError, match="one question for each of its rows"):
        ours(**batch(4), **questions(rows=1))
    with pytest.raises(ValueError, match="1 question vectors for 3 images"), quecc.query(ours, Words(), ["1 2"]):
        ours(**batch(4))
