# SPDX-License-Identifier: Apache-2.0
"""torch: a context in which its attention functions run on our kernels, for code that cannot be edited."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vlmkernels.integrations._attend import (
    multi_head_attention,
    multi_head_reasons,
    serves_scaled_dot_product,
)
from vlmkernels.ops.attention import scaled_dot_product_attention

__all__ = ["sdpa"]

_multi_head_signature = inspect.signature(F.multi_head_attention_forward)


class sdpa(contextlib.ContextDecorator, TorchFunctionMode):  # noqa: N801 (used as a function is)
    """Routes `torch.nn.functional.scaled_dot_product_attention` to `vk.scaled_dot_product_attention`.

    Also `F.multi_head_attention_forward` without weights (what `nn.MultiheadAttention` calls), because torch
    switches such a mode off inside it. A call that no kernel serves (nested tensors, a dtype or head dim that
    is not built, shapes that torch broadcasts) goes to torch's own function. In this thread only; contexts
    nest, and torch.compile traces through them.

    A context costs about a microsecond per torch call inside it: where the model is yours,
    `vlmkernels.integrations.convert` is the better tool. Activation checkpointing runs a forward again in
    `backward`, where torch has switched modes off: convert the model, or decorate the checkpointed function.

    Example:
        >>> import torch.nn.functional as F
        >>> q, k, v = torch.randn(3, 2, 8, 77, 64)
        >>> with vk.integrations.torch.sdpa():
        ...     out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))

        As a decorator:

        >>> @vk.integrations.torch.sdpa()
        ... def attend(q, k, v):
        ...     return F.scaled_dot_product_attention(q, k, v)
        >>> attend(q, k, v).shape
        torch.Size([2, 8, 77, 64])
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and serves_scaled_dot_product(*args, **kwargs):
            return scaled_dot_product_attention(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return _multi_head_attention_forward(*args, **kwargs)
        if func is Tensor.unflatten:  # torch.compile cannot trace that method through a mode
            return torch.unflatten(*args, **kwargs)
        return func(*args, **kwargs)


def _multi_head_attention_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """torch's function of this name: `[L, B, E]`, and the weights of all three projections as arguments."""
    bound = _multi_head_signature.bind(*args, **kwargs)
    bound.apply_defaults()
    a = bound.arguments
    appended = [a[name] for name in ("bias_k", "bias_v", "static_k", "static_v")]
    if a["need_weights"] or a["add_zero_attn"] or any(x is not None for x in appended):
        return F.multi_head_attention_forward(*args, **kwargs)
    query, key, value = batch_first(a["query"], a["key"], a["value"])
    masks = {name: a[name] for name in ("key_padding_mask", "attn_mask", "is_causal")}
    if multi_head_reasons(query, key, value, a["num_heads"], **masks):
        return F.multi_head_attention_forward(*args, **kwargs)
    separate = (a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"])
    out = multi_head_attention(
        query,
        key,
        value,
        a["num_heads"],
        separate if a["use_separate_proj_weight"] else a["in_proj_weight"],
        a["in_proj_bias"],
        a["out_proj_weight"],
        a["out_proj_bias"],
        dropout_p=a["dropout_p"] if a["training"] else 0.0,
        **masks,
    )
    return out.transpose(0, 1), None


def batch_first(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three with their first two dimensions exchanged; what was one object stays one."""
    if query.ndim != 3:
        return query, key, value
    moved = {id(x): x.transpose(0, 1) for x in (query, key, value)}
    return moved[id(query)], moved[id(key)], moved[id(value)]
