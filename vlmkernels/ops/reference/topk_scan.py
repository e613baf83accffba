# SPDX-License-Identifier: Apache-2.0
"""The search behind top-k similarity: a fast approximate scan with an error bound, then exact scores for what is left.

Every score that is returned comes from `pair_scores`, and so does the order. The scan only rules rows out: its products
are ordinary float32 matrix products (over the vectors, or over quantized codes), each with a bound on its distance
from the exact score, and a row is dropped only if even its upper bound cannot reach the k-th best. So the answer does
not depend on how the work was cut, on the thread count, or on the codes. Nothing larger than a tile of scores exists
at once.

The bound. With u the rounding unit (2**-24 for float32), a query q = |q| e, and a row x that is scanned as w y:

    |fl(e . y) w - e . x|  <=  eta (|x| + r) + r,    eta = 2 (D + 32) u,    r >= |x - w y|

since the rounding error of a D-term sum, in any order, is at most D u |e| |y| (Higham, Accuracy and Stability of
Numerical Algorithms, equation 3.5); eta leaves as much again for approximate norms, scaling and the other roundings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .._library import no_autocast
from .topk_score import NORM_FLOOR, norms, pair_scores, score_dtype

# Scores of one tile; with the bounds and masks beside them about 20 MiB.
_TILE_SCORES = 2**20
# Elements of one chunk of the database, 16 MiB of float32, and of the float64 rows that are rescored at once.
_CHUNK_ELEMENTS = 2**22
_RESCORE_ELEMENTS = 2**20
# A tile keeps a selection of its own where this many times k rows of each query pass the running threshold.
_CROWDED = 4


@dataclass
class Chunk:
    """Consecutive rows of a database as the scan multiplies them.

    Attributes:
        rows: [m, D], floating; vector j is about `scale[j] * rows[j]`.
        norm: [m] norms of the vectors, to within D u.
        scale: [m], None = 1.
        residual: [m] upper bounds on `|vector - scale * rows|`, None = 0.
    """

    rows: Tensor
    norm: Tensor
    scale: Tensor | None = None
    residual: Tensor | None = None


class Rows(Protocol):
    """A database to scan: chunks for the bound, single vectors for the exact scores.

    Attributes:
        count: number of rows.
        width: D.
        labels_ascend: whether labels grow with the rows. If not, ties take a little more work.
    """

    count: int
    width: int
    labels_ascend: bool

    def chunk(self, start: int, stop: int) -> Chunk:
        """Rows start to stop as the scan wants them."""

    def gather(self, rows: Tensor) -> Tensor:
        """The vectors themselves, [P, D] for int64 [P]."""

    def labels(self, rows: Tensor) -> Tensor:
        """What is returned for a row and decides between equal scores: distinct and not negative, int64 [P]."""


class TensorRows:
    """The rows of a tensor [M, D], or those at `positions` (int64 [m], ascending), labelled by their position."""

    labels_ascend = True

    def __init__(self, database: Tensor, positions: Tensor | None = None) -> None:
        self.count = database.shape[0] if positions is None else positions.shape[0]
        self.width = database.shape[1]
        self._database = database
        self._positions = positions

    def chunk(self, start: int, stop: int) -> Chunk:
        if self._positions is None:
            rows = self._database[start:stop]
        else:
            rows = self._database.index_select(0, self._positions[start:stop])
        rows = rows.to(score_dtype(rows))
        return Chunk(rows, row_norms(rows))

    def gather(self, rows: Tensor) -> Tensor:
        return self._database.index_select(0, self.labels(rows))

    def labels(self, rows: Tensor) -> Tensor:
        return rows if self._positions is None else self._positions[rows]


@torch.no_grad()
def scan_topk(
    queries: Tensor, source: Rows, k: int, metric: str, *, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k best rows of every query.

    Args:
        queries: [N, D], floating.
        source: the database, `count` rows.
        k: any; where fewer rows are to be had, the rest is label -1 with score -inf.
        metric: "dot", "cosine" or "l2".
        mask: bool [N, count], True = allowed.

    Returns:
        `(scores, labels)`, both [N, k].
    """
    shape = (queries.shape[0], k)
    scores = torch.full(shape, -torch.inf, dtype=score_dtype(queries), device=queries.device)
    best = torch.full(shape, -1, dtype=torch.int64, device=queries.device)
    if k == 0:
        return scores, best
    for tile in _tiles(queries, source, metric):
        # A row that only equals the k-th best loses to it if its label is larger.
        limit = scores[tile.queries, -1:].masked_fill(best[tile.queries, -1:] < 0, torch.nan)
        keep = ~(tile.upper <= limit) if source.labels_ascend else ~(tile.upper < limit)
        if mask is not None:
            keep &= mask[tile.queries, tile.rows]
        if keep.shape[1] > k and int(keep.sum()) > _CROWDED * k * keep.shape[0]:
            # Rows below k lower bounds of this very tile are out as well.
            lower = tile.lower().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
            keep &= ~(tile.upper < lower.masked_fill_(~keep, -torch.inf).topk(k).values[:, -1:])
        query, row = keep.nonzero(as_tuple=True)
        if query.numel():
            row += tile.rows.start
            exact = _exact_scores(tile.vectors, source, query, row, metric).to(scores.dtype)
            # Views of this tile's part of the result, updated in place.
            running = scores[tile.queries], best[tile.queries]
            _merge(*running, query, exact, source.labels(row), source.labels_ascend)
    return scores, best


@torch.no_grad()
def scan_range(queries: Tensor, source: Rows, threshold: float, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    """Every row whose score is at least `threshold`.

    Args:
        queries: [N, D], floating.
        source: the database.
        threshold: compared in the dtype of the scores.
        metric: "dot", "cosine" or "l2".

    Returns:
        `(lims, scores, labels)`: int64 [N + 1], and [R] each; query i owns lims[i] to lims[i + 1], best first, equal
        scores by ascending label.
    """
    found_query = [queries.new_empty(0, dtype=torch.int64)]
    found_label = [queries.new_empty(0, dtype=torch.int64)]
    found_score = [queries.new_empty(0, dtype=score_dtype(queries))]
    for tile in _tiles(queries, source, metric):
        query, row = (~(tile.upper < threshold)).nonzero(as_tuple=True)
        if not query.numel():
            continue
        row += tile.rows.start
        exact = _exact_scores(tile.vectors, source, query, row, metric).to(found_score[0].dtype)
        hit = exact >= threshold
        found_query.append(query[hit] + tile.queries.start)
        found_label.append(source.labels(row[hit]))
        found_score.append(exact[hit])
    query, label, score = torch.cat(found_query), torch.cat(found_label), torch.cat(found_score)
    # Least significant key first; a stable sort keeps the order of those before it.
    order = label.argsort(stable=True)
    order = order[score[order].argsort(stable=True, descending=True)]
    order = order[query[order].argsort(stable=True)]
    query, label, score = query[order], label[order], score[order]
    counts = torch.bincount(query, minlength=queries.shape[0])
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]), score, label


def row_norms(x: Tensor) -> Tensor:
    """Norms of rows to within D u, also where squares leave the range of the dtype: [m, D] -> [m], for bounds only."""
    result = torch.linalg.vector_norm(x, dim=-1)
    doubtful = ~((result > 1e-12) & (result < 1e18))
    if bool(doubtful.any()):
        wide = x[doubtful].double()
        top = wide.abs().amax(-1, keepdim=True) if x.shape[-1] else wide.new_zeros((wide.shape[0], 1))
        top = torch.where(top > 0, top, 1.0)
        result[doubtful] = (torch.linalg.vector_norm(wide / top, dim=-1) * top.squeeze(-1)).to(result.dtype)
    return result


@dataclass
class _Tile:
    queries: slice
    rows: slice
    vectors: Tensor
    approximate: Tensor
    margin: Tensor
    upper: Tensor

    def lower(self) -> Tensor:
        return (self.approximate - self.margin).to(self.upper.dtype)


def _tiles(queries: Tensor, source: Rows, metric: str) -> Iterator[_Tile]:
    """Blocks of (queries, rows) in ascending order of rows, with the bounds of their scores.

    An upper bound is at least the exact score after both were rounded to the scores' dtype, since rounding is monotone.
    It is NaN, hence below nothing, where the scan cannot tell.
    """
    n, width = queries.shape
    if n == 0 or source.count == 0:
        return
    dtype = score_dtype(queries)
    norm = row_norms(queries.double())
    units = queries.double() / torch.where(norm > 0, norm, 1.0).unsqueeze(-1)
    multiply = torch.float64 if _rounds_products(queries.device.type) else dtype
    units = units.to(multiply)
    row_step = min(source.count, max(1, _CHUNK_ELEMENTS // max(1, width)), _TILE_SCORES)
    query_step = max(1, _TILE_SCORES // row_step)
    with no_autocast(queries.device.type):
        for first_row in range(0, source.count, row_step):
            rows = slice(first_row, min(first_row + row_step, source.count))
            chunk = source.chunk(rows.start, rows.stop)
            matrix = chunk.rows.to(multiply)
            for first in range(0, n, query_step):
                block = slice(first, min(first + query_step, n))
                approximate, margin = _bounds(units[block] @ matrix.mT, norm[block], chunk, width, metric)
                upper = (approximate + margin).to(dtype)
                yield _Tile(block, rows, queries[block], approximate, margin, upper)


def _rounds_products(device_type: str) -> bool:
    """Whether a global setting lets float32 matrix products round their operands (to TF32 or bfloat16)."""
    library = torch.backends.mkldnn if device_type == "cpu" else torch.backends.cuda
    setting = getattr(library.matmul, "fp32_precision", None) if hasattr(library, "matmul") else None
    if setting is None:
        # Releases before 2.9 have the one switch.
        return torch.get_float32_matmul_precision() != "highest"
    return setting not in ("none", "ieee")


def _bounds(
    product: Tensor, query_norm: Tensor, chunk: Chunk, width: int, metric: str
) -> tuple[Tensor, Tensor]:
    """Approximate scores [n, m] and how far they may be off, from the products of unit queries with a chunk's rows."""
    # Of the norms' dtype: the product may be wider.
    finfo = torch.finfo(chunk.norm.dtype)
    eta = 2 * (width + 32) * (finfo.eps / 2)
    row_norm = chunk.norm.double()
    residual = torch.zeros_like(row_norm) if chunk.residual is None else chunk.residual.double()
    # What rounding costs each product with a unit query; the last term is what underflow may.
    slack = eta * (row_norm + residual) + residual + width * finfo.tiny
    scale = torch.ones_like(row_norm) if chunk.scale is None else chunk.scale.double()

    # Where an intermediate could overflow float32 the tile is finished in float64, and what overflowed is unknown.
    reach = (query_norm.max() + row_norm.max() + residual.max()) ** 2 * (width + 1)
    if not bool(reach < 1e36):
        product = product.double()
        product = product.masked_fill_(~product.isfinite(), torch.nan)

    def narrow(x: Tensor) -> Tensor:
        return x.to(product.dtype)

    a = query_norm.unsqueeze(1)
    if metric == "cosine":
        a = a / a.clamp(min=NORM_FLOOR)
        floored = row_norm.clamp(min=NORM_FLOOR)
        scale, slack = scale / floored, slack / floored
    approximate = product.mul_(narrow(scale)).mul_(narrow(a))
    margin = narrow(a * 1.0001) * narrow(slack * 1.0001) + 8 * finfo.tiny
    if metric == "l2":
        a, b = narrow(query_norm).unsqueeze(1), narrow(row_norm)
        approximate = approximate.mul_(2).sub_(b * b).sub_(a * a)
        margin = margin.mul_(2).add_((a + b).square_(), alpha=eta)
    return approximate, margin


def _exact_scores(queries: Tensor, source: Rows, query: Tensor, row: Tensor, metric: str) -> Tensor:
    """`pair_scores` of the pairs (query[p], row[p]) in blocks, float64 [P]."""
    step = max(1, _RESCORE_ELEMENTS // max(1, source.width))
    wide = queries.double()
    if metric == "cosine":
        norm = norms(wide)
    parts = []
    for q, x in zip(query.split(step), row.split(step), strict=True):
        vectors = source.gather(x).double()
        if metric == "cosine":
            parts.append(pair_scores(wide[q], vectors, "dot") / (norm[q] * norms(vectors)))
        else:
            parts.append(pair_scores(wide[q], vectors, metric))
    return torch.cat(parts)


def _merge(
    scores: Tensor, labels: Tensor, query: Tensor, new_scores: Tensor, new_labels: Tensor, ascend: bool
) -> None:
    """Put scored rows into the running results, in place.

    Args:
        scores: [n, k], best first.
        labels: [n, k], -1 = nothing yet.
        query: [P], ascending: whose row it is.
        new_scores: [P].
        new_labels: [P], ascending for each query and above all of `labels` where `ascend`.
        ascend: see `scan_topk`.
    """
    k = scores.shape[1]
    touched, place, counts = torch.unique_consecutive(query, return_inverse=True, return_counts=True)
    column = torch.arange(query.numel(), device=query.device) - (counts.cumsum(0) - counts)[place] + k
    shape = (touched.numel(), k + int(counts.max()))
    all_scores = scores.new_full(shape, -torch.inf)
    all_labels = labels.new_full(shape, -1)
    all_scores[:, :k], all_labels[:, :k] = scores[touched], labels[touched]
    all_scores[place, column], all_labels[place, column] = new_scores, new_labels
    if not ascend:
        all_labels, order = all_labels.sort(dim=1, stable=True)
        all_scores = all_scores.gather(1, order)
    order = rank_keys(all_scores, all_labels < 0).sort(dim=1, descending=True, stable=True).indices[:, :k]
    scores[touched] = all_scores.gather(1, order)
    labels[touched] = all_labels.gather(1, order)


def rank_keys(scores: Tensor, missing: Tensor) -> Tensor:
    """int64 keys in the order of scores, NaN below every number, missing below NaN."""
    narrow = torch.int64 if scores.dtype == torch.float64 else torch.int32
    # The bits of positive floats grow with their value, those of negative ones fall; adding 0.0 merges the two zeros.
    bits = (scores + 0.0).view(narrow)
    bits = torch.where(bits < 0, bits ^ torch.iinfo(narrow).max, bits).long()
    lowest = torch.iinfo(torch.int64).min
    return bits.masked_fill(scores.isnan(), lowest + 1).masked_fill(missing, lowest)
