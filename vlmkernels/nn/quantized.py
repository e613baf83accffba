# SPDX-License-Identifier: Apache-2.0
"""Quantized layers on `vk.quantized_linear`. Not here: the conversion of a whole model (`quantize.py`).

State dicts hold plain tensors in canonical layout (`weight_q`, `scale`, `zero_point`, `bias`, and
`input_scale` where static); packed layouts are rebuilt on load and on device moves and are never saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlmkernels.nn.linear import Linear
from vlmkernels.ops import _check
from vlmkernels.ops.quantized import QuantizedWeight, quantize_weight, quantized_linear

__all__ = ["FusedActivation", "QuantizedLinear", "QuantizedPatchEmbedding"]

_SCHEME_OF_DTYPE = {
    torch.int8: "w8a8",
    torch.uint8: "w4a16",
    torch.float8_e4m3fn: "fp8",
    torch.bfloat16: "bf16",
}
_CANONICAL = ("weight_q", "scale", "zero_point")


class QuantizedLinear(nn.Module):
    """`activation(x @ weight.T + bias)` with a quantized weight; stands where `torch.nn.Linear` stood.

    The weight tensors are buffers, the bias a parameter. `.to(dtype)`, `.half()` and the like change the bias
    and the dtype that `weight` reports, never the canonical tensors. A state dict of "w8a8" loads into
    "w8a16" and back: the tensors are the same, only the activations' treatment differs.

    Args:
        in_features: K.
        out_features: N.
        bias: Whether there is a bias `[N]`.
        scheme: "w8a8", "w8a16", "w4a16", "fp8" or "bf16" (see `vk.quantize_weight`).
        group_size: 32, 64 or 128 for "w4a16"; None takes the largest that divides K.
        activation: Fused after the bias: None, "gelu", "gelu_tanh", "quick_gelu", "silu" or "relu".
        backend: Passed to the op; None lets the dispatcher choose.
        device: Device of the tensors; "meta" works.
        dtype: Dtype of the bias, and of `weight`.

    Attributes:
        weight_q: Codes, int8 `[N, K]`, uint8 `[N, K / 2]` (w4a16), float8_e4m3fn (fp8) or bfloat16 (bf16)
            `[N, K]`.
        scale: float32 `[N]`, `[N, K / G]` for w4a16, None for bf16.
        zero_point: uint8 `[N, K / G]` for w4a16, else None.
        input_scale: float32 0-d, the static activation scale (`set_input_scale`), or None.

    Example:
        >>> layer = vk.nn.QuantizedLinear.from_float(nn.Linear(64, 16), "w8a8")
        >>> layer(torch.randn(2, 64)).shape
        torch.Size([2, 16])
    """

    weight_q: Tensor
    scale: Tensor | None
    zero_point: Tensor | None
    input_scale: Tensor | None
    bias: nn.Parameter | None
    # What `to_float` gives back.
    _float_class: type[nn.Linear] = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scheme: str = "w8a8",
        group_size: int | None = None,
        activation: str | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        zeros = torch.zeros(out_features, in_features, device=device)
        parameter = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self._assemble(
            quantize_weight(zeros, scheme, group_size=group_size),
            parameter,
            activation=activation,
            backend=backend,
            weight_dtype=dtype or torch.get_default_dtype(),
        )

    def _assemble(
        self,
        quantized: QuantizedWeight,
        bias: nn.Parameter | None,
        *,
        activation: str | None,
        backend: str | None,
        weight_dtype: torch.dtype,
    ) -> None:
        _check.one_of("nn.QuantizedLinear", "activation", activation, _check.ACTIVATIONS)
        self.out_features, self.in_features = quantized.shape
        self.scheme = quantized.scheme
        self.activation = activation
        self.backend = backend
        self.weight_dtype = weight_dtype
        for name in _CANONICAL:
            self.register_buffer(name, getattr(quantized, name))
        self.register_buffer("input_scale", None)
        self.register_parameter("bias", bias)
        self._quantized: QuantizedWeight | None = quantized

    @classmethod
    def _from_quantized(
        cls,
        quantized: QuantizedWeight,
        bias: nn.Parameter | None,
        *,
        weight_dtype: torch.dtype,
        activation: str | None = None,
        backend: str | None = None,
    ) -> QuantizedLinear:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._assemble(quantized, bias, activation=activation, backend=backend, weight_dtype=weight_dtype)
        return layer

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        scheme: str = "w8a8",
        *,
        group_size: int | None = None,
        activation: str | None = None,
        backend: str | None = None,
    ) -> QuantizedLinear:
        """Quantizes a float layer; the bias parameter is shared with it.

        Args:
            linear: Has `weight` `[N, K]` and `bias` `[N]` or None.
            scheme: As the class takes it.
            group_size: As the class takes it.
            activation: As the class takes it.
            backend: As the class takes it.

        Raises:
            ValueError: If the scheme is unknown or K is not divisible by the group.
        """
        layer = cls._from_quantized(
            quantize_weight(linear.weight, scheme, group_size=group_size),
            linear.bias,
            activation=activation,
            backend=backend,
            weight_dtype=linear.weight.dtype,
        )
        if type(linear) is Linear:
            layer._float_class = Linear
        return layer.train(linear.training)

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Tensor],
        prefix: str = "",
        *,
        scheme: str | None = None,
        activation: str | None = None,
        backend: str | None = None,
    ) -> QuantizedLinear:
        """Builds a layer from its saved tensors alone; shapes, group and scheme are read from them.

        Args:
            state_dict: Holds `prefix + "weight_q"` and its companions; other keys are ignored.
            prefix: The layer's name with its dot, for example "visual.proj.".
            scheme: Needed only for "w8a16", whose tensors are those of "w8a8".
            activation: As the class takes it.
            backend: As the class takes it.

        Raises:
            KeyError: If there is no `weight_q` under the prefix.
            ValueError: If the tensors do not make up a quantized weight of the scheme.
        """
        tensors = {name: state_dict.get(prefix + name) for name in (*_CANONICAL, "bias", "input_scale")}
        weight_q = tensors["weight_q"]
        if weight_q is None:
            raise KeyError(
                f"vk.nn.QuantizedLinear.from_state_dict: no {prefix + 'weight_q'!r} in the state dict"
            )
        if scheme is None:
            scheme = _SCHEME_OF_DTYPE.get(weight_q.dtype)
            if scheme is None:
                raise ValueError(
                    "vk.nn.QuantizedLinear.from_state_dict: weight_q must be int8, uint8, float8_e4m3fn or "
                    f"bfloat16, got {weight_q.dtype}"
                )
        bias = tensors["bias"]
        layer = cls._from_quantized(
            QuantizedWeight(scheme, weight_q, tensors["scale"], tensors["zero_point"]),
            None if bias is None else nn.Parameter(bias),
            activation=activation,
            backend=backend,
            weight_dtype=torch.get_default_dtype() if bias is None else bias.dtype,
        )
        if tensors["input_scale"] is not None:
            layer.input_scale = tensors["input_scale"]
        return layer

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The layer's buffers as the op takes them, with the packed layouts that backends asked for."""
        cached = self._quantized
        # Buffers may have been swapped under us (functional_call, assign=True, plain assignment).
        if cached is None or any(getattr(cached, name) is not getattr(self, name) for name in _CANONICAL):
            cached = self._quantized = QuantizedWeight(
                self.scheme, self.weight_q, self.scale, self.zero_point
            )
        return cached

    @property
    def weight(self) -> Tensor:
        """The dequantized weight `[N, K]`, computed at every access, for code that reads `linear.weight`."""
        return self.quantized_weight.dequantize(self.weight_dtype)

    @property
    def group_size(self) -> int | None:
        """G of a w4a16 layer, else None."""
        return self.quantized_weight.group_size

    def set_input_scale(self, input_scale: float | Tensor | None) -> None:
        """Fixes the activation scale (absmax / 127 over calibration data; absmax / 448 for fp8), or None for
        dynamic.

        Args:
            input_scale: A positive finite number or 0-d tensor; saved with the state dict.

        Raises:
            ValueError: If the scheme keeps float activations, or the number is not positive and finite.
        """
        if input_scale is None:
            self.input_scale = None
            return
        value = (
            torch.as_tensor(input_scale, dtype=torch.float32, device=self.weight_q.device).detach().clone()
        )
        _check.static_input_scale("nn.QuantizedLinear.set_input_scale", self.scheme, value)
        if not (value > 0 and value.isfinite()):
            raise ValueError(
                "vk.nn.QuantizedLinear.set_input_scale: input_scale must be positive and finite, "
                f"got {value.item()}"
            )
        self.input_scale = value

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:  # [..., K] -> [..., N]
        """Applies the layer to `x` `[..., K]`; `residual` `[..., N]` is added after the activation."""
        return quantized_linear(
            x,
            self.quantized_weight,
            self.bias,
            activation=self.activation,
            residual=residual,
            input_scale=self.input_scale,
            backend=self.backend,
        )

    def to_float(self) -> nn.Linear:
        """A `torch.nn.Linear` with the dequantized weight and the same bias parameter.

        Raises:
            ValueError: If an activation is fused, which a linear layer cannot hold.
        """
        if self.activation is not None:
            raise ValueError(
                f"vk.nn.QuantizedLinear.to_float: the layer fuses {self.activation!r}; set `activation` "
                "to None and apply it outside"
            )
        linear = self._float_class(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            # `.half()` and `.to(dtype)` cast every floating buffer; codes and scales must keep their bits.
            moved = self._buffers[name]
            if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype, device=self.weight_q.device)).dtype
        self._quantized = None
        self.quantized_weight  # noqa: B018  packs now, not in the first forward
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in _CANONICAL:
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and own is not None and saved.dtype != own.dtype:
                # A copy would convert silently, and codes of one scheme mean nothing in another.
                error_msgs.append(
                    f"{prefix}{name}: a {self.scheme} layer holds {own.dtype}, the state dict {saved.dtype}; "
                    "quantize the model with the scheme that the state dict was saved with"
                )
                return
        saved_scale = state_dict.get(prefix + "input_scale")
        if saved_scale is not None and self.input_scale is None:
            self.input_scale = torch.empty_like(saved_scale, device=self.weight_q.device)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._quantized = None
        self.quantized_weight  # noqa: B018  packs now, not in the first forward

    def extra_repr(self) -> str:
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
        text += f", scheme={self.scheme}"
        if self.group_size is not None:
            text += f", group_size={self.group_size}"
        if self.activation is not None:
            text += f", activation={self.activation}"
        return text


class FusedActivation(nn.Module):
    """Stands where an activation stood that the quantized layer before it now applies; passes its input on.

    Args:
        original: The activation, put back by `vk.nn.dequantize_`; it has no parameters.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = original  # not a child: walks of the model must not find it again

    def forward(self, x: Tensor) -> Tensor:
        return x

    def extra_repr(self) -> str:
        return repr(self.__dict__["original"])


class QuantizedPatchEmbedding(nn.Module):
    """A convolution whose kernel equals its stride, computed as a quantized linear over unfolded patches.

    Stands where such a `torch.nn.Conv2d` stood: `[B, C, H, W] -> [B, N, H // kh, W // kw]`, unbatched input
    too.

    Args:
        proj: The layer, C * kh * kw -> N, inputs in the order (channel, row, column).
        in_channels: C.
        kernel_size: `(kh, kw)`.
    """

    def __init__(self, proj: QuantizedLinear, in_channels: int, kernel_size: tuple[int, int]) -> None:
        super().__init__()
        if proj.in_features != in_channels * kernel_size[0] * kernel_size[1]:
            raise ValueError(
                f"vk.nn.QuantizedPatchEmbedding: proj has {proj.in_features} inputs, {in_channels} channels "
                f"of {kernel_size} patches need {in_channels * kernel_size[0] * kernel_size[1]}"
            )
        self.proj = proj
        self.in_channels = in_channels
        self.out_channels = proj.out_features
        self.kernel_size = self.stride = kernel_size

    @classmethod
    def from_float(
        cls, conv: nn.Conv2d, scheme: str = "w8a8", *, group_size: int | None = None
    ) -> QuantizedPatchEmbedding:
        """Quantizes a convolution; raises ValueError where `why_not` gives a reason."""
        reason = cls.why_not(conv)
        if reason is not None:
            raise ValueError(f"vk.nn.QuantizedPatchEmbedding.from_float: the convolution {reason}")
        quantized = quantize_weight(conv.weight.flatten(1), scheme, group_size=group_size)
        bias = conv._parameters["bias"]
        proj = QuantizedLinear._from_quantized(quantized, bias, weight_dtype=conv.weight.dtype)
        kernel_h, kernel_w = conv.kernel_size
        return cls(proj, conv.in_channels, (kernel_h, kernel_w)).train(conv.training)

    @staticmethod
    def why_not(conv: nn.Conv2d) -> str | None:
        """Why a convolution is no patch embedding, or None."""
        if conv.kernel_size != conv.stride:
            return f"has kernel {conv.kernel_size} and stride {conv.stride}: no patch embedding"
        padding = conv.padding if isinstance(conv.padding, str) else max(conv.padding)
        if padding not in (0, "valid"):
            return f"has padding {conv.padding}"
        if max(conv.dilation) != 1 or conv.groups != 1:
            return f"has dilation {conv.dilation} and groups {conv.groups}"
        return None

    @property
    def weight(self) -> Tensor:
        """The dequantized kernel `[N, C, kh, kw]`, computed anew at every access."""
        return self.proj.weight.unflatten(1, (self.in_channels, *self.kernel_size))

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias `[N]`."""
        return self.proj.bias

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, N, H // kh, W // kw]
        """Embeds the patches of `x`; like the convolution, ignores what lies beyond the last whole patch."""
        if x.ndim == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        kernel_h, kernel_w = self.kernel_size
        if x.ndim != 4 or x.shape[1] != self.in_channels or x.shape[2] < kernel_h or x.shape[3] < kernel_w:
            raise ValueError(
                f"vk.nn.QuantizedPatchEmbedding: x must be [B, {self.in_channels}, H, W], H >= {kernel_h} "
                f"and W >= {kernel_w}, got {list(x.shape)}"
            )
        rows, columns = x.shape[2] // kernel_h, x.shape[3] // kernel_w
        x = x[:, :, : rows * kernel_h, : columns * kernel_w]
        patches = x.unflatten(2, (rows, kernel_h)).unflatten(4, (columns, kernel_w)).permute(0, 2, 4, 1, 3, 5)
        return self.proj(patches.flatten(3)).permute(0, 3, 1, 2)

    def to_float(self) -> nn.Conv2d:
        """A `torch.nn.Conv2d` with the dequantized kernel and the same bias parameter."""
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, bias=False, device="meta"
        )
        conv.weight = nn.Parameter(self.weight)
        conv.register_parameter("bias", self.bias)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, kernel_size={self.kernel_size}"
