# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses over a process group: the loss and the gradients of one process, half the bytes."""

from __future__ import annotations

import functools
import signal

import numpy as np
import pytest
import torch
import torch.distributed as dist
from contrastive_ranks import (
    SHARDS,
    WIDTH,
    Case,
    answers_of_a_rank,
    edges,
    loss_and_gradients,
    sent_bytes,
    survivor,
    train,
    train_each,
)
from group_programs import run_group, start_ranks

import vlmkernels as vk

OPS = ("clip_loss", "siglip_loss", "multi_positive_loss")
CASES = [
    *(Case(op, rows) for rows in SHARDS for op in OPS),
    *(Case(op, (4, 0, 9), "float64", "reference") for op in OPS),
    *(Case(op, (7, 20), "bfloat16") for op in OPS),
    *(Case("clip_loss", (7, 2), backend=backend, smoothing=0.2) for backend in ("cpu", "reference")),
    Case("clip_loss", (7, 2), "float64", "reference", smoothing=0.2),
    *(Case(op, (13,)) for op in OPS),
    *(Case(op, (300, 517)) for op in OPS),  # many tiles
]


@functools.cache
def answers(size: int) -> dict[Case, list[list[np.ndarray]]]:
    """What every rank says of every case of this many ranks: starting processes is what takes time."""
    cases = [case for case in CASES if len(case.rows) == size]
    ranks = run_group(size, answers_of_a_rank, cases)
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


def test_parameters_after_three_steps_are_those_of_one_process() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the ranks
    alone = train(0, 1, "none")
    torch.set_num_threads(threads)
    for rank in run_group(2, train_each, ("ddp", "fsdp")):
        for wrapper, parameters in rank.items():
            for mine, expected in zip(parameters, alone, strict=True):
                # AdamW divides by the gradient's size: where a gradient is near 0 its rounding shows in the step.
                np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-4, err_msg=wrapper)


# Bytes


def test_half_of_the_bytes_that_gathering_both_sides_sends() -> None:
    rows, size = 400, 3
    gathered = 2 * 2 * (size - 1) * rows * WIDTH * 4  # both sides, there and back, to every other rank
    for sent in run_group(size, sent_bytes, rows, WIDTH):
        numbers = sent - gathered / 2
        # statistics and log-sum-exps of a column (6 numbers to everybody) and a few counts
        assert 0 <= numbers <= (6 * rows * 4 + 256) * size


# Trouble


def test_a_rank_that_dies_raises_in_the_others(tmp_path) -> None:
    path = tmp_path / "answer"
    processes, _ = start_ranks(2, survivor, str(path))
    for process in processes:
        process.join(timeout=60)
    assert processes[1].exitcode == -signal.SIGKILL
    assert not processes[0].is_alive(), "the survivor hangs"
    assert path.read_text() not in ("", "no error")


def test_ranks_with_different_widths_are_told_so_and_no_rows_at_all_give_nan() -> None:
    message = "vk.clip_loss: all ranks of the group must have the same width D, got [4, 5]"
    assert run_group(2, edges) == [(message, True)] * 2


def test_what_is_no_group_is_a_type_error() -> None:
    x = torch.eye(3)
    with pytest.raises(TypeError, match=r"group must be a torch\.distributed process group, got str"):
        vk.clip_loss(x, x, 1.0, group="gloo")


@pytest.mark.parametrize("op", OPS)
def test_second_derivatives_are_refused_by_name(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        q = torch.nn.functional.normalize(torch.randn(5, WIDTH), dim=-1).requires_grad_()
        labels = (
            [torch.arange(5)] * 2 if op == "multi_positive_loss" else [-2.0] if op == "siglip_loss" else []
        )
        loss = getattr(vk, op)(q, q.detach(), 5.0, *labels, group=dist.group.WORLD)
        (first,) = torch.autograd.grad(loss, q, retain_graph=True)
        (again,) = torch.autograd.grad(loss, q, create_graph=True)
        assert torch.equal(first, again)
        with pytest.raises(NotImplementedError, match=rf"vk\.{op}: second derivatives"):
            again.square().sum().backward()
    finally:
        dist.destroy_process_group()
