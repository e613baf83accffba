# SPDX-License-Identifier: Apache-2.0
"""Kernels of linear layers: quantization of rows, one product with an epilogue for every scheme, dequantization.

`y = activation(x @ weight^T + bias) + residual`, the epilogue in float32 and in this order, rounded once. 2 M N K
operations; M (K + N) + N K elements of traffic. Arithmetic limits it from about 300 rows on (an H200 does 180
operations in the time of a byte), the weight's bytes below: 4-bit weights are a quarter of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import tile_position

INT8_LIMIT = tl.constexpr(127.0)
FP8_LIMIT = tl.constexpr(448.0)
#: Adding and subtracting it rounds to an integer, half to even: up to 2^22, its neighbours are one apart.
ROUNDER = tl.constexpr(12582912.0)
#: Terms of an fp8 product that the tensor core adds in its own short accumulator before float32 takes over.
SHORT_SUM = tl.constexpr(64)
#: Columns of a tile that go through the epilogue together.
EPILOGUE_COLS = tl.constexpr(64)
INFINITY = tl.constexpr(float("inf"))
UNSPECIALIZED = ("M", "N", "residual_row", "grad_row", "step")


# Quantization of activations.


@triton.jit
def _codes(values, scale, FP8: tl.constexpr):
    """`clamp(values / scale)` as codes; 0 where the scale is 0 or NaN. A true division, as the reference's."""
    divisor = tl.where(scale > 0, scale, 1.0) + tl.zeros_like(values)
    ratio = tl.where(scale > 0, tl.div_rn(values, divisor), 0.0)
    if FP8:
        return tl.clamp(ratio, -FP8_LIMIT, FP8_LIMIT).to(tl.float8e4nv)
    else:
        ratio = tl.clamp(ratio, -INT8_LIMIT, INT8_LIMIT)
        return ((ratio + ROUNDER) - ROUNDER).to(tl.int8)


@triton.jit
def _normalized(values, inside, K, norm_weight, norm_bias, cols, eps):
    """LayerNorm of a row in float32, two passes over registers; the row itself where there is no weight."""
    if norm_weight is None:
        return values
    else:
        mean = tl.sum(values, 0) / K
        centred = tl.where(inside, values - mean, 0.0)
        variance = tl.sum(centred * centred, 0) / K
        values = (
            centred
            * tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
            * tl.load(norm_weight + cols, mask=inside, other=0.0)
        )
        if norm_bias is not None:
            values += tl.load(norm_bias + cols, mask=inside, other=0.0)
        return values


@triton.jit(do_not_specialize=UNSPECIALIZED)
def quantize_rows_kernel(
    x,  # [M, K]
    input_scale,  # float32 [1], or None: absmax / 127 (448) of each row
    norm_weight,  # [K], or None: quantize x as it is
    norm_bias,
    codes,  # [M, K] contiguous
    scales,  # float32 [M]
    M,
    K,
    x_row,
    x_col,
    eps,
    FP8: tl.constexpr,
    WIDTH: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """A row of activations to 8-bit codes and a scale; through a LayerNorm, where one is given.

    Reads a row once if it fits a block (K <= WIDTH), else twice, writes half or a quarter of what it read: memory
    limits it. Fused with the LayerNorm it replaces a pass that would read and write 16 bits.
    """
    row = tl.program_id(0).to(tl.int64)
    x += row * x_row
    codes += row * K
    limit = INT8_LIMIT
    if FP8:
        limit = FP8_LIMIT
    largest = 0.0
    bad = 0
    values = tl.zeros([WIDTH], tl.float32)
    for first in range(0, K, WIDTH):
        cols = first + tl.arange(0, WIDTH)
        inside = cols < K
        values = tl.load(x + cols.to(tl.int64) * x_col, mask=inside, other=0.0).to(tl.float32)
        if ONE_BLOCK:
            values = _normalized(values, inside, K, norm_weight, norm_bias, cols, eps)
        largest = tl.maximum(largest, tl.max(tl.abs(values), 0))
        bad = tl.maximum(bad, tl.max((values != values).to(tl.int32), 0))
    if input_scale is None:
        scale = tl.div_rn(largest, limit)
        scale = tl.where((bad != 0) | (largest == INFINITY), float("nan"), scale)
    else:
        scale = tl.load(input_scale)
        scale = tl.where((bad != 0) | (scale <= 0) | (scale == INFINITY), float("nan"), scale)
    tl.store(scales + row, scale)
    if ONE_BLOCK:
        cols = tl.arange(0, WIDTH)
        tl.store(codes + cols, _codes(values, scale, FP8), mask=cols < K)
    else:
        for first in range(0, K, WIDTH):
            cols = first + tl.arange(0, WIDTH)
            inside = cols < K
            values = tl.load(x + cols.to(tl.int64) * x_col, mask=inside, other=0.0).to(tl.float32)
            tl.store(codes + cols, _codes(values, scale, FP8), mask=inside)


# Epilogues.


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """The activations of `reference/linear.py`, in float32."""
    if ACTIVATION == "gelu":
        return 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = sigmoid(2 u)
        return y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACTIVATION == "quick_gelu":
        return y * tl.sigmoid(1.702 * y)
    elif ACTIVATION == "silu":
        return y * tl.sigmoid(y)
    elif ACTIVATION == "relu":
        return tl.where(y <= 0, 0.0, y)  # NaN stays
    else:
        return y


@triton.jit
def slope(y, ACTIVATION: tl.constexpr):
    """The derivatives of `activate`."""
    if ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * y * y)
        return 0.5 * (1.0 + tl.erf(y * 0.7071067811865476)) + y * density
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
        return s + y * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * y * y)
    elif ACTIVATION == "quick_gelu":
        s = tl.sigmoid(1.702 * y)
        return s + 1.702 * y * s * (1.0 - s)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(y)
        return s + y * s * (1.0 - s)
    elif ACTIVATION == "relu":
        return tl.where(y <= 0, 0.0, 1.0)
    else:
        return tl.full(y.shape, 1.0, tl.float32)


@triton.jit
def finish(
    y,  # the product, float32 [rows, cols]
    bias,
    residual,
    grad_out,  # None, or what arrives at the result: then the activation's slope times it leaves
    out,
    rows,
    cols,
    inside,
    N,
    bias_step,
    residual_row,
    residual_col,
    grad_row,
    grad_col,
    ACTIVATION: tl.constexpr,
):
    """bias, activation, residual, and the store: the one end of every product."""
    wide_rows = rows.to(tl.int64)[:, None]
    if bias is not None:
        y += tl.load(bias + cols.to(tl.int64) * bias_step, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if grad_out is not None:
        arrived = tl.load(grad_out + wide_rows * grad_row + cols[None, :] * grad_col, mask=inside, other=0.0)
        y = arrived.to(tl.float32) * slope(y, ACTIVATION)
    else:
        y = activate(y, ACTIVATION)
        if residual is not None:
            at = residual + wide_rows * residual_row + cols[None, :] * residual_col
            y += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + wide_rows * N + cols[None, :], y.to(out.dtype.element_ty), mask=inside)


# The product.


@triton.jit
def _weight_tile(
    weight,
    scale,
    zero_point,
    cols,
    depth,
    N,
    K,
    groups,
    w_row,
    w_col,
    TYPE: tl.constexpr,
    FOUR_BITS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """`[cols, depth]` of the weight as the product takes it: stored codes, less the zero point of 4-bit ones."""
    at = weight + cols.to(tl.int64)[:, None] * w_row
    exists = (cols < N)[:, None]
    if FOUR_BITS:
        byte = depth // 2 + tl.arange(0, DEPTH // 2)
        pairs = tl.load(at + byte[None, :] * w_col, mask=exists & (byte < K // 2)[None, :], other=0)
        codes = tl.interleave(pairs & 15, pairs >> 4).to(tl.int32)
        zero = tl.load(zero_point + cols.to(tl.int64) * groups + depth // DEPTH, mask=cols < N, other=0)
        return (codes - zero.to(tl.int32)[:, None]).to(tl.float32).to(TYPE)
    else:
        place = depth + tl.arange(0, DEPTH)
        values = tl.load(
            at + place.to(tl.int64)[None, :] * w_col, mask=exists & (place < K)[None, :], other=0.0
        )
        return values.to(TYPE)


@triton.jit
def _halves(tile):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def _scaled_end(
    sums,
    scale_x,
    scale,
    bias,
    residual,
    grad_out,
    out,
    share,
    rows,
    cols,
    M,
    N,
    bias_step,
    residual_row,
    residual_col,
    grad_row,
    grad_col,
    ACTIVATION: tl.constexpr,
    KIND: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """From finished sums to memory: the scales, then the epilogue, or the part of a split K as it is."""
    y = sums.to(tl.float32)
    if scale_x is not None:
        y = y * tl.load(scale_x + rows, mask=rows < M, other=0.0)[:, None]
    if (scale is not None) and (KIND != "four bits"):
        y = y * tl.load(scale + cols, mask=cols < N, other=0.0)[None, :]
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    if SPLIT:
        at = out + (share.to(tl.int64) * M + rows)[:, None] * N + cols[None, :]
        tl.store(at, y, mask=inside)
    else:
        finish(
            y, bias, residual, grad_out, out, rows, cols, inside, N, bias_step, residual_row, residual_col, grad_row,
            grad_col, ACTIVATION,
        )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def linear_kernel(
    x,  # [M, K], in the dtype of the product or rounded to it here
    weight,  # [N, K] floats or codes; uint8 [N, K / 2] of 4-bit ones
    scale_x,  # float32 [M], or None
    scale,  # float32 [N], [N, K / DEPTH] of 4-bit ones, or None
    zero_point,  # uint8 [N, K / DEPTH], or None
    bias,
    residual,
    grad_out,
    out,  # [M, N] contiguous; float32 [parts, M, N] where K is split
    M,
    N,
    K,
    x_row,
    x_col,
    w_row,
    w_col,
    bias_step,
    residual_row,
    residual_col,
    grad_row,
    grad_col,
    part,  # of K, a multiple of DEPTH; K itself where it is not split
    OPERAND: tl.constexpr,
    KIND: tl.constexpr,  # "int8", "fp8", "four bits" or "float"
    ACTIVATION: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of the product and its epilogue; int8 sums are exact int32, all others float32.

    Codes of 4 bits are multiplied as they are, less the zero point, and each group's sum by its scale: the weight is
    not rounded to the operands' type. Other scales multiply the finished sum, that of the row first.
    """
    blocks_m = tl.cdiv(M, ROWS)
    blocks_n = tl.cdiv(N, COLS)
    index = tl.program_id(0)
    share = index // (blocks_m * blocks_n)
    block_m, block_n = tile_position(index % (blocks_m * blocks_n), blocks_m, blocks_n, BAND)
    rows = block_m * ROWS + tl.arange(0, ROWS)
    cols = block_n * COLS + tl.arange(0, COLS)
    x_at = x + rows.to(tl.int64)[:, None] * x_row
    groups = K // DEPTH
    begin = share * part
    end = tl.minimum(begin + part, K)
    if KIND == "int8":
        sums = tl.zeros([ROWS, COLS], tl.int32)
    else:
        sums = tl.zeros([ROWS, COLS], tl.float32)
    for depth in tl.range(begin, end, DEPTH, num_stages=STAGES):
        place = depth + tl.arange(0, DEPTH)
        exists = (rows < M)[:, None] & (place < K)[None, :]
        a = tl.load(x_at + place.to(tl.int64)[None, :] * x_col, mask=exists, other=0.0).to(OPERAND)
        b = tl.trans(
            _weight_tile(
                weight,
                scale,
                zero_point,
                cols,
                depth,
                N,
                K,
                groups,
                w_row,
                w_col,
                OPERAND,
                KIND == "four bits",
                DEPTH,
            )
        )
        if KIND == "four bits":
            at = scale + cols.to(tl.int64) * groups + depth // DEPTH
            sums += tl.dot(a, b, input_precision=PRECISION) * tl.load(at, mask=cols < N, other=0.0)[None, :]
        elif KIND == "int8":
            sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        elif KIND == "fp8":
            sums = tl.dot(a, b, sums, max_num_imprecise_acc=SHORT_SUM)
        else:
            sums = tl.dot(a, b, sums, input_precision=PRECISION)

    # a piece after the other: the addresses of the whole tile would not fit the registers beside its sums
    if COLS == 4 * EPILOGUE_COLS:
        left, right = _halves(sums)
        pieces = _halves(left) + _halves(right)
    elif COLS == 2 * EPILOGUE_COLS:
        pieces = _halves(sums)
    else:
        pieces = (sums,)
    WIDTH: tl.constexpr = COLS if COLS < EPILOGUE_COLS else EPILOGUE_COLS
    for piece in tl.static_range(COLS // WIDTH):
        _scaled_end(
            pieces[piece], scale_x, scale, bias, residual, grad_out, out, share, rows,
            block_n * COLS + piece * WIDTH + tl.arange(0, WIDTH), M, N, bias_step, residual_row, residual_col, grad_row,
            grad_col, ACTIVATION, KIND, SPLIT,
        )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def linear_finish_kernel(
    parts,  # float32 [PARTS, M, N]
    bias,
    residual,
    grad_out,
    out,
    M,
    N,
    bias_step,
    residual_row,
    residual_col,
    grad_row,
    grad_col,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The parts of a split K, added in their order, and the epilogue."""
    blocks_n = tl.cdiv(N, COLS)
    rows = tl.program_id(0) // blocks_n * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) % blocks_n * COLS + tl.arange(0, COLS)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    y = tl.zeros([ROWS, COLS], tl.float32)
    for share in range(PARTS):
        at = parts + (rows.to(tl.int64) + tl.cast(share, tl.int64) * M)[:, None] * N + cols[None, :]
        y += tl.load(at, mask=inside, other=0.0)
    finish(
        y, bias, residual, grad_out, out, rows, cols, inside, N, bias_step, residual_row, residual_col, grad_row,
        grad_col, ACTIVATION,
    )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dequantize_kernel(
    weight,
    scale,
    zero_point,
    out,  # [N, K] contiguous
    N,
    K,
    w_row,
    w_col,
    FOUR_BITS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The float weight, for the gradient of the activations: N K elements written once, beside 2 M N K operations."""
    blocks = tl.cdiv(K, DEPTH)
    cols = tl.program_id(0) // blocks * COLS + tl.arange(0, COLS)
    depth = tl.program_id(0) % blocks * DEPTH
    groups = K // DEPTH
    w = _weight_tile(
        weight, scale, zero_point, cols, depth, N, K, groups, w_row, w_col, tl.float32, FOUR_BITS, DEPTH
    )
    if FOUR_BITS:
        w *= tl.load(scale + cols.to(tl.int64) * groups + depth // DEPTH, mask=cols < N, other=0.0)[:, None]
    elif scale is not None:
        w *= tl.load(scale + cols, mask=cols < N, other=0.0)[:, None]
    place = depth + tl.arange(0, DEPTH)
    at = out + cols.to(tl.int64)[:, None] * K + place[None, :]
    tl.store(at, w.to(out.dtype.element_ty), mask=(cols < N)[:, None] & (place < K)[None, :])
