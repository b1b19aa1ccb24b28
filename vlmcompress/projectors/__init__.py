# SPDX-License-Identifier: Apache-2.0
"""Trained projectors that turn a tower's features into fewer visual tokens."""

from __future__ import annotations

from typing import Any

#: entry of a model's configuration → what ``from_pretrained`` to use for it
TRAINED = {"tokenflex": "vlmcompress.flex.from_pretrained", "quecc": "vlmcompress.quecc.from_pretrained"}


def check_loaded(model: Any) -> None:
    """Raise ``ValueError`` when the configuration speaks of a projector of ours that the model does not have.

    The stock classes load such a checkpoint without an exception and draw a random projector of their own instead.
    """
    projector = getattr(getattr(model, "model", None), "multi_modal_projector", None)
    config = getattr(model, "config", None)
    for entry, loader in TRAINED.items():
        if getattr(config, entry, None) and getattr(projector, "config_entry", None) != entry:
            raise ValueError(
                f"This checkpoint has a '{entry}' projector, but the model was loaded with a stock class, which put a random "
                f"{type(projector).__name__} in its place; load it with {loader}."
            )
