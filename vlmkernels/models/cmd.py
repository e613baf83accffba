# SPDX-License-Identifier: Apache-2.0
"""CMD: self-distillation of fine-grained pictures across levels, a picture being a bag of regions.

Bi et al., "Cross-Level Multi-Instance Distillation for Self-Supervised Fine-Grained Visual Categorization" (2024),
built on EsViT and DINO. Beside matching teacher and student at the level of the image and of regions (intra-level),
the image's distribution must agree with the aggregate of its own regions (inter-level), so that the few telling
patches decide the image's embedding.

    L = L_intra / P + w L_inter / P,  over the P pairs (teacher's global view a, student's view b != a)
    L_intra += 0.5 CE(q, p) + 0.5 mean_i CE(Q_j*(i), P_i),  j*(i) = argmax_j cos(F_i, F_j)
    L_inter += KL(bag || image) of the student's view b, and of the teacher's view a (which has no gradient)

The released lines pass probabilities or raw logits to `F.kl_div` where log-probabilities belong, sum over regions
(which is no distribution) and divide by B * K; `inter="released"` repeats them, with terms of negative targets zeroed
as older versions of torch did. `inter="kl"` is what they mean (reconstructed): the bag is a weighted mean of the
regions' probabilities.

Shapes: views `[B, 3, H, W]` float, normalised; region features `[B, T, C]`; logits `[B, K]` and `[B, T, K]`.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from vlmkernels.models.clip import VisionConfig
from vlmkernels.models.swin import Swin, SwinConfig
from vlmkernels.models.training import Trainable, TrainingBatch
from vlmkernels.ops.topk import topk_similarity
from vlmkernels.systems import register_system

__all__ = [
    "CMD",
    "CMDConfig",
    "CMDLoss",
    "ViewOutput",
    "random_crops",
    "region_match",
    "retrieval_metrics",
]


@dataclass(frozen=True)
class CMDConfig(ModelConfig):
    """Backbone, heads, views and objectives; the defaults are the paper's Swin-T with windows of 14.

    Attributes:
        swin: The backbone, of which student and teacher have one each (the teacher drops no path).
        prototypes: K.
        head_hidden: Hidden width of both heads.
        bottleneck: Their width before the prototypes.
        local_crops: Small crops, which the student alone sees.
        local_size: Their side.
        local_scale: Range of the area they cover.
        global_scale: Range of the area of the two global crops; (1, 1) where the data loader has cropped.
        student_temperature: tau_s.
        teacher_temperature: tau_t, from the first value to the second.
        temperature_warmup: Share of the run in which it rises (30 of 300 epochs).
        frozen_share: Share of the run in which the last layers stay fixed (1 epoch).
        centre_momentum: Of both centres.
        momentum: Of the teacher's weights at the start; it rises to 1.
        image_weight: Weight of the image-level term within L_intra.
        region_weight: Weight of the region-level term within L_intra; 0 leaves DINO, times image_weight.
        inter_weight: w; 0 leaves EsViT.
        aggregator: "mean" of the regions, or "attention" (gated multi-instance pool).
        inter: "kl" or "released".
        image_mean: What `vk.data.transform_for` subtracts.
        image_std: What it divides by.
        name: Name of the configuration, for reports.
    """

    swin: SwinConfig = field(default_factory=lambda: SwinConfig(window=14))
    prototypes: int = 65536
    head_hidden: int = 2048
    bottleneck: int = 256
    local_crops: int = 8
    local_size: int = 96
    local_scale: tuple[float, float] = (0.05, 0.4)
    global_scale: tuple[float, float] = (0.4, 1.0)
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    temperature_warmup: float = 0.1
    frozen_share: float = 1 / 300
    centre_momentum: float = 0.9
    momentum: float = 0.996
    image_weight: float = 0.5
    region_weight: float = 0.5
    inter_weight: float = 1.0
    aggregator: str = "mean"
    inter: str = "kl"
    image_mean: tuple[float, float, float] = field(default_factory=lambda: VisionConfig().image_mean)
    image_std: tuple[float, float, float] = field(default_factory=lambda: VisionConfig().image_std)
    name: str = ""

    def __post_init__(self) -> None:
        freeze_lists(self)
        require_positive(self, "prototypes", "head_hidden", "bottleneck", "local_size", "student_temperature")
        require_share(self, "temperature_warmup", "frozen_share", "centre_momentum", "momentum")
        require_one_of(self, aggregator=("mean", "attention"), inter=("kl", "released"))
        if self.local_crops < 0 or self.local_size % self.swin.patch_size:
            raise ValueError(
                "CMDConfig: local_crops must not be negative and local_size a multiple of the patch, got "
                f"{self.local_crops} and {self.local_size}"
            )

    @property
    def vision(self) -> VisionConfig:
        """What `vk.data.transform_for` reads."""
        size = self.swin.image_size
        return VisionConfig(size, patch_size=size, image_mean=self.image_mean, image_std=self.image_std)


@dataclass
class ViewOutput:
    """What a network says about one view.

    Attributes:
        image_logits: `[B, K]`.
        region_logits: `[B, T, K]`.
        regions: Features `[B, T, C]`.
        weights: Weights of the regions in the bag, `[B, T]`, of sum 1.
    """

    image_logits: Tensor
    region_logits: Tensor
    regions: Tensor
    weights: Tensor


def region_match(student: Tensor, teacher: Tensor) -> Tensor:  # [B, T, C], [B, U, C] -> [B, T]
    """For each of the student's regions the most similar one of the teacher's (by cosine), in the same picture."""
    if student.ndim != 3 or student.shape[::2] != teacher.shape[::2]:
        raise ValueError(
            f"region_match: expected [B, T, C] and [B, U, C], got {list(student.shape)} and {list(teacher.shape)}"
        )
    with torch.no_grad():
        # A picture has at most some fifty regions: these matrices are small.
        cosines = F.normalize(student.float(), dim=-1) @ F.normalize(teacher.float(), dim=-1).transpose(1, 2)
        return cosines.argmax(-1)


class _AttentionWeights(nn.Module):
    """Gated multi-instance attention, `softmax_k(w^t tanh(V F_k))` (Ilse et al. 2018)."""

    def __init__(self, width: int, hidden: int = 128) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(self, regions: Tensor) -> Tensor:  # [B, T, C] -> [B, T]
        return self.score(self.hidden(regions).tanh()).squeeze(-1).float().softmax(-1)


class CMDLoss(nn.Module):
    """The losses of a set of views, and the teacher's centres.

    Args:
        prototypes: K.
        image_weight: Of the image-level term.
        region_weight: Of the region-level term.
        inter_weight: Of the inter-level terms.
        inter: "kl" or "released".
        student_temperature: tau_s.
        centre_momentum: Of both centres.
    """

    centre: Tensor
    region_centre: Tensor

    def __init__(
        self,
        prototypes: int,
        *,
        image_weight: float = 0.5,
        region_weight: float = 0.5,
        inter_weight: float = 1.0,
        inter: str = "kl",
        student_temperature: float = 0.1,
        centre_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if inter not in ("kl", "released"):
            raise ValueError(f"CMDLoss: inter must be 'kl' or 'released', got {inter!r}")
        self.image_weight, self.region_weight, self.inter_weight = image_weight, region_weight, inter_weight
        self.inter, self.student_temperature, self.centre_momentum = (
            inter,
            student_temperature,
            centre_momentum,
        )
        self.register_buffer("centre", torch.zeros(prototypes))
        self.register_buffer("region_centre", torch.zeros(prototypes))

    def forward(
        self, student: Sequence[ViewOutput], teacher: Sequence[ViewOutput], temperature: float
    ) -> dict[str, Tensor]:
        """Computes the losses; in training, moves the centres.

        Args:
            student: Views in their order, global ones first.
            teacher: The global views.
            temperature: tau_t.

        Returns:
            `loss` and `l_image`, `l_region`, `l_inter` (student's) and `l_inter_teacher` (no gradient), each a mean
            over the pairs of views.

        Raises:
            ValueError: If there is no pair of different views.
        """
        pairs = [(a, b) for a in range(len(teacher)) for b in range(len(student)) if a != b]
        if not pairs:
            raise ValueError("CMDLoss: there must be a student's view that is not the teacher's")
        image_targets = [target_distribution(v.image_logits, self.centre, temperature) for v in teacher]
        region_targets = [
            target_distribution(v.region_logits, self.region_centre, temperature) for v in teacher
        ]
        image = region = inter = inter_teacher = student[0].image_logits.new_zeros((), dtype=torch.float32)
        student_inter = [self._inter_student(view) if self.inter_weight else image for view in student]
        teacher_inter = [
            self._inter_teacher(q, Q, view.weights)
            for q, Q, view in zip(image_targets, region_targets, teacher, strict=True)
        ]
        for a, b in pairs:
            if self.image_weight:
                terms = soft_cross_entropy(
                    image_targets[a], student[b].image_logits, self.student_temperature
                )
                image = image + terms.mean()
            if self.region_weight:
                region = region + self._region(student[b], teacher[a], region_targets[a])
            inter = inter + student_inter[b]
            inter_teacher = inter_teacher + teacher_inter[a]
        if self.training:
            update_centre(self.centre, torch.cat([v.image_logits for v in teacher]), self.centre_momentum)
            update_centre(
                self.region_centre, torch.cat([v.region_logits for v in teacher]), self.centre_momentum
            )
        losses = {
            "l_image": image / len(pairs),
            "l_region": region / len(pairs),
            "l_inter": inter / len(pairs),
            "l_inter_teacher": inter_teacher / len(pairs),
        }
        intra = self.image_weight * losses["l_image"] + self.region_weight * losses["l_region"]
        return {"loss": intra + self.inter_weight * losses["l_inter"], **losses}

    def _region(self, student: ViewOutput, teacher: ViewOutput, targets: Tensor) -> Tensor:
        match = region_match(student.regions, teacher.regions)
        matched = targets.gather(1, match.unsqueeze(-1).expand(-1, -1, targets.shape[-1]))
        return soft_cross_entropy(matched, student.region_logits, self.student_temperature).mean()

    def _inter_student(self, view: ViewOutput) -> Tensor:
        """KL(bag || image) of the student."""
        image = view.image_logits.float() / self.student_temperature
        regions = view.region_logits.float() / self.student_temperature
        if self.inter == "released":
            return _released_kl(image, regions.sum(1))
        bag = (view.weights.unsqueeze(-1) * regions.softmax(-1)).sum(1)
        return (torch.xlogy(bag, bag) - bag * image.log_softmax(-1)).sum(-1).mean()

    @torch.no_grad()
    def _inter_teacher(self, image: Tensor, regions: Tensor, weights: Tensor) -> Tensor:
        """KL(bag || image) of the teacher: a constant, for the log."""
        if self.inter == "released":
            return _released_kl(image, regions.sum(1))
        bag = (weights.unsqueeze(-1) * regions).sum(1)
        return (torch.xlogy(bag, bag) - torch.xlogy(bag, image)).sum(-1).mean()


def _released_kl(given: Tensor, target: Tensor) -> Tensor:
    """`F.kl_div(given, target)` with its element mean, as released: `given` is not in log space, and targets that are
    not positive count 0, as in the torch of that time (today's gives NaN)."""
    log_target = target.clamp(min=torch.finfo(target.dtype).tiny).log()
    return torch.where(target > 0, target * (log_target - given), 0.0).mean()


def random_crops(
    images: Tensor, size: int, scale: tuple[float, float], *, ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> Tensor:
    """One random rectangle per picture, resampled to a square; draws from torch's generator.

    Args:
        images: `[B, 3, S, S]`.
        size: Side of what comes out.
        scale: Range of the area, as a share of the picture's.
        ratio: Range of width to height, log-uniform.

    Returns:
        `[B, 3, size, size]`.
    """
    count, device = len(images), images.device
    area, shape, across, down = torch.rand(4, count, device=device)
    area = scale[0] + (scale[1] - scale[0]) * area
    low, high = torch.tensor(ratio).log().tolist()
    aspect = (low + (high - low) * shape).exp()
    width, height = (area * aspect).sqrt().clamp(max=1.0), (area / aspect).sqrt().clamp(max=1.0)
    theta = torch.zeros(count, 2, 3, device=device)
    theta[:, 0, 0], theta[:, 1, 1] = width, height
    theta[:, 0, 2], theta[:, 1, 2] = (2 * across - 1) * (1 - width), (2 * down - 1) * (1 - height)
    grid = F.affine_grid(theta, [count, 3, size, size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


class _Network(nn.Module):
    """What the teacher copies: backbone, both heads, the weights of the bag."""

    def __init__(self, config: CMDConfig) -> None:
        super().__init__()
        width = config.swin.out_width
        sizes = {"hidden": config.head_hidden, "bottleneck": config.bottleneck}
        self.backbone = Swin(config.swin)
        self.image_head = DistillationHead(width, config.prototypes, **sizes)
        self.region_head = DistillationHead(width, config.prototypes, **sizes)
        self.attention = _AttentionWeights(width) if config.aggregator == "attention" else None

    def forward(self, images: Tensor) -> ViewOutput:
        regions = self.backbone(images)
        if self.attention is None:
            weights = regions.new_full(regions.shape[:2], 1.0 / regions.shape[1], dtype=torch.float32)
        else:
            weights = self.attention(regions)
        return ViewOutput(self.image_head(regions.mean(1)), self.region_head(regions), regions, weights)


@register_system(
    "CMD",
    "Cross-Level Multi-Instance Distillation for Self-Supervised Fine-Grained Visual Categorization",
    "self-supervised training method",
)
class CMD(Trainable, nn.Module):
    """Student, momentum teacher and the cross-level loss.

    Args:
        config: What to build.

    Attributes:
        config: The configuration it was built from.

    Example:
        >>> import torch, vlmkernels as vk
        >>> model = vk.models.create("cmd-emoji")
        >>> model.encode_image(torch.zeros(2, 3, 48, 48)).shape
        torch.Size([2, 96])
    """

    needs_text = False
    needs_second_view = True
    no_weight_decay = ("positional_embedding", "relative_bias", "prototypes")
    may_leave_unused = True  # the last layers, while they are frozen

    def __init__(self, config: CMDConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or CMDConfig()
        self.student = _Network(config)
        self.teacher = Teacher(self.student, config.momentum)
        self.criterion = CMDLoss(
            config.prototypes,
            image_weight=config.image_weight,
            region_weight=config.region_weight,
            inter_weight=config.inter_weight,
            inter=config.inter,
            student_temperature=config.student_temperature,
            centre_momentum=config.centre_momentum,
        )

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Encodes images to the mean of the teacher's regions, `[B, C]`."""
        check_images("CMD.encode_image", images, self.config.swin.image_size)
        features = cast(_Network, self.teacher.network).backbone(images).mean(1)
        return F.normalize(features.float(), dim=-1) if normalize else features

    def region_weights(self, images: Tensor) -> Tensor:
        """How much each region counts in the teacher's bag, `[B, T]`, row by row of the last feature map."""
        check_images("CMD.region_weights", images, self.config.swin.image_size)
        return self.teacher(images).weights

    def forward(
        self, global_views: Sequence[Tensor], local_views: Sequence[Tensor] = ()
    ) -> dict[str, Tensor]:
        """Computes the losses of views of one batch of pictures.

        Args:
            global_views: Two large crops, `[B, 3, S, S]` each, for teacher and student.
            local_views: Small crops, `[B, 3, s, s]`, for the student.

        Returns:
            See `CMDLoss.forward`.
        """
        frozen = self.training and float(self.teacher.progress) < self.config.frozen_share
        for head in (self.student.image_head, self.student.region_head):
            head.frozen = frozen
        student = [*self._split(self.student, global_views), *self._split(self.student, local_views)]
        teacher = self._split(self.teacher, global_views)
        temperature = self.teacher.temperature(
            *self.config.teacher_temperature, self.config.temperature_warmup
        )
        return self.criterion(student, teacher, temperature)

    @staticmethod
    def _split(network: nn.Module, views: Sequence[Tensor]) -> list[ViewOutput]:
        """Runs views of one size in one call."""
        if not views:
            return []
        out = network(torch.cat(list(views)))
        parts = (t.chunk(len(views)) for t in (out.image_logits, out.region_logits, out.regions, out.weights))
        return [ViewOutput(*view) for view in zip(*parts, strict=True)]

    def training_losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """The losses of two global crops and local ones of a batch's pictures."""
        if batch.second_images is None:
            raise ValueError("CMD: training needs a second view of the pictures")
        config = self.config
        views = [batch.images, batch.second_images]
        wide = [random_crops(v, config.swin.image_size, config.global_scale) for v in views]
        local = [
            random_crops(views[i % 2], config.local_size, config.local_scale)
            for i in range(config.local_crops)
        ]
        return self(wide, local)

    def after_step(self, step: int, total: int) -> None:
        """Moves the teacher towards the student."""
        self.teacher.update(self.student, step, total)


def retrieval_metrics(
    features: Tensor,  # [N, C]
    labels: Tensor,  # [N]
    *,
    queries: Tensor | None = None,  # [N]
    cut: int = 100,
) -> dict[str, float]:
    """Retrieval of pictures with the same label: Rank-1, Rank-5 and mean average precision cut at `cut`.

    Args:
        features: `[N, C]`; compared by cosine.
        labels: int64 `[N]`.
        queries: Bool `[N]`, True = a query, the rest is the gallery; None = every ninth picture, as in the paper.
        cut: Ranks that count for the average precision.

    Returns:
        `rank1`, `rank5`, `map`, shares of the queries whose label is in the gallery.

    Raises:
        ValueError: If no query has its label in the gallery.
    """
    if queries is None:
        queries = torch.arange(len(labels)) % 9 == 0
    asked, gallery = labels[queries], labels[~queries]
    known = torch.isin(asked, gallery)
    if not bool(known.any()):
        raise ValueError("retrieval_metrics: no query has its label in the gallery")
    cut = min(cut, len(gallery))
    _, found = topk_similarity(
        features[queries][known].float(), features[~queries].float(), cut, metric="cosine"
    )
    right = (gallery[found] == asked[known].unsqueeze(1)).float()
    precision = right.cumsum(1) / torch.arange(1, cut + 1)
    relevant = (gallery.unsqueeze(0) == asked[known].unsqueeze(1)).sum(1).clamp(max=cut)
    return {
        "rank1": float(right[:, 0].mean()),
        "rank5": float(right[:, :5].amax(1).mean()),
        "map": float(((precision * right).sum(1) / relevant).mean()),
    }


CONFIG_EMOJI = CMDConfig(
    swin=SwinConfig(
        image_size=48, patch_size=4, width=48, depths=(2, 2), heads=(2, 4), window=6, drop_path=0.0
    ),
    prototypes=512,
    head_hidden=256,
    bottleneck=64,
    local_crops=2,
    local_size=24,
    local_scale=(0.15, 0.5),
    global_scale=(0.6, 1.0),
    frozen_share=0.02,
    momentum=0.98,
    name="cmd-emoji",
)

register_architecture("CMD", CMD, CMDConfig)


@register_model("cmd-swin-tiny-w14")
def _published(**overrides: Any) -> CMD:
    return CMD(replace(CMDConfig(), name="cmd-swin-tiny-w14").override(**overrides))


@register_model("cmd-emoji")
def _emoji(**overrides: Any) -> CMD:
    return CMD(CONFIG_EMOJI.override(**overrides))
