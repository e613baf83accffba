# SPDX-License-Identifier: Apache-2.0
"""The forward kernel of attention: one program per block of queries of one head, an online softmax over its keys."""

from __future__ import annotations

import triton
import triton.language as tl

from vlmkernels.ops.triton.attention_tiles import (
    INFINITY,
    LOG2_E,
    UNSPECIALIZED,
    add_product,
    biased,
    dot_rows,
    head_base,
    kept,
    load_rows,
    place,
    power,
    scale_rows,
    seen_keys,
    sequence_bounds,
    store_rows,
    zero_rows,
)


@triton.jit
def _forward_step(
    state,  # sum1, sum2, total, top
    q1,
    q2,
    tensors,  # k, v, bias, key_mask, seed
    strides,  # of k, v, bias, key_mask
    entry,
    head,
    queries,
    Lq,
    first,
    Lk,
    shift,
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
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys [first, first + BLOCK) enter the sums of a block of queries. MASKED: not every query sees all of them."""
    NATURAL: tl.constexpr = q1.dtype == tl.float32
    sum1, sum2, total, top = state
    k, v, bias, key_mask, seed = tensors
    k_strides, v_strides, bias_strides, mask_strides = strides
    keys = first + tl.arange(0, BLOCK)
    inside = keys < Lk
    seen = seen_keys(key_mask, mask_strides, entry, keys, inside)
    k1, k2 = load_rows(k, k_strides, keys, seen, D, D1, D2, UNIT)
    scores = dot_rows(q1, q2, k1, k2, D2, PRECISION) * factor
    scores = biased(
        scores,
        bias,
        bias_strides,
        entry,
        head,
        queries[:, None],
        keys[None, :],
        (queries < Lq)[:, None],
        seen[None, :],
        NATURAL,
    )
    if MASKED:
        visible = seen[None, :]
        if CAUSAL:
            visible = visible & (keys[None, :] <= queries[:, None] + shift)
        scores = tl.where(visible, scores, -INFINITY)

    higher = tl.maximum(top, tl.max(scores, 1))
    # a row that has seen no key yet has no maximum to subtract
    anchor = tl.where(higher == -INFINITY, 0.0, higher)
    weights = power(scores - anchor[:, None], NATURAL)
    decay = power(top - anchor, NATURAL)
    total = total * decay + tl.sum(weights, 1)
    if seed is not None:
        keep = kept(seed, threshold, entry, head, queries, first, BLOCK)
        weights = tl.where(keep, weights * keep_scale, 0.0)
    v1, v2 = load_rows(v, v_strides, keys, seen, DV, V1, V2, UNIT)
    sum1, sum2 = scale_rows(sum1, sum2, decay[:, None], V2)
    sum1, sum2 = add_product(sum1, sum2, weights, v1, v2, V2, PRECISION)
    return sum1, sum2, total, higher


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_forward_kernel(
    q,  # [B, Lq, H, D], or [T, H, D] with batch strides of 0
    k,
    v,
    out,
    lse,  # [B, H, Lq] or [H, T], float32
    bias,  # [B, H, Lq, Lk] through its strides, or None
    key_mask,  # uint8 [B, Lk], or None
    listed,  # blocks of visible keys, or None: `visible_blocks_kernel`
    before,
    cu_q,  # [B + 1], or None
    cu_k,
    seed,  # int64 [1], or None: no dropout
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    lse_strides,  # batch, head
    bias_strides,
    mask_strides,
    blocks,  # of queries per head
    key_blocks,  # per entry, as `listed` counts them
    H,
    batch,
    Lq,
    Lk,
    factor,  # scale, times log2(e) unless scores are natural
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
    TAIL: tl.constexpr,
    CAUSAL: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`out = dropout(softmax(s)) v`, `lse = ln sum exp s` with `s = scale q k^T + bias`, in base 2 throughout.

    Per program 4 ROWS Lk D operations; reads ROWS x D queries once, and keys and values, which the programs of a head
    that run beside it share in the L2 cache. From device memory 2 (Lq + Lk) D elements per head: in 16 bits that is
    Lq Lk / (Lq + Lk) operations per byte, 64 at L = 128 and 180 at L = 360, where an H200 turns from memory to
    arithmetic. Beside the products there are one exponential and eight vector operations per score: with 64-wide heads
    they weigh as much as the products. Blocks of keys that a query block or the mask hides are not visited, those
    that all its queries see are not masked, and the rest of the keys is a block of its own of TAIL keys (257 =
    4 x 64 + 16).
    """
    entry, head, first_row, valid = place(
        cu_q, cu_k, tl.program_id(0).to(tl.int64), blocks, H, Lq, batch, Lq, Lk, ROWS
    )
    queries = first_row.to(tl.int32) + tl.arange(0, ROWS)
    out = head_base(out, out_strides, entry, head, UNIT)
    lse += entry * lse_strides[0] + head * lse_strides[1]
    lq = Lq
    lk = Lk
    if cu_q is not None:
        if not valid:
            slot = (tl.program_id(0).to(tl.int64) % blocks) * ROWS + tl.arange(0, ROWS)
            bad = tl.full([ROWS, V1], float("nan"), tl.float32)
            bad2 = 0.0
            if V2 > 0:
                bad2 = tl.full([ROWS, V2], float("nan"), tl.float32)
            store_rows(out, out_strides, slot, slot < Lq, bad, bad2, DV, V1, V2, UNIT)
            tl.store(lse + slot, float("nan"), mask=slot < Lq)
            return
        q_start, lq = sequence_bounds(cu_q, entry)
        k_start, lk = sequence_bounds(cu_k, entry)
        q += q_start * q_strides[1] * UNIT
        k += k_start * k_strides[1] * UNIT
        v += k_start * v_strides[1] * UNIT
        out += q_start * out_strides[1] * UNIT
        lse += q_start
    if first_row >= lq:
        return
    q = head_base(q, q_strides, entry, head, UNIT)
    k = head_base(k, k_strides, entry, head // GROUP, UNIT)
    v = head_base(v, v_strides, entry, head // GROUP, UNIT)
    q1, q2 = load_rows(q, q_strides, queries, queries < lq, D, D1, D2, UNIT)

    # query i sees the keys j <= i + shift
    shift = lk - lq
    end = lk
    whole = lk // KEYS
    if CAUSAL:
        end = tl.minimum(lk, tl.maximum(tl.minimum(first_row + ROWS, lq) + shift, 0)).to(tl.int32)
        whole = tl.minimum(lk, tl.maximum(first_row + 1 + shift, 0)).to(tl.int32) // KEYS

    sum1, sum2 = zero_rows(ROWS, V1, V2)
    state = (sum1, sum2, tl.zeros([ROWS], tl.float32), tl.full([ROWS], -INFINITY, tl.float32))
    tensors = (k, v, bias, key_mask, seed)
    strides = (k_strides, v_strides, bias_strides, mask_strides)
    if key_mask is not None:
        listed += entry * key_blocks
        visible = tl.load(before + entry * (key_blocks + 1) + tl.cdiv(end, KEYS))
        for n in tl.range(0, visible, num_stages=STAGES):
            state = _forward_step(
                state, q1, q2, tensors, strides, entry, head, queries, lq, tl.load(listed + n) * KEYS, lk, shift,
                factor, threshold, keep_scale, D, D1, D2, DV, V1, V2, UNIT, KEYS, True, CAUSAL, PRECISION,
            )  # fmt: skip
    else:
        for n in tl.range(0, whole, num_stages=STAGES):
            state = _forward_step(
                state, q1, q2, tensors, strides, entry, head, queries, lq, n * KEYS, lk, shift,
                factor, threshold, keep_scale, D, D1, D2, DV, V1, V2, UNIT, KEYS, False, False, PRECISION,
            )  # fmt: skip
        for first in tl.range(whole * KEYS, end, TAIL, num_stages=1):
            state = _forward_step(
                state, q1, q2, tensors, strides, entry, head, queries, lq, first, lk, shift,
                factor, threshold, keep_scale, D, D1, D2, DV, V1, V2, UNIT, TAIL, True, CAUSAL, PRECISION,
            )  # fmt: skip

    sum1, sum2, total, top = state
    empty = total == 0.0  # not `top`: the maximum of NaN is -inf
    share = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
    sum1, sum2 = scale_rows(sum1, sum2, share[:, None], V2)
    store_rows(out, out_strides, queries, queries < lq, sum1, sum2, DV, V1, V2, UNIT)
    anchor = tl.where(top == -INFINITY, 0.0, top)
    if q.dtype.element_ty != tl.float32:
        anchor = anchor / LOG2_E
    log_sum = anchor + tl.log(tl.where(empty, 1.0, total))
    log_sum = tl.where(top == INFINITY, INFINITY, tl.where(empty, -INFINITY, log_sum))
    tl.store(lse + queries, log_sum, mask=queries < lq)
