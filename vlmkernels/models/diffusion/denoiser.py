# SPDX-License-Identifier: Apache-2.0
"""The denoising transformer: patches of a noisy image attend to each other and to the tokens of a condition.

Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023), whose norms are scaled and shifted by the time
embedding (adaLN-zero), with a cross-attention added for conditions of several tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlmkernels.models._checks import require_positive
from vlmkernels.models._config import ModelConfig
from vlmkernels.nn.attention import MultiheadAttention
from vlmkernels.nn.linear import Linear
from vlmkernels.nn.transformer import MLP, LayerNorm

__all__ = ["DiT", "DiTConfig", "TimeEmbedding"]


@dataclass(frozen=True)
class DiTConfig(ModelConfig):
    """Sizes of a `DiT`; the defaults are the measured 8 x 8 digits model, 377k parameters with its class tokens.

    Attributes:
        channels: Channels of what is denoised.
        size: Side of it.
        patch_size: Side of a patch.
        width: Width D.
        layers: Number of blocks.
        heads: Attention heads.
        context_width: Width of the condition's tokens; None = width.
    """

    channels: int = 1
    size: int = 8
    patch_size: int = 2
    width: int = 64
    layers: int = 4
    heads: int = 4
    context_width: int | None = None

    def __post_init__(self) -> None:
        require_positive(self, "channels", "size", "patch_size", "width", "layers", "heads")
        if self.size % self.patch_size or self.width % (2 * self.heads):
            raise ValueError(
                f"DiTConfig: size must be a multiple of patch_size and width of 2 heads, got size {self.size}, "
                f"patch_size {self.patch_size}, width {self.width}, heads {self.heads}"
            )


class TimeEmbedding(nn.Module):
    """Timesteps int64 `[B]` to `[B, D]`: sines and cosines of geometric frequencies, then Linear-SiLU-Linear."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        angle = t.float().unsqueeze(-1) * self.frequencies
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))


class DiTBlock(nn.Module):
    """`x += g1 SelfAttn(ada(LN x)); x += CrossAttn(LN x, context); x += g2 MLP(ada(LN x))`.

    The six modulations (two scales, two shifts, two gates) are a zero-initialised map of the time embedding.

    Args:
        width: Width D.
        heads: Heads of both attentions.
        context_width: Width of the condition's tokens.
    """

    def __init__(self, width: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.norm1, self.norm3 = (
            LayerNorm(width, elementwise_affine=False),
            LayerNorm(width, elementwise_affine=False),
        )
        self.norm2 = LayerNorm(width)
        self.self_attn = MultiheadAttention(width, heads)
        self.cross_attn = MultiheadAttention(width, heads, context_width=context_width)
        self.mlp = MLP(width, 4 * width, act="gelu_tanh")
        self.modulation = Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, time: Tensor, context: Tensor, context_mask: Tensor | None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.self_attn(self.norm1(x) * (1 + scale1) + shift1)
        x = x + self.cross_attn(self.norm2(x), context, key_mask=context_mask)
        return x + gate2 * self.mlp(self.norm3(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """Predicts noise (or velocity): `[B, C, S, S]`, t int64 `[B]`, context `[B, L, Dc]` to `[B, C, S, S]`.

    The last layer is zero-initialised, so that an untrained model predicts 0 and its loss is 1.

    Args:
        config: Sizes.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch_size
        self.patch_embed = nn.Conv2d(config.channels, width, patch, stride=patch)
        self.positional_embedding = nn.Parameter(0.02 * torch.randn((config.size // patch) ** 2, width))
        self.time_embed = TimeEmbedding(width)
        context_width = config.context_width or width
        self.blocks = nn.ModuleList(
            DiTBlock(width, config.heads, context_width) for _ in range(config.layers)
        )
        self.norm = LayerNorm(width)
        self.head = Linear(width, patch * patch * config.channels)
        self.time_act = nn.SiLU()
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, z: Tensor, t: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        """Denoises; `context_mask` bool `[B, L]`, True = attend.

        Raises:
            ValueError: If shapes do not fit.
        """
        c = self.config
        if (
            tuple(z.shape[1:]) != (c.channels, c.size, c.size)
            or t.shape != z.shape[:1]
            or len(context) != len(z)
        ):
            raise ValueError(
                f"DiT: expected z [B, {c.channels}, {c.size}, {c.size}], t [B] and context [B, L, D], got "
                f"{list(z.shape)}, {list(t.shape)} and {list(context.shape)}"
            )
        x = self.patch_embed(z).flatten(2).transpose(1, 2) + self.positional_embedding
        time = self.time_act(self.time_embed(t))
        for block in self.blocks:
            x = block(x, time, context, context_mask)
        grid, patch = c.size // c.patch_size, c.patch_size
        pixels = self.head(self.norm(x)).unflatten(1, (grid, grid)).unflatten(-1, (patch, patch, c.channels))
        return pixels.permute(0, 5, 1, 3, 2, 4).reshape(z.shape)
