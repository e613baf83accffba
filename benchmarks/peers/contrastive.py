# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses in eager PyTorch as training programs write them: logits in memory, library cross-entropy.

Not the reference: under autocast these follow autocast, as a user's program does. The last functions are what GPU rows
are checked with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

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


def open_clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """As open_clip's ClipLoss on one GPU: each direction has a product of its own."""
    per_image = logit_scale * image_features @ text_features.T
    per_text = logit_scale * text_features @ image_features.T
    targets = torch.arange(len(per_image), device=per_image.device)
    return (F.cross_entropy(per_image, targets) + F.cross_entropy(per_text, targets)) / 2


# What they all compute, in float32 with only some rows of the logits in memory at a time: loss and gradients.

BLOCK = 2048


@torch.no_grad()
def exact_clip(image: Tensor, text: Tensor, scale: Tensor) -> list[Tensor]:
    """Loss, and its gradients of both features and of the scale."""
    image, text, n = image.float(), text.float(), len(image)
    row_lse, col_lse = torch.empty(n, device=image.device), torch.full((n,), -torch.inf, device=image.device)
    target = torch.empty_like(row_lse)
    for start, logits in _logit_rows(image, text, scale):
        rows = slice(start, start + len(logits))
        row_lse[rows] = logits.logsumexp(1)
        col_lse = torch.logaddexp(col_lse, logits.logsumexp(0))
        target[rows] = logits.diagonal(start)
    loss = ((row_lse - target).mean() + (col_lse - target).mean()) / 2

    def gradient(start: int, logits: Tensor) -> Tensor:
        rows = slice(start, start + len(logits))
        grad = (logits - row_lse[rows, None]).exp() + (logits - col_lse).exp()
        grad.diagonal(start).sub_(2)
        return grad / (2 * n)

    return [loss, *_gradients(image, text, scale, gradient)[:3]]


@torch.no_grad()
def exact_siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> list[Tensor]:
    """Loss, and its gradients of both features, of the scale and of the bias."""
    image, text, n = image.float(), text.float(), len(image)
    losses = torch.zeros((), dtype=torch.float64, device=image.device)

    def gradient(start: int, logits: Tensor) -> Tensor:
        logits = logits + bias
        signs = torch.full_like(logits, -1.0)
        signs.diagonal(start).fill_(1.0)
        losses.sub_(F.logsigmoid(signs * logits).sum(dtype=torch.float64))
        return -signs * torch.sigmoid(-signs * logits) / n

    grads = _gradients(image, text, scale, gradient)
    return [(losses / n).float(), *grads]


@torch.no_grad()
def exact_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """Loss, and its gradients of the hidden states and the weight."""
    hidden, weight, n = hidden.float(), weight.float(), len(hidden)
    losses = torch.zeros((), dtype=torch.float64, device=hidden.device)

    def gradient(start: int, logits: Tensor) -> Tensor:
        index = targets[start : start + len(logits), None]
        lse = logits.logsumexp(1, keepdim=True)
        losses.add_((lse - logits.gather(1, index)).sum(dtype=torch.float64))
        grad = (logits - lse).exp()
        grad.scatter_add_(1, index, grad.new_full(index.shape, -1.0))
        return grad / n

    grads = _gradients(hidden, weight, torch.ones((), device=hidden.device), gradient)
    return [(losses / n).float(), *grads[:2]]


def _logit_rows(left: Tensor, right: Tensor, scale: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(left), BLOCK):
        yield start, scale * (left[start : start + BLOCK] @ right.T)


def _gradients(
    left: Tensor, right: Tensor, scale: Tensor, gradient: Callable[[int, Tensor], Tensor]
) -> list[Tensor]:
    """Of left, right, scale and a number added to all logits, from d loss / d logits of some rows."""
    of_left, of_right = torch.empty_like(left), torch.zeros_like(right)
    of_scale, of_bias = torch.zeros(2, dtype=torch.float64, device=left.device).unbind(0)
    for start, logits in _logit_rows(left, right, scale):
        part = slice(start, start + len(logits))
        grad = gradient(start, logits)
        of_scale.add_((grad * logits).sum(dtype=torch.float64) / scale)
        of_bias.add_(grad.sum(dtype=torch.float64))
        of_left[part] = scale * (grad @ right)
        of_right += scale * (grad.T @ left[part])
    return [of_left, of_right, of_scale.float(), of_bias.float()]
