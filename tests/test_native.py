# SPDX-License-Identifier: Apache-2.0
"""The Python side of the native modules: loading, dtype numbers, addresses, errors."""

from __future__ import annotations

import copy
import importlib
import re
from pathlib import Path

import pytest
import torch

from vlmkernels import _native

HEADER = Path(__file__).parents[1] / "csrc" / "core" / "tensor_view.h"


def test_dtype_tags_are_those_of_the_header() -> None:
    names = {
        "kF32": torch.float32,
        "kBF16": torch.bfloat16,
        "kF16": torch.float16,
        "kF64": torch.float64,
        "kI8": torch.int8,
        "kU8": torch.uint8,
        "kI32": torch.int32,
        "kI64": torch.int64,
        "kBool": torch.bool,
    }
    written = dict(re.findall(r"(k\w+) = (\d+),", HEADER.read_text()))
    assert {names[name]: int(tag) for name, tag in written.items()} == _native.DTYPE_TAGS


def test_an_unknown_dtype_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"no native kernel knows torch\.complex64"):
        _native.dtype_tag(torch.complex64)


def test_address_of_a_slice_is_that_of_its_first_element() -> None:
    x = torch.zeros(4, 3)
    assert _native.address(x[2]) == x.data_ptr() + 2 * 3 * 4
    assert _native.address(None) == 0
    assert _native.address(x[:0]) in (0, x.data_ptr())


def test_threads_follow_torch() -> None:
    torch.set_num_threads(3)
    assert _native.threads() == 3


def test_an_error_of_a_kernel_names_the_op() -> None:
    with pytest.raises(RuntimeError, match=r"^vk\.peak_probe: seconds is -1, expected more than 0$"):
        _native.call("peak_probe", _native.cpu.peak, "float32", -1.0, 1)


def test_a_native_error_keeps_its_cause() -> None:
    with pytest.raises(RuntimeError, match="kind is 'float3'") as raised:
        _native.call("peak_probe", _native.cpu.peak, "float3", 1.0, 1)
    assert isinstance(raised.value.__cause__, _native.cpu.Error)


def test_results_and_keywords_pass_through_call() -> None:
    assert _native.call("peak_probe", _native.cpu.peak, kind="float32", seconds=0.001, threads=1) > 0


def test_a_missing_module_raises_its_reason_on_use() -> None:
    missing = _native.Missing("_cuda", "this installation was built without it")
    with pytest.raises(ImportError, match="_cuda is not available: this installation was built without it"):
        missing.devices()
    with pytest.raises(ImportError, match="built without it"):
        _ = missing.anything
    copy.copy(missing)  # asks for special methods, which must look absent, not broken


def test_a_module_that_was_not_built_is_remembered_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    module, reason = _native._load("_cuda")
    assert reason == "this installation was built without it"
    assert isinstance(module, _native.Missing)


def test_a_module_that_does_not_load_is_remembered_with_the_loaders_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(name: str) -> None:
        raise ImportError("libc.so.6: version `GLIBC_2.99' not found")

    monkeypatch.setattr(importlib, "import_module", broken)
    assert _native._load("_cpu")[1] == "libc.so.6: version `GLIBC_2.99' not found"


def test_an_error_inside_a_module_is_not_taken_for_its_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    def needs_another(name: str) -> None:
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    monkeypatch.setattr(importlib, "import_module", needs_another)
    with pytest.raises(ModuleNotFoundError, match="numpy"):
        _native._load("_cpu")


def test_the_kernels_share_torchs_pool() -> None:
    assert _native.serial_reason is None
    assert _native.cpu.openmp_path() in _native._mapped_openmp()
