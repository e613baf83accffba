# SPDX-License-Identifier: Apache-2.0
"""vk.topk_similarity and vk.zero_shot: results, order, invariance, gradients, registration, refusals."""

import doctest
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from largest_tensor import LargestTensor
from oracle import assert_as_accurate
from torch._dynamo.testing import CompileCounterWithBackend

import vlmkernels as vk
from vlmkernels.ops import dispatch, topk
from vlmkernels.ops.reference import topk as reference
from vlmkernels.ops.reference import topk_scan

METRICS = ("dot", "cosine", "l2")
SHAPES = [
    (1, 1, 1, 1),
    (3, 5, 7, 5),
    (2, 77, 64, 1),
    (50, 197, 257, 10),
    (1, 577, 80, 577),
    (7, 1031, 33, 50),
]


def best(scores, k):
    """Top-k of exact scores [N, M]: rounded to float32, descending, equal ones in ascending index."""
    values, indices = scores.float().sort(dim=1, descending=True, stable=True)
    return values[:, :k], indices[:, :k]


def exact_scores(queries, database, metric):
    """float64 scores [N, M] by torch's own functions."""
    q, x = queries.double(), database.double()
    if metric == "l2":
        return -(q.unsqueeze(1) - x).square().sum(-1)
    if metric == "cosine":
        q, x = F.normalize(q, dim=-1), F.normalize(x, dim=-1)
    return q @ x.T


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(7)
    return torch.randn(9, 24, generator=generator), torch.randn(700, 24, generator=generator)


@pytest.fixture
def small64():
    """float64 queries and database whose scores differ by more than gradcheck's step."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((4, 6), (9, 6))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes)


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# Results


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "m", "d", "k"), SHAPES)
def test_result_is_the_sorted_float64_product(n, m, d, k, metric):
    generator = torch.Generator().manual_seed(n + m)
    queries, database = torch.randn(n, d, generator=generator), torch.randn(m, d, generator=generator)
    scores, indices = vk.topk_similarity(queries, database, k, metric=metric)
    values, expected = best(exact_scores(queries, database, metric), k)
    assert scores.dtype == torch.float32 and indices.dtype == torch.int64
    assert torch.equal(indices, expected)
    # Both are float64 sums rounded once to float32; where the sums straddle a rounding boundary they differ by one ulp.
    torch.testing.assert_close(scores, values, rtol=1.2e-7, atol=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_no_queries_give_empty_results(metric):
    scores, indices = vk.topk_similarity(torch.empty(0, 5), torch.randn(4, 5), 3, metric=metric)
    assert scores.shape == indices.shape == (0, 3) and indices.dtype == torch.int64


def test_width_zero_scores_zero():
    scores, indices = vk.topk_similarity(torch.empty(2, 0), torch.empty(3, 0), 2)
    assert scores.tolist() == [[0, 0], [0, 0]] and indices.tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("metric", METRICS)
def test_layout_of_inputs_does_not_matter(features, metric):
    queries, database = features
    wanted = vk.topk_similarity(queries, database, 6, metric=metric)
    wide = torch.full((700, 50), torch.nan)
    wide[:, 1:49:2] = database
    got = vk.topk_similarity(queries.T.contiguous().T, wide[:, 1:49:2], 6, metric=metric)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    expanded = queries[:1].expand(4, -1)
    assert torch.equal(
        vk.topk_similarity(expanded, database, 6, metric=metric)[1], wanted[1][:1].expand(4, -1)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("metric", METRICS)
def test_other_dtypes_score_the_values_they_hold(features, metric, dtype):
    queries, database = (x.to(dtype) for x in features)
    scores, indices = vk.topk_similarity(queries, database, 12, metric=metric)
    exact = exact_scores(queries, database, metric)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(indices, best(exact, 12)[1])
    torch.testing.assert_close(scores.double(), exact.gather(1, indices), rtol=1.2e-7, atol=1e-9)


def test_sum_is_folded_by_halves():
    for width in range(1, 40):
        x = torch.randn(width, dtype=torch.float64)
        terms = x.tolist()
        while len(terms) > 1:
            half = 2 ** (math.ceil(math.log2(len(terms))) - 1)
            terms = [a + b for a, b in zip(terms, terms[half:], strict=False)] + terms[
                len(terms) - half : half
            ]
        assert reference.tree_sum(x).item() == terms[0]


def test_l2_of_equal_vectors_is_zero_and_positive(features):
    scores, indices = vk.topk_similarity(features[1][:20], features[1], 1, metric="l2")
    assert indices.squeeze(1).tolist() == list(range(20))
    assert (scores == 0).all() and not scores.signbit().any()


def test_cosine_of_zero_vectors_is_zero():
    scores, indices = vk.topk_similarity(
        torch.zeros(1, 3), torch.tensor([[0.0, 0, 0], [1, 2, 3]]), 2, metric="cosine"
    )
    assert scores.tolist() == [[0, 0]] and indices.tolist() == [[0, 1]]


# Order


@pytest.mark.parametrize("metric", METRICS)
def test_equal_rows_rank_by_index(metric):
    generator = torch.Generator().manual_seed(1)
    database = torch.randint(-2, 3, (7, 5), generator=generator).float().repeat(60, 1)
    queries = torch.randint(-2, 3, (6, 5), generator=generator).float()
    # Small integers: sums and squares are exact, and equal cosines come from equal rows or exact multiples of them.
    scores, indices = vk.topk_similarity(queries, database, 150, metric=metric)
    distinct = vk.topk_similarity(queries, database[:7], 7, metric=metric)[0]
    assert torch.isin(scores, distinct).all()
    same = scores[:, 1:] == scores[:, :-1]
    assert same.sum() > 700
    assert (indices[:, 1:] > indices[:, :-1])[same].all()


def test_scores_that_only_float64_tells_apart_rank_by_index():
    # 1 + 2**-30 rounds to the float32 1, so the second row equals the first.
    database = torch.tensor([[1.0, 0.0], [1.0, 2.0**-30], [1.0, 2.0**-22]])
    scores, indices = vk.topk_similarity(torch.ones(1, 2), database, 3)
    assert indices.tolist() == [[2, 0, 1]]
    assert scores.tolist() == [[1 + 2.0**-22, 1.0, 1.0]]


@pytest.mark.parametrize("metric", METRICS)
def test_near_ties_below_float32_resolution_of_the_scan_are_resolved(metric):
    # Large terms that cancel: a float32 product of these is off by more than the scores differ.
    generator = torch.Generator().manual_seed(5)
    large = torch.randn(1, 64, generator=generator) * 1000
    signs = torch.tensor([1.0, -1.0]).repeat(32)
    small = torch.randn(400, 64, generator=generator) * 1e-2
    database = (large.repeat_interleave(2, 1)[:, :64] + small).contiguous()
    queries = signs.expand(3, -1) * torch.tensor([[1.0], [2.0], [3.0]])
    indices = vk.topk_similarity(queries, database, 20, metric=metric)[1]
    assert torch.equal(indices, best(exact_scores(queries, database, metric), 20)[1])
    product = queries @ database.T if metric == "dot" else F.normalize(queries) @ F.normalize(database).T
    if metric != "l2":
        assert not torch.equal(product.topk(20).indices, indices), (
            "the case must be one that float32 gets wrong"
        )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e15, 1e25])
def test_extreme_magnitudes(features, metric, scale):
    queries, database = features[0], features[1] * scale
    scores, indices = vk.topk_similarity(queries, database, 9, metric=metric)
    values, expected = best(exact_scores(queries, database, metric), 9)
    assert torch.equal(indices, expected)
    torch.testing.assert_close(scores, values, rtol=1.2e-7, atol=1e-9 if metric == "cosine" else 0)


@pytest.mark.parametrize("metric", METRICS)
def test_rows_of_very_different_magnitude(features, metric):
    queries, database = features[0], features[1].clone()
    database *= torch.logspace(-20, 20, 700)[
        torch.randperm(700, generator=torch.Generator().manual_seed(0))
    ].unsqueeze(1)
    assert torch.equal(
        vk.topk_similarity(queries, database, 30, metric=metric)[1],
        best(exact_scores(queries, database, metric), 30)[1],
    )


def test_overflowing_scores_are_infinite_and_tie():
    database = torch.tensor([[1e30, 1e30], [-1e30, 0], [3e30, 3e30], [1.0, 1.0], [1e30, -1e30]])
    scores, indices = vk.topk_similarity(torch.tensor([[1e30, 1e30]]), database, 5)
    # The last row's terms cancel: float32 would give inf - inf, float64 gives 0.
    assert indices.tolist() == [[0, 2, 3, 4, 1]]
    assert scores[0].tolist() == [math.inf, math.inf, pytest.approx(2e30), 0.0, -math.inf]


@pytest.mark.parametrize("metric", METRICS)
def test_nan_ranks_last_but_before_missing_rows(features, metric):
    queries, database = features[0].clone(), features[1][:12].clone()
    database[3, 5] = torch.nan
    database[0] = torch.nan
    mask = torch.ones(12, dtype=torch.bool)
    mask[11] = False
    scores, indices = vk.topk_similarity(queries, database, 12, metric=metric, mask=mask)
    assert indices[:, 9:].tolist() == [[0, 3, -1]] * 9
    assert scores[:, 9:11].isnan().all() and (scores[:, 11] == -math.inf).all()
    assert not scores[:, :9].isnan().any()
    queries[2, 0] = torch.nan
    scores, indices = vk.topk_similarity(queries, database, 4, metric=metric)
    assert scores[2].isnan().all() and indices[2].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_infinite_entries_follow_ieee_rules(metric):
    database = torch.tensor([[0.0, 1.0], [math.inf, 1.0], [-math.inf, 1.0], [1.0, 2.0]])
    scores, indices = vk.topk_similarity(torch.tensor([[1.0, 1.0]]), database, 4, metric=metric)
    assert indices.tolist() == ([[1, 3, 0, 2]] if metric == "dot" else [[0, 3, 1, 2]])
    assert scores[0].tolist() == (
        [math.inf, 3, 1, -math.inf] if metric == "dot" else [-1, -1, -math.inf, -math.inf]
    )


# Masks


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("shape", ["shared", "per query"])
def test_mask_leaves_only_allowed_rows(features, metric, density, shape):
    queries, database = features
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand((700,) if shape == "shared" else (9, 700), generator=generator) < density
    scores, indices = vk.topk_similarity(queries, database, 8, metric=metric, mask=mask)
    full = mask.expand(9, 700)
    exact = exact_scores(queries, database, metric).masked_fill(~full, -math.inf)
    values, expected = best(exact, 8)
    expected = expected.masked_fill(values == -math.inf, -1)
    assert torch.equal(indices, expected)
    assert (scores[indices < 0] == -math.inf).all() and (scores[indices >= 0] > -math.inf).all()


def test_allowed_row_with_score_minus_infinity_keeps_its_index():
    scores, indices = vk.topk_similarity(
        torch.ones(1, 1), torch.tensor([[-math.inf], [1.0]]), 2, mask=torch.tensor([True, False])
    )
    assert indices.tolist() == [[0, -1]] and scores.tolist() == [[-math.inf, -math.inf]]


# Invariance


@pytest.mark.parametrize("metric", METRICS)
def test_batch_does_not_change_bits(features, metric):
    queries, database = features
    scores, indices = vk.topk_similarity(queries, database, 20, metric=metric)
    for i in range(9):
        one = vk.topk_similarity(queries[i : i + 1], database, 20, metric=metric)
        assert torch.equal(one[0][0], scores[i]) and torch.equal(one[1][0], indices[i])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("tile", "chunk"), [(1, 1), (64, 24 * 7), (2**12, 24 * 300)])
def test_chunks_do_not_change_bits(features, metric, tile, chunk, monkeypatch):
    queries, database = features[0], features[1][:90]
    wanted = vk.topk_similarity(queries, database, 11, metric=metric)
    monkeypatch.setattr(topk_scan, "_TILE_SCORES", tile)
    monkeypatch.setattr(topk_scan, "_CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(topk_scan, "_RESCORE_ELEMENTS", 24 * 5)
    got = vk.topk_similarity(queries, database, 11, metric=metric)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("metric", METRICS)
def test_threads_do_not_change_bits(metric, restore_threads):
    generator = torch.Generator().manual_seed(11)
    queries, database = torch.randn(33, 200, generator=generator), torch.randn(3000, 200, generator=generator)
    queries.requires_grad_()
    database.requires_grad_()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        scores, indices = vk.topk_similarity(queries, database, 40, metric=metric)
        results.append((scores, indices, *torch.autograd.grad(scores.square().sum(), (queries, database))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_settings_that_round_matmul_operands_do_not_change_the_answer(features):
    wanted = vk.topk_similarity(*features, 25)
    torch.set_float32_matmul_precision("medium")
    try:
        assert topk_scan._rounds_products("cpu")
        got = vk.topk_similarity(*features, 25)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not topk_scan._rounds_products("cpu")
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_scan_holds_a_tile_of_scores_at_most():
    queries, database = torch.randn(500, 4), torch.randn(60_000, 4)
    with LargestTensor() as largest:
        topk_scan.scan_topk(queries, topk_scan.TensorRows(database), 3, "dot")
    # All scores would be 120 MB.
    assert largest.storage_bytes <= 16 * 2**20


def test_scan_rescores_few_rows():
    gathered = 0

    class Counting(topk_scan.TensorRows):
        def gather(self, rows):
            nonlocal gathered
            gathered += rows.numel()
            return super().gather(rows)

    generator = torch.Generator().manual_seed(0)
    queries, database = torch.randn(20, 64, generator=generator), torch.randn(20_000, 64, generator=generator)
    topk_scan.scan_topk(queries, Counting(database), 10, "dot")
    # k (1 + ln(M / k)) of 20,000 rows in random order, and the few that the bound leaves open
    assert gathered < 20 * 10 * (1 + math.log(2000))


# Gradients


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_match_finite_differences(small64, metric):
    mask = torch.rand(4, 9, generator=torch.Generator().manual_seed(0)) < 0.4

    def scores(queries, database):
        values, indices = vk.topk_similarity(
            queries, database, 3, metric=metric, mask=mask, backend="reference"
        )
        return values.masked_fill(indices < 0, 0.0)

    assert torch.autograd.gradcheck(scores, small64)
    assert torch.autograd.gradgradcheck(scores, small64)


@pytest.mark.parametrize("metric", METRICS)
def test_gradients_are_as_accurate_as_eager(features, metric):
    queries, database = (x.clone().requires_grad_() for x in features)
    scores, indices = vk.topk_similarity(queries, database, 10, metric=metric)
    weight = torch.randn(9, 10, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((scores * weight).sum(), (queries, database))

    def eager(dtype):
        q, x = (t.detach().to(dtype).requires_grad_() for t in features)
        rows = x[indices]
        if metric == "l2":
            s = -(q.unsqueeze(1) - rows).square().sum(-1)
        else:
            s = (q @ x.T) if metric == "dot" else F.normalize(q) @ F.normalize(x).T
            s = s.gather(1, indices)
        return torch.autograd.grad((s * weight.to(dtype)).sum(), (q, x))

    for mine, theirs, exact in zip(ours, eager(torch.float32), eager(torch.float64), strict=True):
        assert_as_accurate(mine, theirs, exact)


def test_gradient_of_a_row_hit_by_every_query_keeps_its_digits():
    # 3000 additions of 2**-9 to a bfloat16 sum stop at 1; in float32 they reach 5.86.
    queries = torch.full((3000, 1), 2.0**-9, dtype=torch.bfloat16)
    database = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    vk.topk_similarity(queries, database, 1)[0].sum().backward()
    assert database.grad.item() == pytest.approx(3000 * 2.0**-9, rel=2**-8)


def test_missing_rows_pass_no_gradient(small64):
    queries, database = small64
    scores, _ = vk.topk_similarity(queries, database, 3, mask=torch.zeros(9, dtype=torch.bool))
    grads = torch.autograd.grad(scores.sum(), (queries, database))
    assert all((g == 0).all() for g in grads)


def test_zero_vectors_have_finite_cosine_gradients():
    queries, database = torch.zeros(1, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    scores, _ = vk.topk_similarity(queries, database, 2, metric="cosine")
    scores.sum().backward()
    assert queries.grad.isfinite().all() and database.grad.isfinite().all()


# Zero-shot classification


def eager_zero_shot(images, classes, scale, k):
    if classes.ndim == 3:
        classes = F.normalize(classes, dim=-1).mean(1)
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(classes, dim=-1).T
    probabilities, indices = logits.softmax(-1).topk(k)
    return probabilities, indices, logits.logsumexp(-1)


@pytest.fixture(params=["vectors", "prompts"])
def classification(request):
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(17, 48, generator=generator)
    classes = torch.randn((31, 48) if request.param == "vectors" else (31, 7, 48), generator=generator)
    return images, classes * 3


@pytest.mark.parametrize("k", [1, 5, 31])
def test_zero_shot_is_softmax_of_scaled_cosines(classification, k):
    images, classes = classification
    ours = vk.zero_shot(images, classes, 20.0, k=k)
    eager = eager_zero_shot(images, classes, 20.0, k)
    exact = eager_zero_shot(images.double(), classes.double(), 20.0, k)
    assert torch.equal(ours[1], exact[1])
    assert_as_accurate(ours[0], eager[0], exact[0], "probabilities")
    assert_as_accurate(ours[2], eager[2], exact[2], "lse")
    assert ours[0].dtype == ours[2].dtype == torch.float32 and ours[1].dtype == torch.int64
    if k == 31:
        # 31 probabilities of at most one, each off by what a float32 logit of up to 20 can be: 20 * 2**-24 relative
        torch.testing.assert_close(ours[0].sum(-1), torch.ones(17), rtol=0, atol=31 * 20 * 2.0**-24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_zero_shot_takes_other_dtypes(classification, dtype):
    images, classes = (x.to(dtype) for x in classification)
    probabilities, indices, lse = vk.zero_shot(images, classes, torch.tensor(20.0), k=4)
    exact = eager_zero_shot(images.double(), classes.double(), 20.0, 4)
    assert torch.equal(indices, exact[1])
    assert probabilities.dtype == lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Half-precision inputs are widened first, so only float32 roundings of logits up to 20 are left.
    torch.testing.assert_close(probabilities.double(), exact[0], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(lse.double(), exact[2], rtol=1e-6, atol=0)


def test_zero_shot_gradients_match_finite_differences(small64):
    scale = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    prompts = torch.randn(
        9, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(8), requires_grad=True
    )

    def floating_outputs(images, classes, logit_scale):
        probabilities, _, lse = vk.zero_shot(images, classes, logit_scale, k=3, backend="reference")
        return probabilities, lse

    for classes in (small64[1], prompts):
        assert torch.autograd.gradcheck(floating_outputs, (small64[0], classes, scale))
        assert torch.autograd.gradgradcheck(floating_outputs, (small64[0], classes, scale))


def test_zero_shot_gradients_are_as_accurate_as_eager(classification):
    def gradients(function, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (*classification, torch.tensor(20.0))]
        probabilities, _, lse = function(*inputs)
        return torch.autograd.grad(probabilities.square().sum() + lse.sum(), inputs)

    ours = gradients(lambda *x: vk.zero_shot(*x, k=6), torch.float32)
    eager = gradients(lambda *x: eager_zero_shot(*x, 6), torch.float32)
    exact = gradients(lambda *x: eager_zero_shot(*x, 6), torch.float64)
    for mine, theirs, right in zip(ours, eager, exact, strict=True):
        # Several draws are not needed: each gradient sums over enough terms that eager is not exact by luck.
        assert_as_accurate(mine, theirs, right)


@pytest.mark.parametrize("threads", [1, 3])
def test_zero_shot_does_not_depend_on_the_batch(classification, threads, restore_threads):
    images, classes = classification
    _, indices, _ = vk.zero_shot(images, classes, 50.0, k=31)
    torch.set_num_threads(threads)
    parts = [vk.zero_shot(x, classes, 50.0, k=31)[1] for x in images.split(3)]
    assert torch.equal(torch.cat(parts), indices)


def test_zero_shot_of_no_images():
    probabilities, indices, lse = vk.zero_shot(torch.empty(0, 4), torch.randn(6, 4), k=2)
    assert probabilities.shape == indices.shape == (0, 2) and lse.shape == (0,)


def test_zero_shot_warns_once_where_its_gradient_keeps_many_logits(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_warned", set())
    # float64, which no kernel serves
    images, classes = torch.randn(1500, 2, dtype=torch.float64), torch.randn(1500, 2, dtype=torch.float64)
    images.requires_grad_()
    with caplog.at_level(logging.WARNING, logger="vlmkernels"):
        with torch.no_grad():
            vk.zero_shot(images, classes)
        assert not caplog.records
        vk.zero_shot(images, classes)
        vk.zero_shot(images, classes)
    assert len(caplog.records) == 1 and "vk.zero_shot" in caplog.text


# Registration


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_topk(small64, metric, masked):
    mask = torch.rand(4, 9, generator=torch.Generator().manual_seed(0)) < 0.4 if masked else None
    torch.library.opcheck(topk.topk_similarity_op, (*small64, 3, metric, mask, "reference"))
    torch.library.opcheck(reference.topk_scan, (*(x.detach() for x in small64), 3, metric, mask))
    indices = torch.ones(4, 3, dtype=torch.int64)
    arguments = (*(x.detach() for x in small64), indices, metric, "reference", [True, False])
    torch.library.opcheck(
        topk.topk_similarity_backward_op, (torch.ones(4, 3, dtype=torch.float64), *arguments)
    )


def test_opcheck_zero_shot(small64):
    images, classes = small64
    scale = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    for c in (classes, torch.randn(9, 2, 6, dtype=torch.float64, requires_grad=True)):
        torch.library.opcheck(topk.zero_shot_op, (images, c, scale, 3, "reference"))
    saved = [x.detach() for x in (images, classes, scale)]
    grads = torch.ones(4, 3, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    probabilities, indices, lse = vk.zero_shot(*saved, k=3)
    torch.library.opcheck(
        topk.zero_shot_backward_op,
        (*grads, *saved, indices, probabilities, lse, "reference", [True, True, True]),
    )


@pytest.mark.parametrize("metric", METRICS)
def test_op_and_reference_agree(features, metric):
    results = []
    for function in (
        lambda q, x: vk.topk_similarity(q, x, 7, metric=metric, backend="reference"),
        lambda q, x: topk.topk_similarity_op(q, x, 7, metric, None, "reference"),
    ):
        queries, database = (x.clone().requires_grad_() for x in features)
        scores, indices = function(queries, database)
        results.append((scores, indices, *torch.autograd.grad(scores.square().sum(), (queries, database))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_op_and_reference_agree_for_zero_shot(classification):
    results = []
    for op in (False, True):
        inputs = [x.clone().requires_grad_() for x in (*classification, torch.tensor(9.0))]
        if op:
            probabilities, lse, indices = topk.zero_shot_op(*inputs, 4, "reference")
        else:
            probabilities, indices, lse = vk.zero_shot(*inputs, k=4, backend="reference")
        grads = torch.autograd.grad(probabilities.sum() + lse.square().sum(), inputs)
        results.append((probabilities, indices, lse, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_second_derivative_of_the_op_names_the_way_out(small64):
    scores, _ = topk.topk_similarity_op(*small64, 3, "dot", None, "reference")
    (grad,) = torch.autograd.grad(scores.square().sum(), small64[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r'backend="reference" to vk\.topk_similarity'):
        grad.sum().backward()


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiles_to_one_graph_with_gradients(features, fresh_dynamo):
    def loss(queries, database, scale):
        scores, indices = vk.topk_similarity(queries, database, 5, metric="l2")
        probabilities, _, lse = vk.zero_shot(queries, database, scale, k=3)
        return scores.sum() + probabilities.square().sum() + lse.sum(), indices

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        inputs = [x.clone().requires_grad_() for x in (*features, torch.tensor(3.0))]
        value, indices = function(*inputs)
        results.append((value, indices, *torch.autograd.grad(value, inputs)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_code_settles_on_dynamic_sizes(features, fresh_dynamo):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, x: vk.topk_similarity(q, x, 5), fullgraph=True, backend=counter)
    for n, m in ((9, 700), (8, 600), (7, 500), (5, 400), (3, 50)):
        queries, database = features[0][:n], features[1][:m]
        got, wanted = compiled(queries, database), vk.topk_similarity(queries, database, 5)
        assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    assert counter.frame_count <= 2


def test_compiled_code_refuses_what_eager_refuses(features, fresh_dynamo):
    def fake_call(queries, database):
        return topk.topk_similarity_op(queries, database, 5, "dot", None, "reference")

    with pytest.raises(Exception, match=r"vk\.topk_similarity: queries and database must have one width"):
        torch.compile(fake_call, fullgraph=True, backend="aot_eager")(features[0], features[1][:, :5])


@pytest.mark.parametrize("metric", METRICS)
def test_vmap_maps_over_problems(metric):
    generator = torch.Generator().manual_seed(6)
    queries, database = torch.randn(3, 5, 8, generator=generator), torch.randn(3, 20, 8, generator=generator)
    mask = torch.rand(20, 3, generator=generator) < 0.5

    def search(q, x, m):
        return vk.topk_similarity(q, x, 4, metric=metric, mask=m)

    scores, indices = torch.vmap(search, in_dims=(0, 0, 1))(queries, database, mask)
    for i in range(3):
        wanted = search(queries[i], database[i], mask[:, i])
        assert torch.equal(scores[i], wanted[0]) and torch.equal(indices[i], wanted[1])


def test_vmap_of_a_gradient():
    generator = torch.Generator().manual_seed(6)
    queries, database = torch.randn(3, 5, 8, generator=generator), torch.randn(20, 8, generator=generator)

    def loss(q, x):
        return vk.topk_similarity(q, x, 4)[0].square().sum() + vk.zero_shot(q, x, 3.0)[2].sum()

    grads = torch.vmap(torch.func.grad(loss), in_dims=(0, None))(queries, database)
    for i in range(3):
        q = queries[i].clone().requires_grad_()
        torch.testing.assert_close(grads[i], torch.autograd.grad(loss(q, database), q)[0])


def test_autocast_rounds_the_operands_and_nothing_else(features):
    queries, database = features
    wanted = vk.topk_similarity(queries.bfloat16(), database.bfloat16(), 10, metric="cosine")
    classes = vk.zero_shot(queries.bfloat16(), database.bfloat16(), 10.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # A mixture is fine here: both become bfloat16.
        got = vk.topk_similarity(queries, database.bfloat16(), 10, metric="cosine")
        got_classes = vk.zero_shot(queries, database.bfloat16(), 10.0)
    assert all(torch.equal(a, b) for a, b in zip((*got, *got_classes), (*wanted, *classes), strict=True))


# Refusals

Q, X = torch.zeros(2, 3), torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([[1.0]], X, 1), {}, TypeError, "queries must be a tensor, got list"),
        ((Q, X.long(), 1), {}, TypeError, "database must be floating"),
        ((Q, X.double(), 1), {}, TypeError, "queries and database must have one dtype"),
        ((Q[0], X, 1), {}, ValueError, r"queries must be \[N, D\], got \[3\]"),
        ((Q, X[None], 1), {}, ValueError, r"database must be \[M, D\], got \[1, 4, 3\]"),
        ((Q, X[:, :2], 1), {}, ValueError, r"one width, got queries \[2, 3\], database \[4, 2\]"),
        ((Q, X.to("meta"), 1), {}, ValueError, "must be on one device"),
        ((Q, X, 5), {}, ValueError, "k must be at most the number of database rows, 4, got 5"),
        ((Q, X, 0), {}, ValueError, "k must be at least 1, got 0"),
        ((Q, X, 1.0), {}, TypeError, "k must be an int, got float"),
        ((Q, X[:0], 1), {}, ValueError, "k must be at most the number of database rows, 0, got 1"),
        ((Q, X, 1), {"metric": "L2"}, ValueError, "metric must be one of .*, got 'L2'"),
        ((Q, X, 1), {"mask": torch.ones(4)}, TypeError, "mask must be bool, got torch.float32"),
        (
            (Q, X, 1),
            {"mask": torch.ones(2, 3, dtype=torch.bool)},
            ValueError,
            r"mask must be \[M\] = \[4\] or",
        ),
        ((Q, X, 1), {"backend": "gpu"}, ValueError, "backend must be None or one of"),
        ((Q, X, 1), {"backend": "triton"}, NotImplementedError, "backend 'triton' cannot serve this call"),
    ],
)
def test_topk_refuses_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=r"vk\.topk_similarity: .*" + message):
        vk.topk_similarity(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((None, X), {}, TypeError, "image_features must be a tensor, got NoneType"),
        ((Q, X.half()), {}, TypeError, "must have one dtype"),
        ((Q, X[0]), {}, ValueError, r"class_features must be \[C, D\] or \[C, P, D\], got \[3\]"),
        ((Q, X[:, :2]), {}, ValueError, "must have one width"),
        ((Q, X[:, None][:, :0]), {}, ValueError, "at least one prompt per class"),
        ((Q, X), {}, ValueError, "k must be at most the number of classes, 4, got 5"),
        ((Q, X, "1"), {"k": 1}, TypeError, "logit_scale must be a number, got str"),
        (
            (Q, X, torch.ones(1)),
            {"k": 1},
            ValueError,
            r"logit_scale must be a float or a 0-d tensor, got \[1\]",
        ),
        ((Q, X, -1.0), {"k": 1}, ValueError, "logit_scale must be positive and finite, got -1.0"),
        ((Q, X, math.inf), {"k": 1}, ValueError, "logit_scale must be positive and finite, got inf"),
        ((Q, X), {"k": 1, "backend": "triton"}, NotImplementedError, "cannot serve this call"),
    ],
)
def test_zero_shot_refuses_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=r"vk\.zero_shot: .*" + message):
        vk.zero_shot(*arguments, **options)


@pytest.mark.parametrize("function", [vk.topk_similarity, vk.zero_shot])
def test_docstring_examples(function):
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder(recurse=False).find(function, globs={"torch": torch, "vk": vk}):
        runner.run(example)
    assert runner.summarize(verbose=False) == (0, 3)
