# SPDX-License-Identifier: Apache-2.0
"""How a model says to a training loop what it needs, and gets it: a batch, its losses, a hook after each step.

`vlmkernels.train` trains every `Trainable`: it draws what the class attributes ask for, calls `training_losses` inside
the forward pass (so that several processes work), differentiates the entry "loss" and logs the others.

    class MyModel(Trainable, nn.Module):
        needs_second_view = True

        def training_losses(self, batch):
            distance = (self(batch.images) - self(batch.second_images)).square().mean()
            return {"loss": distance}
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlmkernels.ops.contrastive import clip_loss, multi_positive_loss, siglip_loss

__all__ = ["Concept", "ContrastiveOptions", "Trainable", "TrainingBatch", "TrainingFacts", "contrastive_loss"]


@dataclass(frozen=True)
class ContrastiveOptions:
    """What the run's settings say about the loss between images and texts.

    Attributes:
        name: "clip", "siglip" or "multi_positive".
        label_smoothing: Of the clip loss; None = the model's own default.
        group: Process group whose ranks pass their shards; None = this process alone.
    """

    name: str = "clip"
    label_smoothing: float | None = None
    group: dist.ProcessGroup | None = None


@dataclass
class TrainingBatch:
    """One step's pairs on the model's device. N captions; view v of pair n is image `v * N + n`.

    Attributes:
        images: `[V * N, 3, S, S]` float32, augmented and normalised.
        ids: `[N, L]` int64, cut after the longest text; None where the model needs no text.
        image_labels: `[V * N]` int64; a picture belongs to the captions with its label.
        text_labels: `[N]` int64.
        second_images: `[V * N, 3, S, S]`, the same pictures augmented anew, for `needs_second_view`.
        description_ids: `[N, Q, L]` int64, each pair's descriptions, padded rows all zero, for `needs_descriptions`.
        description_mask: `[N, Q]` bool, True = there is a description.
        names: N plain names ("waving hand"); for a user's own pairs the captions.
        keywords: N tuples of words; empty for a user's own pairs.
        group: `[N]` int64, row of `TrainingFacts.groups`; -1 = none.
        subgroup: `[N]` int64, row of `TrainingFacts.subgroups`; -1 = none.
        source: `[N]` int64, row of `TrainingFacts.sources`, of the first view; -1 = none.
        options: What the settings say about the contrastive loss.
    """

    images: Tensor
    ids: Tensor | None
    image_labels: Tensor
    text_labels: Tensor
    second_images: Tensor | None = None
    description_ids: Tensor | None = None
    description_mask: Tensor | None = None
    names: list[str] = field(default_factory=list)
    keywords: list[tuple[str, ...]] = field(default_factory=list)
    group: Tensor | None = None
    subgroup: Tensor | None = None
    source: Tensor | None = None
    options: ContrastiveOptions = field(default_factory=ContrastiveOptions)

    @property
    def captions(self) -> Tensor:
        """`ids` of a model that cannot do without; ValueError where there are none."""
        if self.ids is None:
            raise ValueError("TrainingBatch: ids must be given for this model, got None")
        return self.ids


@dataclass(frozen=True)
class Concept:
    """One thing that the data show.

    Attributes:
        label: Its value in `image_labels` and `text_labels`.
        name: Its plain name.
        group: Row of `TrainingFacts.groups`.
        subgroup: Row of `TrainingFacts.subgroups`.
    """

    label: int
    name: str
    group: int
    subgroup: int


@dataclass(frozen=True)
class TrainingFacts:
    """What is known before the first step.

    Attributes:
        steps: Steps of the whole run.
        steps_per_epoch: Steps that show everything once.
        batch_size: Captions per step, over all processes.
        concepts: What the training pictures show; empty for a user's own pairs.
        groups: Names of the groups of concepts.
        subgroups: Names of the subgroups.
        sources: Names of the sources (drawing styles).
        tokenizer: Texts to ids, `tokenizer(texts) -> [N, L]`; None where the model needs no text.
    """

    steps: int
    steps_per_epoch: int
    batch_size: int
    concepts: tuple[Concept, ...] = ()
    groups: tuple[str, ...] = ()
    subgroups: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    tokenizer: Callable[[list[str]], Tensor] | None = None


class Trainable:
    """What a model that can be trained offers, beside its `config` with `vision` (image_size, image_mean, image_std)
    and, where it needs text, `text` (vocab_size, context_length).

    Attributes:
        needs_text: Whether batches have `ids`; the loop then learns a vocabulary from the captions.
        needs_second_view: Whether batches have `second_images`.
        needs_descriptions: Whether batches have `description_ids`: emoji's keywords, one by one.
        max_descriptions: Most descriptions of a pair (Q).
        needs_single_source: Whether all pictures of a step come from one source, drawn anew for every step.
        default_loss: Contrastive loss where the settings say "auto" and every text has one picture.
        default_label_smoothing: Of the clip loss where the settings say nothing.
        no_weight_decay: Endings of the names of parameters that do not decay; vectors and scalars never do.
        may_leave_unused: Whether a step may leave trainable parameters without gradient; with several processes the
            loop then looks for them after every step.
    """

    needs_text: bool = True
    needs_second_view: bool = False
    needs_descriptions: bool = False
    max_descriptions: int = 5
    needs_single_source: bool = False
    default_loss: str = "clip"
    default_label_smoothing: float = 0.0
    no_weight_decay: tuple[str, ...] = ("positional_embedding",)
    may_leave_unused: bool = False

    def prepare_training(self, facts: TrainingFacts) -> None:
        """Is called once before the optimiser is made, also when a run is continued; must not draw random numbers
        that a continued run would not draw."""

    def training_texts(
        self,
        concepts: list[Concept],
        keywords: list[tuple[str, ...]],
        source: Tensor,
        generator: torch.Generator,
    ) -> list[str] | None:
        """Words the captions of a step in the model's own way; None = the data's captions.

        Args:
            concepts: N concepts.
            keywords: N tuples of words.
            source: `[N]` rows of the sources.
            generator: The step's own; the only source of randomness.
        """
        return None

    def vocabulary_texts(
        self,
        concepts: tuple[Concept, ...] = (),
        groups: tuple[str, ...] = (),
        subgroups: tuple[str, ...] = (),
        sources: tuple[str, ...] = (),
    ) -> list[str]:
        """Texts that the vocabulary is learned from beside the data's captions, for models with `training_texts`."""
        return []

    def training_losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Computes the losses of a step, in training mode and under the run's autocast.

        Returns:
            Scalars; "loss" is differentiated, the others are logged. The default takes `self(images, ids)` with
            `image_features`, `text_features`, `logit_scale` and perhaps `logit_bias` to `contrastive_loss`.
        """
        out = self(batch.images, batch.captions)  # type: ignore[operator]
        return {"loss": contrastive_loss(batch, smoothing=self.default_label_smoothing, **out)}

    def after_step(self, step: int, total: int) -> None:
        """Is called after the optimiser's step number `step` (from 1) of `total`: clamps, momentum updates. The
        default calls `clamp_logit_scale` where there is one."""
        clamp = getattr(self, "clamp_logit_scale", None)
        if clamp is not None:
            clamp()


def contrastive_loss(
    batch: TrainingBatch,
    image_features: Tensor,  # [V * N, E]
    text_features: Tensor,  # [N, E]
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    *,
    smoothing: float = 0.0,
) -> Tensor:
    """The loss between images and texts that the run's settings choose, in float32 outside of autocast.

    Args:
        batch: Gives labels, the loss's name, its label smoothing and the process group.
        image_features: Normalised.
        text_features: Normalised.
        logit_scale: Exponentiated.
        logit_bias: For the sigmoid loss; the other losses do not change with it.
        smoothing: Label smoothing of the clip loss where the settings say nothing.

    Raises:
        ValueError: If the sigmoid loss is asked for and there is no bias.
    """
    options = batch.options
    with torch.autocast(image_features.device.type, enabled=False):
        images, texts = image_features.float(), text_features.float()
        if options.name == "multi_positive":
            labels = batch.image_labels, batch.text_labels
            return multi_positive_loss(images, texts, logit_scale, *labels, group=options.group)
        if options.name == "siglip":
            if logit_bias is None:
                raise ValueError("contrastive_loss: the sigmoid loss needs a model with logit_bias")
            return siglip_loss(images, texts, logit_scale, logit_bias, group=options.group)
        smooth = smoothing if options.label_smoothing is None else options.label_smoothing
        return clip_loss(images, texts, logit_scale, label_smoothing=smooth, group=options.group)


def trainable_config(model: Any) -> Any:
    """Returns the configuration of a model that can be trained.

    Raises:
        ValueError: If it cannot be.
    """
    config = getattr(model, "config", None)
    if not isinstance(model, Trainable) or config is None:
        raise ValueError(
            f"expected a model that can be trained (vk.models.Trainable), got {type(model).__name__}"
        )
    return config
