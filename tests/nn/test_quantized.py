# SPDX-License-Identifier: Apache-2.0
"""vk.nn.QuantizedLinear, QuantizedPatchEmbedding and QuantizedMultiheadAttention."""

from __future__ import annotations

import copy
import doctest
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlmkernels as vk
from vlmkernels.nn import quantized
from vlmkernels.nn.quantized import QuantizedLinear, QuantizedPatchEmbedding
from vlmkernels.nn.quantized_attention import QuantizedMultiheadAttention
from vlmkernels.ops import quantized as ops
from vlmkernels.ops.quantized import quantize_weight, quantized_linear

SCHEMES = ["w8a8", "w8a16", "w4a16", "fp8", "bf16"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def cosine(a, b):
    return F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


# QuantizedLinear.


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
def test_layer_is_the_op(scheme, bias):
    linear, x = nn.Linear(64, 24, bias=bias), torch.randn(2, 5, 64)
    layer = QuantizedLinear.from_float(linear, scheme, activation="gelu")
    residual = torch.randn(2, 5, 24)
    qweight = quantize_weight(linear.weight, scheme)
    expected = quantized_linear(x, qweight, linear.bias, activation="gelu", residual=residual)
    assert torch.equal(layer(x, residual), expected)
    assert (layer.in_features, layer.out_features, layer.bias) == (64, 24, linear.bias)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dict_holds_the_canonical_tensors_and_nothing_else(scheme):
    state = QuantizedLinear.from_float(nn.Linear(64, 24), scheme).state_dict()
    expected = {
        "weight_q": ((24, 64), torch.int8),
        "scale": ((24,), torch.float32),
        "bias": ((24,), torch.float32),
    }
    if scheme == "w4a16":
        expected["weight_q"] = ((24, 32), torch.uint8)
        expected["scale"], expected["zero_point"] = ((24, 1), torch.float32), ((24, 1), torch.uint8)
    elif scheme == "fp8":
        expected["weight_q"] = ((24, 64), torch.float8_e4m3fn)
    elif scheme == "bf16":
        expected["weight_q"] = ((24, 64), torch.bfloat16)
        del expected["scale"]
    assert {name: (tuple(x.shape), x.dtype) for name, x in state.items()} == expected


@pytest.mark.parametrize("scheme", SCHEMES)
def test_reloads_into_a_layer_made_from_its_configuration(scheme):
    saved, x = QuantizedLinear.from_float(nn.Linear(64, 24), scheme), torch.randn(3, 64)
    fresh = QuantizedLinear(64, 24, scheme=scheme)
    assert not torch.equal(fresh(x), saved(x))
    fresh.load_state_dict(saved.state_dict())
    assert torch.equal(fresh(x), saved(x))
    on_meta = QuantizedLinear(64, 24, scheme=scheme, device="meta")
    on_meta.load_state_dict(saved.state_dict(), assign=True)
    assert torch.equal(on_meta(x), saved(x))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_safetensors_round_trip_and_rebuilding_from_tensors_alone(scheme, tmp_path):
    from safetensors.torch import load_file, save_file

    saved, x = QuantizedLinear.from_float(nn.Linear(96, 24), scheme), torch.randn(3, 96)
    save_file(
        {f"head.{name}": tensor for name, tensor in saved.state_dict().items()},
        tmp_path / "model.safetensors",
    )
    state = load_file(tmp_path / "model.safetensors")
    named = {"scheme": scheme} if scheme == "w8a16" else {}  # the one scheme that its dtypes do not tell
    layer = QuantizedLinear.from_state_dict(state, "head.", **named)
    assert layer.scheme == scheme
    assert layer.group_size == saved.group_size
    assert torch.equal(layer(x), saved(x))


def test_eight_bit_weights_load_with_either_treatment_of_activations():
    saved = QuantizedLinear.from_float(nn.Linear(64, 24), "w8a8")
    other = QuantizedLinear(64, 24, scheme="w8a16")
    other.load_state_dict(saved.state_dict())
    assert torch.equal(other.weight, saved.weight)


def test_loading_another_scheme_is_refused():
    state = QuantizedLinear.from_float(nn.Linear(64, 24), "bf16").state_dict()
    del state["bias"]
    with pytest.raises(
        RuntimeError, match=r"weight_q: a w8a8 layer holds torch.int8, the state dict torch.bfloat16"
    ):
        QuantizedLinear(64, 24, bias=False).load_state_dict(state)
    with pytest.raises(RuntimeError, match="weight_q"):
        QuantizedLinear(64, 24, bias=False).load_state_dict(nn.Linear(64, 24, bias=False).state_dict())


def test_from_state_dict_refuses_what_is_no_quantized_weight():
    state = QuantizedLinear.from_float(nn.Linear(64, 24), "w8a8").state_dict()
    with pytest.raises(KeyError, match=r"no 'head.weight_q'"):
        QuantizedLinear.from_state_dict(state, "head.")
    with pytest.raises(ValueError, match="takes a scale"):
        QuantizedLinear.from_state_dict({"weight_q": state["weight_q"]})
    with pytest.raises(ValueError, match="weight_q must be int8"):
        QuantizedLinear.from_state_dict({"weight_q": torch.zeros(2, 2)})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_casting_the_module_keeps_codes_and_scales(scheme):
    layer = QuantizedLinear.from_float(nn.Linear(64, 24), scheme)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.half()
    assert layer.bias.dtype == layer.weight.dtype == layer.weight_dtype == torch.float16
    assert layer(torch.randn(2, 64, dtype=torch.float16)).dtype == torch.float16
    layer.double().to(torch.bfloat16).float()
    for name in ("weight_q", "scale", "zero_point"):
        if name in before:
            found = layer.state_dict()[name]
            assert found.dtype == before[name].dtype
            assert torch.equal(found.view(torch.uint8), before[name].view(torch.uint8))


def test_weight_reads_as_the_dequantized_weight():
    linear = nn.Linear(64, 24)
    layer = QuantizedLinear.from_float(linear, "w8a8")
    assert torch.equal(layer.weight, quantize_weight(linear.weight, "w8a8").dequantize())
    assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize("scheme", SCHEMES)
def test_layer_survives_deepcopy_and_saving_the_module(scheme):
    layer, x = QuantizedLinear.from_float(nn.Linear(64, 24), scheme), torch.randn(3, 64)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), layer(x))
        assert twin.quantized_weight.weight_q is twin.weight_q
        assert twin.weight_q.data_ptr() != layer.weight_q.data_ptr()


def test_packed_layout_is_rebuilt_on_load_and_never_saved(monkeypatch):
    monkeypatch.setattr(ops, "_packings", {})
    ops.register_packing("cpu", "cpu", "w8a8", lambda weight_q, scale, zero_point: weight_q.t().contiguous())
    saved, fresh = QuantizedLinear.from_float(nn.Linear(64, 24)), QuantizedLinear(64, 24)
    assert sorted(saved.state_dict()) == ["bias", "scale", "weight_q"]
    for assign in (False, True):
        fresh.load_state_dict(saved.state_dict(), assign=assign)
        assert torch.equal(fresh.quantized_weight.packed("cpu"), saved.weight_q.t())
    assert fresh.to("meta").quantized_weight.packed("cpu") is None


def test_swapped_buffers_are_noticed():
    a, b = QuantizedLinear.from_float(nn.Linear(64, 24)), QuantizedLinear.from_float(nn.Linear(64, 24))
    x = torch.randn(3, 64)
    expected = b(x)
    assert torch.equal(torch.func.functional_call(a, b.state_dict(), (x,)), expected)
    assert not torch.equal(a(x), expected)


def test_static_input_scale_is_used_saved_and_loaded():
    layer, x = QuantizedLinear.from_float(nn.Linear(64, 24)), torch.randn(3, 64)
    dynamic = layer(x)
    layer.set_input_scale(0.05)
    expected = quantized_linear(x, layer.quantized_weight, layer.bias, input_scale=0.05)
    assert torch.equal(layer(x), expected)
    assert not torch.equal(expected, dynamic)
    fresh = QuantizedLinear(64, 24)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), expected)
    assert torch.equal(QuantizedLinear.from_state_dict(layer.state_dict())(x), expected)
    assert layer.half().input_scale.dtype == torch.float32
    layer.set_input_scale(None)
    assert "input_scale" not in layer.state_dict()


def test_static_input_scale_is_checked():
    layer = QuantizedLinear.from_float(nn.Linear(64, 24))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="input_scale must be positive and finite"):
            layer.set_input_scale(bad)
    with pytest.raises(ValueError, match="0-d"):
        layer.set_input_scale(torch.ones(2))
    with pytest.raises(ValueError, match="not to 'w8a16'"):
        QuantizedLinear(64, 24, scheme="w8a16").set_input_scale(1.0)


def test_gradients_reach_input_and_bias_but_not_the_weight():
    layer, x = QuantizedLinear.from_float(nn.Linear(64, 24)), torch.randn(3, 64, requires_grad=True)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 64))
    assert torch.equal(layer.bias.grad, torch.full((24,), 3.0))


def test_to_float_keeps_the_quantized_function():
    layer, x = QuantizedLinear.from_float(nn.Linear(64, 24).eval(), "w8a16"), torch.randn(3, 64)
    linear = layer.to_float()
    assert type(linear) is nn.Linear
    assert linear.bias is layer.bias
    assert not linear.training
    assert (linear.in_features, linear.out_features) == (64, 24)
    assert linear.weight.requires_grad
    torch.testing.assert_close(linear(x), layer(x))
    with pytest.raises(ValueError, match="fuses 'gelu'"):
        QuantizedLinear(64, 24, activation="gelu").to_float()


def test_layer_refuses_bad_options():
    with pytest.raises(ValueError, match="activation must be one of"):
        QuantizedLinear(64, 24, activation="tanh")
    with pytest.raises(ValueError, match="scheme must be one of"):
        QuantizedLinear(64, 24, scheme="int8")
    with pytest.raises(ValueError, match="divisible by the group_size 64"):
        QuantizedLinear(96, 24, scheme="w4a16", group_size=64)
    with pytest.raises(NotImplementedError, match="backend 'triton'"):
        QuantizedLinear(64, 24, backend="triton")(torch.ones(1, 64))


# QuantizedPatchEmbedding.


@pytest.mark.parametrize(("kernel", "size"), [((4, 4), (16, 16)), ((2, 3), (7, 11)), ((5, 5), (5, 5))])
def test_patch_embedding_is_the_convolution(kernel, size):
    conv = nn.Conv2d(3, 12, kernel, stride=kernel)
    layer = QuantizedPatchEmbedding.from_float(conv, "w8a16")
    images = torch.randn(2, 3, *size)
    expected = F.conv2d(images, layer.weight, layer.bias, stride=kernel)
    torch.testing.assert_close(layer(images), expected)
    torch.testing.assert_close(layer(images[0]), expected[0])
    assert cosine(QuantizedPatchEmbedding.from_float(conv, "w8a8")(images), conv(images)) > 0.999
    assert layer.weight.shape == conv.weight.shape
    assert layer.bias is conv.bias
    torch.testing.assert_close(layer.to_float()(images), expected)


def test_patch_embedding_refuses_other_convolutions_and_inputs():
    for options, reason in [
        ({"kernel_size": 3, "stride": 2}, "no patch embedding"),
        ({"kernel_size": 2, "stride": 2, "padding": 1}, "padding"),
        ({"kernel_size": 2, "stride": 2, "dilation": 2}, "dilation"),
        ({"kernel_size": 2, "stride": 2, "groups": 2}, "groups"),
    ]:
        with pytest.raises(ValueError, match=reason):
            QuantizedPatchEmbedding.from_float(nn.Conv2d(4, 8, **options))
    layer = QuantizedPatchEmbedding.from_float(nn.Conv2d(4, 8, 2, stride=2))
    for shape in [(1, 3, 4, 4), (1, 4, 1, 4), (4, 4)]:
        with pytest.raises(ValueError, match=r"x must be \[B, 4, H, W\]"):
            layer(torch.zeros(shape))
    with pytest.raises(ValueError, match="27 inputs"):
        QuantizedPatchEmbedding(QuantizedLinear(27, 8), 4, (3, 3))


# QuantizedMultiheadAttention.


def attention_pair(scheme="w8a16", **options):
    """A float module whose weights are exactly those of the quantized one, and the quantized one."""
    module = nn.MultiheadAttention(64, 4, **({"batch_first": True} | options))
    if module.in_proj_bias is not None:
        nn.init.normal_(module.in_proj_bias)
        nn.init.normal_(module.out_proj.bias)
    converted = QuantizedMultiheadAttention(module.eval(), scheme)
    return converted.to_float(), converted


MASKS = {
    "nothing": {},
    "bool padding": {"key_padding_mask": torch.tensor([[False] * 9, [False] * 5 + [True] * 4])},
    "float padding": {"key_padding_mask": torch.linspace(-2, 2, 18).reshape(2, 9)},
    "bool mask": {"attn_mask": torch.ones(9, 9, dtype=torch.bool).triu(1)},
    "float mask": {"attn_mask": torch.linspace(-3, 3, 81).reshape(9, 9)},
    "mask per head": {"attn_mask": torch.linspace(-3, 3, 8 * 81).reshape(8, 9, 9)},
    "bool mask per head": {"attn_mask": (torch.arange(8 * 81) % 3 == 1).reshape(8, 9, 9)},
    "causal hint": {"attn_mask": torch.ones(9, 9, dtype=torch.bool).triu(1), "is_causal": True},
    "bool mask and padding": {
        "attn_mask": torch.ones(9, 9, dtype=torch.bool).triu(1),
        "key_padding_mask": torch.tensor([[False] * 9, [False] * 5 + [True] * 4]),
    },
    "float mask and padding": {
        "attn_mask": torch.linspace(-3, 3, 81).reshape(9, 9),
        "key_padding_mask": torch.linspace(-2, 2, 18).reshape(2, 9),
    },
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_equals_torch_with_the_same_weights(masks, need_weights):
    module, converted = attention_pair()
    x = torch.randn(2, 9, 64)
    expected, expected_weights = module(x, x, x, need_weights=need_weights, **masks)
    out, weights = converted(x, x, x, need_weights=need_weights, **masks)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    if need_weights:
        torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-6)
    else:
        assert weights is None


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
def test_attention_is_within_quantization_error_of_the_float_module(masks):
    module = nn.MultiheadAttention(64, 4, batch_first=True).eval()
    converted = QuantizedMultiheadAttention(module, "w8a8")
    x = torch.randn(2, 9, 64)
    expected = module(x, x, x, need_weights=False, **masks)[0]
    assert cosine(converted(x, x, x, need_weights=False, **masks)[0], expected) > 0.999


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_attention_layouts_are_torchs(average, batch_first, batched):
    module, converted = attention_pair(batch_first=batch_first)
    x = torch.randn(2, 9, 64) if batched else torch.randn(9, 64)
    if batched and not batch_first:
        x = x.transpose(0, 1)
    expected, expected_weights = module(x, x, x, average_attn_weights=average)
    out, weights = converted(x, x, x, average_attn_weights=average)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-6)


def test_attention_unbatched_padding_mask():
    module, converted = attention_pair()
    x, padding = torch.randn(9, 64), torch.tensor([False] * 6 + [True] * 3)
    expected = module(x, x, x, key_padding_mask=padding)[0]
    torch.testing.assert_close(
        converted(x, x, x, key_padding_mask=padding)[0], expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("widths", [{}, {"kdim": 96, "vdim": 32}, {"bias": False}])
@pytest.mark.parametrize("same", [True, False])
def test_cross_attention_equals_torch(widths, same):
    module, converted = attention_pair(**widths)
    query = torch.randn(2, 5, 64)
    key = torch.randn(2, 9, widths.get("kdim", 64))
    value = key if same and "vdim" not in widths else torch.randn(2, 9, widths.get("vdim", 64))
    expected, expected_weights = module(query, key, value)
    out, weights = converted(query, key, value)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-6)


def test_attention_query_without_keys_gives_the_output_bias():
    _, converted = attention_pair()
    x, padding = torch.randn(2, 9, 64), torch.tensor([[True] * 9, [False] * 9])
    out, weights = converted(x, x, x, key_padding_mask=padding)
    torch.testing.assert_close(out[0], converted.out_proj.bias.expand(9, 64))
    assert torch.equal(weights[0], torch.zeros(9, 9))
    torch.testing.assert_close(weights[1].sum(-1), torch.ones(9))


def test_attention_weights_are_differentiable_and_do_not_change_the_output():
    _, converted = attention_pair("w8a8")
    x = torch.randn(2, 9, 64, requires_grad=True)
    out, weights = converted(x, x, x)
    assert torch.equal(out, converted(x, x, x, need_weights=False)[0])
    (weights * torch.randn_like(weights)).sum().backward()
    assert x.grad.abs().sum() > 0
    assert x.grad.isfinite().all()


def test_attention_is_causal_without_a_mask():
    _, converted = attention_pair()
    x = torch.randn(2, 9, 64)
    mask = torch.ones(9, 9, dtype=torch.bool).triu(1)
    expected = converted(x, x, x, attn_mask=mask)[0]
    torch.testing.assert_close(converted(x, x, x, is_causal=True)[0], expected, rtol=1e-5, atol=1e-6)


def test_attention_state_dict_and_reload():
    _, converted = attention_pair("w8a8")
    names = {f"{layer}.{name}" for layer in ("in_proj", "out_proj") for name in ("weight_q", "scale", "bias")}
    assert set(converted.state_dict()) == names
    fresh = QuantizedMultiheadAttention(nn.MultiheadAttention(64, 4, batch_first=True), "w8a8")
    fresh.load_state_dict(converted.state_dict())
    x, y = torch.randn(2, 9, 64), torch.randn(2, 4, 64)
    assert torch.equal(fresh(x, x, x)[0], converted(x, x, x)[0])
    assert torch.equal(fresh(y, x, x)[0], converted(y, x, x)[0])


def test_attention_refuses_bad_masks_and_modules():
    _, converted = attention_pair()
    x, y = torch.randn(2, 9, 64), torch.randn(2, 5, 64)
    with pytest.raises(ValueError, match=r"attn_mask must be \[9, 9\] or \[8, 9, 9\], got \[9, 8\]"):
        converted(x, x, x, attn_mask=torch.zeros(9, 8))
    with pytest.raises(ValueError, match=r"key_padding_mask must be \[2, 9\], got \[9, 2\]"):
        converted(x, x, x, key_padding_mask=torch.zeros(9, 2))
    with pytest.raises(ValueError, match="5 queries and 9 keys needs attn_mask"):
        converted(y, x, x, is_causal=True)
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        with pytest.raises(ValueError, match="appends keys"):
            QuantizedMultiheadAttention(nn.MultiheadAttention(64, 4, **options))


def test_attention_dropout_acts_in_training_only():
    module = nn.MultiheadAttention(64, 4, dropout=0.5, batch_first=True)
    converted = QuantizedMultiheadAttention(module)
    x = torch.randn(2, 9, 64)
    assert converted.training
    assert not torch.equal(converted(x, x, x)[0], converted(x, x, x)[0])
    converted.eval()
    assert torch.equal(converted(x, x, x)[0], converted(x, x, x)[0])


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_layers_work_inside_torchs_encoder(norm_first, padded):
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 9, 64)
    padding = torch.tensor([[False] * 9, [False] * 5 + [True] * 4]) if padded else None
    kept = torch.ones(2, 9, dtype=torch.bool) if padding is None else ~padding
    expected = encoder(x, src_key_padding_mask=padding)
    for block in encoder.layers:
        block.self_attn = QuantizedMultiheadAttention(block.self_attn)
    with torch.no_grad():
        assert cosine(encoder(x, src_key_padding_mask=padding)[kept], expected[kept]) > 0.999


def test_examples_in_the_docstrings():
    results = doctest.testmod(quantized, extraglobs={"vk": vk, "nn": nn})
    assert results.failed == 0
    assert results.attempted >= 2
