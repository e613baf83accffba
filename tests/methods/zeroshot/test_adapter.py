# SPDX-License-Identifier: Apache-2.0
"""Support adapters: special cases, brute force of the KL affinity, the search, and emoji drawn in other styles."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from vlmkernels.data import emoji
from vlmkernels.methods.zeroshot.adapter import (
    Support,
    SupportAdapter,
    caption_support,
    combined_classifier,
    retrieve_support,
    support_features,
)

C, M, D = 5, 30, 16


@pytest.fixture
def made(unit_rows) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pictures F, labels, class vectors W, captions G and test features."""
    labels = torch.arange(M) % C
    return unit_rows(M, D), labels, unit_rows(C, D, seed=1), unit_rows(M, D, seed=2), unit_rows(25, D, seed=3)


def brute(f, pictures, y, w, captions, alpha, beta, gamma, delta, temperature=0.5) -> Tensor:
    """The formulas with every matrix written out."""
    q = torch.nn.functional.one_hot(y, C).double()
    a = (1 - delta) * f @ pictures.T + delta * f @ captions.T
    px, pi = (f @ w.T / temperature).softmax(1), (pictures @ w.T / temperature).softmax(1)
    kl = torch.zeros(len(f), len(pictures), dtype=torch.float64)
    for n, i in itertools.product(range(len(f)), range(len(pictures))):
        kl[n, i] = (px[n] * (px[n] / pi[i]).log()).sum()
    b = (kl - kl.min()) / (kl.max() - kl.min()) * (a.max() - a.min()) + a.min()
    assert b.min() == pytest.approx(float(a.min())) and b.max() == pytest.approx(float(a.max()))
    return 100 * f @ w.T + alpha * (-beta * (1 - a)).exp() @ q + gamma * (-b) @ q


@pytest.mark.parametrize(
    ("alpha", "beta", "gamma", "delta"),
    [(0, 5.5, 0, 0), (1, 5.5, 0, 0), (2, 9, 3, 0), (2, 9, 3, 0.4), (1, 3, 0, 1), (0, 1, 5, 0.3)],
    ids=["zero-shot", "Tip-Adapter", "TIP-X", "CapS", "captions alone", "KL alone"],
)
def test_logits_against_the_formulas(made, alpha, beta, gamma, delta) -> None:
    pictures, y, w, captions, f = made
    adapter = SupportAdapter(pictures, y, w, captions, alpha=alpha, beta=beta, gamma=gamma, delta=delta)
    expected = brute(f, pictures, y, w, captions, alpha, beta, gamma, delta)
    torch.testing.assert_close(adapter.logits(f), expected)
    torch.testing.assert_close(adapter.scores(f), expected)
    assert torch.equal(adapter.predict(f).labels, expected.argmax(1))


def test_order_of_the_support_does_not_matter(made) -> None:
    pictures, y, w, captions, f = made
    order = torch.randperm(M)
    options = {"alpha": 1.5, "beta": 4.0, "gamma": 2.0, "delta": 0.3}
    a = SupportAdapter(pictures, y, w, captions, **options).logits(f)
    b = SupportAdapter(pictures[order], y[order], w, captions[order], **options).logits(f)
    torch.testing.assert_close(a, b)


def test_steep_votes_are_the_nearest_neighbour(made) -> None:
    pictures, _, w, _, f = made
    nearest = SupportAdapter(pictures[:C], torch.arange(C), w, alpha=1e30, beta=50.0)
    assert torch.equal(nearest.predict(f).labels, (f @ pictures[:C].T).argmax(1))


def test_blocks_and_batches_change_nothing(made, monkeypatch) -> None:
    pictures, y, w, captions, f = made
    adapter = SupportAdapter(pictures, y, w, captions, alpha=1.0, beta=4.0, gamma=2.0, delta=0.3)
    adapter.fit_range(f)
    whole = adapter.logits(f)
    torch.testing.assert_close(torch.cat([adapter.logits(part) for part in f.split(7)]), whole)
    import vlmkernels.methods.zeroshot.adapter as module

    blocks, sizes = module.row_blocks, []
    monkeypatch.setattr(module, "row_blocks", lambda rows, width: blocks(rows, width, 4 * M))
    votes = SupportAdapter._votes
    monkeypatch.setattr(SupportAdapter, "_votes", lambda self, a: sizes.append(a.shape[1]) or votes(self, a))
    torch.testing.assert_close(adapter.logits(f), whole)
    assert max(sizes) == 4  # no [N, M] array


def test_flat_distributions_keep_their_digits(unit_rows) -> None:
    """At T = 0.5 P is nearly uniform over 200 classes: log P is -5.3, KL a hundredth; in float32 it must not cancel."""
    w = unit_rows(200, 64, dtype=torch.float32)
    keys, f = unit_rows(400, 64, seed=1, dtype=torch.float32), unit_rows(30, 64, seed=2, dtype=torch.float32)
    kl = SupportAdapter(keys, torch.arange(400) % 200, w).kl(f)
    exact = SupportAdapter(keys.double(), torch.arange(400) % 200, w.double()).kl(f.double())
    # the terms are as small as KL: their rounding, and that of the cosines (1e-7 of 1, over T)
    assert (kl - exact).abs().max() < 2e-5 * exact.max()


def test_search_is_the_best_of_the_whole_grid(made) -> None:
    pictures, y, w, captions, f = made
    truth = torch.arange(len(f)) % C
    grids = {
        "alpha": [0.1, 5.0, 20.0],
        "beta": [1.0, 8.0],
        "gamma": [0.1, 1.0, 10.0],
        "delta": [0.0, 0.5, 1.0],
    }
    adapter = SupportAdapter(pictures, y, w, captions)
    best = adapter.search(f, truth, grids)
    accuracies = []
    for delta, beta, alpha, gamma in itertools.product(
        *(grids[n] for n in ("delta", "beta", "alpha", "gamma"))
    ):
        expected = brute(f, pictures, y, w, captions, alpha, beta, gamma, delta)
        accuracies.append(float((expected.argmax(1) == truth).double().mean()))
    assert best["accuracy"] == pytest.approx(max(accuracies))
    assert float((adapter.predict(f).labels == truth).double().mean()) == pytest.approx(max(accuracies))
    assert SupportAdapter(pictures, y, w).search(f, truth, {**grids, "delta": [0.0]})["delta"] == 0.0


def test_support_from_captions_and_from_retrieval(unit_rows) -> None:
    images = torch.full((6, 3, 4, 4), 9, dtype=torch.uint8)
    prompts = []

    def generator(prompt: str, seed: int) -> Tensor | None:
        prompts.append((prompt, seed))
        picture = torch.full((3, 4, 4), len(prompts) % 3, dtype=torch.uint8)  # every third one is black
        return None if len(prompts) == 1 else picture

    support = caption_support(
        images,
        torch.arange(6) % 2,
        ["cat", "dog"],
        lambda _: "on a mat",
        generator,
        per_class=3,
        country="Peru",
    )
    assert support.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert support.captions[0] == "A photo of cat. In Peru. on a mat" and support.images.amin() > 0
    assert len({seed for _, seed in prompts}) == len(prompts)
    with pytest.raises(ValueError, match="no picture after"):
        caption_support(images, torch.arange(6) % 2, ["cat", "dog"], str, lambda *_: None)
    text, bank = unit_rows(2, 8), unit_rows(50, 8, seed=1)
    rows, labels = retrieve_support(text, bank, 4)
    assert rows.view(2, 4).tolist() == (text @ bank.T).topk(4).indices.tolist()
    assert labels.tolist() == [0] * 4 + [1] * 4


def test_features_are_averaged_over_passes(encoder, emojis) -> None:
    pictures = emojis.images([(0, "noto"), (5, "noto")])
    support = Support(pictures, ["a face", "another face"], torch.tensor([0, 1]))
    shifts = []

    def augment(x: Tensor, number: int) -> Tensor:
        shifts.append(number)
        return x.roll(number, -1)

    got, captions = support_features(encoder, support, augment=augment, passes=3)
    mean = torch.stack([encoder.images(pictures.roll(i, -1)) for i in range(3)]).mean(0)
    torch.testing.assert_close(got, torch.nn.functional.normalize(mean, dim=1))
    assert shifts == [0, 1, 2] and captions.shape == got.shape
    weights = combined_classifier(encoder, ["raised fist", "no such thing"])
    torch.testing.assert_close(weights.norm(dim=1), torch.ones(2))


def test_bad_input(made) -> None:
    pictures, y, w, captions, f = made
    with pytest.raises(ValueError, match="needs caption_keys"):
        SupportAdapter(pictures, y, w, delta=0.5).logits(f)
    with pytest.raises(ValueError, match="caption_keys must be"):
        SupportAdapter(pictures, y, w, captions[:3])
    with pytest.raises(ValueError, match="labels must lie"):
        SupportAdapter(pictures, y + 1, w)
    with pytest.raises(ValueError, match="grids must be"):
        SupportAdapter(pictures, y, w).search(f, y[:25], {"alpha": [2.0, 1.0]})


def test_other_styles_as_support(encoder, emojis, features, record_claim) -> None:
    """Concepts never trained on; support = two styles with "name: keywords", test = the third style."""
    test = emojis.select(split="held_out_concepts", styles="twemoji", base_only=True)
    classes = [i for i, _ in test]
    support = [
        p for p in emojis.select(split="held_out_concepts", styles=("noto", "openmoji")) if p[0] in classes
    ]
    y = torch.tensor([classes.index(i) for i, _ in support])
    entries = [emojis.emojis[i] for i in classes]
    names = [emoji.spoken_name(e) for e in entries]
    texts = {i: f"{n}: {', '.join(e.keywords[:3])}" for i, n, e in zip(classes, names, entries, strict=True)}
    w = encoder.texts(names)
    captions = encoder.texts([texts[i] for i, _ in support])
    f, truth = features(test), torch.arange(len(test))
    adapter = SupportAdapter(features(support), y, w, captions, classes=names, encoder=encoder)
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    validation, held = order[::2], order[1::2]
    grids = {"alpha": [1.0, 5.0, 20.0, 50.0], "beta": [1.0, 5.5, 20.0], "gamma": [0.0, 0.5, 2.0]}

    def searched(deltas: list[float]) -> tuple[float, float, float]:
        best = adapter.search(f[validation], truth[validation], {**grids, "delta": deltas})
        right = float((adapter.predict(f[held]).labels == truth[held]).float().mean())
        return best["accuracy"], right, best["delta"]

    zero = float(((f @ w.T).argmax(1) == truth)[held].float().mean())
    ends = searched([0.0]), searched([1.0])
    inside = searched([0.2, 0.4, 0.6, 0.8])
    record_claim(
        system="CapS-Adapter",
        claim="a support set in other styles beats zero-shot, and captions beside pictures beat either alone",
        expected="zero-shot < pictures alone < pictures and captions, on validation and on test",
        seen=f"test: zero-shot {zero:.1%}, pictures {ends[0][1]:.1%}, captions {ends[1][1]:.1%}, both "
        f"{inside[1]:.1%} "
        f"(delta {inside[2]}); validation: {ends[0][0]:.1%}, {ends[1][0]:.1%}, {inside[0]:.1%}; "
        f"{len(held)} test pictures of {len(names)} classes",
        holds=zero < ends[0][1] < inside[1] and inside[0] >= max(ends[0][0], ends[1][0]),
        seeds=[0],
    )
    assert zero < ends[0][1]
    assert inside[0] >= ends[1][0]
    why = adapter.explain(f[:1], count=2)
    assert why[0].label in names and len(why[0].reasons) == 2
