# SPDX-License-Identifier: Apache-2.0
"""One file per model family. An adapter says where things are in a model; it never names a method."""

from . import (  # noqa: F401
    gemma3,
    internvl,
    llava,
    llava_next,
    llava_next_video,
    llava_onevision,
    paligemma,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    smolvlm,
)
