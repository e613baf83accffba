# SPDX-License-Identifier: Apache-2.0
"""Linear layers with quantized weights: `vk.quantize_weight`, `vk.QuantizedWeight`, `vk.quantized_linear`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmkernels import _native
from vlmkernels.ops import _check, _linear_cpu, _linear_triton, _quantized_cuda, _triton
from vlmkernels.ops._library import differentiate, like_inputs, register_op
from vlmkernels.ops.dispatch import Call, choose, register_backend
from vlmkernels.ops.linear import operands_under_autocast
from vlmkernels.ops.reference import quantized as reference
from vlmkernels.ops.reference.linear import output_dtype

__all__ = ["QuantizedWeight", "quantize_weight", "quantized_linear", "register_packing"]

#: Packs the canonical tensors `(weight_q, scale, zero_point)` of a weight for one backend; None declines.
Pack = Callable[[Tensor, Tensor | None, Tensor | None], Tensor | None]

_packings: dict[tuple[str, str], list[tuple[str, Pack]]] = {}


def register_packing(backend: str, device: str, scheme: str, pack: Pack) -> None:
    """Gives a backend a weight layout of its own, built whenever a `QuantizedWeight` is made on that kind of
    device.

    Args:
        backend: The backend that reads it: `QuantizedWeight.packed(backend)`.
        device: Device type of the weights, for example "cpu".
        scheme: One of the schemes of `quantize_weight`.
        pack: Canonical tensors to packed tensor.

    Raises:
        ValueError: If the scheme is unknown, or the backend has a packing for it on this device.
    """
    _check.one_of("register_packing", "scheme", scheme, tuple(_check.SCHEME_DTYPES))
    known = _packings.setdefault((device, scheme), [])
    if any(name == backend for name, _ in known):
        raise ValueError(f"vk.register_packing: {backend!r} already packs {scheme!r} weights on {device}")
    known.append((backend, pack))


class QuantizedWeight:
    """A quantized weight: `weight[n, k] = (weight_q[n, k] - zero_point) * scale`, per channel or per group.

    Holds plain tensors in canonical layout, and beside them the packed layouts that backends asked for; those
    are made anew on every construction, move and load, and are never saved. Instances are immutable by
    convention.

    Args:
        scheme: "w8a8", "w8a16", "w4a16", "fp8" or "bf16".
        weight_q: int8 (w8a8, w8a16), float8_e4m3fn (fp8) or bfloat16 (bf16) `[N, K]`; uint8 `[N, K / 2]`, low
            nibble first, for w4a16.
        scale: float32 `[N]`; `[N, K / G]` for w4a16 with G 32, 64 or 128; None for bf16.
        zero_point: uint8 `[N, K / G]` for w4a16, else None.

    Attributes:
        shape: (N, K).
        group_size: G of w4a16, else None.

    Raises:
        TypeError: If a tensor has another dtype.
        ValueError: If the scheme is unknown, or a tensor is missing, superfluous or of another shape.
    """

    def __init__(
        self, scheme: str, weight_q: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None
    ) -> None:
        self.shape = _check.quantized_weight("QuantizedWeight", scheme, weight_q, scale, zero_point)
        self.scheme = scheme
        self.weight_q = weight_q
        self.scale = scale
        self.zero_point = zero_point
        self.group_size: int | None = None
        if scheme == "w4a16" and scale is not None:
            groups = scale.shape[1]
            self.group_size = self.shape[1] // groups if groups else _check.GROUP_SIZES[0]
        self._rows: dict[tuple[int, int], QuantizedWeight] = {}
        self._packed: dict[str, Tensor] = {}
        for backend, pack in _packings.get((weight_q.device.type, scheme), ()):
            packed = pack(weight_q, scale, zero_point)
            if packed is not None:
                self._packed[backend] = packed

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.weight_q.device

    @property
    def nbytes(self) -> int:
        """Bytes of the canonical tensors, what a checkpoint stores."""
        return sum(x.nbytes for x in (self.weight_q, self.scale, self.zero_point) if x is not None)

    def packed(self, backend: str) -> Tensor | None:
        """The layout made for a backend (`register_packing`), None where it reads the canonical tensors."""
        return self._packed.get(backend)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The float weight `[N, K]`, computed in float32 (float64 for float64) and rounded to `dtype`."""
        return reference.dequantize(self.weight_q, self.scale, self.zero_point, dtype)

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Output channels start..stop as a weight, on the same memory; remembered, so packed only once."""
        if (start, stop) not in self._rows:
            scale, zero_point = (x if x is None else x[start:stop] for x in (self.scale, self.zero_point))
            part = QuantizedWeight(self.scheme, self.weight_q[start:stop], scale, zero_point)
            self._rows[start, stop] = part
        return self._rows[start, stop]

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> QuantizedWeight:
        """The weight on another device (itself if it is there); packed layouts are made for that device.

        Raises:
            TypeError: If a dtype is given: the dtypes are the scheme's.
        """
        if isinstance(device, torch.dtype):
            raise TypeError(
                f"vk.QuantizedWeight.to: takes a device, the dtypes are fixed by the scheme; got {device}"
            )
        weight_q = self.weight_q.to(device, non_blocking=non_blocking)
        if weight_q is self.weight_q:
            return self
        scale, zero_point = (
            x if x is None else x.to(device, non_blocking=non_blocking) for x in (self.scale, self.zero_point)
        )
        return QuantizedWeight(self.scheme, weight_q, scale, zero_point)

    def __getstate__(self) -> dict[str, Any]:
        names = ("scheme", "weight_q", "scale", "zero_point")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        QuantizedWeight.__init__(self, **state)

    def __repr__(self) -> str:
        group = "" if self.group_size is None else f", group_size={self.group_size}"
        return (
            f"QuantizedWeight({self.scheme!r}, shape={tuple(self.shape)}{group}, device={str(self.device)!r})"
        )


def quantize_weight(weight: Tensor, scheme: str, *, group_size: int | None = None) -> QuantizedWeight:
    """Quantizes a linear layer's weight.

    ```
    w8a8, w8a16   scale[n] = max_k |w[n, k]| / 127      weight_q = round(w / scale)                int8
    fp8           scale[n] = max_k |w[n, k]| / 448      weight_q = e4m3(w / scale)                 float8_e4m3
    w4a16         scale[n, g] = (max - min) / 15        zero_point = round(-min / scale)           uint8
                                                        weight_q = round(w / scale) + zero_point   4 bits
    bf16          weight_q = bfloat16(w)
    ```

    Rounding is half to even. The minimum and maximum of a w4a16 group are widened to contain 0, so that zeros
    stay exact. A channel (group) of zeros gets scale 0 and dequantizes to zeros; one that holds a NaN or an
    infinity gets scale NaN and dequantizes to NaN. "w8a8" and "w8a16" give the same tensors: what differs is
    how `quantized_linear` treats activations. fp8 is what GPU kernels serve; the reference runs wherever
    torch has float8_e4m3fn. Not differentiable.

    Args:
        weight: `[N, K]`, floating; quantized from its float32 value.
        scheme: "w8a8", "w8a16", "w4a16", "fp8" or "bf16".
        group_size: G of "w4a16": 32, 64 or 128; None takes the largest that divides K.

    Returns:
        A `QuantizedWeight` on the weight's device.

    Raises:
        TypeError: If weight is no floating tensor.
        ValueError: If weight is not 2-d, scheme or group_size is unknown, or K is not divisible by the group.

    Example:
        >>> qweight = vk.quantize_weight(torch.randn(16, 64), "w8a8")
        >>> qweight.weight_q.dtype, tuple(qweight.scale.shape)
        (torch.int8, (16,))
    """
    _check.floating("quantize_weight", "weight", weight)
    _check.ndim("quantize_weight", "weight", weight, 2, "[N, K]")
    group = _check.quantization_group("quantize_weight", scheme, group_size, weight.shape[1])
    return QuantizedWeight(scheme, *reference.quantize_weight(weight, scheme, group))


def quantized_linear(
    x: Tensor,  # [..., K]
    qweight: QuantizedWeight,  # [N, K]
    bias: Tensor | None = None,  # [N]
    *,
    activation: str | None = None,
    residual: Tensor | None = None,  # [..., N]
    input_scale: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Linear layer with a quantized weight: `y = activation(x @ weight.T + bias) + residual`.

    ```
    w8a8    scale_x[m] = max_k |x[m, k]| / 127, or input_scale
            x_q[m, k]  = clamp(round(x[m, k] / scale_x[m]), -127, 127)
            product    = scale_x[m] * scale[n] * sum_k x_q[m, k] * weight_q[n, k]   the sum in integers, exact
    fp8     the same with 448 and e4m3 in place of 127 and int8, the sum in float32
    w8a16   product    = sum_k x[m, k] * weight[n, k], the weight dequantized, activations as they are
    w4a16   the same
    bf16    the same with x rounded to bfloat16
    ```

    Sums and epilogue are float32 (float64 for float64 x); the result is rounded once. A row of zeros gives
    product 0; with w8a8 and fp8 a row that holds a NaN, or an infinity where the scale is dynamic, gives NaN
    throughout.

    Differentiable: x (straight-through: the gradient of a product with the dequantized weight, as if
        activations were neither rounded nor
    clamped; the activation's derivative is that at the quantized value), bias and residual (true gradients).
    Not differentiable: the weight's tensors and input_scale. Second derivatives and vmap on the reference.

    Args:
        x: `[..., K]`, floating; any strides.
        qweight: From `quantize_weight`.
        bias: `[N]` in x's dtype.
        activation: None, "gelu", "gelu_tanh", "quick_gelu", "silu" or "relu".
        residual: `[..., N]` in x's dtype; under autocast it may be wider and then decides the result's dtype.
        input_scale: Static activation scale of "w8a8" and "fp8", a positive number or 0-d tensor.
        backend: None, "reference", "cpu", "cuda" or "triton".

    Returns:
        `[..., N]` in x's dtype (under autocast: in autocast's, widened by the residual's).

    Raises:
        TypeError: If an argument is of another type or dtype.
        ValueError: If shapes or devices do not fit, activation is unknown, or input_scale does not fit the
            scheme or is not positive.
        NotImplementedError: If the named backend cannot serve the call.

    Example:
        >>> qweight = vk.quantize_weight(torch.ones(4, 32), "w8a8")
        >>> vk.quantized_linear(torch.ones(1, 32), qweight, activation="relu")
        tensor([[32., 32., 32., 32.]])
    """
    op = "quantized_linear"
    if not isinstance(qweight, QuantizedWeight):
        raise TypeError(
            f"vk.{op}: qweight must be a QuantizedWeight (vk.quantize_weight), got {type(qweight).__name__}"
        )
    if isinstance(x, Tensor) and backend in (None, "cpu"):
        y = _plain_call(x, qweight, bias, activation, residual, input_scale)
        if y is not None:
            return y
    x, _, bias = operands_under_autocast(op, x, None, bias, residual)
    input_scale = _input_scale_tensor(op, input_scale, x.device)
    tensors = (qweight.weight_q, qweight.scale, qweight.zero_point)
    _check_quantized(
        x, qweight.weight_q, qweight.shape, bias, residual, input_scale, qweight.scheme, activation
    )
    facts = {
        "outputs": qweight.shape[0],
        "inputs": qweight.shape[1],
        "rows": math.prod(x.shape[:-1]),
        "scheme": qweight.scheme,
        "group_size": qweight.group_size,
        "activation": activation,
        "x_dtype": x.dtype,
        "result_dtype": output_dtype(x, residual),
        "scale_dtype": None if input_scale is None else input_scale.dtype,
    }
    name = choose(op, Call(x.device.type, x.dtype, facts), backend)
    if name == "reference":
        return reference.quantized_linear(
            x,
            *tensors,
            bias,
            scheme=qweight.scheme,
            activation=activation,
            residual=residual,
            input_scale=input_scale,
        )
    return _quantized_linear(
        x, *tensors, qweight.packed(name), bias, residual, input_scale, qweight.scheme, activation, name
    )


def _plain_call(
    x: Tensor,
    qweight: QuantizedWeight,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    input_scale: float | Tensor | None,
) -> Tensor | None:
    """The CPU kernel at once, where nothing but it is asked for and all is well; None for everything else."""
    packed = qweight.packed("cpu")
    n, k = qweight.shape
    if (
        packed is None
        or not _linear_cpu.plain(x, bias, residual)
        or x.ndim == 0
        or x.shape[-1] != k
        or k > _linear_cpu.LARGEST_K
        or input_scale is not None
        or activation not in _check.ACTIVATIONS
        or (bias is not None and (bias.dtype != x.dtype or bias.shape != (n,)))
    ):
        return None
    out = x.new_empty((*x.shape[:-1], n))
    if residual is not None and (residual.dtype != x.dtype or residual.shape != out.shape):
        return None
    return _linear_cpu.forward(
        "quantized_linear",
        _linear_cpu.KINDS[qweight.scheme],
        x,
        (n, k),
        qweight.group_size or 0,
        packed,
        None,
        bias,
        activation,
        residual,
        None,
        out,
    )


def _input_scale_tensor(op: str, input_scale: float | Tensor | None, device: torch.device) -> Tensor | None:
    if input_scale is None:
        return None
    if isinstance(input_scale, Tensor):
        if input_scale.ndim == 0 and _check.readable(input_scale):
            _check_positive(op, input_scale.item())
        return input_scale.to(device) if input_scale.device.type == "cpu" else input_scale
    _check.number(op, "input_scale", input_scale)
    _check_positive(op, input_scale)
    return torch.tensor(input_scale, dtype=torch.float32, device=device)


def _check_positive(op: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"vk.{op}: input_scale must be positive and finite, got {value}")


def _check_quantized(
    x: Tensor,
    weight_q: Tensor,
    features: tuple[int, int],
    bias: Tensor | None,
    residual: Tensor | None,
    input_scale: Tensor | None,
    scheme: str,
    activation: str | None,
) -> None:
    op = "quantized_linear"
    _check.linear_arguments(op, x, features, bias, residual, activation, weight="qweight")
    _check.static_input_scale(op, scheme, input_scale)
    _check.same_device(op, x=x, qweight=weight_q, bias=bias, residual=residual, input_scale=input_scale)


def _quantized_fake(
    x: Tensor,
    weight_q: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    packed: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    input_scale: Tensor | None,
    scheme: str,
    activation: str | None,
    backend: str,
) -> Tensor:
    features = _check.quantized_weight("quantized_linear", scheme, weight_q, scale, zero_point)
    _check_quantized(x, weight_q, features, bias, residual, input_scale, scheme, activation)
    return x.new_empty((*x.shape[:-1], features[0]), dtype=output_dtype(x, residual))


def _quantized_impl(
    x: Tensor,
    weight_q: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    packed: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    input_scale: Tensor | None,
    scheme: str,
    activation: str | None,
    backend: str,
) -> Tensor:
    if backend == "cpu":
        if packed is None:  # made where its data could not be read, under a FakeTensorMode for example
            packed = _linear_cpu.pack(scheme, weight_q, scale, zero_point)
        n, k = weight_q.shape[0], x.shape[-1]
        groups = 0 if zero_point is None else zero_point.shape[1]
        return _linear_cpu.forward(
            "quantized_linear",
            _linear_cpu.KINDS[scheme],
            x,
            (n, k),
            k // groups if groups else 0,
            packed,
            None,
            bias,
            activation,
            residual,
            input_scale,
            x.new_empty((*x.shape[:-1], n), dtype=output_dtype(x, residual)),
        )
    if backend == "cuda" and scale is not None:
        out = x.new_empty((*x.shape[:-1], weight_q.shape[0]), dtype=output_dtype(x, residual))
        return _quantized_cuda.forward(x, weight_q, scale, bias, activation, residual, input_scale, out)
    if backend == "triton":
        out = x.new_empty((*x.shape[:-1], weight_q.shape[0]), dtype=output_dtype(x, residual))
        return _linear_triton.forward(
            x, scheme, (weight_q, scale, zero_point), bias, activation, residual, input_scale, out
        )
    return reference.quantized_linear(
        x,
        weight_q,
        scale,
        zero_point,
        bias,
        scheme=scheme,
        activation=activation,
        residual=residual,
        input_scale=input_scale,
    ).contiguous()


def _quantized_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight_q, scale, zero_point, _, bias, residual, input_scale, *options = inputs
    ctx.scheme, ctx.activation, ctx.backend = options
    ctx.save_for_backward(x, weight_q, scale, zero_point, bias, input_scale)
    ctx.residual_dtype = None if residual is None else residual.dtype


def _quantized_grad(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[5]]
    grads: Sequence[Tensor | None] = (None, None)
    if any(needs):
        grads = _quantized_linear_backward(
            grad_out, *ctx.saved_tensors, ctx.scheme, ctx.activation, ctx.backend, needs
        )
    grad_x, grad_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return (
        grad_x,
        None,  # weight_q
        None,  # scale
        None,  # zero_point
        None,  # packed
        grad_bias,
        grad_out.to(ctx.residual_dtype) if ctx.needs_input_grad[6] else None,
        None,  # input_scale
        None,  # scheme
        None,  # activation
        None,  # backend
    )


def _quantized_backward_fake(
    grad_out: Tensor,
    x: Tensor,
    weight_q: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return like_inputs((x, bias), rest[-1])


def _quantized_backward_impl(
    grad_out: Tensor,
    x: Tensor,
    weight_q: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    bias: Tensor | None,
    input_scale: Tensor | None,
    scheme: str,
    activation: str | None,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    if backend == "cpu":
        wanted = [needs[0], needs[1] and bias is not None]
        grad_x, grad_bias = like_inputs((x, bias), wanted)
        n, k = weight_q.shape[0], x.shape[-1]
        groups = 0 if zero_point is None else zero_point.shape[1]
        # Only the activation's slope asks for the product again, and with it for the packed weight.
        packed = None if activation is None else _linear_cpu.pack(scheme, weight_q, scale, zero_point)
        _linear_cpu.backward(
            "quantized_linear",
            _linear_cpu.KINDS[scheme],
            grad_out,
            x,
            (n, k),
            k // groups if groups else 0,
            packed,
            None,
            (weight_q, scale, zero_point),
            bias,
            activation,
            input_scale,
            x.dtype == torch.bfloat16,
            (grad_x if wanted[0] else None, None, grad_bias if wanted[1] else None),
        )
        return grad_x, grad_bias
    if backend == "triton":
        weight = (weight_q, scale, zero_point)
        grads = _linear_triton.backward(
            grad_out, x, scheme, weight, bias, activation, input_scale, None, [needs[0], False, needs[1]]
        )
        return grads[0], grads[2]

    def forward(x: Tensor, bias: Tensor | None) -> Tensor:
        return reference.quantized_linear(
            x,
            weight_q,
            scale,
            zero_point,
            bias,
            scheme=scheme,
            activation=activation,
            residual=no_residual,
            input_scale=input_scale,
        )

    # A residual of zeros keeps the result, and so the incoming gradient, in the dtype that it has.
    no_residual = grad_out.new_zeros(()).expand_as(grad_out)
    return differentiate(forward, (x, bias), grad_out, needs)


_quantized_linear_backward = register_op(
    "quantized_linear_backward",
    "(Tensor grad_out, Tensor x, Tensor weight_q, Tensor? scale, Tensor? zero_point, Tensor? bias, "
    "Tensor? input_scale, str scheme, str? activation, str backend, bool[] needs) -> (Tensor, Tensor)",
    fake=_quantized_backward_fake,
    impl=_quantized_backward_impl,
)
_quantized_linear = register_op(
    "quantized_linear",
    "(Tensor x, Tensor weight_q, Tensor? scale, Tensor? zero_point, Tensor? packed, Tensor? bias, "
    "Tensor? residual, Tensor? input_scale, str scheme, str? activation, str backend) -> Tensor",
    fake=_quantized_fake,
    impl=_quantized_impl,
    setup_context=_quantized_setup,
    backward=_quantized_grad,
)

register_backend("quantized_linear", "cpu", _linear_cpu.quantized_reasons, priority=10)
register_backend(
    "quantized_linear",
    "triton",
    _linear_triton.quantized_reasons,
    not_default=_triton.not_default,
    priority=_triton.PRIORITY,
)
if _native.cpu_reason is None:
    for _scheme in _linear_cpu.KINDS:
        register_packing("cpu", "cpu", _scheme, functools.partial(_linear_cpu.pack, _scheme))
