# SPDX-License-Identifier: Apache-2.0
"""What the YAML files of this package's tasks call: a task of ours as documents of lmms-eval.

A YAML file names one line of JSON with the task's name; :func:`documents` makes the whole data set of it. Pictures stay
in the package's own reader, so that lmms-eval and ``vlmcompress eval`` show the same pixels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from datasets import Dataset
from PIL import Image

from ..tasks import Sample, load


@lru_cache(maxsize=4)
def _samples(task: str) -> list[Sample]:
    return load(task)


def documents(named: Dataset) -> Dataset:
    """One document per question of the task that the first line names."""
    task = named[0]["task"]
    rows = [
        {"task": task, "index": i, "id": s.id, "question": s.question, "answer": s.answer, "kind": s.kind}
        for i, s in enumerate(_samples(task))
    ]
    return Dataset.from_list(rows)


def visual(document: dict[str, Any]) -> list[Any]:
    """The picture of a document, or its video as a list of frames."""
    image = _samples(document["task"])[document["index"]].image
    return [image if isinstance(image, Image.Image) else {"type": "video", "url": list(image)}]


def question(document: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    return document["question"]


def results(document: dict[str, Any], predictions: list[str]) -> dict[str, float]:
    """What the one answer earns."""
    sample = _samples(document["task"])[document["index"]]
    return {"accuracy": sample.mark(predictions[0])["correct"]}
