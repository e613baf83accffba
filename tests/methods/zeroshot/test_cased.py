# SPDX-License-Identifier: Apache-2.0
"""CaSED: the word filters, retrieval against brute force, the limits of alpha, and emoji without a list of names."""

from __future__ import annotations

import random

import pytest
import torch

from vlmkernels.data import emoji
from vlmkernels.methods.zeroshot import (
    CaptionBank,
    CaSED,
    cluster_accuracy,
    semantic_iou,
    semantic_similarity,
)
from vlmkernels.methods.zeroshot._words import candidate_words, singular
from vlmkernels.methods.zeroshot.cased import _representatives
from vlmkernels.ops.flat_index import FlatIndex

CAPTIONS = [
    "a red apple",
    "red apple, fruit",
    "green pear",
    "pear fruit on a tree",
    "blue car",
    "a fast blue car",
]


def test_filters_in_order() -> None:
    text = [
        "<person> likes Dogs at http://x.y/z",
        "two dogs.jpg; a-cat & 3 cats!",
        "photo of photos of an icon",
    ]
    # dogs.jpg loses its ending and counts; photo and icon are words for the medium; two is a function word
    assert candidate_words(text) == ["dog", "cat"]
    assert candidate_words(["apple pear"]) == ["apple", "pear"]  # none occurs twice: the most frequent stay
    assert candidate_words(["a photo of it 123"]) == ["object"]
    assert candidate_words(["dog dog cat"]) == ["dog"]  # twice in one caption passes
    assert candidate_words(["quickly quickly dog dog"]) == ["dog"]
    assert candidate_words(["dog dog cat cat"], tagger=lambda words: [w == "cat" for w in words]) == ["cat"]


def test_singulars() -> None:
    words = ["dogs", "glass", "bus", "cherries", "tomatoes", "boxes", "churches", "dishes", "iris", "sky"]
    assert [singular(w) for w in words] == [
        *("dog", "glass", "bus", "cherries", "tomatoes"),
        *("box", "church", "dish", "iris", "sky"),
    ]


def test_copies_are_linked_transitively() -> None:
    angles = torch.tensor([0.0, 0.3, 0.6, 2.0])  # neighbours have cosine 0.955, the ends 0.825
    vectors = torch.stack([angles.cos(), angles.sin()], 1)
    assert _representatives(vectors, 0.94) == [0, 3]
    assert _representatives(vectors, 1.1) == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def bank(encoder) -> CaptionBank:
    return CaptionBank.build(encoder, CAPTIONS)


def test_retrieval_is_the_brute_force_order(encoder, bank, unit_rows) -> None:
    x = unit_rows(12, 256, dtype=torch.float32)
    system = CaSED(encoder, bank, k=4, dedup=1.1)
    expected = (x.double() @ encoder.texts(CAPTIONS).double().T).topk(4)
    got = system.retrieve(x)
    assert [[i for i, _ in row] for row in got] == expected.indices.tolist()
    torch.testing.assert_close(
        torch.tensor([[s for _, s in row] for row in got]), expected.values.float(), rtol=0, atol=1e-6
    )


def test_batch_is_a_loop_over_images(encoder, bank, unit_rows) -> None:
    x = unit_rows(12, 256, dtype=torch.float32)
    system = CaSED(encoder, bank, k=4)
    together, alone = system.predict(x), [CaSED(encoder, bank, k=4).predict(row[None])[0] for row in x]
    for a, b in zip(together, alone, strict=True):
        assert a.words == b.words and a.captions == b.captions
        torch.testing.assert_close(torch.tensor(a.probabilities), torch.tensor(b.probabilities))
        assert sum(a.probabilities) == pytest.approx(1, abs=1e-5)


def test_probabilities_are_the_two_softmaxes(encoder, bank, unit_rows) -> None:
    x = unit_rows(3, 256, dtype=torch.float32)
    s = float(encoder.model.logit_scale.detach().exp())
    texts = encoder.texts(CAPTIONS)
    for alpha in (0.0, 0.7, 1.0):
        for f, got in zip(
            x, CaSED(encoder, bank, k=4, alpha=alpha, tau=2.0, dedup=1.1).predict(x), strict=True
        ):
            near = (texts @ f).topk(4).indices
            words = candidate_words([CAPTIONS[i] for i in near])
            w = encoder.texts(words)
            centre = texts[near].mean(0)
            centre = centre / centre.norm()
            p = alpha * (s / 2 * w @ f).softmax(0) + (1 - alpha) * (s / 2 * w @ centre).softmax(0)
            order = p.argsort(descending=True, stable=True)
            assert got.words == [words[i] for i in order]
            torch.testing.assert_close(torch.tensor(got.probabilities), p[order], rtol=1e-4, atol=1e-6)


def test_alpha_zero_sees_the_image_through_retrieval_alone(encoder, bank, unit_rows) -> None:
    x = unit_rows(1, 256, dtype=torch.float32)
    near = x + 1e-4 * unit_rows(1, 256, seed=1, dtype=torch.float32)
    system = CaSED(encoder, bank, k=4, alpha=0.0)
    assert system.retrieve(x)[0][0][0] == system.retrieve(near)[0][0][0]
    assert system.predict(x)[0].probabilities == system.predict(near)[0].probabilities
    one = CaSED(encoder, CaptionBank.build(encoder, ["zebra"]), k=1).predict(x)[0]
    assert (one.words, one.probabilities) == (["zebra"], [1.0])


def test_encoding_the_captions_again_changes_nothing(encoder, bank, unit_rows) -> None:
    x = unit_rows(4, 256, dtype=torch.float32)
    for a, b in zip(
        *(CaSED(encoder, bank, k=4, centroid=c).predict(x) for c in ("bank", "encode")), strict=True
    ):
        assert a.words == b.words
        torch.testing.assert_close(
            torch.tensor(a.probabilities), torch.tensor(b.probabilities), rtol=1e-4, atol=1e-6
        )


def test_a_bank_is_saved_and_loaded(encoder, bank, unit_rows, tmp_path) -> None:
    bank.save(tmp_path / "bank")
    again = CaptionBank.load(tmp_path / "bank", mmap=True)
    x = unit_rows(4, 256, dtype=torch.float32)
    assert again.captions == CAPTIONS
    assert CaSED(encoder, again, k=3).retrieve(x) == CaSED(encoder, bank, k=3).retrieve(x)
    why = CaSED(encoder, again, k=3).explain(x[:1], count=2)[0]
    assert len(why.reasons) == 2 and why.reasons[0].text in CAPTIONS


def test_bad_input(encoder, bank) -> None:
    with pytest.raises(ValueError, match="k must lie"):
        CaSED(encoder, bank, k=7)
    with pytest.raises(ValueError, match="alpha must"):
        CaSED(encoder, bank, alpha=1.5)
    with pytest.raises(ValueError, match="there is no caption"):
        CaptionBank.build(encoder, [])
    index = FlatIndex(2, metric="dot")
    index.add(torch.eye(2))
    with pytest.raises(ValueError, match="cosine"):
        CaptionBank(["a", "b"], index)


@pytest.mark.slow
def test_a_million_captions(encoder) -> None:
    """Retrieval over a million vectors from int8 codes alone; the scan's own memory stays within a few MiB."""
    generator = torch.Generator().manual_seed(0)
    index = FlatIndex(256, storage="int8", exact=False)
    for _ in range(100):
        index.add(torch.randn(10_000, 256, generator=generator))
    captions = [f"picture {i} of thing number {i}" for i in range(1_000_000)]
    system = CaSED(encoder, CaptionBank(captions, index), centroid="encode", k=10)
    found = system.predict(index.reconstruct([7, 500_000]))
    assert [p.captions[0][0] for p in found] == [captions[7], captions[500_000]]


def test_emoji_without_a_list_of_names(encoder, features, every_fourth, record_claim) -> None:
    pairs, entries = every_fourth
    chosen = [e for e in entries if e.group not in ("Flags", "Symbols")]
    x = features(pairs)[[i for i, e in enumerate(entries) if e.group not in ("Flags", "Symbols")]]
    true = [emoji.spoken_name(e) for e in chosen]
    # names and keywords of every fourth concept; the model trained on other drawings of them, not on these
    bank = CaptionBank.build(encoder, [c for e in chosen for c in emoji.captions(e)][:6000])
    alphas = {alpha: CaSED(encoder, bank, alpha=alpha).predict(x) for alpha in (0.0, 0.7, 1.0)}
    iou = {alpha: semantic_iou([p.word for p in found], true) for alpha, found in alphas.items()}
    words = [p.word for p in alphas[0.7]]
    everything = sorted({w for p in alphas[0.7] for w in p.words})
    draw = random.Random(0)
    chance = semantic_iou([draw.choice(everything) for _ in true], true)
    caption = semantic_iou([p.captions[0][0] for p in alphas[0.7]], true)
    record_claim(
        system="CaSED",
        claim="words mined from retrieved captions name pictures without a list of classes",
        expected="semantic IoU far above random words; alpha 0.7 at least the worse of 0 and 1; above the "
        "closest caption",
        seen=f"IoU {iou[0.7]:.3f} (alpha 0: {iou[0.0]:.3f}, 1: {iou[1.0]:.3f}); random word {chance:.3f}; "
        "closest caption "
        f"{caption:.3f}; similarity {semantic_similarity(encoder, words, true):.3f}; "
        f"cluster accuracy {cluster_accuracy(words, true):.3f}; {len(true)} pictures",
        holds=iou[0.7] > 5 * chance and iou[0.7] >= min(iou[0.0], iou[1.0]) and caption < iou[0.7],
        seeds=[0],
    )
    assert iou[0.7] > 5 * chance
    assert iou[0.7] >= min(iou[0.0], iou[1.0])
