# SPDX-License-Identifier: Apache-2.0
"""ALIGN: parameter counts, its loss, its padding, its data filter."""

import random

import pytest
import torch
import torch.nn.functional as F

import vlmkernels as vk
from vlmkernels.models import TrainingBatch, align_loss, create
from vlmkernels.models.align import (
    CONFIGS,
    AltText,
    EfficientNet,
    EfficientNetConfig,
    MBConv,
    _SameConv,
    alt_text_filter,
)


def golden_features():
    """The specification's U and T, float64."""
    angle = (
        1.0 + 3.0 * torch.arange(4.0, dtype=torch.float64)[:, None] + torch.arange(3.0, dtype=torch.float64)
    )
    u = angle.sin()
    return F.normalize(u, dim=-1), F.normalize(u + 0.5 * angle.cos(), dim=-1)


def test_golden_values():
    u, t = golden_features()
    assert align_loss(u, t, 0.1).item() == pytest.approx(1.59538933, abs=5e-9)
    assert align_loss(u, t, 0.1, reduction="sum").item() == pytest.approx(3.19077865, abs=5e-9)
    assert align_loss(u, t, 0.1, label_smoothing=0.0).item() == pytest.approx(0.69855462, abs=5e-9)


@pytest.mark.parametrize(
    ("width", "depth", "embed_dim", "stem", "channels", "repeats", "parameters", "projection"),
    [
        (2.0, 3.1, 640, 64, [32, 48, 80, 160, 224, 384, 640], [4, 7, 7, 10, 10, 13, 4], 62_143_440, 0),
        (
            1.2,
            1.4,
            640,
            40,
            [24, 32, 48, 96, 136, 232, 384],
            [2, 3, 3, 5, 5, 6, 2],
            10_103_336,
            384 * 640 + 640,
        ),
    ],
    ids=["B7", "B3"],
)
def test_efficientnet_sizes(width, depth, embed_dim, stem, channels, repeats, parameters, projection):
    config = EfficientNetConfig(width_factor=width, depth_factor=depth)
    assert config.channels(config.stem) == stem
    assert [config.channels(stage[4]) for stage in config.stages] == channels
    assert [config.repeats(stage[0]) for stage in config.stages] == repeats
    with torch.device("meta"):
        tower = EfficientNet(config, embed_dim)
    assert len(tower.blocks) == sum(repeats)
    assert sum(p.numel() for p in tower.parameters()) == parameters + projection
    assert (tower.proj is None) == (projection == 0)


def test_bert_sizes():
    with torch.device("meta"):
        found = {
            name: sum(p.numel() for n, p in create(name).text.named_parameters() if not n.startswith("proj"))
            for name in ("align-b3-mini", "align-b7-base", "align-b7-large")
        }
    # BERT's published sizes without the pooler, W (W + 1)
    assert found["align-b7-base"] == 109_482_240 - 768 * 769
    assert found["align-b7-large"] == 335_141_888 - 1024 * 1025
    assert found["align-b3-mini"] == 11_170_560 - 256 * 257


def test_the_temperature_divides():
    u, t = (F.normalize(torch.randn(6, 8), dim=-1) for _ in range(2))
    torch.testing.assert_close(align_loss(u, t, 0.05, label_smoothing=0.0), vk.clip_loss(u, t, 20.0))
    tau = torch.tensor(0.2, requires_grad=True)
    align_loss(u, t, tau).backward()
    assert tau.grad != 0
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum'"):
        align_loss(u, t, 1.0, reduction="none")


def test_smoothing_mixes_in_the_mean_over_all_pairs():
    u, t = (F.normalize(torch.randn(6, 8, dtype=torch.float64), dim=-1) for _ in range(2))
    eps, total = 0.1, torch.zeros((), dtype=torch.float64)
    for logits in (u @ t.t() / 0.5, t @ u.t() / 0.5):
        log_p = F.log_softmax(logits, dim=1)
        total += ((1 - eps) * -log_p.diagonal() + eps * -log_p.mean(1)).mean() / 2
    torch.testing.assert_close(align_loss(u, t, 0.5), total)


def test_same_padding_is_tensorflows():
    """On odd sizes both sides are padded alike, on even ones the right and lower side more."""
    layer = _SameConv(1, 1, 3, stride=2)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        ones = torch.ones(1, 1, 5, 5)
        assert layer(ones)[0, 0].tolist() == [[4, 6, 4], [6, 9, 6], [4, 6, 4]]
        assert layer(ones[..., :4, :4])[0, 0].tolist() == [[9, 6], [6, 4]]
        port = _SameConv(1, 1, 3, stride=2, port_padding=True)
        port.weight.fill_(1.0)
        assert port(ones)[0, 0].shape == (2, 2)
        assert torch.equal(port(ones[..., :4, :4]), layer(ones[..., :4, :4]))


def test_a_block_that_projects_to_zero_is_the_identity():
    block = MBConv(8, 8, 3, 1, 6, residual=True, drop_path=0.0, port_padding=False).eval()
    with torch.no_grad():
        block.project_bn.weight.zero_()
        block.project_bn.bias.zero_()
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(block(x), x)


def test_padding_does_not_change_the_text():
    model = create("align-emoji")
    ids = torch.tensor([[5, 6, 7, 0, 0, 0], [5, 8, 9, 10, 11, 12]])
    full = model.encode_text(ids)
    torch.testing.assert_close(model.encode_text(ids[:1, :3]), full[:1], rtol=1e-5, atol=1e-6)
    mask = torch.ones_like(ids, dtype=torch.bool)
    assert not torch.equal(model.encode_text(ids, key_mask=mask)[0], full[0])


def test_training_losses_smooth_labels_unless_told_otherwise():
    model = create("align-emoji")
    images, ids = torch.randn(3, 3, 48, 48), torch.randint(1, 4096, (3, 6))
    batch = TrainingBatch(images, ids, torch.arange(3), torch.arange(3))
    out = model(images, ids)
    features = out["image_features"], out["text_features"]
    found = model.training_losses(batch)
    torch.testing.assert_close(found["loss"], align_loss(*features, model.temperature))
    batch.options = vk.models.training.ContrastiveOptions("clip", 0.0)
    torch.testing.assert_close(
        model.training_losses(batch)["loss"], align_loss(*features, model.temperature, label_smoothing=0.0)
    )
    assert model.logit_scale.exp().item() == pytest.approx(1 / model.temperature.item())
    with torch.no_grad():
        model.temperature.fill_(-1.0)
    model.after_step(1, 10)
    assert model.temperature > 0


def test_the_filter_is_idempotent_and_does_not_depend_on_the_order():
    rng = random.Random(0)
    words = ["cat", "dog", "red", "on", "a", "mat", "1/60"]
    pairs = [
        AltText(
            f"image{rng.randrange(40)}",
            rng.choice([150, 300, 1200]),
            rng.choice([250, 300]),
            " ".join(rng.choices(words, k=rng.randrange(1, 6))),
        )
        for _ in range(300)
    ]
    options = {"max_images_per_text": 3, "max_texts_per_image": 9}
    kept = alt_text_filter(pairs, **options)
    assert 0 < len(kept) < len(pairs)
    assert alt_text_filter(kept, **options) == kept
    shuffled = rng.sample(pairs, len(pairs))
    key = repr
    assert sorted(alt_text_filter(shuffled, **options), key=key) == sorted(kept, key=key)


@pytest.mark.parametrize(
    ("pair", "options", "stays"),
    [
        (AltText("i", 300, 300, "a red cat"), {}, True),
        (AltText("i", 199, 300, "a red cat"), {}, False),
        (AltText("i", 300, 901, "a red cat"), {}, False),
        (AltText("i", 300, 300, "cat"), {}, False),
        (AltText("i", 300, 300, "cat " * 21), {}, False),
        (AltText("i", 300, 300, "a red cat"), {"vocabulary": ["a", "red", "cat"]}, True),
        (AltText("i", 300, 300, "a red qzx"), {"vocabulary": ["a", "red", "cat"]}, False),
    ],
)
def test_the_filters_rules(pair, options, stays):
    assert (alt_text_filter([pair], **options) == [pair]) == stays


def test_published_names_are_there():
    assert {"align-b7-base", "align-b7-large", "align-b3-mini", "align-emoji"} == set(CONFIGS)
