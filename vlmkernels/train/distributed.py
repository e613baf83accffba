# SPDX-License-Identifier: Apache-2.0
"""Several processes: what torchrun's environment says, and the process group that the loss gets."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """This process among the others.

    Attributes:
        rank: from 0 to ``world_size - 1``.
        world_size: how many there are.
        device: where this process computes.
        started: whether there is a process group, which may be of one.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    started: bool = False

    @property
    def group(self) -> dist.ProcessGroup | None:
        """What the loss gets; None where this process is alone. Not kept here, see `join`."""
        return dist.group.WORLD if self.started else None

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def from_all(self, value: Any) -> list[Any]:
        """What every process has, in the order of the ranks; all of them ask at the same point."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any of the processes, which all ask at the same point."""
        if self.group is None:
            return flag
        flags = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        return bool(flags.item())


def under_torchrun() -> bool:
    """Whether torchrun, or something that sets the same variables, started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


@contextmanager
def join(device: str = "cpu") -> Iterator[Processes]:
    """Joins the other processes if there are any, and leaves them at the end.

    Nothing may refer to the group any more when the block ends: gloo's threads end with it, and one that still lets go
    of a tensor while the interpreter shuts down aborts the process.

    Args:
        device: "cpu" (gloo) or "cuda" (nccl, one GPU for each process of a machine).

    Yields:
        Where this process stands.

    Raises:
        ValueError: the device is unknown, or "cuda" where there is none.
    """
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"train: device must be cpu or cuda, got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("train: device is cuda, but torch finds no GPU here")
    if not under_torchrun():
        yield Processes(device=torch.device(device))
        return
    target = (
        torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device("cpu")
    )
    if kind == "cuda":
        torch.cuda.set_device(target)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), target, started=True)
    finally:
        gc.collect()  # models and losses are full of cycles
        dist.destroy_process_group()
