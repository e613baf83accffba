# SPDX-License-Identifier: Apache-2.0
"""Settings of every test: seeds, threads, the gpu marker, a header that says what is being tested, and the recording of
what systems were seen to do."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import time
from collections.abc import Callable, Iterator

import pytest
import torch

import vlmkernels
from vlmkernels import _native
from vlmkernels._files import write_text_atomically
from vlmkernels.systems import Claim, claims_file, recorded_claims

SEED = 20210226  # the day the CLIP paper was submitted

# Interpreters that tests start must not take the source tree, where pytest is called, for the installed package that
# this one has (from Python 3.11 on).
os.environ.setdefault("PYTHONSAFEPATH", "1")

_gpu_tests_passed = 0


def pytest_report_header() -> list[str]:
    isa = _native.cpu.isa() if _native.cpu_reason is None else f"none ({_native.cpu_reason})"
    return [
        f"vlmkernels: {vlmkernels.__file__}",
        f"torch: {torch.__version__}, {torch.get_num_threads()} threads, cpu kernels: {isa}",
    ]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    without_gpu = pytest.mark.skip(reason="there is no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(without_gpu)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    global _gpu_tests_passed
    if report.when == "call" and report.passed and "gpu" in report.keywords:
        _gpu_tests_passed += 1


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run of the GPU tests in which none ran on a GPU has shown nothing, and fails."""
    if session.config.option.markexpr == "gpu" and _gpu_tests_passed == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print("\nFAILED: -m gpu was asked for, but no test ran on a GPU")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-claims",
        action="store_true",
        help="write what the systems' behavioural tests see into vlmkernels/results/",
    )


@pytest.fixture
def record_claim(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`record_claim(system=, claim=, expected=, seen=, holds=, seeds=)` states what a behavioural test saw.

    It is written only under --record-claims. One system's claims are told apart by test and claim; a second run
    replaces the first.
    """
    began = time.perf_counter()

    def record(*, system: str, claim: str, expected: str, seen: str, holds: bool, seeds: list[int]) -> None:
        new = Claim(
            system=system,
            claim=claim,
            expected=expected,
            seen=seen,
            holds=bool(holds),
            seeds=tuple(seeds),
            seconds=round(time.perf_counter() - began, 1),
            test=request.node.nodeid,
        )
        if not request.config.getoption("--record-claims"):
            return
        others = [c for c in recorded_claims(system) if (c.test, c.claim) != (new.test, new.claim)]
        claims = sorted([*others, new], key=lambda c: (c.test, c.claim))
        path = claims_file(system)
        path.parent.mkdir(exist_ok=True)
        rows = [dataclasses.asdict(c) for c in claims]
        write_text_atomically(path, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")

    return record
