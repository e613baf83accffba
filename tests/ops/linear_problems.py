# SPDX-License-Identifier: Apache-2.0
"""What the tests of linear layers share: operands, activations written out, quantized operands in float64."""

from __future__ import annotations

import math

import torch

SCHEMES = ["w8a8", "w8a16", "w4a16", "fp8", "bf16"]
ACTIVATIONS = [None, "gelu", "gelu_tanh", "quick_gelu", "silu", "relu"]
EPS32 = torch.finfo(torch.float32).eps


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def activate(y, activation):
    """The activations written out, independently of the package."""
    if activation is None:
        return y
    if activation == "gelu":
        return y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
    if activation == "gelu_tanh":
        return 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    if activation == "quick_gelu":
        return y / (1 + torch.exp(-1.702 * y))
    if activation == "silu":
        return y / (1 + torch.exp(-y))
    return torch.where(y > 0, y, torch.zeros_like(y))


def quantized_operands(x, qweight):
    """Float64 values of both operands after their quantization: what the scheme multiplies."""
    weight = qweight.dequantize(torch.float64)
    if qweight.scheme == "w8a8":
        scale = x.abs().amax(-1, keepdim=True) / 127
        return (x / scale).round().double() * scale.double(), weight
    if qweight.scheme == "fp8":
        scale = x.abs().amax(-1, keepdim=True) / 448
        return (x / scale).to(torch.float8_e4m3fn).double() * scale.double(), weight
    return (x.bfloat16() if qweight.scheme == "bf16" else x).double(), weight
