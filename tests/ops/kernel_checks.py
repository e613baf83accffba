# SPDX-License-Identifier: Apache-2.0
"""What the tests of every CPU kernel share: processes of their own, guard pages, and what a call issues. No tests."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import run_program
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmkernels import _native
from vlmkernels.ops import _library

Implementations = Mapping[Any, Callable[..., Any]]

needs_cpu_kernels = pytest.mark.skipif(
    _native.cpu_reason is not None, reason=f"vlmkernels._cpu: {_native.cpu_reason}"
)


def isa_levels() -> list[str]:
    """The instruction sets of this machine, none where there are no kernels."""
    return _native.cpu.isa_levels() if _native.cpu_reason is None else []


def run(script: str, *arguments: Any, **environment: str) -> str:
    """Output of a Python program in a process of its own, which sees this folder and the package under test."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return run_program(script, *arguments, timeout=900, PYTHONPATH=path, **environment).stdout


def saved_at(isa: str, script: str, folder: Path) -> dict[str, Any]:
    """What a program saves under the path that is its argument, run at one instruction set.

    The dictionary's "isa" says which one really ran.
    """
    run(script, folder / "results.pt", VLMKERNELS_CPU_ISA=isa)
    saved: dict[str, Any] = torch.load(folder / "results.pt")
    assert saved["isa"] == isa
    return saved


def assert_undisturbed_by_threads(calls: Sequence[Callable[[], Any]], repetitions: int = 3) -> None:
    """Each call gives the bits that it gives alone, again and again, in a Python thread beside the others'."""
    expected = [call() for call in calls]
    with ThreadPoolExecutor(len(calls)) as pool:
        repeated = list(pool.map(lambda call: [call() for _ in range(repetitions)], calls))
    for alone, results in zip(expected, repeated, strict=True):
        for result in results:
            pairs = zip(tree_leaves(result), tree_leaves(alone), strict=True)
            assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


# What a call issues.

ALLOCATIONS_AND_VIEWS = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "view", "as_strided",
    "expand", "select", "slice", "unsqueeze", "squeeze", "transpose", "t", "permute", "reshape", "flatten",
    "_unsafe_view", "unbind",
}  # fmt: skip


class Inside(TorchDispatchMode):
    """Notes our own ops, and every op that runs inside their implementations.

    Attributes:
        ours: the ops of ours that were called.
        inside: names of the ops inside; "reshape with a copy" where one did not give a view.
    """

    def __init__(self, implementations: Implementations) -> None:
        super().__init__()
        self.ours: list[Any] = []
        self.inside: list[str] = []
        self._implementations = implementations
        self._depth = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != _library.NAMESPACE:
            result = func(*args, **(kwargs or {}))
            if self._depth:
                name = func._schema.name.removeprefix("aten::")
                copies = name in ("reshape", "flatten") and result.data_ptr() != args[0].data_ptr()
                self.inside.append(f"{name} with a copy" if copies else name)
            return result
        self.ours.append(func)
        self._depth += 1
        try:
            with self:  # straight to the implementation: calling the op again would only bring us back here
                return self._implementations[func](*args)
        finally:
            self._depth -= 1


# Guard pages.

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_regions: list[mmap.mmap] = []  # what the tensors lie in


def guarded_empty(shape: Any, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor whose last byte lies just before a page that must not be touched."""
    count = torch.empty(shape, dtype=dtype, device="meta").numel() * dtype.itemsize
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    pages = -(-count // mmap.PAGESIZE) + 1
    region = mmap.mmap(-1, pages * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    if _libc.mprotect(start + (pages - 1) * mmap.PAGESIZE, mmap.PAGESIZE, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    _regions.append(region)
    raw = (ctypes.c_char * count).from_address(start + (pages - 1) * mmap.PAGESIZE - count)
    return torch.frombuffer(raw, dtype=dtype).view(shape)


def guarded(x: Any) -> Any:
    """A contiguous copy of a tensor that ends at such a page; anything else as it is."""
    return guarded_empty(x.shape, x.dtype).copy_(x) if isinstance(x, Tensor) else x


def release_guarded() -> None:
    """Gives the memory of all guarded tensors back; none may be used any more."""
    _regions.clear()


def touch_a_guard_page() -> None:
    """Writes one byte behind a guarded tensor, which ends the process."""
    x = guarded(torch.zeros(100))
    ctypes.memset(x.data_ptr() + x.nbytes, 0, 1)


class GuardedAllocations(TorchDispatchMode):
    """What the implementations of our own ops allocate ends at such a page too; `count` says how often.

    An op of ours that `implementations` lacks is a KeyError.
    """

    def __init__(self, implementations: Implementations) -> None:
        super().__init__()
        self.count = 0
        self._implementations = implementations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == _library.NAMESPACE:
            with self:
                return self._implementations[func](*args)
        result = func(*args, **(kwargs or {}))
        allocates = func._schema.name in ("aten::empty", "aten::new_empty", "aten::empty_like")
        if not allocates or not result.is_contiguous() or not result.numel():
            return result
        self.count += 1
        return guarded_empty(result.shape, result.dtype)
