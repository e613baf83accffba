# SPDX-License-Identifier: Apache-2.0
"""What the package says about the machine: `vk.backends()` and the content of `vlmkernels info`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import vlmkernels as vk
from vlmkernels import _native, diagnostics

NAMES = ["reference", "cpu", "cuda", "triton"]


def test_backends_lists_all_four_in_order() -> None:
    assert [status.name for status in vk.backends()] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_backend_is_available_or_says_why_not(name: str) -> None:
    status = vk.backends()[name]
    assert bool(status.detail) == status.available
    assert bool(status.reason) != status.available


def test_the_reference_serves_every_op() -> None:
    assert vk.backends()["reference"].ops == diagnostics.OPS
    assert set(diagnostics.OPS) <= set(vk.__all__)


def test_the_cpu_backend_names_its_instruction_set() -> None:
    status = vk.backends()["cpu"]
    assert status.available, status.reason
    assert status.detail.startswith(_native.cpu.isa() + ", ")
    assert "clip_loss" in status.ops


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_reason_is_that() -> None:
    reason = vk.backends()["cuda"].reason
    assert reason in (
        "this installation was built without it",
        "no CUDA driver is installed",
        "there is no CUDA device",
        f"this torch ({torch.__version__}) cannot use CUDA devices",
    ) or reason.startswith("the driver is too old: ")


@pytest.mark.gpu
def test_the_probe_kernel_runs_on_every_device() -> None:
    for index in range(torch.cuda.device_count()):
        assert _native.cuda_device_reason(index) is None


def test_text_of_backends_has_each_name_and_reason() -> None:
    backends = vk.backends()
    lines = str(backends).splitlines()
    for status in backends:
        first = next(line for line in lines if line.startswith(status.name))
        assert (status.detail if status.available else status.reason) in first


def test_info_can_be_written_as_json() -> None:
    content = diagnostics.info()
    assert json.loads(json.dumps(content)).keys() == content.keys()
    assert content["versions"]["torch"] == torch.__version__.split("+")[0] or content["versions"][
        "torch"
    ] == str(torch.__version__)
    assert content["threads"]["torch threads"] == torch.get_num_threads()


def test_info_names_the_openmp_library_in_use() -> None:
    path = diagnostics.info()["threads"]["OpenMP library"]
    assert Path(path).name.startswith(("libgomp", "libiomp5", "libomp"))
    assert path in Path("/proc/self/maps").read_text()


def test_text_of_info_has_every_section_and_key() -> None:
    content = diagnostics.info()
    lines = diagnostics.format_info(content).splitlines()
    for section, values in content.items():
        start = lines.index(section)
        for line, key in zip(lines[start + 1 :], values, strict=False):
            assert line.startswith(f"  {key} ")
