# SPDX-License-Identifier: Apache-2.0
"""GDA: closed forms against brute force, its limits, its variants, and digits and emoji."""

from __future__ import annotations

import pytest
import torch
from largest_tensor import LargestTensor
from torch import Tensor

from vlmkernels.data import emoji
from vlmkernels.methods.zeroshot import GDA, fit_gda, fit_gda_em, fit_gda_new, gda_logits
from vlmkernels.methods.zeroshot.gda import precision_matrix, soft_moments


@pytest.fixture
def blobs() -> tuple[Tensor, Tensor]:
    """120 rows of 4 classes in 10 dimensions, float64."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(120) % 4
    centres = torch.randn(4, 10, generator=generator, dtype=torch.float64)
    x = centres[y] + torch.randn(120, 10, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=1), y


def centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    means = torch.stack([x[y == k].mean(0) for k in range(4)])
    return means, x - means[y]


def test_classifier_is_the_closed_form(blobs) -> None:
    x, y = blobs
    means, c = centred(x, y)
    scatter, n, d = c.T @ c, len(x), x.shape[1]
    precision = d * torch.linalg.inv(scatter + scatter.trace() / (n - 1) * torch.eye(d, dtype=torch.float64))
    weight, bias = fit_gda(x, y, 4)
    torch.testing.assert_close(weight, means @ precision)
    torch.testing.assert_close(
        bias, torch.tensor(0.25).log().double() - 0.5 * (means @ precision * means).sum(1)
    )
    sigma = scatter / (n - 1)
    pseudo = d * torch.linalg.pinv((n - 1) * sigma + sigma.trace() * torch.eye(d, dtype=torch.float64))
    torch.testing.assert_close(precision_matrix(sigma, n), pseudo)


@pytest.mark.parametrize("classes", [7, 300])
def test_float32_features_err_as_rounding_them_does(classes: int) -> None:
    """150 dimensions are two strips of the scatter; fewer and more classes than dimensions are solved differently."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(1200) % classes
    x = torch.randn(classes, 150, generator=generator)[y] + torch.randn(1200, 150, generator=generator)
    x = torch.nn.functional.normalize(x, dim=1)
    for covariance in ("pooled", "class_mean"):
        weight, bias = fit_gda(x, y, classes, covariance=covariance)
        exact, exact_bias = fit_gda(x.double(), y, classes, covariance=covariance)
        assert weight.dtype == bias.dtype == torch.float64
        # sums of 1200 products, each off by 6e-8, and a ridge that keeps the condition number below N
        assert (weight - exact).norm() < 1e-5 * exact.norm()
        assert (bias - exact_bias).norm() < 1e-5 * exact_bias.norm()
    means = torch.stack([x[y == k].double().mean(0) for k in range(classes)])
    c = x.double() - means[y]
    sigma = c.T @ c / (len(x) - 1)
    torch.testing.assert_close(fit_gda(x.double(), y, classes)[0], means @ precision_matrix(sigma, len(x)))


def test_priors_enter_through_the_bias_alone(blobs) -> None:
    x, y = blobs
    prior = torch.tensor([0.7, 0.1, 0.1, 0.1])
    (w, b), (w_prior, b_prior) = fit_gda(x, y, 4), fit_gda(x, y, 4, prior=prior)
    assert torch.equal(w, w_prior)
    torch.testing.assert_close(b_prior - b, (4 * prior).log().double())


def test_without_shrinkage_it_is_linear_discriminant_analysis(blobs) -> None:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    x, y = blobs
    weight, bias = fit_gda(x, y, 4, shrinkage="none")
    peer = LinearDiscriminantAnalysis(solver="lsqr", priors=[0.25] * 4).fit(x.numpy(), y.numpy())
    assert (x @ weight.T + bias).argmax(1).tolist() == peer.predict(x.numpy()).tolist()


def test_isotropic_covariance_is_the_nearest_mean() -> None:
    d = 6
    signs = torch.cat([torch.eye(d), -torch.eye(d)]).double()  # scatter proportional to the identity
    centres = torch.randn(3, d, dtype=torch.float64)
    x = torch.cat([c + 0.3 * signs for c in centres])
    weight, bias = fit_gda(x, torch.arange(3).repeat_interleave(2 * d), 3)
    queries = torch.randn(50, d, dtype=torch.float64)
    assert torch.equal((queries @ weight.T + bias).argmax(1), torch.cdist(queries, centres).argmin(1))


def test_alpha_zero_is_zero_shot_and_one_shot_is_harmless(unit_rows) -> None:
    x, text = unit_rows(4, 8), unit_rows(4, 8, seed=1)
    weight, bias = fit_gda(x, torch.arange(4), 4)
    assert not weight.any()  # no scatter within classes, precision 0
    torch.testing.assert_close(gda_logits(x, text, weight, bias, 0.0), 100 * x @ text.T)
    head = GDA(None, list("abcd"), text=text).fit(x, torch.arange(4))
    assert torch.equal(head.predict(x).labels, (x @ text.T).argmax(1))


def test_class_mean_covariance(blobs) -> None:
    x, y = blobs
    means = torch.stack([x[y == k].mean(0) for k in range(4)])
    sigma = torch.stack([torch.cov(x[y == k].T) for k in range(4)]).mean(0)
    weight, _ = fit_gda(x, y, 4, shrinkage="none", covariance="class_mean")
    torch.testing.assert_close(weight, means @ torch.linalg.pinv(sigma))


def test_new_classes_from_the_nearest_base_pictures(blobs, unit_rows) -> None:
    (x, _), text, k, d = blobs, unit_rows(3, 10, seed=5), 12, 10
    weight, bias = fit_gda_new(text, x, k=k, text_copies=4)
    precisions, means = [], []
    for w in text:
        near = x[(x @ w).topk(k).indices]
        s = (near - w).T @ (near - w) / (k - 1)
        precisions.append(d * torch.linalg.pinv((k - 1) * s + s.trace() * torch.eye(d, dtype=torch.float64)))
        means.append((near.sum(0) + 4 * w) / (k + 4))
    precision, mean = torch.stack(precisions).mean(0), torch.stack(means)
    torch.testing.assert_close(weight, mean @ precision)
    torch.testing.assert_close(
        bias, -torch.tensor(3.0).log().double() - 0.5 * (mean @ precision * mean).sum(1)
    )


def test_soft_moments_against_a_loop(blobs, unit_rows) -> None:
    (x, _), weight = blobs, 5 * unit_rows(4, 10, seed=3)
    bias = torch.randn(4, dtype=torch.float64)
    g = (x @ weight.T + bias).softmax(1)
    means = torch.stack([(g[:, k : k + 1] * x).sum(0) / g[:, k].sum() for k in range(4)])
    sigma = torch.zeros(10, 10, dtype=torch.float64)
    for k in range(4):
        c = x - means[k]
        sigma += c.T @ (c * g[:, k : k + 1]) / g[:, k].sum() / 4
    got = soft_moments(x, weight, bias)
    torch.testing.assert_close(got[0], means)
    torch.testing.assert_close(got[1], sigma)


def test_certain_responsibilities_are_the_supervised_fit(blobs) -> None:
    """With one-hot responsibilities the M-step gives class means and the mean of the biased class covariances."""
    x, y = blobs
    weight = torch.linalg.lstsq(x, torch.nn.functional.one_hot(y).double()).solution.T
    separable = (x @ weight.T).argmax(1)  # a steep softmax of it is one-hot
    got_means, got_sigma = soft_moments(x, 1e12 * weight, None)
    expected = torch.stack([x[separable == k].mean(0) for k in range(4)])
    sigma = sum(torch.cov(x[separable == k].T, correction=0) for k in range(4)) / 4
    torch.testing.assert_close(got_means, expected)
    torch.testing.assert_close(got_sigma, sigma)


def test_memory_does_not_grow_with_rows_times_classes(unit_rows) -> None:
    """2,000 classes of 20,000 rows: responsibilities would be 320 MB in float64, D x D precisions 65 MB a thousand."""
    x, y = unit_rows(20_000, 16, dtype=torch.float32), torch.arange(20_000) % 2000
    text = unit_rows(2000, 16, seed=1, dtype=torch.float32)
    with LargestTensor() as largest:
        fit_gda(x, y, 2000)
        fit_gda_em(x, text, iterations=1)
        fit_gda_new(text[:100], x, k=32)
    assert largest.storage_bytes // 8 <= 2**21 + 2000 * 16  # half a block of float64; N x K is 4e7


def test_bad_input(blobs) -> None:
    x, y = blobs
    with pytest.raises(ValueError, match="labels must lie"):
        fit_gda(x, y, 3)
    with pytest.raises(ValueError, match="two rows"):
        fit_gda(x[:1], y[:1], 4)
    with pytest.raises(ValueError, match="prior must be"):
        fit_gda(x, y, 4, prior=torch.ones(3))
    with pytest.raises(ValueError, match="k must lie"):
        fit_gda_new(x[:2], x, k=500)
    with pytest.raises(ValueError, match="encoder or text"):
        GDA(None, ["a"])


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.nn.functional.normalize(torch.tensor(data.data), dim=1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], torch.tensor(data.target)[order]


def shots(y: Tensor, count: int, seed: int) -> Tensor:
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[y[order] == k][:count] for k in range(10)])


def test_digits_show_what_each_part_does(digits, record_claim) -> None:
    x, y = digits
    test_x, test_y = x[1000:], y[1000:]

    def accuracy(logits: Tensor) -> float:
        return float((logits.argmax(1) == test_y).float().mean())

    seen: dict[str, list[float]] = {}
    for seed in (0, 1, 2):
        noise = torch.Generator().manual_seed(seed)
        prototypes = torch.stack([x[:1000][y[:1000] == k].mean(0) for k in range(10)])
        text = prototypes + 0.06 * torch.randn(10, 64, generator=noise, dtype=torch.float64)
        text = torch.nn.functional.normalize(text, dim=1)
        for count in (7, 60):
            rows = shots(y, count, seed)
            means = torch.stack([x[rows][y[rows] == k].mean(0) for k in range(10)])
            seen.setdefault(f"nearest mean {count}", []).append(accuracy(-torch.cdist(test_x, means)))
            for shrinkage in ("ks", "none"):
                w, b = fit_gda(x[rows], y[rows], 10, shrinkage=shrinkage)
                seen.setdefault(f"{shrinkage} {count}", []).append(accuracy(test_x @ w.T + b))
        model = GDA(None, list("0123456789"), text=text).fit(x[rows], y[rows])
        validation = slice(800, 1000)
        model.search_alpha(x[validation], y[validation])
        seen.setdefault("zero-shot", []).append(accuracy(test_x @ text.T))
        seen.setdefault("both", []).append(accuracy(model.scores(test_x)))
        w, b = fit_gda_em(x[:1000], text, alpha=3.0)
        seen.setdefault("em", []).append(accuracy(gda_logits(test_x, text, w, b, 3.0)))
    mean = {name: sum(v) / len(v) for name, v in seen.items()}
    record_claim(
        system="GDA",
        claim="the shared covariance, the ridge and the ensemble each add accuracy on digits",
        expected="GDA above nearest mean with 60 shots; ridge above pseudo-inverse with 7; both parts at least each; "
        "EM without labels above zero-shot",
        seen=f"60 shots: {mean['ks 60']:.1%} against {mean['nearest mean 60']:.1%}; 7 shots: "
        f"{mean['ks 7']:.1%} with the "
        f"ridge, {mean['none 7']:.1%} without; zero-shot {mean['zero-shot']:.1%}, both {mean['both']:.1%}, "
        f"EM {mean['em']:.1%}",
        holds=mean["ks 60"] > mean["nearest mean 60"]
        and mean["ks 7"] > mean["none 7"]
        and mean["both"] >= max(mean["zero-shot"], mean["ks 60"]) - 0.005
        and mean["em"] > mean["zero-shot"],
        seeds=[0, 1, 2],
    )
    assert mean["ks 60"] > mean["nearest mean 60"]
    assert mean["ks 7"] > mean["none 7"] + 0.05
    assert mean["both"] >= max(mean["zero-shot"], mean["ks 60"]) - 0.005
    assert mean["em"] > mean["zero-shot"]


def test_base_to_new_on_emoji_subgroups(encoder, emojis, features, record_claim) -> None:
    subgroups = [
        s for s in emojis.subgroups if len(emojis.select(split="train", subgroup=s, base_only=True)) >= 20
    ]
    base, new = subgroups[::2], subgroups[1::2]

    def of(chosen: list[str], split: str) -> tuple[Tensor, Tensor]:
        pairs, labels = [], []
        for label, s in enumerate(chosen):
            found = emojis.select(split=split, subgroup=s, base_only=True)[:40]
            pairs += found
            labels += [label] * len(found)
        return features(pairs), torch.tensor(labels)

    base_x, base_y = of(base, "train")
    new_x, new_y = of(new, "test_style")
    names = [emoji.spoken_group(s) for s in new]
    model = GDA(encoder, names, emoji.GROUP_TEMPLATES)
    before = float((model.predict(new_x).labels == new_y).float().mean())
    val_x, val_y = of(base, "test_style")
    fitted = GDA(encoder, [emoji.spoken_group(s) for s in base], emoji.GROUP_TEMPLATES)
    zero_base = float((fitted.predict(val_x).labels == val_y).float().mean())
    fitted.fit(base_x, base_y, covariance="class_mean")
    fitted.search_alpha(val_x[::2], val_y[::2])
    on_base = float((fitted.predict(val_x[1::2]).labels == val_y[1::2]).float().mean())
    model.alpha = fitted.alpha
    model.fit_new(base_x)
    after = float((model.predict(new_x).labels == new_y).float().mean())
    record_claim(
        system="GDA",
        claim="base-to-new: fitted base classes gain, and new classes keep or gain without pictures of theirs",
        expected="base above zero-shot; new not lower",
        seen=f"{len(base)} base subgroups {zero_base:.1%} to {on_base:.1%}; {len(new)} new ones {before:.1%} "
        f"to {after:.1%} "
        f"(alpha {fitted.alpha:g})",
        holds=on_base > zero_base and after >= before,
        seeds=[0],
    )
    assert on_base > zero_base
