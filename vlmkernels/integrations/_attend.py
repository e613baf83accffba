# SPDX-License-Identifier: Apache-2.0
"""Attention for drop-ins: a kernel of ours where one serves the call, torch's own function elsewhere.

Never the reference: who swaps a fused function for another must not end up with a product written to memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.ops import attention as ops

__all__ = [
    "attend",
    "kernel_serves",
    "multi_head_attention",
    "multi_head_reasons",
    "serves_scaled_dot_product",
]

logger = logging.getLogger(__name__)

# Taken here, where no mode of ours is active and nobody has patched the module: what calls fall back to.
_torch_sdpa = F.scaled_dot_product_attention

_PLAIN = (Tensor, nn.Parameter, torch._subclasses.FakeTensor)
_NEG_INF = float("-inf")


def kernel_serves(
    q: Tensor,  # [B, Lq, H, D]
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> bool:
    """Whether `vk.attention` would serve this call with anything but the reference."""
    backend = ops.attention_backend(
        q, k, v, bias=bias, key_mask=key_mask, is_causal=is_causal, dropout_p=dropout_p
    )
    return backend != "reference"


def attend(
    q: Tensor,  # [B, Lq, H, D]
    k: Tensor,  # [B, Lk, Hk, D]
    v: Tensor,  # [B, Lk, Hk, Dv]
    *,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """`vk.attention`, arguments and layout its own; `[B, Lq, H, Dv]`."""
    options: dict[str, Any] = {"bias": bias, "key_mask": key_mask, "is_causal": is_causal}
    if kernel_serves(q, k, v, dropout_p=dropout_p, **options):
        return cast(Tensor, ops.attention(q, k, v, scale=scale, dropout_p=dropout_p, **options))
    if is_causal and bias is None and key_mask is None and q.shape[1] == k.shape[1]:
        mask = None
    else:
        mask, is_causal = _torch_mask(q, k, bias, key_mask, is_causal), False
    out = _torch_sdpa(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _torch_mask(
    q: Tensor, k: Tensor, bias: Tensor | None, key_mask: Tensor | None, is_causal: bool
) -> Tensor | None:
    """One mask for torch's function out of everything that hides keys; causal masks end with the last key."""
    visible = None
    if is_causal:
        queries, keys = q.shape[1], k.shape[1]
        visible = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    if key_mask is not None:
        allowed = key_mask[:, None, None, :]
        visible = allowed if visible is None else visible & allowed
    if bias is None:
        return visible
    if visible is not None:
        bias = bias.masked_fill(~visible, _NEG_INF)
    return bias.to(q.dtype)


def serves_scaled_dot_product(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Whether a kernel serves a call of torch's `scaled_dot_product_attention` (its arguments)."""
    if not (_plain(query) and _plain(key) and _plain(value)):
        return False
    dtype, ndim = query.dtype, query.ndim
    if not dtype.is_floating_point or not dtype == key.dtype == value.dtype:
        return False
    q_shape, k_shape, v_shape = query.shape, key.shape, value.shape
    # torch broadcasts other leading dimensions, and says more about wrong shapes than a guess here could.
    if ndim < 2 or ndim != len(k_shape) or k_shape[:-1] != v_shape[:-1] or q_shape[-1] != k_shape[-1]:
        return False
    if 0 in q_shape or 0 in k_shape:
        return False
    if enable_gqa and ndim == 4:
        if q_shape[0] != k_shape[0] or q_shape[1] % k_shape[1] != 0:
            return False
    elif q_shape[:-2] != k_shape[:-2]:
        return False
    hides_keys = False
    if attn_mask is not None:
        if is_causal or not _plain(attn_mask) or attn_mask.ndim < 2:
            return False
        if attn_mask.dtype not in (torch.bool, torch.float32, dtype):
            return False
        hides_keys = attn_mask.dtype == torch.bool and _keys_alone(attn_mask)
    q, k, v = (ops.with_heads(x).transpose(1, 2) for x in (query, key, value))
    return kernel_serves(
        q,
        k,
        v,
        bias=None if hides_keys else attn_mask,
        key_mask=attn_mask if hides_keys else None,
        is_causal=is_causal,
        dropout_p=dropout_p,
    )


def _keys_alone(mask: Tensor) -> bool:
    return all(size == 1 for size in mask.shape[-3:-1])


def _plain(x: Any) -> bool:
    """A tensor whose memory a kernel can read: no nested one, and no subclass with rules of its own (DTensor)."""
    return type(x) in _PLAIN and not x.is_nested and x.layout == torch.strided


def multi_head_reasons(
    query: Tensor,  # [B, Lq, E]
    key: Tensor,
    value: Tensor,
    heads: int,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> list[str]:
    """Why a call of torch's multi-head attention is left to torch, which also words the errors of wrong ones."""
    if not all(_plain(x) for x in (query, key, value)) or not query.ndim == key.ndim == value.ndim == 3:
        return ["query, key and value are not three plain [B, L, E] tensors"]
    batch, queries, keys = query.shape[0], query.shape[1], key.shape[1]
    reasons = []
    if key.shape[:2] != value.shape[:2] or key.shape[0] != batch or 0 in query.shape or keys == 0:
        reasons.append("query, key and value are empty or do not fit together")
    if is_causal and attn_mask is None:
        reasons.append("is_causal is a hint about an attn_mask, and there is none")
    for mask, shapes in (
        (key_padding_mask, ((batch, keys),)),
        (attn_mask, ((queries, keys), (batch * heads, queries, keys))),
    ):
        if mask is None:
            continue
        if not (mask.dtype == torch.bool or mask.is_floating_point()) or tuple(mask.shape) not in shapes:
            reasons.append("a mask is neither bool nor floating, or has a shape of its own")
    return reasons


def multi_head_attention(
    query: Tensor,  # [B, Lq, E]
    key: Tensor,  # [B, Lk, kdim]
    value: Tensor,  # [B, Lk, vdim]
    heads: int,
    in_weights: Tensor | tuple[Tensor, Tensor, Tensor],  # [3E, E], or three for q, k and v
    in_bias: Tensor | None,  # [3E]
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    linear: Callable[..., Tensor] = F.linear,
) -> Tensor:
    """`out(attend(q(query), k(key), v(value)))` with torch's masks, for calls without `multi_head_reasons`.

    Args:
        query: `[B, Lq, E]`.
        key: `[B, Lk, kdim]`; that it is the same object as query or value saves products.
        value: `[B, Lk, vdim]`.
        heads: H, which divides E.
        in_weights: the packed projection `[3E, E]`, or three.
        in_bias: `[3E]` or None.
        out_weight: `[E, E]`.
        out_bias: `[E]` or None.
        key_padding_mask: `[B, Lk]`, bool with True = ignore, or added to the scores.
        attn_mask: `[Lq, Lk]` or `[B * H, Lq, Lk]`, bool with True = ignore, or added to the scores.
        is_causal: says that attn_mask is the causal mask.
        dropout_p: probability with which a weight is dropped.
        linear: what multiplies with the weights.

    Returns:
        `[B, Lq, E]`.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in _project(query, key, value, in_weights, in_bias, linear))
    is_causal = is_causal and q.shape[1] == k.shape[1]
    bias = None
    if attn_mask is not None and not is_causal:
        bias = _additive(attn_mask, q.dtype)
        bias = bias[None, None] if bias.ndim == 2 else bias.unflatten(0, (-1, heads))
    key_mask = None
    if key_padding_mask is not None:
        if key_padding_mask.dtype == torch.bool:
            key_mask = ~key_padding_mask
        else:
            padding = key_padding_mask.to(q.dtype)[:, None, None, :].expand(-1, 1, q.shape[1], -1)
            bias = padding if bias is None else bias + padding
    out = attend(q, k, v, bias=bias, key_mask=key_mask, is_causal=is_causal, dropout_p=dropout_p)
    return linear(out.flatten(2), out_weight, out_bias)


def _project(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor | tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    linear: Callable[..., Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(weights, Tensor):
        if query is key and key is value:
            q, k, v = linear(query, weights, bias).chunk(3, dim=-1)
            return q, k, v
        width = query.shape[-1]
        if key is value:
            first, rest = (None, None) if bias is None else (bias[:width], bias[width:])
            k, v = linear(key, weights[width:], rest).chunk(2, dim=-1)
            return linear(query, weights[:width], first), k, v
        weights = cast("tuple[Tensor, Tensor, Tensor]", weights.chunk(3))
    biases = (None, None, None) if bias is None else bias.chunk(3)
    q, k, v = (linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    return q, k, v


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask (True = ignore) as 0 and -inf; a floating one in the dtype that is added to scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, _NEG_INF)
