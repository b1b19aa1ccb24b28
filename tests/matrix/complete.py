# SPDX-License-Identifier: Apache-2.0
"""Every way of running every cell, against the slow reference: ``make test-matrix``."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from depth import CELLS, deep, expected


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_equals_the_slow_reference(cell):
    assert deep(*cell) == expected(*cell)
