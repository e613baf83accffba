# SPDX-License-Identifier: Apache-2.0
"""What is available on this machine: `vk.backends()` and the content of `vlmkernels info`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from vlmkernels import _native
from vlmkernels._version import __version__
from vlmkernels.ops import _triton, dispatch

#: Public ops that choose between backends, in the order in which the documentation has them.
OPS = (
    "clip_loss",
    "siglip_loss",
    "multi_positive_loss",
    "info_nce",
    "linear_cross_entropy",
    "attention",
    "attention_varlen",
    "quantized_linear",
    "linear",
    "topk_similarity",
    "zero_shot",
)

_PACKAGES = ("torch", "numpy", "triton", "tokenizers", "safetensors", "pillow")


@dataclass
class BackendStatus:
    """One backend on this machine.

    Attributes:
        name: as in `backend=`.
        available: whether it can serve calls here at all.
        detail: what it runs on (instruction set, devices), empty where it is not available.
        reason: why it is not available, empty where it is.
        ops: the ops that have a kernel in this backend; whether it serves a given call depends on the call.
    """

    name: str
    available: bool
    detail: str = ""
    reason: str = ""
    ops: tuple[str, ...] = ()

    def __str__(self) -> str:
        state = f"available: {self.detail}" if self.available else f"not available: {self.reason}"
        kernels = ", ".join(self.ops) if self.ops else "no op yet"
        return f"{self.name:<10} {state}\n{'':<10} ops: {kernels}"


@dataclass
class Backends:
    """All backends, printable; `backends()["cpu"]` is one of them."""

    statuses: dict[str, BackendStatus] = field(default_factory=dict)

    def __getitem__(self, name: str) -> BackendStatus:
        return self.statuses[name]

    def __iter__(self) -> Iterator[BackendStatus]:
        return iter(self.statuses.values())

    def __str__(self) -> str:
        return "\n".join(str(status) for status in self)

    __repr__ = __str__


def backends() -> Backends:
    """What is available here and why the others are not.

    Asks the GPU where there is one: a small kernel runs on each device, so this starts CUDA.

    Example:
        >>> vk.backends()["reference"].available
        True
    """
    statuses = (
        BackendStatus("reference", True, detail="plain PyTorch, every device and dtype", ops=OPS),
        _cpu_status(),
        _cuda_status(),
        _triton_status(),
    )
    return Backends({status.name: status for status in statuses})


def info() -> dict[str, dict[str, Any]]:
    """Versions, processor, threads, CUDA and backends, as plain values that `json` can write."""
    return {
        "versions": _versions(),
        "cpu": _cpu_info(),
        "threads": _thread_info(),
        "cuda": _cuda_info(),
        "backends": {
            status.name: {
                "available": status.available,
                "detail": status.detail or status.reason,
                "ops": list(status.ops),
            }
            for status in backends()
        },
    }


def format_info(content: dict[str, dict[str, Any]]) -> str:
    """`info()` as lines of text, one section after the other."""
    lines = []
    for section, values in content.items():
        lines.append(section)
        for key, value in values.items():
            lines.append(f"  {key:<22} {_as_text(value)}")
    return "\n".join(lines)


def _as_text(value: Any) -> str:
    if isinstance(value, dict):
        state = "available" if value["available"] else "not available"
        return f"{state}: {value['detail']}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _ops_of(backend: str) -> tuple[str, ...]:
    return tuple(op for op in OPS if backend in dispatch.registered_backends(op))


def _cpu_status() -> BackendStatus:
    ops = _ops_of("cpu")
    if _native.cpu_reason is not None:
        return BackendStatus("cpu", False, reason=_native.cpu_reason, ops=ops)
    count = _native.threads()
    pool = f"{count} thread{'s' if count != 1 else ''}"
    if _native.serial_reason is not None:
        pool = f"1 thread, since {_native.serial_reason}"
    return BackendStatus("cpu", True, detail=f"{_native.cpu.isa()}, {pool}", ops=ops)


def _device_reasons() -> dict[int, str | None]:
    return {index: _native.cuda_device_reason(index) for index in range(torch.cuda.device_count())}


def _cuda_status() -> BackendStatus:
    ops = _ops_of("cuda")
    reasons = _device_reasons()
    if not reasons:
        return BackendStatus("cuda", False, reason=_native.cuda_device_reason(0) or "", ops=ops)
    usable = [index for index, reason in reasons.items() if reason is None]
    if not usable:
        text = "; ".join(f"device {index}: {reason}" for index, reason in reasons.items())
        return BackendStatus("cuda", False, reason=text, ops=ops)
    detail = "; ".join(
        f"device {index}: {torch.cuda.get_device_name(index)}" + (f" ({reason})" if reason else "")
        for index, reason in reasons.items()
    )
    return BackendStatus("cuda", True, detail=detail, ops=ops)


def _triton_status() -> BackendStatus:
    ops = _ops_of("triton")
    if _triton.missing is not None:
        return BackendStatus("triton", False, reason=_triton.missing, ops=ops)
    version = _version("triton")
    if _triton.INTERPRETED:
        return BackendStatus("triton", True, detail=f"triton {version}, interpreted on the CPU", ops=ops)
    if not torch.cuda.is_available():
        return BackendStatus(
            "triton", False, reason=f"triton {version} is installed, but no GPU is usable", ops=ops
        )
    reasons = {index: _triton.device_reason(index) for index in range(torch.cuda.device_count())}
    names = sorted({torch.cuda.get_device_name(index) for index, reason in reasons.items() if reason is None})
    if not names:
        text = "; ".join(f"device {index}: {reason}" for index, reason in reasons.items())
        return BackendStatus("triton", False, reason=text, ops=ops)
    return BackendStatus("triton", True, detail=f"triton {version} on {', '.join(names)}", ops=ops)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, Any]:
    return {
        "vlmkernels": __version__,
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "system": platform.platform(),
    }


def _cpu_info() -> dict[str, Any]:
    if _native.cpu_reason is not None:
        return {"module": f"not available: {_native.cpu_reason}"}
    return {
        "processor": _native.cpu.cpu_brand() or platform.processor() or platform.machine(),
        "instruction set": _native.cpu.isa(),
        "levels here": _native.cpu.isa_levels(),
    }


def _thread_info() -> dict[str, Any]:
    pool = _native.cpu.openmp_path() if _native.cpu_reason is None else None
    return {
        "processors": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "OpenMP library": pool or f"none: {_native.serial_reason}",
    }


def _cuda_info() -> dict[str, Any]:
    if _native.cuda_reason is not None:
        return {"module": f"not available: {_native.cuda_reason}", "torch built for": torch.version.cuda}
    count, reason = _native.cuda.devices()
    content: dict[str, Any] = {
        "built with": _dotted(_native.cuda.runtime_version()),
        "built for": _native.cuda.architectures(),
        "driver": _dotted(_native.cuda.driver_version()),
        "torch built for": torch.version.cuda,
        "devices": count if not reason else f"none: {reason}",
    }
    for index in range(count):
        device = _native.cuda.device_properties(index)
        content[f"device {index}"] = (
            f"{device.name}, sm_{device.capability[0]}{device.capability[1]}, {device.memory_bytes / 2**30:.1f} GiB, "
            f"{device.multiprocessors} multiprocessors"
        )
    return content


def _dotted(version: tuple[int, int]) -> str | None:
    return None if version == (0, 0) else f"{version[0]}.{version[1]}"
