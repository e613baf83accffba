# SPDX-License-Identifier: Apache-2.0
"""PerceptionCLIP: brute force, the limits of the temperature, composite values, and skin tones as context."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlmkernels.methods.zeroshot import (
    PerceptionCLIP,
    PromptClassifier,
    attribute_probe,
    composite_values,
    group_accuracy,
)
from vlmkernels.methods.zeroshot.perception import FACTORS

SCALE = 30.0
C, Z, D = 5, 4, 16
FACTOR = {"place": {str(z): [f"in place {z}"] for z in range(Z)}}


@pytest.fixture
def made(unit_rows):
    text, context = unit_rows(C, Z, D), unit_rows(Z, D, seed=7)

    def make(temperature: float = 1.0, infer: str = "with_y") -> PerceptionCLIP:
        return PerceptionCLIP(
            None,
            list("abcde"),
            FACTOR,
            temperature=temperature,
            infer=infer,
            logit_scale=SCALE,
            text=text,
            context_text=context,
        )

    return make, text, context, unit_rows(40, D, seed=3)


def logits(x: Tensor, text: Tensor) -> Tensor:
    return SCALE * torch.einsum("nd,yzd->nyz", x, text)


@pytest.mark.parametrize("temperature", [0.01, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("infer", ["with_y", "without_y"])
def test_probabilities_against_brute_force(made, temperature: float, infer: str) -> None:
    make, text, context, x = made
    f = logits(x, text)
    if infer == "with_y":
        p_z = (f / temperature).flatten(1).softmax(1).view(-1, C, Z).sum(1)
    else:
        p_z = (SCALE / temperature * x @ context.T).softmax(1)
    expected = (p_z[:, None] * f.softmax(1)).sum(2)
    got = make(temperature, infer)
    torch.testing.assert_close(got.predict_proba(x), expected)
    torch.testing.assert_close(got.infer_context(x), p_z)
    torch.testing.assert_close(got.predict_proba(x).sum(1), torch.ones(40, dtype=torch.float64))
    assert torch.equal(got.predict(x).labels, expected.argmax(1))


def test_temperature_one_is_pooling_in_one_step(made) -> None:
    make, text, _, x = made
    pooled = logits(x, text).flatten(1).softmax(1).view(-1, C, Z).sum(2)
    torch.testing.assert_close(make().predict_proba(x), pooled)


def test_limits_of_the_temperature(made) -> None:
    make, text, _, x = made
    f = logits(x, text)
    torch.testing.assert_close(make(1e9).predict_proba(x), f.softmax(1).mean(2), rtol=1e-6, atol=1e-7)
    cold = make(1e-4).infer_context(x)
    z = f.amax(1).argmax(1)  # as T goes to 0, the log-sum-exp over y is its largest term
    assert torch.equal(cold.argmax(1), z)
    torch.testing.assert_close(make(1e-4).predict_proba(x), f.softmax(1)[torch.arange(40), :, z])


def test_one_value_is_plain_clip(encoder, unit_rows) -> None:
    x = unit_rows(10, 256, dtype=torch.float32)
    names = ["cat", "dog", "car"]
    one = PerceptionCLIP(encoder, names, {"none": {"any": [""]}}, main="a photo of a {}")
    plain = PromptClassifier(encoder, names, ("a photo of a {}.",))
    torch.testing.assert_close(one.predict_proba(x), plain.scores(x).softmax(1), rtol=1e-4, atol=1e-6)
    assert PerceptionCLIP(encoder, names, {}).text.shape[1] == 1  # no factor: one empty value


def test_composite_values_are_the_product() -> None:
    values = composite_values(
        {"size": {"small": ["small", "tiny"], "any": [""]}, "place": {"wood": ["in a wood"], "any": [""]}}
    )
    assert values == [
        ("small, wood", ["small, in a wood", "tiny, in a wood"]),
        ("small, any", ["small", "tiny"]),
        ("any, wood", ["in a wood"]),
        ("any, any", [""]),
    ]
    assert len(FACTORS["background"]) == 12 and len(FACTORS["waterbirds background"]) == 2


def test_blocks_never_hold_all_values(unit_rows, monkeypatch) -> None:
    """N x C x Z would be 16 times the largest block that is made; blocks of images and of values change nothing."""
    import vlmkernels.methods.zeroshot.perception as module

    text, x = unit_rows(C, Z, D), unit_rows(80, D, seed=3)
    got = PerceptionCLIP(None, list("abcde"), FACTOR, logit_scale=SCALE, text=text, temperature=3.0)
    whole = got.predict_proba(x)
    sizes = []
    mm = torch.mm
    monkeypatch.setattr(module, "cache_block", lambda columns: (7, 2))
    monkeypatch.setattr(torch, "mm", lambda *a, out: sizes.append(out.numel()) or mm(*a, out=out))
    torch.testing.assert_close(got.predict_proba(x), whole)
    assert max(sizes) == 2 * 7 * C and 16 * max(sizes) <= 80 * C * Z


def test_bad_input(unit_rows) -> None:
    with pytest.raises(ValueError, match="temperature"):
        PerceptionCLIP(None, ["a"], {}, temperature=0.0)
    with pytest.raises(ValueError, match="needs values"):
        composite_values({"size": {}})
    with pytest.raises(ValueError, match="text must be"):
        PerceptionCLIP(None, ["a"], FACTOR, text=unit_rows(2, Z, D))
    with pytest.raises(ValueError, match="context_text"):
        PerceptionCLIP(None, ["a"], FACTOR, text=unit_rows(1, Z, D), infer="without_y")


TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


def test_skin_tone_as_context(encoder, emojis, features, record_claim) -> None:
    """Gestures in five skin tones; cells are (tone, gesture)."""
    pairs = [p for t in TONES for p in emojis.select(split="test_style", skin_tone=t)]
    entries = [emojis.emojis[i] for i, _ in pairs]
    hands = [i for i, e in enumerate(entries) if e.subgroup.startswith("hand") and e.gender is None]
    gestures = sorted({emojis.emojis[entries[i].base].name for i in hands})
    x = features([pairs[i] for i in hands])
    labels = torch.tensor([gestures.index(emojis.emojis[entries[i].base].name) for i in hands])
    tones = torch.tensor([TONES.index(entries[i].skin_tone) for i in hands])
    with_tone = {"tone": {t: [f"{t} skin tone"] for t in TONES}}
    letters = {"tone": {t: [w] for t, w in zip(TONES, ("qzx", "vkj", "xwq", "jjz", "pfq"), strict=True)}}

    def measure(factors) -> tuple[float, float, PerceptionCLIP]:
        classifier = PerceptionCLIP(encoder, gestures, factors, main="an emoji of {}")
        average, worst, _ = group_accuracy(classifier.predict(x).labels, labels, tones)
        return average, worst, classifier

    plain, context, random_text = measure({}), measure(with_tone), measure(letters)
    inferred = float((context[2].infer_context(x).argmax(1) == tones).float().mean())
    per_tone = [float((context[2].predict(x).labels == labels)[tones == t].float().mean()) for t in range(5)]
    plain_tone = [float((plain[2].predict(x).labels == labels)[tones == t].float().mean()) for t in range(5)]
    probe = attribute_probe(
        encoder,
        x[tones == 4],
        [gestures[y] for y in labels[tones == 4]],
        {"none": "", "correct": "dark skin tone", "wrong": "light skin tone", "random letters": "qzx"},
        main="an emoji of {}",
    )
    record_claim(
        system="PerceptionCLIP",
        claim="conditioning on the inferred skin tone helps the worst group",
        expected="worst tone's accuracy and the average at least those without context; tone inferred far above 1/5",
        seen=f"average {context[0]:.1%} against {plain[0]:.1%}, worst tone {min(per_tone):.1%} against "
        f"{min(plain_tone):.1%} (random letters: average {random_text[0]:.1%}); tone inferred {inferred:.1%}; "
        f"{len(gestures)} gestures, {len(labels)} pictures",
        holds=min(per_tone) >= min(plain_tone) and context[0] >= plain[0] and inferred > 0.4,
        seeds=[0],
    )
    record_claim(
        system="PerceptionCLIP",
        claim="the right attribute's text is nearer to the picture than a wrong one's",
        expected="mean cosine: correct > none, correct > wrong, correct > random letters",
        seen=", ".join(f"{label} {value:.3f}" for label, value in probe.items()),
        holds=probe["correct"] == max(probe.values()),
        seeds=[0],
    )
    assert inferred > 0.4
    assert probe["correct"] > probe["wrong"]
