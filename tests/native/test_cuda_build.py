# SPDX-License-Identifier: Apache-2.0
"""What nvcc made of the kernels: no registers in memory, for any architecture."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess

import pytest

from vlmkernels import _native


def _cuobjdump() -> str | None:
    """NVIDIA's own, or the one that triton carries."""
    triton = importlib.util.find_spec("triton")
    folders = ["/usr/local/cuda/bin"]
    if triton is not None and triton.origin is not None:
        folders.append(os.path.join(os.path.dirname(triton.origin), "backends", "nvidia", "bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join([os.environ["PATH"], *folders]))


CUOBJDUMP = _cuobjdump()

pytestmark = [
    pytest.mark.skipif(_native.cuda_reason is not None, reason=f"vlmkernels._cuda: {_native.cuda_reason}"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="needs cuobjdump"),
]


@pytest.fixture(scope="module")
def resources() -> dict[tuple[str, str], dict[str, int]]:
    """Registers, stack and local memory of each kernel, by (architecture, name)."""
    command = [str(CUOBJDUMP), "--dump-resource-usage", str(_native.cuda.__file__)]
    environment = {**os.environ, "PATH": f"{os.path.dirname(str(CUOBJDUMP))}:{os.environ['PATH']}"}
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    found: dict[tuple[str, str], dict[str, int]] = {}
    architecture = name = ""
    for line in text.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (\w+):", line):
            name = match[1]
        elif "REG:" in line:
            found[architecture, name] = {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", line)}
    return found


def test_kernels_are_built_for_both_architectures(resources: dict[tuple[str, str], dict[str, int]]) -> None:
    names = {architecture: {n for a, n in resources if a == architecture} for architecture, _ in resources}
    assert set(names) == {"sm_80", "sm_90a"}
    assert names["sm_80"] == names["sm_90a"]
    assert sum("attention" in name for name in names["sm_80"]) == 20  # two passes, two dtypes, five widths


def test_no_kernel_spills_registers(resources: dict[tuple[str, str], dict[str, int]]) -> None:
    spilled = {key: use for key, use in resources.items() if use["STACK"] or use["LOCAL"]}
    assert spilled == {}
