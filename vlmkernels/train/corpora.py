# SPDX-License-Identifier: Apache-2.0
"""What a run trains on: batch ``s`` as a function of the seed and of ``s``, so that resuming needs only the step.

`EmojiCorpus` draws from the bundled set, `PairCorpus` from a `vlmkernels.data.sources.PictureStore`. Both hand out
every caption of an epoch once, in an order drawn per epoch, and leave out what does not fill a last batch.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vlmkernels.data import emoji
from vlmkernels.data.augment import Augment, AugmentConfig, blend_styles
from vlmkernels.models.training import Concept
from vlmkernels.train.evaluation import (
    EmojiEvaluation,
    Encoder,
    NeighbourEvaluation,
    PairsEvaluation,
    evaluate_emoji,
    evaluate_neighbours,
    evaluate_pairs,
)

if TYPE_CHECKING:
    from vlmkernels.data.sources import PictureStore

# A mirrored picture would not fit names with these words: directions, clock faces, letters and digits.
_HANDED = re.compile(
    r"\b(left|right|leftwards?|rightwards?|arrow|east|west|flag|clock|thirty|letter|button|input|keycap|"
    r"mark|sign|symbol|numbers?|abc|north|south|clockwise|counterclockwise)\b"
)
_HANDED_GROUPS = ("Flags", "Symbols")

_KEPT_FROM_TRAINING_AT_MOST = 5000


def generator_for(seed: int, *purpose: int) -> torch.Generator:
    """Makes a generator whose state depends on the seed and on what it is for, and on nothing that happened before."""
    digest = hashlib.blake2b(repr((seed, *purpose)).encode("ascii"), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@dataclass
class Batch:
    """One step's pairs.

    Attributes:
        images: [V * N, 3, S, S] float32 from 0 to 1; N first views, then N second ones.
        texts: N captions.
        image_labels: [V * N] int64; a picture belongs to the captions with its label.
        text_labels: [N] int64.
        concepts: N things shown; their labels are ``text_labels``.
        keywords: N tuples of words.
        source: [N] int64, the first view's row of ``TrainingFacts.sources``; -1: none.
        second: [V * N, 3, S, S] like images, augmented anew; None where nobody asked.
    """

    images: torch.Tensor
    texts: list[str]
    image_labels: torch.Tensor
    text_labels: torch.Tensor
    concepts: list[Concept]
    keywords: list[tuple[str, ...]]
    source: torch.Tensor
    second: torch.Tensor | None = None


class _Epochs:
    """The order of the rows in each epoch, cut into batches for each process."""

    def __init__(self, count: int, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        self.count, self.seed, self.rank = count, seed, rank
        # A data set smaller than a batch still trains: the batch shrinks.
        self.batch_size = max(1, min(batch_size, count // world_size))
        self.steps = max(1, count // (self.batch_size * world_size))
        self.world_size = world_size
        self._cached: tuple[int, torch.Tensor] = (-1, torch.empty(0))

    def rows(self, step: int) -> list[int]:
        epoch, within = divmod(step, self.steps)
        if self._cached[0] != epoch:
            order = torch.randperm(self.count, generator=generator_for(self.seed, 0, epoch))
            self._cached = (epoch, order)
        start = (within * self.world_size + self.rank) * self.batch_size
        return self._cached[1][start : start + self.batch_size].tolist()


class EmojiCorpus:
    """The bundled emoji in the training styles, without the held-out concepts.

    A caption of a step belongs to one concept, and no two captions of a step to the same, so that nothing in a batch
    is wrongly pushed apart.

    Args:
        size: side of the pictures that the model takes.
        batch_size: captions per step and process.
        views: pictures per caption.
        seed: see `generator_for`.
        augment: strength of the augmentation; 0: none.
        blend: share of pictures that mix both styles.
        tones: share of the concepts with skin tones that are shown with one.
        topics: share of the captions that name only the group or subgroup, without which such prompts would mean
            nothing to the model.
        styles: drawing styles to train on.
        rank: of this process.
        world_size: number of processes.
    """

    kind = "emoji"

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        views: int = 1,
        seed: int = 0,
        augment: float = 1.0,
        blend: float = 0.3,
        tones: float = 0.25,
        topics: float = 0.1,
        styles: tuple[str, ...] = emoji.TRAIN_STYLES,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.data = emoji.load(styles)
        self.one_to_one = views == 1
        self.views, self.seed, self.blend, self.tones, self.rank = views, seed, blend, tones, rank
        self.topics = topics
        # Not by split="train": a style that the split holds out may be asked for here, for cross-validation.
        drawn = [e for e in self.data.emojis if not e.held_out and e.styles]
        self.concepts = [e.index for e in drawn if e.base == e.index]
        known = set(self.concepts)
        self._toned: dict[int, list[int]] = {}
        for e in drawn:
            if e.base != e.index and e.base in known:
                self._toned.setdefault(e.base, []).append(e.index)
        pairs = [(e.index, style) for e in drawn for style in e.styles]
        self._pictures = self.data.rgba(pairs)
        self._rows: dict[int, list[int]] = {}
        for row, (index, _) in enumerate(pairs):
            self._rows.setdefault(index, []).append(row)
        self._styles = torch.tensor([self.data.styles.index(style) for _, style in pairs])
        groups, subgroups = self.data.groups, self.data.subgroups
        self._concepts = [
            Concept(e.index, emoji.spoken_name(e), groups.index(e.group), subgroups.index(e.subgroup))
            for e in self.data.emojis
        ]
        self._may_flip = torch.tensor([_mirrors(e) for e in self.data.emojis])
        self._augment = Augment(size, AugmentConfig().scaled(augment))
        left_out = [style for style in emoji.STYLES if style not in self.data.styles]
        self.test_style = left_out[-1] if left_out else emoji.HELD_OUT_STYLE
        self._epochs = _Epochs(len(self.concepts), batch_size, seed, rank, world_size)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that show every concept once, but for what does not fill a batch."""
        return self._epochs.steps

    def describe(self) -> str:
        """One sentence about what there is."""
        styles = " and ".join(self.data.styles)
        return f"{len(self.concepts):,} emoji concepts in {len(self._pictures):,} pictures ({styles})"

    def captions(self) -> list[str]:
        """All captions in all templates, for learning a vocabulary."""
        entries = self.data.emojis
        texts = [caption for i in self.concepts for caption in emoji.captions(entries[i])]
        texts += [emoji.spoken_name(entries[i]) for toned in self._toned.values() for i in toned]
        if not self.topics:
            return texts
        topics = (*self.data.groups, *self.data.subgroups)
        return texts + [
            template.format(emoji.spoken_group(t)) for t in topics for template in emoji.GROUP_TEMPLATES
        ]

    def facts(self) -> dict[str, Any]:
        """What `TrainingFacts` says of the data."""
        shown = [*self.concepts, *(i for toned in self._toned.values() for i in toned)]
        return {
            "concepts": tuple(self._concepts[i] for i in sorted(shown)),
            "groups": self.data.groups,
            "subgroups": self.data.subgroups,
            "sources": self.data.styles,
        }

    def batch(self, step: int, *, second_view: bool = False, single_source: bool = False) -> Batch:
        """Draws the pairs of a step.

        Args:
            step: its number.
            second_view: augment the same pictures once more.
            single_source: all pictures in one style, drawn for the step; what it does not have is left out.
        """
        generator = generator_for(self.seed, 1, step, self.rank)
        indices = [self._with_tone(self.concepts[row], generator) for row in self._epochs.rows(step)]
        picks = torch.rand(len(indices), generator=generator).tolist()
        first = [self._rows[i][int(p * len(self._rows[i]))] for i, p in zip(indices, picks, strict=True)]
        if single_source:
            indices, first = self._in_one_style(step, indices)
        # The other style where there is one.
        second = [self._other_style(i, row) for i, row in zip(indices, first, strict=True)]
        pictures, others = self._pictures[torch.tensor(first)], self._pictures[torch.tensor(second)]
        share = 0.0 if single_source else self.blend
        views = [blend_styles(pictures, others, generator, share=share)]
        if self.views == 2:
            views.append(blend_styles(others, pictures, generator, share=share))
        labels = torch.tensor(indices)
        drawn, may_flip = torch.cat(views), self._may_flip[labels].repeat(self.views)
        images = self._augment(drawn, generator, may_flip=may_flip)
        texts = self._texts(indices, generator)
        again = None
        if second_view:  # a generator of its own: the other draws do not depend on who asks
            again = self._augment(drawn, generator_for(self.seed, 3, step, self.rank), may_flip=may_flip)
        return Batch(
            images,
            texts,
            labels.repeat(self.views),
            labels,
            [self._concepts[i] for i in indices],
            [self.data.emojis[i].keywords for i in indices],
            self._styles[torch.tensor(first)],
            again,
        )

    def _in_one_style(self, step: int, indices: list[int]) -> tuple[list[int], list[int]]:
        style = int(torch.randint(len(self.data.styles), (), generator=generator_for(self.seed, 4, step)))
        rows = {i: [row for row in self._rows[i] if self._styles[row] == style] for i in indices}
        kept = [i for i in indices if rows[i]]
        return kept, [rows[i][0] for i in kept]

    def _texts(self, indices: list[int], generator: torch.Generator) -> list[str]:
        if not self.topics:
            return [emoji.random_caption(self.data.emojis[i], generator) for i in indices]
        texts: list[str] = []
        used: set[str] = set()
        topical = torch.rand(len(indices), generator=generator) < self.topics
        for i, by_topic in zip(indices, topical.tolist(), strict=True):
            e = self.data.emojis[i]
            topic, template = torch.randint(12, (2,), generator=generator).tolist()
            name = emoji.spoken_group(
                e.group if topic < 3 else e.subgroup
            )  # there are ten subgroups to a group
            # Once per step: a second picture of the topic would count as a mismatch of its own caption.
            if by_topic and name not in used:
                used.add(name)
                texts.append(emoji.GROUP_TEMPLATES[template % len(emoji.GROUP_TEMPLATES)].format(name))
            else:
                texts.append(emoji.random_caption(e, generator))
        return texts

    def _other_style(self, index: int, row: int) -> int:
        rows = self._rows[index]
        return rows[(rows.index(row) + 1) % len(rows)]

    def _with_tone(self, index: int, generator: torch.Generator) -> int:
        toned = self._toned.get(index)
        if not toned or torch.rand((), generator=generator) >= self.tones:
            return index
        return toned[int(torch.randint(len(toned), (), generator=generator))]

    def evaluate(self, encoder: Encoder) -> EmojiEvaluation:
        """Evaluates on the held-out style and the held-out concepts."""
        return evaluate_emoji(encoder, style=self.test_style)

    def evaluate_images(self, encoder: Encoder) -> NeighbourEvaluation:
        """Evaluates picture features alone, on the held-out style."""
        return evaluate_neighbours(encoder, train_styles=self.data.styles, style=self.test_style)


class PairCorpus:
    """A user's pairs; a share of them, drawn once by the seed, is kept from training for the evaluation.

    Args:
        store: the decoded pictures.
        size: side of the pictures that the model takes.
        batch_size: captions per step and process.
        seed: see `generator_for`.
        augment: strength of the augmentation; 0: none.
        val_share: share of the pairs kept from training; at least one pair and at most 5,000 where it is not 0.
        rank: of this process.
        world_size: number of processes.

    Raises:
        ValueError: nothing is left to train on.
    """

    kind = "pairs"

    def __init__(
        self,
        store: PictureStore,
        size: int,
        *,
        batch_size: int,
        seed: int = 0,
        augment: float = 1.0,
        val_share: float = 0.1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.store, self.seed, self.rank = store, seed, rank
        count = len(store.source)
        held = min(max(1, round(val_share * count)), _KEPT_FROM_TRAINING_AT_MOST) if val_share else 0
        if count - held < world_size:
            raise ValueError(
                f"train: {count} usable pairs are too few to keep {held} for the evaluation and to train {world_size} "
                "process(es) on the rest; pass --val-share 0 to train on all"
            )
        order = torch.randperm(count, generator=generator_for(seed, 2)).tolist()
        self._held, self._trained = sorted(order[:held]), sorted(order[held:])
        captions = store.source.captions
        distinct = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        self._labels = torch.tensor([distinct[caption] for caption in captions])
        self.one_to_one = len(distinct) == count
        self._augment = Augment(size, AugmentConfig(flip=0.0).scaled(augment))
        self._epochs = _Epochs(len(self._trained), batch_size, seed, rank, world_size)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that show every pair once, but for what does not fill a batch."""
        return self._epochs.steps

    def describe(self) -> str:
        """One sentence about what there is."""
        return f"{len(self._trained):,} pairs to train on, {len(self._held):,} kept for the evaluation"

    def captions(self) -> list[str]:
        """The captions of the pairs to train on."""
        captions = self.store.source.captions
        return [captions[i] for i in self._trained]

    def facts(self) -> dict[str, Any]:
        """What `TrainingFacts` says of the data: nothing, as pairs have captions only."""
        return {}

    def batch(self, step: int, *, second_view: bool = False, single_source: bool = False) -> Batch:
        """Draws the pairs of a step; they are all of one source."""
        generator = generator_for(self.seed, 1, step, self.rank)
        pictures, rows = self.store.pictures([self._trained[row] for row in self._epochs.rows(step)])
        captions = [self.store.source.captions[i] for i in rows]
        labels = self._labels[torch.tensor(rows)]
        concepts = [Concept(i, text, -1, -1) for i, text in zip(labels.tolist(), captions, strict=True)]
        images = self._augment(pictures, generator)
        again = self._augment(pictures, generator_for(self.seed, 3, step, self.rank)) if second_view else None
        none = torch.full((len(rows),), -1)
        return Batch(images, captions, labels, labels, concepts, [()] * len(rows), none, again)

    def evaluate_images(self, encoder: Encoder) -> None:
        """Pairs have no classes that pictures alone could be tested on."""
        return

    def evaluate(self, encoder: Encoder) -> PairsEvaluation | None:
        """Evaluates on the pairs kept from training; None where there are none."""
        if not self._held:
            return None
        pictures, rows = self.store.pictures(self._held)
        captions = self.store.source.captions
        return evaluate_pairs(encoder, over_white(pictures), [captions[i] for i in rows])


def over_white(rgba: torch.Tensor) -> torch.Tensor:
    """Puts straight RGBA [N, 4, H, W] uint8 on white: [N, 3, H, W] uint8."""
    alpha = rgba[:, 3:].float() / 255
    return (rgba[:, :3] * alpha + 255 * (1 - alpha)).round().to(torch.uint8)


def _mirrors(e: emoji.Emoji) -> bool:
    return e.group not in _HANDED_GROUPS and e.subgroup != "time" and not _HANDED.search(e.name)
