# SPDX-License-Identifier: Apache-2.0
"""Knowledge Concentration: many specialist classifiers compressed into one network over all their classes.

Gao et al., "Knowledge Concentration: Learning 100K Object Classifiers in a Single CNN" (2017). Three parts: soft
targets from the specialist of the sample's vertical (birds, cars, dishes, ...), an output layer split by vertical, and
a learned scale per vertical that lets verticals learn at their own pace.

    z* = the K = 100 largest sigma(specialist_v(x)) inside the vertical V_v of the sample, 0 everywhere else
    y_v = gamma_v x_v / |x_v|,  x_v the logits of vertical v
    L = -(1/B) sum_i sum_j [z*_ij log sigma(y_ij) + (1 - z*_ij) log(1 - sigma(y_ij))]

Labels nest (a robin is a bird), so both sides are sigmoids. Zeroing follows the teacher's sigmoid. A class that lies
in several verticals needs one output per vertical. (reconstructed): ReLU between layers; the norm taken over the N_v
logits of the vertical; the optional bias per class after scaling.

The loss and its gradients are computed vertical by vertical: the [B, N] logits of 100,000 classes never exist, only
[B, N_v]. Shapes: images `[B, 3, S, S]`; features `[B, D]`; targets sparse, K a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from vlmkernels.models.clip import VisionConfig, VisionTransformer
from vlmkernels.models.training import Trainable, TrainingBatch, TrainingFacts
from vlmkernels.nn.linear import Linear
from vlmkernels.systems import register_system

__all__ = [
    "KnowledgeConcentration",
    "KnowledgeConcentrationConfig",
    "SparseTargets",
    "StructurallyConnectedHead",
    "average_precision",
    "concentrated_targets",
    "multi_teacher_bce",
]


@dataclass
class SparseTargets:
    """Soft targets that are 0 but for a few classes.

    Attributes:
        indices: int64 `[B, K]`, global class numbers, distinct within a row; -1 = unused.
        values: float32 `[B, K]`, in [0, 1]; 0 where unused.
    """

    indices: Tensor
    values: Tensor

    def dense(self, classes: int) -> Tensor:
        """Returns `[B, N]`."""
        out = self.values.new_zeros(len(self.values), classes + 1)
        # Unused entries go to one column more, which is cut off.
        return out.scatter_(1, self.indices % (classes + 1), self.values)[:, :classes]

    def within(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Indices into classes start .. end - 1 and values, those outside being 0 at index 0."""
        inside = (self.indices >= start) & (self.indices < end)
        return torch.where(inside, self.indices - start, 0), torch.where(inside, self.values, 0.0)


def concentrated_targets(
    teacher_probs: Tensor,  # [B, W]
    vertical: Tensor,  # [B]
    offsets: Tensor,  # [M + 1]
    k: int = 100,
) -> SparseTargets:
    """Keeps the k largest of the specialists' probabilities, each inside the sample's own vertical.

    Args:
        teacher_probs: Row i begins with the N_v probabilities of its specialist, v = vertical[i]; what follows in the
            row is ignored. W is at least the largest N_v.
        vertical: int64 `[B]`.
        offsets: int64 `[M + 1]`, first class of every vertical, and N.
        k: Scores kept; from N_v on all of them.

    Returns:
        Targets of `[B, min(k, W)]`.

    Raises:
        ValueError: If shapes do not fit or k is not positive.
    """
    if k < 1 or teacher_probs.ndim != 2 or vertical.shape != teacher_probs.shape[:1]:
        raise ValueError(
            "concentrated_targets: expected teacher_probs [B, W], vertical [B] and k > 0, got "
            f"{list(teacher_probs.shape)}, {list(vertical.shape)} and {k}"
        )
    start, end = offsets[vertical], offsets[vertical + 1]
    own = torch.arange(teacher_probs.shape[1], device=teacher_probs.device) < (end - start).unsqueeze(1)
    values, indices = teacher_probs.masked_fill(~own, -1.0).topk(min(k, teacher_probs.shape[1]), dim=1)
    kept = values >= 0
    return SparseTargets(
        torch.where(kept, indices + start.unsqueeze(1), -1), torch.where(kept, values, 0.0).float()
    )


def multi_teacher_bce(logits: Tensor, targets: Tensor) -> Tensor:  # [B, N], [B, N]
    """Sigmoid cross-entropy with soft targets, summed over classes and averaged over samples.

    Example:
        >>> round(float(multi_teacher_bce(torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[0.9, 0.0, 0.4]]))), 6)
        1.414267
    """
    return (F.softplus(logits) - targets * logits).sum(-1).mean()


class StructurallyConnectedHead(nn.Module):
    """Two hidden layers and N outputs in M verticals, each fed by its own hidden vector.

    Layouts (weights without biases; s_b = in_dim):

        (a) FC(s1)-FC(s2)      shared=s2           s_b s1 + s1 s2 + s2 N
        (b) FC(s1)-SC(s2)      shared=0            s_b s1 + s1 s2 M + s2 N
        (c) SC(s1)-SC(s2)      first="sc"          s_b s1 M + s1 s2 M + s2 N
        (d) FC(s1)-SC(s2, x)   shared=x            s_b s1 + s1 x + s1 (s2 - x) M + s2 N

    Args:
        in_dim: Width s_b of the features.
        s1: Width of the first hidden layer (per vertical with "sc").
        s2: Width of each vertical's hidden vector.
        vertical_sizes: Classes N_v of the M verticals.
        first: "fc" or "sc".
        shared: Units x of s2 that all verticals share.
        pace: None (plain logits), "vertical" (one gamma each, the best) or "class".
        pace_init: "sqrt" for sqrt(N_v) (the best) or "10"; plus noise of deviation 1e-3.
        bias: Biases of the hidden layers.
        class_bias: A bias per class, after scaling.

    Attributes:
        offsets: First class of every vertical, and N.

    Raises:
        ValueError: If sizes do not fit.
    """

    def __init__(
        self,
        in_dim: int,
        s1: int,
        s2: int,
        vertical_sizes: Sequence[int],
        *,
        first: str = "fc",
        shared: int = 0,
        pace: str | None = "vertical",
        pace_init: str = "sqrt",
        bias: bool = True,
        class_bias: bool = False,
    ) -> None:
        super().__init__()
        sizes = tuple(int(n) for n in vertical_sizes)
        if not sizes or min(sizes) < 1 or min(in_dim, s1, s2) < 1 or not 0 <= shared <= s2:
            raise ValueError(
                "StructurallyConnectedHead: widths and vertical sizes must be positive and shared lie in [0, s2], got "
                f"in_dim {in_dim}, s1 {s1}, s2 {s2}, shared {shared}, vertical_sizes {sizes[:5]}"
            )
        if (
            first not in ("fc", "sc")
            or pace not in (None, "vertical", "class")
            or pace_init not in ("sqrt", "10")
        ):
            raise ValueError(
                "StructurallyConnectedHead: first must be 'fc' or 'sc', pace None, 'vertical' or 'class', pace_init "
                f"'sqrt' or '10', got {first!r}, {pace!r}, {pace_init!r}"
            )
        if first == "sc" and shared:
            raise ValueError("StructurallyConnectedHead: shared units need first='fc'")
        self.vertical_sizes, self.first, self.shared, self.s1, self.s2 = sizes, first, shared, s1, s2
        self.pace = pace
        verticals = len(sizes)
        self.layer1 = Linear(in_dim, s1 * (verticals if first == "sc" else 1), bias=bias)
        self.layer2_shared = Linear(s1, shared, bias=bias) if shared else None
        own = s2 - shared
        # One product for all verticals where they share their input, M small ones where they do not.
        self.layer2_weight = nn.Parameter(torch.empty(verticals, own, s1)) if own else None
        self.layer2_bias = nn.Parameter(torch.zeros(verticals, own)) if own and bias else None
        self.weight = nn.Parameter(torch.empty(sum(sizes), s2))
        for weight in (self.layer2_weight, self.weight):
            if weight is not None:
                nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        self.class_bias = nn.Parameter(torch.zeros(sum(sizes))) if class_bias else None
        self.gamma: nn.Parameter | None = None
        if pace is not None:
            start = torch.tensor([math.sqrt(n) if pace_init == "sqrt" else 10.0 for n in sizes])
            if pace == "class":
                start = start.repeat_interleave(torch.tensor(sizes))
            self.gamma = nn.Parameter(start + 1e-3 * torch.randn(len(start)))

    @property
    def classes(self) -> int:
        """Number of classes N."""
        return len(self.weight)

    @property
    def offsets(self) -> list[int]:
        """First class of every vertical, and N."""
        out = [0]
        for size in self.vertical_sizes:
            out.append(out[-1] + size)
        return out

    def weight_count(self) -> int:
        """Number of weights without biases and scales, as the paper counts."""
        weights = [self.layer1.weight, self.weight, self.layer2_weight]
        weights.append(None if self.layer2_shared is None else self.layer2_shared.weight)
        return sum(w.numel() for w in weights if w is not None)

    def hidden(self, features: Tensor) -> Tensor:  # [B, D] -> [M, B, s2]
        """The hidden vector of every vertical, after the second ReLU."""
        verticals = len(self.vertical_sizes)
        x = F.relu(self.layer1(features))
        parts = []
        if self.layer2_shared is not None:
            parts.append(F.relu(self.layer2_shared(x)).expand(verticals, -1, -1))
        if self.layer2_weight is not None:
            if self.first == "sc":
                own = torch.einsum(
                    "bms,mts->mbt", x.unflatten(-1, (verticals, -1)), self.layer2_weight.to(x.dtype)
                )
            else:
                own = F.linear(x, self.layer2_weight.flatten(0, 1).to(x.dtype))
                own = own.unflatten(-1, (verticals, -1)).transpose(0, 1)
            if self.layer2_bias is not None:
                own = own + self.layer2_bias.unsqueeze(1)
            parts.append(F.relu(own))
        return parts[0] if len(parts) == 1 else torch.cat([p.to(parts[0].dtype) for p in parts], dim=-1)

    def vertical_logits(self, hidden: Tensor, vertical: int) -> Tensor:  # [B, s2] -> [B, N_v]
        """The scaled logits y of one vertical, float32."""
        return _paced_logits(hidden, *self._of_vertical(vertical))

    def _of_vertical(self, vertical: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Weight, gamma and bias of a vertical's classes."""
        start, end = self.offsets[vertical : vertical + 2]
        gamma = self.gamma
        if gamma is not None:
            gamma = gamma[start:end] if self.pace == "class" else gamma[vertical]  # type: ignore[assignment]
        return self.weight[start:end], gamma, None if self.class_bias is None else self.class_bias[start:end]

    def forward(self, features: Tensor) -> Tensor:  # [B, D] -> [B, N]
        """All logits, `[B, N]`: for evaluation."""
        hidden = self.hidden(features)
        return torch.cat([self.vertical_logits(h, v) for v, h in enumerate(hidden)], dim=-1)

    def loss(self, features: Tensor, targets: SparseTargets) -> Tensor:  # [B, D]
        """The sigmoid cross-entropy over all N classes, one vertical's logits at a time.

        Equals `multi_teacher_bce(self(features), targets.dense(N))` in memory of O(B max N_v).
        """
        if len(targets.values) != len(features):
            raise ValueError(
                f"StructurallyConnectedHead.loss: expected targets of {len(features)} rows, got {len(targets.values)}"
            )
        hidden = self.hidden(features)
        total = hidden.new_zeros((), dtype=torch.float32)
        offsets = self.offsets
        for v, h in enumerate(hidden):
            part = targets.within(offsets[v], offsets[v + 1])
            total = total + _VerticalLoss.apply(*part, h, *self._of_vertical(v))
        return total / max(len(features), 1)


def _paced_logits(hidden: Tensor, weight: Tensor, gamma: Tensor | None, bias: Tensor | None) -> Tensor:
    x = F.linear(hidden, weight.to(hidden.dtype)).float()
    if gamma is not None:
        x = gamma * F.normalize(x, dim=-1)
    return x if bias is None else x + bias


class _VerticalLoss(torch.autograd.Function):
    """Summed sigmoid cross-entropy of one vertical, whose gradients are taken in forward, while its logits exist."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, values: Tensor, *inputs: Tensor | None) -> Tensor:
        needed = [i for i, x in enumerate(inputs) if x is not None and ctx.needs_input_grad[2 + i]]
        with torch.enable_grad():
            leaves = [
                None if x is None else x.detach().requires_grad_(i in needed) for i, x in enumerate(inputs)
            ]
            logits = _paced_logits(*leaves)  # type: ignore[arg-type]
            # softplus over all classes; the targets touch only their few.
            loss = F.softplus(logits).sum() - (values * logits.gather(1, indices)).sum()
            wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
            found = torch.autograd.grad(loss, wanted) if wanted else ()
        ctx.needed = needed
        ctx.save_for_backward(*found)
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out: list[Tensor | None] = [None] * 6
        for i, found in zip(ctx.needed, ctx.saved_tensors, strict=True):
            out[2 + i] = grad * found
        return tuple(out)


def average_precision(scores: Tensor, relevant: Tensor) -> Tensor:  # [B, C], [B, C]
    """Average precision of every class, `[C]`; NaN for classes without a relevant sample.

    Args:
        scores: Of samples (rows) for classes (columns).
        relevant: Bool `[B, C]`.
    """
    order = scores.argsort(dim=0, descending=True, stable=True)
    hits = relevant.gather(0, order).float()
    precision = hits.cumsum(0) / torch.arange(1, len(scores) + 1, device=scores.device).unsqueeze(1)
    return (precision * hits).sum(0) / hits.sum(0)


@dataclass(frozen=True)
class KnowledgeConcentrationConfig(ModelConfig):
    """A student, its specialists and how it learns from them.

    Attributes:
        vision: Image tower of the student. The paper's is an Inception-V2; a ViT stands in (reconstructed).
        specialist: Image tower of each specialist.
        feature_width: Width s_b of the student's features.
        specialist_width: Width of a specialist's features.
        s1: First hidden layer of the head.
        s2: Hidden vector per vertical.
        first: "fc" or "sc".
        shared: Units of s2 shared by all verticals.
        vertical_sizes: Classes per vertical; empty = taken from the data before training (their groups, each with its
            subgroups and its names).
        class_names: Names of the classes, in order.
        k: Teacher scores kept per sample.
        targets: "soft" (from the specialists) or "hard" (the labels), the ablation.
        pace: "vertical", "class" or "none".
        pace_init: "sqrt" or "10".
        class_bias: A bias per class after scaling.
        specialist_share: Share of the run that trains the specialists, before the student learns from them.
        name: Name of the configuration, for reports.
    """

    vision: VisionConfig = field(default_factory=lambda: VisionConfig(224, 12, 768, 16))
    specialist: VisionConfig = field(default_factory=lambda: VisionConfig(224, 12, 768, 16))
    feature_width: int = 1024
    specialist_width: int = 1024
    s1: int = 4096
    s2: int = 512
    first: str = "fc"
    shared: int = 0
    vertical_sizes: tuple[int, ...] = (5000,) * 20
    class_names: tuple[str, ...] = ()
    k: int = 100
    targets: str = "soft"
    pace: str = "vertical"
    pace_init: str = "sqrt"
    class_bias: bool = False
    specialist_share: float = 0.4
    name: str = ""

    def __post_init__(self) -> None:
        freeze_lists(self)
        require_positive(self, "feature_width", "specialist_width", "s1", "s2", "k")
        require_share(self, "specialist_share")
        require_one_of(self, targets=("soft", "hard"), pace=("none", "vertical", "class"))
        if self.class_names and len(self.class_names) != sum(self.vertical_sizes):
            raise ValueError(
                f"KnowledgeConcentrationConfig: class_names must be {sum(self.vertical_sizes)}, one per class, got "
                f"{len(self.class_names)}"
            )


class Specialist(nn.Module):
    """A classifier of one vertical: image tower and a linear layer, sigmoid outputs.

    Args:
        vision: The tower.
        width: Width of its features.
        classes: Classes N_v of the vertical.
    """

    def __init__(self, vision: VisionConfig, width: int, classes: int) -> None:
        super().__init__()
        self.visual = VisionTransformer(vision, width, act="gelu")
        self.head = nn.Linear(width, classes)
        # Nearly all labels are 0: begin there, as focal loss does, or the first steps only learn that.
        nn.init.constant_(self.head.bias, -math.log(max(classes - 1, 1)))

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, S, S] -> [B, N_v]
        return self.head(self.visual(images))


@register_system(
    "Knowledge Concentration",
    "Knowledge Concentration: Learning 100K Object Classifiers in a Single CNN",
    "training method (multi-teacher distillation) + output layer",
)
class KnowledgeConcentration(Trainable, nn.Module):
    """Specialists, and the student that concentrates them.

    Args:
        config: What to build.

    Attributes:
        config: The configuration it was built from; `prepare_training` fills in the classes.

    Example:
        >>> import torch, vlmkernels as vk
        >>> options = {"vertical_sizes": [3, 2], "class_names": ["bird", "robin", "wren", "car", "van"]}
        >>> model = vk.models.create("concentration-emoji", **options)
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 5])
    """

    needs_text = False
    no_weight_decay = ("positional_embedding", "gamma")
    may_leave_unused = True  # specialists and student train one after the other

    progress: Tensor
    label_classes: Tensor

    def __init__(self, config: KnowledgeConcentrationConfig | None = None) -> None:
        super().__init__()
        self.config = config or KnowledgeConcentrationConfig()
        self.visual = VisionTransformer(self.config.vision, self.config.feature_width, act="gelu")
        self.specialists = nn.ModuleList()
        self.head: StructurallyConnectedHead | None = None
        self.register_buffer("progress", torch.zeros(()))
        # The two classes (subgroup and name) of every label of the data, -1 = none.
        self.register_buffer("label_classes", torch.zeros(0, 2, dtype=torch.int64), persistent=False)
        if self.config.vertical_sizes:
            self._build()

    def _build(self) -> None:
        config = self.config
        self.head = StructurallyConnectedHead(
            config.feature_width,
            config.s1,
            config.s2,
            config.vertical_sizes,
            first=config.first,
            shared=config.shared,
            pace=None if config.pace == "none" else config.pace,
            pace_init=config.pace_init,
            class_bias=config.class_bias,
        )

    def add_specialists(self) -> None:
        """Makes a new specialist for every vertical. A model for inference has none."""
        self.specialists = nn.ModuleList(
            Specialist(self.config.specialist, self.config.specialist_width, n)
            for n in self.config.vertical_sizes
        )

    def _head(self) -> StructurallyConnectedHead:
        if self.head is None:
            raise ValueError("KnowledgeConcentration: vertical_sizes are not known before training")
        return self.head

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Encodes images to the student's features `[B, s_b]`."""
        check_images("KnowledgeConcentration.encode_image", images, self.config.vision.image_size)
        features = self.visual(images)
        return F.normalize(features.float(), dim=-1) if normalize else features

    def forward(self, images: Tensor) -> Tensor:
        """The student's logits `[B, N]`."""
        return self._head()(self.encode_image(images))

    def teacher_probs(self, images: Tensor, vertical: Tensor) -> Tensor:
        """Probabilities of each sample's own specialist, `[B, max N_v]`; detached."""
        out = torch.zeros(len(images), max(self.config.vertical_sizes), device=images.device)
        with torch.no_grad():
            for v in vertical.unique().tolist():
                rows = (vertical == v).nonzero()[:, 0]
                probs = self.specialists[v](images[rows]).float().sigmoid()
                out[rows, : probs.shape[1]] = probs
        return out

    def specialist_loss(self, images: Tensor, vertical: Tensor, classes: Tensor) -> Tensor:
        """Sigmoid cross-entropy of each sample's specialist.

        Args:
            images: `[B, 3, S, S]`.
            vertical: int64 `[B]`.
            classes: int64 `[B, n]`, global numbers of the sample's classes; -1 = none.
        """
        total = images.new_zeros((), dtype=torch.float32)
        offsets = self._head().offsets
        hard = SparseTargets(classes, (classes >= 0).float())
        for v in vertical.unique().tolist():
            rows = (vertical == v).nonzero()[:, 0]
            indices, values = hard.within(offsets[v], offsets[v + 1])
            logits = self.specialists[v](images[rows]).float()
            total = total + F.softplus(logits).sum() - (values[rows] * logits.gather(1, indices[rows])).sum()
        return total / len(images)

    def student_loss(self, images: Tensor, vertical: Tensor, classes: Tensor) -> Tensor:
        """The student's sigmoid cross-entropy over all N classes, on soft or hard targets."""
        head = self._head()
        if self.config.targets == "hard":
            targets = SparseTargets(classes, (classes >= 0).float())
        else:
            offsets = torch.tensor(head.offsets, device=images.device)
            targets = concentrated_targets(
                self.teacher_probs(images, vertical), vertical, offsets, self.config.k
            )
        return head.loss(self.encode_image(images), targets)

    def prepare_training(self, facts: TrainingFacts) -> None:
        """Takes the verticals from the data's groups: each one's classes are its subgroups and its names."""
        if not facts.concepts:
            raise ValueError(
                "KnowledgeConcentration: training needs data with groups and subgroups (the emoji set)"
            )
        names: list[str] = []
        sizes: list[int] = []
        of_label: dict[int, tuple[int, int]] = {}
        vertical_of_group: list[int] = [-1] * len(facts.groups)
        for group in range(len(facts.groups)):
            members = [c for c in facts.concepts if c.group == group]
            if not members:
                continue
            first = len(names)
            subgroups = list(dict.fromkeys(c.subgroup for c in members))
            own = list(dict.fromkeys(c.name for c in members))
            names += [facts.subgroups[s] for s in subgroups] + own
            place = {name: first + len(subgroups) + i for i, name in enumerate(own)}
            for c in members:
                of_label[c.label] = (first + subgroups.index(c.subgroup), place[c.name])
            vertical_of_group[group] = len(sizes)
            sizes.append(len(names) - first)
        table = torch.full((max(of_label) + 1, 2), -1)
        for label, pair in of_label.items():
            table[label] = torch.tensor(pair)
        device = self.progress.device
        self.label_classes = table.to(device)
        self.config = replace(self.config, vertical_sizes=tuple(sizes), class_names=tuple(names))
        self._build()
        self.add_specialists()
        self.to(device)

    def training_losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """The specialists' loss in the first part of the run, the student's in the second."""
        classes = self.label_classes[batch.image_labels]
        starts = torch.tensor(self._head().offsets, device=classes.device)
        vertical = torch.bucketize(classes[:, 1], starts, right=True) - 1
        if self.config.targets == "soft" and float(self.progress) < self.config.specialist_share:
            return {"loss": self.specialist_loss(batch.images, vertical, classes)}
        return {"loss": self.student_loss(batch.images, vertical, classes)}

    def after_step(self, step: int, total: int) -> None:
        """Notes how much of the run is done."""
        self.progress.fill_(step / max(total, 1))


def _small(width: int, channels: tuple[int, ...]) -> VisionConfig:
    return VisionConfig(
        image_size=32,
        layers=1,
        width=width,
        patch_size=16,
        heads=4,
        stem="conv",
        stem_channels=channels,
        pool="mean",
    )


CONFIG_EMOJI = KnowledgeConcentrationConfig(
    vision=_small(128, (24, 48, 96, 128)),
    specialist=_small(64, (16, 32, 48, 64)),
    feature_width=128,
    specialist_width=64,
    s1=256,
    s2=64,
    vertical_sizes=(),
    k=20,
    name="concentration-emoji",
)

register_architecture("KnowledgeConcentration", KnowledgeConcentration, KnowledgeConcentrationConfig)


@register_model("concentration-100k")
def _published(**overrides: Any) -> KnowledgeConcentration:
    return KnowledgeConcentration(
        replace(KnowledgeConcentrationConfig(), name="concentration-100k").override(**overrides)
    )


@register_model("concentration-emoji")
def _emoji(**overrides: Any) -> KnowledgeConcentration:
    return KnowledgeConcentration(CONFIG_EMOJI.override(**overrides))
