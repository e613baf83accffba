# SPDX-License-Identifier: Apache-2.0
"""ViTamin's and SigLIP's towers: sizes, shapes, and what their specification says of them."""

import pytest
import torch
import torch.nn.functional as F

import vlmkernels as vk
from vlmkernels.models import CLIP, TrainingBatch, ViTaminConfig, create, vitamin
from vlmkernels.models.vitamin import GeGLU, MBConvLN, ViTamin

TINY = ViTaminConfig(64, 8, (8, 16), (2, 2), 32, 2, heads=2)


@pytest.mark.parametrize(
    ("size", "image_size", "parameters"),
    [
        ("S", 224, 22_025_152),
        ("B", 224, 87_525_248),
        ("L", 224, 333_318_048),
        ("L", 256, 333_379_488),
        ("XL", 256, 436_348_992),
    ],
)
def test_vitamin_parameter_counts(size, image_size, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in vitamin(size, image_size).parameters()) == parameters


def test_vitamin_shapes():
    tower = ViTamin(TINY, 48)
    seen = []
    for module in (tower.stem_conv2, *tower.stages, tower.down_conv):
        module.register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape[1:])))
    assert tower.forward_tokens(torch.randn(1, 3, 64, 64)).shape == (1, 16, 32)
    assert seen == [(8, 32, 32), (8, 16, 16), (16, 8, 8), (32, 4, 4)]
    assert tower(torch.randn(2, 3, 64, 64)).shape == (2, 48)
    # the first stage keeps the stem's channels and needs no 1x1 on its shortcut; the second one does
    assert [stage[0].expand is None for stage in tower.stages] == [True, False]


def test_vitamin_blocks_whose_last_layer_is_zero_are_the_identity():
    block, x = MBConvLN(8, 8, 1), torch.randn(2, 8, 6, 6)
    tower = ViTamin(TINY, 48)
    layer, tokens = tower.transformer.resblocks[0], torch.randn(2, 5, 32)
    with torch.no_grad():
        for module in (block.conv3_1x1, layer.attn.out_proj, layer.mlp.w2):
            module.weight.zero_()
            module.bias.zero_()
    assert torch.equal(block(x), x)
    assert torch.equal(layer(tokens), tokens)


def test_geglu_gates_with_the_first_layer():
    mlp, x = GeGLU(6, 12), torch.randn(3, 6)
    z = F.layer_norm(x, (6,), eps=1e-6)
    expected = mlp.w2(F.gelu(mlp.w0(z)) * mlp.w1(z))
    torch.testing.assert_close(mlp(x), expected)


def test_the_shortcut_does_not_count_padding():
    block = MBConvLN(4, 4, 2)
    with torch.no_grad():
        block.conv3_1x1.weight.zero_()
        block.conv3_1x1.bias.zero_()
    ones = torch.ones(1, 4, 6, 6)
    torch.testing.assert_close(block(ones), torch.ones(1, 4, 3, 3))


def test_shifting_the_picture_by_16_shifts_the_tokens():
    """Without positions, and away from the borders; attention sees all tokens, so the blocks are left out."""
    tower = ViTamin(ViTaminConfig(128, 8, (8, 16), (2, 2), 32, 0, heads=2), 48).eval()
    with torch.no_grad():
        tower.positional_embedding.zero_()
        picture = torch.randn(1, 3, 128, 128)
        first = tower.forward_tokens(picture).view(8, 8, 32)
        second = tower.forward_tokens(picture.roll(16, dims=3)).view(8, 8, 32)
    torch.testing.assert_close(second[3:5, 4:6], first[3:5, 3:5], rtol=1e-4, atol=1e-5)


def test_a_clip_takes_a_vitamin_as_its_image_tower():
    model = create("vitamin-emoji")
    assert type(model) is CLIP
    assert type(model.visual) is ViTamin
    out = model(torch.randn(2, 3, 48, 48), torch.tensor([[4094, 5, 4095], [4094, 6, 4095]]))
    vk.clip_loss(out["image_features"], out["text_features"], out["logit_scale"]).backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.device("meta"):
        # locked-text tuning: the joint space of a larger model
        assert create("ViTamin-S-LTT").config.embed_dim == 768
        assert create("ViTamin-XL-384").config.vision.heads == 16
        total = sum(p.numel() for p in create("ViTamin-L").parameters())
    assert total == 333_318_048 + 123_650_304 + 1  # the tower, ViT-L/14's text tower and the scale
    with pytest.raises(ValueError, match="size must be one of"):
        vitamin("M")
    with pytest.raises(ValueError, match="multiple of 16"):
        ViTaminConfig(100)


# --- SigLIP


def test_siglip_golden_value():
    angle = (
        1.0 + 3.0 * torch.arange(4.0, dtype=torch.float64)[:, None] + torch.arange(3.0, dtype=torch.float64)
    )
    u = F.normalize(angle.sin(), dim=-1)
    t = F.normalize(angle.sin() + 0.5 * angle.cos(), dim=-1)
    assert vk.siglip_loss(u, t, 10.0, -10.0).item() == pytest.approx(1.65556897, abs=5e-9)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # google's checkpoints: 203.2, 652.2 and 877.4 million
        ("ViT-B-16-SigLIP", 203_155_970),
        ("ViT-L-16-SigLIP-256", 652_150_786),
        ("ViT-SO400M-14-SigLIP", 877_360_306),
    ],
)
def test_siglip_parameter_counts(name, parameters):
    with torch.device("meta"):
        model = create(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.config.name == name


def test_siglip_text_sees_both_ways():
    model = create("siglip-emoji")
    ids = torch.randint(1, 4000, (2, 24))
    changed = ids.clone()
    changed[:, 0] += 1
    assert not torch.equal(model.encode_text(ids), model.encode_text(changed))
    changed = ids.clone()
    changed[:, -1] += 1
    assert not torch.equal(model.encode_text(ids), model.encode_text(changed))


def test_siglip_trains_with_its_own_loss():
    model = create("siglip-emoji")
    images, ids = torch.randn(3, 3, 48, 48), torch.randint(1, 4000, (3, 7))
    assert model.default_loss == "siglip"
    batch = TrainingBatch(images, ids, torch.arange(3), torch.arange(3))
    batch.options = vk.models.training.ContrastiveOptions(model.default_loss)
    loss = model.training_losses(batch)["loss"]
    out = model(images, ids)
    expected = vk.siglip_loss(
        out["image_features"], out["text_features"], model.logit_scale.exp(), model.logit_bias
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="pool='mean'"):
        create("siglip-emoji", vision={"pool": "class"})
