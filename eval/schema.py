# SPDX-License-Identifier: Apache-2.0
"""The files of an evaluation, field by field, checked whenever one is read.

One line each in pandas::

    pandas.read_json("out/eval/answers/grid-keep48.jsonl", lines=True)
    pandas.json_normalize(json.load(open("out/eval/report.json"))["rows"])
    pandas.json_normalize(json.load(open("out/reproduce/reproduction.json"))["cells"])

The same as JSON Schema: ``report.schema.json``, ``answer.schema.json`` and ``reproduction.schema.json`` beside this file,
written by ``python -m vlmcompress.eval.schema``. Within a version fields are only added, with a default; files may hold
fields that a reader does not know.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

REPORT = "vlmcompress.report/1"
FOLDER = Path(__file__).parent

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[float, Field(ge=0)]


class Part(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False, protected_namespaces=())


class Interval(Part):
    """A value with its 95 % interval, paired and resampled by image."""

    value: float
    low: float
    high: float


class Hard(Part):
    """On the questions that the resized picture of the same budget gets wrong."""

    n: int
    accuracy: Share
    low: Share
    high: Share
    uncompressed: Share | None = Field(description="Accuracy of the uncompressed model on the same questions.")


class TaskResult(Part):
    n: int
    accuracy: Share
    low: Share
    high: Share
    sd_over_seeds: float | None
    by_kind: dict[str, Share]
    retained: Interval | None = Field(description="Share of the uncompressed model's accuracy of this run.")
    empty: Share = Field(0, description="Share of the answers without a word.")
    hard: Hard | None = None
    equal: dict[str, dict[str, Interval]] = Field(
        default={},
        description="Difference in accuracy to each baseline at the same layer_tokens and the same full FLOPs; between "
        "its budgets a baseline is interpolated.",
    )
    metrics: dict[str, float] = Field(default={}, description="The task's own metrics as lmms-eval computes them.")


class Clock(Part):
    median: float
    p10: float
    p90: float
    runs: int


class Timing(Part):
    prefill_ms: Clock
    decode_ms_per_token: Clock
    prefill_peak_bytes: int


class Row(Part):
    method: str
    keep: int | float | None
    options: dict[str, Any]
    key: str = Field(description="Name of the row; its answers lie in answers/KEY.jsonl or answers/KEY-seedN.jsonl.")
    seeds: list[int]
    error: str | None = Field(description="Why the row has no numbers, in one sentence.")
    tokens_in: Count | None = Field(None, description="Visual tokens that enter the language model, per prompt.")
    layer_tokens: Count | None = Field(None, description="Visual tokens that a decoder layer sees on average.")
    macs: Count | None = Field(None, description="Multiply-adds of the decoder on visual tokens.")
    flops: Count | None = None
    full: Count | None = Field(None, description="FLOPs of the whole prefill, compressor included.")
    compressor_flops: Count | None = None
    kv_bytes: Count | None = Field(None, description="Keys and values after the prefill, text included.")
    timing: Timing | None = None
    tasks: dict[str, TaskResult] = {}


class Tie(Part):
    """Two rows of one budget that the paired interval of their difference cannot tell apart."""

    task: str
    keep: int | float
    rows: tuple[str, str]
    difference: Interval


class Model(Part):
    name: str
    fingerprint: str
    parameters: int
    dtype: str


class Settings(Part):
    tasks: dict[str, int] = Field(description="Number of questions of each task.")
    max_new_tokens: int
    batch_size: int
    rounds: int


class Report(Part):
    """``report.json``: one evaluation, its machine and versions inside."""

    version: Literal["vlmcompress.report/1"] = Field(alias="schema")
    model: Model
    settings: Settings
    environment: dict[str, Any]
    rows: list[Row] = Field(description="The uncompressed model first.")
    ties: list[Tie] = []


class Answer(Part):
    """One line of ``answers/ROW.jsonl``: a question, its answer and what it cost."""

    task: str
    id: str
    image: str = Field(description="Digest of the picture: answers about one picture belong together.")
    kind: str
    question: str
    answer: str
    prediction: str
    correct: Share
    tokens_in: Count
    layer_tokens: Count
    compressor_flops: Count
    kv_bytes: Count
    macs: Count
    flops: Count
    full: Count
    metrics: dict[str, Any] = Field(default={}, description="What lmms-eval's metrics made of this answer.")


class ReproducedCell(Part):
    """One published value beside ours."""

    benchmark: str
    metric: str
    method: str
    tokens: str
    source: str
    theirs: float = Field(description="Of an average: over the columns that were run; `printed` is the published one.")
    ours: float | None
    difference: float | None
    allowed: float | None = Field(description="Difference up to which the value counts as met; null: not judged.")
    verdict: Literal["met", "above", "below", "not judged", "not run", "failed"]
    reason: str = Field(description="Why there is no value.")
    tasks: list[tuple[str, str]] = Field(default=[], description="Tasks of lmms-eval and their metrics.")
    prompt: dict[str, Any] | None = Field(None, description="What stood around the question, OCR tokens among it.")


class Reproduction(Part):
    """``reproduction.json``: a published table, theirs and ours."""

    version: Literal["vlmcompress.reproduction/1"] = Field(alias="schema")
    table: str
    checkpoint: str
    protocol: str
    about: str
    model_args: dict[str, Any]
    limit: int | None = Field(description="Questions of each task; null: all.")
    environment: dict[str, Any]
    cells: list[ReproducedCell]


def check(kind: type[BaseModel], value: Any, where: object) -> None:
    """``ValueError`` in one sentence when ``value``, read from ``where``, is no such file."""
    try:
        kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise ValueError(f"{where} is no valid {kind.__name__.lower()}: {place}: {first['msg']}.") from error


def schemas() -> dict[str, str]:
    """The JSON Schema files by name."""
    kinds = {"report.schema.json": Report, "answer.schema.json": Answer, "reproduction.schema.json": Reproduction}
    return {name: json.dumps(kind.model_json_schema(), indent=1) + "\n" for name, kind in kinds.items()}


if __name__ == "__main__":
    for name, text in schemas().items():
        (FOLDER / name).write_text(text)
