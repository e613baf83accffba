# SPDX-License-Identifier: Apache-2.0
"""vk.attention and its family: the definition, accuracy, masks, dropout, packed sequences, torch's signature."""

from __future__ import annotations

import doctest
import importlib
import math
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate
from torch import Tensor

import vlmkernels as vk
from vlmkernels.ops._library import registered_ops
from vlmkernels.ops.reference import attention as reference

INF = float("inf")
CASES = pytest.mark.parametrize("case", cases.ATTENTION, ids=str)

#: A little of everything: grouped heads, a bias with -inf, a key mask that hides one entry, causal.
MIXED = cases.AttentionCase(3, 4, 4, 8, Lk=5, Hk=2, bias="1H", key_mask=True, is_causal=True)


def row_by_row(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The definition once more, one query at a time over the keys that it may see."""
    B, Lq, H, D = q.shape
    Lk, Hk = k.shape[1:3]
    mask = options.get("key_mask", torch.ones(B, Lk, dtype=torch.bool))
    out, lse = torch.zeros(B, Lq, H, v.shape[-1], dtype=q.dtype), torch.full((B, H, Lq), -INF, dtype=q.dtype)
    for b in range(B):
        for h in range(H):
            for i in range(Lq):
                seen = [
                    j for j in range(Lk) if mask[b, j] and (not options.get("is_causal") or j <= i + Lk - Lq)
                ]
                scores = [q[b, i, h] @ k[b, j, h // (H // Hk)] * D**-0.5 for j in seen]
                if bias is not None:
                    full = bias.expand(B, H, Lq, Lk)
                    scores = [s + full[b, h, i, j] for s, j in zip(scores, seen, strict=True)]
                total = sum(s.exp() for s in scores)
                if not scores or total == 0:
                    continue
                weights = [s.exp() / total for s in scores]
                out[b, i, h] = sum(w * v[b, j, h // (H // Hk)] for w, j in zip(weights, seen, strict=True))
                lse[b, h, i] = total.log()
    return out, lse


def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """What a user of torch writes, in the inputs' dtype."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q * q.shape[-1] ** -0.5, k)
    scores = scores if bias is None else scores + bias
    if "key_mask" in options:
        scores = scores.masked_fill(~options["key_mask"][:, None, None], -INF)
    if options.get("is_causal"):
        Lq, Lk = scores.shape[-2:]
        scores = scores.masked_fill(~torch.ones(Lq, Lk, dtype=torch.bool).tril(Lk - Lq), -INF)
    hidden = (scores == -INF).all(-1, keepdim=True)
    weights = scores.masked_fill(hidden, 0.0).softmax(-1).masked_fill(hidden, 0.0)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def with_gradients(function: Any, tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The result of a call, and the gradients of its tensors for a fixed random gradient of the result."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    out = function(**leaves, **options)
    upstream = cases.fill("normal", tuple(out.shape), torch.float64, seed=99).to(out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), upstream)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


# The definition.


@pytest.mark.parametrize(
    "case",
    [
        MIXED,
        cases.AttentionCase(1, 3, 2, 8),
        cases.AttentionCase(2, 4, 2, 8, Lk=2, is_causal=True),
        cases.AttentionCase(2, 2, 2, 8, Lk=4, is_causal=True),
        cases.AttentionCase(2, 3, 2, 8, key_mask=True),
        cases.AttentionCase(2, 3, 2, 8, bias="B1"),
    ],
    ids=str,
)
def test_reference_is_the_definition_row_by_row(case: cases.AttentionCase) -> None:
    tensors, options = case.tensors(torch.float64), case.options()
    out, lse = vk.attention(**tensors, **options, return_lse=True, backend="reference")
    expected_out, expected_lse = row_by_row(**tensors, **options)
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@CASES
def test_results_and_gradients_are_as_accurate_as_eager(
    case: cases.AttentionCase, dtype: torch.dtype
) -> None:
    tensors, options = case.tensors(dtype), case.options()
    ours = with_gradients(vk.attention, tensors, **options)
    same_dtype = with_gradients(eager, tensors, **options)
    exact = with_gradients(eager, {name: x.double() for name, x in tensors.items()}, **options)
    for name in ours:
        assert ours[name].dtype == dtype
        assert_as_accurate(ours[name], same_dtype[name], exact[name], name)


@CASES
def test_the_registered_op_gives_what_the_reference_gives(case: cases.AttentionCase) -> None:
    tensors, options = case.tensors(torch.float32), case.options()
    bias, key_mask = tensors.get("bias"), options.get("key_mask")

    def op(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = bias) -> Tensor:
        arguments = (bias, key_mask, None, case.is_causal, case.D**-0.5, 0.0, "reference")
        return torch.ops.vlmkernels.attention(q, k, v, *arguments)[0]

    ours, expected = with_gradients(op, tensors), with_gradients(vk.attention, tensors, **options)
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], rtol=0, atol=0)


def test_scale_multiplies_the_scores() -> None:
    q, k, v = cases.AttentionCase(2, 7, 2, 16).tensors(torch.float64).values()
    expected = vk.attention(q * 0.3 * 4, k, v)
    torch.testing.assert_close(vk.attention(q, k, v, scale=0.3), expected)


def test_qkvpacked_is_attention_of_the_three_parts() -> None:
    qkv = torch.randn(2, 50, 3, 4, 16)
    mask = torch.rand(2, 50) < 0.7
    out, lse = vk.attention_qkvpacked(qkv, key_mask=mask, is_causal=True, return_lse=True)
    expected = vk.attention(*qkv.unbind(2), key_mask=mask, is_causal=True, return_lse=True)
    torch.testing.assert_close((out, lse), expected, rtol=0, atol=0)


def test_values_may_be_wider_than_keys() -> None:
    q, k, v = torch.randn(2, 5, 2, 8), torch.randn(2, 6, 2, 8), torch.randn(2, 6, 2, 24)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(vk.attention(q, k, v), expected)


def test_result_is_contiguous_and_owns_its_memory() -> None:
    q, k, v = torch.randn(3, 2, 9, 4, 16).unbind(0)
    out = vk.attention(q, k, v)
    assert out.is_contiguous()
    assert out.view(2, 9, 64).shape == (2, 9, 64)
    assert out.untyped_storage().data_ptr() not in {x.untyped_storage().data_ptr() for x in (q, k, v)}


def test_result_has_the_same_bits_every_time() -> None:
    tensors, options = MIXED.tensors(torch.float32), MIXED.options()
    first, second = (with_gradients(vk.attention, tensors, **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# Layouts and values.


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_strides_do_not_matter(layout: str) -> None:
    case = cases.AttentionCase(3, 17, 4, 24, Lk=33, Hk=2, bias="BH", key_mask=True)
    tensors = {name: cases.LAYOUTS[layout](x) for name, x in case.tensors(torch.float32).items()}
    mask = cases.LAYOUTS[layout](case.options()["key_mask"])
    dense = {name: x.contiguous() for name, x in tensors.items()}
    expected = vk.attention(**dense, key_mask=mask.contiguous())
    torch.testing.assert_close(vk.attention(**tensors, key_mask=mask), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", cases.VALUES)
def test_extreme_values(kind: str, dtype: torch.dtype) -> None:
    q, k, v = (cases.fill(kind, (2, 33, 2, 64), dtype, seed) for seed in range(3))
    out = vk.attention(q, k, v)
    exact = vk.attention(q.double(), k.double(), v.double(), backend="reference")
    assert_as_accurate(out, eager(q, k, v), exact)


def test_a_nan_reaches_what_depends_on_it_and_nothing_else() -> None:
    q, k, v = torch.randn(3, 2, 5, 2, 8).unbind(0)
    q[0, 3, 1, 0] = math.nan
    out, lse = vk.attention(q, k, v, return_lse=True)
    assert out[0, 3, 1].isnan().all()
    assert lse[0, 1, 3].isnan()
    assert out.isnan().sum() == 8
    assert lse.isnan().sum() == 1


@pytest.mark.parametrize(("B", "Lq", "Lk"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (0, 0, 0)])
def test_empty_sizes_give_zero_results_and_gradients(B: int, Lq: int, Lk: int) -> None:
    q = torch.randn(B, Lq, 2, 8, requires_grad=True)
    k, v = (torch.randn(B, Lk, 2, 8, requires_grad=True) for _ in range(2))
    out, lse = vk.attention(q, k, v, return_lse=True)
    out.sum().backward()
    assert out.shape == (B, Lq, 2, 8)
    assert lse.shape == (B, 2, Lq)
    assert (lse == -INF).all()
    for x in (out, q.grad, k.grad, v.grad):
        assert (x == 0).all()


# Masks, causality, bias.


@pytest.mark.parametrize(("Lq", "Lk"), [(4, 4), (2, 5), (5, 2)])
def test_causal_is_aligned_to_the_end(Lq: int, Lk: int) -> None:
    q, k, v = torch.zeros(1, Lq, 1, Lk), torch.zeros(1, Lk, 1, Lk), torch.eye(Lk)[None, :, None]
    seen = vk.attention(q, k, v, is_causal=True)[0, :, 0] > 0
    assert torch.equal(seen, torch.ones(Lq, Lk, dtype=torch.bool).tril(Lk - Lq))


@pytest.mark.parametrize("hidden_by", ["key_mask", "bias", "causal"])
def test_a_query_without_keys_gives_zero_and_has_zero_gradient(hidden_by: str) -> None:
    q, k, v = torch.randn(3, 2, 4, 2, 8).unbind(0)
    options: dict[str, Any] = {}
    tensors = {"q": q, "k": k, "v": v}
    if hidden_by == "key_mask":
        options["key_mask"] = torch.tensor([[True] * 4, [False] * 4])
        hidden = (slice(1, 2), slice(None))
    elif hidden_by == "bias":
        tensors["bias"] = torch.zeros(1, 1, 4, 4)
        tensors["bias"][..., 1, :] = -INF
        hidden = (slice(None), slice(1, 2))
    else:
        tensors |= {"k": k[:, :2], "v": v[:, :2]}
        options["is_causal"] = True
        hidden = (slice(None), slice(0, 2))
    results = with_gradients(vk.attention, tensors, **options)
    lse = vk.attention(**tensors, **options, return_lse=True)[1].transpose(1, 2)
    assert (results["out"][hidden] == 0).all()
    assert (results["q"][hidden] == 0).all()
    assert (lse[hidden] == -INF).all()
    assert all(x.isfinite().all() for x in results.values())
    if hidden_by == "key_mask":
        assert (results["k"][hidden] == 0).all()
        assert (results["v"][hidden] == 0).all()
    if hidden_by == "bias":
        assert (results["bias"][..., 1, :] == 0).all()


def test_key_mask_is_the_same_as_leaving_the_keys_out() -> None:
    q, k, v = torch.randn(3, 1, 9, 2, 16).unbind(0)
    mask = torch.arange(9)[None] % 2 == 0
    torch.testing.assert_close(vk.attention(q, k, v, key_mask=mask), vk.attention(q, k[:, ::2], v[:, ::2]))


@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_bias_gradient_has_the_shape_of_the_bias(lead: tuple[int, int]) -> None:
    q, k, v = torch.randn(3, 2, 5, 3, 8, dtype=torch.float64).unbind(0)
    bias = torch.randn(*lead, 5, 5, dtype=torch.float64, requires_grad=True)
    full = bias.detach().expand(2, 3, 5, 5).clone().requires_grad_()
    vk.attention(q, k, v, bias=bias).square().sum().backward()
    vk.attention(q, k, v, bias=full).square().sum().backward()
    assert bias.grad.shape == bias.shape
    torch.testing.assert_close(bias.grad, full.grad.sum_to_size(bias.shape))


def test_float32_bias_serves_half_inputs_and_keeps_its_dtype() -> None:
    q, k, v = torch.randn(3, 2, 5, 3, 8, dtype=torch.bfloat16).unbind(0)
    bias = torch.randn(1, 3, 5, 5, requires_grad=True)
    out = vk.attention(q, k, v, bias=bias)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert bias.grad.dtype == torch.float32


# Log-sum-exp.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_lse_dtype_and_value(dtype: torch.dtype) -> None:
    q, k, v = cases.AttentionCase(2, 7, 4, 16, Lk=9, Hk=2).tensors(dtype).values()
    lse = vk.attention(q, k, v, return_lse=True)[1]
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double().repeat_interleave(2, 2)) / 4
    # float32 sums of 16 products of numbers around 1
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=2e-6)


def test_lse_combines_two_halves_of_the_keys() -> None:
    q, k, v = torch.randn(3, 2, 8, 2, 16, dtype=torch.float64).unbind(0)
    (out1, lse1), (out2, lse2) = (
        vk.attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(3), slice(3, 8))
    )
    lse = torch.logaddexp(lse1, lse2)
    weights = ((part - lse).exp().transpose(1, 2)[..., None] for part in (lse1, lse2))
    combined = sum(w * o for w, o in zip(weights, (out1, out2), strict=True))
    torch.testing.assert_close(combined, vk.attention(q, k, v))


# Derivatives, transforms, compilation.


@pytest.mark.parametrize(
    "case",
    [MIXED, cases.AttentionCase(2, 3, 2, 8), cases.AttentionCase(2, 4, 2, 8, Lk=2, is_causal=True)],
    ids=str,
)
def test_gradcheck(case: cases.AttentionCase) -> None:
    tensors = {name: x.requires_grad_() for name, x in case.tensors(torch.float64).items()}
    visible = row_by_row(**{n: x.detach() for n, x in tensors.items()}, **case.options())[1] > -INF

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(tensors, values, strict=True))
        out, lse = vk.attention(**named, **case.options(), return_lse=True, backend="reference")
        return out, lse[visible]  # -inf has no finite difference

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


def test_gradgradcheck_on_the_reference() -> None:
    case = cases.AttentionCase(2, 2, 2, 8, Lk=3, Hk=1, bias="11", key_mask=True)
    tensors = tuple(x.requires_grad_() for x in case.tensors(torch.float64).values())

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return vk.attention(q, k, v, bias=bias, **case.options(), backend="reference")

    assert torch.autograd.gradgradcheck(function, tensors)


def test_gradient_of_the_registered_op_through_both_outputs() -> None:
    tensors = tuple(
        x.requires_grad_() for x in cases.AttentionCase(2, 3, 2, 8, Hk=1).tensors(torch.float64).values()
    )

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.vlmkernels.attention(q, k, v, None, None, None, True, 0.3, 0.0, "reference")

    assert torch.autograd.gradcheck(function, tensors)
    only_lse = torch.autograd.grad(function(*tensors)[1].sum(), tensors, allow_unused=True)
    assert (only_lse[2] == 0).all()
    assert (only_lse[0] != 0).any()


def test_second_derivative_of_the_registered_op_is_refused() -> None:
    q, k, v = (torch.randn(1, 3, 2, 8, requires_grad=True) for _ in range(3))
    out, _ = torch.ops.vlmkernels.attention(q, k, v, None, None, None, False, 0.3, 0.0, "reference")
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(
        NotImplementedError, match=r"attention_backward.*backend=\"reference\" to vk\.attention"
    ):
        grad.sum().backward()


def test_vmap_works_by_default_and_is_refused_by_the_registered_op() -> None:
    q, k, v = torch.randn(3, 4, 2, 5, 2, 8).unbind(0)
    mask = torch.rand(4, 2, 5) < 0.6

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return vk.attention(q, k, v, key_mask=mask, is_causal=True)

    one_by_one = torch.stack([function(*x) for x in zip(q, k, v, mask, strict=True)])
    torch.testing.assert_close(torch.vmap(function)(q, k, v, mask), one_by_one)
    with pytest.raises(NotImplementedError, match="vlmkernels::attention"):
        torch.vmap(
            lambda x: torch.ops.vlmkernels.attention(x, x, x, None, None, None, False, 1.0, 0.0, "cpu")
        )(q)


def op_arguments(name: str, requires_grad: bool) -> tuple[Any, ...]:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, requires_grad=requires_grad)

    seed = torch.tensor([7])
    if name == "attention":
        mask = torch.tensor([[True, True, False], [False] * 3])
        tensors = (
            random(2, 3, 4, 8),
            random(2, 3, 2, 8),
            random(2, 3, 2, 16),
            random(1, 4, 3, 3),
            mask,
            seed,
        )
    else:
        ends = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
        tensors = (random(5, 4, 8), random(5, 2, 8), random(5, 2, 8), ends, ends.clone(), seed)
    return (*tensors, True, 0.25, 0.3, "reference")


@pytest.mark.parametrize("name", ["attention", "attention_varlen"])
def test_opcheck(name: str) -> None:
    torch.library.opcheck(registered_ops()[name], op_arguments(name, requires_grad=True))


@pytest.mark.parametrize("grad_lse", [True, False])
@pytest.mark.parametrize("name", ["attention", "attention_varlen"])
def test_opcheck_backward(name: str, grad_lse: bool) -> None:
    *tensors, causal, scale, dropout_p, backend = op_arguments(name, requires_grad=False)
    out, lse = registered_ops()[name](*tensors, causal, scale, dropout_p, backend)
    grads = (torch.randn_like(out), torch.randn_like(lse) if grad_lse else None)
    needs = [True, False, True, True] if name == "attention" else [True, False, True]
    arguments = (*grads, *tensors, out, lse, causal, scale, dropout_p, backend, needs)
    torch.library.opcheck(registered_ops()[f"{name}_backward"], arguments)


def test_compile_fullgraph_without_recompiling_for_new_sizes() -> None:
    compilations = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal compilations
        compilations += 1
        return graph

    def step(qkv: Tensor, mask: Tensor) -> Tensor:
        return vk.attention_qkvpacked(qkv, key_mask=mask, is_causal=True).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend=count, dynamic=True)
    # no two sizes alike at first: the compiler would take them for one
    for B, L in ((5, 7), (3, 9), (4, 50), (6, 77)):
        qkv, mask = torch.randn(B, L, 3, 2, 16), torch.rand(B, L) < 0.8
        torch.testing.assert_close(compiled(qkv, mask), step(qkv, mask))
    assert compilations == 1


def test_compiled_gradients_are_those_of_eager() -> None:
    tensors, options = MIXED.tensors(torch.float32), MIXED.options()
    compiled = torch.compile(vk.attention, fullgraph=True, backend="aot_eager")
    ours, expected = (
        with_gradients(compiled, tensors, **options),
        with_gradients(vk.attention, tensors, **options),
    )
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name])


def test_compiled_registered_op_stays_one_op() -> None:
    targets: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    def call(q: Tensor) -> Tensor:
        return torch.ops.vlmkernels.attention(q, q, q, None, None, None, False, 0.3, 0.0, "reference")[0]

    q = torch.randn(2, 5, 2, 8)
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend=look)(q), call(q))
    assert targets[0] == "vlmkernels.attention"


def test_export() -> None:
    class Module(torch.nn.Module):
        def forward(self, qkv: Tensor) -> Tensor:
            return vk.attention_qkvpacked(qkv, is_causal=True)

    qkv = torch.randn(2, 7, 3, 2, 8)
    exported = torch.export.export(Module(), (qkv,)).module()
    torch.testing.assert_close(exported(qkv), vk.attention_qkvpacked(qkv, is_causal=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_casts_the_operands_and_sums_in_float32(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(2, 5, 2, 8, dtype=dtype), torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = vk.attention(q, k, v, return_lse=True)
    expected = vk.attention(*(x.to(torch.bfloat16) for x in (q, k, v)), return_lse=True)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    torch.testing.assert_close((out, lse), expected, rtol=0, atol=0)


def test_float64_ignores_autocast() -> None:
    q, k, v = torch.randn(3, 2, 5, 2, 8, dtype=torch.float64).unbind(0)
    with torch.autocast("cpu", torch.bfloat16):
        out = vk.attention(q, k, v)
    torch.testing.assert_close(out, vk.attention(q, k, v), rtol=0, atol=0)


# Dropout.


def test_philox_known_answers() -> None:
    """The first two vectors that the authors of Random123 publish for philox4x32-10."""
    zero, ones = torch.zeros(1, dtype=torch.int64), torch.full((1,), 0xFFFFFFFF)
    words = torch.cat(reference.philox(zero, zero, zero, zero, zero)).tolist()
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    words = torch.cat(reference.philox(torch.tensor([-1]), ones, ones, ones, ones)).tolist()
    assert words == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_dropout_mask_is_a_function_of_seed_and_place() -> None:
    seed = torch.tensor([123456789012345])
    mask = reference.dropout_mask(seed, 3, 2, 7, 9, 0.4)
    assert torch.equal(mask[1:, :, :5, :6], reference.dropout_mask(seed, 2, 2, 5, 6, 0.4, first_batch=1))
    assert not torch.equal(mask, reference.dropout_mask(seed + 1, 3, 2, 7, 9, 0.4))


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_dropout_keeps_the_right_share_of_weights(dropout_p: float) -> None:
    mask = reference.dropout_mask(torch.tensor([123456789012345]), 4, 4, 128, 128, dropout_p)
    deviation = math.sqrt(dropout_p * (1 - dropout_p) / mask.numel())
    assert abs((~mask).double().mean().item() - dropout_p) < 4 * deviation
    # no structure along any dimension: means over the others stay within five deviations of a mean of that many
    for dim in range(4):
        means = (~mask).double().mean([d for d in range(4) if d != dim])
        count = mask.numel() // mask.shape[dim]
        assert (means - dropout_p).abs().max() < 5 * math.sqrt(dropout_p * (1 - dropout_p) / count)


def test_dropout_drops_weights_and_rescales_the_rest() -> None:
    q, k = torch.randn(2, 6, 2, 8), torch.randn(2, 6, 2, 8)
    v = torch.eye(6)[None, :, None].expand(2, 6, 2, 6)  # the result is the weights
    weights = vk.attention(q, k, v)
    torch.manual_seed(3)
    dropped, lse = vk.attention(q, k, v, dropout_p=0.25, return_lse=True)
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,))
    keep = reference.dropout_mask(seed, 2, 2, 6, 6, 0.25).transpose(1, 2)
    torch.testing.assert_close(dropped, weights * keep / 0.75)
    torch.testing.assert_close(lse, vk.attention(q, k, v, return_lse=True)[1])
    assert 0 < (~keep).sum() < keep.numel()


@pytest.mark.parametrize("path", ["reference", "op"])
def test_dropout_backward_sees_the_same_mask(path: str) -> None:
    q, k, v = (torch.randn(1, 4, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def function(*tensors: Tensor) -> Tensor:
        torch.manual_seed(11)
        if path == "reference":
            return vk.attention(*tensors, dropout_p=0.4, backend="reference")
        seed = torch.tensor([11])
        return torch.ops.vlmkernels.attention(*tensors, None, None, seed, False, 0.3, 0.4, "reference")[0]

    assert torch.autograd.gradcheck(function, (q, k, v))


def test_dropout_follows_manual_seed_and_moves_on_with_every_call() -> None:
    q, k, v = torch.randn(3, 2, 9, 2, 8).unbind(0)
    torch.manual_seed(0)
    first, second = (vk.attention(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(0)
    again = vk.attention(q, k, v, dropout_p=0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_dropout_of_everything_gives_zero() -> None:
    q, k, v = (torch.randn(2, 3, 2, 8, requires_grad=True) for _ in range(3))
    out = vk.attention(q, k, v, dropout_p=1.0)
    out.sum().backward()
    assert (out == 0).all()
    assert all((x.grad == 0).all() for x in (q, k, v))


def test_no_dropout_leaves_the_generator_alone() -> None:
    q, k, v = torch.randn(3, 1, 2, 1, 8).unbind(0)
    state = torch.get_rng_state()
    vk.attention(q, k, v)
    assert torch.equal(torch.get_rng_state(), state)


# Packed sequences.


LENGTHS = [((3, 0, 7, 1), (3, 4, 0, 9)), ((50, 77), (50, 77)), ((0, 0), (0, 5)), ((5,), (2,)), ((), ())]


def packed(
    lengths: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    ends = [torch.tensor([0, *x], dtype=torch.int32).cumsum(0, dtype=torch.int32) for x in lengths]
    q = torch.randn(sum(lengths[0]), 4, 16, dtype=dtype)
    k, v = torch.randn(2, sum(lengths[1]), 2, 16, dtype=dtype).unbind(0)
    return q, k, v, *ends


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
def test_varlen_refuses_bad_boundaries_and_gives_nan_where_they_cannot_be_read(
    values: list[int], message: str
) -> None:
    x = torch.randn(5, 2, 8)
    good = torch.tensor([0] * (len(values) - 1) + [5])
    with pytest.raises(ValueError, match=rf"vk\.attention_varlen: {message}"):
        vk.attention_varlen(x, x, x, good, torch.tensor(values))
    compiled = torch.compile(vk.attention_varlen, fullgraph=True, backend="eager")
    assert compiled(x, x, x, good, torch.tensor(values)).isnan().all()


# torch's signature.


def torch_and_ours(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return F.scaled_dot_product_attention(*arguments, **options), vk.scaled_dot_product_attention(
        *arguments, **options
    )


@pytest.mark.parametrize("shape", [(5, 16), (3, 5, 16), (2, 3, 5, 16), (2, 1, 3, 5, 16)], ids=str)
def test_sdpa_takes_any_number_of_leading_dimensions(shape: tuple[int, ...]) -> None:
    q, k, v = torch.randn(3, *shape).unbind(0)
    theirs, ours = torch_and_ours(q, k, v, scale=0.3)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("L", "S"), [(5, 5), (3, 7), (7, 3)])
def test_sdpa_causal_is_aligned_to_the_start(L: int, S: int) -> None:
    q, k, v = torch.randn(2, 3, L, 16), torch.randn(2, 3, S, 16), torch.randn(2, 3, S, 16)
    torch.testing.assert_close(*torch_and_ours(q, k, v, is_causal=True))


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize(
    "shape",
    [(4, 6), (1, 6), (6,), (2, 1, 1, 6), (1, 1, 1, 6), (2, 3, 4, 6), (3, 4, 6), (2, 1, 4, 1)],
    ids=str,
)
def test_sdpa_masks_broadcast_as_in_torch(shape: tuple[int, ...], boolean: bool) -> None:
    q, k, v = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 6, 16), torch.randn(2, 3, 6, 16)
    mask = torch.randn(shape)
    if boolean:
        mask = mask < 0.8
        mask.view(-1)[0] = True
    # torch itself takes some of these shapes only where the mask is bool
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(2, 3, 4, 6))
    torch.testing.assert_close(vk.scaled_dot_product_attention(q, k, v, attn_mask=mask), theirs)


def test_sdpa_mask_of_other_ranks() -> None:
    q, k, v = torch.randn(3, 2, 2, 3, 5, 16).unbind(0)
    mask = torch.randn(2, 1, 1, 5, 5)
    torch.testing.assert_close(*torch_and_ours(q, k, v, attn_mask=mask))
    q, k, v = torch.randn(3, 3, 5, 16).unbind(0)
    torch.testing.assert_close(*torch_and_ours(q, k, v, attn_mask=torch.rand(3, 1, 5) < 0.7))


def test_sdpa_mask_gradient() -> None:
    q, k, v = torch.randn(3, 2, 3, 5, 16).unbind(0)
    masks = [torch.randn(2, 1, 1, 5, requires_grad=True)]
    masks.append(masks[0].detach().clone().requires_grad_())
    F.scaled_dot_product_attention(q, k, v, attn_mask=masks[0]).square().sum().backward()
    vk.scaled_dot_product_attention(q, k, v, attn_mask=masks[1]).square().sum().backward()
    torch.testing.assert_close(masks[1].grad, masks[0].grad)


def test_sdpa_grouped_heads_need_enable_gqa() -> None:
    q, k, v = torch.randn(2, 6, 5, 16), torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16)
    torch.testing.assert_close(*torch_and_ours(q, k, v, enable_gqa=True))
    with pytest.raises(ValueError, match=r"vk\.scaled_dot_product_attention: .* enable_gqa"):
        vk.scaled_dot_product_attention(q, k, v)


def test_sdpa_query_that_sees_nothing_gives_zero() -> None:
    q, k, v = torch.randn(3, 1, 2, 3, 8).unbind(0)
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[1] = False
    out = vk.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert (out[:, :, 1] == 0).all()
    assert (out[:, :, 0] != 0).all()


# Refusals.

Q, K = torch.zeros(2, 77, 16, 64), torch.zeros(2, 77, 6, 64)
BAD_CALLS: list[tuple[Any, type[Exception], str]] = [
    (
        lambda: vk.attention(Q, K, K),
        ValueError,
        r"k has 6 heads, which does not divide q's 16 \(q \[2, 77, 16, 64\], k \[2, 77, 6, 64\]\)",
    ),
    (lambda: vk.attention([1], Q, Q), TypeError, "q must be a tensor, got list"),
    (lambda: vk.attention(Q.int(), Q, Q), TypeError, r"q must be floating \(.*\), got torch.int32"),
    (lambda: vk.attention(Q[0], Q, Q), ValueError, r"q must be \[B, L, H, D\], got \[77, 16, 64\]"),
    (lambda: vk.attention(Q.half(), Q, Q), TypeError, r"q, k and v must have one dtype .*q torch.float16"),
    (lambda: vk.attention(Q.to("meta"), Q, Q), ValueError, "must be on one device, got q meta, k cpu, v cpu"),
    (lambda: vk.attention(Q, Q[:1], Q[:1]), ValueError, "must have one batch size"),
    (lambda: vk.attention(Q, Q, Q[:, :5]), ValueError, "k and v must have one length"),
    (lambda: vk.attention(Q, Q, K), ValueError, "k and v must have the same number of heads"),
    (lambda: vk.attention(Q, Q[..., :8], Q), ValueError, "q and k must have one head dim"),
    (lambda: vk.attention(*[Q[..., :0]] * 3), ValueError, "the head dim must be at least 1"),
    (
        lambda: vk.attention(Q, Q, Q, bias=Q[0, :, 0].bool()),
        TypeError,
        "bias must be floating, got torch.bool",
    ),
    (
        lambda: vk.attention(Q, Q, Q, bias=Q.half()),
        TypeError,
        "bias must be torch.float32, got torch.float16",
    ),
    (
        lambda: vk.attention(Q, Q, Q, bias=torch.zeros(2, 3, 77, 77)),
        ValueError,
        r"bias must be \[B\|1, H\|1, Lq, Lk\] of \[2, 16, 77, 77\], got \[2, 3, 77, 77\]",
    ),
    (lambda: vk.attention(Q, Q, Q, bias=Q[0]), ValueError, r"bias must be \[B\|1, H\|1, Lq, Lk\], got"),
    (
        lambda: vk.attention(Q, Q, Q, key_mask=torch.ones(2, 77)),
        TypeError,
        "key_mask must be bool, got torch.float32",
    ),
    (
        lambda: vk.attention(Q, Q, Q, key_mask=torch.ones(2, 7, dtype=torch.bool)),
        ValueError,
        r"key_mask must be \[B, Lk\] = \[2, 77\], got \[2, 7\]",
    ),
    (lambda: vk.attention(Q, Q, Q, is_causal=1), TypeError, "is_causal must be a bool, got 1"),
    (lambda: vk.attention(Q, Q, Q, dropout_p=1.5), ValueError, r"dropout_p must be in \[0, 1\], got 1.5"),
    (lambda: vk.attention(Q, Q, Q, scale="big"), TypeError, "scale must be a number, got str"),
    (
        lambda: vk.attention(Q, Q, Q, backend="fast"),
        ValueError,
        "backend must be None or one of .*, got 'fast'",
    ),
    (
        lambda: vk.attention(Q, Q, Q, backend="cuda"),
        NotImplementedError,
        "backend 'cuda' cannot serve this call: ",
    ),
    (lambda: vk.attention_qkvpacked(Q), ValueError, r"qkv must be \[B, L, 3, H, D\], got"),
    (lambda: vk.attention_qkvpacked(Q[:, :, None]), ValueError, r"qkv must be .*, got \[2, 77, 1, 16, 64\]"),
    (lambda: vk.attention_varlen(Q, Q, Q, Q, Q), ValueError, r"q must be \[T, H, D\], got"),
    (
        lambda: vk.attention_varlen(Q[0], Q[0], Q[0], Q, Q),
        TypeError,
        "cu_seqlens_q must be int32 or int64, got torch.float32",
    ),
    (
        lambda: vk.attention_varlen(Q[0], Q[0], Q[0], torch.tensor([0, 77]), torch.tensor([0, 7, 77])),
        ValueError,
        r"must count the same sequences \(cu_seqlens_q \[2\], cu_seqlens_k \[3\]\)",
    ),
    (
        lambda: vk.scaled_dot_product_attention(Q, Q, Q, Q[0, 0, 0] > 0, is_causal=True),
        ValueError,
        "attn_mask and is_causal exclude each other",
    ),
    (
        lambda: vk.scaled_dot_product_attention(Q, Q, Q, torch.ones(3, 16)),
        ValueError,
        r"attn_mask must broadcast to \[2, 77, 16, 16\], got \[3, 16\]",
    ),
    (
        lambda: vk.scaled_dot_product_attention(Q, Q[0], Q),
        ValueError,
        "must have the same number of dimensions",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS, ids=[m[:40] for _, _, m in BAD_CALLS])
def test_bad_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^vk\.(attention\w*|scaled_dot_product_attention): .*{message}"):
        call()


def test_fake_refuses_what_the_public_function_refuses() -> None:
    with (
        torch._subclasses.FakeTensorMode(),
        pytest.raises(ValueError, match="k has 6 heads, which does not divide"),
    ):
        q, k = torch.empty(2, 7, 16, 8), torch.empty(2, 7, 6, 8)
        torch.ops.vlmkernels.attention(q, k, k, None, None, None, False, 1.0, 0.0, "reference")


def test_examples_in_the_docstrings() -> None:
    module = importlib.import_module("vlmkernels.ops.attention")
    results = doctest.testmod(module, extraglobs={"torch": torch, "vk": vk})
    assert results.attempted >= 8
    assert results.failed == 0
