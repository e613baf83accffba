# SPDX-License-Identifier: Apache-2.0
"""Kernels of top-k similarity: the scan, products of few queries, exact scores. Host: `topk.py`.

Letters: N queries, M rows of a block of the database, D width. The bounds that rule rows out are those of
`vlmkernels/ops/_topk_search.py`; nothing here decides more than a bound does, so that a product in TF32 or int8 changes
how many rows are scored exactly, and no answer.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .contrastive_tiles import _exp, _part

INFINITY = tl.constexpr(float("inf"))
UNSPECIALIZED = ("N", "M", "first", "capacity")


@triton.jit
def _places(positions, first, cols, M):
    """Numbers of rows in memory: `first + cols`, through `positions` where there are some; past the end the last."""
    at = tl.minimum(cols, M - 1).to(tl.int64) + first
    if positions is not None:
        at = tl.load(positions + at)
    return at


@triton.jit
def _dots(
    queries, rows, query, place, N, D, rows_row, rows_col,
    INTEGER: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Products of the queries from `query` on with the rows at `place`, one tile: exact int32, else float32 sums."""
    depth = tl.arange(0, BLOCK_K)
    q_at = queries + tl.minimum(query, N - 1).to(tl.int64)[:, None] * D + depth[None, :]
    x_at = rows + place[None, :] * rows_row + depth.to(tl.int64)[:, None] * rows_col
    if INTEGER:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for d in range(0, D, BLOCK_K):
        a = tl.load(q_at, mask=(depth < D - d)[None, :], other=0)
        b = tl.load(x_at, mask=(depth < D - d)[:, None], other=0)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        if INTEGER:
            total = tl.dot(a, b, total, out_dtype=tl.int32)
        else:
            total = tl.dot(a, b, total, input_precision=PRECISION)
        q_at += BLOCK_K
        x_at += BLOCK_K * rows_col
    return total


@triton.jit
def _with_logits(top, total, logits, col_inside):
    """A row's largest logit, and sum of exponentials shifted by it, with a part of a tile added to them."""
    logits = tl.where(col_inside[None, :], logits, -INFINITY)
    higher = tl.maximum(top, tl.max(logits, 1))
    shift = tl.where(higher == -INFINITY, 0.0, higher)
    total = total * _exp(top - shift, True) + tl.sum(_exp(logits - shift[:, None], True), 1)
    return higher, total


@triton.jit(do_not_specialize=UNSPECIALIZED)
def topk_scan_kernel(
    queries,  # [N, D] contiguous
    rows,  # any strides
    positions,  # int64, or None
    mask,  # [N, M] one byte each, or None
    factor,  # float32 [N], or None
    offset,  # float32 [N], or None
    slack,  # float32 [N]
    limit,  # float32 [N]; NaN keeps every row
    scale,  # float32 [M]
    shift,
    reach,
    lift,  # None without an offset
    dots,  # float32 [N, M], or None: takes the products, and nothing is filtered
    logit_factor,  # float32 [N], or None: logit_ij = logit_factor_i dot_ij scale_j
    tops,  # float32 [blocks of rows, N]: the largest logit of a tile's rows
    totals,  # the same: sum of exp(logit - largest)
    candidates,  # int32 [N, capacity], in no order
    counts,  # int32 [N], zeros before; may exceed the capacity, and then some candidates are missing
    N,
    M,
    D,
    first,
    rows_row,
    rows_col,
    mask_row,
    mask_col,
    capacity,
    INTEGER: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """A tile of products in registers; each is bounded and compared with its query's limit, what passes is written.

    2 N M D operations. Reads the database ceil(N / BLOCK_M) times, from L2 all but once, since programs that run
    together share its rows; writes 4 bytes a candidate. Matrix units limit it from a few hundred queries on, the
    database's bytes below. The epilogue takes three multiply-adds and a comparison a score, and what a candidate costs
    only where a part of the tile has one. Counters are integers: their order decides nothing but places, which the
    host sorts.
    """
    EDGE_N: tl.constexpr = BLOCK_N // SPLIT
    blocks_m = tl.cdiv(N, BLOCK_M)
    # queries first: they stay in L2, and the rows are those of the programs that run beside this one
    query = tl.program_id(0) % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    col0 = tl.program_id(0) // blocks_m * BLOCK_N
    place = _places(positions, first, col0 + tl.arange(0, BLOCK_N), M)
    tile = _dots(
        queries, rows, query, place, N, D, rows_row, rows_col, INTEGER, WIDEN, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    query_inside = query < N
    wide_query = query.to(tl.int64)
    if dots is None:
        slack_i = tl.load(slack + query, mask=query_inside, other=0.0)
        limit_i = tl.load(limit + query, mask=query_inside, other=INFINITY)
    if logit_factor is not None:
        factor_l = tl.load(logit_factor + query, mask=query_inside, other=0.0)
        top = tl.full((BLOCK_M,), -INFINITY, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
    for part in tl.static_range(SPLIT):
        products = _part(tile, part, SPLIT, BLOCK_M, BLOCK_N).to(tl.float32)
        col = col0 + part * EDGE_N + tl.arange(0, EDGE_N)
        col_inside = col < M
        inside = query_inside[:, None] & col_inside[None, :]
        if dots is not None:
            at = dots + wide_query[:, None] * M + col[None, :]
            tl.store(at, products, mask=inside)
        else:
            if logit_factor is not None:
                scale_l = tl.load(scale + col, mask=col_inside, other=0.0)
                top, total = _with_logits(
                    top, total, products * factor_l[:, None] * scale_l[None, :], col_inside
                )
            if factor is not None:
                products *= tl.load(factor + query, mask=query_inside, other=0.0)[:, None]
            upper = products * tl.load(scale + col, mask=col_inside, other=0.0)[None, :]
            upper += tl.load(shift + col, mask=col_inside, other=0.0)[None, :]
            upper += slack_i[:, None] * tl.load(reach + col, mask=col_inside, other=0.0)[None, :]
            if offset is not None:
                offset_i = tl.load(offset + query, mask=query_inside, other=0.0)
                upper += offset_i[:, None] * tl.load(lift + col, mask=col_inside, other=0.0)[None, :]
            # NaN is kept: nothing is known of it
            keep = inside & ((upper <= limit_i[:, None]) == 0)
            if mask is not None:
                seen = mask + wide_query[:, None] * mask_row + col.to(tl.int64)[None, :] * mask_col
                keep = keep & (tl.load(seen, mask=keep, other=0) != 0)
            if tl.max(keep.to(tl.int32)) > 0:
                counter = counts + query[:, None] + tl.zeros((BLOCK_M, EDGE_N), tl.int32)
                slot = tl.atomic_add(counter, 1, mask=keep, sem="relaxed")
                at = candidates + wide_query[:, None] * capacity + slot
                value = col[None, :] + tl.zeros((BLOCK_M, EDGE_N), tl.int32)
                tl.store(at, value, mask=keep & (slot < capacity))
    if logit_factor is not None:
        at = tl.cast(tl.program_id(0) // blocks_m, tl.int64) * N + query
        tl.store(tops + at, top, mask=query_inside)
        tl.store(totals + at, total, mask=query_inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def topk_few_kernel(
    queries,  # [N, D] contiguous
    rows,
    positions,
    dots,  # float32 [N, M]
    squares,  # float32 [M], or None
    N,
    M,
    D,
    first,
    rows_row,
    rows_col,
    INTEGER: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Products of few queries, and the rows' sums of squares: a matrix-vector product, split over the rows.

    Reads every row once, D elements, and writes N + 1 numbers for it: bound by memory. The second query and those
    after it find the rows in L1.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < M
    depth = tl.arange(0, DEPTH)
    x_at = (
        rows + _places(positions, first, row, M)[:, None] * rows_row + depth.to(tl.int64)[None, :] * rows_col
    )
    for i in range(N):
        if INTEGER:
            total = tl.zeros((ROWS, DEPTH), tl.int32)
        else:
            total = tl.zeros((ROWS, DEPTH), tl.float32)
        square = tl.zeros((ROWS, DEPTH), tl.float32)
        for d in range(0, D, DEPTH):
            exists = depth < D - d
            x = tl.load(x_at + tl.cast(d, tl.int64) * rows_col, mask=exists[None, :], other=0)
            q = tl.load(queries + tl.cast(i, tl.int64) * D + d + depth, mask=exists, other=0)
            if INTEGER:
                total += x.to(tl.int32) * q.to(tl.int32)[None, :]
            else:
                total += x.to(tl.float32) * q.to(tl.float32)[None, :]
            if squares is not None:
                square += x.to(tl.float32) * x.to(tl.float32)
        tl.store(dots + tl.cast(i, tl.int64) * M + row, tl.sum(total, 1).to(tl.float32), mask=inside)
        if squares is not None:
            tl.store(squares + row, tl.sum(square, 1), mask=inside)


# Exact scores.


@triton.jit
def tree_sum(x, ROWS: tl.constexpr, LEVELS: tl.constexpr):
    """Sums of rows [ROWS, 2**LEVELS] in the fixed order of `reference/topk_score.py`: by halves, element i + h to i.

    Elements past the width are -0.0, which leaves every bit of a number that it is added to.
    """
    for level in tl.static_range(LEVELS):
        left, right = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, 2 ** (LEVELS - level - 1))), (0, 2, 1)))
        x = left + right
    return tl.reshape(x, (ROWS,))


@triton.jit
def _wide_piece(at, col, D, step, exists, scale):
    """Elements `col` of rows at pointers [ROWS], as float64; codes are multiplied by a scale and rounded to float32."""
    inside = exists[:, None] & (col < D)[None, :]
    x = tl.load(at[:, None] + col.to(tl.int64)[None, :] * step, mask=inside, other=0).to(tl.float32)
    if scale is not None:
        x = x * scale[:, None]
    return x.to(tl.float64)


@triton.jit
def _folded_terms(
    q_at, x_at, scale, exists, D, q_col, x_col,
    TERM: tl.constexpr, START: tl.constexpr, STRIDE: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The terms of sums, float64, folded by halves until a piece [ROWS, WIDTH] is left of PIECES.

    Pieces whose numbers differ by PIECES / 2 are added first and those that differ by 1 last: a sum of sums, of which
    few are in registers at a time.
    """
    if STRIDE < PIECES:
        left = _folded_terms(
            q_at, x_at, scale, exists, D, q_col, x_col, TERM, START, 2 * STRIDE, PIECES, ROWS, WIDTH
        )
        right = _folded_terms(
            q_at, x_at, scale, exists, D, q_col, x_col, TERM, START + STRIDE, 2 * STRIDE, PIECES, ROWS, WIDTH
        )
        return left + right
    else:
        col = START * WIDTH + tl.arange(0, WIDTH)
        x = _wide_piece(x_at, col, D, x_col, exists, scale)
        if TERM == "square":
            terms = x * x
        else:
            q = _wide_piece(q_at, col, D, q_col, exists, None)
            if TERM == "product":
                terms = q * x
            else:
                terms = (q - x) * (q - x)
        return tl.where((col < D)[None, :], terms, tl.full((ROWS, WIDTH), -0.0, tl.float64))


@triton.jit(do_not_specialize=("P",))
def topk_exact_kernel(
    queries,  # [N, D] contiguous
    rows,  # any strides
    code_scale,  # float32, or None
    query,  # int64 [P]
    row,  # int64 [P]
    scores,  # float32 [P], or float64 [P]; None where only squares are wanted
    squares,  # float64 [P], of the rows, or None
    P,
    D,
    rows_row,
    rows_col,
    L2: tl.constexpr,
    PAIRS: tl.constexpr,
    PIECES: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Exact scores of pairs: float64 terms, each product and sum rounded by itself, in the order of `tree_sum`.

    P D terms, and their operands' bytes, of which the queries' come from L2. A row is PIECES of 2**LEVELS elements.
    """
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    exists = pair < P
    x_row = tl.load(row + pair, mask=exists, other=0)
    q_at = queries + tl.load(query + pair, mask=exists, other=0) * D
    x_at = rows + x_row * rows_row
    scale = None
    if code_scale is not None:
        scale = tl.load(code_scale + x_row, mask=exists, other=0.0)
    WIDTH: tl.constexpr = 2**LEVELS
    TERM: tl.constexpr = "difference" if L2 else "product"
    if scores is not None:
        terms = _folded_terms(q_at, x_at, scale, exists, D, 1, rows_col, TERM, 0, 1, PIECES, PAIRS, WIDTH)
        score = tree_sum(terms, PAIRS, LEVELS)
        if L2:
            score = 0.0 - score
        tl.store(scores + pair, score.to(scores.dtype.element_ty), mask=exists)
    if squares is not None:
        terms = _folded_terms(q_at, x_at, scale, exists, D, 1, rows_col, "square", 0, 1, PIECES, PAIRS, WIDTH)
        tl.store(squares + pair, tree_sum(terms, PAIRS, LEVELS), mask=exists)


# Gradients.


@triton.jit
def topk_gradient_kernel(
    own,  # [R, D], any strides
    others,  # [S, D], any strides
    weight,  # float64 [E]
    own_weight,  # float64 [E]
    other,  # int64 [E], rows of others; negative: none
    starts,  # int64 [R + 1]
    out,  # [R, D] contiguous
    D,
    own_row,
    own_col,
    others_row,
    others_col,
    ADD: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """`out[r] = sum_e weight[e] others[other[e]] - own_weight[e] own[r]`, starts[r] <= e < starts[r + 1], in order.

    Float64 sums, rounded once. Reads E rows, from L2 where many pairs share one, and writes R: bound by memory.
    """
    blocks = tl.cdiv(D, WIDTH)
    r = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    inside = col < D
    wide_col = col.to(tl.int64)
    total = tl.zeros((WIDTH,), tl.float64)
    share = tl.zeros((WIDTH,), tl.float64)
    for e in range(tl.load(starts + r), tl.load(starts + r + 1)):
        row = tl.load(other + e)
        exists = row >= 0
        x = tl.load(others + row * others_row + wide_col * others_col, mask=inside & exists, other=0.0)
        total += tl.where(exists, tl.load(weight + e), 0.0) * x.to(tl.float32).to(tl.float64)
        share += tl.where(exists, tl.load(own_weight + e), 0.0)
    x = tl.load(own + r * own_row + wide_col * own_col, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
    # a vector of no pair has no gradient, whatever is in it
    total -= tl.where(share != 0.0, share * x, 0.0)
    if ADD:
        total += tl.load(out + r * D + col, mask=inside, other=0.0).to(tl.float64)
    tl.store(out + r * D + col, total.to(tl.float32).to(out.dtype.element_ty), mask=inside)
