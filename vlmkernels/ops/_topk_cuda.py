# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend of top-k similarity: what it refuses, and its scan; `_topk_search.py` is the search around it.

The scan multiplies bfloat16 or float16 rows and keeps its bounds in registers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkernels import _native
from vlmkernels.ops import _topk_search, dispatch, measured
from vlmkernels.ops._topk_cpu import Rows

DTYPES = (torch.bfloat16, torch.float16)

_CHUNK = 16


def reasons(call: dispatch.Call) -> list[str]:
    """Why the kernels cannot serve a call; this is the whole list of refusals."""
    if _native.cuda_reason is not None:
        return [_native.cuda_reason]
    against = []
    if call.device != _native.CUDA_DEVICE:
        against.append(f"it serves cuda tensors, not {call.device}")
    if call.dtype not in DTYPES:
        against.append(f"it multiplies bfloat16 and float16, not {call.dtype}")
    return against


dispatch.register_backend(
    "topk_similarity",
    "cuda",
    reasons,
    priority=5,
    not_default=measured.unless_fastest("topk_similarity", "cuda"),
)


def search(
    queries: Tensor,
    rows: Sequence[Rows],
    k: int,
    metric: str,
    *,
    allowed: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_topk_cpu.search`, of rows in the queries' dtype."""
    return _topk_search.search(CudaScan(), queries, rows, k, metric, allowed=allowed, mask=mask)


class CudaScan(_topk_search.Scan):
    """Blocks of rows whose bounds have neither factor nor offset: see csrc/cuda/topk.h."""

    def candidates(self, block: _topk_search.Block, limit: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        queries, rows = _in_chunks(block.queries), _in_chunks(block.taken())
        candidates, counts = _topk_search.room_for_candidates(block, capacity)
        _native.call(
            "topk_similarity",
            _native.cuda.topk_scan,
            queries.data_ptr(),
            rows.data_ptr(),
            queries.shape[0],
            block.count,
            rows.shape[1] * rows.element_size(),
            rows.dtype == torch.bfloat16,
            block.slack.data_ptr(),
            limit.data_ptr(),
            block.scale.data_ptr(),
            block.shift.data_ptr(),
            block.reach.data_ptr(),
            candidates.data_ptr(),
            capacity,
            counts.data_ptr(),
            *_native.cuda_place(rows),
        )
        return candidates, counts


def _in_chunks(rows: Tensor) -> Tensor:
    """`[M, D]` whose rows are whole 16-byte chunks; a padded copy where D is no multiple of 8."""
    padding = -rows.shape[1] % (_CHUNK // rows.element_size())
    rows = F.pad(rows, (0, padding)) if padding else rows.contiguous()
    return rows if rows.data_ptr() % _CHUNK == 0 else rows.clone()
