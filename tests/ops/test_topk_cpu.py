# SPDX-License-Identifier: Apache-2.0
"""What holds for the CPU kernels of top-k search alone: the reference's bits, threads, bounds, instruction sets."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import (
    ALLOCATIONS_AND_VIEWS,
    Inside,
    assert_undisturbed_by_threads,
    isa_levels,
    needs_cpu_kernels,
    run,
    saved_at,
)

import vlmkernels as vk
from vlmkernels.ops import _index_store, _topk_cpu, flat_index, topk

pytestmark = needs_cpu_kernels

METRICS = ("dot", "cosine", "l2")
STORAGES = ("float32", "bfloat16", "int8")
each_metric = pytest.mark.parametrize("metric", METRICS)
each_storage = pytest.mark.parametrize("storage", STORAGES)
# queries, rows, width, k: edges of panels, of blocks of 240 rows, of the path for up to 8 queries
SHAPES = [
    (1, 1, 1, 1),
    (2, 77, 64, 1),
    (8, 241, 130, 17),
    (9, 480, 63, 10),
    (17, 499, 257, 30),
    (50, 197, 31, 197),
    (3, 2000, 100, 300),
]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_bits(got, wanted):
    """Equal indices, and equal scores to the last bit; NaN equals NaN."""
    assert torch.equal(got[1], wanted[1])
    assert torch.equal(got[0].nan_to_num(nan=7.0), wanted[0].nan_to_num(nan=7.0))


def assert_like_reference(queries, database, k, metric, mask=None):
    options = {"metric": metric, "mask": mask}
    wanted = vk.topk_similarity(queries, database, k, backend="reference", **options)
    assert_bits(vk.topk_similarity(queries, database, k, backend="cpu", **options), wanted)


# Values: those of the reference, bit for bit.


@each_metric
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "m", "d", "k"), SHAPES)
def test_every_shape(n, m, d, k, dtype, metric):
    queries, database = randn(n, d, seed=1).to(dtype), randn(m, d, seed=2).to(dtype)
    assert_like_reference(queries, database, k, metric)


@each_metric
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [3, 20])
def test_every_layout(n, dtype, layout, metric):
    queries, database = (
        LAYOUTS[layout](randn(n, 70).to(dtype)),
        LAYOUTS[layout](randn(500, 70, seed=1).to(dtype)),
    )
    assert_like_reference(queries, database, 12, metric)


@each_metric
@pytest.mark.parametrize("kind", ["one", "each"])
@pytest.mark.parametrize("density", [0.0, 0.003, 0.1, 0.9])
@pytest.mark.parametrize("n", [2, 33])
def test_every_mask(n, density, kind, metric):
    shape = (1500,) if kind == "one" else (n, 1500)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < density
    assert_like_reference(randn(n, 40), randn(1500, 40, seed=1), 20, metric, mask)
    if kind == "each":
        wide = torch.zeros(n, 3000, dtype=torch.bool)
        wide[:, ::2] = mask
        assert_like_reference(randn(n, 40), randn(1500, 40, seed=1), 20, metric, wide[:, ::2])


@each_metric
@pytest.mark.parametrize("n", [4, 40])
def test_equal_scores(n, metric):
    # Products of small integers are exact, and there are few of them.
    generator = torch.Generator().manual_seed(1)
    queries = torch.randint(-1, 2, (n, 6), generator=generator).float()
    database = torch.randint(-1, 2, (3000, 6), generator=generator).float()
    for k in (1, 16, 17, 400):
        assert_like_reference(queries, database, k, metric)


@each_metric
@pytest.mark.parametrize("n", [2, 12])
@pytest.mark.parametrize("k", [3, 600])
def test_values_that_bounds_cannot_describe(k, n, metric):
    queries, database = randn(n, 33), randn(1300, 33, seed=1)
    special = [math.nan, math.inf, -math.inf, 1e30, 1e-30, 3e38, 1e-44, 0.0]
    for at, value in enumerate(special):
        database[100 * at + 5] *= value
        database[100 * at + 6, 3] = value
    queries[1, 0] = math.inf
    assert_like_reference(queries, database, k, metric)
    queries[1] = 0
    assert_like_reference(queries, database, k, metric)
    queries[1, 4] = math.nan
    assert_like_reference(queries, database, k, metric)
    assert_like_reference(queries * 1e25, database * 1e15, k, metric)
    assert_like_reference(queries * 1e-30, database * 1e-12, k, metric)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 20),
    m=st.integers(1, 600),
    d=st.integers(0, 70),
    share=st.floats(0, 1),
    metric=st.sampled_from(METRICS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    levels=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_any_number_of_ties(n, m, d, share, metric, dtype, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    queries, database = (
        torch.randint(-levels, levels + 1, (rows, d), generator=generator).to(dtype) for rows in (n, m)
    )
    assert_like_reference(queries, database, max(1, int(share * m)), metric)


@each_metric
def test_duplicates_that_float32_cannot_tell_apart(metric):
    base = randn(1, 64)
    database = base + 1e-6 * randn(2000, 64, seed=1)
    assert_like_reference(base + 1e-6 * randn(9, 64, seed=2), database, 30, metric)


# Determinism and threads.


@each_metric
@pytest.mark.parametrize("n", [1, 5, 40])
def test_threads_and_batches_do_not_change_bits(n, metric):
    queries, database = randn(n, 96), randn(3001, 96, seed=1)
    torch.set_num_threads(1)
    wanted = vk.topk_similarity(queries, database, 25, metric=metric)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert_bits(vk.topk_similarity(queries, database, 25, metric=metric), wanted)
        parts = [vk.topk_similarity(q, database, 25, metric=metric) for q in queries.split(9)]
        assert_bits([torch.cat(x) for x in zip(*parts, strict=True)], wanted)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_zero_shot_repeats_its_bits(threads):
    torch.set_num_threads(threads)
    images, classes = randn(33, 64), randn(900, 64, seed=1)
    first = vk.zero_shot(images, classes, 50.0)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(vk.zero_shot(images, classes, 50.0), first, strict=True))


@each_storage
def test_python_threads_search_one_index(storage):
    index = vk.FlatIndex(64, storage=storage)
    index.add(randn(4000, 64))
    queries = [randn(n, 64, seed=n) for n in (1, 3, 12, 40)]
    assert_undisturbed_by_threads([partial(index.search, q, 10) for q in queries], repetitions=10)


# Codes with bounds: answers are those of the float32 vectors, whatever the data.


def cone(n, d, seed=0):
    """Rows like CLIP's: a common direction and a few dimensions ten times as large as the others."""
    scale = torch.ones(d)
    scale[:: max(1, d // 4)] = 10
    return F.normalize(randn(1, d, seed=99) * scale + 0.7 * randn(n, d, seed=seed) * scale, dim=-1)


DATABASES = {
    "spread": randn(5000, 64),
    "cone": cone(5000, 64),
    "near duplicates": randn(1, 64) + 1e-4 * randn(5000, 64, seed=1),
    "repeated": randn(5, 64).repeat(1000, 1),
    "one large dimension": randn(5000, 64) * torch.cat([torch.full((1,), 1e4), torch.ones(63)]),
    "magnitudes": randn(5000, 64) * torch.logspace(-20, 20, 5000).unsqueeze(1),
    "zeros": torch.cat([torch.zeros(4000, 64), randn(1000, 64)]),
    "narrow": randn(5000, 3),
}


@each_metric
@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
@pytest.mark.parametrize("kind", DATABASES)
def test_codes_give_the_float32_answer(kind, storage, metric):
    database = DATABASES[kind]
    d = database.shape[1]
    index = vk.FlatIndex(d, metric=metric, storage=storage)
    index.add(database)
    for n in (2, 24):
        queries = torch.cat([database[: n // 2] * 1.01, randn(n - n // 2, d, seed=7)])
        scores, ids, stats = index.search_with_stats(queries, 15)
        assert_bits(
            (scores, ids), vk.topk_similarity(queries, database, 15, metric=metric, backend="reference")
        )
        assert stats.rescored >= 15 * n


@pytest.mark.parametrize("n", [2, 24])
def test_codes_that_tell_nothing_give_way_to_the_vectors(n):
    # Codes are taken about the first row added, far from those that follow, whose differences they then lose.
    far, near = randn(1, 64, seed=5) * 30, randn(1, 64) + 1e-2 * randn(40_000, 64, seed=1)
    index = vk.FlatIndex(64, metric="dot", storage="int8")
    index.add(far)
    index.add(near)
    scores, ids, stats = index.search_with_stats(near[:n], 5, filter=range(1, 40_001))
    wanted = vk.topk_similarity(near[:n], near, 5)
    assert_bits((scores, ids - 1), wanted)
    assert stats.widened == n and stats.rescored < n * 40_000 / 2


def test_few_rows_of_a_cone_are_scored_exactly():
    database, queries = cone(30_000, 128), cone(20, 128, seed=4)
    index = vk.FlatIndex(128, storage="int8")
    index.add(database)
    stats = index.search_with_stats(queries, 10)[2]
    assert stats.widened == 0 and stats.rescored < 0.01 * 20 * 30_000
    assert index._snapshot.centre.norm() > 0.3


@pytest.mark.parametrize("dim", [1, 2, 3, 24, 64, 100])
def test_codes_of_the_kernel_are_those_of_its_twin(dim):
    rows, centre = randn(50, dim) * torch.logspace(-3, 3, 50).unsqueeze(1), randn(dim, seed=1)
    rows[7, 0] = math.nan
    rows[8, 0] = math.inf
    ours, twin = _topk_cpu.encode_rotated(rows, centre), _index_store.encode_rotated(rows, centre)
    assert set(ours) == set(twin)
    assert ours["scale"][7:9].isnan().all() and not (ours["residual"][7:9] < math.inf).any()
    usable = rows.isfinite().all(1)
    # float32 and float64 rotations round a code near .5 apart, never further
    assert ((ours["codes"].int() - twin["codes"].int()).abs()[usable] <= 1).all()
    torch.testing.assert_close(ours["scale"][usable], twin["scale"][usable], rtol=1e-4, atol=1e-6)
    turned = (rows.double() - centre.double()) @ _index_store.rotation(dim)
    missed = torch.linalg.vector_norm(turned - ours["codes"] * ours["scale"].double().unsqueeze(1), dim=1)
    assert (ours["residual"].double() >= missed)[usable].all()
    assert (ours["residual"] <= 1.1 * missed + 2e-5 * rows.norm(dim=1) + 1e-5)[usable].all()


@pytest.mark.parametrize("dim", [1, 5, 8, 48])
def test_rotation_is_orthogonal(dim):
    matrix = _index_store.rotation(dim)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim, dtype=torch.float64))


# FlatIndex: kernels and reference answer alike.


@each_metric
@each_storage
@pytest.mark.parametrize("exact", [True, False])
def test_index_answers_like_the_reference(exact, storage, metric, monkeypatch):
    monkeypatch.setattr(_index_store, "_SMALLEST_SEGMENT", 100)
    ids = torch.randperm(1200, generator=torch.Generator().manual_seed(0)) * 2
    index = vk.FlatIndex(40, metric=metric, storage=storage, exact=exact)
    for rows, own in zip(cone(1200, 40).split(170), ids.split(170), strict=True):
        index.add(rows, own)
    index.remove(ids[::7])
    allowed = torch.rand(len(index), generator=torch.Generator().manual_seed(1)) < 0.2
    each = torch.rand(11, len(index), generator=torch.Generator().manual_seed(2)) < 0.2
    queries = cone(11, 40, seed=3)

    def answers():
        found = [index.search(queries, 30, given) for given in (None, allowed, each, ids[:300])]
        threshold = found[0][0][0, 9].item()
        return [*found, index.search(queries[:3], 30, each[:3]), index.range_search(queries, threshold)[1:]]

    ours = answers()
    monkeypatch.setattr(flat_index, "_kernels", lambda device: "reference")
    for got, wanted in zip(ours, answers(), strict=True):
        assert_bits(got, wanted)
    assert index.search_with_stats(queries, 1)[2] == _topk_cpu.Stats(-1, -1)


@each_metric
@each_storage
@pytest.mark.parametrize("n", [2, 20])
def test_range_search_of_many_hits(n, storage, metric, monkeypatch):
    index = vk.FlatIndex(24, metric=metric, storage=storage)
    database = torch.cat([randn(3000, 24), torch.full((2, 24), math.nan), torch.zeros(3, 24)])
    index.add(database)
    queries = randn(n, 24, seed=1)
    scores = index.search(queries, len(index))[0]
    for threshold in (scores[0, 1500].item(), scores[0, 0].item(), 0.0, -math.inf, math.inf):
        ours = index.range_search(queries, threshold)
        with monkeypatch.context() as patch:
            patch.setattr(flat_index, "_kernels", lambda device: "reference")
            wanted = index.range_search(queries, threshold)
        assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


def test_index_of_rotated_codes_survives_a_file(tmp_path):
    index = vk.FlatIndex(48, storage="int8")
    index.add(cone(800, 48))
    index.save(tmp_path / "index")
    queries = cone(20, 48, seed=1)
    for mmap in (False, True):
        loaded = vk.FlatIndex.load(tmp_path / "index", mmap=mmap)
        assert torch.equal(loaded._snapshot.centre, index._snapshot.centre)
        loaded.add(cone(100, 48, seed=2))
        both = torch.cat([cone(800, 48), cone(100, 48, seed=2)])
        assert_bits(loaded.search(queries, 9), vk.topk_similarity(queries, both, 9, metric="cosine"))


LARGER_THAN_MEMORY = """
    import resource, sys, torch
    import vlmkernels as vk

    def resident():
        with open("/proc/self/status") as status:
            return {line.split(":")[0]: line.split()[1] for line in status if line.startswith("Rss")}

    index = vk.FlatIndex.load(sys.argv[1], mmap=True)
    queries = torch.randn(20, 256, generator=torch.Generator().manual_seed(1))
    before = int(resident()["RssAnon"])
    # Anonymous memory may grow by far less than the rows take; the file's pages are the page cache's.
    data = int(open("/proc/self/statm").read().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (data + (80 << 20),) * 2)
    for q in (queries, queries[:1]):
        scores, ids = index.search(q, 5)
        print(ids.flatten().tolist())
    print(int(resident()["RssAnon"]) - before)
"""


@each_storage
def test_a_mapped_index_larger_than_the_memory_limit(tmp_path, storage):
    database = randn(120_000, 256)
    index = vk.FlatIndex(256, storage=storage)
    index.add(database)
    index.save(tmp_path / "index")
    assert (tmp_path / "index").stat().st_size > 110 << 20
    queries = randn(20, 256, seed=1)
    many, one, grown = run(LARGER_THAN_MEMORY, tmp_path / "index").splitlines()
    assert many == str(index.search(queries, 5)[1].flatten().tolist())
    assert one == str(index.search(queries[:1], 5)[1].flatten().tolist())
    assert int(grown) < 64 << 10


# What a call issues.


IMPLEMENTATIONS = {
    topk.topk_similarity_op: topk._topk_impl,
    topk.topk_similarity_backward_op: topk._topk_backward_impl,
    topk.zero_shot_op: topk._zero_shot_impl,
    topk.zero_shot_backward_op: topk._zero_shot_backward_impl,
}


@pytest.mark.parametrize("mask", [None, (50,), (4, 50)])
def test_a_call_issues_only_allocations_and_views(mask):
    queries, database = randn(4, 16), randn(50, 16, seed=1)
    allowed = None if mask is None else torch.rand(mask) < 0.5
    with Inside(IMPLEMENTATIONS) as mode:
        vk.topk_similarity(queries, database, 3, mask=allowed, backend="cpu")
        vk.zero_shot(queries, database, torch.tensor(9.0), backend="cpu")
        vk.zero_shot(queries, database.view(10, 5, 16), torch.tensor(9.0), backend="cpu")
    assert len(mode.ours) == 3 and mode.inside
    assert set(mode.inside) <= ALLOCATIONS_AND_VIEWS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prompts", [0, 5])
def test_gradients_issue_only_allocations_and_views(dtype, prompts):
    queries, database = randn(4, 16).to(dtype), randn(50, 16, seed=1).to(dtype)
    indices = torch.randint(-1, 50, (4, 3))
    needs = [True, True]
    classes = database.view(10, 5, 16) if prompts else database
    scale, lse = torch.tensor(9.0), torch.zeros(4)
    with Inside(IMPLEMENTATIONS) as mode:
        for metric in ("dot", "cosine", "l2"):
            topk.topk_similarity_backward_op(
                torch.ones(4, 3), queries, database, indices, metric, "cpu", needs
            )
        topk.zero_shot_backward_op(
            torch.ones(4, 3), lse, queries, classes, scale, indices.clamp(0, 9), torch.ones(4, 3), lse, "cpu",
            [True, *needs],
        )  # fmt: skip
    assert len(mode.ours) == 4 and mode.inside
    assert set(mode.inside) <= ALLOCATIONS_AND_VIEWS


@each_metric
def test_opcheck_of_the_kernels(metric):
    queries, database = randn(4, 6).requires_grad_(), randn(9, 6, seed=1).requires_grad_()
    mask = torch.rand(4, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    torch.library.opcheck(topk.topk_similarity_op, (queries, database, 3, metric, mask, "cpu"))
    torch.library.opcheck(topk.zero_shot_op, (queries, database, torch.tensor(2.5), 3, "cpu"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_refused_by_name_only(dtype):
    queries, database = randn(2, 4).to(dtype), randn(5, 4).to(dtype)
    with pytest.raises(NotImplementedError, match="features must be float32 or bfloat16"):
        vk.topk_similarity(queries, database, 2, backend="cpu")
    assert vk.topk_similarity(queries, database, 2)[1].shape == (2, 2)


def test_zero_shot_refuses_a_scale_of_another_dtype():
    with pytest.raises(NotImplementedError, match="logit_scale must be float32 on the cpu"):
        vk.zero_shot(randn(2, 4), randn(9, 4), torch.tensor(1.0, dtype=torch.float64), backend="cpu")


# Gradients, against the reference in float64: float32 rounds logits of up to `scale`, and nothing else matters.


def gradients(function, inputs, dtype):
    leaves = [x.detach().to(dtype if x.ndim else torch.promote_types(dtype, torch.float32)) for x in inputs]
    leaves = [x.requires_grad_() for x in leaves]
    return torch.autograd.grad(function(*leaves), leaves)


def assert_gradients(ours, exact, rtol):
    for mine, wanted in zip(ours, exact, strict=True):
        error = (mine.double() - wanted).abs().max()
        assert error <= rtol * wanted.abs().max() + 1e-30, (error, wanted.abs().max())


@each_metric
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 3e-7), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("strided", [False, True])
def test_gradients_of_scores(metric, dtype, rtol, strided):
    """Rows that many queries hit, rows that none hits, queries with fewer than k rows, and a zero vector."""
    queries, database = randn(37, 24).to(dtype), randn(40, 24, seed=1).to(dtype)
    database[5], queries[3] = 0.0, 0.0
    if strided:
        queries, database = queries.mT.contiguous().mT, database.repeat(1, 2)[:, ::2]
    mask = torch.rand(37, 40, generator=torch.Generator().manual_seed(2)) < 0.3
    mask[7] = False
    weight = torch.randn(37, 9, generator=torch.Generator().manual_seed(3))

    def loss(backend):
        def total(q, x):
            scores, indices = vk.topk_similarity(q, x, 9, metric=metric, mask=mask, backend=backend)
            return (scores * weight.to(scores.dtype)).masked_fill(indices < 0, 0.0).sum()

        return total

    exact = gradients(loss("reference"), (queries, database), torch.float64)
    ours = gradients(loss("cpu"), (queries, database), dtype)
    assert all(g.dtype == dtype and g.is_contiguous() for g in ours)
    for mine, wanted in zip(ours, exact, strict=True):  # a zero vector's own gradient is of another size
        large = wanted.abs().amax(-1) > 1e6
        assert_gradients([mine[large]], [wanted[large]], rtol) if large.any() else None
        assert_gradients([mine[~large]], [wanted[~large]], rtol)


@pytest.mark.parametrize("prompts", [0, 1, 6])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)])
def test_gradients_of_zero_shot(dtype, rtol, prompts, needs):
    images = randn(19, 40).to(dtype)
    classes = (randn(300, prompts, 40, seed=1) if prompts else randn(300, 40, seed=1)).to(dtype)
    inputs = (images, classes, torch.tensor(30.0))
    weights = [torch.randn(s, generator=torch.Generator().manual_seed(4)) for s in ((19, 7), (19,))]

    def loss(backend):
        def total(*given):
            given = [x if need else x.detach() for x, need in zip(given, needs, strict=True)]
            probabilities, _, lse = vk.zero_shot(*given, k=7, backend=backend)
            return sum((x * w.to(x.dtype)).sum() for x, w in zip((probabilities, lse), weights, strict=True))

        return total

    def wanted(backend, dtype):
        leaves = [x.to(dtype if x.ndim else torch.promote_types(dtype, torch.float32)) for x in inputs]
        leaves = [x.requires_grad_(need) for x, need in zip(leaves, needs, strict=True)]
        return torch.autograd.grad(loss(backend)(*leaves), [x for x in leaves if x.requires_grad])

    assert_gradients(wanted("cpu", dtype), wanted("reference", torch.float64), rtol)


def test_gradients_do_not_depend_on_the_number_of_threads():
    queries, database = randn(300, 64), randn(900, 64, seed=1)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            gradients(lambda q, x: vk.topk_similarity(q, x, 20, backend="cpu")[0].square().sum(),
                      (queries, database), torch.float32)
        )  # fmt: skip
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_zero_shot_gradient_keeps_no_logits():
    """20,000 images against 20,000 classes: their logits would take 1.6 GB, the two gradients take 10 MB."""
    import resource

    images, classes = randn(20_000, 64).requires_grad_(), randn(20_000, 64, seed=1).requires_grad_()
    probabilities, _, lse = vk.zero_shot(images, classes, 10.0, backend="cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (probabilities.sum() + lse.sum()).backward()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
    assert images.grad.isfinite().all() and classes.grad.isfinite().all()


# Zero-shot classification.


@pytest.mark.parametrize("prompts", [0, 1, 7])
@pytest.mark.parametrize("n", [3, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_shot_agrees_with_the_reference(dtype, n, prompts):
    images = randn(n, 96).to(dtype)
    classes = randn(333, prompts, 96, seed=1).to(dtype) if prompts else randn(333, 96, seed=1).to(dtype)
    ours = vk.zero_shot(images, classes, 60.0, k=20, backend="cpu")
    wanted = vk.zero_shot(images, classes, 60.0, k=20, backend="reference")
    assert torch.equal(ours[1], wanted[1])
    # the reference sums in float64: a logit of up to 60 in float32 is off by 2**-19 at most
    torch.testing.assert_close(ours[0], wanted[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours[2], wanted[2], rtol=0, atol=60 * 2.0**-23)


@pytest.mark.parametrize("prompts", [1, 2, 3, 6, 7])
def test_class_vectors_have_the_bits_of_the_reference(prompts):
    features = randn(40, prompts, 50)
    features[3, 0] = 0
    assert torch.equal(_topk_cpu.class_vectors(features), topk.reference.class_vectors(features))


def test_zero_shot_of_classes_that_bounds_cannot_describe():
    images, classes = randn(9, 32), randn(300, 32, seed=1)
    classes[3] *= 1e25
    classes[4] *= 1e-25
    classes[5] = 0
    ours = vk.zero_shot(images, classes, 30.0, k=300, backend="cpu")
    wanted = vk.zero_shot(images, classes, 30.0, k=300, backend="reference")
    assert torch.equal(ours[1], wanted[1])
    torch.testing.assert_close(ours[2], wanted[2], rtol=0, atol=30 * 2.0**-23)
    classes[6, 0] = math.nan
    assert vk.zero_shot(images, classes, 30.0, backend="cpu")[2].isnan().all()
    images[1, 0] = math.inf
    classes[6, 0] = 1
    lse = vk.zero_shot(images, classes, 30.0, backend="cpu")[2]
    assert lse.isnan().tolist() == [i == 1 for i in range(9)]


# Bounds.

GUARDED = """
    import torch
    from kernel_checks import GuardedAllocations, guarded, release_guarded
    from test_topk_cpu import IMPLEMENTATIONS
    import vlmkernels as vk
    from vlmkernels.ops import _topk_cpu

    generator = torch.Generator().manual_seed(0)
    for n, m, d, k in ((1, 1, 1, 1), (3, 17, 3, 2), (8, 250, 47, 20), (9, 241, 33, 5), (20, 100, 65, 100)):
        queries, database = torch.randn(n, d, generator=generator), torch.randn(m, d, generator=generator)
        for metric in ("dot", "cosine", "l2"):
            for dtype in (torch.float32, torch.bfloat16):
                for shape in (None, (m,), (n, m)):
                    mask = None if shape is None else torch.rand(shape, generator=generator) < 0.5
                    plain = vk.topk_similarity(queries.to(dtype), database.to(dtype), k, metric=metric, mask=mask)
                    with GuardedAllocations(IMPLEMENTATIONS) as mode:
                        got = vk.topk_similarity(guarded(queries.to(dtype)), guarded(database.to(dtype)), k,
                                                 metric=metric, mask=None if mask is None else guarded(mask))
                    assert mode.count >= 3
                    assert all(torch.equal(a, b) for a, b in zip(got, plain)), (n, m, d, k, metric, dtype)
            for storage in ("float32", "bfloat16", "int8"):
                index = vk.FlatIndex(d, metric=metric, storage=storage)
                index.add(database)
                plain = index.search(queries, k)
                (segment,) = index._snapshot.segments
                for name, column in segment.columns.items():
                    segment.columns[name] = guarded(column[: segment.count])
                with GuardedAllocations(IMPLEMENTATIONS):
                    got = index.search(guarded(queries), k)
                    index.range_search(guarded(queries), 0.0)
                assert all(torch.equal(a, b) for a, b in zip(got, plain)), (n, m, d, k, metric, storage)
        with GuardedAllocations(IMPLEMENTATIONS):
            vk.zero_shot(guarded(queries), guarded(database), torch.tensor(3.0), k=k)
            _topk_cpu.encode_rotated(guarded(database), guarded(queries[0]))
            _topk_cpu.class_vectors(guarded(database.view(1, m, d)))
        release_guarded()
    print("in bounds")
"""


def test_nothing_is_read_or_written_behind_a_buffer():
    assert "in bounds" in run(GUARDED)


# Instruction sets.

EVERY_PROBLEM = """
    import sys, torch
    from test_topk_cpu import METRICS, SHAPES, STORAGES, cone, randn
    import vlmkernels as vk
    from vlmkernels import _native

    results = {}
    for n, m, d, k in SHAPES:
        for metric in METRICS:
            for dtype in (torch.float32, torch.bfloat16):
                q, x = randn(n, d, seed=1).to(dtype), randn(m, d, seed=2).to(dtype)
                results[n, metric, dtype] = vk.topk_similarity(q, x, k, metric=metric, backend="cpu")
    for metric in METRICS:
        for storage in STORAGES:
            for exact in (True, False):
                index = vk.FlatIndex(100, metric=metric, storage=storage, exact=exact)
                index.add(cone(900, 100))
                if exact:
                    for n in (3, 20):
                        results["index", metric, n, storage] = index.search(cone(n, 100, seed=1), 12)
                else:
                    codes = index.reconstruct(index.ids)
                    found = index.search(cone(20, 100, seed=1), 12)
                    wanted = vk.topk_similarity(cone(20, 100, seed=1), codes, 12, metric=metric, backend="reference")
                    assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    results["zero_shot"] = vk.zero_shot(randn(20, 64), randn(300, 64, seed=1), 10.0, k=7)
    torch.save({"isa": _native.cpu.isa(), "results": results}, sys.argv[1])
"""


@pytest.mark.parametrize("isa", isa_levels())
def test_every_instruction_set_gives_the_bits_of_the_reference(isa, tmp_path):
    saved = saved_at(isa, EVERY_PROBLEM, tmp_path)
    results = saved["results"]
    probabilities, indices, lse = results.pop("zero_shot")
    wanted = vk.zero_shot(randn(20, 64), randn(300, 64, seed=1), 10.0, k=7, backend="reference")
    assert torch.equal(indices, wanted[1])
    # a float32 logit of up to 10 is off by 2**-21 at most
    torch.testing.assert_close(lse, wanted[2], rtol=0, atol=10 * 2.0**-23)
    torch.testing.assert_close(probabilities, wanted[0], rtol=4e-6, atol=0)
    for n, m, d, k in SHAPES:
        for metric in METRICS:
            for dtype in (torch.float32, torch.bfloat16):
                queries, database = randn(n, d, seed=1).to(dtype), randn(m, d, seed=2).to(dtype)
                assert_bits(
                    results.pop((n, metric, dtype)),
                    vk.topk_similarity(queries, database, k, metric=metric, backend="reference"),
                )
    for _, metric, n, _ in [key for key in results if key[0] == "index"]:
        wanted = vk.topk_similarity(
            cone(n, 100, seed=1), cone(900, 100), 12, metric=metric, backend="reference"
        )
        for storage in STORAGES:
            assert_bits(results["index", metric, n, storage], wanted)
