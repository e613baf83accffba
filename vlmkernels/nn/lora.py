# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (LoRA) on the projections of attention layers, packed or not, float or quantized.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), equation 3: `y = W x + (alpha / r) B (A x)`,
with A drawn normal with deviation 1 / r and B zero, so that an adapted model starts as its base. Only A and B train.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.nn.attention import MultiheadSelfAttention
from vlmkernels.nn.linear import Linear

__all__ = [
    "LoRALinear",
    "add_lora",
    "load_lora_state_dict",
    "lora_parameters",
    "lora_state_dict",
    "merge_lora",
    "set_lora_scale",
]

TARGETS = ("q", "k", "v", "out")
_LAYER_NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}


class LoRALinear(nn.Module):
    """A frozen linear layer with low-rank updates of some of its output blocks.

    Args:
        base: A linear layer, float or quantized, `[..., in] -> [..., out]`; its parameters are frozen.
        in_features: Width of its input.
        out_features: Width of its output.
        rank: Rank r of each update.
        alpha: The update is scaled by alpha / r.
        blocks: Equal blocks that the output falls into (3 for packed q, k, v).
        adapted: Which blocks have an update.

    Attributes:
        scale: Multiplier at run time; 0 gives the base layer back.
        lora_a: `[len(adapted), r, in]`.
        lora_b: `[len(adapted), out / blocks, r]`.

    Raises:
        ValueError: If rank is not positive, or blocks do not fit.
    """

    def __init__(
        self,
        base: nn.Module,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        *,
        blocks: int = 1,
        adapted: Sequence[int] = (0,),
    ) -> None:
        super().__init__()
        if rank < 1 or out_features % blocks or not adapted or not set(adapted) <= set(range(blocks)):
            raise ValueError(
                f"LoRALinear: rank must be positive and adapted name some of {blocks} equal blocks of {out_features}, "
                f"got rank {rank} and adapted {list(adapted)}"
            )
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.blocks, self.adapted = rank, alpha, blocks, tuple(sorted(adapted))
        self.scale = 1.0
        device = next((t.device for t in (*base.parameters(), *base.buffers())), torch.device("cpu"))
        count = len(self.adapted)
        self.lora_a = nn.Parameter(torch.randn(count, rank, in_features, device=device) / rank)
        self.lora_b = nn.Parameter(torch.zeros(count, out_features // blocks, rank, device=device))

    def delta(self) -> Tensor:
        """Returns what `merge` adds to the weight, `[out, in]`."""
        updates = self.scale * self.alpha / self.rank * self.lora_b @ self.lora_a
        rows, columns = updates.shape[1:]
        out = updates.new_zeros(self.blocks, rows, columns)
        out[list(self.adapted)] = updates
        return out.flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.scale == 0.0:
            return y
        factor = self.scale * self.alpha / self.rank
        hidden = F.linear(x, self.lora_a.flatten(0, 1).to(x.dtype)).unflatten(-1, (-1, self.rank))
        parts: list[Tensor] = list(y.chunk(self.blocks, dim=-1))
        for i, block in enumerate(self.adapted):
            update = F.linear(hidden[..., i, :], self.lora_b[i].to(hidden.dtype))
            parts[block] = parts[block] + factor * update.to(y.dtype)
        return parts[0] if self.blocks == 1 else torch.cat(parts, dim=-1)

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Adds the update to the base layer's weight and returns the base layer, which trains again.

        Raises:
            ValueError: If the base is quantized.
        """
        weight = getattr(self.base, "weight", None)
        if not isinstance(weight, nn.Parameter):
            raise ValueError(f"LoRALinear.merge: expected a float base layer, got {type(self.base).__name__}")
        weight.add_(self.delta().to(weight.dtype))
        return self.base.requires_grad_(True)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, blocks={self.blocks}, adapted={self.adapted}"


def _layers(module: nn.Module) -> Iterator[LoRALinear]:
    return (layer for layer in module.modules() if isinstance(layer, LoRALinear))


def _adapt(parent: nn.Module, name: str, rank: int, alpha: float) -> None:
    base = getattr(parent, name)
    if isinstance(base, LoRALinear):
        raise ValueError(f"add_lora: {name} is already adapted; merge it first")
    setattr(parent, name, LoRALinear(base, base.in_features, base.out_features, rank, alpha))


def _adapt_packed(attention: MultiheadSelfAttention, adapted: list[int], rank: int, alpha: float) -> None:
    width = attention.width
    base = attention.in_proj
    if isinstance(base, LoRALinear):
        raise ValueError("add_lora: in_proj is already adapted; merge it first")
    if base is None:
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        base = Linear(width, 3 * width, bias=bias is not None, device=weight.device, dtype=weight.dtype)
        base.weight, base.bias = weight, bias
    attention.replace_in_proj(
        LoRALinear(base, width, 3 * width, rank, alpha, blocks=3, adapted=tuple(adapted))
    )


def add_lora(
    module: nn.Module, rank: int, alpha: float | None = None, target: Sequence[str] = TARGETS
) -> nn.Module:
    """Freezes a model and adapts the projections of its attention layers, in place.

    Args:
        module: Any model with `vk.nn` attention layers (packed ones or `MultiheadAttention`), or with linear layers
            named q_proj, k_proj, v_proj and out_proj.
        rank: Rank r.
        alpha: Scale of the update is alpha / r; None = r, a scale of 1 (papers differ: some take 2 r).
        target: Some of "q", "k", "v", "out".

    Returns:
        The same module.

    Raises:
        ValueError: If a target is unknown, or the model has no such layers or adapted ones already.

    Example:
        >>> import torch, vlmkernels as vk
        >>> block = vk.nn.TransformerBlock(32, 4)
        >>> x = torch.randn(1, 5, 32)
        >>> before = block(x)
        >>> bool(torch.equal(vk.nn.add_lora(block, rank=4)(x), before))
        True
    """
    unknown = [name for name in target if name not in TARGETS]
    if unknown or not target:
        raise ValueError(f"add_lora: target must name some of {list(TARGETS)}, got {list(target)}")
    alpha = float(rank) if alpha is None else alpha
    module.requires_grad_(False)
    adapted = 0
    for layer in list(module.modules()):
        if isinstance(layer, MultiheadSelfAttention):
            parts = [i for i, name in enumerate(("q", "k", "v")) if name in target]
            if parts:
                _adapt_packed(layer, parts, rank, alpha)
                adapted += 1
            if "out" in target:
                _adapt(layer, "out_proj", rank, alpha)
            continue
        names = [_LAYER_NAMES[name] for name in target]
        if not hasattr(layer, "q_proj"):
            continue
        for name in names:
            if hasattr(getattr(layer, name, None), "in_features") or isinstance(
                getattr(layer, name, None), LoRALinear
            ):
                _adapt(layer, name, rank, alpha)
                adapted += 1
    if not adapted:
        raise ValueError(f"add_lora: {type(module).__name__} has no attention layers that can be adapted")
    return module


def lora_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that train: every A and B."""
    return [p for layer in _layers(module) for p in (layer.lora_a, layer.lora_b)]


def lora_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Returns the adapters alone, by the names they have in the model's state dict."""
    return {
        name: value
        for name, value in module.state_dict().items()
        if name.endswith((".lora_a", ".lora_b")) or name in ("lora_a", "lora_b")
    }


def load_lora_state_dict(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Loads adapters into a model that `add_lora` prepared with the same rank and targets.

    Raises:
        ValueError: If names are missing or unexpected.
    """
    known = set(lora_state_dict(module))
    if known != set(state):
        raise ValueError(
            f"load_lora_state_dict: missing {sorted(known - set(state))[:5]}, "
            f"unexpected {sorted(set(state) - known)[:5]}"
        )
    module.load_state_dict(state, strict=False)


def set_lora_scale(module: nn.Module, scale: float) -> None:
    """Multiplies every update by `scale` from now on: 1 as trained, 0 the base model."""
    for layer in _layers(module):
        layer.scale = float(scale)


def merge_lora(module: nn.Module) -> nn.Module:
    """Adds every update to its layer's weight and removes the adapters, in place; the model is a plain one again.

    Returns:
        The same module.

    Raises:
        ValueError: If a base layer is quantized.
    """
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, LoRALinear):
                continue
            merged = layer.merge()
            if isinstance(parent, MultiheadSelfAttention) and name == "in_proj":
                parent.in_proj = None
                parent.in_proj_weight = merged.weight  # type: ignore[assignment]
                parent.in_proj_bias = merged.bias  # type: ignore[assignment]
            else:
                setattr(parent, name, merged)
    return module
