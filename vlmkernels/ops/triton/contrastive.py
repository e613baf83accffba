# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses in Triton: how a problem is cut into chunks, and what is launched for each.

Half precision: `contrastive_tiles.py` forms the logits and consumes them in registers. float32: the library forms a
chunk of dot products (TF32 only if torch allows it; Triton's own float32 product is several times slower), kernels
consume it. In backward a chunk's gradient tile, at most `CHUNK_BYTES`, goes through memory in the products' dtype, and
two library products add it into float32 sums. Deterministic: every partial result has one writer, and partial
results are added in order.

Operations: 8 N M D for CLIP (logits formed twice), 6 for the sigmoid loss, and 6 for linear cross-entropy where a chunk
of `READ_ROWS` rows of float32 logits fits `CHUNK_BYTES`; with more classes 8, because adding the class gradients of
ever smaller chunks would cost more than forming the logits again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from vlmkernels.ops._contrastive_ops import Arguments

from . import contrastive_tiles as tiles
from ._launch import cdiv, launch, tile_of, widens
from ._tables import Tile

#: What a chunk of logits or gradients may take: with the partial statistics beside it less than 64 MiB.
CHUNK_BYTES = 48 * 2**20
#: Columns of a chunk at most: few passes over the rows' sums, and rows enough that the columns' sums see few as well.
CHUNK_COLUMNS = 8192
#: Columns of a chunk of statistics, which has no logits in memory.
STATISTICS_COLUMNS = 65536
#: Rows of a chunk from which on keeping its logits in memory beats forming them again.
READ_ROWS = 1024


@dataclass(frozen=True)
class Problem:
    """A loss's operands as the kernels take them; see `Arguments`.

    Attributes:
        q: [B, N, D] contiguous, in the dtype of the products; k: [B, M, D].
        scale, bias: [] float32; key_bias: [M] float32.
        key_mask: uint8 [B, M].
        positives: int64 [B, N]; None: row i's is column i, or labels decide.
        row_codes: int32 [B, N], col_codes: [B, M]: equal codes are positives.
        smoothing: label smoothing; row_classes, col_classes: what its share is divided by.
        columns: columns have losses as well.
    """

    q: Tensor
    k: Tensor
    scale: Tensor
    bias: Tensor | None = None
    key_bias: Tensor | None = None
    key_mask: Tensor | None = None
    positives: Tensor | None = None
    row_codes: Tensor | None = None
    col_codes: Tensor | None = None
    smoothing: float = 0.0
    row_classes: int = 1
    col_classes: int = 1
    columns: bool = False

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, N, M, D."""
        return self.q.shape[0], self.q.shape[1], self.k.shape[1], self.q.shape[2]

    @property
    def fuses(self) -> bool:
        """Whether kernels form the products themselves."""
        return self.q.dtype != torch.float32


@dataclass(frozen=True)
class Chunk:
    """A range of problems, rows and columns."""

    batch: slice
    rows: slice
    cols: slice

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(part.stop - part.start for part in (self.batch, self.rows, self.cols))


def problem_of(call: Arguments) -> Problem:
    """The operands of a registered op's call."""
    (n, d), m = call.q.shape[-2:], call.k.shape[-2]
    batches = math.prod(call.q.shape[:-2])

    def rows(x: Tensor | None, count: int) -> Tensor | None:
        return None if x is None else x.reshape(batches, count).contiguous()

    row_codes, col_codes = label_codes(rows(call.row_labels, n), rows(call.col_labels, m))
    return Problem(
        q=call.q.reshape(batches, n, d).to(call.compute).contiguous(),
        k=call.k.reshape(batches, m, d).to(call.compute).contiguous(),
        scale=call.scale,
        bias=call.bias,
        key_bias=None if call.key_bias is None else call.key_bias.contiguous(),
        key_mask=None if call.key_mask is None else rows(call.key_mask.view(torch.uint8), m),
        positives=rows(call.positives, n),
        row_codes=row_codes,
        col_codes=col_codes,
        smoothing=call.smoothing,
        row_classes=max(m, 1),
        col_classes=max(n, 1),
        columns=call.columns,
    )


def label_codes(row: Tensor | None, col: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """int64 labels [B, N] and [B, M] as int32 numbers that are equal where the labels are: half the registers."""
    if row is None or col is None:
        return None, None
    ordered = torch.cat([row, col], -1).sort(-1).values
    codes = (torch.searchsorted(ordered, labels, out_int32=True) for labels in (row, col))
    return next(codes), next(codes)


# The registered ops.


def softmax_forward(call: Arguments, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """`softmax_contrastive`: fills loss, row_lse and col_lse (maximum and shifted sum here) and the dots."""
    problem = problem_of(call)
    batches, n, m, _ = problem.sizes
    loss, row_lse, col_lse, dots = outputs
    row, col = statistics(problem, dots.view(batches, n, m) if dots.numel() else None)
    row_lse.view(batches, 2, n).copy_(shifted_sums(row))
    if call.columns:
        col_lse.view(batches, 2, m).copy_(shifted_sums(col))
    loss.copy_(_loss(problem, call, row, col).view(loss.shape))
    return outputs


def softmax_backward(
    grad_loss: Tensor, call: Arguments, kept: list[Tensor], needs: list[bool], outputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """`softmax_contrastive_backward`: fills the gradients of q, k, scale and key_bias."""
    problem = problem_of(call)
    batches, n, m, _ = problem.sizes
    row_lse, col_lse, dots = kept
    row_weight, col_weight, factor = _weights(problem, call, grad_loss)
    sinks = Sinks(
        problem, outputs[0] if needs[0] else None, outputs[1] if needs[1] else None, outputs[3], factor
    )
    softmax_gradients(
        problem,
        row_lse.view(batches, 2, n),
        col_lse.view(batches, 2, m) if call.columns else None,
        row_weight,
        col_weight,
        _shares(problem),
        sinks,
        dots.view(batches, n, m) if dots.numel() else None,
    )
    sinks.finish()
    outputs[2].copy_(sinks.number(0))
    return outputs


def one_pass(
    call: Arguments, sigmoid: bool, needs: list[bool], outputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """`one_pass_contrastive`: the loss, and its gradients for an incoming gradient of 1."""
    loss, grad_q, grad_k, grad_scale, grad_bias, grad_key_bias = outputs
    problem = problem_of(call)
    batches, n, _, _ = problem.sizes
    if sigmoid:
        counted = None
        number = problem.scale.new_full((), batches * n)
    else:
        counted = _counted(problem, call.ignore_index)
        number = counted.sum()
    weight = torch.ones_like(number) if call.reduction == "sum" else 1.0 / number.clamp(min=1)
    wanted = (grad_q if needs[0] else None, grad_k if needs[1] else None, grad_key_bias)
    sinks = Sinks(problem, *wanted, weight) if any(needs) else None
    if counted is None:
        total = sigmoid_loss(problem, sinks)
    else:
        total = _rows_loss(problem, counted, sinks)
    # where nothing counts the mean is NaN and its gradients are zero
    some = number > 0 if call.reduction == "mean" else torch.ones_like(number, dtype=torch.bool)
    loss.copy_(torch.where(some, total * weight, torch.nan))
    if sinks is not None:
        sinks.finish()
        grad_scale.copy_(sinks.number(0))
        grad_bias.copy_(sinks.number(1))
    return outputs


def _rows_loss(problem: Problem, counted: Tensor, sinks: Sinks | None) -> Tensor:
    """Sum of the rows' cross-entropies, float64 [], and their gradients."""
    batches, n, m, _ = problem.sizes
    if sinks is None or not m * READ_ROWS * (4 + problem.q.element_size()) <= CHUNK_BYTES:
        row, _ = statistics(problem)
        if sinks is not None:
            softmax_gradients(problem, shifted_sums(row), None, counted, None, (None, None), sinks)
        return _row_losses(problem, row, counted).sum()
    # A chunk of rows with all its columns: its logits stay in memory until their gradients are taken.
    total = torch.zeros((), dtype=torch.float64, device=problem.q.device)
    step = CHUNK_BYTES // (max(m, 1) * (4 + problem.q.element_size()))
    for first in range(0, n, step):
        rows = slice(first, min(first + step, n))
        part = replace(problem, q=problem.q[:, rows], positives=_cut(problem.positives, rows))
        dots = torch.empty((batches, rows.stop - first, m), dtype=torch.float32, device=problem.q.device)
        row, _ = statistics(part, dots)
        total += _row_losses(part, row, counted[:, rows]).sum()
        softmax_gradients(
            part, shifted_sums(row), None, counted[:, rows], None, (None, None), sinks, dots, rows
        )
    return total


# Losses and weights: vectors of N and M numbers.


def _counted(problem: Problem, ignore_index: int | None) -> Tensor:
    """Which rows have a loss, as 0 and 1: [B, N]."""
    if problem.positives is None or ignore_index is None:
        return torch.ones(problem.q.shape[:2], dtype=torch.float32, device=problem.q.device)
    return (problem.positives != ignore_index).float()


def _shares(problem: Problem) -> tuple[Tensor | None, Tensor | None]:
    """With labels, 1 / (number of positives), 0 without any, of rows and of columns: [B, N] and [B, M]."""
    row, col = problem.row_codes, problem.col_codes
    if row is None or col is None:
        return None, None
    return _share(row, col), _share(col, row)


def _share(labels: Tensor, others: Tensor) -> Tensor:
    ordered = others.sort(-1).values
    counts = torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels)
    return torch.where(counts > 0, 1.0 / counts.clamp(min=1).float(), 0.0)


def shifted_sums(statistics: Tensor) -> Tensor:
    """[4, B, N] -> [B, 2, N]: maximum, and sum of the exponentials shifted by it."""
    return statistics[:2].transpose(0, 1).contiguous()


def _row_losses(
    problem: Problem, statistics: Tensor, counted: Tensor, share: Tensor | None = None, classes: int = 0
) -> Tensor:
    """Cross-entropies of rows (or of columns, by their statistics), 0 where they do not count: float64 [B, N]."""
    top, sums, target, total = statistics.double().unbind(0)
    hard = 1.0 - problem.smoothing
    # maximum and target first: a converged loss is their tiny difference
    losses = top - (target * hard if share is None else target * share.double() * hard)
    if problem.smoothing:
        losses = losses - problem.smoothing / (classes or problem.row_classes) * total
    return torch.where(counted > 0, losses + sums.log(), 0.0)


def _loss(problem: Problem, call: Arguments, row: Tensor, col: Tensor) -> Tensor:
    """The reduced loss, float64."""
    row_share, col_share = _shares(problem)
    counted = _counted(problem, call.ignore_index) if row_share is None else (row_share > 0).float()
    losses = _row_losses(problem, row, counted, row_share)
    if call.reduction == "none":
        return losses
    if not call.columns:
        return losses.sum() / counted.sum() if call.reduction == "mean" else losses.sum()
    col_counted = torch.ones_like(col[0]) if col_share is None else (col_share > 0).float()
    col_losses = _row_losses(problem, col, col_counted, col_share, problem.col_classes)
    means = losses.sum(1) / counted.sum(1) + col_losses.sum(1) / col_counted.sum(1)
    return means.mean() / 2


def _weights(problem: Problem, call: Arguments, grad_loss: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """What rows' and columns' losses are multiplied by in the objective, cut in two: weights [B, N] and [B, M] of at
    most 1 (None = 1), so that a tile fits float16, and a factor [] for the sums. All float32."""
    batches, _, _, _ = problem.sizes
    row_share, col_share = _shares(problem)
    grad_loss = grad_loss.float()
    if row_share is not None and col_share is not None:
        pair = [(share > 0).float() for share in (row_share, col_share)]
        row, col = (counted / counted.sum(1, keepdim=True).clamp(min=1) for counted in pair)
        return normalised(row, col, grad_loss / (2 * max(batches, 1)))
    counted = _counted(problem, call.ignore_index)
    if call.reduction == "none":
        return normalised(counted * grad_loss.view(counted.shape), None, None)
    if call.columns:
        return counted, None, grad_loss / (2 * max(counted.numel(), 1))
    return counted, None, grad_loss / counted.sum().clamp(min=1) if call.reduction == "mean" else grad_loss


def normalised(
    row: Tensor, col: Tensor | None, factor: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Weights divided by the largest of them, which goes into the factor."""
    sizes = [w.nan_to_num(0.0).abs().amax() for w in (row, col) if w is not None and w.numel()]
    largest = torch.stack([row.new_zeros(()), *sizes]).amax()
    down = torch.where(largest > 0, 1.0 / largest, 0.0)
    return row * down, None if col is None else col * down, largest if factor is None else factor * largest


def _cut(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[:, rows].contiguous()


# Statistics.


def statistics(
    problem: Problem, kept: Tensor | None = None, target: float = torch.nan
) -> tuple[Tensor, Tensor]:
    """Maximum, shifted sum of exponentials, sum over positives and sum of the logits: [4, B, N] and [4, B, M].

    Args:
        problem: the operands.
        kept: [B, N, M] float32, takes the dot products.
        target: what the third one is in rows without a positive among the columns (labels: 0).
    """
    _, n, m, _ = problem.sizes
    row, col = (
        _empty_statistics(problem, n, target),
        _empty_statistics(problem, m if problem.columns else 0, target),
    )
    slots = 2 + (problem.row_codes is not None) + bool(problem.smoothing)
    tile = _tile("contrastive_statistics", problem, not problem.fuses)
    if problem.fuses:
        # what is in memory are the partial statistics, two vectors for every tile
        height, width = tile["BLOCK_M"], tile["BLOCK_N"] // tile["SPLIT"]
        cells, widest = CHUNK_BYTES * height * width // (4 * slots * (height + width)), STATISTICS_COLUMNS
    else:
        cells, widest = CHUNK_BYTES // 4, CHUNK_COLUMNS
    room = _Room(torch.float32, problem.q.device)
    for batch, rows, cols in _ranges(problem, cells, widest):
        for col_range in cols:
            chunk = Chunk(batch, rows, col_range)
            dots = None if kept is None else kept[batch, rows, col_range]
            if not problem.fuses:
                product = _dot_products(problem, chunk, None, room)
                assert product is not None  # float32
                dots = product if dots is None else dots.copy_(product)
            _chunk_statistics(problem, chunk, tile, dots, slots, row, col)
    return row, col


def _chunk_statistics(
    problem: Problem, chunk: Chunk, tile: Tile, dots: Tensor | None, slots: int, row: Tensor, col: Tensor
) -> None:
    batches, height, width = chunk.shape
    blocks_m, blocks_n = cdiv(height, tile["BLOCK_M"]), cdiv(width, tile["BLOCK_N"])
    row_parts = row.new_empty(slots, cdiv(width, tile["BLOCK_N"] // tile["SPLIT"]), batches * height)
    col_parts = row.new_empty(slots, blocks_m, batches * width) if problem.columns else None
    launch(
        tiles._statistics_kernel,
        batches * blocks_m * blocks_n,
        *_operands(problem, dots),
        problem.row_codes,
        problem.col_codes,
        row_parts,
        col_parts,
        row[2],
        col[2] if problem.columns else None,
        *_place(problem, chunk, dots),
        tile=tile,
        SAVED=not problem.fuses,
        STORED=problem.fuses and dots is not None,
        COLUMNS=problem.columns,
        SMOOTH=bool(problem.smoothing),
        **_constants(problem, tile),
    )
    _combine(problem, row_parts, row, chunk.batch.start, chunk.rows)
    if col_parts is not None:
        _combine(problem, col_parts, col, chunk.batch.start, chunk.cols)


def _combine(problem: Problem, parts: Tensor, statistics: Tensor, first_batch: int, where: slice) -> None:
    tile = tile_of("contrastive_combine", parts)
    length, whole = parts.shape[2], statistics.shape[2]
    launch(
        tiles._combine_kernel,
        cdiv(length, tile["BLOCK"]),
        parts,
        statistics,
        parts.shape[1],
        length,
        where.stop - where.start,
        first_batch,
        where.start,
        whole,
        statistics.stride(0),
        tile=tile,
        LABELS=problem.row_codes is not None,
        SMOOTH=bool(problem.smoothing),
    )


def _empty_statistics(problem: Problem, count: int, target: float) -> Tensor:
    empty = torch.zeros((4, problem.q.shape[0], count), dtype=torch.float32, device=problem.q.device)
    empty[0] = -torch.inf
    if problem.row_codes is None:
        empty[2] = target
    return empty


# Gradients.


class Sinks:
    """Sums of a loss's gradients over its chunks, in float32, and where they end up.

    Args:
        problem: the operands.
        grad_q: [B, N, D], of any floating dtype, or None where it is not wanted; grad_k: [B, M, D].
        grad_key_bias: [M] float32, or empty or None.
        factor: float32 [], multiplies everything at the end.
        adds: grad_q is float32 and is added to.
    """

    def __init__(
        self,
        problem: Problem,
        grad_q: Tensor | None,
        grad_k: Tensor | None,
        grad_key_bias: Tensor | None,
        factor: Tensor,
        adds: bool = False,
    ) -> None:
        batches, n, m, d = problem.sizes
        self.q = None if grad_q is None else grad_q.view(batches, n, d)
        self.k = None if grad_k is None else grad_k.view(batches, m, d)
        self.factor, self.adds = factor, adds
        self._scaled = factor * problem.scale
        self._key_bias = grad_key_bias if grad_key_bias is not None and grad_key_bias.numel() else None
        self._keys: Tensor | None = None
        device = problem.q.device
        if self._key_bias is not None:
            self._keys = torch.zeros(m, dtype=torch.float64, device=device)
        self._k_sums: Tensor | None = None
        if self.k is not None:
            # Half precision cannot add up: the sums are a float32 matrix of their own there.
            float32 = self.k.dtype == torch.float32
            self._k_sums = self.k.zero_() if float32 else torch.zeros_like(self.k, dtype=torch.float32)
        self._numbers = torch.zeros(2, dtype=torch.float64, device=device)
        if self.q is not None and not adds and batches * n * m == 0:
            self.q.zero_()

    @property
    def wants_keys(self) -> bool:
        """Whether kernels have to add tiles up by columns."""
        return self._keys is not None

    def row_sums(self, problem: Problem, batch: slice, rows: slice) -> Tensor | None:
        """Room for the gradients of a range of rows."""
        if self.q is None:
            return None
        shape = (batch.stop - batch.start, rows.stop - rows.start, problem.q.shape[2])
        return torch.zeros(shape, dtype=torch.float32, device=problem.q.device)

    def add(self, problem: Problem, chunk: Chunk, tile: Tensor, row_sums: Tensor | None) -> None:
        """Adds `tile @ k` to the rows' sums and `tile.T @ q` to the columns'."""
        if row_sums is not None:
            add_product(row_sums, tile, problem.k[chunk.batch, chunk.cols])
        if self._k_sums is not None:
            add_product(self._k_sums[chunk.batch, chunk.cols], tile.mT, problem.q[chunk.batch, chunk.rows])

    def add_numbers(self, chunk: Chunk, numbers: Tensor, keys: Tensor | None) -> None:
        """Adds what the tiles of a chunk left: of scale and bias [1 or 2, tiles], of keys [row tiles, columns]."""
        self._numbers[: numbers.shape[0]] += numbers.double().sum(1)
        if self._keys is not None and keys is not None:
            self._keys[chunk.cols] += keys.double().sum(0)

    def write_rows(self, batch: slice, rows: slice, sums: Tensor | None) -> None:
        """A range of rows has seen all its columns."""
        if sums is None or self.q is None:
            return
        if self.adds:
            self.q[batch, rows] += sums.mul_(self._scaled)
        else:
            write_scaled(self.q[batch, rows], sums, self._scaled)

    def finish(self) -> None:
        """All chunks are in."""
        if self.k is not None and self._k_sums is not None:
            write_scaled(self.k, self._k_sums, self._scaled)
        if self._key_bias is not None and self._keys is not None:
            self._key_bias.copy_(self._keys * self.factor)

    def number(self, which: int) -> Tensor:
        """The gradient of the scale (0) or of the bias (1), float64 []."""
        return self._numbers[which] * self.factor


def softmax_gradients(
    problem: Problem,
    row_sums: Tensor,
    col_sums: Tensor | None,
    row_weight: Tensor,
    col_weight: Tensor | None,
    shares: tuple[Tensor | None, Tensor | None],
    sinks: Sinks,
    kept: Tensor | None = None,
    rows: slice | None = None,
) -> None:
    """Adds the gradients of `sum_i row_weight_i loss_i + sum_j col_weight_j loss_j` to the sinks.

    Args:
        problem: the operands.
        row_sums, col_sums: [B, 2, N] maximum and shifted sum, [B, 2, M].
        row_weight, col_weight: [B, N], [B, M] float32, at most about 1.
        shares: with labels, one over the number of positives of rows and columns.
        sinks: where they go.
        kept: [B, N, M] dot products, where the forward kept them.
        rows: which of the sinks' rows these are, where the problem is a part.
    """
    offset = 0 if rows is None else rows.start
    row_sums, row_weight = row_sums.contiguous(), row_weight.float().contiguous()
    col_sums = None if col_sums is None else col_sums.contiguous()
    reads = kept is not None or not problem.fuses
    block = _tile("contrastive_gradients", problem, reads)
    cells = CHUNK_BYTES // problem.q.element_size()
    room = _Room(problem.q.dtype, problem.q.device)
    for batch, row_range, cols in _ranges(problem, cells, CHUNK_COLUMNS):
        sums = sinks.row_sums(problem, batch, row_range)
        for col_range in cols:
            chunk = Chunk(batch, row_range, col_range)
            dots = _dot_products(problem, chunk, kept, room)
            buffer = dots if kept is None and dots is not None else room(chunk)
            batches, height, width = chunk.shape
            blocks_m, blocks_n = cdiv(height, block["BLOCK_M"]), cdiv(width, block["BLOCK_N"])
            programs = batches * blocks_m * blocks_n
            numbers = row_sums.new_empty(1, programs * block["SPLIT"])
            keys = row_sums.new_empty(batches * blocks_m, width) if sinks.wants_keys else None
            launch(
                tiles._gradients_kernel,
                programs,
                *_operands(problem, dots),
                problem.row_codes,
                problem.col_codes,
                row_sums,
                col_sums,
                row_weight,
                col_weight,
                *shares,
                buffer,
                numbers,
                keys,
                *_place(problem, chunk, dots, problem.smoothing),
                tile=block,
                SAVED=dots is not None,
                COLUMNS=problem.columns,
                **_constants(problem, block),
            )
            sinks.add_numbers(chunk, numbers, keys)
            sinks.add(problem, chunk, buffer, sums)
        sinks.write_rows(batch, slice(row_range.start + offset, row_range.stop + offset), sums)


def sigmoid_loss(problem: Problem, sinks: Sinks | None) -> Tensor:
    """`sum_ij -log sigmoid(y_ij z_ij)`, float64 []; its gradients go to the sinks."""
    block = _tile("contrastive_sigmoid", problem, not problem.fuses)
    cells, widest = CHUNK_BYTES // problem.q.element_size(), CHUNK_COLUMNS
    if sinks is None and problem.fuses:
        cells, widest = 2**30, 2**30  # nothing of them is in memory but three sums a tile
    total = torch.zeros((), dtype=torch.float64, device=problem.q.device)
    room = _Room(problem.q.dtype, problem.q.device)
    for batch, row_range, cols in _ranges(problem, cells, widest):
        sums = None if sinks is None else sinks.row_sums(problem, batch, row_range)
        for col_range in cols:
            chunk = Chunk(batch, row_range, col_range)
            dots = _dot_products(problem, chunk, None, room)
            batches, height, width = chunk.shape
            programs = batches * cdiv(height, block["BLOCK_M"]) * cdiv(width, block["BLOCK_N"])
            numbers = torch.empty(
                (3, programs * block["SPLIT"]), dtype=torch.float32, device=problem.q.device
            )
            buffer = None
            if sinks is not None:
                buffer = room(chunk) if dots is None else dots
            launch(
                tiles._sigmoid_kernel,
                programs,
                problem.q,
                problem.k,
                dots,
                problem.scale,
                problem.bias,
                problem.positives,
                buffer,
                numbers,
                *_place(problem, chunk, dots),
                tile=block,
                SAVED=dots is not None,
                GRADIENTS=buffer is not None,
                **_constants(problem, block),
            )
            total += numbers[0].double().sum()
            if sinks is not None and buffer is not None:
                sinks.add_numbers(chunk, numbers[1:], None)
                sinks.add(problem, chunk, buffer, sums)
        if sinks is not None:
            sinks.write_rows(batch, row_range, sums)
    return total


# Chunks, and what every kernel is given.


def _ranges(problem: Problem, cells: int, widest: int) -> Iterator[tuple[slice, slice, list[slice]]]:
    """Problems, rows, and the columns to visit with them, so that a chunk has at most `cells` logits."""
    batches, n, m, _ = problem.sizes
    if batches * n * m == 0:
        return
    width = min(m, widest)
    height = max(1, min(n, cells // width))
    if height < n:
        height = max(128, height // 128 * 128)
    depth = max(1, cells // (n * m)) if height >= n and width >= m else 1
    cols = [slice(c, min(c + width, m)) for c in range(0, m, width)]
    for b in range(0, batches, depth):
        for r in range(0, n, height):
            yield slice(b, min(b + depth, batches)), slice(r, min(r + height, n)), cols


class _Room:
    """Memory for one chunk of numbers after the other; the first chunk is the largest."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=dtype, device=device)

    def __call__(self, chunk: Chunk) -> Tensor:
        count = math.prod(chunk.shape)
        if count > self._memory.numel():
            self._memory = self._memory.new_empty(count)
        return self._memory[:count].view(chunk.shape)


def _dot_products(problem: Problem, chunk: Chunk, kept: Tensor | None, room: _Room) -> Tensor | None:
    """A chunk's dot products where kernels do not form them: those that are kept, or the library's."""
    if kept is not None:
        return kept[chunk.batch, chunk.rows, chunk.cols]
    if problem.fuses:
        return None
    q, k = problem.q[chunk.batch, chunk.rows], problem.k[chunk.batch, chunk.cols]
    return torch.bmm(q, k.mT, out=room(chunk))


def _operands(problem: Problem, dots: Tensor | None) -> tuple[Tensor | None, ...]:
    return (
        problem.q, problem.k, dots, problem.scale, problem.bias, problem.key_bias, problem.key_mask, problem.positives
    )  # fmt: skip


def _place(problem: Problem, chunk: Chunk, dots: Tensor | None, *smoothing: float) -> tuple[int | float, ...]:
    """Sizes, where the chunk is, and strides; with `smoothing`, each target's shares before the strides."""
    _, n, m, d = problem.sizes
    shares: tuple[float, ...] = ()
    if smoothing:
        s = smoothing[0]
        shares = (s / problem.row_classes, s / problem.col_classes, 1.0 - s)
    strides = (0, 0) if dots is None else dots.stride()[:2]
    starts = (chunk.batch.start, chunk.rows.start, chunk.cols.start)
    q, k = problem.q.stride(), problem.k.stride()
    return (n, m, d, *starts, *chunk.shape, *shares, q[0], q[1], k[0], k[1], *strides)


def _constants(problem: Problem, block: Tile) -> dict[str, bool]:
    return {
        "EVEN_D": problem.q.shape[2] % block["BLOCK_K"] == 0,
        "WIDEN": widens(problem.q.dtype),
        "PRECISE": not problem.fuses,
    }


def _tile(kernel: str, problem: Problem, reads: bool) -> Tile:
    return tile_of(f"{kernel}_read" if reads else kernel, problem.q)


@cache
def _adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch's library product of half-precision matrices can add to float32 sums."""
    try:
        one = torch.ones((1, 16, 16), dtype=dtype, device=device)
        sums = torch.zeros((1, 16, 16), dtype=torch.float32, device=device)
        torch.ops.aten.baddbmm.dtype_out(sums, one, one, torch.float32, out=sums)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return True


def add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """`sums += a @ b`, batched, float32 sums of operands in any dtype."""
    if a.dtype == torch.float32:
        sums.baddbmm_(a, b)
    elif a.device.type == "cpu":
        sums.baddbmm_(a.float(), b.float())
    elif _adds_in_float32(a.device, a.dtype):
        torch.ops.aten.baddbmm.dtype_out(sums, a, b, torch.float32, out=sums)
    else:
        # each chunk's product is rounded, their sum is not
        sums += torch.bmm(a, b)


def write_scaled(out: Tensor, sums: Tensor, factor: Tensor) -> None:
    """`out = factor * sums`, rounded to out's dtype in the same pass."""
    torch.mul(sums, factor, out=out)
