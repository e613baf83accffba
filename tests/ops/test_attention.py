# SPDX-License-Identifier: Apache-2.0
"""vk.attention: the definition, accuracy, layouts, masks, log-sum-exp, dropout, refusals."""

from __future__ import annotations

import doctest
import importlib
import math
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from attention_problems import INF, MIXED, eager, row_by_row, with_gradients
from oracle import assert_as_accurate
from torch import Tensor

import vlmkernels as vk
from vlmkernels.ops.attention import attention_backend
from vlmkernels.ops.reference import attention as reference

CASES = pytest.mark.parametrize("case", cases.ATTENTION, ids=str)


@pytest.mark.parametrize(
    "case",
    [
        MIXED,
        cases.AttentionCase(1, 3, 2, 8),
        cases.AttentionCase(2, 4, 2, 8, Lk=2, is_causal=True),
        cases.AttentionCase(2, 2, 2, 8, Lk=4, is_causal=True),
        cases.AttentionCase(2, 3, 2, 8, key_mask=True),
        cases.AttentionCase(2, 3, 2, 8, bias="B1"),
    ],
    ids=str,
)
def test_reference_is_the_definition_row_by_row(case: cases.AttentionCase) -> None:
    tensors, options = case.tensors(torch.float64), case.options()
    out, lse = vk.attention(**tensors, **options, return_lse=True, backend="reference")
    expected_out, expected_lse = row_by_row(**tensors, **options)
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@CASES
def test_reference_and_its_gradients_are_as_accurate_as_eager(
    case: cases.AttentionCase, dtype: torch.dtype
) -> None:
    tensors, options = case.tensors(dtype), case.options()
    ours = with_gradients(vk.attention, tensors, **options, backend="reference")
    same_dtype = with_gradients(eager, tensors, **options)
    exact = with_gradients(eager, {name: x.double() for name, x in tensors.items()}, **options)
    for name in ours:
        assert ours[name].dtype == dtype
        assert_as_accurate(ours[name], same_dtype[name], exact[name], name)


@CASES
def test_the_registered_op_gives_what_the_reference_gives(case: cases.AttentionCase) -> None:
    tensors, options = case.tensors(torch.float32), case.options()
    bias, key_mask = tensors.get("bias"), options.get("key_mask")

    def op(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = bias) -> Tensor:
        arguments = (bias, key_mask, None, case.is_causal, case.D**-0.5, 0.0, "reference")
        return torch.ops.vlmkernels.attention(q, k, v, *arguments)[0]

    ours = with_gradients(op, tensors)
    expected = with_gradients(vk.attention, tensors, **options, backend="reference")
    for name in ours:
        torch.testing.assert_close(ours[name], expected[name], rtol=0, atol=0)


def test_scale_multiplies_the_scores() -> None:
    q, k, v = cases.AttentionCase(2, 7, 2, 16).tensors(torch.float64).values()
    expected = vk.attention(q * 0.3 * 4, k, v)
    torch.testing.assert_close(vk.attention(q, k, v, scale=0.3), expected)


def test_qkvpacked_is_attention_of_the_three_parts() -> None:
    qkv = torch.randn(2, 50, 3, 4, 16)
    mask = torch.rand(2, 50) < 0.7
    out, lse = vk.attention_qkvpacked(qkv, key_mask=mask, is_causal=True, return_lse=True)
    expected = vk.attention(*qkv.unbind(2), key_mask=mask, is_causal=True, return_lse=True)
    torch.testing.assert_close((out, lse), expected, rtol=0, atol=0)


def test_values_may_be_wider_than_keys() -> None:
    q, k, v = torch.randn(2, 5, 2, 8), torch.randn(2, 6, 2, 8), torch.randn(2, 6, 2, 24)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(vk.attention(q, k, v), expected)


def test_result_is_contiguous_and_owns_its_memory() -> None:
    q, k, v = torch.randn(3, 2, 9, 4, 16).unbind(0)
    out = vk.attention(q, k, v)
    assert out.is_contiguous()
    assert out.view(2, 9, 64).shape == (2, 9, 64)
    assert out.untyped_storage().data_ptr() not in {x.untyped_storage().data_ptr() for x in (q, k, v)}


def test_result_has_the_same_bits_every_time() -> None:
    tensors, options = MIXED.tensors(torch.float32), MIXED.options()
    first, second = (with_gradients(vk.attention, tensors, **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_strides_do_not_matter(layout: str) -> None:
    case = cases.AttentionCase(3, 17, 4, 24, Lk=33, Hk=2, bias="BH", key_mask=True)
    tensors = {name: cases.LAYOUTS[layout](x) for name, x in case.tensors(torch.float32).items()}
    mask = cases.LAYOUTS[layout](case.options()["key_mask"])
    dense = {name: x.contiguous() for name, x in tensors.items()}
    expected = vk.attention(**dense, key_mask=mask.contiguous())
    torch.testing.assert_close(vk.attention(**tensors, key_mask=mask), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", cases.VALUES)
def test_extreme_values(kind: str, dtype: torch.dtype) -> None:
    q, k, v = (cases.fill(kind, (2, 33, 2, 64), dtype, seed) for seed in range(3))
    out = vk.attention(q, k, v)
    exact = vk.attention(q.double(), k.double(), v.double(), backend="reference")
    assert_as_accurate(out, eager(q, k, v), exact)


def test_a_nan_reaches_what_depends_on_it_and_nothing_else() -> None:
    q, k, v = torch.randn(3, 2, 5, 2, 8).unbind(0)
    q[0, 3, 1, 0] = math.nan
    out, lse = vk.attention(q, k, v, return_lse=True)
    assert out[0, 3, 1].isnan().all()
    assert lse[0, 1, 3].isnan()
    assert out.isnan().sum() == 8
    assert lse.isnan().sum() == 1


@pytest.mark.parametrize(("B", "Lq", "Lk"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (0, 0, 0)])
def test_empty_sizes_give_zero_results_and_gradients(B: int, Lq: int, Lk: int) -> None:
    q = torch.randn(B, Lq, 2, 8, requires_grad=True)
    k, v = (torch.randn(B, Lk, 2, 8, requires_grad=True) for _ in range(2))
    out, lse = vk.attention(q, k, v, return_lse=True)
    out.sum().backward()
    assert out.shape == (B, Lq, 2, 8)
    assert lse.shape == (B, 2, Lq)
    assert (lse == -INF).all()
    for x in (out, q.grad, k.grad, v.grad):
        assert (x == 0).all()


@pytest.mark.parametrize(("Lq", "Lk"), [(4, 4), (2, 5), (5, 2)])
def test_causal_is_aligned_to_the_end(Lq: int, Lk: int) -> None:
    q, k, v = torch.zeros(1, Lq, 1, Lk), torch.zeros(1, Lk, 1, Lk), torch.eye(Lk)[None, :, None]
    seen = vk.attention(q, k, v, is_causal=True)[0, :, 0] > 0
    assert torch.equal(seen, torch.ones(Lq, Lk, dtype=torch.bool).tril(Lk - Lq))


@pytest.mark.parametrize("hidden_by", ["key_mask", "bias", "causal"])
def test_a_query_without_keys_gives_zero_and_has_zero_gradient(hidden_by: str) -> None:
    q, k, v = torch.randn(3, 2, 4, 2, 8).unbind(0)
    options: dict[str, Any] = {}
    tensors = {"q": q, "k": k, "v": v}
    if hidden_by == "key_mask":
        options["key_mask"] = torch.tensor([[True] * 4, [False] * 4])
        hidden = (slice(1, 2), slice(None))
    elif hidden_by == "bias":
        tensors["bias"] = torch.zeros(1, 1, 4, 4)
        tensors["bias"][..., 1, :] = -INF
        hidden = (slice(None), slice(1, 2))
    else:
        tensors |= {"k": k[:, :2], "v": v[:, :2]}
        options["is_causal"] = True
        hidden = (slice(None), slice(0, 2))
    results = with_gradients(vk.attention, tensors, **options)
    lse = vk.attention(**tensors, **options, return_lse=True)[1].transpose(1, 2)
    assert (results["out"][hidden] == 0).all()
    assert (results["q"][hidden] == 0).all()
    assert (lse[hidden] == -INF).all()
    assert all(x.isfinite().all() for x in results.values())
    if hidden_by == "key_mask":
        assert (results["k"][hidden] == 0).all()
        assert (results["v"][hidden] == 0).all()
    if hidden_by == "bias":
        assert (results["bias"][..., 1, :] == 0).all()


def test_key_mask_is_the_same_as_leaving_the_keys_out() -> None:
    q, k, v = torch.randn(3, 1, 9, 2, 16).unbind(0)
    mask = torch.arange(9)[None] % 2 == 0
    torch.testing.assert_close(vk.attention(q, k, v, key_mask=mask), vk.attention(q, k[:, ::2], v[:, ::2]))


@pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_bias_gradient_has_the_shape_of_the_bias(lead: tuple[int, int]) -> None:
    q, k, v = torch.randn(3, 2, 5, 3, 8, dtype=torch.float64).unbind(0)
    bias = torch.randn(*lead, 5, 5, dtype=torch.float64, requires_grad=True)
    full = bias.detach().expand(2, 3, 5, 5).clone().requires_grad_()
    vk.attention(q, k, v, bias=bias).square().sum().backward()
    vk.attention(q, k, v, bias=full).square().sum().backward()
    assert bias.grad.shape == bias.shape
    torch.testing.assert_close(bias.grad, full.grad.sum_to_size(bias.shape))


def test_float32_bias_serves_half_inputs_and_keeps_its_dtype() -> None:
    q, k, v = torch.randn(3, 2, 5, 3, 8, dtype=torch.bfloat16).unbind(0)
    bias = torch.randn(1, 3, 5, 5, requires_grad=True)
    out = vk.attention(q, k, v, bias=bias)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert bias.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_lse_dtype_and_value(dtype: torch.dtype) -> None:
    q, k, v = cases.AttentionCase(2, 7, 4, 16, Lk=9, Hk=2).tensors(dtype).values()
    lse = vk.attention(q, k, v, return_lse=True)[1]
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double().repeat_interleave(2, 2)) / 4
    # float32 sums of 16 products of numbers around 1
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=0, atol=2e-6)


def test_lse_combines_two_halves_of_the_keys() -> None:
    q, k, v = torch.randn(3, 2, 8, 2, 16, dtype=torch.float64).unbind(0)
    (out1, lse1), (out2, lse2) = (
        vk.attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(3), slice(3, 8))
    )
    lse = torch.logaddexp(lse1, lse2)
    weights = ((part - lse).exp().transpose(1, 2)[..., None] for part in (lse1, lse2))
    combined = sum(w * o for w, o in zip(weights, (out1, out2), strict=True))
    torch.testing.assert_close(combined, vk.attention(q, k, v))


def test_philox_known_answers() -> None:
    """The first two vectors that the authors of Random123 publish for philox4x32-10."""
    zero, ones = torch.zeros(1, dtype=torch.int64), torch.full((1,), 0xFFFFFFFF)
    words = torch.cat(reference.philox(zero, zero, zero, zero, zero)).tolist()
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    words = torch.cat(reference.philox(torch.tensor([-1]), ones, ones, ones, ones)).tolist()
    assert words == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_dropout_mask_is_a_function_of_seed_and_place() -> None:
    seed = torch.tensor([123456789012345])
    mask = reference.dropout_mask(seed, 3, 2, 7, 9, 0.4)
    assert torch.equal(mask[1:, :, :5, :6], reference.dropout_mask(seed, 2, 2, 5, 6, 0.4, first_batch=1))
    assert not torch.equal(mask, reference.dropout_mask(seed + 1, 3, 2, 7, 9, 0.4))


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_dropout_keeps_the_right_share_of_weights(dropout_p: float) -> None:
    mask = reference.dropout_mask(torch.tensor([123456789012345]), 4, 4, 128, 128, dropout_p)
    deviation = math.sqrt(dropout_p * (1 - dropout_p) / mask.numel())
    assert abs((~mask).double().mean().item() - dropout_p) < 4 * deviation
    # no structure along any dimension: means over the others stay within five deviations of a mean of that many
    for dim in range(4):
        means = (~mask).double().mean([d for d in range(4) if d != dim])
        count = mask.numel() // mask.shape[dim]
        assert (means - dropout_p).abs().max() < 5 * math.sqrt(dropout_p * (1 - dropout_p) / count)


def test_dropout_drops_weights_and_rescales_the_rest() -> None:
    q, k = torch.randn(2, 6, 2, 8), torch.randn(2, 6, 2, 8)
    v = torch.eye(6)[None, :, None].expand(2, 6, 2, 6)  # the result is the weights
    weights = vk.attention(q, k, v)
    torch.manual_seed(3)
    dropped, lse = vk.attention(q, k, v, dropout_p=0.25, return_lse=True)
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,))
    keep = reference.dropout_mask(seed, 2, 2, 6, 6, 0.25).transpose(1, 2)
    torch.testing.assert_close(dropped, weights * keep / 0.75)
    torch.testing.assert_close(lse, vk.attention(q, k, v, return_lse=True)[1])
    assert 0 < (~keep).sum() < keep.numel()


@pytest.mark.parametrize("path", ["reference", "op"])
def test_dropout_backward_sees_the_same_mask(path: str) -> None:
    q, k, v = (torch.randn(1, 4, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def function(*tensors: Tensor) -> Tensor:
        torch.manual_seed(11)
        if path == "reference":
            return vk.attention(*tensors, dropout_p=0.4, backend="reference")
        seed = torch.tensor([11])
        return torch.ops.vlmkernels.attention(*tensors, None, None, seed, False, 0.3, 0.4, "reference")[0]

    assert torch.autograd.gradcheck(function, (q, k, v))


def test_dropout_follows_manual_seed_and_moves_on_with_every_call() -> None:
    q, k, v = torch.randn(3, 2, 9, 2, 8).unbind(0)
    torch.manual_seed(0)
    first, second = (vk.attention(q, k, v, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(0)
    again = vk.attention(q, k, v, dropout_p=0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_dropout_of_everything_gives_zero() -> None:
    q, k, v = (torch.randn(2, 3, 2, 8, requires_grad=True) for _ in range(3))
    out = vk.attention(q, k, v, dropout_p=1.0)
    out.sum().backward()
    assert (out == 0).all()
    assert all((x.grad == 0).all() for x in (q, k, v))


def test_no_dropout_leaves_the_generator_alone() -> None:
    q, k, v = torch.randn(3, 1, 2, 1, 8).unbind(0)
    state = torch.get_rng_state()
    vk.attention(q, k, v)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
def test_dropout_mask_is_the_same_on_every_device() -> None:
    seed = torch.tensor([2**62 + 12345])
    on_gpu = reference.dropout_mask(seed.cuda(), 2, 3, 50, 77, 0.2)
    assert torch.equal(on_gpu.cpu(), reference.dropout_mask(seed, 2, 3, 50, 77, 0.2))


@pytest.mark.gpu
@CASES
def test_gpu_gives_what_the_cpu_gives(case: cases.AttentionCase) -> None:
    tensors, options = case.tensors(torch.float64), case.options()
    on_gpu = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in options.items()}
    ours = vk.attention(**{name: x.cuda() for name, x in tensors.items()}, **on_gpu, backend="reference")
    torch.testing.assert_close(ours.cpu(), vk.attention(**tensors, **options, backend="reference"))


Q, K = torch.zeros(2, 77, 16, 64), torch.zeros(2, 77, 6, 64)
BAD_CALLS: list[tuple[Any, type[Exception], str]] = [
    (
        lambda: vk.attention(Q, K, K),
        ValueError,
        r"k has 6 heads, which does not divide q's 16 \(q \[2, 77, 16, 64\], k \[2, 77, 6, 64\]\)",
    ),
    (lambda: vk.attention([1], Q, Q), TypeError, "q must be a tensor, got list"),
    (lambda: vk.attention(Q.int(), Q, Q), TypeError, r"q must be floating \(.*\), got torch.int32"),
    (lambda: vk.attention(Q[0], Q, Q), ValueError, r"q must be \[B, L, H, D\], got \[77, 16, 64\]"),
    (lambda: vk.attention(Q.half(), Q, Q), TypeError, r"q, k and v must have one dtype .*q torch.float16"),
    (lambda: vk.attention(Q.to("meta"), Q, Q), ValueError, "must be on one device, got q meta, k cpu, v cpu"),
    (lambda: vk.attention(Q, Q[:1], Q[:1]), ValueError, "must have one batch size"),
    (lambda: vk.attention(Q, Q, Q[:, :5]), ValueError, "k and v must have one length"),
    (lambda: vk.attention(Q, Q, K), ValueError, "k and v must have the same number of heads"),
    (lambda: vk.attention(Q, Q[..., :8], Q), ValueError, "q and k must have one head dim"),
    (lambda: vk.attention(*[Q[..., :0]] * 3), ValueError, "the head dim must be at least 1"),
    (
        lambda: vk.attention(Q, Q, Q, bias=Q[0, :, 0].bool()),
        TypeError,
        "bias must be floating, got torch.bool",
    ),
    (
        lambda: vk.attention(Q, Q, Q, bias=Q.half()),
        TypeError,
        "bias must be torch.float32, got torch.float16",
    ),
    (
        lambda: vk.attention(Q, Q, Q, bias=torch.zeros(2, 3, 77, 77)),
        ValueError,
        r"bias must be \[B\|1, H\|1, Lq, Lk\] of \[2, 16, 77, 77\], got \[2, 3, 77, 77\]",
    ),
    (lambda: vk.attention(Q, Q, Q, bias=Q[0]), ValueError, r"bias must be \[B\|1, H\|1, Lq, Lk\], got"),
    (
        lambda: vk.attention(Q, Q, Q, key_mask=torch.ones(2, 77)),
        TypeError,
        "key_mask must be bool, got torch.float32",
    ),
    (
        lambda: vk.attention(Q, Q, Q, key_mask=torch.ones(2, 7, dtype=torch.bool)),
        ValueError,
        r"key_mask must be \[B, Lk\] = \[2, 77\], got \[2, 7\]",
    ),
    (lambda: vk.attention(Q, Q, Q, is_causal=1), TypeError, "is_causal must be a bool, got 1"),
    (lambda: vk.attention(Q, Q, Q, dropout_p=1.5), ValueError, r"dropout_p must be in \[0, 1\], got 1.5"),
    (lambda: vk.attention(Q, Q, Q, scale="big"), TypeError, "scale must be a number, got str"),
    (
        lambda: vk.attention(Q, Q, Q, backend="fast"),
        ValueError,
        "backend must be None or one of .*, got 'fast'",
    ),
    (
        lambda: vk.attention(Q, Q, Q, backend="cuda"),
        NotImplementedError,
        "backend 'cuda' cannot serve this call: ",
    ),
    (lambda: vk.attention_qkvpacked(Q), ValueError, r"qkv must be \[B, L, 3, H, D\], got"),
    (lambda: vk.attention_qkvpacked(Q[:, :, None]), ValueError, r"qkv must be .*, got \[2, 77, 1, 16, 64\]"),
    (lambda: vk.attention_varlen(Q, Q, Q, Q, Q), ValueError, r"q must be \[T, H, D\], got"),
    (
        lambda: vk.attention_varlen(Q[0], Q[0], Q[0], Q, Q),
        TypeError,
        "cu_seqlens_q must be int32 or int64, got torch.float32",
    ),
    (
        lambda: vk.attention_varlen(Q[0], Q[0], Q[0], torch.tensor([0, 77]), torch.tensor([0, 7, 77])),
        ValueError,
        r"must count the same sequences \(cu_seqlens_q \[2\], cu_seqlens_k \[3\]\)",
    ),
    (
        lambda: vk.scaled_dot_product_attention(Q, Q, Q, Q[0, 0, 0] > 0, is_causal=True),
        ValueError,
        "attn_mask and is_causal exclude each other",
    ),
    (
        lambda: vk.scaled_dot_product_attention(Q, Q, Q, torch.ones(3, 16)),
        ValueError,
        r"attn_mask must broadcast to \[2, 77, 16, 16\], got \[3, 16\]",
    ),
    (
        lambda: vk.scaled_dot_product_attention(Q, Q[0], Q),
        ValueError,
        "must have the same number of dimensions",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS, ids=[m[:40] for _, _, m in BAD_CALLS])
def test_bad_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^vk\.(attention\w*|scaled_dot_product_attention): .*{message}"):
        call()


def test_fake_refuses_what_the_public_function_refuses() -> None:
    with torch._subclasses.FakeTensorMode():
        q, k = torch.empty(2, 7, 16, 8), torch.empty(2, 7, 6, 8)
    with pytest.raises(ValueError, match="k has 6 heads, which does not divide"):
        torch.ops.vlmkernels.attention(q, k, k, None, None, None, False, 1.0, 0.0, "reference")


def test_examples_in_the_docstrings() -> None:
    module = importlib.import_module("vlmkernels.ops.attention")
    results = doctest.testmod(module, extraglobs={"torch": torch, "vk": vk})
    assert results.attempted >= 8
    assert results.failed == 0


def test_attention_backend_names_what_would_serve_a_call() -> None:
    q = torch.randn(1, 5, 2, 16)
    served = "cpu" if vk.backends()["cpu"].available else "reference"
    assert attention_backend(q, q, q) == served
    assert attention_backend(q.double(), q.double(), q.double()) == "reference"
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_backend(q, q, q, is_causal=True) == served
