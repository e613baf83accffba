# SPDX-License-Identifier: Apache-2.0
"""vk.quantized_linear under autograd, torch.library, torch.compile and torch.func."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from linear_problems import ACTIVATIONS, SCHEMES, activate, random

from vlmkernels.ops.quantized import QuantizedWeight, quantize_weight, quantized_linear

# Gradients.


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_of_x_passes_straight_through_the_quantizer(scheme, activation):
    x, weight = random(6, 64, dtype=torch.float64), random(20, 64, seed=1)
    bias, grad = random(20, seed=2, dtype=torch.float64), random(6, 20, seed=3, dtype=torch.float64)
    qweight = quantize_weight(weight, scheme)
    x.requires_grad_()
    quantized_linear(x, qweight, bias, activation=activation).backward(grad)
    # The activation's slope is that at the quantized pre-activation, which the product itself gives.
    y = quantized_linear(x.detach(), qweight, bias).requires_grad_()
    activate(y, activation).backward(grad)
    expected = y.grad @ qweight.dequantize(torch.float64)
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_where_activations_stay_float(scheme, activation):
    qweight = quantize_weight(random(5, 32, seed=1), scheme)
    x = random(3, 32, dtype=torch.float64).requires_grad_()
    bias = random(5, seed=2, dtype=torch.float64).requires_grad_()
    residual = random(3, 5, seed=3, dtype=torch.float64).requires_grad_()

    def function(x, bias, residual):
        return quantized_linear(x, qweight, bias, activation=activation, residual=residual)

    assert torch.autograd.gradcheck(function, (x, bias, residual))
    assert torch.autograd.gradgradcheck(function, (x, bias, residual))


@pytest.mark.parametrize("scheme", ["w8a8", "fp8", "bf16"])
def test_gradcheck_of_bias_and_residual_where_activations_are_rounded(scheme):
    qweight = quantize_weight(random(5, 32, seed=1), scheme)
    x = random(3, 32, dtype=torch.float64)
    bias = random(5, seed=2, dtype=torch.float64).requires_grad_()
    residual = random(3, 5, seed=3, dtype=torch.float64).requires_grad_()

    def function(bias, residual):
        return quantized_linear(x, qweight, bias, activation="gelu", residual=residual)

    assert torch.autograd.gradcheck(function, (bias, residual))


def test_second_derivative_of_x_is_that_of_the_activation():
    qweight = quantize_weight(random(4, 32, seed=1), "w8a8")
    x = random(2, 32, dtype=torch.float64).requires_grad_()
    weight = qweight.dequantize(torch.float64)
    (first,) = torch.autograd.grad(
        quantized_linear(x, qweight, activation="silu").sum(), x, create_graph=True
    )
    (second,) = torch.autograd.grad(first.sum(), x)
    y = quantized_linear(x.detach(), qweight)
    s = torch.sigmoid(y)
    curvature = s * (1 - s) * (2 + y * (1 - 2 * s))
    expected = (curvature * weight.sum(1)) @ weight
    torch.testing.assert_close(second, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_weights_get_no_gradient_and_bias_gets_its_own(scheme):
    qweight = quantize_weight(random(4, 32).requires_grad_(), scheme)
    assert not qweight.dequantize().requires_grad
    x, bias = (
        random(3, 32, dtype=torch.bfloat16).requires_grad_(),
        torch.zeros(4, dtype=torch.bfloat16, requires_grad=True),
    )
    y = quantized_linear(x, qweight, bias)
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert x.grad.shape == x.shape
    assert bias.grad.tolist() == [3.0] * 4


def test_saturated_activations_keep_their_gradient():
    qweight = quantize_weight(random(4, 8), "w8a8")
    x = (random(2, 8, seed=1) * 100).requires_grad_()
    quantized_linear(x, qweight, input_scale=0.01).sum().backward()
    torch.testing.assert_close(x.grad, qweight.dequantize().sum(0).expand(2, 8))


def test_adapter_trains_on_a_quantized_backbone():
    torch.manual_seed(0)
    qweight = quantize_weight(random(16, 32), "w8a8")
    target_shift = random(32, seed=5)
    x = random(64, 32, seed=1)
    target = quantized_linear(x + target_shift, qweight)
    shift = torch.zeros(32, requires_grad=True)
    optimizer = torch.optim.Adam([shift], lr=0.1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(quantized_linear(x + shift, qweight), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]


# Registered ops, compilation, transforms.


def op_arguments(scheme, activation="gelu", dtype=torch.float32):
    qweight = quantize_weight(random(8, 64, seed=1), scheme)
    x = random(3, 64, dtype=dtype).requires_grad_()
    bias, residual = (
        random(8, seed=2, dtype=dtype).requires_grad_(),
        random(3, 8, seed=3, dtype=dtype).requires_grad_(),
    )
    scale = torch.tensor(0.03) if scheme == "w8a8" else None
    return (
        x,
        qweight.weight_q,
        qweight.scale,
        qweight.zero_point,
        None,
        bias,
        residual,
        scale,
        scheme,
        activation,
        "reference",
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_opcheck_quantized_linear(scheme):
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if (
        scheme != "fp8"
    ):  # test_schema compares inputs before and after with allclose, which torch lacks for float8
        checks.append("test_schema")
    for activation in (None, "quick_gelu"):
        arguments = op_arguments(scheme, activation)
        torch.library.opcheck(torch.ops.vlmkernels.quantized_linear.default, arguments, test_utils=checks)
    without = (*arguments[:5], None, None, *arguments[7:])
    torch.library.opcheck(torch.ops.vlmkernels.quantized_linear.default, without, test_utils=checks)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_registered_quantized_linear_agrees_with_the_reference(scheme):
    arguments = op_arguments(scheme)
    x, _, _, _, _, bias, residual, input_scale, *_ = arguments
    y = torch.ops.vlmkernels.quantized_linear.default(*arguments)
    qweight = QuantizedWeight(scheme, *arguments[1:4])
    z = quantized_linear(
        x, qweight, bias, activation="gelu", residual=residual, input_scale=input_scale, backend="reference"
    )
    assert torch.equal(y, z)
    grad = random(3, 8, seed=9)
    for found, expected in zip(
        torch.autograd.grad(y, (x, bias, residual), grad),
        torch.autograd.grad(z, (x, bias, residual), grad),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


# Dynamo instantiates autograd.Function while it traces one, and torch itself warns of that.
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiles_without_a_graph_break_and_once_per_shape_class(scheme):
    qweight = quantize_weight(random(8, 64, seed=1), scheme)
    bias = random(8, seed=2)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def function(x, qweight, bias):
        return quantized_linear(x, qweight, bias, activation="gelu", residual=x[..., :8])

    for rows in (4, 5, 6, 7):
        x = random(rows, 64, seed=rows).requires_grad_()
        y = function(x, qweight, bias)
        z = quantized_linear(x, qweight, bias, activation="gelu", residual=x[..., :8])
        torch.testing.assert_close(y, z)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(z.sum(), x))
    assert counter.frame_count <= 2  # the first shape, then one with symbolic rows


def test_vmap_and_functional_gradients_on_the_reference():
    qweight, x = quantize_weight(random(8, 64, seed=1), "w8a8"), random(5, 3, 64)
    mapped = torch.vmap(lambda x: quantized_linear(x, qweight, activation="relu"))(x)
    torch.testing.assert_close(mapped, quantized_linear(x, qweight, activation="relu"))
    slope = qweight.dequantize().sum(0).expand(5, 3, 64)
    through = torch.func.grad(lambda x: torch.vmap(lambda x: quantized_linear(x, qweight))(x).sum())(x)
    torch.testing.assert_close(through, slope)
    leaf = x.clone().requires_grad_()
    torch.vmap(lambda x: quantized_linear(x, qweight))(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, slope)
    per_sample = torch.vmap(torch.func.grad(lambda x: quantized_linear(x, qweight).sum()))(x)
    torch.testing.assert_close(per_sample, slope)
