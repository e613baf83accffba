# SPDX-License-Identifier: Apache-2.0
"""Zero-shot evaluation: retrieval in both directions and classification from prompts, each next to chance.

Ranks come from `vk.topk_similarity`, class probabilities from `vk.zero_shot`; no N x M matrix is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from vlmkernels.ops.topk import topk_similarity, zero_shot

if TYPE_CHECKING:
    from vlmkernels.data.tokenizer import Tokenizer

RECALLS = (1, 5, 10)

TransformImages = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Encoder:
    """A model in eval mode with its tokenizer: pictures and texts to unit vectors, in batches.

    Attributes:
        model: with `encode_image`, and `encode_text` where texts are encoded.
        tokenizer: its tokenizer; None where it reads no text.
        batch_size: how many at once.
        autocast: a function that makes the context to compute in; None: float32.
    """

    model: Any
    tokenizer: Tokenizer | None
    batch_size: int = 256
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    @torch.no_grad()
    def images(self, pictures: torch.Tensor) -> torch.Tensor:
        """Encodes uint8 [N, 3, H, W] to float32 [N, E] of length 1."""
        from vlmkernels.data.transforms import transform_for

        transform = transform_for(self.model)
        if not len(pictures):
            return torch.zeros(0, self.model.config.embed_dim)
        return self._encode(
            lambda part: self.model.encode_image(transform(part).to(self._device)),
            pictures.split(self.batch_size),
        )

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Encodes texts to float32 [N, E] of length 1."""
        if self.tokenizer is None:
            raise ValueError("Encoder.texts: the model has no tokenizer")
        if not texts:
            return torch.zeros(0, self.model.config.embed_dim)
        tokenizer = self.tokenizer
        ids = tokenizer(list(texts), self.model.config.text.context_length)
        return self._encode(
            lambda part: self.model.encode_text(trim(part, tokenizer.end_id).to(self._device)),
            ids.split(self.batch_size),
        )

    def prompts(self, names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
        """Encodes every name in every template: [C, P, E]."""
        features = [self.texts([template.format(name) for name in names]) for template in templates]
        return torch.stack(features, 1)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _encode(
        self, encode: Callable[[torch.Tensor], torch.Tensor], parts: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        was_training = self.model.training
        self.model.eval()
        try:
            with self.autocast():
                features = [encode(part) for part in parts]
            return torch.cat([F.normalize(f.float(), dim=-1) for f in features])
        finally:
            self.model.train(was_training)


def trim(ids: torch.Tensor, end_id: int) -> torch.Tensor:
    """Cuts the columns that are padding in every row of ids [N, L]; a causal text tower gives the same features."""
    ends = (ids == end_id).int().argmax(1)
    return ids[:, : int(ends.max()) + 1] if len(ids) else ids


def average_prompts(prompts: torch.Tensor) -> torch.Tensor:
    """Turns [C, P, E] unit vectors into one unit vector per class, [C, E]."""
    return F.normalize(prompts.mean(1), dim=-1)


@dataclass
class Retrieval:
    """Recall at 1, 5 and 10 in one direction.

    Attributes:
        recall: by k: the share of queries with a match among the k most similar.
        chance: by k: what a random order would reach.
        queries: how many queries.
        database: how many candidates.
        indices: [N, 10 or fewer] the candidates found, best first.
    """

    recall: dict[int, float]
    chance: dict[int, float]
    queries: int
    database: int
    indices: torch.Tensor = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold."""
        return {
            "recall": {f"R@{k}": v for k, v in self.recall.items()},
            "chance": {f"R@{k}": v for k, v in self.chance.items()},
            "queries": self.queries,
            "database": self.database,
        }


def retrieval(
    queries: torch.Tensor,  # [N, E]
    database: torch.Tensor,  # [M, E]
    query_labels: torch.Tensor,  # [N]
    database_labels: torch.Tensor,  # [M]
) -> Retrieval:
    """Finds the nearest database rows of every query; a row with the query's label is a match.

    Args:
        queries: [N, E].
        database: [M, E].
        query_labels: [N] integers.
        database_labels: [M] integers. Queries whose label is not among them count as failures.

    Raises:
        ValueError: there is nothing to search, or no query.
    """
    n, m = len(queries), len(database)
    if not n or not m:
        raise ValueError(f"retrieval: queries and database must not be empty, got {n} and {m} rows")
    width = min(max(RECALLS), m)
    _, indices = topk_similarity(queries, database, width, metric="cosine")
    hits = database_labels[indices] == query_labels[:, None]
    first = hits.int().cumsum(1).clamp(max=1).float().mean(0)
    counts = torch.bincount(database_labels - database_labels.min())
    low = int(database_labels.min())
    known = (query_labels >= low) & (query_labels < low + len(counts))
    matches = torch.where(known, counts[(query_labels - low).clamp(0, len(counts) - 1)], 0)
    recall, chance = {}, {}
    for k in RECALLS:
        k_here = min(k, m)
        recall[k] = float(first[k_here - 1])
        # Probability that k of m rows, drawn without replacement, hold at least one of the matches.
        miss = torch.ones(n, dtype=torch.float64)
        for drawn in range(k_here):
            miss *= ((m - matches - drawn).clamp(min=0) / (m - drawn)).double()
        chance[k] = float(1 - miss.mean())
    return Retrieval(recall, chance, n, m, indices)


@dataclass
class Classification:
    """Zero-shot classification.

    Attributes:
        accuracy: share of pictures whose most probable class is right.
        accuracy_top5: share of those with the right class among the five most probable.
        chance: what guessing evenly would reach.
        majority: the share of the most frequent class, what always naming it would reach.
        classes: names of the classes.
        predicted: [N] class indices.
        labels: [N] class indices.
    """

    accuracy: float
    accuracy_top5: float
    chance: float
    majority: float
    classes: list[str]
    predicted: torch.Tensor = field(repr=False)
    labels: torch.Tensor = field(repr=False)

    @property
    def confusion(self) -> torch.Tensor:
        """[C, C] counts: row = true class, column = predicted class."""
        size = len(self.classes)
        return torch.bincount(self.labels * size + self.predicted, minlength=size * size).view(size, size)

    @property
    def balanced(self) -> float:
        """Mean over the classes that occur of the share of their pictures that were recognised."""
        counts = self.confusion
        present = counts.sum(1) > 0
        return float((counts.diagonal()[present] / counts.sum(1)[present]).mean())

    def to_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold."""
        return {
            "accuracy": self.accuracy,
            "accuracy_top5": self.accuracy_top5,
            "balanced_accuracy": self.balanced,
            "chance": self.chance,
            "majority": self.majority,
            "pictures": len(self.labels),
            "classes": len(self.classes),
        }


def classification(
    image_features: torch.Tensor,  # [N, E]
    class_features: torch.Tensor,  # [C, P, E]
    labels: torch.Tensor,  # [N]
    classes: Sequence[str],
) -> Classification:
    """Names the class of every picture by its most similar prompt average.

    Args:
        image_features: [N, E].
        class_features: [C, P, E], P prompts per class.
        labels: [N] indices of the true classes.
        classes: C names.

    Raises:
        ValueError: there is no picture, or labels lie outside of the classes.
    """
    n, c = len(image_features), len(classes)
    if not n or int(labels.min()) < 0 or int(labels.max()) >= c:
        raise ValueError(f"classification: expected pictures with labels from 0 to {c - 1}, got {n} pictures")
    _, indices, _ = zero_shot(image_features, class_features, k=min(5, c))
    hits = indices == labels[:, None]
    return Classification(
        accuracy=float(hits[:, 0].float().mean()),
        accuracy_top5=float(hits.any(1).float().mean()),
        chance=1 / c,
        majority=float(torch.bincount(labels).max() / n),
        classes=list(classes),
        predicted=indices[:, 0].clone(),
        labels=labels,
    )


@dataclass
class Gallery:
    """What the report shows: examples spread evenly over the test set, not chosen by how well they went.

    Attributes:
        image_to_text: (picture, its caption, [(caption found, whether right)]) with pictures uint8 [3, H, W].
        text_to_image: (caption, [(picture found, its caption, whether right)]).
    """

    image_to_text: list[tuple[torch.Tensor, str, list[tuple[str, bool]]]]
    text_to_image: list[tuple[str, list[tuple[torch.Tensor, str, bool]]]]


def _gallery(
    image_to_text: Retrieval,
    text_to_image: Retrieval,
    picture: Callable[[int], torch.Tensor],
    captions: Sequence[str],
    picture_captions: Sequence[str],
) -> Gallery:
    def spread(count: int, total: int) -> list[int]:
        return [int((i + 0.5) * total / count) for i in range(min(count, total))]

    from_images = []
    for row in spread(18, image_to_text.queries):
        truth = picture_captions[row]
        found = [captions[i] for i in image_to_text.indices[row, :5].tolist()]
        from_images.append((picture(row), truth, [(text, text == truth) for text in found]))
    from_texts = []
    for row in spread(10, text_to_image.queries):
        wanted = captions[row]
        rows = text_to_image.indices[row, :8].tolist()
        found_pictures = [(picture(i), picture_captions[i], picture_captions[i] == wanted) for i in rows]
        from_texts.append((wanted, found_pictures))
    return Gallery(from_images, from_texts)


@dataclass
class EmojiEvaluation:
    """Everything that is measured on the bundled set, with what the report shows of it.

    Attributes:
        pictures: (emoji index, style) of the held-out style's pictures.
        image_to_text: their names found from the pictures.
        text_to_image: the pictures found from their names.
        names: classification over the names of all base emoji.
        groups: of held-out concepts, in all styles.
        subgroups: of held-out concepts, in all styles.
        gallery: examples for the report.
    """

    pictures: list[tuple[int, str]] = field(repr=False)
    image_to_text: Retrieval
    text_to_image: Retrieval
    names: Classification
    groups: Classification
    subgroups: Classification
    gallery: Gallery = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold."""
        return {
            "image_to_text": self.image_to_text.to_dict(),
            "text_to_image": self.text_to_image.to_dict(),
            "top1_over_all_names": self.names.to_dict(),
            "groups_of_held_out_concepts": self.groups.to_dict(),
            "subgroups_of_held_out_concepts": self.subgroups.to_dict(),
        }

    def sentence(self) -> str:
        """The figures that matter, in one line."""
        i2t, t2i = self.image_to_text.recall, self.text_to_image.recall
        return (
            f"held-out style: image->text R@1/5/10 {_percent(i2t)}, text->image {_percent(t2i)}, "
            f"top-1 over {len(self.names.classes):,} names {100 * self.names.accuracy:.1f}%; "
            f"held-out concepts: group {100 * self.groups.accuracy:.1f}% "
            f"(chance {100 * self.groups.chance:.1f}%), subgroup {100 * self.subgroups.accuracy:.1f}% "
            f"(chance {100 * self.subgroups.chance:.1f}%)"
        )


def _percent(recall: dict[int, float]) -> str:
    return "/".join(f"{100 * recall[k]:.1f}" for k in RECALLS) + "%"


def evaluate_emoji(encoder: Encoder, *, style: str | None = None) -> EmojiEvaluation:
    """Evaluates on the bundled emoji.

    Names are encoded in every template of ``NAME_TEMPLATES`` and averaged; groups likewise in ``GROUP_TEMPLATES``.

    Args:
        encoder: the model.
        style: style of the retrieval test; None: the one that is held out from training.
    """
    from vlmkernels.data import emoji

    data = emoji.load()
    style = style or emoji.HELD_OUT_STYLE
    trained = {index for index, _ in data.select(split="train", base_only=True)}
    pictures = [p for p in data.select(styles=style, base_only=True) if p[0] in trained]
    size = encoder.model.config.vision.image_size

    bases = [e for e in data.emojis if e.base == e.index]
    row_of = {e.index: row for row, e in enumerate(bases)}
    prompts = encoder.prompts([emoji.spoken_name(e) for e in bases], emoji.NAME_TEMPLATES)
    labels = torch.tensor([row_of[index] for index, _ in pictures])
    images = encoder.images(data.images(pictures, size=size))
    names = average_prompts(prompts[labels])

    unseen = data.select(split="held_out_concepts", base_only=True)
    unseen_images = encoder.images(data.images(unseen, size=size))
    levels = {}
    for level, values in (("group", data.groups), ("subgroup", data.subgroups)):
        of = torch.tensor([values.index(getattr(data.emojis[index], level)) for index, _ in unseen])
        features = encoder.prompts([emoji.spoken_group(v) for v in values], emoji.GROUP_TEMPLATES)
        levels[level] = classification(unseen_images, features, of, values)
    image_to_text = retrieval(images, names, labels, labels)
    text_to_image = retrieval(names, images, labels, labels)
    spoken = [data.emojis[index].name for index, _ in pictures]
    return EmojiEvaluation(
        pictures=pictures,
        image_to_text=image_to_text,
        text_to_image=text_to_image,
        gallery=_gallery(
            image_to_text, text_to_image, lambda row: data.image(*pictures[row]), spoken, spoken
        ),
        names=classification(images, prompts, labels, [e.name for e in bases]),
        groups=levels["group"],
        subgroups=levels["subgroup"],
    )


@dataclass
class NeighbourEvaluation:
    """How well picture features that were learned without text tell things apart: the nearest neighbour's label.

    Queries are the held-out style's pictures, candidates the training styles' pictures of the same concepts.

    Attributes:
        names: recall of the same concept among the 1, 5 and 10 nearest.
        groups: likewise of a concept of the same group.
        subgroups: likewise of a concept of the same subgroup.
    """

    names: Retrieval
    groups: Retrieval
    subgroups: Retrieval

    def to_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold."""
        return {name: getattr(self, name).to_dict() for name in ("names", "groups", "subgroups")}

    def sentence(self) -> str:
        """The figures that matter, in one line."""
        parts = (("same emoji", self.names), ("subgroup", self.subgroups), ("group", self.groups))
        shown = ", ".join(f"{n} {100 * r.recall[1]:.1f}% (chance {100 * r.chance[1]:.1f}%)" for n, r in parts)
        return f"held-out style, nearest neighbour among the training pictures: {shown}"


def evaluate_neighbours(
    encoder: Encoder, *, train_styles: Sequence[str], style: str | None = None
) -> NeighbourEvaluation:
    """Evaluates picture features on the bundled emoji.

    Args:
        encoder: the model; its text side is not used.
        train_styles: styles of the candidates.
        style: style of the queries; None: the one that is held out from training.
    """
    from vlmkernels.data import emoji

    data = emoji.load()
    trained = {index for index, _ in data.select(split="train", base_only=True)}
    size = encoder.model.config.vision.image_size
    sides = []
    for styles in ((style or emoji.HELD_OUT_STYLE,), tuple(train_styles)):
        pairs = [p for p in data.select(styles=styles, base_only=True) if p[0] in trained]
        entries = [data.emojis[index] for index, _ in pairs]
        labels = [
            torch.tensor([e.index for e in entries]),
            torch.tensor([data.groups.index(e.group) for e in entries]),
            torch.tensor([data.subgroups.index(e.subgroup) for e in entries]),
        ]
        sides.append((encoder.images(data.images(pairs, size=size)), labels))
    (queries, wanted), (database, found) = sides
    return NeighbourEvaluation(
        *(retrieval(queries, database, *pair) for pair in zip(wanted, found, strict=True))
    )


@dataclass
class PairsEvaluation:
    """Retrieval on pairs that were kept from training; pictures with the same caption are all matches."""

    image_to_text: Retrieval
    text_to_image: Retrieval
    gallery: Gallery = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold."""
        return {"image_to_text": self.image_to_text.to_dict(), "text_to_image": self.text_to_image.to_dict()}

    def sentence(self) -> str:
        """The figures that matter, in one line."""
        return (
            f"{self.image_to_text.queries:,} held-out pairs: "
            f"image->text R@1/5/10 {_percent(self.image_to_text.recall)}, "
            f"text->image {_percent(self.text_to_image.recall)} (chance R@1 {100 * self.image_to_text.chance[1]:.2f}%)"
        )


def evaluate_pairs(encoder: Encoder, pictures: torch.Tensor, captions: Sequence[str]) -> PairsEvaluation:
    """Evaluates retrieval among pairs: from every picture its caption, from every distinct caption its pictures.

    Args:
        encoder: the model.
        pictures: [N, 3, H, W] uint8.
        captions: N texts.
    """
    distinct = list(dict.fromkeys(captions))
    position = {caption: i for i, caption in enumerate(distinct)}
    labels = torch.tensor([position[c] for c in captions])
    images, texts = encoder.images(pictures), encoder.texts(distinct)
    own = torch.arange(len(distinct))
    image_to_text, text_to_image = (
        retrieval(images, texts, labels, own),
        retrieval(texts, images, own, labels),
    )
    gallery = _gallery(image_to_text, text_to_image, lambda row: pictures[row], distinct, list(captions))
    return PairsEvaluation(image_to_text, text_to_image, gallery)
