# SPDX-License-Identifier: Apache-2.0
"""Every method chooses on tiny random models what it chose while it agreed with the reference vectors."""

import json
import sys
from pathlib import Path

import pytest

import vlmcompress

sys.path.insert(0, str(Path(__file__).parent))
from own import RECORD, RECORDED, replay

CASES = json.loads(RECORD.read_text())


def test_every_method_has_a_vector():
    assert {case["method"] for case in CASES} == {
        method for method in vlmcompress.methods() if any(vlmcompress.support(method, family)[0] for family in RECORDED)
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['method']}-{case['family']}")
def test_a_method_chooses_what_it_chose(case):
    asked = {name: case[name] for name in ("method", "family", "options")}
    assert asked | replay(**asked) == case
