# SPDX-License-Identifier: Apache-2.0
"""Optimisers: parameter groups, AdamW as torch has it, Lion as its paper has it, and an average of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from vlmkernels.models.training import Trainable

OPTIMIZERS = ("adamw", "lion")


class Lion(torch.optim.Optimizer):
    """EvoLved Sign Momentum (Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, algorithm 2).

    For a parameter ``w`` with gradient ``g`` and momentum ``m``::

        w <- w - lr * (sign(b1 m + (1 - b1) g) + weight_decay * w)
        m <- b2 m + (1 - b2) g

    The momentum that is stored decays with ``b2``, the one whose sign is taken with ``b1``; there is no bias correction
    and no second moment. Every update has the size of the learning rate, which the paper takes 3 to 10 times smaller
    than AdamW's, with a weight decay that much larger.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: ``b1`` and ``b2``.
        weight_decay: decoupled, as in AdamW.

    Raises:
        ValueError: lr, betas or weight_decay are out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0:
            raise ValueError(f"Lion: lr must not be negative, got {lr}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Lion: betas must lie in [0, 1), got {betas}")
        if weight_decay < 0:
            raise ValueError(f"Lion: weight_decay must not be negative, got {weight_decay}")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:  # type: ignore[override]
        """Does one step; parameters without a gradient stay as they are.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"]
                direction = momentum.lerp(p.grad, 1 - first).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(direction, alpha=-group["lr"])
                momentum.lerp_(p.grad, 1 - second)
        return loss


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Splits the trainable parameters into those that decay and those that do not.

    Norm weights, biases and every other vector or scalar (logit scale, class token) are free of decay, as in the CLIP
    paper; so are positions, which are tables of vectors and not maps, and
    whatever else the model's ``no_weight_decay`` names.

    Args:
        model: whose parameters.
        weight_decay: of the first group.

    Returns:
        Two groups in the order of ``model.named_parameters()``.
    """
    never = tuple(getattr(model, "no_weight_decay", Trainable.no_weight_decay))
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        free_of_decay = p.ndim < 2 or name.endswith(never)
        (free if free_of_decay else decayed).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def create_optimizer(
    name: str, model: nn.Module, *, lr: float, weight_decay: float, betas: tuple[float, float] | None = None
) -> torch.optim.Optimizer:
    """Makes an optimiser over the groups of `parameter_groups`.

    Args:
        name: one of ``OPTIMIZERS``.
        model: what to train.
        lr: peak learning rate.
        weight_decay: for matrices.
        betas: None: (0.9, 0.98) for AdamW, as CLIP; (0.9, 0.99) for Lion, as its paper.

    Raises:
        ValueError: the name is unknown.
    """
    groups = parameter_groups(model, weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas or (0.9, 0.98), eps=1e-6, fused=True)
    if name == "lion":
        return Lion(groups, lr=lr, betas=betas or (0.9, 0.99))
    raise ValueError(f"create_optimizer: name must be one of {', '.join(OPTIMIZERS)}, got {name!r}")


class WeightAverage:
    """Exponential moving average of a model's parameters and buffers.

    The decay grows from 0.1 to its final value over the first steps, so that the random start is soon forgotten.

    Args:
        model: what to follow; its present state is the first average.
        decay: weight of the past at every step.

    Raises:
        ValueError: decay is not in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"WeightAverage: decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.steps = 0
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the average towards the model's present state; integer buffers are copied."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, 1 - decay)
            else:
                self.state[name].copy_(value)
