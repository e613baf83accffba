# SPDX-License-Identifier: Apache-2.0
"""Users' own image-text pairs: image folders, CSV/TSV/JSONL tables, and tar shards in the WebDataset layout.

`open_source` lists the pairs without decoding anything; `PictureStore` decodes, in memory where it all fits and on
demand where it does not. What cannot be read is counted, named and left out, and only a source without a single usable
pair is an error. Shards are indexed by their headers once and then read in place: a picture is fetched by its offset,
so nothing is unpacked, shards may be larger than memory, and any order of the pairs can be repeated exactly.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import io
import itertools
import json
import logging
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
PATH_COLUMNS = ("path", "image", "file", "filename", "file_name", "filepath", "image_path", "img")
CAPTION_COLUMNS = ("caption", "text", "title", "description", "label", "name")

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_NAMED_AT_MOST = 10  # skipped pictures that a log message spells out


@dataclass(frozen=True)
class Pair:
    """One picture and its caption.

    Attributes:
        name: what messages call the picture: its path, or ``shard.tar:member``.
        caption: its text.
        file: the picture file, or the shard.
        offset: where the picture begins in the file.
        size: how many bytes it has; None: the whole file.
    """

    name: str
    caption: str
    file: Path
    offset: int = 0
    size: int | None = None

    def read(self, opened: BinaryIO | None = None) -> bytes:
        """Returns the encoded picture; from ``opened``, its file, where somebody has that open."""
        if opened is None:
            with open(self.file, "rb") as file:
                return self.read(file)
        opened.seek(self.offset)
        return opened.read(-1 if self.size is None else self.size)


@dataclass(frozen=True)
class Skipped:
    """Something that was left out, and why."""

    name: str
    reason: str


@dataclass
class Source:
    """The pairs of a data set, in a fixed order, and what could not be used.

    Attributes:
        name: what the user passed.
        kind: "folder", "table" or "shards".
        pairs: the usable pairs, as far as one can tell without decoding.
        skipped: what was left out so far.
    """

    name: str
    kind: str
    pairs: list[Pair] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def captions(self) -> list[str]:
        """The captions, in the order of the pairs."""
        return [pair.caption for pair in self.pairs]

    def files(self) -> list[int]:
        """Returns which file each pair's picture is in, the files counted as they come."""
        numbers: dict[Path, int] = {}
        return [numbers.setdefault(pair.file, len(numbers)) for pair in self.pairs]

    def skip(self, name: str, reason: str) -> None:
        """Records something that cannot be used."""
        self.skipped.append(Skipped(name, reason))

    def summary(self) -> str:
        """One sentence: how many pairs, how many skipped, and the names of the first of those."""
        text = f"{len(self.pairs):,} pairs in {self.name}"
        if self.skipped:
            named = "; ".join(f"{s.name} ({s.reason})" for s in self.skipped[:_NAMED_AT_MOST])
            more = len(self.skipped) - _NAMED_AT_MOST
            text += f"; skipped {len(self.skipped):,}: {named}" + (f"; and {more:,} more" if more > 0 else "")
        return text


def open_source(
    path: str | Path, *, path_column: str | None = None, caption_column: str | None = None
) -> Source:
    """Lists the pairs of a data set.

    * A **folder** of pictures, searched recursively. The caption of ``a/b.png`` is the text of ``a/b.txt`` where that
      exists, else the name of its folder (a folder per class), else, directly in ``path``, its own file name.
    * A **table**: ``.csv``, ``.tsv`` (with a header) or ``.jsonl`` (an object per line). Relative paths start at the
      table's folder.
    * **Shards** in the WebDataset layout: a ``.tar`` file, a folder of them, a glob pattern, or a numbered range such
      as ``shard-{0000..0041}.tar``. Members whose names agree up to the first dot form a pair; the caption is a
      ``.txt`` member, or "caption" or "text" of a ``.json`` one.

    Args:
        path: see above.
        path_column: the table's column with the picture; None: the first of ``PATH_COLUMNS`` that it has.
        caption_column: the table's column with the text; None: the first of ``CAPTION_COLUMNS`` that it has.

    Returns:
        The source. Pictures that are missing, and rows without a caption, are already in its ``skipped``.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the kind of the file is unknown, the table lacks a column, or there is no usable pair.
    """
    name = str(path)
    shards = _find_shards(name)
    place = Path(path)
    if shards:
        source = Source(name, "shards")
        for shard in shards:
            _index_shard(shard, source)
    elif place.is_dir():
        source = Source(name, "folder")
        _list_folder(place, source)
    elif place.suffix.lower() in TABLE_SUFFIXES and place.is_file():
        source = Source(name, "table")
        _read_table(place, source, path_column, caption_column)
    elif not place.exists():
        raise FileNotFoundError(f"data: there is nothing at {name}")
    else:
        raise ValueError(
            f"data: {name} is neither a folder of pictures, nor a table ({', '.join(TABLE_SUFFIXES)}), nor a .tar shard"
        )
    if not source.pairs:
        raise ValueError(f"data: no usable image-text pair in {source.summary()}")
    return source


def list_pictures(folder: str | Path) -> list[Path]:
    """Lists the picture files in a folder and below it, sorted; hidden files and folders are left out."""
    folder = Path(folder)
    return sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in p.relative_to(folder).parts)
        and p.is_file()
    )


def decode_picture(data: bytes | Path, size: int | None = None) -> torch.Tensor:
    """Decodes a picture, upright, with its transparency.

    Args:
        data: the encoded picture, or its file.
        size: S: the shorter side is resized to it (bicubic, antialiased) and the middle square is cut out; None
            leaves the picture as it is.

    Returns:
        [4, S, S] or [4, H, W] uint8: straight RGBA.

    Raises:
        ValueError: the picture cannot be decoded; the message is the reason.
        OSError: the file cannot be read.
    """
    from PIL import Image, ImageOps

    if isinstance(data, Path):
        data = data.read_bytes()
    if not data:
        raise ValueError("empty file")
    try:
        with Image.open(io.BytesIO(data)) as opened:
            if size is not None:
                opened.draft("RGB", (2 * size, 2 * size))  # JPEG: decodes a fraction of the pixels
            picture = ImageOps.exif_transpose(opened).convert("RGBA")
    # Pillow's decoders raise whatever comes to them on damaged files; every one of these means "cannot be read".
    except (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError) as error:
        raise ValueError(f"cannot be decoded: {error}".split("<_io")[0].rstrip()) from error
    except Image.DecompressionBombError as error:
        raise ValueError("too many pixels") from error
    if size is not None:
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(picture.height, picture.width, 4).permute(2, 0, 1).contiguous()


class PictureStore:
    """Decoded square pictures of a source.

    Where all of them fit into ``memory`` bytes they are decoded at once, and those that cannot be are taken out of the
    source. Otherwise they are decoded when asked for; a broken one is then recorded and the next readable one, in the
    source's order, stands in for it (`pictures` says which).

    Args:
        source: the pairs; broken ones are moved to its ``skipped``.
        size: side of the squares.
        memory: how many bytes of decoded pictures may be kept.
        workers: decoding threads.
        progress: called with the number of pictures decoded so far and their total.

    Raises:
        ValueError: no picture could be decoded.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        *,
        memory: int = 2 << 30,
        workers: int = 4,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.source = source
        self.size = size
        self._workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        self._broken: set[int] = set()
        self._all: torch.Tensor | None = None
        if len(source) * 4 * size * size <= memory:
            self._decode_all(progress)

    def close(self) -> None:
        """Ends the decoding threads."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> PictureStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def in_memory(self) -> bool:
        """Whether all pictures are decoded."""
        return self._all is not None

    def _decode_all(self, progress: Callable[[int, int], None] | None) -> None:
        pairs, kept, decoded = self.source.pairs, [], []
        for done, (pair, picture) in enumerate(zip(pairs, self._pool.map(self._try, pairs), strict=True), 1):
            if isinstance(picture, torch.Tensor):
                kept.append(pair)
                decoded.append(picture)
            else:
                self.source.skip(pair.name, picture)
            if progress is not None:
                progress(done, len(pairs))
        self.source.pairs = kept
        if not kept:
            raise ValueError(f"data: no usable image-text pair in {self.source.summary()}")
        self._all = torch.stack(decoded)

    def _try_rows(self, rows: Sequence[int]) -> list[torch.Tensor | str]:
        """One thread's rows, in their order; consecutive ones of a shard are read while it is open."""
        results: list[torch.Tensor | str] = []
        for file, group in itertools.groupby(rows, lambda row: self.source.pairs[row].file):
            with contextlib.ExitStack() as stack:
                opened: BinaryIO | None = None
                with contextlib.suppress(OSError):  # each pair says by itself that its file cannot be read
                    opened = stack.enter_context(open(file, "rb"))
                for row in group:
                    broken = row in self._broken
                    results.append("broken" if broken else self._try(self.source.pairs[row], opened))
        return results

    def _try(self, pair: Pair, opened: BinaryIO | None = None) -> torch.Tensor | str:
        try:
            return decode_picture(pair.read(opened), self.size)
        except ValueError as error:
            return str(error)
        except OSError as error:
            return error.strerror or str(error)

    def pictures(self, rows: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """Returns pictures, and which pair each of them is.

        Args:
            rows: indices of pairs.

        Returns:
            [N, 4, size, size] uint8, and N indices: those asked for, but for broken pictures.

        Raises:
            ValueError: every picture turned out to be broken.
        """
        rows = list(rows)
        if self._all is not None:
            return self._all[torch.tensor(rows, dtype=torch.int64)], rows
        pairs = self.source.pairs
        # Consecutive rows to a thread: where they come from few shards, a thread reads fewer still.
        cuts = [len(rows) * i // self._workers for i in range(self._workers + 1)]
        parts = self._pool.map(self._try_rows, (rows[a:b] for a, b in itertools.pairwise(cuts)))
        first_try = itertools.chain.from_iterable(parts)
        pictures, used = [], []
        for row, picture in zip(rows, first_try, strict=True):
            while not isinstance(picture, torch.Tensor):
                if row not in self._broken:
                    self._broken.add(row)
                    self.source.skip(pairs[row].name, picture)
                if len(self._broken) == len(pairs):
                    raise ValueError(f"data: no usable image-text pair in {self.source.summary()}")
                row = (row + 1) % len(pairs)
                picture = "broken" if row in self._broken else self._try(pairs[row])
            pictures.append(picture)
            used.append(row)
        if not pictures:
            return torch.zeros(0, 4, self.size, self.size, dtype=torch.uint8), []
        return torch.stack(pictures), used


def _words(name: str) -> str:
    return re.sub(r"[_\s]+", " ", name).strip()


def _list_folder(folder: Path, source: Source) -> None:
    for picture in list_pictures(folder):
        beside = picture.with_suffix(".txt")
        if beside.is_file():
            caption = beside.read_text(encoding="utf-8", errors="replace").strip()
        elif picture.parent != folder:
            caption = _words(picture.parent.name)
        else:
            caption = _words(picture.stem)
        name = str(picture.relative_to(folder))
        if caption:
            source.pairs.append(Pair(name, caption, picture))
        else:
            source.skip(name, "empty caption")


def _read_table(table: Path, source: Source, path_column: str | None, caption_column: str | None) -> None:
    columns: tuple[str, str] | None = None
    for place, row in _rows(table, source):
        if columns is None:
            columns = (
                _column(table, row, "picture", path_column, PATH_COLUMNS),
                _column(table, row, "caption", caption_column, CAPTION_COLUMNS),
            )
        name, caption = row.get(columns[0]), row.get(columns[1])
        if not isinstance(name, str) or not name.strip():
            source.skip(place, f"no {columns[0]}")
            continue
        picture = table.parent / name.strip()  # an absolute path stays what it is
        if not isinstance(caption, str) or not caption.strip():
            source.skip(name, f"no {columns[1]}")
        elif not picture.is_file():
            source.skip(name, "no such file")
        else:
            source.pairs.append(Pair(name.strip(), caption.strip(), picture))


def _rows(table: Path, source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(table, encoding="utf-8-sig", errors="replace", newline="") as file:
        if table.suffix.lower() == ".jsonl":
            for number, line in enumerate(file, 1):
                place = f"{table.name} line {number}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError:
                    row = None
                if isinstance(row, dict):
                    yield place, row
                else:
                    source.skip(place, "no JSON object")
        else:
            reader = csv.DictReader(file, delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
            for row in reader:
                yield f"{table.name} line {reader.line_num}", row


def _column(table: Path, row: dict[str, Any], what: str, asked: str | None, known: tuple[str, ...]) -> str:
    if asked is not None:
        if asked not in row:
            raise ValueError(f"data: {table} has no column {asked!r}; it has {', '.join(map(repr, row))}")
        return asked
    by_name = {str(column).strip().lower(): column for column in row}
    for candidate in known:
        if candidate in by_name:
            return by_name[candidate]
    raise ValueError(
        f"data: {table} has no {what} column (looked for {', '.join(known)}); it has {', '.join(map(repr, row))}"
    )


def _find_shards(name: str) -> list[Path]:
    if name.lower().endswith(".tar"):
        braces = _BRACES.search(name)
        if braces:
            first, last = braces.groups()
            numbers = range(int(first), int(last) + 1)
            found = [Path(_BRACES.sub(str(i).zfill(len(first)), name, count=1)) for i in numbers]
            missing = [p for p in found if not p.is_file()]
            if missing:
                raise FileNotFoundError(
                    f"data: {len(missing)} of {len(found)} shards are missing, the first: {missing[0]}"
                )
            return found
        if Path(name).is_file():
            return [Path(name)]
        return sorted(Path(p) for p in glob.glob(name))
    place = Path(name)
    return sorted(place.glob("*.tar")) if place.is_dir() else []


def _index_shard(shard: Path, source: Source) -> None:
    """Reads the headers of a shard; captions are small and are read with them."""
    samples: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isfile():
                    _note_member(tar, member, samples)
    except (tarfile.TarError, OSError) as error:
        source.skip(str(shard), f"the shard ends early: {error}")
    for key, sample in samples.items():
        name = f"{shard.name}:{sample.get('name', key)}"
        if "offset" not in sample:
            source.skip(name, "no picture")
        elif not sample.get("caption"):
            source.skip(name, "no caption")
        else:
            source.pairs.append(Pair(name, sample["caption"], shard, sample["offset"], sample["size"]))


def _note_member(tar: tarfile.TarFile, member: tarfile.TarInfo, samples: dict[str, dict[str, Any]]) -> None:
    folder, _, base = member.name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot:
        return
    sample = samples.setdefault(f"{folder}/{stem}", {})
    suffix = "." + extension.lower().rpartition(".")[2]
    if suffix in IMAGE_SUFFIXES:
        sample.update(name=member.name, offset=member.offset_data, size=member.size)
    elif suffix in (".txt", ".json"):
        content = tar.extractfile(member)
        text = "" if content is None else content.read().decode("utf-8", errors="replace").strip()
        if suffix == ".txt":
            sample["caption"] = text
        else:
            sample.setdefault("caption", _caption_of_json(text))


def _caption_of_json(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        return ""
    if not isinstance(value, dict):
        return ""
    found = (value.get(key) for key in ("caption", "text"))
    return next((v.strip() for v in found if isinstance(v, str) and v.strip()), "")
