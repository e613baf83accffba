# SPDX-License-Identifier: Apache-2.0
"""Converts a whole model to quantized layers and back: `vk.quantize_`, `vk.nn.dequantize_`."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.utils import parametrize

from vlmkernels.nn.linear import Linear
from vlmkernels.nn.quantized import FusedActivation, QuantizedLinear, QuantizedPatchEmbedding
from vlmkernels.nn.quantized_attention import QuantizedMultiheadAttention
from vlmkernels.nn.transformer import MLP, QuickGELU
from vlmkernels.ops import _check
from vlmkernels.ops.quantized import quantize_weight

__all__ = ["QuantizationReport", "dequantize_", "quantize_"]

logger = logging.getLogger(__name__)

_Layer: TypeAlias = nn.Linear | nn.Conv2d | nn.MultiheadAttention


@dataclass
class QuantizationReport:
    """What `quantize_` did: kept as `model.quantization_report`.

    Attributes:
        scheme: The scheme asked for.
        converted: Names of the converted modules, in order.
        fused: Names of the activations that a converted layer now applies.
        left_alone: Name of each candidate that stayed float, and why.
    """

    scheme: str
    converted: list[str] = field(default_factory=list)
    fused: list[str] = field(default_factory=list)
    left_alone: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.scheme}: {len(self.converted)} modules quantized, {len(self.left_alone)} left alone"]
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.left_alone.items()])


def quantize_(
    model: nn.Module,
    scheme: str = "w8a8",
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    group_size: int | None = None,
) -> nn.Module:
    """Replaces a model's linear layers by quantized ones, in place: `weight -> weight_q, scale, zero_point`.

    Converted are `nn.Linear`; `nn.MultiheadAttention` as a whole (its `out_proj` is read by name, so it is
    never replaced alone); the packed input projection of modules with `replace_in_proj`
    (`vk.nn.MultiheadSelfAttention`); `nn.Conv2d` whose kernel equals its stride (patch embeddings).

    An activation right behind a converted layer, in an `nn.Sequential` or a `vk.nn.MLP`, is applied by that layer
    before its result is rounded; a `FusedActivation` that passes its input on takes its place.

    Left alone, with the reason in `model.quantization_report` and the log, is what `filter_fn` refuses,
    subclasses with a forward of their own, weights shared with another module, parametrized or hooked
    modules, and widths that the group does not divide. Biases stay the same parameters.

    A quantized checkpoint needs no float model: build the model on the meta device, convert it and
    `load_state_dict(..., assign=True)`; or convert one with random weights and load.

    torch's fused encoder path, which reads float weights by name, is switched off in
    `nn.TransformerEncoderLayer`s that were touched.

    Args:
        model: Any module that contains the layers; itself it must not be one of them.
        scheme: "w8a8", "w8a16", "w4a16", "fp8" or "bf16".
        filter_fn: Called as `filter_fn(module, name)`; False leaves that layer float, or that attention with
            all its projections.
        group_size: 32, 64 or 128 for "w4a16"; None takes the largest that divides K, layer by layer.

    Returns:
        The model. Its parameters no longer include the converted weights: make optimizers afterwards.

    Raises:
        TypeError: If the model is not a module.
        ValueError: If scheme or group_size is unknown, or the model itself would have to be replaced.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8))
        >>> type(vk.quantize_(model, "w8a8")[0]).__name__
        'QuantizedLinear'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"vk.quantize_: model must be a torch.nn.Module, got {type(model).__name__}")
    _check.quantization_group("quantize_", scheme, group_size)
    if isinstance(model, (nn.Linear, nn.MultiheadAttention, nn.Conv2d)):
        raise ValueError(
            f"vk.quantize_: the model itself is a {type(model).__name__}, which cannot be replaced in place; "
            "use vk.nn.QuantizedLinear.from_float (or the like) and keep its result"
        )
    conversion = _Conversion(model, scheme, group_size, filter_fn)
    conversion.visit(model, "")
    _disable_fused_encoder(model)
    report = conversion.report
    model.__dict__["quantization_report"] = report  # no parameter, module or buffer, so no Module.__setattr__
    for name, reason in report.left_alone.items():
        logger.info("quantize_: %s left alone: %s", name, reason)
    level = logging.INFO if report.converted else logging.WARNING
    logger.log(level, "quantize_: %s", str(report).splitlines()[0])
    return model


class _Conversion:
    """One run of `quantize_`: walks the tree, remembers shared modules, writes the report."""

    def __init__(
        self,
        model: nn.Module,
        scheme: str,
        group_size: int | None,
        filter_fn: Callable[[nn.Module, str], bool] | None,
    ) -> None:
        self.scheme = scheme
        self.group_size = group_size
        self.filter_fn = filter_fn
        self.report = QuantizationReport(scheme)
        # By id, which is safe: only what was alive at the start is looked up. References would keep every
        # float layer in memory until the end.
        self.replacements: dict[int, nn.Module | None] = {}
        self.owners: dict[int, list[str]] = {}
        self.fusible: set[int] = set()  # of the layers made here, those with one place in the model
        self.uses = Counter(id(m) for parent in model.modules() for m in parent._modules.values())
        for name, module in model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.owners.setdefault(id(parameter), []).append(name)

    def visit(self, parent: nn.Module, prefix: str) -> None:
        """Converts what `parent` itself holds, then its children."""
        if isinstance(getattr(parent, "in_proj_weight", None), nn.Parameter):
            name = prefix.removesuffix(".")
            if not self._wanted(parent, name):
                self.report.left_alone[name] = "filter_fn said no"
                return
            self._convert_packed(parent, name)
        for child_name, child in list(parent._modules.items()):
            if child is None or isinstance(
                child, (QuantizedLinear, QuantizedPatchEmbedding, QuantizedMultiheadAttention)
            ):
                continue
            name = prefix + child_name
            if not isinstance(child, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
                if id(child) not in self.replacements:
                    self.replacements[id(child)] = None
                    self.visit(child, name + ".")
                continue
            if id(child) not in self.replacements:
                self.replacements[id(child)] = self._convert(child, name)
            replacement = self.replacements[id(child)]
            if replacement is not None:
                if self.uses[id(child)] == 1:
                    self.fusible.add(id(replacement))
                setattr(parent, child_name, replacement)
        self._fuse_activations(parent, prefix)

    def _fuse_activations(self, parent: nn.Module, prefix: str) -> None:
        """Lets a layer that was converted just now apply the activation that follows it in `parent`."""
        if type(parent) is nn.Sequential:
            names = list(parent._modules)
        elif type(parent) is MLP:
            names = ["c_fc", "act"]
        else:
            return
        for first, second in itertools.pairwise(names):
            layer, follower = parent._modules[first], parent._modules[second]
            if not isinstance(layer, QuantizedLinear) or id(layer) not in self.fusible or follower is None:
                continue
            activation = _activation_name(follower)
            if activation is None or self._why_not_replaced(follower) is not None:
                continue
            layer.activation = activation
            parent._modules[second] = FusedActivation(follower).train(follower.training)
            self.report.fused.append(prefix + second)

    def _convert(self, module: _Layer, name: str) -> nn.Module | None:
        """The quantized twin of a layer, or None with the reason in the report."""
        reason = self._why_not(module, name)
        if reason is not None:
            self.report.left_alone[name] = reason
            return None
        self.report.converted.append(name)
        if isinstance(module, nn.MultiheadAttention):
            return QuantizedMultiheadAttention(module, self.scheme, group_size=self.group_size)
        if isinstance(module, nn.Conv2d):
            return QuantizedPatchEmbedding.from_float(module, self.scheme, group_size=self.group_size)
        return QuantizedLinear.from_float(module, self.scheme, group_size=self.group_size)

    def _convert_packed(self, module: Any, name: str) -> None:
        """Replaces an attention's `in_proj_weight` through the module's own `replace_in_proj`."""
        label = f"{name}.in_proj" if name else "in_proj"
        reason = self._why_not_replaced(module)
        if not hasattr(module, "replace_in_proj"):
            reason = f"{type(module).__name__} has no replace_in_proj, so its packed projection stays float"
        weight = module.in_proj_weight
        if reason is None:
            reason = self._why_not_weights([weight])
        if reason is not None:
            self.report.left_alone[label] = reason
            return
        quantized = quantize_weight(weight, self.scheme, group_size=self.group_size)
        layer = QuantizedLinear._from_quantized(quantized, module.in_proj_bias, weight_dtype=weight.dtype)
        module.replace_in_proj(layer.train(module.training))
        self.report.converted.append(label)

    def _why_not(self, module: _Layer, name: str) -> str | None:
        if not self._wanted(module, name):
            return "filter_fn said no"
        reason = self._why_not_replaced(module)
        if reason is not None:
            return reason
        if isinstance(module, nn.MultiheadAttention):
            projections = (
                module.in_proj_weight,
                module.q_proj_weight,
                module.k_proj_weight,
                module.v_proj_weight,
            )
            weights = [w for w in (*projections, module.out_proj.weight) if w is not None]
            return QuantizedMultiheadAttention.why_not(module) or self._why_not_weights(weights)
        if isinstance(module, nn.Conv2d):
            if type(module).forward is not nn.Conv2d.forward:
                return f"is a {type(module).__name__}, whose forward is its own"
            return QuantizedPatchEmbedding.why_not(module) or self._why_not_weights([module.weight])
        if type(module).forward not in (nn.Linear.forward, Linear.forward):
            return f"is a {type(module).__name__}, whose forward is its own"
        return self._why_not_weights([module.weight])

    def _wanted(self, module: nn.Module, name: str) -> bool:
        return self.filter_fn is None or bool(self.filter_fn(module, name))

    def _why_not_replaced(self, module: nn.Module) -> str | None:
        """Reasons that do not depend on the kind of layer."""
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module._parameters.values()):
            return "is not initialised yet (lazy)"
        if parametrize.is_parametrized(module):
            return "is parametrized"
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            return "has hooks, which a replacement would lose"
        return None

    def _why_not_weights(self, weights: list[Tensor]) -> str | None:
        for weight in weights:
            if not weight.is_floating_point():
                return f"has a weight of {weight.dtype}"
            owners = self.owners.get(id(weight), [])
            if len(owners) > 1:
                return f"shares its weight: {', '.join(owners)}"
            inputs = weight[0].numel() if weight.shape[0] else 0
            if self.scheme == "w4a16" and _check.fitting_group(inputs, self.group_size) is None:
                return (
                    f"has {inputs} inputs, not divisible by the group ({self.group_size or '32, 64 or 128'})"
                )
        return None


def _activation_name(module: nn.Module) -> str | None:
    """What `vk.quantized_linear` calls an activation module, or None where it has no such activation."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    names: dict[type[nn.Module], str] = {nn.SiLU: "silu", nn.ReLU: "relu", QuickGELU: "quick_gelu"}
    return names.get(type(module))


def _disable_fused_encoder(model: nn.Module) -> None:
    """Keeps torch's encoder layers, where a part is quantized, from handing its weights to a fused kernel."""
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)) and any(
            isinstance(child, QuantizedLinear) for child in module.modules()
        ):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            else:
                module.activation_relu_or_gelu = 0


def dequantize_(model: nn.Module) -> nn.Module:
    """Undoes `quantize_` in place, up to the quantization error: `weight = (weight_q - zero_point) * scale`.

    Args:
        model: A model that `quantize_` converted; itself it must not be a quantized layer.

    Returns:
        The model, with `nn.Linear`, `nn.MultiheadAttention` and `nn.Conv2d` back in place, float and
        trainable.

    Raises:
        TypeError: If the model is not a module.
        ValueError: If the model itself is a quantized layer (use its `to_float`).

    Example:
        >>> model = vk.quantize_(nn.Sequential(nn.Linear(64, 32)), "w8a8")
        >>> type(vk.nn.dequantize_(model)[0]).__name__
        'Linear'
    """
    kinds = (QuantizedLinear, QuantizedPatchEmbedding, QuantizedMultiheadAttention)
    if not isinstance(model, nn.Module):
        raise TypeError(f"vk.nn.dequantize_: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, kinds):
        raise ValueError(
            f"vk.nn.dequantize_: the model itself is a {type(model).__name__}; use its to_float()"
        )
    replacements: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        if isinstance(parent, kinds):
            continue
        _separate_activations(parent)
        for name, child in list(parent._modules.items()):
            if not isinstance(child, kinds):
                continue
            if child not in replacements:
                replacements[child] = child.to_float()
            if name == "in_proj" and "in_proj_weight" in parent._parameters:
                parent._modules["in_proj"] = None
                parent.in_proj_weight = replacements[child].weight
                parent.in_proj_bias = replacements[child].bias
            else:
                setattr(parent, name, replacements[child])
    model.__dict__.pop("quantization_report", None)
    return model


def _separate_activations(parent: nn.Module) -> None:
    """Puts fused activations back behind the layers that applied them."""
    layer: nn.Module | None = None
    for name, child in list(parent._modules.items()):
        if isinstance(child, FusedActivation):
            parent._modules[name] = child.__dict__["original"].train(child.training)
            if isinstance(layer, QuantizedLinear):
                layer.activation = None
        layer = child
