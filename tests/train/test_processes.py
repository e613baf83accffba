# SPDX-License-Identifier: Apache-2.0
"""Training in several processes: one log, one report, and a signal to one of them stops them all."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
OPTIONS = ["--batch-size", "64", "--checkpoint-every", "1e9", "--log-every", "1"]


def start(folder: Path, *options: str, processes: int = 2) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [*COMMAND, str(processes), "-m", "vlmkernels", "train", "--output", str(folder)]
    command += [*OPTIONS, *options]
    return subprocess.Popen(
        command,
        env=environment,
        cwd=folder.parent,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


LEAVE = """
import glob
from vlmkernels.train import distributed

def threads():
    return [open(name).read().strip() for name in glob.glob("/proc/self/task/*/comm")]

with distributed.join() as processes:
    assert processes.any(True) and processes.from_all(3) == [3]
    assert any("gloo" in name for name in threads()), threads()
assert not any("gloo" in name for name in threads()), threads()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are listed by /proc")
def test_the_groups_threads_end_before_the_interpreter() -> None:
    # one that is left may abort a process that has done all its work
    environment = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    result = subprocess.run(
        [sys.executable, "-c", LEAVE],
        env=os.environ | environment | {"GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


CONVOLUTIONS = {
    "embed_dim": 32,
    "vision": {
        "image_size": 16,
        "width": 32,
        "patch_size": 8,
        "heads": 2,
        "layers": 1,
        "stem_channels": [8, 16, 32],
        "stem_strides": [2, 2, 2],
    },
    "text": {"layers": 1, "width": 32, "heads": 2, "context_length": 16},
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_any_number_of_processes_gives_the_same_run(tmp_path: Path, shapes_shards: Path) -> None:
    """Batch norm in the stem, unequal parts of the batch, shards: losses and metrics are those of one process."""
    options = [
        "--data",
        str(shapes_shards),
        "--model-options",
        json.dumps(CONVOLUTIONS),
        "--batch-size",
        "20",
    ]
    options += ["--epochs", "8", "--vocab-size", "560", "--precision", "float32", "--val-share", "0.2"]
    runs = {}
    for processes in (1, 2, 3):
        folder = tmp_path / str(processes)
        output = start(folder, *options, "--no-report", processes=processes).communicate(timeout=300)[0]
        assert (folder / "model.safetensors").is_file(), output
        runs[processes] = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    steps, one = len(runs[1]) - 1, runs[1]
    assert steps == 16
    for run in (runs[2], runs[3]):
        for wanted, found in zip(one[:-1], run[:-1], strict=True):
            # The log has five decimals. Rounding differs, and AdamW turns the sign of a tiny gradient into a step.
            assert found["loss"] == pytest.approx(wanted["loss"], abs=2e-3), (wanted, found)
            assert found["logit_scale"] == pytest.approx(wanted["logit_scale"], abs=2e-3)
        assert [row["loss"] for row in run[:3]] == pytest.approx([row["loss"] for row in one[:3]], abs=2e-5)
        assert run[-1]["evaluation"] == one[-1]["evaluation"]
