# SPDX-License-Identifier: Apache-2.0
"""Turns the log of rows of a GPU run into files of results and into a page that says what came of it.

python benchmarks/gpu_results.py rows.jsonl --out FOLDER           # FOLDER/<family>.json, and the page printed
python benchmarks/gpu_results.py rows.jsonl --results benchmarks/results   # .../<card>/<family>.json
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gpu_goals
import result_files
from result_files import Row


def machine_of(rows: Sequence[Row]) -> dict[str, Any]:
    """The machine class of rows: the card in the processor's place, and its architecture in the instruction set's."""
    last = max(rows, key=lambda row: row["date"])
    return {"processor": last["card"], "cores": None, "isa": last["arch"], "threads": None}


def folder_name(card: str) -> str:
    """`NVIDIA H200` -> `nvidia-h200`."""
    return re.sub("[^a-z0-9]+", "-", card.lower()).strip("-")


def page(families: dict[str, list[Row]], most: int) -> Iterator[str]:
    """The goals, then a line for every row, then what failed or was refused, `most` characters of it all at most."""
    rows = [row for family in families.values() for row in family]
    lines = [
        *gpu_goals.verdicts(rows),
        "",
        *map(_line, (r for r in rows if "ms" in r or "us" in r or "extra_mib" in r)),
    ]
    lines += [f"failed  {row['name']}: {row['failed']}" for row in rows if "failed" in row]
    refused = {f"{row['op']} {row['backend']}: {row['refused']}" for row in rows if "refused" in row}
    lines += [f"refused  {sentence}" for sentence in sorted(refused)]
    written = 0
    for index, line in enumerate(lines):
        written += len(line) + 1
        if written > most:
            yield f"({len(lines) - index} more lines; the files of results have every row)"
            return
        yield line


def _line(row: Row) -> str:
    unit = next(unit for unit in ("ms", "us", "extra_mib") if unit in row)
    words = [f"{row['name']}: {row[unit]:.4g} {unit}"]
    if "ratio" in row:
        words.append(f"{row['ratio']:.2f}x {row.get('peer', 'peer')}")
    for key, label in (("share_of_peak", "of peak"), ("share_of_bandwidth", "of bandwidth")):
        if key in row:
            words.append(f"{row[key]:.0%} {label}")
    return ", ".join(words)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 where a row failed, or there is none."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path)
    parser.add_argument("--out", type=Path, help="folder that gets a file for every family")
    parser.add_argument("--results", type=Path, help="folder of results by machine")
    parser.add_argument("--most", type=int, default=9000, help="characters of the page at most")
    options = parser.parse_args(arguments)
    families = result_files.read_log(options.log)
    rows = [row for family in families.values() for row in family]
    if not rows:
        print(f"there are no rows in {options.log}")
        return 1
    machine = machine_of(rows)
    folders = [options.out] if options.out else []
    folders += [options.results / folder_name(machine["processor"])] if options.results else []
    for folder in folders:
        for family, some in families.items():
            result_files.save_rows(folder / f"{family}.json", machine, some)
    print(*page(families, options.most), sep="\n")
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
