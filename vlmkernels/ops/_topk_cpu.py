# SPDX-License-Identifier: Apache-2.0
"""How top-k searches reach the CPU kernels: tensors as addresses, outputs and workspaces allocated here.

Nothing here computes; under a TorchDispatchMode a call issues allocations and views only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmkernels import _native

METRICS = ("dot", "cosine", "l2")
_NO_MATRIX = (0, 0, 0, 0)


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a database.

    Attributes:
        codes: [R, D] float32, bfloat16 or int8: what the scan multiplies.
        vectors: [R, D] float32, what scores are of; None = the codes.
        norm: [R] of the vectors; None = found while scanning.
        scale: [R], of int8 codes.
        residual: [R] upper bounds on `|vector - scale * codes|`; None = 0.
        kept: int64 [count] which rows there are, ascending; None = all of the first `count`.
        labels: int64 [R]; None = the position.
        count: number of rows.
    """

    codes: Tensor
    count: int
    vectors: Tensor | None = None
    norm: Tensor | None = None
    scale: Tensor | None = None
    residual: Tensor | None = None
    kept: Tensor | None = None
    labels: Tensor | None = None


@dataclass(frozen=True)
class Stats:
    """What a search had to do.

    Attributes:
        rescored: rows whose exact score was computed, over all queries.
        widened: queries that the codes left too many rows for, so that the scan ran again on the vectors.
    """

    rescored: int
    widened: int


def search(
    op: str,
    queries: Tensor,
    rows: Sequence[Rows],
    k: int,
    metric: str,
    *,
    allowed: Tensor | None = None,
    mask: Tensor | None = None,
    centre: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best rows of every query.

    Args:
        op: public name, for errors.
        queries: [N, D] float32 or bfloat16, any strides.
        rows: the database in pieces, of one dtype.
        k: at least 1; more than there are rows is filled up with -1 and -inf.
        metric: one of `METRICS`.
        allowed: bool by position, for all queries.
        mask: bool [N, rows], any row stride.
        centre: [D] float32, where the codes are of rotated vectors less this one.

    Returns:
        `(scores, labels, stats)`: float32 [N, k], int64 [N, k], int64 [2] (see `Stats`).
    """
    n = queries.shape[0]
    scores = torch.empty((n, k), dtype=torch.float32)
    labels = torch.empty((n, k), dtype=torch.int64)
    stats = torch.empty(2, dtype=torch.int64)
    call, alive = _call(queries, rows, k, metric, allowed, mask, centre, (scores, labels, stats))
    _run(op, call)
    del alive
    return scores, labels, stats


def range_search(
    op: str,
    queries: Tensor,
    rows: Sequence[Rows],
    threshold: float,
    metric: str,
    centre: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every row whose score is at least `threshold`: `(lims [N + 1], scores [R], labels [R])`, best first."""
    n = queries.shape[0]
    stats = torch.empty(2, dtype=torch.int64)
    outputs = (torch.empty(0), torch.empty(0, dtype=torch.int64), stats)
    call, alive = _call(queries, rows, 1, metric, None, None, centre, outputs)
    threads = _native.threads()
    workspace = torch.empty(call.range_workspace(threads) + 64, dtype=torch.uint8)
    at = workspace.data_ptr()
    result = _native.cpu.RangeResult()
    _native.call(op, _native.cpu.topk_range, call, threshold, at + -at % 64, threads, result)
    del alive
    lims = torch.empty(n + 1, dtype=torch.int64)
    scores = torch.empty(result.count(), dtype=torch.float32)
    labels = torch.empty(result.count(), dtype=torch.int64)
    result.copy(lims.data_ptr(), scores.data_ptr(), labels.data_ptr())
    return lims, scores, labels


def zero_shot(
    images: Tensor, class_features: Tensor, logit_scale: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities [N, k], log-sum-exps [N] and indices [N, k]; see `vk.zero_shot`."""
    n = images.shape[0]
    classes = class_features if class_features.ndim == 2 else class_vectors(class_features)
    probabilities = torch.empty((n, k), dtype=torch.float32)
    labels = torch.empty((n, k), dtype=torch.int64)
    stats = torch.empty(2, dtype=torch.int64)
    lse = torch.empty(n, dtype=torch.float32)
    outputs = (probabilities, labels, stats)
    rows = [Rows(classes, classes.shape[0])]
    call, alive = _call(images, rows, k, "cosine", None, None, None, outputs)
    call.classify(logit_scale.data_ptr(), _native.dtype_tag(logit_scale.dtype), lse.data_ptr())
    _run("zero_shot", call)
    del alive
    return probabilities, lse, labels


def encode_rotated(vectors: Tensor, centre: Tensor) -> dict[str, Tensor]:
    """int8 codes of `rotate(vector - centre)`, as columns of an index.

    Args:
        vectors: [n, D] float32.
        centre: [D] float32.

    Returns:
        codes [n, D], scale [n], norm [n] (of the vectors) and residual [n], upper bounds on what the codes miss.
    """
    vectors, (n, d) = vectors.contiguous(), vectors.shape
    columns = {
        "codes": torch.empty((n, d), dtype=torch.int8),
        **{name: torch.empty(n, dtype=torch.float32) for name in ("scale", "norm", "residual")},
    }
    outputs = {name: x.data_ptr() for name, x in columns.items()}
    _native.call(
        "FlatIndex.add",
        _native.cpu.encode_codes,
        vectors=vectors.data_ptr(),
        centre=centre.data_ptr(),
        n=n,
        d=d,
        threads=_native.threads(),
        **outputs,
    )
    return columns


def class_vectors(class_features: Tensor) -> Tensor:
    """[C, P, D] float32 or bfloat16 -> [C, D] float32: the mean of each class's normalised prompts."""
    c, p, d = class_features.shape
    flat = class_features.reshape(c * p, d)
    out = torch.empty((c, d), dtype=torch.float32)
    threads = _native.threads()
    workspace = torch.empty(_native.cpu.class_vectors_workspace(p, d, threads) + 64, dtype=torch.uint8)
    at = workspace.data_ptr()
    _native.call(
        "zero_shot",
        _native.cpu.class_vectors,
        _matrix(flat),
        c,
        p,
        d,
        out.data_ptr(),
        at + -at % 64,
        threads,
    )
    return out


def _matrix(x: Tensor | None) -> tuple[int, int, int, int]:
    if x is None:
        return _NO_MATRIX
    return (x.data_ptr(), _native.DTYPE_TAGS[x.dtype], x.stride(0), x.stride(1))


def _call(
    queries: Tensor,
    rows: Sequence[Rows],
    k: int,
    metric: str,
    allowed: Tensor | None,
    mask: Tensor | None,
    centre: Tensor | None,
    outputs: tuple[Tensor, Tensor, Tensor],
) -> tuple[Any, list[Tensor | None]]:
    if allowed is not None:
        allowed = allowed.contiguous()
    if mask is not None and mask.stride(1) != 1:
        mask = mask.contiguous()
    alive = [queries, allowed, mask, centre, *outputs]
    segments, first = [], 0
    for r in rows:
        segments.append(
            (
                _matrix(r.codes),
                _matrix(r.vectors),
                _native.address(r.norm),
                _native.address(r.scale),
                _native.address(r.residual),
                _native.address(r.kept),
                _native.address(r.labels),
                r.count,
                first,
            )
        )
        first += r.count
    scores, labels, stats = outputs
    call = _native.cpu.TopkCall(
        metric=METRICS.index(metric),
        n=queries.shape[0],
        d=queries.shape[1],
        k=k,
        q=_matrix(queries),
        segments=segments,
        allowed=_native.address(allowed),
        mask=_native.address(mask),
        mask_stride=0 if mask is None else mask.stride(0),
        centre=_native.address(centre),
        scores=scores.data_ptr(),
        labels=labels.data_ptr(),
        rescored=stats.data_ptr(),
    )
    return call, alive


def _run(op: str, call: Any) -> None:
    threads = _native.threads()
    workspace = torch.empty(call.workspace(threads) + 64, dtype=torch.uint8)
    at = workspace.data_ptr()
    _native.call(op, _native.cpu.topk_search, call, at + -at % 64, threads)
