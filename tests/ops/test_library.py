# SPDX-License-Identifier: Apache-2.0
"""register_op and its helpers: schema, fake, gradient, refusals, recomputed gradients, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vlmkernels.ops import _library
from vlmkernels.ops._library import (
    autocast_dtype,
    differentiate,
    follow_autocast,
    like_inputs,
    no_autocast,
    register_op,
    registered_ops,
)


def scaled(x: Tensor, weight: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """A small op with an optional tensor, an option and two outputs."""
    y = x if weight is None else x * weight
    return (y * scale).sin(), y.square().sum(-1)


def _fake(x: Tensor, weight: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, ctx.scale = inputs
    ctx.save_for_backward(x, weight)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, grad_sum: Tensor | None) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:2])
    grads = scaled_backward(grad_y, grad_sum, *ctx.saved_tensors, ctx.scale, needs)
    grad_x, grad_weight = (g if need else None for g, need in zip(grads, needs, strict=True))
    return grad_x, grad_weight, None  # scale


def _backward_impl(
    grad_y: Tensor | None,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    return differentiate(lambda x, w: scaled(x, w, scale), (x, weight), (grad_y, grad_sum), needs)


scaled_backward = register_op(
    "test_scaled_backward",
    "(Tensor? grad_y, Tensor? grad_sum, Tensor x, Tensor? weight, float scale, bool[] needs) -> (Tensor, Tensor)",
    fake=lambda grad_y, grad_sum, x, weight, scale, needs: like_inputs((x, weight), needs),
    impl=_backward_impl,
)
scaled_op = register_op(
    "test_scaled",
    "(Tensor x, Tensor? weight, float scale) -> (Tensor, Tensor)",
    fake=_fake,
    impl=scaled,
    setup_context=_setup,
    backward=_backward,
)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(4, dtype=torch.float64, requires_grad=True)


def test_op_has_its_name_and_its_implementation(x: Tensor, weight: Tensor) -> None:
    assert str(scaled_op) == "vlmkernels.test_scaled.default"
    assert registered_ops()["test_scaled"] is scaled_op
    assert torch.equal(torch.ops.vlmkernels.test_scaled(x, weight, 2.0)[0], scaled(x, weight, 2.0)[0])


@pytest.mark.parametrize("with_weight", [True, False])
def test_opcheck(x: Tensor, weight: Tensor, with_weight: bool) -> None:
    torch.library.opcheck(scaled_op, (x, weight if with_weight else None, 2.0))
    detached = (x.detach(), weight.detach() if with_weight else None)
    torch.library.opcheck(
        scaled_backward, (torch.randn(3, 4).double(), None, *detached, 2.0, [True, with_weight])
    )


def test_gradient_is_that_of_the_implementation(x: Tensor, weight: Tensor) -> None:
    assert torch.autograd.gradcheck(lambda x, w: scaled_op(x, w, 2.0), (x, weight))
    assert torch.autograd.gradcheck(lambda x: scaled_op(x, None, 2.0), (x,))


def test_gradient_of_one_output_alone(x: Tensor, weight: Tensor) -> None:
    for i in range(2):
        ours = torch.autograd.grad(scaled_op(x, weight, 2.0)[i].sum(), (x, weight))
        expected = torch.autograd.grad(scaled(x, weight, 2.0)[i].sum(), (x, weight))
        torch.testing.assert_close(ours, expected)


def test_no_gradient_is_recorded_without_need(x: Tensor) -> None:
    assert not scaled_op(x.detach(), None, 2.0)[0].requires_grad
    with torch.no_grad():
        assert not scaled_op(x, None, 2.0)[0].requires_grad
    with torch.inference_mode():
        assert scaled_op(x, None, 2.0)[0].is_inference()


def test_compiled_call_is_one_node_with_a_gradient(x: Tensor, weight: Tensor) -> None:
    compiled = torch.compile(lambda x, w: scaled_op(x, w, 2.0), fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(x, weight)[0].sum(), (x, weight))
    torch.testing.assert_close(ours, torch.autograd.grad(scaled(x, weight, 2.0)[0].sum(), (x, weight)))


def test_second_derivative_is_refused_by_name(x: Tensor) -> None:
    (grad,) = torch.autograd.grad(scaled_op(x, None, 2.0)[0].sum(), x, create_graph=True)
    with pytest.raises(
        NotImplementedError, match=r"vlmkernels::test_scaled_backward: second derivatives .* reference"
    ):
        grad.sum().backward()


def test_vmap_is_refused_by_name(x: Tensor) -> None:
    with pytest.raises(
        NotImplementedError, match=r"vlmkernels::test_scaled: torch\.vmap works on the reference"
    ):
        torch.vmap(lambda row: scaled_op(row, None, 2.0))(x.detach())


def test_vmap_rule_can_be_given() -> None:
    def rule(info: Any, in_dims: tuple[int | None], x: Tensor) -> tuple[Tensor, int]:
        return doubled(x), in_dims[0] or 0

    doubled = register_op(
        "test_doubled", "(Tensor x) -> Tensor", fake=torch.empty_like, impl=lambda x: 2 * x, vmap=rule
    )
    x = torch.randn(3, 4)
    assert torch.equal(torch.vmap(doubled)(x), 2 * x)


def test_op_without_gradient_says_so(x: Tensor) -> None:
    op = register_op("test_floor", "(Tensor x) -> Tensor", fake=torch.empty_like, impl=torch.floor)
    with pytest.raises(
        NotImplementedError, match="vlmkernels::test_floor: derivatives exist on the reference"
    ):
        op(x).sum().backward()


@pytest.mark.parametrize(
    ("name", "schema", "arguments", "message"),
    [
        ("test_scaled", "(Tensor x) -> Tensor", {}, "vlmkernels::test_scaled is already registered"),
        (
            "test_a",
            "(Tensor x) -> Tensor",
            {"backward": _backward},
            "needs setup_context and backward together",
        ),
        ("test_a", "(Tensor x, int k=1) -> Tensor", {}, "may have no defaults"),
        ("test_a", "(Tensor x, *, int k) -> Tensor", {}, "may have no .*keyword-only"),
        ("test_a", "(Tensor[] x) -> Tensor", {}, "may have no .*lists of tensors"),
    ],
)
def test_bad_registrations_are_refused(
    name: str, schema: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        register_op(name, schema, fake=torch.empty_like, impl=torch.clone, **arguments)
    assert "test_a" not in registered_ops()


def test_registered_ops_is_a_copy() -> None:
    registered_ops().clear()
    assert "test_scaled" in _library.registered_ops()


def test_differentiate_gives_shape_0_where_nothing_is_wanted(x: Tensor, weight: Tensor) -> None:
    ones = torch.ones(3, 4).double()
    grads = differentiate(lambda x, w: scaled(x, w, 2.0), (x, weight), (ones, None), [False, True])
    assert [list(g.shape) for g in grads] == [[0], [4]]
    grads = differentiate(lambda x, w: scaled(x, w, 2.0), (x, None), (ones, None), [True, True])
    assert [list(g.shape) for g in grads] == [[3, 4], [0]]
    assert [list(g.shape) for g in like_inputs((x, None), [True, True])] == [[3, 4], [0]]


def test_differentiate_returns_tensors_of_their_own(x: Tensor) -> None:
    y, grad = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    grads = differentiate(lambda x, y: x + y, (x, y), grad, [True, True])
    pointers = {t.untyped_storage().data_ptr() for t in (x, y, grad, *grads)}
    assert len(pointers) == 5
    assert torch.equal(grads[0], grad)
    assert torch.equal(grads[1], grad)


def test_differentiate_returns_contiguous_tensors(x: Tensor) -> None:
    (grad,) = differentiate(lambda x: x.t().sum(), (x,), torch.ones((), dtype=torch.float64), [True])
    assert grad.is_contiguous()
    assert torch.equal(grad, torch.ones(3, 4, dtype=torch.float64))


def test_differentiate_gives_zeros_for_what_does_not_matter(x: Tensor, weight: Tensor) -> None:
    grads = differentiate(
        lambda x, w: x.sum(), (x, weight), torch.ones((), dtype=torch.float64), [True, True]
    )
    assert torch.equal(grads[1], torch.zeros_like(weight))
    grads = differentiate(lambda x: x.detach().sum(), (x,), torch.ones((), dtype=torch.float64), [True])
    assert torch.equal(grads[0], torch.zeros_like(x))


def test_differentiate_leaves_no_graph_and_no_gradient_behind(x: Tensor) -> None:
    (grad,) = differentiate(lambda x: x.square().sum(), (x,), torch.ones((), dtype=torch.float64), [True])
    assert not grad.requires_grad
    assert x.grad is None


def test_follow_autocast_outside_autocast_changes_nothing(x: Tensor) -> None:
    assert autocast_dtype("cpu") is None
    assert follow_autocast(x, None)[0] is x


def test_follow_autocast_casts_floats_but_not_doubles() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_dtype("cpu") == torch.bfloat16
        single, half, double, none, index = follow_autocast(
            torch.ones(1), torch.ones(1).half(), torch.ones(1).double(), None, torch.ones(1).int()
        )
    assert (single.dtype, half.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (double.dtype, index.dtype) == (torch.float64, torch.int32)
    assert none is None


def test_no_autocast_switches_it_off_inside() -> None:
    a = torch.randn(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        with no_autocast("cpu"):
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16


def test_devices_without_autocast_have_none() -> None:
    assert autocast_dtype("meta") is None
    with no_autocast("meta"):
        pass
