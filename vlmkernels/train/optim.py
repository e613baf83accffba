# SPDX-License-Identifier: Apache-2.0
"""Optimisers: parameter groups, AdamW as torch has it, Lion as its paper has it, and an average of the weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from vlmkernels.models.training import Trainable
from vlmkernels.systems import register_system

#: by optimiser: AdamW's as CLIP trains with, Lion's as its paper has them
DEFAULT_BETAS = {"adamw": (0.9, 0.98), "lion": (0.9, 0.99)}
OPTIMIZERS = tuple(DEFAULT_BETAS)

# "visual.transformer.resblocks.3.mlp...": tower "visual.", block 3. The names of our models, open_clip's, timm's and
# those of transformers.
_BLOCK = re.compile(
    r"(?P<tower>(?:.*?\.)??)(?:(?:transformer|encoder|trunk)\.)*(?:resblocks|blocks|layers|layer|h)\.(?P<number>\d+)\."
)
_BEFORE_BLOCKS = re.compile(r"embed|conv1|patch|stem|cls_token|ln_pre|norm_pre|pre_?layr?norm")


@register_system(name="Lion", paper="Symbolic Discovery of Optimization Algorithms", kind="optimiser")
class Lion(torch.optim.Optimizer):
    """EvoLved Sign Momentum (Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, algorithm 2).

    For a parameter ``w`` with gradient ``g`` and momentum ``m``, which starts at 0::

        w <- w (1 - lr * weight_decay) - lr * sign(b1 m + (1 - b1) g)          sign(0) = 0
        m <- b2 m + (1 - b2) g

    The momentum that is stored decays with ``b2``, the one whose sign is taken with ``b1``; there is no bias
    correction, no epsilon and no second moment: one buffer per parameter, half of AdamW's state. Every coordinate moves
    by the learning rate, which the paper takes 3 to 10 times smaller than AdamW's, with a weight decay that much
    larger; schedules and clipping stay. For language models it takes betas (0.95, 0.98). Larger batches suit it better.

    The paper found the update by evolving programs; what is here is the program it found.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: ``b1`` and ``b2``.
        weight_decay: decoupled, as in AdamW.
        foreach: update all parameters of a group in a few calls, with a temporary of their size; False: one after the
            other. The results are the same bits.
        master_weights: keep float32 copies of bfloat16 and float16 parameters, and their momentum in float32. Without
            them an update that is less than half a unit in the last place of a weight is lost.

    Raises:
        ValueError: lr, betas or weight_decay are out of range.

    Example:
        >>> p = torch.nn.Parameter(torch.zeros(3))
        >>> optimizer = Lion([p], lr=0.5)
        >>> p.grad = torch.tensor([1e-8, -1e8, 0.0])
        >>> optimizer.step()
        >>> p.tolist()
        [-0.5, 0.5, 0.0]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        foreach: bool = True,
        master_weights: bool = False,
    ) -> None:
        if lr < 0:
            raise ValueError(f"Lion: lr must not be negative, got {lr}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Lion: betas must lie in [0, 1), got {betas}")
        if weight_decay < 0:
            raise ValueError(f"Lion: weight_decay must not be negative, got {weight_decay}")
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"foreach": foreach, "master_weights": master_weights})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:  # type: ignore[override]
        """Does one step; parameters without a gradient stay as they are, their decay and momentum too.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if any(p.grad.is_sparse for p in params):
                raise ValueError("Lion: gradients must be dense; a sign is taken of every coordinate")
            states = [self._state(p, group["master_weights"]) for p in params]
            weights = [state.get("master", p) for p, state in zip(params, states, strict=True)]
            grads = [p.grad.to(w.dtype) for p, w in zip(params, weights, strict=True)]
            momenta = [state["momentum"] for state in states]
            options = {"lr": group["lr"], "betas": group["betas"], "weight_decay": group["weight_decay"]}
            if group["foreach"] and params:
                _lion_steps(weights, grads, momenta, **options)
            else:
                for arguments in zip(weights, grads, momenta, strict=True):
                    lion_step(*arguments, **options)
            for p, weight in zip(params, weights, strict=True):
                if weight is not p:
                    p.copy_(weight)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave; float32 state of half-precision parameters stays float32."""
        super().load_state_dict(state_dict)
        flat = [p for group in self.param_groups for p in group["params"]]
        for index, given in state_dict["state"].items():
            if "master" in given:  # torch casts state to the dtype of its parameter
                restored = {name: value.float().to(flat[index].device) for name, value in given.items()}
                self.state[flat[index]] = {name: value.clone() for name, value in restored.items()}

    def _state(self, p: torch.Tensor, master_weights: bool) -> dict[str, torch.Tensor]:
        state = self.state[p]
        if not state:
            if master_weights and p.dtype in (torch.bfloat16, torch.float16):
                state["master"] = p.detach().float()
            state["momentum"] = torch.zeros_like(state.get("master", p))
        return state


@torch.no_grad()
def lion_step(
    weight: torch.Tensor,
    grad: torch.Tensor,
    momentum: torch.Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
) -> None:
    """One step of `Lion` for one tensor, in place.

    Args:
        weight: changed.
        grad: of weight's shape and dtype.
        momentum: of weight's shape and dtype, changed after the sign has been taken.
        lr, betas, weight_decay: as for `Lion`.
    """
    direction = momentum.lerp(grad, 1 - betas[0]).sign_()
    weight.mul_(1 - lr * weight_decay)
    weight.add_(direction, alpha=-lr)
    momentum.lerp_(grad, 1 - betas[1])


def _lion_steps(
    weights: list[torch.Tensor],
    grads: list[torch.Tensor],
    momenta: list[torch.Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> None:
    """`lion_step` for many tensors."""
    directions = torch._foreach_lerp(momenta, grads, 1 - betas[0])
    torch._foreach_sign_(directions)
    for weight in weights if weight_decay else ():
        weight.mul_(1 - lr * weight_decay)  # on a CPU _foreach_mul_ would round the factor to bfloat16
    torch._foreach_add_(weights, directions, alpha=-lr)
    torch._foreach_lerp_(momenta, grads, 1 - betas[1])


def parameter_groups(
    model: nn.Module, weight_decay: float, *, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Splits the trainable parameters into groups: those that decay and those that do not, layer by layer.

    Norm weights, biases and every other vector or scalar (logit scale, class token) are free of decay, as in the CLIP
    paper; so are positions, which are tables of vectors and not maps, and
    whatever else the model's ``no_weight_decay`` names.

    With a layer decay d, the learning rate of a tower's layer l of L is multiplied by ``d^(L + 1 - l)`` (Clark et al.,
    "ELECTRA", 2020; Bao et al., "BEiT", 2022): embeddings and stem are layer 0, block i is layer i + 1, and what
    follows the blocks, like the logit scale, keeps the whole rate.

    Args:
        model: whose parameters.
        weight_decay: of those that decay.
        layer_decay: factor from a layer to the one before it, in (0, 1].

    Returns:
        Groups, the last layers and what decays first; the key "lr_scale" is the factor on the learning rate.

    Raises:
        ValueError: layer_decay is out of range, or there are no numbered blocks to apply it to.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"parameter_groups: layer_decay must lie in (0, 1], got {layer_decay}")
    never = tuple(getattr(model, "no_weight_decay", Trainable.no_weight_decay))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    above = dict.fromkeys(trained, 0) if layer_decay == 1 else _layers_above(list(trained))
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, p in trained.items():
        free_of_decay = p.ndim < 2 or name.endswith(never)
        group = groups.setdefault(
            (above[name], free_of_decay),
            {
                "params": [],
                "weight_decay": 0.0 if free_of_decay else weight_decay,
                "lr_scale": layer_decay ** above[name],
            },
        )
        group["params"].append(p)
    return [groups[key] for key in sorted(groups)]


def _layers_above(names: list[str]) -> dict[str, int]:
    """How many layers of its tower lie above each parameter's; a tower is what holds a list of blocks."""
    found = {name: _BLOCK.match(name) for name in names}
    depths: dict[str, int] = {}
    for match in found.values():
        if match is not None:
            depths[match["tower"]] = max(depths.get(match["tower"], 0), int(match["number"]) + 1)
    if not depths:
        raise ValueError(
            "parameter_groups: layer_decay needs a model with numbered blocks, this one has none"
        )
    above = {}
    for name, match in found.items():
        tower = max((t for t in depths if name.startswith(t)), key=len, default=None)
        if match is not None:
            above[name] = depths[match["tower"]] - int(match["number"])
        elif tower is not None and _BEFORE_BLOCKS.search(name.removeprefix(tower)):
            above[name] = depths[tower] + 1
        else:
            above[name] = 0
    return above


def create_optimizer(
    name: str,
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] | None = None,
    layer_decay: float = 1.0,
) -> torch.optim.Optimizer:
    """Makes an optimiser over the groups of `parameter_groups`, whose "lr_scale" a schedule must keep to.

    Args:
        name: one of ``OPTIMIZERS``.
        model: what to train.
        lr: peak learning rate.
        weight_decay: for matrices.
        betas: None: (0.9, 0.98) for AdamW, as CLIP; (0.9, 0.99) for Lion, as its paper.
        layer_decay: factor on the learning rate from a layer to the one before it.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"create_optimizer: name must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
    groups = parameter_groups(model, weight_decay, layer_decay=layer_decay)
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
    betas = betas or DEFAULT_BETAS[name]
    if name == "lion":
        return Lion(groups, lr=lr, betas=betas)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-6, fused=True)


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
