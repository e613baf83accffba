# SPDX-License-Identifier: Apache-2.0
"""Equality with open_clip and transformers on random weights, where they are installed."""

import random
import warnings

import pytest
import torch

from vlmkernels.data import Tokenizer, transform_for
from vlmkernels.models import CLIPConfig, TextConfig, VisionConfig, convert_state_dict, load_checkpoint

TEXT = TextConfig(vocab_size=99, context_length=12, width=64, layers=2)
CONFIGS = {
    "vit": CLIPConfig(48, VisionConfig(image_size=32, layers=3, width=128, patch_size=8), TEXT),
    "gelu": CLIPConfig(48, VisionConfig(image_size=32, layers=2, width=64, patch_size=16), TEXT, act="gelu"),
    "resnet": CLIPConfig(48, VisionConfig(image_size=64, layers=(1, 2, 1, 1), width=16), TEXT),
}


def assert_near(value, expected):
    # The same arithmetic in another order: a few rounding errors of float32 through some twenty layers.
    torch.testing.assert_close(value, expected, rtol=2e-4, atol=2e-5)


def open_clip_twin(open_clip, config, **text_options):
    """open_clip's model of a configuration."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    vision, text = config.vision, config.text
    kind = CustomTextCLIP if text_options else CLIP
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(
            config.embed_dim,
            CLIPVisionCfg(
                layers=vision.layers,
                width=vision.width,
                patch_size=vision.patch_size,
                image_size=vision.image_size,
                head_width=64,
            ),
            CLIPTextCfg(
                context_length=text.context_length,
                vocab_size=text.vocab_size,
                width=text.width,
                heads=text.width // 64,
                layers=text.layers,
            ),
            quick_gelu=config.act == "quick_gelu",
        ).eval()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("custom_text", [False, True])
def test_open_clip_agrees(open_clip, make_model, make_batch, tmp_path, name, custom_text):
    model = make_model(CONFIGS[name])
    twin = open_clip_twin(open_clip, model.config, **({"custom": True} if custom_text else {}))
    state = convert_state_dict(model.state_dict(), to="open_clip_custom" if custom_text else "open_clip")
    twin.load_state_dict(state, strict=True)
    images, ids = make_batch(model.config)
    with torch.no_grad():
        assert_near(model.encode_image(images), twin.encode_image(images))
        assert_near(model.encode_text(ids), twin.encode_text(ids))
    torch.save(twin.state_dict(), tmp_path / "open_clip.pt")
    loaded = load_checkpoint(tmp_path / "open_clip.pt", act=model.config.act)
    assert loaded.config == model.config
    with torch.no_grad():
        assert_near(loaded.encode_image(images), twin.encode_image(images))


@pytest.mark.parametrize("name", ["vit", "gelu"])
def test_transformers_agrees(transformers, make_model, make_batch, tmp_path, name):
    model = make_model(CONFIGS[name])
    vision, text = model.config.vision, model.config.text
    config = transformers.CLIPConfig(
        projection_dim=model.config.embed_dim,
        vision_config={
            "hidden_size": vision.width,
            "intermediate_size": 4 * vision.width,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.width // 64,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_act": model.config.act,
            "projection_dim": model.config.embed_dim,
        },
        text_config={
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "intermediate_size": 4 * text.width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.width // 64,
            "max_position_embeddings": text.context_length,
            "hidden_act": model.config.act,
            "projection_dim": model.config.embed_dim,
            "eos_token_id": text.vocab_size - 1,
            "bos_token_id": text.vocab_size - 2,
        },
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin = transformers.CLIPModel(config).eval()
        twin.load_state_dict(convert_state_dict(model.state_dict(), to="transformers"), strict=True)
        twin.save_pretrained(tmp_path)
    images, ids = make_batch(model.config)
    with torch.no_grad():
        out, theirs = model(images, ids), twin(pixel_values=images, input_ids=ids)
        assert_near(out["image_features"], theirs.image_embeds)
        assert_near(out["text_features"], theirs.text_embeds)
        assert_near(
            out["logit_scale"] * out["image_features"] @ out["text_features"].t(), theirs.logits_per_image
        )
    loaded = load_checkpoint(tmp_path)
    heads = {"vision": {"heads": vision.width // 64}, "text": {"heads": text.width // 64}}
    assert loaded.config == model.config.override(**heads)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def random_texts(count):
    """Words with everything that cleaning and splitting care about, and random characters of any script."""
    words = [
        "the",
        "cat's",
        "IT'S",
        "won't",
        "don't",
        "&amp;amp;",
        "&lt;b&gt;",
        "caf\u00e9",
        "\ufb01sh",
        "2024",
    ]
    words += [
        "\u201cquote\u201d",
        "\u2019",
        "'\u017f",
        "\u212a",
        "\u00bd",
        "\u00b2",
        "\u2167",
        "\u0130stanbul",
    ]
    words += ["\u01c5", "\u0149", "\u65e5\u672c", "\ud55c\uad6d", "\U0001f600\U0001f44d\U0001f3fd", "e\u0301"]
    words += [
        "a\u200bb",
        "...",
        "--",
        "<br/>",
        "http://x.y/?q=1",
        "\u00c3\u00a9",
        "a\u00a0b",
        "\t",
        "x\u2028y",
        "",
    ]
    rng = random.Random(0)
    # Blocks in which Unicode assigns nothing new: the two programs bring tables of different versions.
    blocks = ((0x20, 0x250), (0x370, 0x530), (0x5D0, 0x5EB), (0x904, 0x93A), (0xE01, 0xE3B), (0x2010, 0x2070))
    blocks += ((0x2190, 0x2400), (0x3041, 0x3097), (0x4E00, 0x9FA6), (0xAC00, 0xD7A4), (0x1F300, 0x1F650))
    scripts = [chr(code) for start, stop in blocks for code in range(start, stop)]
    for _ in range(count):
        pool = words if rng.random() < 0.6 else scripts
        yield rng.choice([" ", ""]).join(rng.choices(pool, k=rng.randint(0, 12)))


def test_tokenizer_agrees_with_open_clip(open_clip):
    pytest.importorskip("ftfy", reason="needs ftfy, which open_clip's cleaning calls")
    theirs, ours = open_clip.SimpleTokenizer(), Tokenizer.openai()
    texts = list(random_texts(3000))
    assert [ours.encode(text) for text in texts] == [theirs.encode(text) for text in texts]
    assert torch.equal(ours(texts), theirs(texts))
    assert torch.equal(ours(texts, context_length=9), theirs(texts, context_length=9))


@pytest.mark.parametrize("size", [(300, 200), (224, 224), (225, 224), (101, 333), (40, 50)])
def test_preprocessing_agrees_with_open_clip(open_clip, make_model, size):
    from PIL import Image

    transform = transform_for(make_model(CONFIGS["vit"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = open_clip.image_transform(
            transform.size, is_train=False, mean=transform.mean, std=transform.std
        )
        picture = Image.effect_noise(size, 60).convert("RGB")
        assert torch.equal(transform(picture), theirs(picture))
