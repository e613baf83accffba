# SPDX-License-Identifier: Apache-2.0
"""Chooses default backends from committed rows of GPUs, and writes them to vlmkernels/ops/measured.json.

    python benchmarks/choose_defaults.py                  # says what the committed rows decide
    python benchmarks/choose_defaults.py --write          # and writes it
    python benchmarks/choose_defaults.py --check          # exit code 1 where the file says something else

A row counts for the class of shapes that it states. A backend wins a class on an architecture where it served every
row of the class, its results agreed with the check, it was the fastest in each (within the spread), and over all of
them by `MARGIN` at least. Triton needs no victory, being the default: a class that it wins is not written. Rows of
several cards of one architecture count together.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from result_files import Row

from vlmkernels._files import write_text_atomically
from vlmkernels.ops import measured

RESULTS = Path(__file__).parent / "results"
#: Geometric mean of a winner's gains over the next best: less is no reason to leave the portable kernel.
MARGIN = 1.03
#: A row in which the winner is behind by less than this, or by less than the spread, is no defeat.
TIE = 0.02
DEFAULT = "triton"
NEEDED = ("op", "class", "backend", "arch", "name")

Times = dict[str, float]
Table = dict[str, dict[str, dict[str, dict[str, Any]]]]


def read_rows(results: Path) -> list[Row]:
    """Rows of all machines that state a class, with their folder as `machine`."""
    rows = []
    for path in sorted(results.glob("*/*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for row in content["rows"]:
            if all(row.get(key) for key in NEEDED):
                rows.append({**row, "machine": path.parent.name})
    return rows


def choose(rows: Iterable[Row]) -> Table:
    """`{op: {arch: {class: {"fastest": backend, "gain": ..., "rows": [...]}}}}`, Triton's classes left out."""
    classes: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        classes.setdefault((row["op"], row["arch"], row["class"]), []).append(row)
    table: Table = {}
    for (op, arch, name), some in sorted(classes.items()):
        entry = _winner(some)
        if entry is not None:
            table.setdefault(op, {}).setdefault(arch, {})[name] = entry
    return table


def _winner(rows: Sequence[Row]) -> dict[str, Any] | None:
    """The entry of one class, None where the default keeps it."""
    contests: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        contests.setdefault((row["machine"], row["name"].removesuffix(f" {row['backend']}")), []).append(row)
    times = [_times(group) for group in contests.values()]
    if not all(times):
        return None
    candidates = set.intersection(*(set(t) for t in times))
    # a backend that failed in one row of the class is out, however fast it is in the others
    candidates -= {row["backend"] for row in rows if "ms" not in row}
    spreads = [max(row.get("spread", 0.0) for row in group) for group in contests.values()]
    for candidate in sorted(candidates - {DEFAULT}):
        gains = [
            min((t[other] for other in t if other != candidate), default=math.nan) / t[candidate]
            for t in times
        ]
        mean = math.exp(sum(map(math.log, gains)) / len(gains))
        defeats = [g for g, s in zip(gains, spreads, strict=True) if g < 1 - max(TIE, s)]
        if mean >= MARGIN and not defeats:
            shown = sorted(f"{machine}: {name}" for machine, name in contests)
            return {"fastest": candidate, "gain": round(mean, 3), "rows": shown}
    return None


def _times(group: Sequence[Row]) -> Times:
    """Milliseconds by backend of one contest; library kernels under the names that `dispatch` gives them."""
    found = {row["backend"]: row["ms"] for row in group if "ms" in row}
    for row in group:
        others = row.get("others_ms", {})
        found |= {name: others[peer] for peer, name in row.get("library", {}).items() if peer in others}
    return found


def as_text(table: Table) -> str:
    """The content of measured.json: one class a line."""
    comment = "written by benchmarks/choose_defaults.py from committed results"
    lines = []
    for op, archs in table.items():
        inner = []
        for arch, classes in archs.items():
            entries = ",\n".join(
                f"   {json.dumps(name)}: {json.dumps(entry)}" for name, entry in classes.items()
            )
            inner.append(f"  {json.dumps(arch)}: {{\n{entries}\n  }}")
        lines.append(f" {json.dumps(op)}: {{\n" + ",\n".join(inner) + "\n }")
    body = "{\n" + ",\n".join(lines) + "\n}" if lines else "{}"
    return f'{{"comment": {json.dumps(comment)},\n"fastest": {body}}}\n'


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 where --check finds another table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results by machine")
    parser.add_argument("--table", type=Path, default=measured.TABLE, help="the file of defaults")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    rows = read_rows(options.results)
    table = choose(rows)
    text = as_text(table)
    if options.check:
        if options.table.read_text(encoding="utf-8") == text:
            return 0
        print(
            f"{options.table} is not what the rows in {options.results} decide; run choose_defaults.py --write"
        )
        return 1
    for op, archs in table.items():
        for arch, classes in archs.items():
            for name, entry in classes.items():
                print(
                    f"{op} {arch} {name}: {entry['fastest']}, {entry['gain']:.2f}x the next, {len(entry['rows'])} rows"
                )
    print(
        f"{len(rows)} rows of GPUs, {sum(len(c) for a in table.values() for c in a.values())} defaults beside Triton"
    )
    if options.write:
        write_text_atomically(options.table, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
