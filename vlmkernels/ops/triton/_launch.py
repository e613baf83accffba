# SPDX-License-Identifier: Apache-2.0
"""How a Triton kernel is started: device, architecture, tile, and a recorder for tests that compile without a GPU.

Conventions of all kernels here. Sizes and strides are plain ints in elements; row numbers become int64 before they are
multiplied by a stride, so offsets are 64 bits wide. Scalars that arithmetic depends on travel as float32 tensors or
are pinned to float32 in the kernel. Absent tensors are None. Grids have one dimension, which may reach 2**31 - 1.
Outputs are written by one program each and partial results are added up in a fixed order: same input, same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.ops._triton import INTERPRETED

from ._tables import Tile, pick

LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Launch:
    """A call of a kernel as the recorder sees it.

    Attributes:
        kernel: the jitted function.
        arguments: run-time arguments by name.
        constants: compile-time arguments by name, block sizes included.
        options: of the compiler: warps, stages, limits.
        grid: number of programs.
    """

    kernel: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]
    grid: int


_recorded: list[Launch] | None = None
_recorded_arch = 0


@contextlib.contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """Launches are noted instead of run, with the tiles of `arch` (80, 90, ...): outputs stay as allocated.

    For tests: host code runs on cpu tensors, and what it would have started can be compiled without a GPU.
    """
    global _recorded, _recorded_arch
    _recorded, _recorded_arch = [], arch
    try:
        yield _recorded
    finally:
        _recorded = None


def architecture(x: Tensor) -> int:
    """80 for sm_80, 90, ... of a tensor's device; 0 in the interpreter."""
    if _recorded is not None:
        return _recorded_arch
    if INTERPRETED:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def tile_of(kernel: str, x: Tensor, dtype: torch.dtype | None = None, **facts: int) -> Tile:
    """The committed tile of a kernel for operands like x (of another dtype, where given)."""
    return pick(kernel, architecture(x), x.dtype if dtype is None else dtype, **facts)


def widens(dtype: torch.dtype) -> bool:
    """Whether a kernel must multiply in float32 what it could multiply as it is: the interpreter has no bfloat16."""
    return INTERPRETED and dtype == torch.bfloat16


def float32_precision() -> str:
    """tl.dot's `input_precision` for float32 operands: TF32 only where torch allows it for its own products."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def cdiv(a: int, b: int) -> int:
    """Blocks of b that cover a."""
    return -(-a // b)


def launch(
    kernel: Any,
    grid: int,
    *arguments: Any,
    tile: Tile,
    exact_float: bool = False,
    **constants: Any,
) -> None:
    """Start a kernel on the current stream of its tensors' device.

    Args:
        kernel: a `triton.jit` function.
        grid: number of programs; 0 does nothing.
        arguments: run-time arguments in the kernel's order: tensors (None = absent), ints, floats.
        tile: block sizes, warps, stages.
        exact_float: multiplications and additions are not contracted, each rounds by itself.
        constants: compile-time arguments beside the tile's.
    """
    if grid == 0:
        return
    if grid >= 2**31:
        raise ValueError(f"vlmkernels: a grid of {grid} programs, the limit is 2**31 - 1")
    constants = {**tile.blocks, **constants}
    # fusion is said, not left to triton, whose default is to change
    options: dict[str, Any] = {
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": not exact_float,
    }
    if tile.registers:
        options["maxnreg"] = tile.registers
    if _recorded is not None:
        names = kernel.arg_names[: len(arguments)]
        _recorded.append(Launch(kernel, dict(zip(names, arguments, strict=True)), constants, options, grid))
        return
    if INTERPRETED:
        kernel[(grid,)](*arguments, **constants)
        return
    device = next(x.device for x in arguments if isinstance(x, Tensor))
    with torch.cuda.device(device):
        kernel[(grid,)](*arguments, **constants, **options)


@triton.jit
def tile_position(pid, blocks_m, blocks_n, GROUP: tl.constexpr):
    """Program number -> (block of rows, block of columns), in bands of GROUP row blocks, so that the operands of
    programs that run together stay in L2."""
    band = pid // (GROUP * blocks_n)
    first = band * GROUP
    height = tl.minimum(blocks_m - first, GROUP)
    within = pid % (GROUP * blocks_n)
    return first + within % height, within // height
