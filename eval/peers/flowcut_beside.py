# SPDX-License-Identifier: Apache-2.0
"""The authors' FlowCut (PyPI ``flowcut`` 1.0.2) and ours on the same vision tower, weights and pictures, in alternation.

The package replaces methods of transformers 4.37's CLIP and of the authors' LLaVA, which is on no package registry. Its
part inside the tower needs only the names of that LLaVA, so those are stood in for here; what is compared is the tower:
kept patches, features and time. Both run in float32 with one thread; the clock is processor time.

    python eval/peers/flowcut_beside.py --model assets/models/tiny-llava --out results
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from dialogue import Worker, alternate, serve, summary

#: random towers: (layers, width, heads, side in pixels, patch); the weights of queries and keys are made larger, for
#: attention of random weights is so even that nothing leaves before the last cut
RANDOM, CONCENTRATION = (24, 256, 4, 336, 14), 12.0


def load(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], np.ndarray]:
    """Configuration, weights and pictures [n, 3, side, side] of one case."""
    config = json.loads((folder / "config.json").read_text())
    return config, dict(np.load(folder / "weights.npz")), np.load(folder / "pixels.npy")


# theirs ---------------------------------------------------------------------------------------------------------------
def _stand_in() -> type:
    """The names of the authors' LLaVA that the package imports; the tower's class selects patches as theirs does."""
    import torch

    class CLIPVisionTower(torch.nn.Module):
        select_feature, select_layer = "patch", -2
        device, dtype = torch.device("cpu"), torch.float32

        def feature_select(self, outputs: Any) -> Any:
            return outputs.hidden_states[self.select_layer][:, 1:]

    class LlavaMetaForCausalLM:
        pass

    names: dict[str, dict[str, Any]] = {
        "llava": {}, "llava.model": {}, "llava.model.multimodal_encoder": {}, "llava.model.language_model": {},
        "llava.constants": dict.fromkeys(
            ("IGNORE_INDEX", "IMAGE_TOKEN_INDEX", "DEFAULT_IMAGE_PATCH_TOKEN", "DEFAULT_IM_START_TOKEN",
             "DEFAULT_IM_END_TOKEN"), 0),
        "llava.mm_utils": {"get_anyres_image_grid_shape": None},
        "llava.model.multimodal_encoder.clip_encoder": {"CLIPVisionTower": CLIPVisionTower},
        "llava.model.llava_arch": {"LlavaMetaForCausalLM": LlavaMetaForCausalLM},
    }  # fmt: skip
    for name, holds in names.items():
        module = types.ModuleType(name)
        module.__dict__.update(holds)
        sys.modules[name] = module
    return CLIPVisionTower


def theirs() -> None:
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.set_num_threads(1)
    shell = _stand_in()
    from flowcut import flowcut

    state: dict[str, Any] = {}

    def prepare(folder: str, keep: int) -> dict[str, str]:
        config, weights, pixels = load(Path(folder))
        tower = shell()
        tower.vision_tower = CLIPVisionModel(CLIPVisionConfig(**config)).eval()
        tower.vision_tower.load_state_dict(
            {f"vision_model.{name}": torch.from_numpy(w) for name, w in weights.items()}, strict=False
        )
        llava = types.SimpleNamespace(
            config=types.SimpleNamespace(image_aspect_ratio="pad"), model=types.SimpleNamespace(vision_tower=tower)
        )
        flowcut(llava, target_num=keep)
        state.update(tower=tower, pixels=torch.from_numpy(pixels))
        import transformers

        return {"transformers": transformers.__version__, "torch": torch.__version__}

    def run(picture: int, out: str | None = None) -> float:
        begin = time.process_time()
        features, kept = state["tower"](state["pixels"][picture][None])
        took = (time.process_time() - begin) * 1e3
        if out:
            np.savez(out, features=features[0].numpy(), kept=kept[0].numpy())
        return took

    serve({"prepare": prepare, "run": run})


# ours -----------------------------------------------------------------------------------------------------------------
def ours() -> None:
    import torch
    import transformers
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    import vlmcompress

    torch.set_num_threads(1)
    state: dict[str, Any] = {}

    def prepare(folder: str, keep: int) -> dict[str, str]:
        config, weights, pixels = load(Path(folder))
        text = LlamaConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=16
        )
        model = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=CLIPVisionConfig(**config), text_config=text, image_token_id=4)
        ).eval()
        tower = model.model.vision_tower
        names = {name.removeprefix("vision_model."): name for name in tower.state_dict()}
        tower.load_state_dict({names[n]: torch.from_numpy(w) for n, w in weights.items() if n in names}, strict=False)
        handle = vlmcompress.compress(model, "flowcut", keep=keep)
        marks: dict[str, Any] = {}
        tower.register_forward_pre_hook(lambda *_: marks.update(begin=time.process_time()), prepend=True)
        tower.register_forward_hook(lambda *_: marks.update(end=time.process_time()))
        model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: marks.update(features=args[0]))
        patches = (config["image_size"] // config["patch_size"]) ** 2
        ids = torch.tensor([[5, *[4] * patches, 6]])
        state.update(model=model, handle=handle, marks=marks, ids=ids, pixels=torch.from_numpy(pixels))
        return {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "vlmcompress": vlmcompress.__version__,
        }

    @torch.inference_mode()
    def run(picture: int, out: str | None = None) -> float:
        ids, marks = state["ids"], state["marks"]
        state["model"](input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=state["pixels"][picture][None])
        if out:
            kept = state["handle"].last.samples[0].images[0].kept
            np.savez(out, features=marks["features"][0].numpy(), kept=kept.numpy())
        return (marks["end"] - marks["begin"]) * 1e3

    serve({"prepare": prepare, "run": run})


# the comparison -------------------------------------------------------------------------------------------------------
def write_cases(model: str, folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """The tower of a real model on its own pictures, and a random one of 576 patches on noise."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from vlmcompress.eval.loading import encode
    from vlmcompress.eval.loading import load as load_model
    from vlmcompress.eval.tasks import load as load_task

    def write(name: str, tower: Any, pixels: Any) -> Path:
        place = folder / name
        place.mkdir()
        (place / "config.json").write_text(json.dumps(tower.config.to_diff_dict() | {"dtype": None}))
        weights = {n.removeprefix("vision_model."): w.float().numpy() for n, w in tower.state_dict().items()}
        np.savez(place / "weights.npz", **weights)
        np.save(place / "pixels.npy", pixels.float().numpy())
        return place

    real, processor = load_model(model, dtype="float32")
    samples = list({s.picture: s for s in load_task("scenes")[:200]}.values())[:24]
    pixels = encode(real, processor, [s.image for s in samples], ["?"] * len(samples))["pixel_values"]
    torch.manual_seed(0)
    layers, width, heads, side, patch = RANDOM
    drawn = CLIPVisionModel(
        CLIPVisionConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                         num_attention_heads=heads, image_size=side, patch_size=patch)
    ).eval()  # fmt: skip
    for name, weight in drawn.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight *= CONCENTRATION
    noise = torch.randn(4, 3, side, side)
    return {
        Path(model).name: (write("real", real.model.vision_tower, pixels), (48, 16)),
        "random, 24 layers × 256": (write("random", drawn, noise), (192, 64)),
    }


def compare(us: Any, them: Any, folder: Path, keep: int, rounds: int, scratch: Path) -> dict[str, Any]:
    """Kept patches and features of every picture, then the clocks on the first one."""
    versions = {
        "ours": us("prepare", folder=str(folder), keep=keep),
        "theirs": them("prepare", folder=str(folder), keep=keep),
    }
    pictures = len(np.load(folder / "pixels.npy"))
    same, shared, apart = 0, [], 0.0
    for picture in range(pictures):
        found = {}
        for name, worker in (("ours", us), ("theirs", them)):
            worker("run", picture=picture, out=str(scratch / f"{name}.npz"))
            found[name] = dict(np.load(scratch / f"{name}.npz"))
        a, b = found["ours"], found["theirs"]
        same += bool(np.array_equal(a["kept"], b["kept"]))
        shared.append(len(np.intersect1d(a["kept"], b["kept"])) / keep)
        if np.array_equal(a["kept"], b["kept"]):
            apart = max(apart, float(np.abs(a["features"] - b["features"]).max() / np.abs(b["features"]).max()))
    times = alternate({"ours": lambda: us("run", picture=0), "theirs": lambda: them("run", picture=0)}, rounds)
    ratios = [a / b for a, b in zip(times["ours"], times["theirs"], strict=True)]
    return {
        "keep": keep, "pictures": pictures, "same_kept_set": same, "shared_patches": float(np.mean(shared)),
        "largest_feature_difference": apart, "tower_ms": summary(times), "ours_over_theirs": statistics.median(ratios),
        "versions": versions,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--model", default="assets/models/tiny-llava")
    parser.add_argument("--peer", type=Path, default=Path(".venv-peers/flowcut/bin/python"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("results"))
    asked = parser.parse_args()
    if asked.worker:
        {"ours": ours, "theirs": theirs}[asked.worker]()
        return
    from vlmcompress.eval.results import environment
    from vlmcompress.eval.store import write_json

    us, them = (
        Worker(Path(sys.executable), __file__, "--worker", "ours"),
        Worker(asked.peer, __file__, "--worker", "theirs"),
    )
    with tempfile.TemporaryDirectory() as scratch:
        cases = write_cases(asked.model, Path(scratch))
        found = {
            name: [compare(us, them, folder, keep, asked.rounds, Path(scratch)) for keep in keeps]
            for name, (folder, keeps) in cases.items()
        }
    for worker in (us, them):
        worker.close()
    report = {
        "schema": "vlmcompress.peer/1", "peer": "flowcut 1.0.2",
        "command": f"python eval/peers/flowcut_beside.py --rounds {asked.rounds}",
        "environment": environment() | {"threads": 1}, "clock": "processor time", "cases": found,
    }  # fmt: skip
    asked.out.mkdir(parents=True, exist_ok=True)
    write_json(asked.out / "peer-flowcut.json", report)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
