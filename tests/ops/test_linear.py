# SPDX-License-Identifier: Apache-2.0
"""vk.linear, and what it shares with vk.quantized_linear: autocast and mixed dtypes."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from linear_problems import ACTIVATIONS, EPS32, activate, random

import vlmkernels as vk
from vlmkernels.ops.linear import linear
from vlmkernels.ops.quantized import quantize_weight, quantized_linear


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_gradcheck(activation):
    x = random(2, 3, 5, dtype=torch.float64).requires_grad_()
    weight = random(4, 5, seed=1, dtype=torch.float64).requires_grad_()
    bias = random(4, seed=2, dtype=torch.float64).requires_grad_()
    residual = random(2, 3, 4, seed=3, dtype=torch.float64).requires_grad_()

    def function(x, weight, bias, residual):
        return linear(x, weight, bias, activation=activation, residual=residual)

    assert torch.autograd.gradcheck(function, (x, weight, bias, residual))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias, residual))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_is_at_least_as_accurate_as_eager(dtype, activation):
    x, weight = random(50, 197, dtype=dtype), random(77, 197, seed=1, dtype=dtype) / 8
    bias, residual = random(77, seed=2, dtype=dtype), random(50, 77, seed=3, dtype=dtype)
    exact = activate(x.double() @ weight.double().t() + bias.double(), activation) + residual.double()
    eager = activate(F.linear(x, weight, bias), activation) + residual
    y = linear(x, weight, bias, activation=activation, residual=residual)
    assert y.dtype == dtype
    allowed = max(
        1.2 * (eager.double() - exact).abs().max().item(),
        4 * torch.finfo(dtype).eps * exact.abs().max().item(),
    )
    assert (y.double() - exact).abs().max() <= allowed


def test_linear_compute_dtype_rounds_the_operands_and_sums_in_float32():
    x, weight = random(20, 300), random(30, 300, seed=1)
    y = linear(x, weight, compute_dtype=torch.bfloat16)
    assert y.dtype == torch.float32
    exact = x.bfloat16().double() @ weight.bfloat16().double().t()
    eager = x.bfloat16().float() @ weight.bfloat16().float().t()
    assert (y - exact).abs().max() <= 1.2 * (eager - exact).abs().max() + 4 * EPS32 * exact.abs().max()
    assert (y - x @ weight.t()).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 0, 5), (1, 1, 5)])
def test_linear_keeps_leading_dimensions(shape):
    y = linear(random(*shape), random(3, 5), random(3), residual=random(*shape[:-1], 3))
    assert y.shape == (*shape[:-1], 3)
    assert torch.equal(linear(torch.zeros(2, 0), torch.zeros(3, 0), torch.ones(3)), torch.ones(2, 3))


def test_linear_takes_any_strides():
    x, weight = random(12, 9).t(), random(12, 14).t()[::2]
    torch.testing.assert_close(linear(x, weight), linear(x.contiguous(), weight.contiguous()))


def test_autocast_decides_the_dtype_of_the_operands():
    x, weight, bias = random(4, 64), random(8, 64, seed=1), random(8, seed=2)
    qweight = quantize_weight(weight, "w8a8")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, z = quantized_linear(x, qweight, bias), linear(x, weight, bias)
        half_x = linear(x.bfloat16(), weight, bias)
    assert y.dtype == z.dtype == half_x.dtype == torch.bfloat16
    assert torch.equal(y, quantized_linear(x.bfloat16(), qweight, bias.bfloat16()))
    assert torch.equal(z, linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()))


def test_autocast_keeps_a_wider_residual_stream():
    x, weight, residual = random(4, 64).bfloat16(), random(8, 64, seed=1), random(4, 8, seed=2)
    qweight = quantize_weight(weight, "w8a8")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for y in (quantized_linear(x, qweight, residual=residual), linear(x, weight, residual=residual)):
            assert y.dtype == torch.float32


def test_compute_dtype_overrides_autocast():
    x, weight = random(4, 64), random(8, 64, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x, weight, compute_dtype=torch.float32)
        mixed = linear(x.bfloat16(), weight, compute_dtype=torch.float32)
    assert torch.equal(y, linear(x, weight))
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, linear(x.bfloat16().float(), weight))


@pytest.mark.parametrize("name", ["weight", "bias", "residual"])
def test_mixed_dtypes_outside_autocast_are_refused(name):
    arguments = {"weight": random(8, 64), "bias": random(8), "residual": random(4, 8)}
    arguments[name] = arguments[name].bfloat16()
    with pytest.raises(TypeError, match=rf"vk.linear: .*one dtype.*{name} torch.bfloat16"):
        linear(random(4, 64), **arguments)
    del arguments["weight"]
    if name != "weight":
        with pytest.raises(TypeError, match=rf"vk.quantized_linear: .*{name} torch.bfloat16"):
            quantized_linear(random(4, 64), quantize_weight(random(8, 64), "w8a8"), **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        (
            {"weight": torch.ones(8, 63)},
            ValueError,
            r"x must be \[..., K\] with weight's K = 63, got \[3, 64\]",
        ),
        ({"weight": torch.ones(64)}, ValueError, r"weight must be \[N, K\], got \[64\]"),
        ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
        ({"compute_dtype": torch.int8}, TypeError, "compute_dtype must be None or one of"),
        ({"activation": 1}, ValueError, "activation must be one of"),
        ({"residual": torch.ones(3, 1)}, ValueError, "residual must be"),
        ({"weight": torch.ones(8, 64, device="meta")}, ValueError, "one device"),
        ({"backend": "triton"}, NotImplementedError, "backend 'triton' cannot serve"),
    ],
)
def test_linear_refuses(changes, error, sentence):
    with pytest.raises(error, match=f"vk.linear: .*{sentence}"):
        linear(**({"x": random(3, 64), "weight": random(8, 64)} | changes))


def test_fakes_refuse_what_the_public_functions_refuse():
    def traced(x, weight):
        return torch.ops.vlmkernels.linear.default(x, weight, None, None, None, None, "reference")

    with pytest.raises(ValueError, match=r"vk.linear: x must be"):
        traced(torch.ones(3, 5, device="meta"), torch.ones(2, 4, device="meta"))


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_opcheck_linear(compute_dtype):
    x, weight = random(3, 5, 24).requires_grad_(), random(8, 24, seed=1).requires_grad_()
    bias, residual = random(8, seed=2).requires_grad_(), random(3, 5, 8, seed=3).requires_grad_()
    op = torch.ops.vlmkernels.linear.default
    torch.library.opcheck(op, (x, weight, bias, residual, "gelu_tanh", compute_dtype, "reference"))
    torch.library.opcheck(op, (x, weight, None, None, None, compute_dtype, "reference"))


def test_registered_linear_agrees_with_the_reference():
    x, weight = random(3, 5, 24).requires_grad_(), random(8, 24, seed=1).requires_grad_()
    bias, residual = random(8, seed=2).requires_grad_(), random(3, 5, 8, seed=3).requires_grad_()
    inputs = (x, weight, bias, residual)
    y = torch.ops.vlmkernels.linear.default(*inputs, "silu", None, "reference")
    z = linear(x, weight, bias, activation="silu", residual=residual)
    assert torch.equal(y, z)
    grad = random(3, 5, 8, seed=9)
    found, expected = torch.autograd.grad(y, inputs, grad), torch.autograd.grad(z, inputs, grad)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_registered_ops_compute_only_the_gradients_asked_for():
    x, weight = random(3, 24), random(8, 24, seed=1)
    residual = random(3, 8, seed=3).requires_grad_()
    torch.ops.vlmkernels.linear.default(x, weight, None, residual, "silu", None, "reference").sum().backward()
    assert torch.equal(residual.grad, torch.ones(3, 8))


def test_second_derivative_of_a_registered_op_is_refused():
    x, weight = random(3, 24).requires_grad_(), random(8, 24, seed=1)
    y = torch.ops.vlmkernels.linear.default(x, weight, None, None, "silu", None, "reference")
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="linear_backward"):
        grad.sum().backward()


def test_linear_compiles_without_a_graph_break():
    torch._dynamo.reset()
    x, weight = random(4, 16).requires_grad_(), random(8, 16, seed=1).requires_grad_()
    compiled = torch.compile(
        lambda x, w: linear(x, w, activation="gelu"), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x, weight), linear(x, weight, activation="gelu"))
    compiled(x, weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None


def test_examples_in_the_docstrings():
    results = doctest.testmod(importlib.import_module("vlmkernels.ops.linear"), extraglobs={"vk": vk})
    assert results.failed == 0
    assert results.attempted >= 2
