# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: threads, interleaved pairs, probed peaks, and the compact result files.

Run one file, look at the table, and keep the rows::

    pytest benchmarks/bench_contrastive.py --benchmark-columns=median,iqr,rounds
    pytest benchmarks/bench_contrastive.py --save-results        # benchmarks/results/<machine>/contrastive.json

`--threads` (default 2) is given to torch, whose pool our kernels use too. `--machine` names the folder of results; by
default the processor's brand and the number of cores. A row that is run again replaces the one of the same name.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmkernels import _native
from vlmkernels._version import __version__

ROWS = pytest.StashKey[dict[str, list[dict[str, Any]]]]()
PROBE_SECONDS = 0.3


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vlmkernels")
    group.addoption("--threads", type=int, default=2, help="threads of torch and of our kernels (default 2)")
    group.addoption("--machine", default=None, help="name of the folder in benchmarks/results")
    group.addoption(
        "--save-results", action="store_true", help="write benchmarks/results/<machine>/<family>.json"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = {}


def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if not config.getoption("--save-results"):
        return
    folder = Path(__file__).parent / "results" / (config.getoption("--machine") or machine_name())
    folder.mkdir(parents=True, exist_ok=True)
    for family, rows in config.stash[ROWS].items():
        path = folder / f"{family}.json"
        kept = json.loads(path.read_text())["rows"] if path.exists() else []
        new = {row["name"] for row in rows}
        merged = [row for row in kept if row["name"] not in new] + rows
        lines = ",\n".join("  " + json.dumps(row) for row in sorted(merged, key=lambda row: row["name"]))
        path.write_text(f'{{"machine": {json.dumps(machine(config))},\n "rows": [\n{lines}\n]}}\n')


def machine_name() -> str:
    """Folder name for this machine: processor and number of cores."""
    return re.sub(r"[^a-z0-9]+", "-", f"{brand()} {os.cpu_count()} cores".lower()).strip("-")


def brand() -> str:
    return (
        _native.cpu.cpu_brand().strip()
        if _native.cpu_reason is None
        else platform.processor() or platform.machine()
    )


def machine(config: pytest.Config) -> dict[str, Any]:
    return {
        "processor": brand(),
        "cores": os.cpu_count(),
        "isa": _native.cpu.isa() if _native.cpu_reason is None else None,
        "threads": config.getoption("--threads"),
    }


def versions() -> dict[str, str]:
    return {
        "vlmkernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


@pytest.fixture(scope="session", autouse=True)
def threads(request: pytest.FixtureRequest) -> int:
    """Threads of this run, already given to torch."""
    count = request.config.getoption("--threads")
    torch.set_num_threads(count)
    return count


@pytest.fixture(autouse=True)
def extension() -> None:
    """Every row measures the compiled kernels; without them there is nothing to compare."""
    if _native.cpu_reason is not None:
        pytest.fail(f"vlmkernels._cpu is not available: {_native.cpu_reason}")


@pytest.fixture
def row(benchmark, request: pytest.FixtureRequest, threads: int) -> Callable[..., None]:
    """`row(name, shape=..., **figures)` notes figures beside the timing and for the results file."""
    family = Path(request.node.fspath).stem.removeprefix("bench_")

    def note(name: str, **figures: Any) -> None:
        figures = {key: _short(value) for key, value in figures.items()}
        benchmark.extra_info.update(figures)
        entry = {"name": name, **figures, "threads": threads, **versions()}
        request.config.stash[ROWS].setdefault(family, []).append(entry)

    return note


@pytest.fixture
def pairs(benchmark) -> Callable[..., dict[str, float]]:
    """`pairs(ours, peer, rounds)` times the two in turn, peer first, after one untimed call of each.

    Returns medians in milliseconds, their spread (interquartile range over median) and the ratio peer / ours.
    """

    def measure(ours: Callable[[], Any], peer: Callable[[], Any], rounds: int) -> dict[str, float]:
        peer_seconds: list[float] = []
        ours_seconds: list[float] = []

        def timed_peer() -> None:
            peer_seconds.append(_seconds(peer))

        def timed_ours() -> None:
            ours_seconds.append(_seconds(ours))

        benchmark.pedantic(timed_ours, setup=timed_peer, rounds=rounds, warmup_rounds=1)
        ours_seconds, peer_seconds = ours_seconds[-rounds:], peer_seconds[-rounds:]
        ours_median, peer_median = statistics.median(ours_seconds), statistics.median(peer_seconds)
        return {
            "ms": ours_median * 1e3,
            "spread": _spread(ours_seconds),
            "peer_ms": peer_median * 1e3,
            "peer_spread": _spread(peer_seconds),
            "ratio": peer_median / ours_median,
            "rounds": rounds,
        }

    return measure


@pytest.fixture(scope="session")
def peak(threads: int) -> Callable[[str], float]:
    """`peak(kind)`: probes the peak and returns the best of this run, in GFLOP/s.

    A neighbour's load can only lower a probe, so the best one is the nearest to the truth.
    """
    best: dict[str, float] = {}

    def probe(kind: str) -> float:
        best[kind] = max(best.get(kind, 0.0), _native.cpu.peak(kind, PROBE_SECONDS, threads))
        return best[kind]

    return probe


@pytest.fixture
def share_of_peak(peak: Callable[[str], float]) -> Callable[[str, float, float], dict[str, float]]:
    """`share_of_peak(kind, operations, ms)`: rate of the timed call beside the peak that is probed now."""

    def figures(kind: str, operations: float, ms: float) -> dict[str, float]:
        limit = peak(kind)
        rate = operations / ms / 1e6
        return {"gflops": rate, "peak_gflops": limit, "share_of_peak": rate / limit}

    return figures


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _spread(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / statistics.median(values)


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
