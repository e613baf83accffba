# SPDX-License-Identifier: Apache-2.0
"""The CUDA backend of the contrastive losses: what it refuses, and how a problem is cut into chunks of logits.

A chunk is a range of rows and columns. In forward its kernel leaves two vectors for every tile, row and column
statistics of one product, which are added up here in order; in backward it leaves the chunk's d loss / d logits in the
products' dtype, at most `CHUNK_BYTES`, and two library products add it into float32 sums. CLIP: 8 N M D operations, the
sigmoid loss 6. Deterministic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkernels import _native
from vlmkernels.ops import dispatch
from vlmkernels.ops._contrastive_ops import Arguments

DTYPES = (torch.bfloat16, torch.float16)

#: What a chunk of gradients, or the partial statistics of one, may take.
CHUNK_BYTES = 48 * 2**20
#: Columns of a chunk of gradients at most: few passes over the rows' sums, and rows enough that the columns' see few.
CHUNK_COLUMNS = 8192
_CHUNK = 16
_EIGHT = 8

#: First row, rows, first column, columns.
Range = tuple[int, int, int, int]


def reasons(call: dispatch.Call) -> list[str]:
    """Why the kernels cannot serve a call; this is the whole list of refusals."""
    if _native.cuda_reason is not None:
        return [_native.cuda_reason]
    against = []
    if call.device != _native.CUDA_DEVICE:
        against.append(f"it serves cuda tensors, not {call.device}")
    if call.dtype not in DTYPES:
        against.append(f"it multiplies bfloat16 and float16, not {call.dtype}")
    if any(dtype not in (*DTYPES, torch.float32) for dtype in call.facts["dtypes"]):
        shown = " and ".join(map(str, call.facts["dtypes"]))
        against.append(f"features are float32, bfloat16 or float16, not {shown}")
    if call.facts.get("group"):
        against.append("it has no blocks of logits for a process group")
    return against


class _Problem:
    """One loss's operands as the kernels take them, and a call with their addresses.

    Attributes:
        q: [N, D] in the dtype of the products, rows padded to whole 16-byte chunks; k: [M, D].
        key_bias: [M] float32, -inf where the mask leaves a key out.
    """

    def __init__(self, call: Arguments, index: int, compute: torch.dtype) -> None:
        self.n, self.d = call.q.shape[-2:]
        self.m = call.k.shape[-2]
        self.q, self.k = (_rows(_one(x, index), compute) for x in (call.q, call.k))
        self.columns, self.smoothing = call.columns, call.smoothing
        self.scale, self.bias = call.scale, call.bias
        self.key_bias = _key_bias(call, index)
        self.positives: Tensor | None = None
        self.counted = torch.ones(self.n, device=call.q.device)
        if call.positives is not None:
            self.positives = _one(call.positives[..., None], index)[:, 0].contiguous()
            if call.ignore_index is not None:
                self.counted = (self.positives != call.ignore_index).float()
        self.native = _native.cuda.ContrastiveCall(
            self.q.data_ptr(),
            self.k.data_ptr(),
            self.n,
            self.m,
            self.q.shape[1] * self.q.element_size(),
            self.q.dtype == torch.bfloat16,
            self.scale.data_ptr(),
            _native.address(self.bias),
            _native.address(self.key_bias),
            _native.address(self.positives),
            self.columns,
        )

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    def ranges(self, cells: int, widest: int) -> Iterator[Range]:
        """Chunks of at most `cells` logits and `widest` columns, or one tile: rows outside, columns inside."""
        tile = _native.cuda.contrastive_tile()
        width = max(min(self.m, widest), 1)
        height = max(min(self.n, cells // width // tile * tile), tile)
        for row in range(0, self.n, height):
            for col in range(0, self.m, width):
                yield row, min(height, self.n - row), col, min(width, self.m - col)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    padding = -x.shape[1] % (_CHUNK // x.element_size())
    x = F.pad(x, (0, padding)) if padding else x.contiguous()
    return x if x.data_ptr() % _CHUNK == 0 else x.clone()


def _one(x: Tensor, index: int) -> Tensor:
    """Problem `index` of features `[..., N, D]`."""
    return x.flatten(0, -3)[index] if x.ndim > 2 else x


def _key_bias(call: Arguments, index: int) -> Tensor | None:
    """Bias of every key, -inf for those that are masked."""
    key_bias = None if call.key_bias is None else call.key_bias.float().contiguous()
    if call.key_mask is None:
        return key_bias
    mask = _one(call.key_mask[..., None], index)[:, 0]
    base = torch.zeros(mask.shape, device=mask.device) if key_bias is None else key_bias
    return base.masked_fill(~mask, -torch.inf)


# Statistics.


def _statistics(problem: _Problem) -> tuple[Tensor, Tensor]:
    """Maximum, shifted sum of exponentials, positive's logit and sum of the logits: [4, N] and [4, M]."""
    row, col = (
        problem.empty(4, count).fill_(torch.nan) for count in (problem.n, problem.m if problem.columns else 0)
    )
    for line in (row, col):
        line[0], line[1], line[3] = -torch.inf, 0.0, 0.0
    totals = problem.smoothing > 0.0
    slots, tile = 3 if totals else 2, _native.cuda.contrastive_tile()
    # a tile leaves two vectors of its width
    cells = CHUNK_BYTES // (4 * slots * 2) * tile
    for chunk in problem.ranges(cells, max(cells // max(problem.n, 1) // tile, 1) * tile):
        first_row, rows, first_col, cols = chunk
        row_parts = problem.empty(slots, -(-cols // tile), rows)
        col_parts = problem.empty(slots, -(-rows // tile), cols) if problem.columns else None
        _native.call(
            "contrastive",
            _native.cuda.contrastive_statistics,
            problem.native,
            chunk,
            totals,
            row_parts.data_ptr(),
            _native.address(col_parts),
            row[2].data_ptr(),
            _native.address(col[2]) if problem.columns else 0,
            *_native.cuda_place(problem.q),
        )
        _merge(row[:, first_row : first_row + rows], row_parts)
        if col_parts is not None:
            _merge(col[:, first_col : first_col + cols], col_parts)
    return row, col


def _merge(line: Tensor, parts: Tensor) -> None:
    """Adds partial statistics [2 or 3, parts, L] to those of a line [4, L], in their order."""
    tops = torch.cat([line[0][None], parts[0]])
    sums = torch.cat([line[1][None], parts[1]])
    top = tops.amax(0)
    shift = torch.where(top == -torch.inf, 0.0, top)
    line[1] = (sums * (tops - shift).exp()).sum(0)
    line[0] = top
    if parts.shape[0] > 2:
        line[3] += parts[2].sum(0)


def _log_sums(line: Tensor) -> Tensor:
    """[4, L] -> [2, L]: maximum, and logarithm of the shifted sum; never added up."""
    return torch.stack([line[0], line[1].double().log().float()])


def _losses(line: Tensor, smoothing: float, classes: int) -> Tensor:
    """Cross-entropies, float64 [L]. Maximum less target first: a converged loss is their tiny difference."""
    top, sums, target, total = line.double().unbind(0)
    losses = top - target * (1.0 - smoothing)
    if smoothing:
        losses = losses - smoothing / max(classes, 1) * total
    return losses + sums.log()


def _counting(losses: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted > 0, losses, 0.0)


# Gradients.


class _Sums:
    """Gradients of one problem, added up over its chunks in float32."""

    def __init__(self, problem: _Problem, wants_q: bool, wants_k: bool, wants_keys: bool) -> None:
        self.problem = problem
        device, width = problem.q.device, problem.q.shape[1]
        self.q = torch.zeros(problem.n, width, device=device) if wants_q else None
        self.k = torch.zeros(problem.m, width, device=device) if wants_k else None
        self.keys = torch.zeros(problem.m, dtype=torch.float64, device=device) if wants_keys else None
        #: of gradient times dot product, of gradients, of losses
        self.numbers = torch.zeros(3, dtype=torch.float64, device=device)

    def add_all(self, sigmoid: bool, op: str) -> None:
        """Every chunk of the problem."""
        problem, tile = self.problem, _native.cuda.contrastive_tile()
        wants_tile = self.q is not None or self.k is not None
        cells = CHUNK_BYTES // problem.q.element_size() if wants_tile else 2**31
        for chunk in problem.ranges(cells, CHUNK_COLUMNS if wants_tile else 2**20):
            first_row, rows, first_col, cols = chunk
            stride = cols + -cols % _EIGHT
            buffer = torch.empty(
                rows if wants_tile else 0, stride, dtype=problem.q.dtype, device=problem.q.device
            )
            numbers = problem.empty(3, -(-rows // tile) * -(-cols // tile))
            keys = problem.empty(-(-rows // tile), cols) if self.keys is not None else None
            _native.call(
                op,
                _native.cuda.contrastive_gradients,
                problem.native,
                chunk,
                sigmoid,
                buffer.data_ptr() if wants_tile else 0,
                stride,
                numbers.data_ptr(),
                _native.address(keys),
                *_native.cuda_place(problem.q),
            )
            self.numbers += numbers.double().sum(1)
            if self.keys is not None and keys is not None:
                self.keys[first_col : first_col + cols] += keys.double().sum(0)
            part = buffer[:, :cols]
            if self.q is not None:
                _add_product(
                    self.q[first_row : first_row + rows], part, problem.k[first_col : first_col + cols]
                )
            if self.k is not None:
                _add_product(
                    self.k[first_col : first_col + cols], part.T, problem.q[first_row : first_row + rows]
                )

    def write(self, grad_q: Tensor | None, grad_k: Tensor | None, factor: Tensor) -> None:
        """The features' gradients: the sums times scale and `factor`."""
        scaled = factor * self.problem.scale
        for sums, grad in ((self.q, grad_q), (self.k, grad_k)):
            if sums is not None and grad is not None:
                grad.copy_(sums[:, : self.problem.d] * scaled)


def _add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """`sums += a @ b`: float32 sums of half-precision operands, where torch's library product can add to such."""
    if a.device.type == "cpu":
        sums.addmm_(a.float(), b.float())
        return
    try:
        torch.ops.aten.addmm.dtype_out(sums, a, b, torch.float32, out=sums)
    except (AttributeError, NotImplementedError, RuntimeError):
        sums += a @ b  # a chunk's product is rounded, the sum of chunks is not


# The registered ops; outputs are made by the caller, `compute` is the dtype of the products.


def softmax_forward(
    call: Arguments, compute: torch.dtype, outputs: tuple[Tensor, ...], op: str
) -> tuple[Tensor, ...]:
    """Fills loss, row_lse [..., 2, N] and col_lse [..., 2, M]; dot products are formed again in backward."""
    loss, row_lse, col_lse, _ = outputs
    batches = math.prod(call.q.shape[:-2])
    n, m = call.q.shape[-2], call.k.shape[-2]
    values = []
    for index in range(batches):
        problem = _Problem(call, index, compute)
        row, col = _statistics(problem)
        row_lse.view(batches, 2, n)[index] = _log_sums(row)
        losses = _counting(_losses(row, call.smoothing, m), problem.counted)
        if call.columns:
            col_lse.view(batches, 2, m)[index] = _log_sums(col)
            values.append((losses.mean() + _losses(col, call.smoothing, n).mean()) / 2)
        elif call.reduction == "none":
            values.append(losses)
        else:
            values.append(torch.stack([losses.sum(), problem.counted.double().sum()]))
    loss.copy_(_reduced(call, values).view(loss.shape))
    return outputs


def _reduced(call: Arguments, values: list[Tensor]) -> Tensor:
    if not values:  # no problem at all
        empty = torch.full((), torch.nan, dtype=torch.float64, device=call.q.device)
        return empty.expand(*call.q.shape[:-1]) if call.reduction == "none" else empty
    stacked = torch.stack(values)
    if call.reduction == "none":
        return stacked
    if call.columns:
        return stacked.mean()
    total, counted = stacked.sum(0)
    return total / counted if call.reduction == "mean" else total


def _weights(call: Arguments, grad_loss: Tensor, problems: list[_Problem]) -> tuple[list[Tensor], Tensor]:
    """What rows' losses are multiplied by, in two parts: at most 1 each, so that a tile fits float16, and a factor."""
    counted = [problem.counted for problem in problems]
    grad_loss = grad_loss.float()
    if call.reduction == "none" and not call.columns:
        given = grad_loss.reshape(len(problems), -1)
        largest = given.nan_to_num(0.0).abs().amax() if given.numel() else given.new_zeros(())
        down = torch.where(largest > 0, 1.0 / largest, 0.0)
        return [c * g * down for c, g in zip(counted, given, strict=True)], largest
    if call.columns:
        return counted, grad_loss / (2 * max(call.q.shape[-2] * len(problems), 1))
    if call.reduction == "mean":
        number = torch.stack([c.sum() for c in counted]).sum() if counted else grad_loss.new_ones(())
        return counted, grad_loss / number.clamp(min=1)
    return counted, grad_loss


def softmax_backward(
    grad_loss: Tensor,
    call: Arguments,
    compute: torch.dtype,
    kept: list[Tensor],
    needs: list[bool],
    outputs: tuple[Tensor, ...],
    op: str,
) -> tuple[Tensor, ...]:
    """Fills the gradients of q, k, scale and key_bias."""
    row_lse, col_lse, _ = kept
    batches = math.prod(call.q.shape[:-2])
    problems = [_Problem(call, index, compute) for index in range(batches)]
    weights, factor = _weights(call, grad_loss, problems)
    _softmax_gradients(call, problems, row_lse, col_lse, weights, factor, needs, outputs, op)
    return outputs


def _softmax_gradients(
    call: Arguments,
    problems: list[_Problem],
    row_lse: Tensor,
    col_lse: Tensor,
    weights: list[Tensor],
    factor: Tensor,
    needs: list[bool],
    outputs: tuple[Tensor, ...],
    op: str,
) -> None:
    grad_q, grad_k, grad_scale, grad_key_bias = outputs
    batches, n, m = len(problems), call.q.shape[-2], call.k.shape[-2]
    number = torch.zeros((), dtype=torch.float64, device=call.q.device)
    keys = torch.zeros(grad_key_bias.shape, dtype=torch.float64, device=call.q.device)
    for index, problem in enumerate(problems):
        weight = weights[index].contiguous()
        of_rows = row_lse.reshape(batches, 2, n)[index].contiguous()
        of_columns = col_lse.reshape(batches, 2, m)[index].contiguous() if call.columns else None
        problem.native.set_softmax(
            of_rows.data_ptr(),
            _native.address(of_columns),
            weight.data_ptr(),
            0,
            call.smoothing / max(m, 1),
            call.smoothing / max(n, 1),
            1.0 - call.smoothing,
        )
        sums = _Sums(problem, needs[0], needs[1], grad_key_bias.numel() > 0)
        sums.add_all(False, op)
        _write(sums, index, call, needs, grad_q, grad_k, factor)
        number += sums.numbers[0]
        if sums.keys is not None:
            keys += sums.keys
    grad_scale.copy_(number * factor)
    if keys.numel():
        grad_key_bias.copy_(keys * factor)


def _write(
    sums: _Sums,
    index: int,
    call: Arguments,
    needs: list[bool],
    grad_q: Tensor,
    grad_k: Tensor,
    factor: Tensor,
) -> None:
    sums.write(
        _one(grad_q, index) if needs[0] else None,
        _one(grad_k, index) if needs[1] else None,
        factor,
    )


def one_pass(
    call: Arguments,
    compute: torch.dtype,
    sigmoid: bool,
    needs: list[bool],
    outputs: tuple[Tensor, ...],
    op: str,
) -> tuple[Tensor, ...]:
    """Fills the loss, and its gradients of q, k, scale, bias and key_bias for an incoming gradient of 1."""
    loss, grad_q, grad_k, grad_scale, grad_bias, grad_key_bias = outputs
    if not sigmoid:
        n, m = call.q.shape[-2], call.k.shape[-2]
        row_lse, col_lse = call.scale.new_empty(*call.q.shape[:-2], 2, n), call.scale.new_empty(0, 2, m)
        softmax_forward(call, compute, (loss, row_lse, col_lse, col_lse), op)
        if any(needs):
            problems = [_Problem(call, index, compute) for index in range(math.prod(call.q.shape[:-2]))]
            weights, factor = _weights(call, torch.ones_like(loss), problems)
            written = (grad_q, grad_k, grad_scale, grad_key_bias)
            _softmax_gradients(call, problems, row_lse, col_lse, weights, factor, needs, written, op)
            grad_bias.zero_()  # a number added to all logits cancels
        return outputs
    batches, n = math.prod(call.q.shape[:-2]), call.q.shape[-2]
    numbers = torch.zeros(3, dtype=torch.float64, device=call.q.device)
    factor = torch.full((), 1.0 / max(batches * n, 1), device=call.q.device)
    for index in range(batches):
        sums = _Sums(_Problem(call, index, compute), needs[0], needs[1], False)
        sums.add_all(True, op)
        _write(sums, index, call, needs, grad_q, grad_k, factor)
        numbers += sums.numbers
    loss.copy_(numbers[2] / (batches * n) if batches * n else numbers[2] * torch.nan)
    if any(needs):
        grad_scale.copy_(numbers[0] * factor)
        grad_bias.copy_(numbers[1] * factor)
    return outputs
