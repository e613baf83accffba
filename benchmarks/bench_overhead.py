# SPDX-License-Identifier: Apache-2.0
"""What a call costs besides its arithmetic: `vk.clip_loss` on 64 pairs against the plain call into `_cpu`, and eager.

    pytest benchmarks/bench_overhead.py --benchmark-columns=median,iqr,rounds [--save-results]

The plain call reuses prepared pointers and writes into prepared memory; the difference is checks, dispatch,
torch.library, autograd and allocations. One thread, warm cache, many calls per round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import measures
import pytest
import torch
import torch.nn.functional as F
from peers import contrastive as eager
from torch import Tensor

import vlmkernels as vk
from vlmkernels import _native

N, D, SCALE = 64, 32, 10.0
CALLS, ROUNDS = 500, 9
CACHE_LINE = 64


@pytest.fixture(autouse=True)
def one_thread(threads: int):
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def features() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, N, D, generator=generator)
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


def plain_call(image: Tensor, text: Tensor) -> tuple[Callable[[], Any], Tensor]:
    """The kernel behind a forward without gradients, and the scalar that it writes."""
    loss, row_lse, col_lse = torch.empty(()), torch.empty(2, N), torch.empty(2, N)
    scale = torch.tensor(SCALE)

    def matrix(x: Tensor) -> tuple[int, int, int, int, int]:
        return x.data_ptr(), _native.dtype_tag(x.dtype), 0, *x.stride()

    call = _native.cpu.ContrastiveCall(
        q=matrix(image),
        k=matrix(text),
        batch=1,
        n=N,
        m=N,
        d=D,
        columns=True,
        scale=scale.data_ptr(),
        loss=loss.data_ptr(),
        row_lse=row_lse.data_ptr(),
        col_lse=col_lse.data_ptr(),
    )
    workspace = torch.empty(call.workspace(False, 1) + CACHE_LINE, dtype=torch.uint8)
    start = workspace.data_ptr() + -workspace.data_ptr() % CACHE_LINE

    def run(_keep: Any = (workspace, scale, row_lse, col_lse, image, text)) -> None:
        _native.cpu.contrastive_forward(call, start, 1)

    return run, loss


def interleaved(benchmark: Any, sides: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Microseconds per call of each side: rounds of many calls, the sides in turn."""
    times: dict[str, list[float]] = {name: [] for name in sides}

    def many(call: Callable[[], Any]) -> None:
        for _ in range(CALLS):
            call()

    def round_of_all() -> None:
        for name, side in sides.items():
            times[name].append(1e6 * measures.seconds(lambda side=side: many(side)) / CALLS)

    benchmark.pedantic(round_of_all, rounds=ROUNDS, warmup_rounds=1)
    return {name: values[1:] for name, values in times.items()}


def test_forward_overhead(benchmark, row, features) -> None:
    image, text = features
    scale = torch.tensor(SCALE)
    plain, written = plain_call(image, text)
    plain()
    loss = vk.clip_loss(image, text, scale, backend="cpu")
    torch.testing.assert_close(written, loss)
    torch.testing.assert_close(eager.clip_loss(image, text, scale), loss)

    sides = {
        "plain": plain,
        "ours": lambda: vk.clip_loss(image, text, scale, backend="cpu"),
        "default": lambda: vk.clip_loss(image, text, scale),
        "peer": lambda: eager.clip_loss(image, text, scale),
    }
    times = interleaved(benchmark, sides)
    medians = {name: statistics.median(values) for name, values in times.items()}
    row(
        f"clip_loss {N} x {D} forward call",
        shape=[N, N, D],
        dtype="float32",
        peer="eager",
        **measures.versus(times["ours"], times["peer"], "us"),
        plain_us=medians["plain"],
        default_us=medians["default"],
        overhead_us=medians["ours"] - medians["plain"],
        share_of_plain=medians["plain"] / medians["ours"],
    )


def test_forward_and_backward_call(benchmark, row, features) -> None:
    tensors = [x.requires_grad_() for x in (*features, torch.tensor(SCALE))]

    def step(loss: Callable[..., Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(*tensors), tensors)

    sides = {"ours": step(vk.clip_loss), "peer": step(eager.clip_loss)}
    for mine, theirs in zip(sides["ours"](), sides["peer"](), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    times = interleaved(benchmark, sides)
    row(
        f"clip_loss {N} x {D} forward + backward call",
        shape=[N, N, D],
        dtype="float32",
        peer="eager",
        **measures.versus(times["ours"], times["peer"], "us"),
    )
