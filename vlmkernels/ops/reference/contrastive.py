# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses in plain PyTorch: the definition that every backend is tested against.

Letters: N images, queries or rows, M texts or keys, K classes, D width. Checks live in the public functions. Leading
dimensions of the features are independent problems; their losses are averaged.

Logits are `logit_scale * <left_i, right_j> + bias`. Operands are rounded to `compute_dtype`, everything after that is
float32 (float64 for float64): half-precision logits lose the differences that a loss lives on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkernels.ops._library import no_autocast


def clip_loss(
    image_features: Tensor,  # [..., N, D]
    text_features: Tensor,  # [..., N, D]
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """`(CE(Z, arange) + CE(Z.T, arange)) / 2` with `Z = logit_scale * U @ V.T + logit_bias` (Radford 2021, figure 3).

    Args:
        image_features: U, [..., N, D], floating, normalised by the caller.
        text_features: V, [..., N, D].
        logit_scale: number or 0-d tensor, already exponentiated.
        logit_bias: number or 0-d tensor; cancels in the softmax, so its gradient is zero up to rounding.
        label_smoothing: s; targets are (1 - s) * one-hot + s / N.
        compute_dtype: dtype to which the features are rounded; default, their own.

    Returns:
        Scalar, float32 (float64 for float64). NaN for N = 0.
    """
    with no_autocast(image_features.device.type):
        logits = scaled_logits(image_features, text_features, logit_scale, logit_bias, compute_dtype)
        targets = torch.arange(logits.shape[-1], device=logits.device)
        image_rows = cross_entropy(logits, targets, label_smoothing)
        text_rows = cross_entropy(logits.mT, targets, label_smoothing)
        return (image_rows.mean() + text_rows.mean()) / 2


def siglip_loss(
    image_features: Tensor,  # [..., N, D]
    text_features: Tensor,  # [..., N, D]
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """`-(1 / N) sum_ij log sigmoid(y_ij * z_ij)`, y = 1 on the diagonal, else -1 (Zhai et al. 2023, equation 2).

    Args:
        image_features: [..., N, D], floating, normalised by the caller.
        text_features: [..., N, D].
        logit_scale: number or 0-d tensor, already exponentiated.
        logit_bias: number or 0-d tensor.
        compute_dtype: dtype to which the features are rounded; default, their own.

    Returns:
        Scalar, float32 (float64 for float64). All N * N pairs count, and the sum is divided by N. NaN for N = 0.
    """
    with no_autocast(image_features.device.type):
        logits = scaled_logits(image_features, text_features, logit_scale, logit_bias, compute_dtype)
        n = logits.shape[-1]
        signs = 2 * torch.eye(n, dtype=logits.dtype, device=logits.device) - 1
        losses = -F.logsigmoid(signs * logits).sum((-2, -1)) / n
        return losses.mean()


def multi_positive_loss(
    image_features: Tensor,  # [..., N, D]
    text_features: Tensor,  # [..., M, D]
    logit_scale: Tensor | float,
    image_labels: Tensor,  # [..., N]
    text_labels: Tensor,  # [..., M]
    *,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Mean of the two directions' cross-entropies with targets `Y / Y.sum(-1)`, `Y_ij = [label_i == label_j]`.

    The objective of UniCL (Yang et al. 2022, equations 2 to 4).

    Args:
        image_features: [..., N, D], floating, normalised by the caller.
        text_features: [..., M, D].
        logit_scale: number or 0-d tensor, already exponentiated.
        image_labels: [..., N] integers, or [N] for all problems.
        text_labels: [..., M] integers, or [M].
        compute_dtype: dtype to which the features are rounded; default, their own.

    Returns:
        Scalar, float32 (float64 for float64). Images without a text of their label, and texts without an image, do not
        count in their direction's mean; NaN where nothing counts.
    """
    with no_autocast(image_features.device.type):
        logits = scaled_logits(image_features, text_features, logit_scale, None, compute_dtype)
        positive = image_labels.unsqueeze(-1) == text_labels.unsqueeze(-2)
        image_direction = mean_over_rows_with_positives(logits, positive)
        text_direction = mean_over_rows_with_positives(logits.mT, positive.mT)
        return ((image_direction + text_direction) / 2).mean()


def info_nce(
    queries: Tensor,  # [..., N, D]
    keys: Tensor,  # [..., M, D]
    logit_scale: Tensor | float,
    *,
    positives: Tensor | None = None,  # [..., N]
    key_mask: Tensor | None = None,  # [..., M]
    reduction: str = "mean",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """`-log softmax(logit_scale * q_i @ keys.T)[positives_i]` over the usable keys (van den Oord 2018, equation 4).

    Args:
        queries: [..., N, D], floating, normalised by the caller.
        keys: [..., M, D].
        logit_scale: number or 0-d tensor, already exponentiated.
        positives: [..., N] int64, the key that each query belongs to; default, key i for query i.
        key_mask: [..., M] bool, True = usable. A query whose positive is not usable has an infinite loss.
        reduction: "mean", "sum" or "none".
        compute_dtype: dtype to which the features are rounded; default, their own.

    Returns:
        Scalar, or [..., N] for "none"; float32 (float64 for float64).
    """
    with no_autocast(queries.device.type):
        logits = scaled_logits(queries, keys, logit_scale, None, compute_dtype)
        if key_mask is not None:
            logits = logits.masked_fill(~key_mask.unsqueeze(-2), -torch.inf)
        if positives is None:
            positives = torch.arange(logits.shape[-2], device=logits.device)
        losses = cross_entropy(logits, positives)
        return reduce(losses, torch.ones_like(losses, dtype=torch.bool), reduction)


def linear_cross_entropy(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [K, D]
    targets: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [K]
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: Tensor | float = 1.0,
    reduction: str = "mean",
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """`cross_entropy(logit_scale * hidden @ weight.T + bias, targets)` with torch's options and meanings.

    Args:
        hidden: [..., D], floating.
        weight: [K, D].
        targets: [...] int64, classes or `ignore_index`.
        bias: [K] or None.
        ignore_index: rows with this target have loss 0 and leave the mean.
        label_smoothing: s; targets are (1 - s) * one-hot + s / K.
        logit_scale: number or 0-d tensor; multiplies the product, not the bias.
        reduction: "mean" (over the rows that count), "sum" or "none".
        compute_dtype: dtype to which hidden and weight are rounded; default, their own.

    Returns:
        Scalar, or [...] for "none"; float32 (float64 for float64). The mean of no rows is NaN.
    """
    with no_autocast(hidden.device.type):
        logits = scaled_logits(hidden, weight, logit_scale, bias, compute_dtype)
        counted = targets != ignore_index
        losses = cross_entropy(logits, torch.where(counted, targets, 0), label_smoothing)
        return reduce(losses, counted, reduction)


def scaled_logits(
    left: Tensor,
    right: Tensor,
    logit_scale: Tensor | float,
    bias: Tensor | float | None,
    compute_dtype: torch.dtype | None,
) -> Tensor:
    """`logit_scale * left @ right.T + bias` of operands rounded to `compute_dtype`: [..., N, M] in float32 or 64."""
    accumulate = torch.float64 if left.dtype == torch.float64 else torch.float32
    multiply = compute_dtype or left.dtype
    product = torch.matmul(left.to(multiply).to(accumulate), right.to(multiply).to(accumulate).mT)
    logits = _as(logit_scale, accumulate) * product
    return logits if bias is None else logits + _as(bias, accumulate)


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """`-sum_j target_ij log softmax(logits)_ij` per row: logits [..., N, M], targets [..., N] indices -> [..., N]."""
    log_probabilities = F.log_softmax(logits, dim=-1)
    index = targets.to(torch.int64).expand(logits.shape[:-1]).unsqueeze(-1)
    losses = -log_probabilities.gather(-1, index).squeeze(-1)
    if label_smoothing == 0.0:
        return losses  # not 0 * the mean below: a logit of -inf would turn it into NaN
    return (1 - label_smoothing) * losses - label_smoothing * log_probabilities.mean(-1)


def mean_over_rows_with_positives(logits: Tensor, positive: Tensor) -> Tensor:
    """Cross-entropy with each row's positives as equal targets, mean of the rows with any: [..., N, M] -> [...]."""
    log_probabilities = F.log_softmax(logits, dim=-1)
    count = positive.sum(-1)
    losses = -torch.where(positive, log_probabilities, 0).sum(-1) / count.clamp(min=1)
    counted = count > 0
    return torch.where(counted, losses, 0).sum(-1) / counted.sum(-1)


def reduce(losses: Tensor, counted: Tensor, reduction: str) -> Tensor:
    """Mean or sum of the losses that count, or the losses with 0 in place of the others."""
    losses = torch.where(counted, losses, 0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / counted.sum()


def _as(value: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    return value.to(dtype) if isinstance(value, Tensor) else value
