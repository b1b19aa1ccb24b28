# SPDX-License-Identifier: Apache-2.0
"""The processes that share one evaluation, when ``accelerate launch`` started several; else this one alone.

Every process loads the model and answers its share of the batches; the first one alone reads and writes the store, so
nodes need no common disk.
"""

from __future__ import annotations

import os
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


#: what other launchers leave in the environment of each process: how many there are. Slurm's is set by srun alone, not in
#: a job's script, whose processes accelerate may start
FOREIGN = {
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
    "MV2_COMM_WORLD_SIZE": "mpirun",
    "SLURM_STEP_NUM_TASKS": "srun",
    "WORLD_SIZE": "a launcher",
}


def refuse_foreign_launch() -> None:
    """Raise ``ValueError`` where another launcher than accelerate started several of this process.

    They would not know of each other, answer everything each, and write into one folder at a time.
    """
    if torch.distributed.is_torchelastic_launched():
        return
    for name, launcher in FOREIGN.items():
        count = os.environ.get(name, "")
        if count.isdecimal() and int(count) > 1:
            raise ValueError(
                f"{launcher} started {count} of this process ({name}={count}), which would all do the same work and write "
                "the same files; start several with accelerate launch (docs/evaluation.md)."
            )


def workers(device: str) -> Workers:
    """The processes of this run; with ``device`` "cuda" each takes a GPU of its own."""
    refuse_foreign_launch()
    if not torch.distributed.is_torchelastic_launched():
        return Workers(device=device)
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    return Workers(state.process_index, state.num_processes, str(state.device))
