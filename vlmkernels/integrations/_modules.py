# SPDX-License-Identifier: Apache-2.0
"""What converted modules become: a class of ours in front of their own, made when it is first needed.

A module keeps its parameters, buffers, hooks and name; only its class changes, so undoing is one assignment.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.integrations._attend import multi_head_attention, multi_head_reasons
from vlmkernels.integrations.torch import batch_first, sdpa
from vlmkernels.nn.linear import project

__all__ = ["Converted", "FusedLinear", "FusedMultiheadAttention", "RoutedForward", "converted_class"]

_routing = sdpa()  # it has no state, and may be entered again inside itself and in other threads


class Converted(nn.Module):
    """Base of the classes that a converted module gets in front of its own."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class exists in this process only: pickle and deepcopy make it again from its two halves.
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new, type(self).__bases__, *reduced[2:])


class RoutedForward(Converted):
    """A forward of another library's, in which torch's attention function is ours."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _routing:
            return super().forward(*args, **kwargs)


class FusedLinear(Converted):
    """`torch.nn.Linear` on `vk.linear` where that is the faster one."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        return project(input, self.weight, self.bias)


class FusedMultiheadAttention(Converted):
    """`torch.nn.MultiheadAttention` without weights on `vk.attention`; with weights it is torch's."""

    def forward(
        self,
        query: Tensor,  # [B, Lq, D]; [Lq, B, D] without batch_first; [Lq, D]
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `torch.nn.MultiheadAttention.forward`; a query that sees no key gives the output bias."""
        masks: dict[str, Any] = {
            "key_padding_mask": key_padding_mask,
            "attn_mask": attn_mask,
            "is_causal": is_causal,
        }
        q, k, v = (query, key, value) if self.batch_first else batch_first(query, key, value)
        heads: int = self.num_heads  # type: ignore[assignment]
        if need_weights or multi_head_reasons(q, k, v, heads, **masks):
            weights = {"need_weights": need_weights, "average_attn_weights": average_attn_weights}
            return super().forward(query, key, value, **masks, **weights)
        out_proj: Any = self.out_proj
        separate: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        packed: Any = self.in_proj_weight
        in_bias: Any = self.in_proj_bias
        dropout: float = self.dropout  # type: ignore[assignment]
        out = multi_head_attention(
            q,
            k,
            v,
            heads,
            packed if self._qkv_same_embed_dim else separate,
            in_bias,
            out_proj.weight,
            out_proj.bias,
            dropout_p=dropout if self.training else 0.0,
            # torch reads out_proj's weights and never calls it: that it is converted speaks for all projections.
            linear=project if isinstance(out_proj, FusedLinear) else F.linear,
            **masks,
        )
        return out if self.batch_first else out.transpose(0, 1), None


_classes: dict[tuple[type[Converted], type[nn.Module]], type[nn.Module]] = {}


def converted_class(kind: type[Converted], original: type[nn.Module]) -> type[nn.Module]:
    """The class `(kind, original)`, one per pair."""
    if (kind, original) not in _classes:
        body = {"__module__": kind.__module__, "__doc__": kind.__doc__}
        _classes[kind, original] = type(f"Vk{original.__name__}", (kind, original), body)
    return _classes[kind, original]


def _new(kind: type[Converted], original: type[nn.Module]) -> nn.Module:
    cls = converted_class(kind, original)
    return cls.__new__(cls)
