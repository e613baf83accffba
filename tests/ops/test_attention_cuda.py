# SPDX-License-Identifier: Apache-2.0
"""What holds for the CUDA kernels of attention: on the emulator everywhere, on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import cases
import emulated_cuda
import pytest
import torch
from attention_problems import INF, eager, with_gradients
from oracle import assert_as_accurate
from torch import Tensor

import vlmkernels as vk
from vlmkernels import _native
from vlmkernels.ops import _attention_cuda
from vlmkernels.ops.reference import attention as reference

each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
#: Shared memory of one block on an A100, an H100, and the smaller GPUs of the A100's generation.
A100, H100, SMALL = 163 * 1024, 227 * 1024, 99 * 1024

#: Beside the cases of every backend: keys that stream, several blocks of queries, heads that share keys.
LONG = (
    cases.AttentionCase(1, 300, 1, 64, Lk=333, key_mask=True),
    cases.AttentionCase(1, 330, 2, 72, Hk=1, is_causal=True),
    cases.AttentionCase(2, 40, 1, 128, Lk=310, is_causal=True),
    cases.AttentionCase(1, 310, 1, 24, Lk=70, bias="11"),
    cases.AttentionCase(1, 257, 1, 80),
)
#: Kernels differ by width class: five, and every one is in here.
PROBLEMS = (*cases.ATTENTION, *LONG)


@pytest.fixture(params=emulated_cuda.DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return emulated_cuda.use(request.param, monkeypatch)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return emulated_cuda.use("emulated", monkeypatch)


def on_cuda(**arguments: Any) -> Tensor:
    return vk.attention(**arguments, backend="cuda")


def moved(values: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in values.items()}


def refused(case: cases.AttentionCase) -> bool:
    return case.D > _attention_cuda.MAX_HEAD_DIM


def problem(
    case: cases.AttentionCase, dtype: torch.dtype, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Differentiable tensors, and the other arguments: this backend has no gradient of the bias."""
    tensors = case.tensors(dtype, seed)
    options = case.options()
    if "bias" in tensors:
        options["bias"] = tensors.pop("bias")
    return tensors, options


# Accuracy.


@each_dtype
@pytest.mark.parametrize("case", [c for c in PROBLEMS if not refused(c)], ids=str)
def test_results_and_gradients_are_as_accurate_as_eager(
    case: cases.AttentionCase, dtype: torch.dtype, device: torch.device
) -> None:
    draws = [problem(case, dtype, seed) for seed in ((0, 10) if case.Lq * case.keys < 5000 else (0,))]
    ours = [
        {name: x.cpu() for name, x in with_gradients(on_cuda, moved(t, device), **moved(o, device)).items()}
        for t, o in draws
    ]
    theirs = [with_gradients(eager, t, **o) for t, o in draws]
    exact = [
        with_gradients(
            eager,
            {name: x.double() for name, x in t.items()},
            **{name: x.double() if name == "bias" else x for name, x in o.items()},
        )
        for t, o in draws
    ]
    for name in ours[0]:
        assert ours[0][name].dtype == dtype
        # With one key the gradient is the difference of two equal sums, taken in different orders: around 20, float32.
        assert_as_accurate(
            [r[name] for r in ours], [t[name] for t in theirs], [e[name] for e in exact], name, at_least=1e-5
        )


@pytest.mark.parametrize("most_shared", [A100, SMALL])
@pytest.mark.parametrize(
    "case",
    [
        cases.AttentionCase(1, 257, 1, 80, key_mask=True),
        cases.AttentionCase(1, 150, 2, 128, is_causal=True),
        cases.AttentionCase(1, 290, 1, 96),
    ],
    ids=str,
)
def test_devices_with_less_shared_memory(
    case: cases.AttentionCase, most_shared: int, emulated: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, options = problem(case, torch.bfloat16)
    before = with_gradients(on_cuda, tensors, **options)
    controls = emulated_cuda.controls()
    controls.emulator_set_most_shared(most_shared)
    try:
        ours = with_gradients(on_cuda, tensors, **options)
    finally:
        controls.emulator_set_most_shared(H100)
    for name in ours:
        # the same sums in another order, of values that were rounded to 8 bits
        torch.testing.assert_close(ours[name], before[name], rtol=2e-2, atol=2e-2)


@each_dtype
@pytest.mark.parametrize("grads", [("q",), ("k", "v"), ("v",)], ids=str)
def test_only_the_wanted_gradients(grads: tuple[str, ...], dtype: torch.dtype, device: torch.device) -> None:
    tensors, options = problem(cases.AttentionCase(2, 33, 2, 40, is_causal=True), dtype)
    tensors = moved(tensors, device)
    expected = with_gradients(on_cuda, tensors, **options)
    rest = {name: x for name, x in tensors.items() if name not in grads}
    ours = with_gradients(on_cuda, {name: tensors[name] for name in grads}, **rest, **options)
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


@each_dtype
@pytest.mark.parametrize("L", [50, 300])
def test_lse_and_its_gradients_are_those_of_the_reference(
    L: int, dtype: torch.dtype, device: torch.device
) -> None:
    case = cases.AttentionCase(2, L, 2, 64, key_mask=True)
    tensors, options = problem(case, dtype)
    upstream = torch.randn(2, 2, L, generator=torch.Generator().manual_seed(5))

    def results(backend: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        leaves = {n: x.to(device, dtype).requires_grad_() for n, x in tensors.items()}
        out, lse = vk.attention(**leaves, **moved(options, device), return_lse=True, backend=backend)
        total = (lse.masked_fill(lse == -INF, 0.0) * upstream.to(lse)).sum() + out.sum() * 0.5
        return lse.detach().cpu(), [g.cpu() for g in torch.autograd.grad(total, list(leaves.values()))]

    lse, grads = results("cuda", device, dtype)
    exact_lse, exact_grads = results("reference", torch.device("cpu"), torch.float64)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=4e-6)
    for ours, exact in zip(grads, exact_grads, strict=True):
        # gradients are rounded to 8 bits (11 in float16), and so are the weights they are sums of
        torch.testing.assert_close(ours.double(), exact, rtol=2e-2, atol=4e-2)


@each_dtype
@pytest.mark.parametrize("length", [50, 77])
def test_qkvpacked_reads_and_writes_in_place(length: int, dtype: torch.dtype, device: torch.device) -> None:
    qkv = cases.fill("normal", (2, length, 3, 4, 16), dtype).to(device).requires_grad_()
    mask = (torch.rand(2, length) < 0.7).to(device)
    upstream = cases.fill("normal", (2, length, 4, 16), dtype, seed=1).to(device)
    out = vk.attention_qkvpacked(qkv, key_mask=mask, is_causal=True, backend="cuda")
    (grad,) = torch.autograd.grad(out, qkv, upstream)
    parts = [x.detach().requires_grad_() for x in qkv.unbind(2)]
    expected = vk.attention(*parts, key_mask=mask, is_causal=True, backend="cuda")
    assert torch.equal(out, expected)
    assert torch.equal(grad, torch.stack(torch.autograd.grad(expected, parts, upstream), 2))
    assert all(_attention_cuda._in_vectors(x).data_ptr() == x.data_ptr() for x in parts)  # no copy


@pytest.mark.parametrize("layout", sorted(cases.LAYOUTS))
def test_layouts(layout: str, device: torch.device) -> None:
    tensors, options = problem(cases.AttentionCase(3, 33, 2, 24, key_mask=True), torch.bfloat16)
    tensors, options = moved(tensors, device), moved(options, device)
    other = {name: cases.LAYOUTS[layout](x) for name, x in tensors.items()}
    mask = cases.LAYOUTS[layout](options["key_mask"])
    ours = on_cuda(**other, key_mask=mask)
    assert torch.equal(
        ours, on_cuda(**{n: x.contiguous() for n, x in other.items()}, key_mask=mask.contiguous())
    )


# Masks and special values.


@each_dtype
@pytest.mark.parametrize("L", [40, 300])
@pytest.mark.parametrize("values", [float("nan"), INF])
def test_hidden_keys_are_not_read(values: float, L: int, dtype: torch.dtype, device: torch.device) -> None:
    tensors = {n: cases.fill("normal", (2, L, 2, 16), dtype, i).to(device) for i, n in enumerate("qkv")}
    mask = (torch.rand(2, L) < 0.5).to(device)
    expected = with_gradients(on_cuda, tensors, key_mask=mask)
    tensors["k"][~mask], tensors["v"][~mask] = values, values
    ours = with_gradients(on_cuda, tensors, key_mask=mask)
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
def test_nan_and_infinity_spread_as_in_the_reference(value: float, which: str, device: torch.device) -> None:
    tensors = {n: cases.fill("normal", (1, 9, 2, 16), torch.bfloat16, i) for i, n in enumerate("qkv")}
    tensors[which][0, 3, 1, 2] = value
    out, lse = vk.attention(**moved(tensors, device), return_lse=True, backend="cuda")
    expected, expected_lse = vk.attention(**tensors, return_lse=True, backend="reference")
    assert torch.equal(out.cpu().isnan(), expected.isnan())
    assert torch.equal(lse.cpu().isnan(), expected_lse.isnan())


@pytest.mark.parametrize("L", [30, 300])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1.0])
def test_dropout_is_the_references_mask_forward_and_backward(
    dropout_p: float, L: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, options = problem(cases.AttentionCase(2, L, 2, 16, is_causal=True), torch.float16)
    seed = torch.tensor([0x1234_5678_9ABC])
    monkeypatch.setattr(torch, "randint", lambda *args, device, **rest: seed.to(device))
    options["dropout_p"] = dropout_p
    ours = with_gradients(on_cuda, moved(tensors, device), **options)
    exact = with_gradients(
        lambda **arguments: vk.attention(**arguments, backend="reference"),
        {name: x.double() for name, x in tensors.items()},
        **options,
    )
    for name in ours:
        # weights rounded to 11 bits and multiplied by up to 2; one wrong weight would be off by 0.1 and more
        torch.testing.assert_close(ours[name].cpu().double(), exact[name], rtol=1e-2, atol=1e-2)


def test_dropout_mask_weight_by_weight(device: torch.device) -> None:
    # every score equal, values the identity: the result is the mask
    q, k = torch.zeros(2, 21, 2, 64), torch.zeros(2, 64, 2, 64)
    v = torch.eye(64)[None, :, None].expand(2, 64, 2, 64)
    torch.manual_seed(3)
    weights = on_cuda(
        **moved({n: x.half() for n, x in (("q", q), ("k", k), ("v", v))}, device), dropout_p=0.25
    )
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,), device=device).cpu()
    keep = reference.dropout_mask(seed, 2, 2, 21, 64, 0.25).transpose(1, 2)
    assert torch.equal(weights.cpu() > 0, keep)


# Bits, races, bounds.


@pytest.mark.parametrize("L", [77, 300])
def test_runs_agree_bit_for_bit(L: int, device: torch.device) -> None:
    tensors, options = problem(cases.AttentionCase(2, L, 2, 64, is_causal=True), torch.bfloat16)
    tensors = moved(tensors, device)
    first, second = (with_gradients(on_cuda, tensors, **options) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", [PROBLEMS[-4], cases.AttentionCase(2, 77, 1, 64, key_mask=True)], ids=str)
def test_the_order_of_threads_does_not_matter(case: cases.AttentionCase, emulated: torch.device) -> None:
    tensors, options = problem(case, torch.bfloat16)
    forwards = with_gradients(on_cuda, tensors, **options)
    controls = emulated_cuda.controls()
    controls.emulator_run_backwards(1)
    try:
        backwards = with_gradients(on_cuda, tensors, **options)
    finally:
        controls.emulator_run_backwards(0)
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)


@pytest.mark.parametrize("D", [8, 64, 72, 88, 128])
def test_matrix_loads_have_no_bank_conflicts(D: int, emulated: torch.device) -> None:
    controls = emulated_cuda.controls()
    loads, conflicts = controls.emulator_matrix_loads(), controls.emulator_matrix_conflicts()
    with_gradients(on_cuda, problem(cases.AttentionCase(1, 50, 1, D), torch.bfloat16)[0])
    assert controls.emulator_matrix_loads() > loads
    assert controls.emulator_matrix_conflicts() == conflicts


@pytest.mark.parametrize(
    "case", [c for c in PROBLEMS if not refused(c) and (c.Lq * c.keys < 9000 or c in LONG)], ids=str
)
def test_nothing_outside_the_tensors_is_touched(case: cases.AttentionCase, emulated: torch.device) -> None:
    tensors, options = problem(case, torch.bfloat16)
    guarded = {name: emulated_cuda.guarded_like(x) for name, x in tensors.items()}
    extra = {
        name: emulated_cuda.guarded_like(x) if isinstance(x, Tensor) else x for name, x in options.items()
    }
    q, k, v = (guarded[name] for name in "qkv")
    rest = (extra.get("bias"), extra.get("key_mask"), None, case.is_causal, case.D**-0.5, 0.0)
    out = emulated_cuda.guarded_like(torch.zeros_like(q))
    lse = emulated_cuda.guarded_like(torch.zeros(case.B, case.H, case.Lq))
    grads = [emulated_cuda.guarded_like(torch.zeros_like(x)) for x in (q, k, v)]
    _attention_cuda.forward(q, k, v, out, lse, *rest)
    _attention_cuda.backward(emulated_cuda.guarded_like(out), lse, q, k, v, grads, out, lse, *rest)
    expected = on_cuda(**tensors, **options)
    assert torch.equal(out, expected)


def test_an_access_outside_the_tensors_is_an_error_and_not_a_crash(emulated: torch.device) -> None:
    q, k, v = (emulated_cuda.guarded_like(torch.randn(1, 16, 1, 64).bfloat16()) for _ in range(3))
    out, lse = torch.empty_like(q), torch.empty(1, 1, 16)
    call = _native.cuda.AttentionCall(
        (1, 1, 1, 16, 17, 64),
        True,
        False,
        1.0,
        *(_attention_cuda._view(x) for x in (q, k, v, out)),
        lse.data_ptr(),
    )
    with pytest.raises(RuntimeError, match=r"global memory: access at .* outside every tensor"):
        _native.cuda.attention_forward(call, 0, 0)


# Launches.


def plan(backward: bool, most_shared: int, B: int, H: int, Hk: int, Lq: int, Lk: int, D: int) -> Any:
    nothing = (0, 0, 0, 0)
    call = _native.cuda.AttentionCall((B, H, Hk, Lq, Lk, D), True, False, 1.0, *[nothing] * 4, 0)
    return call.plan(backward, most_shared)


RESIDENT, QUERIES, KEYS = 0, 1, 2


@pytest.mark.parametrize(
    ("most_shared", "shape", "expected"),
    [
        # mode, warps, blocks of a head, all blocks, shared bytes
        (A100, (1024, 12, 12, 50, 50, 64), (RESIDENT, 4, 1, 12288, 2 * 64 * 128 + 4 * 2048 + 8)),
        (A100, (256, 16, 16, 257, 257, 64), (RESIDENT, 6, 1, 4096, 2 * 272 * 128 + 6 * 2048 + 5 * 8)),
        (A100, (256, 16, 16, 257, 257, 72), (RESIDENT, 6, 1, 4096, 2 * 272 * 160 + 6 * 2560 + 5 * 8)),
        (H100, (64, 16, 16, 729, 729, 72), (QUERIES, 6, 8, 8192, 4 * 64 * 160 + 6 * 2560 + 2 * 8)),
        (H100, (2, 4, 2, 0, 50, 64), (RESIDENT, 4, 0, 0, 2 * 64 * 128 + 4 * 2048 + 8)),
        (H100, (1 << 16, 1 << 14, 1, 50, 50, 64), (RESIDENT, 4, 1, 1 << 30, 2 * 64 * 128 + 4 * 2048 + 8)),
        (SMALL, (1, 1, 1, 5000, 5000, 128), (QUERIES, 6, 53, 53, 4 * 64 * 256 + 6 * 4096 + 2 * 8)),
        (40 * 1024, (1, 1, 1, 5000, 5000, 128), (QUERIES, 6, 53, -1, 4 * 64 * 256 + 6 * 4096 + 2 * 8)),
    ],
)
def test_forward_plans(most_shared: int, shape: Any, expected: Any, emulated: torch.device) -> None:
    assert plan(False, most_shared, *shape) == [expected]


def test_backward_plans(emulated: torch.device) -> None:
    (whole,) = plan(True, A100, 256, 16, 16, 257, 257, 64)
    assert whole == (RESIDENT, 7, 1, 4096, (4 * 17 + 7) * 2048 + 5 * 8 + 272 * 8)
    assert whole[-1] <= A100
    # 80 wide, four tensors of a head are more than an A100 has
    assert [p[0] for p in plan(True, A100, 256, 16, 16, 257, 257, 72)] == [QUERIES, KEYS]
    assert [p[0] for p in plan(True, H100, 256, 16, 16, 257, 257, 72)] == [RESIDENT]
    # shared key heads sum over their query heads in one block
    queries, keys = plan(True, H100, 2, 8, 2, 50, 50, 64)
    assert (queries[0], queries[3]) == (QUERIES, 2 * 8)
    assert (keys[0], keys[3]) == (KEYS, 2 * 2)
    for width in (8, 64, 72, 88, 128):
        for p in plan(True, SMALL, 1, 1, 1, 3000, 3000, width):
            assert 0 < p[-1] <= SMALL
            assert p[3] > 0


def test_rows_off_16_bytes_are_refused_by_the_binding(emulated: torch.device) -> None:
    x = torch.zeros(2, 8, 2, 64, dtype=torch.bfloat16)
    views = [_attention_cuda._view(x)] * 4
    views[1] = (views[1][0] + 8, *views[1][1:])
    with pytest.raises(RuntimeError, match="16 bytes"):
        _native.cuda.AttentionCall((2, 2, 2, 8, 8, 64), True, False, 1.0, *views, 0)


def test_a_tensor_past_32_bits_of_bytes(emulated: torch.device) -> None:
    """Offsets are 64 bits wide: entries and heads that lie three gigabytes apart."""
    apart = 3 * 2**30 // 2
    storage = torch.empty(apart + 64 * 16, dtype=torch.bfloat16)  # never touched between its ends
    x = storage.as_strided((2, 16, 1, 64), (apart, 64, 64, 1))
    x.copy_(torch.randn(2, 16, 1, 64))
    dense = x.contiguous()
    assert torch.equal(on_cuda(q=x, k=x, v=x), on_cuda(q=dense, k=dense, v=dense))


# Refusals and choice.


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "computes in bfloat16 and float16, not torch.float32"),
        ({"D": 12}, "multiples of 8 up to 128, not 12"),
        ({"D": 136}, "multiples of 8 up to 128, not 136"),
        ({"Dv": 32}, r"as wide as keys \(64\), not 32"),
        ({"bias": True}, "no gradient of the bias"),
    ],
    ids=str,
)
def test_refusals(change: dict[str, Any], reason: str, emulated: torch.device) -> None:
    dtype, D = change.get("dtype", torch.bfloat16), change.get("D", 64)
    q, k = torch.randn(2, 1, 5, 2, D, dtype=dtype).unbind(0)
    v = torch.randn(1, 5, 2, change.get("Dv", D), dtype=dtype)
    bias = torch.randn(1, 1, 5, 5, dtype=dtype, requires_grad=True) if "bias" in change else None
    with pytest.raises(NotImplementedError, match=reason):
        vk.attention(q, k, v, bias=bias, backend="cuda")


def test_it_is_no_default_before_a_gpu_has_shown_it(
    caplog: pytest.LogCaptureFixture, device: torch.device
) -> None:
    q, k, v = torch.randn(3, 1, 5, 2, 64).half().to(device).unbind(0)
    with caplog.at_level("DEBUG", logger="vlmkernels.ops.dispatch"):
        vk.attention(q, k, v)
    if caplog.records:
        assert "no committed result from a GPU shows it right and faster yet" in caplog.text
