# SPDX-License-Identifier: Apache-2.0
"""The rows of a table: which methods at which budgets with which seeds."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

UNCOMPRESSED = "none"
#: rows that every table has, whatever was asked for: the ones that embarrass the field (evaluation.md, section 2)
BASELINES = (UNCOMPRESSED, "no-vision", "random", "grid", "pool", "resize", "fastv", "tome")
STANDARD = (UNCOMPRESSED, "no-vision", "random", "grid", "pool", "resize", "vtc-cls", "fastv", "tome")


@dataclass(frozen=True)
class Row:
    """One line of the table; ``seeds`` has an entry per run that it averages (one ``None`` without randomness)."""

    method: str
    keep: int | float | None = None
    seeds: tuple[int | None, ...] = (None,)
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def key(self) -> str:
        """Name of the row, fit for a file."""
        options = [f"{name}={value}" for name, value in sorted(self.options.items())]
        parts = [self.method, *([] if self.keep is None else [f"keep{self.keep}"]), *options]
        return "-".join(parts).replace("/", "_").replace(" ", "")

    def run_key(self, seed: int | None) -> str:
        return self.key if seed is None else f"{self.key}-seed{seed}"

    def arguments(self, seed: int | None) -> dict[str, Any]:
        """Keyword arguments of ``vlmcompress.compress`` for one run."""
        budget = {} if self.keep is None else {"keep": self.keep}
        return budget | self.options | ({} if seed is None else {"seed": seed})


def parse_keep(text: str) -> int | float:
    """``"48"`` → 48 tokens per image, ``"0.25"`` → a quarter of them; ``ValueError`` in one sentence otherwise."""
    from ..method import check_keep

    try:
        value: int | float = int(text)
    except ValueError:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(
                f"keep is a number of visual tokens per image (int ≥ 1) or a share of them (0 to 1), not '{text}'."
            ) from None
    check_keep(value)
    return value


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Options from ``NAME=VALUE``, values as Python writes them and else as text; ``ValueError`` in one sentence."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"An option is NAME=VALUE, not '{pair}'.")
        try:
            options[name.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name.strip()] = value
    return options


def parse_row(text: str, seeds: Sequence[int] = (0, 1, 2)) -> Row:
    """One row with options of its own: ``"transprune layers=(1,2) fractions=(0.5,0.1)"``.

    A value that holds spaces stands in quotes, as Python writes it. A method that draws at random averages ``seeds``
    unless the row names one. Raises ``ValueError`` in one sentence for an unknown method or option and for values that the
    method refuses.
    """
    from ..method import create

    name, *pairs = _words(text) or [""]
    options = parse_options(pairs)
    method = create(name, **options).methods[0]
    keep = options.pop("keep", None)
    drawn: tuple[int | None, ...] = tuple(seeds) if hasattr(method, "seed") and "seed" not in options else (None,)
    return Row(name, keep, drawn, options)


def _words(text: str) -> list[str]:
    """``text`` split at spaces that stand outside of quotes; the quotes stay. ``ValueError`` where one is not closed."""
    quoted = r"""'[^']*'|"[^"]*\""""
    if not re.fullmatch(rf"""(?:{quoted}|[^'"])*""", text):
        raise ValueError(f"A quote is opened and not closed in the row {text}")
    return re.findall(rf"""(?:{quoted}|[^\s'"])+""", text)


def plan(
    methods: Sequence[str], keeps: Sequence[int | float], seeds: Sequence[int] = (0, 1, 2), further: Sequence[Row] = ()
) -> list[Row]:
    """Rows of ``methods`` × ``keeps`` and the ``further`` ones, those of a method together.

    The uncompressed model stands first whether it was asked for or not. A method without a ``keep`` option gives one
    row, a method with a ``seed`` option one row that averages ``seeds``. Raises ``ValueError`` for an unknown method or
    a budget that no method accepts.
    """
    from ..registry import METHODS

    rows = [Row(UNCOMPRESSED)]
    for name in dict.fromkeys(methods):
        if name == UNCOMPRESSED:
            continue
        options = {f.name for f in dataclasses.fields(METHODS.get(name)) if f.init}
        drawn: tuple[int | None, ...] = tuple(seeds) if "seed" in options else (None,)
        rows += [Row(name, keep, drawn) for keep in (keeps if "keep" in options else [None])]
    rows += further
    order = list(dict.fromkeys(row.method for row in rows))
    # a row asked for twice is one row
    return sorted({row.key: row for row in rows}.values(), key=lambda row: order.index(row.method))
