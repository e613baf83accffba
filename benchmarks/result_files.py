# SPDX-License-Identifier: Apache-2.0
"""Files of rows: results by machine and family, and logs that a run appends to, so that a crash loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlmkernels._files import write_text_atomically

Row = dict[str, Any]


def save_rows(path: Path, machine: dict[str, Any], rows: list[Row]) -> None:
    """Puts rows into a file of results, one a line; those of the same names are replaced."""
    rows = [{key: value for key, value in row.items() if key != "node"} for row in rows]
    kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    new = {row["name"] for row in rows}
    merged = [row for row in kept if row["name"] not in new] + rows
    lines = ",\n".join("  " + json.dumps(row) for row in sorted(merged, key=lambda row: row["name"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, f'{{"machine": {json.dumps(machine)},\n "rows": [\n{lines}\n]}}\n')


def append_row(path: Path, family: str, row: Row) -> None:
    """One line of JSON at the end of a log, on disk when this returns."""
    with path.open("a", encoding="utf-8") as log:
        log.write(json.dumps({"family": family, **row}) + "\n")


def read_log(path: Path) -> dict[str, list[Row]]:
    """Rows of a log by family; of those with one name, the last. A line that a crash cut short is left out."""
    families: dict[str, dict[str, Row]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        families.setdefault(row.pop("family"), {})[row["name"]] = row
    return {family: list(rows.values()) for family, rows in families.items()}
