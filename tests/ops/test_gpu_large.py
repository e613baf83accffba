# SPDX-License-Identifier: Apache-2.0
"""Offsets of more than 32 bits on a GPU: tensors of more than 2^31 elements, whose last rows must be right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import vlmkernels as vk

pytestmark = pytest.mark.gpu
each_backend = pytest.mark.parametrize("backend", ["triton", "cuda"])
PAST = 2**31 + 2**20  # elements
GIB = 2**30


def needs(gib: float) -> None:
    """Skips where so much memory is not free; gives cached memory back first."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"needs {gib:.0f} GiB of the device's memory, and {free / GIB:.0f} are free")


def repeated(*shape: int, seed: int = 0) -> torch.Tensor:
    """bfloat16 values that repeat along the first dimension with a period of 64, so that little is drawn; the last rows
    are others."""
    generator = torch.Generator("cuda").manual_seed(seed)
    some = torch.randn(64, *shape[1:], generator=generator, device="cuda").bfloat16()
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    for start in range(0, shape[0], 64):
        part = x[start : start + 64]
        part.copy_(some[: len(part)])
    x[-2:] = torch.randn(2, *shape[1:], generator=generator, device="cuda").bfloat16()
    return x


def served(call):
    try:
        return call()
    except NotImplementedError as error:
        pytest.skip(str(error))


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.float() - exact.float()).norm() / exact.float().norm()).item()


@each_backend
def test_attention(backend: str) -> None:
    needs(30)
    L, H, D = 50, 12, 64
    B = PAST // (L * 3 * H * D) + 1
    qkv = repeated(B, L, 3, H, D).requires_grad_()
    out = served(lambda: vk.attention_qkvpacked(qkv, backend=backend))
    upstream = torch.zeros_like(out)
    upstream[-2:] = 1.0
    (grad,) = torch.autograd.grad(out, qkv, upstream)
    last = qkv.detach()[-2:].float().requires_grad_()
    exact = vk.attention_qkvpacked(last, backend="reference")
    (exact_grad,) = torch.autograd.grad(exact, last, torch.ones_like(exact))
    assert error(out.detach()[-2:], exact.detach()) < 1e-2
    assert error(grad[-2:], exact_grad) < 2e-2
    assert not grad[:-2].any()


@each_backend
def test_more_logits_than_32_bits_count(backend: str) -> None:
    needs(8)
    n, d = 2**16, 64
    generator = torch.Generator("cuda").manual_seed(0)
    image = F.normalize(torch.randn(n, d, generator=generator, device="cuda"), dim=-1).bfloat16()
    scale = torch.tensor(30.0, device="cuda")
    ours = served(lambda: vk.clip_loss(image, image, scale, backend=backend))
    rows = torch.cat([scale * part.float() @ image.float().T for part in (image[:64], image[-64:])])
    # every row is alike, so some of them have the mean to a part in a hundred
    target = scale * (image.float() ** 2).sum(1)
    some = (rows.logsumexp(1) - torch.cat([target[:64], target[-64:]])).mean()
    assert abs(ours - some) < 0.02 * some


@each_backend
def test_a_result_of_a_linear_layer(backend: str) -> None:
    needs(16)
    K, N = 64, 4096
    M = PAST // N + 1
    x = repeated(M, K)
    weight = torch.randn(N, K, generator=torch.Generator("cuda").manual_seed(1), device="cuda").bfloat16()
    qweight = vk.quantize_weight(weight, "w8a8")
    with torch.no_grad():
        y = served(lambda: vk.quantized_linear(x, qweight, backend=backend))
        exact = vk.quantized_linear(x[-2:].float(), qweight, backend="reference")
    assert error(y[-2:], exact) < 1e-2


@each_backend
def test_a_database(backend: str) -> None:
    needs(16)
    D = 512
    database = repeated(PAST // D + 1, D)
    queries = database[-2:].clone()
    scores, indices = served(lambda: vk.topk_similarity(queries, database, 3, backend=backend))
    assert indices[:, 0].tolist() == [len(database) - 2, len(database) - 1]
    assert torch.allclose(scores[:, 0].double(), (queries.double() ** 2).sum(1), rtol=1e-5)
