# SPDX-License-Identifier: Apache-2.0
"""Quantizers and quantized linear layers in plain PyTorch: what every backend is tested against.

Letters: M rows of activations, K inputs, N outputs, G the group of a four-bit weight. Checks live in the
    public functions.

Every quantizer here is symmetric per row unless it says otherwise, and its scale follows three rules:

* a row of zeros (or one so small that absmax / limit underflows to zero) has scale 0 and codes 0, so it
  dequantizes to zeros;
* a row that holds a NaN or an infinity has scale NaN and codes 0, so it dequantizes to NaN throughout;
* codes are `round(x / scale)`, a true division, ties to even.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkernels.ops._library import no_autocast
from vlmkernels.ops.dispatch import _inside_transform as inside_transform
from vlmkernels.ops.reference.linear import accumulator_dtype, epilogue, output_dtype

INT8_LIMIT = 127
FP8_LIMIT = 448.0  # the largest finite e4m3fn number
INT4_LEVELS = 15

_FLOAT32_EXACT_INTEGERS = 2**24


def quantized_linear(
    x: Tensor,
    weight_q: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bias: Tensor | None = None,
    *,
    scheme: str,
    activation: str | None = None,
    residual: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Tensor:
    """`activation(product + bias) + residual` where `product` belongs to the scheme.

    ```
    w8a8    scale_x[m] * scale[n] * sum_k codes_x[m, k] * weight_q[n, k]      the sum is exact, whatever K
    fp8     the same in e4m3, the sum in float32
    w8a16   sum_k x[m, k] * (weight_q[n, k] * scale[n])
    w4a16   sum_k x[m, k] * ((code[n, k] - zero_point[n, k // G]) * scale[n, k // G])
    bf16    sum_k bfloat16(x[m, k]) * weight_q[n, k]
    ```

    Args:
        x: [..., K], floating.
        weight_q: [N, K], or [N, K / 2] for w4a16.
        scale: [N], [N, K / G] for w4a16, None for bf16.
        zero_point: [N, K / G] for w4a16, else None.
        bias: [N] or None.
        scheme: "w8a8", "w8a16", "w4a16", "fp8" or "bf16".
        activation: a name that `linear.apply_activation` knows.
        residual: [..., N] or None.
        input_scale: 0-d, the static activation scale of w8a8 and fp8; None quantizes every row by its own
            maximum.

    Returns:
        [..., N] in x's dtype (widened by the residual's). The gradient of `x` is that of a product with the
        dequantized weight.
    """
    with no_autocast(x.device.type):
        if scheme in ("w8a16", "w4a16"):
            accumulate = accumulator_dtype(x.dtype)
            product = F.linear(x.to(accumulate), dequantize(weight_q, scale, zero_point, accumulate))
        elif x.requires_grad or inside_transform():
            # Function.apply costs more than a small product. Inside a torch.func transform requires_grad
            # speaks of the innermost level alone, so there it cannot be spared.
            product = _StraightThroughProduct.apply(x, weight_q, scale, input_scale, scheme)
        else:
            product = _rounded_product(x, weight_q, scale, input_scale, scheme)
        return epilogue(product, bias, activation, residual, output_dtype(x, residual))


def _rounded_product(
    x: Tensor, weight_q: Tensor, scale: Tensor | None, input_scale: Tensor | None, scheme: str
) -> Tensor:
    """The products of w8a8, fp8 and bf16, whose activations are rounded first."""
    accumulate = accumulator_dtype(x.dtype)
    if scale is None:  # bf16
        return F.linear(x.to(torch.bfloat16).to(accumulate), weight_q.to(accumulate))
    if scheme == "fp8":
        codes, scale_x = quantize_rows_fp8(x, input_scale)
        product = F.linear(codes.to(accumulate), weight_q.to(accumulate))
    else:
        codes, scale_x = quantize_rows_int8(x, input_scale)
        product = integer_product(codes, weight_q).to(accumulate)
    return product * scale_x.unsqueeze(-1) * scale.to(accumulate)


class _StraightThroughProduct(torch.autograd.Function):
    """The product of rounded activations, differentiated as if they had not been rounded (or clamped)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight_q: Tensor, scale: Tensor | None, input_scale: Tensor | None, scheme: str
    ) -> Tensor:
        return _rounded_product(x, weight_q, scale, input_scale, scheme)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight_q, scale, _, _ = inputs
        ctx.x_dtype = x.dtype
        ctx.save_for_backward(weight_q, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight_q, scale = ctx.saved_tensors
        with no_autocast(grad.device.type):
            grad_x = torch.matmul(grad, dequantize(weight_q, scale, None, grad.dtype)).to(ctx.x_dtype)
        return (
            grad_x,
            None,  # weight_q
            None,  # scale
            None,  # input_scale
            None,  # scheme
        )


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b.T` of int8 codes, without an error: `[..., K] x [N, K] -> [..., N]`.

    The result is floating (float32 where every partial sum fits its 24 bits, else float64, exact up to K =
    2**39), because integer matrix products are slow or missing on some devices; an int32 sum gives the same
    numbers while it does not overflow.
    """
    largest_sum = a.shape[-1] * 128 * 128
    exact = torch.float32 if largest_sum <= _FLOAT32_EXACT_INTEGERS else torch.float64
    return F.linear(a.to(exact), b.to(exact))


def quantize_rows_int8(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes of every row: `codes = clamp(round(x / scale), -127, 127)`.

    Args:
        x: [..., K], floating.
        scale: 0-d, one scale for all rows; default absmax / 127 of each row.

    Returns:
        `(codes, scale)`: int8 [..., K] and float32 [...] (float64 for float64).
    """
    ratio, scale = _scaled_rows(x, scale, INT8_LIMIT)
    return ratio.round().to(torch.int8), scale


def quantize_rows_fp8(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """e4m3 codes of every row, with absmax / 448: the float8 twin of `quantize_rows_int8`."""
    ratio, scale = _scaled_rows(x, scale, FP8_LIMIT)
    return ratio.to(torch.float8_e4m3fn), scale


def _scaled_rows(x: Tensor, scale: Tensor | None, limit: float) -> tuple[Tensor, Tensor]:
    """`(clamp(x / scale), scale)` with zero in place of every code that the scale makes irrelevant."""
    x = x.detach().to(accumulator_dtype(x.dtype))
    if scale is None:
        absmax = x.abs().amax(-1) if x.shape[-1] > 0 else x.new_zeros(x.shape[:-1])
        row_scale = absmax / limit
        row_scale = torch.where(row_scale.isfinite(), row_scale, torch.nan)
    else:
        # One number for all rows cannot carry the NaN of a single row, and a scale must be positive.
        scale = scale.detach().to(x.dtype)
        usable = ~x.isnan().any(-1) & (scale > 0) & scale.isfinite()
        row_scale = torch.where(usable, scale, torch.nan)
    divisor = row_scale.unsqueeze(-1)
    ratio = torch.where(divisor > 0, x / divisor, 0.0)
    return ratio.clamp(-limit, limit), row_scale


def quantize_weight(
    weight: Tensor, scheme: str, group_size: int | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Canonical tensors of a weight.

    Args:
        weight: [N, K], floating. Quantized from its float32 value.
        scheme: "w8a8", "w8a16", "w4a16", "fp8" or "bf16".
        group_size: G of w4a16, a divisor of K.

    Returns:
        `(weight_q, scale, zero_point)` as `quantized_linear` takes them.
    """
    weight = weight.detach()
    if scheme == "bf16":
        return weight.to(torch.bfloat16), None, None
    weight = weight.to(torch.float32)
    if scheme == "w4a16":
        if group_size is None:
            raise ValueError("quantize_weight: w4a16 needs a group_size, got None")
        return _quantize_groups_uint4(weight, group_size)
    quantize_rows = quantize_rows_fp8 if scheme == "fp8" else quantize_rows_int8
    weight_q, scale = quantize_rows(weight)
    return weight_q, scale, None


def _quantize_groups_uint4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """`code = clamp(round(w / scale) + zero_point, 0, 15)`, scale = (max - min) / 15 over a group widened to
    contain 0.

    Containing 0 keeps the zero point in 0..15 and makes zeros exact; it costs levels only where a group has
    one sign.
    """
    n, k = weight.shape
    groups = weight.reshape(n, k // group_size, group_size)
    if groups.numel() == 0:
        low = high = weight.new_zeros(groups.shape[:-1])
    else:
        low, high = groups.amin(-1).clamp(max=0.0), groups.amax(-1).clamp(min=0.0)
    scale = high / INT4_LEVELS - low / INT4_LEVELS  # two quotients: the difference itself may overflow
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    zero_point = torch.where(scale > 0, -low / scale, 0.0).round().clamp(0, INT4_LEVELS)
    divisor = scale.unsqueeze(-1)
    codes = torch.where(divisor > 0, groups / divisor, 0.0).round() + zero_point.unsqueeze(-1)
    codes = codes.clamp(0, INT4_LEVELS).to(torch.uint8).reshape(n, k)
    return pack_nibbles(codes), scale, zero_point.to(torch.uint8)


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [N, K] with values 0..15 -> uint8 [N, K / 2]; element 2j is the low nibble of byte j."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [N, K / 2] -> uint8 [N, K], the inverse of `pack_nibbles`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def dequantize(
    weight_q: Tensor, scale: Tensor | None, zero_point: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The float weight [N, K] of the canonical tensors, computed in float32 or wider, cast to `dtype`."""
    wide = accumulator_dtype(dtype)
    if zero_point is not None and scale is not None:
        codes = unpack_nibbles(weight_q).to(wide)
        groups = codes.reshape(*scale.shape, codes.shape[-1] // max(scale.shape[-1], 1))
        weight = (groups - zero_point.unsqueeze(-1)) * scale.to(wide).unsqueeze(-1)
        return weight.reshape(codes.shape).to(dtype)
    weight = weight_q.to(wide)
    if scale is not None:
        weight = weight * scale.to(wide).unsqueeze(-1)
    return weight.to(dtype)
