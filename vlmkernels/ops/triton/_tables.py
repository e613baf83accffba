# SPDX-License-Identifier: Apache-2.0
"""Which tile a kernel runs with: committed data, chosen by architecture, dtype and shape, never by timing.

At most `MOST_ROWS` rows a kernel. A row holds from its architecture on, for its dtypes, and where every fact is at
least what it says; the first that holds is taken, so the special ones stand first. Rows of architecture 0 are for the
interpreter: small tiles, so that small tests have several of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

MOST_ROWS = 8

HALF = (torch.float16, torch.bfloat16)
FULL = (torch.float32,)


@dataclass(frozen=True)
class Tile:
    """One configuration of a kernel.

    Attributes:
        blocks: values of its block-size parameters by name.
        warps: warps of a program.
        stages: buffers of its pipelined loop.
        registers: what a thread may take at most, 0 for the compiler's choice. 128 of 8 warps let two programs share
            a multiprocessor.
    """

    blocks: Mapping[str, int]
    warps: int = 4
    stages: int = 1
    registers: int = 0

    def __getitem__(self, name: str) -> int:
        return self.blocks[name]


@dataclass(frozen=True)
class Row:
    """A tile and when it is taken.

    Attributes:
        tile: the configuration.
        arch: 80 for sm_80 and what follows, 90, ...; 0 for the interpreter alone.
        dtypes: of the operands; empty for all.
        least: facts by name that must be at least so large.
    """

    tile: Tile
    arch: int = 80
    dtypes: tuple[torch.dtype, ...] = ()
    least: Mapping[str, int] = field(default_factory=dict)

    def holds(self, arch: int, dtype: torch.dtype, facts: Mapping[str, int]) -> bool:
        """Whether this row is for such a call."""
        if arch < self.arch or (arch == 0) != (self.arch == 0):
            return False
        if self.dtypes and dtype not in self.dtypes:
            return False
        return all(facts[name] >= bound for name, bound in self.least.items())


def _logits(m: int, n: int, k: int, split: int = 1) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "SPLIT": split, "GROUP": 8}


# Tiles of a contrastive loss whose products are formed in the kernel (half precision) or read (float32, and where the
# forward kept them). Two blocks of 128 x 128 fit a multiprocessor: while one is in its epilogue the other multiplies.
_PRODUCT = (
    Row(Tile(_logits(128, 128, 64, 4), warps=8, stages=3, registers=128), arch=90, dtypes=HALF),
    Row(Tile(_logits(128, 128, 32, 4), warps=8, stages=3, registers=128), arch=80, dtypes=HALF),
    Row(Tile(_logits(32, 32, 16, 2)), arch=0),
)
_READ = (
    Row(Tile(_logits(64, 64, 16), warps=4, stages=1), arch=80),
    # NumPy adds one after the other, a GPU in a tree: longer sums would be less accurate than they are there.
    Row(Tile(_logits(16, 16, 16)), arch=0),
)

TABLES: dict[str, tuple[Row, ...]] = {
    "contrastive_statistics": _PRODUCT,
    "contrastive_statistics_read": _READ,
    "contrastive_gradients": _PRODUCT,
    "contrastive_gradients_read": _READ,
    "contrastive_sigmoid": _PRODUCT,
    "contrastive_sigmoid_read": _READ,
    "contrastive_combine": (
        Row(Tile({"PARTS": 32, "BLOCK": 32}, warps=4), arch=80),
        Row(Tile({"PARTS": 4, "BLOCK": 32}), arch=0),
    ),
}


def pick(kernel: str, arch: int, dtype: torch.dtype, **facts: int) -> Tile:
    """The tile of a kernel.

    Args:
        kernel: its name in `TABLES`.
        arch: 80, 90, ...; 0 for the interpreter.
        dtype: of the operands.
        facts: what the kernel's rows ask for.
    """
    for row in TABLES[kernel]:
        if row.holds(arch, dtype, facts):
            return row.tile
    raise ValueError(f"_tables: no row of {kernel} for sm_{arch}, {dtype}, {facts}")
