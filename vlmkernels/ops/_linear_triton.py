# SPDX-License-Identifier: Apache-2.0
"""How linear layers, quantized and float, reach the Triton kernels: what they serve, forward, products of backward."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from vlmkernels.ops import _triton, measured
from vlmkernels.ops._library import like_inputs
from vlmkernels.ops._linear_cpu import LARGEST_K
from vlmkernels.ops.dispatch import Call

#: (weight_q, scale, zero_point), or a float weight and twice None.
Canonical = tuple[Tensor, Tensor | None, Tensor | None]

#: The oldest architecture whose tensor cores multiply e4m3.
FLOAT8_ARCHITECTURE = (8, 9)


def reasons(call: Call) -> list[str]:
    """Why the Triton kernels cannot serve a linear layer; shared by `vk.linear` and `vk.quantized_linear`."""
    found = _triton.reasons(call)
    if torch.float64 in (call.facts["x_dtype"], call.facts["result_dtype"]):
        found.append("it sums in float32, which float64 operands do not want")
    if _triton.INTERPRETED and torch.bfloat16 in (
        call.facts["x_dtype"],
        call.facts["result_dtype"],
        call.dtype,
    ):
        found.append("the interpreter truncates where bfloat16 rounds")
    return found


def float_reasons(call: Call) -> list[str]:
    """Why the Triton kernels cannot serve a float linear layer."""
    found = reasons(call)
    if call.dtype == torch.float64:
        found.append("products are float32, bfloat16 or float16, not torch.float64")
    return found


def quantized_reasons(call: Call) -> list[str]:
    """Why the Triton kernels cannot serve a quantized linear layer."""
    found = reasons(call)
    scheme = call.facts["scheme"]
    if scheme == "w8a8" and call.facts["inputs"] > LARGEST_K:
        found.append(f"sums of more than {LARGEST_K} int8 products may leave 32 bits")
    if scheme in ("bf16", "fp8") and _triton.INTERPRETED:
        found.append(f"the interpreter rounds to {scheme} otherwise than a GPU")
    if scheme == "fp8" and not found and call.device == "cuda" and _architecture() < FLOAT8_ARCHITECTURE:
        found.append("e4m3 products need sm_89 or newer")
    return found


def not_default(call: Call) -> list[str]:
    """Where torch's own product is the better one."""
    found = _triton.not_default(call)
    if call.facts["activation"] is None and call.facts["result_dtype"] == call.facts["x_dtype"]:
        found.append("without an activation, torch's library product has nothing left to fuse")
    elif measured.fastest("linear", call) == "reference":
        found.append("committed results show torch's own product faster for such shapes")
    return found


def _architecture() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


# As in `dispatch`: Dynamo asks once and keeps the answer.
_architecture._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forward(
    x: Tensor,
    scheme: str,
    canonical: Canonical,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    input_scale: Tensor | None,
    out: Tensor,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Fills `out` `[..., N]`, contiguous, and returns it. `scheme` is "float", or one of `quantize_weight`."""
    from vlmkernels.ops.triton import linear as kernels

    weight = kernels.Weight(scheme, *canonical)
    return kernels.forward(x, weight, bias, activation, residual, input_scale, out, compute_dtype)


def backward(
    grad_out: Tensor,
    x: Tensor,
    scheme: str,
    canonical: Canonical,
    bias: Tensor | None,
    activation: str | None,
    input_scale: Tensor | None,
    compute_dtype: torch.dtype | None,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, a float weight, and bias, as `like_inputs` has them; straight through a quantization of x.

    Both products are plain, and the library's: `g @ weight` and `g^T @ x`, where g has come through the activation.
    """
    from vlmkernels.ops.triton import linear as kernels

    weight = kernels.Weight(scheme, *canonical)
    float_weight = canonical[0] if scheme == "float" else None
    wanted = [needs[0], needs[1] and float_weight is not None, needs[2] and bias is not None]
    grads = list(like_inputs((x, float_weight, bias), wanted))
    if not any(wanted):
        return tuple(grads)
    operand = compute_dtype or x.dtype
    g = kernels.through_activation(grad_out, x, weight, bias, activation, input_scale, compute_dtype, operand)
    multiply = functools.partial(_multiply, out_dtype=x.dtype)
    if wanted[0]:
        right = kernels.dequantize(weight, operand) if float_weight is None else float_weight.to(operand)
        grads[0] = multiply(g, right).reshape(x.shape)
    if wanted[1]:
        grads[1] = multiply(g.t(), x.reshape(g.shape[0], x.shape[-1]).to(operand))
    if wanted[2]:
        grads[2] = g.sum(0, dtype=torch.float32).to(x.dtype)
    return tuple(grads)


def _multiply(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """`a @ b`, summed in float32 and rounded once, to `out_dtype`."""
    if a.dtype == out_dtype:
        return torch.mm(a, b)
    # torch would round to the operands' dtype in between
    from vlmkernels.ops.triton import linear as kernels

    out = torch.empty(a.shape[0], b.shape[1], dtype=out_dtype, device=a.device)
    return kernels.forward(a, kernels.Weight("float", b.t()), None, None, None, None, out)
