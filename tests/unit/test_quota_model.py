# SPDX-License-Identifier: Apache-2.0
"""QuoTA asks the compressed model itself: what it asks, that nothing of the library acts meanwhile, and what remains."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from models import BEAMS
from models_qwen import prompts_qwen, tiny_qwen
from models_qwen import row_of as qwen_row
from models_video import VIDEO, prompts_video, row_of, tiny_next_video, tiny_onevision
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlavaConfig, Qwen2_5_VLForConditionalGeneration

import vlmcompress
from vlmcompress.adapters.base import adapter_for
from vlmcompress.eval.loading import encode_chats, load, prompt_of, turn
from vlmcompress.methods.quota import QuoTA
from vlmcompress.quota import ANY_OF, DECOUPLE, ENOUGH, scoring_question
from vlmcompress.quota_model import ModelScorer, processor_of
from vlmcompress.training.processor import SPECIALS, build_tokenizer

pytest.importorskip("torchvision")
pytest.importorskip("pyarrow")

from vlmcompress.eval.tasks import load as load_task
from vlmcompress.training.tiny_qwen import QwenRecipe, qwen_config
from vlmcompress.training.tiny_qwen_data import qwen_processor

CHATML = (
    "{% for message in messages %}<s>{{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}</s> {% endfor %}<s>assistant yes"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved Qwen2.5-VL with random weights that reads the clips of scenes-video, and its processor."""
    processor, where = qwen_processor(), tmp_path_factory.mktemp("qwen") / "model"
    text = LlamaConfig(
        hidden_size=40, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=len(processor.tokenizer),
    )  # fmt: skip
    torch.manual_seed(0)
    recipe = QwenRecipe(width=32, layers=2, heads=2, full_attention=(1,))
    config = qwen_config(recipe, LlavaConfig(text_config=text), processor.tokenizer)
    config.text_config.initializer_range = 0.2
    config.eos_token_id = config.text_config.eos_token_id = None
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(where)
    processor.save_pretrained(where)
    return where


@pytest.fixture
def qwen(folder):
    return load(str(folder))


@pytest.fixture(scope="module")
def clips():
    samples = load_task("scenes-video", limit=40)
    return [next(s for s in samples if s.kind == kind) for kind in ("way", "color", "existence")]


def generate(model, inputs, **options):
    return model.generate(**inputs, do_sample=False, max_new_tokens=4, **options)[:, inputs["input_ids"].shape[1] :]


def shares(handle) -> list[list[float]]:
    """The scores of the frames of every video of the last call."""
    found = []
    for sample in handle.last.samples:
        for video in sample.images:
            patches = video.views[~video.is_newline]
            found.append([float(video.scores()[video.views == view][0]) for view in patches.unique()])
    return found


@torch.no_grad()
def by_hand(model, processor, sample, text: str, letter: str) -> list[float]:
    """What the stock model answers to ``text`` about every pair of frames, one by one, through its processor."""
    token = processor.tokenizer.encode(letter, add_special_tokens=False)[0]
    found = []
    for first in range(0, len(sample.image), 2):
        inputs = encode_chats(model, processor, [turn(text, sample.image[first : first + 2])])
        found.append(float(model(**inputs).logits[0, -1].softmax(-1)[token]))
    return found


def test_every_frame_is_asked_alone(qwen, clips):
    """By default with the published kind of question; batched, ragged, and equal to asking the stock model by hand."""
    model, processor = qwen
    expected = [by_hand(model, processor, s, scoring_question(s.question, None, ANY_OF, ENOUGH), "A") for s in clips]
    inputs = encode_chats(model, processor, [s.chat() for s in clips])
    with vlmcompress.compress(model, "quota", keep=64) as handle:
        model(**inputs)
        for found, wanted in zip(shares(handle), expected, strict=True):
            assert found == pytest.approx(wanted, rel=1e-4)
            assert len(found) == 4 and len(set(found)) > 1


def test_nothing_else_of_the_call_changes(qwen, clips):
    """Answers, ledger and positions are those of the same scores handed in: greedy, beams, a second turn, a plain call."""
    model, processor = qwen
    chats = [s.chat() for s in clips]
    inputs = encode_chats(model, processor, chats)
    stock = model(**inputs).logits
    with vlmcompress.compress(model, "quota", keep=40) as handle:
        logits, found = model(**inputs).logits, tuple(map(tuple, shares(handle)))
        answers = [generate(model, inputs), generate(model, inputs, num_beams=BEAMS)]
        assert len(handle.last.samples) == len(chats) * BEAMS
        deltas = model.model.rope_deltas
        cost = handle.report().compressor_flops
    with vlmcompress.compress(model, "quota", keep=40, scores=found) as handle:
        torch.testing.assert_close(model(**inputs).logits, logits, atol=1e-5, rtol=1e-5)
        assert generate(model, inputs).equal(answers[0])
        assert generate(model, inputs, num_beams=BEAMS).equal(answers[1])
        assert model.model.rope_deltas.equal(deltas)
        assert cost > 5 * handle.report().compressor_flops  # the questions are paid for
    assert model(**inputs).logits.equal(stock)


@torch.no_grad()
def test_the_tower_sees_the_frames_once_more_and_no_hook_is_in_between(qwen, clips):
    model, processor = qwen
    inputs = encode_chats(model, processor, [clips[0].chat()])
    grids, lengths = [], []
    model.model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: grids.append(kwargs["grid_thw"].tolist()), with_kwargs=True
    )
    last = model.model.language_model.layers[-1]
    last.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[:2]))
    both = vlmcompress.methods()["fastv"](keep=4, layer=1) + vlmcompress.methods()["h2o"](heavy=0.2, recent=0.2)
    with vlmcompress.compress(model, QuoTA(keep=32) + both) as handle:
        model(**inputs, use_cache=True)
        assert handle.last.layer_tokens[-1] == 4
    assert grids == [[[1, 16, 16]] * 4, [[4, 16, 16]]]
    asked, answered = lengths
    assert asked[0] == 4 and asked[1] > 64  # all four frames whole, in one batch
    assert answered[0] == 1 and answered[1] < 64


@torch.no_grad()
def test_frames_of_one_content_are_asked_once(qwen, clips):
    model, processor = qwen
    frozen = turn("is there a star", [clips[0].image[0]] * 6)
    inputs = encode_chats(model, processor, [frozen, frozen])
    scorer = ModelScorer(adapter_for(model), processor, letter="yes")
    asked = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found, _ = scorer(inputs, inputs["input_ids"])
    assert asked == [1] and len({p for video in found for p in video}) == 1 and list(map(len, found)) == [3, 3]


@torch.no_grad()
def test_the_cost_of_asking_is_counted(qwen, clips):
    model, processor = qwen
    model.set_attn_implementation("eager")  # torch counts its products
    inputs = encode_chats(model, processor, [s.chat() for s in clips])
    for decouple, slack in ((False, 0.02), (True, 0.1)):  # a padded batch of replies computes its padding too
        scorer = ModelScorer(adapter_for(model), processor, batch=5, decouple=decouple, reply_tokens=3)
        with FlopCounterMode(display=False) as counter:
            _, flops = scorer(inputs, inputs["input_ids"])
        assert flops == pytest.approx(counter.get_total_flops(), rel=slack)


# the question ---------------------------------------------------------------------------------------------------------
def test_own_words_and_objects_by_pattern(qwen, clips):
    model, processor = qwen
    words = dict(any_of="at first is there a {objects}", letter="yes", decouple=r"(\w+)\W*$")
    sample = clips[1]
    expected = by_hand(model, processor, sample, f"at first is there a {sample.question.split()[-1]}", "yes")
    with vlmcompress.compress(model, "quota", keep=64, **words) as handle:
        generate(model, encode_chats(model, processor, [sample.chat()]))
        assert shares(handle)[0] == pytest.approx(expected, rel=1e-4)
        saved = model.config.vlmcompress["methods"][0]["options"]
        assert saved["decouple"] == words["decouple"] and "processor" not in saved


@torch.no_grad()
def test_the_model_lists_the_objects_of_distinct_questions(qwen, clips, monkeypatch):
    model, processor = qwen
    inputs = encode_chats(model, processor, [clips[0].chat(), clips[1].chat(), clips[0].chat()])
    asked = []
    stock = model.generate

    def generate_and_note(**given):
        asked.append(processor.batch_decode(given["input_ids"], skip_special_tokens=True))
        return stock(**given)

    monkeypatch.setattr(model, "generate", generate_and_note)
    scorer = ModelScorer(adapter_for(model), processor, decouple=True, reply_tokens=2)
    scorer(inputs, inputs["input_ids"])
    read = [processor.tokenizer.decode(scorer._ids(DECOUPLE.replace("{question}", s.question)), skip_special_tokens=True)
            for s in clips[:2]]  # fmt: skip
    assert [text.strip() for text in asked[0]] == [text.strip() for text in read]


def test_the_question_is_found_in_any_template(qwen, clips):
    model, processor = qwen
    adapter, sample = adapter_for(model), clips[0]
    video = {"type": "video", "video": list(sample.image)}
    question = {"type": "text", "text": sample.question}
    for template in (processor.chat_template, CHATML):
        processor.chat_template = template
        scorer = ModelScorer(adapter, processor)
        for content in ([video, question], [question, video]):
            if content[0] is question and template is not CHATML:
                continue  # a template without roles cannot tell an answer's place
            ids = encode_chats(model, processor, [[{"role": "user", "content": content}]])["input_ids"]
            assert scorer.question_of(ids[0]) == sample.question
    processor.chat_template = processor.chat_template.replace("<|video_pad|>", "<|video_pad|><|video_pad|>")
    with pytest.raises(ValueError, match="one placeholder"):
        ModelScorer(adapter, processor)._filled(scorer._ids(prompt_of(processor, turn("yes", []))), 3)


# families ---------------------------------------------------------------------------------------------------------
def plain_processor(token: int, name: str = "<video>"):
    """Tokenizer of 97 words whose word ``token`` shows a video; without a chat template, as LLaVA's plain form."""
    found = [*SPECIALS[:4], "a", "yes", *(f"w{i}" for i in range(6, 97))]
    found[token] = name
    return SimpleNamespace(
        tokenizer=build_tokenizer(found, {"video_token": name}), chat_template=None, video_token=name
    )


CLIP = ("video", 4)
FAMILIES = {
    "llava_onevision": (tiny_onevision, VIDEO),
    "llava_next_video": (tiny_next_video, VIDEO),
    **{name: (lambda name=name: tiny_qwen(family=name), 91) for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_batched_equals_one_by_one(family):
    build, token = FAMILIES[family]
    model, processor = build(), plain_processor(token)
    if "qwen" in family:
        inputs = prompts_qwen([[5, (4, 2, 3), 7], [2, (3, 2, 2), 4]], family=family)
        alone = [qwen_row(inputs, row) for row in range(2)]
    else:
        spec = [[5, CLIP, 7], [2, CLIP, 4]]
        inputs = prompts_video(model, spec)
        alone = [row_of(inputs, spec, row) for row in range(2)]
    options = dict(min_new_tokens=4, suppress_tokens=[token, 90, 3])
    with vlmcompress.compress(model, "quota", keep=0.4, letter="yes", processor=processor) as handle:
        together = generate(model, inputs, **options)
        found = shares(handle)
        assert all(len(set(video)) == len(video) for video in found)
        for row in range(2):
            assert generate(model, alone[row], **options).equal(together[row : row + 1])
            assert shares(handle)[0] == pytest.approx(found[row], rel=1e-4)


# refusals ---------------------------------------------------------------------------------------------------------
def test_bad_input(qwen, clips):
    for said, options in (
        ("not 'model'", {"scores": "model"}),
        ("regular expression, not", {"decouple": "("}),
        ("has none", {"decouple": "star"}),
    ):
        with pytest.raises(ValueError, match=said):
            QuoTA(**options)
    model, processor = qwen
    with pytest.raises(ValueError, match="no single token"):
        vlmcompress.compress(model, "quota", letter="quetzalcoatl")
    inputs = encode_chats(model, processor, [clips[0].chat()])
    with vlmcompress.compress(model, "quota", keep=32):
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        with pytest.raises(ValueError, match="reads the question from input_ids"):
            model(**{k: v for k, v in inputs.items() if k != "input_ids"}, inputs_embeds=embeds)
    nameless = tiny_qwen()
    assert processor_of(nameless) is None
    with vlmcompress.compress(nameless, "quota", keep=0.5):
        nameless(**prompts_qwen([[5, (4, 4), 3]]))  # a picture needs no score
        with pytest.raises(ValueError, match="no processor beside its weights"):
            nameless(**prompts_qwen([[5, (2, 2, 2), 3]]))
    with vlmcompress.compress(nameless, "quota", keep=0.5, scores="even") as handle:
        nameless(**prompts_qwen([[5, (2, 2, 2), 3]]))
        assert len(set(shares(handle)[0])) == 1


def test_evaluation_runs_it(folder, tmp_path):
    from vlmcompress.cli import main

    words = ["eval", str(folder), "--methods", "quota", "--keep", "0.5", "--tasks", "scenes-video:4", "--rounds", "0",
             "--row", r"quota keep=0.25 letter=yes any_of='at first is there a {objects}' decouple=r'(\w+)\W*$'",
             "--out", str(tmp_path)]  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
