# SPDX-License-Identifier: Apache-2.0
"""Attention kernels that torch carries, FlashAttention's and cuDNN's, as internal choices of `dispatch`.

Nobody names them: they serve a call only where a committed result from a GPU shows one faster than our kernels for
such shapes (`measured.py`), and only without gradients, because their backward passes are not deterministic.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlmkernels.ops import _triton, dispatch, measured

FLASH, CUDNN = "torch_flash", "torch_cudnn"
DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = {FLASH: 256, CUDNN: 128}


def reasons(name: str) -> Callable[[dispatch.Call], list[str]]:
    """The function that lists why one of the two cannot serve a call."""

    def against(call: dispatch.Call) -> list[str]:
        if call.device != "cuda":
            return [f"it serves cuda tensors, not {call.device}"]
        facts, found = call.facts, []
        if call.dtype not in DTYPES:
            found.append(f"it computes in bfloat16 and float16, not {call.dtype}")
        if facts["gradient"]:
            found.append("its backward pass is not deterministic")
        for option in ("bias", "key_mask", "dropout", "return_lse"):
            if facts[option]:
                found.append(f"it is not asked for {option}")
        if not facts["head_dim"] == facts["value_dim"] <= MAX_HEAD_DIM[name] or facts["head_dim"] % 8:
            found.append(
                f"head dims are multiples of 8 up to {MAX_HEAD_DIM[name]}, alike for keys and values"
            )
        if facts["heads"] != facts["key_heads"]:
            found.append("queries and keys have as many heads")
        if facts["is_causal"] and facts["queries"] != facts["keys"]:
            found.append("it aligns a causal mask to the start")
        if 0 in (facts["queries"], facts["keys"]):
            found.append("there is nothing to attend to")
        if not found and not _available(name):
            found.append("this torch was built without it")
        return found

    return against


def _available(name: str) -> bool:
    if name == FLASH:
        return torch.backends.cuda.is_flash_attention_available()
    return torch.backends.cudnn.is_available()


# As in `dispatch`: Dynamo asks once and keeps the answer.
_available._dynamo_marked_constant = True  # type: ignore[attr-defined]

for _name in (FLASH, CUDNN):
    dispatch.register_backend(
        "attention",
        _name,
        reasons(_name),
        priority=_triton.PRIORITY + 1,
        not_default=measured.unless_fastest("attention", _name),
    )


def forward(name: str, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> Tensor:
    """`[B, L, H, D]`, contiguous, by the kernel of this name. The ops are called as they are: choosing them through
    `sdpa_kernel` would set flags of the whole process."""
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    if name == FLASH:
        result = torch.ops.aten._scaled_dot_product_flash_attention(
            *heads_first, 0.0, is_causal, False, scale=scale
        )
    else:
        result = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *heads_first, None, False, 0.0, is_causal, False, scale=scale
        )
    return result[0].transpose(1, 2).contiguous()
