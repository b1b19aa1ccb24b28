# SPDX-License-Identifier: Apache-2.0
"""Published tables as data, each with the protocol that its numbers belong to.

``published/PAPER/MODEL.csv`` holds the cells, the JSON file beside it says which checkpoint they are of and what of ours
each row stands for, and ``published/protocols/NAME.json`` pins per benchmark the tasks of lmms-eval, their metric, the
prompt and whether OCR tokens are in it. A table of one's own is the path of such a CSV file, its protocol's path beside.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .store import read_json

FOLDER = Path(__file__).parent / "published"
COLUMNS = ("model", "benchmark", "metric", "tokens", "method", "value", "source")
#: benchmarks that are means over the others
RATIOS, PLAIN = "mean of ratios to the uncompressed row, %", "mean of the eight columns"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class Benchmark(_Strict):
    """How one benchmark is measured; ``missing`` says why it cannot be."""

    parts: list[tuple[str, str]] = Field([], description="Task of lmms-eval and its metric; several are combined.")
    combine: Literal["mean", "sum"] = "mean"
    scale: float = 1.0
    prompt: dict[str, Any] | None = Field(
        None, description="What stands around the question, `ocr` among it; None: the task itself holds it."
    )
    tolerance: float = Field(0.0, ge=0, description="Difference up to which a value counts as met.")
    note: str = ""
    missing: str = ""

    @model_validator(mode="after")
    def _either(self) -> Benchmark:
        if bool(self.parts) == bool(self.missing):
            raise ValueError("a benchmark has parts, or a reason in missing")
        return self


class Protocol(_Strict):
    """``published/protocols/NAME.json``: benchmarks by "NAME/METRIC", arguments of the model, what averages may differ."""

    about: str
    model_args: dict[str, Any] = {}
    average_tolerance: float = Field(ge=0)
    benchmarks: dict[str, Benchmark]


class Run(_Strict):
    """What stands for one published row: a method of ours with its options."""

    method: str
    keep: int | float | None = None
    options: dict[str, Any] = {}


class Pins(_Strict):
    """The JSON file beside a table; ``methods``: published method → its tokens → what of ours that is."""

    checkpoint: str
    protocol: str
    methods: dict[str, dict[str, Run]]
    left_out: dict[str, str] = {}


@dataclass(frozen=True)
class Cell:
    """One published value."""

    benchmark: str
    metric: str
    tokens: str
    method: str
    value: float
    source: str

    @property
    def row(self) -> tuple[str, str]:
        return self.method, self.tokens

    @property
    def averages(self) -> bool:
        return self.metric in (RATIOS, PLAIN)


@dataclass(frozen=True)
class Table:
    """A published table with what is needed to run it."""

    name: str
    cells: tuple[Cell, ...]
    pins: Pins
    protocol: Protocol

    def run(self, row: tuple[str, str]) -> Run | None:
        """What of ours stands for the published ``row`` (method, tokens)."""
        return self.pins.methods.get(row[0], {}).get(row[1])

    def why_not(self, cell: Cell) -> str:
        """Why a cell cannot be run, or nothing."""
        if self.run(cell.row) is None:
            return self.pins.left_out.get(cell.method, "this row is not described in the table's protocol")
        return "" if cell.averages else self.protocol.benchmarks[f"{cell.benchmark}/{cell.metric}"].missing

    def tasks(self) -> dict[str, Benchmark]:
        """The benchmark that every task of lmms-eval is run for."""
        wanted = {f"{c.benchmark}/{c.metric}" for c in self.cells if not c.averages and not self.why_not(c)}
        chosen = {name: b for name, b in self.protocol.benchmarks.items() if name in wanted}
        return {task: benchmark for benchmark in chosen.values() for task, _ in benchmark.parts}


def names() -> list[str]:
    """The shipped tables that can be reproduced."""
    files = (file for file in FOLDER.glob("*/*.csv") if file.with_suffix(".json").is_file())
    return sorted(str(file.relative_to(FOLDER).with_suffix("")) for file in files)


def read(name: str) -> Table:
    """A shipped table by name, or the one in a CSV file. Raises ``ValueError`` in one sentence."""
    own = name.endswith(".csv")
    path = Path(name) if own else FOLDER / f"{name}.csv"
    if not own and name not in names():
        raise ValueError(f"There is no published table '{name}' to reproduce; there are {', '.join(names())}.")
    for file in (path, path.with_suffix(".json")):
        if not file.is_file():
            raise ValueError(f"There is no file '{file}'; a table is a CSV file and a JSON file of the same name.")
    pins = _parse(Pins, path.with_suffix(".json"))
    protocol = path.parent / pins.protocol if own else FOLDER / "protocols" / f"{pins.protocol}.json"
    if not protocol.is_file():
        raise ValueError(f"{path.with_suffix('.json')} names the protocol '{pins.protocol}', which is not there.")
    table = Table(name, _cells(path), pins, _parse(Protocol, protocol))
    for cell in table.cells:
        if not cell.averages and f"{cell.benchmark}/{cell.metric}" not in table.protocol.benchmarks:
            raise ValueError(f"{protocol} does not say how {cell.benchmark} ({cell.metric}) is measured.")
    return table


def _parse(kind: type[Any], path: Path) -> Any:
    try:
        return kind.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise ValueError(f"{path}: {place}: {first['msg']}.") from error


def _cells(path: Path) -> tuple[Cell, ...]:
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    if not rows or set(COLUMNS) - set(rows[0]):
        raise ValueError(f"{path} is no table: it has the columns {', '.join(COLUMNS)} and at least one row.")
    try:
        return tuple(
            Cell(r["benchmark"], r["metric"], r["tokens"], r["method"], float(r["value"]), r["source"]) for r in rows
        )
    except ValueError as error:
        raise ValueError(f"{path} holds a value that is no number: {error}.") from error
