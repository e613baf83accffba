# SPDX-License-Identifier: Apache-2.0
"""FuDD: its limits (k = 1, k = C, no descriptions), order and caching, and crowded subgroups of emoji."""

from __future__ import annotations

import pytest
import torch

from vlmkernels.data import emoji
from vlmkernels.methods.zeroshot import (
    DescriptorClassifier,
    EmojiDescriptions,
    FuDD,
    PromptClassifier,
    pair_key,
)

NAMES = ["red apple", "green apple", "tomato", "cherries", "watermelon", "lemon"]


def table(names: list[str]) -> dict[tuple[int, int], list[tuple[str, str, str]]]:
    """Two captions for every pair of classes, one of them the same against all others."""
    return {
        (i, j): [
            ("kind", f"{names[i]}, unlike {names[j]}", f"{names[j]}, unlike {names[i]}"),
            ("size", f"a {names[i]} of its size", f"a {names[j]} of its size"),
        ]
        for i in range(len(names))
        for j in range(i + 1, len(names))
    }


@pytest.fixture
def x(unit_rows) -> torch.Tensor:
    return unit_rows(30, 256, dtype=torch.float32)


def test_one_candidate_is_the_first_step(encoder, x) -> None:
    first = PromptClassifier(encoder, NAMES, ("A photo of a {}.",), logit_scale=1.0)
    classifier = FuDD(encoder, NAMES, table(NAMES), k=1)
    assert torch.equal(classifier.predict(x).labels, first.predict(x).labels)


def test_without_descriptions_the_first_step_decides(encoder, x) -> None:
    classifier = FuDD(encoder, NAMES, {}, k=3)
    assert torch.equal(classifier.predict(x).labels, classifier.first(x).labels)
    torch.testing.assert_close(classifier.scores(x).amax(1), classifier.first.logits(x).amax(1))


def test_all_candidates_are_the_one_pass_variant(encoder, x) -> None:
    classifier = FuDD(encoder, NAMES, table(NAMES), k=len(NAMES))
    torch.testing.assert_close(classifier.scores(x), classifier.all_pairs().logits(x))


def test_scores_are_those_of_a_plain_loop(encoder, x) -> None:
    classifier, pairs = FuDD(encoder, NAMES, table(NAMES), k=3), table(NAMES)
    got = classifier.scores(x)
    for row, f in enumerate(x):
        members = (classifier.first.logits(x)[row]).topk(3).indices.tolist()
        for i in members:
            own = set()
            for j in members:
                if i < j:
                    own |= {c for _, c, _ in pairs[i, j]}
                elif j < i:
                    own |= {c for _, _, c in pairs[j, i]}
            t = encoder.texts(sorted(own)).double().mean(0)
            assert float(got[row, i]) == pytest.approx(float(f.double() @ t / t.norm()), abs=1e-6)
        assert torch.isinf(got[row]).sum() == 3


def test_order_of_pairs_and_sets_does_not_matter(encoder, x) -> None:
    forward = FuDD(encoder, NAMES, table(NAMES), k=4)
    back = list(reversed(range(len(NAMES))))
    names = [NAMES[i] for i in back]
    turned = {
        (back.index(j), back.index(i)): [(a, second, first) for a, first, second in found]
        for (i, j), found in reversed(table(NAMES).items())
    }
    backward = FuDD(encoder, names, turned, k=4)
    torch.testing.assert_close(forward.scores(x), backward.scores(x)[:, back])


def test_texts_are_encoded_once(encoder, x) -> None:
    class Counting:
        model, seen = encoder.model, []

        def images(self, pictures):
            return encoder.images(pictures)

        def texts(self, texts):
            self.seen.extend(texts)
            return encoder.texts(texts)

    counting = Counting()
    classifier = FuDD(counting, NAMES, table(NAMES), k=4)
    first = classifier.scores(x)
    torch.testing.assert_close(classifier.scores(x), first)
    assert len(counting.seen) == len(set(counting.seen))


def test_aggregates_and_controls(encoder, x) -> None:
    base = FuDD(encoder, NAMES, table(NAMES), k=3)
    similarity = FuDD(encoder, NAMES, table(NAMES), k=3, aggregate="similarity")
    finite = torch.isfinite(base.scores(x))
    # the mean of similarities is the similarity of the mean times its length, at most 1
    assert (similarity.scores(x)[finite].abs() <= base.scores(x)[finite].abs() + 1e-6).all()
    probability = FuDD(encoder, NAMES, table(NAMES), k=3, aggregate="probability").scores(x)
    torch.testing.assert_close(probability.clamp(min=0).sum(1), torch.ones(len(x)))
    other = FuDD(encoder, NAMES, table(NAMES), k=3, control="other")
    members = [0, 1, 2]
    chosen = other._chosen(0, members)
    assert not set(chosen) & set(other.captions(0, members))
    assert all("red apple" in c for c in chosen)
    # every pair uses the attributes kind and size, so none is left and the template stands in
    assert FuDD(encoder, NAMES, table(NAMES), k=3, control="other_attributes")._chosen(0, members) == [
        "A photo of a red apple."
    ]


def test_bad_input(encoder, x) -> None:
    with pytest.raises(ValueError, match="twice"):
        pair_key(3, 3)
    assert pair_key(5, 2) == (2, 5)
    with pytest.raises(ValueError, match="second step"):
        FuDD(encoder, NAMES, {}, k=2).predict(x, k=3)
    with pytest.raises(ValueError, match="aggregate must be"):
        FuDD(encoder, NAMES, {}, aggregate="max")


def test_explanation_lists_the_captions_that_decided(encoder, x) -> None:
    (why,) = FuDD(encoder, NAMES, table(NAMES), k=3).explain(x[:1], count=9)
    assert len(why.reasons) == 3  # two differ by rival, one is the same for both
    assert all(why.label in r.text for r in why.reasons)


def test_differences_help_in_crowded_subgroups(encoder, emojis, features, record_claim) -> None:
    subgroups = (
        "cat-face",
        "hand-fingers-partial",
        "hand-fingers-open",
        "face-smiling",
        "time",
        "animal-mammal",
    )
    pairs = [p for s in subgroups for p in emojis.select(split="test_style", subgroup=s, base_only=True)]
    names = [emoji.spoken_name(emojis.emojis[i]) for i, _ in pairs]
    x, labels, source = features(pairs), torch.arange(len(pairs)), EmojiDescriptions()
    fudd = FuDD(encoder, names, k=10, template="{}", capitalize=False)
    close = (fudd.first.top(x, 2)[1] == labels[:, None]).any(1)

    def accuracy(classifier) -> float:
        return float((classifier.predict(x).labels == labels)[close].float().mean())

    keywords = DescriptorClassifier(
        encoder, {n: source.descriptors(n) for n in names}, sentence=lambda n, k: f"{n}: {k}"
    )
    control = FuDD(encoder, names, k=10, template="{}", capitalize=False, control="other")
    got = {
        "differential": accuracy(fudd),
        "all keywords": accuracy(keywords),
        "name": accuracy(PromptClassifier(encoder, names, ("{}",))),
        "control": accuracy(control),
    }
    recall = fudd.recall(x, labels)
    record_claim(
        system="FuDD",
        claim="differential descriptions beat all keywords and the name where the first step is close",
        expected="differential > all keywords >= name alone, on images whose first two answers hold the truth",
        seen=f"differential {got['differential']:.1%}, all keywords {got['all keywords']:.1%}, name "
        f"{got['name']:.1%}, "
        f"non-differential control {got['control']:.1%}; {int(close.sum())} images; top-10 recall {recall:.1%}",
        holds=got["differential"] > got["all keywords"] >= got["name"],
        seeds=[0],
    )
    assert float((fudd.predict(x).labels == labels).float().mean()) <= recall
    assert got["differential"] > 1 / 10
