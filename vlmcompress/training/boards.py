# SPDX-License-Identifier: Apache-2.0
"""Does one flexible projector match projectors trained for one count? A board game that answers within the hour.

A board of g × g cells, each empty or of one of four colours, goes through a small tower and the TokenFLEX projector; a
reader that does not care how many tokens it gets answers questions about it with cross-attention: what is at a cell, how
many cells have a colour, is a colour present in a row. Boards are fresh in every step, the same ones in every arm.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..projectors.tokenflex import TokenFlexProjector
from .counts import CountSchedule
from .runs import device_at_hand

KINDS = ("look-up", "count", "presence")
_SHARES = (0.6, 0.2, 0.2)
_COLORS, _EMPTY = 4, 0.6
_LOOKUPS, _COUNTS = 1 + _COLORS, 13  # what is there; how many, 12 for more
ANSWERS = _LOOKUPS + _COUNTS + 2


@dataclass(frozen=True)
class BoardStudy:
    """Everything that decides the outcome, besides the machine."""

    side: int = 8
    counts: tuple[int, ...] = (4, 16, 64)
    probabilities: tuple[float, ...] = (0.2, 0.3, 0.5)
    untrained: tuple[int, ...] = (9, 25, 36)
    steps: int = 2500
    batch: int = 64
    questions: int = 24
    width: int = 96
    heads: int = 4
    rate: float = 2e-3
    test_boards: int = 2048

    def arms(self) -> dict[str, tuple[tuple[int, ...], tuple[float, ...]]]:
        """Counts and probabilities of every arm: one for each count, and the flexible one."""
        fixed = {f"fixed-{n}": ((n,), (1.0,)) for n in self.counts}
        return fixed | {"flexible": (self.counts, self.probabilities)}


def boards(study: BoardStudy, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boards [B, g²] (0: empty), questions [B, Q, 4] (kind, row, column, colour), answers [B, Q], kinds [B, Q]."""
    g, shape = study.side, (number, study.questions)

    def draw(high: int, size: tuple[int, ...]) -> Tensor:
        return torch.randint(high, size, generator=generator)

    colors = draw(_COLORS, (number, g * g)) + 1
    board = colors.masked_fill(torch.rand(number, g * g, generator=generator) < _EMPTY, 0)
    kind = torch.multinomial(torch.tensor(_SHARES), math.prod(shape), replacement=True, generator=generator).view(shape)
    row, col, color = draw(g, shape), draw(g, shape), draw(_COLORS, shape) + 1
    looked = board.gather(1, row * g + col)
    same = board[:, None] == color[..., None]  # [B, Q, g²]
    count = same.sum(2).clamp_max(_COUNTS - 1) + _LOOKUPS
    in_row = same.unflatten(2, (g, g)).gather(2, row[..., None, None].expand(-1, -1, 1, g)).any(-1)[..., 0]
    answer = torch.where(kind == 0, looked, torch.where(kind == 1, count, in_row.long() + _LOOKUPS + _COUNTS))
    # what a question does not ask about is hidden from the reader
    row, col = row.masked_fill(kind == 1, g), col.masked_fill(kind != 0, g)
    return board, torch.stack([kind, row, col, color.masked_fill(kind == 0, 0)], -1), answer, kind


class BoardModel(nn.Module):
    """Tower, projector and reader, about 0.3 million parameters."""

    def __init__(self, study: BoardStudy):
        super().__init__()
        g, d = study.side, study.width
        place = torch.eye(g)
        codes = torch.cat([place.repeat_interleave(g, 0), place.repeat(g, 1)], 1)
        self.register_buffer("codes", codes, persistent=False)
        self.tower = nn.Sequential(nn.Linear(1 + _COLORS + 2 * g, d), nn.GELU(), nn.Linear(d, d))
        self.projector = TokenFlexProjector(d, d, grid=(g, g))
        self.words = nn.ModuleList(nn.Embedding(n, d) for n in (len(KINDS), g + 1, g + 1, _COLORS + 1))
        self.blocks = nn.ModuleList(_Block(d, study.heads) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, ANSWERS))

    def forward(self, board: Tensor, questions: Tensor, tokens: int) -> Tensor:
        """Logits [B, Q, answers] when the board [B, g²] is seen through ``tokens`` tokens."""
        cells = nn.functional.one_hot(board, 1 + _COLORS).float()
        features = self.tower(torch.cat([cells, self.codes.expand(len(board), -1, -1)], 2))
        self.projector.num_image_tokens = tokens
        seen = self.projector(features)
        asked = sum(embed(questions[..., i]) for i, embed in enumerate(self.words))
        for block in self.blocks:
            asked = block(asked, seen)
        return self.head(asked)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, asked: Tensor, seen: Tensor) -> Tensor:
        q = self.q(self.before(asked)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(seen).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        read = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        asked = asked + self.out(read)
        return asked + self.mlp(self.between(asked))


def train_arm(study: BoardStudy, arm: str, seed: int) -> dict:
    """Train one arm and measure it at every count: ``accuracy[tokens][kind]``, tokens seen, seconds."""
    counts, probabilities = study.arms()[arm]
    schedule = CountSchedule(counts, probabilities, seed=seed)
    torch.manual_seed(seed)
    model = BoardModel(study).to(device_at_hand())
    optimizer = torch.optim.AdamW(model.parameters(), lr=study.rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, study.steps)
    data, start, seen = torch.Generator().manual_seed(seed + 1), time.perf_counter(), 0
    for step in range(study.steps):
        board, questions, answers, _ = (part.to(model.codes.device) for part in boards(study, study.batch, data))
        tokens = schedule.count(step)
        seen += tokens * study.batch
        loss = nn.functional.cross_entropy(model(board, questions, tokens).flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
    seconds = time.perf_counter() - start
    return {
        "arm": arm,
        "seed": seed,
        "tokens_seen": seen,
        "seconds": round(seconds, 1),
        "accuracy": measure(model, study),
    }


@torch.no_grad()
def measure(model: BoardModel, study: BoardStudy) -> dict[str, dict[str, float]]:
    """Accuracy at every trained and untrained count, per kind of question and over all, on boards of their own."""
    found: dict[str, dict[str, float]] = {}
    for tokens in sorted((*study.counts, *study.untrained)):
        generator, right = torch.Generator().manual_seed(10**9), []
        for _ in range(study.test_boards // study.batch):
            drawn = boards(study, study.batch, generator)
            board, questions, answers, kinds = (part.to(model.codes.device) for part in drawn)
            right.append(torch.stack([model(board, questions, tokens).argmax(-1) == answers, kinds]))
        hit, kind = torch.cat(right, 1).flatten(1)
        rates = {name: float(hit[kind == i].float().mean()) for i, name in enumerate(KINDS)}
        found[str(tokens)] = {"all": float(hit.float().mean())} | rates
    return found


def run(study: BoardStudy, seeds: list[int], folder: Path) -> dict:
    """Every arm at every seed, those in ``folder/arms.jsonl`` left out; writes ``study.json`` and ``report.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "arms.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for seed in seeds:
        for arm in study.arms():
            if not any((row["arm"], row["seed"]) == (arm, seed) for row in done):
                done.append(train_arm(study, arm, seed))
                with path.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
    report = {"study": asdict(study), "seeds": seeds, "torch": torch.__version__, **summary(study, done, seeds)}
    (folder / "study.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(study, report))
    return report


def summary(study: BoardStudy, rows: list[dict], seeds: list[int]) -> dict:
    """Mean and standard deviation over seeds per arm and count, and the gates of the specification."""

    def values(arm: str, tokens: int) -> Tensor:
        return torch.tensor([r["accuracy"][str(tokens)]["all"] for r in rows if r["arm"] == arm and r["seed"] in seeds])

    every = sorted((*study.counts, *study.untrained))
    table = {
        arm: {n: {"mean": float(v.mean()), "std": float(v.std(correction=0))} for n in every for v in [values(arm, n)]}
        for arm in study.arms()
    }
    mean = {arm: {n: cell["mean"] for n, cell in row.items()} for arm, row in table.items()}
    seen = {arm: sum(r["tokens_seen"] for r in rows if r["arm"] == arm and r["seed"] in seeds) for arm in study.arms()}
    most, top = max(study.counts), f"fixed-{max(study.counts)}"
    away = {f"fixed-{a}": [b for b in study.counts if abs(study.counts.index(b) - i) == 1]
            for i, a in enumerate(study.counts)}  # fmt: skip
    losses = {arm: min(mean[arm][int(arm[6:])] - mean[arm][n] for n in others) for arm, others in away.items()}
    gates = {
        "flexible ≥ fixed − 0.02 at every trained count": min(
            mean["flexible"][n] - mean[f"fixed-{n}"][n] for n in study.counts
        )
        >= -0.02,
        f"flexible − {top} ≥ 0.15 at every smaller count": min(
            mean["flexible"][n] - mean[top][n] for n in study.counts if n != most
        )
        >= 0.15,
        "fixed arms lose ≥ 0.08 one count away": min(losses.values()) >= 0.08,
        f"tokens seen ≤ 0.6 of {top}": seen["flexible"] <= 0.6 * seen[top],
    }
    return {"accuracy": table, "tokens_seen": seen, "losses_one_count_away": losses, "gates": gates}


def markdown(study: BoardStudy, report: dict) -> str:
    """The report as a page: arms × counts, gates, tokens."""
    every = sorted((*study.counts, *study.untrained))
    head = [f"{n}" if n in study.counts else f"{n} (untrained)" for n in every]
    seeds = ", ".join(map(str, report["seeds"]))
    lines = [
        "# One flexible projector against fixed ones, on boards",
        "",
        f"`vlmcompress train boards`, seeds {seeds}; accuracy over all questions, mean ± standard deviation.",
        "",
        f"| trained at | {' | '.join(head)} |",
        "|---|" + "---:|" * len(every),
    ]
    for arm, row in report["accuracy"].items():
        cells = [f"{row[n]['mean']:.3f} ± {row[n]['std']:.3f}" for n in every]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines += ["", "| gate | |", "|---|---|"]
    lines += [f"| {gate} | {'holds' if held else '**does not hold**'} |" for gate, held in report["gates"].items()]
    saved = 1 - report["tokens_seen"]["flexible"] / report["tokens_seen"][f"fixed-{max(study.counts)}"]
    lines += ["", f"The flexible arm saw {saved:.0%} fewer tokens than the one of {max(study.counts)}."]
    return "\n".join(lines) + "\n"
