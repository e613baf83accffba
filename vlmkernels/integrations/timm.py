# SPDX-License-Identifier: Apache-2.0
"""timm: which of its modules `convert` routes to our attention, and why it leaves others alone.

A timm module that can call torch's `scaled_dot_product_attention` says so with the attribute `fused_attn`: the
attention of its ViTs, EVA, BEiT, Swin, MaxViT, attention pools and more. Their forwards stay timm's own.
"""

from __future__ import annotations

from torch import nn

__all__ = ["is_attention", "why_not"]


def is_attention(module: nn.Module) -> bool:
    """Whether a module is one of timm's attention modules (or a subclass of one)."""
    return hasattr(module, "fused_attn") and any(
        base.__module__.partition(".")[0] == "timm" for base in type(module).__mro__
    )


def why_not(module: nn.Module) -> str | None:
    """Why one of timm's attention modules cannot be converted, or None."""
    if not module.fused_attn:
        return (
            "its fused_attn is off, so it writes its scores itself "
            "(timm.layers.set_fused_attn(True, experimental=True) before the model is made turns it on)"
        )
    return None
