# SPDX-License-Identifier: Apache-2.0
"""Prefix conditioning: a CLIP trained on captions and on labels, told by a learned token which of the two it reads.

Saito et al., "Prefix Conditioning Unifies Language and Label Supervision" (2023). Captions and class-labelled images
(their labels put into templates) train one model. In front of every text stands a prefix that belongs to its kind of
data and soaks up that kind's style and vocabulary; at test time class prompts get the *caption* prefix, because
captions are the wider domain. Using the classification prefix "because prompts look like it" is the mistake that the
paper warns of.

Shapes: images `[B, 3, S, S]` float, normalised; ids `[B, L]`; sources an int or `[B]`; features `[B, E]`.

Not confirmed in a source, and so marked (reconstructed): one token per source; the prefix before the start token (a
prefix after the end token would do nothing under a causal mask); templates drawn at random in training; prefixes
without weight decay; UniCL's loss from its published definition. That each mini-batch comes from one source
("debiased sampling") is (recalled); `SingleSourceBatchSampler(..., sampling="mixed")` is the ablation. Optimiser,
batch, epochs and backbone of the paper were not found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.models._checks import check_ids, check_images, require_one_of, require_positive
from vlmkernels.models._config import ModelConfig
from vlmkernels.models._registry import register_model
from vlmkernels.models._text import TextTower, read_end
from vlmkernels.models.clip import CLIP, CONFIGS, CLIPConfig, TextConfig, VisionConfig
from vlmkernels.ops.contrastive import clip_loss, multi_positive_loss
from vlmkernels.systems import register_system

__all__ = [
    "CAPTION",
    "CLASSIFICATION",
    "PrefixCLIP",
    "PrefixCLIPConfig",
    "PrefixConditionedText",
    "SingleSourceBatchSampler",
    "unicl_loss",
]

#: The two sources of the paper.
CLASSIFICATION, CAPTION = 0, 1


@dataclass(frozen=True)
class PrefixCLIPConfig(ModelConfig):
    """A CLIP with prefixes.

    Attributes:
        clip: Both towers.
        num_sources: Kinds of data, each with its prefix.
        tokens_per_source: Tokens m of a prefix; 0 = no prefixes, the ablation.
        objective: "unicl" (equal labels are positives) or "clip" (each pair is its own class).
        test_source: Prefix of `encode_text` where none is given.
        name: Name of the configuration, for reports.
    """

    clip: CLIPConfig = field(default_factory=lambda: CONFIGS["ViT-B-16"])
    num_sources: int = 2
    tokens_per_source: int = 1
    objective: str = "unicl"
    test_source: int = CAPTION
    name: str = ""

    def __post_init__(self) -> None:
        require_positive(self, "num_sources")
        require_one_of(self, objective=("unicl", "clip"))
        if self.tokens_per_source < 0:
            raise ValueError(
                f"PrefixCLIPConfig: tokens_per_source must not be negative, got {self.tokens_per_source}"
            )
        if not 0 <= self.test_source < self.num_sources:
            raise ValueError(
                f"PrefixCLIPConfig: test_source must lie in [0, {self.num_sources}), got {self.test_source}"
            )

    @property
    def vision(self) -> VisionConfig:
        """The image tower, which `vk.data.transform_for` reads."""
        return self.clip.vision

    @property
    def text(self) -> TextConfig:
        """The text tower."""
        return self.clip.text

    @property
    def embed_dim(self) -> int:
        """Width E of the joint space."""
        return self.clip.embed_dim


class PrefixConditionedText(nn.Module):
    """A text tower that reads `[P_k; emb(ids)]`: a prefix of the source k, then the text.

    The causal mask runs over all m + L tokens, the positions are extended by m, and the feature is read at the end
    token, whose place moves by m. With `tokens_per_source=0` it is the text tower it was made from.

    Args:
        text_encoder: A `CLIP`, or a module with its text tower's attributes (`TextTower`); its modules are taken over
            and its positions copied.
        num_sources: Kinds of data.
        tokens_per_source: Tokens m of a prefix.

    Raises:
        ValueError: If num_sources is not positive or tokens_per_source is negative.
    """

    def __init__(
        self, text_encoder: CLIP | TextTower, *, num_sources: int = 2, tokens_per_source: int = 1
    ) -> None:
        super().__init__()
        if num_sources < 1 or tokens_per_source < 0:
            raise ValueError(
                "PrefixConditionedText: num_sources must be positive and tokens_per_source not negative, got "
                f"{num_sources} and {tokens_per_source}"
            )
        positions = text_encoder.positional_embedding.detach()
        width = positions.shape[1]
        self.context_length = positions.shape[0]
        self.num_sources, self.tokens_per_source = num_sources, tokens_per_source
        # The name ends as the positions' does, so that the optimiser spares it from weight decay, which would
        # shrink a prefix away.
        self.prefix_positional_embedding = nn.Parameter(
            0.02 * torch.randn(num_sources, tokens_per_source, width)
        )
        extra = 0.01 * torch.randn(tokens_per_source, width)
        self.positional_embedding = nn.Parameter(torch.cat([extra, positions.clone()]))
        self.token_embedding = text_encoder.token_embedding
        self.transformer = text_encoder.transformer
        self.ln_final = text_encoder.ln_final
        self.text_projection = text_encoder.text_projection

    @property
    def prefix(self) -> nn.Parameter:
        """The prefixes P `[sources, m, D]`."""
        return self.prefix_positional_embedding

    def forward(self, ids: Tensor, source: int | Tensor) -> Tensor:
        """Encodes texts of one source, or of a source per row.

        Args:
            ids: int32 or int64 `[B, L]`, the end token being the largest id.
            source: Source of all rows, or int64 `[B]`.

        Returns:
            Features `[B, E]`.

        Raises:
            ValueError: If ids do not fit, or a source is unknown.
            TypeError: If ids are not integers.
        """
        check_ids("PrefixConditionedText", ids, self.context_length)
        count, m = len(ids), self.tokens_per_source
        if isinstance(source, int):
            if not 0 <= source < self.num_sources:
                raise ValueError(
                    f"PrefixConditionedText: source must lie in [0, {self.num_sources}), got {source}"
                )
            prefix = self.prefix[source].expand(count, -1, -1)
        elif source.shape != (count,):
            raise ValueError(
                f"PrefixConditionedText: source must be an int or [{count}], got {list(source.shape)}"
            )
        else:
            prefix = self.prefix[source]
        x = torch.cat([prefix, self.token_embedding(ids)], dim=1)
        x = self.transformer(x + self.positional_embedding[: x.shape[1]])
        # The end is found in the ids, before the prefix moved it.
        x = read_end(x, ids.argmax(dim=-1) + m)
        return self.ln_final(x) @ self.text_projection


def unicl_loss(
    image_features: Tensor,  # [N, E]
    text_features: Tensor,  # [N, E]
    labels: Tensor | None,  # [N]
    logit_scale: Tensor | float,
    *,
    group: Any = None,
) -> Tensor:
    """UniCL's objective, `(CE(Z, Y / |Y|) + CE(Z.T, Y.T / |Y.T|)) / 2` with `Y_ij = [label_i = label_j]`.

    Yang et al., "Unified Contrastive Learning in Image-Text-Label Space" (2022), equation 3 (reconstructed). Targets
    are transposed first and then divided by the sum of their row.

    Args:
        image_features: `[N, E]`, normalised.
        text_features: `[N, E]`, normalised.
        labels: int64 `[N]`; a negative label (a caption) equals only itself. None: all pairs are captions.
        logit_scale: Number or 0-d tensor, already exponentiated.
        group: Process group whose ranks pass their shards; labels are compared over all of it, so captions must then
            have labels of their own.

    Returns:
        The scalar loss; with all labels distinct it is CLIP's.

    Raises:
        ValueError: If a label is negative while there is a group.
    """
    if labels is None:
        return clip_loss(image_features, text_features, logit_scale, group=group)
    single = labels < 0
    if group is not None and bool(single.any()):
        raise ValueError(
            "unicl_loss: with a group every pair needs a label that is global, got negative ones"
        )
    own = labels.clamp(min=0).max() + 1 + torch.arange(len(labels), device=labels.device)
    labels = torch.where(single, own, labels)
    return multi_positive_loss(image_features, text_features, logit_scale, labels, labels, group=group)


class SingleSourceBatchSampler:
    """Batches of indices that come from one source each ("debiased sampling"), in an order drawn anew per epoch.

    Every item is visited once per epoch; the last batch of a source may be smaller. Works as the `batch_sampler` of
    a `torch.utils.data.DataLoader`.

    Args:
        sources: Source of every item, `[N]`.
        batch_size: Items per batch.
        weights: Relative chance per source and remaining batch of being drawn next; None = in proportion to what
            remains, which is a uniformly random order of all batches.
        sampling: "single", or "mixed" for batches that ignore the sources (the ablation).
        seed: Of the order.

    Raises:
        ValueError: If batch_size is not positive, sampling is unknown or weights do not fit the sources.
    """

    def __init__(
        self,
        sources: Sequence[int] | Tensor,
        batch_size: int,
        weights: Sequence[float] | None = None,
        *,
        sampling: str = "single",
        seed: int = 0,
    ) -> None:
        self.sources = torch.as_tensor(sources, dtype=torch.int64)
        if batch_size < 1:
            raise ValueError(f"SingleSourceBatchSampler: batch_size must be positive, got {batch_size}")
        if sampling not in ("single", "mixed"):
            raise ValueError(
                f"SingleSourceBatchSampler: sampling must be 'single' or 'mixed', got {sampling!r}"
            )
        kinds = int(self.sources.max()) + 1 if len(self.sources) else 0
        if weights is not None and (len(weights) < kinds or min(weights, default=1) <= 0):
            raise ValueError(
                f"SingleSourceBatchSampler: weights must be positive, one for each of {kinds} sources, "
                f"got {list(weights)}"
            )
        self.batch_size, self.sampling, self.seed, self.epoch = batch_size, sampling, seed, 0
        self.weights = torch.ones(kinds) if weights is None else torch.tensor(list(weights)[:kinds])

    def _cut(self, items: Tensor, generator: torch.Generator) -> list[list[int]]:
        order = items[torch.randperm(len(items), generator=generator)].tolist()
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    def __len__(self) -> int:
        counts = [len(self.sources)] if self.sampling == "mixed" else self.sources.bincount().tolist()
        return sum(-(-count // self.batch_size) for count in counts)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        self.epoch += 1
        if self.sampling == "mixed":
            yield from self._cut(torch.arange(len(self.sources)), generator)
            return
        waiting = [
            self._cut((self.sources == k).nonzero()[:, 0], generator) for k in range(len(self.weights))
        ]
        while any(waiting):
            left = torch.tensor([float(len(batches)) for batches in waiting])
            kind = int(torch.multinomial(left * self.weights, 1, generator=generator))
            yield waiting[kind].pop()


@register_system(
    "Prefix Conditioning",
    "Prefix Conditioning Unifies Language and Label Supervision",
    "training method + test-time switch",
)
class PrefixCLIP(nn.Module):
    """A CLIP whose text tower is told by a prefix what kind of text it reads.

    Args:
        config: What to build.

    Attributes:
        config: The configuration it was built from.

    Example:
        >>> import torch, vlmkernels as vk
        >>> model = vk.models.create("prefix-emoji")
        >>> ids = torch.tensor([[4094, 5, 4095], [4094, 6, 4095]])
        >>> out = model(torch.zeros(2, 3, 32, 32), ids, source=0, labels=torch.tensor([3, 3]))
        >>> sorted(out)
        ['image_features', 'logit_scale', 'loss', 'text_features']
    """

    def __init__(self, config: PrefixCLIPConfig | None = None) -> None:
        super().__init__()
        self.config = config or PrefixCLIPConfig()
        self.tokenizer_state: dict[str, Any] | None = None
        clip = CLIP(self.config.clip)
        self.visual = clip.visual
        self.text = PrefixConditionedText(
            clip, num_sources=self.config.num_sources, tokens_per_source=self.config.tokens_per_source
        )
        self.logit_scale = clip.logit_scale

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:  # [B, 3, S, S]
        """Encodes normalised images to `[B, E]`; the image tower has no prefix."""
        check_images("PrefixCLIP.encode_image", images, self.config.vision.image_size)
        features = self.visual(images)
        return F.normalize(features.float(), dim=-1) if normalize else features

    def encode_text(
        self, ids: Tensor, normalize: bool = False, *, source: int | Tensor | None = None
    ) -> Tensor:  # [B, L]
        """Encodes texts to `[B, E]` behind the prefix of `source`; None = the configuration's `test_source`."""
        features = self.text(ids, self.config.test_source if source is None else source)
        return F.normalize(features.float(), dim=-1) if normalize else features

    def forward(
        self,
        images: Tensor,  # [B, 3, S, S]
        ids: Tensor,  # [B, L]
        source: int | Tensor = CAPTION,
        labels: Tensor | None = None,  # [B]
        *,
        group: Any = None,
    ) -> dict[str, Tensor]:
        """Encodes pairs and compares them.

        Args:
            images: Normalised `[B, 3, S, S]`.
            ids: `[B, L]`.
            source: Source of the batch, or of every row.
            labels: int64 `[B]` for "unicl"; negative (or None) = a pair of its own. "clip" ignores them.
            group: Process group of the loss.

        Returns:
            `loss`, `image_features` and `text_features` `[B, E]` normalised, `logit_scale` exponentiated.
        """
        image = self.encode_image(images, normalize=True)
        text = self.encode_text(ids, normalize=True, source=source)
        scale = self.logit_scale.exp()
        if self.config.objective == "clip":
            labels = None
        loss = unicl_loss(image, text, labels, scale, group=group)
        return {"loss": loss, "image_features": image, "text_features": text, "logit_scale": scale}

    @torch.no_grad()
    def class_features(self, ids: Tensor, *, source: int | None = None) -> Tensor:  # [C, P, L] -> [C, E]
        """Zero-shot classifier: the normalised mean of the normalised features of every class's P prompts."""
        prompts = self.encode_text(ids.flatten(0, 1), normalize=True, source=source)
        return F.normalize(prompts.unflatten(0, ids.shape[:2]).mean(1), dim=-1)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Clamps `logit_scale` to [0, ln 100] in place; CLIP's recipe does so after each optimiser step."""
        self.logit_scale.clamp_(0.0, 4.6052)


_EMOJI = CLIPConfig(
    embed_dim=128,
    vision=VisionConfig(
        image_size=32,
        layers=1,
        width=128,
        patch_size=16,
        heads=4,
        stem="conv",
        stem_channels=(24, 48, 96, 128),
        pool="mean",
    ),
    text=TextConfig(vocab_size=4096, context_length=32, width=96, layers=1, heads=4),
    act="gelu",
)
CONFIG_EMOJI = PrefixCLIPConfig(clip=_EMOJI, name="prefix-emoji")


@register_model("prefix-ViT-B-16")
def _published(**overrides: Any) -> PrefixCLIP:
    """The paper's backbone was not found; ViT-B/16 with CLIP's text tower stands in (reconstructed)."""
    return PrefixCLIP(replace(PrefixCLIPConfig(), name="prefix-ViT-B-16").override(**overrides))


@register_model("prefix-emoji")
def _emoji(**overrides: Any) -> PrefixCLIP:
    return PrefixCLIP(CONFIG_EMOJI.override(**overrides))
