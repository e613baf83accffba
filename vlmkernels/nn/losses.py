# SPDX-License-Identifier: Apache-2.0
"""Loss modules over the contrastive ops. They hold options only: no parameters, no caches, no buffers.

Features are normalised by the caller and `logit_scale` is already exponentiated, as the ops expect; a model's
output fits: `ClipLoss()(**model(images, ids))`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlmkernels.ops.contrastive import (
    clip_loss,
    info_nce,
    linear_cross_entropy,
    multi_positive_loss,
    siglip_loss,
)

__all__ = ["ClipLoss", "InfoNCELoss", "LinearCrossEntropyLoss", "MultiPositiveLoss", "SigLipLoss"]


class _ContrastiveLoss(nn.Module):
    """The options all contrastive losses share.

    Args:
        group: Process group whose ranks pass their shards (see `vk.clip_loss`); None = this process alone.
        compute_dtype: Dtype of the products (accumulation stays float32); None = the features' dtype, or
            autocast's.
        backend: Passed to the op; None lets the dispatcher choose.
    """

    def __init__(
        self,
        *,
        group: dist.ProcessGroup | None = None,
        compute_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.group = group
        self.compute_dtype = compute_dtype
        self.backend = backend


class ClipLoss(_ContrastiveLoss):
    """`(CE(Z, arange) + CE(Z^t, arange)) / 2` with `Z = scale * u v^t + bias`.

    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), figure 3.

    Args:
        label_smoothing: Mass spread over all pairs of a row (ALIGN uses 0.1).
        group: Process group whose ranks pass their shards (see `vk.clip_loss`); None = this process alone.
        compute_dtype: Dtype of the products; None = the features' dtype, or autocast's.
        backend: Passed to the op; None lets the dispatcher choose.
    """

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        group: dist.ProcessGroup | None = None,
        compute_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(group=group, compute_dtype=compute_dtype, backend=backend)
        self.label_smoothing = label_smoothing

    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """Returns the scalar loss; see `vk.clip_loss`."""
        return clip_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias=logit_bias,
            label_smoothing=self.label_smoothing,
            group=self.group,
            compute_dtype=self.compute_dtype,
            backend=self.backend,
        )


class SigLipLoss(_ContrastiveLoss):
    """`-(1/N) sum_ij log sigmoid(y_ij (scale * u_i v_j + bias))`, y = +1 on the diagonal, -1 elsewhere.

    Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023), equation 2: divided by N, not by N^2.
    """

    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor | float,
        logit_bias: Tensor | float,
    ) -> Tensor:
        """Returns the scalar loss; see `vk.siglip_loss`."""
        return siglip_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            group=self.group,
            compute_dtype=self.compute_dtype,
            backend=self.backend,
        )


class MultiPositiveLoss(_ContrastiveLoss):
    """Contrastive loss where equal labels are positives (Yang et al., "UniCL", 2022, equations 2 to 4)."""

    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [M, D]
        logit_scale: Tensor | float,
        image_labels: Tensor,  # [N]
        text_labels: Tensor,  # [M]
    ) -> Tensor:
        """Returns the scalar loss; see `vk.multi_positive_loss`."""
        return multi_positive_loss(
            image_features,
            text_features,
            logit_scale,
            image_labels,
            text_labels,
            group=self.group,
            compute_dtype=self.compute_dtype,
            backend=self.backend,
        )


class InfoNCELoss(nn.Module):
    """One-directional contrastive loss of queries against keys, which may outnumber them.

    Args:
        reduction: "mean", "sum" or "none".
        compute_dtype: Dtype of the products; None = the features' dtype, or autocast's.
        backend: Passed to the op; None lets the dispatcher choose.
    """

    def __init__(
        self,
        *,
        reduction: str = "mean",
        compute_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.reduction = reduction
        self.compute_dtype = compute_dtype
        self.backend = backend

    def forward(
        self,
        queries: Tensor,  # [N, D]
        keys: Tensor,  # [M, D]
        logit_scale: Tensor | float,
        *,
        positives: Tensor | None = None,  # [N], default arange
        key_mask: Tensor | None = None,  # [M]
    ) -> Tensor:
        """Returns the loss; see `vk.info_nce`."""
        return info_nce(
            queries,
            keys,
            logit_scale,
            positives=positives,
            key_mask=key_mask,
            reduction=self.reduction,
            compute_dtype=self.compute_dtype,
            backend=self.backend,
        )


class LinearCrossEntropyLoss(nn.Module):
    """Cross-entropy of `scale * hidden weight^t + bias` without its logits (captioning heads, many classes).

    Args:
        ignore_index: Targets with this value are left out.
        label_smoothing: Mass spread over all classes.
        logit_scale: Multiplies the logits before the bias.
        reduction: "mean", "sum" or "none".
        compute_dtype: Dtype of the products; None = the features' dtype, or autocast's.
        backend: Passed to the op; None lets the dispatcher choose.
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        reduction: str = "mean",
        compute_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.reduction = reduction
        self.compute_dtype = compute_dtype
        self.backend = backend

    def forward(
        self,
        hidden: Tensor,  # [..., D]
        weight: Tensor,  # [K, D]
        targets: Tensor,  # [...]
        bias: Tensor | None = None,  # [K]
    ) -> Tensor:
        """Returns the loss; see `vk.linear_cross_entropy`."""
        return linear_cross_entropy(
            hidden,
            weight,
            targets,
            bias=bias,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            logit_scale=self.logit_scale,
            reduction=self.reduction,
            compute_dtype=self.compute_dtype,
            backend=self.backend,
        )
