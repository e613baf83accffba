# SPDX-License-Identifier: Apache-2.0
"""The GPU rows without a GPU: every row's Python on small problems, the clock, and what is said of failures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_goals
import gpu_measures
import gpu_results
import pytest
import result_files
import torch
from gpu_measures import Arena

from vlmkernels.ops import _triton

SUITES = Path(__file__).parents[2] / "benchmarks"
ROOT = SUITES.parent
#: Kernels of torch that a CPU does not have.
ABSENT = {"SDPA efficient", "SDPA cudnn"}


def dry_run(log: Path, *arguments: str, interpret: bool = False) -> str:
    """pytest on the GPU suites with --dry, in a process of its own; its rows go to `log`."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TRITON_INTERPRET": "1" if interpret else "0",
    }
    suites = [str(path) for path in sorted(SUITES.glob("bench_gpu_*.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--dry", f"--append={log}"]
    done = subprocess.run(
        [*command, *suites, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Rows of a dry run, by the reference: our kernels are refused, and rows say so."""
    log = tmp_path_factory.mktemp("dry") / "rows.jsonl"
    dry_run(log)
    return [row for family in result_files.read_log(log).values() for row in family]


def test_every_row_runs_and_its_results_agree(rows: list[dict[str, Any]]) -> None:
    assert not [row for row in rows if "failed" in row]
    for row in rows:
        missing = {name for name in row.get("others_missing", {}) if not name.startswith("ours ")}
        assert missing <= ABSENT, row
        if row["backend"] == "reference" and "others_ms" in row:
            assert {"ms", "spread", "ratio", "peer", "error", "rounds", "torch", "card", "step"} <= row.keys()


def test_every_goal_has_a_row(rows: list[dict[str, Any]]) -> None:
    names = {row["name"] for row in rows}
    for goal in gpu_goals.GOALS:
        assert f"{goal.row} reference" in names, goal
        (row,) = [row for row in rows if row["name"] == f"{goal.row} reference"]
        if goal.measure not in ("share_of_paper", "launches"):  # which only a card has
            assert goal.of(row) is not None, goal


@pytest.mark.slow
@pytest.mark.skipif(_triton.missing is not None, reason=str(_triton.missing))
def test_every_row_runs_on_interpreted_kernels(tmp_path: Path) -> None:
    dry_run(tmp_path / "rows.jsonl", interpret=True)
    families = result_files.read_log(tmp_path / "rows.jsonl")
    by_triton = [row for rows in families.values() for row in rows if row["backend"] == "triton"]
    assert len([row for row in by_triton if "refused" not in row]) > 60
    assert not [row for row in by_triton if "failed" in row]


def test_what_rows_compile_can_be_compiled_before(tmp_path: Path) -> None:
    out = dry_run(tmp_path / "rows.jsonl", "--prepare", "-k", "ViT-B or clip_loss or zero_shot")
    assert " passed" in out and not (tmp_path / "rows.jsonl").exists()


# One contest.


@pytest.fixture
def arena() -> Arena:
    arena = Arena(dry=True)
    noted: list[dict[str, Any]] = []
    arena.note = lambda name, **figures: noted.append({"name": name, **figures})
    arena.noted = noted  # type: ignore[attr-defined]
    arena.backends = lambda op: ["triton", "cuda"]  # type: ignore[method-assign]
    return arena


def contest(arena: Arena, ours: dict[str, Any], peers: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Rows by backend of a contest whose calls return numbers, all of which should be 1."""

    def setup(result: Any) -> Any:
        def call() -> float:
            if isinstance(result, BaseException):
                raise result
            return float(result)

        return call

    arena.contest(
        "row",
        op="attention",
        ours=lambda backend: setup(ours[backend]),
        peers={name: lambda value=value: setup(value) for name, value in peers.items()},
        check=lambda result: abs(result - 1),
        tolerance=1e-2,
        shape=[1],
        **options,
    )
    return {row["backend"]: row for row in arena.noted}  # type: ignore[attr-defined]


def test_a_failure_is_a_row_and_the_others_are_measured(arena: Arena) -> None:
    rows = contest(
        arena,
        {"triton": RuntimeError("misaligned\nmore"), "cuda": 1.0},
        {"first": torch.OutOfMemoryError("2 GiB"), "second": 1.0},
    )
    assert rows["triton"]["failed"] == "RuntimeError: misaligned" and "ms" not in rows["triton"]
    assert rows["cuda"]["peer"] == "second" and rows["cuda"]["ratio"] > 0
    assert rows["cuda"]["others_missing"] == {"first": "out of memory"}
    assert arena.failures == ["row, triton: RuntimeError: misaligned"]


def test_a_wrong_result_is_not_timed(arena: Arena) -> None:
    rows = contest(arena, {"triton": 1.5, "cuda": float("nan")}, {"peer": 1.0})
    assert "relative error 5.00e-01" in rows["triton"]["failed"]
    assert "relative error nan" in rows["cuda"]["failed"]
    assert len(arena.failures) == 2


def test_a_peer_may_err_and_it_is_noted(arena: Arena) -> None:
    rows = contest(arena, {"triton": 1.0, "cuda": 1.0}, {"peer": 2.0})
    assert rows["cuda"]["others_errors"] == {"peer": 1.0} and not arena.failures


def test_a_refusal_is_no_failure_unless_nobody_serves(arena: Arena) -> None:
    refusal = NotImplementedError("not built")
    rows = contest(arena, {"triton": 1.0, "cuda": refusal}, {"peer": 1.0})
    assert rows["cuda"]["refused"] == "not built" and not arena.failures
    contest(arena, {"triton": refusal, "cuda": refusal}, {"peer": 1.0})
    assert "no backend serves it" in arena.failures[0]


def test_without_a_peer_there_is_no_ratio(arena: Arena) -> None:
    rows = contest(arena, {"triton": 1.0, "cuda": 1.0}, {"peer": RuntimeError("no kernel")}, operations=1e6)
    assert "ratio" not in rows["cuda"] and rows["cuda"]["tflops"] > 0


def test_a_lost_device_ends_the_row_after_it_is_noted(arena: Arena) -> None:
    arena.alive = lambda: False  # type: ignore[method-assign]
    with pytest.raises(gpu_measures.DeviceLostError, match="the device is lost: RuntimeError: illegal"):
        contest(arena, {"triton": RuntimeError("illegal memory access"), "cuda": 1.0}, {"peer": 1.0})
    assert "the device is lost" in arena.noted[0]["failed"]  # type: ignore[attr-defined]


def test_what_else_is_timed_is_no_peer(arena: Arena) -> None:
    rows = contest(arena, {"triton": 1.0, "cuda": 1.0}, {"peer": 1.0}, beside={"floor": lambda: lambda: None})
    assert rows["cuda"]["peer"] == "peer" and set(rows["cuda"]["others_ms"]) == {"peer", "floor"}
    assert set(rows["cuda"]["others_errors"]) == {"peer"}


def test_a_figure_that_cannot_be_had_costs_no_row(arena: Arena) -> None:
    def figures(backend: str) -> dict[str, Any]:
        raise ValueError("no profiler")

    rows = contest(arena, {"triton": 1.0, "cuda": 1.0}, {"peer": 1.0}, figures=figures)
    assert rows["cuda"]["figures_missing"] == "no profiler" and rows["cuda"]["ms"] > 0


# The clock of events.


def test_the_clock_flushes_sleeps_and_times_between_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("synchronize")

        def elapsed_time(self, end: Event) -> float:
            return 2.5

    flushed = SimpleNamespace(zero_=lambda: log.append("flush"))
    monkeypatch.setattr(gpu_measures.torch, "empty", lambda *a, **k: flushed)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(cycles))  # fails where torch has none
    clock = gpu_measures.EventClock()
    assert clock.milliseconds(lambda: log.append("call"), issue_seconds=1e-4) == 2.5
    assert log == ["flush", 300_000, "record", "call", "record", "synchronize"]
    log.clear()
    clock.milliseconds(lambda: log.append("call"), issue_seconds=1.0)
    assert log[1] == gpu_measures.LONGEST_SLEEP * gpu_measures.CYCLES_PER_SECOND


@pytest.mark.filterwarnings("ignore:CUDA is not available, disabling CUDA profiling")
def test_what_only_a_device_does_is_spelt_right(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs, memory, launches and calls per microsecond, on stand-ins for the functions of `torch.cuda`."""
    allocated = iter([100, 100])

    class Stream:
        def wait_stream(self, other: Any) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *_: Any) -> None: ...

    class Graph(Stream):
        def replay(self) -> None: ...

    cuda = {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "current_stream": Stream,
        "stream": lambda stream: stream,
        "graph": lambda graph: graph,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: next(allocated),
        "max_memory_allocated": lambda: 180,
    }
    for name, stand_in in cuda.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, stand_in)
    arena.dry = False
    replay, captured = arena.graph(lambda: [torch.ones(2)])
    assert replay() is None and captured[0].sum() == 2
    assert arena.extra_bytes(lambda: [torch.ones(5)]) == 180 - 100 - 20
    assert arena.alive()
    monkeypatch.setattr(torch.autograd.DeviceType, "CUDA", torch.autograd.DeviceType.CPU, raising=True)
    assert arena.launches(lambda: torch.ones(3) + 1) > 0
    assert len(arena.microseconds_per_call(lambda: None, calls=2)) == 9
    assert arena.versions().keys() == {"card", "arch", "cuda", "cudnn", "triton"}


@pytest.mark.parametrize(
    ("kind", "card", "rate"),
    [
        ("bfloat16", "NVIDIA H200", 989.0),
        ("int8", "NVIDIA H100 80GB HBM3", 1979.0),
        ("memory", "NVIDIA H200", 4.8),
        ("fp8", "NVIDIA A100-SXM4-80GB", None),
        ("bfloat16", "NVIDIA H100 PCIe", None),
    ],
)
def test_rates_on_paper(kind: str, card: str, rate: float | None) -> None:
    assert gpu_measures.paper(kind, card) == rate


# What is said of a run.


def invented(name: str, backend: str, **figures: Any) -> dict[str, Any]:
    common = {
        "op": "attention",
        "backend": backend,
        "card": "NVIDIA H200",
        "arch": "sm_90",
        "date": "2026-01-01",
    }
    return {"name": f"{name} {backend}", **common, **figures}


def test_goals_are_judged_by_our_best_backend() -> None:
    name = "attention ViT-B/16 (256,12,197,64) bfloat16 forward"
    rows = [invented(name, "triton", ms=1.0, ratio=1.6), invented(name, "cuda", ms=0.8, ratio=1.9)]
    lines = list(gpu_goals.verdicts(rows))
    assert f"reached       {name}: ratio at least 1.7; cuda 1.9, triton 1.6" in lines
    assert sum(line.startswith("not measured") for line in lines) == len(gpu_goals.GOALS)
    lines = list(gpu_goals.verdicts([invented("w8a8 ViT-B/16 out, 1 images", "triton", ms=1.0, ratio=0.9)]))
    assert (
        lines[-1]
        == "missed        w8a8 is never slower than bfloat16, 1 layers; w8a8 ViT-B/16 out, 1 images 0.90"
    )


def test_the_table_of_the_readme_is_that_of_the_committed_results() -> None:
    table = "\n".join(gpu_goals.table(gpu_goals.committed()))
    readme = (SUITES / "README.md").read_text(encoding="utf-8")
    assert table in readme, f"put this into benchmarks/README.md:\n{table}"
    name = "attention ViT-B/16 (256,12,197,64) bfloat16 forward"
    lines = gpu_goals.table(
        [invented(name, "triton", ms=1.0, ratio=1.6), invented(name, "cuda", ms=0.8, ratio=1.9)]
    )
    assert f"| {name} | ratio | at least 1.7 | 1.9 (cuda), 1.6 (triton) |" in lines


def test_results_go_to_the_cards_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "rows.jsonl"
    name = "attention ViT-B/16 (256,12,197,64) bfloat16 forward"
    result_files.append_row(log, "attention", invented(name, "triton", ms=9.0, ratio=1.0))
    result_files.append_row(log, "attention", invented(name, "triton", ms=1.0, ratio=1.8))
    result_files.append_row(log, "attention", invented(name, "cuda", failed="RuntimeError: it fell"))
    with log.open("a") as file:
        file.write('{"family": "attention", "name": "cut sh')
    assert (
        gpu_results.main([str(log), "--results", str(tmp_path / "results"), "--out", str(tmp_path / "out")])
        == 1
    )
    page = capsys.readouterr().out
    assert "reached       " in page and "failed  " in page and "it fell" in page
    written = tmp_path / "results" / "nvidia-h200" / "attention.json"
    assert written.read_text() == (tmp_path / "out" / "attention.json").read_text()
    assert [row["name"].split()[-1] for row in result_files.read_log(log)["attention"]] == ["triton", "cuda"]


def test_a_page_is_no_longer_than_it_may_be() -> None:
    families = {"attention": [invented("a long name " * 5, "cuda", ms=1.0) for _ in range(100)]}
    page = "\n".join(gpu_results.page(families, 3000))
    assert len(page) < 3100 and "more lines" in page
