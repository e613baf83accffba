# SPDX-License-Identifier: Apache-2.0
"""The context that routes torch's attention functions: what it routes, what it leaves to torch."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlmkernels.integrations import _attend
from vlmkernels.integrations.torch import sdpa
from vlmkernels.ops import dispatch

CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "bool mask": {"attn_mask": torch.arange(7)[None] < 5},
    "bool pattern": {"attn_mask": torch.ones(5, 7, dtype=torch.bool).tril(2)},
    "float mask": {"attn_mask": torch.linspace(-1, 1, 35).view(5, 7)},
}


@pytest.fixture
def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 5, 16), torch.randn(2, 3, 7, 16), torch.randn(2, 3, 7, 16)


@pytest.mark.parametrize("case", CASES)
def test_calls_are_routed(served, qkv, case):
    theirs = F.scaled_dot_product_attention(*qkv, **CASES[case])
    mask = CASES[case].get("attn_mask")
    wide = {"attn_mask": mask.double()} if mask is not None and mask.is_floating_point() else {}
    exact = F.scaled_dot_product_attention(*(x.double() for x in qkv), **{**CASES[case], **wide})
    with sdpa():
        ours = F.scaled_dot_product_attention(*qkv, **CASES[case])
    assert len(served) == 1
    assert_as_accurate(ours, theirs, exact)


def test_a_mask_over_keys_alone_is_no_bias(served, qkv):
    with sdpa():
        F.scaled_dot_product_attention(*qkv, attn_mask=torch.ones(2, 1, 1, 7, dtype=torch.bool))
        F.scaled_dot_product_attention(*qkv, attn_mask=torch.ones(2, 1, 5, 7, dtype=torch.bool))
    assert [call["bias"] is None for call in served] == [True, False]


def test_grouped_heads_are_routed(served):
    q, k = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 5, 8)
    theirs = F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    with sdpa():
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, k, enable_gqa=True), theirs)
    assert served


def test_gradients_are_torchs(served, qkv):
    def gradients(dtype, routed):
        leaves = [x.to(dtype).requires_grad_() for x in qkv]
        if routed:
            with sdpa():
                out = F.scaled_dot_product_attention(*leaves, is_causal=True)
        else:
            out = F.scaled_dot_product_attention(*leaves, is_causal=True)
        return torch.autograd.grad(out.square().sum(), leaves)

    triples = zip(gradients(torch.float32, True), gradients(torch.float32, False), strict=True)
    for (ours, theirs), exact in zip(triples, gradients(torch.float64, False), strict=True):
        assert_as_accurate(ours, theirs, exact)


def test_it_is_a_decorator(served, qkv):
    @sdpa()
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    theirs = F.scaled_dot_product_attention(*qkv)
    assert not served
    torch.testing.assert_close(attend(*qkv), theirs)
    attend(*qkv)
    assert len(served) == 2


def test_contexts_nest_and_end(served, qkv):
    routing = sdpa()
    with routing, routing:
        F.scaled_dot_product_attention(*qkv)
    with pytest.raises(RuntimeError, match="mine"), sdpa():
        raise RuntimeError("mine")
    F.scaled_dot_product_attention(*qkv)
    assert len(served) == 1


def test_other_threads_are_left_alone(served, qkv):
    with sdpa():
        thread = threading.Thread(target=lambda: F.scaled_dot_product_attention(*qkv))
        thread.start()
        thread.join()
    assert not served


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_torchs_multi_head_attention_is_routed_where_it_has_no_weights(served, batch_first, need_weights):
    module = nn.MultiheadAttention(32, 4, batch_first=batch_first)
    x = torch.randn(6, 6, 32)
    theirs = module(x, x, x, need_weights=need_weights)
    with sdpa():
        ours = module(x, x, x, need_weights=need_weights)
    assert len(served) == (0 if need_weights else 1)
    torch.testing.assert_close(ours, theirs)


def test_a_decorated_function_is_routed_again_when_it_is_recomputed(served, qkv):
    leaves = [x.requires_grad_() for x in qkv]
    out = checkpoint(sdpa()(F.scaled_dot_product_attention), *leaves, use_reentrant=False)
    out.sum().backward()
    assert len(served) == 2
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*leaves).sum(), leaves)
    torch.testing.assert_close(tuple(x.grad for x in leaves), expected)


def test_it_compiles_into_one_graph(qkv):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(q, k, v):
        with sdpa():
            return F.scaled_dot_product_attention(q * 2, k, v)

    torch.testing.assert_close(attend(*qkv), F.scaled_dot_product_attention(qkv[0] * 2, *qkv[1:]))


def unservable() -> dict[str, tuple]:
    q = torch.randn(2, 3, 5, 16)
    rows = [torch.randn(4, 3, 8), torch.randn(6, 3, 8)]
    nested = torch.nested.as_nested_tensor(rows, layout=torch.jagged).transpose(1, 2)
    return {
        "broadcast batch": (q[:1], q, q),
        "nested": (nested, nested, nested),
        "integer": (q.int(), q.int(), q.int()),
        "mixed": (q, q.double(), q.double()),
        "one dimension": (q[0, 0, 0], q[0, 0, 0], q[0, 0, 0]),
        "other width": (q, q[..., :8], q),
        "mask and causal": (q, q, q, torch.ones(5, 5, dtype=torch.bool), 0.0, True),
        "mask of one dimension": (q, q, q, torch.ones(5, dtype=torch.bool)),
        "integer mask": (q, q, q, torch.ones(5, 5, dtype=torch.int32)),
        "heads without enable_gqa": (q, q[:, :1], q[:, :1]),
    }


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch's own use of them
@pytest.mark.parametrize("case", unservable())
def test_what_we_do_not_serve_is_torchs_with_its_errors(served, case):
    arguments = unservable()[case]

    def outcome():
        try:
            return F.scaled_dot_product_attention(*arguments)
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
            return type(error), str(error)

    torch.manual_seed(0)
    theirs = outcome()
    with sdpa():
        ours = outcome()
    assert not served
    if isinstance(theirs, tuple):
        assert ours == theirs
    else:
        pairs = zip(ours.unbind(), theirs.unbind(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_torch_runs_where_only_the_reference_would(monkeypatch, qkv):
    """float64 has no kernel anywhere: the drop-in must not write the scores."""
    monkeypatch.setattr(_attend.ops, "attention", lambda *args, **options: pytest.fail("the reference ran"))
    wide = [x.double() for x in qkv]
    with sdpa():
        ours = F.scaled_dot_product_attention(*wide, is_causal=True)
    assert torch.equal(ours, F.scaled_dot_product_attention(*wide, is_causal=True))


def test_kernels_are_asked_where_there_are_some(qkv):
    q, k, v = (x.transpose(1, 2) for x in qkv)
    call = _attend.ops._call(q, k, v, None, None, False, 0.0, False, 0)
    names = dispatch.registered_backends("attention")
    able = any(not dispatch.reasons_against("attention", name, call) for name in names if name != "reference")
    assert _attend.kernel_serves(q, k, v) == able


@pytest.mark.parametrize("lengths", [(5, 5), (5, 7), (7, 5)])
@pytest.mark.parametrize("masks", ["none", "keys", "bias", "both"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_both_ways_of_attending_agree(monkeypatch, lengths, masks, is_causal):
    """Torch's function under our conventions: causality that ends with the last key, and masks that combine."""
    q, k, v = (
        torch.randn(2, lengths[0], 4, 8),
        torch.randn(2, lengths[1], 2, 8),
        torch.randn(2, lengths[1], 2, 8),
    )
    options = {"is_causal": is_causal, "scale": 0.4}
    if masks in ("keys", "both"):
        options["key_mask"] = torch.tensor([[True] * lengths[1], [False, True] + [True] * (lengths[1] - 2)])
    if masks in ("bias", "both"):
        options["bias"] = torch.randn(1, 4, *lengths)
    results = []
    for serves in (True, False):
        monkeypatch.setattr(_attend, "kernel_serves", lambda *args, serves=serves, **options: serves)
        results.append(_attend.attend(q, k, v, **options))
    # Two float32 programs; differences are roundings of numbers near one.
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=2e-6)


def test_the_functional_form_with_separate_weights_is_routed(served):
    """One query over all tokens, as OpenAI's pool of convolutional features calls it."""
    x, weights = torch.randn(9, 2, 32), torch.randn(4, 32, 32) / 6
    bias, out_bias = torch.randn(96), torch.randn(32)

    def pool(dtype):
        q, k, v, out = weights.to(dtype)
        options = {"use_separate_proj_weight": True, "need_weights": False, "training": False}
        options |= {"q_proj_weight": q, "k_proj_weight": k, "v_proj_weight": v}
        tokens = x.to(dtype)
        appended = (None, None, False)
        return F.multi_head_attention_forward(
            tokens[:1],
            tokens,
            tokens,
            32,
            4,
            None,
            bias.to(dtype),
            *appended,
            0.1,
            out,
            out_bias.to(dtype),
            **options,
        )[0]

    with sdpa():
        ours = pool(torch.float32)
    assert len(served) == 1 and served[0]["dropout_p"] == 0.0
    assert_as_accurate(ours, pool(torch.float32), pool(torch.float64))
