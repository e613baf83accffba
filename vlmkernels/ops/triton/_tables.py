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
    """One configuration: values of a kernel's block-size parameters by name, warps, and pipeline stages."""

    blocks: Mapping[str, int]
    warps: int = 4
    stages: int = 1

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


TABLES: dict[str, tuple[Row, ...]] = {}


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
