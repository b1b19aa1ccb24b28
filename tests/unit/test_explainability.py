# SPDX-License-Identifier: Apache-2.0
"""The method `explainability`: its map against stock attention, its options, where it finds its net, what it refuses."""

from __future__ import annotations

import pytest
import torch
from models import cached, prompts, row_alone, tiny_llava
from models_next import one_row, prompts_next, tiny_next
from models_qwen import prompts_qwen, row_of, tiny_qwen
from models_video import BUILDERS, prompts_video
from models_video import row_of as video_row

import vlmcompress
from vlmcompress.methods.explainability import Explainability
from vlmcompress.relevance import FOLDER, RelevancePredictor
from vlmcompress.training.explainability import Watch

GREEDY = dict(max_new_tokens=3, do_sample=False)
SPEC = [[5, "image", 3, "image", 7], [9, "image", 4]]


@pytest.fixture
def net(tmp_path):
    torch.manual_seed(3)
    path = tmp_path / "net.safetensors"
    RelevancePredictor((8, 16), scale_by_length=True).save(path)
    return str(path)


@torch.no_grad()
def test_map_is_the_first_layers_attention_of_the_text_behind_each_image():
    model, inputs = tiny_llava(attention="eager"), prompts(SPEC, 36)
    stock = model(**inputs, output_attentions=True).attentions[0].mean(1)
    watch = Watch()
    model.set_attn_implementation("sdpa")
    with vlmcompress.compress(model, watch):
        model(**inputs)
    _, _, layout, maps = watch.seen[0]
    text = (inputs["input_ids"] != model.config.image_token_id) & inputs["attention_mask"].bool()
    for image, (row, columns) in enumerate(zip(layout.sample, layout.column, strict=True)):
        behind = text[row] & (torch.arange(text.shape[1]) > columns[-1])
        expected = stock[row][behind][:, columns].mean(0)
        torch.testing.assert_close(maps[image], expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_identity_keeps_the_most_attended_and_renumbers():
    model, inputs = tiny_llava(), prompts(SPEC, 36)
    watch = Watch()
    with vlmcompress.compress(model, watch):
        model(**inputs)
    best = [row.topk(9).indices.sort().values for row in watch.seen[0][3]]
    with vlmcompress.compress(model, "explainability", predictor="identity", keep=0.25) as handle:
        model(**inputs)
        kept = [image.kept for sample in handle.last.samples for image in sample.images]
        assert all(a.equal(b) for a, b in zip(best, kept, strict=True))
        assert handle.last.layer_tokens == [27] * 4
        assert handle.last.positions[0].max() == inputs["attention_mask"][0].sum() - 2 * 27 - 1
        assert handle.report().compressor_flops > 0


CASES = {
    "llava": lambda: (
        tiny_llava(eos_token_id=None),
        prompts(SPEC, 36),
        lambda batch, row: row_alone(batch, SPEC, row),
    ),
    "next": lambda: (
        tiny_next(eos_token_id=None),
        prompts_next(tiny_next(), [[5, "square", 7], [2, "wide", 3]]),
        lambda batch, row: one_row(batch, row, slice(row, row + 1)),
    ),
    "qwen": lambda: (tiny_qwen(), prompts_qwen([[5, (4, 6), 7], [2, (6, 6), 3, (2, 8), 4]]), row_of),
    "video": lambda: (
        (model := BUILDERS["llava_onevision"]()),
        prompts_video(model, [[5, ("video", 3), 7], [9, ("video", 3), 4]]),
        lambda batch, row: video_row(batch, [[5, ("video", 3), 7], [9, ("video", 3), 4]], row),
    ),
}
OPTIONS = [{}, {"joint": True}, {"protect_newline": True}, {"keep": 7, "suffix_tokens": 2}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_batched_equals_alone(case, options, net):
    model, inputs, alone = CASES[case]()
    model.generation_config.eos_token_id = None
    with vlmcompress.compress(model, "explainability", predictor=net, **({"keep": 0.3} | options)) as handle:
        batch, ledger = model.generate(**inputs, **GREEDY), handle.last
        assert ledger.layer_tokens[0] < sum(image.n_original for s in ledger.samples for image in s.images)
        for row in range(2):
            assert model.generate(**alone(inputs, row), **GREEDY)[0, -3:].equal(batch[row, -3:])
            for image, single in zip(ledger.samples[row].images, handle.last.samples[0].images, strict=True):
                assert image.kept.equal(single.kept)


@torch.no_grad()
def test_the_net_decides(net):
    model, inputs = tiny_llava(), prompts([[5, "image", 7]], 36)
    watch = Watch()
    with vlmcompress.compress(model, watch):
        model(**inputs)
    expected = RelevancePredictor.load(net)(watch.seen[0][3])[0].topk(9).indices.sort().values
    with vlmcompress.compress(model, "explainability", predictor=net, keep=9) as handle:
        model(**inputs)
        assert handle.last.samples[0].images[0].kept.equal(expected)
        mine = handle.report().compressor_flops
    with vlmcompress.compress(model, "explainability", predictor="identity", keep=9) as handle:
        model(**inputs)
        assert mine - handle.report().compressor_flops == 36 * RelevancePredictor.load(net).flops
        assert not handle.last.samples[0].images[0].kept.equal(expected)


@torch.no_grad()
def test_joint_budget_goes_where_the_scores_are():
    model, inputs = tiny_llava(), prompts([[5, "image", 3, "image", 7]], 36)
    watch = Watch()
    with vlmcompress.compress(model, watch):
        model(**inputs)
    ranking = watch.seen[0][3].flatten().topk(18).indices
    with vlmcompress.compress(model, "explainability", predictor="identity", keep=9, joint=True) as handle:
        model(**inputs)
        images = handle.last.samples[0].images
        assert [len(image.kept) for image in images] == [int((ranking < 36).sum()), int((ranking >= 36).sum())]


@torch.no_grad()
def test_text_in_front_of_the_image_only():
    model, inputs = tiny_llava(), prompts([[5, "image"]], 36)
    with vlmcompress.compress(model, "explainability", predictor="identity", keep=9) as handle:
        with pytest.warns(UserWarning, match="no text behind it"):
            model(**inputs)
        assert len(handle.last.samples[0].images[0].kept) == 9


@torch.no_grad()
def test_keeping_all_changes_nothing(net):
    model, inputs = tiny_llava(), prompts(SPEC, 36)
    before = model(**inputs).logits
    with vlmcompress.compress(model, "explainability", predictor=net, keep=1.0):
        assert model(**inputs).logits.equal(before)


@torch.no_grad()
def test_second_picture_behind_a_conversation():
    """An image that comes with a later turn is chosen from as in one prompt of both turns."""
    model = tiny_llava()
    both = prompts([[5, "image", 4, "image", 6]], 36)
    ids, pixels = both["input_ids"], both["pixel_values"]
    first = {"input_ids": ids[:, :45], "pixel_values": pixels[:1]}
    second = {"input_ids": ids[:, 45:], "pixel_values": pixels[1:]}
    # nothing leaves in the first turn, so the whole conversation is what the second one sees
    with vlmcompress.compress(model, Watch()):
        output = model(**first, use_cache=True)
    watch = Watch()
    with vlmcompress.compress(model, watch):
        model(**second, **cached(output), use_cache=True)
    whole = Watch()
    with vlmcompress.compress(model, whole):
        model(**both)
    torch.testing.assert_close(watch.seen[0][3][0], whole.seen[0][3][1], atol=1e-6, rtol=1e-5)


def test_the_predictor_lies_beside_the_weights(tmp_path, net):
    tiny_llava().save_pretrained(tmp_path / "model")
    model = type(tiny_llava()).from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="train one with"):
        vlmcompress.compress(model, "explainability")
    assert not hasattr(model.config, "vlmcompress")
    (tmp_path / "model" / FOLDER).mkdir()
    RelevancePredictor.load(net).save(tmp_path / "model" / FOLDER / "image.safetensors")
    with vlmcompress.compress(model, "explainability", keep=9) as handle:
        model(**prompts([[5, "image", 7]], 36))
        found = handle.last.samples[0].images[0].kept
    with vlmcompress.compress(model, "explainability", keep=9, predictor=net) as handle:
        model(**prompts([[5, "image", 7]], 36))
        assert handle.last.samples[0].images[0].kept.equal(found)


def test_what_is_refused(net, tmp_path):
    with pytest.raises(ValueError, match="name of a file"):
        Explainability(predictor=3)
    with pytest.raises(ValueError, match="suffix_tokens"):
        Explainability(suffix_tokens=-1)
    with pytest.raises(ValueError, match="no predictor at"):
        vlmcompress.compress(tiny_llava(), "explainability", predictor=str(tmp_path / "nothing"))
    sliding = tiny_llava("mistral", sliding_window=8)
    with pytest.raises(ValueError, match="sliding window"):
        vlmcompress.compress(sliding, "explainability", predictor="identity")
