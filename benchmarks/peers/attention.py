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


#: Kernels behind scaled_dot_product_attention, by the names that rows give them; "default" lets torch choose.
SDPA_BACKENDS = {
    "default": None,
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
}


def with_backend(backend: str, qkv: Tensor, *, is_causal: bool = False) -> Tensor:
    """`attention` by one of `SDPA_BACKENDS`; RuntimeError where it cannot."""
    name = SDPA_BACKENDS[backend]
    if name is None:
        return attention(qkv, is_causal=is_causal)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, name)):
        return attention(qkv, is_causal=is_causal)
