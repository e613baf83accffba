# SPDX-License-Identifier: Apache-2.0
"""The zero-shot methods on the command line: --method, --open-vocabulary, anomalies, and the gallery page."""

from __future__ import annotations

import html.parser
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vlmkernels.cli.anomalies import heat
from vlmkernels.data import emoji

Run = Callable[..., Any]
LABELS = "strawberry,bicycle,hot beverage,raised fist"


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two emoji in the held-out style, as files."""
    folder, data = tmp_path_factory.mktemp("drawings"), emoji.load()
    for name in ("strawberry", "bicycle"):
        index = next(e.index for e in data.emojis if e.name == name)
        picture = data.image(index, emoji.HELD_OUT_STYLE)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{name}.png")
    return folder


@pytest.mark.parametrize("method", ["clip", "zpe", "description", "fudd", "perception", "loki"])
def test_every_method_knows_a_strawberry(run: Run, drawings: Path, method: str) -> None:
    files = [drawings / "strawberry.png", drawings / "bicycle.png"]
    code, out, _ = run("classify", *files, "--labels", LABELS, "--method", method, "--explain", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["method"] == method
    assert [r["labels"][0]["label"] for r in found["results"]] == ["strawberry", "bicycle"]
    probable = method in ("clip", "zpe", "perception")
    assert all(("probability" in x) == probable for x in found["results"][0]["labels"])
    assert ("reasons" in found["results"][0]) == (method not in ("clip", "loki"))


def test_reasons_are_printed(run: Run, drawings: Path) -> None:
    code, out, _ = run(
        "classify", drawings / "strawberry.png", "--labels", LABELS, "--method", "description", "--explain"
    )
    assert code == 0
    assert "berry" in out and out.splitlines()[1].startswith("    0.")


def test_descriptions_from_a_file(run: Run, drawings: Path, tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(
        json.dumps({"descriptors": {"thing": ["red berry"], "other": ["blue car"]}})
    )
    arguments = ["--labels", "thing,other", "--method", "description", "--descriptions", tmp_path / "d.json"]
    code, out, _ = run("classify", drawings / "strawberry.png", *arguments, "--json")
    assert code == 0
    assert json.loads(out)["results"][0]["labels"][0]["label"] == "thing"


def test_words_without_labels(run: Run, drawings: Path, tmp_path: Path) -> None:
    things = [
        f"{n} {what}"
        for n in ("strawberry", "bicycle")
        for what in ("cake", "in the sun", "on a hill", "shop")
    ]
    (tmp_path / "c.txt").write_text("\n".join([*things, "red strawberry", "fast bicycle", "", ""]))
    code, out, _ = run(
        "classify",
        drawings / "strawberry.png",
        "--open-vocabulary",
        "--captions",
        tmp_path / "c.txt",
        "--json",
    )
    assert code == 0
    assert json.loads(out)["results"][0]["labels"][0]["label"] == "strawberry"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "pass at least one picture"),
        (["x.png", "--open-vocabulary", "--labels", "a"], "takes no labels"),
        (["x.png", "--captions", "c.txt"], "belongs to --open-vocabulary"),
        (["x.png", "--method", "magic"], "invalid choice"),
        (["x.png", "--method", "perception", "--context", "mood", "--labels", "a"], "no readable picture"),
    ],
)
def test_bad_input_to_classify(run: Run, arguments: list[str], sentence: str) -> None:
    code, _, err = run("classify", *arguments)
    assert code == 2
    assert sentence in err and len(err.strip().splitlines()) == 1


def test_unknown_context(run: Run, drawings: Path) -> None:
    code, _, err = run(
        "classify", drawings / "bicycle.png", "--labels", "a", "--method", "perception", "--context", "mood"
    )
    assert code == 2 and "--context: expected some of" in err


def test_a_damaged_picture_comes_first(run: Run, tmp_path: Path) -> None:
    data, generator = emoji.load(), torch.Generator().manual_seed(0)
    index = next(e.index for e in data.emojis if e.name == "red apple")
    (tmp_path / "apples" / "more").mkdir(parents=True)
    for i in range(6):
        picture = data.image(index, emoji.HELD_OUT_STYLE).float()
        picture += 4 * torch.randn(picture.shape, generator=generator)
        if i == 4:
            picture[:, 28:38, 30:40] = 20
        pixels = picture.clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "apples" / ("more" if i % 2 else ".") / f"{i}.png")
    (tmp_path / "apples" / "broken.png").write_bytes(b"no picture")
    code, out, err = run(
        "anomalies", tmp_path / "apples", "--size", 64, "--output", tmp_path / "maps", "--json"
    )
    assert code == 2 and "broken.png" in err  # the rest is done
    results = json.loads(out)["results"]
    assert len(results) == 6 and Path(results[0]["picture"]).name == "4.png"
    with Image.open(results[0]["map"]) as shown:
        assert shown.size == (128, 64)
    code, out, _ = run("anomalies", tmp_path / "apples", "--size", 64, "--no-maps")
    assert out.splitlines()[0].endswith("4.png")


def test_bad_input_to_anomalies(run: Run, tmp_path: Path) -> None:
    assert "there is no folder" in run("anomalies", "gone")[2]
    (tmp_path / "empty").mkdir()
    assert "at least three" in run("anomalies", tmp_path / "empty")[2]
    assert "--size" in run("anomalies", tmp_path / "empty", "--size", 3)[2]


def test_heat_goes_from_blue_to_red() -> None:
    picture = torch.full((3, 1, 2), 128, dtype=torch.uint8)
    cold, hot = heat(picture, torch.tensor([[0.0, 1.0]])).permute(2, 1, 0)[:, 0]
    assert int(cold.argmax()) == 2 and int(hot.argmax()) == 0


class _Tags(html.parser.HTMLParser):
    """Counts tags that are open, and what is loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.slow
def test_gallery_is_one_whole_page(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("classify", "--gallery", tmp_path / "page.html", "--labels", LABELS)
    assert code == 0 and out.strip() == f"gallery: {tmp_path / 'page.html'}"
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    tags = _Tags()
    tags.feed(page)
    assert not tags.open
    assert all(s.startswith("data:image/webp") for s in tags.sources)
    for title in (
        "ZPE",
        "FuDD",
        "CaSED",
        "FGVP",
        "MuSc",
        "S3A",
        "CAB",
        "PAC-Bayes",
        "CapS-Adapter",
        "GDA",
        "Loki",
    ):
        assert title in page


@pytest.mark.slow
def test_gallery_of_ones_own_pictures(run: Run, drawings: Path, trained: Path, tmp_path: Path) -> None:
    """A model of one's own gets the part that needs no bundled pictures."""
    page = tmp_path / "page.html"
    code, _, _ = run(
        "classify", drawings / "bicycle.png", "--gallery", page, "--labels", "red,blue", "--model", trained
    )
    assert code == 0
    assert "bicycle.png" in page.read_text() and "FGVP" not in page.read_text()
