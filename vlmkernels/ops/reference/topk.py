# SPDX-License-Identifier: Apache-2.0
"""Top-k similarity in plain PyTorch: what a score is, and the ops that every backend is tested against.

Letters: N queries or images, M database rows, D width, C classes, P prompts of a class. Checks live in the public
functions. The search itself, which finds the best rows without scoring every pair exactly, is in `topk_scan.py`.

**What a score is.** Every backend gives the same bits, because the arithmetic that decides is fixed:

* the operands are widened to float64, multiplied elementwise, and added by `tree_sum`; products and sums are rounded
  separately (no fused multiply-add);
* dot: that sum. cosine: the sum divided by the product of the two norms, each the square root of a sum of the same kind
  and at least 1e-12. l2: zero minus the sum of the squared differences;
* the result is rounded to float32 (float64 inputs stay float64). Rows rank by the rounded score, larger first, NaN
  last; equal scores rank by ascending index.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import no_autocast, register_op
from .topk_scan import TensorRows, scan_topk
from .topk_score import norms, pair_scores, score_dtype, tree_sum

# Bounds the float64 temporaries of the chunked parts (8 MiB each).
_BLOCK_ELEMENTS = 2**20
# Logits that exist at once where no gradient keeps them all: 16 MiB of float64.
_BLOCK_LOGITS = 2**21

__all__ = [
    "class_probabilities",
    "class_vectors",
    "gather_scores",
    "pair_scores",
    "score_dtype",
    "topk_scan",
    "topk_similarity",
    "tree_sum",
    "zero_shot",
]


def topk_similarity(
    queries: Tensor, database: Tensor, k: int, metric: str = "dot", mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The `k` best rows for every query: a scan for the indices, then their scores, differentiable in any order.

    Args:
        queries: [N, D], floating.
        database: [M, D], in the same dtype.
        k: at most M.
        metric: "dot", "cosine" or "l2" (negated squared distance).
        mask: [M] or [N, M] bool, True = allowed.

    Returns:
        `(scores, indices)`, both [N, k]: float32 (float64 for float64), descending, and int64; -inf and -1 where the
        mask leaves fewer than k rows.
    """
    scores, indices = topk_scan(queries.detach(), database.detach(), k, metric, mask)
    if not (torch.is_grad_enabled() and (queries.requires_grad or database.requires_grad)):
        return scores, indices
    return gather_scores(queries, database, indices, metric), indices


def gather_scores(queries: Tensor, database: Tensor, indices: Tensor, metric: str) -> Tensor:
    """Scores of known indices, differentiable in any order.

    Args:
        queries: [N, D], floating.
        database: [M, D].
        indices: int64 [N, k], -1 = no row.
        metric: as in `topk_similarity`.

    Returns:
        [N, k], float32 (float64 for float64); -inf, without a gradient, where there is no row.
    """
    # The gradient of a row hit by many queries is a long sum: it is added up in float32, then rounded once.
    source = database if database.dtype == torch.float64 else database.float()
    # An embedding, since its backward adds in a fixed order on every device; indexing's does not.
    rows = F.embedding(indices.clamp(min=0), source)
    scores = pair_scores(queries.unsqueeze(1), rows, metric).to(score_dtype(queries))
    return scores.masked_fill(indices < 0, -torch.inf)


def zero_shot(
    image_features: Tensor, class_features: Tensor, logit_scale: Tensor, k: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    """Zero-shot classification: top-k softmax probabilities of scaled cosines, and the log-sum-exp.

    Args:
        image_features: [N, D], floating.
        class_features: [C, D], or [C, P, D] for P prompts per class.
        logit_scale: 0-d, positive.
        k: at most C.

    Returns:
        `(probabilities, lse, indices)`: [N, k], [N] and int64 [N, k], floating ones float32 (float64 for float64).
    """
    with no_autocast(image_features.device.type):
        dtype = score_dtype(image_features)
        images, classes = image_features.detach().to(dtype), class_vectors(class_features.detach())
        indices = topk_scan(images, classes, k, "cosine", None)[1]
        return *class_probabilities(image_features, class_features, logit_scale, indices), indices


def class_probabilities(
    image_features: Tensor, class_features: Tensor, logit_scale: Tensor, indices: Tensor
) -> tuple[Tensor, Tensor]:
    """Softmax probabilities of known classes and the log-sum-exp over all, differentiable in any order.

    Args:
        image_features: [N, D].
        class_features: [C, D] or [C, P, D].
        logit_scale: 0-d.
        indices: int64 [N, k].

    Returns:
        `(probabilities [N, k], lse [N])`.
    """
    dtype = score_dtype(image_features)
    with no_autocast(image_features.device.type):
        images, classes = image_features.to(dtype), class_vectors(class_features)
        # In float64: rounded to float32, logits of a size of 100 would cost the probabilities two digits.
        scale = logit_scale.to(device=images.device, dtype=torch.float64)
        unit_images, unit_classes = unit_vectors(images), unit_vectors(classes)
        step = max(1, _BLOCK_LOGITS // max(1, classes.shape[0]))
        lse = torch.cat([torch.logsumexp(scale * (x @ unit_classes.mT), -1) for x in unit_images.split(step)])
        # The scores that rank the classes, so that probabilities descend as the scores do.
        cosines = gather_scores(images, classes, indices, "cosine").double()
        return torch.exp(scale * cosines - lse.unsqueeze(-1)).to(dtype), lse.to(dtype)


def class_vectors(class_features: Tensor) -> Tensor:
    """One vector per class: `sum_p x_p / |x_p| / P`, each prompt normalised first; the cosine renormalises the mean.

    Args:
        class_features: [C, D], returned as it is, or [C, P, D].

    Returns:
        [C, D], float32 (float64 for float64).
    """
    dtype = score_dtype(class_features)
    if class_features.ndim == 2:
        return class_features.to(dtype)
    step = max(1, _BLOCK_ELEMENTS // max(1, class_features[0].numel())) if class_features.shape[0] else 1
    prompts = class_features.shape[1]
    means = []
    for block in class_features.split(step):
        means.append((tree_sum(unit_vectors(block).movedim(1, -1)) / prompts).to(dtype))
    return torch.cat(means)


def unit_vectors(x: Tensor) -> Tensor:
    """`x / max(|x|, 1e-12)` along the last dimension, float64."""
    x = x.double()
    return x / norms(x).unsqueeze(-1)


def _scan(
    queries: Tensor, database: Tensor, k: int, metric: str, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    if mask is None or mask.ndim == 2:
        return scan_topk(queries, TensorRows(database), k, metric, mask=mask)
    allowed = mask.nonzero().squeeze(1)
    return scan_topk(queries, TensorRows(database, allowed), k, metric)


def _scan_fake(
    queries: Tensor, database: Tensor, k: int, metric: str, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=score_dtype(queries)), queries.new_empty(shape, dtype=torch.int64)


def _scan_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    queries: Tensor,
    database: Tensor,
    k: int,
    metric: str,
    mask: Tensor | None,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    def slice_of(x: Tensor | None, dim: int | None, i: int) -> Tensor | None:
        return x if x is None or dim is None else x.select(dim, i)

    results = [
        topk_scan(
            slice_of(queries, in_dims[0], i),
            slice_of(database, in_dims[1], i),
            k,
            metric,
            slice_of(mask, in_dims[4], i),
        )
        for i in range(info.batch_size)
    ]
    return (torch.stack([s for s, _ in results]), torch.stack([i for _, i in results])), (0, 0)


# The reference's own building block. It is an op because the number of rows that a scan rescores depends on the data:
# torch.compile and vmap take it whole. It has no gradient; `topk_similarity` above scores its indices again for that.
topk_scan = register_op(
    "topk_scan",
    "(Tensor queries, Tensor database, SymInt k, str metric, Tensor? mask) -> (Tensor, Tensor)",
    fake=_scan_fake,
    impl=_scan,
    vmap=_scan_vmap,
)
