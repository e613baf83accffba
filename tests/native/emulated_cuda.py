# SPDX-License-Identifier: Apache-2.0
"""Builds `_cuda` from the same sources with g++, its kernels on the emulator beside this file, and imports it.

What a test calls is the binding, the launcher and the kernel that a GPU runs; only `cuda_runtime.h` and
`csrc/cuda/engine/device.h` are others.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import mmap
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from vlmkernels import _native

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent / "cuda_emulator"
COMPILER = os.environ.get("CXX") or shutil.which("g++")

#: Built modules stay here, under a name that says what they were built from.
CACHE = ROOT / "build" / "cuda_emulator"


def missing() -> str | None:
    """Why the emulated module cannot be built here, or None."""
    if sys.platform != "linux":
        return "the emulator needs Linux"
    if COMPILER is None:
        return "needs a C++ compiler"
    return None if importlib.util.find_spec("pybind11") else "needs pybind11"


def _sources() -> list[Path]:
    return [
        EMULATOR / "emulator.cpp",
        ROOT / "csrc/core/error.cpp",
        *sorted((ROOT / "csrc/cuda").rglob("*.cu")),
        *sorted((ROOT / "csrc/bindings").glob("cuda_*.cpp")),
    ]


def _flags() -> list[str]:
    import pybind11

    return [
        *("-std=gnu++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
        '-DVK_CUDA_ARCHITECTURE_NAMES="emulated"',
        # registers the same C++ types as the real module, and may live in one process with it
        '-DPYBIND11_COMPILER_TYPE="vlmkernels_emulated"',
        *(f"-I{folder}" for folder in (EMULATOR / "include", EMULATOR, ROOT / "csrc")),
        *(f"-isystem{folder}" for folder in (pybind11.get_include(), sysconfig.get_path("include"))),
    ]


def _digest(paths: list[Path]) -> str:
    """Of the compiler and of everything in these files, headers included."""
    digest = hashlib.sha256(repr([COMPILER, sys.version, *_flags()]).encode())
    headers = (path for folder in (EMULATOR, ROOT / "csrc") for path in folder.rglob("*.h"))
    for path in [*paths, *sorted(headers)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str], target: Path) -> Path:
    """`target`, which the command writes; another process may write it, too."""
    if target.exists():
        return target
    unfinished = target.with_suffix(f".{os.getpid()}")
    done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    os.replace(unfinished, target)
    return target


def _compile(source: Path) -> Path:
    # the bindings convert arguments and take long to optimise
    level = "-O0" if "bindings" in source.parts else "-O2"
    command = [str(COMPILER), "-x", "c++", *_flags(), level, "-c", str(source)]
    return _run(command, CACHE / f"{source.stem}_{_digest([source])}.o")


@functools.cache
def build() -> Path:
    """Path of the built module; half a minute the first time, and less after a change."""
    sources = _sources()
    target = CACHE / _digest(sources) / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(_compile, sources))
    return _run([str(COMPILER), "-shared", *map(str, objects)], target)


@functools.cache
def module() -> ModuleType:
    """The emulated `_cuda`."""
    path = str(build())
    loader = importlib.machinery.ExtensionFileLoader("emulated._cuda", path)
    spec = importlib.util.spec_from_file_location("emulated._cuda", path, loader=loader)
    assert spec is not None
    loaded = importlib.util.module_from_spec(spec)
    loader.exec_module(loaded)
    return loaded


@functools.cache
def controls() -> Any:
    """The emulator's own functions, through ctypes: `emulator_run_backwards` and the counters of emulator.cpp."""
    library = ctypes.CDLL(str(build()))
    for name in ("emulator_matrix_loads", "emulator_matrix_conflicts"):
        getattr(library, name).restype = ctypes.c_int64
    return library


#: Where the kernels of `_cuda` are tried: on the emulator wherever it can be built, and on a GPU where there is one.
DEVICES = ("emulated", pytest.param("cuda", marks=pytest.mark.gpu))


def use(device: str, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Device of the tensors for one of `DEVICES`; with "emulated" `vlmkernels` runs the emulated module on the CPU, and
    where that cannot be built the test is skipped."""
    if device != "emulated":
        return torch.device(device)
    reason = missing()
    if reason is not None:
        pytest.skip(f"CUDA emulator: {reason}")
    monkeypatch.setattr(_native, "cuda", module())
    monkeypatch.setattr(_native, "cuda_reason", None)
    monkeypatch.setattr(_native, "CUDA_DEVICE", "cpu")
    monkeypatch.setattr(_native, "cuda_place", lambda tensor: (0, 0))
    return torch.device("cpu")


_regions: list[mmap.mmap] = []  # tensors do not own them


def guarded_like(x: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor whose last byte lies just before a page that nobody may touch; its values are those of x."""
    count = x.numel() * x.element_size()
    if count == 0:
        return x.contiguous()
    pages = -(-count // mmap.PAGESIZE) + 1
    region = mmap.mmap(-1, pages * mmap.PAGESIZE)
    _regions.append(region)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    guard = start + (pages - 1) * mmap.PAGESIZE
    assert libc.mprotect(guard, mmap.PAGESIZE, 0) == 0, ctypes.get_errno()
    data = (ctypes.c_char * count).from_address(guard - count)
    return torch.frombuffer(data, dtype=x.dtype).view(x.shape).copy_(x)
