# SPDX-License-Identifier: Apache-2.0
"""Batches: distinct concepts, every caption once per epoch, nothing held out, the same for the same step."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from vlmkernels.data import emoji
from vlmkernels.data.sources import PictureStore, open_source
from vlmkernels.train.corpora import Batch, EmojiCorpus, PairCorpus, _Epochs, over_white


@pytest.fixture(scope="module")
def corpus() -> EmojiCorpus:
    return EmojiCorpus(16, batch_size=64)


def test_a_step_has_distinct_concepts(corpus: EmojiCorpus) -> None:
    batch = corpus.batch(3)
    assert batch.images.shape == (64, 3, 16, 16)
    assert len(batch.texts) == 64
    bases = {emoji.load().emojis[i].base for i in batch.text_labels.tolist()}
    assert len(bases) == 64
    assert torch.equal(batch.image_labels, batch.text_labels)


def test_an_epoch_shows_every_concept_once(corpus: EmojiCorpus) -> None:
    first, second = (
        [
            row
            for step in range(corpus.steps_per_epoch)
            for row in corpus._epochs.rows(epoch * corpus.steps_per_epoch + step)
        ]
        for epoch in range(2)
    )
    assert len(set(first)) == len(first) > len(corpus.concepts) - 64
    assert first != second


def test_held_out_concepts_and_styles_are_not_shown(corpus: EmojiCorpus) -> None:
    data = emoji.load()
    assert corpus.data.styles == emoji.TRAIN_STYLES
    held = {e.index for e in data.emojis if e.held_out}
    shown = {*corpus.concepts, *(i for toned in corpus._toned.values() for i in toned)}
    assert held
    assert not held & shown
    assert corpus.test_style == emoji.HELD_OUT_STYLE


def test_steps_repeat(corpus: EmojiCorpus) -> None:
    again = EmojiCorpus(16, batch_size=64)
    for step in (0, 5):
        one, two = corpus.batch(step), again.batch(step)
        assert torch.equal(one.images, two.images)
        assert one.texts == two.texts


def together(ranks: list[EmojiCorpus] | list[PairCorpus], step: int, views: int, **options: bool) -> Batch:
    """The batch of all processes, in the order of the one-process batch."""
    batches = [rank.batch(step, **options) for rank in ranks]

    def joined(name: str) -> torch.Tensor:
        parts = zip(*(getattr(b, name).chunk(views) for b in batches), strict=True)
        return torch.cat([x for view in parts for x in view])

    return Batch(
        joined("images"),
        [text for b in batches for text in b.texts],
        joined("image_labels"),
        torch.cat([b.text_labels for b in batches]),
        [concept for b in batches for concept in b.concepts],
        [words for b in batches for words in b.keywords],
        torch.cat([b.source for b in batches]),
        joined("second") if options.get("second_view") else None,
    )


def assert_same_batch(got: Batch, wanted: Batch) -> None:
    assert (got.texts, got.concepts, got.keywords) == (wanted.texts, wanted.concepts, wanted.keywords)
    for name in ("text_labels", "image_labels", "source"):
        assert torch.equal(getattr(got, name), getattr(wanted, name)), name
    # Batched matrix products round differently for another number of pictures: coordinates move by an ulp of 16 pixels.
    torch.testing.assert_close(got.images, wanted.images, rtol=0, atol=1e-4)
    if wanted.second is not None:
        torch.testing.assert_close(got.second, wanted.second, rtol=0, atol=1e-4)


@pytest.mark.parametrize("views", [1, 2])
def test_processes_share_the_batch_of_one(views: int) -> None:
    one = EmojiCorpus(16, batch_size=50, views=views, topics=0.5)
    for processes in (2, 3):
        ranks = [copy.copy(one) for _ in range(processes)]  # opening the pictures takes a second
        for rank, corpus in enumerate(ranks):
            corpus._epochs = _Epochs(len(one.concepts), 50, 0, rank, processes)
        for step, options in (
            (0, {}),
            (one.steps_per_epoch + 1, {"second_view": True}),
            (1, {"single_source": True}),
        ):
            assert_same_batch(together(ranks, step, views, **options), one.batch(step, **options))


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("memory", [0, 1 << 30], ids=["on demand", "in memory"])
def test_processes_share_a_batch_of_shards(shapes_shards: Path, processes: int, memory: int) -> None:
    with PictureStore(open_source(shapes_shards), 20, memory=memory, workers=3) as store:
        settings = {"batch_size": 20, "val_share": 0.1}
        one = PairCorpus(store, 16, **settings)
        ranks = [
            PairCorpus(store, 16, **settings, rank=rank, world_size=processes) for rank in range(processes)
        ]
        for step in (0, one.steps_per_epoch):
            assert_same_batch(together(ranks, step, 1), one.batch(step))


def test_processes_and_their_threads_read_shards_of_their_own(shapes_shards: Path) -> None:
    source = open_source(shapes_shards)
    files = source.files()
    with PictureStore(source, 20) as store:
        ranks = [
            PairCorpus(store, 16, batch_size=12, val_share=0.0, rank=rank, world_size=3) for rank in range(3)
        ]
        steps = ranks[0].steps_per_epoch
        seen = []
        for rank in ranks:
            rows = [[rank._trained[row] for row in rank._epochs.rows(step)] for step in range(steps)]
            seen.append({files[row] for step in rows for row in step})
            for place in zip(*rows, strict=True):  # what a place of the batch shows, step by step
                assert len({files[row] for row in place}) <= 2
        assert len(set(files)) == 6
        assert all(
            len(own) <= 3 for own in seen
        )  # 6 shards for 3 processes; one may be shared with a neighbour
        order = [row for step in range(steps) for row in ranks[0]._epochs.batch(step)]
        assert len(set(order)) == len(order) == steps * 12


def test_a_batch_smaller_than_the_processes_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch_size of 2 is too small for 3 processes"):
        _Epochs(100, batch_size=2, seed=0, rank=0, world_size=3)


def test_two_views_share_their_captions() -> None:
    batch = EmojiCorpus(16, batch_size=32, views=2).batch(0)
    assert batch.images.shape == (64, 3, 16, 16)
    assert len(batch.texts) == 32
    assert torch.equal(batch.image_labels, batch.text_labels.repeat(2))


def test_a_share_of_the_captions_names_only_a_topic() -> None:
    data = emoji.load()
    # Without the bare name, which a caption of a single keyword may equal.
    templates = emoji.GROUP_TEMPLATES[1:]
    topics = {t.format(emoji.spoken_group(g)) for g in (*data.groups, *data.subgroups) for t in templates}
    for share, low, high in ((0.0, 0, 0), (0.5, 15, 100)):
        corpus = EmojiCorpus(16, batch_size=200, topics=share)
        found = [text for text in corpus.batch(0).texts if text in topics]
        assert low <= len(found) <= high
        assert len(set(found)) == len(found)
        assert topics.isdisjoint(corpus.captions()) == (share == 0.0)  # the vocabulary is learned from them


def test_directions_and_letters_are_not_mirrored(corpus: EmojiCorpus) -> None:
    may = {e.name: bool(corpus._may_flip[e.index]) for e in corpus.data.emojis}
    for name in (
        "right arrow",
        "left-facing fist",
        "flag: Japan",
        "keycap: 3",
        "A button (blood type)",
    ):
        assert not may[name]
    for name in ("dog face", "pizza", "bicycle"):
        assert may[name]


def test_pairs_keep_a_share_from_training(shapes_folder: Path) -> None:
    with PictureStore(open_source(shapes_folder), 20) as store:
        corpus = PairCorpus(store, 16, batch_size=8, val_share=0.25)
        assert len(corpus._held) == 18
        assert not set(corpus._held) & set(corpus._trained)
        assert corpus.batch(0).images.shape == (8, 3, 16, 16)
        everything = PairCorpus(store, 16, batch_size=1000, val_share=0.0)
        assert len(everything.batch(0).texts) == 72
        labels, texts = everything.batch(0).text_labels.tolist(), everything.batch(0).texts
        assert len(set(zip(labels, texts, strict=True))) == len(set(labels)) == len(set(texts))


def test_too_few_pairs_are_refused(shapes_folder: Path) -> None:
    source = open_source(shapes_folder)
    source.pairs = source.pairs[:1]
    with PictureStore(source, 20) as store, pytest.raises(ValueError, match="1 usable pairs are too few"):
        PairCorpus(store, 16, batch_size=8)


def test_transparent_pictures_lie_on_white() -> None:
    rgba = torch.tensor([0, 100, 200, 128], dtype=torch.uint8).view(1, 4, 1, 1)
    assert over_white(rgba).flatten().tolist() == [127, 177, 227]
