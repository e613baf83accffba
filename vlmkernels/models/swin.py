# SPDX-License-Identifier: Apache-2.0
"""The Swin transformer: attention within windows that shift from block to block, four stages of halving resolution.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (2021). Shapes: images
`[B, 3, H, W]`, any size that is a multiple of the patch; tokens `[B, T, C]` after the last norm.

A window's mask depends on where it lies only by its pattern of regions (inside, right edge, bottom edge, corner), so
that attention runs once per pattern with a bias `[1, H, T, T]` instead of one per window. Feature maps that windows do
not divide are padded; padding attends to nothing but itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.models._checks import freeze_lists, require_positive, require_share
from vlmkernels.models._config import ModelConfig
from vlmkernels.nn.attention import MultiheadSelfAttention
from vlmkernels.nn.transformer import MLP, DropPath, LayerNorm

__all__ = ["Swin", "SwinConfig"]


@dataclass(frozen=True)
class SwinConfig(ModelConfig):
    """Sizes; the defaults are Swin-T with windows of 7.

    Attributes:
        image_size: Side of the images that window sizes are chosen for.
        patch_size: Side of a patch.
        width: Channels of the first stage; each further stage doubles them.
        depths: Blocks per stage, an even block shifting the odd one's windows.
        heads: Attention heads per stage.
        window: Side of a window; where a stage's feature map is no larger, its side, and nothing shifts.
        drop_path: Stochastic depth rate of the last block.
    """

    image_size: int = 224
    patch_size: int = 4
    width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    drop_path: float = 0.1

    def __post_init__(self) -> None:
        freeze_lists(self)
        require_positive(self, "image_size", "patch_size", "width", "window")
        require_share(self, "drop_path")
        factor = self.patch_size * 2 ** (len(self.depths) - 1)
        if len(self.depths) != len(self.heads) or self.image_size % factor:
            raise ValueError(
                "SwinConfig: depths and heads must be of one length, and image_size a multiple of "
                f"{factor}, got depths {self.depths}, heads {self.heads} and image_size {self.image_size}"
            )

    @property
    def out_width(self) -> int:
        """Channels C of the last stage."""
        return self.width * 2 ** (len(self.depths) - 1)


@lru_cache(maxsize=64)
def _patterns(height: int, width: int, window: int, shift: int) -> list[tuple[list[int], Tensor | None]]:
    """Groups the windows of a padded map by their mask.

    Returns:
        Per group: its windows' numbers, and the bool `[T, T]` of who may attend to whom (None: everyone).
    """
    rows, columns = -(-height // window) * window, -(-width // window) * window
    region = torch.full((rows, columns), -1)
    region[:height, :width] = 0
    region = region.roll((-shift, -shift), (0, 1))
    if shift:
        # What the roll carried from one edge to the other must not attend across it.
        region[-shift:] += 2 * (region[-shift:] >= 0)
        region[:, -shift:] += 4 * (region[:, -shift:] >= 0)
    cells = region.view(rows // window, window, columns // window, window).transpose(1, 2).flatten(2)
    kinds, inverse = cells.flatten(0, 1).unique(dim=0, return_inverse=True)
    groups: list[tuple[list[int], Tensor | None]] = []
    for number, kind in enumerate(kinds):
        allowed = kind.unsqueeze(0) == kind.unsqueeze(1)
        members = (inverse == number).nonzero()[:, 0].tolist()
        groups.append((members, None if bool(allowed.all()) else allowed))
    return groups


class SwinBlock(nn.Module):
    """`x += attention within (shifted) windows; x += MLP`, with a learned bias per relative position and head."""

    relative_index: Tensor

    def __init__(self, width: int, heads: int, window: int, shift: int, drop_path: float) -> None:
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attn = MultiheadSelfAttention(width, heads)
        self.relative_bias = nn.Parameter(0.02 * torch.randn((2 * window - 1) ** 2, heads))
        place = torch.stack(torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij")).flatten(1)
        offset = place[:, :, None] - place[:, None, :] + window - 1
        self.register_buffer("relative_index", offset[0] * (2 * window - 1) + offset[1], persistent=False)
        self.mlp = MLP(width, 4 * width)
        self.drop_path = DropPath(drop_path)

    def _attend(self, x: Tensor) -> Tensor:  # [B, H, W, C]
        height, width = x.shape[1:3]
        window, shift = self.window, self.shift
        x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
        padded = x.shape
        x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3)
        grid = x.shape[1:3]
        windows = x.flatten(3, 4).flatten(1, 2)  # [B, windows, T, C]
        bias = self.relative_bias[self.relative_index].permute(2, 0, 1).unsqueeze(0)
        groups = _patterns(height, width, window, shift)
        out = torch.empty_like(windows) if len(groups) > 1 else windows
        for members, allowed in groups:
            chosen = windows if len(groups) == 1 else windows[:, members]
            masked = bias if allowed is None else bias.masked_fill(~allowed.to(bias.device), -torch.inf)
            found = self.attn(chosen.flatten(0, 1), bias=masked).unflatten(0, chosen.shape[:2])
            if len(groups) == 1:
                out = found
            else:
                out = out.to(found.dtype)
                out[:, members] = found
        x = out.unflatten(1, grid).unflatten(3, (window, window)).transpose(2, 3).reshape(*padded[:3], -1)
        if shift:
            x = x.roll((shift, shift), (1, 2))
        return x[:, :height, :width]

    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C]
        x = x + self.drop_path(self._attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Joins 2 x 2 tokens of width C to one of width 2 C: concatenation, norm, linear without bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, H, W, C]
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, dim=-1)))


class Swin(nn.Module):
    """The backbone: `[B, 3, H, W]` to region features `[B, T, C]` after the final norm.

    Args:
        config: Sizes.
    """

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.patch_norm = LayerNorm(config.width)
        total = sum(config.depths)
        self.stages, self.merges = nn.ModuleList(), nn.ModuleList()
        side, number = config.image_size // config.patch_size, 0
        for stage, (depth, heads) in enumerate(zip(config.depths, config.heads, strict=True)):
            width = config.width * 2**stage
            window = min(config.window, side)
            blocks = []
            for block in range(depth):
                shift = window // 2 if block % 2 and side > config.window else 0
                rate = config.drop_path * number / max(total - 1, 1)
                blocks.append(SwinBlock(width, heads, window, shift, rate))
                number += 1
            self.stages.append(nn.Sequential(*blocks))
            if stage < len(config.depths) - 1:
                self.merges.append(PatchMerging(width))
                side //= 2
        self.norm = LayerNorm(config.out_width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Encodes images of any size that is a multiple of the patch."""
        if (
            images.ndim != 4
            or images.shape[1] != 3
            or any(s % self.config.patch_size for s in images.shape[2:])
        ):
            raise ValueError(
                f"Swin: images must be [B, 3, H, W] with sides that are multiples of {self.config.patch_size}, "
                f"got {list(images.shape)}"
            )
        x = self.patch_norm(self.patch_embed(images).permute(0, 2, 3, 1))
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i < len(self.merges):
                x = self.merges[i](x)
        return self.norm(x.flatten(1, 2))
