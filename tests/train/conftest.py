# SPDX-License-Identifier: Apache-2.0
"""What the tests of training share: a folder of small pictures with captions, and settings for a tiny model."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "yellow": (240, 210, 40)}
SHAPES = ("circle", "square", "bar")

TINY_MODEL = {
    "embed_dim": 32,
    "vision": {"image_size": 16, "width": 32, "patch_size": 8, "heads": 2, "stem": "patch", "pool": "class"},
    "text": {"layers": 1, "width": 32, "heads": 2, "context_length": 16},
}


def draw(colour: str, shape: str, turn: int) -> Image.Image:
    picture = Image.new("RGB", (32, 32), "white")
    pen = ImageDraw.Draw(picture)
    left, top = 4 + turn % 3, 4 + turn % 4
    if shape == "circle":
        pen.ellipse((left, top, left + 18, top + 18), fill=COLOURS[colour])
    elif shape == "square":
        pen.rectangle((left, top, left + 17, top + 17), fill=COLOURS[colour])
    else:
        pen.rectangle((left, top + 6, left + 22, top + 12), fill=COLOURS[colour])
    return picture


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per class: 12 classes of 6 pictures, a third of them with a caption beside the picture."""
    folder = tmp_path_factory.mktemp("shapes")
    for colour in COLOURS:
        for shape in SHAPES:
            place = folder / f"{colour}_{shape}"
            place.mkdir()
            for turn in range(6):
                draw(colour, shape, turn).save(place / f"{turn}.png")
                if turn % 3 == 0:
                    (place / f"{turn}.txt").write_text(f"a {shape} that is {colour}, drawn {turn} times")
    return folder


@pytest.fixture(scope="session")
def shapes_shards(shapes_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures of ``shapes_folder`` in 6 shards of 12."""
    folder = tmp_path_factory.mktemp("shards")
    files = sorted(shapes_folder.rglob("*.png"))
    for number in range(6):
        with tarfile.open(folder / f"shapes-{number:04d}.tar", "w") as tar:
            for i, file in enumerate(files[number * 12 : number * 12 + 12]):
                tar.add(file, f"{i:05d}.png")
                caption = f"a {file.parent.name.replace('_', ' ')}, number {file.stem}".encode()
                member = tarfile.TarInfo(f"{i:05d}.txt")
                member.size = len(caption)
                tar.addfile(member, io.BytesIO(caption))
    return folder


@pytest.fixture
def tiny(shapes_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run of a few seconds on ``shapes_folder``."""
    return {
        "model_options": TINY_MODEL,
        "data": str(shapes_folder),
        "output": str(tmp_path / "run"),
        "epochs": 4,
        "batch_size": 16,
        "vocab_size": 560,
        "precision": "float32",
        "threads": 1,
        "log_every": 2,
        "report": False,
    }
