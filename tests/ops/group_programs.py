# SPDX-License-Identifier: Apache-2.0
"""Running a function in several processes that form a gloo group. Not tests: what the tests of groups share."""

from __future__ import annotations

import datetime
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _enter(
    rank: int, size: int, port: int, function: Callable[..., Any], arguments: tuple, results: Any
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # gloo would look the host's name up, which need not lead back to this machine
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    timeout = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timeout)
    try:
        results.put((rank, function(rank, size, *arguments), None))
    except Exception:
        results.put((rank, None, traceback.format_exc()))
    finally:
        dist.destroy_process_group()


def start_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> tuple[list[Any], Any]:
    """Starts `function(rank, size, *arguments)` in `size` processes: the processes, and the queue of their answers.

    `function` must live in a module that a new process can import by name, so in none of the test modules.
    """
    context = mp.get_context("spawn")
    results = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_enter, args=(rank, size, port, function, arguments, results))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    return processes, results


def run_group(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(rank, size, *arguments)` in `size` processes; what each returned, in the order of the ranks.

    A function returns plain Python or NumPy values: tensors would travel through shared memory that their process takes
    with it.
    """
    processes, results = start_ranks(size, function, *arguments)
    answers: list[Any] = []
    deadline = time.monotonic() + 2 * TIMEOUT
    try:
        while len(answers) < size:
            try:
                answers.append(results.get(timeout=1))
            except queue.Empty:
                # A process that failed before its program began will never answer.
                ended = {rank: p.exitcode for rank, p in enumerate(processes) if p.exitcode}
                assert not ended, f"ranks ended without an answer, by exit code: {ended}"
                assert time.monotonic() < deadline, f"{size - len(answers)} of {size} ranks do not answer"
        errors = [error for _, _, error in answers if error is not None]
        assert not errors, errors[0]
    finally:
        for process in processes:
            process.join(timeout=10 if len(answers) == size else 0)
            if process.is_alive():
                process.kill()
    return [value for _, value, _ in sorted(answers, key=lambda answer: answer[0])]
