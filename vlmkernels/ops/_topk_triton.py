# SPDX-License-Identifier: Apache-2.0
"""How top-k similarity, zero-shot classification and FlatIndex reach the Triton kernels: what they serve. Imports no
triton before a kernel is launched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmkernels.ops import _topk_search, _triton, dispatch
from vlmkernels.ops._library import like_inputs
from vlmkernels.ops._topk_cpu import Rows


def reasons(call: dispatch.Call) -> list[str]:
    """Why the Triton kernels cannot serve a call; this is the whole list of refusals."""
    found = _triton.reasons(call)
    if call.dtype == torch.float64:
        found.append("products are float32, bfloat16 or float16, not torch.float64")
    return found


for _op in ("topk_similarity", "zero_shot"):
    dispatch.register_backend(
        _op, "triton", reasons, priority=_triton.PRIORITY, not_default=_triton.not_default
    )


def search(
    queries: Tensor,
    rows: Sequence[Rows],
    k: int,
    metric: str,
    *,
    allowed: Tensor | None = None,
    mask: Tensor | None = None,
    centre: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_topk_cpu.search`."""
    from vlmkernels.ops.triton.topk import TritonScan

    return _topk_search.search(
        TritonScan(), queries, rows, k, metric, allowed=allowed, mask=mask, centre=centre
    )


def range_search(
    queries: Tensor, rows: Sequence[Rows], threshold: float, metric: str, centre: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_topk_cpu.range_search`."""
    from vlmkernels.ops.triton.topk import TritonScan

    return _topk_search.range_search(TritonScan(), queries, rows, threshold, metric, centre)


def topk_similarity_gradients(
    grad_scores: Tensor,
    queries: Tensor,
    database: Tensor,
    indices: Tensor,
    metric: str,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """As `_topk_cpu_backward.topk_similarity_gradients`."""
    from vlmkernels.ops.triton.topk_backward import score_gradients

    grad_queries, grad_database = like_inputs((queries, database), needs)
    score_gradients(
        grad_scores,
        queries,
        database,
        indices,
        metric,
        grad_queries if needs[0] else None,
        grad_database if needs[1] else None,
    )
    return grad_queries, grad_database


def zero_shot(
    images: Tensor, class_features: Tensor, logit_scale: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_topk_cpu.zero_shot`."""
    from vlmkernels.ops.triton import zero_shot as kernels

    return kernels.zero_shot(images, class_features, logit_scale, k)


def zero_shot_gradients(
    grad_probabilities: Tensor,
    grad_lse: Tensor,
    image_features: Tensor,
    class_features: Tensor,
    logit_scale: Tensor,
    indices: Tensor,
    probabilities: Tensor,
    lse: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_topk_cpu_backward.zero_shot_gradients`."""
    from vlmkernels.ops.triton import zero_shot as kernels

    grads = like_inputs((image_features, class_features, logit_scale), needs)
    wanted = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    kernels.zero_shot_gradients(
        grad_probabilities,
        grad_lse,
        image_features,
        class_features,
        logit_scale,
        indices,
        probabilities,
        (wanted[0], wanted[1], wanted[2]),
    )
    return grads[0], grads[1], grads[2]
