# SPDX-License-Identifier: Apache-2.0
"""The parts of csrc/core that Python cannot reach, tested in C++: built and run here."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("g++")
AARCH64_COMPILER = shutil.which("aarch64-linux-gnu-g++")


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_parallel_for(tmp_path: Path) -> None:
    program = tmp_path / "parallel_test"
    sources = [
        ROOT / "tests/native/parallel_test.cpp",
        ROOT / "csrc/core/parallel.cpp",
        ROOT / "csrc/core/error.cpp",
    ]
    run(COMPILER, "-std=gnu++20", "-O1", "-fopenmp", f"-I{ROOT / 'csrc'}", *sources, "-o", program, "-ldl")
    libraries = run("ldd", program).splitlines()
    runtime = next(line.split()[2] for line in libraries if "omp" in line)
    assert run(program, runtime) == "ok\n"


@pytest.mark.skipif(AARCH64_COMPILER is None, reason="needs aarch64-linux-gnu-g++")
def test_core_and_the_portable_kernels_compile_for_aarch64(tmp_path: Path) -> None:
    sources = [
        *(ROOT / "csrc/core").glob("*.cpp"),
        *(ROOT / "csrc/cpu").glob("*.cpp"),
        ROOT / "csrc/cpu/isa/portable.cpp",
    ]
    assert len(sources) > 4
    for source in sources:
        flags = ["-std=gnu++20", "-O1", "-Wall", "-Werror", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/cpu'}"]
        run(AARCH64_COMPILER, *flags, "-fsyntax-only", source)
