# SPDX-License-Identifier: Apache-2.0
"""Tiles of the attention kernels: `width` is that of the wider head as padded, `rows` its queries (0 if unknown)."""

from __future__ import annotations

from ._tables import FULL, HALF, TABLES, Row, Tile


def _rows(rows: int, keys: int, warps: int, stages: int = 1) -> Tile:
    return Tile({"ROWS": rows, "KEYS": keys}, warps, stages)


#: In the interpreter every operation of a program costs alike, whatever its tile: not too small.
_INTERPRETED = Row(_rows(32, 32, 4), arch=0)

TABLES["attention_forward"] = (
    _INTERPRETED,
    Row(_rows(32, 16, 8), dtypes=FULL, least={"width": 97}),
    Row(_rows(32, 32, 8), dtypes=FULL),
    Row(_rows(64, 32, 8, 2), dtypes=HALF, least={"width": 129}),
    Row(_rows(128, 64, 8, 2), dtypes=HALF, least={"width": 97, "rows": 129}),
    Row(_rows(64, 64, 8, 2), dtypes=HALF, least={"width": 97}),
    Row(_rows(128, 64, 8, 3), dtypes=HALF, least={"rows": 400}),
    Row(_rows(64, 64, 4, 2), dtypes=HALF),
)

TABLES["attention_by_queries"] = (
    _INTERPRETED,
    Row(_rows(32, 16, 8), dtypes=FULL, least={"width": 97}),
    Row(_rows(32, 32, 8), dtypes=FULL),
    Row(_rows(64, 32, 8), dtypes=HALF, least={"width": 129}),
    Row(_rows(64, 64, 8, 2), dtypes=HALF, least={"width": 97}),
    Row(_rows(128, 64, 8, 2), dtypes=HALF, least={"rows": 400}),
    Row(_rows(64, 64, 4, 2), dtypes=HALF),
)

TABLES["attention_by_keys"] = (
    _INTERPRETED,
    Row(_rows(32, 16, 8), dtypes=FULL, least={"width": 129}),
    Row(_rows(32, 32, 8), dtypes=FULL),
    Row(_rows(32, 32, 8), dtypes=HALF, least={"width": 129}),
    Row(_rows(64, 64, 8, 2), dtypes=HALF, least={"width": 97}),
    Row(_rows(64, 128, 8, 2), arch=90, dtypes=HALF, least={"rows": 400}),
    Row(_rows(64, 64, 4, 2), arch=90, dtypes=HALF),
    Row(_rows(32, 64, 4, 2), dtypes=HALF),
)

#: Heads of up to ROWS queries, and an eighth more (16 at least); longer ones take two kernels. Small blocks of keys,
#: because q, u and dq fill the registers; rows that would spill are left out.
TABLES["attention_whole"] = (
    _INTERPRETED,
    Row(_rows(16, 16, 4), dtypes=FULL),
    Row(_rows(16, 16, 8), dtypes=HALF, least={"width": 129}),
    Row(_rows(64, 16, 8), dtypes=HALF, least={"width": 97}),
    Row(_rows(16, 16, 4), dtypes=HALF, least={"width": 65}),
    Row(_rows(256, 16, 8), arch=90, dtypes=HALF, least={"rows": 145}),
    Row(_rows(128, 16, 8), dtypes=HALF, least={"rows": 81}),
    Row(_rows(64, 16, 4), dtypes=HALF),
)

TABLES["attention_bias"] = (
    _INTERPRETED,
    Row(_rows(32, 32, 8), dtypes=FULL),
    Row(_rows(32, 64, 8), dtypes=HALF, least={"width": 97}),
    Row(_rows(64, 64, 8), dtypes=HALF),
)
