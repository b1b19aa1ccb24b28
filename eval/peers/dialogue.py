# SPDX-License-Identifier: Apache-2.0
"""Two processes that answer in turn, each in an environment of its own.

A worker reads one JSON line, answers with one, and leaves arrays in the files that the line names. Needs numpy alone, so
that any environment can run it.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def serve(answers: dict[str, Callable[..., Any]]) -> None:
    """Answer lines such as ``{"do": "prefill", "ratio": 0.5}`` until there are no more; prints go to stderr."""
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for line in sys.stdin:
            asked = json.loads(line)
            out.write(json.dumps(answers[asked.pop("do")](**asked)) + "\n")
            out.flush()


class Worker:
    """A script started as a worker; call it with what to do."""

    def __init__(self, python: Path, script: str, *arguments: str):
        if not python.is_file():
            raise SystemExit(
                f"There is no environment at {python.parent.parent}; docs/evaluation.md says how to make it."
            )
        command = [str(python), script, *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, do: str, **asked: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **asked}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"A worker ended while it was asked to {do}; what it said stands above.")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def alternate(cases: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Every case once per round, each round from another case on, after one round of warming up."""
    names, found = list(cases), {name: [] for name in cases}
    for turn in range(rounds + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            value = cases[name]()
            if turn:
                found[name].append(value)
    return found


def summary(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median, least and most milliseconds of each case."""
    return {
        name: {"median": statistics.median(t), "min": min(t), "max": max(t), "runs": len(t)}
        for name, t in times.items()
    }
