# SPDX-License-Identifier: Apache-2.0
"""Towers, batches and losses that the tests of gradient caching share, in one process and in several."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlmkernels as vk

ROWS = 23


class Pair(nn.Module):
    """Both towers, and the arguments of every loss."""

    def __init__(self, dropout: float = 0.0, width: int = 16) -> None:
        super().__init__()
        self.image = tower(12, width, dropout)
        self.text = tower(7, width, dropout)
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.logit_bias = nn.Parameter(torch.tensor(-2.0))

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        return {
            "image_features": F.normalize(self.image(images), dim=-1),
            "text_features": F.normalize(self.text(texts), dim=-1),
            "logit_scale": self.logit_scale.exp(),
            "logit_bias": self.logit_bias + 0.0,
        }


def tower(inputs: int, width: int, dropout: float) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
    )


def problem(
    dtype: torch.dtype = torch.float64, dropout: float = 0.0, rows: int = ROWS
) -> tuple[Pair, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Pair(dropout).to(dtype)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(rows, 12, generator=generator, dtype=torch.float64).to(dtype)
    return model, images, torch.randn(rows, 7, generator=generator, dtype=torch.float64).to(dtype)


def labels(rows: int = ROWS) -> Tensor:
    return torch.arange(rows) % 9


def clip(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, **rest: Any) -> Tensor:
    return vk.clip_loss(
        image_features, text_features, logit_scale, label_smoothing=0.1, group=rest.get("group")
    )


def siglip(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor, **rest: Any
) -> Tensor:
    return vk.siglip_loss(image_features, text_features, logit_scale, logit_bias, group=rest.get("group"))


def multi_positive(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, **rest: Any) -> Tensor:
    rows = rest.get("labels", labels())
    return vk.multi_positive_loss(
        image_features, text_features, logit_scale, rows, rows, group=rest.get("group")
    )


LOSSES = {"clip": clip, "siglip": siglip, "multi_positive": multi_positive}


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found
