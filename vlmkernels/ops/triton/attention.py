# SPDX-License-Identifier: Apache-2.0
"""Attention on Triton: what a call brings, which kernels it takes, their arguments.

The kernels: `attention_forward.py`, `attention_backward.py`, `attention_whole.py`; what they share is in
`attention_tiles.py`. A forward is one launch, and two where keys are masked (a list of the blocks of keys that are
visible). A backward is one launch for short heads, else two, and one more where the bias wants a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _tables_attention  # noqa: F401  puts its rows into the tables
from ._launch import cdiv, float32_precision, launch, tile_of
from ._tables import Tile
from .attention_backward import attention_by_keys_kernel, attention_by_queries_kernel
from .attention_forward import attention_forward_kernel
from .attention_tiles import visible_blocks_kernel
from .attention_whole import attention_bias_kernel, attention_whole_kernel

#: Elements of 16 bits that a 16-byte load takes; what strides are counted in where all of them allow it.
VECTOR = 8
SMALLEST_TILE = 16
#: Heads wider than twice this are padded to a power of two.
WIDEST_CUT = 64
#: Blocks of the list of visible blocks that its kernel looks at at a time.
LISTED_AT_ONCE = 16

Strides = tuple[int, ...]
_NO_STRIDES: Strides = (0, 0, 0, 0)


@dataclass
class AttentionCall:
    """A checked call: `[B, L, H, D]` tensors, or `[T, H, D]` with `cu_seqlens`; `seed` where there is dropout."""

    q: Tensor
    k: Tensor
    v: Tensor
    is_causal: bool
    scale: float
    dropout_p: float
    seed: Tensor | None
    bias: Tensor | None = None
    key_mask: Tensor | None = None
    cu_seqlens: tuple[Tensor, Tensor] | None = None

    @property
    def batch(self) -> int:
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens[0].shape[0] - 1

    @property
    def factor(self) -> float:
        """What a product of query and key is multiplied by: scores of 16-bit operands are in base 2."""
        return self.scale if self.q.dtype == torch.float32 else self.scale * math.log2(math.e)

    @property
    def empty(self) -> bool:
        """No query, or no key: nothing for a kernel to do."""
        return self.q.shape[-3] == 0 or self.k.shape[-3] == 0 or self.q.numel() == 0 or self.v.numel() == 0


def parts(width: int) -> tuple[int, int]:
    """A head's width as two tiles, the second 0 where a cut saves nothing: 72 = 64 + 16, 96 = 64 + 32, 112 -> 128.

    Of the widths that 8 divides, those that are cut are 40, 48, 72, 80, 88 and 96. Above 128 two sums of such parts no
    longer fit the registers beside the scores, and the width is padded to 256.
    """
    first = max(SMALLEST_TILE, 1 << (width.bit_length() - 1))
    rest = width - first
    if rest <= 0:
        return first, 0
    second = max(SMALLEST_TILE, 1 << (rest - 1).bit_length())
    return (first, second) if second < first <= WIDEST_CUT else (2 * first, 0)


def forward(call: AttentionCall, out: Tensor, lse: Tensor) -> None:
    """Fills out (contiguous, q's dtype) and lse (contiguous float32)."""
    if call.empty:
        out.zero_()
        lse.fill_(-math.inf)
        _mark_invalid(call, out, lse)
        return
    tile = _tile("attention_forward", call)
    unit = _unit(call.q, call.k, call.v, out)
    listed, before, key_blocks = _visible_blocks(call, tile)
    blocks = _blocks(call, tile["ROWS"], of_keys=False)
    launch(
        attention_forward_kernel,
        blocks * call.q.shape[-2] * _entries(call),
        call.q,
        call.k,
        call.v,
        out,
        lse,
        call.bias,
        _bytes(call.key_mask),
        listed,
        before,
        *_boundaries(call),
        call.seed,
        *(_strides(x, unit) for x in (call.q, call.k, call.v, out)),
        _lse_strides(lse),
        _bias_strides(call.bias),
        _mask_strides(call.key_mask),
        blocks,
        key_blocks,
        *_sizes(call),
        call.factor,
        *_dropout(call),
        tile=tile,
        TAIL=_tail(call, tile["KEYS"]),
        **_constants(call, unit, tile),
    )


def backward(
    call: AttentionCall,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grads: Sequence[Tensor | None],
    grad_bias: Tensor | None = None,
) -> None:
    """Fills the gradients of q, k and v that are not None, through any strides, and that of the bias, contiguous."""
    wanted = [g for g in (*grads, grad_bias) if g is not None]
    if call.empty:
        for grad in wanted:
            grad.zero_()
            _mark_invalid(call, grad)
        return
    if not wanted:
        return
    if grad_out.stride(-1) != 1:
        # an expanded gradient, as `out.sum()` sends back
        grad_out = grad_out.contiguous()
    whole = grad_bias is None and _whole_tile(call)
    if whole:
        _backward_whole(call, whole, out, lse, grad_out, grad_lse, grads)
        return
    delta = torch.empty_like(lse)
    _backward_by_queries(call, out, lse, grad_out, grad_lse, delta, grads[0])
    if grads[1] is not None or grads[2] is not None:
        # both or neither: they share all but one product
        grad_k = torch.empty_like(call.k) if grads[1] is None else grads[1]
        grad_v = torch.empty_like(call.v) if grads[2] is None else grads[2]
        _backward_by_keys(call, lse, grad_out, delta, grad_k, grad_v)
    if grad_bias is not None:
        _backward_bias(call, lse, grad_out, delta, grad_bias)


def _backward_by_queries(
    call: AttentionCall,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    delta: Tensor,
    grad_q: Tensor | None,
) -> None:
    tile = _tile("attention_by_queries", call)
    unit = _unit(call.q, call.k, call.v, out, grad_out, grad_q)
    listed, before, key_blocks = _visible_blocks(call, tile)
    blocks = _blocks(call, tile["ROWS"], of_keys=False)
    launch(
        attention_by_queries_kernel,
        blocks * call.q.shape[-2] * _entries(call),
        call.q,
        call.k,
        call.v,
        out,
        grad_out,
        lse,
        grad_lse,
        delta,
        grad_q,
        call.bias,
        _bytes(call.key_mask),
        listed,
        before,
        *_boundaries(call),
        call.seed,
        *(_strides(x, unit) for x in (call.q, call.k, call.v, out, grad_out, grad_q)),
        _lse_strides(lse),
        _grad_lse_strides(grad_lse),
        _bias_strides(call.bias),
        _mask_strides(call.key_mask),
        blocks,
        key_blocks,
        *_sizes(call),
        call.scale,
        call.factor,
        *_dropout(call),
        tile=tile,
        TAIL=_tail(call, tile["KEYS"]),
        **_constants(call, unit, tile),
    )


def _backward_by_keys(
    call: AttentionCall, lse: Tensor, grad_out: Tensor, delta: Tensor, grad_k: Tensor, grad_v: Tensor
) -> None:
    tile = _tile("attention_by_keys", call)
    unit = _unit(call.q, call.k, call.v, grad_out, grad_k, grad_v)
    blocks = _blocks(call, tile["KEYS"], of_keys=True)
    _, batch, Lq, Lk = _sizes(call)
    launch(
        attention_by_keys_kernel,
        blocks * call.k.shape[-2] * _entries(call),
        call.q,
        call.k,
        call.v,
        grad_out,
        lse,
        delta,
        grad_k,
        grad_v,
        call.bias,
        _bytes(call.key_mask),
        *_boundaries(call),
        call.seed,
        *(_strides(x, unit) for x in (call.q, call.k, call.v, grad_out, grad_k, grad_v)),
        _lse_strides(lse),
        _bias_strides(call.bias),
        _mask_strides(call.key_mask),
        blocks,
        call.k.shape[-2],
        batch,
        Lq,
        Lk,
        call.scale,
        call.factor,
        *_dropout(call),
        tile=tile,
        **_constants(call, unit, tile),
    )


def _backward_whole(
    call: AttentionCall,
    tile: Tile,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grads: Sequence[Tensor | None],
) -> None:
    unit = _unit(call.q, call.k, call.v, out, grad_out, *grads)
    listed, before, key_blocks = _visible_blocks(call, tile)
    heads, batch, Lq, Lk = _sizes(call)
    launch(
        attention_whole_kernel,
        batch * heads,
        call.q,
        call.k,
        call.v,
        out,
        grad_out,
        lse,
        grad_lse,
        *grads,
        call.bias,
        _bytes(call.key_mask),
        listed,
        before,
        call.seed,
        *(_strides(x, unit) for x in (call.q, call.k, call.v, out, grad_out, *grads)),
        _lse_strides(lse),
        _grad_lse_strides(grad_lse),
        _bias_strides(call.bias),
        _mask_strides(call.key_mask),
        key_blocks or cdiv(Lk, tile["KEYS"]),
        heads,
        Lq,
        Lk,
        call.scale,
        call.factor,
        *_dropout(call),
        tile=tile,
        MORE=_more(tile) if Lq > tile["ROWS"] else 0,
        **_constants(call, unit, tile, grouped=False),
    )


def _backward_bias(
    call: AttentionCall, lse: Tensor, grad_out: Tensor, delta: Tensor, grad_bias: Tensor
) -> None:
    tile = _tile("attention_bias", call)
    unit = _unit(call.q, call.k, call.v, grad_out)
    heads, batch, Lq, Lk = _sizes(call)
    row_blocks, key_blocks = cdiv(Lq, tile["ROWS"]), cdiv(Lk, tile["KEYS"])
    bias_batch, bias_heads = grad_bias.shape[:2]
    launch(
        attention_bias_kernel,
        row_blocks * key_blocks * bias_batch * bias_heads,
        call.q,
        call.k,
        call.v,
        grad_out,
        lse,
        delta,
        grad_bias,
        call.bias,
        _bytes(call.key_mask),
        call.seed,
        *(_strides(x, unit) for x in (call.q, call.k, call.v, grad_out)),
        _lse_strides(lse),
        _bias_strides(call.bias),
        _mask_strides(call.key_mask),
        row_blocks,
        key_blocks,
        bias_heads,
        batch // bias_batch,
        heads // bias_heads,
        Lq,
        Lk,
        call.factor,
        *_dropout(call),
        tile=tile,
        **_constants(call, unit, tile),
    )


# Arguments.


def _tile(kernel: str, call: AttentionCall) -> Tile:
    """The kernel's tile for heads of this width (the wider one, as padded) and length (0: the device alone knows)."""
    width = max(sum(parts(call.q.shape[-1])), sum(parts(call.v.shape[-1])))
    rows = 0 if call.cu_seqlens is not None else call.q.shape[1]
    return tile_of(kernel, call.q, call.q.dtype, width=width, rows=rows)


def _whole_tile(call: AttentionCall) -> Tile | None:
    """The tile of the kernel that holds a whole head of queries, None where they do not fit."""
    grouped = call.q.shape[-2] != call.k.shape[-2]
    if call.cu_seqlens is not None or grouped:
        return None
    tile = _tile("attention_whole", call)
    return tile if call.q.shape[1] <= tile["ROWS"] + _more(tile) else None


def _constants(call: AttentionCall, unit: int, tile: Tile, *, grouped: bool = True) -> dict[str, Any]:
    d1, d2 = parts(call.q.shape[-1])
    v1, v2 = parts(call.v.shape[-1])
    group = {"GROUP": call.q.shape[-2] // call.k.shape[-2]} if grouped else {}
    precision = float32_precision() if call.q.dtype == torch.float32 else "ieee"
    return group | {
        "D": call.q.shape[-1],
        "D1": d1,
        "D2": d2,
        "DV": call.v.shape[-1],
        "V1": v1,
        "V2": v2,
        "UNIT": unit,
        "CAUSAL": call.is_causal,
        "STAGES": tile.stages,
        "PRECISION": precision,
    }


def _entries(call: AttentionCall) -> int:
    """Batch entries that have programs of their own; packed sequences share the slots of one."""
    return 1 if call.cu_seqlens is not None else call.batch


def _sizes(call: AttentionCall) -> tuple[int, int, int, int]:
    """H, batch, Lq and Lk; packed, Lq and Lk count all tokens."""
    return call.q.shape[-2], call.batch, call.q.shape[-3], call.k.shape[-3]


def _blocks(call: AttentionCall, block: int, *, of_keys: bool) -> int:
    """Blocks of rows per head; packed, the slots among which every sequence finds its own (`sequence_of`)."""
    length = call.k.shape[-3] if of_keys else call.q.shape[-3]
    return cdiv(length, block) if call.cu_seqlens is None else length // block + call.batch


def _tail(call: AttentionCall, block: int) -> int:
    """Keys of the block behind the whole ones: as many as there are, where the host knows it and no mask intervenes."""
    rest = 0 if call.cu_seqlens is not None or call.is_causal else call.k.shape[1] % block
    return max(SMALLEST_TILE, 1 << (rest - 1).bit_length()) if rest else block


def _more(tile: Tile) -> int:
    """Rows of the second tile of queries of the whole-head kernel, where one is needed."""
    return max(SMALLEST_TILE, tile["ROWS"] // 8)


def _visible_blocks(call: AttentionCall, tile: Tile) -> tuple[Tensor | None, Tensor | None, int]:
    """The lists that `visible_blocks_kernel` makes, and how many blocks there are; None without a key mask."""
    mask = call.key_mask
    if mask is None:
        return None, None, 0
    batch, keys = mask.shape
    blocks = cdiv(keys, tile["KEYS"])
    listed = torch.empty(batch, blocks, dtype=torch.int32, device=mask.device)
    before = torch.empty(batch, blocks + 1, dtype=torch.int32, device=mask.device)
    launch(
        visible_blocks_kernel,
        batch,
        _bytes(mask),
        _mask_strides(mask),
        blocks,
        keys,
        listed,
        before,
        tile=Tile({"BLOCK": tile["KEYS"], "CHUNK": LISTED_AT_ONCE}),
    )
    return listed, before, blocks


def _unit(*tensors: Tensor | None) -> int:
    """What strides are counted in: VECTOR where columns are dense and all other strides allow it."""
    for x in tensors:
        if x is not None and (x.stride(-1) != 1 or any(step % VECTOR for step in _steps(x)[:3])):
            return 1
    return VECTOR


def _strides(x: Tensor | None, unit: int) -> Strides:
    if x is None:
        return _NO_STRIDES
    *steps, column = _steps(x)
    return (*(step // unit for step in steps), column)


def _steps(x: Tensor) -> Strides:
    """Batch (0 if packed), row, head and column; 0 where a dimension has one entry, whose stride means nothing."""
    steps = tuple(0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True))
    return (*steps[:-1], x.stride(-1)) if x.ndim == 4 else (0, *steps[:-1], x.stride(-1))


def _lse_strides(lse: Tensor) -> Strides:
    return lse.stride()[:2] if lse.ndim == 3 else (0, lse.stride(0))


def _grad_lse_strides(grad: Tensor | None) -> Strides:
    if grad is None:
        return (0, 0, 0)
    return grad.stride() if grad.ndim == 3 else (0, *grad.stride())


def _bias_strides(bias: Tensor | None) -> Strides:
    if bias is None:
        return _NO_STRIDES
    return tuple(0 if size == 1 else step for size, step in zip(bias.shape, bias.stride(), strict=True))


def _mask_strides(mask: Tensor | None) -> Strides:
    return (0, 0) if mask is None else mask.stride()


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


def _boundaries(call: AttentionCall) -> tuple[Tensor | None, Tensor | None]:
    if call.cu_seqlens is None:
        return None, None
    return call.cu_seqlens[0].contiguous(), call.cu_seqlens[1].contiguous()


def _dropout(call: AttentionCall) -> tuple[int, float]:
    """(smallest word that keeps a weight, factor of the kept ones)."""
    if call.seed is None:
        return 0, 1.0
    threshold = round(call.dropout_p * 2**32)
    if threshold == 2**32:  # no word is so large
        return 0, 0.0
    return threshold, 1.0 / (1.0 - call.dropout_p)


def _mark_invalid(call: AttentionCall, *results: Tensor) -> None:
    """NaN where boundaries are no boundaries, for calls without a kernel that would find it out."""
    if call.cu_seqlens is None:
        return
    valid = torch.ones((), dtype=torch.bool, device=call.q.device)
    for ends, tokens in zip(call.cu_seqlens, (call.q.shape[0], call.k.shape[0]), strict=True):
        valid = valid & (ends[0] == 0) & (ends[-1] == tokens) & (ends.diff() >= 0).all()
    for result in results:
        result.masked_fill_(~valid, math.nan)
