# SPDX-License-Identifier: Apache-2.0
"""What holds for the CUDA kernels of the contrastive losses: on the emulator, and on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import emulated_cuda
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vlmkernels as vk
from vlmkernels import _native
from vlmkernels.ops import _contrastive_cuda as kernels
from vlmkernels.ops import dispatch
from vlmkernels.ops._contrastive_ops import Arguments

each_dtype = pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)


@pytest.fixture(params=emulated_cuda.DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return emulated_cuda.use(request.param, monkeypatch)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    return emulated_cuda.use("emulated", monkeypatch)


def pair(n: int, m: int, d: int, dtype: torch.dtype, *batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normalised features, those of one number similar."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(*batch, count, d, generator=generator) for count in (n, m))
    same = min(n, m)
    k[..., :same, :] += 2 * q[..., :same, :]
    return F.normalize(q, dim=-1).to(dtype), F.normalize(k, dim=-1).to(dtype)


def softmax(call: Arguments, upstream: Tensor | float = 0.37) -> dict[str, Tensor]:
    """Loss and gradients of the softmax objective, all on the CPU."""
    (*batch, n, _), m, dtype = call.q.shape, call.k.shape[-2], call.q.dtype
    new = call.scale.new_empty
    lse = (new(*batch, 2, n), new(*batch, 2, m) if call.columns else new(0), new(0))
    loss = new(*batch, n) if call.reduction == "none" else new(())
    kernels.softmax_forward(call, dtype, (loss, *lse), "clip_loss")
    keys = new(0) if call.key_bias is None else torch.empty_like(call.key_bias)
    grads = (torch.empty_like(call.q), torch.empty_like(call.k), new(()), keys)
    upstream = torch.as_tensor(upstream).to(loss).expand(loss.shape)
    kernels.softmax_backward(upstream, call, dtype, list(lse), [True] * 5, grads, "clip_loss")
    return {
        name: x.cpu() for name, x in zip(("loss", "q", "k", "scale", "keys"), (loss, *grads), strict=True)
    }


def sigmoid(call: Arguments, needs: bool = True) -> dict[str, Tensor]:
    new = call.scale.new_empty
    grads = (torch.empty_like(call.q), torch.empty_like(call.k), new(()), new(()), new(0))
    loss = new(())
    kernels.one_pass(call, call.q.dtype, True, [needs] * 5, (loss, *grads), "siglip_loss")
    return {
        name: x.cpu() for name, x in zip(("loss", "q", "k", "scale", "bias"), (loss, *grads[:4]), strict=True)
    }


def exact(function: Any, tensors: dict[str, Tensor], upstream: Tensor | float = 0.37) -> dict[str, Tensor]:
    """The reference's loss and gradients in float64, of `function(**tensors)`."""
    leaves = {name: x.double().cpu().requires_grad_() for name, x in tensors.items()}
    loss = function(**leaves)
    upstream = torch.as_tensor(upstream).double().expand(loss.shape)
    grads = torch.autograd.grad(loss, list(leaves.values()), upstream)
    return {"loss": loss.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_close(ours: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Statistics are float32 sums; a gradient's tile is rounded to `dtype` once, its sums over the tiles once more."""
    eps = torch.finfo(dtype).eps
    for name, wanted in expected.items():
        found = ours[name].double()
        assert found.shape == wanted.shape, name
        if name in ("q", "k"):
            least = eps * torch.finfo(dtype).smallest_normal  # spacing of the smallest numbers
            assert (found - wanted).abs().max() <= 1.5 * eps * wanted.abs().max() + least, name
        else:
            # the device's 2^x is good to 2 ulp, at exponents of up to some hundred
            torch.testing.assert_close(
                found, wanted, rtol=3e-5, atol=3e-5, msg=lambda m, name=name: f"{name}: {m}"
            )


SIZES = ((1, 8), (5, 16), (127, 20), (128, 64), (300, 72))


@each_dtype
@pytest.mark.parametrize(("n", "d"), SIZES)
@pytest.mark.parametrize(("scale", "smoothing"), [(20.0, 0.0), (100.0, 0.1)])
def test_clip_loss(
    n: int, d: int, scale: float, smoothing: float, dtype: torch.dtype, device: torch.device
) -> None:
    q, k = pair(n, n, d, dtype)
    ours = softmax(
        Arguments(
            q.to(device), k.to(device), torch.tensor(scale, device=device), columns=True, smoothing=smoothing
        )
    )
    expected = exact(
        lambda q, k, scale: vk.clip_loss(q, k, scale, label_smoothing=smoothing, backend="reference"),
        {"q": q, "k": k, "scale": torch.tensor(scale)},
    )
    assert_close(ours, expected, dtype)


@each_dtype
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_siglip_loss(n: int, d: int, dtype: torch.dtype, device: torch.device) -> None:
    q, k = pair(n, n, d, dtype)
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    call = Arguments(q.to(device), k.to(device), scale.to(device), bias.to(device))
    expected = exact(
        lambda q, k, scale, bias: vk.siglip_loss(q, k, scale, bias, backend="reference"),
        {"q": q, "k": k, "scale": scale, "bias": bias},
        1.0,
    )
    assert_close(sigmoid(call), expected, dtype)
    assert torch.equal(sigmoid(call, needs=False)["loss"], sigmoid(call)["loss"])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_rows_with_positives_masks_and_ignored_rows(reduction: str, device: torch.device) -> None:
    n, m, d = 70, 150, 24
    q, k = pair(n, m, d, torch.bfloat16)
    generator = torch.Generator().manual_seed(3)
    positives = torch.randint(m, (n,), generator=generator)
    mask = torch.rand(m, generator=generator) < 0.6
    mask[positives] = True
    key_bias = torch.randn(m, generator=generator)
    upstream = torch.rand(n, generator=generator) if reduction == "none" else torch.tensor(0.37)
    ignored = positives.clone()
    ignored[::7] = -100
    call = Arguments(
        q.to(device),
        k.to(device),
        torch.tensor(8.0, device=device),
        key_bias=key_bias.to(device),
        positives=ignored.to(device),
        key_mask=mask.to(device),
        ignore_index=-100,
        reduction=reduction,
    )

    def definition(q: Tensor, k: Tensor, scale: Tensor, keys: Tensor) -> Tensor:
        logits = (scale * q @ k.T + keys).masked_fill(~mask, -torch.inf)
        return F.cross_entropy(logits, ignored, reduction=reduction)

    expected = exact(definition, {"q": q, "k": k, "scale": torch.tensor(8.0), "keys": key_bias}, upstream)
    assert_close(softmax(call, upstream), expected, torch.bfloat16)


def test_problems_side_by_side(device: torch.device) -> None:
    q, k = pair(40, 40, 16, torch.float16, 3)
    ours = softmax(Arguments(q.to(device), k.to(device), torch.tensor(9.0, device=device), columns=True))
    expected = exact(
        lambda q, k, scale: vk.clip_loss(q, k, scale, backend="reference"),
        {"q": q, "k": k, "scale": torch.tensor(9.0)},
    )
    assert_close(ours, expected, torch.float16)


def test_chunks_add_up(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = pair(300, 300, 40, torch.bfloat16)
    call = Arguments(
        q.to(device), k.to(device), torch.tensor(30.0, device=device), columns=True, smoothing=0.1
    )
    whole = softmax(call)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 2 * 128 * 130)
    monkeypatch.setattr(kernels, "CHUNK_COLUMNS", 130)
    problem = kernels._Problem(call, 0, torch.bfloat16)
    assert len(list(problem.ranges(kernels.CHUNK_BYTES // 2, kernels.CHUNK_COLUMNS))) == 9
    parts = softmax(call)
    for name in whole:
        # the same tiles, their sums in another order
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-2 if name in "qk" else 1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [0, 3])
def test_nothing_to_compare(n: int, device: torch.device) -> None:
    q, k = pair(n, n, 8, torch.bfloat16)
    ours = sigmoid(Arguments(q.to(device), k.to(device), torch.tensor(1.0, device=device), None))
    assert ours["loss"].isnan() == (n == 0)
    assert ours["q"].shape == (n, 8)


def test_nan_stays_in_its_row_and_in_every_column(device: torch.device) -> None:
    q, k = pair(150, 150, 16, torch.bfloat16)
    q[140, 3] = torch.nan
    call = Arguments(q.to(device), k.to(device), torch.tensor(5.0, device=device), columns=True)
    new = call.scale.new_empty
    row_lse, col_lse = new(2, 150), new(2, 150)
    kernels.softmax_forward(call, torch.bfloat16, (new(()), row_lse, col_lse, new(0)), "clip_loss")
    assert row_lse[1].isnan().nonzero().flatten().tolist() == [140]
    assert col_lse[1].isnan().all()


# Through the public functions.


def public(op: str, q: Tensor, k: Tensor, **options: Any) -> dict[str, Tensor]:
    """Loss and gradients of an op; a float64 call is the reference's."""
    tensors = {"q": q.clone().requires_grad_(), "k": k.clone().requires_grad_()}
    scale = tensors["scale"] = torch.tensor(12.0, device=q.device, requires_grad=True)
    generator, device = torch.Generator().manual_seed(5), q.device
    if op == "clip_loss":
        loss = vk.clip_loss(*tensors.values(), label_smoothing=0.1, **options)
    elif op == "siglip_loss":
        tensors["bias"] = torch.tensor(-8.0, device=device, requires_grad=True)
        loss = vk.siglip_loss(*tensors.values(), **options)
    elif op == "info_nce":
        mask = (torch.rand(len(k), generator=generator) < 0.7).to(device)
        mask[: len(q)] = True
        loss = vk.info_nce(*tensors.values(), key_mask=mask, **options)
    else:
        targets = torch.randint(len(k), (len(q),), generator=generator)
        targets[3] = -100
        tensors["keys"] = torch.randn(len(k), generator=generator).to(q).requires_grad_()
        loss = vk.linear_cross_entropy(
            tensors["q"],
            tensors["k"],
            targets.to(device),
            bias=tensors["keys"],
            logit_scale=scale,
            **options,
        )
    grads = torch.autograd.grad(loss, list(tensors.values()))
    return {"loss": loss.detach().cpu(), **{n: g.cpu() for n, g in zip(tensors, grads, strict=True)}}


@pytest.mark.parametrize("op", ["clip_loss", "siglip_loss", "info_nce", "linear_cross_entropy"])
def test_public_functions(op: str, device: torch.device) -> None:
    n = 40
    q, k = pair(n, n if op in ("clip_loss", "siglip_loss") else 70, 24, torch.bfloat16)
    ours = public(op, q.to(device), k.to(device), backend="cuda")
    expected = public(op, q.double(), k.double(), backend="reference")
    assert ours["q"].dtype == torch.bfloat16
    # their sums are rounded to bfloat16 at the end, with the gradient of the bias, which has the features' dtype
    for name in ours:
        half = name in ("q", "k", "keys")
        torch.testing.assert_close(
            ours[name].double(),
            expected[name].double(),
            rtol=2**-7 if half else 1e-4,
            atol=2**-7 * expected[name].abs().max().item() if half else 1e-4,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def test_a_group_and_labels_are_refused(emulated: torch.device) -> None:
    facts = {"dtypes": (torch.bfloat16,) * 2, "width": 8, "group": True}
    against = kernels.reasons(dispatch.Call("cpu", torch.bfloat16, facts))
    assert against == ["it has no blocks of logits for a process group"]
    q, k = pair(5, 5, 8, torch.bfloat16)
    labels = torch.arange(5)
    with pytest.raises(NotImplementedError, match="no cuda kernel for this op"):
        vk.multi_positive_loss(q, k, 5.0, labels, labels, backend="cuda")


# Bits, races, bounds.


def test_runs_agree_bit_for_bit(device: torch.device) -> None:
    q, k = pair(200, 200, 32, torch.bfloat16)
    call = Arguments(q.to(device), k.to(device), torch.tensor(50.0, device=device), columns=True)
    first, second = softmax(call), softmax(call)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("scale", [10.0, 300.0])
def test_the_order_of_threads_does_not_matter(scale: float, emulated: torch.device) -> None:
    q, k = pair(140, 140, 24, torch.bfloat16)
    call = Arguments(q, k, torch.tensor(scale), columns=True, smoothing=0.1)
    controls = emulated_cuda.controls()
    conflicts = controls.emulator_matrix_conflicts()
    forwards = {**softmax(call), **{f"sigmoid {name}": x for name, x in sigmoid(call).items()}}
    controls.emulator_run_backwards(1)
    try:
        backwards = {**softmax(call), **{f"sigmoid {name}": x for name, x in sigmoid(call).items()}}
    finally:
        controls.emulator_run_backwards(0)
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)
    assert controls.emulator_matrix_conflicts() == conflicts


@pytest.mark.parametrize(("n", "m", "d"), [(1, 3, 8), (131, 259, 24), (128, 129, 64)])
def test_nothing_outside_the_tensors_is_touched(
    n: int, m: int, d: int, emulated: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = (emulated_cuda.guarded_like(x) for x in pair(n, m, d, torch.bfloat16))
    monkeypatch.setattr(
        kernels._Problem,
        "empty",
        lambda self, *shape: emulated_cuda.guarded_like(torch.empty(shape, dtype=torch.float32)),
    )
    key_bias = emulated_cuda.guarded_like(torch.randn(m))
    positives = emulated_cuda.guarded_like(torch.arange(n) % m)
    ours = softmax(Arguments(q, k, torch.tensor(3.0), key_bias=key_bias, positives=positives))
    monkeypatch.undo()
    emulated_cuda.use("emulated", monkeypatch)
    plain = (x.clone() for x in (q, k, key_bias, positives))
    q, k, key_bias, positives = plain
    expected = softmax(Arguments(q, k, torch.tensor(3.0), key_bias=key_bias, positives=positives))
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_a_chunk_outside_its_problem_is_refused(emulated: torch.device) -> None:
    q, k = pair(5, 5, 8, torch.bfloat16)
    problem = kernels._Problem(Arguments(q, k, torch.tensor(1.0)), 0, torch.bfloat16)
    with pytest.raises(RuntimeError, match="outside its problem"):
        _native.cuda.contrastive_gradients(problem.native, (0, 6, 0, 5), False, 0, 8, 0, 0, 0, 0)
