# SPDX-License-Identifier: Apache-2.0
"""Attention on Triton, on the interpreter or a GPU: accuracy, layouts, masks, dropout, packed sequences, bits."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from attention_problems import INF, MIXED, eager, packed, with_gradients
from oracle import assert_as_accurate, assert_typically_as_accurate
from torch import Tensor
from triton_device import DEVICE, DTYPES

import vlmkernels as vk
from vlmkernels.ops.reference import attention as reference

if DEVICE == "cpu":  # there bfloat16 is truncated, and refused
    DTYPES = (torch.float32, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

#: Beside the cases of every backend: several blocks both ways, a second tile of queries, odd widths.
LONG = (
    cases.AttentionCase(1, 100, 1, 64, Lk=170),
    cases.AttentionCase(1, 70, 2, 40, Lk=100, Hk=1, is_causal=True),
    cases.AttentionCase(1, 100, 1, 16, Lk=70, is_causal=True),
    cases.AttentionCase(2, 70, 1, 72, Lk=100, key_mask=True, is_causal=True),
    cases.AttentionCase(1, 47, 1, 96, Lk=70),
    cases.AttentionCase(1, 48, 1, 80),
    cases.AttentionCase(1, 7, 2, 3),
    cases.AttentionCase(2, 33, 3, 5, is_causal=True),
    cases.AttentionCase(1, 1, 1, 1),
)
#: One of each kind for every run; the slow run has all of them.
FEW = tuple(
    case
    for case in cases.ATTENTION
    if case.keys < 100
    and case.H < 8
    and (
        case.Lq in (0, 1, 3, 5, 16)
        or (case.Lq == 17 and (case.D in (8, 40, 72) or case.bias or case.key_mask))
    )
)


def on_device(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in tensors.items()}


def on_triton(**arguments: Any) -> Tensor:
    return vk.attention(**on_device(arguments), backend="triton").cpu()


def assert_accurate(case: cases.AttentionCase, dtype: torch.dtype, draws: int) -> None:
    """Each result and gradient beside eager's, as for the CPU kernels: means in float32, worst elements else.

    Where a query sees one key, its gradient is the difference of two sums of the same products, one of which went
    through the rounded result: half a unit in the last place of `sum |u| |out|` is left, times a key. Eager has 0.
    """
    problems = [(case.tensors(dtype, seed=10 * i), case.options()) for i in range(draws)]
    ours = [with_gradients(on_triton, tensors, **options) for tensors, options in problems]
    theirs = [with_gradients(eager, tensors, **options) for tensors, options in problems]
    exact = [
        with_gradients(eager, {name: x.double() for name, x in tensors.items()}, **options)
        for tensors, options in problems
    ]
    rule = assert_typically_as_accurate if dtype == torch.float32 else assert_as_accurate
    for name in ours[0]:
        assert ours[0][name].dtype == dtype
        truth = [e[name] for e in exact]
        left = 0.0
        if case.keys == 1 and name in "qk":
            largest = max(x.abs().max().item() for t, _ in problems for x in t.values() if x.numel())
            left = torch.finfo(dtype).eps / 2 * case.D * largest**3 * case.D**-0.5
            assert all((x == 0).all() for x in truth)
        rule([r[name] for r in ours], [t[name] for t in theirs], truth, f"{case} {name}", at_least=left)


@each_dtype
@pytest.mark.parametrize("case", FEW, ids=str)
def test_results_and_gradients_are_as_accurate_as_eager(
    case: cases.AttentionCase, dtype: torch.dtype
) -> None:
    assert_accurate(case, dtype, draws=1)


@pytest.mark.parametrize("case", LONG, ids=str)
def test_several_blocks_are_as_accurate_as_eager(case: cases.AttentionCase) -> None:
    assert_accurate(case, torch.float16, draws=1)


@pytest.mark.slow
@each_dtype
@pytest.mark.parametrize("case", [*cases.ATTENTION, *LONG], ids=str)
def test_every_case_is_as_accurate_as_eager(case: cases.AttentionCase, dtype: torch.dtype) -> None:
    assert_accurate(case, dtype, draws=3)


@each_dtype
def test_lse_and_its_gradients_are_those_of_the_reference(dtype: torch.dtype) -> None:
    case = cases.AttentionCase(2, 40, 2, 24, Lk=50, Hk=1, bias="1H", key_mask=True, is_causal=True)
    tensors, options = case.tensors(dtype), case.options()
    upstream = torch.randn(case.B, case.H, case.Lq, generator=torch.Generator().manual_seed(5))

    def lse_of(backend: str, **leaves: Tensor) -> tuple[Tensor, Tensor]:
        device = DEVICE if backend == "triton" else "cpu"
        arguments = {name: x.to(device) for name, x in leaves.items()}
        mask = options["key_mask"].to(device)
        out, lse = vk.attention(**arguments, is_causal=True, key_mask=mask, return_lse=True, backend=backend)
        weighted = lse.masked_fill(lse == -INF, 0.0).cpu() * upstream.to(lse.dtype)
        return weighted.sum() + out.double().cpu().sum() * 0.5, lse.detach().cpu()

    ours = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    exact = {name: x.double().requires_grad_() for name, x in tensors.items()}
    total, lse = lse_of("triton", **ours)
    exact_total, exact_lse = lse_of("reference", **exact)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact_lse, rtol=3e-7, atol=3e-6)
    grads = torch.autograd.grad(total, list(ours.values()))
    # half types: the result of a row is rounded before its gradient is taken
    eps = torch.finfo(dtype).eps
    for grad, expected in zip(grads, torch.autograd.grad(exact_total, list(exact.values())), strict=True):
        torch.testing.assert_close(grad.double(), expected, rtol=8 * eps + 1e-5, atol=8 * eps + 2e-5)


@pytest.mark.parametrize("layout", sorted(cases.LAYOUTS))
def test_any_strides(layout: str) -> None:
    case = cases.AttentionCase(2, 20, 2, 16, Lk=35, bias="BH")
    tensors = {name: cases.LAYOUTS[layout](x) for name, x in on_device(case.tensors(torch.float32)).items()}
    dense = {name: x.contiguous() for name, x in tensors.items()}
    ours = with_gradients(lambda **x: vk.attention(**x, backend="triton"), tensors)
    expected = with_gradients(lambda **x: vk.attention(**x, backend="triton"), dense)
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_qkvpacked_reads_and_writes_in_place() -> None:
    qkv = cases.fill("normal", (2, 40, 3, 2, 16), torch.float16).to(DEVICE).requires_grad_()
    mask = (torch.arange(80).reshape(2, 40) % 3 != 1).to(DEVICE)
    upstream = cases.fill("normal", (2, 40, 2, 16), torch.float16, seed=1).to(DEVICE)
    out = vk.attention_qkvpacked(qkv, key_mask=mask, is_causal=True, backend="triton")
    (grad,) = torch.autograd.grad(out, qkv, upstream)
    leaves = [x.detach().requires_grad_() for x in qkv.unbind(2)]
    expected = vk.attention(*leaves, key_mask=mask, is_causal=True, backend="triton")
    assert torch.equal(out, expected)
    assert torch.equal(grad, torch.stack(torch.autograd.grad(expected, leaves, upstream), 2))
    assert grad.is_contiguous()


@pytest.mark.parametrize("needs", ["q", "k", "v", "kv", "bias", "q bias"])
def test_only_the_gradients_that_are_wanted(needs: str) -> None:
    names = needs.split() if " " in needs or needs == "bias" else list(needs)
    tensors = on_device(cases.AttentionCase(2, 20, 2, 16, bias="1H").tensors(torch.float32))
    everything = with_gradients(lambda **x: vk.attention(**x, backend="triton"), tensors)
    leaves = {name: x.detach().requires_grad_(name in names) for name, x in tensors.items()}
    out = vk.attention(**leaves, backend="triton")
    upstream = cases.fill("normal", tuple(out.shape), torch.float64, seed=99).to(out)
    grads = torch.autograd.grad(out, [leaves[name] for name in names], upstream)
    for name, grad in zip(names, grads, strict=True):
        torch.testing.assert_close(grad, everything[name], rtol=1e-5, atol=1e-5)


def test_hidden_keys_are_not_read() -> None:
    q, k, v = (cases.fill("normal", (2, 70, 1, 16), torch.float32, seed) for seed in range(3))
    mask = torch.rand(2, 70) < 0.5
    mask[:, 32:64] = False  # a whole block
    expected = with_gradients(on_triton, {"q": q, "k": k, "v": v}, key_mask=mask)
    k[~mask], v[~mask] = float("nan"), INF
    ours = with_gradients(on_triton, {"q": q, "k": k, "v": v}, key_mask=mask)
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
def test_nan_and_infinity_spread_as_in_the_reference(value: float, which: str) -> None:
    tensors = {name: cases.fill("normal", (1, 9, 2, 16), torch.float32, i) for i, name in enumerate("qkv")}
    tensors[which][0, 3, 1, 2] = value
    out, lse = vk.attention(**on_device(tensors), return_lse=True, backend="triton")
    expected, expected_lse = vk.attention(**tensors, return_lse=True, backend="reference")
    assert torch.equal(out.isfinite().cpu(), expected.isfinite())
    assert torch.equal(out.isnan().cpu(), expected.isnan())
    assert torch.equal(lse.isnan().cpu(), expected_lse.isnan())


def test_a_negative_scale_is_no_exception() -> None:
    q, k, v = (cases.fill("normal", (1, 20, 2, 16), torch.float32, i).to(DEVICE) for i in range(3))
    ours = vk.attention(q, k, v, scale=-0.5, backend="triton")
    torch.testing.assert_close(ours, vk.attention(q, k, v, scale=-0.5, backend="reference"))


@pytest.mark.parametrize(
    ("case", "dropout_p"),
    [(cases.AttentionCase(1, 40, 2, 24), 0.1), (cases.AttentionCase(1, 5, 1, 8), 1.0), (MIXED, 0.5)],
    ids=str,
)
def test_dropout_is_the_references_mask_forward_and_backward(
    case: cases.AttentionCase, dropout_p: float
) -> None:
    tensors, options = case.tensors(torch.float32), case.options()

    def seeded(backend: str, **leaves: Any) -> Tensor:
        torch.manual_seed(11)
        return vk.attention(**leaves, dropout_p=dropout_p, backend=backend)

    # both draw the seed from the same generator, so the reference runs on the same device
    arguments = on_device(options)
    ours = with_gradients(lambda **x: seeded("triton", **x), on_device(tensors), **arguments)
    exact = {name: x.double() for name, x in on_device(tensors).items()}
    expected = with_gradients(lambda **x: seeded("reference", **x), exact, **arguments)
    for name in ours:
        # one weight dropped or kept otherwise is an error of 1/40 at least
        torch.testing.assert_close(ours[name].double(), expected[name], rtol=2e-5, atol=2e-5)


def test_dropout_mask_weight_by_weight() -> None:
    q, k = torch.zeros(2, 9, 2, 8, device=DEVICE), torch.zeros(2, 61, 2, 8, device=DEVICE)
    v = torch.eye(61, device=DEVICE)[None, :, None].expand(2, 61, 2, 61)  # the result is the weights
    torch.manual_seed(3)
    weights = vk.attention(q, k, v, dropout_p=0.25, backend="triton")
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=DEVICE)
    keep = reference.dropout_mask(seed, 2, 2, 9, 61, 0.25).transpose(1, 2)
    assert torch.equal(weights > 0, keep)


@pytest.mark.parametrize(
    ("lengths", "is_causal", "dropout_p"),
    [
        (((3, 0, 7, 1), (3, 4, 0, 9)), False, 0.0),
        (((3, 0, 7, 1), (3, 4, 0, 9)), True, 0.3),
        (((40, 1), (50, 40)), False, 0.0),
        (((40, 37), (50, 20)), True, 0.0),
        (((0, 0), (0, 5)), False, 0.0),
        (((), ()), True, 0.0),
    ],
    ids=str,
)
def test_varlen_is_each_sequence_by_itself(lengths: Any, is_causal: bool, dropout_p: float) -> None:
    q, k, v, ends_q, ends_k = (x.to(DEVICE) for x in packed(lengths))

    def gradients(backend: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        torch.manual_seed(7)
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out, lse = vk.attention_varlen(
            *leaves,
            ends_q,
            ends_k.long(),
            is_causal=is_causal,
            dropout_p=dropout_p,
            return_lse=True,
            backend=backend,
        )
        generator = torch.Generator().manual_seed(2)
        upstream = torch.randn(out.shape, generator=generator).to(out)
        upstream_lse = torch.randn(lse.shape, generator=generator).to(lse).masked_fill(lse == -INF, 0.0)
        return out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, (upstream, upstream_lse))

    for ours, exact in zip(
        gradients("triton", torch.float32), gradients("reference", torch.float64), strict=True
    ):
        torch.testing.assert_close(ours.double(), exact.double(), rtol=2e-5, atol=2e-5)


def test_boundaries_that_are_none_give_nan() -> None:
    from vlmkernels.ops.triton import attention as kernels

    q = torch.randn(20, 2, 16, device=DEVICE)
    good = torch.tensor([0, 5, 20], device=DEVICE)
    for ends in ([0, 12, 5], [1, 5, 20], [0, 25, 20]):
        for pair in ((torch.tensor(ends, device=DEVICE), good), (good, torch.tensor(ends, device=DEVICE))):
            call = kernels.AttentionCall(q, q, q, False, 0.25, 0.0, None, cu_seqlens=pair)
            out, lse = torch.zeros_like(q), torch.zeros(2, 20, device=DEVICE)
            kernels.forward(call, out, lse)
            assert out.isnan().all()
            assert lse.isnan().all()
            grads = [torch.zeros_like(q) for _ in range(3)]
            kernels.backward(call, out, lse, q, None, grads)
            assert all(grad.isnan().all() for grad in grads)


def test_bits_are_the_same_every_time() -> None:
    tensors = cases.AttentionCase(1, 40, 1, 16, bias="11").tensors(torch.float16)
    first, second = (with_gradients(on_triton, tensors) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_gradient_that_is_one_number_expanded() -> None:
    q, k, v = (
        cases.fill("normal", (1, 20, 2, 16), torch.float32, i).to(DEVICE).requires_grad_() for i in range(3)
    )
    ours = torch.autograd.grad(vk.attention(q, k, v, backend="triton").sum(), (q, k, v))
    theirs = torch.autograd.grad(vk.attention(q, k, v, backend="reference").sum(), (q, k, v))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("q", "reason"),
    [
        (torch.zeros(1, 2, 1, 264), "head dims above 256"),
        (torch.zeros(1, 2, 1, 8, dtype=torch.float64), "sums in float32"),
    ],
)
def test_refusals(q: Tensor, reason: str) -> None:
    q = q.to(DEVICE)
    with pytest.raises(NotImplementedError, match=reason):
        vk.attention(q, q, q, backend="triton")
