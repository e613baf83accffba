# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses over a process group: the loss and the gradients of one process, half the bytes."""

from __future__ import annotations

import functools
import os
import signal
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from group_programs import run_group
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


OPS = ("clip_loss", "siglip_loss", "multi_positive_loss")
CASES = [
    *(Case(op, rows) for rows in SHARDS for op in OPS),
    *(Case(op, (4, 0, 9), "float64", "reference") for op in OPS),
    *(Case(op, (7, 20), "bfloat16") for op in OPS),
    *(Case("clip_loss", (7, 2), backend=backend, smoothing=0.2) for backend in ("cpu", "reference")),
    *(Case(op, (13,)) for op in OPS),
    *(Case(op, (300, 517)) for op in OPS),  # many tiles
]


def _answers_of_a_rank(rank: int, size: int, cases: list[Case]) -> list[list[np.ndarray]]:
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


@functools.cache
def answers(size: int) -> dict[Case, list[list[np.ndarray]]]:
    """What every rank says of every case of this many ranks: starting processes is what takes time."""
    cases = [case for case in CASES if len(case.rows) == size]
    ranks = run_group(size, _answers_of_a_rank, cases)
    return {case: [rank[i] for rank in ranks] for i, case in enumerate(cases)}


# Some twenty roundings of float32 (of bfloat16: to nearest, 2^-9) separate the two orders of summation.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float64": 1e-12}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_loss_of_one_process(case: Case) -> None:
    size, tolerance = len(case.rows), TOLERANCE[case.dtype]
    ranks = answers(size)[case]
    wide = {name: x.double() if x.is_floating_point() else x for name, x in case.problem().items()}
    expected = loss_and_gradients(case.op, wide, backend="reference", **case.options())
    for rank in ranks:
        np.testing.assert_allclose(rank[0], expected[0], rtol=tolerance, atol=tolerance)
    assert len({rank[0].tobytes() for rank in ranks}) == 1, "the ranks return different bits"
    for at in (1, 2):  # features: the sum of the ranks' losses is `size` times the one loss
        together = np.concatenate([rank[at] for rank in ranks]) / size
        scale = np.abs(expected[at]).max() if expected[at].size else 1.0
        np.testing.assert_allclose(together, expected[at], rtol=0, atol=tolerance * scale)
    for at in range(3, len(expected)):  # scale and bias: the global gradient on every rank
        for rank in ranks:
            np.testing.assert_allclose(rank[at], expected[at], rtol=10 * tolerance, atol=tolerance)


# Training: three optimiser steps under DDP and FSDP end where one process ends.


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


def _train_each(rank: int, size: int, wrappers: tuple[str, ...]) -> dict[str, list[np.ndarray]]:
    return {wrapper: _train(rank, size, wrapper) for wrapper in wrappers}


def _train(rank: int, size: int, wrapper: str) -> list[np.ndarray]:
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


def test_parameters_after_three_steps_are_those_of_one_process() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the ranks
    alone = _train(0, 1, "none")
    torch.set_num_threads(threads)
    for rank in run_group(2, _train_each, ("ddp", "fsdp")):
        for wrapper, parameters in rank.items():
            for mine, expected in zip(parameters, alone, strict=True):
                # AdamW divides by the gradient's size: where a gradient is near 0 its rounding shows in the step.
                np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-4, err_msg=wrapper)


# Bytes


def _sent_bytes(rank: int, size: int, rows: int, width: int) -> int:
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


def test_half_of_the_bytes_that_gathering_both_sides_sends() -> None:
    rows, size = 400, 3
    gathered = 2 * 2 * (size - 1) * rows * WIDTH * 4  # both sides, there and back, to every other rank
    for sent in run_group(size, _sent_bytes, rows, WIDTH):
        numbers = sent - gathered / 2
        # statistics and log-sum-exps of a column (6 numbers to everybody) and a few counts
        assert 0 <= numbers <= (6 * rows * 4 + 256) * size


# Trouble


def _die(rank: int, size: int) -> str:
    group = dist.group.WORLD
    vk.clip_loss(features(4, rank), features(4, rank), 1.0, group=group)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        vk.clip_loss(features(4, rank), features(4, rank), 1.0, group=group)
    except RuntimeError as error:
        return str(error)
    return "no error"


def _survivor(rank: int, size: int, path: str) -> None:
    answer = _die(rank, size)
    with open(path, "w") as file:
        file.write(answer)


def test_a_rank_that_dies_raises_in_the_others(tmp_path) -> None:
    import torch.multiprocessing as mp
    from group_programs import _enter, free_port

    context = mp.get_context("spawn")
    path, port, results = tmp_path / "answer", free_port(), context.Queue()
    processes = [
        context.Process(target=_enter, args=(rank, 2, port, _survivor, (str(path),), results))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert processes[1].exitcode == -signal.SIGKILL
    assert not processes[0].is_alive(), "the survivor hangs"
    assert path.read_text() not in ("", "no error")


def _edges(rank: int, size: int) -> tuple[str, bool]:
    x, nothing = torch.randn(3, 4 + rank), torch.empty(0, 8)
    with pytest.raises(ValueError, match="same width D") as caught:
        vk.clip_loss(x, x, 1.0, group=dist.group.WORLD)
    return str(caught.value), vk.clip_loss(nothing, nothing, 1.0, group=dist.group.WORLD).isnan().item()


def test_ranks_with_different_widths_are_told_so_and_no_rows_at_all_give_nan() -> None:
    message = "vk.clip_loss: all ranks of the group must have the same width D, got [4, 5]"
    assert run_group(2, _edges) == [(message, True)] * 2


def test_what_is_no_group_is_a_type_error() -> None:
    x = torch.eye(3)
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed process group, got str"):
        vk.clip_loss(x, x, 1.0, group="gloo")
