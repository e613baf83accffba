# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend of top-k similarity: what it refuses, and the search around its scan.

The scan multiplies bfloat16 or float16 rows, bounds every score in registers and writes down the few rows that may
still be among the k best. Chunks of the database grow, so that a chunk brings each query some multiples of k
candidates; their exact scores, and the order, are the reference's: those of every other backend, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkernels import _native
from vlmkernels.ops import dispatch
from vlmkernels.ops.reference import topk_scan as scan
from vlmkernels.ops.reference.topk_score import NORM_FLOOR, score_dtype

DTYPES = (torch.bfloat16, torch.float16)

#: Rows that the reference's scan goes through first: their k-th best score is the first limit.
FIRST_ROWS = 4096
#: A chunk is at most so many times what came before it, which is about how many times k candidates it brings.
GROWTH = 3
#: Candidates of one scan: 64 MiB of them.
MOST_CANDIDATES = 2**24
_QUERIES = 8192
_CHUNK = 16

#: What the products may be off by, in units of |q| |x|, for each of D terms and for the roundings around them. The
#: device's sums drop bits instead of rounding them, which doubles the reference's bound.
_ROUNDING = 4 * 2.0**-24


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


def _not_default(call: dispatch.Call) -> list[str]:
    return ["no committed result from a GPU shows it right and faster yet"]


dispatch.register_backend("topk_similarity", "cuda", reasons, priority=5, not_default=_not_default)


def search(
    queries: Tensor,  # [N, D]
    database: Tensor,  # [M, D]
    k: int,
    metric: str,
    mask: Tensor | None,  # [M] or [N, M]
) -> tuple[Tensor, Tensor]:
    """`(scores, indices)` of `vk.topk_similarity`."""
    n, m = queries.shape[0], database.shape[0]
    scores = torch.empty(n, k, dtype=score_dtype(queries), device=queries.device)
    indices = torch.empty(n, k, dtype=torch.int64, device=queries.device)
    first = min(m, max(FIRST_ROWS, 2 * k))
    for start in range(0, n, _QUERIES):
        block = slice(start, min(start + _QUERIES, n))
        allowed = None if mask is None else (mask if mask.ndim == 2 else mask[None]).expand(n, m)[block]
        running = scan.scan_topk(
            queries[block],
            scan.TensorRows(database[:first]),
            k,
            metric,
            mask=None if allowed is None else allowed[:, :first],
        )
        part = _Search(queries[block], database, k, metric, allowed, *running)
        done = first
        while done < m:
            count = min(GROWTH * done, m - done)
            part.add(done, done + count)
            done += count
        scores[block], indices[block] = part.scores, part.indices
    return scores, indices


@dataclass
class _Search:
    """A block of queries and its k best rows so far, which `add` updates in place."""

    queries: Tensor
    database: Tensor
    k: int
    metric: str
    allowed: Tensor | None
    scores: Tensor
    indices: Tensor

    def __post_init__(self) -> None:
        self.rows = scan.TensorRows(self.database)
        self.norm = scan.row_norms(self.queries.double())
        self.padded = _in_chunks(self.queries)
        self.capacity = max(MOST_CANDIDATES // max(self.queries.shape[0], 1), 1)
        eta = _ROUNDING * (self.queries.shape[1] + 32)
        self.slack = (eta * self.norm * (2.0 if self.metric == "l2" else 1.0)).float()
        self.eta = eta

    def add(self, start: int, stop: int) -> None:
        """Rows start to stop of the database; in halves where they bring more candidates than there is room for."""
        capacity = min(self.capacity, stop - start)
        candidates, counts = self._candidates(start, stop, capacity)
        if int(counts.max()) > capacity:
            middle = (start + stop) // 2
            self.add(start, middle)
            self.add(middle, stop)
            return
        query, place = (torch.arange(capacity, device=counts.device) < counts[:, None]).nonzero(as_tuple=True)
        row = candidates[query, place].long() + start
        # A scan leaves candidates in no order.
        order = (query * self.database.shape[0] + row).argsort()
        query, row = query[order], row[order]
        if self.allowed is not None:
            seen = self.allowed[query, row]
            query, row = query[seen], row[seen]
        if query.numel():
            exact = scan._exact_scores(self.queries, self.rows, query, row, self.metric).to(self.scores.dtype)
            scan._merge(self.scores, self.indices, query, exact, row, ascend=True)

    def _candidates(self, start: int, stop: int, capacity: int) -> tuple[Tensor, Tensor]:
        part = self.database[start:stop]
        padded = _in_chunks(part)
        scale, shift, reach = self._columns(part)
        n = self.queries.shape[0]
        limit = self._limit()
        candidates = torch.empty(n, capacity, dtype=torch.int32, device=part.device)
        counts = torch.zeros(n, dtype=torch.int32, device=part.device)
        _native.call(
            "topk_similarity",
            _native.cuda.topk_scan,
            self.padded.data_ptr(),
            padded.data_ptr(),
            n,
            stop - start,
            padded.shape[1] * padded.element_size(),
            padded.dtype == torch.bfloat16,
            self.slack.data_ptr(),
            limit.data_ptr(),
            scale.data_ptr(),
            shift.data_ptr(),
            reach.data_ptr(),
            candidates.data_ptr(),
            capacity,
            counts.data_ptr(),
            *_native.cuda_place(part),
        )
        return candidates, counts

    def _limit(self) -> Tensor:
        """The k-th best score in the scan's terms, rounded down, [N]; NaN where fewer than k rows are known."""
        limit = self.scores[:, -1].double().masked_fill(self.indices[:, -1] < 0, torch.nan)
        if self.metric == "cosine":
            limit = limit * self.norm.clamp(min=NORM_FLOOR)
        elif self.metric == "l2":
            limit = limit + self.norm**2 * (1.0 - 2.0 * self.eta)
        rounded = limit.float()
        # one step for rounding to float32, one for that of the norms' product
        for _ in range(2):
            rounded = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
        return rounded

    def _columns(self, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, shift and reach of the database's rows, [m] each: see csrc/cuda/topk.h."""
        norm = _norms(part)
        ones = torch.ones_like(norm)
        least = torch.full_like(
            norm, part.shape[1] * torch.finfo(torch.float32).tiny
        )  # what underflow may cost
        if self.metric == "dot":
            return ones, least, norm
        if self.metric == "cosine":
            floored = norm.clamp(min=NORM_FLOOR)
            # an unknown norm: nothing is ruled out
            scale = torch.where(floored.isinf(), 1.0, 1.0 / floored)
            return scale, least * scale, torch.where(floored.isinf(), torch.inf, norm * scale)
        # 2 q x - |x|^2 against score + |q|^2: eta (|q| + |x|)^2 is at most 2 eta (|q|^2 + |x|^2)
        return 2.0 * ones, -(norm**2) * (1.0 - 2.0 * self.eta) + 2.0 * least, norm


def _norms(rows: Tensor) -> Tensor:
    """float32 norms, good to D units; infinite where squares may have left float32 and so nothing is known."""
    norm = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)
    doubtful = ~((norm > 1e-12) & (norm < 1e18))
    if bool(doubtful.any()):
        nonzero = (rows != 0).any(-1)
        norm = norm.masked_fill(doubtful & nonzero, torch.inf)
    return norm


def _in_chunks(rows: Tensor) -> Tensor:
    """`[M, D]` whose rows are whole 16-byte chunks; a padded copy where D is no multiple of 8."""
    padding = -rows.shape[1] % (_CHUNK // rows.element_size())
    rows = F.pad(rows, (0, padding)) if padding else rows.contiguous()
    return rows if rows.data_ptr() % _CHUNK == 0 else rows.clone()
