# SPDX-License-Identifier: Apache-2.0
"""The Triton engine: one file per family, `_launch.py` that starts kernels, `_tables.py` with their tiles.

Files here import triton at their top, so they are imported only by the function that launches a kernel, once
`ops/_triton.py` has found that triton is here and has something to run on.
"""
