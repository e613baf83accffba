# SPDX-License-Identifier: Apache-2.0
"""FAISS: its flat indexes and their files, from and to `vk.FlatIndex`.

The same verbs under nearly the same names:

| FAISS | `vk.FlatIndex` | difference |
|---|---|---|
| `IndexFlatIP(d)`, `IndexFlatL2(d)` | `FlatIndex(d, metric="dot")`, `metric="l2"` | "cosine" normalises by itself |
| `index.add(x)`, `add_with_ids(x, ids)` | `add(x)`, `add(x, ids)` | returns the ids: distinct, not negative |
| `index.search(x, k)` | `search(x, k)` | "l2" scores are negated squared distances: larger is better |
| `search(..., params=...(sel=IDSelector...))` | `search(x, k, filter=...)` | ids, or a bool mask by position |
| `index.range_search(x, radius)` | `range_search(x, threshold)` | scores of at least the threshold, sorted |
| `index.reconstruct(i)`, `reconstruct_batch(ids)` | `reconstruct(ids)` | by id, never by position |
| `index.remove_ids(sel)` | `remove(ids)` | the ids that stay keep their value (a plain FAISS index renumbers) |
| `index.reset()`, `index.ntotal`, `index.d` | `reset()`, `ntotal`, `dim` | |
| `write_index`, `read_index` | those of this file; `save`, `load` | `save` writes safetensors |

Results are tensors instead of NumPy arrays; missing results have id -1 in both, with score -inf here (FAISS: the
largest or smallest float). Equal scores come in ascending id.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlmkernels.ops.flat_index import FlatIndex

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["from_faiss", "read_index", "to_faiss", "write_index"]

_BATCH = 2**16  # rows moved at once: what is copied twice stays small


def from_faiss(
    index: Any,
    *,
    metric: str | None = None,
    storage: str = "float32",
    exact: bool = True,
    device: torch.device | str = "cpu",
) -> FlatIndex:
    """A `vk.FlatIndex` with the vectors and ids of a FAISS index.

    Args:
        index: `IndexFlatIP` or `IndexFlatL2`, or an `IndexIDMap` or `IndexIDMap2` over one.
        metric: None: "dot" for inner products and "l2" for L2; "cosine" may be asked for instead of "dot".
        storage: as `vk.FlatIndex` takes it.
        exact: as `vk.FlatIndex` takes it.
        device: where the rows are.

    Returns:
        The index, rows in the same order.

    Raises:
        ImportError: faiss is not installed.
        TypeError: the index is of another kind.
        ValueError: the metric does not fit the index; ids are negative or repeated.
    """
    import faiss

    outer = faiss.downcast_index(index)
    ids = None
    flat = outer
    if isinstance(outer, faiss.IndexIDMap):
        ids = torch.from_numpy(faiss.vector_to_array(outer.id_map))
        flat = faiss.downcast_index(outer.index)
    if not isinstance(flat, faiss.IndexFlat):
        raise TypeError(
            "vk.integrations.faiss: the index must be an IndexFlatIP or IndexFlatL2, or an IndexIDMap over one, "
            f"got {type(outer).__name__}" + ("" if flat is outer else f" over {type(flat).__name__}")
        )
    fitting = {faiss.METRIC_INNER_PRODUCT: ("dot", "cosine"), faiss.METRIC_L2: ("l2",)}.get(flat.metric_type)
    if fitting is None:
        raise TypeError(f"vk.integrations.faiss: metric type {flat.metric_type} of FAISS has no counterpart")
    if metric is not None and metric not in fitting:
        raise ValueError(f"vk.integrations.faiss: metric must be one of {fitting} here, got {metric!r}")
    result = FlatIndex(flat.d, metric=metric or fitting[0], storage=storage, exact=exact, device=device)
    for start in range(0, flat.ntotal, _BATCH):
        count = min(_BATCH, flat.ntotal - start)
        rows = torch.from_numpy(flat.reconstruct_n(start, count))
        result.add(rows, None if ids is None else ids[start : start + count])
    return result


def to_faiss(index: FlatIndex) -> Any:
    """A FAISS index with the vectors and ids of a `vk.FlatIndex`.

    Args:
        index: any. "cosine" becomes inner products of normalised vectors: normalise queries yourself then, and
            expect normalised vectors from `reconstruct`. `exact=False` gives what the codes stand for.

    Returns:
        `IndexFlatIP` or `IndexFlatL2`; `IndexIDMap` over it unless the ids are 0, 1, 2 and so on.

    Raises:
        ImportError: faiss is not installed.
    """
    import faiss

    flat = faiss.IndexFlatL2(index.dim) if index.metric == "l2" else faiss.IndexFlatIP(index.dim)
    ids = index.ids
    plain = torch.equal(ids, torch.arange(len(index), device=ids.device))
    result = flat if plain else faiss.IndexIDMap(flat)
    for part in ids.split(_BATCH):
        rows = index.reconstruct(part)
        if index.metric == "cosine":
            rows = torch.nn.functional.normalize(rows, dim=-1)
        array = rows.cpu().contiguous().numpy()
        if plain:
            flat.add(array)
        else:
            result.add_with_ids(array, part.cpu().numpy())
    return result


def read_index(
    path: str | os.PathLike[str],
    *,
    metric: str | None = None,
    storage: str = "float32",
    exact: bool = True,
    device: torch.device | str = "cpu",
) -> FlatIndex:
    """Reads a file that FAISS's `write_index` wrote; see `from_faiss`.

    Args:
        path: the file.
        metric: as in `from_faiss`, as are the others.
        storage: as `vk.FlatIndex` takes it.
        exact: as `vk.FlatIndex` takes it.
        device: where the rows are.

    Raises:
        ImportError: faiss is not installed.
        FileNotFoundError: there is no such file.
        ValueError: the file is none of FAISS's.
        TypeError: its index is not flat.
    """
    import faiss

    if not Path(path).is_file():
        raise FileNotFoundError(f"vk.integrations.faiss.read_index: there is no file {os.fspath(path)}")
    try:
        index = faiss.read_index(os.fspath(path))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1]
        raise ValueError(
            f"vk.integrations.faiss.read_index: {os.fspath(path)} is no FAISS index: {reason}"
        ) from error
    return from_faiss(index, metric=metric, storage=storage, exact=exact, device=device)


def write_index(index: FlatIndex, path: str | os.PathLike[str]) -> None:
    """Writes a file that FAISS's `read_index` reads, replacing an old one in a single step; see `to_faiss`.

    Args:
        index: any.
        path: the file.

    Raises:
        ImportError: faiss is not installed.
        OSError: the file cannot be written.
    """
    import faiss

    with _replacing(Path(path)) as temporary:
        faiss.write_index(to_faiss(index), str(temporary))


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` whose file takes its place, once complete."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder) / path.name
        yield temporary
        os.replace(temporary, path)
