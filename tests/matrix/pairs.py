# SPDX-License-Identifier: Apache-2.0
"""Few cells in which every two values of two axes meet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations

Cell = tuple[Hashable, ...]


def covering(cells: Iterable[Cell], whole: int) -> list[Cell]:
    """A subset of ``cells`` that has every pair of values of two axes which some cell has.

    Every combination of the first ``whole`` axes gets one cell, so the others cost nothing as long as those are many;
    what is missing then is added. Deterministic: of equally useful cells the one whose values were used least, then the
    first.
    """
    groups: dict[Cell, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell[:whole], []).append(cell)
    missing = {pair for group in groups.values() for cell in group for pair in pairs(cell)}
    used: Counter[tuple] = Counter()

    def best(candidates: Sequence[Cell]) -> Cell:
        cell = max(candidates, key=lambda c: (len(missing & pairs(c)), -sum(used[pair] for pair in pairs(c))))
        missing.difference_update(pairs(cell))
        used.update(pairs(cell))
        return cell

    chosen = [best(group) for group in groups.values()]
    everything = [cell for group in groups.values() for cell in group]
    while missing:
        chosen.append(best([cell for cell in everything if missing & pairs(cell)]))
    return chosen


def pairs(cell: Cell) -> set[tuple]:
    """Every two of the cell's values, with their axes."""
    return set(combinations(enumerate(cell), 2))
