# SPDX-License-Identifier: Apache-2.0
"""Gradients of top-k scores and of zero-shot probabilities by the CPU kernels.

The scores of the k rows of each query are a sparse problem of N k D operations. The log-sum-exp over all classes is
the contrastive loss's softmax by rows with a weight per row, so its gradient is taken by that family's kernel, tile by
tile: no [N, C] array exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmkernels import _native
from vlmkernels.ops._contrastive_ops import Arguments, _Launch
from vlmkernels.ops._topk_cpu import METRICS, _matrix, class_vectors


def topk_similarity_gradients(
    grad_scores: Tensor,
    queries: Tensor,
    database: Tensor,
    indices: Tensor,
    metric: str,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Gradients [N, D] and [M, D] of the scores [N, k] of known rows, in the features' dtype; [0] where not needed."""
    outputs: dict[str, Tensor] = {}
    grads = tuple(
        _room(outputs, name, x) if need else x.new_empty(0)
        for name, x, need in (("grad_q", queries, needs[0]), ("grad_x", database, needs[1]))
    )
    _sparse("topk_similarity", metric, queries, database, indices, grad_scores, outputs)
    return grads[0], grads[1]


def zero_shot_gradients(
    grad_probabilities: Tensor,  # [N, k] float32
    grad_lse: Tensor,  # [N] float32
    image_features: Tensor,
    class_features: Tensor,
    logit_scale: Tensor,
    indices: Tensor,
    probabilities: Tensor,
    lse: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to image features, class features and the scale, in their dtypes; [0] where not needed."""
    (n, d), k = image_features.shape, indices.shape[1]
    classes = class_features if class_features.ndim == 2 else class_vectors(class_features)
    images, units = class_vectors(image_features.unsqueeze(1)), class_vectors(classes.unsqueeze(1))
    grad_images = torch.empty((n, d), dtype=torch.float32)
    grad_units = torch.empty(units.shape, dtype=torch.float32) if needs[1] else None
    grad_scale = torch.empty((), dtype=torch.float32)
    grad_score = torch.empty((n, k), dtype=torch.float32)
    row_weight = torch.empty(n, dtype=torch.float32)
    row_lse = torch.empty((2, n), dtype=torch.float32)
    no_positives = torch.empty(n, dtype=torch.int64)
    grad_probabilities, grad_lse = grad_probabilities.contiguous(), grad_lse.contiguous()
    _native.call(
        "zero_shot",
        _native.cpu.zero_shot_weights,
        n=n,
        d=d,
        k=k,
        logit_scale=logit_scale.data_ptr(),
        probabilities=probabilities.data_ptr(),
        grad_probabilities=grad_probabilities.data_ptr(),
        lse=lse.data_ptr(),
        grad_lse=grad_lse.data_ptr(),
        row_lse=row_lse.data_ptr(),
        grad_score=grad_score.data_ptr(),
        row_weight=row_weight.data_ptr(),
        no_positives=no_positives.data_ptr(),
        zeros=grad_images.data_ptr(),
    )

    # All classes: the softmax by rows.
    dense = _Launch(Arguments(images, units, logit_scale, positives=no_positives))
    dense.arguments |= {"block": True, "row_classes": 1, "col_classes": 1}
    for name, tensor in (
        ("row_lse", row_lse),
        ("row_weight", row_weight),
        ("grad_q", grad_images),
        ("grad_k", grad_units),
        ("grad_scale", grad_scale),
    ):
        dense.add(name, tensor)
    dense("zero_shot", _native.cpu.contrastive_backward)

    # The k best, on top of it.
    outputs = {"grad_q": grad_images} | ({} if grad_units is None else {"grad_x": grad_units})
    scalars = {"logit_scale": logit_scale.data_ptr(), "grad_scale": grad_scale.data_ptr()}
    _sparse("zero_shot", "dot", images, units, indices, grad_score, outputs, add=True, **scalars)

    grads = [x.new_empty(0) for x in (image_features, class_features, logit_scale)]
    if needs[0]:
        grads[0] = _through_unit(image_features, grad_images)
    if grad_units is not None:
        if class_features.ndim == 2:
            grads[1] = _through_unit(classes, grad_units)
        else:
            flat = class_features.reshape(-1, d)
            grad_means = _through_unit(classes, grad_units)
            grads[1] = _through_unit(flat, grad_means, class_features.shape[1]).view(class_features.shape)
    if needs[2]:
        grads[2] = grad_scale
    return grads[0], grads[1], grads[2]


def _room(outputs: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """Room for a gradient: its float32 sums, and a rounded copy, which is then the answer, where `like` is bf16."""
    outputs[name] = torch.empty(like.shape, dtype=torch.float32)
    if like.dtype == torch.float32:
        return outputs[name]
    outputs[f"{name}_bf16"] = torch.empty(like.shape, dtype=like.dtype)
    return outputs[f"{name}_bf16"]


def _sparse(
    op: str,
    metric: str,
    queries: Tensor,
    database: Tensor,
    indices: Tensor,
    grad_scores: Tensor,
    outputs: dict[str, Tensor],
    **options: Any,
) -> None:
    (n, d), m, k = queries.shape, database.shape[0], indices.shape[1]
    indices, grad_scores = indices.contiguous(), grad_scores.contiguous()
    workspace = torch.empty(_native.cpu.topk_gradients_workspace(n, m, k) + 64, dtype=torch.uint8)
    at = workspace.data_ptr()
    _native.call(
        op,
        _native.cpu.topk_gradients,
        metric=METRICS.index(metric),
        n=n,
        m=m,
        d=d,
        k=k,
        q=_matrix(queries),
        x=_matrix(database),
        indices=indices.data_ptr(),
        grad_score=grad_scores.data_ptr(),
        workspace=at + -at % 64,
        threads=_native.threads(),
        **({name: x.data_ptr() for name, x in outputs.items()} | options),
    )


def _through_unit(x: Tensor, grad: Tensor, group: int = 1) -> Tensor:
    """Gradient to rows [R, D] from that to their normalised means [R / group, D] float32, in the rows' dtype."""
    outputs: dict[str, Tensor] = {}
    answer = _room(outputs, "out", x)
    _native.call(
        "zero_shot",
        _native.cpu.unit_gradients,
        x=_matrix(x),
        rows=x.shape[0],
        group=group,
        d=x.shape[1],
        grad=grad.data_ptr(),
        threads=_native.threads(),
        **{name: out.data_ptr() for name, out in outputs.items()},
    )
    return answer
