# SPDX-License-Identifier: Apache-2.0
"""vk.quantize_ and vk.nn.dequantize_: what is converted, what is left alone and why, reloading, accuracy."""

from __future__ import annotations

import copy
import doctest
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlmkernels as vk
from vlmkernels.nn import quantize
from vlmkernels.nn.attention import AttentionPool, MultiheadCrossAttention, MultiheadSelfAttention
from vlmkernels.nn.quantize import dequantize_, quantize_
from vlmkernels.nn.quantized import QuantizedLinear, QuantizedPatchEmbedding
from vlmkernels.nn.quantized_attention import QuantizedMultiheadAttention
from vlmkernels.nn.transformer import Transformer

SCHEMES = ["w8a8", "w8a16", "w4a16", "fp8", "bf16"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Encoder(nn.Module):
    """A small vision transformer: patch embedding, blocks, head."""

    def __init__(self, width=64, layers=3, causal=False):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.transformer = Transformer(width, layers, 4, is_causal=causal)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 32)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.transformer(x)).mean(1))


def images(n=4):
    return torch.rand(n, 3, 32, 32)


@pytest.mark.parametrize(
    ("scheme", "least"),
    [("w8a8", 0.998), ("w8a16", 0.999), ("w4a16", 0.97), ("fp8", 0.995), ("bf16", 0.9999)],
)
def test_transformer_keeps_its_embeddings(scheme, least):
    model, x = Encoder().eval(), images(16)
    with torch.no_grad():
        expected = model(x)
        found = quantize_(model, scheme)(x)
    assert (found - expected).abs().max() > 0
    assert F.cosine_similarity(found, expected).min() >= least


def test_transformer_is_converted_throughout_and_in_place():
    model = Encoder(layers=2)
    blocks = [f"transformer.resblocks.{i}" for i in range(2)]
    biases = {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    assert quantize_(model) is model
    names = [
        n
        for b in blocks
        for n in (f"{b}.attn.in_proj", f"{b}.attn.out_proj", f"{b}.mlp.c_fc", f"{b}.mlp.c_proj")
    ]
    report = model.quantization_report
    assert report.scheme == "w8a8"
    assert report.converted == ["patches", *names, "head"]
    assert report.left_alone == {}
    assert isinstance(model.patches, QuantizedPatchEmbedding)
    assert isinstance(model.head, QuantizedLinear)
    assert {id(p) for name, p in model.named_parameters() if name.endswith("bias")} == biases
    assert not any(p.ndim == 2 for p in model.parameters())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("start", ["random", "meta"])
def test_checkpoint_reloads_without_the_float_model(scheme, start, tmp_path):
    from safetensors.torch import load_file, save_file

    saved, x = quantize_(Encoder(), scheme).eval(), images()
    save_file(saved.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta" if start == "meta" else "cpu"):
        fresh = Encoder().eval()
    quantize_(fresh, scheme).load_state_dict(
        load_file(tmp_path / "model.safetensors"), assign=start == "meta"
    )
    assert torch.equal(fresh(x), saved(x))


def test_filter_decides_by_module_and_name():
    model, seen = Encoder(layers=1), []

    def keep_first_and_last(module, name):
        seen.append((type(module).__name__, name))
        return name not in ("patches", "head", "transformer.resblocks.0.attn")

    quantize_(model, filter_fn=keep_first_and_last)
    assert seen[:2] == [("Conv2d", "patches"), ("MultiheadSelfAttention", "transformer.resblocks.0.attn")]
    assert model.quantization_report.converted == [
        f"transformer.resblocks.0.mlp.{n}" for n in ("c_fc", "c_proj")
    ]
    assert set(model.quantization_report.left_alone.values()) == {"filter_fn said no"}
    assert type(model.head) is nn.Linear
    assert model.transformer.resblocks[0].attn.in_proj is None
    assert isinstance(model.transformer.resblocks[0].attn.out_proj, nn.Linear)


def test_multihead_attention_is_converted_whole():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(64, 4, batch_first=True), "fc": nn.Linear(64, 64)})
    x = torch.randn(2, 9, 64)
    expected = model["attn"](x, x, x, need_weights=False)[0]
    quantize_(model)
    assert isinstance(model["attn"], QuantizedMultiheadAttention)
    assert model.quantization_report.converted == ["attn", "fc"]
    found = model["attn"](x, x, x, need_weights=False)[0]
    assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.999


def test_multihead_attention_that_cannot_be_converted_keeps_its_output_projection():
    model = nn.Sequential(nn.MultiheadAttention(64, 4, add_bias_kv=True))
    x = torch.randn(9, 2, 64)
    expected = model[0](x, x, x)[0]
    quantize_(model)
    assert torch.equal(model[0](x, x, x)[0], expected)
    assert "appends keys" in model.quantization_report.left_alone["0"]


def test_vk_attention_modules():
    model = nn.ModuleDict(
        {
            "own": MultiheadSelfAttention(64, 4, bias=False),
            "cross": MultiheadCrossAttention(64, 4, context_width=96),
            "pool": AttentionPool(64, 4, queries=2),
        }
    ).eval()
    x, context = torch.randn(2, 9, 64), torch.randn(2, 5, 96)
    with torch.no_grad():
        expected = [model["own"](x), model["cross"](x, context), model["pool"](x)]
        quantize_(model)
        found = [model["own"](x), model["cross"](x, context), model["pool"](x)]
    for a, b in zip(found, expected, strict=True):
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999
    assert model["own"].in_proj_weight is None
    assert isinstance(model["own"].in_proj, QuantizedLinear)
    converted = set(model.quantization_report.converted)
    assert {"own.in_proj", "own.out_proj", "cross.out_proj", "pool.attn.out_proj"} <= converted


def test_packed_projection_without_a_replacement_hook_is_reported():
    class Old(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_proj_weight = nn.Parameter(torch.randn(96, 32))
            self.out_proj = nn.Linear(32, 32)

    model = quantize_(nn.ModuleDict({"attn": Old()}))
    assert "no replace_in_proj" in model.quantization_report.left_alone["attn.in_proj"]
    assert model.quantization_report.converted == ["attn.out_proj"]


def test_layers_with_a_forward_of_their_own_are_left_alone():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = quantize_(nn.Sequential(Scaled(32, 32), nn.Conv2d(3, 8, 3, padding=1)))
    left = model.quantization_report.left_alone
    assert type(model[0]) is Scaled
    assert "forward is its own" in left["0"]
    assert "no patch embedding" in left["1"]


def test_shared_weights_are_left_alone_but_shared_modules_stay_shared():
    tied = nn.ModuleDict({"embed": nn.Embedding(48, 32), "head": nn.Linear(32, 48, bias=False)})
    tied["head"].weight = tied["embed"].weight
    quantize_(tied)
    assert tied["head"].weight is tied["embed"].weight
    assert tied.quantization_report.left_alone == {"head": "shares its weight: embed, head"}
    layer = nn.Linear(32, 32)
    shared = quantize_(nn.Sequential(layer, nn.ReLU(), layer, nn.Sequential(layer)))
    assert isinstance(shared[0], QuantizedLinear)
    assert shared[0] is shared[2] is shared[3][0]
    assert shared.quantization_report.converted == ["0"]


def test_hooked_parametrized_and_lazy_layers_are_left_alone():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.LazyLinear(8), nn.Linear(32, 32))
    model[0].register_forward_hook(lambda *_: None)
    nn.utils.parametrizations.orthogonal(model[1])
    quantize_(model)
    left = model.quantization_report.left_alone
    assert "hooks" in left["0"]
    assert "parametrized" in left["1"]
    assert "lazy" in left["2"]
    assert model.quantization_report.converted == ["3"]


def test_widths_that_the_group_does_not_divide_are_left_alone():
    model = nn.Sequential(nn.Linear(48, 96), nn.Linear(96, 64), nn.Linear(64, 8))
    quantize_(model, "w4a16")
    assert model.quantization_report.converted == ["1", "2"]
    assert (
        "48 inputs, not divisible by the group (32, 64 or 128)" in model.quantization_report.left_alone["0"]
    )
    assert (model[1].group_size, model[2].group_size) == (32, 64)
    model = quantize_(nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 8)), "w4a16", group_size=64)
    assert "not divisible by the group (64)" in model.quantization_report.left_alone["0"]


def test_quantizing_twice_changes_nothing():
    model = quantize_(Encoder(layers=1))
    before = dict(model.named_modules())
    quantize_(model, "w4a16")
    assert dict(model.named_modules()) == before
    assert model.quantization_report.converted == []


def test_what_happened_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="vlmkernels.nn.quantize"):
        quantize_(nn.Sequential(nn.Linear(32, 8), nn.Conv2d(3, 8, 3)))
        quantize_(nn.Sequential(nn.ReLU()))
    assert [r.levelname for r in caplog.records] == ["INFO", "INFO", "WARNING"]
    assert "1 left alone: has kernel (3, 3)" in caplog.messages[0]
    assert caplog.messages[1] == "quantize_: w8a8: 1 modules quantized, 1 left alone"


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_torchs_encoder_does_not_bypass_the_quantized_layers(norm_first, attention):
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=norm_first)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2)}).eval()
    x, padding = torch.randn(2, 9, 64), torch.tensor([[False] * 9, [False] * 5 + [True] * 4])
    with torch.no_grad():
        expected = model["encoder"](x, src_key_padding_mask=padding)
        quantize_(
            model, filter_fn=lambda module, name: attention or not isinstance(module, nn.MultiheadAttention)
        )
        calls = []
        model["encoder"].layers[1].linear1.register_forward_hook(lambda *_: calls.append(1))
        found = model["encoder"](x, src_key_padding_mask=padding)
    assert calls == [1]
    assert F.cosine_similarity(found[~padding].flatten(), expected[~padding].flatten(), dim=0) > 0.999


def test_torchs_decoder_runs_quantized():
    model = nn.Sequential(nn.TransformerDecoderLayer(64, 4, 128, batch_first=True)).eval()
    x, memory = torch.randn(2, 9, 64), torch.randn(2, 5, 64)
    mask = nn.Transformer.generate_square_subsequent_mask(9)
    expected = model[0](x, memory, tgt_mask=mask, tgt_is_causal=True)
    quantize_(model)
    found = model[0](x, memory, tgt_mask=mask, tgt_is_causal=True)
    assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.999


# Dynamo instantiates autograd.Function while it traces one, and torch itself warns of that.
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("trained", [False, True])
def test_quantized_model_compiles_without_a_graph_break(trained):
    torch._dynamo.reset()
    model, x = quantize_(Encoder(layers=1)).eval().requires_grad_(trained), images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, expected = compiled(x), model(x)
    torch.testing.assert_close(found, expected)
    if trained:
        weight = model.norm.weight
        gradients = [torch.autograd.grad(y.square().sum(), weight)[0] for y in (found, expected)]
        torch.testing.assert_close(*gradients)


def test_quantized_model_trains_what_is_in_front_of_it():
    model = quantize_(Encoder(layers=1)).requires_grad_(False)
    prompt = torch.zeros(1, 3, 32, 32, requires_grad=True)
    x, target = images(8), torch.randn(8, 32)
    optimizer, losses = torch.optim.Adam([prompt], lr=0.05), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x + prompt), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]


def test_casting_a_quantized_model_keeps_its_codes():
    model, x = quantize_(Encoder(layers=1)).eval(), images()
    expected = model(x)
    half = copy.deepcopy(model).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(half.head.weight_q, model.head.weight_q)
    assert half.head.scale.dtype == torch.float32
    assert F.cosine_similarity(half(x.bfloat16()).float(), expected).min() > 0.995


def test_training_mode_and_devices_are_kept():
    model = nn.Sequential(nn.Linear(32, 32).eval(), nn.Linear(32, 32, device="meta"))
    quantize_(model)
    assert not model[0].training
    assert model[1].training
    assert model[1].weight_q.device.type == "meta"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dequantize_restores_the_layers_up_to_the_quantization_error(scheme):
    model, x = Encoder(layers=1).eval(), images()
    names = {name: (tuple(p.shape), p.dtype) for name, p in model.state_dict().items()}
    kinds = {name: type(module) for name, module in model.named_modules()}
    quantize_(model, scheme)
    expected = model(x)
    assert dequantize_(model) is model
    assert {name: (tuple(p.shape), p.dtype) for name, p in model.state_dict().items()} == names
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "quantization_report")
    assert F.cosine_similarity(model(x), expected).min() > 0.995


def test_dequantize_restores_multihead_attention():
    for options in ({}, {"kdim": 96, "vdim": 32}, {"bias": False}):
        model = nn.Sequential(nn.MultiheadAttention(64, 4, **options))
        names = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        dequantize_(quantize_(model))
        assert type(model[0]) is nn.MultiheadAttention
        assert {name: tuple(p.shape) for name, p in model.state_dict().items()} == names


def test_refusals():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        quantize_({})
    with pytest.raises(ValueError, match=r"vk.quantize_: scheme must be one of .* got 'int8'"):
        quantize_(Encoder(), "int8")
    with pytest.raises(ValueError, match="group_size belongs to 'w4a16'"):
        quantize_(Encoder(), "w8a8", group_size=64)
    with pytest.raises(ValueError, match="group_size must be one of"):
        quantize_(Encoder(), "w4a16", group_size=48)
    for module in (nn.Linear(4, 4), nn.MultiheadAttention(8, 2), nn.Conv2d(3, 8, 2, stride=2)):
        with pytest.raises(ValueError, match="cannot be replaced in place"):
            quantize_(module)
    with pytest.raises(ValueError, match="use its to_float"):
        dequantize_(QuantizedLinear(32, 8))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        dequantize_([])


def test_examples_in_the_docstrings():
    results = doctest.testmod(quantize, extraglobs={"vk": vk, "nn": nn})
    assert results.failed == 0
    assert results.attempted >= 4


# Activations behind a converted layer.


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.SiLU(), "silu"),
        (nn.ReLU(), "relu"),
        (vk.nn.QuickGELU(), "quick_gelu"),
    ],
)
def test_a_layer_applies_the_activation_behind_it(module, name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), module, nn.Linear(128, 32))
    keys = set(vk.quantize_(copy.deepcopy(model), "w8a8", filter_fn=lambda m, n: n != "0").state_dict())
    x = torch.randn(5, 64)
    apart = quantize_(copy.deepcopy(model))
    apart[0].activation, apart[1] = None, copy.deepcopy(module)
    quantize_(model)
    assert model[0].activation == name
    assert model.quantization_report.fused == ["1"]
    assert keys - {"0.weight"} <= set(model.state_dict())
    torch.testing.assert_close(model(x), apart(x), rtol=1e-2, atol=1e-2)
    vk.nn.dequantize_(model)
    assert model[1] is module
    assert type(model[0]) is nn.Linear


def test_the_mlp_of_a_block_is_fused_and_comes_apart():
    mlp = nn.ModuleList([vk.nn.MLP(64, 128, act="quick_gelu")])
    act = mlp[0].act
    quantize_(mlp)
    assert mlp[0].c_fc.activation == "quick_gelu"
    assert mlp.quantization_report.fused == ["0.act"]
    assert copy.deepcopy(mlp)[0](torch.randn(3, 64)).shape == (3, 64)
    vk.nn.dequantize_(mlp)
    assert mlp[0].act is act
    assert not hasattr(mlp[0].c_fc, "activation")


def test_activations_stay_where_a_layer_cannot_apply_them():
    shared = nn.Linear(32, 32)
    hooked = nn.GELU()
    hooked.register_forward_hook(lambda module, args, output: output)
    model = nn.Sequential(
        nn.Sequential(shared, nn.GELU()),
        nn.Sequential(shared, nn.ReLU()),
        nn.Sequential(nn.Linear(32, 32), hooked),
        nn.Sequential(nn.Linear(32, 32), nn.Tanh()),
        nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU()),
        nn.ModuleList([nn.Linear(32, 32), nn.GELU()]),
    )
    quantize_(model, filter_fn=lambda module, name: True)
    assert model.quantization_report.fused == []
    assert all(m.activation is None for m in model.modules() if isinstance(m, vk.nn.QuantizedLinear))
