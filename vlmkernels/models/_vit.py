# SPDX-License-Identifier: Apache-2.0
"""The plain vision transformer in timm's layout, all of whose tokens are of use: grounding, masked modelling."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmkernels.models.clip import VisionConfig
from vlmkernels.nn.attention import MultiheadSelfAttention
from vlmkernels.nn.transformer import LayerNorm, Transformer
from vlmkernels.ops.attention import attention

_EPS = 1e-6


class QKNormSelfAttention(MultiheadSelfAttention):
    """Self-attention whose queries and keys pass a LayerNorm per head (timm's `qk_norm`), with eps 1e-6."""

    def __init__(self, width: int, heads: int, **options: Any) -> None:
        super().__init__(width, heads, **options)
        self.q_norm = LayerNorm(width // heads, eps=_EPS)
        self.k_norm = LayerNorm(width // heads, eps=_EPS)

    def forward(
        self,
        x: Tensor,  # [B, L, D]
        *,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        q, k, v = self.project_qkv(x).unbind(2)
        out = attention(
            self.q_norm(q).to(v.dtype),
            self.k_norm(k).to(v.dtype),
            v,
            key_mask=key_mask,
            bias=bias,
            is_causal=self.is_causal if is_causal is None else is_causal,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return self.out_proj(out.flatten(2))  # type: ignore[union-attr]


class PlainViT(nn.Module):
    """Patches, class token, positions, pre-norm blocks, final norm: `[B, 3, S, S]` to tokens `[B, 1 + N, D]`.

    Args:
        config: Sizes; `pool="mean"` leaves the class token out.
        qk_norm: LayerNorm on queries and keys, per head.
        act: Activation of the MLPs.
    """

    def __init__(self, config: VisionConfig, *, qk_norm: bool = False, act: str = "gelu") -> None:
        super().__init__()
        if config.is_resnet or config.stem != "patch":
            raise ValueError(
                f"PlainViT: expected a transformer with the patch stem, got stem {config.stem!r}"
            )
        width = config.width
        self.config = config
        self.patch_embed = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size)
        self.class_tokens = int(config.pool == "class")
        self.class_token = nn.Parameter(0.02 * torch.randn(self.class_tokens, width))
        self.positional_embedding = nn.Parameter(
            0.02 * torch.randn(config.grid**2 + self.class_tokens, width)
        )
        self.transformer = Transformer(
            width,
            config.layers,  # type: ignore[arg-type]
            config.heads or max(1, width // 64),
            mlp_width=config.mlp_width,
            act=act,
            dropout=config.dropout,
            drop_path=config.drop_path,
            attention_layer=QKNormSelfAttention if qk_norm else MultiheadSelfAttention,
            norm_layer=partial(LayerNorm, eps=_EPS),
        )
        self.norm = LayerNorm(width, eps=_EPS)

    def forward(
        self, images: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None
    ) -> Tensor:  # [B, 3, S, S]
        """Encodes normalised images.

        Args:
            images: `[B, 3, S, S]`.
            mask: Bool `[B, N]`, True = the patch's embedding is replaced by `mask_token` before positions are added.
            mask_token: `[D]`.

        Returns:
            Tokens after the final norm, `[B, 1 + N, D]`; without a class token `[B, N, D]`.
        """
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        if mask is not None and mask_token is not None:
            x = torch.where(mask.unsqueeze(-1), mask_token.to(x.dtype), x)
        x = torch.cat([self.class_token.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        return self.norm(self.transformer(x + self.positional_embedding))
