# SPDX-License-Identifier: Apache-2.0
"""The CLIP transformer: activations, LayerNorm, MLP, the pre-norm block and a stack of blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmkernels.nn.attention import MultiheadSelfAttention
from vlmkernels.nn.linear import Linear

__all__ = ["MLP", "DropPath", "LayerNorm", "QuickGELU", "Transformer", "TransformerBlock", "activation"]


class QuickGELU(nn.Module):
    """`x * sigmoid(1.702 x)`: the GELU approximation that OpenAI's CLIP weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}


def activation(name: str) -> nn.Module:
    """Returns a new module for an activation name as `vk.linear` and `vk.quantized_linear` spell it.

    Args:
        name: One of "gelu", "gelu_tanh", "quick_gelu", "relu", "silu".

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation: expected one of {sorted(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name]()


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` computed in float32 whatever its input's dtype, which the output keeps.

    torch's kernels already keep statistics and affine in float32 where input and weight share a half type;
    mixed types (half activations on float32 weights, as under autocast) are widened here.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in (torch.float16, torch.bfloat16):
            return super().forward(x)
        if self.weight is None or self.weight.dtype == x.dtype:
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype)
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), bias, self.eps).to(x.dtype)


class DropPath(nn.Module):
    """Drops whole residual branches per sample in training (stochastic depth, Huang et al. 2016).

    Args:
        rate: Probability of dropping a sample's branch; the survivors are scaled by `1 / (1 - rate)`.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"DropPath: rate must be in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * keep.to(x.dtype) / (1.0 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class MLP(nn.Module):
    """`c_proj(act(c_fc(x)))`, the position-wise half of a block.

    Args:
        width: Width D of input and output.
        hidden: Width of the hidden layer.
        act: Activation name (see `activation`).
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        act: str = "gelu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.c_fc = Linear(width, hidden, device=device, dtype=dtype)
        self.act = activation(act)
        self.c_proj = Linear(hidden, width, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:  # [B, L, D]
        return self.c_proj(self.act(self.c_fc(x)))


class TransformerBlock(nn.Module):
    """Pre-norm residual block: `x += attn(ln_1(x)); x += mlp(ln_2(x))`, with OpenAI's parameter names.

    Args:
        width: Model width D.
        heads: Number of attention heads.
        mlp_width: Hidden width of the MLP; None = 4 D.
        act: Activation name of the MLP.
        is_causal: Causal attention.
        dropout: Dropout on the attention weights and on both branches, in training only.
        drop_path: Rate of dropping whole branches per sample, in training only.
        attention_layer: Called as `attention_layer(width, heads, is_causal=, dropout=)`; forward takes
            `(x, *, key_mask, bias)`.
        norm_layer: Called as `norm_layer(width)`.
        mlp_layer: Called as `mlp_layer(width, mlp_width, act=)`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp_width: int | None = None,
        act: str = "gelu",
        is_causal: bool = False,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        attention_layer: Callable[..., nn.Module] = MultiheadSelfAttention,
        norm_layer: Callable[..., nn.Module] = LayerNorm,
        mlp_layer: Callable[..., nn.Module] = MLP,
    ) -> None:
        super().__init__()
        self.ln_1 = norm_layer(width)
        self.attn = attention_layer(width, heads, is_causal=is_causal, dropout=dropout)
        self.ln_2 = norm_layer(width)
        self.mlp = mlp_layer(width, 4 * width if mlp_width is None else mlp_width, act=act)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Transforms tokens `[B, L, D]`; `key_mask` `[B, L]` and `bias` go to the attention."""
        x = x + self.drop_path(self.dropout(self.attn(self.ln_1(x), key_mask=key_mask, bias=bias)))
        return x + self.drop_path(self.dropout(self.mlp(self.ln_2(x))))


class Transformer(nn.Module):
    """A stack of `TransformerBlock`s named `resblocks`, as in OpenAI's checkpoints.

    Args:
        width: Model width D.
        layers: Number of blocks.
        heads: Number of attention heads.
        drop_path: Rate of the last block; the rate grows linearly from 0 at the first.
        **block: Passed to every `TransformerBlock`.

    Attributes:
        gradient_checkpointing: Recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(self, width: int, layers: int, heads: int, *, drop_path: float = 0.0, **block: Any) -> None:
        super().__init__()
        self.width = width
        self.gradient_checkpointing = False
        rates = [drop_path * i / max(layers - 1, 1) for i in range(layers)]
        self.resblocks = nn.ModuleList(
            TransformerBlock(width, heads, drop_path=rate, **block) for rate in rates
        )

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Transforms tokens `[B, L, D]`; `key_mask` `[B, L]` and `bias` go to every block."""
        for block in self.resblocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, key_mask=key_mask, bias=bias, use_reentrant=False)
            else:
                x = block(x, key_mask=key_mask, bias=bias)
        return x
