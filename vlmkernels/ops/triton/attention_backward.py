# SPDX-License-Identifier: Apache-2.0
"""The backward kernels of attention: by queries (dQ), by keys (dK, dV), a whole head at once, and the bias's gradient.

Scores are formed again from the log-sum-exps. With p the weights, u what arrives at the result and w at the
log-sum-exp::

    delta[i] = sum_d u[i, d] out[i, d] - w[i]
    ds       = p (u v^T - delta)            dq = scale ds k    dk = scale ds^T q    dbias = ds    dv = p^T u

and under dropout, u v^T and the p of dv are multiplied by the mask. Every element of a gradient is summed by one
program in a fixed order: no atomics, and the same bits every time. Weights and ds enter the products rounded to the
operands' type.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vlmkernels.ops.triton.attention_tiles import (
    INFINITY,
    UNSPECIALIZED,
    add_product,
    biased,
    dot_rows,
    head_base,
    kept,
    load_rows,
    place,
    power,
    row_sums,
    scale_rows,
    seen_keys,
    sequence_bounds,
    shift_of,
    store_rows,
    zero_rows,
)


@triton.jit
def _by_queries_step(
    sum1,
    sum2,
    q,  # pairs of parts, as are the results of load_rows below
    u,
    row_shift,
    delta,
    tensors,
    strides,
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
    """`sum + ds k` over the keys [first, first + BLOCK), and ds `[queries, BLOCK]` in float32."""
    NATURAL: tl.constexpr = q[0].dtype == tl.float32
    k, v, bias, key_mask, seed = tensors
    k_strides, v_strides, bias_strides, mask_strides = strides
    keys = first + tl.arange(0, BLOCK)
    seen = seen_keys(key_mask, mask_strides, entry, keys, keys < Lk)
    k1, k2 = load_rows(k, k_strides, keys, seen, D, D1, D2, UNIT)
    v1, v2 = load_rows(v, v_strides, keys, seen, DV, V1, V2, UNIT)
    scores = dot_rows(q[0], q[1], k1, k2, D2, PRECISION) * factor
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
    weights = power(scores - row_shift[:, None], NATURAL)
    ds = dot_rows(u[0], u[1], v1, v2, V2, PRECISION)
    if seed is not None:
        keep = kept(seed, threshold, entry, head, queries, first, BLOCK)
        ds = tl.where(keep, ds * keep_scale, 0.0)
    ds = weights * (ds - delta[:, None])
    sum1, sum2 = add_product(sum1, sum2, ds, k1, k2, D2, PRECISION)
    return sum1, sum2, ds


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_by_queries_kernel(
    q,
    k,
    v,
    out,
    grad_out,
    lse,
    grad_lse,  # float32 [B, H, Lq] or [H, T] through its strides, or None
    delta,  # written: float32, laid out as lse
    grad_q,  # or None: delta alone
    bias,
    key_mask,
    listed,
    before,
    cu_q,
    cu_k,
    seed,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    grad_out_strides,
    grad_q_strides,
    lse_strides,  # batch, head
    grad_lse_strides,  # batch, head, row
    bias_strides,
    mask_strides,
    blocks,
    key_blocks,
    H,
    batch,
    Lq,
    Lk,
    scale,
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
    TAIL: tl.constexpr,
    CAUSAL: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """delta, and the gradient of a block of queries: a loop over the keys that they see, as in the forward kernel.

    6 ROWS Lk D operations (scores, u v^T, ds k) against 4 of the forward; reads q, u and out once, k and v through the
    L2 cache; writes dq and delta. Registers limit it: scores, ds and dq live at once.
    """
    entry, head, first_row, valid = place(
        cu_q, cu_k, tl.program_id(0).to(tl.int64), blocks, H, Lq, batch, Lq, Lk, ROWS
    )
    queries = first_row.to(tl.int32) + tl.arange(0, ROWS)
    lq = Lq
    lk = Lk
    lse += entry * lse_strides[0] + head * lse_strides[1]
    delta += entry * lse_strides[0] + head * lse_strides[1]
    if grad_lse is not None:
        grad_lse += entry * grad_lse_strides[0] + head * grad_lse_strides[1]
    if grad_q is not None:
        grad_q = head_base(grad_q, grad_q_strides, entry, head, UNIT)
    if cu_q is not None:
        if not valid:
            if grad_q is not None:
                slot = (tl.program_id(0).to(tl.int64) % blocks) * ROWS + tl.arange(0, ROWS)
                nan1, nan2 = zero_rows(ROWS, D1, D2)
                nan1, nan2 = scale_rows(nan1, nan2, float("nan"), D2)
                store_rows(grad_q, grad_q_strides, slot, slot < Lq, nan1, nan2, D, D1, D2, UNIT)
            return
        q_start, lq = sequence_bounds(cu_q, entry)
        k_start, lk = sequence_bounds(cu_k, entry)
        q += q_start * q_strides[1] * UNIT
        k += k_start * k_strides[1] * UNIT
        v += k_start * v_strides[1] * UNIT
        out += q_start * out_strides[1] * UNIT
        grad_out += q_start * grad_out_strides[1] * UNIT
        lse += q_start
        delta += q_start
        if grad_lse is not None:
            grad_lse += q_start * grad_lse_strides[2]
        if grad_q is not None:
            grad_q += q_start * grad_q_strides[1] * UNIT
    if first_row >= lq:
        return
    inside = queries < lq
    q = head_base(q, q_strides, entry, head, UNIT)
    k = head_base(k, k_strides, entry, head // GROUP, UNIT)
    v = head_base(v, v_strides, entry, head // GROUP, UNIT)
    u1, u2 = load_rows(
        head_base(grad_out, grad_out_strides, entry, head, UNIT),
        grad_out_strides, queries, inside, DV, V1, V2, UNIT,
    )  # fmt: skip
    o1, o2 = load_rows(
        head_base(out, out_strides, entry, head, UNIT), out_strides, queries, inside, DV, V1, V2, UNIT
    )
    delta_row = row_sums(u1, u2, o1, o2, V2)
    if grad_lse is not None:
        delta_row -= tl.load(grad_lse + queries.to(tl.int64) * grad_lse_strides[2], mask=inside, other=0.0)
    tl.store(delta + queries, delta_row, mask=inside)

    if grad_q is not None:
        q1, q2 = load_rows(q, q_strides, queries, inside, D, D1, D2, UNIT)
        row_shift = shift_of(lse + queries, inside, q1.dtype == tl.float32)
        shift = lk - lq
        end = lk
        whole = lk // KEYS
        if CAUSAL:
            end = tl.minimum(lk, tl.maximum(tl.minimum(first_row + ROWS, lq) + shift, 0)).to(tl.int32)
            whole = tl.minimum(lk, tl.maximum(first_row + 1 + shift, 0)).to(tl.int32) // KEYS
        tensors = (k, v, bias, key_mask, seed)
        strides = (k_strides, v_strides, bias_strides, mask_strides)
        sum1, sum2 = zero_rows(ROWS, D1, D2)
        if key_mask is not None:
            listed += entry * key_blocks
            visible = tl.load(before + entry * (key_blocks + 1) + tl.cdiv(end, KEYS))
            for n in tl.range(0, visible, num_stages=STAGES):
                sum1, sum2, _ = _by_queries_step(
                    sum1, sum2, (q1, q2), (u1, u2), row_shift, delta_row, tensors, strides, entry, head, queries,
                    lq, tl.load(listed + n) * KEYS, lk, shift, factor, threshold, keep_scale,
                    D, D1, D2, DV, V1, V2, UNIT, KEYS, True, CAUSAL, PRECISION,
                )  # fmt: skip
        else:
            for n in tl.range(0, whole, num_stages=STAGES):
                sum1, sum2, _ = _by_queries_step(
                    sum1, sum2, (q1, q2), (u1, u2), row_shift, delta_row, tensors, strides, entry, head, queries,
                    lq, n * KEYS, lk, shift, factor, threshold, keep_scale,
                    D, D1, D2, DV, V1, V2, UNIT, KEYS, False, False, PRECISION,
                )  # fmt: skip
            for first in tl.range(whole * KEYS, end, TAIL, num_stages=1):
                sum1, sum2, _ = _by_queries_step(
                    sum1, sum2, (q1, q2), (u1, u2), row_shift, delta_row, tensors, strides, entry, head, queries,
                    lq, first, lk, shift, factor, threshold, keep_scale,
                    D, D1, D2, DV, V1, V2, UNIT, TAIL, True, CAUSAL, PRECISION,
                )  # fmt: skip
        sum1, sum2 = scale_rows(sum1, sum2, scale, D2)
        store_rows(grad_q, grad_q_strides, queries, inside, sum1, sum2, D, D1, D2, UNIT)


@triton.jit
def _by_keys_step(
    sums,  # dk and dv, each a pair of parts
    k,
    v,
    q,
    u,
    row_shift,
    delta,
    bias,
    seed,
    bias_strides,
    entry,
    head,
    queries,
    Lq,
    keys,
    seen,
    first,
    shift,
    factor,
    threshold,
    keep_scale,
    D2: tl.constexpr,
    V2: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`dk + ds^T q` and `dv + p^T u` over a block of queries, and ds^T `[keys, queries]` in float32.

    Keys that do not exist or are hidden are rows of zeros here: what they sum up is not stored.
    """
    NATURAL: tl.constexpr = k[0].dtype == tl.float32
    dk1, dk2, dv1, dv2 = sums
    scores = dot_rows(k[0], k[1], q[0], q[1], D2, PRECISION) * factor
    scores = biased(
        scores,
        bias,
        bias_strides,
        entry,
        head,
        queries[None, :],
        keys[:, None],
        (queries < Lq)[None, :],
        seen[:, None],
        NATURAL,
    )
    if CAUSAL:
        scores = tl.where(keys[:, None] <= queries[None, :] + shift, scores, -INFINITY)
    weights = power(scores - row_shift[None, :], NATURAL)
    ds = dot_rows(v[0], v[1], u[0], u[1], V2, PRECISION)
    used = weights
    if seed is not None:
        keep = tl.trans(kept(seed, threshold, entry, head, queries, first, BLOCK))
        used = tl.where(keep, weights * keep_scale, 0.0)
        ds = tl.where(keep, ds * keep_scale, 0.0)
    dv1, dv2 = add_product(dv1, dv2, used, u[0], u[1], V2, PRECISION)
    ds = weights * (ds - delta[None, :])
    dk1, dk2 = add_product(dk1, dk2, ds, q[0], q[1], D2, PRECISION)
    return (dk1, dk2, dv1, dv2), ds


@triton.jit
def _by_keys_load(
    q,
    u,
    lse,
    delta,
    q_strides,
    u_strides,
    queries,
    Lq,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    DV: tl.constexpr,
    V1: tl.constexpr,
    V2: tl.constexpr,
    UNIT: tl.constexpr,
):
    """What a block of queries brings: q, u, the shift of its scores, delta."""
    inside = queries < Lq
    q1, q2 = load_rows(q, q_strides, queries, inside, D, D1, D2, UNIT)
    u1, u2 = load_rows(u, u_strides, queries, inside, DV, V1, V2, UNIT)
    return (
        (q1, q2),
        (u1, u2),
        shift_of(lse + queries, inside, q1.dtype == tl.float32),
        tl.load(delta + queries, mask=inside, other=0.0),
    )


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_by_keys_kernel(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    grad_k,
    grad_v,
    bias,
    key_mask,
    cu_q,
    cu_k,
    seed,
    q_strides,
    k_strides,
    v_strides,
    grad_out_strides,
    grad_k_strides,
    grad_v_strides,
    lse_strides,
    bias_strides,
    mask_strides,
    blocks,  # of keys per head
    H,  # key heads
    batch,
    Lq,
    Lk,
    scale,
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
    """The gradients of a block of keys and values: a loop over the query heads that share them, and their queries.

    8 KEYS GROUP Lq D operations (scores, u v^T, p^T u, ds^T q); reads k and v once, q and u through the L2 cache.
    Scores are formed transposed, so that the weights are a left operand as they lie in registers. A block without a
    visible key writes zeros and reads nothing else; under a causal mask the loop begins at the first query that sees
    the block.
    """
    entry, head, first_key, valid = place(
        cu_k, cu_q, tl.program_id(0).to(tl.int64), blocks, H, Lk, batch, Lk, Lq, KEYS
    )
    keys = first_key.to(tl.int32) + tl.arange(0, KEYS)
    lq = Lq
    lk = Lk
    grad_k = head_base(grad_k, grad_k_strides, entry, head, UNIT)
    grad_v = head_base(grad_v, grad_v_strides, entry, head, UNIT)
    dk1, dk2 = zero_rows(KEYS, D1, D2)
    dv1, dv2 = zero_rows(KEYS, V1, V2)
    if cu_q is not None:
        if not valid:
            slot = (tl.program_id(0).to(tl.int64) % blocks) * KEYS + tl.arange(0, KEYS)
            dk1, dk2 = scale_rows(dk1, dk2, float("nan"), D2)
            dv1, dv2 = scale_rows(dv1, dv2, float("nan"), V2)
            store_rows(grad_k, grad_k_strides, slot, slot < Lk, dk1, dk2, D, D1, D2, UNIT)
            store_rows(grad_v, grad_v_strides, slot, slot < Lk, dv1, dv2, DV, V1, V2, UNIT)
            return
        q_start, lq = sequence_bounds(cu_q, entry)
        k_start, lk = sequence_bounds(cu_k, entry)
        q += q_start * q_strides[1] * UNIT
        k += k_start * k_strides[1] * UNIT
        v += k_start * v_strides[1] * UNIT
        grad_out += q_start * grad_out_strides[1] * UNIT
        grad_k += k_start * grad_k_strides[1] * UNIT
        grad_v += k_start * grad_v_strides[1] * UNIT
        lse += q_start
        delta += q_start
    if first_key >= lk:
        return
    inside = keys < lk
    seen = seen_keys(key_mask, mask_strides, entry, keys, inside)
    shift = lk - lq
    begin = 0
    whole = 0  # the first block of queries that all see all these keys
    if CAUSAL:
        begin = tl.maximum(first_key - shift, 0).to(tl.int32) // ROWS
        whole = tl.cdiv(tl.maximum(first_key + KEYS - 1 - shift, 0).to(tl.int32), ROWS)
    end = tl.cdiv(lq, ROWS)
    if key_mask is not None:
        end = tl.where(tl.max(seen.to(tl.int32), 0) != 0, end, 0)
    whole = tl.minimum(whole, end)

    k = head_base(k, k_strides, entry, head, UNIT)
    v = head_base(v, v_strides, entry, head, UNIT)
    kk = load_rows(k, k_strides, keys, seen, D, D1, D2, UNIT)
    vv = load_rows(v, v_strides, keys, seen, DV, V1, V2, UNIT)
    sums = (dk1, dk2, dv1, dv2)
    for member in range(GROUP):
        query_head = head * GROUP + member
        q_head = head_base(q, q_strides, entry, query_head, UNIT)
        u_head = head_base(grad_out, grad_out_strides, entry, query_head, UNIT)
        lse_head = lse + entry * lse_strides[0] + query_head * lse_strides[1]
        delta_head = delta + entry * lse_strides[0] + query_head * lse_strides[1]
        if CAUSAL:
            for m in tl.range(begin, whole, num_stages=1):
                queries = m * ROWS + tl.arange(0, ROWS)
                qq, uu, row_shift, delta_row = _by_keys_load(
                    q_head, u_head, lse_head, delta_head, q_strides, grad_out_strides, queries, lq,
                    D, D1, D2, DV, V1, V2, UNIT,
                )  # fmt: skip
                sums, _ = _by_keys_step(
                    sums, kk, vv, qq, uu, row_shift, delta_row, bias, seed, bias_strides, entry, query_head,
                    queries, lq, keys, seen, first_key.to(tl.int32), shift, factor, threshold, keep_scale,
                    D2, V2, KEYS, True, PRECISION,
                )  # fmt: skip
        for m in tl.range(whole, end, num_stages=STAGES):
            queries = m * ROWS + tl.arange(0, ROWS)
            qq, uu, row_shift, delta_row = _by_keys_load(
                q_head, u_head, lse_head, delta_head, q_strides, grad_out_strides, queries, lq,
                D, D1, D2, DV, V1, V2, UNIT,
            )  # fmt: skip
            sums, _ = _by_keys_step(
                sums, kk, vv, qq, uu, row_shift, delta_row, bias, seed, bias_strides, entry, query_head,
                queries, lq, keys, seen, first_key.to(tl.int32), shift, factor, threshold, keep_scale,
                D2, V2, KEYS, False, PRECISION,
            )  # fmt: skip

    dk1, dk2, dv1, dv2 = sums
    # rows of hidden keys: what they summed up is of zeros in place of the key
    factor_rows = tl.where(seen, scale, 0.0)[:, None]
    dk1 = tl.where(seen[:, None], dk1 * factor_rows, 0.0)
    dv1 = tl.where(seen[:, None], dv1, 0.0)
    if D2 > 0:
        dk2 = tl.where(seen[:, None], dk2 * factor_rows, 0.0)
    if V2 > 0:
        dv2 = tl.where(seen[:, None], dv2, 0.0)
    store_rows(grad_k, grad_k_strides, keys, inside, dk1, dk2, D, D1, D2, UNIT)
    store_rows(grad_v, grad_v_strides, keys, inside, dv1, dv2, DV, V1, V2, UNIT)
