# SPDX-License-Identifier: Apache-2.0
"""What the GPU kernels are to reach on an H200, row by row, and what a run says of it.

python benchmarks/gpu_goals.py            # the table of README.md, from the committed results of that card
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from result_files import Row

#: Committed results of the card that the goals are for.
RESULTS = Path(__file__).parent / "results" / "nvidia-h200"
UNMEASURED = "not yet measured"


@dataclass(frozen=True)
class Goal:
    """One figure.

    Attributes:
        row: name of the row, without the backend.
        measure: a figure of the row, or "over NAME": the time of that program of the row over ours.
        bound: what it is to reach.
        most: whether the bound is the largest instead of the smallest allowed value.
    """

    row: str
    measure: str
    bound: float
    most: bool = False

    def of(self, row: Row) -> float | None:
        """The figure of a row; None where the row lacks it, because something failed."""
        if self.measure.startswith("over "):
            theirs = row.get("others_ms", {}).get(self.measure.removeprefix("over "))
            return None if theirs is None or "ms" not in row else theirs / row["ms"]
        return row.get(self.measure)

    def reached(self, value: float) -> bool:
        return value <= self.bound if self.most else value >= self.bound

    def __str__(self) -> str:
        return f"{self.row}: {self.measure} {'at most' if self.most else 'at least'} {self.bound:g}"


def _attention(shape: str, forward: float, backward: float) -> list[Goal]:
    name = f"attention {shape} bfloat16"
    return [Goal(f"{name} forward", "ratio", forward), Goal(f"{name} backward", "ratio", backward)]


_CLIP = "clip_loss 32768 x 768 bfloat16 forward+backward"
_SIGLIP = "siglip_loss 32768 x 768 bfloat16 forward+backward"
_CROSS_ENTROPY = "linear_cross_entropy 8192 x 768, 49408 classes bfloat16 forward+backward"
_W8A8 = "w8a8 linear + GELU (50432, 768, 3072)"
_W8A8_LARGE = "w8a8 linear + GELU (65792, 1024, 4096)"
_SEARCH = "topk_similarity 10000 x 1000000 x 512 k=10 bfloat16"

GOALS = (
    Goal(_CLIP, "share_of_paper", 0.65),
    Goal(_CLIP, "over eager, autocast", 2.5),
    Goal(_CLIP, "over compiled, autocast", 1.7),
    Goal(_SIGLIP, "share_of_paper", 0.65),
    Goal(_SIGLIP, "over eager, autocast", 4.0),
    Goal(_CROSS_ENTROPY, "share_of_paper", 0.65),
    Goal(_CROSS_ENTROPY, "over eager, autocast", 3.0),
    Goal("clip_loss 65536 x 1024 bfloat16 memory", "extra_mib", 572.0, most=True),
    Goal("siglip_loss 65536 x 1024 bfloat16 memory", "extra_mib", 572.0, most=True),
    Goal("clip_loss 1048576 x 512 bfloat16 forward+backward", "ms", 60e3, most=True),
    *_attention("ViT-B/32 (1024,12,50,64)", 2.0, 2.5),
    *_attention("ViT-B/16 (256,12,197,64)", 1.7, 2.0),
    *_attention("ViT-L/14 (256,16,257,64)", 1.5, 1.7),
    *_attention("ViT-H/14 (256,16,257,80)", 1.6, 1.7),
    *_attention("ViT-L/14@336 (64,16,577,64)", 1.25, 1.2),
    *_attention("so400m (64,16,729,72)", 1.3, 1.3),
    *_attention("text (1024,8,77,64) causal", 2.0, 2.5),
    Goal("attention ViT-B/16 (256,12,197,64) bfloat16 forward, half of the keys masked", "ratio", 0.95),
    Goal("attention ViT-B/16 (256,12,197,64) bfloat16 backward, half of the keys masked", "ratio", 0.95),
    Goal("attention forward call", "us", 25.0, most=True),
    Goal("attention in a CUDA graph", "ratio", 1.0),
    Goal(_W8A8, "share_of_paper", 0.55),
    Goal(_W8A8, "over bfloat16 linear + GELU, compiled", 1.5),
    Goal(_W8A8_LARGE, "share_of_paper", 0.55),
    Goal(_W8A8_LARGE, "over bfloat16 linear + GELU, compiled", 1.5),
    Goal("fp8 linear 8192 x 8192 x 8192", "ratio", 1.15),
    Goal(_SEARCH, "ms", 17.3, most=True),
    Goal(_SEARCH, "ratio", 2.3),
    Goal("topk_similarity 1 x 1000000 x 512 k=10 bfloat16", "share_of_bandwidth", 0.85),
    Goal("zero_shot 256 x 1000 x 512 k=5 bfloat16", "over eager", 4.0),
    Goal("zero_shot 256 x 1000 x 512 k=5 bfloat16", "launches", 1.0, most=True),
)

#: Rows whose ratio to bfloat16 may not fall below 1, whatever the shape.
NEVER_SLOWER = "w8a8 ViT", "w8a8 so400m"


def best_of(goal: Goal, rows: Iterable[Row]) -> dict[str, float]:
    """Figures of a goal by backend of ours, the best first."""
    named = [row for row in rows if row["name"] == f"{goal.row} {row.get('backend')}"]
    figures = {row["backend"]: goal.of(row) for row in named}
    known = [(value, backend) for backend, value in figures.items() if value is not None]
    return {backend: value for value, backend in sorted(known, reverse=not goal.most)}


def verdicts(rows: Iterable[Row]) -> Iterator[str]:
    """A line for every goal: reached, missed or not measured, with the figures of our backends."""
    rows = list(rows)
    for goal in GOALS:
        figures = best_of(goal, rows)
        if not figures:
            yield f"not measured  {goal}"
            continue
        state = "reached" if goal.reached(next(iter(figures.values()))) else "missed"
        yield f"{state:<12}  {goal}; {', '.join(f'{name} {value:.3g}' for name, value in figures.items())}"
    yield from _never_slower(rows)


def table(rows: Iterable[Row]) -> list[str]:
    """Lines of the Markdown table of goals and committed figures."""
    rows = list(rows)
    lines = ["| row | figure | goal | measured |", "|---|---|---|---|"]
    for goal in GOALS:
        figures = best_of(goal, rows)
        said = ", ".join(f"{value:.3g} ({name})" for name, value in figures.items()) or UNMEASURED
        bound = f"{'at most' if goal.most else 'at least'} {goal.bound:g}"
        lines.append(f"| {goal.row} | {goal.measure.replace('over ', 'gain over ')} | {bound} | {said} |")
    return lines


def committed() -> list[Row]:
    """Rows of `RESULTS`."""
    return [
        row for path in sorted(RESULTS.glob("*.json")) for row in json.loads(path.read_text("utf-8"))["rows"]
    ]


def _never_slower(rows: list[Row]) -> Iterator[str]:
    best: dict[str, float] = {}
    for row in rows:
        if row["name"].startswith(NEVER_SLOWER) and "ratio" in row:
            name = row["name"].removesuffix(f" {row['backend']}")
            best[name] = max(best.get(name, 0.0), row["ratio"])
    slower = {name: ratio for name, ratio in best.items() if ratio < 1.0}
    state = "not measured" if not best else "missed" if slower else "reached"
    said = "".join(f"; {name} {ratio:.2f}" for name, ratio in slower.items())
    yield f"{state:<12}  w8a8 is never slower than bfloat16, {len(best)} layers{said}"


if __name__ == "__main__":
    print(*table(committed()), sep="\n")
