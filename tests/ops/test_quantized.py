# SPDX-License-Identifier: Apache-2.0
"""vk.quantize_weight, vk.quantized_linear, vk.QuantizedWeight: quantizers, exact sums, epilogue, refusals."""

from __future__ import annotations

import copy
import doctest
import io
import itertools
import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from linear_problems import ACTIVATIONS, EPS32, SCHEMES, activate, quantized_operands, random

import vlmkernels as vk
from vlmkernels.ops import quantized
from vlmkernels.ops.quantized import QuantizedWeight, quantize_weight, quantized_linear
from vlmkernels.ops.reference import quantized as reference

# Weights.


def test_int8_codes_are_the_written_formula():
    weight = random(17, 96)
    qweight = quantize_weight(weight, "w8a8")
    scale = weight.abs().max(dim=1).values / 127
    assert torch.equal(qweight.scale, scale)
    assert qweight.weight_q.dtype == torch.int8
    assert torch.equal(qweight.weight_q.float(), (weight / scale[:, None]).round())
    assert qweight.weight_q.abs().max() == 127


def test_int8_codes_round_half_to_even():
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    assert quantize_weight(weight, "w8a16").weight_q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


def test_w8a8_and_w8a16_share_their_tensors():
    weight = random(8, 40)
    a, b = quantize_weight(weight, "w8a8"), quantize_weight(weight, "w8a16")
    assert torch.equal(a.weight_q, b.weight_q)
    assert torch.equal(a.scale, b.scale)


def test_four_bit_codes_are_packed_low_nibble_first():
    weight = torch.arange(16.0).repeat(1, 2)  # min 0, max 15: scale 1, zero point 0, code = value
    qweight = quantize_weight(weight, "w4a16", group_size=32)
    assert qweight.scale.tolist() == [[1.0]]
    assert qweight.zero_point.tolist() == [[0]]
    expected = [(2 * j) | (2 * j + 1) << 4 for j in range(8)] * 2
    assert qweight.weight_q.dtype == torch.uint8
    assert qweight.weight_q.tolist() == [expected]


def test_four_bit_zero_point_places_zero_exactly():
    weight = torch.cat([torch.full((1, 31), -4.0), torch.tensor([[11.0]])], dim=1)
    weight[0, 3] = 0.0
    qweight = quantize_weight(weight, "w4a16", group_size=32)
    assert qweight.zero_point.tolist() == [[4]]
    assert torch.equal(qweight.dequantize(), weight)


@pytest.mark.parametrize("offset", [5.0, -5.0])
def test_four_bit_groups_of_one_sign_stay_within_half_a_step(offset):
    weight = random(4, 64).clamp(-1, 1) + offset
    qweight = quantize_weight(weight, "w4a16", group_size=64)
    assert (qweight.dequantize() - weight).abs().max() <= qweight.scale.max() * 0.5 * (1 + 16 * EPS32)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_four_bit_groups_have_their_own_scale(group_size):
    weight = random(5, 256) * torch.linspace(0.1, 10, 256)
    qweight = quantize_weight(weight, "w4a16", group_size=group_size)
    assert qweight.group_size == group_size
    assert qweight.weight_q.shape == (5, 128)
    assert qweight.scale.shape == qweight.zero_point.shape == (5, 256 // group_size)
    step = qweight.scale.repeat_interleave(group_size, dim=1)
    # Half a step, plus what float32 loses in codes up to 15 steps away from zero.
    assert ((qweight.dequantize() - weight).abs() <= step * 0.5 * (1 + 32 * EPS32)).all()


@pytest.mark.parametrize(("k", "group"), [(384, 128), (192, 64), (96, 32)])
def test_default_group_is_the_largest_that_divides(k, group):
    assert quantize_weight(random(2, k), "w4a16").group_size == group


def test_round_trip_errors_are_bounded_by_half_a_step():
    weight = random(33, 160) * torch.logspace(-6, 6, 33)[:, None]
    int8 = quantize_weight(weight, "w8a8")
    # Half a step, plus the float32 rounding of quotient and product (codes reach 127 steps).
    assert ((int8.dequantize() - weight).abs() <= int8.scale[:, None] * (0.5 + 127 * EPS32)).all()
    fp8 = quantize_weight(weight, "fp8")
    # e4m3: 3 mantissa bits, so half a unit is 2^-4 relative; subnormals step by 2^-9.
    bound = torch.maximum(weight.abs() * 2**-4, fp8.scale[:, None] * 2**-10) * (1 + 4 * EPS32)
    assert ((fp8.dequantize() - weight).abs() <= bound).all()
    bf16 = quantize_weight(weight, "bf16")
    assert ((bf16.dequantize() - weight).abs() <= weight.abs() * 2**-8).all()
    assert bf16.scale is None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantizing_a_dequantized_weight_changes_nothing(scheme):
    once = quantize_weight(random(12, 128), scheme)
    twice = quantize_weight(once.dequantize(), scheme)
    assert torch.equal(once.weight_q.view(torch.uint8), twice.weight_q.view(torch.uint8))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_any_floating_dtype_are_quantized_from_float32(scheme, dtype):
    weight = random(6, 64, dtype=dtype)
    a, b = quantize_weight(weight, scheme), quantize_weight(weight.float(), scheme)
    assert torch.equal(a.dequantize(), b.dequantize())
    assert a.dequantize(torch.float64).dtype == torch.float64


@pytest.mark.parametrize("scheme", SCHEMES)
def test_channels_of_zeros_dequantize_to_zeros(scheme):
    weight = random(3, 64)
    weight[1] = 0
    qweight = quantize_weight(weight, scheme)
    assert torch.equal(qweight.dequantize()[1], torch.zeros(64))
    assert quantized_linear(random(2, 64), qweight)[:, 1].tolist() == [0.0, 0.0]
    if qweight.scale is not None:
        assert (qweight.scale[1] == 0).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_channels_with_nan_dequantize_to_nan_and_leave_the_others_alone(scheme):
    weight = random(3, 32)
    clean = quantize_weight(weight, scheme).dequantize()
    weight[1, 5] = math.nan
    found = quantize_weight(weight, scheme).dequantize()
    assert found[1, 5].isnan()
    if scheme != "bf16":  # which has no scale to share
        assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16", "fp8"])
def test_channels_with_infinity_dequantize_to_nan(scheme):
    weight = random(2, 32)
    weight[0, 0] = -math.inf
    dequantized = quantize_weight(weight, scheme).dequantize()
    assert dequantized[0].isnan().all()
    assert dequantized[1].isfinite().all()


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16", "fp8"])
@pytest.mark.parametrize("size", [1e-44, 1e-40, 1e38, 3e38])
def test_extreme_magnitudes_stay_finite_and_in_range(scheme, size):
    weight = random(4, 32).clamp(-1, 1) * size
    qweight = quantize_weight(weight, scheme)
    dequantized = qweight.dequantize()
    assert dequantized.isfinite().all()
    # Where the scale itself is a subnormal it has few bits: one whole step then.
    step = qweight.scale.amax(-1) if scheme == "w4a16" else qweight.scale * (1 if scheme == "w8a8" else 32)
    # Where it underflows to zero, so does the weight.
    step = torch.where(step > 0, step, weight.abs().amax(-1))
    assert ((dequantized - weight).abs().amax(-1) <= step).all()


def test_weights_with_no_inputs_or_no_outputs():
    for scheme, shape in itertools.product(SCHEMES, [(0, 64), (4, 0), (0, 0)]):
        qweight = quantize_weight(torch.zeros(shape), scheme)
        assert qweight.shape == shape
        assert qweight.dequantize().shape == shape
        y = quantized_linear(torch.ones(3, shape[1]), qweight, torch.ones(shape[0]))
        assert torch.equal(y, torch.ones(3, shape[0]))


# The product.


@pytest.mark.parametrize("k", [1, 1024, 1025, 70_000])
def test_int8_sums_are_exact_at_extreme_codes(k):
    codes = torch.tensor([[127.0], [-127.0]]).expand(2, k)
    x = codes.double()  # absmax 127: scale 1, codes are the values
    weight = codes.clone().float()
    weight[1, ::2] *= -1
    qweight = quantize_weight(weight, "w8a8")
    assert qweight.scale.tolist() == [1.0, 1.0]
    expected = x.long() @ weight.long().t()
    assert torch.equal(quantized_linear(x, qweight).long(), expected)
    assert torch.equal(quantized_linear(x.float(), qweight), expected.float())


@pytest.mark.parametrize("k", [3, 1000, 4096])
def test_int8_sums_are_exact_at_random_codes(k):
    generator = torch.Generator().manual_seed(k)
    a = torch.randint(-127, 128, (5, 2, k), generator=generator, dtype=torch.int8)
    b = torch.randint(-128, 128, (7, k), generator=generator, dtype=torch.int8)
    assert torch.equal(reference.integer_product(a, b).long(), a.long() @ b.long().t())


def test_int8_sums_are_exact_under_autocast():
    x = torch.full((1, 1000), 127.0)
    x[0, 0] = 126.0
    qweight = quantize_weight(x, "w8a8")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = quantized_linear(x.double(), qweight)  # float64 is not autocast
        assert reference.quantized_linear(x, qweight.weight_q, qweight.scale, None, scheme="w8a8").item() == y
    assert y.item() == 127.0**2 * 999 + 126.0**2


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_result_is_the_product_of_the_quantized_operands_then_the_epilogue(scheme, activation):
    x, weight = random(3, 11, 160, seed=1), random(37, 160, seed=2) / 10
    bias, residual = random(37, seed=3), random(3, 11, 37, seed=4)
    qweight = quantize_weight(weight, scheme)
    y = quantized_linear(x, qweight, bias, activation=activation, residual=residual)
    x64, weight64 = quantized_operands(x, qweight)
    expected = activate(x64 @ weight64.t() + bias.double(), activation) + residual.double()
    # The eager float32 computation on the same operands is the yardstick.
    eager = activate(F.linear(x64.float(), weight64.float(), bias), activation) + residual
    allowed = max(1.2 * (eager - expected).abs().max().item(), 4 * EPS32 * expected.abs().max().item())
    assert (y - expected).abs().max() <= allowed


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_result_has_the_dtype_of_x_and_is_rounded_once(scheme, dtype):
    x, bias = random(9, 64, dtype=dtype), random(21, seed=1, dtype=dtype)
    qweight = quantize_weight(random(21, 64, seed=2), scheme)
    y = quantized_linear(x, qweight, bias, activation="gelu")
    assert y.dtype == dtype
    wide = x.double() if dtype == torch.float64 else x.float()
    x64, weight64 = quantized_operands(wide, qweight)
    expected = activate(x64 @ weight64.t() + bias.double(), "gelu")
    # One rounding to dtype is half a unit; float32 sums before it add far less.
    unit = torch.finfo(dtype).eps * expected.abs().max()
    assert (y.double() - expected).abs().max() <= (4 if dtype == torch.float64 else 0.51) * unit


def test_accuracy_of_eight_bits_against_float():
    x, weight = random(64, 512, seed=1), random(256, 512, seed=2)
    exact = x @ weight.t()
    for scheme, limit in [("w8a8", 0.015), ("w8a16", 0.01), ("w4a16", 0.15), ("fp8", 0.05), ("bf16", 0.004)]:
        y = quantized_linear(x, quantize_weight(weight, scheme))
        assert 0 < (y - exact).norm() / exact.norm() < limit, scheme


def test_rows_of_zeros_give_the_epilogue_alone():
    x = random(3, 64)
    x[1] = 0
    bias = random(8, seed=1)
    for scheme in SCHEMES:
        y = quantized_linear(x, quantize_weight(random(8, 64, seed=2), scheme), bias, activation="relu")
        assert torch.equal(y[1], bias.relu()), scheme


@pytest.mark.parametrize("scheme", ["w8a8", "fp8"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_with_nan_or_infinity_give_nan_and_leave_the_others_alone(scheme, bad):
    x, qweight = random(3, 64), quantize_weight(random(8, 64, seed=2), scheme)
    clean = quantized_linear(x, qweight)
    x[1, 7] = bad
    y = quantized_linear(x, qweight)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


def test_rows_do_not_depend_on_each_other():
    x, qweight = (
        random(13, 96) * torch.logspace(-3, 3, 13)[:, None],
        quantize_weight(random(8, 96, seed=2), "w8a8"),
    )
    together = quantized_linear(x, qweight)
    apart = torch.stack([quantized_linear(row, qweight) for row in x])
    assert torch.equal(together, apart)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_strides_do_not_matter(scheme):
    qweight = quantize_weight(random(10, 64, seed=1), scheme)
    base = random(8, 9, 130)
    views = [base[..., ::2][..., :64], base[:, :, 3:67], base[:, :, :64].transpose(0, 1)]
    views.append(base[:1, :, :64].expand(4, 9, 64))
    residual = random(9, 10, 8, seed=2).permute(2, 0, 1)
    for x in (*views, base[:, :, :64]):
        # The library may sum float products in another order for other strides; integers have no order.
        allowed = 0 if scheme == "w8a8" else 64 * EPS32 * 64
        extra = residual if x.shape[:2] == (8, 9) else None
        y = quantized_linear(x, qweight, residual=extra)
        z = quantized_linear(x.contiguous(), qweight, residual=None if extra is None else extra.contiguous())
        assert (y - z).abs().max() <= allowed


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(64,), (0, 64), (1, 64), (2, 0, 64), (2, 3, 5, 64)])
def test_leading_dimensions_are_kept(scheme, shape):
    qweight = quantize_weight(random(10, 64, seed=1), scheme)
    y = quantized_linear(random(*shape), qweight, residual=random(*shape[:-1], 10))
    assert y.shape == (*shape[:-1], 10)


def test_same_input_gives_the_same_bits():
    x, qweight = random(50, 768), quantize_weight(random(77, 768, seed=1), "w8a8")
    assert torch.equal(quantized_linear(x, qweight), quantized_linear(x, qweight))


# Static activation scales.


@pytest.mark.parametrize(("scheme", "limit"), [("w8a8", 127), ("fp8", 448)])
def test_static_scale_equals_dynamic_where_it_is_the_rows_own(scheme, limit):
    x, qweight = random(1, 64), quantize_weight(random(8, 64, seed=1), scheme)
    scale = x.abs().max() / limit
    dynamic = quantized_linear(x, qweight)
    assert torch.equal(quantized_linear(x, qweight, input_scale=scale), dynamic)
    assert torch.equal(quantized_linear(x, qweight, input_scale=scale.item()), dynamic)


def test_static_scale_saturates():
    qweight = quantize_weight(torch.full((1, 4), 127.0), "w8a8")  # scale 1
    x = torch.tensor([[300.0, -300.0, math.inf, 1.0], [2.0, 0.0, 0.0, -1.4]])
    assert quantized_linear(x, qweight, input_scale=1.0).flatten().tolist() == [127 * 128.0, 127.0]


def test_static_scale_lets_nan_through():
    x, qweight = random(3, 32), quantize_weight(random(4, 32, seed=1), "w8a8")
    x[2, 0] = math.nan
    y = quantized_linear(x, qweight, input_scale=0.02)
    assert y[2].isnan().all()
    assert y[:2].isfinite().all()


def test_static_scale_that_nobody_could_check_gives_nan():
    x, qweight = random(2, 32), quantize_weight(random(4, 32, seed=1), "w8a8")
    for bad in (0.0, -1.0, math.inf, math.nan):
        tensors = (qweight.weight_q, qweight.scale, None)
        y = reference.quantized_linear(x, *tensors, scheme="w8a8", input_scale=torch.tensor(bad))
        assert y.isnan().all()


# QuantizedWeight.


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_weight_survives_pickle_and_deepcopy(scheme):
    qweight = quantize_weight(random(8, 64), scheme)
    file = io.BytesIO()
    torch.save(qweight, file)
    file.seek(0)
    for twin in (torch.load(file, weights_only=False), copy.deepcopy(qweight)):
        assert twin.scheme == scheme
        assert twin.shape == (8, 64)
        assert twin.group_size == qweight.group_size
        assert torch.equal(twin.dequantize(), qweight.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantized_weight_moves_between_devices(scheme):
    qweight = quantize_weight(random(8, 64), scheme)
    assert qweight.to("cpu") is qweight
    moved = qweight.to("meta")
    assert moved.device.type == "meta"
    assert moved.shape == (8, 64)
    assert moved.weight_q.dtype == qweight.weight_q.dtype
    assert quantized_linear(torch.empty(3, 64, device="meta"), moved).shape == (3, 8)
    with pytest.raises(TypeError, match="device"):
        qweight.to(torch.float16)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_are_views_of_the_same_memory(scheme):
    qweight = quantize_weight(random(12, 64), scheme)
    part = qweight.rows(4, 8)
    assert torch.equal(part.dequantize(), qweight.dequantize()[4:8])
    assert part.weight_q.untyped_storage().data_ptr() == qweight.weight_q.untyped_storage().data_ptr()
    assert qweight.rows(4, 8) is part


def test_quantized_weight_sizes():
    weight = torch.zeros(64, 128)
    sizes = {scheme: quantize_weight(weight, scheme).nbytes for scheme in SCHEMES}
    assert sizes == {
        "w8a8": 64 * 128 + 64 * 4,
        "w8a16": 64 * 128 + 64 * 4,
        "w4a16": 64 * 64 + 64 * 5,
        "fp8": 64 * 128 + 64 * 4,
        "bf16": 64 * 128 * 2,
    }


def test_packed_layouts_are_made_anew_and_never_saved(monkeypatch):
    monkeypatch.setattr(quantized, "_packings", {})
    made = []

    def pack(weight_q, scale, zero_point):
        made.append(weight_q.shape)
        return weight_q.t().contiguous()

    quantized.register_packing("cpu", "cpu", "w8a8", pack)
    qweight = quantize_weight(random(8, 64), "w8a8")
    assert torch.equal(qweight.packed("cpu"), qweight.weight_q.t())
    assert qweight.packed("triton") is None
    assert quantize_weight(random(8, 64), "w8a16").packed("cpu") is None
    assert "_packed" not in qweight.__getstate__()
    assert torch.equal(copy.deepcopy(qweight).packed("cpu"), qweight.weight_q.t())
    assert qweight.rows(0, 4).packed("cpu") is qweight.rows(0, 4).packed("cpu")
    assert made == [(8, 64), (8, 64), (4, 64)]
    with pytest.raises(ValueError, match="already packs"):
        quantized.register_packing("cpu", "cpu", "w8a8", pack)


# Refusals.


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: quantize_weight([1.0], "w8a8"), TypeError, "weight must be a tensor, got list"),
        (
            lambda: quantize_weight(torch.ones(2, 2, dtype=torch.int32), "w8a8"),
            TypeError,
            "weight must be floating",
        ),
        (lambda: quantize_weight(torch.ones(4), "w8a8"), ValueError, r"weight must be \[N, K\], got \[4\]"),
        (lambda: quantize_weight(torch.ones(2, 2), "int8"), ValueError, "scheme must be one of .*got 'int8'"),
        (
            lambda: quantize_weight(torch.ones(2, 48), "w4a16"),
            ValueError,
            "divisible by 32, 64 or 128, got K = 48",
        ),
        (
            lambda: quantize_weight(torch.ones(2, 96), "w4a16", group_size=64),
            ValueError,
            "group_size 64, got K = 96",
        ),
        (
            lambda: quantize_weight(torch.ones(2, 96), "w4a16", group_size=48),
            ValueError,
            "group_size must be one of",
        ),
        (lambda: quantize_weight(torch.ones(2, 64), "w8a8", group_size=64), ValueError, "belongs to 'w4a16'"),
    ],
)
def test_quantize_weight_refuses(call, error, sentence):
    with pytest.raises(error, match=f"vk.quantize_weight: .*{sentence}"):
        call()


def _quantized(**changes):
    arguments = {"x": random(3, 64), "qweight": quantize_weight(random(8, 64), "w8a8"), "bias": random(8)}
    arguments |= changes
    return quantized_linear(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "sentence"),
    [
        ({"qweight": torch.ones(8, 64)}, TypeError, "qweight must be a QuantizedWeight .*got Tensor"),
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"x": torch.ones(3, 64, dtype=torch.int8)}, TypeError, "x must be floating"),
        ({"x": torch.ones(3, 63)}, ValueError, r"x must be \[..., K\] with qweight's K = 64, got \[3, 63\]"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must be \[..., K\]"),
        ({"bias": torch.ones(7)}, ValueError, r"bias must be \[N\] = \[8\], got \[7\]"),
        ({"bias": 1.0}, TypeError, "bias must be a tensor"),
        ({"residual": torch.ones(8)}, ValueError, r"residual must be .* = \[3, 8\], got \[8\]"),
        ({"activation": "tanh"}, ValueError, "activation must be one of .*got 'tanh'"),
        ({"input_scale": 0.0}, ValueError, "input_scale must be positive and finite, got 0.0"),
        (
            {"input_scale": torch.tensor(-1.0)},
            ValueError,
            "input_scale must be positive and finite, got -1.0",
        ),
        ({"input_scale": math.nan}, ValueError, "input_scale must be positive"),
        ({"input_scale": "auto"}, TypeError, "input_scale must be a number, got str"),
        ({"input_scale": torch.ones(3)}, ValueError, "input_scale must be a number or a 0-d tensor"),
        (
            {"input_scale": 1.0, "qweight": quantize_weight(torch.ones(8, 64), "w8a16")},
            ValueError,
            "not to 'w8a16'",
        ),
        ({"x": torch.ones(3, 64, device="meta"), "bias": None}, ValueError, "one device"),
        ({"backend": "tpu"}, ValueError, "backend must be None or one of .*got 'tpu'"),
        ({"backend": "triton"}, NotImplementedError, "backend 'triton' cannot serve"),
    ],
)
def test_quantized_linear_refuses(changes, error, sentence):
    with pytest.raises(error, match=f"vk.quantized_linear: .*{sentence}"):
        _quantized(**changes)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (("w8a8", torch.zeros(2, 32), torch.ones(2)), TypeError, "weight_q of 'w8a8' must be torch.int8"),
        (
            ("w8a8", torch.zeros(32, dtype=torch.int8), torch.ones(2)),
            ValueError,
            r"weight_q must be \[N, K\]",
        ),
        (("w8a8", torch.zeros(2, 32, dtype=torch.int8)), ValueError, "takes a scale, got None"),
        (
            ("w8a8", torch.zeros(2, 32, dtype=torch.int8), torch.ones(3)),
            ValueError,
            r"scale must be \[N\] = \[2\]",
        ),
        (
            ("w8a8", torch.zeros(2, 32, dtype=torch.int8), torch.ones(2).half()),
            TypeError,
            "scale must be float32",
        ),
        (("bf16", torch.zeros(2, 32, dtype=torch.bfloat16), torch.ones(2)), ValueError, "takes no scale"),
        (
            (
                "w4a16",
                torch.zeros(2, 32, dtype=torch.uint8),
                torch.ones(2, 4),
                torch.zeros(2, 4, dtype=torch.uint8),
            ),
            ValueError,
            r"scale must be \[N, K / G\] with G 32, 64 or 128, got \[2, 4\] for N, K = 2, 64",
        ),
        (
            ("w4a16", torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 2), torch.zeros(2, 2)),
            TypeError,
            "zero_point must be uint8",
        ),
        (
            (
                "w4a16",
                torch.zeros(2, 32, dtype=torch.uint8),
                torch.ones(2, 2),
                torch.zeros(2, 1, dtype=torch.uint8),
            ),
            ValueError,
            r"zero_point must be \[N, K / G\] = \[2, 2\]",
        ),
    ],
)
def test_quantized_weight_refuses_tensors_that_do_not_fit(arguments, error, sentence):
    with pytest.raises(error, match=f"vk.QuantizedWeight: .*{sentence}"):
        QuantizedWeight(*arguments)


def test_examples_in_the_docstrings():
    results = doctest.testmod(quantized, extraglobs={"vk": vk})
    assert results.failed == 0
    assert results.attempted >= 4
