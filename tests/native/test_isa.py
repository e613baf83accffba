# SPDX-License-Identifier: Apache-2.0
"""Instruction-set levels: each one this machine has, forced in a fresh process, gives the same answers."""

from __future__ import annotations

import pytest
from programs import result_of, run_program

from vlmkernels import _native

pytestmark = pytest.mark.skipif(
    _native.cpu_reason is not None, reason=f"no CPU kernels: {_native.cpu_reason}"
)

LEVELS = _native.cpu.isa_levels() if _native.cpu_reason is None else []


def test_portable_is_the_lowest_level() -> None:
    assert LEVELS[0] == "portable"


@pytest.mark.parametrize("level", LEVELS)
def test_a_forced_level_is_the_one_that_runs(level: str) -> None:
    isa, rates = result_of(
        """
import json
from vlmkernels import _native
rates = {kind: _native.cpu.peak(kind, 0.005, 1) for kind in ("float32", "bfloat16", "int8", "read")}
print(json.dumps([_native.cpu.isa(), rates]))
""",
        VLMKERNELS_CPU_ISA=level,
        OMP_NUM_THREADS="1",
    )
    assert isa == level
    assert all(rate > 0.01 for rate in rates.values()), rates


def test_an_empty_value_forces_nothing() -> None:
    isa = result_of(
        "import json; from vlmkernels import _native; print(json.dumps(_native.cpu.isa()))",
        VLMKERNELS_CPU_ISA="",
    )
    assert isa == LEVELS[-1]


@pytest.mark.parametrize("module", ["_native", "_cpu"])
def test_an_unknown_level_is_an_error_that_lists_the_known_ones(module: str) -> None:
    done = run_program(f"from vlmkernels import {module}", check=False, VLMKERNELS_CPU_ISA="avx9000")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "ImportError: VLMKERNELS_CPU_ISA=avx9000 is not a known level; expected portable, x86-64-v2, avx2, avx512 or "
        "avx512_bf16"
    )


@pytest.mark.skipif(LEVELS[-1:] == ["avx512_bf16"], reason="this machine has every level")
def test_a_level_above_the_machines_is_an_error() -> None:
    done = run_program("from vlmkernels import _native", check=False, VLMKERNELS_CPU_ISA="avx512_bf16")
    assert done.returncode != 0
    assert f"but the highest level of this machine is {LEVELS[-1]}" in done.stderr
