# SPDX-License-Identifier: Apache-2.0
"""The pictures of a report: accuracy against cost, one panel per task; visual tokens by decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: colour-blind safe (Paul Tol's "bright", then "muted"); grey and black belong to random and the uncompressed model
COLOURS = ["#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#882255", "#999933", "#117733", "#332288"]
# as many as do not divide the number of colours, so that a pair comes back late
MARKERS = "osD^vPX<>hp"
INK, FAINT, RANDOM = "#222222", "#D8D8D8", "#888888"


@dataclass(frozen=True)
class Cost:
    """What the horizontal axis shows: its label, a word for the title, and where a row has it (None: not measured)."""

    label: str
    unit: str
    of: Callable[[dict[str, Any]], float | None]


MFLOPS = Cost("MFLOPs of one prefill, compressor included", "FLOPs", lambda row: row["full"] / 1e6)
PREFILL_MS = Cost(
    "median ms of one prefill", "milliseconds", lambda row: row["timing"] and row["timing"]["prefill_ms"]["median"]
)


def frontier(report: dict[str, Any], path: Path, cost: Cost = MFLOPS) -> None:
    """Write the picture of accuracy against ``cost`` as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(report["settings"]["tasks"])
    rows = [row for row in report["rows"] if "tasks" in row and cost.of(row) is not None]
    methods = list(dict.fromkeys(r["method"] for r in rows if r["keep"] is not None and r["method"] != "random"))
    style = {m: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, m in enumerate(methods)}
    figure, axes = plt.subplots(1, len(tasks), figsize=(6.4 * len(tasks) + 2.2, 5.2), squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        _panel(axis, task, rows, style, report["settings"]["tasks"][task], cost)
    axes[0][0].set_ylabel("accuracy, %", color=INK)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", frameon=False, fontsize=10.5, handlelength=2.4)
    name = report["model"]["name"]
    figure.suptitle(
        f"{name}: what accuracy is left for how many {cost.unit}", x=0.02, ha="left", fontsize=14, color=INK
    )
    figure.tight_layout(rect=(0, 0, 1 - 2.2 / figure.get_figwidth(), 0.98))
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)


def layer_profile(profiles: Mapping[str, Sequence[int]], path: Path) -> None:
    """Write a picture of the visual tokens that every decoder layer processes, by method, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4))
    for i, (method, tokens) in enumerate(profiles.items()):
        edges = [layer - 0.5 for layer in range(len(tokens) + 1)]
        # lines that lie on each other stay visible: each is a little thinner than the one below
        width = 6 - 4.5 * i / max(1, len(profiles) - 1)
        axis.stairs(tokens, edges, color=COLOURS[i % len(COLOURS)], linewidth=width, label=method, baseline=None)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color=FAINT, linewidth=0.7)
    axis.set_ylim(bottom=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("decoder layer", color=INK)
    axis.set_ylabel("visual tokens", color=INK)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)


def _panel(axis: Any, task: str, rows: list[dict], style: dict[str, tuple[str, str]], n: int, cost: Cost) -> None:
    def curve(method: str) -> tuple[list[float], list[dict]]:
        mine = sorted((r for r in rows if r["method"] == method and r["keep"] is not None), key=cost.of)
        return [cost.of(r) for r in mine], [r["tasks"][task] for r in mine]

    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color=FAINT, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(colors=INK)
    axis.set_title(f"{task}   n = {n:,}", loc="left", fontsize=11.5, color=INK)
    axis.set_xlabel(cost.label, color=INK)
    for row in rows:
        if row["method"] == "none":
            best = row["tasks"][task]
            axis.axhspan(100 * best["low"], 100 * best["high"], color="#000000", alpha=0.06, linewidth=0)
            axis.plot(cost.of(row), 100 * best["accuracy"], "*", color=INK, markersize=15, label="uncompressed")
            axis.axhline(100 * best["accuracy"], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        elif row["method"] == "no-vision":
            axis.axhline(100 * row["tasks"][task]["accuracy"], color=INK, linewidth=1, linestyle=":", label="no vision")
    x, found = curve("random")
    if x:
        y = [100 * t["accuracy"] for t in found]
        spread = [100 * (t["sd_over_seeds"] or 0) for t in found]
        low, high = ([a + s * b for a, b in zip(y, spread, strict=True)] for s in (-1, 1))
        axis.fill_between(x, low, high, color=RANDOM, alpha=0.3, linewidth=0)
        axis.plot(x, y, color=RANDOM, linewidth=2, marker="o", markersize=4, label="random, mean ± sd")
    for method, (colour, marker) in style.items():
        x, found = curve(method)
        y = [100 * t["accuracy"] for t in found]
        errors = [[100 * (t["accuracy"] - t["low"]) for t in found], [100 * (t["high"] - t["accuracy"]) for t in found]]
        axis.errorbar(x, y, yerr=errors, color=colour, marker=marker, markersize=6.5, linewidth=1.8, elinewidth=0.7,
                      capsize=0, alpha=0.95, label=method)  # fmt: skip
