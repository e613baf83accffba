# SPDX-License-Identifier: Apache-2.0
"""ViTamin: an image tower for CLIP of two convolutional stages and one long transformer stage.

Chen et al., "ViTamin: Designing Scalable Vision Models in the Vision-Language Era" (2024); shapes as in timm and
open_clip, whose weights load. Images `[B, 3, S, S]`, S a multiple of 16, become features `[B, E]`::

    stem (stride 2) -> 2 + 4 MBConv-LN blocks (strides 4, 8) -> norm, conv (stride 16) -> + positions
    -> blocks of attention and GeGLU -> mean over tokens -> norm -> projection

No squeeze-excite, no class token, one norm at the entry of each convolutional block; in the last stage the MLP has a
norm of its own behind the block's. Convolutions have biases, norms eps 1e-6, GELU is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.models._registry import register_architecture, register_model
from vlmkernels.models.clip import CLIP, CLIPConfig, TextConfig, default_heads
from vlmkernels.nn.linear import Linear
from vlmkernels.nn.transformer import LayerNorm, Transformer
from vlmkernels.systems import register_system

__all__ = ["CONFIGS", "ViTamin", "ViTaminCLIPConfig", "ViTaminConfig", "vitamin"]

_EPS = 1e-6
_norm = partial(LayerNorm, eps=_EPS)


@dataclass(frozen=True)
class ViTaminConfig:
    """Image tower.

    Attributes:
        image_size: Side S of the square input, a multiple of 16.
        stem_width: Channels s of the stem.
        conv_widths: Channels of the two convolutional stages.
        conv_depths: Their blocks.
        width: Width D of the transformer stage.
        layers: Its blocks.
        heads: Attention heads; None = D / 64.
        drop_path: Stochastic depth rate of the last block, in training (0.1 for the long runs).
        image_mean: Mean that `vk.data.transform_for` subtracts, per channel.
        image_std: Deviation that `vk.data.transform_for` divides by, per channel.
    """

    image_size: int = 224
    stem_width: int = 64
    conv_widths: tuple[int, int] = (64, 128)
    conv_depths: tuple[int, int] = (2, 4)
    width: int = 384
    layers: int = 14
    heads: int | None = None
    drop_path: float = 0.0
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        for name in ("conv_widths", "conv_depths", "image_mean", "image_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.image_size % 16 or self.image_size < 16:
            raise ValueError(f"ViTaminConfig: image_size must be a multiple of 16, got {self.image_size}")

    @property
    def grid(self) -> int:
        """Side of the grid of tokens."""
        return self.image_size // 16

    def build(self, embed_dim: int, **block: Any) -> ViTamin:
        """Builds the tower; CLIP's choices of attention, norm and MLP classes do not apply to it."""
        return ViTamin(self, embed_dim)


@dataclass(frozen=True)
class ViTaminCLIPConfig(CLIPConfig):
    """A CLIP with a ViTamin as its image tower; see `CLIPConfig`."""

    vision: ViTaminConfig = field(default_factory=ViTaminConfig)  # type: ignore[assignment]
    act: str = "gelu"


class LayerNorm2d(LayerNorm):
    """LayerNorm over the channels of each pixel of `[B, C, H, W]`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MBConvLN(nn.Module):
    """`shortcut(x) + conv3_1x1(gelu(depthwise(gelu(conv1_1x1(norm(x))))))`.

    The shortcut of a strided block is a 3x3 average pool that does not count padding, then a 1x1 convolution where the
    number of channels changes.
    """

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        hidden = 4 * width
        self.stride = stride
        self.pre_norm = LayerNorm2d(in_width, eps=_EPS)
        self.conv1_1x1 = nn.Conv2d(in_width, hidden, 1)
        self.conv2_kxk = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden)
        self.conv3_1x1 = nn.Conv2d(hidden, width, 1)
        self.expand = nn.Conv2d(in_width, width, 1) if in_width != width else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.stride == 2:
            shortcut = F.avg_pool2d(x, 3, stride=2, padding=1, count_include_pad=False)
        if self.expand is not None:
            shortcut = self.expand(shortcut)
        x = F.gelu(self.conv1_1x1(self.pre_norm(x)))
        return shortcut + self.conv3_1x1(F.gelu(self.conv2_kxk(x)))


class GeGLU(nn.Module):
    """`w2(gelu(w0 z) * w1 z)` with `z = norm(x)`, a norm of its own.

    Args:
        width: Width D of input and output.
        hidden: Width of the gate (2 D in ViTamin).
        act: "gelu"; nothing else was published.
    """

    def __init__(self, width: int, hidden: int, *, act: str = "gelu") -> None:
        super().__init__()
        self.norm = _norm(width)
        self.w0 = Linear(width, hidden)
        self.w1 = Linear(width, hidden)
        self.w2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.w2(F.gelu(self.w0(x)) * self.w1(x))


class ViTamin(nn.Module):
    """The tower: `[B, 3, S, S] -> [B, E]`.

    Args:
        config: Its sizes.
        embed_dim: Width E of the output.
    """

    def __init__(self, config: ViTaminConfig, embed_dim: int) -> None:
        super().__init__()
        stem, (first, second), width = config.stem_width, config.conv_widths, config.width
        self.stem_conv1 = nn.Conv2d(3, stem, 3, stride=2, padding=1)
        self.stem_norm = LayerNorm2d(stem, eps=_EPS)
        self.stem_conv2 = nn.Conv2d(stem, stem, 3, padding=1)
        self.stages = nn.ModuleList()
        for in_width, out_width, depth in zip(
            (stem, first), (first, second), config.conv_depths, strict=True
        ):
            blocks = [MBConvLN(in_width, out_width, 2)]
            blocks += [MBConvLN(out_width, out_width, 1) for _ in range(depth - 1)]
            self.stages.append(nn.Sequential(*blocks))
        self.down_norm = LayerNorm2d(second, eps=_EPS)
        self.down_conv = nn.Conv2d(second, width, 3, stride=2, padding=1)
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(config.grid**2, width))
        self.transformer = Transformer(
            width,
            config.layers,
            config.heads or default_heads("ViTaminConfig", width),
            mlp_width=2 * width,
            drop_path=config.drop_path,
            norm_layer=_norm,
            mlp_layer=GeGLU,
        )
        self.fc_norm = _norm(width)
        self.head = Linear(width, embed_dim, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Returns the last block's tokens `[B, (S/16)^2, D]`."""
        x = self.stem_conv2(F.gelu(self.stem_norm(self.stem_conv1(x))))
        for stage in self.stages:
            x = stage(x)
        x = self.down_conv(self.down_norm(x)).flatten(2).transpose(1, 2)
        # Under autocast the convolution gives half precision; the sum promotes, so the residual stream is float32.
        return self.transformer(x + self.positional_embedding)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc_norm(self.forward_tokens(x).mean(dim=1)))


_SIZES = {
    "S": (64, (64, 128), 384, 14, 384),
    "B": (128, (128, 256), 768, 14, 512),
    "L": (160, (160, 320), 1024, 31, 768),
    "XL": (192, (192, 384), 1152, 32, 1152),
}


def _vision(size: str, image_size: int) -> ViTaminConfig:
    stem, convs, width, layers, _ = _SIZES[size]
    # XL has heads of 72
    return ViTaminConfig(image_size, stem, convs, (2, 4), width, layers, 16 if size == "XL" else None)


def vitamin(size: str = "S", image_size: int = 224, embed_dim: int | None = None) -> ViTamin:
    """Builds a tower by the letter of its published size.

    Args:
        size: "S", "B", "L" or "XL".
        image_size: Side of the input.
        embed_dim: Width E of the output; None = the published one.

    Raises:
        ValueError: If the size is unknown.
    """
    if size not in _SIZES:
        raise ValueError(f"vitamin: size must be one of {sorted(_SIZES)}, got {size!r}")
    return ViTamin(_vision(size, image_size), embed_dim or _SIZES[size][-1])


def _clip(
    size: str, image_size: int, embed_dim: int | None = None, width: int | None = None, layers: int = 12
) -> ViTaminCLIPConfig:
    joint = embed_dim or _SIZES[size][-1]
    width = width or joint
    text = TextConfig(width=width, layers=layers, heads=16 if width == 1152 else None)
    return ViTaminCLIPConfig(joint, _vision(size, image_size), text)


CONFIGS: dict[str, ViTaminCLIPConfig] = {
    "ViTamin-S": _clip("S", 224),
    "ViTamin-B": _clip("B", 224),
    # locked-text tuning: joint space and text tower of a larger model
    "ViTamin-S-LTT": _clip("S", 224, 768),
    "ViTamin-B-LTT": _clip("B", 224, 768),
    "ViTamin-L": _clip("L", 224),
    **{f"ViTamin-L-{s}": _clip("L", s) for s in (256, 336, 384)},
    "ViTamin-L2": _clip("L", 224, 1024, layers=24),
    **{f"ViTamin-L2-{s}": _clip("L", s, 1024, layers=24) for s in (256, 336, 384)},
    **{f"ViTamin-XL-{s}": _clip("XL", s, layers=27) for s in (256, 336, 384)},
    # Small enough to train on a CPU in minutes
    "vitamin-emoji": ViTaminCLIPConfig(
        128,
        ViTaminConfig(48, 16, (16, 32), (1, 2), 64, 4, image_mean=(0.5,) * 3, image_std=(0.5,) * 3),
        TextConfig(4096, 32, 128, 1),
    ),
}
CONFIGS = {name: replace(config, name=name) for name, config in CONFIGS.items()}


def _register(name: str) -> None:
    @register_model(name)
    def build(**overrides: Any) -> CLIP:
        return CLIP(CONFIGS[name].override(**overrides)).eval()


for _name in CONFIGS:
    _register(_name)
register_architecture("ViTamin", CLIP, ViTaminCLIPConfig)
register_system(
    "ViTamin", "ViTamin: Designing Scalable Vision Models in the Vision-Language Era", "image encoder"
)(ViTamin)
