# SPDX-License-Identifier: Apache-2.0
"""The float linear layer with a fused epilogue: `vk.linear`."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmkernels.ops import _check, _linear_cpu, _linear_triton, _triton
from vlmkernels.ops._library import (
    autocast_dtype,
    differentiate,
    follow_autocast,
    like_inputs,
    register_op,
    wants_gradients,
)
from vlmkernels.ops.dispatch import Call, choose, register_backend
from vlmkernels.ops.reference import linear as reference

__all__ = ["linear", "outruns_torch"]


def linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None = None,  # [N]
    *,
    activation: str | None = None,
    residual: Tensor | None = None,  # [..., N]
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Float linear layer with a fused epilogue: `y = activation(x @ weight.T + bias) + residual`.

    The epilogue runs in float32 (float64 for float64) and rounds once. On the CPU the tile engine is the default
    where it beats torch's product: from 1,024 rows and widths of 512, float32 or bfloat16, where no gradient is
    recorded, or in float32 without an activation. `backend="cpu"` asks for it elsewhere; its backward forms the
    product again for the activation's slope. Deterministic, and a row's bits depend neither on the other rows nor on
    the number of threads. Differentiable in x, weight, bias and
    residual; second derivatives and vmap on the reference.

    Args:
        x: `[..., K]`, floating; any strides.
        weight: `[N, K]` in x's dtype.
        bias: `[N]` in x's dtype.
        activation: None, "gelu", "gelu_tanh", "quick_gelu", "silu" or "relu".
        residual: `[..., N]` in x's dtype; under autocast it may be wider and then decides the result's dtype.
        compute_dtype: A floating dtype to which x and weight are rounded for the product, whose sums are
            float32; default: their own, or autocast's.
        backend: None, "reference", "cpu", "cuda" or "triton".

    Returns:
        `[..., N]` in x's dtype (under autocast without compute_dtype: in autocast's, widened by the
        residual's).

    Raises:
        TypeError: If an argument is no floating tensor, or dtypes differ outside autocast.
        ValueError: If shapes or devices do not fit, or activation is unknown.
        NotImplementedError: If the named backend cannot serve the call.

    Example:
        >>> x, weight = torch.ones(1, 3), torch.ones(2, 3)
        >>> vk.linear(x, weight, torch.tensor([-4.0, 1.0]), activation="relu")
        tensor([[0., 4.]])
    """
    op = "linear"
    _check.floating(op, "weight", weight)
    _check_compute_dtype(op, compute_dtype)
    x, weight, bias = operands_under_autocast(op, x, weight, bias, residual, compute_dtype)
    _check_linear(x, weight, bias, residual, activation)
    needs = any(wants_gradients(x, weight, bias, residual))
    name = choose(op, _call(x, weight, residual, activation, compute_dtype or x.dtype, needs), backend)
    if name == "reference":
        return reference.linear(
            x, weight, bias, activation=activation, residual=residual, compute_dtype=compute_dtype
        )
    return _linear(x, weight, bias, residual, activation, compute_dtype, name)


def outruns_torch(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` in float32, without an activation, takes the tile engine by itself: what `vk.nn` asks before it
    leaves torch's product, which costs less per call.
    """
    plain = type(x) in (Tensor, torch.nn.Parameter) and type(weight) in (Tensor, torch.nn.Parameter)
    if not plain or x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return False
    if autocast_dtype("cpu") is not None or torch.compiler.is_compiling():
        return False
    needs = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return choose("linear", _call(x, weight, None, None, x.dtype, needs), None) == "cpu"


def _call(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    activation: str | None,
    operand: torch.dtype,
    needs_gradient: bool,
) -> Call:
    facts = {
        "outputs": weight.shape[0],
        "inputs": weight.shape[1],
        "rows": math.prod(x.shape[:-1]),
        "activation": activation,
        "x_dtype": x.dtype,
        "result_dtype": reference.output_dtype(x, residual),
        "gradient": needs_gradient,
    }
    return Call(x.device.type, operand, facts)


def operands_under_autocast(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Any, Tensor | None]:
    """(x, weight, bias) in one dtype under autocast, which leaves the residual; elsewhere as they are."""
    _check.floating(op, "x", x)
    if autocast_dtype(x.device.type) is None:
        # Other dtypes are checked with the arguments; only here is a wider residual known to be a mistake.
        if residual is not None:
            _check.floating(op, "residual", residual)
            _check.same_dtype(op, x=x, residual=residual)
        return x, weight, bias
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            _check.floating(op, name, tensor)
    if compute_dtype is None:
        cast_x, cast_weight, cast_bias = follow_autocast(x, weight, bias)
    else:
        # The product's dtype is given, so autocast only excuses a mixture: all take the widest of their
        # dtypes.
        dtypes = [tensor.dtype for tensor in (x, weight, bias) if tensor is not None]
        widest = functools.reduce(torch.promote_types, dtypes)
        cast_x, cast_weight, cast_bias = (t if t is None else t.to(widest) for t in (x, weight, bias))
    return x if cast_x is None else cast_x, cast_weight, cast_bias


def _check_compute_dtype(op: str, compute_dtype: Any) -> None:
    if compute_dtype is not None and compute_dtype not in _check.FLOATING:
        allowed = ", ".join(str(d) for d in _check.FLOATING)
        raise TypeError(f"vk.{op}: compute_dtype must be None or one of {allowed}, got {compute_dtype!r}")


def _check_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None
) -> None:
    _check.ndim("linear", "weight", weight, 2, "[N, K]")
    _check.same_dtype("linear", x=x, weight=weight)
    _check.linear_arguments("linear", x, (weight.shape[0], weight.shape[1]), bias, residual, activation)
    _check.same_device("linear", x=x, weight=weight, bias=bias, residual=residual)


def _linear_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    compute_dtype: torch.dtype | None,
    backend: str,
) -> Tensor:
    _check_linear(x, weight, bias, residual, activation)
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=reference.output_dtype(x, residual))


def _linear_impl(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    compute_dtype: torch.dtype | None,
    backend: str,
) -> Tensor:
    if backend == "cpu":
        out = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=reference.output_dtype(x, residual))
        kind = _linear_cpu.FLOAT_KINDS[compute_dtype or x.dtype]
        features = (weight.shape[0], weight.shape[1])
        return _linear_cpu.forward(
            "linear", kind, x, features, 0, None, weight, bias, activation, residual, None, out
        )
    if backend == "triton":
        out = x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=reference.output_dtype(x, residual))
        return _linear_triton.forward(
            x, "float", (weight, None, None), bias, activation, residual, None, out, compute_dtype
        )
    return reference.linear(
        x, weight, bias, activation=activation, residual=residual, compute_dtype=compute_dtype
    ).contiguous()


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, residual, ctx.activation, ctx.compute_dtype, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.residual_dtype = None if residual is None else residual.dtype


def _linear_grad(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    grads: Sequence[Tensor | None] = (None, None, None)
    if any(needs):
        grads = _linear_backward(
            grad_out, *ctx.saved_tensors, ctx.activation, ctx.compute_dtype, ctx.backend, needs
        )
    grad_x, grad_weight, grad_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return (
        grad_x,
        grad_weight,
        grad_bias,
        grad_out.to(ctx.residual_dtype) if ctx.needs_input_grad[3] else None,
        None,  # activation
        None,  # compute_dtype
        None,  # backend
    )


def _linear_backward_fake(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return like_inputs((x, weight, bias), rest[-1])


def _linear_backward_impl(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    compute_dtype: torch.dtype | None,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    if backend == "cpu":
        tensors = (x, weight, bias)
        wanted = [need and tensor is not None for need, tensor in zip(needs, tensors, strict=True)]
        grads = like_inputs(tensors, wanted)
        operand = compute_dtype or x.dtype
        _linear_cpu.backward(
            "linear",
            _linear_cpu.FLOAT_KINDS[operand],
            grad_out,
            x,
            (weight.shape[0], weight.shape[1]),
            0,
            None,
            weight,
            (weight, None, None),
            bias,
            activation,
            None,
            operand == torch.bfloat16,
            (
                grads[0] if wanted[0] else None,
                grads[1] if wanted[1] else None,
                grads[2] if wanted[2] else None,
            ),
        )
        return grads
    if backend == "triton":
        return _linear_triton.backward(
            grad_out, x, "float", (weight, None, None), bias, activation, None, compute_dtype, needs
        )

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return reference.linear(
            x, weight, bias, activation=activation, residual=no_residual, compute_dtype=compute_dtype
        )

    # A residual of zeros keeps the result, and so the incoming gradient, in the dtype that it has.
    no_residual = grad_out.new_zeros(()).expand_as(grad_out)
    return differentiate(forward, (x, weight, bias), grad_out, needs)


_linear_backward = register_op(
    "linear_backward",
    "(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, str? activation, ScalarType? compute_dtype, "
    "str backend, bool[] needs) -> (Tensor, Tensor, Tensor)",
    fake=_linear_backward_fake,
    impl=_linear_backward_impl,
)
_linear = register_op(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str? activation, ScalarType? compute_dtype, "
    "str backend) -> Tensor",
    fake=_linear_fake,
    impl=_linear_impl,
    setup_context=_linear_setup,
    backward=_linear_grad,
)

register_backend("linear", "cpu", _linear_cpu.float_reasons, not_default=_linear_cpu.not_default, priority=10)
register_backend(
    "linear",
    "triton",
    _linear_triton.float_reasons,
    not_default=_linear_triton.not_default,
    priority=_triton.PRIORITY,
)
