# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress demo``."""

from __future__ import annotations

from pathlib import Path


def demo(model: str | None, port: int | None, device: str, share: bool, results: Path | None) -> None:
    """Check everything cheap first, then serve until interrupted."""
    from ..demo.models import DEFAULT, RESULTS

    if model is None and not DEFAULT.is_dir():
        raise ValueError("This installation ships no model; name a folder or a hub id: vlmcompress demo MODEL")
    if results is not None and not results.is_dir():
        raise ValueError(f"There is no folder '{results}'.")
    from transformers.utils import logging

    from ..demo.app import serve

    logging.enable_progress_bar()  # the page shows how far a model is loaded
    serve(model or str(DEFAULT), port=port, device=device, share=share, results=results or RESULTS)
