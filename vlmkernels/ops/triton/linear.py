# SPDX-License-Identifier: Apache-2.0
"""Linear layers on Triton, float and quantized: which kernels a call takes, and their arguments.

A forward is one launch of `linear_kernel`; w8a8 and fp8 quantize the activations in one before it, and w8a16 and w4a16
of a few rows split K over many programs, whose parts another adds up. A backward forms the product again where an
activation asks for its slope, and leaves the plain products to torch's library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from . import _tables_linear  # noqa: F401  puts its rows into the tables
from ._launch import cdiv, float32_precision, launch, tile_of
from ._tables import Tile
from .linear_kernels import dequantize_kernel, linear_finish_kernel, linear_kernel, quantize_rows_kernel

#: Rows up to which K is split over programs that would otherwise be too few to fill a GPU.
FEW_ROWS = 64
#: Programs that fill a GPU about once; a constant, so that the sums do not depend on which.
PROGRAMS = 256
MOST_PARTS = 16
#: Longest row that is quantized in one block.
WIDEST_BLOCK = 8192

_FLOAT8 = getattr(torch, "float8_e4m3fn", None)
_OPERANDS = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.int8: tl.int8,
    _FLOAT8: tl.float8e4nv,
}
_KINDS = {"w8a8": "int8", "fp8": "fp8", "w4a16": "four bits"}
_KERNEL_OF = {"w8a8": "linear_int8", "fp8": "linear_fp8", "w8a16": "linear_mixed", "w4a16": "linear_mixed"}


@dataclass
class Weight:
    """The right operand: a float weight `[N, K]` (scheme "float"), or the tensors of a `QuantizedWeight`."""

    scheme: str
    weight_q: Tensor
    scale: Tensor | None = None
    zero_point: Tensor | None = None

    @property
    def features(self) -> tuple[int, int]:
        n, k = self.weight_q.shape
        return n, 2 * k if self.scheme == "w4a16" else k

    @property
    def group(self) -> int:
        """Inputs that share a scale, 0 where there are no groups."""
        if self.zero_point is None or self.zero_point.shape[1] == 0:
            return 0
        return self.features[1] // self.zero_point.shape[1]

    def operand(self, x: Tensor, compute_dtype: torch.dtype | None) -> torch.dtype:
        """In which dtype x and the weight are multiplied."""
        fixed = {"w8a8": torch.int8, "fp8": _FLOAT8, "bf16": torch.bfloat16}
        return fixed.get(self.scheme) or compute_dtype or x.dtype


def forward(
    x: Tensor,  # [..., K]
    weight: Weight,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    input_scale: Tensor | None,
    out: Tensor,  # [..., N], contiguous
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Fills `out` and returns it."""
    if out.numel() == 0:
        return out
    n = weight.features[0]
    residual = None if residual is None else residual.reshape(out.numel() // n, n)
    _product(x, weight, bias, activation, residual, None, input_scale, out, compute_dtype)
    return out


def through_activation(
    grad_out: Tensor,  # [..., N]
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    activation: str | None,
    input_scale: Tensor | None,
    compute_dtype: torch.dtype | None,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient in front of the activation, `[M, N]` in `dtype`: the product again, its slope times what arrives."""
    n = weight.features[0]
    grad_rows = grad_out.reshape(math.prod(grad_out.shape[:-1]), n)
    if activation is None:
        return grad_rows.to(dtype)
    out = torch.empty(grad_rows.shape, dtype=dtype, device=x.device)
    if out.numel():
        _product(x, weight, bias, activation, None, grad_rows, input_scale, out, compute_dtype)
    return out


def dequantize(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The float weight `[N, K]` in `dtype`."""
    n, k = weight.features
    out = torch.empty(n, k, dtype=dtype, device=weight.weight_q.device)
    if out.numel() == 0:
        return out
    four_bits = weight.scheme == "w4a16"
    tile = tile_of("dequantize", out, dtype)
    depth = weight.group or tile["DEPTH"]
    launch(
        dequantize_kernel,
        cdiv(n, tile["COLS"]) * cdiv(k, depth),
        weight.weight_q,
        _dense(weight.scale),
        _dense(weight.zero_point),
        out,
        n,
        k,
        *weight.weight_q.stride(),
        tile=Tile({"COLS": tile["COLS"], "DEPTH": depth}, tile.warps, tile.stages),
        FOUR_BITS=four_bits,
    )
    return out


def quantize_rows(
    x: Tensor,  # [M, K]
    input_scale: Tensor | None = None,
    *,
    norm: tuple[Tensor, Tensor | None, float] | None = None,
    fp8: bool = False,
) -> tuple[Tensor, Tensor]:
    """8-bit codes `[M, K]` of rows and their scales `[M]`; through a LayerNorm (weight, bias, eps), where one is given.

    Raises:
        ValueError: rows too long to be normalised in one block.
    """
    rows, k = x.shape
    codes = torch.empty(rows, k, dtype=_FLOAT8 if fp8 else torch.int8, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    width = max(16, 1 << (k - 1).bit_length()) if k else 16
    if norm is not None and width > WIDEST_BLOCK:
        raise ValueError(
            f"quantize_rows: a LayerNorm over {k} features does not fit a block of {WIDEST_BLOCK}"
        )
    tile = tile_of("quantize_rows", x, x.dtype, width=width)
    norm_weight, norm_bias, eps = norm or (None, None, 0.0)
    launch(
        quantize_rows_kernel,
        rows,
        x,
        None if input_scale is None else input_scale.detach().to(torch.float32).reshape(1),
        norm_weight,
        norm_bias,
        codes,
        scales,
        rows,
        k,
        *x.stride(),
        eps,
        tile=Tile({"WIDTH": min(width, WIDEST_BLOCK)}, tile.warps, tile.stages),
        exact_float=True,
        FP8=fp8,
        ONE_BLOCK=width <= WIDEST_BLOCK,
    )
    return codes, scales


def _product(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    grad_out: Tensor | None,
    input_scale: Tensor | None,
    out: Tensor,
    compute_dtype: torch.dtype | None,
) -> None:
    n, k = weight.features
    rows = math.prod(out.shape[:-1])
    x = x.reshape(rows, k)
    operand = weight.operand(x, compute_dtype)
    scale_x = None
    if weight.scheme in ("w8a8", "fp8"):
        x, scale_x = quantize_rows(x, input_scale, fp8=weight.scheme == "fp8")
    kernel = _KERNEL_OF.get(weight.scheme, "linear")
    tile = tile_of(kernel, x, operand, rows=rows)
    depth = weight.group or tile["DEPTH"]
    tiles = cdiv(rows, tile["ROWS"]) * cdiv(n, tile["COLS"])
    parts, part = _split(weight.scheme, rows, tiles, k, depth)
    epilogue = (
        *(0 if bias is None else bias.stride(0),),
        *_two_strides(residual),
        *_two_strides(grad_out),
    )
    target = out
    if parts > 1:
        target = torch.empty(parts, rows, n, dtype=torch.float32, device=x.device)
    launch(
        linear_kernel,
        tiles * parts,
        x,
        weight.weight_q,
        scale_x,
        _dense(weight.scale),
        _dense(weight.zero_point),
        *((None, None, None) if parts > 1 else (bias, residual, grad_out)),
        target,
        rows,
        n,
        k,
        *x.stride(),
        *weight.weight_q.stride(),
        *epilogue,
        part,
        tile=Tile({**tile.blocks, "DEPTH": depth}, tile.warps, tile.stages),
        exact_float=scale_x is not None,
        OPERAND=_OPERANDS[operand],
        ACTIVATION=activation,
        KIND=_KINDS.get(weight.scheme, "float"),
        SPLIT=parts > 1,
        STAGES=tile.stages,
        PRECISION=float32_precision() if operand == torch.float32 else "ieee",
    )
    if parts > 1:
        finish = tile_of("linear_finish", x, out.dtype)
        launch(
            linear_finish_kernel,
            cdiv(rows, finish["ROWS"]) * cdiv(n, finish["COLS"]),
            target,
            bias,
            residual,
            grad_out,
            out,
            rows,
            n,
            *epilogue,
            tile=finish,
            PARTS=parts,
            ACTIVATION=activation,
        )


def _split(scheme: str, rows: int, tiles: int, k: int, depth: int) -> tuple[int, int]:
    """(parts, length of one) of K: more than one where few rows leave a GPU idle, a function of the shape alone."""
    blocks = cdiv(k, depth)
    if scheme not in ("w8a16", "w4a16") or rows > FEW_ROWS or 2 * tiles > PROGRAMS or blocks < 4:
        return 1, max(k, 1)
    parts = min(PROGRAMS // tiles, MOST_PARTS, blocks // 2)
    part = cdiv(blocks, parts) * depth
    return cdiv(k, part), part


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _two_strides(x: Tensor | None) -> Any:
    return (0, 0) if x is None else x.stride()
