# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress methods``."""

from __future__ import annotations

import dataclasses

from rich import box
from rich.console import Console
from rich.table import Table


def list_methods() -> None:
    """Print every registered method with its stages, options and the families it serves."""
    from ..catalog import families, methods, support

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("method", "acts at", "options", "families", "what it does"):
        table.add_column(column, no_wrap=column == "method")
    for name, cls in methods().items():
        options = [f.name if _required(f) else f"{f.name}={f.default}" for f in dataclasses.fields(cls) if f.init]
        served = [family for family in families() if support(name, family)[0]]
        stages = [stage.name for stage in sorted(cls.stages, key=lambda s: list(type(s)).index(s))]
        table.add_row(name, ", ".join(stages) or "–", ", ".join(options) or "–", ", ".join(served), cls.summary)
    Console().print(table)


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
