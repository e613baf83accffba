# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses in eager PyTorch as training programs write them: logits in memory, library cross-entropy.

Not the reference: under autocast these follow autocast, as a user's program does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """One product and its transpose, two cross-entropies."""
    logits = logit_scale * image_features @ text_features.T
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def siglip_loss(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> Tensor:
    """Signs from a diagonal matrix, as open_clip and big_vision form them."""
    logits = logit_scale * image_features @ text_features.T + logit_bias
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """A linear layer without bias and a cross-entropy over its outputs."""
    return F.cross_entropy(F.linear(hidden, weight), targets)
