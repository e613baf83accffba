# SPDX-License-Identifier: Apache-2.0
"""The arithmetic that defines a similarity score: a sum in a fixed order, norms, and the three metrics."""

from __future__ import annotations

import torch
from torch import Tensor

#: A norm is at least this, as in `torch.nn.functional.normalize`: a zero vector has cosine 0 with everything.
NORM_FLOOR = 1e-12


def score_dtype(x: Tensor) -> torch.dtype:
    """The dtype of scores: float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def tree_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension in a fixed order, so that the bits depend on nothing but the numbers.

    While more than one element is left, with h the largest power of two below their number, element i + h is added to
    element i. Elementwise additions round alike on every device, for every batch and thread count; a library's sum or
    matrix product promises none of that.

    Args:
        x: [..., D].

    Returns:
        [...], 0 where D = 0.
    """
    width = int(x.shape[-1])
    if width == 0:
        return x.sum(-1)
    while width > 1:
        half = 1 << ((width - 1).bit_length() - 1)
        folded = x[..., : width - half] + x[..., half:]
        x = folded if width == 2 * half else torch.cat([folded, x[..., width - half : half]], -1)
        width = half
    return x[..., 0]


def pair_scores(queries: Tensor, rows: Tensor, metric: str) -> Tensor:
    """Scores of pairs in float64, differentiable in any order.

    Args:
        queries: [..., D], any floating dtype.
        rows: [..., D], broadcast against queries.
        metric: "dot", "cosine" or "l2".

    Returns:
        [...] float64, not yet rounded.
    """
    q, x = queries.double(), rows.double()
    if metric == "l2":
        return 0.0 - tree_sum((q - x).square())
    dot = tree_sum(q * x)
    if metric == "cosine":
        return dot / (norms(q) * norms(x))
    return dot


def norms(x: Tensor) -> Tensor:
    """`max(|x|, 1e-12)` over the last dimension by `tree_sum`, in x's dtype: [..., D] -> [...]."""
    return floored_root(tree_sum(x.square()))


def floored_root(squares: Tensor) -> Tensor:
    """Norms of sums of squares."""
    # The floor goes on the square: the square root's slope at zero is infinite, and 0 * inf would be a NaN gradient.
    return squares.clamp(min=NORM_FLOOR**2).sqrt()
