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
def test_engine_rate(benchmark, row, threads: int, kind: str, depth: int, m: int) -> None:
    rates, peaks = [], []

    def probe() -> None:
        peaks.append(_native.cpu.peak(kind, SECONDS / 2, threads))

    def run() -> None:
        rates.append(
            _native.cpu.engine_rate(kind=kind, m=m, n=COLUMNS, depth=depth, seconds=SECONDS, threads=threads)
        )

    # The clock drifts with the neighbours' load: the peak is probed before and after.
    benchmark.pedantic(run, setup=probe, rounds=2, warmup_rounds=0)
    rate, peak = max(rates), max(peaks)
    row(
        f"engine {kind} {m} x {COLUMNS} depth {depth}",
        shape=[m, COLUMNS, depth],
        dtype=kind,
        gflops=rate,
        peak_gflops=peak,
        share_of_peak=rate / peak,
    )
    assert rate > 0
