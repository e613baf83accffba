# SPDX-License-Identifier: Apache-2.0
"""The search of a GPU's top-k kernels: what it asks of a scan, the bounds it gives to one, and what is done with the
candidates that come back. Two scans stand behind it: CUDA C++ (`_topk_cuda.py`) and Triton (`triton/topk.py`).

A scan multiplies queries with rows, bounds every score in registers and writes down the few rows that may still be
among the k best. Chunks of the database grow, so that each brings a query some multiples of k candidates; their exact
scores, and the order, are the reference's: those of every other backend, bit for bit.

The bound. A query q = |q| e is multiplied as codes z with q = f z + (at most g |q|), a row x as codes y with
x = centre + R^T (s y + (at most r)); R is orthogonal, and neither it nor the centre need be there:

    <q, x>  <=  f s <z, y> + <q, centre> + |q| (r + (g + eta) (|x| + |centre| + r))

eta holds what products, sums and this expression itself round. Cosine divides by |x|, l2 doubles and subtracts |x|^2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._index_store import rotation
from ._library import no_autocast
from ._topk_cpu import Rows
from .reference import topk_scan as reference
from .reference.quantized import quantize_rows_int8
from .reference.topk_score import NORM_FLOOR, pair_scores, score_dtype

#: Rows that give the first limit: their k-th best lower bound.
FIRST_ROWS = 4096
#: A chunk is so many times what came before it, which is about how many times k candidates it brings: the more the
#: fewer pairs there are, up to `PAIRS` of them.
LEAST_GROWTH, MOST_GROWTH = 3, 64
PAIRS = 2**20
#: Candidates of one scan: 64 MiB of them.
MOST_CANDIDATES = 2**24
#: Approximate scores that exist at once: those of the first rows, and of few queries.
MOST_SCORES = 2**22
_QUERIES = 8192
_EXACT_ELEMENTS = 2**20
_NORM_ELEMENTS = 2**25

#: What the products may be off by, in units of |q| |x|, for each of D terms and for the roundings around them. The
#: device's sums drop bits instead of rounding them, which doubles the reference's bound.
_ROUNDING = 4 * 2.0**-24
#: Norms between which squares stay in float32.
_SMALLEST_NORM, _LARGEST_NORM = 1e-12, 1e18
#: Longest rows whose int8 products stay in 32 bits.
LONGEST_INT8 = (2**31 - 1) // 127**2


@dataclass(frozen=True)
class Block:
    """What a scan multiplies and how it bounds, n queries by m rows. Vectors are float32, contiguous.

    ```
    upper_ij = factor_i dot_ij scale_j + offset_i lift_j + shift_j + slack_i reach_j
    ```

    Attributes:
        queries: [n, D] contiguous, in the dtype of the rows.
        rows: [R, D]; positions: int64 [m'], which of them, None = all.
        first, count: the first row (or position), and m.
        mask: bool [n, m], False = need not be kept; None = all True.
        slack: [n], infinite where nothing is known; factor, offset: [n], None = 1 and 0.
        scale, shift, reach: [m]; lift: [m], None where there is no offset.
        spread: [m], how much of the shift is there to make it an upper bound.
    """

    queries: Tensor
    rows: Tensor
    positions: Tensor | None
    first: int
    count: int
    mask: Tensor | None
    slack: Tensor
    scale: Tensor
    shift: Tensor
    reach: Tensor
    spread: Tensor
    factor: Tensor | None = None
    offset: Tensor | None = None
    lift: Tensor | None = None

    def taken(self) -> Tensor:
        """The rows themselves, [m, D]."""
        part = slice(self.first, self.first + self.count)
        return self.rows[part] if self.positions is None else self.rows.index_select(0, self.positions[part])

    def of(self, some: Tensor) -> Block:
        """The same rows for some of the queries, int64 [n']."""

        def pick(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.index_select(0, some)

        return replace(
            self,
            queries=self.queries.index_select(0, some),
            slack=self.slack.index_select(0, some),
            mask=pick(self.mask),
            factor=pick(self.factor),
            offset=pick(self.offset),
        )

    def bounds(self, dots: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds of all scores, [n, m]; NaN where nothing is known."""
        middle = dots if self.factor is None else dots * self.factor.unsqueeze(1)
        middle = middle * self.scale + self.shift
        if self.offset is not None and self.lift is not None:
            middle = middle + self.offset.unsqueeze(1) * self.lift
        margin = self.slack.unsqueeze(1) * self.reach
        return middle - margin - 2.0 * self.spread, middle + margin


def room_for_candidates(block: Block, capacity: int) -> tuple[Tensor, Tensor]:
    """What `Scan.candidates` fills: int32 [n, capacity], and counts of 0, int32 [n]."""
    n, device = block.queries.shape[0], block.queries.device
    candidates = torch.empty(n, capacity, dtype=torch.int32, device=device)
    return candidates, torch.zeros(n, dtype=torch.int32, device=device)


class Scan:
    """What a device does for a search. The methods that are written out are torch's; kernels replace them."""

    #: Up to so many queries have all their approximate scores written down, by a kernel that reads every row once.
    few_queries = 0

    def rounding(self, dtype: torch.dtype, width: int) -> float:
        """eta above for operands of a dtype."""
        return _ROUNDING * (width + 32)

    def candidates(self, block: Block, limit: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        """The rows whose upper bound is not at most a query's limit, [n] (NaN: all rows).

        Returns:
            `(candidates, counts)`: int32 [n, capacity] numbers within the block, in no order, of which the first
            counts[i] are there; int32 [n], which may exceed the capacity, and then some candidates are missing.
            Where the mask is False, candidates may be there or not.
        """
        raise NotImplementedError

    def candidates_and_logits(
        self, block: Block, limit: Tensor, capacity: int, factor: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same, and of the logits `factor_i dot_ij scale_j`, exact to float32's rounding, for parts of the rows the
        largest of every query and the sum of the exponentials shifted by it: [parts, n] each."""
        raise NotImplementedError

    def dots(self, block: Block) -> Tensor:
        """All products of a block, [n, m] float32."""
        wide = torch.float64 if reference._rounds_products(block.queries.device.type) else torch.float32
        with no_autocast(block.queries.device.type):
            return (block.queries.to(wide) @ block.taken().to(wide).mT).float()

    def few_dots(
        self, queries: Tensor, rows: Tensor, positions: Tensor | None, first: int, count: int, squares: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Products [n, m] of few queries, and the rows' sums of squares [m], both float32; see `Block`."""
        raise NotImplementedError

    def exact_scores(
        self, queries: Tensor, vectors: Tensor, scale: Tensor | None, query: Tensor, row: Tensor, metric: str
    ) -> Tensor:
        """`pair_scores` of the pairs (query[p], row[p]) rounded to float32, [P]; with a scale, rows are codes."""
        step = max(1, _EXACT_ELEMENTS // max(1, queries.shape[1]))
        parts = [torch.empty(0, device=queries.device)]
        for i, j in zip(query.split(step), row.split(step), strict=True):
            x = vectors.index_select(0, j)
            if scale is not None:
                x = x.float() * scale.index_select(0, j).unsqueeze(-1)
            parts.append(pair_scores(queries.index_select(0, i), x, metric).float())
        return torch.cat(parts)


def search(
    scan: Scan,
    queries: Tensor,  # [N, D], floating
    rows: Sequence[Rows],
    k: int,
    metric: str,
    *,
    allowed: Tensor | None = None,  # bool by position, for all queries
    mask: Tensor | None = None,  # bool [N, rows]
    centre: Tensor | None = None,  # [D], where codes are of rotated vectors less this one
) -> tuple[Tensor, Tensor, Tensor]:
    """`(scores [N, k] float32, labels [N, k] int64, [rescored, widened])`, as `_topk_cpu.search`."""
    n = queries.shape[0]
    scores = torch.full((n, k), -torch.inf, dtype=score_dtype(queries), device=queries.device)
    labels = torch.full((n, k), -1, dtype=torch.int64, device=queries.device)
    rescored = 0
    pieces = _pieces(rows, allowed)
    step = max(1, min(_QUERIES, MOST_CANDIDATES // (4 * (LEAST_GROWTH + 1) * max(k, 1))))
    for start in range(0, n, step):
        block = slice(start, min(start + step, n))
        part = Search(scan, queries[block], metric, centre, scores[block], labels[block])
        part.run(pieces, None if mask is None else mask[block])
        rescored += part.rescored
    return scores, labels, torch.tensor([rescored, 0])


def range_search(
    scan: Scan,
    queries: Tensor,
    rows: Sequence[Rows],
    threshold: float,
    metric: str,
    centre: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every row whose score is at least `threshold`: `(lims [N + 1], scores [R], labels [R])`, best first."""
    n, device = queries.shape[0], queries.device
    scores, labels = torch.empty((n, 0), device=device), torch.empty((n, 0), dtype=torch.int64, device=device)
    found = [(labels.view(-1), labels.view(-1), scores.view(-1))]
    pieces = _pieces(rows, None)
    for start in range(0, n, _QUERIES):
        block = slice(start, min(start + _QUERIES, n))
        part = Search(scan, queries[block], metric, centre, scores[block], labels[block])
        found += [(query + start, label, score) for query, label, score in part.above(pieces, threshold)]
    query, label, score = (torch.cat(x) for x in zip(*found, strict=True))
    # Least significant key first; a stable sort keeps the order of those before it.
    order = label.argsort(stable=True)
    order = order[score[order].argsort(stable=True, descending=True)]
    order = order[query[order].argsort(stable=True)]
    counts = torch.bincount(query, minlength=n)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]), score[order], label[order]


class LogSumExp:
    """Of the logits `factor_i <q_i, x_j> / |x_j|` over all rows j, added up on the way of a search by cosine."""

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor
        self._top = torch.full_like(factor, -torch.inf)
        self._total = torch.zeros_like(factor, dtype=torch.float64)

    def add(self, tops: Tensor, totals: Tensor) -> None:
        """What a part of the rows has: largest logits and shifted sums, [parts, n]."""
        top = torch.maximum(self._top, tops.amax(0))
        shift = top.masked_fill(top == -torch.inf, 0.0).double()
        self._total = self._total * (self._top - shift).exp() + (totals * (tops - shift).exp()).sum(0)
        self._top = top

    def result(self) -> Tensor:
        """float64 [n]."""
        return self._top.double() + self._total.log()


def classify(
    scan: Scan, images: Tensor, classes: Rows, k: int, factor: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`(cosines [N, k], labels [N, k], lse [N])`, the last in float64: a classifier with the logits of `LogSumExp`."""
    n, count = images.shape[0], classes.count
    scores = torch.full((n, k), -torch.inf, device=images.device)
    labels = torch.full((n, k), -1, dtype=torch.int64, device=images.device)
    lse = torch.empty(n, dtype=torch.float64, device=images.device)
    pieces = _pieces([classes], None)
    # statistics of a tile's rows are 8 bytes for some 64 classes
    step = max(1, min(_QUERIES, MOST_CANDIDATES // max(4 * (LEAST_GROWTH + 1) * k, count // 16)))
    for start in range(0, n, step):
        block = slice(start, min(start + step, n))
        part = Search(scan, images[block], "cosine", None, scores[block], labels[block])
        part.logits = LogSumExp(factor[block])
        part.run(pieces, None)
        lse[block] = part.logits.result()
    return scores, labels, lse


@dataclass
class Piece:
    """Rows of one tensor that may be found.

    Attributes:
        codes, vectors, scale, residual, labels: as in `Rows`, by place in the tensors.
        norm: [count] of the rows, infinite where squares may have left float32; None = not known yet.
        places: int64 [count], where the rows are; None = the first `count`.
        count: number of rows.
        base: position of the first, which is its column in a mask.
        numbers: int64 [count], labels of the rows where `labels` is None; None = base + 0, 1, ...
    """

    codes: Tensor
    vectors: Tensor | None
    scale: Tensor | None
    residual: Tensor | None
    labels: Tensor | None
    norm: Tensor | None
    places: Tensor | None
    count: int
    base: int
    numbers: Tensor | None

    def take(self, column: Tensor, start: int, stop: int) -> Tensor:
        """Rows start to stop of a column."""
        return column[start:stop] if self.places is None else column.index_select(0, self.places[start:stop])

    def place(self, row: Tensor) -> Tensor:
        """Where rows (int64, below `count`) are in the tensors."""
        return row if self.places is None else self.places[row]

    def label(self, row: Tensor) -> Tensor:
        """What is returned for rows."""
        if self.labels is not None:
            return self.labels[self.place(row)]
        return row + self.base if self.numbers is None else self.numbers[row]

    def norms(self, start: int, stop: int) -> Tensor:
        """Norms of rows start to stop, which are found once."""
        if self.norm is None:
            step = max(1, _NORM_ELEMENTS // max(1, self.codes.shape[1]))
            parts = [torch.empty(0, device=self.codes.device)]
            for first in range(0, self.count, step):
                x = self.take(self.codes, first, min(first + step, self.count))
                parts.append(_usable(torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32), x))
            self.norm = torch.cat(parts)
        return self.norm[start:stop]


def _pieces(rows: Sequence[Rows], allowed: Tensor | None) -> list[Piece]:
    pieces, base = [], 0
    for r in rows:
        count, places, numbers = r.count, r.kept, None
        if allowed is not None:
            numbers = allowed[base : base + r.count].nonzero().squeeze(1)
            count, places = numbers.numel(), numbers if places is None else places[numbers]
            numbers = numbers + base
        codes, vectors, scale, residual = r.codes, r.vectors, r.scale, r.residual
        if codes.dtype == torch.int8 and codes.shape[1] > LONGEST_INT8 and scale is not None:
            codes = codes.float() * scale.unsqueeze(-1) if vectors is None else vectors
            scale = residual = None
        piece = Piece(codes, vectors, scale, residual, r.labels, None, places, count, base, numbers)
        if r.norm is not None:
            piece.norm = _usable(piece.take(r.norm, 0, count), None)
        pieces.append(piece)
        base += r.count
    return pieces


def _usable(norm: Tensor, rows: Tensor | None) -> Tensor:
    """float32 norms; infinite where squares may have left float32 and so nothing is known. Zero is known of a vector
    of zeros alone, which without `rows` it is."""
    doubtful = ~((norm > _SMALLEST_NORM) & (norm < _LARGEST_NORM))
    if bool(doubtful.any()):
        zero = norm == 0 if rows is None else (rows == 0).all(-1)
        norm = norm.masked_fill(doubtful & ~zero, torch.inf)
    return norm


@dataclass(frozen=True)
class _Operand:
    """Queries as a scan multiplies them: codes, slack, factor and offset of `Block`.

    Attributes:
        lost: [], the largest part of a query's norm that its codes miss.
        centre_norm: [].
    """

    codes: Tensor
    slack: Tensor
    lost: Tensor
    centre_norm: Tensor
    factor: Tensor | None = None
    offset: Tensor | None = None


def _operand(queries: Tensor, norm: Tensor, dtype: torch.dtype, centre: Tensor | None) -> _Operand:
    usable = (norm == 0) | ((norm > _SMALLEST_NORM) & (norm < _LARGEST_NORM))
    slack = torch.where(usable, norm * (1 + 1e-6), torch.inf).float()
    zero = torch.zeros((), device=queries.device)
    if dtype == queries.dtype:
        return _Operand(queries, slack, zero, zero)
    wide, offset, centre_norm = queries.double(), None, zero
    if centre is not None:
        offset = (wide @ centre.double()).float()
        centre_norm = torch.linalg.vector_norm(centre.double()).float()
        wide = wide @ rotation(queries.shape[1]).to(queries.device)
    if dtype == torch.int8:
        codes, factor = quantize_rows_int8(wide.float())
        missed = wide - codes.double() * factor.double().unsqueeze(-1)
    else:
        codes, factor = wide.to(dtype), None
        missed = wide - codes.double()
    lost = torch.linalg.vector_norm(missed, dim=-1) / torch.where(norm > 0, norm, 1.0)
    lost = lost.masked_fill(~usable, 0.0).amax() * (1 + 1e-6)
    return _Operand(codes.contiguous(), slack, lost.float(), centre_norm, factor, offset)


class Search:
    """A block of queries and its k best rows so far, which are updated in place."""

    def __init__(
        self, scan: Scan, queries: Tensor, metric: str, centre: Tensor | None, scores: Tensor, labels: Tensor
    ) -> None:
        self.scan, self.queries, self.metric, self.centre = scan, queries.contiguous(), metric, centre
        self.scores, self.labels, self.k = scores, labels, scores.shape[1]
        self.logits: LogSumExp | None = None
        self.rescored = 0
        self.norm = reference.row_norms(self.queries.double())
        self._operands: dict[torch.dtype, _Operand] = {}

    def run(self, pieces: list[Piece], mask: Tensor | None) -> None:
        """Visit all rows."""
        n, done = self.queries.shape[0], 0
        if n == 0 or self.k == 0:
            return
        growth = min(max(PAIRS // (n * self.k), LEAST_GROWTH), MOST_GROWTH)
        for piece in pieces:
            seen = None if mask is None else mask[:, piece.base : piece.base + piece.count]
            if n <= self.scan.few_queries:
                for start in range(0, piece.count, MOST_SCORES // n):
                    self._all_scores(piece, start, min(start + MOST_SCORES // n, piece.count), seen)
                continue
            start = 0
            while start < piece.count:
                stop = min(start + max(growth * done, FIRST_ROWS, 2 * self.k), piece.count)
                limit = self._first_limit(piece, stop, seen) if done == 0 else None
                self.add(piece, start, stop, seen, limit, logits=self.logits)
                done += stop - start
                start = stop

    def add(
        self,
        piece: Piece,
        start: int,
        stop: int,
        mask: Tensor | None = None,
        limit: Tensor | None = None,
        some: Tensor | None = None,
        logits: LogSumExp | None = None,
    ) -> None:
        """Rows start to stop of a piece, for some of the queries, int64 [n]; their logits are added to what is given.

        Queries that bring more candidates than there is room for are looked at again by themselves, and where they are
        most of the queries the rows in halves.
        """
        n = self.queries.shape[0] if some is None else some.numel()
        block = self.block(piece, start, stop, mask)
        limit = self.limit() if limit is None else limit
        if some is not None:
            block, limit = block.of(some), limit[some]
        candidates, counts, crowded = self._candidates(block, limit, logits)
        query, row = _pairs(candidates, counts.masked_fill(crowded, 0))
        if block.mask is not None:
            seen = block.mask[query, row]
            query, row = query[seen], row[seen]
        self._merge(piece, query if some is None else some[query], row + start)
        left = crowded.nonzero().squeeze(1)
        if left.numel() == 0:
            return
        whole = 2 * left.numel() <= n
        left = left if some is None else some[left]
        middle = stop if whole else (start + stop) // 2
        self.add(piece, start, middle, mask, some=left)
        if not whole:
            self.add(piece, middle, stop, mask, some=left)

    def above(self, pieces: list[Piece], threshold: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """`(query, label, score)` of all rows that score at least `threshold`."""
        n = self.queries.shape[0]
        wanted = torch.full((n,), threshold, dtype=torch.float32, device=self.queries.device)
        limit = self._in_scan_terms(wanted.double(), self.norm)
        for piece in pieces if n else []:
            ranges = [(0, piece.count)] if piece.count else []
            while ranges:
                start, stop = ranges.pop()
                candidates, counts, crowded = self._candidates(self.block(piece, start, stop), limit)
                if bool(crowded.any()):
                    middle = (start + stop) // 2
                    ranges += [(middle, stop), (start, middle)]
                    continue
                query, row = _pairs(candidates, counts)
                score = self._exact(piece, query, row + start)
                hit = score >= wanted[query]
                yield query[hit], piece.label(row[hit] + start), score[hit]

    def block(
        self, piece: Piece, start: int, stop: int, mask: Tensor | None = None, norm: Tensor | None = None
    ) -> Block:
        """A range of a piece's rows as a scan takes them."""
        codes, operand = piece.codes, self._operand(piece)
        norm = piece.norms(start, stop) if norm is None else norm
        scale = torch.ones_like(norm) if piece.scale is None else piece.take(piece.scale, start, stop)
        residual = 0.0 if piece.residual is None else piece.take(piece.residual, start, stop)
        eta = self.scan.rounding(codes.dtype, codes.shape[1])
        reach = residual + (operand.lost + eta) * (norm + residual + operand.centre_norm)
        reach = torch.where(reach < _LARGEST_NORM, reach * 1.0001, torch.inf)
        # what underflow may cost
        spread = torch.full_like(norm, codes.shape[1] * torch.finfo(torch.float32).tiny)
        lift = torch.ones_like(norm)
        shift = torch.zeros_like(norm)
        if self.metric == "cosine":
            floored = norm.clamp(min=NORM_FLOOR)
            lift = torch.where(floored.isinf(), 1.0, 1.0 / floored)
        elif self.metric == "l2":
            # 2 q x - |x|^2 against score + |q|^2; the norms are good to this
            lift, shift = 2.0 * lift, -(norm**2)
            spread = spread + _norm_rounding(codes) * norm**2
        spread = spread * lift
        return Block(
            queries=operand.codes,
            rows=codes,
            positions=piece.places,
            first=start,
            count=stop - start,
            mask=None if mask is None else mask[:, start:stop],
            slack=operand.slack,
            scale=scale * lift,
            shift=shift + spread,
            reach=reach * lift,
            spread=spread,
            factor=operand.factor,
            offset=operand.offset,
            lift=None if operand.offset is None else lift,
        )

    def limit(self) -> Tensor:
        """The k-th best score in the scan's terms, rounded down, [n]; NaN where fewer than k rows are known."""
        last = self.scores[:, -1].double().masked_fill(self.labels[:, -1] < 0, torch.nan)
        return self._in_scan_terms(last, self.norm)

    def _candidates(
        self, block: Block, limit: Tensor, logits: LogSumExp | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of a scan, and which queries have more than there is room for."""
        capacity = min(max(MOST_CANDIDATES // block.queries.shape[0], 1), block.count)
        if logits is None:
            candidates, counts = self.scan.candidates(block, limit, capacity)
        else:
            result = self.scan.candidates_and_logits(block, limit, capacity, logits.factor)
            candidates, counts = result[:2]
            logits.add(*result[2:])
        return candidates, counts, counts > capacity

    def _all_scores(self, piece: Piece, start: int, stop: int, mask: Tensor | None) -> None:
        """Rows start to stop, whose approximate scores are written down."""
        queries = self._operand(piece).codes
        dots, squares = self.scan.few_dots(
            queries, piece.codes, piece.places, start, stop - start, piece.norm is None
        )
        norm = None
        if squares is not None:
            norm = _usable(squares.sqrt(), piece.take(piece.codes, start, stop))
        block = self.block(piece, start, stop, mask, norm)
        if self.logits is not None:
            z = dots * self.logits.factor.unsqueeze(1) * block.scale
            top = z.amax(1, keepdim=True)
            self.logits.add(top.mT, (z - top).exp().sum(1, keepdim=True).mT)
        lower, upper = block.bounds(dots)
        limit = self.limit()
        if block.count >= self.k:
            limit = torch.fmax(limit, self._reached(block, lower, self.norm))
        keep = ~(upper <= limit.unsqueeze(1))
        query, row = (keep if block.mask is None else keep & block.mask).nonzero(as_tuple=True)
        self._merge(piece, query, row + start)

    def _first_limit(self, piece: Piece, stop: int, mask: Tensor | None) -> Tensor | None:
        """A limit that k of a piece's first rows reach; None where there are fewer."""
        if stop < self.k:
            return None
        block = self.block(piece, 0, min(stop, max(FIRST_ROWS, 2 * self.k)), mask)
        every = torch.arange(self.queries.shape[0], device=self.queries.device)
        limits = []
        for some in every.split(max(1, MOST_SCORES // block.count)):
            part = block.of(some)
            limits.append(self._reached(part, part.bounds(self.scan.dots(part))[0], self.norm[some]))
        return torch.cat(limits)

    def _reached(self, block: Block, lower: Tensor, norm: Tensor) -> Tensor:
        """The limit that the k-th best of these lower bounds sets, [n]; NaN where fewer are known."""
        lower = torch.where(lower.isfinite(), lower, -torch.inf)
        if block.mask is not None:
            lower = lower.masked_fill(~block.mask, -torch.inf)
        score = lower.topk(self.k, dim=1).values[:, -1].double()
        score = score.masked_fill(score.isinf(), torch.nan)
        if self.metric == "cosine":
            score = score / norm.clamp(min=NORM_FLOOR)
        elif self.metric == "l2":
            score = score - norm**2
        return self._in_scan_terms(score, norm)

    def _in_scan_terms(self, score: Tensor, norm: Tensor) -> Tensor:
        """What an upper bound must exceed where the score must be better than these, float64 [n]."""
        if self.metric == "cosine":
            score = score * norm.clamp(min=NORM_FLOOR)
        elif self.metric == "l2":
            score = score + norm**2 * (1.0 - _norm_rounding(self.queries))
        rounded = score.float()
        # a step for each rounding on the way to the score: of the limit, of the norms' product, of the score itself
        for _ in range(3):
            rounded = torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
        return rounded

    def _merge(self, piece: Piece, query: Tensor, row: Tensor) -> None:
        """Score pairs, which come in ascending order, and keep the best."""
        self.rescored += query.numel()
        if query.numel():
            exact = self._exact(piece, query, row)
            ascend = piece.labels is None
            reference._merge(self.scores, self.labels, query, exact, piece.label(row), ascend)

    def _exact(self, piece: Piece, query: Tensor, row: Tensor) -> Tensor:
        vectors, scale = (piece.codes, piece.scale) if piece.vectors is None else (piece.vectors, None)
        return self.scan.exact_scores(self.queries, vectors, scale, query, piece.place(row), self.metric)

    def _operand(self, piece: Piece) -> _Operand:
        dtype = piece.codes.dtype
        if dtype not in self._operands:
            centre = self.centre if dtype == torch.int8 else None
            self._operands[dtype] = _operand(self.queries, self.norm, dtype, centre)
        return self._operands[dtype]


def _norm_rounding(x: Tensor) -> float:
    """What squares of float32 norms may be off by, in units of themselves."""
    return 2 * _ROUNDING * (x.shape[1] + 32)


def _pairs(candidates: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and rows of candidates in ascending order: a scan leaves them in none."""
    widest = int(counts.max())
    query, place = (torch.arange(widest, device=counts.device) < counts[:, None]).nonzero(as_tuple=True)
    row = candidates[query, place].long()
    order = ((query << 32) + row).argsort()
    return query[order], row[order]
