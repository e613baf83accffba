# SPDX-License-Identifier: Apache-2.0
"""Where the Triton tests of a family run: on the interpreter (TRITON_INTERPRET=1, cpu tensors) or on a GPU.

The files `interpreted_<family>.py` hold them. pytest does not collect them by name, because a process is either one
that interprets kernels or one that does not; `test_triton.py` runs each in a process of its own, and on a GPU again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from vlmkernels.ops import _triton

DEVICE = "cpu" if _triton.INTERPRETED else "cuda"

#: The interpreter multiplies bfloat16 wrongly (kernels widen it there, see `_launch.widens`) and rounds to it by
#: truncation, so it is tried on a GPU.
DTYPES = (
    (torch.float32, torch.float16) if _triton.INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
)


def run_family(family: str, *, interpret: bool, timeout: float = 600, marks: str = "not slow") -> None:
    """The tests of `interpreted_<family>.py` in another process; fails with their output, or if there were none."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1" if interpret else "0"}
    run_tests(environment, timeout, "-m", marks, Path(__file__).with_name(f"interpreted_{family}.py"))


def run_contract(family: str, timeout: float = 600) -> None:
    """The family's contract, interpreted: its tests that have "triton" among their parameters."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    run_tests(environment, timeout, "-k", "triton", *sorted(Path(__file__).parent.glob(f"test_{family}*.py")))


def run_tests(environment: dict[str, str], timeout: float, *arguments: str | Path) -> None:
    """pytest in another process; fails with its output, or if there was no test."""
    options = ["-q", "-x", "--no-header", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, f"{result.stdout[-6000:]}\n{result.stderr[-2000:]}"
    assert " passed" in result.stdout, result.stdout[-2000:]


#: Bytes of shared memory that a program may take, by architecture.
SHARED_OF = {80: 163 * 1024, 90: 227 * 1024}
#: The compiler that the tables of tiles were made with. Others give registers out differently: what they spill is
#: printed, and says nothing about the kernels.
TABLES_MADE_WITH = "3.7."


def check_resources(
    launches: list[Any], arch: int, spill: int = 0, by_kernel: dict[str, int] | None = None
) -> None:
    """Every recorded launch compiles for sm_<arch>, fits its memory, and spills no more than it may.

    Args:
        launches: as recorded.
        arch: 80 or 90.
        spill: bytes of a thread's registers that may live in memory.
        by_kernel: the same by name, for launches whose registers are limited.
    """
    import triton
    from triton_compile import compiled

    assert launches
    known = triton.__version__.startswith(TABLES_MADE_WITH)
    for launch in launches:
        found = compiled(launch, arch)
        limit = launch.options.get("maxnreg", 255)
        allowed = spill if by_kernel is None or limit == 255 else by_kernel[found.name]
        print(f"sm_{arch} {found.name} {launch.options}: {found.registers} registers, ", end="")
        print(f"{found.spilled} bytes spilled, {found.shared} shared")
        assert found.registers <= limit, f"{found} {launch.options} {launch.constants}"
        assert found.shared <= SHARED_OF[arch], f"{found} {launch.options} {launch.constants}"
        assert found.spilled <= allowed or not known, f"{found} {launch.options} {launch.constants}"
