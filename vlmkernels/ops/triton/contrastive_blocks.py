# SPDX-License-Identifier: Apache-2.0
"""Blocks of a contrastive loss over a process group in Triton: the signatures of `reference/contrastive_blocks.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmkernels.ops.reference.contrastive_blocks import Block

from .contrastive import Problem, Sinks, label_codes, normalised, sigmoid_loss, softmax_gradients, statistics


def block_statistics(q: Tensor, k: Tensor, scale: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Maximum, shifted sum, sum over positives and sum of the logits of rows and of columns: [4, n] and [4, m]."""
    row, col = statistics(_problem(q, k, scale, block), target=0.0)
    return row[:, 0], col[:, 0]


def block_gradients(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    block: Block,
    row_lse: Tensor,
    col_lse: Tensor,
    row_weight: Tensor,
    col_weight: Tensor,
    grad_q: Tensor | None,
    wants_k: bool,
) -> tuple[Tensor | None, Tensor]:
    """Adds to grad_q [n, D]; returns the gradients of k [m, D] (or None) and of scale, float64 []."""
    problem = _problem(q, k, scale, block)
    row, col, factor = normalised(row_weight[None], col_weight[None], None)
    grad_k = torch.empty(k.shape, dtype=torch.float32, device=k.device) if wants_k else None
    sinks = Sinks(problem, grad_q, grad_k, None, factor, adds=True)
    shares = (_one(block.row_share), _one(block.col_share))
    softmax_gradients(problem, _sums(row_lse), _sums(col_lse), row, col, shares, sinks)
    sinks.finish()
    return grad_k, sinks.number(0)


def block_sigmoid(
    q: Tensor, k: Tensor, scale: Tensor, block: Block, weight: float, grad_q: Tensor | None, wants_k: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Adds to grad_q; returns the loss, and the gradients of k (or None), scale and bias; numbers float64 []."""
    problem = _problem(q, k, scale, block)
    grad_k = torch.empty(k.shape, dtype=torch.float32, device=k.device) if wants_k else None
    sinks = Sinks(problem, grad_q, grad_k, None, scale.new_full((), weight), adds=True)
    value = sigmoid_loss(problem, sinks) * weight
    sinks.finish()
    return value, grad_k, sinks.number(0), sinks.number(1)


def _problem(q: Tensor, k: Tensor, scale: Tensor, block: Block) -> Problem:
    row_codes, col_codes = label_codes(_one(block.row_labels), _one(block.col_labels))
    return Problem(
        q=q[None].contiguous(),
        k=k[None].contiguous(),
        scale=scale,
        bias=block.logit_bias,
        positives=None if row_codes is not None else _one(block.positives),
        row_codes=row_codes,
        col_codes=col_codes,
        smoothing=block.smoothing,
        row_classes=max(block.row_classes, 1),
        col_classes=max(block.col_classes, 1),
        columns=True,
    )


def _sums(lse: Tensor) -> Tensor:
    """Maximum and log of the shifted sum [2, n] -> maximum and sum [1, 2, n]."""
    return torch.stack([lse[0], lse[1].double().exp().float()])[None]


def _one(x: Tensor | None) -> Tensor | None:
    return None if x is None else x[None].contiguous()
