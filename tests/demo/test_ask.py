# SPDX-License-Identifier: Apache-2.0
"""Questions, clocks, overlays and sweeps on the shipped model and on a tiny random one, without a browser."""

import itertools
import json
import threading
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmcompress.attach import compress, current_handle
from vlmcompress.demo import figures, html
from vlmcompress.demo.ask import STEPS, UNCOMPRESSED, ask, compose, plan, share, tokens_at, visual_tokens
from vlmcompress.demo.images import open_upload
from vlmcompress.demo.models import DEFAULT, SAMPLES, Pool, methods_for, second_stages
from vlmcompress.demo.picture import paint, panels
from vlmcompress.demo.sweep import sweep
from vlmcompress.eval.loading import answer, encode

QUESTION = "what color is the ring"


@pytest.fixture(scope="module")
def pool():
    return Pool(size=2)


@pytest.fixture(scope="module")
def shipped(pool):
    return pool.get(str(DEFAULT))


@pytest.fixture(scope="module")
def scene():
    return open_upload(SAMPLES / "scene-1.png")[0]


def last(runs):
    return list(runs)[-1]


@pytest.fixture(scope="module")
def runs(shipped, scene):
    names = ("vtc-cls", "tome", "fastv", "h2o")
    return last(ask(shipped, scene, QUESTION, {name: compose(name, 36) for name in names}))


def test_answers_are_those_of_the_library(shipped, scene, runs):
    inputs = encode(shipped.model, shipped.processor, [scene], [QUESTION])
    assert runs.answers[UNCOMPRESSED].text == answer(shipped.model, shipped.processor, inputs, 8)[0]
    with compress(shipped.model, "vtc-cls", keep=36) as handle:
        assert runs.answers["vtc-cls"].text == answer(shipped.model, shipped.processor, inputs, 8)[0]
        assert runs.answers["vtc-cls"].report == handle.report()
    assert runs.answers[UNCOMPRESSED].text == "yellow"
    assert current_handle(shipped.model) is None


def test_every_answer_has_its_clocks(runs):
    for found in runs.answers.values():
        assert found.done and not found.error
        assert found.first_ms > 0 and found.new_tokens >= 2 and found.tokens_per_s > 0


def test_text_comes_token_by_token(shipped, scene):
    seen = [(r.answers[UNCOMPRESSED].new_tokens, r.answers["grid"].new_tokens)
            for r in ask(shipped, scene, QUESTION, {"grid": compose("grid", 36)})]  # fmt: skip
    assert seen[0] == (1, 0) and seen == sorted(seen)


def test_a_method_that_refuses_leaves_the_others_alone(shipped, scene):
    run = last(ask(shipped, scene, QUESTION, {"mustdrop": compose("mustdrop", 2), "grid": compose("grid", 36)}))
    assert run.answers["mustdrop"].error.endswith(".") and run.answers["mustdrop"].report is None
    assert run.answers["grid"].text and not run.answers["grid"].error
    assert current_handle(shipped.model) is None
    assert run.answers["mustdrop"].error in unescape(html.grid(run, {}))


def test_a_listener_that_leaves_frees_the_model(shipped, scene):
    asking = ask(shipped, scene, QUESTION, {"grid": compose("grid", 36)}, new_tokens=200)
    next(asking)
    asking.close()
    assert not shipped.lock.locked() and current_handle(shipped.model) is None


def test_two_users_do_not_meet(shipped, scene):
    found = {}

    def user(name, keep):
        for run in ask(shipped, scene, QUESTION, {name: compose(name, keep)}):
            found[name] = run

    threads = [threading.Thread(target=user, args=case) for case in (("vtc-cls", 20), ("grid", 50))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: run.answers[name].report.tokens for name, run in found.items()} == {"vtc-cls": 20, "grid": 50}
    assert current_handle(shipped.model) is None


@pytest.mark.parametrize("question", ["", "   ", None, "x" * 2001])
def test_questions_are_checked(shipped, scene, question):
    with pytest.raises(ValueError, match="question"):
        next(ask(shipped, scene, question, {}))


def test_the_budget_is_a_log_scale():
    assert share(STEPS) == 1 and share(0) == 1 / 128
    ratios = {round(share(step + 1) / share(step), 9) for step in range(STEPS)}
    assert len(ratios) == 1
    assert tokens_at(STEPS, 144) == 144 and tokens_at(0, 144) == 1 and tokens_at(STEPS - 8, 144) == 36


def test_visual_tokens_are_those_of_the_ledger(shipped, scene, runs):
    assert visual_tokens(shipped, scene) == runs.answers["tome"].report.tokens_before


def test_methods_and_second_stages_compose():
    composed = compose("vtc-cls", 36, "", "h2o", "heavy=0.2")
    assert composed.name == "vtc-cls+h2o" and composed.methods[1].heavy == 0.2
    for words, *bad in (
        ("no option 'nonsense'", "vtc-cls", 36, "nonsense=1"),
        ("keeps nothing", "vtc-cls", 0),
        ("no method 'nothing'", "nothing", 4),
        ("both choose tokens between decoder layers", "fastv", 8, "", "transprune"),
        ("NAME=VALUE, not 'layer'", "vtc-cls", 36, "layer"),
    ):
        with pytest.raises(ValueError, match=words):
            compose(*bad)
    assert {"h2o", "fastv"} <= set(second_stages("llava")) <= set(methods_for("llava"))
    assert "vtc-cls" not in second_stages("llava")


def test_a_comparison_is_of_one_to_six_methods():
    with pytest.raises(ValueError, match="at least one"):
        plan([], 8)
    with pytest.raises(ValueError, match="at most 6"):
        plan(["random", "grid", "pool", "resize", "vtc-cls", "fastv", "tome"], 8)
    assert list(plan(["grid", "grid", "tome"], 8)) == ["grid", "tome"]


def test_panels_tell_what_is_alive(runs):
    chosen = panels(runs.answers["vtc-cls"].ledger)[0]
    assert chosen.alive.sum() == 36 and chosen.there.all() and (chosen.group == -1).all()
    dropped = chosen.score[~chosen.alive]
    assert chosen.score[chosen.alive].min() >= dropped.max()
    before, behind = (panels(runs.answers["fastv"].ledger, layer)[0].alive.sum() for layer in (0, 4))
    assert (before, behind) == (144, 36)
    merged = panels(runs.answers["tome"].ledger)[0]
    assert merged.alive.all() and len(np.unique(merged.group[merged.group >= 0])) <= 36
    with pytest.raises(ValueError, match="decoder layers 0 to"):
        panels(runs.answers["fastv"].ledger, 99)


def test_the_picture_changes_with_layer_method_and_colour(runs):
    early, late = (paint(runs, runs.answers["fastv"], layer) for layer in (0, 4))
    assert early.size == late.size and early.tobytes() != late.tobytes()
    scored, plain = (paint(runs, runs.answers["vtc-cls"], colour=c) for c in (True, False))
    assert scored.tobytes() != plain.tobytes()
    # dropped cells are grey without colour
    cell = 672 // 12
    row, column = (int(i[0]) for i in (~panels(runs.answers["vtc-cls"].ledger)[0].alive).nonzero())
    r, g, b = plain.getpixel((column * cell + cell // 2, row * cell + cell // 2))
    assert r == g == b


def test_costs_are_those_of_the_report(runs):
    found = runs.answers["vtc-cls"]
    text = html.costs(runs, "vtc-cls")
    for number in (f"{found.report.kv_bytes / 1024:,.0f} KiB", f"{found.first_ms:,.1f} ms", "4× less"):
        assert number in text
    assert html.costs(runs, "vtc-cls").count('class="vc-metric"') == len(html.METRICS)


def test_what_people_wrote_is_escaped(shipped, scene):
    run = last(ask(shipped, scene, "<b>x</b>", {"grid": compose("grid", 36)}))
    figures_json = json.dumps(figures.run_dict(run))
    assert json.loads(figures_json)["question"] == "<b>x</b>"
    for text in (html.sentence("<script>"), html.table(["<script>"], [["<script>"]], ["<script>"]),
                 html.answer_card("<script>", None)):  # fmt: skip
        assert "<script>" not in text and "&lt;script&gt;" in text


def test_downloads(runs, tmp_path):
    shelf = figures.Shelf()
    stored = json.loads(Path(shelf.json("a.json", figures.run_dict(runs))).read_text())
    entered = {entry["name"]: entry.get("kept") for entry in stored["answers"]}
    assert entered["vtc-cls"] == runs.answers["vtc-cls"].ledger.samples[0].images[0].kept.tolist()
    target = shelf.path("a.png")
    figures.compare_figure(runs, {}, target)
    assert Image.open(target).width > 600
    shelf.close()
    assert not target.exists()


def test_old_downloads_leave():
    shelf = figures.Shelf(age=-1)
    old = shelf.json("a.json", {})
    new = shelf.json("a.json", {})
    assert not Path(old).exists() and Path(new).read_text() == "{}\n"


def test_a_sweep_measures_every_budget(shipped, tmp_path):
    points = list(sweep(shipped, "vtc-cls", 10, (0.25, 0.0625)))
    assert [(p.method, p.share, p.tokens) for p in points] == [
        (UNCOMPRESSED, 1.0, 144), ("vtc-cls", 0.25, 36), ("vtc-cls", 0.0625, 9)
    ]  # fmt: skip
    for p in points:
        assert not p.error and p.questions == 10 and p.low <= p.accuracy <= p.high
    assert points[0].accuracy > 0.6
    assert all(a.gflops > b.gflops and a.kv_kib > b.kv_kib for a, b in itertools.pairwise(points))
    figures.sweep_figure(points, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").height > 600


def test_a_sweep_goes_on_behind_a_refusal_and_refuses_what_has_no_budget(shipped, tmp_path):
    points = list(sweep(shipped, "mustdrop", 4, (0.5, 0.01)))
    assert [bool(p.error) for p in points] == [False, False, True]
    figures.sweep_figure(points, tmp_path / "a.png")
    with pytest.raises(ValueError, match="no budget"):
        next(sweep(shipped, "h2o", 20))


def test_the_pool_keeps_the_models_used_last(tiny_folder, tmp_path, shipped):
    pool = Pool(size=1)
    first = pool.get(str(tiny_folder))
    assert pool.get(str(tiny_folder)) is first and first.family == "llava" and first.label == tiny_folder.name
    for bad, words in (("", "Name a model"), (str(tmp_path), "no config.json"), ("/nowhere", "no model folder")):
        with pytest.raises(ValueError, match=words):
            pool.get(bad)
    assert pool.get(str(tiny_folder)) is first  # a failure changes nothing
    pool.get(str(DEFAULT))
    assert pool.get(str(tiny_folder)) is not first


def test_loading_one_model_does_not_hold_up_another(shipped, pool):
    with pool._loading:  # somebody loads
        assert pool.get(str(DEFAULT)) is shipped
