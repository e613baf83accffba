# SPDX-License-Identifier: Apache-2.0
"""Attention: the public functions.

Their registered ops: `_attention_ops.py`; the definition: `reference/attention.py`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from vlmkernels.ops import _attention_library, _check, dispatch
from vlmkernels.ops import _attention_ops as ops
from vlmkernels.ops._library import follow_autocast, no_autocast, wants_gradients
from vlmkernels.ops.reference import attention as reference

__all__ = ["attention", "attention_qkvpacked", "attention_varlen", "scaled_dot_product_attention"]


def attention(
    q: Tensor,  # [B, Lq, H, D]
    k: Tensor,  # [B, Lk, Hk, D]
    v: Tensor,  # [B, Lk, Hk, Dv]
    *,
    bias: Tensor | None = None,  # [B|1, H|1, Lq, Lk]
    key_mask: Tensor | None = None,  # [B, Lk]
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`out = dropout(softmax(scale * q @ k^T + bias)) @ v`, heads after length, any strides.

    Scores are summed in float32 (float64 for float64) and never cast to a half type. A query that sees no
    key, because `key_mask`, `is_causal` or a `bias` of -inf hides them all, gives 0 and has zero gradient.

    Args:
        q: queries `[B, Lq, H, D]`, float16, bfloat16, float32 or float64.
        k: keys `[B, Lk, Hk, D]`; Hk divides H, and query head `h` uses key head `h // (H/Hk)`.
        v: values `[B, Lk, Hk, Dv]`; Dv is usually D.
        bias: `[B|1, H|1, Lq, Lk]` in q's dtype or float32, added after the scale; -inf is allowed.
        key_mask: bool `[B, Lk]`, True = attend.
        is_causal: query i sees keys `j <= i + Lk - Lq`: aligned to the end, the last query sees all.
        scale: factor of the scores; None means `D ** -0.5`.
        dropout_p: probability in [0, 1] with which a weight is dropped. The mask comes from a counter-based
            generator that torch's default generator seeds: `torch.manual_seed` reproduces it, the backward
            sees the same.
        return_lse: also return the log-sum-exp of each query's scores.
        backend: None chooses; "reference", "cpu", "cuda" or "triton" insists.

    Returns:
        `[B, Lq, H, Dv]`, contiguous, in q's dtype (autocast's under autocast); with `return_lse` a pair, the
        second being float32 (float64 for float64) `[B, H, Lq]`, natural logarithm, -inf for a query without a
        key.

    Raises:
        TypeError: a dtype is not floating, q, k and v differ in dtype outside autocast, or bias or key_mask
            has the wrong kind of dtype.
        ValueError: shapes or devices do not fit together.
        NotImplementedError: the named backend cannot serve the call; a second derivative or vmap off the
            reference.

    Gradients reach q, k, v and bias, through out and lse; not key_mask, scale or dropout_p.

    Example:
        >>> q, k, v = torch.randn(3, 2, 77, 8, 64).unbind(0)
        >>> vk.attention(q, k, v, is_causal=True).shape
        torch.Size([2, 77, 8, 64])
    """
    return _attention("attention", q, k, v, bias, key_mask, is_causal, scale, dropout_p, return_lse, backend)


def attention_qkvpacked(
    qkv: Tensor,  # [B, L, 3, H, D]
    *,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention(*qkv.unbind(2))`: self-attention on what one linear layer gives, read where it lies.

    Args:
        qkv: `[B, L, 3, H, D]`, for example `linear(x).unflatten(-1, (3, H, D))`.
        bias: as in `attention`, as are the other arguments.
        key_mask: bool `[B, L]`, True = attend.
        is_causal: query i sees keys `j <= i`.
        scale: factor of the scores; None means `D ** -0.5`.
        dropout_p: probability in [0, 1] with which a weight is dropped.
        return_lse: also return the log-sum-exp `[B, H, L]`.
        backend: None chooses; "reference", "cpu", "cuda" or "triton" insists.

    Returns:
        `[B, L, H, D]`, or a pair with the log-sum-exp.

    Raises:
        TypeError, ValueError, NotImplementedError: as `attention`.

    Gradients reach qkv and bias.

    Example:
        >>> qkv = torch.randn(2, 50, 3, 12, 64, requires_grad=True)
        >>> vk.attention_qkvpacked(qkv).shape
        torch.Size([2, 50, 12, 64])
    """
    op = "attention_qkvpacked"
    _check.floating(op, "qkv", qkv)
    _check.ndim(op, "qkv", qkv, 5, "[B, L, 3, H, D]")
    _check.shape(op, "qkv", qkv, (None, None, 3, None, None), "[B, L, 3, H, D]")
    packed: Tensor = follow_autocast(qkv)[0]  # type: ignore[assignment]
    q, k, v = packed.unbind(2)
    return _attention(
        op, q, k, v, bias, key_mask, is_causal, scale, dropout_p, return_lse, backend, packed=packed
    )


def attention_varlen(
    q: Tensor,  # [Tq, H, D]
    k: Tensor,  # [Tk, Hk, D]
    v: Tensor,  # [Tk, Hk, Dv]
    cu_seqlens_q: Tensor,  # [B+1]
    cu_seqlens_k: Tensor,  # [B+1]
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`out[q0:q1] = attention(q[q0:q1], k[k0:k1], v[k0:k1])` for each of B sequences packed end to end.

    Sequence b has the queries from `q0 = cu_seqlens_q[b]` to `q1 = cu_seqlens_q[b+1]`, and keys likewise.
    Nothing is read back from a GPU; on the CPU the values of the boundaries are checked.

    Args:
        q: queries `[Tq, H, D]`, float16, bfloat16, float32 or float64.
        k: keys `[Tk, Hk, D]`; Hk divides H.
        v: values `[Tk, Hk, Dv]`.
        cu_seqlens_q: int32 or int64 `[B+1]` on q's device, rising from 0 to Tq; equal neighbours: empty.
        cu_seqlens_k: the same for keys. A sequence with queries and no keys gives 0.
        is_causal: within each sequence, aligned to its end.
        scale: factor of the scores; None means `D ** -0.5`.
        dropout_p: probability in [0, 1] with which a weight is dropped, as in `attention`.
        return_lse: also return the log-sum-exp of each query's scores.
        backend: None chooses; "reference", "cpu", "cuda" or "triton" insists.

    Returns:
        `[Tq, H, Dv]`, contiguous, in q's dtype; with `return_lse` a pair, the second float32 `[H, Tq]`.

    Raises:
        TypeError, ValueError: as `attention`; boundaries that do not rise from 0 to the number of tokens are
            a ValueError on the CPU, and on a GPU give NaN.
        NotImplementedError: the named backend cannot serve the call; a second derivative or vmap off the
            reference.

    Gradients reach q, k and v; the boundaries have none.

    Example:
        >>> q, k, v = torch.randn(3, 9, 4, 16).unbind(0)
        >>> ends = torch.tensor([0, 5, 5, 9])
        >>> vk.attention_varlen(q, k, v, ends, ends).shape
        torch.Size([9, 4, 16])
    """
    op = "attention_varlen"
    q, k, v = _operands(op, q, k, v)
    _check.attention(op, q, k, v, layout="[T, H, D]")
    _check.cu_seqlens(op, q, k, cu_seqlens_q, cu_seqlens_k)
    _check_options(op, is_causal, scale, dropout_p, return_lse)
    scores = q.shape[1] * q.shape[0] * k.shape[0]
    if _check.readable(cu_seqlens_q) and _check.readable(cu_seqlens_k):
        ends_q = _check.boundaries(op, "cu_seqlens_q", cu_seqlens_q, q.shape[0])
        ends_k = _check.boundaries(op, "cu_seqlens_k", cu_seqlens_k, k.shape[0])
        pairs = zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False)
        scores = q.shape[1] * sum((q1 - q0) * (k1 - k0) for q0, q1, k0, k1 in pairs)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    with no_autocast(q.device.type):
        call = _call(q, k, v, None, None, is_causal, dropout_p, return_lse, scores)
        name = dispatch.choose(op, call, backend)
        seed = _seed(dropout_p, q.device)
        if name == "reference":
            options: dict[str, Any] = {
                "is_causal": is_causal,
                "scale": scale,
                "dropout_p": dropout_p,
                "seed": seed,
            }
            out, lse = reference.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
        else:
            out, lse = ops.attention_varlen(
                q, k, v, cu_seqlens_q, cu_seqlens_k, seed, is_causal, scale, dropout_p, name
            )
    return (out, lse) if return_lse else out


def scaled_dot_product_attention(
    query: Tensor,  # [B, H, L, D]
    key: Tensor,  # [B, Hk, S, D]
    value: Tensor,  # [B, Hk, S, Dv]
    attn_mask: Tensor | None = None,  # broadcastable to [B, H, L, S]
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`dropout(softmax(scale * query @ key^T + attn_mask)) @ value`, torch's signature, heads before length.

    A drop-in for `torch.nn.functional.scaled_dot_product_attention`, with its conventions: `is_causal` aligns
    to the start (query i sees keys `j <= i`), and a bool mask means True = attend. Queries without a key give
    0.

    Args:
        query: `[B, H, L, D]`; fewer or more leading dimensions as torch takes them.
        key: `[B, Hk, S, D]`; Hk = H unless `enable_gqa`.
        value: `[B, Hk, S, Dv]`.
        attn_mask: bool, or floating in query's dtype or float32; broadcastable to `[B, H, L, S]`.
        dropout_p: probability in [0, 1] with which a weight is dropped.
        is_causal: causal mask aligned to the start; excludes `attn_mask`.
        scale: factor of the scores; None means `D ** -0.5`.
        enable_gqa: allow Hk to divide H.

    Returns:
        `[B, H, L, Dv]` in query's dtype.

    Raises:
        TypeError: dtypes that do not fit.
        ValueError: shapes or devices that do not fit, `attn_mask` together with `is_causal`, Hk other than H
            without `enable_gqa`.

    Gradients reach query, key, value and a floating attn_mask.

    Example:
        >>> q, k, v = torch.randn(3, 2, 8, 77, 64).unbind(0)
        >>> vk.scaled_dot_product_attention(q, k, v, is_causal=True).shape
        torch.Size([2, 8, 77, 64])
    """
    op = "scaled_dot_product_attention"
    for name, x in (("query", query), ("key", key), ("value", value)):
        _check.floating(op, name, x)
        if x.ndim < 2 or x.ndim != query.ndim:
            raise ValueError(
                f"vk.{op}: query, key and value must have the same number of dimensions, at least 2 "
                f"({_check.shapes(query=query, key=key, value=value)})"
            )
    _check.flag(op, "is_causal", is_causal)
    leading = query.shape[:-2]
    if not enable_gqa and not leading == key.shape[:-2] == value.shape[:-2]:
        raise ValueError(
            f"vk.{op}: query, key and value must agree in all but the last two dimensions, unless enable_gqa "
            f"allows fewer key heads ({_check.shapes(query=query, key=key, value=value)})"
        )
    if attn_mask is not None and is_causal:
        raise ValueError(
            f"vk.{op}: attn_mask and is_causal exclude each other; add the causal mask to attn_mask"
        )

    L, S = query.shape[-2], key.shape[-2]
    q, k, v = (with_heads(x).transpose(1, 2) for x in (query, key, value))
    bias = key_mask = None
    if attn_mask is not None:
        bias, key_mask = _split_mask(op, attn_mask, query, S)
    elif is_causal and L < S:
        # no query sees the keys past its own length: without them, start and end are aligned alike
        k, v = k[:, :L], v[:, :L]
    elif is_causal and L > S:
        # so they are for the first S queries; the others see every key
        parts = (
            _attention(op, part, k, v, None, None, causal, scale, dropout_p, False, None)
            for part, causal in ((q[:, :S], True), (q[:, S:], False))
        )
        return torch.cat([*parts], 1).transpose(1, 2).reshape(*leading, L, value.shape[-1])
    out = _attention(op, q, k, v, bias, key_mask, is_causal, scale, dropout_p, False, None)
    return out.transpose(1, 2).reshape(*leading, L, value.shape[-1])


def _attention(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
    return_lse: bool,
    backend: str | None,
    packed: Tensor | None = None,
) -> Any:
    """Check, choose, call; `op` is the public name that errors speak of, q, k and v may be parts of `packed`."""
    q, k, v = _operands(op, q, k, v)
    _check.attention(op, q, k, v, bias=bias, key_mask=key_mask)
    _check_options(op, is_causal, scale, dropout_p, return_lse)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    with no_autocast(q.device.type):
        scores = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]
        call = _call(q, k, v, bias, key_mask, is_causal, dropout_p, return_lse, scores)
        name = dispatch.choose("attention", call, backend)
        seed = _seed(dropout_p, q.device)
        if name == "reference":
            options: dict[str, Any] = {
                "is_causal": is_causal,
                "scale": scale,
                "dropout_p": dropout_p,
                "seed": seed,
            }
            out, lse = reference.attention(q, k, v, bias=bias, key_mask=key_mask, **options)
        elif name in (_attention_library.FLASH, _attention_library.CUDNN):
            return _attention_library.forward(name, q, k, v, is_causal, scale)
        elif packed is not None:
            out, lse = ops.attention_qkvpacked(
                packed, bias, key_mask, seed, is_causal, scale, dropout_p, name
            )
        else:
            out, lse = ops.attention(q, k, v, bias, key_mask, seed, is_causal, scale, dropout_p, name)
    return (out, lse) if return_lse else out


def _operands(op: str, q: Any, k: Any, v: Any) -> tuple[Tensor, Tensor, Tensor]:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check.floating(op, name, x)
    return follow_autocast(q, k, v)  # type: ignore[return-value]


def _check_options(op: str, is_causal: Any, scale: Any, dropout_p: Any, return_lse: Any) -> None:
    _check.flag(op, "is_causal", is_causal)
    _check.flag(op, "return_lse", return_lse)
    _check.probability(op, "dropout_p", dropout_p)
    if scale is not None:
        _check.number(op, "scale", scale)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    return_lse: bool,
    scores: int,
) -> dispatch.Call:
    facts = {
        "head_dim": q.shape[-1],
        "value_dim": v.shape[-1],
        "heads": q.shape[-2],
        "key_heads": k.shape[-2],
        "queries": q.shape[-3],
        "keys": k.shape[-3],
        "dense_last": q.stride(-1) == 1 and k.stride(-1) == 1 and v.stride(-1) == 1,
        "bias": bias is not None,
        "bias_grad": bias is not None and bias.requires_grad,
        "key_mask": key_mask is not None,
        "is_causal": is_causal,
        "dropout": dropout_p > 0.0,
        "return_lse": return_lse,
        "gradient": any(wants_gradients(q, k, v, bias)),
    }
    return dispatch.Call(q.device.type, q.dtype, facts, scores * max(q.element_size(), 4))


def _seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """Seed of this call's dropout mask, from torch's generator and on its device: nothing is read back."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device) if dropout_p > 0.0 else None


def attention_backend(
    q: Tensor,  # [B, Lq, H, D]
    k: Tensor,  # [B, Lk, Hk, D]
    v: Tensor,  # [B, Lk, Hk, Dv]
    *,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> str:
    """Name of the backend that `attention` would choose for these arguments, for those who have another answer at hand.

    Runs nothing, checks nothing and warns of nothing.

    Args:
        q, k, v, bias, key_mask, is_causal, dropout_p, return_lse: as for `attention`.

    Returns:
        "cpu", "cuda", "triton", an internal choice such as "torch", or "reference" where no kernel serves the call.
    """
    q, k, v = cast("tuple[Tensor, Tensor, Tensor]", follow_autocast(q, k, v))
    # No product size: the dispatcher would warn of a reference that is not going to run.
    call = _call(q, k, v, bias, key_mask, is_causal, dropout_p, return_lse, 0)
    return dispatch.choose("attention", call, None)


def with_heads(x: Tensor) -> Tensor:
    """Any number of dimensions as `[B, H, L, D]`: missing ones added, further ones flattened into B."""
    return x.flatten(0, -4) if x.ndim > 4 else x[(None,) * (4 - x.ndim)]


def _split_mask(op: str, mask: Any, query: Tensor, keys: int) -> tuple[Tensor | None, Tensor | None]:
    """torch's attn_mask as (bias, key_mask): bool over keys alone stays a mask, everything else is added."""
    _check.tensor(op, "attn_mask", mask)
    full = (*query.shape[:-1], keys)
    missing = len(full) - mask.ndim
    if missing < 0 or any(m not in (1, f) for m, f in zip(mask.shape, full[missing:], strict=True)):
        raise ValueError(f"vk.{op}: attn_mask must broadcast to {list(full)}, got {_check.describe(mask)}")
    aligned = mask[(None,) * max(missing, 4 - mask.ndim)]
    if aligned.ndim > 4:
        aligned = aligned.expand(full).flatten(0, -4)
    queries = query.shape[-2]
    if mask.dtype == torch.bool:
        if aligned.shape[1] == aligned.shape[2] == 1:
            return None, aligned[:, 0, 0].expand(with_heads(query).shape[0], keys)
        aligned = _as_bias(aligned, query.dtype)
    return aligned.expand(*aligned.shape[:2], queries, keys), None


def _as_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible and -inf elsewhere, in the dtype of the sums over tensors of `dtype`."""
    zeros = torch.zeros(visible.shape, dtype=torch.promote_types(dtype, torch.float32), device=visible.device)
    return zeros.masked_fill(~visible, float("-inf"))
