# SPDX-License-Identifier: Apache-2.0
"""Measure this machine's limits (--peak), or run the benchmark suites of a source checkout and compare (--compare)."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vlmkernels import _native
from vlmkernels.cli._baseline import HEADER, LIMIT, Row, Verdict, better, cells, compare, read_baseline
from vlmkernels.cli._models import print_json

HELP = "measure the processor's limits, or run the benchmark suites and compare them with committed results"

_UNITS = {"float32": "GFLOP/s", "bfloat16": "GFLOP/s", "int8": "GOP/s", "read": "GB/s"}
_NOTHING_SELECTED = 5  # pytest's exit code
_STDERR = 2  # the process's own: sys.stderr may be replaced by something that is no file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--peak", action="store_true", help="register-only loops and a read of memory, per data type"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="--peak: seconds per measurement")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--suites", default="benchmarks", help="folder of the benchmark suites")
    parser.add_argument("--select", metavar="WORDS", help="only benchmarks whose names match, as pytest's -k")
    parser.add_argument("--quick", action="store_true", help="only a minute or two of rows, of every family")
    parser.add_argument(
        "--compare",
        action="store_true",
        help=f"exit code 1 where a row falls by more than {LIMIT:.0%}% beyond its spread, against the results of this "
        "machine class",
    )
    parser.add_argument(
        "--attempts", type=int, default=3, help="--compare: measurements before a row counts as fallen"
    )
    parser.add_argument(
        "--strict", action="store_true", help="--compare: exit code 2 where a row has no baseline"
    )
    parser.add_argument("--save", action="store_true", help="keep the rows as results of this machine class")
    parser.add_argument(
        "--results", metavar="FOLDER", help="committed results (default: results, in --suites)"
    )
    parser.add_argument(
        "--machine", metavar="NAME", help="machine class (default: processor and number of cores)"
    )


def run(args: argparse.Namespace) -> int:
    """Measures, or runs pytest on the suites."""
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    if args.attempts < 1:
        raise ValueError(f"--attempts must be at least 1, got {args.attempts}")
    return _peak(args) if args.peak else _suites(args)


def _peak(args: argparse.Namespace) -> int:
    if not 0 < args.seconds <= 60:
        raise ValueError(f"--seconds must lie between 0 and 60, got {args.seconds}")
    if _native.cpu_reason is not None:
        raise ImportError(f"bench --peak needs the CPU module: {_native.cpu_reason}")
    threads = _native.threads()
    rates = {kind: _native.cpu.peak(kind, args.seconds, threads) for kind in _UNITS}
    if args.json:
        print_json(
            {
                "processor": _native.cpu.cpu_brand(),
                "isa": _native.cpu.isa(),
                "threads": threads,
                "rates": {kind: {"value": rate, "unit": _UNITS[kind]} for kind, rate in rates.items()},
            }
        )
        return 0
    print(f"{_native.cpu.cpu_brand()}, {_native.cpu.isa()}, {threads} thread{'s' if threads != 1 else ''}")
    for kind, rate in rates.items():
        print(f"{kind:<10} {rate:8.1f} {_UNITS[kind]}")
    return 0


def _suites(args: argparse.Namespace) -> int:
    folder = Path(args.suites)
    if not any(folder.glob("bench_*.py")):
        raise FileNotFoundError(
            f"bench: there are no suites in {folder}; they are part of the source checkout, not of the installed "
            "package: run this there, or pass --suites. `vlmkernels bench --peak` works everywhere"
        )
    missing = [name for name in ("pytest", "pytest_benchmark") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"bench: the suites need {' and '.join(missing)}: pip install 'vlmkernels[test]'")

    selected = ["-m", "quick"] if args.quick else []
    selected += ["-k", args.select] if args.select else []
    code, measured = _measure(args, [str(folder.resolve()), *selected])
    if code == _NOTHING_SELECTED or not measured["rows"]:
        if code in (0, _NOTHING_SELECTED):
            raise ValueError(f"bench: no row was measured{f' ({args.select})' if args.select else ''}")
        return 1
    if not args.compare:
        _print(args, measured, None)
        return int(code != 0)

    results = Path(args.results) if args.results else folder / "results"
    baseline = read_baseline(results / measured["name"], measured["machine"])
    verdicts = _repeated(args, measured["rows"], baseline)
    _print(args, measured, verdicts)
    fallen = [v for v in verdicts.values() if v.state == "fell"]
    if fallen or code != 0:
        return 1
    return 2 if args.strict and any(v.state == "new" for v in verdicts.values()) else 0


def _measure(args: argparse.Namespace, selection: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """pytest's exit code, and the machine and rows of the run: `name`, `machine`, `rows`."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "rows.json"
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--benchmark-quiet", *selection]
        command += [f"--threads={torch.get_num_threads()}", f"--rows={file}"]
        command += ["--save-results"] if args.save else []
        command += [f"--results={Path(args.results).resolve()}"] if args.results else []
        command += [f"--machine={args.machine}"] if args.machine else []
        # From the folder of the suites: python -m puts the current one first in the path, and in a checkout the source
        # tree there has no extension modules.
        done = subprocess.run(command, cwd=args.suites, env=_absolute_path(), stdout=_STDERR, check=False)
        if not file.is_file():
            return done.returncode, {"rows": []}
        content = json.loads(file.read_text(encoding="utf-8"))
    rows = [row for family in content.pop("families").values() for row in family]
    return done.returncode, content | {"rows": rows}


def _absolute_path() -> dict[str, str]:
    """The environment, PYTHONPATH made absolute."""
    path = os.environ.get("PYTHONPATH")
    if not path:
        return dict(os.environ)
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in path.split(os.pathsep) if p)
    }


def _repeated(args: argparse.Namespace, rows: list[Row], baseline: list[Row]) -> dict[str, Verdict]:
    """Verdicts by name; rows that fell are measured again, up to `--attempts` times, and the best counts.

    The rows themselves are replaced where a repetition was better.
    """
    verdicts = {verdict.name: verdict for verdict in compare(rows, baseline)}
    position = {row["name"]: index for index, row in enumerate(rows)}
    for _ in range(args.attempts - 1):
        fallen = [name for name, verdict in verdicts.items() if verdict.state == "fell"]
        if not fallen:
            break
        print(f"measuring again: {', '.join(fallen)}", file=sys.stderr)
        nodes = dict.fromkeys(rows[position[name]]["node"] for name in fallen)
        for verdict, row in _pairs_of(_measure(args, list(nodes))[1]["rows"], baseline):
            if verdict.name in fallen and better(verdicts[verdict.name], verdict) is verdict:
                verdicts[verdict.name] = verdict
                rows[position[verdict.name]] = row
    return verdicts


def _pairs_of(rows: list[Row], baseline: list[Row]) -> list[tuple[Verdict, Row]]:
    return list(zip(compare(rows, baseline), rows, strict=True))


def _print(args: argparse.Namespace, measured: dict[str, Any], verdicts: dict[str, Verdict] | None) -> None:
    rows = [{key: value for key, value in row.items() if key != "node"} for row in measured["rows"]]
    if args.json:
        content: dict[str, Any] = {"name": measured["name"], "machine": measured["machine"], "rows": rows}
        if verdicts is not None:
            content["comparison"] = [asdict(verdict) for verdict in verdicts.values()]
        print_json(content)
        return
    header, table = list(HEADER), [cells(row) for row in rows]
    if verdicts is not None:
        header += ["was", "change", "state"]
        table = [line + _judged(verdicts[line[0]]) for line in table]
    _print_table(header, table)
    for verdict in (verdicts or {}).values():
        if verdict.state == "fell":
            print(f"fell: {verdict}")
    if verdicts is not None:
        states = [verdict.state for verdict in verdicts.values()]
        where = f"the committed results of {measured['name']}"
        if set(states) == {"new"}:
            print(
                f"nothing to compare with: there are no results of these rows for {measured['name']}; --save keeps them"
            )
        else:
            counts = ", ".join(
                f"{states.count(s)} {s}" for s in ("holds", "fell", "unclear", "new") if s in states
            )
            print(f"against {where}: {counts}")


def _judged(verdict: Verdict) -> list[str]:
    if not verdict.changes:
        return ["", "", verdict.state]
    change = verdict.changes[0]  # the ratio to the peer, where there is one
    before = f"{change.before:.2f}x" if change.measure == "ratio" else f"{change.before:.0%}"
    return [before, f"{-change.fall:+.0%}", verdict.state]


def _print_table(header: Sequence[str], table: Sequence[Sequence[str]]) -> None:
    """With rich where it is installed and a terminal reads, in plain columns otherwise."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.table import Table

        drawn = Table(*header)
        for line in table:
            style = {"fell": "bold red", "unclear": "yellow"}.get(line[-1])
            drawn.add_row(*line, style=style)
        Console().print(drawn)
        return
    widths = [max(len(line[i]) for line in (header, *table)) for i in range(len(header))]
    for line in (header, *table):
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
