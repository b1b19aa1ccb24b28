# SPDX-License-Identifier: Apache-2.0
"""kvpress 0.5.5 and ours behind the same prompts of the same model, in alternation.

What overlaps: kvpress evicts once, after the prompt, text models in the first place; its ``StreamingLLMPress`` is our
``keep-last`` at that moment and must keep the same entries. Its ``ObservedAttentionPress`` is "related to H2O": both rank
entries by the attention that they got from the prompt, kvpress by its mean over the queries that could see an entry, H2O
(and our ``h2o``) by its sum, which favours early entries. Those two need not agree, so the share in common is reported
beside that of a random choice. SnapKV, expected attention and the rest have no counterpart here; H2O's later evictions,
A2SF, Keyformer, LazyEviction and TokenSelect have none there.

    python eval/peers/kvpress_beside.py --model assets/models/tiny-llava --out results
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from dialogue import Worker, alternate, serve, summary

SINKS, STEPS = 4, 8
#: (press of theirs, method of ours)
PAIRS = {"streaming": ("StreamingLLMPress", "keep-last"), "attention": ("ObservedAttentionPress", "h2o")}


def same_name(name: str) -> str:
    """The name of a weight in both versions of transformers."""
    return name.replace(".vision_model.", ".")


def write_weights(model: Any, folder: Path) -> None:
    """Configuration and weights of a model for both sides."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    np.savez(folder / "weights.npz", **{same_name(n): w.float().numpy() for n, w in model.state_dict().items()})


class Side:
    """One library on one model: runs a prompt, then some given tokens, and tells which entries it kept."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        self.torch: Any = torch
        self.model: Any = None
        self.prompts: list[dict[str, Any]] = []

    def prepare(self, model: str, prompts: str, attention: str) -> dict[str, str]:
        import transformers
        from transformers import LlavaConfig, LlavaForConditionalGeneration

        config = LlavaConfig.from_pretrained(model)
        self.model = LlavaForConditionalGeneration._from_config(
            config, dtype=self.torch.float32, attn_implementation=attention
        ).eval()
        # a version of transformers that does not know a name would leave the weight as it was drawn, and only warn
        own = {same_name(name): name for name in self.model.state_dict()}
        weights = np.load(Path(model) / "weights.npz")
        if own.keys() != set(weights):
            raise ValueError(f"Weights that only one side has: {sorted(own.keys() ^ set(weights))}.")
        self.model.load_state_dict({own[name]: self.torch.from_numpy(weights[name]) for name in weights})
        found = np.load(prompts)
        count = 1 + max(int(name.split("/")[0]) for name in found)
        self.prompts = [
            {n.split("/")[1]: self.torch.from_numpy(found[n]) for n in found if n.split("/")[0] == str(i)}
            for i in range(count)
        ]
        return {"transformers": transformers.__version__, "torch": self.torch.__version__}

    def attached(self, pair: str, kept: int, n: int) -> Any:
        raise NotImplementedError

    def entries(self, cache: Any) -> list[Any]:
        """Keys of every layer, [heads, entries, d]."""
        return [layer.keys[0] for layer in cache.layers]

    def prefill(self, prompt: int) -> Any:
        return self.model(**self.prompts[prompt], use_cache=True, logits_to_keep=1)

    def step(self, cache: Any, token: int, position: int) -> Any:
        ids = self.torch.tensor([[token]])
        where = self.torch.tensor([[position]])
        return self.model(input_ids=ids, position_ids=where, past_key_values=cache, use_cache=True)

    def run(self, prompt: int, pair: str, kept: int, out: str | None = None) -> dict[str, float]:
        """Milliseconds of the prompt and per later token; with ``out`` the kept entries and the logits go there."""
        n = self.prompts[prompt]["input_ids"].shape[1]
        with self.torch.inference_mode():
            whole = self.entries(self.prefill(prompt).past_key_values) if out else []
            whole = [keys.clone() for keys in whole]
            with self.attached(pair, kept, n):
                begin = time.process_time()
                first = self.prefill(prompt)
                middle = time.process_time()
                cache = first.past_key_values
                left = [keys.clone() for keys in self.entries(cache)] if out else []
                logits = [first.logits[0, -1]]
                later = time.process_time()
                for i in range(STEPS):
                    logits.append(self.step(cache, 5 + i, n + i).logits[0, -1])
                end = time.process_time()
        if out:
            # an entry is told by its key: the one of the whole cache that it equals
            places = [self.torch.cdist(a, b).argmin(-1).sort().values for a, b in zip(left, whole, strict=True)]
            np.savez(out, places=np.stack([p.numpy() for p in places]), logits=self.torch.stack(logits).numpy())
        return {"prefill": (middle - begin) * 1e3, "decode": (end - later) * 1e3 / STEPS}


class Theirs(Side):
    def attached(self, pair: str, kept: int, n: int) -> Any:
        import kvpress

        # kvpress keeps int(n · (1 - ratio)); half an entry more keeps the float from rounding below it
        ratio = 1 - (kept + 0.5) / n
        options = {"n_sink": SINKS} if pair == "streaming" else {}
        return getattr(kvpress, PAIRS[pair][0])(compression_ratio=ratio, **options)(self.model)


class Ours(Side):
    def attached(self, pair: str, kept: int, n: int) -> Any:
        import vlmcompress

        options = {"budget": kept, "sinks": SINKS} if pair == "streaming" else {"heavy": kept, "recent": 0}
        return vlmcompress.compress(self.model, PAIRS[pair][1], **options)

    def step(self, cache: Any, token: int, position: int) -> Any:
        from vlmcompress.compat import cache_keyword

        ids, where = self.torch.tensor([[token]]), self.torch.tensor([[position]])
        return self.model(input_ids=ids, position_ids=where, use_cache=True, **{cache_keyword(self.model): cache})


def write_prompts(model: str, folder: Path, file: Path, count: int) -> list[int]:
    """The model, and questions of the scenes as its processor encodes them; the number of tokens of each."""
    from vlmcompress.eval.loading import encode
    from vlmcompress.eval.loading import load as load_model
    from vlmcompress.eval.tasks import load as load_task

    real, processor = load_model(model, dtype="float32")
    write_weights(real, folder)
    found, lengths = {}, []
    for i, sample in enumerate(load_task("scenes", limit=count)):
        inputs = encode(real, processor, [sample.image], [sample.question])
        wanted = ("input_ids", "attention_mask", "pixel_values")
        found |= {f"{i}/{name}": inputs[name].numpy() for name in wanted}
        lengths.append(inputs["input_ids"].shape[1])
    np.savez(file, **found)
    return lengths


def write_long(folder: Path, file: Path, tokens: int = 2048) -> None:
    """A LLaVA of random weights for the clock, 576 of its ``tokens`` visual."""
    import torch

    from vlmcompress.eval import decoding

    model = decoding.build(4, 512, "cpu", torch.float32)
    write_weights(model, folder)
    inputs = decoding.prompt(tokens, "cpu", torch.float32)
    np.savez(file, **{f"0/{name}": value.numpy() for name, value in inputs.items()})


def kept_entries(
    us: Worker, them: Worker, lengths: list[int], pair: str, share: float, scratch: Path
) -> dict[str, Any]:
    """How alike the kept entries and the logits behind them are, over all prompts."""
    common, equal, chance, apart = [], 0, [], []
    for prompt, n in enumerate(lengths):
        kept, found = int(share * n), {}
        for name, worker in (("ours", us), ("theirs", them)):
            worker("run", prompt=prompt, pair=pair, kept=kept, out=str(scratch / f"{name}.npz"))
            found[name] = dict(np.load(scratch / f"{name}.npz"))
        a, b = found["ours"]["places"], found["theirs"]["places"]
        rows = list(zip(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), strict=True))
        common += [len(np.intersect1d(x, y)) / kept for x, y in rows]
        equal += bool(np.array_equal(a, b))
        chance.append(kept / n)
        # at the first later token both caches hold what the prompt left; ours goes on evicting
        gap = np.abs(found["ours"]["logits"][:2] - found["theirs"]["logits"][:2]).max(-1)
        apart.append(gap / np.abs(found["theirs"]["logits"][:2]).max(-1))
    return {
        "theirs": PAIRS[pair][0], "ours": PAIRS[pair][1], "kept_share": share, "prompts": len(lengths),
        "prompts_with_equal_sets": equal, "entries_in_common": float(np.mean(common)),
        "by_chance": float(np.mean(chance)),
        "largest_logit_difference": dict(zip(("prompt", "next token"), np.max(apart, 0).tolist(), strict=True)),
    }  # fmt: skip


def times_of(us: Worker, them: Worker, pair: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of the long prompt and of later tokens, both sides in turn, a fifth of the entries kept."""
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}

    def case(name: str, worker: Worker) -> Callable[[], float]:
        def call() -> float:
            runs[name].append(worker("run", prompt=0, pair=pair, kept=409))
            return runs[name][-1]["prefill"]

        return call

    alternate({"ours": case("ours", us), "theirs": case("theirs", them)}, rounds)
    # the first one warms up
    return {
        part: summary({name: [run[part] for run in found[1:]] for name, found in runs.items()})
        for part in ("prefill", "decode")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--model", default="assets/models/tiny-llava")
    parser.add_argument("--peer", type=Path, default=Path(".venv-peers/kvpress/bin/python"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("results"))
    asked = parser.parse_args()
    if asked.worker:
        side = Ours() if asked.worker == "ours" else Theirs()
        serve({"prepare": side.prepare, "run": side.run})
        return
    from vlmcompress.eval.results import environment
    from vlmcompress.eval.store import write_json

    us, them = (
        Worker(Path(sys.executable), __file__, "--worker", "ours"),
        Worker(asked.peer, __file__, "--worker", "theirs"),
    )
    sides, kept, clocks, versions = {"ours": us, "theirs": them}, [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        lengths = write_prompts(asked.model, scratch / "real", scratch / "prompts.npz", asked.prompts)
        write_long(scratch / "long", scratch / "long.npz")

        def prepare(model: str, prompts: str, pair: str) -> None:
            for name, worker in sides.items():
                # only with eager attention does kvpress see the weights that its second press ranks by
                attention = "eager" if (name, pair) == ("theirs", "attention") else "sdpa"
                place = str(scratch / prompts)
                versions[name] = worker("prepare", model=model, prompts=place, attention=attention)

        for pair in PAIRS:
            prepare(str(scratch / "real"), "prompts.npz", pair)
            kept += [kept_entries(us, them, lengths, pair, share, scratch) for share in (0.5, 0.2)]
            prepare(str(scratch / "long"), "long.npz", pair)
            clocks[pair] = times_of(us, them, pair, asked.rounds)
    for worker in (us, them):
        worker.close()
    report = {
        "schema": "vlmcompress.peer/1", "peer": "kvpress 0.5.5",
        "command": f"python eval/peers/kvpress_beside.py --rounds {asked.rounds} --prompts {asked.prompts}",
        "environment": environment() | {"threads": 1}, "versions": versions, "clock": "processor time",
        "attention": "sdpa, theirs eager for ObservedAttentionPress", "kept": kept,
        "milliseconds": {"shape": "Llama 4 layers × 512, 2,048 tokens, a fifth kept", **clocks},
    }  # fmt: skip
    asked.out.mkdir(parents=True, exist_ok=True)
    write_json(asked.out / "peer-kvpress.json", report)
    print(json.dumps({"kept": kept, "milliseconds": clocks}, indent=1))


if __name__ == "__main__":
    main()
