# SPDX-License-Identifier: Apache-2.0
"""`torch.nn.MultiheadAttention` with quantized projections."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from vlmkernels.nn.quantized import QuantizedLinear
from vlmkernels.ops.attention import attention
from vlmkernels.ops.quantized import quantize_weight, quantized_linear

__all__ = ["QuantizedMultiheadAttention"]


class QuantizedMultiheadAttention(nn.Module):
    """`torch.nn.MultiheadAttention` with quantized projections and `vk.attention` between them.

    Same call and same results up to quantization, with three differences: a query that no key may answer
    gives 0 before the output projection (torch: NaN); `is_causal=True` needs no `attn_mask` where both
    lengths are equal; the returned weights are those before dropout. `need_weights=True` computes the weights
    apart, in O(Lq * Lk) memory, and leaves the output as it is.

    Args:
        attention_module: The float module. Its biases are shared (where `kdim` or `vdim` differ, the input
            bias is split into copies). `bias_k`, `bias_v` and `add_zero_attn` are refused.
        scheme: As `QuantizedLinear` takes it.
        group_size: As `QuantizedLinear` takes it.
        backend: Passed to both ops.

    Raises:
        ValueError: If the module has what `why_not` names, or the weights do not fit the scheme.
    """

    # Read by torch.nn.TransformerEncoder(Layer), whose fused path would read float weights by name.
    _qkv_same_embed_dim = False
    bias_k = bias_v = None
    add_zero_attn = False

    in_proj: QuantizedLinear | None
    q_proj: QuantizedLinear
    k_proj: QuantizedLinear
    v_proj: QuantizedLinear
    out_proj: QuantizedLinear

    def __init__(
        self,
        attention_module: nn.MultiheadAttention,
        scheme: str = "w8a8",
        *,
        group_size: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        reason = self.why_not(attention_module)
        if reason is not None:
            raise ValueError(f"vk.nn.QuantizedMultiheadAttention: the module {reason}")
        self.embed_dim = attention_module.embed_dim
        self.kdim = attention_module.kdim
        self.vdim = attention_module.vdim
        self.num_heads = attention_module.num_heads
        self.head_dim = attention_module.head_dim
        self.dropout = attention_module.dropout
        self.batch_first = attention_module.batch_first
        self.backend = backend

        def project(weight: Tensor, bias: nn.Parameter | None) -> QuantizedLinear:
            quantized = quantize_weight(weight, scheme, group_size=group_size)
            return QuantizedLinear._from_quantized(
                quantized, bias, weight_dtype=weight.dtype, backend=backend
            )

        bias = attention_module.in_proj_bias
        if attention_module.in_proj_weight is not None:
            self.in_proj = project(attention_module.in_proj_weight, bias)
        else:
            biases: list[nn.Parameter | None] = [None, None, None]
            if bias is not None:
                biases = [nn.Parameter(part.detach().clone()) for part in bias.chunk(3)]
            self.in_proj = None
            self.q_proj = project(attention_module.q_proj_weight, biases[0])
            self.k_proj = project(attention_module.k_proj_weight, biases[1])
            self.v_proj = project(attention_module.v_proj_weight, biases[2])
        self.out_proj = project(attention_module.out_proj.weight, attention_module.out_proj.bias)
        self.train(attention_module.training)

    @staticmethod
    def why_not(module: nn.MultiheadAttention) -> str | None:
        """Why a module cannot be converted, or None."""
        if type(module).forward is not nn.MultiheadAttention.forward:
            return f"is a {type(module).__name__}, whose forward is its own"
        if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
            return "appends keys (add_bias_kv or add_zero_attn)"
        return None

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The bias `[3 D]` of the three input projections, or None."""
        if self.in_proj is not None:
            return self.in_proj.bias
        biases: list[Tensor] = [p.bias for p in (self.q_proj, self.k_proj, self.v_proj) if p.bias is not None]
        return torch.cat(biases) if biases else None

    def _project_rows(self, layer: QuantizedLinear, x: Tensor, start: int, stop: int) -> Tensor:
        """Rows start..stop (in units of D) of the packed projection."""
        first, last = start * self.embed_dim, stop * self.embed_dim
        bias = None if layer.bias is None else layer.bias[first:last]
        return quantized_linear(
            x,
            layer.quantized_weight.rows(first, last),
            bias,
            input_scale=layer.input_scale,
            backend=layer.backend,
        )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        packed = self.in_proj
        if packed is None:
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if query is key and key is value:
            q, k, v = packed(query).chunk(3, dim=-1)
            return q, k, v
        q = self._project_rows(packed, query, 0, 1)
        if key is value:
            k, v = self._project_rows(packed, key, 1, 3).chunk(2, dim=-1)
            return q, k, v
        return q, self._project_rows(packed, key, 1, 2), self._project_rows(packed, value, 2, 3)

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
        """Attends as `torch.nn.MultiheadAttention.forward` does.

        Args:
            query: `[B, Lq, D]`, `[Lq, B, D]` without `batch_first`, or `[Lq, D]`.
            key: `[B, Lk, kdim]` likewise.
            value: `[B, Lk, vdim]` likewise.
            key_padding_mask: `[B, Lk]` (`[Lk]`), bool with True = ignore, or float, added to the scores.
            need_weights: Also return the attention weights.
            attn_mask: `[Lq, Lk]` or `[B * H, Lq, Lk]`, bool with True = ignore, or float, added to the
                scores.
            average_attn_weights: Average the returned weights over the heads.
            is_causal: Says that `attn_mask` is the causal mask (which is then not read where Lq = Lk).

        Returns:
            `(output, weights)`: output like query, weights `[B, Lq, Lk]` or `[B, H, Lq, Lk]`, None without
            `need_weights`.

        Raises:
            ValueError: If a mask does not have one of these shapes, or `is_causal` comes with Lq != Lk and no
                mask.
        """
        batched = query.ndim == 3
        # `is` must survive the transposition: it decides whether one product serves q, k and v.
        moved: dict[int, Tensor] = {}
        for tensor in (query, key, value):
            if id(tensor) not in moved:
                if not batched:
                    moved[id(tensor)] = tensor.unsqueeze(0)
                else:
                    moved[id(tensor)] = tensor if self.batch_first else tensor.transpose(0, 1)
        q, k, v = self._project(moved[id(query)], moved[id(key)], moved[id(value)])
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)) for t in (q, k, v))
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        if is_causal and q.shape[1] == k.shape[1]:
            attn_mask = None
        elif is_causal and attn_mask is None:
            raise ValueError(
                f"vk.nn.QuantizedMultiheadAttention: is_causal with {q.shape[1]} queries and {k.shape[1]} "
                "keys needs attn_mask"
            )
        else:
            is_causal = False
        key_mask, bias = self._masks(q, k, key_padding_mask, attn_mask)
        options: dict[str, Any] = {"bias": bias, "key_mask": key_mask, "is_causal": is_causal}
        options |= {"dropout_p": self.dropout if self.training else 0.0, "backend": self.backend}
        weights = None
        if need_weights:
            attended, lse = attention(q, k, v, return_lse=True, **options)
            weights = _attention_weights(q, k, lse, bias, key_mask, is_causal)
            if average_attn_weights:
                weights = weights.mean(1)
            weights = weights if batched else weights.squeeze(0)
        else:
            attended = cast(Tensor, attention(q, k, v, **options))
        out = self.out_proj(attended.flatten(2))
        if not batched:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return out, weights

    def _masks(
        self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """torch's masks as `vk.attention` takes them: `(key_mask, bias)`."""
        batch, queries, heads, _ = q.shape
        keys = k.shape[1]
        key_mask = bias = None
        if attn_mask is not None:
            shapes = {2: (queries, keys), 3: (batch * heads, queries, keys)}
            if tuple(attn_mask.shape) != shapes.get(attn_mask.ndim):
                raise ValueError(
                    f"vk.nn.QuantizedMultiheadAttention: attn_mask must be {list(shapes[2])} or "
                    f"{list(shapes[3])}, got {list(attn_mask.shape)}"
                )
            bias = _additive(attn_mask, q.dtype).unflatten(0, (batch, heads)) if attn_mask.ndim == 3 else None
            bias = _additive(attn_mask, q.dtype)[None, None] if bias is None else bias
        if key_padding_mask is not None:
            if tuple(key_padding_mask.shape) != (batch, keys):
                raise ValueError(
                    f"vk.nn.QuantizedMultiheadAttention: key_padding_mask must be {[batch, keys]}, "
                    f"got {list(key_padding_mask.shape)}"
                )
            if key_padding_mask.dtype == torch.bool:
                key_mask = ~key_padding_mask
            else:
                padding = key_padding_mask.to(q.dtype)[:, None, None, :].expand(batch, 1, queries, keys)
                bias = padding if bias is None else bias + padding
        return key_mask, bias

    def to_float(self) -> nn.MultiheadAttention:
        """A `torch.nn.MultiheadAttention` with dequantized weights and the same biases."""
        module = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            dropout=self.dropout,
            bias=self.in_proj_bias is not None,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=self.batch_first,
            device=self.out_proj.weight_q.device,
            dtype=self.out_proj.weight_dtype,
        )
        if module.in_proj_weight is None:
            for name in ("q_proj", "k_proj", "v_proj"):
                setattr(module, f"{name}_weight", nn.Parameter(getattr(self, name).weight))
        elif self.in_proj is not None:
            module.in_proj_weight = nn.Parameter(self.in_proj.weight)
        bias = self.in_proj_bias
        if bias is not None:
            module.in_proj_bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach())
        module.out_proj.weight = nn.Parameter(self.out_proj.weight)
        module.out_proj.register_parameter("bias", self.out_proj.bias)
        return module.train(self.training)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask (True = ignore) as 0 and -inf; a float mask as it is."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def _attention_weights(
    q: Tensor, k: Tensor, lse: Tensor, bias: Tensor | None, key_mask: Tensor | None, is_causal: bool
) -> Tensor:
    """`exp(scores - lse)` `[B, H, Lq, Lk]` in q's dtype; lse `[B, H, Lq]` comes from the attention."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).to(lse.dtype) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    if is_causal:
        allowed = allowed.tril()
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]
    # A row with no key has lse = -inf, and -inf - -inf would be NaN.
    allowed = allowed & lse.isfinite().unsqueeze(-1)
    weights = torch.where(allowed, scores - lse.unsqueeze(-1), float("-inf")).exp()
    return weights.to(q.dtype)
