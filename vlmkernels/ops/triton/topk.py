# SPDX-License-Identifier: Apache-2.0
"""Top-k similarity on Triton: the scan that `vlmkernels/ops/_topk_search.py` searches with, and its arguments.

Rows of a database are multiplied where they are, through their positions where only some may be found. float32 rows
are multiplied in TF32, whatever torch allows for its own products: the bound counts what TF32 loses, and scores are
exact all the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmkernels.ops import _topk_search
from vlmkernels.ops._topk_search import Block
from vlmkernels.ops.reference.topk_score import floored_root, norms, tree_sum

from . import _tables_topk  # noqa: F401  puts its rows into the tables
from ._launch import cdiv, launch, tile_of, widens
from ._tables import Tile
from .topk_kernels import topk_exact_kernel, topk_few_kernel, topk_scan_kernel

#: Widest rows that are scored in registers; wider ones are by torch.
WIDEST = 4096

_WIDE_ELEMENTS = 2**20

#: TF32 keeps 11 bits of each operand, and a device may cut off what is below them.
_TF32_ROUNDING = 2.01 * 2.0**-10


def float32_like(dtype: torch.dtype) -> str:
    """tl.dot's `input_precision` where products must be as good as float32's: three in TF32 for float32 operands,
    which lose 2**-21 of each term and, unlike float32's own, are the matrix units'."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


class TritonScan(_topk_search.Scan):
    """Any floating dtype but float64, and int8 codes; any strides."""

    few_queries = 4

    def rounding(self, dtype: torch.dtype, width: int) -> float:
        return super().rounding(dtype, width) + (_TF32_ROUNDING if dtype == torch.float32 else 0.0)

    def candidates(self, block: Block, limit: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        candidates, counts = _topk_search.room_for_candidates(block, capacity)
        _scan(block, limit, None, candidates, counts)
        return candidates, counts

    def candidates_and_logits(
        self, block: Block, limit: Tensor, capacity: int, factor: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        candidates, counts = _topk_search.room_for_candidates(block, capacity)
        tops, totals = _scan(block, limit, None, candidates, counts, factor)
        return candidates, counts, tops, totals

    def dots(self, block: Block) -> Tensor:
        dots = block.slack.new_empty(block.queries.shape[0], block.count)
        _scan(block, None, dots, None, None)
        return dots

    def few_dots(
        self, queries: Tensor, rows: Tensor, positions: Tensor | None, first: int, count: int, squares: bool
    ) -> tuple[Tensor, Tensor | None]:
        dots = torch.empty(queries.shape[0], count, dtype=torch.float32, device=rows.device)
        sums = torch.empty(count, dtype=torch.float32, device=rows.device) if squares else None
        tile = tile_of("topk_few", rows)
        launch(
            topk_few_kernel,
            cdiv(count, tile["ROWS"]),
            queries,
            rows,
            positions,
            dots,
            sums,
            queries.shape[0],
            count,
            queries.shape[1],
            first,
            *rows.stride(),
            tile=tile,
            INTEGER=rows.dtype == torch.int8,
        )
        return dots, sums

    def exact_scores(
        self, queries: Tensor, vectors: Tensor, scale: Tensor | None, query: Tensor, row: Tensor, metric: str
    ) -> Tensor:
        if not 0 < queries.shape[1] <= WIDEST:
            return super().exact_scores(queries, vectors, scale, query, row, metric)
        scores = torch.empty(query.numel(), dtype=torch.float32, device=queries.device)
        if metric != "cosine":
            _exact(queries, vectors, scale, query, row, scores, None, l2=metric == "l2")
            return scores
        sums, squares = pair_sums(queries, vectors, query, row, scale)
        return (sums / (norms(queries.double())[query] * floored_root(squares))).float()


def pair_sums(
    queries: Tensor,  # [N, D] contiguous
    rows: Tensor,  # [R, D]
    query: Tensor,  # int64 [P]
    row: Tensor,  # int64 [P]
    scale: Tensor | None = None,  # [R], of int8 codes
) -> tuple[Tensor, Tensor]:
    """Products of pairs of vectors, and the sums of squares of the rows in them: exact float64 sums, [P] each."""
    sums = torch.empty(query.numel(), dtype=torch.float64, device=queries.device)
    squares = torch.empty_like(sums)
    if 0 < queries.shape[1] <= WIDEST:
        _exact(queries, rows, scale, query, row, sums, squares)
        return sums, squares
    step = max(1, _WIDE_ELEMENTS // max(1, queries.shape[1]))
    for first in range(0, query.numel(), step):
        part = slice(first, first + step)
        x = rows[row[part]].double()
        sums[part], squares[part] = tree_sum(queries[query[part]].double() * x), tree_sum(x.square())
    return sums, squares


def row_norms(rows: Tensor) -> Tensor:
    """`norms` of rows [R, D], to the bit: float64 [R]."""
    if not 0 < rows.shape[1] <= WIDEST:
        return norms(rows.double())
    squares = torch.empty(rows.shape[0], dtype=torch.float64, device=rows.device)
    every = torch.arange(rows.shape[0], device=rows.device)
    _exact(rows, rows, None, every, every, None, squares)
    return floored_root(squares)


def _exact(
    queries: Tensor,
    rows: Tensor,
    scale: Tensor | None,
    query: Tensor,
    row: Tensor,
    sums: Tensor | None,
    squares: Tensor | None,
    l2: bool = False,
) -> None:
    width = queries.shape[1]
    levels = (width - 1).bit_length()
    tile = tile_of("topk_exact", queries, width=width)
    launch(
        topk_exact_kernel,
        cdiv(query.numel(), tile["PAIRS"]),
        queries,
        rows,
        scale,
        query.contiguous(),
        row.contiguous(),
        sums,
        squares,
        query.numel(),
        width,
        *rows.stride(),
        tile=Tile({"PAIRS": tile["PAIRS"]}, tile.warps),
        exact_float=True,
        L2=l2,
        PIECES=max(1, 2**levels // tile["WIDTH"]),
        LEVELS=min(levels, tile["WIDTH"].bit_length() - 1),
    )


def _scan(
    block: Block,
    limit: Tensor | None,
    dots: Tensor | None,
    candidates: Tensor | None,
    counts: Tensor | None,
    logit_factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One launch of the scan, and the statistics of logits that it left, [blocks of rows, n] each."""
    queries, rows, mask = block.queries, block.rows, None
    if block.mask is not None and dots is None:
        mask = block.mask.view(torch.uint8)
    n = queries.shape[0]
    # three products for one, of two parts of each operand, need the room of a smaller tile
    thrice = logit_factor is not None and rows.dtype == torch.float32
    # as the compiler sees it: in elements
    aligned = not thrice and rows.stride(1) == 1 and rows.stride(0) % 16 == queries.shape[1] % 16 == 0
    tile = tile_of("topk_scan", queries, rows.dtype, queries=n, aligned=int(aligned))
    if mask is not None or logit_factor is not None:
        # these take the registers that a limit would have to take back
        tile = Tile(tile.blocks, tile.warps, tile.stages)
    blocks = cdiv(block.count, tile["BLOCK_N"])
    tops = torch.empty(0 if logit_factor is None else blocks, n, dtype=torch.float32, device=rows.device)
    totals = torch.empty_like(tops)
    launch(
        topk_scan_kernel,
        cdiv(n, tile["BLOCK_M"]) * blocks,
        queries,
        rows,
        block.positions,
        mask,
        block.factor,
        block.offset,
        block.slack,
        limit,
        block.scale,
        block.shift,
        block.reach,
        block.lift,
        dots,
        logit_factor,
        None if logit_factor is None else tops,
        None if logit_factor is None else totals,
        candidates,
        counts,
        n,
        block.count,
        queries.shape[1],
        block.first,
        *rows.stride(),
        *((0, 0) if mask is None else mask.stride()),
        0 if candidates is None else candidates.shape[1],
        tile=tile,
        INTEGER=rows.dtype == torch.int8,
        WIDEN=widens(rows.dtype),
        # a bound may be loose, a log-sum-exp may not
        PRECISION="tf32"
        if rows.dtype == torch.float32 and logit_factor is None
        else float32_like(rows.dtype),
    )
    return tops, totals
