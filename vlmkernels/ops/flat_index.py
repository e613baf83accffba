# SPDX-License-Identifier: Apache-2.0
"""FlatIndex: a database of vectors with exact search.

What it stores lives in `_index_store.py`; it is searched by the CPU kernels (`_topk_cpu.py`) where the rows are on the
CPU and the extension is there, by the Triton kernels (`_topk_triton.py`) on a GPU, else by the reference
(`reference/topk_scan.py`). The answers are the same.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from vlmkernels import _native

from . import _check, _topk_cpu, _topk_triton, _triton, dispatch
from ._index_store import STORAGE_DTYPES, IndexRows, Layout, Snapshot, kernel_rows, read_file, write_file
from ._topk_cpu import Stats
from .reference.topk_scan import scan_range, scan_topk

if TYPE_CHECKING:
    import numpy

    ArrayLike: TypeAlias = Tensor | numpy.ndarray
    IdsLike: TypeAlias = Tensor | numpy.ndarray | Sequence[int]


class FlatIndex:
    """Vectors with int64 ids, searched exhaustively and exactly.

    ```
    search: the k largest s(q, x_id) of every query, s as in vk.topk_similarity ("cosine", "dot", "l2" = -|q - x|^2)
    ```

    Scores are those of `vk.topk_similarity`: computed in float64 in a fixed order, rounded to float32, descending;
    equal scores come in ascending id, NaN comes last. Results do not depend on the batch of queries, the thread
    count, the order of adding, or (`exact=True`) the storage.

    The storage is what a search reads: float32 vectors, bfloat16 ones (half the bytes), or int8 codes with one scale
    per row (a quarter). With `exact=True` the float32 vectors are kept too, in memory or in the mapped file; the scan
    bounds how far a code's score may be from the true one and scores the few rows that the bound cannot rule out from
    their vectors. With `exact=False` codes are all there is, and rows rank by the vectors that the codes stand for.

    Searches may run in several threads at once, also while another thread changes the index: each sees the state
    before or after a change, never a part of it. Changes wait for one another.

    Args:
        dim: D, at least 1.
        metric: "cosine", "dot" or "l2".
        storage: "float32", "bfloat16" or "int8".
        exact: keep float32 vectors beside the codes, and answer from them.
        device: where the rows are.

    Raises:
        TypeError, ValueError: arguments of another kind.

    Nothing here is differentiable; `vk.topk_similarity` is.

    Example:
        >>> index = vk.FlatIndex(2)
        >>> _ = index.add(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), ids=[10, 20, 30])
        >>> index.search(torch.tensor([[0.0, 3.0]]), k=2)[1].tolist()
        [[20, 30]]
    """

    def __init__(
        self,
        dim: int,
        *,
        metric: str = "cosine",
        storage: str = "float32",
        exact: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        _check.count("FlatIndex", "dim", dim, 1)
        _check.one_of("FlatIndex", "metric", metric, _check.METRICS)
        _check.one_of("FlatIndex", "storage", storage, tuple(STORAGE_DTYPES))
        _check.flag("FlatIndex", "exact", exact)
        self._metric = metric
        self._snapshot = Snapshot(Layout(dim, storage, exact), _full_device(device))
        self._writing = threading.Lock()

    @property
    def dim(self) -> int:
        """Width D of the vectors."""
        return self._snapshot.layout.dim

    @property
    def metric(self) -> str:
        """ "cosine", "dot" or "l2"."""
        return self._metric

    @property
    def storage(self) -> str:
        """ "float32", "bfloat16" or "int8"."""
        return self._snapshot.layout.storage

    @property
    def exact(self) -> bool:
        """Whether answers are those of the float32 vectors."""
        return self._snapshot.layout.exact

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._snapshot.device

    @property
    def ntotal(self) -> int:
        """Number of vectors."""
        return self._snapshot.count

    @property
    def ids(self) -> Tensor:
        """The ids in order of position (the order of adding, without what was removed): int64 [ntotal], a copy."""
        return self._snapshot.ids()

    def __len__(self) -> int:
        return self.ntotal

    def __repr__(self) -> str:
        return (
            f"FlatIndex(dim={self.dim}, metric={self.metric!r}, storage={self.storage!r}, exact={self.exact}, "
            f"device={str(self.device)!r}, ntotal={self.ntotal})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_writing"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _writing=threading.Lock())

    def add(self, vectors: ArrayLike, ids: IdsLike | None = None) -> Tensor:
        """Append vectors.

        Atomic: a search sees all of them or none, and a call that raises changes nothing. Small batches are cheap; rows
        already stored are not copied.

        Args:
            vectors: [n, D] tensor or NumPy array, floating; kept as float32.
            ids: int64 [n], not negative, distinct and new; default: counted up from the largest id there has been.

        Returns:
            The ids, int64 [n] on the index's device.

        Raises:
            TypeError: vectors are not floating, or ids not integers.
            ValueError: shapes that do not fit; ids that are negative, repeated, or already there.
        """
        op = "FlatIndex.add"
        rows = self._vectors(op, "vectors", vectors)
        given = None if ids is None else self._ids(op, ids)
        if given is not None and given.numel() != rows.shape[0]:
            raise ValueError(f"vk.{op}: ids must be [n] = [{rows.shape[0]}], got {_check.describe(given)}")
        with self._writing:
            snapshot = self._snapshot
            rows = rows.to(snapshot.device)
            if given is None:
                first = snapshot.last_id + 1
                if first + rows.shape[0] > 2**63 - 1:
                    raise ValueError(f"vk.{op}: ids must be given, no more follow {snapshot.last_id}")
                added = torch.arange(first, first + rows.shape[0], device=snapshot.device)
            else:
                added = given.to(snapshot.device, copy=True)
                _check_new_ids(op, added, snapshot)
            if rows.shape[0]:
                self._snapshot = snapshot.append(rows, added)
            return added

    def remove(self, ids: IdsLike) -> int:
        """Remove vectors; the rest keeps its order and its ids.

        Args:
            ids: int64 [n], each in the index; repetition is allowed.

        Returns:
            How many vectors were removed.

        Raises:
            TypeError: ids are not integers.
            ValueError: an id is not in the index; nothing is removed then.
        """
        wanted = self._ids("FlatIndex.remove", ids)
        with self._writing:
            snapshot = self._snapshot
            positions = _positions("FlatIndex.remove", snapshot, wanted.to(snapshot.device)).unique()
            if positions.numel():
                self._snapshot = snapshot.without(positions)
            return positions.numel()

    def reset(self) -> None:
        """Remove everything; ids start at 0 again."""
        with self._writing:
            self._snapshot = Snapshot(self._snapshot.layout, self._snapshot.device)

    def reconstruct(self, ids: IdsLike) -> Tensor:
        """The vectors of ids.

        Args:
            ids: int64 [n], each in the index.

        Returns:
            [n, D] float32: the vectors as they were added (`exact=True` or storage "float32"), or what the codes
            stand for.

        Raises:
            TypeError: ids are not integers.
            ValueError: an id is not in the index.
        """
        snapshot = self._snapshot
        wanted = self._ids("FlatIndex.reconstruct", ids).to(snapshot.device)
        return IndexRows(snapshot).gather(_positions("FlatIndex.reconstruct", snapshot, wanted))

    def to(self, device: torch.device | str) -> FlatIndex:
        """Move the index to a device, in place as a module does (a mapped index is read into memory on the way).

        Returns:
            The index itself.
        """
        target = _full_device(device)
        with self._writing:
            self._snapshot = self._snapshot.to(target)
        return self

    def search(
        self, queries: ArrayLike, k: int, filter: ArrayLike | Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The k best vectors for every query.

        Args:
            queries: [N, D] tensor or NumPy array, floating; used as float32.
            k: at least 1; may exceed `ntotal`.
            filter: what may be found. Bool: True = allowed, [ntotal] by position (the order of `ids`), or [N, ntotal]
                for each query. Integers: the allowed ids [F], in any order; ids that are not in the index are ignored.

        Returns:
            `(scores, ids)`, float32 and int64 [N, k] on the index's device, descending. Where fewer than k vectors can
            be found, the rest is id -1 with score -inf.

        Raises:
            TypeError: queries are not floating, k is no int, the filter is neither bool nor integer.
            ValueError: shapes that do not fit, k < 1.
        """
        scores, ids, _ = self._search(queries, k, filter)
        return scores, ids

    def search_with_stats(
        self, queries: ArrayLike, k: int, filter: ArrayLike | Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, Stats]:
        """As `search`, with what the search had to do: how many rows the bounds left to be scored exactly.

        Args:
            queries, k, filter: as in `search`.

        Returns:
            `(scores, ids, stats)`: `stats.rescored` counts exactly scored rows over all queries, `stats.widened` the
            queries for which the codes left so many that the scan was repeated on the float32 vectors. Both are -1
            where the kernels did not serve the call.
        """
        scores, ids, stats = self._search(queries, k, filter)
        return scores, ids, Stats(-1, -1) if stats is None else Stats(*stats.tolist())

    def _search(
        self, queries: ArrayLike, k: int, filter: ArrayLike | Sequence[int] | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        op = "FlatIndex.search"
        snapshot = self._snapshot
        wanted = self._vectors(op, "queries", queries).to(snapshot.device)
        _check.count(op, "k", k, 1)
        allowed, mask = None, None
        if filter is not None:
            given = _array(op, "filter", filter).to(snapshot.device)
            if given.dtype == torch.bool:
                _check.allowed_rows(op, "filter", given, wanted.shape[0], snapshot.count)
                allowed, mask = (given, None) if given.ndim == 1 else (None, given)
            else:
                found = snapshot.find(_as_ids(op, "filter", given))
                allowed = torch.zeros(snapshot.count, dtype=torch.bool, device=snapshot.device)
                allowed[found[found >= 0]] = True
        kernels, rows = _kernels(snapshot.device.type), kernel_rows(snapshot)
        options = {"allowed": allowed, "mask": mask, "centre": snapshot.centre}
        if kernels == "cpu":
            return _topk_cpu.search(op, wanted, rows, k, self._metric, **options)
        if kernels == "triton":
            return _topk_triton.search(wanted, rows, k, self._metric, **options)
        positions = None if allowed is None else allowed.nonzero().squeeze(1)
        scores, ids = scan_topk(wanted, IndexRows(snapshot, positions), k, self._metric, mask=mask)
        return scores, ids, None

    def range_search(self, queries: ArrayLike, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
        """Every vector whose score is at least a threshold.

        Args:
            queries: [N, D] tensor or NumPy array, floating; used as float32.
            threshold: smallest score to report, rounded to float32 as scores are; for "l2" a negated squared distance.

        Returns:
            `(lims, scores, ids)`: int64 [N + 1], float32 [R], int64 [R] on the index's device. Query i owns the entries
            lims[i] to lims[i + 1], descending, equal scores in ascending id. NaN is never reported.

        Raises:
            TypeError: queries are not floating, threshold is no number.
            ValueError: shapes that do not fit, a threshold that is NaN.
        """
        op = "FlatIndex.range_search"
        snapshot = self._snapshot
        wanted = self._vectors(op, "queries", queries).to(snapshot.device)
        _check.number(op, "threshold", threshold)
        if math.isnan(threshold):
            raise ValueError(f"vk.{op}: threshold must be a number, got {threshold}")
        kernels, rows = _kernels(snapshot.device.type), kernel_rows(snapshot)
        if kernels == "cpu":
            return _topk_cpu.range_search(op, wanted, rows, float(threshold), self._metric, snapshot.centre)
        if kernels == "triton":
            return _topk_triton.range_search(wanted, rows, float(threshold), self._metric, snapshot.centre)
        return scan_range(wanted, IndexRows(snapshot), threshold, self._metric)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the index to one file (safetensors), replacing an old one in a single step.

        The file is complete or not there: if writing is interrupted, the old file stays as it was.

        Args:
            path: the file.

        Raises:
            OSError: the file cannot be written.
        """
        snapshot = self._snapshot
        layout = snapshot.layout
        metadata = {
            "dim": str(layout.dim),
            "metric": self._metric,
            "storage": layout.storage,
            "exact": "true" if layout.exact else "false",
            "ids_ascend": "true" if snapshot.runs is None else "false",
            "last_id": str(snapshot.last_id),
        }
        write_file(Path(path), snapshot, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], mmap: bool = False) -> FlatIndex:
        """Read an index that `save` wrote, onto the CPU.

        Args:
            path: the file.
            mmap: leave the rows in the file and read them while searching, so that a database larger than memory can be
                searched. It may be changed all the same: new rows are kept in memory, the file is never written.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no index, is of a later version, or is cut short.
        """
        _check.flag("FlatIndex.load", "mmap", mmap)
        snapshot, metadata = read_file(Path(path), mmap)
        layout = snapshot.layout
        index = cls(layout.dim, metric=metadata["metric"], storage=layout.storage, exact=layout.exact)
        index._snapshot = snapshot
        return index

    def _vectors(self, op: str, name: str, value: Any) -> Tensor:
        x = _array(op, name, value)
        _check.floating(op, name, x)
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"vk.{op}: {name} must be [n, D] with D = {self.dim}, got {_check.describe(x)}")
        return x.to(torch.float32)

    def _ids(self, op: str, value: Any) -> Tensor:
        return _as_ids(op, "ids", _array(op, "ids", value))


def _kernels(device: str) -> str:
    """Which backend searches rows on a kind of device."""
    if device == "cpu":
        return "cpu" if _native.cpu_reason is None else "reference"
    return "reference" if _triton.reasons(dispatch.Call(device, torch.float32)) else "triton"


def _full_device(device: torch.device | str) -> torch.device:
    """The device with its number: "cuda" becomes "cuda:0", so that devices can be compared."""
    return torch.empty(0, device=device).device


def _array(op: str, name: str, value: Any) -> Tensor:
    """A tensor of a tensor, a NumPy array, or a list or tuple; never a writable view of an array that is read-only."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (list, tuple, range)):
        return torch.as_tensor(list(value)) if len(value) else torch.empty(0, dtype=torch.int64)
    if hasattr(value, "__array__"):
        import numpy

        array = numpy.asarray(value)
        # Torch knows neither negative strides nor read-only memory.
        usable = array.flags.writeable and all(stride >= 0 for stride in array.strides)
        return torch.from_numpy(array if usable else array.copy())
    raise TypeError(f"vk.{op}: {name} must be a tensor, a NumPy array or a list, got {type(value).__name__}")


def _as_ids(op: str, name: str, x: Tensor) -> Tensor:
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"vk.{op}: {name} must be integers, got {x.dtype}")
    if x.ndim != 1:
        raise ValueError(f"vk.{op}: {name} must be one-dimensional, got {_check.describe(x)}")
    return x.long()


def _check_new_ids(op: str, ids: Tensor, snapshot: Snapshot) -> None:
    if ids.numel() and int(ids.min()) < 0:
        raise ValueError(f"vk.{op}: ids must not be negative, got {int(ids.min())}")
    distinct, counts = ids.unique(return_counts=True)
    if distinct.numel() != ids.numel():
        raise ValueError(f"vk.{op}: ids must be distinct, got {int(distinct[counts > 1][0])} more than once")
    taken = ids[snapshot.find(ids) >= 0]
    if taken.numel():
        raise ValueError(f"vk.{op}: ids must be new, but {int(taken[0])} is in the index already")


def _positions(op: str, snapshot: Snapshot, ids: Tensor) -> Tensor:
    positions = snapshot.find(ids)
    unknown = ids[positions < 0]
    if unknown.numel():
        raise ValueError(f"vk.{op}: ids must be in the index, but {int(unknown[0])} is not")
    return positions
