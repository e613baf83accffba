# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend of attention: what it refuses, and how the registered ops reach its kernels.

bfloat16 and float16, sums in float32, head dims that are multiples of 8 up to 128. Below some 288 tokens a block
takes a whole head and backward is one kernel; above, keys stream and it is two. Equal bits on every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmkernels import _native
from vlmkernels.ops import dispatch, measured

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 128
_VECTOR_BYTES = 16


def reasons(call: dispatch.Call) -> list[str]:
    """Why the kernels cannot serve a call; this is the whole list of refusals."""
    if _native.cuda_reason is not None:
        return [_native.cuda_reason]
    against = []
    if call.device != _native.CUDA_DEVICE:
        against.append(f"it serves cuda tensors, not {call.device}")
    if call.dtype not in DTYPES:
        against.append(f"it computes in bfloat16 and float16, not {call.dtype}")
    head_dim = call.facts["head_dim"]
    if head_dim % 8 != 0 or not 0 < head_dim <= MAX_HEAD_DIM:
        against.append(f"head dims are multiples of 8 up to {MAX_HEAD_DIM}, not {head_dim}")
    if call.facts["value_dim"] != head_dim:
        against.append(f"values are as wide as keys ({head_dim}), not {call.facts['value_dim']}")
    if call.facts["bias_grad"]:
        against.append("it has no gradient of the bias")
    return against


dispatch.register_backend(
    "attention", "cuda", reasons, priority=5, not_default=measured.unless_fastest("attention", "cuda")
)

View = tuple[int, int, int, int]
_NOTHING: View = (0, 0, 0, 0)


def _view(x: Tensor | None) -> View:
    """Address and strides of `[B, L, H, D]`; zeros for None. A dimension of size 1 has no stride."""
    if x is None:
        return _NOTHING
    batch, row, head = (0 if n == 1 else step for n, step in zip(x.shape[:3], x.stride()[:3], strict=True))
    return x.data_ptr(), batch, row, head


def _in_vectors(x: Tensor) -> Tensor:
    """`x` where each row begins at a multiple of 16 bytes and is dense; a copy of other layouts."""
    elements = _VECTOR_BYTES // x.element_size()
    steps = [step for n, step in zip(x.shape[:3], x.stride()[:3], strict=True) if n > 1]
    dense = x.stride(-1) == 1 and all(step % elements == 0 for step in steps)
    if dense and x.data_ptr() % _VECTOR_BYTES == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
) -> Any:
    """The call as the kernels take it; the tensors must outlive it."""
    B, Lq, H, D = q.shape
    sizes = (B, H, k.shape[2], Lq, k.shape[1], D)
    views = (_view(q), _view(k), _view(v), _view(out), lse.data_ptr())
    call = _native.cuda.AttentionCall(sizes, q.dtype == torch.bfloat16, is_causal, scale, *views)
    if bias is not None:
        lead = [0 if n == 1 else step for n, step in zip(bias.shape[:2], bias.stride()[:2], strict=True)]
        call.set_bias(bias.data_ptr(), bias.dtype == torch.float32, *lead, *bias.stride()[2:])
    if key_mask is not None:
        call.set_key_mask(key_mask.data_ptr(), *key_mask.stride())
    if seed is not None:
        keep_scale = 0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p)
        call.set_dropout(seed.data_ptr(), round(dropout_p * 2**32), keep_scale)
    return call


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
) -> None:
    """Fills `out` `[B, Lq, H, D]` and `lse` `[B, H, Lq]`, both contiguous."""
    q, k, v = (_in_vectors(x) for x in (q, k, v))
    call = _call(q, k, v, out, lse, bias, key_mask, seed, is_causal, scale, dropout_p)
    _native.call("attention", _native.cuda.attention_forward, call, *_native.cuda_place(q))


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grads: Sequence[Tensor | None],
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    is_causal: bool,
    scale: float,
    dropout_p: float,
) -> None:
    """Fills `grads`, of q, k and v; None is not wanted. They lie as `_in_vectors` says."""
    q, k, v, grad_out = (_in_vectors(x) for x in (q, k, v, grad_out))
    call = _call(q, k, v, out, lse, bias, key_mask, seed, is_causal, scale, dropout_p)
    row_dots = torch.empty_like(lse)
    of_lse = _NOTHING if grad_lse is None else (grad_lse.data_ptr(), *grad_lse.stride())
    call.set_gradients(_view(grad_out), of_lse, *(_view(g) for g in grads), row_dots.data_ptr())
    _native.call("attention", _native.cuda.attention_backward, call, *_native.cuda_place(q))
