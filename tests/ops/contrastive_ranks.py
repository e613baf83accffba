# SPDX-License-Identifier: Apache-2.0
"""What each rank of the tests of contrastive losses over a group runs, and the problems it runs on. Not tests.

A module of its own, because a spawned process imports what it runs by name: test modules have none there.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import vlmkernels as vk

WIDTH = 24
# Rows of each rank: equal, unequal, a rank without any, one row in all.
SHARDS = [(5, 5), (7, 2), (0, 6), (4, 0, 9), (1, 0, 0), (3, 50, 8, 11)]


def features(rows: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64), dim=-1).to(dtype)


def problem(op: str, rows: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of the concatenated batch, in the order of the op's arguments."""
    n, scalars = sum(rows), torch.float64 if dtype == torch.float64 else torch.float32
    m = 2 * n if op == "multi_positive_loss" else n
    arguments = {
        "q": features(n, 1, dtype),
        "k": features(m, 2, dtype),
        "scale": torch.tensor(7.0, dtype=scalars),
    }
    if op == "siglip_loss":
        arguments["bias"] = torch.tensor(-3.0, dtype=scalars)
    if op == "multi_positive_loss":
        generator = torch.Generator().manual_seed(3)
        arguments["row_labels"] = torch.randint(0, 9, (n,), generator=generator)
        arguments["col_labels"] = torch.randint(3, 12, (m,), generator=generator)
    return arguments


def shard(arguments: dict[str, Tensor], rows: tuple[int, ...], rank: int) -> dict[str, Tensor]:
    """A rank's part: of texts of `multi_positive_loss` twice as many rows, unevenly against the images."""
    ends = np.cumsum((0, *rows))
    part = {}
    for name, x in arguments.items():
        if x.ndim == 0:
            part[name] = x
            continue
        factor = len(x) // max(ends[-1], 1) if name in ("k", "col_labels") else 1
        part[name] = x[factor * ends[rank] : factor * ends[rank + 1]]
    return part


def loss_and_gradients(op: str, arguments: dict[str, Tensor], **options: Any) -> list[np.ndarray]:
    leaves = {name: x.detach().clone().requires_grad_(x.is_floating_point()) for name, x in arguments.items()}
    loss = getattr(vk, op)(*leaves.values(), **options)
    loss.backward()
    grads = [x.grad for x in leaves.values() if x.is_floating_point()]
    return [x.detach().double().numpy() for x in (loss, *grads)]


@dataclass(frozen=True)
class Case:
    op: str
    rows: tuple[int, ...]
    dtype: str = "float32"
    backend: str = "cpu"
    smoothing: float = 0.0

    def options(self) -> dict[str, Any]:
        return {"label_smoothing": self.smoothing} if self.smoothing else {}

    def problem(self) -> dict[str, Tensor]:
        return problem(self.op, self.rows, getattr(torch, self.dtype))


def answers_of_a_rank(rank: int, size: int, cases: list[Case]) -> list[list[np.ndarray]]:
    return [
        loss_and_gradients(
            case.op,
            shard(case.problem(), case.rows, rank),
            group=dist.group.WORLD,
            backend=case.backend,
            **case.options(),
        )
        for case in cases
    ]


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.image, self.text = nn.Linear(10, WIDTH), nn.Linear(12, WIDTH)
        self.scale = nn.Parameter(torch.tensor([2.0]))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            F.normalize(self.image(images), dim=-1),
            F.normalize(self.text(texts), dim=-1),
            self.scale.exp(),
        )


def train_each(rank: int, size: int, wrappers: tuple[str, ...]) -> dict[str, list[np.ndarray]]:
    return {wrapper: train(rank, size, wrapper) for wrapper in wrappers}


def train(rank: int, size: int, wrapper: str) -> list[np.ndarray]:
    generator = torch.Generator().manual_seed(9)
    images, texts = torch.randn(12, 10, generator=generator), torch.randn(12, 12, generator=generator)
    rows = slice(rank * 12 // size, (rank + 1) * 12 // size)
    towers = Towers()
    model: Any = towers
    if wrapper == "ddp":
        model = nn.parallel.DistributedDataParallel(towers)
    elif wrapper == "fsdp":
        from torch.distributed.fsdp import fully_shard

        model = fully_shard(towers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        u, v, scale = model(images[rows], texts[rows])
        loss = vk.clip_loss(u, v, scale, group=None if wrapper == "none" else dist.group.WORLD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in towers.parameters()]
    return [p.detach().numpy().copy() for p in full]


def sent_bytes(rank: int, size: int, rows: int, width: int) -> int:
    """Bytes that this rank gives to the group in forward and backward, counted where they are handed over."""
    sent = 0

    def count(name: str, measure: Any) -> None:
        function = getattr(dist, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal sent
            sent += measure(*args)
            return function(*args, **kwargs)

        setattr(dist, name, counted)

    def of_operations(operations: list[Any]) -> int:
        return sum(o.tensor.nbytes for o in operations if o.op is dist.isend)

    others = size - 1
    count("batch_isend_irecv", of_operations)
    count("all_gather", lambda parts, x: others * x.nbytes)
    count("all_to_all_single", lambda received, x, *splits: x.nbytes)
    u, v = (features(rows, seed)[:, :width].requires_grad_() for seed in (rank, 10 + rank))
    vk.clip_loss(u, v, torch.tensor(5.0, requires_grad=True), group=dist.group.WORLD).backward()
    return sent


def die(rank: int, size: int) -> str:
    group = dist.group.WORLD
    vk.clip_loss(features(4, rank), features(4, rank), 1.0, group=group)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        vk.clip_loss(features(4, rank), features(4, rank), 1.0, group=group)
    except RuntimeError as error:
        return str(error)
    return "no error"


def survivor(rank: int, size: int, path: str) -> None:
    answer = die(rank, size)
    with open(path, "w") as file:
        file.write(answer)


def edges(rank: int, size: int) -> tuple[str, bool]:
    x, nothing = torch.randn(3, 4 + rank), torch.empty(0, 8)
    with pytest.raises(ValueError, match="same width D") as caught:
        vk.clip_loss(x, x, 1.0, group=dist.group.WORLD)
    return str(caught.value), vk.clip_loss(nothing, nothing, 1.0, group=dist.group.WORLD).isnan().item()
