# SPDX-License-Identifier: Apache-2.0
"""vk.attention_varlen: packed sequences, with boundaries that can be read and with those that cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_problems import INF, packed
from torch import Tensor

import vlmkernels as vk
from vlmkernels import _native
from vlmkernels.ops.reference import attention as reference

LENGTHS = [((3, 0, 7, 1), (3, 4, 0, 9)), ((50, 77), (50, 77)), ((0, 0), (0, 5)), ((5,), (2,)), ((), ())]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_varlen_is_attention_of_each_sequence(lengths: Any, is_causal: bool) -> None:
    q, k, v, ends_q, ends_k = packed(lengths)
    out, lse = vk.attention_varlen(q, k, v, ends_q, ends_k, is_causal=is_causal, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (4, q.shape[0])
    for b in range(len(lengths[0])):
        in_q, in_k = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
        one = (q[None, in_q], k[None, in_k], v[None, in_k])
        expected, expected_lse = vk.attention(*one, is_causal=is_causal, return_lse=True)
        torch.testing.assert_close(out[in_q], expected[0])
        torch.testing.assert_close(lse[:, in_q], expected_lse[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_varlen_that_reads_nothing_back_gives_the_same(
    lengths: Any, is_causal: bool, dropout_p: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v, ends_q, ends_k = packed(lengths, dtype)
    options: dict[str, Any] = {"scale": 0.25, "is_causal": is_causal, "dropout_p": dropout_p}
    options["seed"] = torch.tensor([987654321]) if dropout_p else None
    expected = reference.attention_varlen(q, k, v, ends_q, ends_k, **options)
    monkeypatch.setattr(reference._check, "readable", lambda x: False)
    monkeypatch.setattr(Tensor, "tolist", None)
    monkeypatch.setattr(Tensor, "item", None)
    out, lse = reference.attention_varlen(q, k, v, ends_q, ends_k, **options)
    monkeypatch.undo()
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])


def test_varlen_compiles_to_one_graph() -> None:
    q, k, v, ends_q, ends_k = packed(LENGTHS[0])
    compiled = torch.compile(vk.attention_varlen, fullgraph=True, backend="eager")
    expected = vk.attention_varlen(q, k, v, ends_q, ends_k, is_causal=True)
    torch.testing.assert_close(compiled(q, k, v, ends_q, ends_k, is_causal=True), expected)


def test_varlen_takes_int64_boundaries() -> None:
    q, k, v, ends_q, ends_k = packed(LENGTHS[0])
    expected = vk.attention_varlen(q, k, v, ends_q, ends_k)
    assert torch.equal(vk.attention_varlen(q, k, v, ends_q.long(), ends_k.long()), expected)


@pytest.mark.parametrize("path", ["reference", "op"])
def test_varlen_gradcheck(path: str) -> None:
    q, k, v, ends_q, ends_k = packed(((2, 0, 3), (3, 2, 1)), torch.float64)
    tensors = tuple(x.requires_grad_() for x in (q, k, v))

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if path == "reference":
            out, lse = vk.attention_varlen(q, k, v, ends_q, ends_k, is_causal=True, return_lse=True)
        else:
            options = (None, True, 0.25, 0.0, "reference")
            out, lse = torch.ops.vlmkernels.attention_varlen(q, k, v, ends_q, ends_k, *options)
        return out, lse.masked_fill(lse == -INF, 0.0)

    assert torch.autograd.gradcheck(function, tensors)


def test_varlen_dropout_is_that_of_a_batch() -> None:
    q, k, v = torch.randn(3, 2, 5, 2, 8).unbind(0)
    ends = torch.tensor([0, 5, 10])
    torch.manual_seed(1)
    batch = vk.attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(1)
    sequences = vk.attention_varlen(*(x.flatten(0, 1) for x in (q, k, v)), ends, ends, dropout_p=0.5)
    torch.testing.assert_close(sequences, batch.flatten(0, 1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 5], r"cu_seqlens_k must go from 0 to 5 \(the tokens\), got 1 to 5"),
        ([0, 4], r"cu_seqlens_k must go from 0 to 5 \(the tokens\), got 0 to 4"),
        ([0, 4, 3, 5], r"cu_seqlens_k must not decrease, got 4 then 3 at sequence 1"),
    ],
)
def test_varlen_refuses_bad_boundaries(values: list[int], message: str) -> None:
    x = torch.randn(5, 2, 8)
    good = torch.tensor([0] * (len(values) - 1) + [5])
    with pytest.raises(ValueError, match=rf"vk\.attention_varlen: {message}"):
        vk.attention_varlen(x, x, x, good, torch.tensor(values))
    # a compiled program cannot read them while it is traced: the kernel does, and the reference gives NaN
    compiled = torch.compile(vk.attention_varlen, fullgraph=True, backend="eager")
    assert compiled(x, x, x, good, torch.tensor(values), backend="reference").isnan().all()
    if _native.cpu_reason is None:
        with pytest.raises(ValueError, match=rf"vk\.attention_varlen: {message}"):
            compiled(x, x, x, good, torch.tensor(values), backend="cpu")


@pytest.mark.gpu
def test_nothing_is_read_back_from_a_gpu() -> None:
    q, k, v, ends_q, ends_k = (x.cuda() for x in packed(LENGTHS[0]))
    mask = torch.tensor([[True, False], [False, False]], device="cuda")
    batch = torch.randn(2, 2, 3, 2, 8, device="cuda", requires_grad=True)
    q.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = vk.attention_varlen(q, k, v, ends_q, ends_k, is_causal=True, dropout_p=0.1)
        out.sum().backward()
        vk.attention_qkvpacked(batch, key_mask=mask, is_causal=True, dropout_p=0.1).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.isfinite().all()
    assert (batch.grad[1] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("values", [[1, 5], [0, 4], [0, 4, 3, 5], [0, 9], [-7, 5]], ids=str)
def test_varlen_with_bad_boundaries_on_a_gpu_gives_nan(values: list[int]) -> None:
    x = torch.randn(5, 2, 8, device="cuda")
    good = torch.tensor([0] * (len(values) - 1) + [5], device="cuda")
    assert (
        vk.attention_varlen(x, x, x, good, torch.tensor(values, device="cuda"), is_causal=True).isnan().all()
    )
