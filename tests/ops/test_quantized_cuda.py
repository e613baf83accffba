# SPDX-License-Identifier: Apache-2.0
"""What holds for the CUDA kernels of quantized linear layers: on the emulator, and on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import cases
import emulated_cuda
import pytest
import torch
from linear_problems import ACTIVATIONS, activate, quantized_operands, random
from torch import Tensor

import vlmkernels as vk
from vlmkernels import _native
from vlmkernels.ops import _quantized_cuda, measured
from vlmkernels.ops.dispatch import Call
from vlmkernels.ops.reference import quantized as reference

each_dtype = pytest.mark.parametrize("dtype", _quantized_cuda.DTYPES, ids=str)
#: Rows, inputs, outputs: 0, 1, primes, around a tile, and a depth of more slices than are under way at once.
SHAPES = (
    (0, 32, 8),
    (5, 0, 8),
    (1, 1, 1),
    (3, 17, 5),
    (50, 64, 24),
    (127, 80, 128),
    (129, 96, 136),
    (31, 333, 257),
    (7, 768, 40),
)


@pytest.fixture(params=emulated_cuda.DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return emulated_cuda.use(request.param, monkeypatch)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return emulated_cuda.use("emulated", monkeypatch)


def on_cuda(
    device: torch.device, x: Tensor, qweight: Any, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """The result on the CPU of a call with everything on the device."""
    moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in options.items()}
    bias = None if bias is None else bias.to(device)
    return vk.quantized_linear(x.to(device), qweight.to(device), bias, **moved, backend="cuda").cpu()


def weight_of(n: int, k: int, seed: int = 1) -> Any:
    return vk.quantize_weight(random(n, k, seed=seed) if k else torch.zeros(n, 0), "w8a8")


def ulps(x: Tensor, dtype: torch.dtype) -> float:
    """Distance of the numbers of `dtype` around the largest of x."""
    return torch.finfo(dtype).eps * x.abs().max().clamp(min=1e-30).item() if x.numel() else 0.0


# Codes.


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (5, 17), (9, 64), (2, 777)])
@pytest.mark.parametrize("static", [None, 0.02])
def test_codes_and_scales_are_the_references(
    static: float | None, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    x = random(*shape, dtype=dtype)
    scale = None if static is None else torch.tensor(static)
    codes, row_scale = _quantized_cuda.quantize_rows(
        x.to(device), None if scale is None else scale.to(device)
    )
    expected, expected_scale = reference.quantize_rows_int8(x, scale)
    assert torch.equal(codes[:, : shape[1]].cpu(), expected)
    assert not codes[:, shape[1] :].any()
    assert torch.equal(row_scale.cpu(), expected_scale.expand(shape[0]).float())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 1e-45])
@pytest.mark.parametrize("static", [None, 0.5])
def test_special_rows(value: float, static: float | None, device: torch.device) -> None:
    x = random(4, 40)
    x[2] = value if value < 1 else x[2]
    x[2, 7] = value
    scale = None if static is None else torch.tensor(static)
    qweight = weight_of(9, 40)
    ours = on_cuda(device, x, qweight, input_scale=scale)
    expected = vk.quantized_linear(x, qweight, input_scale=scale, backend="reference")
    assert torch.equal(ours.isnan(), expected.isnan())
    # the same integers times the same scales, multiplied in another order
    torch.testing.assert_close(ours, expected, equal_nan=True, rtol=1e-6, atol=0)


# The product and its end.


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_bias_and_residual(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    m, k, n = shape
    x, qweight = random(m, k, dtype=dtype), weight_of(n, k)
    bias, residual = random(n, seed=2, dtype=dtype), random(m, n, seed=3, dtype=dtype)
    ours = on_cuda(device, x, qweight, bias, residual=residual)
    a, b = quantized_operands(x.float(), qweight) if k else (x.double(), torch.zeros(n, k).double())
    exact = a @ b.T + bias.double() + residual.double()
    assert ours.dtype == dtype
    assert ours.shape == (m, n)
    # one rounding to the dtype; in float32 those of two scales and two sums beside it
    assert (ours.double() - exact).abs().max().item() <= 2 * ulps(exact, dtype) if m else True


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str | None, device: torch.device) -> None:
    x, qweight, bias = 3 * random(33, 48), weight_of(40, 48), random(40, seed=2)
    ours = on_cuda(device, x, qweight, bias, activation=activation)
    a, b = quantized_operands(x, qweight)
    exact = activate(a @ b.T + bias.double(), activation)
    torch.testing.assert_close(ours.double(), exact, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("layout", sorted(cases.LAYOUTS))
def test_layouts(layout: str, device: torch.device) -> None:
    x, qweight, residual = (
        random(3, 20, 48, dtype=torch.bfloat16),
        weight_of(24, 48),
        random(3, 20, 24, seed=3),
    )
    x, residual = cases.LAYOUTS[layout](x.to(device)), cases.LAYOUTS[layout](residual.bfloat16().to(device))
    options = {"activation": "gelu", "backend": "cuda"}
    ours = vk.quantized_linear(x, qweight.to(device), residual=residual, **options)
    expected = vk.quantized_linear(
        x.contiguous(), qweight.to(device), residual=residual.contiguous(), **options
    )
    assert torch.equal(ours, expected)


def test_rows_of_a_weight_off_16_bytes(device: torch.device) -> None:
    x, qweight = random(5, 24), weight_of(12, 24).to(device)
    part = vk.quantized_linear(x.to(device), qweight.rows(3, 9), backend="cuda")
    assert torch.equal(part, vk.quantized_linear(x.to(device), qweight, backend="cuda")[:, 3:9])


@each_dtype
def test_gradients_are_those_of_the_reference(dtype: torch.dtype, device: torch.device) -> None:
    qweight, leaves = weight_of(24, 40), {}
    grads = {}
    for backend, where in (("cuda", device), ("reference", torch.device("cpu"))):
        x = random(9, 40, dtype=dtype).to(where).requires_grad_()
        bias = random(24, seed=2, dtype=dtype).to(where).requires_grad_()
        y = vk.quantized_linear(x, qweight.to(where), bias, activation="silu", backend=backend)
        grads[backend] = [g.cpu() for g in torch.autograd.grad(y.float().square().sum(), (x, bias))]
        leaves[backend] = y.detach().cpu()
    for ours, expected in zip(grads["cuda"], grads["reference"], strict=True):
        # the incoming gradients differ by the last bit of the results
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            ours, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item()
        )


# Bits, races, bounds, launches.


def test_runs_agree_bit_for_bit(device: torch.device) -> None:
    x, qweight = random(40, 70, dtype=torch.bfloat16), weight_of(33, 70)
    assert torch.equal(on_cuda(device, x, qweight), on_cuda(device, x, qweight))


def test_the_order_of_threads_does_not_matter(emulated: torch.device) -> None:
    x, qweight, residual = random(130, 400), weight_of(40, 400), random(130, 40, seed=3)
    forwards = on_cuda(emulated, x, qweight, residual=residual)
    controls = emulated_cuda.controls()
    conflicts = controls.emulator_matrix_conflicts()
    controls.emulator_run_backwards(1)
    try:
        backwards = on_cuda(emulated, x, qweight, residual=residual)
    finally:
        controls.emulator_run_backwards(0)
    assert torch.equal(forwards, backwards)
    assert controls.emulator_matrix_conflicts() == conflicts


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_outside_the_tensors_is_touched(
    shape: tuple[int, int, int], dtype: torch.dtype, emulated: torch.device
) -> None:
    m, k, n = shape
    qweight = weight_of(n, k)
    tensors = [
        random(m, k, dtype=dtype),
        _quantized_cuda._in_chunks(qweight.weight_q),
        qweight.scale,
        random(n, seed=2, dtype=dtype),
        random(m, n, seed=3, dtype=dtype),
    ]
    x, weight_q, scale, bias, residual = (emulated_cuda.guarded_like(t) for t in tensors)
    out = emulated_cuda.guarded_like(torch.zeros(m, n, dtype=dtype))
    # guarded rows may begin anywhere: weights alone must lie in chunks, and these do
    ours = _quantized_cuda.forward(x, weight_q, scale, bias, "relu", residual, None, out)
    expected = on_cuda(emulated, tensors[0], qweight, tensors[3], activation="relu", residual=tensors[4])
    assert torch.equal(ours, expected)


def test_plans(emulated: torch.device) -> None:
    def plan(m: int, n: int, k: int, out: int = 0, residual: tuple[int, int, int] = (0, 0, 0)) -> Any:
        bf16 = _native.DTYPE_TAGS[torch.bfloat16]
        nothing = (0, 0, 0)
        call = _native.cuda.QuantizedLinearCall(m, n, k, 0, 0, 0, 0, nothing, 0, residual, out, bf16)
        return call.plan()

    shared = 4 * 256 * 64
    assert plan(50432, 3072, 768) == (394 * 24, shared, True)
    assert plan(65792, 4096, 1024) == (514 * 32, shared, True)
    assert plan(0, 8, 16) == (0, shared, True)
    assert plan(1, 9, 16)[2] is False  # rows of nine values begin anywhere
    assert plan(1, 8, 16, out=8)[2] is False
    assert plan(1, 8, 16, residual=(1 << 20, 1, 12))[2] is False
    assert plan(10**10, 128, 16)[0] == 78125000
    with pytest.raises(RuntimeError, match="16 bytes"):
        plan(1, 8, 17)


# Refusals and choice.


@pytest.mark.parametrize(
    ("scheme", "dtype", "reason"),
    [
        ("w8a16", torch.bfloat16, "not 'w8a16'"),
        ("w4a16", torch.bfloat16, "not 'w4a16'"),
        ("fp8", torch.bfloat16, "not 'fp8'"),
        ("bf16", torch.bfloat16, "not 'bf16'"),
        ("w8a8", torch.float64, "float32, bfloat16 and float16, not torch.float64"),
    ],
)
def test_refusals(scheme: str, dtype: torch.dtype, reason: str, emulated: torch.device) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        vk.quantized_linear(
            random(2, 32, dtype=dtype), vk.quantize_weight(random(8, 32), scheme), backend="cuda"
        )


def test_it_is_no_default_before_a_gpu_has_shown_it() -> None:
    facts = {"outputs": 64, "inputs": 64, "rows": 5, "scheme": "w8a8"}
    not_default = measured.unless_fastest("quantized_linear", "cuda")
    assert not_default(Call("cuda", torch.bfloat16, facts)) == [measured.UNMEASURED]
