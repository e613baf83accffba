# SPDX-License-Identifier: Apache-2.0
"""Kernels of zero-shot classification: classes of several prompts, and all of a small classifier in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from .contrastive_tiles import _exp
from .topk_kernels import INFINITY, _folded_terms, tree_sum

#: Squared norms outside which float32 products tell nothing of the cosine; zero is outside as well.
SMALLEST_SQUARE = tl.constexpr(1e-24)
LARGEST_SQUARE = tl.constexpr(1e36)
#: Keys of scores, in their order: no class at all, and NaN; every number is above.
NO_KEY = tl.constexpr(-(2**31))
NAN_KEY = tl.constexpr(-(2**31) + 1)


@triton.jit
def _floored_root(squares, FLOOR: tl.constexpr):
    """`max(sqrt(squares), FLOOR)`; NaN stays."""
    least = tl.full(squares.shape, FLOOR * FLOOR, tl.float64)
    return tl.sqrt(tl.where(squares < least, least, squares))


@triton.jit(do_not_specialize=("D", "P"))
def class_mean_kernel(
    prompts,  # [C, P, D], any strides
    norms,  # float64 [C, P], floored
    means,  # float32 [C, D] contiguous
    P,
    D,
    class_step,
    prompt_step,
    col_step,
    WIDTH: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """`means[c] = sum_p prompts[c, p] / norms[c, p] / P`: float64, added by `tree_sum`, rounded once.

    Reads C P D elements once: bound by memory.
    """
    blocks = tl.cdiv(D, WIDTH)
    c = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    p = tl.arange(0, 2**LEVELS)
    inside = (col < D)[:, None] & (p < P)[None, :]
    at = (
        prompts
        + c * class_step
        + col.to(tl.int64)[:, None] * col_step
        + p.to(tl.int64)[None, :] * prompt_step
    )
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32).to(tl.float64)
    unit = x / (tl.load(norms + c * P + p, mask=p < P, other=1.0)[None, :] + tl.zeros_like(x))
    unit = tl.where((p < P)[None, :], unit, tl.full((WIDTH, 2**LEVELS), -0.0, tl.float64))
    number = tl.zeros((WIDTH,), tl.float64) + P
    mean = tree_sum(unit, WIDTH, LEVELS) / number
    tl.store(means + c * D + col, mean.to(tl.float32), mask=col < D)


@triton.jit
def _key_of(score):
    """int32 in the order of float32 scores."""
    score = tl.where(score == 0.0, 0.0, score)  # one zero
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(score == score, bits, NAN_KEY)


@triton.jit
def _score_of(key):
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _inserted(values, value, place, KEPT: tl.constexpr):
    """Rows of a sorted list [ROWS, KEPT] with a value put at a place; what was there and behind it moves on."""
    j = tl.arange(0, KEPT)
    before = j[None, :, None] == j[None, None, :] - 1
    moved = tl.sum(tl.where(before, values[:, :, None], 0), 1)
    return tl.where(
        j[None, :] < place[:, None], values, tl.where(j[None, :] == place[:, None], value[:, None], moved)
    )


@triton.jit(do_not_specialize=("N", "C"))
def zero_shot_kernel(
    images,  # [N, D], any strides
    classes,  # [C, D], any strides
    logit_scale,  # float32 []
    probabilities,  # float32 [N, K] contiguous
    indices,  # int64 [N, K] contiguous
    lse,  # float32 [N]
    N,
    C,
    D,
    images_row,
    images_col,
    classes_row,
    classes_col,
    eta,  # what a float32 cosine may be off by
    K: tl.constexpr,
    KEPT: tl.constexpr,
    FLOOR: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    DEPTH: tl.constexpr,
    PIECES: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """ROWS images against all classes, C <= CLASSES: norms, product, log-sum-exp, the k best and their probabilities.

    The float32 cosines stay in registers. Of a row's classes those whose upper bound reaches the k-th best lower bound
    are scored exactly, one after the other in ascending index, as `topk_exact_kernel` does, and put into a sorted list
    behind what equals them. 2 N C D operations; the classes are read from L2 by every program, which is what limits
    it, beside a few thousand cycles for the candidates.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < N
    col = tl.arange(0, CLASSES)
    depth = tl.arange(0, DEPTH)
    image_at = images + tl.minimum(row, N - 1).to(tl.int64) * images_row
    class_at = classes + tl.minimum(col, C - 1).to(tl.int64) * classes_row
    dots = tl.zeros((ROWS, CLASSES), tl.float32)
    image_square = tl.zeros((ROWS,), tl.float32)
    class_square = tl.zeros((CLASSES,), tl.float32)
    for d in range(0, D, DEPTH):
        inside = depth < D - d
        place = (d + depth).to(tl.int64)
        a = tl.load(image_at[:, None] + place[None, :] * images_col, mask=inside[None, :], other=0.0)
        b = tl.load(class_at[None, :] + place[:, None] * classes_col, mask=inside[:, None], other=0.0)
        wide_a = a.to(tl.float32)
        wide_b = b.to(tl.float32)
        image_square += tl.sum(wide_a * wide_a, 1)
        class_square += tl.sum(wide_b * wide_b, 0)
        if WIDEN:
            dots = tl.dot(wide_a, wide_b, dots, input_precision=PRECISION)
        else:
            dots = tl.dot(a, b, dots, input_precision=PRECISION)

    scale = tl.load(logit_scale)
    image_known = (image_square > SMALLEST_SQUARE) & (image_square < LARGEST_SQUARE)
    class_known = (class_square > SMALLEST_SQUARE) & (class_square < LARGEST_SQUARE)
    image_norm = tl.sqrt_rn(image_square)
    class_norm = tl.sqrt_rn(class_square)
    image_norm = tl.where(image_norm < FLOOR, FLOOR, image_norm)
    class_norm = tl.where(class_norm < FLOOR, FLOOR, class_norm)
    cosine = tl.div_rn(dots, image_norm[:, None] * class_norm[None, :])
    logit = tl.where((col < C)[None, :], cosine * scale, -INFINITY)
    top = tl.max(logit, 1)
    top = tl.where(top == -INFINITY, 0.0, top)
    total = tl.sum(_exp(logit - top[:, None], True), 1)
    tl.store(lse + row, top + tl.log(total), mask=exists)

    known = image_known[:, None] & class_known[None, :]
    rest = tl.where(known & (col < C)[None, :], cosine - eta, -INFINITY)
    limit = tl.full((ROWS,), INFINITY, tl.float32)
    for _ in tl.static_range(K):
        limit, at = tl.max(rest, 1, return_indices=True)
        rest = tl.where(col[None, :] == at[:, None], -INFINITY, rest)
    keep = (known == 0) | (cosine + eta >= limit[:, None])
    keep = keep & (col < C)[None, :] & exists[:, None]
    left = tl.where(keep, col[None, :] + tl.zeros((ROWS, CLASSES), tl.int32), CLASSES)

    WIDTH: tl.constexpr = 2**LEVELS
    squares = _folded_terms(
        image_at, image_at, None, exists, D, images_col, images_col, "square", 0, 1, PIECES, ROWS, WIDTH
    )
    norm = _floored_root(tree_sum(squares, ROWS, LEVELS), FLOOR)
    keys = tl.full((ROWS, KEPT), NO_KEY, tl.int32)
    ids = tl.full((ROWS, KEPT), -1, tl.int32)
    following = tl.min(left, 1)
    while tl.min(following) < CLASSES:
        found = following < CLASSES
        x_at = classes + tl.where(found, following, 0).to(tl.int64) * classes_row
        products = _folded_terms(
            image_at, x_at, None, found, D, images_col, classes_col, "product", 0, 1, PIECES, ROWS, WIDTH
        )
        squares = _folded_terms(
            image_at, x_at, None, found, D, images_col, classes_col, "square", 0, 1, PIECES, ROWS, WIDTH
        )
        other = _floored_root(tree_sum(squares, ROWS, LEVELS), FLOOR)
        score = tree_sum(products, ROWS, LEVELS) / (norm * other)
        key = tl.where(found, _key_of(score.to(tl.float32)), NO_KEY)
        place = tl.where(found, tl.sum((keys >= key[:, None]).to(tl.int32), 1), KEPT)
        keys = _inserted(keys, key, place, KEPT)
        ids = _inserted(ids, following, place, KEPT)
        left = tl.where(col[None, :] == following[:, None], CLASSES, left)
        following = tl.min(left, 1)

    j = tl.arange(0, KEPT)
    # in float64: rounded to float32, logits of a size of 100 would cost the probabilities two digits
    exponent = _score_of(keys).to(tl.float64) * scale.to(tl.float64) - top.to(tl.float64)[:, None]
    probability = (tl.exp(exponent) / (total.to(tl.float64)[:, None] + tl.zeros_like(exponent))).to(
        tl.float32
    )
    out = row.to(tl.int64)[:, None] * K + j[None, :]
    inside = exists[:, None] & (j < K)[None, :]
    tl.store(probabilities + out, probability, mask=inside)
    tl.store(indices + out, ids.to(tl.int64), mask=inside)
