# SPDX-License-Identifier: Apache-2.0
"""Training in several processes: one log, one report, and a signal to one of them stops them all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
OPTIONS = ["--batch-size", "32", "--checkpoint-every", "1e9", "--log-every", "1"]


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [*COMMAND, "-m", "vlmkernels", "train", "--output", str(folder), *OPTIONS, *options]
    return subprocess.Popen(
        command,
        env=environment,
        cwd=folder.parent,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.slow
def test_torchrun_writes_one_log_stops_together_and_resumes(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(folder, "--epochs", "1", "--no-report")
    log = folder / "results.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    # to one of the two trainers only
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGTERM)
    process.communicate(timeout=120)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1)), "two processes wrote the log"
    assert (folder / "checkpoint.safetensors").is_file()

    total = json.loads((folder / "params.json").read_text())["steps"]
    assert len(steps) < total
    process = start(folder, "--epochs", "1", "--no-report", "--resume")
    output = process.communicate(timeout=500)[0]
    assert process.returncode == 0, output
    assert output.count("held-out style") == 1
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines[:-1]] == list(range(1, total + 1))
    assert "evaluation" in lines[-1]
