# SPDX-License-Identifier: Apache-2.0
"""The denoising U-Net of latent diffusion: residual convolutions with time, transformer blocks at each resolution.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022), at any scale (reconstructed).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.models._checks import freeze_lists, require_positive
from vlmkernels.models._config import ModelConfig
from vlmkernels.models.diffusion.denoiser import TimeEmbedding
from vlmkernels.nn.attention import MultiheadAttention
from vlmkernels.nn.linear import Linear
from vlmkernels.nn.transformer import LayerNorm

__all__ = ["UNet", "UNetConfig"]


@dataclass(frozen=True)
class UNetConfig(ModelConfig):
    """Sizes of a `UNet`.

    Attributes:
        channels: Channels of what is denoised.
        size: Side of it.
        width: Channels at full resolution.
        multipliers: Channels per resolution, as multiples of width; each next resolution is half the side.
        blocks: Residual blocks per resolution.
        heads: Attention heads.
        context_width: Width of the condition's tokens; None = width.
    """

    channels: int = 3
    size: int = 32
    width: int = 32
    multipliers: tuple[int, ...] = (1, 2, 4)
    blocks: int = 1
    heads: int = 4
    context_width: int | None = None

    def __post_init__(self) -> None:
        freeze_lists(self)
        require_positive(self, "channels", "size", "width", "blocks", "heads")
        if self.size % 2 ** (len(self.multipliers) - 1) or self.width % max(8, self.heads):
            raise ValueError(
                f"UNetConfig: size must halve {len(self.multipliers) - 1} times and width be a multiple of 8 and of "
                f"heads, got size {self.size}, width {self.width}, heads {self.heads}"
            )


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(8, channels), channels)


class ResidualBlock(nn.Module):
    """`x + conv(act(norm(conv(act(norm(x))) + time)))`, the second convolution zero-initialised."""

    def __init__(self, channels: int, out_channels: int, time_width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(channels), _norm(out_channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_width, out_channels)
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(cast(nn.Parameter, self.conv2.bias))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(y)))


class SpatialTransformer(nn.Module):
    """Self-attention, cross-attention and a GEGLU MLP over the positions of a feature map `[B, C, H, W]`."""

    def __init__(self, channels: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.norm1, self.norm2, self.norm3 = LayerNorm(channels), LayerNorm(channels), LayerNorm(channels)
        self.self_attn = MultiheadAttention(channels, heads)
        self.cross_attn = MultiheadAttention(channels, heads, context_width=context_width)
        self.geglu = Linear(channels, 8 * channels)
        self.out = Linear(4 * channels, channels)

    def forward(self, x: Tensor, context: Tensor, context_mask: Tensor | None) -> Tensor:
        y = self.norm(x).flatten(2).transpose(1, 2)
        y = y + self.self_attn(self.norm1(y))
        y = y + self.cross_attn(self.norm2(y), context, key_mask=context_mask)
        value, gate = self.geglu(self.norm3(y)).chunk(2, dim=-1)
        y = y + self.out(value * F.gelu(gate))
        return x + y.transpose(1, 2).reshape(x.shape)


class _Stage(nn.Module):
    """A residual block followed by a transformer block."""

    def __init__(self, channels: int, out_channels: int, config: UNetConfig) -> None:
        super().__init__()
        time_width = 4 * config.width
        self.residual = ResidualBlock(channels, out_channels, time_width)
        self.attention = SpatialTransformer(out_channels, config.heads, config.context_width or config.width)

    def forward(self, x: Tensor, time: Tensor, context: Tensor, context_mask: Tensor | None) -> Tensor:
        return self.attention(self.residual(x, time), context, context_mask)


class UNet(nn.Module):
    """Predicts noise (or velocity), with the signature of `DiT`.

    Args:
        config: Sizes.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.width * m for m in config.multipliers]
        self.time_embed = TimeEmbedding(4 * config.width)
        self.conv_in = nn.Conv2d(config.channels, config.width, 3, padding=1)
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        channels, skips = config.width, [config.width]
        for level, width in enumerate(widths):
            for _ in range(config.blocks):
                self.down.append(_Stage(channels, width, config))
                channels = width
                skips.append(channels)
            if level < len(widths) - 1:
                self.downsample.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
                skips.append(channels)
        self.middle = _Stage(channels, channels, config)
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(widths))):
            for _ in range(config.blocks + 1):
                self.up.append(_Stage(channels + skips.pop(), widths[level], config))
                channels = widths[level]
            if level:
                self.upsample.append(nn.Conv2d(channels, channels, 3, padding=1))
        self.norm = _norm(channels)
        self.conv_out = nn.Conv2d(channels, config.channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(cast(nn.Parameter, self.conv_out.bias))

    def forward(self, z: Tensor, t: Tensor, context: Tensor, context_mask: Tensor | None = None) -> Tensor:
        """Denoises; see `DiT.forward`."""
        c = self.config
        if (
            tuple(z.shape[1:]) != (c.channels, c.size, c.size)
            or t.shape != z.shape[:1]
            or len(context) != len(z)
        ):
            raise ValueError(
                f"UNet: expected z [B, {c.channels}, {c.size}, {c.size}], t [B] and context [B, L, D], got "
                f"{list(z.shape)}, {list(t.shape)} and {list(context.shape)}"
            )
        time = self.time_embed(t)
        x = self.conv_in(z)
        kept = [x]
        for i, stage in enumerate(self.down):
            x = stage(x, time, context, context_mask)
            kept.append(x)
            level, last = divmod(i + 1, c.blocks)
            if last == 0 and level <= len(self.downsample):
                x = self.downsample[level - 1](x)
                kept.append(x)
        x = self.middle(x, time, context, context_mask)
        for i, stage in enumerate(self.up):
            x = stage(torch.cat([x, kept.pop()], dim=1), time, context, context_mask)
            level, last = divmod(i + 1, c.blocks + 1)
            if last == 0 and level <= len(self.upsample):
                x = self.upsample[level - 1](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm(x)))
