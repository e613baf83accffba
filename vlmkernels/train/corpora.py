# SPDX-License-Identifier: Apache-2.0
"""What a run trains on: batch ``s`` as a function of the seed and of ``s``, so that resuming needs only the step.

`EmojiCorpus` draws from the bundled set, `PairCorpus` from a `vlmkernels.data.sources.PictureStore`. Both hand out
every caption of an epoch once, in an order drawn per epoch, and leave out what does not fill a last batch.

Several processes share a batch: each gets consecutive places of it, and what is random at a place depends on the seed,
the step and the place. So the batch of a step is the same for any number of processes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vlmkernels.data import emoji
from vlmkernels.data.augment import Augment, AugmentConfig, blend_styles
from vlmkernels.data.draws import Draws, generator_for, key_for
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


# What a key is for, beside the seed and the step.
_ORDER, _PICTURES, _HELD, _CAPTIONS, _CONCEPTS, _BLENDS, _SECOND_VIEWS, _STYLE = range(8)


@dataclass
class Batch:
    """One step's pairs, those of this process.

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
    """The order of the rows in each epoch, cut into batches, and this process's part of each.

    Args:
        count: rows in an epoch.
        batch_size: places in a batch of all processes; a data set smaller than that makes it shrink.
        seed: what the order depends on.
        rank: of this process.
        world_size: number of processes.
        shards: which file each row is in. A place of the batch then goes through its files one after the other, so
            that consecutive places, which are those of a process (and of a decoding thread), read few of them.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        shards: list[int] | None = None,
    ) -> None:
        self.count, self.seed = count, seed
        self.batch_size = min(batch_size, count)
        if self.batch_size < world_size:
            raise ValueError(
                f"train: a batch_size of {self.batch_size} is too small for {world_size} processes; each needs a pair"
            )
        self.steps = count // self.batch_size
        #: the places of the batch that are this process's
        self.places = range(rank * self.batch_size // world_size, (rank + 1) * self.batch_size // world_size)
        self._shards = None if shards is None else torch.tensor(shards)
        self._cached: tuple[int, torch.Tensor] = (-1, torch.empty(0))

    def batch(self, step: int) -> list[int]:
        """The rows of all processes."""
        epoch, within = divmod(step, self.steps)
        if self._cached[0] != epoch:
            self._cached = (epoch, self._order(epoch))
        return self._cached[1][within].tolist()

    def rows(self, step: int) -> list[int]:
        """The rows of this process."""
        return self.batch(step)[self.places.start : self.places.stop]

    def _order(self, epoch: int) -> torch.Tensor:
        """The rows of an epoch: int64 [steps, batch_size]."""
        generator = generator_for(self.seed, _ORDER, epoch)
        order = torch.randperm(self.count, generator=generator)
        used = self.steps * self.batch_size
        if self._shards is None:
            return order[:used].view(self.steps, self.batch_size)
        # Shards in a new order, the rows of each shuffled.
        turn = torch.randperm(int(self._shards.max()) + 1, generator=generator)
        order = order[turn[self._shards[order]].argsort(stable=True)]
        return order[:used].view(self.batch_size, self.steps).T

    def draws(self, step: int, purpose: int, places: Sequence[int] | None = None, *, views: int = 1) -> Draws:
        """The random numbers of places, by default those of this process; those of the second view follow."""
        members = torch.tensor(self.places if places is None else places)
        return Draws(
            key_for(self.seed, purpose, step),
            torch.cat([members + view * self.batch_size for view in range(views)]),
        )


class EmojiCorpus:
    """The bundled emoji in the training styles, without the held-out concepts.

    A caption of a step belongs to one concept, and no two captions of a step to the same, so that nothing in a batch
    is wrongly pushed apart.

    Args:
        size: side of the pictures that the model takes.
        batch_size: captions per step, over all processes.
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
        self.views, self.seed, self.blend, self.tones = views, seed, blend, tones
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

    @property
    def batch_size(self) -> int:
        """Captions per step, over all processes; fewer than asked for where there are no more."""
        return self._epochs.batch_size

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
        """Draws the pairs of a step, those of this process.

        Args:
            step: its number.
            second_view: augment the same pictures once more.
            single_source: all pictures in one style, drawn for the step; what it does not have is left out.
        """
        draws = self._epochs.draws(step, _CONCEPTS)
        rows, toned = self._epochs.rows(step), draws.chance(self.tones).tolist()
        tones, picks = draws.uniform().tolist(), draws.uniform().tolist()
        places = list(self._epochs.places)
        indices = [
            self._with_tone(self.concepts[row], tone) if with_tone else self.concepts[row]
            for row, with_tone, tone in zip(rows, toned, tones, strict=True)
        ]
        first = [self._rows[i][int(p * len(self._rows[i]))] for i, p in zip(indices, picks, strict=True)]
        if single_source:
            places, indices, first = self._in_one_style(step, places, indices)
        # The other style where there is one.
        second = [self._other_style(i, row) for i, row in zip(indices, first, strict=True)]
        pictures, others = self._pictures[torch.tensor(first)], self._pictures[torch.tensor(second)]
        share, draws = 0.0 if single_source else self.blend, self._epochs.draws(step, _BLENDS, places)
        views = [blend_styles(pictures, others, draws, share=share)]
        if self.views == 2:
            views.append(blend_styles(others, pictures, draws, share=share))
        labels = torch.tensor(indices)
        drawn, may_flip = torch.cat(views), self._may_flip[labels].repeat(self.views)
        images, again = (
            self._augment(
                drawn, self._epochs.draws(step, purpose, places, views=self.views), may_flip=may_flip
            )
            if wanted
            else None
            for purpose, wanted in ((_PICTURES, True), (_SECOND_VIEWS, second_view))
        )
        assert images is not None
        return Batch(
            images,
            self._texts(step, places, indices),
            labels.repeat(self.views),
            labels,
            [self._concepts[i] for i in indices],
            [self.data.emojis[i].keywords for i in indices],
            self._styles[torch.tensor(first)],
            again,
        )

    def _in_one_style(
        self, step: int, places: list[int], indices: list[int]
    ) -> tuple[list[int], list[int], list[int]]:
        """The places and indices that the step's style has, and their pictures."""
        style = int(
            torch.randint(len(self.data.styles), (), generator=generator_for(self.seed, _STYLE, step))
        )
        rows = {i: [row for row in self._rows[i] if self._styles[row] == style] for i in indices}
        kept = [(place, i) for place, i in zip(places, indices, strict=True) if rows[i]]
        return [place for place, _ in kept], [i for _, i in kept], [rows[i][0] for _, i in kept]

    def _texts(self, step: int, places: list[int], indices: list[int]) -> list[str]:
        topics = self._topics(step) if self.topics else {}
        texts = []
        for place, i in zip(places, indices, strict=True):
            drawn = generator_for(self.seed, _CAPTIONS, step, place) if place not in topics else None
            texts.append(topics[place] if drawn is None else emoji.random_caption(self.data.emojis[i], drawn))
        return texts

    def _topics(self, step: int) -> dict[int, str]:
        """The places of the whole batch whose caption names only a topic, and those captions.

        A topic is named once per step: a second picture of it would count as a mismatch of its own caption.
        """
        draws = self._epochs.draws(step, _CAPTIONS, range(self.batch_size))
        places = draws.chance(self.topics).nonzero()[:, 0].tolist()
        kinds, templates = draws.integers(12).tolist(), draws.integers(len(emoji.GROUP_TEMPLATES)).tolist()
        rows, captions, used = self._epochs.batch(step), {}, set()
        for place in places:
            e = self.data.emojis[self.concepts[rows[place]]]
            # there are ten subgroups to a group
            name = emoji.spoken_group(e.group if kinds[place] < 3 else e.subgroup)
            if name not in used:
                used.add(name)
                captions[place] = emoji.GROUP_TEMPLATES[templates[place]].format(name)
        return captions

    def _other_style(self, index: int, row: int) -> int:
        rows = self._rows[index]
        return rows[(rows.index(row) + 1) % len(rows)]

    def _with_tone(self, index: int, drawn: float) -> int:
        toned = self._toned.get(index, [index])
        return toned[int(drawn * len(toned))]

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
        batch_size: captions per step, over all processes.
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
        self.store = store
        count = len(store.source)
        held = min(max(1, round(val_share * count)), _KEPT_FROM_TRAINING_AT_MOST) if val_share else 0
        if count - held < world_size:
            raise ValueError(
                f"train: {count} usable pairs are too few to keep {held} for the evaluation and to train {world_size} "
                "process(es) on the rest; pass --val-share 0 to train on all"
            )
        order = torch.randperm(count, generator=generator_for(seed, _HELD)).tolist()
        self._held, self._trained = sorted(order[:held]), sorted(order[held:])
        captions = store.source.captions
        distinct = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        self._labels = torch.tensor([distinct[caption] for caption in captions])
        self.one_to_one = len(distinct) == count
        self._augment = Augment(size, AugmentConfig(flip=0.0).scaled(augment))
        shards = None
        if store.source.kind == "shards":
            files = store.source.files()
            shards = [files[row] for row in self._trained]
        self._epochs = _Epochs(len(self._trained), batch_size, seed, rank, world_size, shards)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that show every pair once, but for what does not fill a batch."""
        return self._epochs.steps

    @property
    def batch_size(self) -> int:
        """Captions per step, over all processes; fewer than asked for where there are no more."""
        return self._epochs.batch_size

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
        """Draws the pairs of a step, those of this process; they are all of one source."""
        pictures, rows = self.store.pictures([self._trained[row] for row in self._epochs.rows(step)])
        captions = [self.store.source.captions[i] for i in rows]
        labels = self._labels[torch.tensor(rows)]
        concepts = [Concept(i, text, -1, -1) for i, text in zip(labels.tolist(), captions, strict=True)]
        images = self._augment(pictures, self._epochs.draws(step, _PICTURES))
        again = self._augment(pictures, self._epochs.draws(step, _SECOND_VIEWS)) if second_view else None
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
