# SPDX-License-Identifier: Apache-2.0
"""PAC-Bayes for prompts: limits and order of the bounds, the search's increments, calibration, and emoji subgroups."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from vlmkernels.data import emoji
from vlmkernels.methods.zeroshot.pac_bayes import (
    BigramModel,
    CausalModel,
    binary_kl,
    column_errors,
    greedy_prompt_search,
    inverse_kl,
    pac_bayes_bound,
    prompt_kl,
    uniform_kl,
)

KINDS = ["mcallester", "occam", "kl_inverse"]


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_move_the_right_way(kind: str) -> None:
    base = pac_bayes_bound(0.1, 100.0, 5000, 0.05, kind)
    assert base < pac_bayes_bound(0.1, 200.0, 5000, 0.05, kind)
    assert base < pac_bayes_bound(0.1, 100.0, 500, 0.05, kind)
    assert base < pac_bayes_bound(0.1, 100.0, 5000, 0.01, kind)
    assert base < pac_bayes_bound(0.1, 100.0, 5000, 0.05, kind, hypotheses=7)
    assert pac_bayes_bound(0.1, 0.0, 10**13, 0.05, kind) == pytest.approx(0.1, abs=1e-5)
    assert pac_bayes_bound(0.9, 1e6, 10, 0.05, kind) == 1.0


def test_the_published_figures_fit_the_root() -> None:
    """2.3% training error and a bound of 8.6% at n = 50,000 need about 397 nats."""
    assert pac_bayes_bound(0.023, 383, 50_000, 0.01) == pytest.approx(0.086, abs=0.001)
    assert uniform_kl(10, 5) == pytest.approx(50 * math.log(49_408))


def test_binary_kl_and_its_inverse() -> None:
    assert binary_kl(0.3, 0.3) == 0 and binary_kl(0.0, 0.5) == pytest.approx(math.log(2))
    assert binary_kl(0.3, 0.0) == math.inf
    for r, limit in itertools.product((0.0, 0.05, 0.4, 1.0), (0.001, 0.1, 1.0)):
        q = inverse_kl(r, limit)
        assert binary_kl(r, q) == pytest.approx(limit, rel=1e-6) or q == 1.0
        assert q <= min(1.0, r + math.sqrt(limit / 2)) + 1e-12  # Pinsker


def test_uniform_prior_over_hypotheses_is_the_finite_class_bound() -> None:
    h, n, delta = 1000, 400, 0.05
    expected = 0.1 + math.sqrt((math.log(h) + math.log(1 / delta)) / (2 * n))
    assert pac_bayes_bound(0.1, math.log(h), n, delta, "occam") == pytest.approx(expected)


def test_bigram_probabilities_sum_to_one() -> None:
    model = BigramModel(["a red cat", "a dog"], smoothing=0.5, unknown_words=10)
    for before in ("<start>", "a", "cat", "never seen"):
        known = sum(math.exp(model.word_log_probability(w, before)) for w in model.words)
        unknown = 10 * math.exp(model.word_log_probability("zebra", before))
        assert known + unknown == pytest.approx(1)
    parts = [("a", "<start>"), ("cat", "a"), ("<end>", "cat")]
    total = sum(model.word_log_probability(*p) for p in parts)
    assert model.log_probability("A cat") == pytest.approx(total)
    assert prompt_kl(["a cat", "a cat"], model) == pytest.approx(-2 * total)
    assert model.next_words("a", 2) == ["dog", "red"]


def test_a_causal_model_scores_through_its_own_tokens() -> None:
    class Tokenizer:
        bos_token_id, eos_token_id = 1, 2

        def __call__(self, text: str):
            return type("Batch", (), {"input_ids": [1, *(3 + len(w) for w in text.split())]})

        def decode(self, ids: list[int]) -> str:
            return f" w{ids[0]}"

    def model(ids: Tensor):
        logits = torch.zeros(1, ids.shape[1], 10)
        logits[..., 5] = 1.0
        return type("Out", (), {"logits": logits})

    prior = CausalModel(model, Tokenizer())
    p = torch.zeros(10).scatter(0, torch.tensor([5]), 1.0).log_softmax(0)
    # words of two and three letters, then the end
    assert prior.log_probability("ab abc") == pytest.approx(float(p[5] + p[6] + p[2]), abs=1e-6)
    assert prior.next_words("ab", 1) == ["w5"]


def test_a_changed_column_is_the_full_evaluation(unit_rows) -> None:
    f, text, candidates = unit_rows(60, 8), unit_rows(5, 8, seed=1), unit_rows(9, 8, seed=2)
    f, text, candidates = ((10 * x).round() for x in (f, text, candidates))  # integers: ties are exact
    candidates[3] = text[4]
    labels = torch.arange(60) % 5
    scores = f @ text.T
    for c in range(5):
        expected = []
        for candidate in candidates:
            changed = scores.clone()
            changed[:, c] = f @ candidate
            expected.append(int((changed.argmax(1) != labels).sum()))
        assert column_errors(f, labels, scores, c, candidates).tolist() == expected


def words_encoder(words: list[str], width: int = 12):
    """Texts to the normalised sum of fixed random word vectors; the empty text to a vector of its own."""
    table = torch.randn(
        len(words) + 1, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    row = {w: i for i, w in enumerate(words)}

    def encode(texts) -> Tensor:
        sums = [sum((table[row[w]] for w in t.split()), table[-1] * 0.1) for t in texts]
        return torch.nn.functional.normalize(torch.stack(sums), dim=1)

    return encode


def test_search_lowers_the_error_and_kl_weight_zero_is_plain() -> None:
    words = [f"w{i}" for i in range(25)]
    encode = words_encoder(words)
    labels = torch.arange(80) % 4
    f = encode([f"w{2 * y} w{2 * y + 9}" for y in labels.tolist()])
    f = f + 0.5 * torch.randn(f.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    f = torch.nn.functional.normalize(f, dim=1)
    plain = greedy_prompt_search(f, labels, 4, encode, words, most_words=2)
    assert plain.errors == sorted(plain.errors, reverse=True) and plain.errors[-1] == plain.train_error
    right = (f @ encode(plain.prompts).T).argmax(1) == labels
    assert plain.train_error == pytest.approx(1 - float(right.double().mean()))
    model = BigramModel([" ".join(words[:5])])
    same = greedy_prompt_search(f, labels, 4, encode, words, model=model, most_words=2, kl_weight=0.0)
    assert same.prompts == plain.prompts
    assert same.kl == pytest.approx(prompt_kl(same.prompts, model))
    penalised = greedy_prompt_search(f, labels, 4, encode, words, model=model, most_words=2, kl_weight=1.0)
    assert penalised.kl <= same.kl and penalised.train_error >= same.train_error
    pruned = greedy_prompt_search(f, labels, 4, encode, words, model=model, most_words=1, pruned_to=3)
    assert {w for p in pruned.prompts for w in p.split()} <= set(words[:5])


def test_bad_input(unit_rows) -> None:
    f = unit_rows(4, 3)
    with pytest.raises(ValueError, match="expected 0 <= train_error"):
        pac_bayes_bound(1.5, 0, 10)
    with pytest.raises(ValueError, match="kind must be"):
        pac_bayes_bound(0.5, 0, 10, kind="union")
    with pytest.raises(ValueError, match="need a model"):
        greedy_prompt_search(f, torch.zeros(4).long(), 1, lambda t: f[: len(t)], ["a"], kl_weight=1.0)
    with pytest.raises(ValueError, match="beginnings"):
        greedy_prompt_search(f, torch.zeros(4).long(), 2, lambda t: f[: len(t)], ["a"], init=["x"])


@lru_cache
def digit_errors() -> Tensor:
    """Whether each of 60 hypotheses, drawn before any split, is wrong about each digit: float64 [60, 1797]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.nn.functional.normalize(torch.tensor(data.data), dim=1)
    y = torch.tensor(data.target)
    means = torch.stack([x[y == k].mean(0) for k in range(10)])
    generator = torch.Generator().manual_seed(0)
    prototypes = means + 0.08 * torch.randn(60, 10, 64, generator=generator, dtype=torch.float64)
    return torch.stack([(x @ p.T).argmax(1) != y for p in prototypes]).double()


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_hold_as_often_as_they_say(kind: str, record_claim) -> None:
    """Hypotheses from a fixed dictionary of prototypes per digit, the best one on 1,000 of 1,797 pictures."""
    wrong, generator = digit_errors(), torch.Generator().manual_seed(1)
    failed, slack = 0, 0.0
    for _ in range(200):
        order = torch.randperm(wrong.shape[1], generator=generator)
        train = wrong[:, order[:1000]].mean(1)
        h = int(train.argmin())
        test = float(wrong[h, order[1000:]].mean())
        bound = pac_bayes_bound(float(train[h]), math.log(60), 1000, 0.05, kind)
        failed += test > bound
        slack += (bound - test) / 200
    if kind == "mcallester":
        record_claim(
            system="PAC-Bayes for prompts",
            claim="the bound fails at most as often as delta says",
            expected="at most 5% of 200 splits of digits with delta = 0.05",
            seen=f"{failed} of 200 fail; the bound lies {slack:.3f} above the test error on average",
            holds=failed <= 10,
            seeds=[0],
        )
    assert failed <= 10


@pytest.fixture(scope="module")
def task(encoder, emojis, features):
    """Eight subgroups in training styles and in the held-out one; a word vocabulary, and a prior on all other names."""
    subgroups = (
        *("face-smiling", "animal-mammal", "food-fruit", "transport-ground"),
        *("sport", "musical-instrument", "plant-flower", "heart"),
    )

    def of(split: str) -> tuple[Tensor, Tensor]:
        pairs = [emojis.select(split=split, subgroup=s, base_only=True)[:40] for s in subgroups]
        labels = torch.arange(len(subgroups)).repeat_interleave(torch.tensor([len(p) for p in pairs]))
        return features([p for own in pairs for p in own]), labels

    words = sorted(
        {w for e in emojis.emojis if e.subgroup in subgroups for k in e.keywords for w in k.split()}
    )
    # names in templates say nothing about which training picture has which label
    names = [emoji.spoken_name(e) for e in emojis.emojis if e.base == e.index]
    prior = BigramModel(t.format(n) for n in names for t in emoji.NAME_TEMPLATES)
    cache: dict[str, Tensor] = {}

    def encode(texts) -> Tensor:
        new = [t for t in dict.fromkeys(texts) if t not in cache]
        if new:
            cache.update(zip(new, encoder.texts(new), strict=True))
        return torch.stack([cache[t] for t in texts])

    names = [emoji.spoken_group(s) for s in subgroups]
    return *of("train"), *of("test_style"), words, prior, encode, names


@pytest.mark.slow
def test_emoji_subgroups(task, record_claim) -> None:
    x, y, test_x, test_y, words, prior, encode, names = task

    def search(labels: Tensor, **options):
        return greedy_prompt_search(
            x, labels, 8, encode, words, model=prior, **{"most_words": 2, "init": "an emoji of", **options}
        )

    def test_error(prompts: list[str]) -> float:
        return float(((test_x @ encode(prompts).T).argmax(1) != test_y).double().mean())

    by_hand = [f"an emoji of {n}" for n in names]
    hand_error = float(((x @ encode(by_hand).T).argmax(1) != y).double().mean())
    hand_kl, even = prompt_kl(by_hand, prior), uniform_kl(8, max(len(p.split()) for p in by_hand))
    bounds = [pac_bayes_bound(hand_error, kl, len(x), kind="kl_inverse") for kl in (hand_kl, even)]
    found = search(y)
    error = test_error(found.prompts)
    bound = found.bound(len(x), kind="kl_inverse")
    record_claim(
        system="PAC-Bayes for prompts",
        claim="a language prior gives a tighter bound than the uniform one, and the bound is not vacuous",
        expected="bound(bigram prior) < bound(uniform prior) < 1 for natural prompts; bound(greedy) above "
        "its test error",
        seen=f"by hand: bounds {bounds[0]:.3f} and {bounds[1]:.3f} (KL {hand_kl:.0f} and {even:.0f} nats, n "
        f"= {len(x)}); "
        f"greedy: training error {found.train_error:.3f}, test error in another style {error:.3f}, bound {bound:.3f}",
        holds=bounds[0] < bounds[1] and bound < 1,
        seeds=[0],
    )
    noisy = []
    for share in (0.0, 0.3, 0.6):
        generator = torch.Generator().manual_seed(1)
        chosen = torch.rand(len(y), generator=generator) < share
        labels = torch.where(chosen, torch.randint(0, 8, y.shape, generator=generator), y)
        result = search(labels, most_words=1)
        noisy.append((1 - result.train_error, 1 - test_error(result.prompts)))
    record_claim(
        system="PAC-Bayes for prompts",
        claim="prompts do not fit random labels: training and test accuracy fall together",
        expected="training accuracy falls with the share of random labels",
        seen="; ".join(
            f"{s:.0%} random: {a:.1%} and {b:.1%}" for s, (a, b) in zip((0, 0.3, 0.6), noisy, strict=True)
        ),
        holds=noisy[0][0] > noisy[1][0] > noisy[2][0] and noisy[2][1] <= noisy[0][1],
        seeds=[1],
    )
    few = torch.cat([(y == k).nonzero()[:4, 0] for k in range(8)])
    candidates = [
        greedy_prompt_search(
            x[few], y[few], 8, encode, words, model=prior, most_words=m, init="an emoji of", kl_weight=weight
        )
        for m, weight in ((1, 0.0), (2, 0.0), (3, 0.0), (2, 0.02), (2, 0.1))
    ]
    by_error = min(candidates, key=lambda c: c.train_error)
    by_bound = min(candidates, key=lambda c: c.bound(len(few), kind="kl_inverse"))
    errors = test_error(by_bound.prompts), test_error(by_error.prompts)
    record_claim(
        system="PAC-Bayes for prompts",
        claim="at few pictures, choosing by the bound is no worse than choosing by training error",
        expected="test error of the choice by bound at most that by training error (4 pictures a class)",
        seen=f"{errors[0]:.3f} by bound, {errors[1]:.3f} by training error",
        holds=errors[0] <= errors[1],
        seeds=[0],
    )
    assert bounds[0] < bounds[1]
    assert noisy[0][0] > noisy[1][0] > noisy[2][0]
