# SPDX-License-Identifier: Apache-2.0
"""The processes that share one evaluation, when ``accelerate launch`` started several; else this one alone.

Every process loads the model and answers its share of the batches; the first one alone reads and writes the store, so
nodes need no common disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """``size`` processes, of which this is number ``rank``; it computes on ``device``."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def main(self) -> bool:
        """Whether this is the process that keeps the results and talks."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank, on every process."""
        if self.size == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def share(self, value: Any) -> Any:
        """The first process's value, on every process."""
        if self.size == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]


def workers(device: str) -> Workers:
    """The processes of this run; with ``device`` "cuda" each takes a GPU of its own."""
    if not torch.distributed.is_torchelastic_launched():
        return Workers(device=device)
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    return Workers(state.process_index, state.num_processes, str(state.device))
