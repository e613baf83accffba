# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend of quantized linear layers: "w8a8", forward; what it refuses, and how calls reach its kernels.

Two kernels: one quantizes rows of x, one multiplies int8 tiles and ends with scales, bias, activation and residual. The
gradient is a product with the dequantized weight, which is torch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkernels import _native
from vlmkernels.ops import _check, dispatch, measured

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Longest rows whose sums of products of codes stay within 32 bits: 127 * 127 * LARGEST_K < 2**31.
LARGEST_K = 131072
_CHUNK = 16
_ACTIVATIONS = {name: number for number, name in enumerate(_check.ACTIVATIONS)}
_NOTHING = (0, 0, 0)


def reasons(call: dispatch.Call) -> list[str]:
    """Why the kernels cannot serve a call; this is the whole list of refusals."""
    if _native.cuda_reason is not None:
        return [_native.cuda_reason]
    against = []
    if call.device != _native.CUDA_DEVICE:
        against.append(f"it serves cuda tensors, not {call.device}")
    if call.facts["scheme"] != "w8a8":
        against.append(f"it multiplies int8 by int8 (w8a8), not {call.facts['scheme']!r}")
    for what in ("x_dtype", "result_dtype"):
        if call.facts[what] not in DTYPES:
            against.append(f"it serves float32, bfloat16 and float16, not {call.facts[what]}")
            break
    if call.facts["inputs"] > LARGEST_K:
        against.append(f"sums of more than {LARGEST_K} int8 products may leave 32 bits")
    return against


dispatch.register_backend(
    "quantized_linear",
    "cuda",
    reasons,
    priority=5,
    not_default=measured.unless_fastest("quantized_linear", "cuda"),
)


def _rows(x: Tensor) -> Tensor:
    """`[..., width]` as `[rows, width]` with dense columns; a view where the layout has one."""
    flat = x.flatten(0, -2) if x.ndim > 1 else x[None]
    return flat if flat.shape[1] <= 1 or flat.stride(1) == 1 else flat.contiguous()


def _argument(x: Tensor | None) -> tuple[int, int, int]:
    """Address, dtype and elements between rows."""
    if x is None:
        return _NOTHING
    return x.data_ptr(), _native.DTYPE_TAGS[x.dtype], x.stride(0)


def _in_chunks(codes: Tensor) -> Tensor:
    """int8 `[N, K]` whose rows are whole 16-byte chunks; a padded copy where K is no multiple of 16."""
    padding = -codes.shape[1] % _CHUNK
    padded = F.pad(codes, (0, padding)) if padding else codes.contiguous()
    return padded if padded.data_ptr() % _CHUNK == 0 else padded.clone()


def quantize_rows(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """int8 codes `[M, K]` of x `[M, K]`, padded with zeros to whole chunks, and float32 scales `[M]`."""
    M, K = x.shape
    codes = x.new_empty((M, K + -K % _CHUNK), dtype=torch.int8)
    scale = x.new_empty(M, dtype=torch.float32)
    static = None if input_scale is None else input_scale.float()
    _native.call(
        "quantized_linear",
        _native.cuda.quantize_rows,
        M,
        K,
        _argument(x),
        _native.address(static),
        codes.data_ptr(),
        codes.shape[1],
        scale.data_ptr(),
        *_native.cuda_place(x),
    )
    return codes, scale


def forward(
    x: Tensor,  # [..., K]
    weight_q: Tensor,  # [N, K]
    scale: Tensor,  # [N]
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    input_scale: Tensor | None,
    out: Tensor,  # [..., N], contiguous
) -> Tensor:
    """Fills `out` and returns it."""
    codes, row_scale = quantize_rows(_rows(x), input_scale)
    weight = _in_chunks(weight_q)
    scale = scale.contiguous()
    bias = None if bias is None else bias.contiguous()
    rows = None if residual is None else _rows(residual)
    call = _native.cuda.QuantizedLinearCall(
        codes.shape[0],
        weight.shape[0],
        codes.shape[1],
        codes.data_ptr(),
        row_scale.data_ptr(),
        weight.data_ptr(),
        scale.data_ptr(),
        _argument(bias),
        _ACTIVATIONS[activation],
        _argument(rows),
        out.data_ptr(),
        _native.DTYPE_TAGS[out.dtype],
    )
    _native.call("quantized_linear", _native.cuda.quantized_linear, call, *_native.cuda_place(x))
    return out
