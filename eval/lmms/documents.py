# SPDX-License-Identifier: Apache-2.0
"""Tasks of lmms-eval for ``vlmcompress eval``: its prompt, its data, its metric; our rows, our store, our intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from lmms_eval.api.task import ConfigurableMessagesTask
from lmms_eval.protocol import ChatMessages
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import handle_non_serializable, load_yaml_config
from PIL import Image

from ..loading import first_sentence
from ..tasks.base import Sample, digest
from . import quiet
from .model import settings_of

MODEL = "vlmcompress"  # lmms-eval lets a task's prompt depend on the model's name


@dataclass(frozen=True)
class Document(Sample):
    """One document of a task of lmms-eval; its pictures are read when it is asked, not before."""

    task: ConfigurableMessagesTask = None
    index: int = 0

    @property
    def max_new_tokens(self) -> int:
        return settings_of(self.task.config.generation_kwargs)["max_new_tokens"]

    @property
    def until(self) -> tuple[str, ...]:
        return tuple(settings_of(self.task.config.generation_kwargs)["until"])

    def chat(self) -> list[dict[str, Any]]:
        document = self.task.eval_docs[self.index]
        return ChatMessages(messages=self.task.doc_to_messages(document)).to_hf_messages()

    def mark(self, prediction: str) -> dict[str, Any]:
        """``correct``: the first of the task's metrics that scores this question; ``metrics``: all of them."""
        metrics = self.task.process_results(self._text(), [self._filtered(prediction)])
        scores = [value.get("score") if isinstance(value, dict) else value for value in metrics.values()]
        found = [float(s) for s in scores if isinstance(s, (bool, int, float, np.number)) and 0 <= s <= 1]
        if not found:
            raise ValueError(
                f"'{self.task.config.task}' gives single questions no score from 0 to 1 (its metrics: "
                f"{', '.join(metrics)}); run it with lmms-eval --model vlmcompress."
            )
        return {"correct": found[0], "metrics": json.loads(json.dumps(metrics, default=handle_non_serializable))}

    def aggregate(self, answers: Sequence[dict[str, Any]]) -> dict[str, float]:
        """The task's own metrics over the answers to all its questions, as lmms-eval reports them."""
        found = {}
        for name, total in self.task.aggregation().items():
            values = [a["metrics"][name] for a in answers if name in a["metrics"]]
            if values:
                found[name] = float(total(values))
        return found

    @cached_property
    def picture(self) -> str:
        parts = [part for message in self.chat() for part in message["content"]]
        shown = [part[part["type"]] for part in parts if part["type"] in ("image", "video")]
        if not shown or isinstance(shown[0], (str, dict)):
            return f"{self.task.config.task}-{shown[0] if shown else self.index}"
        return digest(shown[0] if isinstance(shown[0], Image.Image) else tuple(shown[0]))

    def _text(self) -> dict[str, Any]:
        return self.task.eval_docs_no_media[self.index]

    def _filtered(self, prediction: str) -> Any:
        about = {
            "task": self.task.config.task,
            "doc_id": self.index,
            "repeats": 1,
            "split": self.task.config.test_split,
        }
        request = self.task.construct_requests(self.index, "", metadata=about)
        request.resps = [prediction]
        ensemble = self.task._filters[0]
        ensemble.apply([request], [self._text()])
        return request.filtered_resps[ensemble.name]


def load(name: str) -> list[Document]:
    """The documents of a task of lmms-eval, or of the task in a YAML file.

    Raises ``ValueError`` in one sentence for a name that there is not, a group of tasks, data out of reach, and a task
    that single questions get no score of.
    """
    try:
        task = _file(Path(name)) if name.endswith((".yaml", ".yml")) else _named(name)
    except ValueError:
        raise
    # whatever its data set's libraries make of a missing network or file: a retry error carries the last failure
    except Exception as error:
        attempt = getattr(error, "last_attempt", None)
        cause = attempt.exception() if attempt is not None else error
        raise ValueError(f"The data of the task '{name}' could not be loaded: {first_sentence(cause)}") from error
    if task.OUTPUT_TYPE != "generate_until":
        raise ValueError(
            f"'{name}' is no task of one question and one answer ({task.OUTPUT_TYPE}); run it with lmms-eval."
        )
    documents = []
    for index, row in enumerate(task.eval_docs_no_media):
        kind = row.get("category") or row.get("question_type") or name
        question, answer = task.doc_to_text(row), task.doc_to_target(row)
        documents.append(Document(str(index), (), str(question), str(answer), str(kind), task, index))
    if not documents:
        raise ValueError(f"The task '{name}' holds no questions.")
    documents[0].mark("")
    return documents


def _file(path: Path) -> ConfigurableMessagesTask:
    if not path.is_file():
        raise ValueError(f"There is no task file '{path}'.")
    return ConfigurableMessagesTask(config=load_yaml_config(str(path)), model_name=MODEL)


@lru_cache(maxsize=1)
def task_manager() -> TaskManager:
    """What knows all of lmms-eval's tasks; it reads more than a thousand YAML files for this."""
    with quiet():
        return TaskManager(verbosity="ERROR", model_name=MODEL)


def _named(name: str) -> ConfigurableMessagesTask:
    from ..tasks.base import tasks

    manager = task_manager()
    if name not in manager.all_tasks:
        raise ValueError(f"There is no task '{name}'; the tasks are {', '.join(tasks())} and those of lmms-eval.")
    if name not in manager.all_subtasks:
        raise ValueError(f"'{name}' is a group of tasks of lmms-eval; name its tasks one by one.")
    return manager.load_task_or_group([name], "chat")[name]
