# SPDX-License-Identifier: Apache-2.0
"""Attention modules on `vk.attention`: packed self-attention, cross attention and two attention pools.

Parameter names are those of `torch.nn.MultiheadAttention` (and so of OpenAI's and open_clip's checkpoints);
activations are `[B, L, D]`, batch first.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.nn.linear import Linear, project
from vlmkernels.ops.attention import attention, attention_qkvpacked

__all__ = ["AttentionPool", "AttentionPool2d", "MultiheadCrossAttention", "MultiheadSelfAttention"]


def _check_heads(owner: str, width: int, heads: int) -> None:
    if heads < 1 or width % heads != 0:
        raise ValueError(
            f"{owner}: heads must be positive and divide width, got width {width} and heads {heads}"
        )


def _check_dropout(owner: str, dropout: float) -> None:
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"{owner}: dropout must be in [0, 1), got {dropout}")


class MultiheadSelfAttention(nn.Module):
    """Self-attention with one packed input projection: `out_proj(softmax(q k^t / sqrt(D/H)) v)`.

    The packed projection feeds `vk.attention_qkvpacked` without a copy. State-dict names: `in_proj_weight`
    `[3D, D]` (rows q, k, v), `in_proj_bias`, `out_proj.weight`, `out_proj.bias`; initialised as torch's
    module.

    Args:
        width: Model width D.
        heads: Number of heads H; must divide D.
        bias: Whether both projections have a bias.
        dropout: Dropout on the attention weights, in training mode only.
        is_causal: Position i sees positions up to i.
        backend: Passed to the op; None lets the dispatcher choose.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If heads does not divide width, or dropout is outside [0, 1).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        is_causal: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_heads("MultiheadSelfAttention", width, heads)
        _check_dropout("MultiheadSelfAttention", dropout)
        self.width = width
        self.heads = heads
        self.dropout = dropout
        self.is_causal = is_causal
        self.backend = backend
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width, device=device, dtype=dtype))
        if bias:
            self.in_proj_bias = nn.Parameter(torch.empty(3 * width, device=device, dtype=dtype))
        else:
            self.register_parameter("in_proj_bias", None)
        # Set by `replace_in_proj` when something else (a quantized linear) computes the packed projection.
        self.in_proj: nn.Module | None = None
        self.out_proj = Linear(width, width, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises as `torch.nn.MultiheadAttention`: Xavier uniform packed weight, zero biases."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        self.out_proj.reset_parameters()
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def replace_in_proj(self, module: nn.Module) -> None:
        """Lets `module` (D -> 3D) compute the packed projection and drops the float parameters.

        Args:
            module: Maps `[B, L, D]` to `[B, L, 3D]`; stored as `in_proj`, so its state appears under that
                name.
        """
        self.in_proj = module
        self.register_parameter("in_proj_weight", None)
        self.register_parameter("in_proj_bias", None)

    def project_qkv(self, x: Tensor) -> Tensor:
        """Returns the packed queries, keys and values of `x` `[B, L, D]` as `[B, L, 3, H, D/H]`."""
        packed = (
            self.in_proj(x)
            if self.in_proj is not None
            else project(x, self.in_proj_weight, self.in_proj_bias)
        )
        return packed.unflatten(-1, (3, self.heads, -1))

    def forward(
        self,
        x: Tensor,  # [B, L, D]
        *,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Attends within each sequence.

        Args:
            x: Tokens `[B, L, D]`.
            key_mask: Bool `[B, L]`, True = may be attended to. A row with no key gives the output bias.
            bias: Added to the scaled scores, broadcastable to `[B, H, L, L]`.
            is_causal: Overrides the module's setting for this call.

        Returns:
            `[B, L, D]` in the dtype of the projection.
        """
        out = attention_qkvpacked(
            self.project_qkv(x),
            bias=bias,
            key_mask=key_mask,
            is_causal=self.is_causal if is_causal is None else is_causal,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return self.out_proj(cast(Tensor, out).flatten(2))

    def extra_repr(self) -> str:
        return f"width={self.width}, heads={self.heads}, is_causal={self.is_causal}, dropout={self.dropout}"


class MultiheadCrossAttention(nn.Module):
    """Attention of queries over another sequence, with the parameters of `torch.nn.MultiheadAttention`.

    Where the context has the queries' width the three input projections are packed in `in_proj_weight` `[3D,
    D]`; otherwise they are `q_proj_weight`, `k_proj_weight`, `v_proj_weight`. `in_proj_bias` `[3D]` either
    way.

    Args:
        width: Width D of the queries and of the output.
        heads: Number of heads H; must divide D.
        context_width: Width of the attended sequence; None = width.
        bias: Whether the projections have a bias.
        dropout: Dropout on the attention weights, in training mode only.
        backend: Passed to the op; None lets the dispatcher choose.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If heads does not divide width, or dropout is outside [0, 1).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        context_width: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_heads("MultiheadCrossAttention", width, heads)
        _check_dropout("MultiheadCrossAttention", dropout)
        self.width = width
        self.heads = heads
        self.context_width = width if context_width is None else context_width
        self.dropout = dropout
        self.backend = backend

        def weight(rows: int, columns: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(rows, columns, device=device, dtype=dtype))

        if self.context_width == width:
            self.in_proj_weight = weight(3 * width, width)
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                self.register_parameter(name, None)
        else:
            self.register_parameter("in_proj_weight", None)
            self.q_proj_weight = weight(width, width)
            self.k_proj_weight = weight(width, self.context_width)
            self.v_proj_weight = weight(width, self.context_width)
        if bias:
            self.in_proj_bias = nn.Parameter(torch.empty(3 * width, device=device, dtype=dtype))
        else:
            self.register_parameter("in_proj_bias", None)
        self.out_proj = Linear(width, width, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises as `torch.nn.MultiheadAttention`: Xavier uniform input weights, zero biases."""
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        self.out_proj.reset_parameters()
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def project_queries(self, x: Tensor) -> Tensor:
        """Returns the queries of `x` `[B, Lq, D]` as `[B, Lq, H, D/H]`."""
        weight = self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight[: self.width]
        bias = None if self.in_proj_bias is None else self.in_proj_bias[: self.width]
        return F.linear(x, weight, bias).unflatten(-1, (self.heads, -1))

    def project_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values of `context` `[B, Lk, context_width]`, each `[B, Lk, H, D/H]`."""
        bias = None if self.in_proj_bias is None else self.in_proj_bias[self.width :]
        if self.in_proj_weight is not None:
            # Keys and values come from one product: half the reads of the context.
            k, v = F.linear(context, self.in_proj_weight[self.width :], bias).chunk(2, dim=-1)
        else:
            k_bias, v_bias = (None, None) if bias is None else bias.chunk(2)
            k = F.linear(context, self.k_proj_weight, k_bias)
            v = F.linear(context, self.v_proj_weight, v_bias)
        return k.unflatten(-1, (self.heads, -1)), v.unflatten(-1, (self.heads, -1))

    def forward(
        self,
        x: Tensor,  # [B, Lq, D]
        context: Tensor,  # [B, Lk, context_width]
        *,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Lets each query attend over the context.

        Args:
            x: Queries `[B, Lq, D]`.
            context: Attended tokens `[B, Lk, context_width]`.
            key_mask: Bool `[B, Lk]`, True = may be attended to.
            bias: Added to the scaled scores, broadcastable to `[B, H, Lq, Lk]`.
            is_causal: Causal, aligned to the end where Lq != Lk (the last query sees every key).

        Returns:
            `[B, Lq, D]` in the dtype of the projection.
        """
        out = attention(
            self.project_queries(x),
            *self.project_context(context),
            bias=bias,
            key_mask=key_mask,
            is_causal=is_causal,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return self.out_proj(cast(Tensor, out).flatten(2))

    def extra_repr(self) -> str:
        sizes = f"width={self.width}, heads={self.heads}, context_width={self.context_width}"
        return f"{sizes}, dropout={self.dropout}"


class MultiheadAttention(nn.Module):
    """Attention with a linear layer each for queries, keys, values and output: `out(softmax(q k^t / sqrt(D/H)) v)`.

    For decoders whose keys and values differ, and for layers that adapters replace one by one (`vk.nn.add_lora`).
    Where only the queries are given it is self-attention; where a context is given, cross-attention.

    Args:
        width: Width D of the queries and of the output.
        heads: Number of heads H; must divide D.
        context_width: Width of keys and values; None = width.
        bias: Whether the projections of queries, keys and values have a bias.
        dropout: Dropout on the attention weights, in training mode only.
        backend: Passed to the op; None lets the dispatcher choose.

    Raises:
        ValueError: If heads does not divide width, or dropout is outside [0, 1).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        context_width: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _check_heads("MultiheadAttention", width, heads)
        _check_dropout("MultiheadAttention", dropout)
        self.heads, self.dropout, self.backend = heads, dropout, backend
        context_width = width if context_width is None else context_width
        self.q_proj = Linear(width, width, bias=bias)
        self.k_proj = Linear(context_width, width, bias=bias)
        self.v_proj = Linear(context_width, width, bias=bias)
        self.out_proj = Linear(width, width)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        q: Tensor,  # [B, Lq, D]
        k: Tensor | None = None,  # [B, Lk, context_width]
        v: Tensor | None = None,  # [B, Lk, context_width]
        *,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            q: What the queries are made of, `[B, Lq, D]`.
            k: What the keys are made of; None = q.
            v: What the values are made of; None = k.
            key_mask: Bool `[B, Lk]`, True = may be attended to.
            bias: Added to the scaled scores, broadcastable to `[B, H, Lq, Lk]`.

        Returns:
            `[B, Lq, D]`.
        """
        k = q if k is None else k
        v = k if v is None else v
        shape = (self.heads, -1)
        out = attention(
            self.q_proj(q).unflatten(-1, shape),
            self.k_proj(k).unflatten(-1, shape),
            self.v_proj(v).unflatten(-1, shape),
            bias=bias,
            key_mask=key_mask,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return self.out_proj(cast(Tensor, out).flatten(2))


class AttentionPool2d(nn.Module):
    """CLIP's pool for convolutional towers: the mean token attends over itself and every position.

    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), section
    2.4. The tokens are `[mean(x); x] + positional_embedding`; only the mean is a query, so the cost is 1 x
    (HW + 1).

    Args:
        grid: Side of the feature map; the positions are `[grid^2 + 1, width]`.
        width: Channels of the feature map.
        heads: Number of heads; must divide width.
        out_width: Width of the pooled vector.
        backend: Passed to the op; None lets the dispatcher choose.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If heads does not divide width.
    """

    def __init__(
        self,
        grid: int,
        width: int,
        heads: int,
        out_width: int,
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_heads("AttentionPool2d", width, heads)
        self.grid = grid
        self.heads = heads
        self.backend = backend
        self.positional_embedding = nn.Parameter(
            torch.empty(grid * grid + 1, width, device=device, dtype=dtype)
        )
        self.q_proj = nn.Linear(width, width, device=device, dtype=dtype)
        self.k_proj = nn.Linear(width, width, device=device, dtype=dtype)
        self.v_proj = nn.Linear(width, width, device=device, dtype=dtype)
        self.c_proj = nn.Linear(width, out_width, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with deviation `width^-0.5` for the positions and the four projections."""
        std = self.positional_embedding.shape[1] ** -0.5
        nn.init.normal_(self.positional_embedding, std=std)
        for layer in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            layer.reset_parameters()
            nn.init.normal_(layer.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        """Pools a feature map `[B, C, grid, grid]` to `[B, out_width]`."""
        if x.shape[-2] * x.shape[-1] + 1 != self.positional_embedding.shape[0]:
            raise ValueError(
                f"AttentionPool2d: the positions fit a {self.grid} x {self.grid} feature map, "
                f"got {list(x.shape)}"
            )
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        tokens = tokens + self.positional_embedding
        heads = (self.heads, -1)
        q = self.q_proj(tokens[:, :1]).unflatten(-1, heads)
        k = self.k_proj(tokens).unflatten(-1, heads)
        v = self.v_proj(tokens).unflatten(-1, heads)
        out = cast(Tensor, attention(q, k, v, backend=self.backend))
        return self.c_proj(out.flatten(1))


class AttentionPool(nn.Module):
    """Learned queries attend over a token sequence: `attn(ln_q(query), ln_k(x))`.

    The pooler of Set Transformer (Lee et al. 2019, eq. 9) as CoCa uses it; parameter names are open_clip's.

    Args:
        width: Width of the queries and of the output.
        heads: Number of heads; must divide width.
        queries: Number of learned queries.
        context_width: Width of the pooled tokens; None = width.
        norm_layer: Class of the two norms.
        backend: Passed to the op; None lets the dispatcher choose.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If heads does not divide width or queries is not positive.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        queries: int = 1,
        context_width: int | None = None,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if queries < 1:
            raise ValueError(f"AttentionPool: queries must be at least 1, got {queries}")
        context_width = width if context_width is None else context_width
        self.query = nn.Parameter(torch.randn(queries, width, device=device, dtype=dtype))
        self.attn = MultiheadCrossAttention(
            width, heads, context_width=context_width, backend=backend, device=device, dtype=dtype
        )
        self.ln_q = norm_layer(width, device=device, dtype=dtype)
        self.ln_k = norm_layer(context_width, device=device, dtype=dtype)

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:  # [B, L, context_width]
        """Pools `[B, L, context_width]` to `[B, queries, width]`; `key_mask` `[B, L]`, True = attend."""
        query = self.ln_q(self.query).expand(x.shape[0], -1, -1)
        return self.attn(query, self.ln_k(x), key_mask=key_mask)
