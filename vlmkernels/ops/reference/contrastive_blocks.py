# SPDX-License-Identifier: Apache-2.0
"""A block of a contrastive loss in plain PyTorch: some rows against some columns of a larger problem.

What a process group needs: each rank holds some rows and sees the columns shard by shard. At most `CHUNK_LOGITS` logits
exist at once. Not differentiable: the gradients are formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

#: Logits that are in memory at once.
CHUNK_LOGITS = 2**24


@dataclass
class Block:
    """What a block's logits are compared with.

    Attributes:
        logit_bias: added to every logit.
        positives: [n] int64, the column of each row's positive in this block's coordinates, which may lie outside it.
        row_labels: [n] int64, with col_labels [m]: equal labels are positives.
        row_share: [n], with labels: 1 / (positives of the row in the whole problem), 0 without any; col_share [m].
        smoothing: label smoothing.
        row_classes: number of columns of the whole problem; col_classes: of rows.
    """

    logit_bias: Tensor | None = None
    positives: Tensor | None = None
    row_labels: Tensor | None = None
    col_labels: Tensor | None = None
    row_share: Tensor | None = None
    col_share: Tensor | None = None
    smoothing: float = 0.0
    row_classes: int = 0
    col_classes: int = 0


def block_statistics(q: Tensor, k: Tensor, scale: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Maximum, shifted sum of exponentials, sum over positives and sum of the logits, by rows and by columns.

    Args:
        q: [n, D], rounded to the dtype of the products.
        k: [m, D].
        scale: [].
        block: the rest.

    Returns:
        [4, n] and [4, m] in the dtype of the sums.
    """
    row = _empty_statistics(q, q.shape[0])
    col = _empty_statistics(q, k.shape[0])
    for rows, dots in _chunks(q, k):
        logits = _logits(dots, scale, block)
        positive = _positive(block, rows, logits)
        row[:, rows] = _statistics(logits, positive)
        col = merge_statistics(col, _statistics(logits.T, positive.T))
    return row, col


def merge_statistics(a: Tensor, b: Tensor) -> Tensor:
    """Statistics [4, n] of two disjoint sets of logits as those of both."""
    top = torch.maximum(a[0], b[0])
    # where nothing was seen yet the maximum is -inf and the sum 0
    shift = torch.where(top == -torch.inf, 0.0, top)
    total = a[1] * (a[0] - shift).exp() + b[1] * (b[0] - shift).exp()
    return torch.stack([top, total, a[2] + b[2], a[3] + b[3]])


def block_gradients(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    block: Block,
    row_lse: Tensor,  # [2, n]: maximum, log of the shifted sum
    col_lse: Tensor,  # [2, m]
    row_weight: Tensor,  # [n]
    col_weight: Tensor,  # [m]
    grad_q: Tensor | None,  # [n, D], added to
    wants_k: bool,
) -> tuple[Tensor | None, Tensor]:
    """Gradients of `sum_i row_weight_i loss_i + sum_j col_weight_j loss_j`, the softmax objective.

    Returns:
        The gradient of k [m, D] or None, and that of scale [] (float64).
    """
    grad_k = torch.zeros(k.shape, dtype=row_lse.dtype, device=k.device) if wants_k else None
    grad_scale = torch.zeros((), dtype=torch.float64, device=q.device)
    hard = 1.0 - block.smoothing
    for rows, dots in _chunks(q, k):
        logits = _logits(dots, scale, block)
        positive = _positive(block, rows, logits)
        by_row = (logits - row_lse[0, rows, None] - row_lse[1, rows, None]).exp()
        by_col = (logits - col_lse[0] - col_lse[1]).exp()
        if block.smoothing:
            by_row -= block.smoothing / block.row_classes
            by_col -= block.smoothing / block.col_classes
        row_share = 1.0 if block.row_share is None else block.row_share[rows, None]
        col_share = 1.0 if block.col_share is None else block.col_share
        target = positive.to(logits.dtype) * hard  # a bool times a number would be float32
        by_row -= target * row_share
        by_col -= target * col_share
        tile = by_row * row_weight[rows, None] + by_col * col_weight
        grad_scale += (tile.double() * dots).sum()
        _add_products(tile * scale, q[rows], k, None if grad_q is None else grad_q[rows], grad_k)
    return grad_k, grad_scale


def block_sigmoid(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    block: Block,
    weight: float,
    grad_q: Tensor | None,  # [n, D], added to
    wants_k: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """`weight * sum_ij -log sigmoid(y_ij z_ij)` and its gradients, y = 1 for a row's positive, else -1.

    Returns:
        The sum [] (float64), the gradients of k [m, D] or None, of scale and of the bias [] (float64).
    """
    sums = torch.promote_types(q.dtype, torch.float32)
    grad_k = torch.zeros(k.shape, dtype=sums, device=k.device) if wants_k else None
    loss, grad_scale, grad_bias = torch.zeros(3, dtype=torch.float64, device=q.device).unbind(0)
    for rows, dots in _chunks(q, k):
        logits = _logits(dots, scale, block)
        sign = 2.0 * _positive(block, rows, logits) - 1.0
        loss = loss - weight * F.logsigmoid(sign * logits).double().sum()
        tile = -sign * torch.sigmoid(-sign * logits) * weight
        grad_scale = grad_scale + (tile.double() * dots).sum()
        grad_bias = grad_bias + tile.double().sum()
        _add_products(tile * scale, q[rows], k, None if grad_q is None else grad_q[rows], grad_k)
    return loss, grad_k, grad_scale, grad_bias


def _empty_statistics(like: Tensor, count: int) -> Tensor:
    sums = torch.promote_types(like.dtype, torch.float32)
    empty = torch.zeros(4, count, dtype=sums, device=like.device)
    empty[0] = -torch.inf
    return empty


def _chunks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and their dot products with all columns."""
    sums = torch.promote_types(q.dtype, torch.float32)
    step = max(1, CHUNK_LOGITS // max(1, k.shape[0]))
    columns = k.to(sums).T
    for first in range(0, q.shape[0] if k.shape[0] else 0, step):
        rows = slice(first, min(first + step, q.shape[0]))
        yield rows, q[rows].to(sums) @ columns


def _logits(dots: Tensor, scale: Tensor, block: Block) -> Tensor:
    logits = dots * scale
    return logits if block.logit_bias is None else logits + block.logit_bias


def _positive(block: Block, rows: slice, logits: Tensor) -> Tensor:
    """Bool [rows, columns]."""
    if block.row_labels is not None and block.col_labels is not None:
        return block.row_labels[rows, None] == block.col_labels
    assert block.positives is not None  # one of the two is how a block is made
    return block.positives[rows, None] == torch.arange(logits.shape[1], device=logits.device)


def _statistics(logits: Tensor, positive: Tensor) -> Tensor:
    top = logits.amax(1)
    shift = torch.where(top == -torch.inf, 0.0, top)
    sums = (logits - shift[:, None]).exp().sum(1)
    return torch.stack([top, sums, torch.where(positive, logits, 0.0).sum(1), logits.sum(1)])


def _add_products(tile: Tensor, q: Tensor, k: Tensor, grad_q: Tensor | None, grad_k: Tensor | None) -> None:
    if grad_q is not None:
        grad_q += tile @ k.to(tile.dtype)
    if grad_k is not None:
        grad_k += tile.T @ q.to(tile.dtype)
