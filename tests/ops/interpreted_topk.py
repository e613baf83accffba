# SPDX-License-Identifier: Apache-2.0
"""Top-k similarity on Triton, on the interpreter or a GPU: the reference's bits, for every way a search can go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, fill
from largest_tensor import LargestTensor
from oracle import assert_as_accurate, assert_typically_as_accurate
from torch import Tensor
from triton_device import DEVICE, DTYPES

import vlmkernels as vk
from vlmkernels.ops import _index_store, _topk_search, flat_index

# the interpreter's NumPy, where numbers leave float32
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

METRICS = ("dot", "cosine", "l2")
each_metric = pytest.mark.parametrize("metric", METRICS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
#: One query and few of them, whose scores are all written down; a tile, and several tiles each way.
SHAPES = [(1, 1, 1, 1), (1, 300, 33, 7), (3, 70, 17, 70), (5, 200, 24, 5), (20, 170, 40, 30)]


@pytest.fixture(autouse=True)
def few_first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks in a database of some hundred rows."""
    monkeypatch.setattr(_topk_search, "FIRST_ROWS", 32)
    monkeypatch.setattr(_topk_search, "MOST_GROWTH", 3)


def vectors(count: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def assert_same(queries: Tensor, database: Tensor, k: int, **options: Any) -> None:
    """Scores and indices are the reference's, bit for bit."""
    ours = vk.topk_similarity(queries, database, k, backend="triton", **options)
    on_cpu = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in options.items()}
    expected = vk.topk_similarity(queries.cpu(), database.cpu(), k, backend="reference", **on_cpu)
    assert torch.equal(ours[1].cpu(), expected[1])
    torch.testing.assert_close(ours[0].cpu(), expected[0], rtol=0, atol=0, equal_nan=True)


@each_metric
@each_dtype
@pytest.mark.parametrize(("n", "m", "d", "k"), SHAPES)
def test_scores_and_indices_are_the_references(n, m, d, k, dtype, metric):
    assert_same(vectors(n, d, dtype), vectors(m, d, dtype, seed=1), k, metric=metric)


def test_bfloat16_is_multiplied():
    for n in (2, 9):
        assert_same(
            vectors(n, 24, torch.bfloat16), vectors(90, 24, torch.bfloat16, seed=1), 4, metric="cosine"
        )


@pytest.mark.parametrize("n", [0, 6])
def test_no_queries_and_no_width(n):
    scores, indices = vk.topk_similarity(vectors(n, 3), vectors(40, 3), 4, backend="triton")
    assert scores.shape == indices.shape == (n, 4)
    assert_same(vectors(n, 0), vectors(40, 0), 40)


@each_metric
@pytest.mark.parametrize("n", [2, 6])
def test_equal_scores_come_in_ascending_index(n, metric):
    generator = torch.Generator().manual_seed(1)
    database = torch.randint(-2, 3, (7, 5), generator=generator).float().repeat(30, 1).to(DEVICE)
    queries = torch.randint(-2, 3, (n, 5), generator=generator).float().to(DEVICE)
    assert_same(queries, database, 50, metric=metric)


@each_metric
@pytest.mark.parametrize("shape", ["shared", "per query"])
@pytest.mark.parametrize("n", [2, 9])
def test_masks(n, shape, metric):
    for density in (0.0, 0.02, 0.5):
        generator = torch.Generator().manual_seed(2)
        mask = torch.rand((130,) if shape == "shared" else (n, 130), generator=generator) < density
        assert_same(vectors(n, 16), vectors(130, 16, seed=1), 8, metric=metric, mask=mask.to(DEVICE))


def test_a_transposed_mask():
    mask = torch.rand(200, 9, generator=torch.Generator().manual_seed(2)) < 0.3
    assert_same(vectors(9, 16), vectors(200, 16, seed=1), 8, mask=mask.to(DEVICE).t())


@each_metric
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 1e-30, 1e30])
@pytest.mark.parametrize("n", [3, 6])
def test_special_rows_and_queries(n, value, metric):
    queries, database = vectors(n, 16), vectors(110, 16, seed=1)
    database[::47] = value
    database[50, 3] = value
    queries[2, 5] = value
    queries[0] = value
    assert_same(queries, database, 9, metric=metric)


@pytest.mark.parametrize("n", [3, 6])
def test_sums_that_leave_float32_on_the_way(n):
    """-2e38 - 2e38 + 3e38 is a score, though float32 goes through -inf."""
    database = torch.tensor([[-2e19, -2e19, 3e19], [-3e19, -3e19, -3e19], [-1e19, -1e19, 0.0]]).repeat(30, 1)
    assert_same(torch.full((n, 3), 1e19).to(DEVICE), database.to(DEVICE), 31)


@each_metric
@pytest.mark.parametrize("kind", ["constant", "huge", "tiny"])
def test_kinds_of_values(kind, metric):
    assert_same(fill(kind, (6, 16)).to(DEVICE), fill(kind, (90, 16), seed=1).to(DEVICE), 9, metric=metric)


@each_metric
def test_near_ties_below_the_resolution_of_the_scan(metric):
    large = vectors(1, 32) * 1000
    signs = torch.tensor([1.0, -1.0], device=DEVICE).repeat(16)
    database = large.repeat_interleave(2, 1)[:, :32] + vectors(200, 32, seed=1) * 1e-2
    assert_same(signs.expand(6, -1) * torch.arange(1, 7, device=DEVICE)[:, None], database, 20, metric=metric)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("n", [2, 6])
def test_any_strides(n, layout):
    queries, database = vectors(n, 24), vectors(100, 24, seed=1)
    ours = vk.topk_similarity(LAYOUTS[layout](queries), LAYOUTS[layout](database), 7, backend="triton")
    expected = vk.topk_similarity(
        LAYOUTS[layout](queries).contiguous(), LAYOUTS[layout](database).contiguous(), 7, backend="triton"
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("n", [3, 6])
def test_the_best_rows_come_last_and_find_no_room(n, monkeypatch):
    """Every row beats the limit, so that candidates do not fit."""
    monkeypatch.setattr(_topk_search, "MOST_CANDIDATES", 16 * n)
    database = torch.arange(1.0, 201.0, device=DEVICE)[:, None].expand(200, 8)
    assert_same(torch.ones(n, 8, device=DEVICE), database, 4)


def test_one_query_that_crowds_is_looked_at_alone(monkeypatch):
    queries, database = vectors(7, 8), vectors(300, 8, seed=1)
    queries[3] = 0.0  # all rows tie
    monkeypatch.setattr(_topk_search, "MOST_CANDIDATES", 7 * 60)
    assert_same(queries, database, 5)


def test_blocks_of_queries_and_of_scores_do_not_change_bits(monkeypatch):
    monkeypatch.setattr(_topk_search, "_QUERIES", 7)
    monkeypatch.setattr(_topk_search, "MOST_SCORES", 64)
    for n in (3, 20):
        assert_same(vectors(n, 16), vectors(150, 16, seed=1), 6, metric="l2")


def test_rows_wider_than_a_block_are_scored_by_torch(monkeypatch):
    from vlmkernels.ops.triton import topk

    monkeypatch.setattr(topk, "WIDEST", 16)
    assert_same(vectors(6, 24), vectors(100, 24, seed=1), 5, metric="cosine")


def test_more_than_any_list_in_registers_is_found():
    assert_same(vectors(2, 4), vectors(4500, 4, seed=1), 4200)


@each_metric
def test_few_rows_are_scored_exactly(metric):
    """k (1 + ln(M / k)) of rows in random order would be the fewest; chunks of thrice what is known bring three k."""
    rows = [_topk_search.Rows(vectors(300, 64, torch.float16, seed=1), 300)]
    from vlmkernels.ops.triton.topk import TritonScan

    *_, stats = _topk_search.search(TritonScan(), vectors(8, 64, torch.float16), rows, 4, metric)
    assert 8 * 4 <= stats[0].item() <= 8 * 4 * 10


# Gradients


def gradients(queries, database, metric, dtype, backend, **options):
    q, x = queries.to(dtype).requires_grad_(), database.to(dtype).requires_grad_()
    scores, indices = vk.topk_similarity(q, x, 5, metric=metric, backend=backend, **options)
    weight = torch.arange(1, 6, device=scores.device) * torch.where(indices < 0, 0.0, 1.0)
    return torch.autograd.grad((scores.masked_fill(indices < 0, 0.0).square() * weight).sum(), (q, x))


@each_metric
@each_dtype
@pytest.mark.parametrize("n", [2, 20])
def test_gradients_are_as_accurate_as_the_references(n, dtype, metric):
    queries, database = vectors(n, 40, dtype), vectors(30, 40, dtype, seed=1)
    ours = gradients(queries, database, metric, dtype, "triton")
    eager = gradients(queries, database, metric, dtype, "reference")
    exact = gradients(queries.double(), database.double(), metric, torch.float64, "reference")
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        assert mine.dtype == dtype
        assert_as_accurate(mine, theirs, truth)


@each_metric
def test_gradients_of_missing_rows_zero_vectors_and_strides(metric):
    queries, database = LAYOUTS["every_other"](vectors(6, 10)), LAYOUTS["transposed"](vectors(30, 10, seed=1))
    queries[1], database[4] = 0.0, 0.0
    mask = torch.rand(6, 30, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.15
    mask[:, 4] = True
    mask[3] = False
    ours, expected = (
        gradients(queries, database, metric, torch.float32, b, mask=mask) for b in ("triton", "reference")
    )
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.is_contiguous() and mine.isfinite().all()
        # sums of at most 30 terms, rounded once here
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def test_a_row_without_a_number_that_nobody_found_has_no_gradient():
    queries, database = vectors(3, 10), vectors(30, 10, seed=1)
    database[7] = float("nan")
    for grad in gradients(queries, database, "cosine", torch.float32, "triton"):
        assert grad.isfinite().all()


def test_only_wanted_gradients_are_taken():
    queries, database = vectors(3, 10).requires_grad_(), vectors(30, 10, seed=1)
    vk.topk_similarity(queries, database, 2, backend="triton")[0].sum().backward()
    assert queries.grad is not None and database.grad is None


# Zero-shot classification


def eager_zero_shot(images, classes, scale, k):
    if classes.ndim == 3:
        classes = F.normalize(classes, dim=-1).mean(1)
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(classes, dim=-1).T
    probabilities, indices = logits.softmax(-1).topk(k)
    return probabilities, indices, logits.logsumexp(-1)


@pytest.fixture(params=["one launch", "scan"])
def way(request, monkeypatch):
    """Few classes in one launch, or the same through the scan of many."""
    from vlmkernels.ops.triton import zero_shot

    if request.param == "scan":
        monkeypatch.setattr(zero_shot, "FEW_CLASSES", 0)
    return request.param


@each_dtype
@pytest.mark.parametrize("prompts", [0, 5])
@pytest.mark.parametrize(("n", "c", "d", "k"), [(1, 1, 7, 1), (3, 40, 24, 5), (21, 70, 33, 7)])
def test_zero_shot_is_softmax_of_scaled_cosines(n, c, d, k, prompts, dtype, way):
    images = vectors(n, d, dtype)
    classes = vectors(c * max(prompts, 1), d, dtype, seed=1) * 3
    classes = classes.view(c, prompts, d) if prompts else classes
    ours = vk.zero_shot(images, classes, 20.0, k=k, backend="triton")
    expected = vk.zero_shot(images, classes, 20.0, k=k, backend="reference")
    exact = eager_zero_shot(images.double(), classes.double(), 20.0, k)
    eager = eager_zero_shot(images.float(), classes.float(), 20.0, k)
    assert torch.equal(ours[1], expected[1])
    # float32 logits of up to 20, which few roundings of their norms and of themselves shift by a unit each
    of_logits = 4 * 20 * 2.0**-24
    assert_as_accurate(
        ours[0], eager[0], exact[0], "probabilities", at_least=of_logits * exact[0].max().item()
    )
    assert_as_accurate(ours[2], eager[2], exact[2], "lse", at_least=of_logits)


def test_zero_shot_ties_and_strides(way):
    images = LAYOUTS["transposed"](vectors(5, 20))
    classes = LAYOUTS["sliced"](vectors(6, 20, seed=1).repeat(5, 1))
    ours = vk.zero_shot(images, classes, torch.tensor(7.0, dtype=torch.float64), k=16, backend="triton")
    expected = vk.zero_shot(images, classes, 7.0, k=16, backend="reference")
    assert torch.equal(ours[1], expected[1])
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("value", [float("nan"), 0.0, 1e-30])
def test_zero_shot_of_classes_that_cannot_be_normalised(value, way):
    images, classes = vectors(5, 20), vectors(30, 20, seed=1)
    classes[3], classes[17, 4], images[1] = value, value, 0.0
    ours = vk.zero_shot(images, classes, 3.0, k=9, backend="triton")
    expected = vk.zero_shot(images, classes, 3.0, k=9, backend="reference")
    assert torch.equal(ours[1], expected[1])
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-7, equal_nan=True)
    torch.testing.assert_close(ours[2], expected[2], rtol=1e-6, atol=1e-6, equal_nan=True)


def test_long_lists_and_no_images_go_through_the_scan():
    images, classes = vectors(6, 20), vectors(60, 20, seed=1)
    for n in (0, 2, 6):
        ours = vk.zero_shot(images[:n], classes, 3.0, k=40, backend="triton")
        expected = vk.zero_shot(images[:n], classes, 3.0, k=40, backend="reference")
        assert torch.equal(ours[1], expected[1])


@pytest.mark.parametrize("prompts", [2, 13])
def test_classes_are_averaged_to_the_references_bits(prompts):
    from vlmkernels.ops.reference import topk as reference
    from vlmkernels.ops.triton import zero_shot

    features = vectors(9 * prompts, 30, torch.float16).view(9, prompts, 30)
    features[4, 1] = 0.0
    for layout in (features, features.transpose(0, 2).contiguous().transpose(0, 2)):
        assert torch.equal(zero_shot.class_vectors(layout), reference.class_vectors(layout))


@pytest.mark.parametrize("prompts", [0, 3])
@pytest.mark.parametrize("n", [2, 20])
def test_zero_shot_gradients_are_as_accurate_as_eager(n, prompts, monkeypatch):
    from vlmkernels.ops.triton import contrastive

    # several chunks
    monkeypatch.setattr(contrastive, "CHUNK_BYTES", 40 * 16 * 4)
    monkeypatch.setattr(contrastive, "CHUNK_COLUMNS", 16)
    classes = vectors(40 * max(prompts, 1), 24, seed=1) * 3
    classes = classes.view(40, prompts, 24) if prompts else classes

    def grads(function, dtype, **options):
        given = (vectors(n, 24), classes, torch.tensor(20.0, device=DEVICE))
        inputs = [x.detach().to(dtype).requires_grad_() for x in given]
        probabilities, _, lse = function(*inputs, k=6, **options)
        weight = torch.linspace(-1, 1, n, device=DEVICE)
        return torch.autograd.grad(
            (probabilities.square().sum(1) * weight).sum() + (lse * weight).sum(), inputs
        )

    ours = grads(vk.zero_shot, torch.float32, backend="triton")
    eager, exact = grads(eager_zero_shot, torch.float32), grads(eager_zero_shot, torch.float64)
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        assert_typically_as_accurate(mine, theirs, truth)


def test_half_precision_zero_shot_gradients():
    dtype = torch.float16
    for classes in (vectors(40, 24, seed=1), vectors(120, 24, seed=1).view(40, 3, 24)):
        results = []
        for backend, to in (("triton", dtype), ("reference", dtype)):
            inputs = [x.detach().to(to).requires_grad_() for x in (vectors(9, 24), classes)]
            scale = torch.tensor(5.0, device=DEVICE, requires_grad=True)
            probabilities, _, lse = vk.zero_shot(*inputs, scale, k=3, backend=backend)
            results.append(torch.autograd.grad(probabilities.square().sum() + lse.sum(), (*inputs, scale)))
        for mine, expected in zip(*results, strict=True):
            assert mine.dtype == expected.dtype
            # unit vectors and gradient tiles in float16, whose rounding is 2**-11
            torch.testing.assert_close(
                mine, expected, rtol=2e-2, atol=4 * 2.0**-11 * expected.abs().max().item()
            )


def test_zero_shot_keeps_no_logits():
    """The largest tensor of a call and its gradient is a chunk, not [N, C]."""
    from vlmkernels.ops import _topk_triton

    images, classes, scale = vectors(8, 4), vectors(200, 4, seed=1), torch.tensor(3.0, device=DEVICE)
    with pytest.MonkeyPatch.context() as patch, LargestTensor() as largest:
        from vlmkernels.ops.triton import contrastive, zero_shot

        patch.setattr(zero_shot, "FEW_CLASSES", 0)
        patch.setattr(contrastive, "CHUNK_BYTES", 4 * 512)
        patch.setattr(contrastive, "CHUNK_COLUMNS", 64)
        patch.setattr(_topk_search, "MOST_SCORES", 512)
        patch.setattr(_topk_search, "MOST_CANDIDATES", 8 * 64)
        probabilities, lse, indices = _topk_triton.zero_shot(images, classes, scale, 3)
        _topk_triton.zero_shot_gradients(
            probabilities, lse, images, classes, scale, indices, probabilities, lse, (True, True, True)
        )
    assert largest.nbytes <= classes.nbytes < 4 * 8 * 200


# FlatIndex


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch):
    """`backend(name)` searches indexes on the device with it."""
    return lambda name: monkeypatch.setattr(flat_index, "_kernels", lambda device: name)


def features(count: int, seed: int = 0) -> Tensor:
    """Vectors as encoders give them: a shared direction, a few large dimensions."""
    x = vectors(count, 24, seed=seed)
    x[:, 3] *= 9
    return x + 2 * vectors(1, 24, seed=99)


def index_of(storage: str, exact: bool, metric: str) -> vk.FlatIndex:
    """Two segments, some rows removed, ids that do not ascend."""
    index = vk.FlatIndex(24, metric=metric, storage=storage, exact=exact, device=DEVICE)
    index.add(features(160, 1), ids=torch.arange(500, 340, -1))
    index.add(features(140, 2))
    index.remove(torch.arange(400, 410))
    return index


def assert_same_answers(backend, call) -> None:
    backend("triton")
    ours = call()
    backend("reference")
    for mine, expected in zip(ours, call(), strict=True):
        assert torch.equal(mine, expected)


@each_metric
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_an_index_answers_as_the_reference(storage, exact, metric, backend, monkeypatch):
    monkeypatch.setattr(_index_store, "_SMALLEST_SEGMENT", 64)
    index = index_of(storage, exact, metric)
    assert len(index._snapshot.segments) == 2
    for n, k in ((2, 9), (5, 40)):
        assert_same_answers(backend, lambda n=n, k=k: index.search(features(n, 3), k))


@pytest.mark.parametrize("n", [2, 6])
@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_an_index_under_filters(storage, n, backend):
    index = vk.FlatIndex(24, metric="l2", storage=storage, device=DEVICE)
    index.add(features(300, 1))
    queries = features(n, 3)
    every = torch.rand(300, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.1
    each = torch.rand(n, 300, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.1
    for filter in (every, each, torch.arange(0, 500, 7)):
        assert_same_answers(backend, lambda filter=filter: index.search(queries, 60, filter))


@each_metric
@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_range_search_of_an_index(storage, metric, backend, monkeypatch):
    index = vk.FlatIndex(24, metric=metric, storage=storage, device=DEVICE)
    index.add(features(250, 1))
    queries = features(6, 3)
    scores, _ = index.search(queries, 30)
    monkeypatch.setattr(_topk_search, "MOST_CANDIDATES", 6 * 100)
    assert_same_answers(backend, lambda: index.range_search(queries, scores[2, 20].item()))
    assert_same_answers(backend, lambda: index.range_search(queries, -torch.inf))
    assert index.range_search(queries[:0], 0.0)[0].tolist() == [0]


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_an_index_that_was_built_on_the_cpu_answers_as_there(storage, monkeypatch):
    index = vk.FlatIndex(24, storage=storage)
    index.add(features(200, 1).cpu())
    queries = features(6, 3).cpu()
    expected = index.search(queries, 9)
    index.to(DEVICE)
    monkeypatch.setattr(flat_index, "_kernels", lambda device: "triton")
    ours = index.search(queries, 9)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25, 0.0])
def test_an_int8_index_of_rows_that_have_no_codes(value, backend):
    index = vk.FlatIndex(24, metric="dot", storage="int8", device=DEVICE)
    rows, queries = features(200, 1), features(6, 3)
    rows[::50] = value
    rows[7, 3] = value
    queries[1] = value
    index.add(rows)
    for n in (2, 6):
        backend("triton")
        ours = index.search(queries[:n], 9)
        backend("reference")
        expected = index.search(queries[:n], 9)
        assert torch.equal(ours[1], expected[1])
        torch.testing.assert_close(ours[0], expected[0], rtol=0, atol=0, equal_nan=True)


def test_int8_codes_rule_most_rows_out(backend):
    index = vk.FlatIndex(24, metric="cosine", storage="int8", device=DEVICE)
    index.add(features(800, 1))
    backend("triton")
    for n in (2, 8):
        _, _, stats = index.search_with_stats(features(n, 3), 5)
        assert n * 5 <= stats.rescored <= n * 120


def test_empty_indexes_and_more_than_there_is(backend):
    backend("triton")
    index = vk.FlatIndex(24, device=DEVICE)
    scores, ids = index.search(features(3), 4)
    assert ids.tolist() == [[-1] * 4] * 3 and (scores == -torch.inf).all()
    index.add(features(2))
    assert (index.search(features(3), 4)[1][:, 2:] == -1).all()
    assert index.search(features(0), 4)[1].shape == (0, 4)
