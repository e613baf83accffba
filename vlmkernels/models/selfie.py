# SPDX-License-Identifier: Apache-2.0
"""Selfie: fill-in-the-blank pretraining of a convolutional network, by choosing among the patches of one image.

Trinh et al., "Selfie: Self-supervised Pretraining for Image Embedding" (2019). Some patches are removed; a transformer
pools the others to one vector u; u plus the position of a hole must pick, by dot product, the patch that was there
among the removed patches of the *same* image. Afterwards only the patch network is kept, as stages 1 to 3 of a ResNet.

Figures without another mark are those of a public implementation on CIFAR-10 (16 patches of 8 x 8, 4 of them holes,
3 layers, 32 heads, feed-forward 640, dropout 0.1). It leaves u_0 fixed at zero and adds no positions to the context,
so that the pooled vector cannot know where the holes are; here u_0 is learned and positions are added (reconstructed).
Features are neither normalised nor divided by a temperature; `scale_logits` divides by sqrt(D) where width makes the
products large.

Shapes: images `[B, 3, S, S]` float, normalised; holes int64 `[B, T]`.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.models._checks import (
    check_images,
    freeze_lists,
    require_one_of,
    require_positive,
    require_share,
)
from vlmkernels.models._config import ModelConfig
from vlmkernels.models._registry import register_architecture, register_model
from vlmkernels.models.clip import VisionConfig
from vlmkernels.models.training import Trainable, TrainingBatch
from vlmkernels.nn.transformer import Transformer
from vlmkernels.ops.contrastive import info_nce
from vlmkernels.systems import register_system

__all__ = ["PatchNet", "ResNet", "Selfie", "SelfieConfig"]

_EXPANSION = 4


@dataclass(frozen=True)
class SelfieConfig(ModelConfig):
    """Sizes; the defaults are the 32 x 32 setting with a ResNet-50.

    Attributes:
        image_size: Side S of the images.
        patch_size: Side of a patch.
        depths: Bottleneck blocks of the four stages of the ResNet; the patch network has the first three.
        width: Inner channels of stage 1; stage k has 2^(k-1) times as many, and gives out four times those.
        strides: Strides of the four stages. Small inputs keep their size in the stem, which has no pool.
        stem: "small" (3x3, stride 1) or "large" (7x7, stride 2, then a 3x3 max pool of stride 2).
        holes: Patches removed from an image; None = a quarter.
        layers: Layers of the attention pool.
        heads: Its heads.
        mlp_width: Its feed-forward width.
        dropout: Its dropout.
        positions: "patch" (one vector each, for 16 patches) or "factorised" (row plus column, for 49).
        scale_logits: Divide the logits by sqrt(D).
        image_mean: What `vk.data.transform_for` subtracts.
        image_std: What it divides by.
        name: Name of the configuration, for reports.
    """

    image_size: int = 32
    patch_size: int = 8
    depths: tuple[int, int, int, int] = (3, 4, 6, 3)
    width: int = 64
    strides: tuple[int, int, int, int] = (1, 2, 2, 2)
    stem: str = "small"
    holes: int | None = None
    layers: int = 3
    heads: int = 32
    mlp_width: int = 640
    dropout: float = 0.1
    positions: str = "patch"
    scale_logits: bool = False
    image_mean: tuple[float, float, float] = field(default_factory=lambda: VisionConfig().image_mean)
    image_std: tuple[float, float, float] = field(default_factory=lambda: VisionConfig().image_std)
    name: str = ""

    def __post_init__(self) -> None:
        freeze_lists(self)
        require_positive(self, "image_size", "patch_size", "width", "layers", "heads", "mlp_width")
        require_share(self, "dropout")
        require_one_of(self, stem=("small", "large"), positions=("patch", "factorised"))
        if self.image_size % self.patch_size or len(self.depths) != 4 or len(self.strides) != 4:
            raise ValueError(
                "SelfieConfig: image_size must be a multiple of patch_size, and there must be four depths and "
                f"strides, got {self.image_size}, {self.patch_size}, {self.depths}, {self.strides}"
            )
        if not 1 <= self.hole_count < self.grid**2:
            raise ValueError(f"SelfieConfig: holes must lie in [1, {self.grid**2}), got {self.hole_count}")

    @property
    def grid(self) -> int:
        """Side of the grid of patches."""
        return self.image_size // self.patch_size

    @property
    def hole_count(self) -> int:
        """Patches removed from an image."""
        return max(1, self.grid**2 // 4) if self.holes is None else self.holes

    @property
    def feature_width(self) -> int:
        """Width D of a patch's feature: the output of stage 3."""
        return 4 * _EXPANSION * self.width

    @property
    def vision(self) -> VisionConfig:
        """What `vk.data.transform_for` reads."""
        return VisionConfig(
            self.image_size,
            patch_size=self.patch_size,
            image_mean=self.image_mean,
            image_std=self.image_std,
        )


class _Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        out_width = _EXPANSION * width
        self.conv1, self.bn1 = nn.Conv2d(in_width, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out_width, 1, bias=False), nn.BatchNorm2d(out_width)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or in_width != out_width:
            conv = nn.Conv2d(in_width, out_width, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out_width))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.downsample(x))


def _stage(config: SelfieConfig, stage: int) -> nn.Sequential:
    width = config.width * 2**stage
    in_width = config.width if stage == 0 else width // 2 * _EXPANSION
    blocks = []
    for block in range(config.depths[stage]):
        blocks.append(_Bottleneck(in_width, width, config.strides[stage] if block == 0 else 1))
        in_width = width * _EXPANSION
    return nn.Sequential(*blocks)


def _stem(config: SelfieConfig) -> nn.Sequential:
    if config.stem == "small":
        conv = nn.Conv2d(3, config.width, 3, padding=1, bias=False)
        layers = [("conv1", conv), ("bn1", nn.BatchNorm2d(config.width)), ("act", nn.ReLU())]
    else:
        conv = nn.Conv2d(3, config.width, 7, stride=2, padding=3, bias=False)
        layers = [("conv1", conv), ("bn1", nn.BatchNorm2d(config.width)), ("act", nn.ReLU())]
        layers.append(("pool", nn.MaxPool2d(3, stride=2, padding=1)))
    return nn.Sequential(OrderedDict(layers))


class PatchNet(nn.Module):
    """The first three stages of a ResNet and a global average: `[B, 3, p, p]` to `[B, D]`."""

    def __init__(self, config: SelfieConfig) -> None:
        super().__init__()
        self.stem = _stem(config)
        self.layer1, self.layer2, self.layer3 = (_stage(config, stage) for stage in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer3(self.layer2(self.layer1(self.stem(x)))).mean((2, 3))


class ResNet(nn.Module):
    """A whole classifier: the stages of a `PatchNet`, stage 4 and a linear layer, both new.

    Args:
        config: Sizes.
        classes: Number of classes K.
        patch_net: Where stages 1 to 3 come from; they are shared, not copied. None = new ones.

    Raises:
        ValueError: If classes is not positive.
    """

    def __init__(self, config: SelfieConfig, classes: int, patch_net: PatchNet | None = None) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"ResNet: classes must be positive, got {classes}")
        patch_net = PatchNet(config) if patch_net is None else patch_net
        self.stem = patch_net.stem
        self.layer1, self.layer2, self.layer3 = patch_net.layer1, patch_net.layer2, patch_net.layer3
        self.layer4 = _stage(config, 3)
        self.head = nn.Linear(8 * _EXPANSION * config.width, classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, 3, S, S] -> [B, K]
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.head(self.layer4(x).mean((2, 3)))


@register_system(
    "Selfie",
    "Selfie: Self-supervised Pretraining for Image Embedding",
    "self-supervised training method",
)
class Selfie(Trainable, nn.Module):
    """Patch network, attention pool, positions.

    Args:
        config: What to build.

    Attributes:
        config: The configuration it was built from.

    Example:
        >>> import torch, vlmkernels as vk
        >>> model = vk.models.create("selfie-emoji")
        >>> sorted(model(torch.randn(2, 3, 32, 32)))
        ['accuracy', 'loss']
    """

    needs_text = False
    no_weight_decay = ("positional_embedding",)

    def __init__(self, config: SelfieConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or SelfieConfig()
        width, grid = config.feature_width, config.grid
        self.patch_net = PatchNet(config)
        self.query = nn.Parameter(0.02 * torch.randn(width))
        # One row per patch, or grid rows for the rows and grid for the columns of the grid.
        count = grid * grid if config.positions == "patch" else 2 * grid
        self.positional_embedding = nn.Parameter(0.02 * torch.randn(count, width))
        self.pool = Transformer(
            width, config.layers, config.heads, mlp_width=config.mlp_width, dropout=config.dropout
        )

    def positions(self) -> Tensor:
        """The position vectors of all patches, `[N, D]`."""
        if self.config.positions == "patch":
            return self.positional_embedding
        row, column = self.positional_embedding.chunk(2)
        return (row.unsqueeze(1) + column.unsqueeze(0)).flatten(0, 1)

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Encodes whole images to the patch network's average feature `[B, D]`."""
        check_images("Selfie.encode_image", images, self.config.image_size)
        features = self.patch_net(images)
        return F.normalize(features.float(), dim=-1) if normalize else features

    def patch_features(self, images: Tensor) -> Tensor:
        """Features of all patches, `[B, N, D]`, row by row; each patch goes through the network by itself."""
        check_images("Selfie.patch_features", images, self.config.image_size)
        patch = self.config.patch_size
        patches = F.unfold(images, patch, stride=patch).transpose(1, 2)  # [B, N, 3 p p]
        return self.patch_net(patches.reshape(-1, 3, patch, patch)).unflatten(0, patches.shape[:2])

    def draw_holes(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws which patches are removed, int64 `[B, T]`, per image."""
        order = torch.rand(count, self.config.grid**2, generator=generator).argsort(1)
        return order[:, : self.config.hole_count]

    def queries(self, features: Tensor, holes: Tensor) -> Tensor:  # [B, N, D], [B, T] -> [B, T, D]
        """`u + p_t`: what is asked of each hole, from the patches that are not holes."""
        count, patches, width = features.shape
        hidden = torch.zeros(count, patches, dtype=torch.bool, device=features.device)
        hidden.scatter_(1, holes, True)
        rest = (~hidden).nonzero()[:, 1].view(count, -1, 1).expand(-1, -1, width)
        positions = self.positions().to(features.dtype)
        context = (features + positions).gather(1, rest)
        query = self.query.to(features.dtype).expand(count, 1, -1)
        pooled = self.pool(torch.cat([query, context], dim=1))[:, :1]
        return pooled + positions[holes]

    def forward(self, images: Tensor, target_index: Tensor | None = None) -> dict[str, Tensor]:
        """The loss of picking each hole's patch among the holes of its image.

        Args:
            images: `[B, 3, S, S]`; augmented before, so that patches of one image do not overlap.
            target_index: int64 `[B, T]`, distinct patches per image; None = drawn.

        Returns:
            `loss` (mean over images and holes) and `accuracy` (share of holes whose own patch scores highest).

        Raises:
            ValueError: If shapes do not fit.
        """
        holes = self.draw_holes(len(images)).to(images.device) if target_index is None else target_index
        if holes.ndim != 2 or len(holes) != len(images) or not 1 <= holes.shape[1] < self.config.grid**2:
            raise ValueError(
                f"Selfie: target_index must be [{len(images)}, T] with T below {self.config.grid**2}, "
                f"got {list(holes.shape)}"
            )
        features = self.patch_features(images)
        queries = self.queries(features, holes)
        keys = features.gather(1, holes.unsqueeze(-1).expand(-1, -1, features.shape[-1])).to(queries.dtype)
        scale = features.shape[-1] ** -0.5 if self.config.scale_logits else 1.0
        loss = info_nce(queries.float(), keys.float(), scale)
        with torch.no_grad():
            found = (queries @ keys.transpose(1, 2)).argmax(-1)
            right = found == torch.arange(holes.shape[1], device=found.device)
        return {"loss": loss, "accuracy": right.float().mean()}

    def training_losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """The loss of a batch's pictures."""
        return self(batch.images)

    def export_backbone(self, classes: int) -> ResNet:
        """A classifier for fine-tuning: stages 1 to 3 from the patch network, stage 4 and the linear layer new."""
        return ResNet(self.config, classes, self.patch_net)


CONFIG_EMOJI = SelfieConfig(
    depths=(1, 1, 1, 1),
    width=12,
    layers=2,
    heads=8,
    mlp_width=256,
    dropout=0.0,
    scale_logits=True,
    name="selfie-emoji",
)
CONFIG_IMAGENET = SelfieConfig(
    image_size=224,
    patch_size=32,
    stem="large",
    positions="factorised",
    name="selfie-resnet50-224",
)

register_architecture("Selfie", Selfie, SelfieConfig)


@register_model("selfie-resnet50-32")
def _published(**overrides: Any) -> Selfie:
    return Selfie(replace(SelfieConfig(), name="selfie-resnet50-32").override(**overrides))


@register_model("selfie-resnet50-224")
def _imagenet(**overrides: Any) -> Selfie:
    return Selfie(CONFIG_IMAGENET.override(**overrides))


@register_model("selfie-emoji")
def _emoji(**overrides: Any) -> Selfie:
    return Selfie(CONFIG_EMOJI.override(**overrides))
