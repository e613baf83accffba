# SPDX-License-Identifier: Apache-2.0
"""What methods with a momentum teacher share: the projection head, targets, schedules, the teacher's update.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (DINO, 2021), equations 1 to 4.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DistillationHead", "Teacher", "cosine", "soft_cross_entropy", "target_distribution"]


class DistillationHead(nn.Module):
    """MLP, normalisation, linear layer with rows of length 1: `[..., D]` to the logits of K prototypes `[..., K]`.

    Args:
        width: Width D of the input.
        prototypes: K.
        hidden: Width of the two hidden layers.
        bottleneck: Width before the last layer.

    Attributes:
        frozen: Whether the prototypes stay fixed, as DINO keeps them during the first epoch.
    """

    def __init__(self, width: int, prototypes: int, *, hidden: int = 2048, bottleneck: int = 256) -> None:
        super().__init__()
        layers = [nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, bottleneck)]
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(layers[0], nn.GELU(), layers[1], nn.GELU(), layers[2])
        # Only the direction of a prototype counts: the weight norm's magnitude is fixed at 1, as in DINO.
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck))
        self.frozen = False

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(self.mlp(x), dim=-1)
        prototypes = self.prototypes.detach() if self.frozen else self.prototypes
        return F.linear(x, F.normalize(prototypes, dim=-1).to(x.dtype))


def target_distribution(logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """`softmax((o - c) / tau)` of the teacher, detached, float32."""
    return ((logits.detach().float() - centre) / temperature).softmax(-1)


def soft_cross_entropy(targets: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """`-sum_k q_k log softmax(o / tau)_k` over the last dimension; no mean."""
    return -(targets * (logits.float() / temperature).log_softmax(-1)).sum(-1)


def cosine(start: float, end: float, progress: float) -> float:
    """From start to end along half a cosine, progress in [0, 1]."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


class Teacher(nn.Module):
    """A momentum copy of a student: `w <- m w + (1 - m) student`, m rising along a cosine to 1. It never trains.

    Args:
        student: What to copy.
        momentum: m at the first step.

    Attributes:
        network: The copy.
        progress: Share of the run that is done, in the state so that a continued run goes on as it would have.
    """

    progress: Tensor

    def __init__(self, student: nn.Module, momentum: float) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"Teacher: momentum must lie in [0, 1], got {momentum}")
        self.network = copy.deepcopy(student).requires_grad_(False)
        self.momentum = momentum
        self.register_buffer("progress", torch.zeros(()))

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode: the teacher sees whole pictures and drops nothing."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)

    @torch.no_grad()
    def update(self, student: nn.Module, step: int, total: int) -> None:
        """Moves towards the student after step `step` (from 1) of `total`."""
        self.progress.fill_(step / max(total, 1))
        momentum = cosine(self.momentum, 1.0, (step - 1) / max(total, 1))
        for weight, new in zip(self.network.parameters(), student.parameters(), strict=True):
            weight.lerp_(new.detach(), 1 - momentum)
        for buffer, value in zip(self.network.buffers(), student.buffers(), strict=True):
            buffer.copy_(value)

    def temperature(self, start: float, end: float, share: float) -> float:
        """Linear warm-up of a temperature over the first `share` of the run."""
        done = 1.0 if share <= 0 else min(float(self.progress) / share, 1.0)
        return start + (end - start) * done


@torch.no_grad()
def update_centre(centre: Tensor, logits: Tensor, momentum: float) -> None:
    """`c <- m c + (1 - m) mean(o)` in place, the mean over all leading dimensions and over all processes."""
    total = logits.detach().float().flatten(0, -2).sum(0)
    count = torch.tensor(float(logits.numel() // logits.shape[-1]), device=logits.device)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
        dist.all_reduce(count)
    if count > 0:
        centre.lerp_((total / count).view_as(centre), 1 - momentum)
