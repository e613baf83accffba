# SPDX-License-Identifier: Apache-2.0
"""The model registry: names, overrides, shipped weights."""

import pytest
import torch
from torch import nn

from vlmkernels import models
from vlmkernels.models import _registry


def test_list_models_is_sorted_and_complete():
    names = models.list_models()
    assert names == sorted(names, key=str.lower)
    assert {"RN50", "RN50x64", "ViT-B-32", "ViT-L-14-336", "ViT-bigG-14", "emoji-clip"} <= set(names)


@pytest.mark.parametrize("name", ["ViT-L/14@336px", "vit-l-14-336", "ViT-L-14-336"])
def test_spellings_of_a_name(name):
    with torch.device("meta"):
        model = models.create(name)
        assert models.CLIP.from_config("ViT-L/14@336px").config == model.config
    assert (model.config.name, model.config.vision.image_size) == ("ViT-L-14-336", 336)


def test_create_is_in_eval_mode_and_merges_overrides():
    model = models.create(
        "emoji-clip", embed_dim=32, vision={"layers": 1}, text={"layers": 1, "context_length": 9}
    )
    assert not any(module.training for module in model.modules())
    assert len(model.visual.transformer.resblocks) == 1
    assert model.positional_embedding.shape == (9, 128)
    assert model.text_projection.shape == (128, 32)


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"create: expected one of \[.*'ViT-B-32'.*\], got 'ViT-Z'"):
        models.create("ViT-Z")


def test_pretrained_without_weights_says_where_it_looked():
    with pytest.raises(
        FileNotFoundError, match=r"no pretrained weights of 'ViT-B-32'.*vk\.models\.load_checkpoint"
    ):
        models.create("ViT-B-32", pretrained=True)


def test_pretrained_loads_the_shipped_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(_registry, "_WEIGHTS", tmp_path)
    model = models.create("emoji-clip", vision={"layers": 1}, text={"layers": 1})
    models.save_pretrained(model, models.pretrained_dir("emoji-clip"), dtype=torch.float16)
    loaded = models.create("emoji-clip", pretrained=True)
    assert loaded.config == model.config
    assert loaded.text_projection.dtype == torch.float32
    torch.testing.assert_close(loaded.text_projection, model.text_projection.half().float(), rtol=0, atol=0)


def test_register_model(monkeypatch):
    monkeypatch.setattr(_registry, "_MODELS", dict(_registry._MODELS))

    @models.register_model("Tiny/1")
    def tiny(width=2):
        return nn.Linear(width, width)

    assert "Tiny/1" in models.list_models()
    assert models.create("tiny-1", width=3).weight.shape == (3, 3)
    with pytest.raises(ValueError, match="'vit-b/32' is already registered"):
        models.register_model("vit-b/32")(tiny)
