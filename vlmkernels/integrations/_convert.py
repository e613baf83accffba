# SPDX-License-Identifier: Apache-2.0
"""`convert`: a model's attention (and linear) modules on our operations, in place, reported, undoable."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from vlmkernels.integrations import open_clip, timm, transformers
from vlmkernels.integrations._modules import (
    Converted,
    FusedLinear,
    FusedMultiheadAttention,
    RoutedForward,
    converted_class,
)

__all__ = ["ConversionReport", "convert"]

logger = logging.getLogger(__name__)


@dataclass
class ConversionReport:
    """What `convert` did, and the way back.

    Attributes:
        converted: name of each converted module, and the class (or attention implementation) that it has now.
        left_alone: name of each candidate that stayed as it was, and why.
    """

    converted: dict[str, str] = field(default_factory=dict)
    left_alone: dict[str, str] = field(default_factory=dict)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Gives every module that this call converted its own class back; once undone, again is harmless."""
        while self._undo:
            self._undo.pop()()

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} modules converted, {len(self.left_alone)} left alone"]
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.left_alone.items()])


def convert(
    model: nn.Module, *, linear: bool = False, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> ConversionReport:
    """Puts a model's attention on `vk.attention`, in place: parameters, state dict, hooks and results stay.

    Converted are

    * `nn.MultiheadAttention`: calls without weights (`need_weights=False`) run on `vk.attention`;
    * timm's modules with `fused_attn`, open_clip's `Attention`, and any other module whose forward calls
      torch's `scaled_dot_product_attention`: the forward stays theirs, that call becomes ours;
    * models of transformers: `attn_implementation="vlmkernels"`;
    * with `linear=True`, `nn.Linear`: `vk.linear`, where it has a kernel for the shape.

    A module changes its class and nothing else, so optimizers, DDP and references to it go on working; it may
    be pickled and deep-copied. Calls that no kernel serves run as before. A second call converts what is new.

    Not reached: attention written out as matrix products, `nn.MultiheadAttention` asked for its weights, and
    `nn.TransformerEncoderLayer` in eval mode without gradients, where torch runs a fused layer of its own.
    Quantize (`vk.quantize_`) before converting: it leaves converted modules alone.

    Args:
        model: any module.
        linear: convert `nn.Linear` too. It pays where `vk.linear` beats torch; measure.
        filter_fn: called as `filter_fn(module, name)` for each candidate; False leaves it alone.

    Returns:
        What was converted and what was left alone, with the reason; `report.undo()` takes it back.

    Raises:
        TypeError: the model is not a module.

    Example:
        >>> model = torch.nn.MultiheadAttention(64, 4, batch_first=True)
        >>> report = vk.integrations.convert(model)
        >>> report.converted
        {'': 'VkMultiheadAttention'}
        >>> report.undo()
        >>> type(model).__name__
        'MultiheadAttention'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"vk.integrations.convert: model must be a torch.nn.Module, got {type(model).__name__}"
        )
    report = ConversionReport()

    def wanted(module: nn.Module, name: str) -> bool:
        if filter_fn is None or filter_fn(module, name):
            return True
        report.left_alone[name] = "filter_fn said no"
        return False

    _convert_transformers(model, wanted, report)
    for name, module in list(model.named_modules()):
        kind = _kind(module, linear)
        if kind is None or not wanted(module, name):
            continue
        reason = _why_not(module, kind)
        if reason is not None:
            report.left_alone[name] = reason
            continue
        _swap(module, kind, report)
        report.converted[name] = type(module).__name__
    for name, reason in report.left_alone.items():
        logger.info("convert: %s left alone: %s", name, reason)
    return report


def _kind(module: nn.Module, linear: bool) -> type[Converted] | None:
    """What a module would be converted to; None: it is no candidate, or converted already."""
    if isinstance(module, Converted):
        return None
    if isinstance(module, nn.MultiheadAttention):
        return FusedMultiheadAttention
    if timm.is_attention(module) or open_clip.is_attention(module) or _calls_sdpa(module):
        return RoutedForward
    return FusedLinear if linear and isinstance(module, nn.Linear) else None


def _calls_sdpa(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "scaled_dot_product_attention" in code.co_names


def _why_not(module: nn.Module, kind: type[Converted]) -> str | None:
    own = f"is a {type(module).__name__}, whose forward is its own"
    if isinstance(module, torch.jit.ScriptModule):
        return "is compiled by TorchScript"
    if parametrize.is_parametrized(module):
        return "is parametrized"
    if "forward" in module.__dict__:
        return "its forward has been replaced on the instance"
    if isinstance(module, nn.MultiheadAttention):
        if type(module).forward is not nn.MultiheadAttention.forward:
            return own
        if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
            return "appends keys (add_bias_kv or add_zero_attn)"
    elif kind is FusedLinear:
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters(recurse=False)):
            return "is not initialised yet (lazy)"
        # torch.nn.MultiheadAttention's out_proj is a subclass that adds nothing.
        return own if type(module).forward is not nn.Linear.forward else None
    elif timm.is_attention(module):
        return timm.why_not(module)
    elif open_clip.is_attention(module):
        return open_clip.why_not(module)
    return None


def _swap(module: nn.Module, kind: type[Converted], report: ConversionReport) -> None:
    original = type(module)
    cls = converted_class(kind, original)
    module.__class__ = cls

    def undo() -> None:
        if type(module) is not cls:
            logger.warning("convert: a %s has been changed since, and stays", type(module).__name__)
            return
        module.__class__ = original

    report._undo.append(undo)


def _convert_transformers(
    model: nn.Module, wanted: Callable[[nn.Module, str], bool], report: ConversionReport
) -> None:
    """Switches the attention implementation of the outermost models of transformers inside a model."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:  # nobody has imported it, so no module can be an instance of its classes
        return
    found = {n: m for n, m in model.named_modules() if isinstance(m, modeling.PreTrainedModel)}
    outermost = [n for n in found if not any(n != other and _inside(n, other) for other in found)]
    for root in outermost:
        configs = {n: m.config for n, m in found.items() if n == root or _inside(n, root)}
        if all(c._attn_implementation == transformers.NAME for c in configs.values()):
            continue
        if not wanted(found[root], root):
            continue
        before = {id(c): (c, c._attn_implementation) for c in configs.values()}
        transformers.register()
        found[root].set_attn_implementation(transformers.NAME)
        for name, config in configs.items():
            changed = config._attn_implementation == transformers.NAME
            if not changed:
                report.left_alone[name] = "its attention does not go through transformers' interface"
            elif before[id(config)][1] != transformers.NAME:
                report.converted[name] = f'attn_implementation="{transformers.NAME}"'
        report._undo.append(lambda before=before: _restore(before))  # type: ignore[misc]


def _restore(before: dict[int, tuple[Any, str | None]]) -> None:
    for config, implementation in before.values():
        # The property would set the configs inside too, each of which has its own entry here.
        config._attn_implementation_internal = implementation


def _inside(name: str, outer: str) -> bool:
    return name != outer and (outer == "" or name.startswith(outer + "."))
