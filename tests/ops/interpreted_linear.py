# SPDX-License-Identifier: Apache-2.0
"""Linear layers on Triton, on the interpreter or a GPU: exact sums, accuracy, codes, gradients, layouts, bits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import FEW_SIZES, LAYOUTS, SIZES
from linear_problems import ACTIVATIONS, SCHEMES, activate, quantized_operands, random
from oracle import assert_as_accurate, assert_typically_as_accurate
from triton_device import DEVICE, DTYPES

from vlmkernels.ops.linear import linear
from vlmkernels.ops.quantized import quantize_weight, quantized_linear
from vlmkernels.ops.reference import quantized as reference

if DEVICE == "cpu":  # which rounds to bfloat16 and e4m3 otherwise, and refuses them
    DTYPES = (torch.float32, torch.float16)
    SCHEMES = ["w8a8", "w8a16", "w4a16"]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
#: (M, K, N): one row, the split K of few rows, several tiles each way, odd sizes.
SHAPES = ((1, 32, 3), (4, 256, 17), (9, 160, 37), (50, 96, 40))
LARGE = ((50, 768, 100), (130, 512, 49))


def problem(m, k, n, *, seed=0, dtype=torch.float32):
    """x, weight, bias, residual of everyday size."""
    x, weight = random(m, k, seed=seed, dtype=dtype), random(n, k, seed=seed + 1) / math.sqrt(max(k, 1))
    tensors = (x, weight, random(n, seed=seed + 2, dtype=dtype), random(m, n, seed=seed + 3, dtype=dtype))
    return tuple(t.to(DEVICE) for t in tensors)


def on_triton(*arguments, **options):
    return quantized_linear(*arguments, **options, backend="triton")


def assert_quantized_accurate(scheme, dtype, activation, shapes, seeds):
    for m, k, n in shapes:
        ours, eager, exact = [], [], []
        for seed in seeds:
            x, weight, bias, residual = problem(m, k, n, seed=seed, dtype=dtype)
            qweight = quantize_weight(weight, scheme)
            options = {"activation": activation, "residual": residual}
            ours.append(on_triton(x, qweight, bias, **options))
            eager.append(quantized_linear(x, qweight, bias, **options, backend="reference"))
            x64, weight64 = quantized_operands(x.float(), qweight)
            exact.append(activate(x64 @ weight64.t() + bias.double(), activation) + residual.double())
        assert_as_accurate(ours, eager, exact, f"{scheme} {m, k, n}")


def assert_float_accurate(dtype, activation, shapes, seeds, compute_dtype=None):
    for m, k, n in shapes:
        ours, eager, exact = [], [], []
        for seed in seeds:
            x, weight, bias, residual = problem(m, k, n, seed=seed, dtype=dtype)
            weight = weight.to(dtype)
            options = {"activation": activation, "residual": residual, "compute_dtype": compute_dtype}
            ours.append(linear(x, weight, bias, **options, backend="triton"))
            eager.append(linear(x, weight, bias, **options, backend="reference"))
            operand = compute_dtype or dtype
            product = x.to(operand).double() @ weight.to(operand).double().t()
            exact.append(activate(product + bias.double(), activation) + residual.double())
        assert_as_accurate(ours, eager, exact, f"{m, k, n}")


@each_scheme
@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_results_are_as_accurate_as_the_reference(scheme, dtype, activation):
    shapes = SHAPES if activation in ("gelu", None) else SHAPES[2:3]
    assert_quantized_accurate(scheme, dtype, activation, shapes, seeds=(0, 4))


@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float_results_are_as_accurate_as_the_reference(dtype, activation):
    shapes = ((1, 7, 3), (9, 65, 37), (40, 100, 50)) if activation in ("gelu", None) else ((9, 65, 37),)
    assert_float_accurate(dtype, activation, shapes, seeds=(0, 4))


@pytest.mark.parametrize("compute_dtype", [torch.float16, torch.float32])
def test_compute_dtype_rounds_the_operands_and_sums_in_float32(compute_dtype):
    for dtype in (torch.float32, torch.float16):
        assert_float_accurate(dtype, "gelu", ((9, 65, 37),), (0, 4), compute_dtype)


@pytest.mark.slow
@each_scheme
@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_shape_is_as_accurate_as_the_reference(scheme, dtype, activation):
    assert_quantized_accurate(scheme, dtype, activation, (*SHAPES, *LARGE), seeds=(0, 4, 8))
    assert_float_accurate(dtype, activation, LARGE, seeds=(0, 4, 8))


def assert_exact(size):
    for m, k, n in ((size, 40, 5), (5, size, 40), (5, 40, size)):
        x, weight, *_ = problem(m, k, n)
        qweight = quantize_weight(weight, "w8a8")
        assert torch.equal(on_triton(x, qweight), quantized_linear(x, qweight, backend="reference")), (
            m,
            k,
            n,
        )


@pytest.mark.parametrize("size", FEW_SIZES)
def test_few_sizes_give_the_references_int8_sums(size):
    assert_exact(size)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_every_size_gives_the_references_int8_sums(size):
    assert_exact(size)


@each_scheme
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_any_strides(scheme, layout):
    x, weight, bias, residual = problem(20, 64, 37)
    qweight = quantize_weight(weight, scheme, group_size=32 if scheme == "w4a16" else None)
    x, residual = LAYOUTS[layout](x), LAYOUTS[layout](residual)
    bias = LAYOUTS["every_other"](bias)
    y = on_triton(x, qweight, bias, activation="gelu", residual=residual)
    dense = [t.contiguous() for t in (x, bias, residual)]
    assert torch.equal(y, on_triton(dense[0], qweight, dense[1], activation="gelu", residual=dense[2]))
    weight = LAYOUTS[layout](weight)
    z = linear(x, weight, bias, residual=residual, activation="silu", backend="triton")
    expected = linear(
        dense[0],
        weight.contiguous(),
        dense[1],
        residual=dense[2],
        activation="silu",
        backend="triton",
    )
    assert torch.equal(z, expected)


@each_scheme
def test_activations_of_more_dimensions(scheme):
    qweight = quantize_weight(random(10, 64, seed=1).to(DEVICE), scheme)
    base = random(5, 4, 6, 64).to(DEVICE)
    for x in (base[0, 0, 0], base[0].transpose(0, 1), base.transpose(0, 2), base[:, ::2], base[:0]):
        y = on_triton(x, qweight)
        assert y.shape == (*x.shape[:-1], 10)
        assert torch.equal(y, on_triton(x.reshape(-1, 64), qweight).reshape(y.shape))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("rows", [1, 40])
def test_every_group_of_four_bits(group_size, rows):
    x, weight, bias, _ = problem(rows, 1024, 24)
    qweight = quantize_weight(weight, "w4a16", group_size=group_size)
    ours, eager = (quantized_linear(x, qweight, bias, backend=b) for b in ("triton", "reference"))
    exact = x.double() @ qweight.dequantize(torch.float64).t() + bias.double()
    assert_as_accurate(ours, eager, exact)


def test_rows_of_a_weight_are_a_weight():
    x, weight, *_ = problem(5, 64, 40)
    for scheme in SCHEMES:
        qweight = quantize_weight(weight, scheme)
        assert torch.equal(on_triton(x, qweight.rows(8, 27)), on_triton(x, qweight)[:, 8:27])


def test_codes_at_ties_are_the_references():
    scale = torch.linspace(0.001, 3, 13, device=DEVICE)[:, None]
    halves = torch.arange(-127, 127, device=DEVICE)[None] + 0.5
    x = (halves * scale).repeat(1, 3)
    x[:, 254:508] = torch.nextafter(x[:, :254], torch.tensor(math.inf, device=DEVICE))
    x[:, 508:] = torch.nextafter(x[:, :254], torch.tensor(-math.inf, device=DEVICE))
    assert_same_codes(torch.cat([127 * scale, x], dim=1))


@pytest.mark.parametrize("size", [1e-44, 1e-40, 1e-30, 1e30, 3e38])
def test_codes_of_extreme_rows_are_the_references(size):
    assert_same_codes((random(3, 64).clamp(-1, 1) * size).to(DEVICE))


def assert_same_codes(x, **options):
    from vlmkernels.ops.triton import linear as kernels

    codes, scales = kernels.quantize_rows(x, **options)
    expected, expected_scales = reference.quantize_rows_int8(x, options.get("input_scale"))
    assert torch.equal(codes, expected)
    assert torch.equal(scales.nan_to_num(-1.0), expected_scales.nan_to_num(-1.0))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("width", [20, 9000])
def test_bad_rows_and_static_scales(width):
    x = random(6, width).to(DEVICE)
    x[0, 7], x[1, 3], x[2, 1], x[3] = math.nan, math.inf, -math.inf, 0.0
    assert_same_codes(x)
    x[4, 2] = 1e9
    assert_same_codes(x, input_scale=torch.tensor(0.02, device=DEVICE))
    qweight = quantize_weight(random(4, width, seed=1).to(DEVICE), "w8a8")
    for input_scale in (None, 0.02, torch.tensor(0.02, dtype=torch.float64)):
        ours, expected = (
            quantized_linear(x, qweight, input_scale=input_scale, backend=b) for b in ("triton", "reference")
        )
        assert torch.equal(ours.nan_to_num(-1.0), expected.nan_to_num(-1.0))


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_and_quantization_in_one_pass(bias):
    from vlmkernels.ops.triton import linear as kernels

    x, weight, shift = random(7, 100) * 3 + 1, random(100, seed=1), random(100, seed=2) if bias else None
    norm = tuple(t if t is None else t.to(DEVICE) for t in (weight, shift))
    codes, scales = kernels.quantize_rows(x.to(DEVICE), norm=(*norm, 1e-5))
    exact = F.layer_norm(x.double(), (100,), weight.double(), None if shift is None else shift.double(), 1e-5)
    # half a step of the codes, and float32 rounding of the norm
    bound = exact.abs().amax(1, keepdim=True) / 127 * 0.5001 + 1e-5
    assert ((codes.cpu().double() * scales.cpu().double()[:, None] - exact).abs() <= bound).all()
    with pytest.raises(ValueError, match="does not fit a block"):
        kernels.quantize_rows(torch.zeros(1, 8200, device=DEVICE), norm=(torch.ones(8200), None, 1e-5))


def gradients_of(op, activation, backend, x, weight, bias, residual, grad, qweight):
    inputs = [t.detach().clone().requires_grad_() for t in (x, weight, bias, residual)]
    if op == "linear":
        y = linear(*inputs[:3], activation=activation, residual=inputs[3], backend=backend)
    else:
        del inputs[1]
        options = {"activation": activation, "residual": inputs[2], "backend": backend}
        y = quantized_linear(inputs[0], qweight, inputs[1], **options)
    return torch.autograd.grad(y, inputs, grad.to(y.dtype))


@each_dtype
@pytest.mark.parametrize(
    ("op", "activation"),
    [*itertools.product(["linear"], ACTIVATIONS), *itertools.product(SCHEMES, [None, "gelu"])],
)
def test_gradients_are_as_accurate_as_the_reference(op, dtype, activation):
    for m, k, n in ((1, 32, 3), (50, 96, 37)):
        x, weight, bias, residual = problem(m, k, n, dtype=dtype)
        grad = random(m, n, seed=9, dtype=dtype).to(DEVICE)
        qweight = None if op == "linear" else quantize_weight(weight, op)
        weight = weight.to(dtype)
        tensors = (x, weight, bias, residual, grad)
        ours, eager = (gradients_of(op, activation, b, *tensors, qweight) for b in ("triton", "reference"))
        if qweight is None:
            exact = gradients_of(op, activation, "reference", *(t.double() for t in tensors), None)
        else:
            x64, weight64 = quantized_operands(x.float(), qweight)
            before = (x64 @ weight64.t() + bias.double()).requires_grad_()
            (through,) = torch.autograd.grad(activate(before, activation), before, grad.double())
            exact = (through @ weight64, through.sum(0), grad.double())
        for mine, theirs, truth in zip(ours, eager, exact, strict=True):
            assert mine.dtype == dtype
            assert_typically_as_accurate(mine, theirs, truth, f"{op} {m, k, n}")


def test_gradients_with_a_compute_dtype_come_in_the_dtype_of_x():
    x, weight, bias, _ = problem(9, 64, 33)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    grad = random(9, 33, seed=5).to(DEVICE)
    ours, eager = (
        torch.autograd.grad(
            linear(*inputs, activation="gelu", compute_dtype=torch.float16, backend=b), inputs, grad
        )
        for b in ("triton", "reference")
    )
    for mine, theirs in zip(ours, eager, strict=True):
        assert mine.dtype == torch.float32
        # the gradient enters the products rounded to float16, 64 terms
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=4e-3)


def test_gradients_of_empty_and_transposed_activations():
    weight = random(8, 64, seed=1).to(DEVICE).requires_grad_()
    for shape in ((0, 64), (3, 5, 64)):
        x = random(*shape).to(DEVICE).transpose(0, -2).requires_grad_()
        grad = random(*x.shape[:-1], 8, seed=2).to(DEVICE)
        found, expected = (
            torch.autograd.grad(linear(x, weight, activation="relu", backend=b), (x, weight), grad)
            for b in ("triton", "reference")
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@each_scheme
def test_bits_depend_neither_on_the_run_nor_on_the_other_rows(scheme):
    x, weight, bias, _ = problem(70, 64, 40)
    qweight = quantize_weight(weight, scheme)
    y = on_triton(x, qweight, bias, activation="gelu")
    assert torch.equal(y, on_triton(x, qweight, bias, activation="gelu"))
    # as many rows take the same tile; far fewer may take another, or split K
    assert torch.equal(y[:66], on_triton(x[:66], qweight, bias, activation="gelu"))


def test_refusals():
    x = torch.zeros(2, 64, dtype=torch.float64, device=DEVICE)
    with pytest.raises(NotImplementedError, match="sums in float32"):
        linear(x, torch.zeros(3, 64, dtype=torch.float64, device=DEVICE), backend="triton")
    with pytest.raises(NotImplementedError, match="131072"):
        on_triton(
            torch.zeros(1, 131080, device=DEVICE),
            quantize_weight(torch.zeros(1, 131080, device=DEVICE), "w8a8"),
        )
