# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: every layout and container loads the same model, conversion is exact, no code is executed."""

import json
import logging
import os
import pickle
import warnings
import zipfile

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from vlmkernels.data import Tokenizer
from vlmkernels.models import CLIP, convert_state_dict, infer_config, load_checkpoint, save_pretrained
from vlmkernels.models.clip import CONFIGS

HF_CONFIG = {
    "model_type": "clip",
    "vision_config": {"hidden_act": "quick_gelu", "num_attention_heads": 4},
    "text_config": {"hidden_act": "quick_gelu", "num_attention_heads": 2},
}


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def assert_same_features(a, b, make_batch):
    out, expected = a(*make_batch(a.config)), b(*make_batch(b.config))
    for key, value in expected.items():
        torch.testing.assert_close(out[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("to", ["openai", "open_clip", "open_clip_custom", "transformers"])
def test_conversion_and_back_is_the_identity(vit, to):
    state = vit.state_dict()
    there = convert_state_dict(state, to=to)
    back = convert_state_dict(there, to="openai")
    assert sorted(back) == sorted(state)
    assert all(torch.equal(back[name], value) for name, value in state.items())
    again = convert_state_dict(back, to=to)
    assert sorted(again) == sorted(there)
    assert all(torch.equal(again[name], value) for name, value in there.items())


def test_layout_names(vit):
    custom = convert_state_dict(vit.state_dict(), to="open_clip_custom")
    assert "text.transformer.resblocks.0.attn.in_proj_weight" in custom
    assert "text.text_projection" in custom
    assert "visual.transformer.resblocks.0.attn.in_proj_weight" in custom
    assert "logit_scale" in custom
    hf = convert_state_dict(vit.state_dict(), to="transformers")
    width, embed = vit.config.vision.width, vit.config.embed_dim
    assert hf["visual_projection.weight"].shape == (embed, width)
    assert hf["vision_model.encoder.layers.2.self_attn.v_proj.weight"].shape == (width, width)
    assert torch.equal(
        hf["vision_model.encoder.layers.2.self_attn.v_proj.weight"],
        vit.visual.transformer.resblocks[2].attn.in_proj_weight[2 * width :],
    )
    assert "vision_model.pre_layrnorm.weight" in hf


def test_conversion_refuses_what_the_target_cannot_hold(make_model, resnet):
    with pytest.raises(ValueError, match=r"transformers' CLIPModel is a plain ViT .* cannot hold"):
        convert_state_dict(resnet.state_dict(), to="transformers")
    with pytest.raises(ValueError, match=r"to must be one of .*'transformers'\], got 'keras'"):
        convert_state_dict(resnet.state_dict(), to="keras")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("visual.trunk.blocks.0.attn.qkv.weight", "timm"),
        ("vision_model.head.probe", "SigLIP"),
        ("model.layers.0.weight", "are missing"),
    ],
)
def test_foreign_checkpoints_are_refused_with_a_reason(name, reason):
    with pytest.raises(ValueError, match=reason):
        convert_state_dict({name: torch.zeros(1)}, to="openai")


@pytest.mark.parametrize("name", [name for name in CONFIGS if CONFIGS[name].vision.stem == "patch"])
def test_configuration_is_inferred_from_shapes(name):
    with torch.device("meta"):
        state = CLIP(CONFIGS[name]).state_dict()
    for layout in ("openai", "open_clip_custom"):
        config = infer_config(convert_state_dict(state, to=layout), act=CONFIGS[name].act)
        assert config.override(name=name) == CONFIGS[name]


def test_own_folder_round_trip(model, make_batch, tmp_path):
    tokenizer = Tokenizer.train(["a cat and a dog", "a dog"] * 2, vocab_size=520)
    save_pretrained(model, tmp_path / "out", tokenizer)
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors", "tokenizer.json"]
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.config == model.config
    assert not loaded.training
    assert_same_weights(loaded, model)
    assert_same_features(loaded, model, make_batch)
    assert Tokenizer.from_dict(loaded.tokenizer_state).merges == tokenizer.merges
    save_pretrained(loaded, tmp_path / "again")
    assert load_checkpoint(tmp_path / "again").tokenizer_state == loaded.tokenizer_state


def test_own_file_alone_carries_its_configuration(model, tmp_path):
    save_pretrained(model, tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "alone.safetensors")
    loaded = load_checkpoint(tmp_path / "alone.safetensors")
    assert loaded.config == model.config
    assert_same_weights(loaded, model)


def test_saving_is_atomic(vit, tmp_path):
    save_pretrained(vit, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    class Broken:
        def save(self, path):
            path.write_text("half a file")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_pretrained(vit, tmp_path, Broken())
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


@pytest.mark.parametrize("layout", ["openai", "open_clip_custom"])
@pytest.mark.parametrize("container", ["safetensors", "pickle", "training", "ddp"])
def test_files_in_openai_and_open_clip_layouts(vit, resnet, tmp_path, layout, container, make_model):
    for config in (vit.config, resnet.config):
        # Heads cannot be told from weights: these have the published models' 64 channels per head.
        model = make_model(config.override(vision={"heads": None}, text={"heads": None}))
        state = convert_state_dict(model.state_dict(), to=layout)
        path = tmp_path / f"weights.{'safetensors' if container == 'safetensors' else 'pt'}"
        if container == "safetensors":
            save_file(state, path)
        elif container == "pickle":
            torch.save(state, path)
        else:
            prefix = "module." if container == "ddp" else ""
            torch.save({"epoch": 3, "state_dict": {prefix + name: v for name, v in state.items()}}, path)
        loaded = load_checkpoint(path, act="quick_gelu")
        assert loaded.config == model.config
        assert_same_weights(loaded, model)


@pytest.mark.parametrize("container", ["model.safetensors", "pytorch_model.bin", "shards"])
def test_transformers_folders(vit, make_batch, tmp_path, container):
    state = convert_state_dict(vit.state_dict(), to="transformers")
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]  # older files hold these buffers
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    if container == "shards":
        names = sorted(state)
        files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
        for file in set(files.values()):
            save_file({name: state[name] for name in names if files[name] == file}, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    elif container == "model.safetensors":
        save_file(state, tmp_path / container)
    else:
        torch.save(state, tmp_path / container)
    loaded = load_checkpoint(tmp_path)
    assert loaded.config == vit.config
    assert_same_weights(loaded, vit)
    assert_same_features(loaded, vit, make_batch)


def test_shards_outside_the_folder_are_refused(vit, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../secret.safetensors"}})
    )
    with pytest.raises(ValueError, match="names a shard outside its folder"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("quick", [True, False])
def test_open_clip_folder_says_the_activation_and_heads(vit, tmp_path, quick):
    save_file(vit.state_dict(), tmp_path / "open_clip_model.safetensors")
    config = {"vision_cfg": {"head_width": 16}, "text_cfg": {"heads": 2}, "quick_gelu": quick}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    loaded = load_checkpoint(tmp_path)
    assert loaded.config.act == ("quick_gelu" if quick else "gelu")
    assert (loaded.config.vision.heads, loaded.config.text.heads) == (4, 2)


def test_unknown_activation_is_assumed_aloud(vit, tmp_path, caplog):
    save_file(vit.state_dict(), tmp_path / "some.safetensors")
    with caplog.at_level(logging.WARNING, logger="vlmkernels.models.weights"):
        assert load_checkpoint(tmp_path / "some.safetensors").config.act == "gelu"
    assert 'pass act="quick_gelu"' in caplog.text
    caplog.clear()
    assert load_checkpoint(tmp_path / "some.safetensors", act="quick_gelu").config.act == "quick_gelu"
    assert not caplog.text


def test_openai_files_are_recognised_by_their_scalars(vit, tmp_path, caplog):
    extras = {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save(vit.state_dict() | extras, tmp_path / "ViT.pt")
    assert load_checkpoint(tmp_path / "ViT.pt").config.act == "quick_gelu"
    assert not caplog.text


def test_half_precision_files_load_as_float32_or_as_asked(vit, tmp_path):
    save_pretrained(vit, tmp_path, dtype=torch.bfloat16)
    assert load_file(tmp_path / "model.safetensors")["visual.proj"].dtype == torch.bfloat16
    loaded = load_checkpoint(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded.visual.proj, vit.visual.proj.bfloat16().float(), rtol=0, atol=0)
    assert {p.dtype for p in load_checkpoint(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_loaded_weights_train(vit, make_batch, tmp_path):
    save_pretrained(vit, tmp_path)
    loaded = load_checkpoint(tmp_path)
    loaded(*make_batch(vit.config))["image_features"].sum().backward()
    assert loaded.visual.proj.requires_grad
    assert loaded.visual.proj.grad is not None


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_another_resolution_resizes_the_positions(request, tmp_path, name, make_batch):
    model = request.getfixturevalue(name)
    save_pretrained(model, tmp_path)
    size = 2 * model.config.vision.image_size
    loaded = load_checkpoint(tmp_path, vision={"image_size": size})
    key = "visual.positional_embedding" if name == "vit" else "visual.attnpool.positional_embedding"
    old, new = model.state_dict()[key], loaded.state_dict()[key]
    grid = model.config.vision.grid
    assert new.shape[0] == 4 * grid**2 + 1
    assert torch.equal(new[0], old[0])
    image = old[1:].t().reshape(1, -1, grid, grid)
    expected = F.interpolate(image, size=(2 * grid, 2 * grid), mode="bicubic", antialias=True)
    torch.testing.assert_close(new[1:], expected[0].flatten(1).t())
    assert loaded.encode_image(make_batch(loaded.config)[0]).shape == (4, 48)


def test_shorter_context_cuts_the_text_positions(vit, tmp_path, make_batch):
    save_pretrained(vit, tmp_path)
    loaded = load_checkpoint(tmp_path, text={"context_length": 8})
    _, ids = make_batch(vit.config)
    torch.testing.assert_close(loaded.encode_text(ids[:, :8]), vit.encode_text(ids))
    with pytest.raises(
        ValueError, match=r"positional_embedding is \[12, 64\], the configuration wants \[20, 64\]"
    ):
        load_checkpoint(tmp_path, text={"context_length": 20})


def test_what_does_not_fit_is_named(vit, tmp_path):
    save_pretrained(vit, tmp_path)
    with pytest.raises(ValueError, match=r"unexpected \['visual.transformer.resblocks.2"):
        load_checkpoint(tmp_path, vision={"layers": 2})
    with pytest.raises(ValueError, match=r"missing \['visual.transformer.resblocks.3"):
        load_checkpoint(tmp_path, vision={"layers": 4})
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_checkpoint(tmp_path / "absent.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds none of model.safetensors"):
        load_checkpoint(tmp_path / "empty")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_pickled_code_is_never_executed(vit, tmp_path):
    trap = tmp_path / "executed"
    torch.save({"state_dict": vit.state_dict(), "extra": Evil(trap)}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="pickled code is never executed here"):
        load_checkpoint(tmp_path / "evil.pt")
    with zipfile.ZipFile(tmp_path / "evil_script.pt", "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps(Evil(trap), protocol=2))
        archive.writestr("evil/constants.pkl", b"")
    with pytest.raises(ValueError, match=r"cannot read the tensors of the TorchScript archive .*mkdir"):
        load_checkpoint(tmp_path / "evil_script.pt")
    assert not trap.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut short"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_files_are_a_value_error(tmp_path, content, suffix):
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="load_checkpoint"):
        load_checkpoint(path)


def test_torchscript_archive(vit, make_model, make_batch, tmp_path):
    model = make_model(vit.config.override(vision={"heads": None}, text={"heads": None}))
    model.visual.half()
    model.visual.ln_post.float()  # mixed types, as in OpenAI's files
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; such files stay
        holder = torch.jit.script(_Holder(model.state_dict()))
        torch.jit.save(holder, tmp_path / "ViT.pt")
    loaded = load_checkpoint(tmp_path / "ViT.pt")
    assert loaded.config == model.config
    assert_same_weights(loaded, model.float())


class _Holder(torch.nn.Module):
    """A module tree with the given names, and the scalars that OpenAI's archives hold."""

    def __init__(self, state, top=True):
        super().__init__()
        children = {}
        for name, value in state.items():
            head, _, rest = name.partition(".")
            if rest:
                children.setdefault(head, {})[rest] = value
            else:
                self.register_parameter(head, torch.nn.Parameter(value.clone()))
        for name, values in children.items():
            self.add_module(name, _Holder(values, top=False))
        if top:
            self.register_buffer("input_resolution", torch.tensor(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x
