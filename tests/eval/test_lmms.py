# SPDX-License-Identifier: Apache-2.0
"""The real lmms-eval on the shipped small model: the same answers as our own runner, both ways round."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import ImageFile
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration

import vlmcompress
from vlmcompress.commands.evaluate import Settings, evaluate
from vlmcompress.eval.lmms import TASKS, quiet
from vlmcompress.eval.loading import encode, load
from vlmcompress.eval.rows import Row
from vlmcompress.eval.runner import run_rows
from vlmcompress.eval.store import Store
from vlmcompress.eval.tasks import load as load_task
from vlmcompress.eval.tasks import tasks
from vlmcompress.training.tiny_qwen import QwenRecipe, build_qwen
from vlmcompress.training.tiny_qwen_data import qwen_processor, qwen_tokenizer

MODEL = str(Path(__file__).parents[2] / "assets/models/tiny-llava")
LIMIT = 12


@pytest.fixture(scope="module", autouse=True)
def _lmms():
    """Importing lmms-eval tells PIL to accept truncated pictures; the other tests of this process want PIL as it was."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    import_module("lmms_eval.api.task")
    ImageFile.LOAD_TRUNCATED_IMAGES = before


@pytest.fixture(scope="module")
def loaded():
    return load(MODEL)


@pytest.fixture(scope="module")
def samples():
    """What ``--limit`` of lmms-eval takes: the first questions."""
    return {task: load_task(task)[:LIMIT] for task in ("scenes", "easy-vqa")}


def test_indexing_the_tasks_says_nothing():
    """The first of this module's tests to need them."""
    from loguru import logger

    from vlmcompress.eval.lmms.documents import task_manager

    lines: list[str] = []
    sink = logger.add(lines.append)
    try:
        assert "gqa" in task_manager().all_tasks
    finally:
        logger.remove(sink)
    assert not lines


def agree(folder, loaded, row, samples, tmp_path):
    """lmms-eval's command line and our runner give the same answers and marks; what the command printed."""
    options = "".join(f",{name}={value}" for name, value in row.options.items())
    limit = len(next(iter(samples.values())))
    run = subprocess.run(
        [sys.executable, "-m", "lmms_eval", "--model", "vlmcompress", "--model_args",
         f"pretrained={folder},method={row.method},keep={row.keep}{options}", "--tasks", ",".join(samples),
         "--include_path", str(TASKS), "--limit", str(limit), "--batch_size", "5", "--device", "cpu", "--output_path",
         str(tmp_path), "--log_samples"],
        capture_output=True, text=True, cwd=tmp_path, timeout=1200,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    store = Store(tmp_path / "ours", {})
    model, processor = loaded
    assert not run_rows(model, processor, [row], samples, store, batch_size=7, max_new_tokens=4)
    ours = store.answers(row.key)
    totals = json.loads(next(tmp_path.rglob("*_results.json")).read_text())["results"]
    for task in samples:
        lines = next(tmp_path.rglob(f"*_samples_{task}.jsonl")).read_text().splitlines()
        theirs = {samples[task][row["doc_id"]].id: row for row in map(json.loads, lines)}
        mine = {a["id"]: a for a in ours if a["task"] == task}
        assert set(theirs) == set(mine)
        assert {i: row["filtered_resps"] for i, row in theirs.items()} == {i: a["prediction"] for i, a in mine.items()}
        assert {i: row["accuracy"] for i, row in theirs.items()} == {i: a["correct"] for i, a in mine.items()}
        assert totals[task]["accuracy,none"] == pytest.approx(sum(a["correct"] for a in mine.values()) / limit)
    return run.stdout


def test_the_command_line_of_lmms_eval_gives_our_runners_answers(loaded, samples, tmp_path):
    said = agree(MODEL, loaded, Row("fastv", 16, options={"layer": 1}), samples, tmp_path)
    # it says what was kept: 24 prompts in batches of five, the last of two or four
    assert "visual tokens in" in said


def test_videos_go_through_lmms_eval(tiny_folder, tmp_path):
    torch.manual_seed(0)
    base = LlavaForConditionalGeneration.from_pretrained(tiny_folder)
    model = build_qwen(QwenRecipe(width=32, layers=2, heads=2, full_attention=(1,)), base, qwen_tokenizer())
    model.save_pretrained(tmp_path / "model")
    qwen_processor().save_pretrained(tmp_path / "model")
    agree(tmp_path / "model", load(tmp_path / "model"), Row("grid", 0.5), {"scenes-video": load_task("scenes-video")[:3]},
          tmp_path)  # fmt: skip


def test_every_task_of_ours_is_one_of_theirs():
    from lmms_eval.utils import load_yaml_config

    for name in tasks():
        config = load_yaml_config(str(TASKS / f"{name}.yaml"), mode="simple")
        assert config["task"] == name
        assert json.loads(Path(config["dataset_kwargs"]["data_files"]["test"]).read_text()) == {"task": name}


def test_a_task_of_theirs_is_one_of_ours(samples, tmp_path):
    """The YAML file goes through lmms-eval's own task: data set, prompt, filter, metric and aggregation."""
    yaml = str(TASKS / "scenes.yaml")
    report = evaluate(Settings(MODEL, "grid", "16", f"{yaml},scenes", 20, tmp_path, 1, 8, 4, rounds=0, device="cpu"))
    for row in report["rows"]:
        theirs, ours = row["tasks"][yaml], row["tasks"]["scenes"]
        assert theirs["n"] == ours["n"] == 20
        assert theirs["metrics"]["accuracy"] == pytest.approx(theirs["accuracy"])
        assert ours["metrics"] == {}
    lines = Store(tmp_path, json.loads((tmp_path / "configuration.json").read_text())).answers("grid-keep16")
    own = {sample.question: sample for sample in load_task("scenes")}
    foreign = [line for line in lines if line["task"] == yaml]
    assert len(foreign) == 20
    assert {line["image"] for line in foreign} <= {sample.picture for sample in load_task("scenes")}
    assert all(line["question"] in own for line in foreign)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no-such-task", "There is no task 'no-such-task'; the tasks are documents, easy-vqa, scenes"),
        ("mmmu", "group of tasks"),
        ("nowhere.yaml", "no task file 'nowhere.yaml'"),
        ("pope", "The data of the task 'pope' could not be loaded: "),
    ],
)
def test_tasks_out_of_reach_are_one_sentence(name, says, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=says) as failure:
        load_task(name)
    assert "\n" not in str(failure.value)


class Requests:
    """What lmms-eval hands to a model: requests whose documents are looked up by task, split and number."""

    def __init__(self, samples):
        self.documents = {"toy": {"test": samples}}

    def chat(self, i, **generation):
        def messages(sample):
            content = [{"type": "image", "url": sample.image}, {"type": "text", "text": sample.question}]
            return [{"role": "user", "content": content}]

        return SimpleNamespace(args=("", messages, generation, i, "toy", "test"))

    def simple(self, i, generation):
        question = self.documents["toy"]["test"][i].question
        return SimpleNamespace(args=(question, generation, lambda s: [s.image], i, "toy", "test"))

    def likelihood(self, i, continuation):
        question = self.documents["toy"]["test"][i].question
        return SimpleNamespace(args=(question, continuation, lambda s: [s.image], i, "toy", "test"))


@pytest.fixture(scope="module")
def asked(samples):
    return Requests(samples["scenes"])


@pytest.fixture(scope="module")
def simple(asked):
    from vlmcompress.eval.lmms.model import SimpleCompressedModel

    model = SimpleCompressedModel(MODEL, "vtc-cls", 48, batch_size=3, device="cpu")
    model.task_dict = asked.documents
    return model


def test_likelihoods_are_those_of_a_plain_forward(simple, asked, samples, loaded):
    """Continuations of one and two tokens in one left-padded batch, against the loss of each alone."""
    chosen = [asked.likelihood(0, " red"), asked.likelihood(1, " blue star"), asked.likelihood(2, " yes")]
    found = simple.loglikelihood(chosen)
    model, processor = loaded
    with vlmcompress.compress(model, "vtc-cls", keep=48), torch.no_grad():
        for request, (loss, greedy) in zip(chosen, found, strict=True):
            sample = samples["scenes"][request.args[3]]
            inputs = encode(model, processor, [sample.image], [sample.question])
            target = processor.tokenizer(request.args[1], add_special_tokens=False, return_tensors="pt").input_ids
            ids = torch.cat([inputs["input_ids"], target], dim=1)
            logits = model(ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"]).logits[0]
            logits = logits[-target.shape[1] - 1 : -1]
            assert loss == pytest.approx(cross_entropy(logits, target[0]).item(), abs=1e-4)
            assert greedy == torch.equal(logits.argmax(-1), target[0])


def test_the_likeliest_answer_is_the_greedy_one(simple, asked, samples):
    answers = simple.generate_until([asked.simple(i, {"max_new_tokens": 1}) for i in range(4)])
    for i, answer in enumerate(answers):
        choices = sorted({answer.text, "red", "2", "yes", "circle"})
        losses = [loss for loss, _ in simple.loglikelihood([asked.likelihood(i, f" {c}") for c in choices])]
        assert choices[losses.index(min(losses))] == answer.text


def test_generation_settings_are_obeyed(asked):
    from vlmcompress.eval.lmms.model import CompressedModel, settings_of

    model = CompressedModel(
        MODEL, "grid", 0.5, batch_size="4", device="cpu", dtype="float32", attn_implementation="eager"
    )
    model.task_dict = asked.documents
    assert model.model.config._attn_implementation == "eager"
    short, long = asked.chat(0, max_new_tokens=1), asked.chat(0, max_new_tokens=6, until="never")
    found = model.generate_until([short, long, short])
    assert found[0].text == found[2].text == found[1].text.split()[0]
    assert found[0].token_counts.output_tokens == 1
    assert model.handle.report().tokens == 72
    assert settings_of(None) == {"max_new_tokens": 256, "until": []}
    assert settings_of({"until": "stop", "temperature": 0.0, "do_sample": False})["until"] == ["stop"]
    with pytest.raises(ValueError, match="greedily, but the task asks for temperature"):
        settings_of({"temperature": 0.7})
    with pytest.raises(NotImplementedError, match="force_simple"):
        model.loglikelihood([asked.likelihood(0, " red")])


def test_what_compress_refuses_is_refused_here():
    from vlmcompress.eval.lmms.model import CompressedModel

    for arguments, says in [
        ({"method": "magic"}, "no method 'magic'"),
        ({"method": "grid", "keep": 0}, "keeps nothing"),
        ({"method": "grid", "keep": 16, "colour": 3}, "no option 'colour'"),
        ({"method": "grid", "keep": 16, "batch_size": "auto"}, "batch_size is a number"),
    ]:
        with pytest.raises(ValueError, match=says):
            CompressedModel(MODEL, device="cpu", **arguments)


SETTINGS = {
    "none": lambda logger: None,
    "its log off": lambda logger: logger.disable("lmms_eval"),
    "all logs off but one": lambda logger: (logger.disable(""), logger.enable("lmms_eval.tasks")),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_lmms_s_log_is_quiet_for_a_while_only(setting):
    from loguru import logger

    lines: list[str] = []
    said = {"__name__": "lmms_eval.tasks"}, {"__name__": "lmms_eval.api"}, {"__name__": "ours"}

    def speak() -> list[str]:
        lines.clear()
        for module in said:
            exec("from loguru import logger; logger.debug(__name__)", module)
        return [line.strip() for line in lines]

    core = logger._core
    stock, sink = (core.activation_list, core.enabled.copy()), logger.add(lines.append, format="{message}")
    try:
        SETTINGS[setting](logger)
        before = speak()
        with quiet():
            assert not [line for line in speak() if line.startswith("lmms_eval")]
        assert speak() == before
    finally:
        logger.remove(sink)
        core.activation_list, core.enabled = stock
