# SPDX-License-Identifier: Apache-2.0
"""Selfie: the identities of its specification; holes of emoji and fine-tuning with few labels."""

import math

import pytest
import torch
import torch.nn.functional as F

import vlmkernels as vk
from vlmkernels.models.selfie import CONFIG_EMOJI, PatchNet, ResNet, Selfie, SelfieConfig


@pytest.fixture
def model() -> Selfie:
    torch.manual_seed(0)
    return Selfie(CONFIG_EMOJI).eval()


def test_one_hole_leaves_no_choice(model):
    out = model(torch.randn(3, 3, 32, 32), torch.tensor([[2], [5], [7]]))
    assert out["loss"].item() == pytest.approx(0.0, abs=1e-6) and out["accuracy"] == 1


def test_an_untrained_model_guesses(model):
    assert model(torch.randn(64, 3, 32, 32))["loss"].item() == pytest.approx(math.log(4), rel=0.1)


def test_a_batch_equals_its_images_one_by_one(model):
    images, holes = torch.randn(5, 3, 32, 32), model.draw_holes(5)
    whole = model(images, holes)["loss"]
    alone = torch.stack([model(images[i : i + 1], holes[i : i + 1])["loss"] for i in range(5)]).mean()
    assert torch.allclose(whole, alone, rtol=1e-4)


def test_permuting_the_holes_permutes_rows_and_columns(model):
    images = torch.randn(2, 3, 32, 32)
    holes, order = torch.tensor([[1, 6, 9, 14], [0, 3, 8, 11]]), torch.tensor([2, 0, 3, 1])
    features = model.patch_features(images)
    queries, permuted = model.queries(features, holes), model.queries(features, holes[:, order])
    assert torch.allclose(permuted, queries[:, order], atol=1e-5)
    assert torch.allclose(model(images, holes)["loss"], model(images, holes[:, order])["loss"], rtol=1e-5)


def test_the_logits_are_plain_products_of_queries_and_hidden_patches(model):
    plain = Selfie(CONFIG_EMOJI.override(scale_logits=False)).eval()
    plain.load_state_dict(model.state_dict())
    images, holes = torch.randn(2, 3, 32, 32), model.draw_holes(2)
    features = plain.patch_features(images)
    queries = plain.queries(features, holes)
    keys = torch.stack([features[b, holes[b]] for b in range(2)])
    logits = queries @ keys.transpose(1, 2)
    expected = F.cross_entropy(logits.flatten(0, 1), torch.arange(4).repeat(2))
    assert torch.allclose(plain(images, holes)["loss"], expected, rtol=1e-4)


def test_hidden_patches_do_not_reach_the_query(model):
    images, holes = torch.randn(1, 3, 32, 32), torch.tensor([[0, 1, 2, 3]])  # the first row
    other = images.clone()
    other[:, :, :8] = torch.randn(1, 3, 8, 32)
    queries = [model.queries(model.patch_features(x), holes) for x in (images, other)]
    assert torch.allclose(*queries, atol=1e-6)


def test_the_query_knows_where_the_context_is(model):
    features = model.patch_features(torch.randn(1, 3, 32, 32))
    moved = features[:, torch.tensor([*range(4), *reversed(range(4, 16))])]  # the context in another order
    holes = torch.tensor([[0, 1, 2, 3]])
    with torch.no_grad():
        model.positional_embedding.mul_(20)
        assert not torch.allclose(model.queries(features, holes), model.queries(moved, holes), atol=1e-3)


def test_rows_and_columns_give_each_patch_its_own_position():
    config = SelfieConfig(
        image_size=56, depths=(1, 1, 1, 1), width=4, heads=4, mlp_width=32, positions="factorised"
    )
    model = Selfie(config)
    assert model.positional_embedding.shape == (14, 64)
    assert len(model.positions().detach().unique(dim=0)) == 49
    assert config.hole_count == 12


def test_identical_patches_leave_chance(model):
    out = model(torch.randn(1, 3, 8, 8).repeat(8, 1, 4, 4))
    assert out["loss"].item() == pytest.approx(math.log(4), rel=1e-4)


def test_the_backbone_is_a_resnet_50_with_shared_stages():
    config = SelfieConfig(stem="large")
    resnet = ResNet(config, 1000)
    assert sum(p.numel() for p in resnet.parameters()) == 25_557_032  # torchvision's ResNet-50
    assert config.feature_width == 1024
    selfie = Selfie(CONFIG_EMOJI)
    backbone = selfie.export_backbone(7)
    assert backbone.layer3 is selfie.patch_net.layer3
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert PatchNet(CONFIG_EMOJI)(torch.randn(2, 3, 8, 8)).shape == (2, CONFIG_EMOJI.feature_width)


def test_published_settings():
    config = SelfieConfig()
    assert (config.grid, config.hole_count, config.feature_width) == (4, 4, 1024)
    large = vk.models.selfie.CONFIG_IMAGENET
    assert (large.grid, large.hole_count, large.positions) == (7, 12, "factorised")


def test_bad_input_is_named(model):
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 32, 32\]"):
        model(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"target_index must be \[2, T\] with T below 16"):
        model(torch.zeros(2, 3, 32, 32), torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"holes must lie in \[1, 16\), got 16"):
        SelfieConfig(holes=16)
    with pytest.raises(ValueError, match="classes must be positive"):
        model.export_backbone(0)
