# SPDX-License-Identifier: Apache-2.0
"""Benchmark rows beside those of a committed run of the same machine class: what fell, and by how much it may fall.

Absolute times depend on who else uses the machine. What is compared are figures of one run: the ratio to a peer whose
calls alternate with ours, and the share of a limit that is probed between them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

#: A fall by more than this, beyond what the measurement itself varies by, is a fall.
LIMIT = 0.10
#: Where a measurement varies by more than this, holding says nothing.
UNCLEAR = 0.40
#: Figures of one run that are comparable between runs; larger is better.
MEASURES = {
    "ratio": "ratio to the peer",
    "share_of_peak": "share of the probed peak",
    "share_of_read": "share of the read rate",
    "share_of_bandwidth": "share of the read rate",
    "share_of_plain": "share of the plain call",
}


@dataclass(frozen=True)
class Change:
    """One measure of a row, now and in the baseline.

    Attributes:
        measure: a key of `MEASURES`.
        before: in the baseline.
        now: in this run.
        allowed: the relative fall that is no fall: `LIMIT`, the larger spread of the two runs, and how far the peer
            stays below 90% of the rate that it had in the baseline, since the machine was disturbed then.
    """

    measure: str
    before: float
    now: float
    allowed: float

    @property
    def fall(self) -> float:
        """Relative; negative where it rose."""
        return 1 - self.now / self.before

    @property
    def fell(self) -> bool:
        """Whether it fell by more than is allowed; NaN counts as fallen."""
        return not self.fall <= self.allowed


@dataclass(frozen=True)
class Verdict:
    """What the comparison says of one row. `state` is "holds", "fell", "unclear" or "new"."""

    name: str
    state: str
    changes: tuple[Change, ...] = ()  # one per measure that both runs have, in the order of `MEASURES`

    @property
    def excess(self) -> float:
        """How far the measure that is nearest to holding has fallen beyond what is allowed; negative where it holds."""
        return min(change.fall - change.allowed for change in self.changes)

    def __str__(self) -> str:
        if not self.changes:
            return f"{self.name}: not in the baseline"
        parts = [
            f"{MEASURES[c.measure]} {c.now:.3g}, was {c.before:.3g} ({-c.fall:+.0%}, {c.allowed:.0%} allowed)"
            for c in self.changes
        ]
        return f"{self.name}: {'; '.join(parts)}"


def read_baseline(folder: Path, machine: dict[str, Any]) -> list[Row]:
    """Rows of the committed results of a machine class; none where there are no files of this class.

    A file of another instruction set or number of threads is of another class, whatever its folder is called.

    Raises:
        ValueError: a file in the folder is no file of results.
    """
    rows: list[Row] = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            recorded, found = content["machine"], content["rows"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"bench: {path} is no file of results ({type(error).__name__}: {error})"
            ) from error
        if all(recorded.get(key) == machine.get(key) for key in ("isa", "threads")):
            rows += found
    return rows


def compare(rows: Iterable[Row], baseline: Iterable[Row]) -> list[Verdict]:
    """A verdict per row, in their order.

    A row fell where everything falls that both runs measured of it: a slower kernel loses against the peer and against
    the probe, a faster peer or a disturbed probe moves one of the two.
    """
    known = {row["name"]: row for row in baseline}
    return [
        _verdict(row, known[row["name"]]) if row["name"] in known else Verdict(row["name"], "new")
        for row in rows
    ]


def better(one: Verdict, other: Verdict) -> Verdict:
    """Of two measurements of the same row: the one that is nearer to holding. Disturbances only ever slow."""
    if not one.changes or not other.changes:
        return other
    return min(one, other, key=lambda verdict: verdict.excess)


def _verdict(now: Row, before: Row) -> Verdict:
    changes = tuple(
        Change(measure, before[measure], now[measure], _allowed(measure, now, before))
        for measure in MEASURES
        if _positive(before.get(measure)) and isinstance(now.get(measure), (int, float))
    )
    if not changes:
        return Verdict(now["name"], "new")
    if all(change.fell for change in changes):
        state = "fell"
    elif min(change.allowed for change in changes) > UNCLEAR:
        state = "unclear"
    else:
        state = "holds"
    return Verdict(now["name"], state, changes)


def _allowed(measure: str, now: Row, before: Row) -> float:
    if measure != "ratio":
        return LIMIT + max(_number(row, "spread") for row in (now, before))
    return LIMIT + max(_ratio_spread(row) for row in (now, before)) + _disturbance(now, before)


def _ratio_spread(row: Row) -> float:
    if "ratio_spread" in row:
        return _number(row, "ratio_spread")
    return math.hypot(_number(row, "spread"), _number(row, "peer_spread"))


def _disturbance(now: Row, before: Row) -> float:
    for time in ("peer_ms", "peer_us"):
        if _positive(now.get(time)) and _positive(before.get(time)):
            return max(0.0, 1 - LIMIT - before[time] / now[time])
    return 0.0


def _number(row: Row, key: str) -> float:
    return float(row.get(key, 0.0))


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and value > 0


def cells(row: Row) -> list[str]:
    """A row as text: name, peer, the peer's figure, ours, ratio, share of the limit."""
    theirs, ours = next(
        (
            (
                f"{_short(row[f'peer_{key}'])} {unit}" if f"peer_{key}" in row else "",
                f"{_short(row[key])} {unit}",
            )
            for key, unit in (("ms", "ms"), ("us", "us"), ("extra_mib", "MiB"), ("gflops", "GFLOP/s"))
            if key in row
        ),
        ("", ""),
    )
    share = next((f"{row[key]:.0%}" for key in MEASURES if key != "ratio" and key in row), "")
    return [
        row["name"],
        row.get("peer", ""),
        theirs,
        ours,
        f"{row['ratio']:.2f}x" if "ratio" in row else "",
        share,
    ]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


HEADER: Sequence[str] = ("row", "peer", "peer's", "ours", "ratio", "of the limit")
