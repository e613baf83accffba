# SPDX-License-Identifier: Apache-2.0
"""What a FlatIndex keeps: segments of encoded rows, immutable snapshots of them, and the file they are saved in.

**Snapshots.** A reader takes one `Snapshot` and never looks back; a writer builds the next one and swaps it in. Rows
are appended behind the last row that any older snapshot knows, so both may share the buffers. A full segment is never
copied: the next one is half as large as everything before it, which bounds both the waste and the number of segments.

**Codes.** Where vectors are kept beside int8 codes, the codes serve the scan alone, and then of `rotate(x - centre)`
instead of x: products change by a number per query, and the codes lose far less of features that share a direction or
have a few large dimensions, as CLIP's do.

**File.** The safetensors format, written by hand so that rows stream out segment by segment and come back as views of a
memory map: eight bytes of header length, a JSON header, raw tensors; wider dtypes first, so that all are aligned.
"""

from __future__ import annotations

import functools
import json
import math
import mmap as mmap_module
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmkernels import _native
from vlmkernels._files import write_atomically

from . import _topk_cpu
from .reference.quantized import quantize_rows_int8
from .reference.topk_scan import Chunk, row_norms

STORAGE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
FORMAT = "vlmkernels.flat_index"
VERSION = "1"

_SMALLEST_SEGMENT = 1024
# Rows that the centre is found from; norms that count; how much shorter a typical row must get about it.
_CENTRE_SAMPLE = 4096
_SMALLEST_NORM, _LARGEST_NORM = 1e-15, 1e15
_WORTH_CENTRING = 0.95
# Elements encoded or written at once.
_BLOCK_ELEMENTS = 2**22
_ALIGNMENT = 64
_FILE_DTYPES = {torch.int64: "I64", torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8"}


@dataclass(frozen=True)
class Layout:
    """Which columns a row has.

    Attributes:
        dim: D.
        storage: a key of `STORAGE_DTYPES`.
        exact: whether float32 vectors are kept beside codes that are not float32.
    """

    dim: int
    storage: str
    exact: bool

    @property
    def keeps_vectors(self) -> bool:
        return self.exact and self.storage != "float32"

    @property
    def rotates(self) -> bool:
        return self.keeps_vectors and self.storage == "int8"

    def columns(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name to dtype and shape of one row, wide dtypes first."""
        columns: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"ids": (torch.int64, ())}
        if self.keeps_vectors:
            columns["vectors"] = (torch.float32, (self.dim,))
            columns["residual"] = (torch.float32, ())
        if self.storage == "int8":
            columns["scale"] = (torch.float32, ())
        columns["norm"] = (torch.float32, ())
        columns["codes"] = (STORAGE_DTYPES[self.storage], (self.dim,))
        return columns

    def encode(self, vectors: Tensor, centre: Tensor | None) -> dict[str, Tensor]:
        """All columns but the ids of float32 vectors [n, D]; `centre` [D] where codes are rotated about one."""
        if centre is not None:
            kernel = vectors.device.type == "cpu" and _native.cpu_reason is None
            encode = _topk_cpu.encode_rotated if kernel else encode_rotated
            return {"vectors": vectors, **encode(vectors, centre)}
        columns = {}
        if self.storage == "int8":
            columns["codes"], columns["scale"] = quantize_rows_int8(vectors)
        else:
            columns["codes"] = vectors.to(STORAGE_DTYPES[self.storage])
        decoded = decode(columns)
        columns["norm"] = row_norms(vectors if self.exact else decoded)
        if self.keeps_vectors:
            columns["vectors"] = vectors
            columns["residual"] = _as_bound(row_norms(vectors.double() - decoded.double()))
        return columns


def _as_bound(distance: Tensor) -> Tensor:
    # An upper bound has to survive its own rounding to float32.
    return (distance * (1 + 1e-6) + torch.finfo(torch.float32).tiny).float()


def find_centre(vectors: Tensor) -> Tensor:
    """[D], what codes of rows like these [n, D] are taken about: their common direction, zero where there is none.

    The mean of normalised rows, at the typical norm; less where there are few rows, whose mean is mostly chance.
    """
    sample = vectors[:: max(1, vectors.shape[0] // _CENTRE_SAMPLE)].double()
    norm = torch.linalg.vector_norm(sample, dim=-1)
    usable = (norm > _SMALLEST_NORM) & (norm < _LARGEST_NORM)
    sample, norm = sample[usable], norm[usable]
    count = sample.shape[0]
    if count == 0:
        return torch.zeros_like(vectors[0])
    centre = (sample / norm.unsqueeze(-1)).mean(0) * norm.median() * (count / (count + 8))
    shrinks = (torch.linalg.vector_norm(sample - centre, dim=-1) / norm).median() < _WORTH_CENTRING
    return (centre if bool(shrinks) else torch.zeros_like(centre)).float()


@functools.cache
def rotation(dim: int) -> Tensor:
    """The orthogonal matrix [D, D] of `rotate` in csrc/cpu/topk_exact.h: signs and Hadamard transforms, float64."""
    size = 1 << (dim.bit_length() - 1)
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] < size:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard)
    result = torch.eye(dim, dtype=torch.float64)
    for turn in range(1 if size == dim else 2):
        h = [((i + 1) * 2654435761 + turn * 40503) % 2**32 for i in range(size)]
        h = [(x ^ (x >> 15)) * 2246822519 % 2**32 for x in h]
        signs = torch.tensor([-1.0 if (x ^ (x >> 13)) & 1 else 1.0 for x in h], dtype=torch.float64)
        part = slice(0, size) if turn == 0 else slice(dim - size, dim)
        step = torch.eye(dim, dtype=torch.float64)
        step[part, part] = signs.unsqueeze(1) * hadamard / math.sqrt(size)
        result = result @ step
    return result


def encode_rotated(vectors: Tensor, centre: Tensor) -> dict[str, Tensor]:
    """The twin of the kernel of this name: codes of `(vectors - centre) @ rotation`, and what they miss."""
    turned = (vectors.double() - centre.double()) @ rotation(vectors.shape[1]).to(vectors.device)
    codes, scale = quantize_rows_int8(turned.float())
    distance = row_norms(turned - codes.double() * scale.double().unsqueeze(-1))
    return {"codes": codes, "scale": scale, "norm": row_norms(vectors), "residual": _as_bound(distance)}


def decode(columns: dict[str, Tensor]) -> Tensor:
    """float32 vectors of codes: [n, D]."""
    codes = columns["codes"].float()
    return codes * columns["scale"].unsqueeze(-1) if "scale" in columns else codes


@dataclass(frozen=True)
class Segment:
    """Columns of `count` rows; the tensors may be longer.

    Attributes:
        columns: name to tensor [capacity, ...], see `Layout.columns`.
        count: rows in use.
        mapped: whether the columns are views of a file: never written, and not copied into memory to drop rows.
        kept: int64 [count], the rows of the columns that are left of a mapped segment; None = all.
    """

    columns: dict[str, Tensor]
    count: int
    mapped: bool = False
    kept: Tensor | None = None

    @property
    def free(self) -> int:
        return 0 if self.mapped else self.columns["ids"].shape[0] - self.count

    def slice(self, start: int, stop: int, names: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        if self.kept is None:
            return {name: self.columns[name][start:stop] for name in names or self.columns}
        return self.pick(torch.arange(start, stop, device=self.kept.device), names)

    def pick(self, rows: Tensor, names: tuple[str, ...] | None = None) -> dict[str, Tensor]:
        rows = rows if self.kept is None else self.kept[rows]
        return {name: self.columns[name].index_select(0, rows) for name in names or self.columns}

    def ids(self) -> Tensor:
        return self.columns["ids"][: self.count] if self.kept is None else self.columns["ids"][self.kept]

    def without(self, dropped: Tensor) -> Segment:
        """A segment that lacks the rows `dropped` (bool [count])."""
        rows = (~dropped).nonzero().squeeze(1)
        if self.mapped:
            return Segment(self.columns, rows.numel(), True, rows if self.kept is None else self.kept[rows])
        return Segment(self.pick(rows), rows.numel())

    def to(self, device: torch.device) -> Segment:
        if self.columns["ids"].device == device:
            return self
        return Segment({name: x.to(device) for name, x in self.slice(0, self.count).items()}, self.count)


@dataclass(frozen=True)
class Snapshot:
    """One state of an index; immutable.

    Attributes:
        layout: the columns.
        device: of all tensors.
        segments: rows in order of position.
        last_id: the largest id there has ever been, -1 at first.
        runs: `(ids ascending, their positions)` pairs that together hold every id; None while ids ascend with the
            position, when the segments themselves can be searched.
        centre: [D] float32, what the codes are rotated about; None where they are of the vectors as they are.
    """

    layout: Layout
    device: torch.device
    segments: tuple[Segment, ...] = ()
    last_id: int = -1
    runs: tuple[tuple[Tensor, Tensor], ...] | None = None
    centre: Tensor | None = None
    count: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", sum(s.count for s in self.segments))

    def ids(self) -> Tensor:
        """All ids in order of position, a copy."""
        empty = torch.empty(0, dtype=torch.int64, device=self.device)
        return torch.cat([empty, *(s.ids() for s in self.segments)])

    def find(self, ids: Tensor) -> Tensor:
        """Positions of ids, -1 where there is none: int64 [n] -> int64 [n]."""
        ids = ids.contiguous()
        positions = torch.full_like(ids, -1)
        start = 0
        for known, where in self.runs if self.runs is not None else ((s.ids(), None) for s in self.segments):
            if known.numel():
                slot = torch.searchsorted(known, ids).clamp(max=known.numel() - 1)
                hit = known[slot] == ids
                positions[hit] = slot[hit] + start if where is None else where[slot[hit]]
                start += known.numel()
        return positions

    def append(self, vectors: Tensor, ids: Tensor) -> Snapshot:
        """The state with rows added; `ids` are new and distinct. Writes behind the rows of this state."""
        segments = list(self.segments)
        centre = find_centre(vectors) if self.layout.rotates and self.count == 0 else self.centre
        done, total = 0, ids.numel()
        block = max(1, _BLOCK_ELEMENTS // self.layout.dim)
        while done < total:
            if not segments or segments[-1].free == 0:
                capacity = max(total - done, self.count // 2, _SMALLEST_SEGMENT)
                segments.append(self._new_segment(capacity))
            last = segments[-1]
            n = min(total - done, last.free, block)
            part = slice(done, done + n)
            encoded = self.layout.encode(vectors[part], centre) | {"ids": ids[part]}
            for name, column in last.columns.items():
                column[last.count : last.count + n] = encoded[name]
            segments[-1] = Segment(last.columns, last.count + n)
            done += n
        last_id = max(self.last_id, int(ids.max()))
        return Snapshot(self.layout, self.device, tuple(segments), last_id, self._extended_runs(ids), centre)

    def without(self, positions: Tensor) -> Snapshot:
        """The state that lacks the rows at `positions`; the rest moves up."""
        dropped = torch.zeros(self.count, dtype=torch.bool, device=positions.device)
        dropped[positions] = True
        segments = []
        for segment, part in zip(self.segments, dropped.split([s.count for s in self.segments]), strict=True):
            remaining = segment.without(part) if bool(part.any()) else segment
            if remaining.count:
                segments.append(remaining)
        runs = None
        if self.runs is not None:
            ordered = torch.cat([positions.new_empty(0), *(s.ids() for s in segments)]).sort()
            runs = ((ordered.values, ordered.indices),)
        return Snapshot(self.layout, self.device, tuple(segments), self.last_id, runs, self.centre)

    def to(self, device: torch.device) -> Snapshot:
        segments = tuple(s.to(device) for s in self.segments)
        runs = self.runs
        if runs is not None:
            runs = tuple((known.to(device), where.to(device)) for known, where in runs)
        centre = None if self.centre is None else self.centre.to(device)
        return Snapshot(self.layout, device, segments, self.last_id, runs, centre)

    def _new_segment(self, capacity: int) -> Segment:
        # A tensor made in inference mode could not be written to outside it, by the next add.
        with torch.inference_mode(False):
            columns = {
                name: torch.empty((capacity, *shape), dtype=dtype, device=self.device)
                for name, (dtype, shape) in self.layout.columns().items()
            }
        if self.device.type == "cpu" and _native.cpu_reason is None:
            # A search for one query waits for memory alone, and through small pages for translations, too.
            for column in columns.values():
                _native.cpu.ask_for_large_pages(column.data_ptr(), column.nbytes)
        return Segment(columns, 0)

    def _extended_runs(self, ids: Tensor) -> tuple[tuple[Tensor, Tensor], ...] | None:
        ascending = int(ids[0]) > self.last_id and bool((ids[1:] > ids[:-1]).all())
        if self.runs is None and ascending:
            return None
        if self.runs is not None:
            runs = list(self.runs)
        else:
            known = self.ids()
            runs = [(known, torch.arange(known.numel(), device=self.device))] if known.numel() else []
        known, order = ids.sort()
        runs.append((known, order + self.count))
        # Runs of like size merge, so an id is sorted O(log) times, however small the batches.
        while len(runs) > 1 and runs[-2][0].numel() <= 2 * runs[-1][0].numel():
            (a, b), (c, d) = runs.pop(), runs.pop()
            known, order = torch.cat([a, c]).sort()
            runs.append((known, torch.cat([b, d])[order]))
        return tuple(runs)


def kernel_rows(snapshot: Snapshot) -> list[_topk_cpu.Rows]:
    """The rows of a snapshot as the CPU kernels take them. Labels are ids."""
    return [
        _topk_cpu.Rows(
            s.columns["codes"],
            s.count,
            vectors=s.columns.get("vectors"),
            norm=s.columns["norm"],
            scale=s.columns.get("scale"),
            residual=s.columns.get("residual"),
            kept=s.kept,
            labels=s.columns["ids"],
        )
        for s in snapshot.segments
    ]


class IndexRows:
    """The rows of a snapshot, or those at `positions` (int64 [m], ascending), for the scan. Labels are ids."""

    def __init__(self, snapshot: Snapshot, positions: Tensor | None = None) -> None:
        self.count = snapshot.count if positions is None else positions.numel()
        self.width = snapshot.layout.dim
        self.labels_ascend = snapshot.runs is None
        self._layout = snapshot.layout
        self._segments = snapshot.segments
        self._positions = positions
        self._rotated = snapshot.centre is not None

    def chunk(self, start: int, stop: int) -> Chunk:
        # Rotated codes are for the kernels; here the vectors themselves are read.
        names = tuple(name for name in self._layout.columns() if name not in ("ids", "vectors"))
        if self._rotated:
            names = ("vectors", "norm")
        if self._positions is not None:
            columns = self._pick(self._positions[start:stop], names)
        else:
            pieces, first = [], 0
            for segment in self._segments:
                begin, end = max(start - first, 0), min(stop - first, segment.count)
                if begin < end:
                    pieces.append(segment.slice(begin, end, names))
                first += segment.count
            columns = {
                name: pieces[0][name] if len(pieces) == 1 else torch.cat([p[name] for p in pieces])
                for name in names
            }
        if self._rotated:
            return Chunk(columns["vectors"], columns["norm"])
        return Chunk(columns["codes"], columns["norm"], columns.get("scale"), columns.get("residual"))

    def gather(self, rows: Tensor) -> Tensor:
        """The vectors that are ranked: float32 ones where they are kept, else the decoded codes."""
        positions = rows if self._positions is None else self._positions[rows]
        if self._layout.keeps_vectors:
            return self._pick(positions, ("vectors",))["vectors"]
        names = ("codes", "scale") if self._layout.storage == "int8" else ("codes",)
        return decode(self._pick(positions, names))

    def labels(self, rows: Tensor) -> Tensor:
        return self._pick(rows if self._positions is None else self._positions[rows], ("ids",))["ids"]

    def _pick(self, positions: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        if len(self._segments) == 1:
            return self._segments[0].pick(positions, names)
        result = {}
        for name in names:
            dtype, shape = self._layout.columns()[name]
            result[name] = torch.empty((positions.numel(), *shape), dtype=dtype, device=positions.device)
        first = 0
        for segment in self._segments:
            here = ((positions >= first) & (positions < first + segment.count)).nonzero().squeeze(1)
            if here.numel():
                for name, x in segment.pick(positions[here] - first, names).items():
                    result[name][here] = x
            first += segment.count
        return result


def write_file(path: Path, snapshot: Snapshot, metadata: dict[str, str]) -> None:
    """Write a snapshot beside `path` and put it in place in one step; whatever goes wrong, an old file stays whole."""
    header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "version": VERSION, **metadata}}
    if snapshot.centre is not None:
        header["__metadata__"]["centre"] = snapshot.centre.cpu().numpy().tobytes().hex()
    offset = 0
    for name, (dtype, shape) in snapshot.layout.columns().items():
        full = (snapshot.count, *shape)
        size = dtype.itemsize * torch.Size(full).numel()
        header[name] = {
            "dtype": _FILE_DTYPES[dtype],
            "shape": list(full),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in snapshot.layout.columns():
                file.writelines(_blocks(snapshot, name))

    write_atomically(path, write)


def _blocks(snapshot: Snapshot, name: str) -> Iterator[memoryview]:
    """The bytes of a column."""
    step = max(1, _BLOCK_ELEMENTS // snapshot.layout.dim)
    for segment in snapshot.segments:
        for start in range(0, segment.count, step):
            block = segment.slice(start, min(start + step, segment.count), (name,))[name]
            yield block.cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def read_file(path: Path, mmap: bool) -> tuple[Snapshot, dict[str, str]]:
    """The snapshot in a file, and its metadata.

    Raises:
        ValueError: the file is no index, is of a later version, or is cut short.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        text = file.read(length) if length <= size - 8 else b""
    try:
        header = json.loads(text)
        metadata = header["__metadata__"]
        known = metadata["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(f"vk.FlatIndex.load: {path} is not a file that FlatIndex.save wrote")
    if metadata["version"] != VERSION:
        raise ValueError(
            f"vk.FlatIndex.load: {path} has version {metadata['version']}, this release reads version {VERSION}"
        )
    layout = Layout(int(metadata["dim"]), metadata["storage"], metadata["exact"] == "true")
    start = 8 + length
    end = start + max(header[name]["data_offsets"][1] for name in layout.columns())
    if end > size:
        raise ValueError(f"vk.FlatIndex.load: {path} is cut short: {size} bytes, expected {end}")

    file_bytes = _map(path)
    columns = {}
    for name, (dtype, _) in layout.columns().items():
        begin, end = header[name]["data_offsets"]
        column = file_bytes[start + begin : start + end].view(dtype).view(header[name]["shape"])
        columns[name] = column if mmap else column.clone()
    count = columns["ids"].shape[0]
    segments = (Segment(columns, count, mapped=mmap),) if count else ()
    runs = None
    if metadata["ids_ascend"] != "true" and count:
        ordered = columns["ids"].sort()
        runs = ((ordered.values, ordered.indices),)
    centre = None
    if "centre" in metadata:
        centre = torch.frombuffer(bytearray.fromhex(metadata["centre"]), dtype=torch.float32)
    return Snapshot(layout, torch.device("cpu"), segments, int(metadata["last_id"]), runs, centre), metadata


def _map(path: Path) -> Tensor:
    """The file's bytes, read-only. torch.from_file maps them writable, which counts against the machine's memory."""
    with open(path, "rb") as file:
        mapping = mmap_module.mmap(file.fileno(), 0, access=mmap_module.ACCESS_READ)
    with warnings.catch_warnings():
        # Torch warns that writing to such a tensor is undefined; a mapped segment is never written.
        warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
        return torch.frombuffer(mapping, dtype=torch.uint8)
