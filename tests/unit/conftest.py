# SPDX-License-Identifier: Apache-2.0
"""What several files here start from; others have a model of their own."""

from __future__ import annotations

import pytest
from models import prompts, tiny_llava


@pytest.fixture
def model():
    """A LLaVA of 36 visual tokens that generates without an end."""
    return tiny_llava(eos_token_id=None)


@pytest.fixture
def inputs():
    """Two prompts with a picture each."""
    return prompts([[5, "image", 7], [2, "image", 3]], 36)
