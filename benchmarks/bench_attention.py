# SPDX-License-Identifier: Apache-2.0
"""Attention, forward and forward + backward, beside torch's scaled_dot_product_attention in the same run.

    pytest benchmarks/bench_attention.py --benchmark-columns=median,iqr,rounds      # all rows, about two minutes
    pytest benchmarks/bench_attention.py -k "B/16 and bfloat16"                     # one shape
    pytest benchmarks/bench_attention.py --save-results                             # and keep the figures

Calls alternate, peer first. Both sides read a packed qkv, as one linear layer gives it, and return [B, L, H, D]. Rates
count useful operations: 4 B H L^2 D forward and 10 backward, which forms the scores again; half where causal. The last
rows are ratios of ours to ours: half the keys masked against none, a pack of lengths against equal lengths.
"""

from __future__ import annotations

from collections.abc import Callable

import measures
import pytest
import torch
from attention_shape import OPERATIONS, AttentionShape
from peers import attention as peer
from torch import Tensor

import vlmkernels as vk

DTYPES = ("float32", "bfloat16")
# Both round the result to the dtype; gradients in bfloat16 are sums that the peer rounds tile by tile.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
SECONDS = 1.5  # of timing per row, about


class Case(AttentionShape):
    def qkv(self, dtype: str) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        shape = (self.B, self.L, 3, self.H, self.D)
        return torch.randn(shape, generator=generator).to(getattr(torch, dtype)).requires_grad_()


CASES = (
    Case("ViT-B/32", 32, 12, 50, 64),
    Case("ViT-B/16", 16, 12, 197, 64),
    Case("ViT-L/14", 8, 16, 257, 64),
    Case("ViT-L/14@336", 2, 16, 577, 64),
    Case("text", 64, 8, 77, 64, is_causal=True),
    Case("so400m", 4, 16, 1024, 72),
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def step(function: Callable[[], Tensor], leaf: Tensor, upstream: Tensor | None) -> Callable[[], Tensor]:
    """Forward without a graph, or forward and backward that leaves the gradient on `leaf`."""

    def forward() -> Tensor:
        with torch.no_grad():
            return function()

    def both() -> Tensor:
        leaf.grad = None
        out = function()
        out.backward(upstream)
        return out.detach()

    return forward if upstream is None else both


def rounds_for(call: Callable[[], object], seconds: float = SECONDS) -> int:
    call()
    return int(min(41, max(5, seconds / measures.seconds(call) / 3)))


@each_dtype
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attention(pairs, row, share_of_peak, case: Case, backward: bool, dtype: str) -> None:
    qkv = case.qkv(dtype)
    upstream = torch.randn(case.B, case.L, case.H, case.D).to(qkv.dtype) if backward else None
    ours = step(lambda: vk.attention_qkvpacked(qkv, is_causal=case.is_causal, backend="cpu"), qkv, upstream)
    theirs = step(lambda: peer.attention(qkv, is_causal=case.is_causal), qkv, upstream)
    result, grad = ours(), qkv.grad
    assert measures.difference(result, theirs()) < TOLERANCE[dtype]
    if backward:
        assert measures.difference(grad, qkv.grad) < TOLERANCE[dtype]
    timed = "forward+backward" if backward else "forward"
    operations = case.operations(timed)
    times = pairs(ours, theirs, rounds_for(theirs))
    rates = share_of_peak(dtype, operations, times["ms"])
    row(
        f"attention {case.name} {dtype} {timed}",
        shape=[case.B, case.H, case.L, case.D],
        dtype=dtype,
        peer="scaled_dot_product_attention",
        peer_gflops=operations / times["peer_ms"] / 1e6,
        **times,
        **rates,
    )


@each_dtype
@pytest.mark.parametrize("case", [CASES[1], CASES[5]], ids=lambda case: case.name)
def test_masked_keys_cost_nothing(pairs, row, case: Case, dtype: str) -> None:
    qkv = case.qkv(dtype)
    mask = (torch.arange(case.L) < (case.L + 1) // 2).expand(case.B, case.L)
    masked = step(lambda: vk.attention_qkvpacked(qkv, key_mask=mask, backend="cpu"), qkv, None)
    whole = step(lambda: vk.attention_qkvpacked(qkv, backend="cpu"), qkv, None)
    with torch.no_grad():
        assert measures.difference(masked(), peer.attention(qkv, key_mask=mask)) < TOLERANCE[dtype]
    times = pairs(masked, whole, rounds_for(whole))
    row(
        f"attention {case.name} {dtype} forward, last half of the keys masked",
        shape=[case.B, case.H, case.L, case.D],
        dtype=dtype,
        peer="ours without a mask",
        **times,
    )


@each_dtype
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_packed_lengths_keep_the_rate(pairs, row, share_of_peak, backward: bool, dtype: str) -> None:
    lengths = [64, 1024, 256, 576, 100, 729, 324, 900, 196, 512, 81, 784, 400, 625, 144, 961]
    H, D = 16, 72
    equal = Case("so400m", len(lengths), H, sum(lengths) // len(lengths), D)
    generator = torch.Generator().manual_seed(0)
    packed = (
        torch.randn(sum(lengths), 3, H, D, generator=generator).to(getattr(torch, dtype)).requires_grad_()
    )
    batch = equal.qkv(dtype)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    upstream = torch.randn(sum(lengths), H, D).to(packed.dtype) if backward else None
    batch_upstream = torch.randn(equal.B, equal.L, H, D).to(packed.dtype) if backward else None

    def varlen() -> Tensor:
        q, k, v = packed.unbind(1)
        return vk.attention_varlen(q, k, v, ends, ends, backend="cpu")

    ours = step(varlen, packed, upstream)
    same = step(lambda: vk.attention(*batch.unbind(2), backend="cpu"), batch, batch_upstream)
    with torch.no_grad():
        assert measures.difference(varlen(), peer.attention_varlen(packed, lengths)) < TOLERANCE[dtype]
    timed = "forward+backward" if backward else "forward"
    operations = OPERATIONS[timed] * H * D * sum(n * n for n in lengths)
    times = pairs(ours, same, rounds_for(same))
    rates = share_of_peak(dtype, operations, times["ms"])
    equal_rate = equal.operations(timed) / times["peer_ms"] / 1e6
    row(
        f"attention_varlen 16 lengths of 64 to 1024 {dtype} {timed}",
        shape=[sum(lengths), H, D],
        dtype=dtype,
        peer="ours on equal lengths",
        peer_gflops=equal_rate,
        rate_ratio=rates["gflops"] / equal_rate,
        **times,
        **rates,
    )
