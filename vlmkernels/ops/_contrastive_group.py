# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses over a process group: each logit is computed once in the whole group.

A rank holds its images' rows and sees every text: `image_local x text_all`, shard by shard. Texts travel directly from
their owner to every rank while the shards that are here are being computed. Row statistics are then whole; column
statistics are parts, which go to the column's owner (a vector), who adds them up in the order of the ranks. In
backward the parts of a text's gradient go to its owner the same way, each as soon as its shard is done. So a rank
sends its texts once and everybody's text gradient once, half of what gathering both sides with gradients sends, plus
O(N) numbers.

Every rank returns the loss of the whole batch. Backward differentiates the sum of the ranks' losses by the features,
and their mean by scale and bias, so that averaging over ranks gives the gradients of the one loss (`clip_loss`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlmkernels import _native
from vlmkernels.ops._contrastive_ops import Arguments, _Launch
from vlmkernels.ops.reference import contrastive_blocks as reference
from vlmkernels.ops.reference.contrastive_blocks import Block, merge_statistics

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class GroupLoss:
    """What a loss over a group is, beside its features.

    Attributes:
        op: public name, for errors.
        group: the process group.
        compute: dtype of the products.
        backend: "cpu", "triton" or "reference".
        smoothing: label smoothing of the softmax objective.
    """

    op: str
    group: dist.ProcessGroup
    compute: torch.dtype
    backend: str
    smoothing: float = 0.0


def group_softmax(
    loss: GroupLoss,
    q: Tensor,  # [n, D]
    k: Tensor,  # [m, D]
    scale: Tensor,  # []
    bias: Tensor | None,  # []
    row_labels: Tensor | None = None,  # [n]
    col_labels: Tensor | None = None,  # [m]
) -> Tensor:
    """Mean of the two directions' cross-entropies; positives are on the diagonal, or by label."""
    return _GroupSoftmax.apply(q, k, scale, bias, row_labels, col_labels, loss)


def group_sigmoid(loss: GroupLoss, q: Tensor, k: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Sum of `-log sigmoid(y z)` over all pairs, divided by the number of rows."""
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (q, k)]
    return _GroupSigmoid.apply(q, k, scale, bias, loss, needs)


class _Ranks:
    """The ranks of a group, what each holds, and how it travels."""

    def __init__(self, loss: GroupLoss, q: Tensor, k: Tensor) -> None:
        self.group = loss.group
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        facts = [q.shape[0], k.shape[0], q.shape[1], _DTYPES.index(k.dtype), _DTYPES.index(loss.compute)]
        table = torch.stack(self.all_gather(torch.tensor(facts, device=q.device))).tolist()
        for name, column in (("width D", 2), ("dtype", 3), ("compute_dtype", 4)):
            values = [row[column] for row in table]
            if len(set(values)) > 1:
                shown = values if column == 2 else [_DTYPES[value] for value in values]
                raise ValueError(
                    f"vk.{loss.op}: all ranks of the group must have the same {name}, got {shown}"
                )
        self.rows, self.cols = [row[0] for row in table], [row[1] for row in table]
        self.first_row, self.first_col = sum(self.rows[: self.rank]), [0]
        for count in self.cols:
            self.first_col.append(self.first_col[-1] + count)

    @property
    def order(self) -> list[int]:
        """The ranks as this one visits them: itself first, then those behind it in a ring."""
        return [(self.rank + step) % self.size for step in range(self.size)]

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Everybody's tensor of the same shape, in the order of the ranks."""
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return parts

    def gather_rows(self, x: Tensor, counts: list[int]) -> list[Tensor]:
        """Everybody's rows, of which each has another number: for vectors."""
        padded = x.new_zeros((max(counts), *x.shape[1:]))
        padded[: x.shape[0]] = x
        return [part[:count] for part, count in zip(self.all_gather(padded), counts, strict=True)]

    def to_owners(self, parts: list[Tensor]) -> list[Tensor]:
        """Sends `parts[s]` [c, cols of s] to rank s; returns what every rank has for this one's columns."""
        width, mine = parts[0].shape[0], self.cols[self.rank]
        sent = torch.cat([part.reshape(-1) for part in parts])
        received = sent.new_empty(self.size * width * mine)
        dist.all_to_all_single(
            received, sent, [width * mine] * self.size, [part.numel() for part in parts], group=self.group
        )
        return list(received.view(self.size, width, mine).unbind(0))

    def trade(self, peer: int, sent: Tensor | None, behind: int, received: Tensor | None) -> list[Any]:
        """Starts sending to `peer` and receiving from `behind`, where there is anything; returns what to wait for."""
        operations = []
        for function, x, rank in ((dist.isend, sent, peer), (dist.irecv, received, behind)):
            if x is not None and x.numel():
                rank = dist.get_global_rank(self.group, rank)
                operations.append(dist.P2POp(function, x, rank, group=self.group))
        return dist.batch_isend_irecv(operations) if operations else []


class _Shards:
    """Everybody's columns, on their way here from the start."""

    def __init__(self, ranks: _Ranks, mine: Tensor) -> None:
        self._shards = {ranks.rank: mine.contiguous()}
        self._pending: dict[int, list[Any]] = {}
        for step, owner in enumerate(ranks.order[1:], start=1):
            self._shards[owner] = mine.new_empty(ranks.cols[owner], mine.shape[1])
            behind = (ranks.rank - step) % ranks.size
            self._pending[owner] = ranks.trade(behind, self._shards[ranks.rank], owner, self._shards[owner])

    def __getitem__(self, owner: int) -> Tensor:
        for work in self._pending.pop(owner, ()):
            work.wait()
        return self._shards[owner]


class _ColumnGradients:
    """Parts of the columns' gradients on their way to their owners."""

    def __init__(self, ranks: _Ranks, dtype: torch.dtype) -> None:
        self._ranks, self._dtype = ranks, dtype
        self._parts: dict[int, Tensor] = {}  # by the rank that computed it
        self._pending: list[Any] = []
        self._sent: list[Tensor] = []  # kept alive until it has left

    def add(self, owner: int, part: Tensor) -> None:
        """Takes the part for `owner`'s columns; at the same step another rank computes one for this rank's."""
        ranks = self._ranks
        if owner == ranks.rank:
            self._parts[owner] = part
            return
        step = (owner - ranks.rank) % ranks.size
        behind = (ranks.rank - step) % ranks.size
        self._sent.append(part.to(self._dtype))
        self._parts[behind] = part.new_empty((ranks.cols[ranks.rank], part.shape[1]), dtype=self._dtype)
        self._pending += ranks.trade(owner, self._sent[-1], behind, self._parts[behind])

    def total(self) -> Tensor:
        """The gradient of this rank's columns, summed in the order of the ranks."""
        for work in self._pending:
            work.wait()
        total = self._parts[0].to(self._parts[self._ranks.rank].dtype, copy=True)
        for rank in range(1, self._ranks.size):
            total += self._parts[rank]
        return total


def _ordered_sum(ranks: _Ranks, values: list[Tensor]) -> Tensor:
    """Sums of numbers over the ranks, the same bits on each: float64 [len(values)]."""
    return torch.stack(ranks.all_gather(torch.stack([v.double() for v in values]))).sum(0)


def _first_derivatives(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward whose results name the loss when somebody differentiates them."""

    @functools.wraps(backward)
    def once(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            grads = backward(ctx, grad_loss)
        if not torch.is_grad_enabled():  # nobody asked for a graph
            return grads
        anchor = torch.zeros((), requires_grad=True)
        return tuple(None if x is None else _Refuse.apply(x, anchor, ctx.loss.op) for x in grads)

    return once


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, op: str) -> Tensor:
        ctx.op = op
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise NotImplementedError(
            f"vk.{ctx.op}: second derivatives exist in one process only, with backend='reference'; not over a group"
        )


class _GroupSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        row_labels: Tensor | None,
        col_labels: Tensor | None,
        loss: GroupLoss,
    ) -> Tensor:
        ranks = _Ranks(loss, q, k)
        # products are of operands in this dtype anyway, so nothing else needs to travel
        left, shards = _operand(q, loss), _Shards(ranks, _operand(k, loss))
        blocks = _softmax_blocks(loss, ranks, q, bias, row_labels, col_labels)
        statistics, _, _ = _blocks(loss.backend)
        row: Tensor | None = None
        parts: dict[int, Tensor] = {}
        for owner in ranks.order:
            block_row, parts[owner] = statistics(left, shards[owner], scale, blocks[owner])
            row = block_row if row is None else merge_statistics(row, block_row)
        assert row is not None  # a group has at least this rank
        mine = ranks.to_owners([parts[owner] for owner in range(ranks.size)])
        col = mine[0]
        for part in mine[1:]:
            col = merge_statistics(col, part)

        row_loss, row_counts = _losses(row, blocks[ranks.rank].row_share, loss.smoothing, sum(ranks.cols))
        col_loss, col_counts = _losses(col, blocks[ranks.rank].col_share, loss.smoothing, sum(ranks.rows))
        sums = _ordered_sum(ranks, [row_loss.sum(), row_counts.sum(), col_loss.sum(), col_counts.sum()])
        col_lse = ranks.gather_rows(_lse(col).T, ranks.cols)
        ctx.ranks, ctx.loss, ctx.blocks = ranks, loss, blocks
        ctx.inputs = q.dtype, k.dtype
        ctx.save_for_backward(
            left,
            scale,
            _lse(row),
            row_counts / sums[1] / 2,
            sums[3],
            *(shards[s] for s in range(ranks.size)),
            *col_lse,
        )
        value = (sums[0] / sums[1] + sums[2] / sums[3]) / 2
        return value.to(row.dtype)

    @staticmethod
    @_first_derivatives
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        ranks, loss, size = ctx.ranks, ctx.loss, ctx.ranks.size
        left, scale, row_lse, row_weight, col_count, *rest = ctx.saved_tensors
        shards, col_lse = rest[:size], rest[size:]
        needs_q, needs_k, needs_scale, needs_bias = ctx.needs_input_grad[:4]
        upstream = _ordered_sum(ranks, [grad_loss])[0]
        _, gradients, _ = _blocks(loss.backend)
        grad_q = torch.zeros(left.shape, dtype=row_lse.dtype, device=left.device) if needs_q else None
        columns = _ColumnGradients(ranks, ctx.inputs[1])
        grad_scale = torch.zeros((), dtype=torch.float64, device=left.device)
        row_weight = (row_weight * upstream).to(row_lse.dtype)
        # A rank whose texts need no gradient still has parts of the others'.
        wants_k = any(needs for needs in _everybody(ranks, needs_k, left.device))
        for owner in ranks.order:
            block = ctx.blocks[owner]
            counted = (
                torch.ones_like(col_lse[owner][:, 0]) if block.col_share is None else block.col_share > 0
            )
            col_weight = (counted * (upstream / col_count / 2)).to(row_lse.dtype)
            part, block_scale = gradients(
                left, shards[owner], scale, block, row_lse, col_lse[owner].T.contiguous(), row_weight, col_weight,
                grad_q, wants_k,
            )  # fmt: skip
            grad_scale += block_scale
            if part is not None:
                columns.add(owner, part)
        # The sum of the parts is the gradient of the sum of the losses; each rank's is its share of that.
        grad_scale = _ordered_sum(ranks, [grad_scale])[0] / size
        grad_k = columns.total() if wants_k else None
        return (
            None if grad_q is None else grad_q.to(ctx.inputs[0]),
            grad_k.to(ctx.inputs[1]) if grad_k is not None and needs_k else None,
            grad_scale.to(scale.dtype) if needs_scale else None,
            torch.zeros_like(scale) if needs_bias else None,  # it cancels in a softmax
            None,  # row_labels
            None,  # col_labels
            None,  # loss
        )


class _GroupSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, scale: Tensor, bias: Tensor, loss: GroupLoss, needs: list[bool]
    ) -> Tensor:
        ranks = _Ranks(loss, q, k)
        left, shards = _operand(q, loss), _Shards(ranks, _operand(k, loss))
        needs_q, needs_k = needs  # here gradients are taken in forward, where autograd itself is off
        wants_k = any(_everybody(ranks, needs_k, q.device))
        sums = torch.promote_types(q.dtype, torch.float32)
        grad_q = torch.zeros(q.shape, dtype=sums, device=q.device) if needs_q else None
        columns = _ColumnGradients(ranks, k.dtype)
        weight = 1.0 / sum(ranks.rows) if sum(ranks.rows) else 0.0
        rows = torch.arange(q.shape[0], device=q.device) + ranks.first_row
        numbers = [torch.zeros((), dtype=torch.float64, device=q.device) for _ in range(3)]
        _, _, sigmoid = _blocks(loss.backend)
        for owner in ranks.order:
            block = Block(logit_bias=bias, positives=rows - ranks.first_col[owner])
            value, part, grad_scale, grad_bias = sigmoid(
                left, shards[owner], scale, block, weight, grad_q, wants_k
            )
            numbers = [a + b for a, b in zip(numbers, (value, grad_scale, grad_bias), strict=True)]
            if part is not None:
                columns.add(owner, part)
        value, grad_scale, grad_bias = _ordered_sum(ranks, numbers).unbind(0)
        grad_k = columns.total() if wants_k else None
        ctx.ranks, ctx.loss, ctx.inputs = ranks, loss, (q.dtype, k.dtype)
        ctx.save_for_backward(
            grad_q, grad_k if needs_k else None, grad_scale.to(scale.dtype), grad_bias.to(bias.dtype)
        )
        return (value if sum(ranks.rows) else value + torch.nan).to(sums)

    @staticmethod
    @_first_derivatives
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.saved_tensors
        upstream = _ordered_sum(ctx.ranks, [grad_loss])[0]
        factors = (upstream, upstream, upstream / ctx.ranks.size, upstream / ctx.ranks.size)
        dtypes = (*ctx.inputs, grads[2].dtype, grads[3].dtype)
        return (
            *(
                (grad * factor.to(grad.dtype)).to(dtype) if need else None
                for grad, factor, dtype, need in zip(
                    grads, factors, dtypes, ctx.needs_input_grad[:4], strict=True
                )
            ),
            None,  # loss
            None,  # needs
        )


def _operand(x: Tensor, loss: GroupLoss) -> Tensor:
    return x.detach().to(loss.compute)


def _everybody(ranks: _Ranks, flag: bool, device: torch.device) -> list[bool]:
    return [
        bool(x) for x in torch.stack(ranks.all_gather(torch.tensor([flag], device=device).long())).tolist()
    ]


def _lse(statistics: Tensor) -> Tensor:
    return torch.stack([statistics[0], statistics[1].double().log().to(statistics.dtype)])


def _losses(
    statistics: Tensor, share: Tensor | None, smoothing: float, classes: int
) -> tuple[Tensor, Tensor]:
    """Each row's cross-entropy, and which rows count: float64 [n]."""
    top, sums, target, total = statistics.double().unbind(0)
    counted = torch.ones_like(top) if share is None else (share > 0).double()
    hard = (1.0 - smoothing) * (1.0 if share is None else share.double())
    # maximum and target first: a converged loss is their tiny difference
    losses = top - hard * target - smoothing / max(classes, 1) * total + sums.log()
    return torch.where(counted > 0, losses, 0.0), counted


def _softmax_blocks(
    loss: GroupLoss,
    ranks: _Ranks,
    q: Tensor,
    bias: Tensor | None,
    row_labels: Tensor | None,
    col_labels: Tensor | None,
) -> list[Block]:
    """This rank's rows against each rank's columns."""
    block = Block(
        logit_bias=bias, smoothing=loss.smoothing, row_classes=sum(ranks.cols), col_classes=sum(ranks.rows)
    )
    if row_labels is None or col_labels is None:
        rows = torch.arange(q.shape[0], device=q.device) + ranks.first_row
        return [replace(block, positives=rows - ranks.first_col[owner]) for owner in range(ranks.size)]
    sums = torch.promote_types(q.dtype, torch.float32)
    all_rows = torch.cat(ranks.gather_rows(row_labels, ranks.rows))
    all_cols = ranks.gather_rows(col_labels, ranks.cols)
    row_share = _share(row_labels, torch.cat(all_cols), sums)
    return [
        replace(
            block,
            row_labels=row_labels,
            col_labels=labels,
            row_share=row_share,
            col_share=_share(labels, all_rows, sums),
        )
        for labels in all_cols
    ]


def _share(labels: Tensor, others: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / (how many of `others` are equal), 0 where none is."""
    ordered = others.sort().values
    counts = torch.searchsorted(ordered, labels, right=True) - torch.searchsorted(ordered, labels)
    return torch.where(counts > 0, 1.0 / counts.clamp(min=1).to(dtype), 0.0)


# The blocks on the CPU kernels: the signatures of `reference/contrastive_blocks.py`.


def _cpu_launch(q: Tensor, k: Tensor, scale: Tensor, block: Block, **options: Any) -> _Launch:
    positives = None if block.row_labels is not None else block.positives
    call = Arguments(
        q,
        k,
        scale,
        block.logit_bias,
        positives=positives,
        row_labels=block.row_labels,
        col_labels=block.col_labels,
        smoothing=block.smoothing,
        compute=q.dtype,
        **options,
    )
    launch = _Launch(call)
    launch.arguments |= {
        "block": True,
        "row_classes": max(block.row_classes, 1),
        "col_classes": max(block.col_classes, 1),
    }
    launch.add("row_share", block.row_share)
    launch.add("col_share", block.col_share)
    return launch


def _cpu_statistics(q: Tensor, k: Tensor, scale: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    row, col = torch.empty(4, q.shape[0]), torch.empty(4, k.shape[0])
    launch = _cpu_launch(q, k, scale, block, columns=True)
    launch.add("row_stats", row)
    launch.add("col_stats", col)
    launch("clip_loss", _native.cpu.contrastive_block_statistics)
    return row, col


def _cpu_gradients(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    block: Block,
    row_lse: Tensor,
    col_lse: Tensor,
    row_weight: Tensor,
    col_weight: Tensor,
    grad_q: Tensor | None,
    wants_k: bool,
) -> tuple[Tensor | None, Tensor]:
    launch = _cpu_launch(q, k, scale, block, columns=True)
    grad_k = torch.empty(k.shape) if wants_k else None
    grad_scale = torch.empty(())
    for name, tensor in (
        ("row_lse", row_lse),
        ("col_lse", col_lse),
        ("row_weight", row_weight),
        ("col_weight", col_weight),
        ("grad_q", grad_q),
        ("grad_k", grad_k),
        ("grad_scale", grad_scale),
    ):
        launch.add(name, tensor)
    launch("clip_loss", _native.cpu.contrastive_backward)
    return grad_k, grad_scale.double()


def _cpu_sigmoid(
    q: Tensor, k: Tensor, scale: Tensor, block: Block, weight: float, grad_q: Tensor | None, wants_k: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    launch = _cpu_launch(q, k, scale, block)
    launch.arguments["sigmoid"] = True
    grad_k = torch.empty(k.shape) if wants_k else None
    value, grad_scale, grad_bias = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for name, tensor in (
        ("loss", value),
        ("row_weight", torch.full((q.shape[0],), weight)),
        ("grad_q", grad_q),
        ("grad_k", grad_k),
        ("grad_scale", grad_scale),
        ("grad_logit_bias", grad_bias),
    ):
        launch.add(name, tensor)
    launch("siglip_loss", _native.cpu.contrastive_one_pass, one_pass=True)
    return value.double(), grad_k, grad_scale.double(), grad_bias.double()


def _blocks(backend: str) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """A backend's statistics, gradients and sigmoid."""
    if backend == "cpu":
        return _cpu_statistics, _cpu_gradients, _cpu_sigmoid
    if backend == "triton":
        from vlmkernels.ops.triton import contrastive_blocks as kernels

        return kernels.block_statistics, kernels.block_gradients, kernels.block_sigmoid
    return reference.block_statistics, reference.block_gradients, reference.block_sigmoid
