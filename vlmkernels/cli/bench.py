# SPDX-License-Identifier: Apache-2.0
"""Measure this machine's limits (--peak), or run the benchmark suites of a source checkout."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from vlmkernels import _native
from vlmkernels.cli._models import print_json

HELP = "measure the processor's limits, or run the benchmark suites"

_UNITS = {"float32": "GFLOP/s", "bfloat16": "GFLOP/s", "int8": "GOP/s", "read": "GB/s"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument(
        "--peak", action="store_true", help="register-only loops and a read of memory, per data type"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="--peak: seconds per measurement")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--suites", default="benchmarks", help="folder of the benchmark suites")
    parser.add_argument("--select", metavar="WORDS", help="only benchmarks whose names match, as pytest's -k")


def run(args: argparse.Namespace) -> int:
    """Measures, or runs pytest on the suites."""
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
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
    found = sorted(folder.glob("bench_*.py"))
    if not found:
        raise FileNotFoundError(
            f"bench: there are no suites in {folder}; they are part of the source checkout, not of the installed "
            "package: run this there, or pass --suites. `vlmkernels bench --peak` works everywhere"
        )
    command = [sys.executable, "-m", "pytest", str(folder), f"--threads={torch.get_num_threads()}"]
    command += ["--benchmark-columns=median,iqr,rounds"]
    if args.select:
        command += ["-k", args.select]
    if not args.json:
        return subprocess.call(command)
    with tempfile.TemporaryDirectory() as temporary:
        results = Path(temporary) / "results.json"
        done = subprocess.run([*command, f"--benchmark-json={results}"], stdout=sys.stderr, check=False)
        if results.is_file() and results.stat().st_size:
            print_json(json.loads(results.read_text(encoding="utf-8")))
    return done.returncode
