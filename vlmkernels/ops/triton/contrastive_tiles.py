# SPDX-License-Identifier: Apache-2.0
"""Kernels of the contrastive family: a tile of logits, and the epilogues that consume it. Hosts: `contrastive.py`.

A program owns one tile of BLOCK_M rows and BLOCK_N columns of one problem. It forms the tile's dot products (2 D
operations each, float32 sums) or reads them where a library product or the forward left them (SAVED), makes logits
`z = scale * dot + bias + key_bias_j`, and leaves what its epilogue is for. The epilogue takes the tile in SPLIT parts
of EDGE_N columns, one after the other, which keeps it within 128 registers: two programs share a multiprocessor, and
while one is in its epilogue the other multiplies.

Letters: N rows, M columns, D width, B problems. `first_*` and `height`, `width`, `batches` say which chunk of the
problem is launched; numbers called `_local` count within it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import tile_position

#: Where a tile's row and column maxima lie closer than this, one exponential serves rows and columns: nothing that
#: counts in a float32 sum underflows (e**-60 of e**-28 does not). Exponents of up to 60 cost two digits of the terms,
#: which beside operands in half precision are none; float32 always takes two exponentials.
SHARED_SHIFT = tl.constexpr(60.0)


@triton.jit
def _dots(
    q_ptr, k_ptr, row, col, N, M, D, q_row, k_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_D: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """`q[row:] @ k[col:].T`, one tile, of matrices with unit column stride; past the end the last row repeats."""
    depth = tl.arange(0, BLOCK_K)
    rows = tl.minimum(row + tl.arange(0, BLOCK_M), N - 1).to(tl.int64)
    cols = tl.minimum(col + tl.arange(0, BLOCK_N), M - 1).to(tl.int64)
    q_at = q_ptr + rows[:, None] * q_row + depth[None, :]
    k_at = k_ptr + cols[None, :] * k_row + depth[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for d in range(0, D, BLOCK_K):
        if EVEN_D:
            a = tl.load(q_at)
            b = tl.load(k_at)
        else:
            a = tl.load(q_at, mask=(depth < D - d)[None, :], other=0.0)
            b = tl.load(k_at, mask=(depth < D - d)[:, None], other=0.0)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
        q_at += BLOCK_K
        k_at += BLOCK_K
    return total


@triton.jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Left and right half of a tile; nothing moves, since a thread owns columns of both."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _part(x, WHICH: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One of the SPLIT (1, 2 or 4) parts of a tile, from the left."""
    tl.static_assert(SPLIT == 1 or SPLIT == 2 or SPLIT == 4)
    part = x
    if SPLIT > 1:
        left, right = _halves(x, ROWS, COLUMNS)
        part = left if WHICH < SPLIT // 2 else right
    if SPLIT == 4:
        left, right = _halves(part, ROWS, COLUMNS // 2)
        part = left if WHICH % 2 == 0 else right
    return part


@triton.jit
def _tile_at(
    pointer, batch, row, col, batch_stride, row_stride, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Addresses of a tile's elements: a 64-bit start and 32-bit offsets, which cost half the registers."""
    start = tl.cast(batch, tl.int64) * batch_stride + tl.cast(row, tl.int64) * row_stride + col
    return pointer + start + (tl.arange(0, BLOCK_M)[:, None] * row_stride + tl.arange(0, BLOCK_N)[None, :])


@triton.jit
def _exp(x, PRECISE: tl.constexpr):
    """exp(x) for x <= 0: the device's (an error of |x| * 6e-8, nothing beside half precision), or to 8.5e-8 of itself.

    PRECISE: x = n log 2 + r, log 2 in two parts so that n times the first is exact; a polynomial in r.
    """
    if PRECISE:
        small = x < -87.0  # zero beside any sum that it is part of
        x = tl.where(small, -87.0, x)
        n = tl.floor(x * 1.4426950408889634 + 0.5)
        r = (x - n * 0.693359375) + n * 2.12194440e-4
        p = r * 0.0013926181709393859 + 0.008363177999854088
        p = p * r + 0.041666556149721146
        p = p * r + 0.16666576266288757
        p = p * r + 0.5
        power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
        result = tl.where(small, 0.0, (r * r * p + r + 1.0) * power)
    else:
        result = tl.exp(x)
    return result


@triton.jit
def _logits(
    dots, batch, cols_at, inside, whole, col_inside, scale_ptr, bias_ptr, key_bias_ptr, key_mask_ptr, M,
    EDGE_N: tl.constexpr,
):  # fmt: skip
    """Logits of a tile that begins at column `cols_at`; -inf outside the problem and for keys that are not usable."""
    z = dots * tl.load(scale_ptr).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr).to(tl.float32)
    if key_bias_ptr is not None:
        z += tl.load(key_bias_ptr + cols_at + tl.arange(0, EDGE_N), mask=col_inside, other=0.0)[None, :]
    if key_mask_ptr is not None:
        usable = tl.load(
            key_mask_ptr + (batch * M + cols_at) + tl.arange(0, EDGE_N), mask=col_inside, other=0
        )
        z = tl.where((usable != 0)[None, :], z, float("-inf"))
    if not whole:
        z = tl.where(inside, z, float("-inf"))
    return z


@triton.jit
def _positive_columns(positives_ptr, row, row_inside, batch, N, M, BLOCK_M: tl.constexpr):
    """The positive of each row from `row` on, -1 where it is no column: its own number where `positives` is absent."""
    rows = tl.arange(0, BLOCK_M)
    if positives_ptr is None:
        wanted = tl.where(row_inside, row + rows, -1)
    else:
        given = tl.load(positives_ptr + (batch * N + row) + rows, mask=row_inside, other=-1)
        wanted = tl.where((given >= 0) & (given < M), given, -1).to(tl.int32)
    return wanted


@triton.jit
def _statistics_epilogue(
    dots, batch, batch_local, row_local, col_local, part, block_m,
    dots_ptr, scale_ptr, bias_ptr, key_bias_ptr, key_mask_ptr, positives_ptr, row_codes_ptr, col_codes_ptr,
    row_parts_ptr, col_parts_ptr, row_targets_ptr, col_targets_ptr,
    N, M, first_row, first_col, batches, height, width, row_slot, col_slot, dots_batch, dots_row,
    STORED: tl.constexpr, COLUMNS: tl.constexpr, SMOOTH: tl.constexpr, PRECISE: tl.constexpr, BLOCK_M: tl.constexpr,
    EDGE_N: tl.constexpr,
):  # fmt: skip
    """What `_statistics_kernel` leaves of one part of a tile."""
    in_rows = tl.arange(0, BLOCK_M)
    in_cols = tl.arange(0, EDGE_N)
    row_inside = in_rows < height - row_local
    col_inside = in_cols < width - col_local
    inside = row_inside[:, None] & col_inside[None, :]
    whole = (row_local + BLOCK_M <= height) & (col_local + EDGE_N <= width)
    if STORED:
        at = _tile_at(dots_ptr, batch_local, row_local, col_local, dots_batch, dots_row, BLOCK_M, EDGE_N)
        tl.store(at, dots, mask=inside)
    z = _logits(
        dots, batch, first_col + col_local, inside, whole, col_inside, scale_ptr, bias_ptr, key_bias_ptr, key_mask_ptr,
        M, EDGE_N,
    )  # fmt: skip

    row_at = row_parts_ptr + (tl.cast(part * batches + batch_local, tl.int64) * height + row_local) + in_rows
    col_at = in_cols
    row_top = tl.max(z, 1)
    row_shift = tl.where(row_top == float("-inf"), 0.0, row_top)
    tl.store(row_at, row_top, mask=row_inside)
    if COLUMNS:
        col_at = (
            col_parts_ptr + (tl.cast(block_m * batches + batch_local, tl.int64) * width + col_local) + in_cols
        )
        col_top = tl.max(z, 0)
        col_shift = tl.where(col_top == float("-inf"), 0.0, col_top)
        tl.store(col_at, col_top, mask=col_inside)
        if not PRECISE:
            top = tl.max(row_top, 0)
            lowest = tl.minimum(
                tl.min(tl.where(row_inside, row_top, top), 0), tl.min(tl.where(col_inside, col_top, top), 0)
            )
            if top - lowest < SHARED_SHIFT:
                shared = _exp(z - top, PRECISE)
                # The same expression as for an element that is the maximum: such a quotient is 1 exactly.
                row_sum = tl.sum(shared, 1) / tl.exp(row_shift - top)
                col_sum = tl.sum(shared, 0) / tl.exp(col_shift - top)
            else:
                row_sum = tl.sum(_exp(z - row_shift[:, None], PRECISE), 1)
                col_sum = tl.sum(_exp(z - col_shift[None, :], PRECISE), 0)
        else:
            row_sum = tl.sum(_exp(z - row_shift[:, None], PRECISE), 1)
            col_sum = tl.sum(_exp(z - col_shift[None, :], PRECISE), 0)
        tl.store(col_at + col_slot, col_sum, mask=col_inside)
    else:
        row_sum = tl.sum(_exp(z - row_shift[:, None], PRECISE), 1)
    tl.store(row_at + row_slot, row_sum, mask=row_inside)

    if row_codes_ptr is not None:
        row_code = tl.load(
            row_codes_ptr + (batch * N + first_row + row_local) + in_rows, mask=row_inside, other=-1
        )
        col_code = tl.load(
            col_codes_ptr + (batch * M + first_col + col_local) + in_cols, mask=col_inside, other=-2
        )
        positive = tl.where(row_code[:, None] == col_code[None, :], z, 0.0)
        tl.store(row_at + 2 * row_slot, tl.sum(positive, 1), mask=row_inside)
        if COLUMNS:
            tl.store(col_at + 2 * col_slot, tl.sum(positive, 0), mask=col_inside)
    else:
        wanted = _positive_columns(positives_ptr, first_row + row_local, row_inside, batch, N, M, BLOCK_M)
        wanted -= first_col + col_local
        found = (wanted >= 0) & (wanted < tl.minimum(EDGE_N, width - col_local))
        if tl.max(found.to(tl.int32), 0) > 0:
            hit = found[:, None] & (wanted[:, None] == in_cols[None, :])
            target = tl.where(hit, z, 0.0)
            at = row_targets_ptr + (batch * N + first_row + row_local) + in_rows
            tl.store(at, tl.sum(target, 1), mask=found)
            if COLUMNS:
                # no two rows share a positive where columns have losses, too
                at = col_targets_ptr + (batch * M + first_col + col_local) + in_cols
                tl.store(at, tl.sum(target, 0), mask=tl.max(hit.to(tl.int32), 0) > 0)

    if SMOOTH:
        finite = z
        if not whole:
            finite = tl.where(inside, z, 0.0)
        last: tl.constexpr = 2 if row_codes_ptr is None else 3
        tl.store(row_at + last * row_slot, tl.sum(finite, 1), mask=row_inside)
        if COLUMNS:
            tl.store(col_at + last * col_slot, tl.sum(finite, 0), mask=col_inside)


@triton.jit
def _statistics_kernel(
    q_ptr, k_ptr, dots_ptr, scale_ptr, bias_ptr, key_bias_ptr, key_mask_ptr, positives_ptr, row_codes_ptr,
    col_codes_ptr, row_parts_ptr, col_parts_ptr, row_targets_ptr, col_targets_ptr,
    N, M, D, first_batch, first_row, first_col, batches, height, width,
    q_batch, q_row, k_batch, k_row, dots_batch, dots_row,
    SAVED: tl.constexpr, STORED: tl.constexpr, COLUMNS: tl.constexpr, SMOOTH: tl.constexpr, EVEN_D: tl.constexpr,
    WIDEN: tl.constexpr, PRECISE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Maximum and shifted sum of exponentials of a tile's rows, and of its columns, from one pass over the logits.

    ```
    row_parts[0, tile column, i] = max_j z_ij       row_parts[1, ...] = sum_j exp(z_ij - max)       likewise col_parts
    targets_i = z_ij of row i's positive j           (with labels: parts[2] = sum of the logits of equal labels)
    parts[2 or 3] = sum_j z_ij                       where labels are smoothed
    ```

    2 N M D operations; one exponential a logit, two in float32 and in tiles whose maxima lie SHARED_SHIFT apart.
    Reads (N + M) D operands from L2 or memory, writes 8 / EDGE_N + 8 / BLOCK_M bytes a logit. Limited by the matrix
    units at D >= 512; below, by exponentials and comparisons, which the other program of the multiprocessor hides.
    """
    EDGE_N: tl.constexpr = BLOCK_N // SPLIT
    blocks_m = tl.cdiv(height, BLOCK_M)
    blocks_n = tl.cdiv(width, BLOCK_N)
    pid = tl.program_id(0)
    batch_local = pid // (blocks_m * blocks_n)
    block_m, block_n = tile_position(pid % (blocks_m * blocks_n), blocks_m, blocks_n, GROUP)
    batch = (first_batch + batch_local).to(tl.int64)
    row_local = block_m * BLOCK_M
    row_slot = tl.cast(tl.cdiv(width, EDGE_N), tl.int64) * batches * height
    col_slot = tl.cast(blocks_m, tl.int64) * batches * width
    if SAVED:
        at = _tile_at(
            dots_ptr, batch_local, row_local, block_n * BLOCK_N, dots_batch, dots_row, BLOCK_M, BLOCK_N
        )
        inside = (tl.arange(0, BLOCK_M) < height - row_local)[:, None]
        inside = inside & (tl.arange(0, BLOCK_N) < width - block_n * BLOCK_N)[None, :]
        dots = tl.load(at, mask=inside, other=0.0)
    else:
        dots = _dots(
            q_ptr + batch * q_batch, k_ptr + batch * k_batch, first_row + row_local, first_col + block_n * BLOCK_N,
            N, M, D, q_row, k_row, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_D, WIDEN,
        )  # fmt: skip
    for part in tl.static_range(SPLIT):
        edge = SPLIT * block_n + part
        if edge * EDGE_N < width:
            _statistics_epilogue(
                _part(dots, part, SPLIT, BLOCK_M, BLOCK_N), batch, batch_local, row_local, edge * EDGE_N, edge, block_m,
                dots_ptr, scale_ptr, bias_ptr, key_bias_ptr, key_mask_ptr, positives_ptr, row_codes_ptr,
                col_codes_ptr, row_parts_ptr, col_parts_ptr, row_targets_ptr, col_targets_ptr, N, M, first_row,
                first_col, batches, height, width, row_slot, col_slot, dots_batch, dots_row, STORED, COLUMNS,
                SMOOTH, PRECISE, BLOCK_M, EDGE_N,
            )  # fmt: skip


@triton.jit
def _combine_kernel(
    parts_ptr, statistics_ptr, parts, length, height, first_batch, first, whole, slot,
    LABELS: tl.constexpr, SMOOTH: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merge a chunk's partial statistics `[2 to 4, parts, length]` into the running ones `[4, B, whole]`, in order.

    `length` is batches * height. Reads every partial once; bound by memory, and small beside the tiles.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = at < length
    target = (first_batch + at // height).to(tl.int64) * whole + first + at % height
    top = tl.load(statistics_ptr + target, mask=ok, other=float("-inf"))
    # In float64: a thousand roundings of a sum just above 1 would be what a converged loss is made of.
    total = tl.load(statistics_ptr + slot + target, mask=ok, other=0.0).to(tl.float64)
    size = tl.cast(parts, tl.int64) * length
    if LABELS:
        positive = tl.load(statistics_ptr + 2 * slot + target, mask=ok, other=0.0)
    if SMOOTH:
        every = tl.load(statistics_ptr + 3 * slot + target, mask=ok, other=0.0)
    for p in range(0, parts, PARTS):
        part = p + tl.arange(0, PARTS)
        read = (part < parts)[:, None] & ok[None, :]
        offset = part.to(tl.int64)[:, None] * length + at[None, :]
        tops = tl.load(parts_ptr + offset, mask=read, other=float("-inf"))
        sums = tl.load(parts_ptr + size + offset, mask=read, other=0.0)
        higher = tl.maximum(top, tl.max(tops, 0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        rescaled = sums.to(tl.float64) * _exp(tops - shift[None, :], True)
        total = total * _exp(top - shift, True) + tl.sum(rescaled, 0)
        top = higher
        if LABELS:
            positive += tl.sum(tl.load(parts_ptr + 2 * size + offset, mask=read, other=0.0), 0)
        if SMOOTH:
            last: tl.constexpr = 3 if LABELS else 2
            every += tl.sum(tl.load(parts_ptr + last * size + offset, mask=read, other=0.0), 0)
    tl.store(statistics_ptr + target, top, mask=ok)
    tl.store(statistics_ptr + slot + target, total.to(tl.float32), mask=ok)
    if LABELS:
        tl.store(statistics_ptr + 2 * slot + target, positive, mask=ok)
    if SMOOTH:
        tl.store(statistics_ptr + 3 * slot + target, every, mask=ok)


@triton.jit
def _gradients_epilogue(
    dots, batch, batch_local, row_local, col_local, block_m, parts_at, blocks_m,
    scale_ptr, bias_ptr, key_bias_ptr, key_mask_ptr, positives_ptr, row_codes_ptr, col_codes_ptr,
    row_sums_ptr, col_sums_ptr, row_weight_ptr, col_weight_ptr, row_share_ptr, col_share_ptr, tile_ptr, scale_parts_ptr,
    key_parts_ptr, N, M, first_row, first_col, height, width, row_soft, col_soft, hard,
    COLUMNS: tl.constexpr, PRECISE: tl.constexpr, BLOCK_M: tl.constexpr, EDGE_N: tl.constexpr,
):  # fmt: skip
    """What `_gradients_kernel` leaves of one part of a tile."""
    in_rows = tl.arange(0, BLOCK_M)
    in_cols = tl.arange(0, EDGE_N)
    row_inside = in_rows < height - row_local
    col_inside = in_cols < width - col_local
    inside = row_inside[:, None] & col_inside[None, :]
    whole = (row_local + BLOCK_M <= height) & (col_local + EDGE_N <= width)
    z = _logits(
        dots, batch, first_col + col_local, inside, whole, col_inside, scale_ptr, bias_ptr, key_bias_ptr, key_mask_ptr,
        M, EDGE_N,
    )  # fmt: skip
    row = batch * N + first_row + row_local
    col = batch * M + first_col + col_local
    sums_at = row_sums_ptr + (batch * N + row) + in_rows
    row_top = tl.load(sums_at, mask=row_inside, other=0.0)
    row_inverse = 1.0 / tl.load(sums_at + N, mask=row_inside, other=1.0)
    # A quotient: a logarithm's rounding would be every probability's of its row. The positives leave each direction
    # before the two are added, where near 1 the difference is exact; one direction after the other, for registers.
    if row_codes_ptr is None:
        wanted = _positive_columns(positives_ptr, first_row + row_local, row_inside, batch, N, M, BLOCK_M)
        wanted -= first_col + col_local
    else:
        wanted = tl.load(row_codes_ptr + row + in_rows, mask=row_inside, other=-1)
        codes = tl.load(col_codes_ptr + col + in_cols, mask=col_inside, other=-2)
    g = _exp(z - row_top[:, None], PRECISE) * row_inverse[:, None]
    if row_codes_ptr is not None:
        row_share = tl.load(row_share_ptr + row + in_rows, mask=row_inside, other=0.0) * hard
        g -= tl.where(wanted[:, None] == codes[None, :], row_share[:, None] + row_soft, row_soft)
    else:
        g -= tl.where(wanted[:, None] == in_cols[None, :], hard + row_soft, row_soft)
    g *= tl.load(row_weight_ptr + row + in_rows, mask=row_inside, other=0.0)[:, None]
    if COLUMNS:
        sums_at = col_sums_ptr + (batch * M + col) + in_cols
        col_top = tl.load(sums_at, mask=col_inside, other=0.0)
        col_inverse = 1.0 / tl.load(sums_at + M, mask=col_inside, other=1.0)
        by_col = _exp(z - col_top[None, :], PRECISE) * col_inverse[None, :]
        if row_codes_ptr is not None:
            col_share = tl.load(col_share_ptr + col + in_cols, mask=col_inside, other=0.0) * hard
            by_col -= tl.where(wanted[:, None] == codes[None, :], col_share[None, :] + col_soft, col_soft)
        else:
            by_col -= tl.where(wanted[:, None] == in_cols[None, :], hard + col_soft, col_soft)
        if col_weight_ptr is not None:
            by_col *= tl.load(col_weight_ptr + col + in_cols, mask=col_inside, other=0.0)[None, :]
        g += by_col
    if not whole:
        g = tl.where(inside, g, 0.0)
    at = _tile_at(
        tile_ptr, batch_local, row_local, col_local, tl.cast(height, tl.int64) * width, width, BLOCK_M, EDGE_N
    )
    tl.store(at, g.to(tile_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_parts_ptr + parts_at, tl.sum(tl.sum(g * dots, 1), 0))
    if key_parts_ptr is not None:
        place = tl.cast(batch_local * blocks_m + block_m, tl.int64) * width + col_local
        tl.store(key_parts_ptr + place + in_cols, tl.sum(g, 0), mask=col_inside)


@triton.jit
def _gradients_kernel(
    q_ptr, k_ptr, dots_ptr, scale_ptr, bias_ptr, key_bias_ptr, key_mask_ptr, positives_ptr, row_codes_ptr,
    col_codes_ptr, row_sums_ptr, col_sums_ptr, row_weight_ptr, col_weight_ptr, row_share_ptr, col_share_ptr,
    tile_ptr, scale_parts_ptr, key_parts_ptr,
    N, M, D, first_batch, first_row, first_col, batches, height, width, row_soft, col_soft, hard,
    q_batch, q_row, k_batch, k_row, dots_batch, dots_row,
    SAVED: tl.constexpr, COLUMNS: tl.constexpr, EVEN_D: tl.constexpr, WIDEN: tl.constexpr, PRECISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The gradient tile of softmax losses, from logits formed again and the shifted sums of their rows and columns.

    ```
    g_ij = w_i (exp(z_ij - top_i) / sum_i - soft_row - hard share_i [j positive]) + the same for the column
    ```

    (An absent column weight is 1.) Written contiguously `[batches, height, width]` in the dtype of the products, which
    two library products consume; beside it `sum g_ij dot_ij` (gradient of the scale) and column sums (of key_bias) of
    each part. 2 N M D operations, an exponential a logit and direction, 2 bytes written: bound by the matrix units from
    D = 512 on. Where it reads dots (SAVED, 4 bytes) by memory; in float32 the tile may lie over the dots.
    """
    EDGE_N: tl.constexpr = BLOCK_N // SPLIT
    blocks_m = tl.cdiv(height, BLOCK_M)
    blocks_n = tl.cdiv(width, BLOCK_N)
    pid = tl.program_id(0)
    batch_local = pid // (blocks_m * blocks_n)
    block_m, block_n = tile_position(pid % (blocks_m * blocks_n), blocks_m, blocks_n, GROUP)
    batch = (first_batch + batch_local).to(tl.int64)
    row_local = block_m * BLOCK_M
    if SAVED:
        at = _tile_at(
            dots_ptr, batch_local, row_local, block_n * BLOCK_N, dots_batch, dots_row, BLOCK_M, BLOCK_N
        )
        inside = (tl.arange(0, BLOCK_M) < height - row_local)[:, None]
        inside = inside & (tl.arange(0, BLOCK_N) < width - block_n * BLOCK_N)[None, :]
        dots = tl.load(at, mask=inside, other=0.0)
    else:
        dots = _dots(
            q_ptr + batch * q_batch, k_ptr + batch * k_batch, first_row + row_local, first_col + block_n * BLOCK_N,
            N, M, D, q_row, k_row, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_D, WIDEN,
        )  # fmt: skip
    for part in tl.static_range(SPLIT):
        _gradients_epilogue(
            _part(dots, part, SPLIT, BLOCK_M, BLOCK_N), batch, batch_local, row_local,
            (SPLIT * block_n + part) * EDGE_N, block_m, SPLIT * pid + part, blocks_m, scale_ptr, bias_ptr,
            key_bias_ptr, key_mask_ptr, positives_ptr, row_codes_ptr, col_codes_ptr, row_sums_ptr, col_sums_ptr,
            row_weight_ptr, col_weight_ptr, row_share_ptr, col_share_ptr, tile_ptr, scale_parts_ptr, key_parts_ptr,
            N, M, first_row, first_col, height, width, row_soft, col_soft, hard, COLUMNS, PRECISE, BLOCK_M, EDGE_N,
        )  # fmt: skip


@triton.jit
def _log1p(e):
    """log(1 + e) for e in [0, 1] to 1.6e-7 of itself: e times a polynomial (interpolated at Chebyshev's points)."""
    p = e * -0.0031760570127516985 + 0.019542528316378593
    p = p * e - 0.05637361481785774
    p = p * e + 0.10543623566627502
    p = p * e - 0.1526966691017151
    p = p * e + 0.1966327428817749
    p = p * e - 0.24951615929603577
    p = p * e + 0.33329710364341736
    p = p * e - 0.49999892711639404
    return e * (p * e + 1.0)


@triton.jit
def _sigmoid_epilogue(
    dots, batch, batch_local, row_local, col_local, parts_at, sums, scale_ptr, bias_ptr, positives_ptr, tile_ptr,
    sums_ptr, N, M, first_row, first_col, height, width,
    GRADIENTS: tl.constexpr, PRECISE: tl.constexpr, BLOCK_M: tl.constexpr, EDGE_N: tl.constexpr,
):  # fmt: skip
    """What `_sigmoid_kernel` leaves of one part of a tile."""
    row_inside = tl.arange(0, BLOCK_M) < height - row_local
    in_cols = tl.arange(0, EDGE_N)
    inside = row_inside[:, None] & (in_cols < width - col_local)[None, :]
    whole = (row_local + BLOCK_M <= height) & (col_local + EDGE_N <= width)
    z = dots * tl.load(scale_ptr).to(tl.float32) + tl.load(bias_ptr).to(tl.float32)
    wanted = _positive_columns(positives_ptr, first_row + row_local, row_inside, batch, N, M, BLOCK_M)
    wanted -= first_col + col_local
    touched = tl.max(((wanted >= 0) & (wanted < EDGE_N)).to(tl.int32), 0) > 0
    x = -z
    if touched:
        x = tl.where(wanted[:, None] == in_cols[None, :], z, x)
    e = _exp(-tl.abs(x), PRECISE)
    loss = tl.maximum(-x, 0.0) + _log1p(e)
    if not whole:
        loss = tl.where(inside, loss, 0.0)
    tl.store(sums_ptr + parts_at, tl.sum(tl.sum(loss, 1), 0))
    if GRADIENTS:
        # 1 / (1 + exp(x)), without overflow on either side
        g = tl.where(x >= 0.0, e, 1.0) / (1.0 + e)
        if touched:
            g = tl.where(wanted[:, None] == in_cols[None, :], -g, g)
        if not whole:
            g = tl.where(inside, g, 0.0)
        at = _tile_at(
            tile_ptr,
            batch_local,
            row_local,
            col_local,
            tl.cast(height, tl.int64) * width,
            width,
            BLOCK_M,
            EDGE_N,
        )
        tl.store(at, g.to(tile_ptr.dtype.element_ty), mask=inside)
        tl.store(sums_ptr + sums + parts_at, tl.sum(tl.sum(g * dots, 1), 0))
        tl.store(sums_ptr + 2 * sums + parts_at, tl.sum(tl.sum(g, 1), 0))


@triton.jit
def _sigmoid_kernel(
    q_ptr, k_ptr, dots_ptr, scale_ptr, bias_ptr, positives_ptr, tile_ptr, sums_ptr,
    N, M, D, first_batch, first_row, first_col, batches, height, width,
    q_batch, q_row, k_batch, k_row, dots_batch, dots_row,
    SAVED: tl.constexpr, GRADIENTS: tl.constexpr, EVEN_D: tl.constexpr, WIDEN: tl.constexpr, PRECISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Loss and gradient tile of the sigmoid loss in one pass: both are known as soon as the logit is.

    ```
    x = y z, y = 1 for a row's positive, else -1;   loss = log(1 + exp(-x));   g = -y / (1 + exp(x))
    ```

    Writes the tile as `_gradients_kernel` does, and three sums of each part: loss, g dot, g. 2 N M D operations here
    and 4 in the library products that follow; about 30 instructions a logit, so bound by the matrix units from D = 512
    on.
    """
    EDGE_N: tl.constexpr = BLOCK_N // SPLIT
    blocks_m = tl.cdiv(height, BLOCK_M)
    blocks_n = tl.cdiv(width, BLOCK_N)
    pid = tl.program_id(0)
    batch_local = pid // (blocks_m * blocks_n)
    block_m, block_n = tile_position(pid % (blocks_m * blocks_n), blocks_m, blocks_n, GROUP)
    batch = (first_batch + batch_local).to(tl.int64)
    row_local = block_m * BLOCK_M
    sums = tl.num_programs(0).to(tl.int64) * SPLIT
    if SAVED:
        at = _tile_at(
            dots_ptr, batch_local, row_local, block_n * BLOCK_N, dots_batch, dots_row, BLOCK_M, BLOCK_N
        )
        inside = (tl.arange(0, BLOCK_M) < height - row_local)[:, None]
        inside = inside & (tl.arange(0, BLOCK_N) < width - block_n * BLOCK_N)[None, :]
        dots = tl.load(at, mask=inside, other=0.0)
    else:
        dots = _dots(
            q_ptr + batch * q_batch, k_ptr + batch * k_batch, first_row + row_local, first_col + block_n * BLOCK_N,
            N, M, D, q_row, k_row, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_D, WIDEN,
        )  # fmt: skip
    for part in tl.static_range(SPLIT):
        _sigmoid_epilogue(
            _part(dots, part, SPLIT, BLOCK_M, BLOCK_N), batch, batch_local, row_local,
            (SPLIT * block_n + part) * EDGE_N, SPLIT * pid + part, sums, scale_ptr, bias_ptr, positives_ptr,
            tile_ptr, sums_ptr, N, M, first_row, first_col, height, width, GRADIENTS, PRECISE, BLOCK_M, EDGE_N,
        )  # fmt: skip
