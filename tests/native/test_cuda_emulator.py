# SPDX-License-Identifier: Apache-2.0
"""The emulator that CUDA kernels are tested on where there is no GPU: its instructions, and the mistakes it finds."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import emulated_cuda
import pytest
import torch

pytestmark = pytest.mark.skipif(
    emulated_cuda.missing() is not None, reason=f"CUDA emulator: {emulated_cuda.missing()}"
)
ENGINE = Path("cuda/engine/device.h")


def test_instructions_and_mistakes(tmp_path: Path) -> None:
    program = tmp_path / "emulator_test"
    folder, csrc = emulated_cuda.EMULATOR, emulated_cuda.ROOT / "csrc"
    flags = ["-std=gnu++20", "-O1", "-Wall", "-Wno-unknown-pragmas", f"-I{folder}/include", f"-I{folder}"]
    sources = [folder / "emulator_test.cpp", folder / "emulator.cpp"]
    command = [emulated_cuda.COMPILER, *flags, f"-I{csrc}", *sources, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr


def test_the_stand_in_has_every_function_of_the_engine() -> None:
    """A function that only the real file has would be one that no test here reaches."""

    def names(path: Path) -> set[str]:
        return set(
            re.findall(
                r"^(?:__device__ __forceinline__ |inline )?\w+ (\w+)\(", path.read_text(), re.MULTILINE
            )
        )

    real = names(emulated_cuda.ROOT / "csrc" / ENGINE)
    emulated = names(emulated_cuda.EMULATOR / "include" / ENGINE)
    assert len(real) > 15
    assert real <= emulated


def test_assembly_is_in_one_file() -> None:
    files = [
        *(emulated_cuda.ROOT / "csrc/cuda").rglob("*.h"),
        *(emulated_cuda.ROOT / "csrc/cuda").rglob("*.cu"),
    ]
    assert [f.name for f in files if re.search(r"\basm\b|__shfl|__ballot", f.read_text())] == ["device.h"]


def test_the_probe_kernel_runs() -> None:
    out = torch.zeros(1000, dtype=torch.int32)
    emulated_cuda.module().launch_pattern(out.data_ptr(), 1000, 7, 0, 0)
    expected = (torch.arange(1000) * 2654435761 + 7) & 0xFFFFFFFF
    assert torch.equal(out.long() & 0xFFFFFFFF, expected)
