# SPDX-License-Identifier: Apache-2.0
"""torch's scaled_dot_product_attention as encoders call it: heads from a packed qkv, the result made contiguous."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(qkv: Tensor, *, is_causal: bool = False, key_mask: Tensor | None = None) -> Tensor:
    """`[B, L, 3, H, D]` to `[B, L, H, D]`."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    mask = None if key_mask is None else key_mask[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    return out.transpose(1, 2).contiguous()


def attention_varlen(qkv: Tensor, lengths: list[int]) -> Tensor:
    """`[T, 3, H, D]` to `[T, H, D]`: torch on the CPU has no packed form, so each sequence is a call."""
    return torch.cat([attention(part[None])[0] for part in qkv.split(lengths)])
