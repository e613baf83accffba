# SPDX-License-Identifier: Apache-2.0
"""The Triton engine: the tables, the reasons, and every family's own tests on the interpreter and on a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from triton_device import run_contract, run_family

import vlmkernels as vk
from vlmkernels.ops import _triton
from vlmkernels.ops.dispatch import Call

FAMILIES = sorted(
    path.stem.removeprefix("interpreted_") for path in Path(__file__).parent.glob("interpreted_*.py")
)

needs_triton = pytest.mark.skipif(_triton.missing is not None, reason=str(_triton.missing))
needs_interpreter = pytest.mark.skipif(
    _triton.missing is not None or metadata.version("triton").startswith(("3.5.", "3.6.")),
    reason=_triton.missing
    or "the interpreter of triton before 3.7 needs a conversion that NumPy has given up",
)


@needs_interpreter
@pytest.mark.parametrize("family", FAMILIES)
def test_family_on_the_interpreter(family: str) -> None:
    run_family(family, interpret=True)


@needs_interpreter
@pytest.mark.slow
def test_contract_of_the_losses_on_the_interpreter() -> None:
    run_contract("contrastive")


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_family_on_the_gpu(family: str) -> None:
    run_family(family, interpret=False)


def test_an_old_triton_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    for version, wanted in (
        ("3.4.0", "triton 3.4.0 does not compile the kernels"),
        ("3.5.1", None),
        ("3.10.0", None),
    ):
        monkeypatch.setattr(metadata, "version", lambda name, version=version: version)
        reason = _triton._why_missing()
        assert reason is None if wanted is None else str(reason).startswith(wanted)


def test_without_triton_it_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "missing", "triton is not installed")
    assert _triton.reasons(Call("cuda", torch.float16)) == ["triton is not installed"]
    status = vk.backends()["triton"]
    assert not status.available and status.reason == "triton is not installed"


@needs_triton
@pytest.mark.skipif(_triton.INTERPRETED, reason="kernels are interpreted here")
def test_cpu_tensors_are_for_the_interpreter() -> None:
    assert _triton.reasons(Call("cpu", torch.float32)) == [
        "it serves cuda tensors, and cpu ones only under TRITON_INTERPRET=1"
    ]
    assert _triton.reasons(Call("mps", torch.float32)) == ["it serves cuda tensors, not mps"]


def test_importing_the_package_does_not_import_triton() -> None:
    # torch imports it here and there, so an interpreter that cannot find it has to do
    program = (
        "import sys; sys.modules['triton'] = None; import vlmkernels as vk; print(vk.backends()['triton'])"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": ":".join(sys.path)})


@needs_triton
def test_tables_are_small_and_say_what_to_do_everywhere() -> None:
    from vlmkernels.ops.triton import _tables

    for kernel, rows in _tables.TABLES.items():
        assert 0 < len(rows) <= _tables.MOST_ROWS, kernel
        assert any(row.arch == 0 for row in rows), f"{kernel} has no tile for the interpreter"
        general = [row for row in rows if row.arch <= 80 and not row.least and row.arch]
        dtypes = set(_tables.HALF + _tables.FULL)
        covered = set().union(*(row.dtypes or dtypes for row in general))
        assert covered in (dtypes, set(_tables.HALF)), f"{kernel} has no tile for {dtypes - covered}"
        for row in rows:
            assert all(size & (size - 1) == 0 for size in row.tile.blocks.values()), kernel
