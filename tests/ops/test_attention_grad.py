# SPDX-License-Identifier: Apache-2.0
"""vk.attention: derivatives, transforms, registered ops, compilers, autocast."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
from attention_problems import INF, MIXED, row_by_row, with_gradients
from torch import Tensor

import vlmkernels as vk
from vlmkernels.ops._library import registered_ops


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


# inductor's own imports warn
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_inductor_gives_what_eager_gives(dropout_p: float) -> None:
    tensors, options = MIXED.tensors(torch.float32), MIXED.options()
    compiled = torch.compile(vk.attention, fullgraph=True)
    ours = with_gradients(compiled, tensors, **options, dropout_p=dropout_p)
    if dropout_p == 0:
        expected = with_gradients(vk.attention, tensors, **options)
        for name in ours:
            torch.testing.assert_close(ours[name], expected[name])
    else:
        torch.manual_seed(5)
        first = compiled(**tensors, **options, dropout_p=dropout_p)
        torch.manual_seed(5)
        assert torch.equal(compiled(**tensors, **options, dropout_p=dropout_p), first)
