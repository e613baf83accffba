# SPDX-License-Identifier: Apache-2.0
"""The diffusion base: closed forms of its schedule, sampler and guidance; networks; adapters; digits."""

import pytest
import torch
from emoji_runs import fit

import vlmkernels as vk
from vlmkernels.models.diffusion import (
    DiffusionConfig,
    KLAutoencoder,
    KLAutoencoderConfig,
    LatentDiffusion,
    NoiseSchedule,
    UNet,
    UNetConfig,
    guided,
    sample,
)
from vlmkernels.models.diffusion_classifier import DiffusionClassifier
from vlmkernels.nn import (
    add_lora,
    load_lora_state_dict,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    set_lora_scale,
)


def gaussian(schedule: NoiseSchedule, deviation: float):
    """The exact predictor for data N(context, deviation^2)."""

    def predict(x, t, context, context_mask=None):
        abar = schedule.abar(t, x)
        mean = context.view(-1, *[1] * (x.ndim - 1)).to(x)
        return (1 - abar).sqrt() * (x - abar.sqrt() * mean) / (abar * deviation**2 + 1 - abar)

    return predict


def test_schedules_have_the_published_ends():
    scaled = NoiseSchedule("scaled_linear").alphas_cumprod
    assert scaled[[0, 499, 999]].tolist() == pytest.approx([0.99915, 0.27766965, 0.00466010], rel=1e-5)
    assert NoiseSchedule("linear").alphas_cumprod[999].item() == pytest.approx(4.04e-5, rel=5e-3)


def test_noise_and_data_and_velocity_recover_each_other():
    schedule = NoiseSchedule("linear")
    z, noise, t = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4), torch.tensor([0, 10, 300, 700, 990])
    z_t = schedule.add_noise(z, t, noise)
    assert torch.allclose(schedule.predict_noise(z_t, t, z), noise, atol=1e-3)
    back = schedule.predict_data(z_t[:4], t[:4], noise[:4])
    assert torch.allclose(back, z[:4], atol=1e-3)
    v = schedule.velocity(z, t, noise)
    assert torch.allclose(schedule.noise_from_velocity(z_t, t, v), noise, atol=1e-5)


def test_ddim_with_eta_one_is_the_ddpm_posterior():
    schedule = NoiseSchedule("linear")
    z, noise, t = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3), 400
    z_t = schedule.add_noise(z, t, noise)
    mean, variance = schedule.posterior(z, z_t, t)
    zero, one = torch.zeros_like(z), torch.ones_like(z)
    assert torch.allclose(schedule.ddim_step(z_t, noise, t, t - 1, eta=1.0, fresh=zero), mean, atol=1e-4)
    moved = schedule.ddim_step(z_t, noise, t, t - 1, eta=1.0, fresh=one) - mean
    assert torch.allclose(moved, variance.sqrt().expand_as(moved), atol=1e-4)


@pytest.mark.parametrize(("steps", "limit"), [(50, 0.15), (250, 0.03), (1000, 0.008)])
def test_ddim_carries_noise_to_gaussian_data(steps, limit):
    """The closed form; the errors measured for this schedule and deviation were 0.12, 0.025 and 0.006."""
    schedule, mean, deviation = NoiseSchedule("linear"), 4.0, 0.5
    start = torch.randn(2000, 1)
    context = torch.full((2000,), mean)
    found = sample(
        gaussian(schedule, deviation), schedule, (2000, 1), context, steps=steps, guidance=1.0, start=start
    )
    abar = float(schedule.alphas_cumprod[-1])
    expected = mean + deviation * (start - abar**0.5 * mean) / (abar * deviation**2 + 1 - abar) ** 0.5
    assert (found - expected).abs().max() < limit


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_guidance_between_gaussians_moves_the_mean(guidance):
    schedule = NoiseSchedule("linear")
    predict = gaussian(schedule, 0.7)
    x, t = torch.randn(6, 2), torch.tensor([0, 50, 200, 400, 800, 999])
    null, conditional = torch.full((6,), -1.0), torch.full((6,), 2.0)
    found = guided(predict, x, t, conditional, null, guidance)
    expected = predict(x, t, null + guidance * (conditional - null))
    assert torch.allclose(found, expected, atol=1e-4)


def test_clamping_recomputes_the_noise_before_the_step():
    schedule = NoiseSchedule("linear")
    z_t, noise = torch.randn(4, 1, 2, 2) * 3, torch.randn(4, 1, 2, 2)
    data = schedule.predict_data(z_t, 500, noise).clamp(-1, 1)
    expected = schedule.add_noise(data, 300, schedule.predict_noise(z_t, 500, data))
    assert torch.allclose(schedule.ddim_step(z_t, noise, 500, 300, clamp=1.0), expected, atol=1e-5)


def test_the_grid_goes_from_the_last_step_to_the_first():
    assert NoiseSchedule("linear").timesteps(3) == [999, 500, 0]
    with pytest.raises(ValueError, match=r"steps must lie in \[1, 1000\], got 0"):
        NoiseSchedule("linear").timesteps(0)


@pytest.fixture
def model() -> LatentDiffusion:
    return vk.models.create("diffusion-digits")


def test_the_digits_model_has_the_measured_size(model):
    assert sum(p.numel() for p in model.parameters()) == 376_644  # "377k parameters"


@pytest.mark.parametrize("denoiser", ["dit", "unet"])
@pytest.mark.parametrize("prediction", ["noise", "velocity"])
def test_an_untrained_model_predicts_nothing_and_its_loss_is_one(denoiser, prediction):
    config = DiffusionConfig(
        denoiser=denoiser, prediction=prediction, unet=UNetConfig(width=8, multipliers=(1, 2), heads=2)
    )
    model = LatentDiffusion(config).eval()
    images, classes = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))
    with torch.no_grad():
        out = model.denoiser(images, torch.full((64,), 7), model.context(classes)[0])
        assert out.abs().max() == 0
        assert model(images, classes)["loss"].item() == pytest.approx(1.0, abs=0.1)


def test_a_unet_halves_and_doubles_back():
    unet = UNet(UNetConfig(channels=3, size=16, width=8, multipliers=(1, 2, 4), blocks=2, heads=2))
    out = unet(torch.randn(2, 3, 16, 16), torch.tensor([1, 9]), torch.randn(2, 5, 8))
    assert out.shape == (2, 3, 16, 16)
    out.sum().backward()
    assert all(p.grad is not None for p in unet.parameters())


def awake(model: LatentDiffusion) -> LatentDiffusion:
    """A model in which no layer is zero any more."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def test_samples_repeat_with_the_generator_and_follow_the_class(model):
    model = awake(model)
    classes = torch.tensor([1, 2])
    first, second = (
        model.sample(classes, steps=4, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first, second)
    other = model.sample(classes.flip(0), steps=4, generator=torch.Generator().manual_seed(3))
    assert not torch.allclose(first, other)
    unguided = [
        model.sample(c, steps=4, guidance=0.0, generator=torch.Generator().manual_seed(3))
        for c in (classes, classes.flip(0))
    ]
    assert torch.equal(*unguided)


def test_text_conditions_ignore_padding_and_drop_to_the_null_token():
    config = DiffusionConfig(condition="text", text=DiffusionConfig().text.__class__(99, 8, 32, 1, 4))
    model = awake(LatentDiffusion(config))
    ids = torch.tensor([[97, 5, 98, 0, 0], [97, 6, 7, 8, 98]])
    images, t, noise = torch.randn(2, 1, 8, 8), torch.tensor([3, 500]), torch.randn(2, 1, 8, 8)
    short = model(images[:1], ids[:1, :3], t=t[:1], noise=noise[:1])["loss"]
    assert torch.allclose(short, model(images[:1], ids[:1], t=t[:1], noise=noise[:1])["loss"], rtol=1e-4)
    dropped = model(images, ids, t=t, noise=noise, dropped=torch.tensor([True, True]))["loss"]
    null = model(images, model.context.null(2), t=t, noise=noise)["loss"]
    assert torch.allclose(dropped, null, rtol=1e-4)
    assert model.sample(ids, steps=2, guidance=3.0).shape == (2, 1, 8, 8)


def test_the_autoencoder_keeps_its_scale_in_both_directions():
    autoencoder = KLAutoencoder(KLAutoencoderConfig(width=8, downsamplings=2))
    images = torch.rand(8, 3, 16, 16) * 2 - 1
    out = autoencoder(images)
    assert torch.allclose(out["loss"], out["l1"] + 1e-6 * out["kl"])
    scale = autoencoder.calibrate(images)
    latents = autoencoder.encode(images)
    assert latents.shape == (8, 4, 4, 4) and latents.std().item() == pytest.approx(1.0, rel=1e-3)
    assert torch.allclose(autoencoder.decode(latents), autoencoder.decoder(latents / scale))
    draws = [autoencoder.encode(images, sample=True) for _ in range(2)]
    assert not torch.equal(*draws)


def test_a_latent_model_samples_images_and_leaves_its_autoencoder_alone():
    config = DiffusionConfig(image_size=16, channels=3, autoencoder="kl", kl=KLAutoencoderConfig(width=8))
    model = LatentDiffusion(config).eval()
    assert model.config.latent_shape == (4, 4)
    model(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))["loss"].backward()
    assert all(p.grad is None for p in model.autoencoder.parameters())
    assert model.sample(torch.tensor([0, 1]), steps=2).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("packed", [False, True])
def test_adapters_start_as_the_base_and_merge_to_what_they_are(packed):
    torch.manual_seed(0)
    base = vk.nn.TransformerBlock(32, 4).eval() if packed else awake(vk.models.create("diffusion-digits"))
    x = (
        (torch.randn(2, 5, 32),)
        if packed
        else (torch.randn(2, 1, 8, 8), torch.tensor([5, 900]), torch.randn(2, 2, 64))
    )
    run = base if packed else base.denoiser
    with torch.no_grad():
        before = run(*x)
        names = set(base.state_dict())
        add_lora(base, rank=4, alpha=8.0)
        assert torch.equal(run(*x), before)
        for p in lora_parameters(base):
            p.add_(0.05 * torch.randn_like(p))
        adapted = run(*x)
        assert not torch.allclose(adapted, before)
        set_lora_scale(base, 0.0)
        assert torch.equal(run(*x), before)
        set_lora_scale(base, 1.0)
        merge_lora(base)
        assert torch.allclose(run(*x), adapted, atol=1e-5)
    assert set(base.state_dict()) == names


def test_adapters_alone_train_and_travel():
    torch.manual_seed(0)
    model = awake(vk.models.create("diffusion-digits"))
    twin = vk.models.create("diffusion-digits")
    twin.load_state_dict(model.state_dict())
    add_lora(model, rank=2)
    model(torch.randn(4, 1, 8, 8), torch.arange(4))["loss"].backward()
    trained = {id(p) for p in model.parameters() if p.grad is not None}
    assert trained == {id(p) for p in lora_parameters(model)}
    assert len(lora_parameters(model)) == 4 * 2 * 4 * 2  # blocks, attentions, projections, A and B
    with torch.no_grad():
        for p in lora_parameters(model):
            p.add_(0.1)
    add_lora(twin, rank=2)
    load_lora_state_dict(twin, lora_state_dict(model))
    x = torch.randn(1, 1, 8, 8), torch.tensor([7]), torch.randn(1, 2, 64)
    assert torch.equal(model.denoiser(*x), twin.denoiser(*x))


def test_adapters_on_a_quantized_base_train_and_do_not_merge():
    block = vk.quantize_(vk.nn.TransformerBlock(32, 4).eval(), "w8a8")
    x = torch.randn(2, 5, 32)
    before = block(x)
    linear = next(m for m in block.modules() if isinstance(m, vk.nn.QuantizedLinear) and m.in_features == 32)
    adapted = vk.nn.LoRALinear(linear, linear.in_features, linear.out_features, 4, 4.0)
    assert torch.equal(adapted(x), linear(x)) and before.shape == x.shape
    adapted(x).sum().backward()
    assert adapted.lora_b.grad is not None
    with pytest.raises(ValueError, match="expected a float base layer, got QuantizedLinear"):
        adapted.merge()


def test_bad_input_is_named(model):
    with pytest.raises(ValueError, match="expected a kind of"):
        NoiseSchedule("cosine")
    with pytest.raises(ValueError, match="expected s < t"):
        NoiseSchedule().ddim_step(torch.zeros(1, 1), torch.zeros(1, 1), 5, 5)
    with pytest.raises(ValueError, match=r"images must be \[B, 1, 8, 8\]"):
        model(torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"expected classes int64 \[B\]"):
        model.context(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="target must name some of"):
        add_lora(model, 4, target=("mlp",))
    with pytest.raises(ValueError, match="no attention layers"):
        add_lora(torch.nn.Linear(3, 3), 2)
    with pytest.raises(ValueError, match=r"guidance 2\.0 needs a null context"):
        guided(lambda *a, **k: a[0], torch.zeros(1, 1), torch.zeros(1), torch.zeros(1, 1, 1), None, 2.0)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    datasets = pytest.importorskip("sklearn.datasets", reason="needs scikit-learn")
    bunch = datasets.load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return ((images - images.mean()) / images.std())[order], torch.tensor(bunch.target)[order]


DIGITS_TRAIN = 1400


@pytest.fixture(scope="session")
def digits_model(tmp_path_factory) -> LatentDiffusion:
    """The measured model, trained for 2,200 steps instead of 3,000."""
    from vlmkernels.train.optim import WeightAverage

    images, labels = digits()
    torch.manual_seed(0)
    model = LatentDiffusion()
    average, generator = WeightAverage(model, 0.99), torch.Generator().manual_seed(0)

    def losses(step: int) -> dict[str, torch.Tensor]:
        if step:
            average.update(model)
        rows = torch.randint(DIGITS_TRAIN, (96,), generator=generator)
        return model(images[rows], labels[rows])

    seen = fit(model, losses, 2200, lr=2e-3)
    model.load_state_dict(average.state)
    model.loss_of_training = (sum(seen[:10]) / 10, sum(seen[-50:]) / 50)
    return model.eval()


@pytest.mark.slow
def test_guidance_raises_agreement_and_lowers_usefulness_as_training_data(digits_model, record_claim):
    linear_model = pytest.importorskip("sklearn.linear_model", reason="needs scikit-learn")
    images, labels = digits()
    train, test = slice(0, DIGITS_TRAIN), slice(DIGITS_TRAIN, None)

    def classifier(x: torch.Tensor, y: torch.Tensor):
        return linear_model.LogisticRegression(max_iter=400).fit(x.flatten(1).numpy(), y.numpy())

    judge = classifier(images[train], labels[train])
    classes = torch.arange(10).repeat(30)
    agreement, usefulness = {}, {}
    for weight in (1.0, 2.0, 7.5):
        drawn = digits_model.sample(
            classes, steps=20, guidance=weight, clamp=2.2, generator=torch.Generator().manual_seed(1)
        )
        agreement[weight] = judge.score(drawn.flatten(1).numpy(), classes.numpy())
        usefulness[weight] = classifier(drawn, classes).score(
            images[test].flatten(1).numpy(), labels[test].numpy()
        )
    first, last = digits_model.loss_of_training
    holds = agreement[1.0] < agreement[2.0] and usefulness[1.0] > usefulness[7.5]
    record_claim(
        system="Diffusion Classifier",
        claim="its base: guidance raises samples' agreement with their class and lowers their use as training data",
        expected="agreement rises from w=1 to w=2; a classifier trained on samples is worse at w=7.5 than at w=1",
        seen="digits, 300 samples, w=1, 2, 7.5: agreement "
        + ", ".join(f"{agreement[w]:.3f}" for w in agreement)
        + "; accuracy of a classifier trained on them "
        + ", ".join(f"{usefulness[w]:.3f}" for w in usefulness)
        + f"; loss {first:.2f} to {last:.3f} in 2,200 steps",
        holds=holds,
        seeds=[0],
    )
    assert last < 0.15 and agreement[1.0] > 0.8


@pytest.mark.slow
def test_digits_are_classified_by_denoising_and_pruning_costs_little(digits_model, record_claim):
    images, labels = digits()
    x, truth = images[DIGITS_TRAIN : DIGITS_TRAIN + 150], labels[DIGITS_TRAIN : DIGITS_TRAIN + 150]
    classifier = DiffusionClassifier(digits_model, batch_size=2048)

    def accuracy(samples: tuple[int, ...], keep: tuple[int, ...]) -> float:
        found, _ = classifier.classify(
            x, torch.arange(10), samples, keep, generator=torch.Generator().manual_seed(0)
        )
        return float((found == truth).float().mean())

    by_steps = {n: accuracy((n,), (1,)) for n in (2, 8, 40)}
    staged = accuracy((8, 40), (2, 1))  # 8 * 10 + 32 * 2 evaluations instead of 400
    rising = by_steps[2] <= by_steps[8] <= by_steps[40] and by_steps[2] < by_steps[40]
    holds = by_steps[40] > 0.8 and rising and staged > by_steps[40] - 0.02
    record_claim(
        system="Diffusion Classifier",
        claim="a class-conditional denoiser classifies, better with more timesteps, and pruning costs little",
        expected="digits: above 80%, rising with timesteps; staged pruning within 2 points at a third of the cost",
        seen=", ".join(f"{100 * a:.1f}% with {n} timesteps" for n, a in by_steps.items())
        + f"; {100 * staged:.1f}% staged at 36% of the cost of 40",
        holds=holds,
        seeds=[0],
    )
    assert by_steps[40] > 0.8
    assert staged > by_steps[40] - 0.05
