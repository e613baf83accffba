# SPDX-License-Identifier: Apache-2.0
"""What holds for the CPU kernels of attention: accuracy, instruction sets, bits, threads, bounds, what they issue."""

from __future__ import annotations

from functools import partial
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from attention_problems import INF, MIXED, eager, packed, with_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import (
    ALLOCATIONS_AND_VIEWS,
    Inside,
    assert_undisturbed_by_threads,
    isa_levels,
    needs_cpu_kernels,
    run,
    saved_at,
)
from oracle import assert_as_accurate, assert_typically_as_accurate
from torch import Tensor

import vlmkernels as vk
from vlmkernels.ops import _attention_ops as ops
from vlmkernels.ops._library import registered_ops
from vlmkernels.ops.reference import attention as reference

pytestmark = needs_cpu_kernels
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

#: Beside the cases of every backend: several blocks of keys and of queries, heads that share them, wide heads.
LONG = (
    cases.AttentionCase(1, 700, 2, 64, Lk=900),
    cases.AttentionCase(2, 300, 8, 40, Lk=1100, is_causal=True),
    cases.AttentionCase(1, 1500, 4, 16, Hk=2, is_causal=True),
    cases.AttentionCase(2, 650, 2, 72, Lk=1300, key_mask=True, is_causal=True),
    cases.AttentionCase(1, 90, 8, 256, Lk=400, Hk=2, bias="11"),
    cases.AttentionCase(3, 200, 4, 24, bias="B1", key_mask=True),
    cases.AttentionCase(1, 7, 2, 3),
    cases.AttentionCase(2, 33, 3, 5, is_causal=True),
    cases.AttentionCase(1, 1, 1, 1),
    cases.AttentionCase(1, 19, 2, 300, Lk=70),
)


def on_cpu(**arguments: Any) -> Tensor:
    return vk.attention(**arguments, backend="cpu")


def draws_of(
    case: cases.AttentionCase, dtype: torch.dtype, count: int = 2
) -> list[tuple[dict[str, Tensor], Any]]:
    return [(case.tensors(dtype, seed=10 * i), case.options()) for i in range(count)]


def assert_accurate(case: cases.AttentionCase, dtype: torch.dtype, results: list[dict[str, Tensor]]) -> None:
    """Each result and gradient beside eager's.

    In float32 both are sums of many roundings, in another order, and which of the two has the larger single error is
    chance: their means are compared. In bfloat16 the worst errors are.
    """
    draws = draws_of(case, dtype, len(results))
    theirs = [with_gradients(eager, tensors, **options) for tensors, options in draws]
    exact = [
        with_gradients(eager, {name: x.double() for name, x in tensors.items()}, **options)
        for tensors, options in draws
    ]
    rule = assert_typically_as_accurate if dtype == torch.float32 else assert_as_accurate
    for name in results[0]:
        assert results[0][name].dtype == dtype
        rule(
            [r[name] for r in results], [t[name] for t in theirs], [e[name] for e in exact], f"{case} {name}"
        )


# Accuracy.


@each_dtype
@pytest.mark.parametrize("case", cases.ATTENTION + LONG, ids=str)
def test_results_and_gradients_are_as_accurate_as_eager(
    case: cases.AttentionCase, dtype: torch.dtype
) -> None:
    results = [with_gradients(on_cpu, tensors, **options) for tensors, options in draws_of(case, dtype)]
    assert_accurate(case, dtype, results)


@each_dtype
@pytest.mark.parametrize("case", [MIXED, LONG[3]], ids=str)
def test_lse_and_its_gradients_are_those_of_the_reference(
    case: cases.AttentionCase, dtype: torch.dtype
) -> None:
    tensors, options = case.tensors(dtype), case.options()
    upstream = torch.randn(case.B, case.H, case.Lq, generator=torch.Generator().manual_seed(5))

    def lse_of(backend: str, **leaves: Tensor) -> Tensor:
        out, lse = vk.attention(**leaves, **options, return_lse=True, backend=backend)
        return (lse.masked_fill(lse == -INF, 0.0) * upstream.to(lse.dtype)).sum() + out.double().sum() * 0.5

    grads, lses = {}, {}
    for name, backend, dtype_of in (("ours", "cpu", dtype), ("exact", "reference", torch.float64)):
        leaves = {n: x.to(dtype_of).requires_grad_() for n, x in tensors.items()}
        grads[name] = torch.autograd.grad(lse_of(backend, **leaves), list(leaves.values()))
        lses[name] = vk.attention(**leaves, **options, return_lse=True, backend=backend)[1].detach()
    assert lses["ours"].dtype == torch.float32
    torch.testing.assert_close(lses["ours"].double(), lses["exact"], rtol=3e-7, atol=2e-6)
    # bfloat16: the result of a row is rounded to 8 bits before its gradient is taken
    tolerance = {"rtol": 1e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 4e-2}
    for ours, exact in zip(grads["ours"], grads["exact"], strict=True):
        torch.testing.assert_close(ours.double(), exact, **tolerance)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_and_layout_agrees_with_the_reference(data: st.DataObject) -> None:
    draw = data.draw
    sizes = st.integers(0, 90)
    B, Hk, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    Lq, Lk, D, Dv = draw(sizes), draw(sizes), draw(st.integers(1, 80)), draw(st.integers(1, 80))
    shapes = ((B, Lq, Hk * groups, D), (B, Lk, Hk, D), (B, Lk, Hk, Dv))
    layouts = {**cases.LAYOUTS, "dense": lambda x: x}
    q, k, v = (
        layouts[draw(st.sampled_from(sorted(layouts)))](cases.fill("normal", shape, seed=i))
        for i, shape in enumerate(shapes)
    )
    options: dict[str, Any] = {"is_causal": draw(st.booleans())}
    if draw(st.booleans()):
        options["key_mask"] = torch.rand(B, Lk, generator=torch.Generator().manual_seed(1)) < 0.6
    tensors = {"q": q, "k": k, "v": v}
    if draw(st.booleans()):
        lead = draw(st.sampled_from([(1, 1), (B, 1), (1, Hk * groups), (B, Hk * groups)]))
        tensors["bias"] = cases.fill("normal", (*lead, Lq, Lk), seed=9)

    def gradients(dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
        # the leaf is the tensor as it lies
        leaves = {name: x.to(dtype) if dtype != x.dtype else x.detach() for name, x in tensors.items()}
        leaves = {name: x.requires_grad_() for name, x in leaves.items()}
        out = vk.attention(**leaves, **options, backend=backend)
        upstream = cases.fill("normal", tuple(out.shape), torch.float64, seed=99).to(dtype)
        grads = torch.autograd.grad(out, list(leaves.values()), upstream)
        return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}

    ours, exact = gradients(torch.float32, "cpu"), gradients(torch.float64, "reference")
    for name in exact:
        # sums of at most 270 products of numbers around 1, whose weights add up to 1
        torch.testing.assert_close(ours[name].double(), exact[name], rtol=1e-5, atol=3e-5)


@each_dtype
@pytest.mark.parametrize("length", [50, 77])
def test_qkvpacked_reads_and_writes_in_place(length: int, dtype: torch.dtype) -> None:
    qkv = cases.fill("normal", (2, length, 3, 4, 16), dtype).requires_grad_()
    mask = torch.rand(2, length) < 0.7
    upstream = cases.fill("normal", (2, length, 4, 16), dtype, seed=1)
    out = vk.attention_qkvpacked(qkv, key_mask=mask, is_causal=True, backend="cpu")
    (grad,) = torch.autograd.grad(out, qkv, upstream)
    parts = [x.detach().requires_grad_() for x in qkv.unbind(2)]
    expected = vk.attention(*parts, key_mask=mask, is_causal=True, backend="cpu")
    expected_grads = torch.autograd.grad(expected, parts, upstream)
    assert torch.equal(out, expected)
    assert torch.equal(grad, torch.stack(expected_grads, 2))
    assert grad.is_contiguous()


@pytest.mark.parametrize(("L", "S"), [(7, 3), (90, 31), (5, 0)])
def test_sdpa_causal_with_more_queries_than_keys_needs_no_bias(
    L: int, S: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "ones", None)
    q, k, v = torch.randn(2, 3, L, 16), torch.randn(2, 3, S, 16), torch.randn(2, 3, S, 16)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    ours = vk.scaled_dot_product_attention(*leaves, is_causal=True)
    grads = torch.autograd.grad(ours.square().sum(), leaves)
    monkeypatch.undo()
    if S == 0:
        assert (ours == 0).all()
        return
    theirs = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*theirs, is_causal=True)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().sum(), theirs))


# Masks and special values.


@each_dtype
@pytest.mark.parametrize("values", [float("nan"), INF])
def test_hidden_keys_are_not_read(values: float, dtype: torch.dtype) -> None:
    q, k, v = (cases.fill("normal", (2, 40, 2, 16), dtype, seed) for seed in range(3))
    mask = torch.rand(2, 40) < 0.5
    expected = with_gradients(on_cpu, {"q": q, "k": k, "v": v}, key_mask=mask)
    k[~mask], v[~mask] = values, values
    ours = with_gradients(on_cpu, {"q": q, "k": k, "v": v}, key_mask=mask)
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


@each_dtype
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
def test_nan_and_infinity_spread_as_in_the_reference(value: float, which: str, dtype: torch.dtype) -> None:
    tensors = {name: cases.fill("normal", (1, 9, 2, 16), dtype, i) for i, name in enumerate("qkv")}
    tensors[which][0, 3, 1, 2] = value
    out, lse = vk.attention(**tensors, return_lse=True, backend="cpu")
    expected, expected_lse = vk.attention(**tensors, return_lse=True, backend="reference")
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(lse.isnan(), expected_lse.isnan())
    assert torch.equal(lse.isinf(), expected_lse.isinf())


@each_dtype
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("mask", [False, True])
def test_dropout_is_the_references_mask_forward_and_backward(
    mask: bool, dropout_p: float, dtype: torch.dtype
) -> None:
    L, D = 70, 24
    tensors = {name: cases.fill("normal", (2, L, 2, D), dtype, i) for i, name in enumerate("qkv")}
    options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": True}
    if mask:
        options["key_mask"] = torch.arange(2 * L).reshape(2, L) % 3 != 1

    def seeded(backend: str):
        def function(**leaves: Tensor) -> Tensor:
            torch.manual_seed(11)
            return vk.attention(**leaves, **options, backend=backend)

        return function

    exact = with_gradients(seeded("reference"), {n: x.double() for n, x in tensors.items()})
    theirs = with_gradients(seeded("reference"), tensors)
    ours = with_gradients(seeded("cpu"), tensors)
    for name in ours:
        # one weight dropped or kept otherwise is an error of 1/70 at least
        tolerance = 2e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(ours[name].double(), exact[name], rtol=tolerance, atol=tolerance)
        assert ours[name].shape == theirs[name].shape


@pytest.mark.parametrize("first", [0, 5])
def test_dropout_mask_weight_by_weight(first: int) -> None:
    q, k = torch.zeros(2, 9, 2, 8), torch.zeros(2, 61, 2, 8)
    v = torch.eye(61)[None, :, None].expand(2, 61, 2, 61)  # the result is the weights
    mask = torch.ones(2, 61, dtype=torch.bool)
    mask[:, :first] = False
    torch.manual_seed(3)
    weights = vk.attention(q, k, v, key_mask=mask, dropout_p=0.25, backend="cpu")
    torch.manual_seed(3)
    keep = reference.dropout_mask(torch.randint(2**63 - 1, (1,)), 2, 2, 9, 61, 0.25).transpose(1, 2)
    assert torch.equal(weights > 0, keep & mask[:, None, None])


# Packed sequences.


@each_dtype
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [((3, 0, 7, 1), (3, 4, 0, 9)), ((50, 197, 1), (50, 300, 700)), ((0, 0), (0, 5)), ((), ())],
    ids=str,
)
def test_varlen_has_the_bits_of_each_sequence_by_itself(
    lengths: Any, is_causal: bool, dtype: torch.dtype
) -> None:
    q, k, v, ends_q, ends_k = packed(lengths, dtype)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = vk.attention_varlen(
        *leaves, ends_q, ends_k, is_causal=is_causal, return_lse=True, backend="cpu"
    )
    upstream, upstream_lse = torch.randn_like(out), torch.randn_like(lse).masked_fill(lse == -INF, 0.0)
    grads = torch.autograd.grad((out, lse), leaves, (upstream, upstream_lse))
    assert all(torch.isfinite(g).all() for g in grads)
    for b in range(len(lengths[0])):
        in_q, in_k = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
        one = [x[None, s].detach().requires_grad_() for x, s in ((q, in_q), (k, in_k), (v, in_k))]
        one_out, one_lse = vk.attention(*one, is_causal=is_causal, return_lse=True, backend="cpu")
        expected = torch.autograd.grad(
            (one_out, one_lse), one, (upstream[None, in_q], upstream_lse[None, :, in_q])
        )
        assert torch.equal(out[in_q], one_out[0])
        assert torch.equal(lse[:, in_q], one_lse[0])
        for grad, single, place in zip(grads, expected, (in_q, in_k, in_k), strict=True):
            # a sequence by itself may be cut otherwise: the same sums in another order
            tolerance = 1e-5 if dtype == torch.float32 else 4e-2
            torch.testing.assert_close(grad[place], single[0], rtol=tolerance, atol=tolerance)


def test_varlen_dropout_counts_sequences_and_places() -> None:
    q, k, v, ends_q, ends_k = packed(((5, 0, 30), (9, 4, 30)))
    results = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(1)
        results.append(vk.attention_varlen(q, k, v, ends_q, ends_k, dropout_p=0.5, backend=backend))
    torch.testing.assert_close(*results)


# Bits and threads.


@each_dtype
@pytest.mark.parametrize("case", [MIXED, *LONG[:6], cases.AttentionCase(5, 77, 4, 64, bias="11")], ids=str)
def test_bits_do_not_depend_on_threads_or_repetition(case: cases.AttentionCase, dtype: torch.dtype) -> None:
    tensors, options = case.tensors(dtype), case.options()
    torch.set_num_threads(1)
    first = with_gradients(on_cpu, tensors, **options)
    for threads in (2, 3, 2):
        torch.set_num_threads(threads)
        again = with_gradients(on_cpu, tensors, **options)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_python_threads_do_not_disturb_each_other() -> None:
    case = cases.AttentionCase(3, 65, 4, 32)
    problems = [case.tensors(torch.float32, seed=10 * i) for i in range(4)]
    assert_undisturbed_by_threads([partial(with_gradients, on_cpu, tensors) for tensors in problems])


FORKED = """
    import os, sys, torch, cases, vlmkernels as vk
    # small enough that torch.equal does not want torch's threads, which the child has lost
    q, k, v = cases.AttentionCase(2, 65, 2, 16).tensors(torch.float32).values()
    expected = vk.attention(q, k, v, backend="cpu")
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(vk.attention(q, k, v, backend="cpu"), expected) else 3)
    print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_computes_the_same() -> None:
    assert run(FORKED).split() == ["child", "0"]


@each_dtype
def test_default_backend_is_cpu(dtype: torch.dtype) -> None:
    q, k, v = cases.AttentionCase(2, 20, 2, 16).tensors(dtype).values()
    assert torch.equal(vk.attention(q, k, v), vk.attention(q, k, v, backend="cpu"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_refused_by_name_and_served_by_the_reference(dtype: torch.dtype) -> None:
    q, k, v = cases.AttentionCase(2, 5, 2, 16).tensors(dtype).values()
    with pytest.raises(NotImplementedError, match=f"computes in float32 and bfloat16, not {dtype}"):
        vk.attention(q, k, v, backend="cpu")
    assert torch.equal(vk.attention(q, k, v), vk.attention(q, k, v, backend="reference"))


# What a call issues.


IMPLEMENTATIONS = {
    ops.attention: ops._forward,
    ops.attention_backward: ops._backward_impl,
    ops.attention_qkvpacked: ops._packed_forward,
    ops.attention_qkvpacked_backward: ops._packed_backward_impl,
    ops.attention_varlen: ops._varlen_forward,
    ops.attention_varlen_backward: ops._varlen_backward_impl,
}


@each_dtype
@pytest.mark.parametrize("kind", ["plain", "packed", "varlen"])
def test_a_call_issues_only_allocations_and_views(kind: str, dtype: torch.dtype) -> None:
    if kind == "varlen":
        q, k, v, *ends = packed(((50, 30), (50, 40)), dtype)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        upstream = torch.randn_like(q)
        with Inside(IMPLEMENTATIONS) as mode:
            out = vk.attention_varlen(*leaves, *ends, is_causal=True, backend="cpu")
            torch.autograd.grad(out, leaves, upstream)
    else:
        qkv = cases.fill("normal", (2, 50, 3, 4, 16), dtype).requires_grad_()
        bias = torch.randn(1, 4, 50, 50, requires_grad=True)
        mask = torch.rand(2, 50) < 0.7
        upstream = torch.randn(2, 50, 4, 16).to(dtype)
        leaves = [*qkv.detach().unbind(2)] if kind == "plain" else [qkv]
        leaves = [*(x.requires_grad_() for x in leaves), bias]
        function = vk.attention if kind == "plain" else vk.attention_qkvpacked
        with Inside(IMPLEMENTATIONS) as mode:
            out = function(*leaves[:-1], bias=bias, key_mask=mask, is_causal=True, backend="cpu")
            torch.autograd.grad(out, leaves, upstream)
    assert len(mode.ours) == 2
    assert set(mode.inside) <= ALLOCATIONS_AND_VIEWS


def cpu_arguments(name: str, requires_grad: bool) -> tuple[Any, ...]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, requires_grad=requires_grad)

    seed, mask = torch.tensor([7]), torch.tensor([[True, True, False], [False] * 3])
    if name == "attention":
        tensors = (
            random(2, 3, 4, 8),
            random(2, 3, 2, 8),
            random(2, 3, 2, 16),
            random(1, 4, 3, 3),
            mask,
            seed,
        )
    elif name == "attention_qkvpacked":
        tensors = (random(2, 3, 3, 4, 8), random(1, 4, 3, 3), mask, seed)
    else:
        ends = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
        tensors = (random(5, 4, 8), random(5, 2, 8), random(5, 2, 8), ends, ends.clone(), seed)
    return (*tensors, True, 0.25, 0.3, "cpu")


OPS = ("attention", "attention_qkvpacked", "attention_varlen")


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(registered_ops()[name], cpu_arguments(name, requires_grad=True))


@pytest.mark.parametrize("grad_lse", [True, False])
@pytest.mark.parametrize("name", OPS)
def test_opcheck_backward(name: str, grad_lse: bool) -> None:
    *tensors, causal, scale, dropout_p, backend = cpu_arguments(name, requires_grad=False)
    out, lse = registered_ops()[name](*tensors, causal, scale, dropout_p, backend)
    grads = (torch.randn_like(out), torch.randn_like(lse) if grad_lse else None)
    needs = {"attention": [True, False, True, True], "attention_qkvpacked": [True, True]}.get(
        name, [True, False, True]
    )
    arguments = (*grads, *tensors, out, lse, causal, scale, dropout_p, backend, needs)
    torch.library.opcheck(registered_ops()[f"{name}_backward"], arguments)


@pytest.mark.parametrize("name", ["qkvpacked", "varlen"])
def test_compiled_in_one_graph_gives_the_same(name: str) -> None:
    if name == "qkvpacked":
        function, tensors = vk.attention_qkvpacked, [torch.randn(2, 50, 3, 2, 16)]
        rest: list[Tensor] = []
    else:
        q, k, v, *rest = packed(((5, 20), (7, 20)))
        function, tensors = vk.attention_varlen, [q, k, v]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")

    def results(call: Any) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = call(*leaves, *rest, is_causal=True, backend="cpu")
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

    for ours, expected in zip(results(compiled), results(function), strict=True):
        assert torch.equal(ours, expected)


# Bounds.


GUARDED = """
    import torch
    import cases, vlmkernels as vk
    from attention_problems import packed
    from kernel_checks import GuardedAllocations, guarded
    from test_attention_cpu import IMPLEMENTATIONS, LONG

    def results(tensors, rest, function, **options):
        leaves = [x.detach().requires_grad_() for x in tensors.values()]
        out, lse = function(*leaves, *rest, **options, return_lse=True, backend="cpu")
        upstream = guarded(cases.fill("normal", tuple(out.shape), torch.float64, seed=99).to(out.dtype))
        return out, lse, *torch.autograd.grad((out, lse), leaves, (upstream, guarded(torch.ones_like(lse))))

    def attention(q, k, v, bias=None, **options):
        return vk.attention(q, k, v, bias=bias, **options)

    def compare(tensors, rest, function, **options):
        expected = results(tensors, rest, function, **options)
        tensors = {name: guarded(x) for name, x in tensors.items()}
        options = {name: guarded(x) for name, x in options.items()}
        with GuardedAllocations(IMPLEMENTATIONS) as mode:
            ours = results(tensors, [guarded(x) for x in rest], function, **options)
        assert mode.count >= 5, "no output was guarded"
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))

    for case in (*cases.ATTENTION, *LONG[4:]):
        if case.B and case.Lq and case.keys and case.Lq * case.keys < 20000:
            for dtype in (torch.float32, torch.bfloat16):
                tensors = case.tensors(dtype)
                tensors.pop("bias", None) if dtype == torch.bfloat16 and case.D == 72 else None
                compare(tensors, [], attention, **case.options())
    for dtype in (torch.float32, torch.bfloat16):
        for length in (1, 17, 50):
            for heads, width in ((1, 3), (2, 24)):
                qkv = {"qkv": cases.fill("normal", (2, length, 3, heads, width), dtype)}
                compare(qkv, [], vk.attention_qkvpacked, is_causal=True)
        q, k, v, *ends = packed(((3, 0, 50), (17, 4, 50)), dtype)
        compare({"q": q, "k": k, "v": v}, ends, vk.attention_varlen)
    print("in bounds")
"""


def test_nothing_is_read_or_written_behind_a_buffer() -> None:
    assert "in bounds" in run(GUARDED)


# Instruction sets.


EVERY_CASE = """
    import sys, torch, cases
    from attention_problems import with_gradients
    from test_attention_cpu import AT_EVERY_LEVEL, draws_of, on_cpu
    from vlmkernels import _native

    results = {}
    for i, case in enumerate(AT_EVERY_LEVEL):
        for dtype in (torch.float32, torch.bfloat16):
            results[i, dtype] = [with_gradients(on_cpu, t, **o) for t, o in draws_of(case, dtype)]
    torch.manual_seed(3)
    q, k, v = cases.AttentionCase(2, 33, 2, 16).tensors(torch.float32).values()
    dropped = vk.attention(q, k, v, dropout_p=0.4, backend="cpu")
    torch.save({"isa": _native.cpu.isa(), "results": results, "dropped": dropped}, sys.argv[1])
""".replace("import sys, torch, cases", "import sys, torch, cases, vlmkernels as vk")

AT_EVERY_LEVEL = (
    cases.AttentionCase(2, 50, 2, 64),
    cases.AttentionCase(1, 77, 3, 72, is_causal=True),
    cases.AttentionCase(1, 197, 1, 88),
    cases.AttentionCase(2, 33, 6, 24, Lk=41, Hk=2, bias="1H", key_mask=True),
    cases.AttentionCase(1, 400, 1, 40, Lk=700, is_causal=True),
    cases.AttentionCase(1, 9, 2, 5),
)


@pytest.mark.parametrize("isa", isa_levels())
def test_every_instruction_set_is_as_accurate_as_eager(isa: str, tmp_path) -> None:
    saved = saved_at(isa, EVERY_CASE, tmp_path)
    assert len(saved["results"]) == 2 * len(AT_EVERY_LEVEL)
    for (index, dtype), results in saved["results"].items():
        assert_accurate(AT_EVERY_LEVEL[index], dtype, results)
    torch.manual_seed(3)
    q, k, v = cases.AttentionCase(2, 33, 2, 16).tensors(torch.float32).values()
    torch.testing.assert_close(saved["dropped"], vk.attention(q, k, v, dropout_p=0.4, backend="reference"))


def test_operands_are_left_as_they_are() -> None:
    tensors, options = MIXED.tensors(torch.float32), MIXED.options()
    before = {name: x.clone() for name, x in tensors.items()}
    with_gradients(on_cpu, tensors, **options)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
