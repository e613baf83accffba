# SPDX-License-Identifier: Apache-2.0
"""Gradients of top-k scores on Triton: a sparse problem of N k D operations.

With s the score of query n and its row x, `ds/dq = a x - b q` and `ds/dx = a q - c x`, where

```
dot: a = 1, b = c = 0        l2: a = b = c = 2        cosine: a = 1 / (|q| |x|), b = s / |q|^2, c = s / |x|^2
```

(b and c are 0 where a norm is below its floor, which then is a constant). Both gradients are sums over the pairs of one
vector, in order, by one program: no atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmkernels.ops.reference.topk_score import NORM_FLOOR, floored_root, norms

from . import _tables_topk  # noqa: F401  puts its rows into the tables
from ._launch import cdiv, launch, tile_of
from .topk import pair_sums
from .topk_kernels import topk_gradient_kernel


def score_gradients(
    grad_scores: Tensor,  # [N, k]
    queries: Tensor,  # [N, D]
    database: Tensor,  # [M, D]
    indices: Tensor,  # int64 [N, k], -1 = no row
    metric: str,
    grad_queries: Tensor | None,  # [N, D] contiguous, filled
    grad_database: Tensor | None,  # [M, D] contiguous, filled
    *,
    add: bool = False,
) -> None:
    """Fills what is given, or adds to it."""
    n, k = indices.shape
    queries = queries.contiguous()
    query = torch.arange(n, device=indices.device).repeat_interleave(k)
    row = indices.reshape(-1)
    grad = grad_scores.reshape(-1).double()
    if metric == "cosine":
        sums, squares = pair_sums(queries, database, query, row.clamp(min=0))
        q_norm, x_norm = norms(queries.double())[query], floored_root(squares)
        weight = grad / (q_norm * x_norm)
        score = weight * sums
        own_q = torch.where(q_norm > NORM_FLOOR, score / q_norm**2, 0.0)
        own_x = torch.where(x_norm > NORM_FLOOR, score / x_norm**2, 0.0)
    elif metric == "l2":
        weight = own_q = own_x = 2.0 * grad
    else:
        weight, own_q, own_x = grad, torch.zeros_like(grad), torch.zeros_like(grad)
    if grad_queries is not None:
        starts = torch.arange(n + 1, device=row.device) * k
        _gather(grad_queries, queries, database, weight, own_q, row, starts, add)
    if grad_database is not None:
        ordered, order = row.sort(stable=True)
        starts = torch.searchsorted(ordered, torch.arange(database.shape[0] + 1, device=row.device))
        _gather(grad_database, database, queries, weight[order], own_x[order], query[order], starts, add)


def _gather(
    out: Tensor,
    own: Tensor,
    others: Tensor,
    weight: Tensor,
    own_weight: Tensor,
    other: Tensor,
    starts: Tensor,
    add: bool,
) -> None:
    """`out[r] = sum_e weight[e] others[other[e]] - own_weight[e] own[r]` over starts[r] <= e < starts[r + 1]."""
    count, width = out.shape
    tile = tile_of("topk_gradient", out)
    launch(
        topk_gradient_kernel,
        count * cdiv(width, tile["WIDTH"]),
        own,
        others,
        weight,
        own_weight,
        other.contiguous(),
        starts,
        out,
        width,
        *own.stride(),
        *others.stride(),
        tile=tile,
        ADD=add,
    )
