# SPDX-License-Identifier: Apache-2.0
"""What the tests of the evaluation leave behind for others: nothing."""

import pytest
from PIL import ImageFile


@pytest.fixture(autouse=True)
def _truncated_pictures(monkeypatch):
    """Importing lmms-eval tells PIL to accept truncated pictures; the other tests of this process want PIL as it was."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", ImageFile.LOAD_TRUNCATED_IMAGES)
