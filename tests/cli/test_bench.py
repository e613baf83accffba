# SPDX-License-Identifier: Apache-2.0
"""The gate on speed: what counts as a fall, repetitions, and real rows of which one runs on a slowed kernel."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vlmkernels import _native
from vlmkernels.cli import bench
from vlmkernels.cli._baseline import better, compare, read_baseline

Run = Callable[..., tuple[int, str, str]]

SUITES = Path(__file__).parents[2] / "benchmarks"
MACHINE = {"processor": "one", "cores": 2, "isa": "avx2", "threads": 2}


def row(ratio: float = 2.0, *, name: str = "a", peer_ms: float = 10.0, **more: Any) -> dict[str, Any]:
    """A row of a kernel that takes half the peer's time."""
    return {
        "name": name,
        "ratio": ratio,
        "ratio_spread": 0.02,
        "ms": peer_ms / ratio,
        "peer_ms": peer_ms,
        **more,
    }


def state(now: dict[str, Any], before: dict[str, Any]) -> str:
    return compare([now], [before])[0].state


@pytest.mark.parametrize(
    ("ratio", "expected"), [(2.0, "holds"), (3.0, "holds"), (1.77, "holds"), (1.75, "fell")]
)
def test_a_fall_beyond_a_tenth_and_the_spread(ratio: float, expected: str) -> None:
    assert state(row(ratio), row()) == expected


def test_the_larger_spread_of_the_two_runs_counts() -> None:
    assert state(row(1.5), row()) == "fell"
    assert state(row(1.5, ratio_spread=0.2), row()) == "holds"
    assert state(row(1.5), row(ratio_spread=0.2)) == "holds"


def test_older_results_have_the_spreads_of_the_two_sides() -> None:
    before = row(spread=0.12, peer_spread=0.16)
    del before["ratio_spread"]
    assert compare([row()], [before])[0].changes[0].allowed == pytest.approx(0.1 + 0.2)


def test_a_slower_kernel_loses_every_measure_and_a_faster_peer_only_one() -> None:
    before = row(share_of_peak=0.8, spread=0.01)
    assert state(row(1.0, share_of_peak=0.4), before) == "fell"
    assert state(row(1.0, share_of_peak=0.8), before) == "holds"
    assert state(row(2.0, share_of_peak=0.4), before) == "holds"


def test_rows_without_a_peer_are_held_to_the_probe() -> None:
    before = {"name": "engine", "share_of_peak": 0.95, "gflops": 200.0}
    assert state({"name": "engine", "share_of_peak": 0.86}, before) == "holds"
    assert state({"name": "engine", "share_of_peak": 0.84}, before) == "fell"


def test_a_disturbed_peer_widens_what_is_allowed() -> None:
    assert state(row(1.5), row()) == "fell"
    assert (
        state(row(1.5, peer_ms=14.0), row()) == "holds"
    )  # at 71% of its rate, 19% below the 90% that is normal
    assert state(row(0.9, peer_ms=14.0), row()) == "fell"


def test_a_kernel_that_runs_twice_falls_however_the_machine_is() -> None:
    assert state(row(1.0, peer_ms=14.0, ratio_spread=0.15), row()) == "fell"


def test_a_wide_measurement_that_holds_is_unclear() -> None:
    assert state(row(1.9, ratio_spread=0.5), row()) == "unclear"


def test_not_a_number_is_a_fall() -> None:
    assert state(row(math.nan), row()) == "fell"


def test_rows_that_the_baseline_lacks_are_new() -> None:
    assert state(row(name="b"), row()) == "new"
    assert state(row(), {"name": "a", "extra_mib": 3.0}) == "new"


def test_the_better_of_two_measurements_counts() -> None:
    slow, slower = compare([row(1.5), row(1.2)], [row()])
    assert better(slow, slower) is better(slower, slow) is slow


def test_results_of_another_class_are_no_baseline(tmp_path: Path) -> None:
    content = {"machine": MACHINE, "rows": [row()]}
    (tmp_path / "attention.json").write_text(json.dumps(content))
    assert read_baseline(tmp_path, MACHINE) == [row()]
    assert read_baseline(tmp_path, MACHINE | {"threads": 1}) == []
    assert read_baseline(tmp_path, MACHINE | {"isa": "avx512"}) == []
    assert read_baseline(tmp_path / "gone", MACHINE) == []


Measured = list[dict[str, Any]]


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """`measurements(first, second, ...)`: a folder of suites that measure this in turn, with `row()` as baseline."""
    folder = tmp_path / "benchmarks"
    results = folder / "results" / "one"
    results.mkdir(parents=True)
    (folder / "bench_a.py").touch()
    (results / "a.json").write_text(json.dumps({"machine": MACHINE, "rows": [row()]}))

    def prepare(*runs: Measured, code: int = 0) -> Path:
        left: Iterator[Measured] = iter(runs)

        def measure(args: Any, selection: Any) -> tuple[int, dict[str, Any]]:
            rows = [{**r, "node": "bench_a.py::test_a"} for r in next(left)]
            return code, {"name": args.machine or "one", "machine": MACHINE, "rows": rows}

        monkeypatch.setattr(bench, "_measure", measure)
        return folder

    return prepare


def test_a_row_that_recovers_does_not_fail(run: Run, measurements: Callable[..., Path]) -> None:
    folder = measurements([row(1.2)], [row(1.3)], [row(1.9)])
    code, out, _ = run("bench", "--suites", folder, "--compare")
    assert code == 0
    assert "1 holds" in out and "1.90x" in out


def test_a_row_that_falls_three_times_fails(run: Run, measurements: Callable[..., Path]) -> None:
    folder = measurements([row(1.2)], [row(1.3)], [row(1.1)])
    code, out, err = run("bench", "--suites", folder, "--compare")
    assert code == 1
    assert "fell: a: ratio to the peer 1.3, was 2 (-35%, 12% allowed)" in out
    assert err.count("measuring again: a") == 2


def test_attempts_are_as_many_as_asked_for(run: Run, measurements: Callable[..., Path]) -> None:
    folder = measurements([row(1.2)])
    assert run("bench", "--suites", folder, "--compare", "--attempts", 1)[0] == 1


def test_json_holds_rows_and_comparison(run: Run, measurements: Callable[..., Path]) -> None:
    folder = measurements([row(1.2), row(name="b")])
    code, out, _ = run("bench", "--suites", folder, "--compare", "--attempts", 1, "--json")
    content = json.loads(out)
    assert code == 1
    assert [r["name"] for r in content["rows"]] == ["a", "b"]
    assert [(v["name"], v["state"]) for v in content["comparison"]] == [("a", "fell"), ("b", "new")]


def test_a_machine_without_a_baseline_says_so(run: Run, measurements: Callable[..., Path]) -> None:
    folder = measurements([row()], [row()])
    code, out, _ = run("bench", "--suites", folder, "--compare", "--machine", "another")
    assert code == 0
    assert "there are no results of these rows for another" in out
    assert run("bench", "--suites", folder, "--compare", "--machine", "another", "--strict")[0] == 2


def test_a_failing_case_fails_whatever_the_rows_say(run: Run, measurements: Callable[..., Path]) -> None:
    folder = measurements([row()], code=1)
    assert run("bench", "--suites", folder, "--compare")[0] == 1


def test_nothing_selected_is_bad_input(run: Run, measurements: Callable[..., Path]) -> None:
    code, _, err = run("bench", "--suites", measurements([], code=5), "--select", "no such row")
    assert code == 2
    assert "no row was measured (no such row)" in err


def test_a_baseline_that_is_none_is_bad_input(run: Run, measurements: Callable[..., Path]) -> None:
    folder = measurements([row()])
    (folder / "results" / "one" / "a.json").write_text("[]")
    code, _, err = run("bench", "--suites", folder, "--compare")
    assert code == 2
    assert "a.json is no file of results" in err


SLOWED = """
import vlmkernels as vk

kernel = vk.attention_qkvpacked


def slowed(*arguments, **options):
    for _ in range(2):
        kernel(*arguments, **options)
    return kernel(*arguments, **options)


vk.attention_qkvpacked = slowed
"""


@pytest.mark.skipif(_native.cpu_reason is not None, reason="the rows are those of the CPU kernels")
def test_a_slowed_kernel_trips_the_gate_and_an_unchanged_one_does_not(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row_name = "attention ViT-B/32 (32,12,50,64) float32 forward"
    arguments = ("bench", "--suites", SUITES, "--results", tmp_path / "results", "--machine", "here")
    arguments += ("--select", "ViT-B/32 and float32 and not backward", "--threads", 1)
    code, out, _ = run(*arguments, "--save")
    assert code == 0
    assert row_name in out
    (saved,) = json.loads((tmp_path / "results" / "here" / "attention.json").read_text())["rows"]
    assert saved["name"] == row_name

    code, out, _ = run(*arguments, "--compare", "--strict")
    assert code == 0
    assert "fell" not in out

    (tmp_path / "slowed.py").write_text(SLOWED)
    path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p slowed")
    code, out, _ = run(*arguments, "--compare", "--attempts", 1)
    assert code == 1
    assert f"fell: {row_name}" in out
