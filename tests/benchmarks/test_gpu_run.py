# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/gpu_run.sh` without a GPU: its steps in a dry run, its limits, its files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_run.sh"
#: What may come back from a run.
MOST_FILES = 8

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the script is for Linux")


def dry_run(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {"DRY": "1", "PYTHON": sys.executable, "OUT": str(out), **environment}
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env=os.environ | {"PYTHONPATH": path} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_some_steps(tmp_path: Path) -> None:
    done = dry_run(tmp_path, "build", "sanitize")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    assert [line.split(",")[0].split() for line in lines] == [["build", "ok"], ["sanitize", "ok"]]
    assert "===== sanitize: ok" in (tmp_path / "run.log").read_text()


def test_a_failing_step_is_noted_and_the_next_one_runs(tmp_path: Path) -> None:
    done = dry_run(tmp_path, "build", "sanitize", PYTHON="false")
    assert done.returncode == 1
    assert done.stdout.count("FAILED, exit code 1") == 2


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    done = dry_run(tmp_path, "build", LIMIT="10")
    assert done.returncode == 1 and "build        not run: no time was left" in done.stdout


def test_an_unknown_step_is_bad_input(tmp_path: Path) -> None:
    done = dry_run(tmp_path, "bulid")
    assert done.returncode == 2 and "unknown step bulid" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("--quick",)], ids=["all", "quick"])
def test_every_step(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = dry_run(tmp_path, *arguments, LIMIT="900")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not measured  w8a8 is never slower" in done.stdout
    files = [path.name for path in tmp_path.iterdir()]
    assert len(files) <= MOST_FILES
    assert {"summary.txt", "run.log", "info.json", "tests.json", "attention.json"} <= set(files)
