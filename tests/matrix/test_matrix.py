# SPDX-License-Identifier: Apache-2.0
"""Every method on every family does what ``vlmcompress.support`` and ``docs/support.md`` say of it.

A method or family that is registered and has no cell fails the first test. The depth of each family (slow references,
beams, second turns, both attention kernels) is in its own file under ``tests/unit``.
"""

import sys
from pathlib import Path

import pytest

import vlmcompress
from vlmcompress.catalog import families, recorded
from vlmcompress.commands.support import markdown

sys.path.insert(0, str(Path(__file__).parent))
from cells import FAMILIES, OPTIONS, outcome

DOCUMENT = Path(__file__).parents[2] / "docs" / "support.md"


def test_nothing_is_missing():
    assert set(OPTIONS) == set(vlmcompress.methods())
    assert {name.removesuffix(" video") for name in FAMILIES} == set(families())


def test_the_document_is_the_matrix():
    assert DOCUMENT.read_text() == markdown()


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cell(family, method):
    why = outcome(method, family)
    assert recorded()[method][family] == why
    if " " not in family:
        assert vlmcompress.support(method, family) == (not why, why)
