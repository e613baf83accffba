# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses, forward + backward, beside eager PyTorch in the same run; and the memory of both.

    pytest benchmarks/bench_contrastive.py --benchmark-columns=median,iqr,rounds        # all rows, some minutes
    pytest benchmarks/bench_contrastive.py -k "clip_loss and 2048"                      # one row
    pytest benchmarks/bench_contrastive.py --save-results                               # and keep the figures

Calls alternate, peer first; the row states medians, spread, `ratio` = peer / ours, and the rate of ours in executed
operations (those of recomputed tiles included) beside the peak probed right after. Eager keeps its logits: N = 16384
takes about 8 GiB. Features are normalised and aligned as after some training; the cache is as the peer left it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peers import contrastive as eager
from torch import Tensor

import vlmkernels as vk

# Bytes of dot products that a loss may keep for backward, instead of forming them again.
SAVED_LIMIT = 64 * 2**20
# Losses agree to float32 rounding. Under autocast the peer rounds its logits, in steps of a quarter at a scale of 100.
LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
GRADIENT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}


@dataclass(frozen=True)
class Case:
    """One row: the op on N x M logits of width D."""

    op: str
    n: int
    m: int
    d: int
    dtype: str
    rounds: int

    @property
    def name(self) -> str:
        shape = f"{self.n} x {self.d}" + (f", {self.m} classes" if self.op == "linear_cross_entropy" else "")
        return f"{self.op} {shape} {self.dtype}"

    def executed_operations(self) -> float:
        """Of forward and backward: three products, and a fourth where CLIP forms its logits again."""
        again = self.op == "clip_loss" and 4 * self.n * self.m > SAVED_LIMIT
        return (8.0 if again else 6.0) * self.n * self.m * self.d


DTYPES = ("float32", "bfloat16")
CASES = [
    *(
        Case("clip_loss", n, n, 512, dtype, 9 if n == 2048 else 3)
        for n in (2048, 8192, 16384)
        for dtype in DTYPES
    ),
    *(Case("siglip_loss", 8192, 8192, 512, dtype, 3) for dtype in DTYPES),
    *(Case("linear_cross_entropy", 1024, 49408, 512, dtype, 3) for dtype in DTYPES),
]


def inputs(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Differentiable tensors and the rest, in the order of the arguments."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(case.n, case.d, generator=generator)
    right = torch.randn(case.m, case.d, generator=generator)
    if case.op == "linear_cross_entropy":
        tensors, rest = [left, 0.05 * right], [torch.randint(case.m, (case.n,), generator=generator)]
    else:
        tensors, rest = [F.normalize(left, dim=-1), F.normalize(left + right, dim=-1)], []
        tensors.append(torch.tensor(100.0 if case.op == "clip_loss" else 10.0))
        if case.op == "siglip_loss":
            tensors.append(torch.tensor(-10.0))
    return [x.requires_grad_() for x in tensors], rest


def steps(case: Case) -> tuple[list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
    """The differentiable tensors, and forward + backward of ours and of the peer, which leave gradients on them."""
    tensors, rest = inputs(case)
    compute_dtype = getattr(torch, case.dtype)

    def ours() -> Tensor:
        return backward(getattr(vk, case.op)(*tensors, *rest, compute_dtype=compute_dtype, backend="cpu"))

    def peer() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bfloat16"):
            return backward(getattr(eager, case.op)(*tensors, *rest))

    def backward(loss: Tensor) -> Tensor:
        for x in tensors:
            x.grad = None
        loss.backward()
        return loss.detach()

    return tensors, ours, peer


def check_agreement(
    case: Case, tensors: list[Tensor], ours: Callable[[], Tensor], peer: Callable[[], Tensor]
) -> None:
    """Timing two programs that compute different things says nothing."""
    loss = ours()
    grads = [x.grad for x in tensors]
    peer_loss = peer()
    assert abs(loss - peer_loss) <= LOSS_TOLERANCE[case.dtype] * abs(peer_loss) + 1e-6, (loss, peer_loss)
    for mine, theirs in zip(grads, (x.grad for x in tensors), strict=True):
        difference = (mine - theirs).norm() / theirs.norm()
        assert difference <= GRADIENT_TOLERANCE[case.dtype], f"gradients differ by {difference:.2e}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_and_backward(pairs, row, share_of_peak, case: Case) -> None:
    tensors, ours, peer = steps(case)
    check_agreement(case, tensors, ours, peer)
    times = pairs(ours, peer, case.rounds)
    rates = share_of_peak(case.dtype, case.executed_operations(), times["ms"])
    row(
        case.name,
        shape=[case.n, case.m, case.d],
        dtype=case.dtype,
        peer="eager" if case.dtype == "float32" else "eager, autocast",
        **times,
        **rates,
    )


# Memory: each side in a process of its own, since a peak never comes down.

PEAK_MEMORY = """
import sys
sys.path.insert(0, sys.argv[1])
import resource
import torch
import bench_contrastive as bench

torch.set_num_threads(int(sys.argv[5]))
side, op, n = sys.argv[2], sys.argv[3], int(sys.argv[4])
case = bench.Case(op, n, n, 512, "float32", 1)
small = bench.steps(bench.Case(op, 64, 64, 512, "float32", 1))
small[1](), small[2]()
tensors, ours, peer = bench.steps(case)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()

ballast = []  # up to the peak so far, so that whatever the step takes raises it
while resident() < peak():
    ballast.append(bytearray(b"x" * (1 << 20)))
before = peak()
ours() if side == "ours" else peer()
print((peak() - before - sum(x.grad.nbytes for x in tensors)) / 2**20)
"""


def extra_mebibytes(side: str, op: str, n: int, threads: int) -> float:
    """Peak memory of one forward and backward beside the inputs and the gradients."""
    arguments = [str(Path(__file__).parent), side, op, str(n), str(threads)]
    result = subprocess.run([sys.executable, "-c", PEAK_MEMORY, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return float(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("n", [8192, 16384])
@pytest.mark.parametrize("op", ["clip_loss", "siglip_loss"])
def test_memory(benchmark, row, threads: int, op: str, n: int) -> None:
    figures = {}

    def measure() -> None:
        figures["extra_mib"] = extra_mebibytes("ours", op, n, threads)
        figures["peer_extra_mib"] = extra_mebibytes("peer", op, n, threads)

    benchmark.pedantic(measure, rounds=1)
    ratio = figures["peer_extra_mib"] / max(figures["extra_mib"], 1.0)
    row(f"{op} {n} x 512 memory", shape=[n, n, 512], dtype="float32", peer="eager", **figures, ratio=ratio)
