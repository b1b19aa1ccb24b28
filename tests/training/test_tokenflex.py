# SPDX-License-Identifier: Apache-2.0
"""Training with drawn counts: stages, labels, PRIOR, resume, bf16, checkpointing and two processes, on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor
from transformers.loss.loss_utils import ForCausalLMLoss

from vlmcompress import flex
from vlmcompress.training.chats import ChatCollator, JsonChats, SceneChats, conversation
from vlmcompress.training.counts import CountSchedule
from vlmcompress.training.tokenflex import FlexRun, SqrtLoss, freeze, load_base, train_tokenflex

COUNTS = (4, 9, 36)


@pytest.fixture
def run(tiny_folder, tmp_path):
    return FlexRun(
        str(tiny_folder), tmp_path / "model", counts=COUNTS, steps=4, batch=2, rate=1e-3, tower_rate=1e-3, questions=3,
        workers=0, save_every=2,
    )  # fmt: skip


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_labels_are_the_answers_and_the_end(tiny_folder):
    processor = AutoProcessor.from_pretrained(tiny_folder)
    collator, tokenizer = ChatCollator(processor), processor.tokenizer
    messages = conversation([("what color is the star ?", "red"), ("what color is the circle ?", "blue")])
    ids, labels = collator.encode(messages)
    assert int((ids == processor.image_token_id).sum()) == 1
    assert tokenizer.convert_ids_to_tokens(labels[labels != -100]) == ["red", "</s>", "blue", "</s>"]
    assert labels[labels != -100].equal(ids[labels != -100])
    prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
    assert ids[: len(tokenizer(prompt)["input_ids"])].tolist() == tokenizer(prompt)["input_ids"]
    batch = collator([SceneChats(0, 4, questions=2)[i] for i in range(3)])
    assert batch["pixel_values"].shape[0] == 3 and (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    wide = ChatCollator(processor, tokens=9)([SceneChats(0, 4, questions=2)[i] for i in range(3)])
    assert int((wide["input_ids"] == processor.image_token_id).sum()) == 27


def test_llava_json(tmp_path):
    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "data.json").write_text(
        json.dumps([{"image": "a.png", "conversations": turns}, {"conversations": turns}])
    )
    data = JsonChats(tmp_path / "data.json", tmp_path)
    assert len(data) == 1 and data[0]["messages"] == conversation([("what ?", "red")])
    with pytest.raises(ValueError, match="no data file"):
        JsonChats(tmp_path / "none.json", tmp_path)
    (tmp_path / "bad.json").write_text(json.dumps([{"image": "a.png"}]))
    with pytest.raises(ValueError, match="no list of entries"):
        JsonChats(tmp_path / "bad.json", tmp_path)


@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_the_right_parts_learn_at_the_drawn_counts(run, stage):
    run = dataclasses.replace(run, stage=stage, accumulate=2)
    before, _ = load_base(run)
    model = flex.from_pretrained(train_tokenflex(run))
    log = json.loads((run.output / "log.json").read_text())
    schedule = CountSchedule(COUNTS, flex.PROBABILITIES, seed=0)
    drawn = [schedule.count(step, micro) for step in range(4) for micro in range(2)]
    last = [row for row in log if "visual_tokens" in row][-1]
    assert last["visual_tokens"] == 2 * sum(drawn) and len(set(drawn)) > 1
    assert {n: last[f"batches_at_{n}"] for n in COUNTS} == {n: drawn.count(n) for n in COUNTS}
    changed = {name for name, p in model.state_dict().items() if not p.equal(before.state_dict()[name])}
    parts = {"projector": "multi_modal_projector", "tower": "vision_tower", "language": "language_model"}
    learned = {part for part, name in parts.items() if any(name in key for key in changed)}
    assert learned == ({"projector"} if stage == "align" else set(parts))
    assert model.config.tokenflex["counts"] == list(COUNTS)
    assert model.state_dict().keys() == before.state_dict().keys()


def test_a_resumed_run_is_the_unbroken_one(run):
    whole = weights(train_tokenflex(run))
    work = run.output.with_name("model-work")
    shutil.rmtree(work / "checkpoint-4")
    shutil.rmtree(run.output)
    resumed = weights(train_tokenflex(run))
    assert json.loads((run.output / "log.json").read_text())[-1]["step"] == 4
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


def test_gradient_checkpointing_changes_nothing(run, monkeypatch):
    monkeypatch.setattr("vlmcompress.training.tokenflex.fast_bf16", lambda: False)
    plain = weights(train_tokenflex(dataclasses.replace(run, steps=2)))
    again = dataclasses.replace(run, steps=2, gradient_checkpointing=True, output=run.output.with_name("other"))
    for name, tensor in weights(train_tokenflex(again)).items():
        torch.testing.assert_close(tensor, plain[name], atol=1e-5, rtol=1e-4, msg=name)


def test_bf16(run, monkeypatch):
    monkeypatch.setattr("vlmcompress.training.tokenflex.fast_bf16", lambda: True)
    train_tokenflex(dataclasses.replace(run, steps=2))
    assert all(row["loss"] > 0 for row in json.loads((run.output / "log.json").read_text()) if "loss" in row)


def test_prior_by_one_flag(run):
    plain = weights(train_tokenflex(dataclasses.replace(run, steps=2)))
    other = dataclasses.replace(run, steps=2, prior=1.0, output=run.output.with_name("prior"))
    weighted = weights(train_tokenflex(other))
    assert any(not weighted[name].equal(tensor) for name, tensor in plain.items())
    cached = run.output.with_name("prior-work") / "reference.safetensors"
    stamp = cached.stat().st_mtime_ns
    assert flex.from_pretrained(other.output).config.prior == {"alpha": 1.0, "reference": "base"}
    train_tokenflex(dataclasses.replace(other, output=run.output.with_name("prior"), resume=False))
    assert cached.stat().st_mtime_ns == stamp  # read, not made again


def test_two_processes_equal_one_with_twice_the_micro_batches(run, tmp_path, monkeypatch):
    """Gloo on the CPU; one count, so that the accumulated run sees the same batches."""
    script = tmp_path / "job.py"
    script.write_text(
        "import torch\nfrom pathlib import Path\ntorch.set_num_threads(1)\n"
        "import vlmcompress.training.tokenflex as t\nt.fast_bf16 = lambda: False\n"
        f"t.train_tokenflex(t.FlexRun({run.base!r}, Path({str(tmp_path / 'two')!r}), counts=(9,), steps=2, batch=2, rate=1e-3, "
        "tower_rate=1e-3, questions=3, workers=0))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    out = subprocess.run(launch, capture_output=True, text=True, timeout=240)
    assert out.returncode == 0, out.stderr[-2000:]
    monkeypatch.setattr("vlmcompress.training.tokenflex.fast_bf16", lambda: False)
    alone = dataclasses.replace(run, counts=(9,), steps=2, accumulate=2)
    before, _ = load_base(alone)
    before.save_pretrained(tmp_path / "before")
    start, one, two = (weights(folder) for folder in (tmp_path / "before", train_tokenflex(alone), tmp_path / "two"))
    for name, tensor in one.items():
        moved = (tensor - start[name]).abs().mean()
        assert (two[name] - tensor).abs().mean() <= 0.02 * moved, name


def test_released_loss_weighting():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 9, 11), torch.randint(0, 11, (2, 9))
    labels[0, 3:] = -100
    nll = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100
    )
    w = torch.tensor([[2**-0.5] * 8, [8**-0.5] * 8]) * (labels[:, 1:] != -100)
    torch.testing.assert_close(SqrtLoss()(logits, labels, 11), (nll * w).sum() / w.sum())
    even = torch.randint(0, 11, (2, 9))
    torch.testing.assert_close(SqrtLoss()(logits, even, 11), ForCausalLMLoss(logits, even, 11))


def test_bad_runs(run):
    for options, message in (({"stage": "four"}, "stage is one of align"), ({"loss_weighting": "cube"}, "token or sqrt"),
                             ({"prior": 1.0, "loss_weighting": "sqrt"}, "not both"),
                             ({"data": run.output}, "comes with the folder of its images")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(run, **options)
    with pytest.raises(ValueError, match="10 tokens do not fit"):
        train_tokenflex(dataclasses.replace(run, counts=(10,)))
    model, _ = load_base(run)
    with pytest.raises(ValueError, match="stage is one of"):
        freeze(model, "all")
