# SPDX-License-Identifier: Apache-2.0
"""The checks of a wheel find what they look for, the smoke test is quick and honest, results are counted."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import check_wheel
import every_torch
import pytest

import vlmkernels as vk
from vlmkernels import _native, smoke

SMOKE_SECONDS = 10.0


def make_wheel(folder: Path, *extra: str, without: str = "", filler: int = 0) -> Path:
    """A file that has what a wheel needs, by name."""
    wheel = folder / "vlmkernels-0.1.0-cp312-cp312-linux_x86_64.whl"
    modules = [f"vlmkernels/_{name}.cpython-312-x86_64-linux-gnu.so" for name in ("cpu", "cuda")]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*check_wheel.NEEDED, *modules, *extra):
            if not without or without not in name:
                archive.writestr(name, os.urandom(filler))
    return wheel


def test_a_complete_wheel_has_no_problem(tmp_path: Path) -> None:
    assert check_wheel.problems(make_wheel(tmp_path), ["cpu", "cuda"]) == []


@pytest.mark.parametrize(
    ("without", "problem"),
    [
        ("_cpu.cpython", "the module _cpu is missing"),
        ("_cuda.cpython", "the module _cuda is missing"),
        ("py.typed", "vlmkernels/py.typed is missing"),
        ("model.safetensors", "model.safetensors is missing"),
    ],
)
def test_what_is_missing_is_a_problem(tmp_path: Path, without: str, problem: str) -> None:
    (found,) = check_wheel.problems(make_wheel(tmp_path, without=without), ["cpu", "cuda"])
    assert problem in found


@pytest.mark.parametrize(
    "extra",
    [
        "tests/test_a.py",
        "vlmkernels/cpu/a.cpp",
        "vlmkernels/__pycache__/a.pyc",
        "vlmkernels.libs/libgomp.so.1",
    ],
)
def test_what_does_not_belong_is_a_problem(tmp_path: Path, extra: str) -> None:
    assert len(check_wheel.problems(make_wheel(tmp_path, extra), ["cpu", "cuda"])) >= 1


def test_a_large_wheel_is_a_problem(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, filler=1000)
    (found,) = check_wheel.problems(wheel, ["cpu"], limit=5000)
    assert "is the limit" in found


def test_the_smoke_test_takes_ten_seconds_at_most() -> None:
    """Of processor time, so that other work on the machine does not count."""
    environment = {**os.environ, "PYTHONPATH": str(Path(vk.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "vlmkernels.smoke"], env=environment, capture_output=True, text=True, cwd="/"
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all well" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SMOKE_SECONDS


@pytest.mark.skipif(_native.cpu_reason is not None, reason="needs a backend beside the reference")
@pytest.mark.parametrize("op", smoke.PROBLEMS)
def test_the_smoke_test_notices_a_wrong_result(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_a_percent():
        function, arguments = problem()

        def wrong(*tensors, backend):
            return function(*tensors, backend=backend) * (1.01 if backend == "cpu" else 1.0)

        return wrong, arguments

    problem = smoke.PROBLEMS[op]
    monkeypatch.setitem(smoke.PROBLEMS, op, off_by_a_percent)
    with pytest.raises(ValueError, match="differ from the reference by"):
        smoke.compare(op, "cpu")


def test_a_required_module_that_is_missing_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_native, "cuda_reason", "it was left out")
    monkeypatch.setattr(smoke, "PROBLEMS", {})
    monkeypatch.setattr(smoke, "name_drawings", lambda: "not asked")
    assert smoke.main(["--require", "cuda"]) == 1
    assert "FAILED: ImportError: it was left out" in capsys.readouterr().out
    assert smoke.main([]) == 0


def test_the_results_of_a_run_are_counted(tmp_path: Path) -> None:
    case = '<testcase classname="a" name="{}">{}</testcase>'
    cases = [
        case.format("one", ""),
        case.format("two", "<skipped/>"),
        case.format("three", "<failure>no</failure>"),
    ]
    (tmp_path / "results.xml").write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    expected = {"passed": 1, "failed": 1, "skipped": 1, "failures": ["a::three"]}
    assert every_torch.counts(tmp_path / "results.xml") == expected
