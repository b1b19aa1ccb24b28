# SPDX-License-Identifier: Apache-2.0
"""``vlmcompress tasks``: what accuracy can be measured on."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def list_tasks(folder: bool) -> None:
    """Print the tasks of this package with what they are, or only the folder that lmms-eval is pointed to."""
    from ..eval.lmms import TASKS
    from ..eval.tasks.base import REGISTRY

    if folder:
        print(TASKS)
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("task", style="bold")
    table.add_column("what it is")
    for name, reader in sorted(REGISTRY.items()):
        table.add_row(name, (reader.__doc__ or "").strip().splitlines()[0])
    console = Console()
    console.print(table)
    console.print("Further: the tasks of lmms-eval by their names (pope, gqa, mme, …), or the YAML file of one.")
