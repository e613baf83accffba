# SPDX-License-Identifier: Apache-2.0
"""Attention in plain PyTorch: the definition that every backend is tested against.

Half types are widened to float32 first; float64 stays float64. Any order of derivative, any torch.func
transform.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmkernels.ops import _check

_MASK32 = 0xFFFFFFFF
# Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), Philox4x32: multipliers and key
# increments.
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10


def attention(
    q: Tensor,  # [B, Lq, H, D]
    k: Tensor,  # [B, Lk, Hk, D], Hk divides H
    v: Tensor,  # [B, Lk, Hk, Dv]
    *,
    scale: float,
    bias: Tensor | None = None,  # [B|1, H|1, Lq, Lk]
    key_mask: Tensor | None = None,  # [B, Lk], True = attend
    is_causal: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,  # int64 [1], None: no dropout
    first_batch: int = 0,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """`out = dropout(softmax(s)) v`, `lse = logsumexp(s)` with `s = scale q k^T + bias`; no key: 0, -inf.

    Vaswani et al., "Attention is all you need" (2017), equation 1. Arguments are taken as checked.

    Args:
        first_batch: what dropout counts the first batch entry as (a packed batch is computed sequence by
            sequence).
        return_lse: False spares the pass over the scores that lse costs; an empty tensor takes its place.

    Returns:
        out `[B, Lq, H, Dv]` contiguous in q's dtype; lse `[B, H, Lq]` in the dtype of the sums, -inf without
        a key.
    """
    B, Lq, H, _ = q.shape
    Lk, Hk = k.shape[1:3]
    sums = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = (x.to(sums).transpose(1, 2) for x in (q, k, v))  # heads before length
    if Hk != H:
        # stacking the query heads of a key head along the length would spare this copy, and double the rounding
        # error of the gradients: they would be one long sum instead of a sum of H / Hk short ones
        keys, values = (x.repeat_interleave(H // Hk, dim=1) for x in (keys, values))

    scores = (queries * scale) @ keys.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias.to(sums)
    visible = _visible(Lq, Lk, key_mask, is_causal, q.device)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))

    no_key = None
    if Lk == 0 or bias is not None or key_mask is not None or (is_causal and Lq > Lk):
        no_key = (scores == float("-inf")).all(-1, keepdim=True)
        scores = scores.masked_fill(no_key, 0.0)
    weights = scores.softmax(-1)
    lse = scores.logsumexp(-1) if return_lse else scores.new_empty(0)
    if seed is not None:
        keep = dropout_mask(seed, B, H, Lq, Lk, dropout_p, first_batch)
        weights = weights * keep * (0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p))

    out = weights @ values
    if no_key is not None:
        out = out.masked_fill(no_key, 0.0)
        lse = lse.masked_fill(no_key.squeeze(-1), float("-inf")) if return_lse else lse
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse


def attention_varlen(
    q: Tensor,  # [Tq, H, D]
    k: Tensor,  # [Tk, Hk, D]
    v: Tensor,  # [Tk, Hk, Dv]
    cu_seqlens_q: Tensor,  # [B+1]
    cu_seqlens_k: Tensor,  # [B+1]
    *,
    scale: float,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """`attention` of each sequence by itself: sequence b has the queries `cu_seqlens_q[b]:cu_seqlens_q[b+1]`.

    Where the boundaries can be read (CPU, outside a compiler), sequence by sequence; elsewhere as one
    attention over all tokens in which a query sees its own sequence only, which costs O(Tq x Tk) but reads
    nothing back to the host (and where a NaN or an infinity in v reaches every query, since zero times it is
    NaN).

    Returns:
        out `[Tq, H, Dv]` contiguous in q's dtype; lse `[H, Tq]`. NaN everywhere where the boundaries are no
        boundaries and could not be checked.
    """
    if not (_check.readable(cu_seqlens_q) and _check.readable(cu_seqlens_k)):
        return _attention_varlen_masked(
            q, k, v, cu_seqlens_q, cu_seqlens_k, scale, is_causal, dropout_p, seed
        )
    bounds_q = _check.boundaries("attention_varlen", "cu_seqlens_q", cu_seqlens_q, q.shape[0])
    bounds_k = _check.boundaries("attention_varlen", "cu_seqlens_k", cu_seqlens_k, k.shape[0])
    places = list(zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False)) or [(0, 0, 0, 0)]
    parts = [
        attention(
            q[None, q0:q1],
            k[None, k0:k1],
            v[None, k0:k1],
            scale=scale,
            is_causal=is_causal,
            dropout_p=dropout_p,
            seed=seed,
            first_batch=b,
            return_lse=return_lse,
        )
        for b, (q0, q1, k0, k1) in enumerate(places)
    ]
    lse = torch.cat([lse[0] for _, lse in parts], -1) if return_lse else parts[0][1]
    return torch.cat([out[0] for out, _ in parts]), lse


def _attention_varlen_masked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    is_causal: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    H, Hk = q.shape[1], k.shape[1]
    sums = torch.promote_types(q.dtype, torch.float32)
    sequence_q, position_q, valid_q = _places(cu_seqlens_q, q.shape[0])
    sequence_k, position_k, valid_k = _places(cu_seqlens_k, k.shape[0])

    visible = sequence_q[:, None] == sequence_k[None, :]
    if is_causal:
        lengths_q, lengths_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()
        # the last query of a sequence sees its last key
        shift = (
            (lengths_k - lengths_q)[sequence_q] if cu_seqlens_q.shape[0] > 1 else torch.zeros_like(position_q)
        )
        visible = visible & (position_k[None, :] <= (position_q + shift)[:, None])

    queries, keys, values = (x.to(sums).transpose(0, 1) for x in (q, k, v))  # [H, T, D]
    if Hk != H:
        keys, values = (x.repeat_interleave(H // Hk, dim=0) for x in (keys, values))
    scores = (queries * scale) @ keys.transpose(-1, -2)
    scores = scores.masked_fill(~visible, float("-inf"))
    no_key = ~visible.any(-1, keepdim=True)
    scores = scores.masked_fill(no_key, 0.0)
    weights = scores.softmax(-1).masked_fill(~visible, 0.0)
    lse = scores.logsumexp(-1).masked_fill(no_key.squeeze(-1), float("-inf"))
    if seed is not None:
        heads = torch.arange(H, device=q.device)[:, None, None]
        keep = _keep(seed, sequence_q[:, None], heads, position_q[:, None], position_k[None, :], dropout_p)
        weights = weights * keep * (0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p))
    out = (weights @ values).transpose(0, 1)

    valid = valid_q & valid_k
    out = torch.where(valid, out, float("nan"))
    lse = torch.where(valid, lse, float("nan"))
    return out.to(q.dtype).contiguous(), lse


def dropout_mask(
    seed: Tensor,  # int64 [1]
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    dropout_p: float,
    first_batch: int = 0,
) -> Tensor:
    """The attention weights that dropout keeps, True = keep, `[batch, heads, queries, keys]`.

    Weight (b, h, i, j) is kept where word `j % 4` of `philox(key=seed, counter=(j // 4, i, h, b))` is at
    least `round(dropout_p 2^32)`. It depends on nothing else, so every kernel and every backward can make the
    same mask.
    """
    b, h, i, j = (torch.arange(n, device=seed.device) for n in (batch, heads, queries, keys))
    words = philox(seed, (b + first_batch)[:, None, None, None], h[:, None, None], i[:, None], j[::4] // 4)
    mask = torch.stack(words, dim=-1).flatten(-2)[..., :keys]
    return mask >= _threshold(dropout_p)


def _keep(seed: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, dropout_p: float) -> Tensor:
    """`dropout_mask` at arbitrary, broadcast positions."""
    words = torch.stack(philox(seed, b, h, i, j // 4), dim=-1)
    word = (j % 4).expand(words.shape[:-1])[..., None]
    return words.gather(-1, word).squeeze(-1) >= _threshold(dropout_p)


def _threshold(dropout_p: float) -> int:
    return round(dropout_p * 2**32)


def philox(
    seed: Tensor, b: Tensor, h: Tensor, i: Tensor, block: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011): four words for the counter `(block, i, h, b)` under a 64-bit seed.

    Words are uint32 values in int64 tensors: products wrap at 64 bits and lose nothing that the masks below
    keep.
    """
    key0, key1 = seed & _MASK32, (seed >> 32) & _MASK32
    c0, c1, c2, c3 = torch.broadcast_tensors(block.long(), i.long(), h.long(), b.long())
    for _ in range(_PHILOX_ROUNDS):
        product0, product1 = c0 * _PHILOX_MULTIPLIERS[0], c2 * _PHILOX_MULTIPLIERS[1]
        high0, low0 = (product0 >> 32) & _MASK32, product0 & _MASK32
        high1, low1 = (product1 >> 32) & _MASK32, product1 & _MASK32
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _PHILOX_WEYL[0]) & _MASK32, (key1 + _PHILOX_WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def _visible(
    queries: int, keys: int, key_mask: Tensor | None, is_causal: bool, device: torch.device
) -> Tensor | None:
    """Which keys a query may see, broadcastable to `[B, H, Lq, Lk]`; None where it may see all."""
    visible = None if key_mask is None else key_mask[:, None, None, :]
    if is_causal:
        # aligned to the end: the last query sees every key
        causal = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        visible = causal if visible is None else visible & causal
    return visible


def _places(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sequence of each token, its position there, and whether the boundaries are valid (a 0-d bool)."""
    cu_seqlens = cu_seqlens.long()
    token = torch.arange(tokens, device=cu_seqlens.device)
    sequences = cu_seqlens.shape[0] - 1
    valid = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & (cu_seqlens.diff() >= 0).all()
    # of several boundaries at one place the last one opens the sequence that the token is in; the others are
    # empty
    sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1
    sequence = sequence.clamp(0, max(sequences - 1, 0))
    return sequence, token - cu_seqlens[sequence], valid
