# SPDX-License-Identifier: Apache-2.0
"""Compiling Triton kernels without a GPU: what host code would launch becomes a cubin, and its resources are read.

    with recording(90) as launches:
        vk.clip_loss(image, text, 10.0, backend="triton")      # on cpu tensors, see `as_if_on_a_gpu`
    for launch in distinct(launches):
        assert compiled(launch, 90).spilled == 0

Not for processes with TRITON_INTERPRET=1: there kernels cannot be compiled.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vlmkernels.ops import _triton
from vlmkernels.ops.triton._launch import Launch

ARCHITECTURES = (80, 90)

TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
    getattr(torch, "float8_e4m3fn", None): "fp8e4nv",
}  # fmt: skip


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers of a thread, bytes of its stack (spills live there), shared memory."""

    name: str
    registers: int
    spilled: int
    shared: int


@contextlib.contextmanager
def as_if_on_a_gpu(monkeypatch: Any) -> Iterator[None]:
    """`backend="triton"` accepts cpu tensors although kernels are not interpreted: for use around `recording`."""
    with monkeypatch.context() as patch:
        patch.setattr(_triton, "reasons", lambda call: [])
        yield


def compiled(launch: Launch, arch: int) -> Resources:
    """Compile what was recorded, specialised as a real launch would be, and read what the cubin takes."""
    result = _compile(launch, arch)
    return resources(result.metadata.name, result.asm["cubin"], result.metadata.shared)


def compiled_assembly(launch: Launch, arch: int) -> str:
    """The PTX of what was recorded."""
    text: str = _compile(launch, arch).asm["ptx"]
    return text


def _compile(launch: Launch, arch: int) -> Any:
    source = ASTSource(
        launch.kernel, signature=signature(launch), constexprs=constants(launch), attrs=attributes(launch)
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """One of every kind that would be compiled by itself."""
    kinds = {}
    for launch in launches:
        specialised = (signature(launch), constants(launch), attributes(launch), launch.options)
        kinds.setdefault((launch.kernel.__name__, *map(repr, specialised)), launch)
    return list(kinds.values())


def signature(launch: Launch) -> dict[str, Any]:
    """Types by name; a tuple of integers (strides) is a tuple of types."""
    types = {name: _type(launch, name, value) for name, value in launch.arguments.items()}
    ordered = {name: types.get(name, "constexpr") for name in launch.kernel.arg_names}
    missing = set(ordered) - set(types) - set(launch.constants)
    assert not missing, f"{launch.kernel.__name__} is launched without {missing}"
    return ordered


def constants(launch: Launch) -> dict[Any, Any]:
    """By name, or by place where an element of a tuple is one."""
    fixed: dict[Any, Any] = {}
    for name, value in launch.arguments.items():
        types = _type(launch, name, value)
        if isinstance(value, tuple):
            place = launch.kernel.arg_names.index(name)
            fixed |= {(place, i): value[i] for i, kind in enumerate(types) if kind == "constexpr"}
        elif types == "constexpr":
            fixed[name] = value
    return {**fixed, **launch.constants}


def attributes(launch: Launch) -> dict[tuple[int, ...], list[list[Any]]]:
    """Which arguments are multiples of 16, as the launcher finds: it decides how wide loads are."""
    divisible = {}
    for place, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if _unspecialized(launch, name):
            continue
        elements = (
            {(place, i): x for i, x in enumerate(value)} if isinstance(value, tuple) else {(place,): value}
        )
        for at, element in elements.items():
            number = element.data_ptr() if isinstance(element, torch.Tensor) else element
            if isinstance(number, int) and not isinstance(number, bool) and number % 16 == 0:
                divisible[at] = [["tt.divisibility", 16]]
    return divisible


def _unspecialized(launch: Launch, name: str) -> bool:
    """Whether the kernel asks that a value of this argument makes no kernel of its own."""
    parameters = launch.kernel.params
    return any(parameter.name == name and parameter.do_not_specialize for parameter in parameters)


def _type(launch: Launch, name: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_type(launch, name, element) for element in value)
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if value is None or isinstance(value, str):
        return "constexpr"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        if value == 1 and not _unspecialized(launch, name):
            return "constexpr"
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def resources(name: str, cubin: bytes, shared: int) -> Resources:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", text)
    assert found, text
    return Resources(name, int(found[1]), int(found[2]) + int(found[3]), shared)
