# SPDX-License-Identifier: Apache-2.0
"""Tiles of the kernels of linear layers: `rows` of activations decide, and for `quantize_rows` the padded width."""

from __future__ import annotations

from ._tables import FULL, HALF, TABLES, Row, Tile


def _tile(rows: int, cols: int, depth: int, warps: int, stages: int) -> Tile:
    return Tile({"ROWS": rows, "COLS": cols, "DEPTH": depth, "BAND": 8}, warps, stages)


_INTERPRETED = Row(_tile(32, 32, 32, 4, 1), arch=0)

#: 256 columns need the 227 KiB of shared memory that sm_90 has, and its `wgmma`.
TABLES["linear"] = (
    _INTERPRETED,
    Row(_tile(32, 64, 16, 8, 1), dtypes=FULL),
    Row(_tile(128, 256, 64, 8, 3), arch=90, dtypes=HALF, least={"rows": 1025}),
    Row(_tile(128, 128, 64, 8, 3), dtypes=HALF, least={"rows": 257}),
    Row(_tile(64, 128, 64, 4, 3), dtypes=HALF, least={"rows": 33}),
    Row(_tile(16, 64, 128, 4, 4), dtypes=HALF),
)

_EIGHT_BITS = (
    _INTERPRETED,
    Row(_tile(128, 256, 128, 8, 3), arch=90, least={"rows": 1025}),
    Row(_tile(128, 128, 128, 8, 3), least={"rows": 257}),
    Row(_tile(64, 128, 128, 4, 3), least={"rows": 33}),
    Row(_tile(16, 64, 128, 4, 4)),
)
TABLES["linear_int8"] = _EIGHT_BITS
#: Its float32 sums beside the tensor core's short ones leave no room for 256 columns.
TABLES["linear_fp8"] = tuple(row for row in _EIGHT_BITS if row.arch != 90)

#: The weight is widened in registers; DEPTH is the group of 4-bit weights.
TABLES["linear_mixed"] = (
    _INTERPRETED,
    Row(_tile(32, 32, 32, 8, 1), dtypes=FULL),
    Row(_tile(128, 64, 64, 8, 3), dtypes=HALF, least={"rows": 257}),
    Row(_tile(64, 64, 64, 4, 3), dtypes=HALF, least={"rows": 17}),
    Row(_tile(16, 64, 64, 4, 4), dtypes=HALF),
)

TABLES["linear_finish"] = (
    Row(Tile({"ROWS": 16, "COLS": 32}), arch=0),
    Row(Tile({"ROWS": 4, "COLS": 128})),
)

TABLES["dequantize"] = (
    Row(Tile({"COLS": 32, "DEPTH": 32}), arch=0),
    Row(Tile({"COLS": 32, "DEPTH": 64})),
)

TABLES["quantize_rows"] = (
    Row(Tile({}), arch=0),
    Row(Tile({}, warps=8), least={"width": 4096}),
    Row(Tile({}, warps=4)),
)
