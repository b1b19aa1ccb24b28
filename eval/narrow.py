# SPDX-License-Identifier: Apache-2.0
"""Narrow twins: a model's own depth, geometry and method on a fraction of its width, cheap enough to run anywhere.

How many tokens a method leaves where depends on depth and geometry, so the twin's ledger holds for the model. What the
method itself costs is a polynomial of degree two in the width (:func:`compressor_flops`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

#: widths of the twins in units of the narrowest: three points determine a polynomial of degree two
STEPS = (1, 2, 3)
_VOCABULARY = 64


def factor(config: Any) -> int:
    """How many times wider the model is than its narrowest twin; 1 where the widths cannot be divided."""
    text, vision = config.get_text_config(), config.vision_config
    keys = _kv_heads(text) * _head_dim(text)
    sections = [s * _kv_heads(text) for s in _sections(text)]
    whole = math.gcd(text.hidden_size, keys // 2, _width(vision) // 4, *sections)
    return max(f for f in range(1, 129) if whole % f == 0)


def narrow(config: Any, step: int) -> Any:
    """Configuration of the twin ``step`` times as wide as the narrowest. Its weights are random and its answers nonsense.

    One key head (with the model's queries per key), one vision head, a small feed-forward block, a small vocabulary.
    """
    share = Fraction(step, factor(config))
    config = copy.deepcopy(config)
    text, vision = config.get_text_config(), config.vision_config
    kv_heads, head_dim, width = _kv_heads(text), _head_dim(text), _width(vision)
    if _sections(text):
        text.rope_parameters["mrope_section"] = [int(s * kv_heads * share) for s in _sections(text)]
    text.head_dim = int(kv_heads * head_dim * share)
    text.num_attention_heads, text.num_key_value_heads = text.num_attention_heads // kv_heads, 1
    text.hidden_size, text.intermediate_size = int(text.hidden_size * share), 8
    text.vocab_size = _VOCABULARY
    text.bos_token_id = text.eos_token_id = text.pad_token_id = None
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    for place, name in enumerate(names, 1):
        if getattr(config, name, None) is not None:
            setattr(config, name, _VOCABULARY - place)
    if hasattr(vision, "embed_dim"):  # there `hidden_size` is the width behind the projector
        vision.embed_dim, vision.hidden_size, vision.mlp_ratio = int(width * share), text.hidden_size, 1
    else:
        vision.hidden_size, vision.intermediate_size = int(width * share), 8
    if hasattr(vision, "out_hidden_size"):
        vision.out_hidden_size = text.hidden_size
    setattr(vision, "num_heads" if hasattr(vision, "num_heads") else "num_attention_heads", 1)
    return config


def compressor_flops(measured: Sequence[float], steps: Sequence[int], at: int) -> float:
    """The method's own FLOPs at width ``at``, from what the twins of width ``steps`` measured (Lagrange, exact)."""
    total = Fraction(0)
    for i, value in zip(steps, measured, strict=True):
        others = [j for j in steps if j != i]
        total += Fraction(value) * math.prod((Fraction(at - j, i - j) for j in others), start=Fraction(1))
    return float(total)


def _kv_heads(text: Any) -> int:
    return getattr(text, "num_key_value_heads", None) or text.num_attention_heads


def _head_dim(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _width(vision: Any) -> int:
    return getattr(vision, "embed_dim", None) or vision.hidden_size


def _sections(text: Any) -> list[int]:
    return (getattr(text, "rope_parameters", None) or {}).get("mrope_section", [])
