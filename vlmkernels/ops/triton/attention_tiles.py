# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels share on the device: tiles split in two, places of sequences, scores, dropout.

Head dims are no powers of two, and Triton's tiles are. A width is therefore cut into the largest power of two that it
holds and a second part for the rest: 72 = 64 + 16, 80 = 64 + 16, 96 = 64 + 32, where padding to 128 would multiply
1.8, 1.6 and 1.3 times as much. Every tile that is as wide as a head is a pair `(x1, x2)`; `x2` is 0.0 where one part
is enough.

Strides come as tuples (batch, row, head, column), in units of `UNIT` elements: Triton knows of an integer only whether
16 divides it, so a head stride of 72 would cost the 16-byte loads unless it is written as 9 x 8.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import LOG2_E

INFINITY = tl.constexpr(float("inf"))
#: Run-time integers whose value must not make a new kernel: of a stride, `UNIT` says all that matters.
UNSPECIALIZED = (
    *(
        "blocks",
        "row_blocks",
        "key_blocks",
        "H",
        "batch",
        "Lq",
        "Lk",
        "bias_heads",
        "repeat_entries",
        "repeat_heads",
    ),
    *("q_strides", "k_strides", "v_strides", "out_strides", "lse_strides", "threshold"),
    *("grad_out_strides", "grad_lse_strides", "grad_q_strides", "grad_k_strides", "grad_v_strides"),
)
#: Boundaries of packed sequences that a program reads at a time, looking for its own.
BOUNDARIES = tl.constexpr(1024)


# Tiles as wide as a head.


@triton.jit
def head_base(x, strides, batch, head, UNIT: tl.constexpr):
    """Address of the first row of one head; `batch` and `head` are int64."""
    return x + (batch * strides[0] + head * strides[2]) * UNIT


@triton.jit
def _part(
    base,
    strides,
    rows,
    inside,
    FIRST: tl.constexpr,
    PART: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Addresses of columns FIRST, FIRST + 1, ... of rows, and which of them exist."""
    cols = FIRST + tl.arange(0, PART)
    if UNIT == 1:
        steps = cols * strides[3]
    else:
        steps = cols
    at = base + rows.to(tl.int64)[:, None] * strides[1] * UNIT + steps[None, :]
    if FIRST + PART <= WIDTH:
        exists = inside[:, None] & tl.full([1, PART], True, tl.int1)
    else:
        exists = inside[:, None] & (cols < WIDTH)[None, :]
    return at, exists


@triton.jit
def load_rows(
    base, strides, rows, inside, WIDTH: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, UNIT: tl.constexpr
):
    """Rows `[n, WIDTH]` as the pair `([n, W1], [n, W2])`, 0 where `inside` is False and beyond the width."""
    at, exists = _part(base, strides, rows, inside, 0, W1, WIDTH, UNIT)
    x1 = tl.load(at, mask=exists, other=0.0)
    x2 = 0.0
    if W2 > 0:
        at, exists = _part(base, strides, rows, inside, W1, W2, WIDTH, UNIT)
        x2 = tl.load(at, mask=exists, other=0.0)
    return x1, x2


@triton.jit
def store_rows(
    base,
    strides,
    rows,
    inside,
    x1,
    x2,
    WIDTH: tl.constexpr,
    W1: tl.constexpr,
    W2: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Writes what `load_rows` reads, rounded to the type behind `base`."""
    at, exists = _part(base, strides, rows, inside, 0, W1, WIDTH, UNIT)
    tl.store(at, x1.to(base.dtype.element_ty), mask=exists)
    if W2 > 0:
        at, exists = _part(base, strides, rows, inside, W1, W2, WIDTH, UNIT)
        tl.store(at, x2.to(base.dtype.element_ty), mask=exists)


@triton.jit
def zero_rows(ROWS: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr):
    """A pair of float32 sums, at zero."""
    x2 = 0.0
    if W2 > 0:
        x2 = tl.zeros([ROWS, W2], tl.float32)
    return tl.zeros([ROWS, W1], tl.float32), x2


@triton.jit
def scale_rows(x1, x2, factor, W2: tl.constexpr):
    """Both parts times `factor`, a number or one per row `[n, 1]`."""
    if W2 > 0:
        x2 = x2 * factor
    return x1 * factor, x2


@triton.jit
def dot_rows(a1, a2, b1, b2, W2: tl.constexpr, PRECISION: tl.constexpr):
    """`a @ b^T` over the width of a head: `[m, n]` in float32."""
    product = tl.dot(a1, tl.trans(b1), input_precision=PRECISION)
    if W2 > 0:
        product = tl.dot(a2, tl.trans(b2), product, input_precision=PRECISION)
    return product


@triton.jit
def add_product(sum1, sum2, weights, x1, x2, W2: tl.constexpr, PRECISION: tl.constexpr):
    """`sum + weights @ x`, the weights rounded to the type of x."""
    weights = weights.to(x1.dtype)
    sum1 = tl.dot(weights, x1, sum1, input_precision=PRECISION)
    if W2 > 0:
        sum2 = tl.dot(weights, x2, sum2, input_precision=PRECISION)
    return sum1, sum2


@triton.jit
def row_sums(a1, a2, b1, b2, W2: tl.constexpr):
    """`sum_d a[i, d] b[i, d]` in float32."""
    sums = tl.sum(a1.to(tl.float32) * b1.to(tl.float32), 1)
    if W2 > 0:
        sums += tl.sum(a2.to(tl.float32) * b2.to(tl.float32), 1)
    return sums


# Packed sequences.


@triton.jit
def sequence_of(cu, other, slot, batch, tokens, other_tokens, BLOCK: tl.constexpr):
    """(sequence, its block, valid) for one of `tokens // BLOCK + batch` slots, found without the host.

    Sequence b owns the slots from `cu[b] // BLOCK + b`, one more than it needs at most. `valid` is False where
    either list of boundaries does not rise from 0 to its number of tokens.
    """
    begun = 0
    wrong = 0
    for first in range(0, batch, BOUNDARIES):
        at = first + tl.arange(0, BOUNDARIES)
        inside = at < batch
        start = tl.load(cu + at, mask=inside, other=0).to(tl.int64)
        end = tl.load(cu + at + 1, mask=inside, other=0).to(tl.int64)
        falls = start > end
        falls = falls | (
            tl.load(other + at, mask=inside, other=0) > tl.load(other + at + 1, mask=inside, other=0)
        )
        wrong += tl.sum((falls & inside).to(tl.int32))
        begun += tl.sum((inside & (start // BLOCK + at <= slot)).to(tl.int32))
    ends = (tl.load(cu) == 0) & (tl.load(cu + batch) == tokens)
    ends = ends & (tl.load(other) == 0) & (tl.load(other + batch) == other_tokens)
    sequence = tl.maximum(begun - 1, 0).to(tl.int64)
    valid = ends & (wrong == 0)
    block = slot - (tl.load(cu + sequence).to(tl.int64) // BLOCK + sequence)
    return sequence, block, valid


@triton.jit
def sequence_bounds(cu, sequence):
    """(first token, length) of a sequence."""
    start = tl.load(cu + sequence).to(tl.int64)
    return start, (tl.load(cu + sequence + 1).to(tl.int64) - start).to(tl.int32)


@triton.jit
def place(cu, other, index, blocks, heads, length, batch, tokens, other_tokens, BLOCK: tl.constexpr):
    """(batch entry, head, first row in the entry, valid) of program `index`: blocks of rows change fastest.

    Blocks of one head run side by side, and find the tensors that they share in the L2 cache.
    """
    block = index % blocks
    head = (index // blocks) % heads
    if cu is None:
        return (index // blocks // heads).to(tl.int64), head.to(tl.int64), block * BLOCK, True
    else:
        entry, block, valid = sequence_of(cu, other, block, batch, tokens, other_tokens, BLOCK)
        return entry, head.to(tl.int64), block.to(tl.int32) * BLOCK, valid


# Key masks: which blocks have a key.


@triton.jit
def visible_blocks_kernel(
    mask, strides, blocks, Lk, listed, before, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """For each batch entry, the blocks of BLOCK keys that show any, in order, and how many come before each block.

    `listed [B, blocks]`, `before [B, blocks + 1]`, int32. One program per batch entry reads its Lk bytes.
    """
    entry = tl.program_id(0).to(tl.int64)
    mask += entry * strides[0]
    listed += entry * blocks
    before += entry * (blocks + 1)
    tl.store(before, 0)
    count = 0
    for first in range(0, blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        keys = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        seen = tl.load(mask + keys.to(tl.int64) * strides[1], mask=keys < Lk, other=0)
        any_seen = (tl.max(seen.to(tl.int32), 1) != 0).to(tl.int32)
        rank = count + tl.cumsum(any_seen, 0)
        tl.store(listed + rank - 1, block, mask=any_seen != 0)
        tl.store(before + block + 1, rank, mask=block < blocks)
        count += tl.sum(any_seen)


@triton.jit
def seen_keys(mask, mask_strides, entry, keys, inside):
    """`inside`, less the keys that the mask hides."""
    if mask is None:
        return inside
    else:
        at = mask + entry * mask_strides[0] + keys.to(tl.int64) * mask_strides[1]
        return inside & (tl.load(at, mask=inside, other=0) != 0)


# Scores. Those of 16-bit operands are in base 2, their factor holding log2(e), which saves a multiplication for each.
# Those of float32 operands are natural: a score and a log-sum-exp are rounded as they are, and not again 1.44 times as
# large, which is what the weights of the backward kernels then differ by.


@triton.jit
def biased(scores, bias, strides, entry, head, rows, cols, row_inside, col_inside, NATURAL: tl.constexpr):
    """Scores plus the bias at (rows, cols), which broadcast to the scores' shape."""
    if bias is None:
        return scores
    else:
        at = bias + entry * strides[0] + head * strides[1]
        at = at + rows.to(tl.int64) * strides[2] + cols.to(tl.int64) * strides[3]
        added = tl.load(at, mask=row_inside & col_inside, other=0.0).to(tl.float32)
        if NATURAL:
            return scores + added
        else:
            return scores + added * LOG2_E


@triton.jit
def power(x, NATURAL: tl.constexpr):
    """The exponential of a score."""
    if NATURAL:
        return tl.exp(x)
    else:
        return tl.exp2(x)


@triton.jit
def shift_of(lse, inside, NATURAL: tl.constexpr):
    """What a row's scores are compared with: its log-sum-exp, or infinity (every weight 0) without a key."""
    shift = tl.load(lse, mask=inside, other=-INFINITY)
    if not NATURAL:
        shift = shift * LOG2_E
    return tl.where(shift == -INFINITY, INFINITY, shift)


@triton.jit
def kept(seed, threshold, entry, head, queries, first_key, BLOCK: tl.constexpr):
    """Which weights dropout keeps, `[m, BLOCK]`: word `j % 4` of Philox4x32-10 at the counter (j // 4, i, h, b).

    Salmon et al. (SC 2011), keyed by the 64-bit seed; one evaluation decides four neighbouring keys, so `first_key` is
    a multiple of 4.
    """
    four = (first_key // 4 + tl.arange(0, BLOCK // 4))[None, :].to(tl.uint32)
    rows = queries[:, None].to(tl.uint32)
    zeros = tl.zeros([queries.shape[0], BLOCK // 4], tl.uint32)
    threshold = threshold.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        tl.load(seed), zeros + four, zeros + rows, zeros + head.to(tl.uint32), zeros + entry.to(tl.uint32)
    )
    even = tl.join((w0 >= threshold).to(tl.int8), (w2 >= threshold).to(tl.int8))
    odd = tl.join((w1 >= threshold).to(tl.int8), (w3 >= threshold).to(tl.int8))
    return tl.reshape(tl.join(even, odd), [queries.shape[0], BLOCK]) != 0
