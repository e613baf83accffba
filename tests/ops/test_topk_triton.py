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
#: The same of a whole classifier in one launch, whose cosines wait in registers while candidates are scored.
ONE_LAUNCH_SPILL = 64
#: And of rows that are no multiples of 16 elements apart, whose elements are loaded one by one.
ODD_WIDTH_SPILL = 256


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


def classifications(
    arch: int, dtype: torch.dtype, count: int, k: int, width: int = 512, prompts: int = 0
) -> list[Any]:
    """What zero-shot classification of a batch launches."""
    from triton_compile import distinct

    from vlmkernels.ops._topk_triton import zero_shot
    from vlmkernels.ops.triton._launch import recording

    shape = (count, prompts, width) if prompts else (count, width)
    with recording(arch) as launches:
        zero_shot(torch.ones(256, width, dtype=dtype), torch.ones(shape, dtype=dtype), torch.tensor(100.0), k)
    return distinct(launches)


def gradients(arch: int, dtype: torch.dtype, metric: str) -> list[Any]:
    from triton_compile import distinct

    from vlmkernels.ops._topk_triton import topk_similarity_gradients
    from vlmkernels.ops.triton._launch import recording

    queries, database = torch.ones(20, 512, dtype=dtype), torch.ones(100, 512, dtype=dtype)
    indices = torch.zeros(20, 5, dtype=torch.int64)
    with recording(arch) as launches:
        topk_similarity_gradients(torch.ones(20, 5), queries, database, indices, metric, (True, True))
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


def test_few_classes_are_one_launch() -> None:
    assert names(classifications(80, torch.bfloat16, 1000, 5)) == ["zero_shot"]
    assert names(classifications(80, torch.bfloat16, 100, 5, prompts=7)) == [
        "topk_exact",
        "class_mean",
        "zero_shot",
    ]


@each_arch
def test_classification_compiles(arch: int) -> None:
    check_resources(classifications(arch, torch.bfloat16, 1000, 5), arch, ONE_LAUNCH_SPILL)


@each_arch
def test_gradients_compile(arch: int) -> None:
    check_resources(gradients(arch, torch.bfloat16, "cosine"), arch)


@pytest.mark.slow
@each_arch
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_classification_compiles(dtype: torch.dtype, arch: int) -> None:
    for count, k in ((1000, 5), (1000, 16), (100, 1), (5, 5), (3000, 5)):
        check_resources(classifications(arch, dtype, count, k), arch, ONE_LAUNCH_SPILL, SPILLED)
    for prompts in (1, 7, 80, 1000):
        check_resources(classifications(arch, dtype, 100, 5, 500, prompts), arch, ODD_WIDTH_SPILL)


@pytest.mark.slow
@each_arch
@pytest.mark.parametrize("metric", ["dot", "cosine", "l2"])
def test_every_gradient_compiles(metric: str, arch: int) -> None:
    for dtype in FLOATS:
        check_resources(gradients(arch, dtype, metric), arch)


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
    # of the longest rows, which few candidates have, eight pieces are on their way at once
    spill = 192 if width > 2048 else 0
    for dtype in FLOATS:
        check_resources(exact(arch, dtype, width, metric), arch, spill=spill)
    check_resources(exact(arch, torch.float32, width, metric, scaled=True), arch, spill=spill)
