# SPDX-License-Identifier: Apache-2.0
"""Backward kernels beside those of `attention_backward.py`: all gradients of a short head at once; that of the bias."""

from __future__ import annotations

import triton
import triton.language as tl

from vlmkernels.ops.triton.attention_backward import _by_keys_step, _by_queries_step
from vlmkernels.ops.triton.attention_tiles import (
    UNSPECIALIZED,
    add_product,
    head_base,
    load_rows,
    row_sums,
    scale_rows,
    seen_keys,
    shift_of,
    store_rows,
    zero_rows,
)


@triton.jit
def _whole_rows(
    q,
    out,
    u,
    lse,
    grad_lse,
    q_strides,
    out_strides,
    u_strides,
    grad_lse_strides,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    Lq,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    DV: tl.constexpr,
    V1: tl.constexpr,
    V2: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Queries FIRST ... FIRST + ROWS: their numbers, q, u, the shift of their scores, delta."""
    queries = FIRST + tl.arange(0, ROWS)
    inside = queries < Lq
    q1, q2 = load_rows(q, q_strides, queries, inside, D, D1, D2, UNIT)
    u1, u2 = load_rows(u, u_strides, queries, inside, DV, V1, V2, UNIT)
    o1, o2 = load_rows(out, out_strides, queries, inside, DV, V1, V2, UNIT)
    delta = row_sums(u1, u2, o1, o2, V2)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + queries.to(tl.int64) * grad_lse_strides[2], mask=inside, other=0.0)
    return queries, (q1, q2), (u1, u2), shift_of(lse + queries, inside, q1.dtype == tl.float32), delta


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_whole_kernel(
    q,
    k,
    v,
    out,
    grad_out,
    lse,
    grad_lse,
    grad_q,  # or None, as grad_k and grad_v
    grad_k,
    grad_v,
    bias,
    key_mask,
    listed,
    before,
    seed,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    grad_out_strides,
    grad_q_strides,
    grad_k_strides,
    grad_v_strides,
    lse_strides,
    grad_lse_strides,
    bias_strides,
    mask_strides,
    key_blocks,
    H,
    Lq,
    Lk,
    scale,
    factor,
    threshold,
    keep_scale,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    DV: tl.constexpr,
    V1: tl.constexpr,
    V2: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    MORE: tl.constexpr,  # rows of a second tile, 0 for none: 257 = 256 + 16
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All gradients of one head whose queries fit a block: reads q, k, v, out and u once, writes dq, dk and dv once.

    10 Lq Lk D operations, which form the scores once, and 8 L D elements of traffic: 80 operations per byte at L = 128
    in 16 bits, so memory bounds it below about 300 queries; two kernels do 14 Lq Lk D and move 13 L D. q, u and the
    sums of dq stay on the chip; keys pass by in blocks, and their gradients leave as each is done.
    """
    index = tl.program_id(0).to(tl.int64)
    entry = index // H
    head = index % H
    q = head_base(q, q_strides, entry, head, UNIT)
    k = head_base(k, k_strides, entry, head, UNIT)
    v = head_base(v, v_strides, entry, head, UNIT)
    out = head_base(out, out_strides, entry, head, UNIT)
    u = head_base(grad_out, grad_out_strides, entry, head, UNIT)
    lse += entry * lse_strides[0] + head * lse_strides[1]
    if grad_lse is not None:
        grad_lse += entry * grad_lse_strides[0] + head * grad_lse_strides[1]
    if grad_k is not None:
        grad_k = head_base(grad_k, grad_k_strides, entry, head, UNIT)
    if grad_v is not None:
        grad_v = head_base(grad_v, grad_v_strides, entry, head, UNIT)
    queries, qq, uu, row_shift, delta = _whole_rows(
        q, out, u, lse, grad_lse, q_strides, out_strides, grad_out_strides, grad_lse_strides,
        0, ROWS, Lq, D, D1, D2, DV, V1, V2, UNIT,
    )  # fmt: skip
    dq1, dq2 = zero_rows(ROWS, D1, D2)
    more1 = 0.0
    more2 = 0.0
    if MORE > 0:
        queries_more, q_more, u_more, shift_more, delta_more = _whole_rows(
            q, out, u, lse, grad_lse, q_strides, out_strides, grad_out_strides, grad_lse_strides,
            ROWS, MORE, Lq, D, D1, D2, DV, V1, V2, UNIT,
        )  # fmt: skip
        more1, more2 = zero_rows(MORE, D1, D2)

    shift = Lk - Lq
    visible = key_blocks
    if key_mask is not None:
        listed += entry * key_blocks
        before += entry * (key_blocks + 1)
        visible = tl.load(before + key_blocks)
        for n in range(key_blocks):
            if tl.load(before + n + 1) == tl.load(before + n):
                keys = n * KEYS + tl.arange(0, KEYS)
                if grad_k is not None:
                    zero1, zero2 = zero_rows(KEYS, D1, D2)
                    store_rows(grad_k, grad_k_strides, keys, keys < Lk, zero1, zero2, D, D1, D2, UNIT)
                if grad_v is not None:
                    zero1, zero2 = zero_rows(KEYS, V1, V2)
                    store_rows(grad_v, grad_v_strides, keys, keys < Lk, zero1, zero2, DV, V1, V2, UNIT)
    # hoisting would hold q and u in registers four times, once for each product that they enter: it spills
    for n in tl.range(0, visible, num_stages=STAGES, disable_licm=True):
        first = n * KEYS
        if key_mask is not None:
            first = tl.load(listed + n) * KEYS
        keys = first + tl.arange(0, KEYS)
        inside = keys < Lk
        seen = seen_keys(key_mask, mask_strides, entry, keys, inside)
        kk = load_rows(k, k_strides, keys, seen, D, D1, D2, UNIT)
        vv = load_rows(v, v_strides, keys, seen, DV, V1, V2, UNIT)
        dk1, dk2 = zero_rows(KEYS, D1, D2)
        dv1, dv2 = zero_rows(KEYS, V1, V2)
        sums = (dk1, dk2, dv1, dv2)
        sums, ds = _by_keys_step(
            sums, kk, vv, qq, uu, row_shift, delta, bias, seed, bias_strides, entry, head, queries, Lq, keys, seen,
            first, shift, factor, threshold, keep_scale, D2, V2, KEYS, CAUSAL, PRECISION,
        )  # fmt: skip
        dq1, dq2 = add_product(dq1, dq2, tl.trans(ds), kk[0], kk[1], D2, PRECISION)
        if MORE > 0:
            sums, ds = _by_keys_step(
                sums, kk, vv, q_more, u_more, shift_more, delta_more, bias, seed, bias_strides, entry, head,
                queries_more, Lq, keys, seen, first, shift, factor, threshold, keep_scale,
                D2, V2, KEYS, CAUSAL, PRECISION,
            )  # fmt: skip
            more1, more2 = add_product(more1, more2, tl.trans(ds), kk[0], kk[1], D2, PRECISION)
        dk1, dk2, dv1, dv2 = sums
        if grad_k is not None:
            dk1, dk2 = scale_rows(dk1, dk2, scale, D2)
            dk1 = tl.where(seen[:, None], dk1, 0.0)
            if D2 > 0:
                dk2 = tl.where(seen[:, None], dk2, 0.0)
            store_rows(grad_k, grad_k_strides, keys, inside, dk1, dk2, D, D1, D2, UNIT)
        if grad_v is not None:
            dv1 = tl.where(seen[:, None], dv1, 0.0)
            if V2 > 0:
                dv2 = tl.where(seen[:, None], dv2, 0.0)
            store_rows(grad_v, grad_v_strides, keys, inside, dv1, dv2, DV, V1, V2, UNIT)

    if grad_q is not None:
        grad_q = head_base(grad_q, grad_q_strides, entry, head, UNIT)
        dq1, dq2 = scale_rows(dq1, dq2, scale, D2)
        store_rows(grad_q, grad_q_strides, queries, queries < Lq, dq1, dq2, D, D1, D2, UNIT)
        if MORE > 0:
            more1, more2 = scale_rows(more1, more2, scale, D2)
            store_rows(grad_q, grad_q_strides, queries_more, queries_more < Lq, more1, more2, D, D1, D2, UNIT)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_bias_kernel(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    grad_bias,  # contiguous [B|1, H|1, Lq, Lk]
    bias,
    key_mask,
    seed,
    q_strides,
    k_strides,
    v_strides,
    grad_out_strides,
    lse_strides,
    bias_strides,
    mask_strides,
    row_blocks,
    key_blocks,
    bias_heads,
    repeat_entries,  # batch entries and heads that share one element of the bias
    repeat_heads,
    Lq,
    Lk,
    factor,
    threshold,
    keep_scale,
    GROUP: tl.constexpr,  # query heads of a key head
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    DV: tl.constexpr,
    V1: tl.constexpr,
    V2: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of a tile of the bias: ds, summed over the entries and heads that share it, in their order.

    4 ROWS KEYS D operations for each of them (scores and u v^T once more), so that nothing of the size of all scores is
    written, and no two programs add to one place.
    """
    index = tl.program_id(0).to(tl.int64)
    key_block = (index % key_blocks).to(tl.int32)
    row_block = (index // key_blocks % row_blocks).to(tl.int32)
    shared = index // key_blocks // row_blocks
    bias_entry = shared // bias_heads
    bias_head = shared % bias_heads
    first = key_block * KEYS
    queries = row_block * ROWS + tl.arange(0, ROWS)
    keys = first + tl.arange(0, KEYS)
    inside = queries < Lq
    shift = Lk - Lq
    repeats = repeat_entries * repeat_heads
    if CAUSAL:
        repeats = tl.where(first <= tl.minimum(row_block * ROWS + ROWS, Lq) - 1 + shift, repeats, 0)
    tensors = (k, v, bias, key_mask, seed)
    sums = tl.zeros([ROWS, KEYS], tl.float32)
    for r in tl.range(0, repeats, num_stages=STAGES):
        entry = bias_entry + r // repeat_heads
        head = bias_head + r % repeat_heads
        q1, q2 = load_rows(
            head_base(q, q_strides, entry, head, UNIT), q_strides, queries, inside, D, D1, D2, UNIT
        )
        u1, u2 = load_rows(
            head_base(grad_out, grad_out_strides, entry, head, UNIT),
            grad_out_strides, queries, inside, DV, V1, V2, UNIT,
        )  # fmt: skip
        row = entry * lse_strides[0] + head * lse_strides[1] + queries
        delta_row = tl.load(delta + row, mask=inside, other=0.0)
        row_shift = shift_of(lse + row, inside, q1.dtype == tl.float32)
        tensors = (
            head_base(k, k_strides, entry, head // GROUP, UNIT),
            head_base(v, v_strides, entry, head // GROUP, UNIT),
            bias,
            key_mask,
            seed,
        )
        unused1, unused2 = zero_rows(ROWS, D1, D2)
        unused1, unused2, ds = _by_queries_step(
            unused1, unused2, (q1, q2), (u1, u2), row_shift, delta_row, tensors,
            (k_strides, v_strides, bias_strides, mask_strides), entry, head, queries, Lq, first, Lk, shift,
            factor, threshold, keep_scale, D, D1, D2, DV, V1, V2, UNIT, KEYS, True, CAUSAL, PRECISION,
        )  # fmt: skip
        sums += ds
    at = grad_bias + (shared * Lq + queries)[:, None] * Lk + keys[None, :]
    tl.store(at, sums.to(grad_bias.dtype.element_ty), mask=inside[:, None] & (keys < Lk)[None, :])
