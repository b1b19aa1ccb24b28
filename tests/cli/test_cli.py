# SPDX-License-Identifier: Apache-2.0
"""The commands do their work, and every bad input is one sentence on stderr."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vlmcompress.cli import explain, main


@pytest.fixture
def call(capsys, monkeypatch):
    """Run the command line in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args):
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in args])
        printed = capsys.readouterr()
        return stop.value.code, printed.out, printed.err

    return run


def one_sentence(code, err):
    lines = [line for line in err.strip().splitlines() if line]
    return code not in (0, None) and len(lines) == 1 and "Traceback" not in err and len(lines[0]) < 400


def test_methods_lists_every_method(call):
    import vlmcompress

    code, out, _ = call("methods")
    assert code == 0
    assert all(name in out for name in vlmcompress.methods())


def test_run_answers_reports_and_draws(call, tiny_folder, picture, tmp_path):
    png = tmp_path / "kept.png"
    code, out, err = call("run", tiny_folder, picture, "what color is the star ?", "--keep", "9", "--out", png)
    assert code == 0, err
    assert "visual tokens in" in out
    assert "25.0%" in out
    drawn = np.asarray(Image.open(png))
    assert drawn.shape[0] == drawn.shape[1] >= 600


BAD = {
    "missing image": (["{model}", "nowhere.png", "what ?"], "no image file 'nowhere.png'"),
    "corrupt image": (["{model}", "{corrupt}", "what ?"], "could not be read as an image"),
    "truncated image": (["{model}", "{truncated}", "what ?"], "could not be read as an image"),
    "image is a folder": (["{model}", "{model}", "what ?"], "no image file"),
    "missing model": (["no/such/folder", "{picture}", "what ?"], "no model folder 'no/such/folder'"),
    "model is a file": (["{picture}", "{picture}", "what ?"], "is a file"),
    "folder without config": (["{empty}", "{picture}", "what ?"], "no config.json"),
    "folder without processor": (["{bare}", "{picture}", "what ?"], "has no processor"),
    "damaged weights": (["{damaged}", "{picture}", "what ?"], "could not be loaded"),
    "text-only model": (["{text}", "{picture}", "what ?"], "text-only model"),
    "unknown method": (["{model}", "{picture}", "what ?", "--method", "magic"], "no method 'magic'"),
    "unknown option": (["{model}", "{picture}", "what ?", "-o", "colour=3"], "no option 'colour'"),
    "option without value": (["{model}", "{picture}", "what ?", "-o", "layers"], "NAME=VALUE"),
    "keep 0": (["{model}", "{picture}", "what ?", "--keep", "0"], "keeps nothing"),
    "keep negative": (["{model}", "{picture}", "what ?", "--keep", "-3"], "keep"),
    "keep a word": (["{model}", "{picture}", "what ?", "--keep", "abc"], "not 'abc'"),
    "keep above one": (["{model}", "{picture}", "what ?", "--keep", "1.5"], "1.5 is outside"),
    "keep not a number": (["{model}", "{picture}", "what ?", "--keep", "nan"], "keep"),
    "budget given twice": (["{model}", "{picture}", "what ?", "--keep", "3", "-o", "keep=4"], "given twice"),
    "budget of a method without": (
        ["{model}", "{picture}", "what ?", "--method", "h2o", "--keep", "3"],
        "no option 'keep'",
    ),
    "option of a wrong type": (["{model}", "{picture}", "what ?", "-o", "pooled=true"], "takes bool, not 'true'"),
    "unknown device": (["{model}", "{picture}", "what ?", "--device", "abacus"], "can be computed on 'abacus'"),
    "device that is not there": (
        ["{model}", "{picture}", "what ?", "--device", "cuda:77"],
        "can be computed on 'cuda:77'",
    ),
    "empty question": (["{model}", "{picture}", "  "], "question is empty"),
    "no folder for the overlay": (["{model}", "{picture}", "what ?", "--out", "no/where.png"], "no folder 'no'"),
    "no question": (["{model}", "{picture}"], "Missing argument"),
    "tokens not a number": (["{model}", "{picture}", "what ?", "--max-new-tokens", "x"], "--max-new-tokens"),
}


@pytest.fixture(scope="module")
def places(tiny_folder, picture, tmp_path_factory):
    from transformers import LlamaConfig

    root = tmp_path_factory.mktemp("bad")
    for name in ("empty", "text"):
        (root / name).mkdir()
    LlamaConfig().save_pretrained(root / "text")
    for name in ("bare", "damaged"):
        shutil.copytree(tiny_folder, root / name)
    for file in ("preprocessor_config.json", "processor_config.json"):
        (root / "bare" / file).unlink(missing_ok=True)
    (root / "damaged" / "model.safetensors").write_bytes(b"nothing")
    (root / "corrupt.png").write_bytes(b"not a picture")
    (root / "truncated.png").write_bytes(picture.read_bytes()[:900])
    found = {p: root / p for p in ("empty", "text", "bare", "damaged")}
    found |= {"corrupt": root / "corrupt.png", "truncated": root / "truncated.png"}
    return found | {"model": tiny_folder, "picture": picture}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_of_run(call, places, case):
    args, says = BAD[case]
    code, _, err = call("run", *[a.format(**places) for a in args])
    assert one_sentence(code, err), err
    assert says in err


def test_a_schedule_of_its_own_needs_no_budget(call, tiny_folder, picture):
    schedule = ["--method", "transprune", "-o", "layers=(1,2)", "-o", "fractions=(0.5,0.25)"]
    code, out, err = call("run", tiny_folder, picture, "what ?", *schedule)
    assert code == 0, err
    assert "visual tokens, layer average" in out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--device", "abacus"], "can be computed on 'abacus'"),
        (["--tasks", "no-such-task"], "no task 'no-such-task'"),
        (["--methods", "grid,magic"], "no method 'magic'"),
        (["--methods", ","], "names nothing"),
        (["--keep", "9,0"], "keeps nothing"),
        (["--limit", "0"], "--limit"),
    ],
)
def test_bad_input_of_eval(call, tiny_folder, tmp_path, args, says):
    code, _, err = call("eval", tiny_folder, "--out", tmp_path / "out", *args)
    assert one_sentence(code, err), err
    assert says in err
    assert not (tmp_path / "out").exists()


def test_unsupported_family(call, places, tiny_folder, picture, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text()) | {
        "model_type": "vipllava",
        "architectures": ["VipLlavaForConditionalGeneration"],
    }
    config["vision_feature_layers"] = [-2, -1]
    path.write_text(json.dumps(config))
    code, _, err = call("run", tmp_path / "model", picture, "what ?")
    assert "vipllava" in err.splitlines()[-1]
    assert code == 1
    assert "Traceback" not in err


def test_a_missing_extra_is_named():
    assert "vlmcompress[train]" in explain(ModuleNotFoundError("No module named 'accelerate'", name="accelerate"))
    assert "vlmcompress[eval]" in explain(ModuleNotFoundError("No module named 'scipy.stats'", name="scipy.stats"))


def test_a_missing_extra_stops_eval_with_a_sentence(tiny_folder, tmp_path):
    """In a process of its own in which matplotlib cannot be imported."""
    code = "import sys; sys.modules['matplotlib'] = None; from vlmcompress.cli import main; main(sys.argv[1:])"
    args = ["eval", tiny_folder, "--methods", "grid", "--keep", "9", "--tasks", "scenes", "--out", tmp_path / "o"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].endswith("pip install 'vlmcompress[eval]'")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()


def test_our_own_defects_keep_their_traceback():
    assert explain(KeyError("oops")) is None
    assert explain(ModuleNotFoundError("No module named 'vlmcompress.nothing'", name="vlmcompress.nothing")) is None
