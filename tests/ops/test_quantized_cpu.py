# SPDX-License-Identifier: Apache-2.0
"""What holds for the CPU kernels of the linear layers alone: exact sums, bits, threads, bounds, instruction sets."""

from __future__ import annotations

import itertools
import math
import sys
from functools import partial

import pytest
import torch
from cases import LAYOUTS, SIZES
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
from linear_problems import ACTIVATIONS, activate, quantized_operands, random
from oracle import assert_as_accurate, assert_typically_as_accurate

from vlmkernels.ops import _linear_cpu
from vlmkernels.ops import linear as linear_module  # noqa: F401  the function hides the module of the same name
from vlmkernels.ops import quantized as ops
from vlmkernels.ops.quantized import quantize_weight, quantized_linear

linear_file = sys.modules["vlmkernels.ops.linear"]
linear = linear_file.linear

pytestmark = needs_cpu_kernels
CPU_SCHEMES = ("w8a8", "w8a16", "w4a16", "bf16")
DTYPES = (torch.float32, torch.bfloat16)
each_scheme = pytest.mark.parametrize("scheme", CPU_SCHEMES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def problem(m, k, n, *, seed=0, dtype=torch.float32):
    """x, weight, bias, residual of everyday size."""
    x, weight = random(m, k, seed=seed, dtype=dtype), random(n, k, seed=seed + 1) / math.sqrt(max(k, 1))
    return x, weight, random(n, seed=seed + 2, dtype=dtype), random(m, n, seed=seed + 3, dtype=dtype)


# Values.


@each_scheme
@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_results_are_as_accurate_as_the_reference(scheme, dtype, activation):
    for m, k, n in ((1, 32, 1), (4, 96, 17), (9, 160, 37), (50, 768, 100), (130, 512, 49)):
        ours, eager, exact = [], [], []
        for seed in range(0, 12, 4):
            x, weight, bias, residual = problem(m, k, n, seed=seed, dtype=dtype)
            qweight = quantize_weight(weight, scheme)
            options = {"activation": activation, "residual": residual}
            ours.append(quantized_linear(x, qweight, bias, **options, backend="cpu"))
            eager.append(quantized_linear(x, qweight, bias, **options, backend="reference"))
            x64, weight64 = quantized_operands(x.float(), qweight)
            exact.append(activate(x64 @ weight64.t() + bias.double(), activation) + residual.double())
        assert_as_accurate(ours, eager, exact, f"{scheme} {m, k, n}")


@each_dtype
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float_results_are_as_accurate_as_the_reference(dtype, compute_dtype, activation):
    operand = compute_dtype or dtype
    for m, k, n in ((1, 7, 3), (9, 65, 37), (50, 768, 100), (130, 257, 49)):
        ours, eager, exact = [], [], []
        for seed in range(0, 12, 4):
            x, weight, bias, residual = problem(m, k, n, seed=seed, dtype=dtype)
            weight = weight.to(dtype)
            options = {"activation": activation, "residual": residual, "compute_dtype": compute_dtype}
            ours.append(linear(x, weight, bias, **options, backend="cpu"))
            eager.append(linear(x, weight, bias, **options, backend="reference"))
            product = x.to(operand).double() @ weight.to(operand).double().t()
            exact.append(activate(product + bias.double(), activation) + residual.double())
        assert_as_accurate(ours, eager, exact, f"{m, k, n}")


@pytest.mark.parametrize("size", SIZES)
def test_every_size_gives_the_references_int8_sums(size):
    for m, k, n in ((size, 40, 5), (5, size, 40), (5, 40, size)):
        x, weight, *_ = problem(m, k, n)
        qweight = quantize_weight(weight, "w8a8")
        ours, reference = (quantized_linear(x, qweight, backend=backend) for backend in ("cpu", "reference"))
        assert torch.equal(ours, reference), (m, k, n)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 40), st.integers(1, 4), st.integers(0, 130)),
    scheme=st.sampled_from(CPU_SCHEMES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_strides(sizes, scheme, layout, dtype, activation, seed):
    m, groups, n = sizes
    x, weight, bias, residual = problem(m, 32 * groups, n, seed=seed, dtype=dtype)
    qweight = quantize_weight(weight, scheme, group_size=32 if scheme == "w4a16" else None)
    x, residual = LAYOUTS[layout](x), LAYOUTS[layout](residual)
    bias = LAYOUTS["every_other"](bias)
    y = quantized_linear(x, qweight, bias, activation=activation, residual=residual, backend="cpu")
    dense = [t.contiguous() for t in (x, bias, residual)]
    z = quantized_linear(dense[0], qweight, dense[1], activation=activation, residual=dense[2], backend="cpu")
    assert torch.equal(y, z)
    reference = quantized_linear(
        dense[0], qweight, dense[1], activation=activation, residual=dense[2], backend="reference"
    )
    torch.testing.assert_close(y, reference, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-2)


@each_scheme
def test_activations_of_more_dimensions(scheme):
    qweight = quantize_weight(random(10, 64, seed=1), scheme)
    base = random(5, 4, 6, 64)
    for x in (base[0, 0, 0], base[0], base[0].transpose(0, 1), base, base.transpose(0, 2), base[:, ::2]):
        y = quantized_linear(x, qweight, backend="cpu")
        flat = quantized_linear(x.reshape(-1, 64), qweight, backend="cpu")
        assert torch.equal(y.reshape(-1, 10), flat)


@pytest.mark.parametrize("size", [1e-44, 1e-40, 1e-30, 1e30, 3e38])
def test_codes_of_extreme_rows_are_the_references(size):
    x, weight, *_ = problem(7, 64, 9)
    x, qweight = x.clamp(-1, 1) * size, quantize_weight(weight, "w8a8")
    ours, reference = (quantized_linear(x, qweight, backend=backend) for backend in ("cpu", "reference"))
    assert torch.equal(ours.nan_to_num(), reference.nan_to_num())


def test_codes_at_ties_are_the_references():
    # Halves of the scale, and their neighbours: where the inverse of the scale alone would round to another code.
    scale = torch.linspace(0.001, 3, 97)[:, None]
    halves = torch.arange(-127, 127)[None] + 0.5
    x = (halves * scale).repeat(1, 3)
    x[:, 254:508] = torch.nextafter(x[:, :254], torch.tensor(math.inf))
    x[:, 508:] = torch.nextafter(x[:, :254], torch.tensor(-math.inf))
    x = torch.cat([127 * scale, x], dim=1)
    weight = torch.eye(x.shape[1])  # every code comes out by itself
    qweight = quantize_weight(weight, "w8a8")
    ours, reference = (quantized_linear(x, qweight, backend=backend) for backend in ("cpu", "reference"))
    assert torch.equal(ours, reference)


@each_scheme
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [1, 20])
def test_bad_rows_are_the_references_and_leave_the_others_alone(scheme, bad, rows):
    x, weight, bias, _ = problem(rows, 64, 18)
    qweight = quantize_weight(weight, scheme)
    clean = quantized_linear(x, qweight, bias, backend="cpu")
    x[0, 7] = bad
    ours, reference = (quantized_linear(x, qweight, bias, backend=b) for b in ("cpu", "reference"))
    assert torch.equal(ours[1:], clean[1:])
    assert torch.equal(ours[0].isnan(), reference[0].isnan())
    assert torch.equal(ours[0].isinf(), reference[0].isinf())


@pytest.mark.parametrize("input_scale", [0.02, torch.tensor(0.02), torch.tensor(0.02, dtype=torch.float64)])
def test_static_scales(input_scale):
    x, weight, bias, _ = problem(20, 64, 18)
    x[3, 5], x[4, 1], x[5, 2] = math.nan, math.inf, 1e9
    qweight = quantize_weight(weight, "w8a8")
    ours, reference = (
        quantized_linear(x, qweight, bias, input_scale=input_scale, backend=b) for b in ("cpu", "reference")
    )
    torch.testing.assert_close(ours, reference, equal_nan=True, rtol=1e-6, atol=1e-6)


def test_outlier_channels_keep_four_bit_rows_accurate():
    # One input a thousand times the others: the integers that stand for a group's activations must not lose these.
    x, weight, *_ = problem(1, 512, 64)
    x[0, 3] = 1000.0
    weight[:, 3] = 0.0
    qweight = quantize_weight(weight, "w4a16")
    ours, eager = (quantized_linear(x, qweight, backend=b) for b in ("cpu", "reference"))
    assert_as_accurate(ours, eager, x.double() @ qweight.dequantize(torch.float64).t())


# Gradients.


@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", [*CPU_SCHEMES, "linear"])
def test_gradients_are_as_accurate_as_the_reference(op, dtype, activation):
    for m, k, n in ((1, 32, 3), (50, 96, 37), (200, 64, 129)):
        x, weight, bias, residual = problem(m, k, n, dtype=dtype)
        grad = random(m, n, seed=9, dtype=dtype)
        qweight = None if op == "linear" else quantize_weight(weight, op)
        weight = weight.to(dtype)

        def gradients(backend, x, weight, bias, residual, qweight=qweight, grad=grad):
            inputs = [t.detach().clone().requires_grad_() for t in (x, weight, bias, residual)]
            if qweight is None:
                y = linear(*inputs[:3], activation=activation, residual=inputs[3], backend=backend)
            else:
                del inputs[1]
                y = quantized_linear(
                    inputs[0], qweight, inputs[1], activation=activation, residual=inputs[2], backend=backend
                )
            return torch.autograd.grad(y, inputs, grad.to(y.dtype))

        ours, eager = (gradients(backend, x, weight, bias, residual) for backend in ("cpu", "reference"))
        if qweight is None:
            exact = gradients("reference", x.double(), weight.double(), bias.double(), residual.double())
        else:
            x64, weight64 = quantized_operands(x.float(), qweight)
            pre = (x64 @ weight64.t() + bias.double()).requires_grad_()
            (slope,) = torch.autograd.grad(activate(pre, activation), pre, grad.double())
            exact = (slope @ weight64, slope.sum(0), grad.double())
        for mine, theirs, truth in zip(ours, eager, exact, strict=True):
            assert mine.dtype == dtype
            assert_typically_as_accurate(mine, theirs, truth, f"{op} {m, k, n}")


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_gradients_do_not_depend_on_strides(layout):
    x, weight, bias, _ = problem(40, 64, 33)
    grad = random(40, 33, seed=5)
    twisted = [LAYOUTS[layout](t) for t in (x, weight, grad)]

    def gradients(x, weight, grad):
        inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
        return torch.autograd.grad(linear(*inputs, activation="gelu", backend="cpu"), inputs, grad)

    for found, expected in zip(
        gradients(*twisted), gradients(*(t.contiguous() for t in twisted)), strict=True
    ):
        assert torch.equal(found, expected)


def test_gradients_of_activations_of_three_dimensions_that_no_stride_joins():
    x = random(6, 5, 64).transpose(0, 1).requires_grad_()
    weight = random(8, 64, seed=1).requires_grad_()
    grad = random(6, 5, 8, seed=2).transpose(0, 1)
    found = torch.autograd.grad(linear(x, weight, backend="cpu"), (x, weight), grad)
    expected = torch.autograd.grad(linear(x, weight, backend="reference"), (x, weight), grad)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# Bits and threads.


@each_scheme
@each_dtype
def test_bits_depend_neither_on_threads_nor_on_the_batch(scheme, dtype):
    x, weight, bias, _ = problem(300, 256, 200, dtype=dtype)
    qweight = quantize_weight(weight, scheme)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(quantized_linear(x, qweight, bias, activation="gelu", backend="cpu"))
        results.append(quantized_linear(x, qweight, bias, activation="gelu", backend="cpu"))
    assert all(torch.equal(results[0], other) for other in results[1:])
    # Up to four rows of a 4-bit weight are another kernel.
    pieces = [quantized_linear(part, qweight, bias, activation="gelu", backend="cpu") for part in x.split(77)]
    assert torch.equal(torch.cat(pieces), results[0])


@each_dtype
def test_gradients_have_the_same_bits_with_any_number_of_threads(dtype):
    x, weight, bias, _ = problem(300, 96, 200, dtype=dtype)
    grad = random(300, 200, seed=7, dtype=dtype)
    results = []
    for threads in (1, 2, 3, 3):
        torch.set_num_threads(threads)
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        y = linear(*inputs, activation="gelu", backend="cpu")
        results.append((y.detach(), *torch.autograd.grad(y, inputs, grad)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_python_threads_do_not_disturb_each_other():
    problems = [problem(60, 128, 90, seed=10 * seed) for seed in range(4)]
    weights = [quantize_weight(weight, "w8a8") for _, weight, *_ in problems]
    calls = [
        partial(quantized_linear, x, weight, backend="cpu")
        for (x, *_), weight in zip(problems, weights, strict=True)
    ]
    assert_undisturbed_by_threads(calls, repetitions=5)


# What a call issues.

IMPLEMENTATIONS = {
    ops._quantized_linear: ops._quantized_impl,
    ops._quantized_linear_backward: ops._quantized_backward_impl,
    linear_file._linear: linear_file._linear_impl,
    linear_file._linear_backward: linear_file._linear_backward_impl,
}


@pytest.mark.parametrize("op", [*CPU_SCHEMES, "linear"])
@pytest.mark.parametrize("shape", [(20,), (2, 10), (2, 5, 2)])
def test_a_call_issues_only_allocations_and_views(op, shape):
    x, weight, bias, residual = problem(20, 64, 12)
    x, residual = x.view(*shape, 64).requires_grad_(), residual.view(*shape, 12)
    bias.requires_grad_()
    qweight = None if op == "linear" else quantize_weight(weight, op)
    weight.requires_grad_()
    grad = torch.ones(*shape, 12)
    with Inside(IMPLEMENTATIONS) as mode:
        if qweight is None:
            y = linear(x, weight, bias, activation="gelu", residual=residual, backend="cpu")
            torch.autograd.grad(y, (x, weight, bias), grad)
        else:
            y = quantized_linear(x, qweight, bias, activation="gelu", residual=residual, backend="cpu")
            torch.autograd.grad(y, (x, bias), grad)
    assert len(mode.ours) == 2
    assert set(mode.inside) <= ALLOCATIONS_AND_VIEWS


def test_a_plain_call_and_the_registered_op_give_the_same_bits():
    x, weight, bias, residual = problem(20, 64, 12)
    qweight = quantize_weight(weight, "w8a8")
    plain = quantized_linear(x, qweight, bias, activation="silu", residual=residual)
    registered = quantized_linear(
        x.clone().requires_grad_(), qweight, bias, activation="silu", residual=residual
    )
    assert registered.requires_grad
    assert torch.equal(plain, registered.detach())


@each_scheme
def test_opcheck(scheme):
    x, weight, bias, residual = problem(3, 64, 8)
    qweight = quantize_weight(weight, scheme)
    tensors = (qweight.weight_q, qweight.scale, qweight.zero_point, qweight.packed("cpu"))
    inputs = [t.requires_grad_() for t in (x, bias, residual)]
    arguments = (inputs[0], *tensors, inputs[1], inputs[2], None, scheme, "quick_gelu", "cpu")
    torch.library.opcheck(torch.ops.vlmkernels.quantized_linear.default, arguments)


def test_opcheck_linear():
    inputs = [t.requires_grad_() for t in problem(3, 24, 8)]
    torch.library.opcheck(torch.ops.vlmkernels.linear.default, (*inputs, "gelu", None, "cpu"))


def test_compiles_without_a_graph_break():
    x, weight, bias, _ = problem(5, 64, 8)
    qweight = quantize_weight(weight, "w8a8")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: quantized_linear(x, qweight, bias, activation="gelu", backend="cpu"),
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(x), quantized_linear(x, qweight, bias, activation="gelu", backend="cpu"))
    leaf = x.clone().requires_grad_()
    compiled(leaf).sum().backward()
    assert leaf.grad.isfinite().all()


def test_refusals_say_why():
    x, weight, *_ = problem(3, 64, 8)
    qweight = quantize_weight(weight, "w8a8")
    with pytest.raises(NotImplementedError, match=r"float32 and bfloat16, and x is torch\.float64"):
        quantized_linear(x.double(), qweight, backend="cpu")
    with pytest.raises(NotImplementedError, match="'fp8' is what GPUs multiply"):
        quantized_linear(x, quantize_weight(weight, "fp8"), backend="cpu")
    with pytest.raises(NotImplementedError, match="may leave 32 bits"):
        quantized_linear(
            torch.zeros(1, 131073), quantize_weight(torch.zeros(1, 131073), "w8a8"), backend="cpu"
        )
    with pytest.raises(NotImplementedError, match=r"torch\.float16"):
        linear(x, weight, compute_dtype=torch.float16, backend="cpu")


def test_defaults():
    x, weight, *_ = problem(3, 64, 8)
    qweight = quantize_weight(weight, "w8a8")
    assert torch.equal(quantized_linear(x, qweight), quantized_linear(x, qweight, backend="cpu"))
    large, wide = random(_linear_cpu.FEWEST_ROWS, 512), random(512, 512, seed=1)
    assert torch.equal(linear(large, wide), linear(large, wide, backend="cpu"))
    assert torch.equal(linear(x, weight), linear(x, weight, backend="reference"))


def test_a_weight_of_a_trace_is_packed_later():
    weight = random(8, 64)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert quantize_weight(torch.empty(8, 64), "w8a8").packed("cpu") is None
    qweight = quantize_weight(weight, "w8a8")
    expected = quantized_linear(weight, qweight, backend="cpu")
    qweight._packed.clear()
    assert torch.equal(quantized_linear(weight, qweight, backend="cpu"), expected)


# Bounds.

GUARDED = """
    import torch
    from kernel_checks import GuardedAllocations, guarded
    from test_quantized_cpu import IMPLEMENTATIONS, CPU_SCHEMES, DTYPES, linear, problem, quantized_linear
    from vlmkernels.ops.quantized import QuantizedWeight, quantize_weight

    sizes = ((1, 32, 1), (3, 64, 5), (4, 96, 49), (9, 160, 33), (17, 32, 97), (129, 64, 15))
    for scheme in (*CPU_SCHEMES, "linear"):
        for m, k, n in sizes:
            for dtype in DTYPES:
                if scheme == "linear":
                    k += 1
                x, weight, bias, residual = problem(m, k, n, dtype=dtype)
                grad = residual.flip(0)

                def results(x, weight, bias, residual, grad, tensors):
                    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
                    if scheme == "linear":
                        y = linear(*inputs, activation="gelu", residual=residual, backend="cpu")
                    else:
                        del inputs[1]
                        qweight = QuantizedWeight(scheme, *tensors)
                        y = quantized_linear(inputs[0], qweight, inputs[1], activation="gelu",
                                             residual=residual, backend="cpu")
                    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]

                weight = weight.to(dtype)
                tensors = ()
                if scheme != "linear":
                    q = quantize_weight(weight, scheme)
                    tensors = (q.weight_q, q.scale, q.zero_point)
                expected = results(x, weight, bias, residual, grad, tensors)
                with GuardedAllocations(IMPLEMENTATIONS) as mode:
                    found = results(*map(guarded, (x, weight, bias, residual, grad)), tuple(map(guarded, tensors)))
                assert mode.count >= 4, "no output was guarded"
                for a, b in zip(found, expected, strict=True):
                    assert torch.equal(a, b), (scheme, m, k, n, dtype)
                found = None
    print("in bounds")
"""


def test_nothing_is_read_or_written_behind_a_buffer():
    assert "in bounds" in run(GUARDED)


# Instruction sets.

EVERY_PROBLEM = """
    import itertools, sys, torch
    from test_quantized_cpu import CPU_SCHEMES, DTYPES, isa_problems, results_of
    from vlmkernels import _native
    from vlmkernels.ops.quantized import quantize_weight, quantized_linear

    torch.save({"isa": _native.cpu.isa(), "results": results_of("cpu")}, sys.argv[1])
"""


def isa_problems():
    """Sizes, dtype and seed of what every instruction set is tried at."""
    sizes = ((1, 64, 9), (3, 96, 70), (7, 160, 33), (50, 768, 100), (131, 2304, 17))
    return itertools.product((*CPU_SCHEMES, "linear"), sizes, DTYPES)


def results_of(backend):
    """Result and gradient of x for each of them, and codes at the limits of int8."""
    found = {}
    for scheme, (m, k, n), dtype in isa_problems():
        x, weight, bias, residual = problem(m, k, n, dtype=dtype)
        x = x.requires_grad_()
        if scheme == "linear":
            y = linear(x, weight.to(dtype), bias, activation="gelu", residual=residual, backend=backend)
        else:
            qweight = quantize_weight(weight, scheme)
            y = quantized_linear(x, qweight, bias, activation="gelu", residual=residual, backend=backend)
        (grad,) = torch.autograd.grad(y, x, residual)
        found[scheme, m, k, n, dtype] = (y.detach(), grad)
    x = torch.tensor([[127.0], [-127.0]]).expand(2, 70_001)
    weight = x.clone()
    weight[1, ::2] *= -1
    found["extreme"] = quantized_linear(x, quantize_weight(weight, "w8a8"), backend=backend)
    codes = random(5, 3000, seed=3) * torch.logspace(-3, 3, 5)[:, None]
    found["int8"] = quantized_linear(
        codes, quantize_weight(random(61, 3000, seed=4), "w8a8"), backend=backend
    )
    return found


@pytest.fixture(scope="module")
def reference_results():
    return results_of("reference")


@pytest.mark.parametrize("isa", isa_levels())
def test_every_instruction_set_is_exact_in_int8_and_as_accurate_as_eager(isa, tmp_path, reference_results):
    saved = saved_at(isa, EVERY_PROBLEM, tmp_path)
    for name in ("extreme", "int8"):
        assert torch.equal(saved["results"][name], reference_results[name]), name
    for scheme, (m, k, n), dtype in isa_problems():
        x, weight, bias, residual = problem(m, k, n, dtype=dtype)
        if scheme == "linear":
            x64, weight64 = x.double(), weight.to(dtype).double()
        else:
            x64, weight64 = quantized_operands(x.float(), quantize_weight(weight, scheme))
        pre = (x64 @ weight64.t() + bias.double()).requires_grad_()
        exact = activate(pre, "gelu") + residual.double()
        (slope,) = torch.autograd.grad(exact, pre, residual.double())
        y, grad = saved["results"][scheme, m, k, n, dtype]
        eager, eager_grad = reference_results[scheme, m, k, n, dtype]
        assert_as_accurate(y, eager, exact.detach(), f"{scheme} {m, k, n}")
        assert_typically_as_accurate(grad, eager_grad, slope @ weight64, f"gradient, {scheme} {m, k, n}")
