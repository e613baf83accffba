# SPDX-License-Identifier: Apache-2.0
"""Diffusion Classifier: the exact case, timesteps, pruning and shared noise; digits and emoji."""

import pytest
import torch

import vlmkernels as vk
from vlmkernels.models.diffusion import NoiseSchedule
from vlmkernels.models.diffusion_classifier import STAGES, DiffusionClassifier, stage_timesteps, winoground

SCHEDULE = NoiseSchedule("linear")
MEANS = 1.5 * torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


def ideal(deviation: float, schedule: NoiseSchedule = SCHEDULE):
    """The exact denoiser of classes N(mean_c, deviation^2 I); a condition is its class's mean."""

    def denoise(x_t, t, mean):
        abar = schedule.abar(t, x_t)
        return (1 - abar).sqrt() * (x_t - abar.sqrt() * mean) / (abar * deviation**2 + 1 - abar)

    return denoise


def drawn(count: int, deviation: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(6, (count,), generator=generator)
    return MEANS[labels] + deviation * torch.randn(count, 16, generator=generator), labels


def test_gaussian_classes_are_classified_by_the_nearest_mean():
    x, _ = drawn(40, 1.0)
    nearest = torch.cdist(x, MEANS).argmin(1)
    classifier = DiffusionClassifier(ideal(1.0), SCHEDULE)
    found, errors = classifier.classify(x, MEANS, (1000,), (1,), generator=torch.Generator().manual_seed(0))
    assert (found == nearest).float().mean() >= 0.95  # a finite number of noise draws
    assert errors.shape == (40, 6) and errors.isfinite().all()


def test_the_mean_error_has_its_closed_form():
    deviation, t = 0.8, 350
    x = MEANS[:1] + 0.3
    abar = float(SCHEDULE.alphas_cumprod[t])
    v = abar * deviation**2 + 1 - abar
    noise = torch.randn(4000, 16, generator=torch.Generator().manual_seed(3))
    classifier = DiffusionClassifier(ideal(deviation), SCHEDULE)
    errors = classifier.errors(x, MEANS, torch.arange(6)[None], [t] * 4000, noise).mean(-1)[0]
    squared = (x - MEANS).square().sum(1)
    expected = (abar * deviation**2 / v) ** 2 + abar * (1 - abar) * squared / v**2 / 16
    assert errors.tolist() == pytest.approx(expected.tolist(), rel=0.05)


def test_without_deviation_every_noise_gives_the_same_error():
    x, t = MEANS[:1] + 0.3, 350
    noise = torch.randn(5, 16)
    classifier = DiffusionClassifier(ideal(0.0), SCHEDULE)
    errors = classifier.errors(x, MEANS, torch.arange(6)[None], [t] * 5, noise)[0]
    abar = float(SCHEDULE.alphas_cumprod[t])
    expected = abar / (1 - abar) * (x - MEANS).square().mean(1)
    assert torch.allclose(errors, expected[:, None].expand(6, 5), rtol=1e-3, atol=1e-4)


def test_stages_take_the_papers_timesteps():
    first, second = stage_timesteps([50, 500])
    assert first == list(range(11, 1000, 20))
    assert sorted(first + second) == list(range(1, 1000, 2))
    stages = stage_timesteps([50, 100, 500, 1000])
    assert stages[0] == list(range(10, 1000, 20)) and stages[1] == list(range(5, 1000, 10))
    assert [sum(map(len, stages[: i + 1])) for i in range(4)] == [50, 150, 550, 1000]
    assert all(keep[-1] == 1 and len(n) == len(keep) for n, keep, _ in STAGES.values())


def test_keeping_all_until_the_last_stage_is_exhaustive():
    x, _ = drawn(10, 1.0)
    classifier = DiffusionClassifier(ideal(1.0), SCHEDULE)
    order = [t for stage in stage_timesteps((10, 50)) for t in stage]
    noise = torch.randn(50, 16)
    staged, errors = classifier.classify(x, MEANS, (10, 50), (6, 1), noise=noise)
    everything = classifier.errors(x, MEANS, torch.arange(6).expand(10, -1), order, noise).mean(-1)
    assert torch.allclose(errors, everything, rtol=1e-5)
    assert torch.equal(staged, everything.argmin(1))


def test_pruned_prompts_are_tried_no_more():
    x, _ = drawn(3, 1.0)
    calls = []

    def denoise(x_t, t, mean):
        calls.append(len(x_t))
        return ideal(1.0)(x_t, t, mean)

    DiffusionClassifier(denoise, SCHEDULE).classify(x, MEANS, (5, 25, 50), (3, 2, 1))
    stages = [len(s) for s in stage_timesteps((5, 25, 50))]
    assert sum(calls) == 3 * (6 * stages[0] + 3 * stages[1] + 2 * stages[2])


def test_permuting_prompts_permutes_errors():
    x, _ = drawn(4, 1.0)
    classifier, noise = DiffusionClassifier(ideal(1.0), SCHEDULE), torch.randn(20, 16)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    found, errors = classifier.classify(x, MEANS, (4, 20), (3, 1), noise=noise)
    permuted, permuted_errors = classifier.classify(x, MEANS[order], (4, 20), (3, 1), noise=noise)
    assert torch.allclose(errors[:, order], permuted_errors)
    assert torch.equal(order[permuted], found)


def test_several_prompts_of_a_class_are_pruned_as_prompts():
    x, _ = drawn(5, 0.5)
    prompts, classes = torch.cat([MEANS, MEANS + 0.1]), torch.arange(6).repeat(2)
    classifier = DiffusionClassifier(ideal(0.5), SCHEDULE)
    found, errors = classifier.classify(x, prompts, (20, 100), (4, 1), class_index=classes)
    assert errors.shape == (5, 12)
    assert torch.equal(found, errors.argmin(1) % 6)


def test_equal_errors_go_to_the_lower_prompt():
    x, _ = drawn(3, 1.0)
    found, _ = DiffusionClassifier(ideal(1.0), SCHEDULE).classify(x, MEANS[[2, 2, 2, 2]], (4, 20), (2, 1))
    assert found.tolist() == [0, 0, 0]


def test_shared_noise_makes_differences_of_errors_steady():
    near = 0.3 * MEANS  # classes that overlap, where the noise decides
    labels = torch.arange(6).repeat(50)
    x = near[labels] + 0.5 * torch.randn(300, 16)
    classifier, steps = DiffusionClassifier(ideal(0.5), SCHEDULE), [60] * 10
    active = torch.arange(6).expand(300, -1)
    shared = classifier.errors(x, near, active, steps, torch.randn(10, 16))
    single = [classifier.errors(x, near, active[:, c : c + 1], steps, torch.randn(10, 16)) for c in range(6)]
    alone = torch.cat(single, dim=1)
    spread = [(e[:, 0] - e[:, 1]).var(-1).mean() for e in (shared, alone)]
    assert spread[0] < 0.5 * spread[1]
    right = [(e.mean(-1).argmin(1) == labels).float().mean() for e in (shared, alone)]
    assert right[0] > right[1]


@pytest.mark.parametrize("loss", ["l1", "huber", "kl", "l2+kl"])
def test_every_loss_finds_well_separated_classes(loss):
    x, labels = drawn(30, 0.1)
    found, _ = DiffusionClassifier(ideal(0.1), SCHEDULE, loss=loss).classify(x, MEANS, (20, 100), (3, 1))
    assert torch.equal(found, labels)


def test_kl_is_the_weighted_squared_error_where_variances_agree():
    x, t, noise = MEANS[:1] + 0.3, 350, torch.randn(1, 16)
    active = torch.arange(6)[None]
    kl = DiffusionClassifier(ideal(0.5), SCHEDULE, loss="kl").errors(x, MEANS, active, [t], noise)
    l2 = DiffusionClassifier(ideal(0.5), SCHEDULE).errors(x, MEANS, active, [t], noise)
    abar, before, beta = SCHEDULE.alphas_cumprod[t], SCHEDULE.alphas_cumprod[t - 1], SCHEDULE.betas[t]
    # (mean - mean')^2 / (2 variance), with the data's error (1 - abar) / abar that of the noise
    variance = (1 - before) / (1 - abar) * beta
    factor = before * beta**2 / (1 - abar) ** 2 * (1 - abar) / abar / (2 * variance * torch.tensor(2.0).log())
    assert torch.allclose(kl, factor * l2, rtol=1e-3)


def test_pair_scores_and_winoground_outcomes():
    x = MEANS[:2] + 0.1
    scores = DiffusionClassifier(ideal(0.5), SCHEDULE).pair_scores(x, MEANS[:2], interval=50)
    assert all(outcome.item() for outcome in winoground(scores))
    text, image, group = winoground(torch.tensor([[2.0, 1.0], [2.5, 3.0]]))
    assert (text.item(), image.item(), group.item()) == (True, False, False)


def test_a_model_is_a_denoiser_by_itself():
    model = vk.models.create("diffusion-digits")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    x, conditions = torch.randn(2, 1, 8, 8), torch.arange(10)
    found, errors = DiffusionClassifier(model).classify(x, conditions, (4, 20), (3, 1))
    assert found.shape == (2,) and errors.shape == (2, 10) and errors.std() > 0


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="loss must be one of"):
        DiffusionClassifier(ideal(1.0), SCHEDULE, loss="l3")
    with pytest.raises(ValueError, match="a schedule must be given"):
        DiffusionClassifier(ideal(1.0))
    classifier = DiffusionClassifier(ideal(1.0), SCHEDULE)
    with pytest.raises(ValueError, match="end with 1"):
        classifier.classify(MEANS, MEANS, (5, 10), (3, 2))
    with pytest.raises(ValueError, match=r"class_index must be \[6\]"):
        classifier.classify(MEANS, MEANS, (5, 10), (3, 1), class_index=torch.zeros(2))
    with pytest.raises(ValueError, match="noise must have 10 rows"):
        classifier.classify(MEANS, MEANS, (5, 10), (3, 1), noise=torch.zeros(3, 16))
    with pytest.raises(ValueError, match="stages of 1 to 1000"):
        stage_timesteps([0])
