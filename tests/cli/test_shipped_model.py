# SPDX-License-Identifier: Apache-2.0
"""The model that ships in the wheel: its size, what its card promises, and the three commands of the README."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlmkernels.cli._models import load_encoder
from vlmkernels.data import emoji
from vlmkernels.models import pretrained_dir
from vlmkernels.train import evaluate_emoji

Run = Callable[..., tuple[int, str, str]]

FOLDER = pretrained_dir("emoji-clip")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of the held-out style under names that say nothing."""
    data = emoji.load(emoji.HELD_OUT_STYLE)
    by_name = {e.name: e.index for e in data.emojis}
    place = tmp_path / "pictures"
    place.mkdir()
    for number, name in enumerate(("red heart", "cat face", "pizza", "dog face", "bicycle", "flag: Japan")):
        pixels = data.image(by_name[name], emoji.HELD_OUT_STYLE, size=160)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(place / f"{number}.png")
    return place


def test_it_is_small_and_complete() -> None:
    names = {path.name for path in FOLDER.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8_000_000


def test_it_does_what_its_card_says() -> None:
    torch.manual_seed(0)
    result = evaluate_emoji(load_encoder("emoji-clip"))
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for direction, measured in (
        ("Picture to name", result.image_to_text),
        ("Name to picture", result.text_to_image),
    ):
        row = re.search(rf"\| {direction} \|(.*)\|", card)
        figures = [float(x) for x in re.findall(r"([\d.]+)%", row.group(1))][:3]
        # Another processor may add in another order and turn a rank or two.
        assert figures == pytest.approx([100 * measured.recall[k] for k in (1, 5, 10)], abs=0.3)
        assert measured.recall[1] >= 0.45


def test_classify_index_and_search(run: Run, folder: Path) -> None:
    code, out, _ = run("classify", folder / "1.png", folder / "2.png", "--labels", "cat,dog,pizza", "--json")
    assert code == 0
    assert [r["labels"][0]["label"] for r in json.loads(out)["results"]] == ["cat", "pizza"]
    code, out, _ = run("index", folder)
    assert code == 0
    code, out, _ = run("search", "a red heart", "--json")
    assert code == 0
    assert Path(json.loads(out)["results"][0]["picture"]).name == "0.png"


def test_search_works_at_once(run: Run) -> None:
    code, out, _ = run("search", "a red heart", "--top", 3)
    assert code == 0
    assert "red heart" in out
