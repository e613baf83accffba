# SPDX-License-Identifier: Apache-2.0
"""The native modules `_cpu` and `_cuda`: loaded here, or the reason why not; what crosses to them; their errors.

Nothing else imports the two. `cpu` and `cuda` are the modules, or stand-ins that raise the reason on first use::

    if _native.cpu_reason is None:
        _native.call("clip_loss", _native.cpu.contrastive_forward, call, workspace, _native.threads())
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

import torch

if TYPE_CHECKING:
    from vlmkernels import _cpu as cpu
    from vlmkernels import _cuda as cuda

    cpu_reason: str | None
    cuda_reason: str | None

P = ParamSpec("P")
R = TypeVar("R")

#: Numbers of `vk::Dtype` in csrc/core/tensor_view.h.
DTYPE_TAGS = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.int8: 4,
    torch.uint8: 5,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 8,
}

_OPENMP_NAMES = ("libgomp", "libiomp5", "libomp")
_ISA_VARIABLE = "VLMKERNELS_CPU_ISA"


class Missing:
    """Stands in for a native module that could not be loaded: any use raises ImportError with the reason."""

    def __init__(self, name: str, reason: str) -> None:
        self._name = name
        self._reason = reason

    def __getattr__(self, attribute: str) -> NoReturn:
        if attribute.startswith("__"):  # asked by copy, inspect and doctest, which expect this error
            raise AttributeError(attribute)
        raise ImportError(f"vlmkernels.{self._name} is not available: {self._reason}")


def _load(name: str) -> tuple[Any, str | None]:
    full_name = f"vlmkernels.{name}"
    try:
        return importlib.import_module(full_name), None
    except ModuleNotFoundError as error:
        if error.name != full_name:
            raise
        reason = "this installation was built without it"
    except ImportError as error:
        # Whoever forces a level wants that one or an error, not the reference in its place.
        if name == "_cpu" and os.environ.get(_ISA_VARIABLE):
            raise
        reason = str(error)
    return Missing(name, reason), reason


def _mapped_openmp() -> list[str]:
    """OpenMP runtimes in this process, torch's own first."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            lines = maps.read().splitlines()
    except OSError:
        return []
    # address permissions offset device inode path: the path is the sixth field and may contain spaces
    fields = [line.split(maxsplit=5) for line in lines]
    paths = dict.fromkeys(f[5] for f in fields if len(f) == 6)
    found = [path for path in paths if os.path.basename(path).startswith(_OPENMP_NAMES)]
    home = os.path.dirname(os.path.realpath(torch.__file__))
    torchs_own = (home + os.sep, home + ".libs" + os.sep)
    return sorted(found, key=lambda path: not os.path.realpath(path).startswith(torchs_own))


def _join_pool() -> str | None:
    """Gives the CPU kernels torch's threads; the reason why not, otherwise."""
    candidates = _mapped_openmp()
    for path in candidates:
        if cpu.use_openmp(path):
            return None
    if candidates:
        return f"no usable entry points in {', '.join(candidates)}"
    return "torch loaded no OpenMP runtime"


if not TYPE_CHECKING:
    cpu, cpu_reason = _load("_cpu")
    cuda, cuda_reason = _load("_cuda")

#: Why the CPU kernels run on one thread, or None where they share torch's pool.
serial_reason: str | None = cpu_reason if cpu_reason is not None else _join_pool()


def threads() -> int:
    """Threads for one call: `torch.get_num_threads()`, so that `torch.set_num_threads` holds for our kernels too."""
    return torch.get_num_threads()


def dtype_tag(dtype: torch.dtype) -> int:
    """Number of a dtype in the native interface.

    Raises:
        TypeError: no kernel knows this dtype.
    """
    tag = DTYPE_TAGS.get(dtype)
    if tag is None:
        raise TypeError(f"no native kernel knows {dtype}; expected one of {', '.join(map(str, DTYPE_TAGS))}")
    return tag


def address(tensor: torch.Tensor | None) -> int:
    """Address of the first element; 0 for None, and for an empty tensor, which owns no memory."""
    return 0 if tensor is None else tensor.data_ptr()


def stream(device: torch.device) -> int:
    """Handle of torch's current CUDA stream on a device."""
    return int(torch.cuda.current_stream(device).cuda_stream)


#: Kind of device that the kernels of `_cuda` serve. Tests that emulate a device put another here.
CUDA_DEVICE = "cuda"


def cuda_place(tensor: torch.Tensor) -> tuple[int, int]:
    """Device index and stream for a kernel on a tensor: torch's current stream on the tensor's device."""
    return tensor.get_device(), stream(tensor.device)


def call(op: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Calls a native function; its error becomes one of the same kind that names the op.

    Args:
        op: public name without `vk.`.
        function: a function of `cpu` or `cuda`.

    Raises:
        ValueError: a value inside a tensor is out of range.
        RuntimeError: the native function failed otherwise.
    """
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        raise ValueError(f"vk.{op}: {error}") from None
    except RuntimeError as error:
        raise RuntimeError(f"vk.{op}: {error}") from error


@functools.cache
def cuda_device_reason(index: int) -> str | None:
    """Why the kernels of `_cuda` cannot run on a device, found by running one there; None where they can.

    Args:
        index: of the device, as torch counts.
    """
    if cuda_reason is not None:
        return cuda_reason
    count, reason = cuda.devices()
    if reason:
        return reason
    if not torch.cuda.is_available():
        return f"this torch ({torch.__version__}) cannot use CUDA devices"
    if not 0 <= index < min(count, torch.cuda.device_count()):
        return f"there is no CUDA device {index}"
    # More elements than one wave of blocks covers, and no multiple of a block.
    elements, seed, multiplier = 300_007, 12345, 2654435761
    device = torch.device("cuda", index)
    out = torch.zeros(elements, dtype=torch.int32, device=device)
    try:
        cuda.launch_pattern(address(out), elements, seed, index, stream(device))
        values = out.cpu().long() & 0xFFFFFFFF
    except RuntimeError as error:
        major, minor = cuda.device_properties(index).capability
        built_for = ", ".join(cuda.architectures())
        return f"the probe kernel failed on sm_{major}{minor} (built for {built_for}): {error}"
    expected = (torch.arange(elements) * multiplier + seed) & 0xFFFFFFFF
    return None if torch.equal(values, expected) else "the probe kernel wrote wrong values"
