# SPDX-License-Identifier: Apache-2.0
"""Top-k similarity on Triton, without a GPU: what a search launches, and that it compiles for both architectures.

Values are tested in `interpreted_topk.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_device import check_resources

from vlmkernels.ops import _topk_search, _triton
from vlmkernels.ops._topk_cpu import Rows

pytestmark = pytest.mark.skipif(
    _triton.missing is not None or _triton.INTERPRETED,
    reason="needs triton, and kernels that are not interpreted",
)

each_arch = pytest.mark.parametrize("arch", [80, 90])
#: One of every class of the tables.
QUERIES = (1000, 32, 1)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
#: Bytes of a thread's registers that the scan may spill, which is limited to 128 so that two programs share a
#: multiprocessor: 0 in the loop that multiplies, what a candidate needs in the part that few tiles reach.
SPILLED = {"topk_scan_kernel": 96}


def rows_of(dtype: torch.dtype, count: int = 4096, width: int = 512) -> Rows:
    codes = torch.zeros(count, width, dtype=dtype)
    if dtype != torch.int8:
        return Rows(codes, count)
    ones = torch.ones(count)
    return Rows(codes, count, vectors=torch.zeros(count, width), norm=ones, scale=ones, residual=ones)


def scans(
    arch: int, dtype: torch.dtype, n: int, *, mask: bool = False, allowed: bool = False, width: int = 512
) -> list[Any]:
    """What scanning some rows launches on an architecture: products of the first rows, and the scan."""
    from triton_compile import distinct

    from vlmkernels.ops.triton._launch import recording
    from vlmkernels.ops.triton.topk import TritonScan

    k, count = 10, 4096
    queries = torch.ones(n, width, dtype=torch.float32 if dtype == torch.int8 else dtype)
    centre = torch.ones(width) if dtype == torch.int8 else None
    scores, labels = torch.zeros(n, k), torch.zeros(n, k, dtype=torch.int64)
    seen = torch.ones(n, count, dtype=torch.bool) if mask else None
    every = torch.ones(count, dtype=torch.bool) if allowed else None
    with recording(arch) as launches:
        part = _topk_search.Search(TritonScan(), queries, "cosine", centre, scores, labels)
        part.run(_topk_search._pieces([rows_of(dtype, count, width)], every), seen)
    return distinct(launches)


def exact(arch: int, dtype: torch.dtype, width: int, metric: str, scaled: bool = False) -> list[Any]:
    from triton_compile import distinct

    from vlmkernels.ops.triton._launch import recording
    from vlmkernels.ops.triton.topk import TritonScan

    scale = torch.ones(9) if scaled else None
    pairs = torch.zeros(100, dtype=torch.int64), torch.zeros(100, dtype=torch.int64)
    rows = torch.ones(9, width, dtype=torch.int8 if scaled else dtype)
    with recording(arch) as launches:
        TritonScan().exact_scores(torch.ones(5, width, dtype=dtype), rows, scale, *pairs, metric)
    return distinct(launches)


def names(launches: list[Any]) -> list[str]:
    return [launch.kernel.__name__.removesuffix("_kernel") for launch in launches]


def test_few_queries_read_the_rows_once_and_more_scan_them() -> None:
    # recorded launches leave whatever memory held, so that some rows may seem to be among the best
    assert names(scans(80, torch.bfloat16, 1))[0] == "topk_few"
    first, scan = scans(80, torch.bfloat16, 1000)
    assert names([first, scan]) == ["topk_scan", "topk_scan"]
    assert first.arguments["dots"] is not None and scan.arguments["dots"] is None


def test_offsets_are_64_bits_wide() -> None:
    """Rows further than 2**31 elements in: their numbers are widened before they are multiplied."""
    from triton_compile import compiled_assembly

    (scan, *_) = scans(80, torch.bfloat16, 1000)
    assert "mul.wide.s32" in compiled_assembly(scan, 80) or "mad.wide.s32" in compiled_assembly(scan, 80)


@each_arch
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8], ids=str)
def test_the_scan_of_many_queries_compiles(dtype: torch.dtype, arch: int) -> None:
    check_resources(scans(arch, dtype, 1000), arch, by_kernel=SPILLED)


@each_arch
def test_exact_scores_round_products_and_sums_by_themselves(arch: int) -> None:
    from triton_compile import compiled_assembly

    launches = exact(arch, torch.bfloat16, 512, "cosine")
    check_resources(launches, arch)
    assembly = compiled_assembly(launches[0], arch)
    assert "mul.rn.f64" in assembly or "mul.f64" in assembly
    assert "fma.rn.f64" not in assembly


@pytest.mark.slow
@each_arch
@pytest.mark.parametrize("n", QUERIES)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
def test_every_scan_compiles(dtype: torch.dtype, n: int, arch: int) -> None:
    for options in ({}, {"mask": True}, {"allowed": True}, {"width": 500}, {"width": 501}):
        print(options)
        check_resources(scans(arch, dtype, n, **options), arch, by_kernel=SPILLED)


@pytest.mark.slow
@each_arch
@pytest.mark.parametrize("metric", ["dot", "cosine", "l2"])
@pytest.mark.parametrize("width", [1, 100, 512, 1500, 4096])
def test_every_exact_score_compiles(width: int, metric: str, arch: int) -> None:
    for dtype in FLOATS:
        check_resources(exact(arch, dtype, width, metric), arch)
    check_resources(exact(arch, torch.float32, width, metric, scaled=True), arch)
