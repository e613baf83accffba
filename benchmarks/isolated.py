# SPDX-License-Identifier: Apache-2.0
"""Runs pytest so that no test can take the others with it: a process for each file, and a new one after every crash.

    python benchmarks/isolated.py --summary OUT.json --jobs 8 --seconds 200 tests/ops/test_gpu.py ... -- -m gpu

A kernel that reads outside memory leaves its process without a device, and one that never ends without an end. So each
test is noted when it begins and when it is done (this file is the plugin that does that, too); a process that dies,
that has lost its device or whose test takes too long is followed by another, which goes on with the test after it.
What comes out is every test's outcome: passed, failed, skipped, crashed, or not run, because time was up.

    python benchmarks/isolated.py --print OUT.json ...        # what such files say
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

Event = dict[str, Any]

HERE = Path(__file__).parent
#: A process that only ever dies is not started for ever.
MOST_STARTS = 12
DEVICE_LOST = 70


# In the process of the tests: a pytest plugin.


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--progress", metavar="FILE", help="note what begins and ends, and skip what is noted")
    parser.addoption("--shard", default="0/1", metavar="I/N", help="every N-th test, from the I-th on")
    parser.addoption(
        "--test-seconds", type=float, default=120.0, help="a test that takes longer ends the process"
    )


def pytest_configure(config: Any) -> None:
    if config.getoption("--progress"):
        config.pluginmanager.register(_Progress(config), "progress")


class _Progress:
    """Notes events in the file of --progress."""

    def __init__(self, config: Any) -> None:
        self._path = Path(config.getoption("--progress"))
        self._limit = config.getoption("--test-seconds")
        self._begun = {e["node"] for e in read_events(self._path) if e["event"] == "begin"}
        self._config = config
        self._outcome, self._message, self._start = "passed", "", 0.0

    def _note(self, event: str, **more: Any) -> None:
        append_event(self._path, {"event": event, **more})

    @pytest.hookimpl(trylast=True)  # after -m and -k
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        index, count = map(int, self._config.getoption("--shard").split("/"))
        mine = items[index::count]
        left = [item for item in mine if item.nodeid not in self._begun]
        self._note("collected", count=len(mine))
        chosen = {id(item) for item in left}
        self._config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
        items[:] = left

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._outcome, self._message, self._start = "passed", "", time.perf_counter()
        self._note("begin", node=nodeid)
        faulthandler.dump_traceback_later(self._limit, exit=True)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._outcome = "failed"
            self._message = self._message or _said(str(report.longrepr))
        elif report.skipped and self._outcome == "passed":
            self._outcome = "skipped"
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            self._message = str(reason)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        faulthandler.cancel_dump_traceback_later()
        seconds = round(time.perf_counter() - self._start, 2)
        self._note("end", node=nodeid, outcome=self._outcome, message=self._message, seconds=seconds)
        if self._outcome == "failed" and _device_is_lost():
            sys.stdout.flush()
            os._exit(DEVICE_LOST)

    def pytest_sessionfinish(self) -> None:
        self._note("finished")


def _said(text: str) -> str:
    """What a failure says: the first of pytest's lines that begin with E, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    return next((line[1:].strip() for line in lines if line.startswith("E ")), lines[-1])[:400]


def _device_is_lost() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def append_event(path: Path, event: Event) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")


def read_events(path: Path) -> list[Event]:
    """Of a file of --progress; a line that a crash cut short is left out."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


# In the process that starts the others.


@dataclass
class Result:
    """What became of one file's tests, or of one shard of them.

    Attributes:
        name: the file, and the shard where there are several.
        outcomes: test -> (outcome, what it said, seconds).
        collected: tests that should have run; None where not even that is known.
        problem: why the file as a whole could not run to its end, empty where it did.
        starts: processes that it took.
    """

    name: str
    outcomes: dict[str, tuple[str, str, float]] = field(default_factory=dict)
    collected: int | None = None
    problem: str = ""
    starts: int = 0

    def count(self, outcome: str) -> int:
        return sum(o[0] == outcome for o in self.outcomes.values())

    @property
    def not_run(self) -> int:
        return 0 if self.collected is None else self.collected - len(self.outcomes)

    @property
    def passed(self) -> bool:
        """Whether every test ran, and none failed; files whose tests are all skipped or deselected pass."""
        return not (self.problem or self.not_run or self.count("failed") or self.count("crashed"))


def run_file(
    file: str, shard: tuple[int, int], arguments: Sequence[str], deadline: float, log: Path, folder: Path
) -> Result:
    """Runs a file's tests in as many processes as it takes, their output appended to `log`."""
    index, count = shard
    result = Result(file if count == 1 else f"{file} {index + 1}/{count}")
    progress = folder / f"{Path(file).stem}.{index}.jsonl"
    options = ["-q", "--no-header", "-p", "no:cacheprovider", "-p", "isolated"]
    command = [sys.executable, "-m", "pytest", *options, file, *arguments]
    command += [f"--progress={progress}", f"--shard={index}/{count}"]
    environment = dict(os.environ)
    path = [str(HERE), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    while not result.problem:
        left = deadline - time.monotonic()
        if left <= 0:
            result.problem = "time was up"
            break
        before = len(read_events(progress))
        result.starts += 1
        code = _run(command, environment, left, log)
        events = read_events(progress)
        ended = {e["node"] for e in events if e["event"] in ("end", "crashed")}
        open_tests = [e["node"] for e in events if e["event"] == "begin" and e["node"] not in ended]
        if code is None:
            for node in open_tests:
                append_event(progress, {"event": "crashed", "node": node, "message": "cut off: time was up"})
            result.problem = "time was up"
        elif any(e["event"] == "finished" for e in events[before:]):
            if code not in (0, 1, 5):  # pytest's: passed, failed, no tests
                result.problem = f"pytest ended with exit code {code}"
            break
        elif open_tests:
            for node in open_tests:
                append_event(
                    progress,
                    {"event": "crashed", "node": node, "message": f"ended its process, exit code {code}"},
                )
        elif code != DEVICE_LOST:
            result.problem = f"pytest ended with exit code {code} outside of any test"
        if result.starts == MOST_STARTS and not result.problem:
            result.problem = f"{MOST_STARTS} processes died"
    _fill(result, read_events(progress))
    return result


def _run(command: list[str], environment: dict[str, str], seconds: float, log: Path) -> int | None:
    """Exit code; None where the process took longer and was ended."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None


def _fill(result: Result, events: list[Event]) -> None:
    for event in events:
        if event["event"] == "collected":
            # a process after the first collects what the first did
            result.collected = event["count"]
        elif event["event"] == "end":
            result.outcomes[event["node"]] = (event["outcome"], event["message"], event["seconds"])
        elif event["event"] == "crashed":
            result.outcomes[event["node"]] = ("crashed", event["message"], 0.0)


def report(results: Sequence[Result], most: int = 40) -> Iterator[str]:
    """Lines: a count for every file, then what failed."""
    for result in results:
        counts = [
            f"{result.count(o)} {o}" for o in ("passed", "failed", "crashed", "skipped") if result.count(o)
        ]
        counts += [f"{result.not_run} not run"] if result.not_run else []
        counts += [result.problem] if result.problem else []
        yield f"{'ok  ' if result.passed else 'FAIL'} {result.name}: {', '.join(counts) or 'no tests'}"
    bad = [
        (node, *outcome)
        for result in results
        for node, outcome in result.outcomes.items()
        if outcome[0] in ("failed", "crashed")
    ]
    for node, outcome, message, _ in bad[:most]:
        yield f"  {outcome} {node}: {message[:160]}"
    if len(bad) > most:
        yield f"  and {len(bad) - most} more"


def read_summary(path: Path) -> list[Result]:
    """What `--summary` wrote."""
    return [Result(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 where every test of every file ran and none failed."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    own, of_pytest = arguments[:cut], arguments[cut + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*")
    parser.add_argument("--print", action="store_true", help="files are summaries: say what they say")
    parser.add_argument("--summary", type=Path, help="where the outcomes go, as JSON")
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="where pytest's output goes")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--shards", type=int, default=1, help="processes for the tests of one file")
    parser.add_argument("--seconds", type=float, default=3600.0, help="for everything")
    options = parser.parse_args(own)
    if options.print:
        print(*report([r for file in options.files for r in read_summary(Path(file))]), sep="\n")
        return 0

    deadline = time.monotonic() + options.seconds
    work = [(file, (i, options.shards)) for file in options.files for i in range(options.shards)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        results = list(
            pool.map(
                lambda job: run_file(job[0], job[1], of_pytest, deadline, options.log, Path(folder)), work
            )
        )
    print(*report(results), sep="\n")
    if options.summary:
        options.summary.write_text(json.dumps([asdict(r) for r in results], indent=1), encoding="utf-8")
    return int(not all(r.passed for r in results))


if __name__ == "__main__":
    sys.exit(main())
