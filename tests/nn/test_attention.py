# SPDX-License-Identifier: Apache-2.0
"""Attention modules; torch.nn.MultiheadAttention with the same parameters is the oracle."""

import pytest
import torch
from torch import nn

from vlmkernels.nn import AttentionPool, AttentionPool2d, MultiheadCrossAttention, MultiheadSelfAttention

WIDTH, HEADS, BATCH, LENGTH = 32, 4, 3, 7


@pytest.fixture
def x():
    return torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def key_mask():
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[0, 5:] = False
    mask[2, 1:] = False
    return mask


def torch_twin(module, **options):
    """torch's module with the weights of ours, loaded by name."""
    twin = nn.MultiheadAttention(module.width, module.heads, batch_first=True, dtype=torch.float64, **options)
    twin.load_state_dict(module.state_dict(), strict=True)
    return twin.eval()


def randomized(module):
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_equals_torch(x, bias):
    module = randomized(MultiheadSelfAttention(WIDTH, HEADS, bias=bias, dtype=torch.float64))
    expected, _ = torch_twin(module, bias=bias)(x, x, x, need_weights=False)
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


def test_self_attention_with_key_mask_equals_torch(x, key_mask):
    module = randomized(MultiheadSelfAttention(WIDTH, HEADS, dtype=torch.float64))
    expected, _ = torch_twin(module)(x, x, x, key_padding_mask=~key_mask, need_weights=False)
    torch.testing.assert_close(module(x, key_mask=key_mask), expected, rtol=1e-12, atol=1e-12)


def test_self_attention_with_additive_bias_equals_torch(x):
    module = randomized(MultiheadSelfAttention(WIDTH, HEADS, dtype=torch.float64))
    bias = torch.randn(LENGTH, LENGTH, dtype=torch.float64)
    expected, _ = torch_twin(module)(x, x, x, attn_mask=bias, need_weights=False)
    torch.testing.assert_close(module(x, bias=bias[None, None]), expected, rtol=1e-12, atol=1e-12)


def test_self_attention_causal_by_module_or_by_call(x):
    module = randomized(MultiheadSelfAttention(WIDTH, HEADS, is_causal=True, dtype=torch.float64))
    mask = torch.full((LENGTH, LENGTH), -torch.inf, dtype=torch.float64).triu(1)
    expected, _ = torch_twin(module)(x, x, x, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(module(x, is_causal=False), expected)


def test_self_attention_row_without_a_key_gives_the_output_bias(x):
    module = randomized(MultiheadSelfAttention(WIDTH, HEADS, dtype=torch.float64))
    out = module(x, key_mask=torch.zeros(BATCH, LENGTH, dtype=torch.bool))
    torch.testing.assert_close(out, module.out_proj.bias.expand_as(out), rtol=0, atol=0)


def test_self_attention_gradcheck(x):
    module = randomized(MultiheadSelfAttention(WIDTH, HEADS, is_causal=True, dtype=torch.float64))
    x = x[:1, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(module, {"in_proj_weight": w}, (x,)),
        (x, module.in_proj_weight.detach().clone().requires_grad_()),
        fast_mode=True,
    )


def test_self_attention_dropout_acts_in_training_only(x):
    module = randomized(MultiheadSelfAttention(WIDTH, HEADS, dropout=0.5, dtype=torch.float64))
    torch.testing.assert_close(module(x), module(x), rtol=0, atol=0)
    module.train()
    torch.manual_seed(0)
    first = module(x)
    torch.manual_seed(0)
    torch.testing.assert_close(module(x), first, rtol=0, atol=0)
    assert not torch.allclose(module(x), first)


def test_self_attention_initialises_as_torch():
    torch.manual_seed(3)
    module = MultiheadSelfAttention(WIDTH, HEADS)
    torch.manual_seed(3)
    twin = nn.MultiheadAttention(WIDTH, HEADS)
    assert module.in_proj_bias.count_nonzero() == 0
    assert module.out_proj.bias.count_nonzero() == 0
    bound = (6 / (4 * WIDTH)) ** 0.5
    for weight in (module.in_proj_weight, twin.in_proj_weight):
        assert 0.95 * bound < weight.abs().max() <= bound


def test_replaced_projection_is_used_and_saved(x):
    module = randomized(MultiheadSelfAttention(WIDTH, HEADS, dtype=torch.float64))
    expected = module(x)
    linear = nn.Linear(WIDTH, 3 * WIDTH, dtype=torch.float64)
    linear.load_state_dict({"weight": module.in_proj_weight, "bias": module.in_proj_bias})
    module.replace_in_proj(linear)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=0)
    assert sorted(module.state_dict()) == [
        "in_proj.bias",
        "in_proj.weight",
        "out_proj.bias",
        "out_proj.weight",
    ]


@pytest.mark.parametrize("context_width", [None, 24])
def test_cross_attention_equals_torch(x, key_mask, context_width):
    module = randomized(
        MultiheadCrossAttention(WIDTH, HEADS, context_width=context_width, dtype=torch.float64)
    )
    context = torch.randn(BATCH, LENGTH, context_width or WIDTH, dtype=torch.float64)
    twin = torch_twin(module, kdim=context_width, vdim=context_width)
    expected, _ = twin(x[:, :5], context, context, key_padding_mask=~key_mask, need_weights=False)
    torch.testing.assert_close(module(x[:, :5], context, key_mask=key_mask), expected, rtol=1e-12, atol=1e-12)


def test_cross_attention_causal_aligns_to_the_end(x):
    module = randomized(MultiheadCrossAttention(WIDTH, HEADS, dtype=torch.float64))
    whole = module(x, x, is_causal=True)
    torch.testing.assert_close(module(x[:, -2:], x, is_causal=True), whole[:, -2:], rtol=1e-12, atol=1e-12)


def test_attention_pool_2d_is_row_zero_of_full_attention():
    module = randomized(AttentionPool2d(3, WIDTH, HEADS, 16, dtype=torch.float64))
    image = torch.randn(BATCH, WIDTH, 3, 3, dtype=torch.float64)
    twin = MultiheadSelfAttention(WIDTH, HEADS, dtype=torch.float64)
    twin.load_state_dict(
        {
            "in_proj_weight": torch.cat([module.q_proj.weight, module.k_proj.weight, module.v_proj.weight]),
            "in_proj_bias": torch.cat([module.q_proj.bias, module.k_proj.bias, module.v_proj.bias]),
            "out_proj.weight": torch.eye(WIDTH, dtype=torch.float64),
            "out_proj.bias": torch.zeros(WIDTH, dtype=torch.float64),
        }
    )
    tokens = image.flatten(2).transpose(1, 2)
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + module.positional_embedding
    torch.testing.assert_close(module(image), module.c_proj(twin(tokens)[:, 0]), rtol=1e-12, atol=1e-12)


def test_attention_pool_2d_refuses_another_resolution():
    with pytest.raises(ValueError, match=r"3 x 3 feature map, got \[1, 32, 4, 4\]"):
        AttentionPool2d(3, WIDTH, HEADS, 16)(torch.zeros(1, WIDTH, 4, 4))


def test_attention_pool_ignores_order_and_masked_tokens(x, key_mask):
    module = randomized(AttentionPool(16, 2, queries=3, context_width=WIDTH, dtype=torch.float64))
    out = module(x, key_mask=key_mask)
    assert out.shape == (BATCH, 3, 16)
    order = torch.randperm(LENGTH)
    torch.testing.assert_close(module(x[:, order], key_mask=key_mask[:, order]), out, rtol=1e-12, atol=1e-12)
    changed = torch.where(key_mask[..., None], x, x + 1.0)
    torch.testing.assert_close(module(changed, key_mask=key_mask), out, rtol=0, atol=0)


@pytest.mark.parametrize("owner", [MultiheadSelfAttention, MultiheadCrossAttention])
def test_bad_settings_are_named(owner):
    with pytest.raises(ValueError, match=rf"{owner.__name__}: heads .* got width 32 and heads 5"):
        owner(32, 5)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1\.0"):
        owner(32, 4, dropout=1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_float64(x, dtype):
    module = randomized(MultiheadSelfAttention(WIDTH, HEADS, dtype=torch.float64))
    half = MultiheadSelfAttention(WIDTH, HEADS, dtype=dtype).eval()
    half.load_state_dict(module.state_dict())
    exact = MultiheadSelfAttention(WIDTH, HEADS, dtype=torch.float64).eval()
    exact.load_state_dict(half.state_dict())
    out = half(x.to(dtype))
    expected = exact(x.to(dtype).double())
    assert out.dtype == dtype
    # Five roundings in a row (qkv, scores, weights, values, output), each half a unit in the last place.
    assert (out - expected).abs().max() <= 5 * 0.5 * torch.finfo(dtype).eps * expected.abs().max()


def test_compiles_to_one_graph(x):
    module = randomized(MultiheadSelfAttention(WIDTH, HEADS, is_causal=True))
    x = x.float()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
