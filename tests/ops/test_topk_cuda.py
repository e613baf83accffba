# SPDX-License-Identifier: Apache-2.0
"""What holds for the CUDA scan of top-k similarity: on the emulator everywhere, on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import emulated_cuda
import pytest
import torch
from torch import Tensor

import vlmkernels as vk
from vlmkernels import _native
from vlmkernels.ops import _topk_cuda, _topk_search
from vlmkernels.ops._topk_cpu import Rows

each_dtype = pytest.mark.parametrize("dtype", _topk_cuda.DTYPES, ids=str)
each_metric = pytest.mark.parametrize("metric", ["dot", "cosine", "l2"])


@pytest.fixture(params=emulated_cuda.DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    # the reference goes first through few rows, so that the scan has some
    monkeypatch.setattr(_topk_search, "FIRST_ROWS", 64)
    return emulated_cuda.use(request.param, monkeypatch)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(_topk_search, "FIRST_ROWS", 64)
    return emulated_cuda.use("emulated", monkeypatch)


def vectors(count: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same(queries: Tensor, database: Tensor, k: int, device: torch.device, **options: Any) -> None:
    """Scores and indices are the reference's, bit for bit."""
    on_device = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    ours = vk.topk_similarity(queries.to(device), database.to(device), k, backend="cuda", **on_device)
    expected = vk.topk_similarity(queries, database, k, backend="reference", **options)
    assert torch.equal(ours[1].cpu(), expected[1])
    torch.testing.assert_close(ours[0].cpu(), expected[0], rtol=0, atol=0, equal_nan=True)


@each_dtype
@each_metric
@pytest.mark.parametrize(
    ("n", "m", "width", "k"),
    [(1, 1, 8, 1), (3, 130, 17, 5), (130, 700, 24, 10), (7, 1000, 64, 100), (2, 300, 8, 300)],
)
def test_scores_and_indices_are_the_references(
    n: int, m: int, width: int, k: int, metric: str, dtype: torch.dtype, device: torch.device
) -> None:
    assert_same(vectors(n, width, dtype), vectors(m, width, dtype, seed=1), k, device, metric=metric)


@each_metric
def test_ties_come_in_ascending_index(metric: str, device: torch.device) -> None:
    database = vectors(10, 16, torch.bfloat16, seed=1).repeat(40, 1)
    assert_same(vectors(5, 16, torch.bfloat16), database, 100, device, metric=metric)


@each_metric
@pytest.mark.parametrize("each_query", [False, True])
def test_masks(each_query: bool, metric: str, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand((20, 500) if each_query else (500,), generator=generator) < 0.1
    if each_query:
        mask[3] = False
    queries, database = vectors(20, 16, torch.float16), vectors(500, 16, torch.float16, seed=1)
    assert_same(queries, database, 40, device, metric=metric, mask=mask)


@each_metric
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 1e-30, 1e30])
def test_special_rows_and_queries(value: float, metric: str, device: torch.device) -> None:
    queries, database = vectors(6, 16, torch.bfloat16), vectors(400, 16, torch.bfloat16, seed=1)
    database[::97] = value
    database[50, 3] = value
    queries[2, 5] = value
    queries[4] = value
    assert_same(queries, database, 9, device, metric=metric)


def test_the_best_rows_come_last(device: torch.device) -> None:
    """Every row beats the limit, so candidates do not fit and chunks are cut."""
    queries = torch.ones(3, 8, dtype=torch.bfloat16)
    database = torch.arange(1, 1001, dtype=torch.float32)[:, None].expand(1000, 8).bfloat16()
    assert_same(queries, database, 4, device)


def test_chunks_are_cut_where_candidates_do_not_fit(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_topk_search, "MOST_CANDIDATES", 64)
    queries = torch.ones(4, 8, dtype=torch.bfloat16)
    database = torch.arange(1, 301, dtype=torch.float32)[:, None].expand(300, 8).bfloat16()
    assert_same(queries, database, 5, device)


def test_few_candidates_pass_the_scan(device: torch.device) -> None:
    queries, database = vectors(16, 32, torch.bfloat16), vectors(1500, 32, torch.bfloat16, seed=1)
    scores, indices = vk.topk_similarity(queries, database[:500], 10, backend="reference")
    part = _topk_search.Search(
        _topk_cuda.CudaScan(), queries.to(device), "dot", None, scores.to(device), indices.to(device)
    )
    (piece,) = _topk_search._pieces([Rows(database.to(device), 1500)], None)
    _, counts, _ = part._candidates(part.block(piece, 500, 1500), part.limit())
    # of twice as many rows as are known some 20 are better than the 10th; the bound adds next to none
    assert 8 * 16 <= counts.sum().item() <= 40 * 16


def test_gradients(device: torch.device) -> None:
    grads = {}
    for backend, where in (("cuda", device), ("reference", torch.device("cpu"))):
        q = vectors(4, 16, torch.bfloat16).to(where).requires_grad_()
        x = vectors(200, 16, torch.bfloat16, seed=1).to(where).requires_grad_()
        scores, _ = vk.topk_similarity(q, x, 5, metric="cosine", backend=backend)
        grads[backend] = [g.cpu() for g in torch.autograd.grad(scores.square().sum(), (q, x))]
    assert all(torch.equal(a, b) for a, b in zip(grads["cuda"], grads["reference"], strict=True))


def test_the_order_of_threads_does_not_matter(emulated: torch.device) -> None:
    queries, database = vectors(130, 24, torch.bfloat16), vectors(600, 24, torch.bfloat16, seed=1)
    forwards = vk.topk_similarity(queries, database, 7, backend="cuda")
    controls = emulated_cuda.controls()
    controls.emulator_run_backwards(1)
    try:
        backwards = vk.topk_similarity(queries, database, 7, backend="cuda")
    finally:
        controls.emulator_run_backwards(0)
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))


@pytest.mark.parametrize(
    ("n", "m", "width", "capacity"), [(1, 3, 8, 1), (129, 131, 24, 7), (3, 400, 64, 400)]
)
def test_nothing_outside_the_tensors_is_touched(
    n: int, m: int, width: int, capacity: int, emulated: torch.device
) -> None:
    queries, database = vectors(n, width, torch.float16), vectors(m, width, torch.float16, seed=1)
    tensors = [
        queries,
        database,
        torch.zeros(n),
        torch.zeros(n),
        torch.ones(m),
        torch.zeros(m),
        torch.zeros(m),
    ]
    q, x, slack, limit, scale, shift, reach = (emulated_cuda.guarded_like(t) for t in tensors)
    candidates = emulated_cuda.guarded_like(torch.full((n, capacity), -1, dtype=torch.int32))
    counts = emulated_cuda.guarded_like(torch.zeros(n, dtype=torch.int32))
    vectors_at = (slack, limit, scale, shift, reach, candidates)
    _native.cuda.topk_scan(
        q.data_ptr(), x.data_ptr(), n, m, 2 * width, False, *(t.data_ptr() for t in vectors_at), capacity,
        counts.data_ptr(), 0, 0,
    )  # fmt: skip
    better = queries.double() @ database.double().T > 0
    assert torch.equal(counts.long(), better.sum(1))
    for i in range(n):
        found = candidates[i][candidates[i] >= 0].tolist()
        assert len(found) == min(capacity, int(counts[i]))
        assert set(found) <= set(better[i].nonzero().flatten().tolist())


def test_refusals(emulated: torch.device) -> None:
    with pytest.raises(NotImplementedError, match=r"bfloat16 and float16, not torch\.float32"):
        vk.topk_similarity(torch.randn(2, 8), torch.randn(9, 8), 1, backend="cuda")
