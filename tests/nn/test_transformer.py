# SPDX-License-Identifier: Apache-2.0
"""The transformer block and its parts; torch.nn.TransformerEncoderLayer is the oracle of the block."""

import pytest
import torch
from torch import nn

from vlmkernels.nn import (
    MLP,
    DropPath,
    LayerNorm,
    MultiheadSelfAttention,
    QuickGELU,
    Transformer,
    TransformerBlock,
    activation,
)

WIDTH, HEADS = 32, 4


@pytest.fixture
def x():
    return torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(0))


def test_block_equals_torch_encoder_layer(x):
    torch.manual_seed(0)
    block = TransformerBlock(WIDTH, HEADS, mlp_width=48, act="gelu").eval().double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    names = {
        "ln_1": "norm1",
        "ln_2": "norm2",
        "attn": "self_attn",
        "mlp.c_fc": "linear1",
        "mlp.c_proj": "linear2",
    }
    state = {}
    for name, value in block.state_dict().items():
        for ours, theirs in names.items():
            if name.startswith(ours + "."):
                state[theirs + name.removeprefix(ours)] = value
    layer = nn.TransformerEncoderLayer(
        WIDTH,
        HEADS,
        48,
        dropout=0.0,
        activation="gelu",
        norm_first=True,
        batch_first=True,
        dtype=torch.float64,
    )
    layer.load_state_dict(state, strict=True)
    torch.testing.assert_close(block(x.double()), layer(x.double()), rtol=1e-12, atol=1e-12)


def test_block_has_openai_names():
    assert sorted(TransformerBlock(WIDTH, HEADS).state_dict()) == [
        "attn.in_proj_bias",
        "attn.in_proj_weight",
        "attn.out_proj.bias",
        "attn.out_proj.weight",
        "ln_1.bias",
        "ln_1.weight",
        "ln_2.bias",
        "ln_2.weight",
        "mlp.c_fc.bias",
        "mlp.c_fc.weight",
        "mlp.c_proj.bias",
        "mlp.c_proj.weight",
    ]


def test_causal_stack_does_not_look_ahead(x):
    torch.manual_seed(0)
    stack = Transformer(WIDTH, 2, HEADS, is_causal=True).eval()
    changed = x.clone()
    changed[:, 4:] += 1.0
    torch.testing.assert_close(stack(changed)[:, :4], stack(x)[:, :4], rtol=0, atol=0)
    assert not torch.allclose(stack(changed)[:, 4:], stack(x)[:, 4:])


def test_key_mask_reaches_every_block(x):
    torch.manual_seed(0)
    stack = Transformer(WIDTH, 2, HEADS).eval()
    mask = torch.tensor([[True] * 4 + [False] * 2] * 2)
    torch.testing.assert_close(stack(x, key_mask=mask)[:, :4], stack(x[:, :4]))


def test_gradient_checkpointing_changes_nothing(x):
    torch.manual_seed(0)
    stack = Transformer(WIDTH, 2, HEADS, dropout=0.2).train()
    gradients = []
    for enabled in (False, True):
        stack.gradient_checkpointing = enabled
        stack.zero_grad()
        torch.manual_seed(1)
        stack(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in stack.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_classes_are_arguments(x):
    class Loud(MultiheadSelfAttention):
        """An attention of the user's."""

    class Wide(MLP):
        """An MLP of the user's."""

    stack = Transformer(WIDTH, 2, HEADS, attention_layer=Loud, norm_layer=nn.RMSNorm, mlp_layer=Wide)
    for block in stack.resblocks:
        assert (type(block.attn), type(block.ln_1), type(block.mlp)) == (Loud, nn.RMSNorm, Wide)
    assert stack(x).shape == x.shape


def test_quick_gelu_formula():
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    torch.testing.assert_close(QuickGELU()(x), x / (1 + torch.exp(-1.702 * x)), rtol=1e-14, atol=1e-15)


def test_activation_names():
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(activation("gelu_tanh")(x), nn.functional.gelu(x, approximate="tanh"))
    torch.testing.assert_close(activation("silu")(x), nn.functional.silu(x))
    torch.testing.assert_close(activation("relu")(x), x.clamp(min=0))
    assert isinstance(activation("quick_gelu"), QuickGELU)
    with pytest.raises(ValueError, match=r"expected one of .*'quick_gelu'.* got 'swish'"):
        activation("swish")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", ["same", "float32"])
def test_layer_norm_rounds_once(dtype, weights):
    torch.manual_seed(0)
    norm = LayerNorm(768)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    if weights == "same":
        norm.to(dtype)
    x = (torch.randn(4, 768) * 3 + 50).to(dtype)
    exact = nn.functional.layer_norm(x.double(), (768,), norm.weight.double(), norm.bias.double())
    out = norm(x)
    assert out.dtype == dtype
    # Half a unit in the last place of the result, and float32's own error, which x's mean of 50 amplifies.
    slack = 0.5 * torch.finfo(dtype).eps * exact.abs() * (1 + 1e-3) + 1e-4
    assert ((out.double() - exact).abs() <= slack).all()


def test_layer_norm_float64_stays_float64():
    x = torch.randn(3, 16, dtype=torch.float64)
    torch.testing.assert_close(
        LayerNorm(16).double()(x), nn.functional.layer_norm(x, (16,)), rtol=1e-14, atol=1e-14
    )


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    out = drop(torch.ones(4000, 2, 3))
    per_sample = out[:, 0, 0]
    torch.testing.assert_close(out, per_sample[:, None, None].expand_as(out), rtol=0, atol=0)
    torch.testing.assert_close(per_sample.unique(), torch.tensor([0.0, 4 / 3]))
    # Five standard deviations of the mean of 4000 draws.
    assert abs(float(per_sample.mean()) - 1) < 5 * (0.25 / 0.75 / 4000) ** 0.5
    assert torch.equal(drop.eval()(out), out)


def test_drop_path_grows_with_depth():
    rates = [block.drop_path.rate for block in Transformer(WIDTH, 3, HEADS, drop_path=0.2).resblocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\), got 1"):
        DropPath(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_to_one_graph(x, dtype):
    torch.manual_seed(0)
    stack = Transformer(WIDTH, 2, HEADS, act="quick_gelu", is_causal=True).eval().to(dtype)
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    # The same operations in the same order: bits agree.
    torch.testing.assert_close(compiled(x.to(dtype)), stack(x.to(dtype)), rtol=0, atol=0)
