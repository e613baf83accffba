# SPDX-License-Identifier: Apache-2.0
"""Linear layers that users have on a GPU today: torch's bfloat16, int8 by `_int_mm`, e4m3 by `_scaled_mm`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_E4M3 = 448.0


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Product, bias, exact GELU."""
    return F.gelu(F.linear(x, weight, bias))


def int8_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 rows and their float32 scales `[rows, 1]`, symmetric, as `vk.quantize_weight` makes them."""
    scale = (x.abs().amax(-1, keepdim=True).float() / 127).clamp(min=1e-30)
    return (x.float() / scale).round().clamp(-127, 127).to(torch.int8), scale


def int8_linear_gelu(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """x is quantized by rows, the product is integer, the rest float32; for torch.compile, which fuses both ends."""
    rows, row_scale = int8_codes(x)
    sums = torch._int_mm(rows, codes.t())
    return F.gelu(sums.float() * row_scale * scale.view(1, -1) + bias.float()).to(x.dtype)


def e4m3_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 rows and their float32 scales `[rows, 1]`."""
    scale = (x.abs().amax(-1, keepdim=True).float() / LARGEST_E4M3).clamp(min=1e-30)
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def e4m3_product(rows: Tensor, row_scale: Tensor, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`_scaled_mm` with a scale for every row of either side, summed as fast as it can."""
    return torch._scaled_mm(
        rows, codes.t(), scale_a=row_scale, scale_b=scale.t(), out_dtype=dtype, use_fast_accum=True
    )


def e4m3_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x is quantized by rows; for torch.compile, which makes that one kernel."""
    rows, row_scale = e4m3_rows(x)
    return e4m3_product(rows, row_scale, codes, scale, x.dtype)
