# SPDX-License-Identifier: Apache-2.0
"""The bare tile engine beside the peaks probed in the same run: packed operands in, largest value out.

    pytest benchmarks/bench_engine.py --benchmark-disable-gc -q [--save-results]

Rates count useful operations, 2 M N depth: what an edge wastes on masked rows is lost rate.
"""

from __future__ import annotations

import pytest

from vlmkernels import _native

KINDS = ("float32", "bfloat16", "int8")
COLUMNS = 960
BLOCK = 512
SECONDS = 0.4


@pytest.mark.parametrize("m", [BLOCK, 1, 50, 77, 197])
@pytest.mark.parametrize("depth", [512, 2048])
@pytest.mark.parametrize("kind", KINDS)
def test_engine_rate(benchmark, row, peak, threads: int, kind: str, depth: int, m: int) -> None:
    rates: list[float] = []
    peaks: list[float] = []

    def probe() -> None:
        peaks.append(peak(kind))

    def run() -> None:
        rates.append(_native.cpu.engine_rate(kind, m, COLUMNS, depth, SECONDS, threads))

    benchmark.pedantic(run, setup=probe, rounds=2, warmup_rounds=0)
    row(
        f"engine {kind} {m} x {COLUMNS} depth {depth}",
        shape=[m, COLUMNS, depth],
        dtype=kind,
        gflops=max(rates),
        peak_gflops=max(peaks),
        share_of_peak=max(rates) / max(peaks),
    )
