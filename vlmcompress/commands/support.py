# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress methods --support``: which method works on which family, as the Markdown page ``docs/support.md``."""

from __future__ import annotations

from ..catalog import methods, recorded
from ..method import Stage

TITLE = """# What works where

✓: works; a number: refused with a sentence, for the reason of that number below. Every cell is what
`tests/matrix/test_matrix.py` found on a tiny model of the stock class: a left-padded batch of two prompts is answered as
each prompt alone, and one image, the batch, two images and a video, with fused and plain attention, greedily, with beams
and in a second turn give the logits (within 1e-4) of the same model on the full sequence, dropped tokens hidden by a mask,
without a cache (`make test-matrix` runs all of it). Methods that finish before the language model (marked ○) also work
with static and quantised caches, with a compiled decoding step and with prompt lookup; the others need the default cache.
Linears whose weights torchao or bitsandbytes quantised (8 or 4 bits) serve methods of every stage
(`tests/unit/test_quantised.py`).
This page is what `vlmcompress methods --support > docs/support.md` prints.
"""


def finishes_early(name: str) -> bool:
    """Whether a method of default options leaves the language model and its cache alone."""
    method = methods()[name]
    return not method.stages & {Stage.PREFILL, Stage.CACHE} and not method.reads_first_layer


def markdown() -> str:
    """Methods × families, and the reasons of the refusals."""
    cells = recorded()
    families = list(next(iter(cells.values())))
    reasons = list(dict.fromkeys(why for row in cells.values() for why in row.values() if why))
    lines = ["| method | " + " | ".join(families) + " |", "|---" + "|:---:" * len(families) + "|"]
    for method, row in cells.items():
        shown = [str(1 + reasons.index(row[family])) if row[family] else "✓" for family in families]
        lines.append(f"| {method}{' ○' if finishes_early(method) else ''} | " + " | ".join(shown) + " |")
    notes = [f"{number}. {reason[0].upper()}{reason[1:]}." for number, reason in enumerate(reasons, 1)]
    return "\n".join([TITLE, *lines, "", *notes]) + "\n"
