# SPDX-License-Identifier: Apache-2.0
"""Attention on a GPU beside every backend of scaled_dot_product_attention; key masks; cost of a call; CUDA graphs.

    pytest -m gpu benchmarks/bench_gpu_attention.py                                # all rows, a minute or two
    pytest -m gpu benchmarks/bench_gpu_attention.py -k "B/16 and backward"         # some rows
    pytest benchmarks/bench_gpu_attention.py --dry                                 # the same Python on small problems

bfloat16. Both sides read a packed qkv, as one linear layer gives it, and return [B, L, H, D]: transposes are the
peer's to do. Rates count useful operations: 4 B H L^2 D forward, 10 backward; half where causal. A backward row times
the backward pass alone, whose forward ran before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import measures
import pytest
import torch
from attention_shape import OPERATIONS, AttentionShape
from gpu_measures import Arena, Call
from peers import attention as peer
from torch import Tensor

import vlmkernels as vk

pytestmark = pytest.mark.gpu

STEPS = ("forward", "backward", "forward+backward")
#: Relative error of results and gradients rounded to bfloat16, whose unit is 2^-8, against float32.
TOLERANCE = 1e-2
CHECKED = 4  # batch entries from either end: enough to see a wrong offset


class Case(AttentionShape):
    def moved(self, step: str) -> float:
        """Bytes: forward reads q, k, v and writes the result; backward reads those and the gradient, writes three."""
        tensors = {"forward": 4, "backward": 8, "forward+backward": 12}[step]
        return tensors * 2.0 * self.B * self.H * self.L * self.D

    def small(self) -> Case:
        return replace(self, B=2, H=2, L=min(self.L, 19), D=min(self.D, 24))


CASES = (
    Case("ViT-B/32", 1024, 12, 50, 64),
    Case("ViT-B/16", 256, 12, 197, 64),
    Case("ViT-L/14", 256, 16, 257, 64),
    Case("ViT-H/14", 256, 16, 257, 80),
    Case("ViT-L/14@336", 64, 16, 577, 64),
    Case("so400m", 64, 16, 729, 72),
    Case("text", 1024, 8, 77, 64, is_causal=True),
)


def problem(arena: Arena, case: Case) -> tuple[Case, Tensor, Tensor]:
    """The case as it runs here, its qkv, and an incoming gradient."""
    case = case.small() if arena.dry else case
    qkv = arena.randn(case.B, case.L, 3, case.H, case.D).to(arena.half).requires_grad_()
    return case, qkv, arena.randn(case.B, case.L, case.H, case.D, seed=1).to(arena.half)


def stepped(function: Callable[[], Tensor], qkv: Tensor, upstream: Tensor, step: str) -> Call:
    """A call of one step; it returns what the step computes."""
    if step == "forward":

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [function()]

        return forward
    if step == "forward+backward":
        return lambda: list(torch.autograd.grad(function(), qkv, upstream))
    out = function()
    return lambda: list(torch.autograd.grad(out, qkv, upstream, retain_graph=True))


def error_of(
    qkv: Tensor, upstream: Tensor, case: Case, step: str, key_mask: Tensor | None = None
) -> Callable[[list[Tensor]], float]:
    """Relative error of a step's result against float32, on the batch's first and last entries."""
    rows = torch.arange(case.B, device=qkv.device)
    rows = torch.cat([rows[:CHECKED], rows[-CHECKED:]])
    some = qkv.detach()[rows].float().requires_grad_()
    mask = None if key_mask is None else key_mask[rows]
    with torch.autocast(qkv.device.type, enabled=False):
        out = vk.attention_qkvpacked(some, key_mask=mask, is_causal=case.is_causal, backend="reference")
        if step == "forward":
            exact = out.detach()
        else:
            (exact,) = torch.autograd.grad(out, some, upstream[rows].float())
    return lambda result: measures.difference(result[0][rows], exact)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attention(arena: Arena, case: Case, step: str) -> None:
    run, qkv, upstream = problem(arena, case)

    def ours(backend: str) -> Call:
        return stepped(
            lambda: vk.attention_qkvpacked(qkv, is_causal=run.is_causal, backend=backend), qkv, upstream, step
        )

    def theirs(backend: str) -> Call:
        return stepped(lambda: peer.with_backend(backend, qkv, is_causal=run.is_causal), qkv, upstream, step)

    arena.contest(
        f"attention {case.name} bfloat16 {step}",
        op="attention",
        ours=ours,
        peers={f"SDPA {name}": lambda name=name: theirs(name) for name in peer.SDPA_BACKENDS},
        library={"SDPA flash": "torch_flash", "SDPA cudnn": "torch_cudnn"} if step == "forward" else None,
        check=error_of(qkv, upstream, run, step),
        tolerance=TOLERANCE,
        shape=[run.B, run.H, run.L, run.D],
        step=step,
        operations=run.operations(step),
        moved=run.moved(step),
        seconds=0.4,
    )


@pytest.mark.parametrize("step", ["forward", "backward"])
@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[6]], ids=lambda case: case.name)
def test_key_mask(arena: Arena, case: Case, step: str) -> None:
    """Half the keys masked, against none: `ratio` is to be 0.95 at least. Nothing is saved by what is masked."""
    run, qkv, upstream = problem(arena, case)
    mask = (torch.arange(run.L, device=arena.device) < (run.L + 1) // 2).expand(run.B, run.L)
    error = error_of(qkv, upstream, run, step, mask)

    def of(backend: str, key_mask: Tensor | None) -> Call:
        options = {"key_mask": key_mask, "is_causal": run.is_causal, "backend": backend}
        return stepped(lambda: vk.attention_qkvpacked(qkv, **options), qkv, upstream, step)

    for backend in arena.backends("attention"):
        arena.contest(
            f"attention {case.name} bfloat16 {step}, half of the keys masked",
            op="attention",
            only=backend,
            ours=lambda name: of(name, mask),
            peers={"ours without a mask": lambda backend=backend: of(backend, None)},
            check=error,
            tolerance=TOLERANCE,
            shape=[run.B, run.H, run.L, run.D],
            step=step,
            operations=run.operations(step),
            moved=run.moved(step),
            seconds=0.3,
        )


LENGTHS = (64, 1024, 256, 576, 100, 729, 324, 900, 196, 512, 81, 784, 400, 625, 144, 961)


@pytest.mark.parametrize("step", ["forward", "backward"])
def test_varlen(arena: Arena, step: str) -> None:
    """Native resolutions packed end to end, beside ours on as many tokens in equal lengths."""
    lengths = [n // 32 + 1 for n in LENGTHS[:4]] if arena.dry else [n for n in LENGTHS for _ in range(4)]
    H, D, T = 16 if not arena.dry else 2, 72, sum(lengths)
    qkv = arena.randn(T, 3, H, D).to(arena.half).requires_grad_()
    upstream = arena.randn(T, H, D, seed=1).to(arena.half)
    ends = torch.tensor([0, *lengths], device=arena.device).cumsum(0).int()
    equal = T // len(lengths)
    batch = arena.randn(len(lengths), equal, 3, H, D).to(arena.half).requires_grad_()
    batch_upstream = arena.randn(len(lengths), equal, H, D, seed=1).to(arena.half)

    def packed(x: Tensor, backend: str) -> Tensor:
        q, k, v = x.unbind(1)
        return vk.attention_varlen(q, k, v, ends, ends, backend=backend)

    some = qkv.detach().float().requires_grad_()
    out = peer.attention_varlen(some, lengths)
    exact = out.detach() if step == "forward" else torch.autograd.grad(out, some, upstream.float())[0]
    for backend in arena.backends("attention_varlen"):
        arena.contest(
            f"attention_varlen {len(lengths)} lengths of {min(lengths)} to {max(lengths)} bfloat16 {step}",
            op="attention_varlen",
            only=backend,
            ours=lambda name: stepped(lambda: packed(qkv, name), qkv, upstream, step),
            peers={
                "ours on equal lengths": lambda backend=backend: stepped(
                    lambda: vk.attention_qkvpacked(batch, backend=backend), batch, batch_upstream, step
                )
            },
            check=lambda result: (
                0.0 if result[0].ndim > exact.ndim else measures.difference(result[0], exact)
            ),
            tolerance=TOLERANCE,
            shape=[T, H, D],
            step=step,
            operations=OPERATIONS[step] * H * D * sum(n * n for n in lengths),
            seconds=0.3,
        )


def test_call_overhead(arena: Arena) -> None:
    """What the host pays to issue one eager forward call, the device having next to nothing to do."""
    case = Case("call", 1, 2, 16, 64)
    qkv = arena.randn(case.B, case.L, 3, case.H, case.D).to(arena.half)
    peer_us = arena.microseconds_per_call(lambda: peer.with_backend("default", qkv))
    sides = {name: {"backend": name} for name in arena.backends("attention")} | {"default": {}}
    for name, option in sides.items():
        with (
            torch.no_grad(),
            arena.or_a_failed_row(f"attention forward call {name}", op="attention", backend=name),
        ):
            us = arena.microseconds_per_call(lambda option=option: vk.attention_qkvpacked(qkv, **option))
            arena.note(
                f"attention forward call {name}",
                op="attention",
                backend=name,
                shape=[case.B, case.H, case.L, case.D],
                dtype="bfloat16",
                peer="SDPA default",
                **measures.versus(us, peer_us, "us"),
                **arena.versions(),
            )


def test_cuda_graph(arena: Arena) -> None:
    """Forward and backward in one graph."""
    run, qkv, upstream = problem(arena, CASES[1])

    def step_of(backend: str) -> list[Tensor]:
        out = vk.attention_qkvpacked(qkv, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, qkv, upstream)]

    for backend in arena.backends("attention"):
        arena.graph_row(
            f"attention in a CUDA graph {backend}",
            lambda backend=backend: step_of(backend),
            [qkv],
            op="attention",
            backend=backend,
            shape=[run.B, run.H, run.L, run.D],
        )
