# SPDX-License-Identifier: Apache-2.0
"""The folder of one evaluation: what was asked of it, and every answer as it came.

``configuration.json`` says what is measured (model, tasks, questions, generation). ``answers/ROW.jsonl`` holds one line
per question and grows batch by batch, so that an interrupted run goes on where it stopped and its answers stay readable
(``pandas.read_json(path, lines=True)``). ``timings.json`` holds the clocks.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .schema import Answer, check


class Store:
    """Answers of one evaluation under ``folder``; opened for one configuration, refused for another."""

    def __init__(self, folder: str | Path, configuration: dict[str, Any]):
        self.folder = Path(folder)
        self.configuration = configuration
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"The results cannot go to {self.folder}: it is a file, not a folder.")
        (self.folder / "answers").mkdir(parents=True, exist_ok=True)
        path = self.folder / "configuration.json"
        if not path.exists():
            write_json(path, configuration)
            return
        before = read_json(path)
        differing = sorted(k for k in configuration.keys() | before.keys() if configuration.get(k) != before.get(k))
        if differing:
            raise ValueError(
                f"{self.folder} holds results of another configuration (it differs in {', '.join(differing)}); "
                "take another folder or delete this one."
            )

    def _path(self, row: str) -> Path:
        return self.folder / "answers" / f"{row}.jsonl"

    def answers(self, row: str) -> list[dict[str, Any]]:
        """Stored answers of one row. A last line cut off by a crash is dropped, here and on disk."""
        path = self._path(row)
        if not path.exists():
            return []
        lines = path.read_bytes().split(b"\n")
        whole, rest = lines[:-1], lines[-1]
        if rest:
            path.write_bytes(b"".join(line + b"\n" for line in whole))
        try:
            found = [json.loads(line) for line in whole]
        except ValueError as error:
            raise ValueError(f"{path} is damaged in the middle; delete it to have this row run again.") from error
        for number, line in enumerate(found, 1):
            check(Answer, line, f"{path}, line {number},")
        return found

    def append(self, row: str, answers: list[dict[str, Any]]) -> None:
        """Add the answers of one batch; on disk when this returns."""
        path = self._path(row)
        try:
            with path.open("ab") as stream:
                stream.write(b"".join(json.dumps(a).encode() + b"\n" for a in answers))
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:  # a write that fails does not name its file
            raise OSError(error.errno, error.strerror, str(path)) from error


def write_json(path: Path, value: Any) -> None:
    """Write so that a reader sees the old file or the new one, never half of one."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(json.dumps(value, indent=1) + "\n")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_json(path: Path) -> Any:
    """The file's content; ``ValueError`` in one sentence when it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged (no valid JSON).") from error
