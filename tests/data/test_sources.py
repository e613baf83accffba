# SPDX-License-Identifier: Apache-2.0
"""Users' pairs: what is found where, what is skipped and how that is said, and that shards are read in place."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlmkernels.data.sources import PictureStore, decode_picture, list_pictures, open_source


def _png(
    colour: Sequence[int], size: tuple[int, int] = (20, 10), mode: str = "RGB", kind: str = "PNG"
) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, tuple(colour)).save(buffer, kind)
    return buffer.getvalue()


def _tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _pairs(path: Path | str, **options: str) -> list[tuple[str, str]]:
    return [(pair.name, pair.caption) for pair in open_source(path, **options).pairs]


def test_folder_takes_captions_from_text_files_then_folders_then_names(tmp_path: Path) -> None:
    (tmp_path / "red_cars").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("red_cars/a.png", "red_cars/b.PNG", "a_green_tree.png", ".hidden/x.png"):
        (tmp_path / name).write_bytes(_png((1, 2, 3)))
    (tmp_path / "red_cars" / "b.txt").write_text(" a car, red \n")
    (tmp_path / "notes.md").write_text("not a picture")
    assert _pairs(tmp_path) == [
        ("a_green_tree.png", "a green tree"),
        ("red_cars/a.png", "red cars"),
        ("red_cars/b.PNG", "a car, red"),
    ]
    assert [p.name for p in list_pictures(tmp_path)] == ["a_green_tree.png", "a.png", "b.PNG"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", 'image,caption\na.png,"one, two"\nsub/b.png,three\n'),
        ("t.tsv", "caption\tfilepath\none, two\ta.png\nthree\tsub/b.png\n"),
        ("t.jsonl", '{"path": "a.png", "text": "one, two"}\n\n{"path": "sub/b.png", "text": "three"}\n'),
    ],
)
def test_tables_give_pairs_relative_to_their_folder(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "sub").mkdir()
    for picture in ("a.png", "sub/b.png"):
        (tmp_path / picture).write_bytes(_png((1, 2, 3)))
    (tmp_path / name).write_text(text)
    assert _pairs(tmp_path / name) == [("a.png", "one, two"), ("sub/b.png", "three")]


def test_columns_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png((1, 2, 3)))
    (tmp_path / "t.csv").write_text("where,what,caption\na.png,this,that\n")
    assert _pairs(tmp_path / "t.csv", path_column="where", caption_column="what") == [("a.png", "this")]
    with pytest.raises(ValueError, match="no column 'wher'; it has 'where', 'what', 'caption'"):
        open_source(tmp_path / "t.csv", path_column="wher")
    with pytest.raises(ValueError, match="no picture column"):
        open_source(tmp_path / "t.csv")


def test_rows_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png((1, 2, 3)))
    lines = [
        '{"path": "a.png", "text": "x"}',
        '{"path": "gone.png", "text": "x"}',
        '{"path": "a.png", "text": " "}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join([*lines, "not json", '{"path": null, "text": "x"}']))
    source = open_source(tmp_path / "t.jsonl")
    assert [(s.name, s.reason) for s in source.skipped] == [
        ("gone.png", "no such file"),
        ("a.png", "no text"),
        ("t.jsonl line 4", "no JSON object"),
        ("t.jsonl line 5", "no path"),
    ]
    assert "1 pairs" in source.summary()
    assert "skipped 4: gone.png (no such file); " in source.summary()


def test_shards_pair_members_and_are_read_in_place(tmp_path: Path) -> None:
    first, second = _png((255, 0, 0)), _png((0, 255, 0), kind="JPEG")
    _tar(
        tmp_path / "s-000.tar",
        {
            "000.png": first,
            "000.txt": b"a red one\n",
            "dir/001.jpg": second,
            "dir/001.json": json.dumps({"caption": "a green one", "url": "u"}).encode(),
            "002.png": first,
            "003.txt": b"no picture",
        },
    )
    _tar(tmp_path / "s-001.tar", {"000.png": second, "000.txt": b"of the second shard"})
    source = open_source(tmp_path)
    assert [(p.name, p.caption) for p in source.pairs] == [
        ("s-000.tar:000.png", "a red one"),
        ("s-000.tar:dir/001.jpg", "a green one"),
        ("s-001.tar:000.png", "of the second shard"),
    ]
    assert [pair.read() for pair in source.pairs] == [first, second, second]
    assert {(s.name, s.reason) for s in source.skipped} == {
        ("s-000.tar:002.png", "no caption"),
        ("s-000.tar:/003", "no picture"),
    }


@pytest.mark.parametrize("pattern", ["s-{000..001}.tar", "s-*.tar"])
def test_shards_by_pattern(tmp_path: Path, pattern: str) -> None:
    for number in range(2):
        _tar(tmp_path / f"s-00{number}.tar", {"a.png": _png((1, 2, 3)), "a.txt": b"x"})
    assert len(open_source(str(tmp_path / pattern))) == 2
    with pytest.raises(FileNotFoundError, match="1 of 3 shards are missing"):
        open_source(str(tmp_path / "s-{000..002}.tar"))


def test_a_shard_cut_short_keeps_what_is_whole(tmp_path: Path) -> None:
    members = {
        f"{i}.{kind}": _png((i, 2, 3)) if kind == "png" else b"x" for i in range(4) for kind in ("png", "txt")
    }
    _tar(tmp_path / "s.tar", members)
    content = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(content[: 512 * 9])
    source = open_source(tmp_path / "s.tar")
    with PictureStore(source, 8) as store:
        assert 1 <= len(source) < 4
        assert len(source.skipped) >= 1
        assert len(store.pictures(range(len(source)))[0]) == len(source)


@pytest.mark.parametrize("memory", [1 << 20, 0], ids=["in memory", "on demand"])
def test_broken_pictures_are_counted_named_and_skipped(tmp_path: Path, memory: int) -> None:
    good = _png((10, 20, 30))
    contents = {"a.png": good, "b.png": b"", "c.png": good[:40], "d.png": b"plain text", "e.png": good}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    source = open_source(tmp_path)
    with PictureStore(source, 8, memory=memory) as store:
        rows = range(len(source))
        pictures, used = store.pictures(rows)
        assert store.in_memory == bool(memory)
    assert {s.name for s in source.skipped} == {"b.png", "c.png", "d.png"}
    assert all(s.reason and "0x" not in s.reason for s in source.skipped)
    assert {source.pairs[i].name for i in used} == {"a.png", "e.png"}
    assert len(pictures) == len(used)
    assert (pictures[:, :3] == torch.tensor([10, 20, 30], dtype=torch.uint8).view(1, 3, 1, 1)).all()


def test_on_demand_gives_what_memory_gives(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(_png((i, 2 * i, 3 * i)))
    rows = [3, 1, 1, 4]
    with (
        PictureStore(open_source(tmp_path), 8) as store,
        PictureStore(open_source(tmp_path), 8, memory=0) as other,
    ):
        assert torch.equal(store.pictures(rows)[0], other.pictures(rows)[0])
        assert other.pictures([])[0].shape == (0, 4, 8, 8)


@pytest.mark.parametrize("memory", [1 << 20, 0], ids=["in memory", "on demand"])
def test_no_usable_pair_is_an_error(tmp_path: Path, memory: int) -> None:
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"no usable image-text pair.*a\.png"):
        PictureStore(open_source(tmp_path), 8, memory=memory).pictures([0])


def test_places_without_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is nothing at"):
        open_source(tmp_path / "gone")
    with pytest.raises(ValueError, match="no usable image-text pair"):
        open_source(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="neither a folder of pictures"):
        open_source(tmp_path / "x.bin")


def test_decoding_keeps_transparency_and_cuts_the_middle_square() -> None:
    picture = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    picture.paste((200, 100, 50, 128), (10, 0, 30, 20))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    assert decode_picture(buffer.getvalue()).shape == (4, 20, 40)
    square = decode_picture(buffer.getvalue(), 10)
    assert square.shape == (4, 10, 10)
    # Pillow resamples premultiplied 8-bit values, which may round by one step.
    assert (square[:, 5, 5].int() - torch.tensor([200, 100, 50, 128])).abs().max() <= 1


def test_decoding_turns_pictures_upright() -> None:
    picture = Image.new("RGB", (4, 2), (255, 255, 255))
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by a quarter
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", exif=exif)
    assert decode_picture(buffer.getvalue()).shape == (4, 4, 2)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgba(mode: str) -> None:
    picture = (
        Image.new("L", (6, 6), 255).convert(mode) if mode != "I;16" else Image.new("I;16", (6, 6), 65535)
    )
    buffer = io.BytesIO()
    picture.save(buffer, "TIFF" if mode in ("CMYK", "I;16") else "PNG")
    decoded = decode_picture(buffer.getvalue())
    assert decoded.shape == (4, 6, 6)
    assert decoded[3].min() == 255
    assert decoded[:3].min() >= 250
