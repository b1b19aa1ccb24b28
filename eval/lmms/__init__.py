# SPDX-License-Identifier: Apache-2.0
"""Both ways into lmms-eval: our models and tasks for its command line, its tasks for our runner.

``lmms-eval --model vlmcompress --model_args pretrained=…,method=flowcut,keep=64 --tasks …`` finds the model through the
entry-point group ``lmms_eval.models``; ``--include_path`` with the folder that ``vlmcompress tasks --folder`` prints adds
the tasks of this package.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: what ``lmms-eval --include_path`` takes to offer this package's tasks
TASKS = Path(__file__).parent.parent / "tasks" / "lmms"


def manifest() -> Any:
    """What the entry point hands to lmms-eval: the model's name and its two classes, chat and ``--force_simple``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="vlmcompress",
        chat_class_path="vlmcompress.eval.lmms.model.CompressedModel",
        simple_class_path="vlmcompress.eval.lmms.model.SimpleCompressedModel",
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing of lmms-eval's log is shown meanwhile; afterwards every setting of it (loguru) is what it was.

    Indexing its tasks tells of each of its files that is no task, for debugging.
    """
    from loguru import logger

    # loguru can switch a package's log off and on, but not tell how it was
    core = logger._core  # type: ignore[attr-defined]
    with core.lock:
        before = core.activation_list, core.enabled
    logger.disable("lmms_eval")
    try:
        yield
    finally:
        with core.lock:
            core.activation_list, core.enabled = before
