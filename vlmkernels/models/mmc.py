# SPDX-License-Identifier: Apache-2.0
"""MMC: masked momentum contrastive pretraining, for patch features that segment objects without training.

Wu et al., "Masked Momentum Contrastive Learning for Zero-shot Semantic Understanding" (2023). Only the abstract was
available: three objectives (masked image modelling makes neighbours locally alike, momentum self-distillation carries
global meaning into patches, a global contrast separates images) and the evaluation by a prompting patch
(`prompt_segmentation.py`) follow it; all details of the training are (reconstructed).

    L = w_mim L_MIM + w_mom L_mom + w_con L_con

    L_MIM  mean over masked pixels of |D(student patch) - x|
    L_mom  CE of teacher's and student's prototype distributions, class token across views, masked patches within one;
           one head for both is what passes global meaning to patches
    L_con  InfoNCE of student and teacher class tokens across views, both orders, temperature 0.2

The student alone sees masked pictures. Shapes: views `[B, 3, S, S]` float, normalised; masks bool `[B, N]`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, cast

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
from vlmkernels.models._self_distillation import (
    DistillationHead,
    Teacher,
    soft_cross_entropy,
    target_distribution,
    update_centre,
)
from vlmkernels.models._vit import PlainViT
from vlmkernels.models.clip import VisionConfig
from vlmkernels.models.training import Trainable, TrainingBatch
from vlmkernels.ops.contrastive import info_nce
from vlmkernels.systems import register_system

__all__ = ["MMC", "MMCConfig", "block_masks"]


@dataclass(frozen=True)
class MMCConfig(ModelConfig):
    """Sizes and objectives; the defaults are a ViT-S/16 (reconstructed).

    Attributes:
        vision: The backbone.
        mask_ratio: Range of the share of patches hidden from the student.
        mask_fill: What stands in their place: a learned "token", or "noise" in the pixels.
        decoder_layers: Layers of the light pixel head, 1 or 2.
        head_hidden: Hidden width of the projection heads.
        bottleneck: Width before the prototypes.
        prototypes: Number of prototypes K.
        contrast_width: Width of the contrast's projections.
        contrast_temperature: Of the contrast.
        student_temperature: tau_s.
        teacher_temperature: tau_t, from the first value to the second.
        temperature_warmup: Share of the run in which it rises.
        centre_momentum: Of the teacher's centre.
        momentum: Of the teacher's weights at the start; it rises to 1.
        mim_weight: w_mim.
        momentum_weight: w_mom.
        contrast_weight: w_con.
        name: Name of the configuration, for reports.
    """

    vision: VisionConfig = field(default_factory=lambda: VisionConfig(224, 12, 384, 16, heads=6))
    mask_ratio: tuple[float, float] = (0.3, 0.7)
    mask_fill: str = "token"
    decoder_layers: int = 1
    head_hidden: int = 2048
    bottleneck: int = 256
    prototypes: int = 8192
    contrast_width: int = 256
    contrast_temperature: float = 0.2
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    temperature_warmup: float = 0.3
    centre_momentum: float = 0.9
    momentum: float = 0.996
    mim_weight: float = 1.0
    momentum_weight: float = 1.0
    contrast_weight: float = 1.0
    name: str = ""

    def __post_init__(self) -> None:
        freeze_lists(self)
        require_positive(self, "head_hidden", "bottleneck", "prototypes", "contrast_width")
        require_positive(self, "contrast_temperature", "student_temperature")
        require_share(self, "centre_momentum", "momentum", "temperature_warmup")
        require_one_of(self, mask_fill=("token", "noise"))
        if not 0 <= self.mask_ratio[0] <= self.mask_ratio[1] < 1 or self.decoder_layers not in (1, 2):
            raise ValueError(
                "MMCConfig: mask_ratio must be a range within [0, 1) and decoder_layers 1 or 2, got "
                f"{self.mask_ratio} and {self.decoder_layers}"
            )
        if self.vision.pool != "class":
            raise ValueError("MMCConfig: vision must have a class token")


def block_masks(
    count: int, grid: int, ratio: tuple[float, float], *, generator: torch.Generator | None = None
) -> Tensor:
    """Draws masks that cover patches in blocks, as BEiT and iBOT do: rectangles until the share is reached.

    Args:
        count: B, how many masks.
        grid: Side of the grid of patches.
        ratio: Range of the share of patches that a mask covers, drawn per mask.
        generator: A CPU generator; None = torch's.

    Returns:
        Bool `[B, grid * grid]`, True = hidden; every mask covers exactly its share, rounded.
    """
    masks = torch.zeros(count, grid, grid, dtype=torch.bool)
    shares = torch.rand(count, generator=generator) * (ratio[1] - ratio[0]) + ratio[0]
    for mask, share in zip(masks, shares.tolist(), strict=True):
        wanted = round(share * grid * grid)
        while True:
            missing = wanted - int(mask.sum())
            if missing <= 0:
                break
            size, shape, down, across = torch.rand(4, generator=generator).tolist()
            area = 1 + size * (max(missing, 4) - 1)
            aspect = 0.3 ** (1 - 2 * shape)  # log-uniform from 0.3 to 1 / 0.3
            height = min(grid, max(1, round((area * aspect) ** 0.5)))
            width = min(grid, max(1, round((area / aspect) ** 0.5)))
            top, left = int(down * (grid - height + 1)), int(across * (grid - width + 1))
            mask[top : top + height, left : left + width] = True
        surplus = int(mask.sum()) - wanted
        if surplus:
            covered = mask.flatten().nonzero()[:, 0]
            mask.view(-1)[covered[torch.randperm(len(covered), generator=generator)[:surplus]]] = False
    return masks.flatten(1)


class _Student(nn.Module):
    """What the teacher copies: backbone, prototype head, contrast projection."""

    def __init__(self, config: MMCConfig) -> None:
        super().__init__()
        width = config.vision.width
        self.backbone = PlainViT(config.vision)
        self.head = DistillationHead(
            width, config.prototypes, hidden=config.head_hidden, bottleneck=config.bottleneck
        )
        self.projection = nn.Sequential(
            nn.Linear(width, config.head_hidden),
            nn.GELU(),
            nn.Linear(config.head_hidden, config.contrast_width),
        )

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Prototype logits of all tokens `[B, 1 + N, K]`, and the class token's unit projection `[B, 256]`."""
        return self.head(tokens), F.normalize(self.projection(tokens[:, 0]).float(), dim=-1)


@register_system(
    "MMC",
    "Masked Momentum Contrastive Learning for Zero-shot Semantic Understanding",
    "self-supervised training method + evaluation protocol",
)
class MMC(Trainable, nn.Module):
    """Student, momentum teacher, pixel head.

    Args:
        config: What to build.

    Attributes:
        config: The configuration it was built from.

    Example:
        >>> import torch, vlmkernels as vk
        >>> model = vk.models.create("mmc-emoji")
        >>> model.patch_features(torch.zeros(2, 3, 48, 48)).shape
        torch.Size([2, 64, 96])
    """

    needs_text = False
    needs_second_view = True
    no_weight_decay = ("positional_embedding", "class_token", "prototypes")

    centre: Tensor
    patch_centre: Tensor

    def __init__(self, config: MMCConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MMCConfig()
        width, patch = config.vision.width, config.vision.patch_size
        self.student = _Student(config)
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        pixels = 3 * patch * patch
        if config.decoder_layers == 1:
            self.pixel_head: nn.Module = nn.Linear(width, pixels)
        else:
            self.pixel_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, pixels))
        self.teacher = Teacher(self.student, config.momentum)
        self.register_buffer("centre", torch.zeros(config.prototypes))
        self.register_buffer("patch_centre", torch.zeros(config.prototypes))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.config.vision.grid, self.config.vision.grid

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Encodes images to the teacher's class token `[B, D]`."""
        check_images("MMC.encode_image", images, self.config.vision.image_size)
        features = self._teacher_tokens(images)[:, 0]
        return F.normalize(features.float(), dim=-1) if normalize else features

    def patch_features(self, images: Tensor) -> Tensor:
        """Patches of the teacher's last block after its norm, `[B, N, D]`, for `prompt_patch_segment`."""
        check_images("MMC.patch_features", images, self.config.vision.image_size)
        return self._teacher_tokens(images)[:, 1:]

    def _patches(self, images: Tensor) -> Tensor:  # [B, 3, S, S] -> [B, N, 3 p p]
        patch = self.config.vision.patch_size
        return F.unfold(images, patch, stride=patch).transpose(1, 2)

    def _hide(self, images: Tensor, mask: Tensor) -> Tensor:
        """Replaces the pixels of masked patches by noise."""
        patch = self.config.vision.patch_size
        pixels = mask.view(-1, 1, *self.grid).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
        return torch.where(pixels, torch.randn_like(images), images)

    def forward(
        self, first: Tensor, second: Tensor, masks: tuple[Tensor, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Computes the losses of two views; in training, moves the teacher's centres.

        Args:
            first: `[B, 3, S, S]`.
            second: The same pictures seen otherwise.
            masks: Bool `[B, N]` for each view; None = drawn.

        Returns:
            `loss` and its parts `l_mim`, `l_mom`, `l_con`. A part of weight 0 is not computed, and left out.
        """
        config = self.config
        check_images("MMC", first, config.vision.image_size)
        check_images("MMC", second, config.vision.image_size)
        views = torch.cat([first, second])
        if masks is None:
            mask = block_masks(len(views), config.vision.grid, config.mask_ratio).to(views.device)
        else:
            mask = torch.cat(masks)
        token = config.mask_fill == "token"
        seen = self.student.backbone(
            views if token else self._hide(views, mask), mask if token else None, self.mask_token
        )
        losses: dict[str, Tensor] = {}
        if config.mim_weight:
            wrong = (self.pixel_head(seen[:, 1:]).float() - self._patches(views)).abs().mean(-1)
            losses["l_mim"] = (wrong * mask).sum() / mask.sum().clamp(min=1)
        if config.momentum_weight or config.contrast_weight:
            student_logits, student_global = self.student(seen)
            teacher_logits, teacher_global = self.teacher(self._teacher_tokens(views))
        if config.momentum_weight:
            losses["l_mom"] = self._momentum_loss(student_logits, teacher_logits, mask)
        if config.contrast_weight:
            scale = 1.0 / config.contrast_temperature
            other = teacher_global.roll(len(first), 0)  # the other view of every picture
            halves = zip(student_global.chunk(2), other.chunk(2), strict=True)
            terms = [info_nce(queries, keys, scale) for queries, keys in halves]
            losses["l_con"] = terms[0] + terms[1]
        weights = {
            "l_mim": config.mim_weight,
            "l_mom": config.momentum_weight,
            "l_con": config.contrast_weight,
        }
        total = sum((weights[name] * value for name, value in losses.items()), seen.new_zeros(()))
        return {"loss": total, **losses}

    @torch.no_grad()
    def _teacher_tokens(self, views: Tensor) -> Tensor:
        return cast(_Student, self.teacher.network).backbone(views)

    def _momentum_loss(self, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy of the class token across views plus that of masked patches within a view."""
        config = self.config
        temperature = self.teacher.temperature(*config.teacher_temperature, config.temperature_warmup)
        half = len(student) // 2
        targets = target_distribution(teacher[:, 0], self.centre, temperature).roll(half, 0)
        whole = soft_cross_entropy(targets, student[:, 0], config.student_temperature).mean()
        # Only masked positions: distributions over K prototypes for all patches would be the largest tensors here.
        hidden = target_distribution(teacher[:, 1:][mask], self.patch_centre, temperature)
        parts = soft_cross_entropy(hidden, student[:, 1:][mask], config.student_temperature)
        if self.training:
            update_centre(self.centre, teacher[:, 0], config.centre_momentum)
            update_centre(self.patch_centre, teacher[:, 1:], config.centre_momentum)
        return whole + parts.sum() / mask.sum().clamp(min=1)

    def training_losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """The losses of two augmented views of a batch's pictures."""
        if batch.second_images is None:
            raise ValueError("MMC: training needs a second view of the pictures")
        return self(batch.images, batch.second_images)

    def after_step(self, step: int, total: int) -> None:
        """Moves the teacher towards the student."""
        self.teacher.update(self.student, step, total)


CONFIG_EMOJI = MMCConfig(
    vision=VisionConfig(image_size=48, layers=3, width=96, patch_size=6, heads=4),
    head_hidden=256,
    bottleneck=64,
    prototypes=512,
    contrast_width=64,
    momentum=0.98,
    name="mmc-emoji",
)

register_architecture("MMC", MMC, MMCConfig)


@register_model("mmc-ViT-S-16")
def _published(**overrides: Any) -> MMC:
    return MMC(replace(MMCConfig(), name="mmc-ViT-S-16").override(**overrides))


@register_model("mmc-emoji")
def _emoji(**overrides: Any) -> MMC:
    return MMC(CONFIG_EMOJI.override(**overrides))
