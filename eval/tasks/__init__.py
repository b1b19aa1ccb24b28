# SPDX-License-Identifier: Apache-2.0
"""The tasks that accuracy is measured on: `load` one, `score` an answer."""

from .base import Sample, load, register_task, score, tasks

__all__ = ["Sample", "load", "register_task", "score", "tasks"]
