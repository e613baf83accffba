# SPDX-License-Identifier: Apache-2.0
"""What the tests of attention share: the definition row by row, eager torch, gradients, packed sequences."""

from __future__ import annotations

from typing import Any

import cases
import torch
from torch import Tensor

INF = float("inf")

#: A little of everything: grouped heads, a bias with -inf, a key mask that hides one entry, causal.
MIXED = cases.AttentionCase(3, 4, 4, 8, Lk=5, Hk=2, bias="1H", key_mask=True, is_causal=True)


def row_by_row(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The definition once more, one query at a time over the keys that it may see."""
    B, Lq, H, D = q.shape
    Lk, Hk = k.shape[1:3]
    mask = options.get("key_mask", torch.ones(B, Lk, dtype=torch.bool))
    out, lse = torch.zeros(B, Lq, H, v.shape[-1], dtype=q.dtype), torch.full((B, H, Lq), -INF, dtype=q.dtype)
    for b in range(B):
        for h in range(H):
            for i in range(Lq):
                seen = [
                    j for j in range(Lk) if mask[b, j] and (not options.get("is_causal") or j <= i + Lk - Lq)
                ]
                scores = [q[b, i, h] @ k[b, j, h // (H // Hk)] * D**-0.5 for j in seen]
                if bias is not None:
                    full = bias.expand(B, H, Lq, Lk)
                    scores = [s + full[b, h, i, j] for s, j in zip(scores, seen, strict=True)]
                total = sum(s.exp() for s in scores)
                if not scores or total == 0:
                    continue
                weights = [s.exp() / total for s in scores]
                out[b, i, h] = sum(w * v[b, j, h // (H // Hk)] for w, j in zip(weights, seen, strict=True))
                lse[b, h, i] = total.log()
    return out, lse


def eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """What a user of torch writes, in the inputs' dtype."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q * q.shape[-1] ** -0.5, k)
    scores = scores if bias is None else scores + bias
    if "key_mask" in options:
        scores = scores.masked_fill(~options["key_mask"][:, None, None], -INF)
    if options.get("is_causal"):
        Lq, Lk = scores.shape[-2:]
        scores = scores.masked_fill(~torch.ones(Lq, Lk, dtype=torch.bool).tril(Lk - Lq), -INF)
    hidden = (scores == -INF).all(-1, keepdim=True)
    weights = scores.masked_fill(hidden, 0.0).softmax(-1).masked_fill(hidden, 0.0)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def with_gradients(function: Any, tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The result of a call, and the gradients of its tensors for a fixed random gradient of the result."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    out = function(**leaves, **options)
    upstream = cases.fill("normal", tuple(out.shape), torch.float64, seed=99).to(out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), upstream)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def packed(
    lengths: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, cu_seqlens_q and cu_seqlens_k for sequences of these (queries, keys), four heads on two."""
    ends = [torch.tensor([0, *x], dtype=torch.int32).cumsum(0, dtype=torch.int32) for x in lengths]
    q = torch.randn(sum(lengths[0]), 4, 16, dtype=dtype)
    k, v = torch.randn(2, sum(lengths[1]), 2, 16, dtype=dtype).unbind(0)
    return q, k, v, *ends
