# SPDX-License-Identifier: Apache-2.0
"""ZPE: scores against brute force in float64, the identities of debiasing and weighting, and corrupted templates."""

from __future__ import annotations

import pytest
import torch

from vlmkernels.data import emoji
from vlmkernels.methods.zeroshot import (
    ZPE,
    PromptClassifier,
    select_templates,
    zpe_classifier,
    zpe_scores,
    zpe_weights,
)
from vlmkernels.methods.zeroshot._classifier import prompt_features

SCALE = 20.0
SENSIBLE = [
    *emoji.NAME_TEMPLATES,
    "a photo of a {}.",
    "an image of {}",
    "a sticker of {}",
    "clipart of {}",
    "a simple icon of {}",
    "a cartoon of {}",
    "a graphic of {}",
    "a symbol of {}",
]
CORRUPTED = [
    "purple {} in a bank",
    "seven trains and {}",
    "wet {} accounting",
    "cow cow {} cow",
    "a car near the {} house",
    "{} {} rain snow cloud",
    "a pizza with {} and cheese",
    "flag of {}",
    "man and woman with {}",
    "{} clock at three thirty",
    "zodiac {} sign",
    "a letter about {} and keys",
    "musical {} note",
    "green apple, {} tree",
    "keycap {}",
]


@pytest.fixture
def small(unit_rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Text [P, C, D], test images and pretraining-like images."""
    return unit_rows(6, 9, 16), unit_rows(40, 16, seed=1), unit_rows(30, 16, seed=2)


def brute_scores(text, images, pretrain, debias: str, generic=None) -> torch.Tensor:
    test, before = (SCALE * torch.einsum("nd,pcd->npc", x, text) for x in (images, pretrain))
    offset = {
        "none": torch.zeros(text.shape[:2], dtype=torch.float64),
        "test": test.mean(0),
        "pretrain": before.mean(0),
        "both": 0.5 * (test.mean(0) + before.mean(0)),
    }
    if generic is not None:
        offset["pretrain_star"] = (SCALE * torch.einsum("nd,pcd->npc", pretrain, generic)).mean((0, 2))[
            :, None
        ]
    return (test - offset[debias]).amax(2)


@pytest.mark.parametrize("debias", ["none", "test", "pretrain", "both", "pretrain_star"])
def test_scores_are_those_of_the_logits(small, unit_rows, debias: str) -> None:
    text, images, pretrain = small
    generic = unit_rows(6, 11, 16, seed=4)
    brute = brute_scores(text, images, pretrain, debias, generic)
    got = zpe_scores(
        text, images, pretrain, logit_scale=SCALE, debias=debias, per_example=True, generic_text=generic
    )
    torch.testing.assert_close(got, brute)
    mean = zpe_scores(text, images, pretrain, logit_scale=SCALE, debias=debias, generic_text=generic)
    torch.testing.assert_close(mean, brute.mean(0))


def test_offsets_common_to_both_sets_leave_no_trace(small) -> None:
    """An offset beta[p, c] on all logits is one more coordinate that every image has in the same amount."""
    text, images, pretrain = small
    beta = torch.randn(text.shape[:2], dtype=torch.float64)
    shifted = torch.cat([text, beta[..., None]], 2)
    images_1, pretrain_1 = (
        torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1) for x in (images, pretrain)
    )

    def scores(debias: str, *tensors: torch.Tensor) -> torch.Tensor:
        return zpe_scores(*tensors, logit_scale=SCALE, debias=debias)

    torch.testing.assert_close(scores("both", shifted, images_1, pretrain_1), scores("both", *small))
    assert (scores("none", shifted, images_1, pretrain_1) - scores("none", *small)).abs().min() > 0.1


def test_equal_weights_are_the_plain_average_of_logits(small) -> None:
    text, images, _ = small
    scores = zpe_scores(*small, logit_scale=SCALE, debias="none")
    weight = zpe_classifier(text, zpe_weights(scores, "equal"))
    plain = torch.einsum("nd,pcd->npc", images, text).mean(1)
    torch.testing.assert_close(images @ weight.T, plain)


def test_weighted_logits_are_those_of_the_weighted_classes(small) -> None:
    text, images, _ = small
    weights = zpe_weights(zpe_scores(*small, logit_scale=SCALE))
    weighted = (weights[:, None] * torch.einsum("nd,pcd->npc", images, text)).sum(1)
    torch.testing.assert_close(images @ zpe_classifier(text, weights).T, weighted)
    assert (zpe_classifier(text, weights).norm(dim=1) < 0.99).all()  # not normalised again


def test_copies_of_one_template_share_its_weight(unit_rows) -> None:
    text = unit_rows(1, 9, 16).repeat(4, 1, 1)
    classifier = ZPE(None, list("abcdefghi"), ["{}"] * 4, text=text, debias="test", logit_scale=SCALE)
    images = unit_rows(30, 16, seed=1)
    got = classifier.fit(images)
    torch.testing.assert_close(got.weights, torch.full((4,), 0.25, dtype=torch.float64))
    assert torch.equal(got.predict(images).labels, (images @ text[0].T).argmax(1))


def test_weightings(small) -> None:
    scores = torch.tensor([3.0, 1.0, -2.0])
    assert zpe_weights(scores, "score").tolist() == [0.75, 0.25, 0.0]
    assert zpe_weights(scores, "score10")[0] > 0.9999
    assert zpe_weights(torch.tensor([-1.0, -2.0]), "score").tolist() == [0.5, 0.5]
    assert float(zpe_weights(torch.full((3,), 1e30), "score10").sum()) == pytest.approx(1)


def test_selection_is_one_sided_with_plain_deviations() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0])  # median 2, deviations 2 1 0 1 8, MAD 1
    assert select_templates(scores, 0.5).tolist() == [False, False, False, True, True]
    assert select_templates(scores, 2.0).tolist() == [False] * 4 + [True]
    assert select_templates(scores, 9.0).tolist() == [False] * 4 + [True]  # nothing passes: the best stays
    assert select_templates(scores, -torch.inf).all()
    equal = torch.tensor([1.0, 1.0, 1.0, 1.5])
    assert select_templates(equal, 0.5).tolist() == [False, False, False, True]  # MAD 0
    assert select_templates(equal, -0.5).all()


def test_per_example_weights(small) -> None:
    text, images, pretrain = small
    classifier = ZPE(None, list("abcdefghi"), ["{}"] * 6, text=text, per_example=True, logit_scale=SCALE)
    classifier.fit(images, pretrain)
    weights = brute_scores(text, images, pretrain, "both").softmax(1)
    expected = torch.einsum("np,npc->nc", weights, SCALE * torch.einsum("nd,pcd->npc", images, text))
    torch.testing.assert_close(classifier.scores(images), expected)
    assert torch.equal(classifier.predict(images).labels, expected.argmax(1))


def test_bad_input(small, encoder) -> None:
    text, images, _ = small
    with pytest.raises(ValueError, match="needs pretraining-like"):
        zpe_scores(text, images)
    with pytest.raises(ValueError, match="no image"):
        zpe_scores(text, images[:0], debias="test")
    with pytest.raises(ValueError, match="call fit"):
        ZPE(encoder, ["a"], ["{}"]).predict(torch.ones(1, 256))
    with pytest.raises(ValueError, match="debias must be one of"):
        ZPE(encoder, ["a"], ["{}"], debias="all")


def test_corrupted_templates_get_little_weight(encoder, emojis, features, every_fourth, record_claim) -> None:
    pairs, entries = every_fourth
    names, labels = [emoji.spoken_name(e) for e in entries], torch.arange(len(entries))
    images = features(pairs)
    before = features(emojis.select(split="train", styles="noto", base_only=True)[::8])
    names, labels, images = names[::2], labels[: len(names[::2])], images[::2]
    pool = SENSIBLE + CORRUPTED
    text = prompt_features(encoder, names, pool).transpose(0, 1)
    fitted = {
        w: ZPE(encoder, names, pool, weighting=w, text=text).fit(images, before) for w in ("softmax", "equal")
    }
    accuracy = {w: float((c.predict(images).labels == labels).float().mean()) for w, c in fitted.items()}
    good, bad = fitted["softmax"].weights.split([len(SENSIBLE), len(CORRUPTED)])
    selected = ZPE(encoder, names, pool, select_threshold=0.5, text=text).fit(images, before)
    kept = float((selected.weights[len(SENSIBLE) :] > 0).float().mean())
    plain = PromptClassifier(encoder, names, SENSIBLE)  # what the pool could reach without the others
    ceiling = float((plain.predict(images).labels == labels).float().mean())
    picked = float((selected.predict(images).labels == labels).float().mean())
    record_claim(
        system="ZPE",
        claim="templates that do not fit get less weight, and the weighted pool beats the plain average",
        expected="mean weight of sensible templates above that of corrupted ones; accuracy at least the average's",
        seen=f"weights {float(good.mean()):.4f} and {float(bad.mean()):.4f}; "
        f"accuracy {accuracy['softmax']:.1%} weighted, "
        f"{picked:.1%} selected, {accuracy['equal']:.1%} averaged, {ceiling:.1%} sensible ones alone; "
        f"{kept:.0%} of the corrupted ones selected",
        holds=bool(good.mean() > bad.mean()) and accuracy["softmax"] >= accuracy["equal"],
        seeds=[0],
    )
    assert good.mean() > bad.mean()
    assert accuracy["softmax"] > accuracy["equal"]
    assert picked > accuracy["equal"]


def test_debiasing_lowers_a_popular_word(encoder, emojis, features, every_fourth, record_claim) -> None:
    """ "face" is a frequent keyword: it fits many pictures whatever their class."""
    pairs, entries = every_fourth
    faces = [i for i, e in enumerate(entries) if e.subgroup.startswith("face")]
    names = [emoji.spoken_name(entries[i]) for i in faces]
    images = features(pairs)[faces]
    before = features(emojis.select(split="train", styles="noto", base_only=True)[::8])
    pool = [*SENSIBLE, "face: {}"]

    def rank(debias: str) -> int:
        scores = ZPE(encoder, names, pool, debias=debias).fit(images, before).template_scores
        return int((scores > scores[-1]).sum()) + 1

    without, both = rank("none"), rank("both")
    record_claim(
        system="ZPE",
        claim="debiasing lowers a template that holds a popular word",
        expected='"face: {}" ranks high among templates for faces without debiasing and lower with it',
        seen=f"rank {without} of {len(pool)} without, {both} with",
        holds=both > without,
        seeds=[0],
    )
    assert min(without, both) >= 1 and max(without, both) <= len(pool)
