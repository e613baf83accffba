# SPDX-License-Identifier: Apache-2.0
"""CLIP: published sizes, initialisation, and what the encoders must and must not depend on."""

import math

import pytest
import torch

from vlmkernels.models import CLIP, CLIPConfig, TextConfig, VisionConfig, create
from vlmkernels.models.clip import CONFIGS
from vlmkernels.nn import ClipLoss, SigLipLoss

# Image tower, text tower, whole model.
PUBLISHED = {
    "RN50": (38_316_896, 63_690_240, 102_007_137),
    "RN101": (56_259_936, 63_428_096, 119_688_033),
    "RN50x4": (87_137_080, 91_163_520, 178_300_601),
    "RN50x16": (167_328_912, 123_650_304, 290_979_217),
    "RN50x64": (420_380_352, 202_877_952, 623_258_305),
    "ViT-B-32": (87_849_216, 63_428_096, 151_277_313),
    "ViT-B-16": (86_192_640, 63_428_096, 149_620_737),
    "ViT-L-14": (303_966_208, 123_650_304, 427_616_513),
    "ViT-L-14-336": (304_293_888, 123_650_304, 427_944_193),
    "ViT-H-14": (632_076_800, 354_032_640, 986_109_441),
    "ViT-g-14": (1_012_645_632, 354_032_640, 1_366_678_273),
    "ViT-bigG-14": (1_844_907_264, 694_659_840, 2_539_567_105),
}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = create(name)
    image, text, total = PUBLISHED[name]
    assert count(model.visual) == image
    assert count(model) == total == image + text + 1


def test_emoji_clip_is_small():
    with torch.device("meta"):
        assert 2_000_000 < count(create("emoji-clip")) < 8_000_000


def test_forward_gives_a_losss_arguments(model, make_batch):
    out = model(*make_batch(model.config))
    assert sorted(out) == ["image_features", "logit_scale", "text_features"]
    for key in ("image_features", "text_features"):
        assert out[key].shape == (4, 48)
        torch.testing.assert_close(out[key].norm(dim=-1), torch.ones(4))
    torch.testing.assert_close(out["logit_scale"], torch.tensor(1 / 0.07))


def test_forward_with_logit_bias(make_model, make_batch):
    config = CONFIGS["emoji-clip"].override(vision={"layers": 1}, text={"layers": 1}, init_logit_bias=-10.0)
    out = make_model(config)(*make_batch(config))
    assert out["logit_bias"].item() == -10.0
    assert SigLipLoss()(**out).isfinite()


def test_encode_normalizes_only_when_asked(model, make_batch):
    images, ids = make_batch(model.config)
    for encode, value in ((model.encode_image, images), (model.encode_text, ids)):
        raw, unit = encode(value), encode(value, normalize=True)
        torch.testing.assert_close(unit, raw / raw.norm(dim=-1, keepdim=True))
        assert not torch.allclose(raw.norm(dim=-1), torch.ones(4))


def test_batch_permutation(model, make_batch):
    images, ids = make_batch(model.config)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model.encode_image(images[order]), model.encode_image(images)[order])
    torch.testing.assert_close(model.encode_text(ids[order]), model.encode_text(ids)[order])


def test_text_after_the_end_token_does_not_matter(vit, make_batch):
    _, ids = make_batch(vit.config)
    end = ids.argmax(dim=-1, keepdim=True)
    after = torch.arange(ids.shape[1]) > end
    for padding in (5, vit.config.text.vocab_size - 1):
        changed = torch.where(after, padding, ids)
        torch.testing.assert_close(vit.encode_text(changed), vit.encode_text(ids), rtol=0, atol=0)


def test_text_before_the_end_token_matters(vit, make_batch):
    _, ids = make_batch(vit.config)
    for position in range(3):
        changed = ids.clone()
        changed[:, position] = 17
        assert not torch.isclose(vit.encode_text(changed), vit.encode_text(ids)).all(dim=-1).any()


def test_shorter_rows_give_the_same_features(vit, make_batch):
    _, ids = make_batch(vit.config)
    torch.testing.assert_close(vit.encode_text(ids[:, :7].int()), vit.encode_text(ids))


@pytest.mark.parametrize("position", [0, 7])
def test_image_features_depend_on_patch_positions(vit, make_batch, position):
    images, _ = make_batch(vit.config)
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).clone()  # [B, 3, 4, 4, 8, 8]
    row, column = divmod(position, 4)
    moved = patches.clone()
    moved[:, :, row, column], moved[:, :, 3, 3] = patches[:, :, 3, 3], patches[:, :, row, column]
    moved = moved.permute(0, 1, 2, 4, 3, 5).reshape(images.shape)
    assert not torch.allclose(vit.encode_image(moved), vit.encode_image(images), rtol=1e-3)


def test_gradients_reach_every_parameter(model, make_batch):
    model.train()
    ClipLoss()(**model(*make_batch(model.config))).backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert unused == []


def test_gradcheck(make_model, make_batch):
    config = CLIPConfig(
        8,
        VisionConfig(image_size=8, layers=1, width=16, patch_size=4, heads=2),
        TextConfig(vocab_size=20, context_length=7, width=16, layers=1, heads=2),
    )
    model = make_model(config).double()
    images, ids = make_batch(config, size=2)

    def features(images, scale, embedding):
        values = {"logit_scale": scale, "token_embedding.weight": embedding}
        out = torch.func.functional_call(model, values, (images, ids))
        return tuple(out.values())

    inputs = (images.double(), model.logit_scale.detach(), model.token_embedding.weight.detach())
    assert torch.autograd.gradcheck(features, [x.clone().requires_grad_() for x in inputs], fast_mode=True)


def test_mean_pooling_has_no_class_token(make_model, make_batch, vit):
    model = make_model(vit.config.override(vision={"pool": "mean"}))
    assert model.visual.class_embedding is None
    assert model.visual.positional_embedding.shape == (16, 64)
    images, _ = make_batch(model.config)
    expected = model.visual.ln_post(model.visual.forward_tokens(images).mean(dim=1)) @ model.visual.proj
    torch.testing.assert_close(model.encode_image(images), expected)


def test_patch_dropout_in_training_only(make_model, make_batch, vit):
    model = make_model(vit.config.override(vision={"patch_dropout": 0.5}))
    images, _ = make_batch(model.config)
    assert model.visual.forward_tokens(images).shape == (4, 17, 64)
    torch.testing.assert_close(model.encode_image(images), vit.encode_image(images), rtol=0, atol=0)
    model.train()
    assert model.visual.forward_tokens(images).shape == (4, 9, 64)


def test_patch_dropout_keeps_distinct_patches_with_their_positions(make_model, vit):
    model = make_model(vit.config.override(vision={"patch_dropout": 0.25}))
    tokens = torch.arange(16.0).view(1, 16, 1).expand(2, 16, 64)
    kept = model.visual._drop_patches(tokens)
    assert kept.shape == (2, 12, 64)
    assert all(len(set(row.tolist())) == 12 for row in kept[..., 0])
    assert (kept == kept[..., :1]).all()


def test_conv_stem_settings():
    vision = {"patch_size": 8, "stem_channels": (24, 48, 48), "stem_strides": [2, 1, 4]}
    stem = create("emoji-clip", vision=vision).visual.conv1
    assert [block[0].stride[0] for block in stem.blocks] == [2, 1, 4]
    assert stem(torch.zeros(1, 3, 64, 64)).shape == (1, 256, 8, 8)
    with pytest.raises(ValueError, match="one stride per convolution with product patch_size"):
        create("emoji-clip", vision={"stem_channels": (24, 48)})


def test_resnet_pools_before_the_last_convolution(resnet):
    strides = [module.stride for module in resnet.modules() if isinstance(module, torch.nn.Conv2d)]
    assert strides.count((2, 2)) == 1  # only the first convolution of the stem
    pooled = {
        name for name, module in resnet.visual.named_modules() if isinstance(module, torch.nn.AvgPool2d)
    }
    strided = {f"layer{i}.0.{name}" for i in (2, 3, 4) for name in ("avgpool", "downsample.-1")}
    assert pooled == {"avgpool", "layer1.0.downsample.-1"} | strided


def test_initialisation_of_the_text_tower():
    torch.manual_seed(0)
    model = CLIP(
        CLIPConfig(256, VisionConfig(32, 1, 64, 8), TextConfig(vocab_size=2000, width=256, layers=8))
    )
    block = model.transformer.resblocks[3]
    expected = {
        model.token_embedding.weight: 0.02,
        model.positional_embedding: 0.01,
        model.text_projection: 1 / 16,
        block.attn.in_proj_weight: 1 / 16,
        block.attn.out_proj.weight: 1 / 16 / 4,
        block.mlp.c_proj.weight: 1 / 16 / 4,
        block.mlp.c_fc.weight: 512**-0.5,
    }
    for parameter, std in expected.items():
        # Five standard deviations of the estimate.
        assert parameter.std().item() == pytest.approx(std, rel=5 / (2 * parameter.numel()) ** 0.5)
    assert block.attn.in_proj_bias.count_nonzero() == 0
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))


def test_initialisation_of_the_image_towers():
    torch.manual_seed(0)
    vit = CLIP(
        CLIPConfig(256, VisionConfig(64, 1, 256, 4), TextConfig(vocab_size=50, width=64, layers=1))
    ).visual
    for parameter in (vit.class_embedding, vit.positional_embedding, vit.proj):
        assert parameter.std().item() == pytest.approx(1 / 16, rel=5 / (2 * parameter.numel()) ** 0.5)
    resnet = CLIP(
        CLIPConfig(256, VisionConfig(64, (2, 1, 1, 1), 16), TextConfig(vocab_size=50, width=64, layers=1))
    ).visual
    pool = resnet.attnpool
    for layer in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
        assert layer.weight.std().item() == pytest.approx(
            512**-0.5, rel=5 / (2 * layer.weight.numel()) ** 0.5
        )
    assert resnet.layer1[1].bn3.weight.count_nonzero() == 0
    assert resnet.layer1[1].bn2.weight.count_nonzero() == 16


def test_clamp_logit_scale(vit):
    for value, expected in ((7.0, math.log(100)), (-1.0, 0.0), (3.0, 3.0)):
        vit.logit_scale.data.fill_(value)
        vit.clamp_logit_scale()
        assert vit.logit_scale.item() == pytest.approx(expected)


def test_gradient_checkpointing_changes_nothing(vit, make_batch):
    gradients = []
    for enabled in (False, True):
        vit.set_gradient_checkpointing(enabled)
        vit.train().zero_grad()
        ClipLoss()(**vit(*make_batch(vit.config))).backward()
        gradients.append([parameter.grad.clone() for parameter in vit.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_bad_inputs_are_named(vit, make_batch):
    images, ids = make_batch(vit.config)
    with pytest.raises(
        ValueError, match=r"encode_image: images must be \[B, 3, 32, 32\], got \[4, 3, 32, 16\]"
    ):
        vit.encode_image(images[..., :16])
    with pytest.raises(TypeError, match=r"encode_image: images must be floating point .* got torch.uint8"):
        vit.encode_image(images.to(torch.uint8))
    with pytest.raises(
        ValueError, match=r"encode_text: ids must be \[B, L\] with L from 1 to 12, got \[4, 13\]"
    ):
        vit.encode_text(torch.zeros(4, 13, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"encode_text: ids must be int32 or int64, got torch.float32"):
        vit.encode_text(ids.float())


def test_empty_batches(vit):
    assert vit.encode_image(torch.zeros(0, 3, 32, 32)).shape == (0, 48)
    assert vit.encode_text(torch.zeros(0, 5, dtype=torch.int64)).shape == (0, 48)


def test_bad_configurations_are_named():
    with pytest.raises(ValueError, match=r"CLIPConfig: expected fields among .* got 'embed'"):
        CLIPConfig.from_dict({"embed": 4})
    with pytest.raises(ValueError, match=r"VisionConfig: expected fields among .* got 'depth'"):
        create("ViT-B-32", vision={"depth": 4})
    with pytest.raises(ValueError, match=r"image_size must be a multiple of patch_size, got 100 and 32"):
        VisionConfig(image_size=100)
    with pytest.raises(ValueError, match=r"stem must be one of \['patch', 'conv'\], got 'linear'"):
        VisionConfig(stem="linear")
    with pytest.raises(
        ValueError, match=r"heads must be given where width is no multiple of 64, got width 100"
    ):
        create("emoji-clip", text={"width": 100})


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_survive_json(name):
    import json

    config = CONFIGS[name]
    assert CLIPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(model, make_batch, dtype):
    images, ids = make_batch(model.config)
    with torch.no_grad():
        expected = model(images, ids)
        out = model.to(dtype)(images, ids)
    assert out["image_features"].dtype == dtype
    assert out["logit_scale"].dtype == torch.float32
    for key in ("image_features", "text_features"):
        # Features of length 1: an angle of 0.1 is far below that between different inputs.
        assert (out[key].float() - expected[key]).norm(dim=-1).max() < (
            0.1 if dtype == torch.bfloat16 else 0.0125
        )


def test_autocast_trains(model, make_batch):
    model.train()
    images, ids = make_batch(model.config)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images, ids)
        loss = ClipLoss()(**out)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_compiles_to_one_graph(model, make_batch):
    images, ids = make_batch(model.config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected, out = model(images, ids), compiled(images, ids)
    for key, value in expected.items():
        torch.testing.assert_close(out[key], value)


def test_learns_to_match_pairs(vit, make_batch):
    images, ids = make_batch(vit.config, size=8)
    vit.train()
    optimizer = torch.optim.AdamW(vit.parameters(), lr=1e-3)
    losses = []
    for _ in range(15):
        loss = ClipLoss()(**vit(images, ids))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        vit.clamp_logit_scale()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
