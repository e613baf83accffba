# SPDX-License-Identifier: Apache-2.0
"""How linear layers, quantized and float, reach the kernels of `_cpu`: what they serve, packed weights, one call."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vlmkernels import _native
from vlmkernels.ops import _check
from vlmkernels.ops.dispatch import Call

#: Numbers of `vk::cpu::WeightKind` in csrc/cpu/quantized.h.
KINDS = {"w8a8": 0, "w8a16": 1, "w4a16": 2, "bf16": 3}
FLOAT_KINDS = {torch.bfloat16: 3, torch.float32: 4}

#: Longest rows whose int8 products cannot leave 32 bits: 127 * 128 * LARGEST_K < 2**31.
LARGEST_K = 131072

#: `vk.linear` packs its weight in every call, which so many rows pay for.
FEWEST_ROWS = 1024
SMALLEST_WIDTH = 512
# read once: a compiler that traces a call cannot look into the extension
_ON_INTEL = _native.cpu_reason is None and "Intel" in _native.cpu.cpu_brand()

_DTYPES = (torch.float32, torch.bfloat16)
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_ACTIVATIONS = {name: number for number, name in enumerate(_check.ACTIVATIONS)}
_ALIGNMENT = 64
_NOTHING = (0, 0, 1, 0, 0, 1)


def reasons(call: Call) -> list[str]:
    """Why the CPU kernels cannot serve a linear layer; shared by `vk.linear` and `vk.quantized_linear`."""
    found = []
    if _native.cpu_reason is not None:
        found.append(f"vlmkernels._cpu is not available: {_native.cpu_reason}")
    if call.device != "cpu":
        found.append(f"it serves cpu tensors, not {call.device}")
    for name in ("x_dtype", "result_dtype"):
        if call.facts[name] not in _DTYPES:
            what = "x" if name == "x_dtype" else "the result"
            found.append(f"it serves float32 and bfloat16, and {what} is {call.facts[name]}")
            break
    return found


def quantized_reasons(call: Call) -> list[str]:
    """Why the CPU kernels cannot serve a quantized linear layer."""
    found = reasons(call)
    scheme = call.facts["scheme"]
    if scheme not in KINDS:
        found.append(f"{scheme!r} is what GPUs multiply; no kernel here does")
    if scheme == "w8a8" and call.facts["inputs"] > LARGEST_K:
        found.append(f"sums of more than {LARGEST_K} int8 products may leave 32 bits")
    if call.facts["scale_dtype"] == torch.float16:
        found.append("it does not read float16 input scales")
    return found


def float_reasons(call: Call) -> list[str]:
    """Why the CPU kernels cannot serve a float linear layer."""
    found = reasons(call)
    if not found and call.dtype not in FLOAT_KINDS:
        found.append(f"products are float32 or bfloat16, not {call.dtype}")
    return found


def not_default(call: Call) -> list[str]:
    """Where torch's own linear layer is the faster one, by benchmarks/bench_quantized.py."""
    facts = call.facts
    if _ON_INTEL:
        return [
            "torch multiplies with the maker's own library on this processor, and nobody has measured the two"
        ]
    if facts["rows"] < FEWEST_ROWS or min(facts["inputs"], facts["outputs"]) < SMALLEST_WIDTH:
        return [f"torch's product is as fast below {FEWEST_ROWS} rows or widths of {SMALLEST_WIDTH}"]
    if facts["gradient"] and (call.dtype != torch.float32 or facts["activation"] is not None):
        return ["torch's backward is faster in bfloat16, and behind an activation, whose input it keeps"]
    return []


def pack(scheme: str, weight_q: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> Tensor | None:
    """The layout that the kernels of this process's instruction set read; None where there is no data to read."""
    if not _check.readable(weight_q):
        return None
    n = weight_q.shape[0]
    k = weight_q.shape[1] * (2 if scheme == "w4a16" else 1)
    group = 0
    if zero_point is not None and scale is not None:
        group = k // scale.shape[1] if scale.shape[1] else _check.GROUP_SIZES[0]
    kind = KINDS[scheme]
    packed = torch.empty(_native.cpu.packed_weight_bytes(kind, n, k, group), dtype=torch.uint8)
    scale = None if scale is None else scale.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    addresses = _native.address(scale), _native.address(zero_point)
    _native.call(
        "quantize_weight",
        _native.cpu.pack_weight,
        kind,
        _matrix(weight_q),
        *addresses,
        n,
        k,
        group,
        packed.data_ptr(),
        _native.threads(),
    )
    return packed


def _matrix(x: Tensor) -> tuple[int, int, int, int]:
    """`[N, K]` as the kernels take it: address, dtype, strides."""
    row, column = x.stride()
    return x.data_ptr(), _native.DTYPE_TAGS[x.dtype], row, column


def _rows(x: Tensor) -> tuple[int, int, int, int, int, int]:
    """At most three dimensions as rows: address, dtype, rows per outer step, strides of both and of the columns."""
    tag = _native.DTYPE_TAGS[x.dtype]
    if x.ndim == 2:
        row, column = x.stride()
        return x.data_ptr(), tag, x.shape[0], 0, row, column
    if x.ndim == 3:
        outer, row, column = x.stride()
        return x.data_ptr(), tag, x.shape[1], outer, row, column
    return x.data_ptr(), tag, 1, 0, 0, x.stride(0)


def _three(x: Tensor) -> Tensor:
    """At most three dimensions: a view where the leading ones are one stride, else a copy."""
    return x.flatten(0, -3) if x.ndim > 3 else x


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _tag(x: Tensor | None) -> int:
    return 0 if x is None else _native.DTYPE_TAGS[x.dtype]


def _call(
    kind: int,
    x: Tensor,
    features: tuple[int, int],
    group: int,
    packed: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    input_scale: Tensor | None,
    out: Tensor | None,
) -> Any:
    n, k = features
    call = _native.cpu.LinearCall(
        kind,
        _rows(x),
        x.numel() // k if k else math.prod(x.shape[:-1]),
        n,
        k,
        group,
        _address(packed),
        _address(bias),
        _tag(bias),
        1 if bias is None else bias.stride(0),
        _ACTIVATIONS[activation],
        _NOTHING if residual is None else _rows(residual),
        _address(out),
        _tag(out),
        _address(input_scale),
        _tag(input_scale),
    )
    if weight is not None:
        call.set_weight(_matrix(weight))
    return call


def forward(
    op: str,
    kind: int,
    x: Tensor,  # [..., K]
    features: tuple[int, int],
    group: int,
    packed: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    input_scale: Tensor | None,
    out: Tensor,  # [..., N], contiguous
) -> Tensor:
    """Fills `out` and returns it; the right operand is `packed`, or `weight` packed in this call.

    Args:
        op: public name without `vk.`, for errors.
        kind: of the right operand.
        features: (N, K).
        group: of a 4-bit weight, else 0.
    """
    x, residual = _three(x), None if residual is None else _three(residual)
    call = _call(kind, x, features, group, packed, weight, bias, activation, residual, input_scale, out)
    _run(op, call, _native.cpu.linear_forward)
    return out


def backward(
    op: str,
    kind: int,
    grad_out: Tensor,  # [..., N]
    x: Tensor,  # [..., K]
    features: tuple[int, int],
    group: int,
    packed: Tensor | None,
    weight: Tensor | None,
    canonical: tuple[Tensor, Tensor | None, Tensor | None],
    bias: Tensor | None,
    activation: str | None,
    input_scale: Tensor | None,
    half: bool,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Fills the gradients of x, weight and bias that are wanted, contiguous and in x's dtype.

    Args:
        canonical: (weight_q, scale, zero_point), or a float weight and twice None: what multiplies the gradient.
        half: products of gradients in bfloat16.
    """
    x, grad_out = (
        x.flatten(0, -3) if x.ndim > 3 else x,
        grad_out.flatten(0, -3) if grad_out.ndim > 3 else grad_out,
    )
    codes, scale, zero_point = canonical
    scale = None if scale is None else scale.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    call = _call(kind, x, features, group, packed, weight, bias, activation, None, input_scale, None)
    gradients = _native.cpu.LinearGradients(
        call,
        _rows(grad_out),
        half,
        _matrix(codes),
        _address(scale),
        _address(zero_point),
        _address(grads[0]),
        _address(grads[1]),
        _address(grads[2]),
        _native.DTYPE_TAGS[x.dtype],
    )
    _run(op, gradients, _native.cpu.linear_backward)


def _run(op: str, call: Any, function: Any) -> None:
    """Calls a native function with a workspace of the size that it asks for."""
    threads = _native.threads()
    workspace = torch.empty(call.workspace(threads) + _ALIGNMENT, dtype=torch.uint8)
    at = workspace.data_ptr()
    _native.call(op, function, call, at + -at % _ALIGNMENT, threads)


def plain(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a call may skip torch.library: plain CPU tensors, no gradient, nothing that watches, traces or maps.

    What the registered op would do is then this call and 10 us of bookkeeping, which a layer of some hundred
    microseconds notices.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() != 0
        or torch._C._functorch.maybe_current_level() is not None
        or torch.is_autocast_enabled("cpu")
    ):
        return False
    gradients = torch.is_grad_enabled()
    for tensor in (x, *others):
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN_TYPES or not tensor.is_cpu or (gradients and tensor.requires_grad):
            return False
    return x.dtype in _DTYPES
