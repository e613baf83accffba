# SPDX-License-Identifier: Apache-2.0
"""What the tests of the command share: coloured squares, a tiny model trained on them, and a way to run the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vlmkernels.cli import main

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "yellow": (240, 210, 40)}
TINY_MODEL = {
    "embed_dim": 32,
    "vision": {
        "image_size": 16,
        "layers": 1,
        "width": 32,
        "heads": 2,
        "patch_size": 8,
        "stem_channels": [16, 32],
        "stem_strides": [4, 2],
    },
    "text": {"layers": 1, "width": 32, "heads": 2, "context_length": 16},
}


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Runs the command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per colour with 8 squares each."""
    folder = tmp_path_factory.mktemp("colours")
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for i in range(8):
            picture = Image.new("RGB", (24, 24), "white")
            picture.paste(colour, (i % 4, i % 3, 18 + i % 4, 18 + i % 3))
            picture.save(folder / name / f"{name}{i}.png")
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """The folder of a run on ``pictures``, made by the command with a configuration file."""
    place = tmp_path_factory.mktemp("trained")
    settings = {
        "model-options": TINY_MODEL,
        "data": str(pictures),
        "output": str(place / "run"),
        "epochs": 80,
        "batch-size": 16,
        "lr": 2e-3,
        "vocab_size": 530,
        "augment": 0.2,
        "precision": "float32",
        "threads": 1,
    }
    (place / "settings.json").write_text(json.dumps({"train": settings}))
    threads = torch.get_num_threads()
    assert main(["train", "--config", str(place / "settings.json")]) == 0
    torch.set_num_threads(threads)
    return place / "run"
