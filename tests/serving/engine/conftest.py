# SPDX-License-Identifier: Apache-2.0
"""Real engines on the CPU, in this process; ``make test-serving`` runs this folder in an environment that has vLLM."""

from __future__ import annotations

import gc
import os

# before vLLM is imported anywhere
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    TORCHDYNAMO_DISABLE="1",
)

from pathlib import Path

import pytest
import torch
from serving.engine.widened import widen
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmcompress

ASSETS = Path(vlmcompress.__file__).parents[1] / "assets"
TINY = ASSETS / "models" / "tiny-llava"


@pytest.fixture(scope="session")
def wide(tmp_path_factory) -> Path:
    """tiny-llava under the tensor names of the hub."""
    return widen(TINY, tmp_path_factory.mktemp("models") / "wide")


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model():
    """tiny-llava in transformers."""
    return AutoModelForImageTextToText.from_pretrained(TINY).eval()


@pytest.fixture(scope="module")
def start():
    """Start an engine on a model folder; those of one module stay until it ends."""
    from vllm import LLM

    engines = []

    def make(folder: Path, entry: dict | None = None, **options) -> LLM:
        overrides = {} if entry is None else {"hf_overrides": {"vlmcompress": entry}}
        settings = dict(
            dtype="float32", enforce_eager=True, max_model_len=1024, kv_cache_memory_bytes=2**26, max_num_seqs=16,
            limit_mm_per_prompt={"image": 4}, seed=0,
        )  # fmt: skip
        engines.append(LLM(str(folder), **{**settings, **overrides, **options}))
        return engines[-1]

    yield make
    engines.clear()
    gc.collect()


@pytest.fixture(autouse=True)
def _threads():
    torch.set_num_threads(1)
