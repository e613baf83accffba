# SPDX-License-Identifier: Apache-2.0
"""Layouts of CoCa, ViTamin, SigLIP and ALIGN: the peers' own models, saved, loaded by us, give the same features."""

import json
import warnings

import pytest
import torch
import torch.nn.functional as F

from vlmkernels import models
from vlmkernels.models import export_state_dict, load_checkpoint, save_checkpoint, save_pretrained

# Features of the two sides: the same float32 arithmetic in another order.
COSINE = 0.99999


def shaken(model):
    """A model in which every parameter matters: no zeros, no ones, no shared values."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point() and name.split(".")[-1] not in (
                "logit_scale",
                "logit_bias",
                "temperature",
            ):
                value.copy_(0.05 * torch.randn_like(value) + (value if value.ndim < 2 else 0.7 * value))
    return model.eval()


def assert_same(ours, theirs):
    assert F.cosine_similarity(ours, theirs).min() > COSINE
    # cosine alone would not see a wrong scale
    torch.testing.assert_close(ours.norm(dim=1), theirs.norm(dim=1), rtol=1e-4, atol=1e-5)


def quiet(build):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build()


def token_rows(vocab, context, count=3):
    ids = torch.randint(1, vocab - 2, (count, context), generator=torch.Generator().manual_seed(5))
    ids[:, 0] = vocab - 2
    for row, length in zip(ids, range(4, 4 + count), strict=True):
        row[length] = vocab - 1
        row[length + 1 :] = 0
    return ids


def pictures(size, count=3):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(6))


COCA = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 128,
        "patch_size": 8,
        "attentional_pool": True,
        "attn_pooler_queries": 9,
        "attn_pooler_heads": 4,
        "output_tokens": True,
    },
    "text_cfg": {
        "context_length": 11,
        "vocab_size": 99,
        "width": 64,
        "heads": 2,
        "layers": 2,
        "embed_cls": True,
        "output_tokens": True,
    },
    "multimodal_cfg": {"context_length": 11, "vocab_size": 99, "width": 64, "heads": 2, "layers": 3},
}


def coca_twin(open_clip, **changes):
    from open_clip.coca_model import CoCa

    config = json.loads(json.dumps(COCA))
    for part, values in changes.items():
        config[part].update(values)
    # open_clip has the right mask as an option of the tower and none in its configuration of it
    correct = config["text_cfg"].pop("correct_cls_mask", False)
    twin = quiet(lambda: CoCa(**config))
    torch.nn.init.normal_(twin.text_decoder.text_projection, std=0.1)  # open_clip leaves it as allocated
    twin = shaken(twin)
    twin.text.correct_cls_mask = correct
    config["text_cfg"]["correct_cls_mask"] = correct
    return config, twin


def saved_open_clip(folder, twin, config):
    folder.mkdir()
    torch.save(twin.state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"text_cfg": {"correct_cls_mask": True}},
        {"vision_cfg": {"width": 64}},
        {"vision_cfg": {"width": 64, "attentional_pool": False}},
    ],
    ids=["queries", "correct-mask", "equal-widths", "no-pooler"],
)
def test_coca_of_open_clip(open_clip, tmp_path, changes):
    config, twin = coca_twin(open_clip, **changes)
    model = load_checkpoint(saved_open_clip(tmp_path / "coca", twin, config))
    assert model.config.pooler == ("queries" if config["vision_cfg"]["attentional_pool"] else "none")
    images, ids = pictures(32), token_rows(99, 11)
    with torch.no_grad():
        assert_same(model.encode_image(images), twin.encode_image(images, normalize=False))
        assert_same(model.encode_text(ids), twin.encode_text(ids, normalize=False))
        logits = twin(images, ids, output_labels=False)["logits"]
        torch.testing.assert_close(model.caption_logits(images, ids), logits, rtol=1e-4, atol=1e-4)
        theirs = open_clip.CoCaLoss(2.0, 1.0)(**twin(images, ids))
        ours = models.coca_loss(model, model(images, ids), ids, w_con=1.0, w_cap=2.0)
    torch.testing.assert_close(ours, sum(theirs), rtol=1e-5, atol=1e-5)
    back = export_state_dict(model, "open_clip")
    assert back.keys() == twin.state_dict().keys()
    for name, value in twin.state_dict().items():
        assert torch.equal(back[name], value), name


@pytest.mark.parametrize("correct", [False, True])
def test_coca_writes_the_tokens_that_open_clip_writes(open_clip, tmp_path, correct):
    """open_clip encodes the whole prefix again for every token; here keys and values are kept."""
    config, twin = coca_twin(open_clip, text_cfg={"correct_cls_mask": correct})
    model = load_checkpoint(saved_open_clip(tmp_path / "coca", twin, config))
    images = pictures(32, 5)
    text = torch.full((5, 1), 97)
    with torch.no_grad():
        while text.shape[1] < 10:
            logits = twin(images, text, output_labels=False)["logits"][:, -1]
            if text.shape[1] < 5:
                logits[:, 98] = -torch.inf
            text = torch.cat([text, logits.argmax(1, keepdim=True)], dim=1)
    ours = model.generate(images, start_id=97, end_id=98, max_length=10, min_length=5)
    for row, expected in zip(ours.tolist(), text.tolist(), strict=True):
        end = expected.index(98) + 1 if 98 in expected else 9  # the last token is an end by force
        assert row[:end] == expected[:end]


def test_vitamin_of_open_clip(open_clip, tmp_path):
    timm = pytest.importorskip("timm")
    from open_clip.model import CustomTextCLIP
    from timm.models.vitamin import VitCfg, VitConvCfg

    config = {
        "embed_dim": 48,
        "vision_cfg": {
            "timm_model_name": "vitamin_small_224",
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 64,
        },
        "text_cfg": {"context_length": 12, "vocab_size": 99, "width": 64, "heads": 2, "layers": 2},
    }

    def build():
        twin = CustomTextCLIP(48, config["vision_cfg"], config["text_cfg"])
        embed = VitCfg((16, 32, 64), (2, 4, 1), 16, VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6), "1d")
        twin.visual.trunk = timm.create_model(
            "vitamin_small_224",
            embed_cfg=embed,
            embed_dim=64,
            depth=2,
            num_heads=1,
            img_size=64,
            num_classes=0,
        )
        twin.visual.head.proj = torch.nn.Linear(64, 48, bias=False)
        return twin

    twin = shaken(quiet(build))
    model = load_checkpoint(saved_open_clip(tmp_path / "vitamin", twin, config))
    assert type(model.visual) is models.ViTamin
    assert model.config.vision == models.ViTaminConfig(64, 16, (16, 32), (2, 4), 64, 2)
    images, ids = pictures(64), token_rows(99, 12)
    with torch.no_grad():
        assert_same(model.encode_image(images), twin.encode_image(images))
        assert_same(model.encode_text(ids), twin.encode_text(ids))
    back = export_state_dict(model, "open_clip")
    for name, value in twin.state_dict().items():
        assert torch.equal(back.pop(name), value), name
    assert not back


def test_siglip_of_open_clip(open_clip, tmp_path):
    timm = pytest.importorskip("timm")
    from open_clip.model import CustomTextCLIP

    config = {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "vision_cfg": {
            "timm_model_name": "vit_base_patch16_siglip_224",
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": 9,
            "vocab_size": 99,
            "width": 64,
            "heads": 2,
            "layers": 2,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
        },
    }

    def build():
        small = {"embed_dim": 64, "depth": 2, "num_heads": 1, "img_size": 32, "num_classes": 0}
        trunk = timm.create_model("vit_base_patch16_siglip_224", **small)
        vision = {**config["vision_cfg"], "timm_model_name": "vit_tiny_patch16_224", "timm_pool": "avg"}
        twin = CustomTextCLIP(64, vision | {"image_size": 32}, config["text_cfg"], init_logit_bias=-10.0)
        twin.visual.trunk = trunk
        return twin

    twin = shaken(quiet(build))
    model = load_checkpoint(saved_open_clip(tmp_path / "siglip", twin, config))
    assert (model.config.act, model.config.text_act) == ("gelu", "gelu")
    images, ids = pictures(32), token_rows(99, 9)
    with torch.no_grad():
        assert_same(model.encode_image(images), twin.encode_image(images))
        assert_same(model.encode_text(ids), twin.encode_text(ids))
        assert float(model.logit_bias) == -10.0
    back = export_state_dict(model, "open_clip")
    for name, value in twin.state_dict().items():
        assert torch.equal(back.pop(name), value), name
    assert not back


def test_siglip_of_transformers(transformers, tmp_path):
    config = transformers.SiglipConfig(
        text_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 99,
            "max_position_embeddings": 9,
            "projection_size": 48,
        },
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 32,
            "patch_size": 8,
        },
    )
    twin = shaken(quiet(lambda: transformers.SiglipModel(config)))
    quiet(lambda: twin.save_pretrained(tmp_path))
    model = load_checkpoint(tmp_path)
    assert (model.config.act, model.config.vision.heads, model.config.text.heads) == ("gelu_tanh", 3, 2)
    images, ids = pictures(32), token_rows(99, 9)
    with torch.no_grad():
        theirs = twin(pixel_values=images, input_ids=ids)
        ours = model(images, ids)
        assert_same(ours["image_features"], theirs.image_embeds)
        assert_same(ours["text_features"], theirs.text_embeds)
        logits = ours["logit_scale"] * ours["image_features"] @ ours["text_features"].t() + ours["logit_bias"]
        torch.testing.assert_close(logits, theirs.logits_per_image, rtol=1e-4, atol=1e-4)
        # padding is part of the input: short rows are padded to the context
        short = model.encode_text(ids[:, :7])
        padded = model.encode_text(F.pad(ids[:, :7], (0, 2), value=1))
    assert torch.equal(short, padded)
    save_checkpoint(model, tmp_path / "back.safetensors", layout="transformers")
    again = load_checkpoint(
        tmp_path / "back.safetensors", act="gelu_tanh", vision={"heads": 3}, text={"heads": 2}
    )
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


@pytest.mark.parametrize("size", [64, 65])
def test_align_of_transformers(transformers, tmp_path, size):
    config = transformers.AlignConfig(
        text_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 99,
            "max_position_embeddings": 12,
        },
        vision_config={
            "image_size": size,
            "width_coefficient": 1.0,
            "depth_coefficient": 1.1,
            "in_channels": [32, 16, 24],
            "out_channels": [16, 24, 40],
            "kernel_sizes": [3, 3, 5],
            "strides": [1, 2, 2],
            "num_block_repeats": [1, 2, 2],
            "expand_ratios": [1, 6, 6],
            "hidden_dim": 40,
        },
        projection_dim=40,
    )
    twin = shaken(quiet(lambda: transformers.AlignModel(config)))
    quiet(lambda: twin.save_pretrained(tmp_path))
    model = load_checkpoint(tmp_path)
    images, ids = pictures(size), token_rows(99, 12)
    mask = ids != 0
    with torch.no_grad():
        theirs = twin(pixel_values=images, input_ids=ids, attention_mask=mask.long())
        ours = model(images, ids)
        assert_same(ours["image_features"], theirs.image_embeds)
        assert_same(ours["text_features"], theirs.text_embeds)
        expected = transformers.models.align.modeling_align.align_loss(theirs.logits_per_text)
        loss = models.align_loss(ours["image_features"], ours["text_features"], model.temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    back = export_state_dict(model, "transformers")
    for name, value in twin.state_dict().items():
        if not name.startswith("text_model.pooler."):  # ALIGN does not use it, nor does this package keep it
            assert torch.equal(back.pop(name), value), name
    assert not back


@pytest.mark.parametrize("name", ["coca-emoji", "vitamin-emoji", "siglip-emoji", "align-emoji"])
def test_our_folders_load_again(tmp_path, name):
    model = models.create(name)
    save_pretrained(model, tmp_path)
    for path in (tmp_path, (tmp_path / "model.safetensors").rename(tmp_path / "alone.safetensors")):
        if path.suffix:
            loaded = load_checkpoint(path)
            assert type(loaded) is type(model)
            assert loaded.config == model.config
            for key, value in model.state_dict().items():
                assert torch.equal(loaded.state_dict()[key], value)


def test_a_missing_and_a_foreign_tensor_are_named(tmp_path):
    model = models.create("coca-emoji")
    state = export_state_dict(model, "open_clip")
    state["visual.extra"] = torch.zeros(2)
    torch.save(state, tmp_path / "more.pt")
    with pytest.raises(ValueError, match=r"does not fit a CoCa of open_clip: unexpected \['visual.extra'\]"):
        load_checkpoint(tmp_path / "more.pt")
    del state["visual.extra"], state["text_decoder.cross_attn.1.ln_1_kv.bias"]
    torch.save(state, tmp_path / "less.pt")
    with pytest.raises(ValueError, match=r"missing \['text_decoder.cross_attn.1.ln_1_kv.bias'\]"):
        load_checkpoint(tmp_path / "less.pt", pool_heads=4)


def test_what_a_layout_cannot_hold_is_refused(tmp_path):
    model = models.create("coca-emoji", pooler="cascade")
    with pytest.raises(ValueError, match=r"no place for \['visual.attn_pool_contrastive"):
        save_checkpoint(model, tmp_path / "x", layout="open_clip")
    with pytest.raises(
        ValueError, match=r"layout of a CoCa must be one of \['open_clip'\], got 'transformers'"
    ):
        save_checkpoint(model, tmp_path / "x", layout="transformers")


@pytest.mark.parametrize(("name", "size"), [("coca-emoji", 64), ("vitamin-emoji", 64), ("siglip-emoji", 32)])
def test_another_resolution_resizes_the_positions_as_open_clip_does(tmp_path, name, size):
    model = models.create(name)
    save_pretrained(model, tmp_path)
    loaded = load_checkpoint(tmp_path, vision={"image_size": size})
    old, new = model.visual.positional_embedding.detach(), loaded.visual.positional_embedding
    first = int(name == "coca-emoji")
    grid, wanted = model.config.vision.grid, loaded.config.vision.grid
    expected = F.interpolate(
        old[first:].t().reshape(1, -1, grid, grid), size=(wanted, wanted), mode="bicubic", antialias=True
    )
    assert torch.equal(new[:first], old[:first])
    assert torch.equal(new[first:], expected.flatten(2)[0].t())
    assert loaded.encode_image(pictures(size)).shape == (3, model.config.embed_dim)
