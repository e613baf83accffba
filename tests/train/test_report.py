# SPDX-License-Identifier: Apache-2.0
"""The charts and the page: well formed, complete, escaped, and without anything to download."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from vlmkernels.train._charts import bar_of_parts, heat_map, line_chart, number, ticks
from vlmkernels.train.evaluation import Gallery, PairsEvaluation, retrieval
from vlmkernels.train.report import write_report
from vlmkernels.train.run_folder import RunFolder

VOID = {"meta", "img", "br"}


class _Balance(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass  # closes itself: nothing stays open

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (3.2, 5.6), (0.0, 1e-3), (0.0, 91234.0), (14.1, 14.3)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-9 <= t <= high + 1e-9 for t in found)
    step = found[1] - found[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 2.5, 5)) < 1e-6


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.00025, "2.5e-4"), (0.0005, "5e-4"), (1.25, "1.25"), (12000, "12k"), (5.31234, "5.312")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize("count", [1, 2, 37, 5000])
def test_line_charts_stay_in_their_frame(count: int) -> None:
    chart = line_chart(
        "a < b", list(range(1, count + 1)), [math.sin(i / 9) for i in range(count)], x_label="x"
    )
    drawing = ElementTree.fromstring(re.search(r"<svg.*</svg>", chart).group())
    points = drawing.find("polyline").get("points").split()
    assert 1 <= len(points) <= 800
    for point in points:
        x, y = map(float, point.split(","))
        assert 0 <= x <= 420
        assert 0 <= y <= 210
    assert "a &lt; b" in chart


def test_constant_curves_are_drawn() -> None:
    assert "nan" not in line_chart("c", [1, 2, 3], [5.0, 5.0, 5.0], x_label="x")


def test_heat_maps_show_every_count() -> None:
    drawing = ElementTree.fromstring(heat_map([[3, 1], [0, 0]], ["a & b", "c"]))
    texts = [node.text for node in drawing.iter("text")]
    assert texts.count("3") == 1
    assert texts.count("1") == 1
    assert "a & b (4)" in texts
    assert "c (0)" in texts


def test_parts_add_up() -> None:
    shares = [
        float(s) for s in re.findall(r"flex-grow:([\d.]+)", bar_of_parts([("a", 3.0), ("b", 1.0)], "s"))
    ]
    assert shares == [0.75, 0.25]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    params = {
        "settings": {"model": "emoji-clip", "lr": 0.001, "data": "<folder>"},
        "command": "vlmkernels train --data '<folder>'",
        "precision": "float32",
        "threads": 2,
        "data": "40 pairs of <things>",
        "parameters": 2_400_000,
        "versions": {"torch": "2.6"},
    }
    run = RunFolder(tmp_path)
    run.params.write_text(json.dumps(params))
    for step in range(10, 60, 10):
        run.append(
            {"step": step, "loss": 5 / step, "lr": 1e-3, "logit_scale": 14.0, "pairs_per_second": 900.0}
        )
    return run


def _evaluation() -> PairsEvaluation:
    features = torch.nn.functional.normalize(torch.randn(6, 8), dim=-1)
    labels = torch.arange(6)
    found = retrieval(features, features, labels, labels)
    picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
    gallery = Gallery([(picture, "<b>", [("<b>", True), ("c", False)])], [("<b>", [(picture, "c", False)])])
    return PairsEvaluation(found, found, gallery)


def test_the_page_is_well_formed_and_whole(folder: RunFolder) -> None:
    page = write_report(folder, _evaluation(), {"training": 20.0, "evaluation": 2.0}).read_text()
    balance = _Balance()
    balance.feed(page)
    assert balance.open == []
    assert all(address.startswith("data:image/webp;base64,") for address in balance.addresses)
    assert len(balance.addresses) == 2
    assert "url(" not in page
    assert "<script" not in page
    assert "<b>" not in re.sub(r"<b>[\d.,k]+ s</b>", "", page)
    assert "vlmkernels train --data &#x27;&lt;folder&gt;&#x27;" in page
    for heading in (
        "Training",
        "Held-out pairs",
        "From pictures to captions",
        "Where the time went",
        "To repeat it",
    ):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("<figure") == 4


def test_a_page_without_evaluation_or_steps(folder: RunFolder) -> None:
    folder.results.unlink()
    page = write_report(folder, None, {"training": 1.0}).read_text()
    assert "no steps" in page
    assert "<h2>Training</h2>" not in page
