# SPDX-License-Identifier: Apache-2.0
"""The runner that goes on after a test that takes its process with it: crashes, endless tests, time, shards."""

from __future__ import annotations

import json
from pathlib import Path

import isolated
import pytest

TESTS = """
import os, time
import pytest

def test_a(): pass
def test_b(): os._exit(9)
def test_c(): assert 1 == 2, "so it says"
def test_d(): time.sleep(60)
@pytest.mark.skip(reason="not here")
def test_e(): pass
def test_f(): pass
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "test_some.py"
    path.write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return path


def run(file: Path, *own: str, tests: tuple[str, ...] = ()) -> list[isolated.Result]:
    summary = file.with_name("summary.json")
    code = isolated.main(
        [str(file), "--summary", str(summary), "--log", str(file.with_name("log")), *own, "--", *tests]
    )
    results = isolated.read_summary(summary)
    assert code == int(not all(r.passed for r in results))
    return results


def test_every_test_has_an_outcome_whatever_the_others_do(file: Path, capsys) -> None:
    (result,) = run(file, tests=("--test-seconds=2",))
    short = {node.partition("::")[2]: outcome for node, (outcome, _, _) in result.outcomes.items()}
    assert short == {
        "test_a": "passed",
        "test_b": "crashed",
        "test_c": "failed",
        "test_d": "crashed",
        "test_e": "skipped",
        "test_f": "passed",
    }
    assert result.starts == 3 and not result.passed and result.not_run == 0 and not result.problem
    printed = capsys.readouterr().out
    assert "so it says" in printed and "exit code 9" in printed
    isolated.main(["--print", str(file.with_name("summary.json"))])
    assert capsys.readouterr().out == printed


def test_time_is_up(file: Path) -> None:
    (result,) = run(file, "--seconds", "4", tests=("-k", "test_a or test_d or test_f"))
    assert result.problem == "time was up"
    assert result.count("passed") == 1 and result.count("crashed") == 1 and result.not_run == 1


def test_shards_share_the_tests(file: Path) -> None:
    results = run(file, "--shards", "2", "--jobs", "2", tests=("-k", "test_a or test_c or test_e or test_f"))
    assert [r.collected for r in results] == [2, 2]
    nodes = [node for r in results for node in r.outcomes]
    assert len(nodes) == len(set(nodes)) == 4
    assert [r.passed for r in results].count(False) == 1


def test_a_file_that_cannot_be_read_is_a_problem_and_no_endless_loop(tmp_path: Path) -> None:
    path = tmp_path / "test_broken.py"
    path.write_text("import os\nos._exit(3)\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (result,) = run(path)
    assert not result.passed and "exit code 3 outside of any test" in result.problem
    assert json.loads((tmp_path / "summary.json").read_text())[0]["starts"] == 1
