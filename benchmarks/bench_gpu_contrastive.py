# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses on a GPU, forward + backward, beside open_clip's programs eager and compiled; memory; a million.

    pytest -m gpu benchmarks/bench_gpu_contrastive.py
    pytest -m gpu benchmarks/bench_gpu_contrastive.py -k "clip_loss and 32768"
    pytest benchmarks/bench_gpu_contrastive.py --dry                     # the same Python on small problems

bfloat16 features; the peers run under autocast, as training programs do. Rates count 8 N^2 D operations for CLIP and 6
for the other two, whatever a program executes. Every result is compared with the same loss in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import measures
import pytest
import torch
import torch.nn.functional as F
from gpu_measures import Arena, Call
from peers import contrastive as peer
from torch import Tensor

import vlmkernels as vk

pytestmark = pytest.mark.gpu

#: Relative error of the loss and of each gradient: bfloat16 rounds by 2^-9 at most, sums of roundings by less.
TOLERANCE = 1e-2
FACTOR = {"clip_loss": 8.0, "siglip_loss": 6.0, "linear_cross_entropy": 6.0}
EAGER = {
    "clip_loss": peer.open_clip_loss,
    "siglip_loss": peer.siglip_loss,
    "linear_cross_entropy": peer.linear_cross_entropy,
}
EXACT = {
    "clip_loss": peer.exact_clip,
    "siglip_loss": peer.exact_siglip,
    "linear_cross_entropy": peer.exact_linear_cross_entropy,
}


@dataclass(frozen=True)
class Case:
    """One row: the op on N x M logits of width D."""

    op: str
    n: int
    m: int
    d: int

    @property
    def name(self) -> str:
        classes = f", {self.m} classes" if self.op == "linear_cross_entropy" else ""
        return f"{self.op} {self.n} x {self.d}{classes}"

    @property
    def operations(self) -> float:
        return FACTOR[self.op] * self.n * self.m * self.d

    def here(self, arena: Arena) -> Case:
        return replace(self, n=40, m=40 if self.n == self.m else 70, d=24) if arena.dry else self


CASES = (
    Case("clip_loss", 32768, 32768, 768),
    Case("clip_loss", 4096, 4096, 512),
    Case("siglip_loss", 32768, 32768, 768),
    Case("siglip_loss", 4096, 4096, 512),
    Case("linear_cross_entropy", 8192, 49408, 768),
)


def inputs(arena: Arena, case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Differentiable tensors, aligned as after some training, and the rest, in the order of the arguments."""
    left, right = arena.randn(case.n, case.d), arena.randn(case.m, case.d, seed=1)
    if case.op == "linear_cross_entropy":
        targets = torch.randint(case.m, (case.n,), generator=arena.generator(2), device=arena.device)
        tensors, rest = [left.to(arena.half), (0.05 * right).to(arena.half)], [targets]
    else:
        features = (F.normalize(left, dim=-1), F.normalize(left + right, dim=-1))
        tensors, rest = [x.to(arena.half) for x in features], []
        numbers = (100.0,) if case.op == "clip_loss" else (10.0, -10.0)
        tensors += [torch.tensor(number, device=arena.device) for number in numbers]
    return [x.requires_grad_() for x in tensors], rest


def step(function: Callable[..., Tensor], tensors: list[Tensor], rest: list[Tensor], **options: Any) -> Call:
    """Forward and backward: the loss and the gradients."""

    def call() -> list[Tensor]:
        loss = function(*tensors, *rest, **options)
        return [loss.detach(), *torch.autograd.grad(loss, tensors)]

    return call


def autocast(arena: Arena, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def under_autocast(*arguments: Tensor) -> Tensor:
        with torch.autocast(arena.device.type, arena.half):
            return function(*arguments)

    return under_autocast


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_and_backward(arena: Arena, case: Case) -> None:
    run = case.here(arena)
    tensors, rest = inputs(arena, run)
    eager = autocast(arena, EAGER[case.op])
    compiled = autocast(arena, arena.compiled(EAGER[case.op]))
    exact = [] if arena.prepare else EXACT[case.op](*[x.detach() for x in tensors], *rest)

    def error(result: list[Tensor]) -> float:
        return max(measures.difference(mine, true) for mine, true in zip(result, exact, strict=True))

    arena.contest(
        f"{case.name} bfloat16 forward+backward",
        op=case.op,
        ours=lambda backend: step(getattr(vk, case.op), tensors, rest, backend=backend),
        peers={
            "eager, autocast": lambda: step(eager, tensors, rest),
            "compiled, autocast": lambda: step(compiled, tensors, rest),
        },
        compiles=("compiled, autocast",),
        check=error,
        tolerance=TOLERANCE,
        shape=[run.n, run.m, run.d],
        step="forward+backward",
        operations=run.operations,
        seconds=1.0,
    )


@pytest.mark.parametrize("op", ["clip_loss", "siglip_loss"])
def test_memory(arena: Arena, op: str) -> None:
    """Beside the inputs and the gradients; eager keeps several N x N matrices, and may not fit at all."""
    case = Case(op, 65536, 65536, 1024)
    run = case.here(arena)
    tensors, rest = inputs(arena, run)
    shared = {"op": op, "shape": [run.n, run.m, run.d], "dtype": "bfloat16", "peer": "eager, autocast"}
    if arena.prepare:
        return
    figures: dict[str, Any] = {}
    try:
        figures["peer_extra_mib"] = arena.extra_bytes(step(autocast(arena, EAGER[op]), tensors, rest)) / 2**20
    except torch.OutOfMemoryError:
        figures["peer_failed"] = "out of memory"
    arena.tidy()
    for backend in arena.backends(op):
        name = f"{case.name} bfloat16 memory {backend}"
        with arena.or_a_failed_row(name, backend=backend, **shared):
            ours = step(getattr(vk, op), tensors, rest, backend=backend)
            mine = {"extra_mib": arena.extra_bytes(ours) / 2**20}
            if "peer_extra_mib" in figures:
                mine["ratio"] = figures["peer_extra_mib"] / max(mine["extra_mib"], 1.0)
            arena.note(name, backend=backend, **shared, **figures, **mine, **arena.versions())


def test_a_million_pairs(arena: Arena) -> None:
    """One step of CLIP's loss on 2^20 pairs. Logits are linear in either side, so that the gradients must agree:
    `<grad_image, image> = <grad_text, text> = grad_scale * scale`.
    """
    case = Case("clip_loss", 2**20, 2**20, 512)
    run = case.here(arena)
    if arena.prepare:
        return
    tensors, rest = inputs(arena, run)
    backend = arena.fastest_so_far("clip_loss") or arena.backends("clip_loss")[0]
    name = f"{case.name} bfloat16 forward+backward {backend}"
    shared = {"op": case.op, "backend": backend, "shape": [run.n, run.m, run.d], "dtype": "bfloat16"}
    with arena.or_a_failed_row(name, **shared):
        warm, targets = inputs(arena, replace(run, n=min(run.n, 2**15), m=min(run.m, 2**15)))
        step(vk.clip_loss, warm, targets, backend=backend)()  # compiles
        results: list[Tensor] = []
        call = step(vk.clip_loss, tensors, rest, backend=backend)
        ms = arena.clock.milliseconds(lambda: results.extend(call()))
        loss, *grads = results
        image, text, scale = (
            (grad.double() * x.detach().double()).sum() for grad, x in zip(grads, tensors, strict=True)
        )
        assert loss.isfinite()
        error = max(abs(image - scale), abs(text - scale)) / abs(scale)
        assert error < 2e-2, f"gradients disagree: {image:.5g}, {text:.5g} and {scale:.5g}"
        arena.note(
            name,
            **shared,
            step="forward+backward",
            ms=ms,
            rounds=1,
            error=float(error),
            tflops=run.operations / ms / 1e9,
            **arena.versions(),
        )


def test_cuda_graph(arena: Arena) -> None:
    """A step captured in a graph gives the bits of an eager one."""
    run = Case("clip_loss", 1024, 1024, 512).here(arena)
    tensors, rest = inputs(arena, run)
    for backend in arena.backends("clip_loss"):
        arena.graph_row(
            f"clip_loss in a CUDA graph {backend}",
            step(vk.clip_loss, tensors, rest, backend=backend),
            tensors[:2],
            op="clip_loss",
            backend=backend,
            shape=[run.n, run.m, run.d],
        )
