# SPDX-License-Identifier: Apache-2.0
"""CLIP's text tower as a module of its own, for models that are no CLIP but read texts as CLIP does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmkernels.models._checks import check_ids
from vlmkernels.models.clip import TextConfig, TextTransformer
from vlmkernels.nn.transformer import LayerNorm


class TextTower(nn.Module):
    """Token ids `[B, L]` to features `[B, E]`: embeddings, causal blocks, norm and projection at the end token.

    Parameter names are those of a CLIP, so that its text weights load with `strict=False`.

    Args:
        config: Sizes.
        embed_dim: Width E of the output.
        act: Activation of the MLPs.
        **block: Passed to every block (the classes of attention, norm and MLP).
    """

    def __init__(self, config: TextConfig, embed_dim: int, *, act: str = "gelu", **block: Any) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, config.width))
        self.transformer = TextTransformer(config, act=act, **block)
        self.ln_final = LayerNorm(config.width)
        self.text_projection = nn.Parameter(config.width**-0.5 * torch.randn(config.width, embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Encodes ids; the feature is read at the first occurrence of the largest id, the end token."""
        check_ids("TextTower", ids, self.config.context_length)
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        x = read_end(self.transformer(x), ids.argmax(dim=-1))
        return self.ln_final(x) @ self.text_projection


def read_end(x: Tensor, end: Tensor) -> Tensor:
    """Takes of `x` [B, L, D] the token at position `end` [B]."""
    return x[torch.arange(len(x), device=x.device), end]
