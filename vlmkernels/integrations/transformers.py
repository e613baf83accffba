# SPDX-License-Identifier: Apache-2.0
"""transformers: `attn_implementation="vlmkernels"`, in the attention interface and the mask interface.

Both are needed. A name that only the attention interface knows gets no mask at all, and a padded batch then
attends to its padding without a word.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn

from vlmkernels.integrations._attend import attend

__all__ = ["NAME", "attention_forward", "attention_mask", "register"]

logger = logging.getLogger(__name__)

#: The value of `attn_implementation`.
NAME = "vlmkernels"


def register() -> str:
    """Makes `attn_implementation="vlmkernels"` known to transformers, in both interfaces; again is harmless.

    Then `AutoModel.from_pretrained(..., attn_implementation="vlmkernels")`, or `set_attn_implementation` (or
    `vlmkernels.integrations.convert`) on a model that exists. Padding stays a mask over keys, causality a flag;
    only patterns such as sliding windows become a dense mask. Calls that no kernel serves run on torch's
    `scaled_dot_product_attention`.

    Differences from "eager": no attention weights are returned (as "sdpa"), and a query that sees no key (left
    padding) gives 0 instead of an average.

    Returns:
        The name.

    Raises:
        ImportError: transformers is not installed, or has no mask interface (before 4.53).
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    # Before 5 the mask functions took cache positions; torch's dense mask is always right.
    known = "q_length" in inspect.signature(sdpa_mask).parameters
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask if known else sdpa_mask)
    return NAME


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **options: Any,
) -> Tensor | None:
    """The mask that `attention_forward` gets; arguments are those of transformers' own mask functions.

    Returns:
        None: nothing is hidden (or, for a module that says is_causal, what comes later). `[B, Lk]`, bool:
        causal, ending with the last key, and these keys. `[B, 1, 1, Lk]`, bool: these keys, for every query.
        `[B, 1, Lq, Lk]`, bool: the whole pattern. True = attend. A model that combines masks asks for the
        whole pattern by forbidding the skips.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    mask_function = causal_mask_function if mask_function is None else mask_function
    # A static cache counts its queries in a tensor; a shorter past than keys leaves causality unaligned.
    aligned = not isinstance(q_offset, Tensor) and q_offset - kv_offset == kv_length - q_length
    causal = mask_function is causal_mask_function and allow_is_causal_skip and aligned
    bidirectional = mask_function is bidirectional_mask_function and allow_is_bidirectional_skip
    if attention_mask is not None and (causal or bidirectional):
        missing = kv_length + kv_offset - attention_mask.shape[-1]
        keys = torch.nn.functional.pad(attention_mask, (0, missing)) if missing > 0 else attention_mask
        keys = keys[:, kv_offset : kv_offset + kv_length].to(torch.bool)
        if _traced(keys) or not bool(keys.all()):
            return keys if causal else keys[:, None, None, :]
        attention_mask = None
    if attention_mask is None and causal and q_length not in (1, kv_length):
        # Later queries of a longer sequence: no pattern is needed to end with the last key.
        device = options.get("device", "cpu")
        return torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        **options,
    )


def attention_forward(
    module: nn.Module,
    query: Tensor,  # [B, H, Lq, D]
    key: Tensor,  # [B, Hk, Lk, D]
    value: Tensor,  # [B, Hk, Lk, Dv]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,  # [B|1, H|1, Lq, Lk]
    **options: Any,
) -> tuple[Tensor, None]:
    """`vk.attention` with the arguments of transformers' attention functions.

    Args:
        module: the attention module; its `is_causal` counts where no mask and no argument speaks.
        query: `[B, H, Lq, D]`.
        key: `[B, Hk, Lk, D]`; Hk divides H.
        value: `[B, Hk, Lk, Dv]`.
        attention_mask: what `attention_mask` returned, or a 4-d mask of the caller's, bool or additive.
        dropout: probability with which a weight is dropped.
        scaling: factor of the scores; None means `D ** -0.5`.
        is_causal: overrides the module's.
        position_bias: added to the scores.
        options: what other implementations need; ignored where the result does not depend on it.

    Returns:
        `([B, Lq, H, Dv], None)`.

    Raises:
        ValueError: the model needs a soft cap or attention sinks.
    """
    for name in ("softcap", "s_aux"):
        if options.get(name) is not None:
            raise ValueError(
                f'attn_implementation="{NAME}": {name} is not served; use "eager" for this model'
            )
    if options.get("output_attentions"):
        _warn_of_weights()
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if q.shape[0] == 1 and k.shape[0] > 1:  # learned queries
        q = q.expand(k.shape[0], -1, -1, -1)
    queries, keys = q.shape[1], k.shape[1]
    bias = key_mask = None
    causal = False
    if attention_mask is None:
        # The attribute is not assumed: modules without it are encoders'.
        causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal) and queries > 1
        if causal and queries != keys:  # the prefill of a static cache: query i sees the keys up to i
            attention_mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril()[None, None]
            causal = False
    if attention_mask is not None:
        if attention_mask.ndim == 2:
            key_mask, causal = attention_mask, True
        elif attention_mask.dtype == torch.bool and attention_mask.shape[1] == attention_mask.shape[2] == 1:
            key_mask = attention_mask[:, 0, 0].expand(k.shape[0], keys)
        else:
            bias = _additive(attention_mask, q).expand(-1, -1, queries, keys)
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
        bias = _additive(bias, q).expand(-1, -1, queries, keys)
    out = attend(
        q, k, v, bias=bias, key_mask=key_mask, is_causal=causal, scale=scaling, dropout_p=float(dropout)
    )
    return out.contiguous(), None


def _additive(mask: Tensor, q: Tensor) -> Tensor:
    """A 4-d mask as a bias: bool (True = attend) becomes 0 and -inf."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    return mask if mask.dtype in (q.dtype, torch.float32) else mask.to(q.dtype)


def _traced(x: Tensor) -> bool:
    """Whether values cannot be read, because the program is being recorded."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return tracing or isinstance(x, torch._subclasses.FakeTensor)


@functools.cache
def _warn_of_weights() -> None:
    logger.warning('attn_implementation="%s" returns no attention weights; use "eager" for them', NAME)
