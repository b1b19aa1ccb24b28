# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress methods --support``: which method works on which family, as the Markdown page ``docs/support.md``."""

from __future__ import annotations

from ..catalog import recorded

TITLE = """# What works where

✓: works; a number: refused with a sentence, for the reason of that number below. Every cell is what
`tests/matrix/test_matrix.py` found on a tiny model of the stock class: a left-padded batch of two prompts, answered as
each prompt alone. This page is what `vlmcompress methods --support > docs/support.md` prints.
"""


def markdown() -> str:
    """Methods × families, and the reasons of the refusals."""
    cells = recorded()
    families = list(next(iter(cells.values())))
    reasons = list(dict.fromkeys(why for row in cells.values() for why in row.values() if why))
    lines = ["| method | " + " | ".join(families) + " |", "|---" + "|:---:" * len(families) + "|"]
    for method, row in cells.items():
        shown = [str(1 + reasons.index(row[family])) if row[family] else "✓" for family in families]
        lines.append(f"| {method} | " + " | ".join(shown) + " |")
    notes = [f"{number}. {reason[0].upper()}{reason[1:]}." for number, reason in enumerate(reasons, 1)]
    return "\n".join([TITLE, *lines, "", *notes]) + "\n"
