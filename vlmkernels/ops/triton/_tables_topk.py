# SPDX-License-Identifier: Apache-2.0
"""Tiles of the top-k kernels: how many `queries` there are decides for the scan, and whether rows are `aligned`."""

from __future__ import annotations

import torch

from ._tables import FULL, HALF, TABLES, Row, Tile


def _scan(rows: int, cols: int, depth: int, split: int, warps: int, stages: int, registers: int = 0) -> Tile:
    blocks = {"BLOCK_M": rows, "BLOCK_N": cols, "BLOCK_K": depth, "SPLIT": split}
    return Tile(blocks, warps, stages, registers)


_MANY = {"queries": 65, "aligned": 1}

# Few queries: the database's rows stream through, and its bytes are the limit. Many: two programs of 128 x 128 share a
# multiprocessor, and while one filters the other multiplies. Rows that are no multiples of 16 elements apart
# may arrive in pieces, past the copies that fill shared memory in the background.
TABLES["topk_scan"] = (
    Row(_scan(16, 32, 16, 2, 4, 1), arch=0),
    Row(_scan(128, 128, 64, 4, 8, 3, registers=128), arch=90, dtypes=HALF, least=_MANY),
    Row(_scan(128, 128, 32, 4, 8, 3, registers=128), dtypes=HALF + FULL, least=_MANY),
    Row(_scan(128, 128, 128, 4, 8, 3, registers=128), dtypes=(torch.int8,), least=_MANY),
    Row(_scan(16, 128, 64, 1, 4, 4), dtypes=HALF + FULL, least={"aligned": 1}),
    Row(_scan(16, 128, 128, 1, 4, 4), least={"aligned": 1}),
    Row(_scan(64, 64, 32, 2, 4, 2)),
)

#: One query after the other against rows in registers.
TABLES["topk_few"] = (
    Row(Tile({"ROWS": 32, "DEPTH": 32}), arch=0),
    Row(Tile({"ROWS": 32, "DEPTH": 128}, warps=4), dtypes=FULL),
    Row(Tile({"ROWS": 16, "DEPTH": 256}, warps=4)),
)

#: WIDTH elements of a row at a time, of which there are at most 8: more would all be loaded first, and not fit.
TABLES["topk_exact"] = (
    Row(Tile({"PAIRS": 64, "WIDTH": 16}), arch=0),
    Row(Tile({"PAIRS": 1, "WIDTH": 512}, warps=4), least={"width": 1025}),
    Row(Tile({"PAIRS": 4, "WIDTH": 128}, warps=4)),
)

TABLES["topk_gradient"] = (
    Row(Tile({"WIDTH": 32}), arch=0),
    Row(Tile({"WIDTH": 256}, warps=4)),
)

#: All classes are one block, their number rounded up to `classes`.
TABLES["zero_shot"] = (
    Row(Tile({"ROWS": 16, "DEPTH": 32, "WIDTH": 16}), arch=0),
    Row(Tile({"ROWS": 16, "DEPTH": 16, "WIDTH": 64}, warps=8, stages=2), dtypes=FULL),
    Row(Tile({"ROWS": 16, "DEPTH": 32, "WIDTH": 64}, warps=8, stages=2), dtypes=HALF, least={"classes": 257}),
    Row(Tile({"ROWS": 16, "DEPTH": 32, "WIDTH": 128}, warps=4, stages=2), dtypes=HALF),
)

#: Prompts times columns of a block.
TABLES["class_mean"] = (
    Row(Tile({"ELEMENTS": 256}), arch=0),
    Row(Tile({"ELEMENTS": 2048}, warps=4)),
)
