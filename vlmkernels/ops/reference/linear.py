# SPDX-License-Identifier: Apache-2.0
"""Linear layer and its epilogue in plain PyTorch; `quantized.py` puts the epilogue behind other products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkernels.ops._library import no_autocast

QUICK_GELU_SLOPE = 1.702


def apply_activation(y: Tensor, activation: str | None) -> Tensor:
    """Applies one of the epilogue's activations.

    Args:
        y: any shape, floating.
        activation: None, "gelu" (with erf), "gelu_tanh", "quick_gelu" (y * sigmoid(1.702 y)), "silu" or
            "relu".

    Returns:
        A tensor like `y`.
    """
    if activation is None:
        return y
    if activation == "gelu":
        return F.gelu(y)
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    if activation == "quick_gelu":
        return y * torch.sigmoid(QUICK_GELU_SLOPE * y)
    if activation == "silu":
        return F.silu(y)
    if activation == "relu":
        return F.relu(y)
    raise ValueError(f"activation {activation!r} is not one of None, gelu, gelu_tanh, quick_gelu, silu, relu")


def epilogue(
    product: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`activation(product + bias) + residual`, in the product's dtype, rounded once to `dtype`.

    Args:
        product: [..., N], float32 or float64.
        bias: [N] or None.
        activation: a name that `apply_activation` knows.
        residual: [..., N] or None.
        dtype: dtype of the result.
    """
    y = product
    if bias is not None:
        y = y + bias.to(y.dtype)
    y = apply_activation(y, activation)
    if residual is not None:
        y = y + residual.to(y.dtype)
    return y.to(dtype)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and epilogues: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def output_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """x's dtype, widened by a residual stream that is kept wider than the activations."""
    if residual is None or residual.dtype == x.dtype:
        return x.dtype
    return torch.promote_types(x.dtype, residual.dtype)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """`activation(x @ weight.T + bias) + residual`, the epilogue in float32 (float64 for float64).

    Args:
        x: [..., K], floating.
        weight: [N, K].
        bias: [N] or None.
        activation: a name that `apply_activation` knows.
        residual: [..., N] or None.
        compute_dtype: dtype to which the two operands of the product are rounded; default, their own.

    Returns:
        [..., N] in x's dtype (widened by the residual's).
    """
    accumulate = accumulator_dtype(x.dtype)
    multiply = compute_dtype or x.dtype
    with no_autocast(x.device.type):
        x_operand, weight_operand = x.to(multiply), weight.to(multiply)
        if multiply != x.dtype:
            # Torch rounds a half-precision product to half precision; values already rounded multiply exactly
            # here.
            x_operand, weight_operand = x_operand.to(accumulate), weight_operand.to(accumulate)
        product = F.linear(x_operand, weight_operand).to(accumulate)
        return epilogue(product, bias, activation, residual, output_dtype(x, residual))
