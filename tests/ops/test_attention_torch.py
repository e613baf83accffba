# SPDX-License-Identifier: Apache-2.0
"""vk.scaled_dot_product_attention against the function of torch whose signature it has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vlmkernels as vk


def torch_and_ours(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return F.scaled_dot_product_attention(*arguments, **options), vk.scaled_dot_product_attention(
        *arguments, **options
    )


@pytest.mark.parametrize("shape", [(5, 16), (3, 5, 16), (2, 3, 5, 16), (2, 1, 3, 5, 16)], ids=str)
def test_sdpa_takes_any_number_of_leading_dimensions(shape: tuple[int, ...]) -> None:
    q, k, v = torch.randn(3, *shape).unbind(0)
    theirs, ours = torch_and_ours(q, k, v, scale=0.3)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("L", "S"), [(5, 5), (3, 7), (7, 3)])
def test_sdpa_causal_is_aligned_to_the_start(L: int, S: int) -> None:
    q, k, v = torch.randn(2, 3, L, 16), torch.randn(2, 3, S, 16), torch.randn(2, 3, S, 16)
    torch.testing.assert_close(*torch_and_ours(q, k, v, is_causal=True))


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize(
    "shape",
    [(4, 6), (1, 6), (6,), (2, 1, 1, 6), (1, 1, 1, 6), (2, 3, 4, 6), (3, 4, 6), (2, 1, 4, 1)],
    ids=str,
)
def test_sdpa_masks_broadcast_as_in_torch(shape: tuple[int, ...], boolean: bool) -> None:
    q, k, v = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 6, 16), torch.randn(2, 3, 6, 16)
    mask = torch.randn(shape)
    if boolean:
        mask = mask < 0.8
        mask.view(-1)[0] = True
    # torch itself takes some of these shapes only where the mask is bool
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(2, 3, 4, 6))
    torch.testing.assert_close(vk.scaled_dot_product_attention(q, k, v, attn_mask=mask), theirs)


def test_sdpa_mask_of_other_ranks() -> None:
    q, k, v = torch.randn(3, 2, 2, 3, 5, 16).unbind(0)
    mask = torch.randn(2, 1, 1, 5, 5)
    torch.testing.assert_close(*torch_and_ours(q, k, v, attn_mask=mask))
    q, k, v = torch.randn(3, 3, 5, 16).unbind(0)
    torch.testing.assert_close(*torch_and_ours(q, k, v, attn_mask=torch.rand(3, 1, 5) < 0.7))


def test_sdpa_mask_gradient() -> None:
    q, k, v = torch.randn(3, 2, 3, 5, 16).unbind(0)
    masks = [torch.randn(2, 1, 1, 5, requires_grad=True)]
    masks.append(masks[0].detach().clone().requires_grad_())
    F.scaled_dot_product_attention(q, k, v, attn_mask=masks[0]).square().sum().backward()
    vk.scaled_dot_product_attention(q, k, v, attn_mask=masks[1]).square().sum().backward()
    torch.testing.assert_close(masks[1].grad, masks[0].grad)


def test_sdpa_grouped_heads_need_enable_gqa() -> None:
    q, k, v = torch.randn(2, 6, 5, 16), torch.randn(2, 2, 5, 16), torch.randn(2, 2, 5, 16)
    torch.testing.assert_close(*torch_and_ours(q, k, v, enable_gqa=True))
    with pytest.raises(ValueError, match=r"vk\.scaled_dot_product_attention: .* enable_gqa"):
        vk.scaled_dot_product_attention(q, k, v)


def test_sdpa_query_that_sees_nothing_gives_zero() -> None:
    q, k, v = torch.randn(3, 1, 2, 3, 8).unbind(0)
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[1] = False
    out = vk.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert (out[:, :, 1] == 0).all()
    assert (out[:, :, 0] != 0).all()
