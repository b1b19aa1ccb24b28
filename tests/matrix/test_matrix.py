# SPDX-License-Identifier: Apache-2.0
"""Every method on every family does what ``vlmcompress.support`` and ``docs/support.md`` say of it.

A method or family that is registered and has no cell fails the first test. Every way of running a cell (prompts, both
attention kernels, greedy, beams, a second turn) is held against the slow reference; every pair of two ways here, all of
them in ``complete.py`` (``make test-matrix``). More of each family is in its own file under ``tests/unit``.
"""

import sys
from pathlib import Path

import pytest

import vlmcompress
from vlmcompress.catalog import families, recorded
from vlmcompress.commands.support import markdown

sys.path.insert(0, str(Path(__file__).parent))
from cells import FAMILIES, OPTIONS, outcome
from depth import CELLS, deep, expected
from pairs import covering, pairs
from stories import STORIES

FEW = covering(CELLS, whole=2)

DOCUMENT = Path(__file__).parents[2] / "docs" / "support.md"


def test_nothing_is_missing():
    assert set(OPTIONS) == set(vlmcompress.methods())
    assert {name.removesuffix(" video") for name in FAMILIES} == set(families())
    assert set(STORIES) == set(families())


def test_the_document_is_the_matrix():
    assert DOCUMENT.read_text() == markdown()


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cell(family, method):
    why = outcome(method, family)
    assert recorded()[method][family] == why
    if " " not in family:
        assert vlmcompress.support(method, family) == (not why, why)


def test_every_pair_is_covered():
    met = {pair for cell in FEW for pair in pairs(cell)}
    assert met == {pair for cell in CELLS for pair in pairs(cell)}
    assert len(FEW) < len(CELLS) / 10


@pytest.mark.parametrize("cell", FEW, ids="-".join)
def test_equals_the_slow_reference(cell):
    assert deep(*cell) == expected(*cell)
