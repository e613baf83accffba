# SPDX-License-Identifier: Apache-2.0
"""The contrastive losses: known values, accuracy against float64, layouts, edges, options, refusals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from contrastive_problems import BACKENDS, DRAWS, OPERANDS, OPS, SQUARE, check_accuracy, draws, make, shapes
from oracle import assert_as_accurate, ulp

from vlmkernels import _native
from vlmkernels.ops import contrastive as ops
from vlmkernels.ops.reference import contrastive as reference

needs_cpu = pytest.mark.skipif(
    _native.cpu_reason is not None, reason=f"vlmkernels._cpu: {_native.cpu_reason}"
)

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_op = pytest.mark.parametrize("op", OPS)


def golden_features(dtype=torch.float32):
    """Four pairs in three dimensions that every specification's golden values are computed on."""
    angle = 1 + 3 * torch.arange(4.0, dtype=torch.float64)[:, None] + torch.arange(3.0, dtype=torch.float64)
    image, text = angle.sin(), angle.sin() + 0.5 * angle.cos()
    return F.normalize(image, dim=-1).to(dtype), F.normalize(text, dim=-1).to(dtype)


# Known values.


@each_backend
def test_clip_loss_golden_value(backend):
    image, text = golden_features()
    assert ops.clip_loss(image, text, 10.0, backend=backend).item() == pytest.approx(0.69855462, rel=2e-6)


@each_backend
def test_clip_loss_with_smoothing_golden_value(backend):
    image, text = golden_features()
    loss = ops.clip_loss(image, text, 1 / 0.1, label_smoothing=0.1, backend=backend)
    assert loss.item() == pytest.approx(1.59538933, rel=2e-6)


@each_backend
def test_siglip_loss_golden_value(backend):
    image, text = golden_features()
    assert ops.siglip_loss(image, text, 10.0, -10.0, backend=backend).item() == pytest.approx(
        1.65556897, rel=2e-6
    )


@each_backend
def test_multi_positive_loss_golden_value(backend):
    image, text = golden_features()
    labels = torch.tensor([0, 0, 1, 2])
    loss = ops.multi_positive_loss(image, text, 10.0, labels, labels, backend=backend)
    assert loss.item() == pytest.approx(5.17085093, rel=2e-6)


@each_backend
def test_info_nce_golden_rows(backend):
    image, text = golden_features()
    assert ops.info_nce(image, text, 10.0, backend=backend).item() == pytest.approx(0.70429036, rel=2e-6)
    assert ops.info_nce(text, image, 10.0, backend=backend).item() == pytest.approx(0.69281888, rel=2e-6)


@each_backend
def test_linear_cross_entropy_golden_rows(backend):
    image, text = golden_features()
    loss = ops.linear_cross_entropy(image, text, torch.arange(4), logit_scale=10.0, backend=backend)
    assert loss.item() == pytest.approx(0.70429036, rel=2e-6)


@each_backend
@pytest.mark.parametrize("scale", [1.0, 1 / 0.07])
def test_clip_loss_orthonormal_features(backend, scale):
    image = torch.eye(8)
    expected = math.log1p(7 * math.exp(-scale))
    # a converged loss is the logarithm of a sum just above 1: exact to the spacing of float32 there
    loss = ops.clip_loss(image, image, scale, backend=backend).item()
    assert loss == pytest.approx(expected, rel=1e-6, abs=torch.finfo(torch.float32).eps)


def test_clip_loss_orthonormal_features_float64():
    image = torch.eye(8, dtype=torch.float64)
    assert ops.clip_loss(image, image, 1.0).item() == pytest.approx(1.27400884, rel=1e-8)
    assert ops.clip_loss(image, image, 1 / 0.07).item() == pytest.approx(4.374e-6, rel=1e-3)


@each_backend
def test_siglip_loss_orthonormal_features(backend):
    image = torch.eye(8)
    assert ops.siglip_loss(image, image, 10.0, -10.0, backend=backend).item() == pytest.approx(
        0.69346497, rel=1e-6
    )


@each_backend
def test_siglip_loss_zero_similarities(backend):
    zero = torch.zeros(8, 4)
    assert ops.siglip_loss(zero, zero, 10.0, -10.0, backend=backend).item() == pytest.approx(
        10.00036319, rel=1e-6
    )


@each_backend
def test_siglip_loss_far_tail_keeps_its_digits(backend):
    # every pair is right by a wide margin: 64 terms of log(1 + exp(-30))
    image, scale, bias = torch.eye(8), torch.tensor(60.0), torch.tensor(-30.0, requires_grad=True)
    loss = ops.siglip_loss(image, image, scale, bias, backend=backend)
    (grad,) = torch.autograd.grad(loss, bias)
    tail = math.log1p(math.exp(-30.0))
    assert loss.item() == pytest.approx(8 * tail, rel=1e-5)
    assert grad.item() == pytest.approx((56 - 8) / 8 * math.exp(-30.0), rel=1e-5)


@each_op
def test_reference_equals_library_cross_entropy(op):
    problem = make(op, 7, None if op in SQUARE else 11, 5, seed=1).to(torch.float64)
    first, second = (problem.tensors[name] for name in OPERANDS[op])
    logits = problem.tensors["logit_scale"] * first @ second.T
    if op == "clip_loss":
        both = [F.cross_entropy(z, torch.arange(7), label_smoothing=0.1) for z in (logits, logits.T)]
        expected = sum(both) / 2
    elif op == "siglip_loss":
        targets = torch.eye(7, dtype=torch.float64)
        expected = (
            F.binary_cross_entropy_with_logits(
                logits + problem.tensors["logit_bias"], targets, reduction="sum"
            )
            / 7
        )
    elif op == "multi_positive_loss":
        equal = (problem.options["image_labels"][:, None] == problem.options["text_labels"]).double()
        directions = []
        for z, targets in ((logits, equal), (logits.T, equal.T)):
            rows = targets.sum(-1) > 0
            directions.append(F.cross_entropy(z[rows], F.normalize(targets[rows], p=1, dim=-1)))
        expected = sum(directions) / 2
    elif op == "info_nce":
        usable = problem.options["key_mask"]
        renumbered = usable.cumsum(0)[problem.options["positives"]] - 1
        expected = F.cross_entropy(logits[:, usable], renumbered)
    else:
        expected = F.cross_entropy(
            logits + problem.tensors["bias"], problem.options["targets"], label_smoothing=0.1
        )
    torch.testing.assert_close(problem.loss(reference), expected)


# Accuracy.


@needs_cpu
@pytest.mark.parametrize(("op", "shape"), [(op, shape) for op in OPS for shape in shapes(op)])
def test_float32_is_as_accurate_as_eager(op, shape):
    check_accuracy(draws(op, *shape))


@needs_cpu
@pytest.mark.parametrize(("op", "shape"), [(op, shape) for op in OPS for shape in shapes(op)])
def test_bfloat16_compute_is_as_accurate_as_eager(op, shape):
    check_accuracy(draws(op, *shape), compute_dtype=torch.bfloat16)


@needs_cpu
@each_op
def test_bfloat16_features_are_as_accurate_as_eager(op):
    problems = []
    for seed in range(DRAWS):
        problem = make(op, 77, d=64, seed=seed)
        first, second = OPERANDS[op]
        problems.append(problem.but(**{name: problem.tensors[name].bfloat16() for name in (first, second)}))
    check_accuracy(problems)


@needs_cpu
@each_op
def test_bfloat16_loss_is_the_loss_of_rounded_operands(op):
    problem = make(op, 77, d=100)
    rounded = problem.but(**{name: problem.tensors[name].bfloat16().float() for name in OPERANDS[op]})
    loss = problem.loss(ops, backend="cpu", compute_dtype=torch.bfloat16)
    exact = rounded.to(torch.float64).loss(reference)
    assert_as_accurate(loss, rounded.loss(reference), exact, at_least=ulp(1.0, torch.float32))


@needs_cpu
@each_op
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_width_of_one(op, compute_dtype):
    # judged by itself: eager adds products of this width up by another routine, in another order
    problem = make(op, 50, d=1)
    results = problem.results(ops, backend="cpu", compute_dtype=compute_dtype)
    expected = problem.to(torch.float64).results(reference)
    rtol, atol = (1e-5, 1e-5) if compute_dtype is None else (2**-7, 2**-8)  # bf16 rounds twice, 2**-9 each
    for name, result in results.items():
        torch.testing.assert_close(result.double(), expected[name], rtol=rtol, atol=atol)


@needs_cpu
@each_op
def test_large_logits_of_unnormalised_features(op):
    problem = make(op, 50, d=64)
    scaled = {name: 5 * problem.tensors[name] for name in OPERANDS[op]}
    check_accuracy([problem.but(**scaled, logit_scale=torch.tensor(100.0))])


@needs_cpu
@each_op
def test_zero_features(op):
    problem = make(op, 50, d=16)
    zeros = {name: torch.zeros_like(problem.tensors[name]) for name in OPERANDS[op]}
    check_accuracy([problem.but(**zeros)])


@needs_cpu
@each_op
def test_equal_rows_tie(op):
    problem = make(op, 77, d=16)
    first, second = OPERANDS[op]
    repeated = {name: problem.tensors[name][torch.arange(77) // 10] for name in (first, second)}
    check_accuracy([problem.but(**repeated)])


@needs_cpu
def test_more_dot_products_than_are_saved_for_backward():
    # 4,224 x 4,224 float32 are more than the 64 MiB that a loss may keep: backward forms them again
    check_accuracy([make("clip_loss", 4224, d=4)], upstream=-2.0)


@needs_cpu
def test_more_logits_than_one_chunk_of_rows():
    check_accuracy([make("linear_cross_entropy", 1100, 11000, 4)], upstream=-2.0)


# Layouts.


@needs_cpu
@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "layout", ["transposed", "every other column", "columns of a wider matrix", "rows of a taller one"]
)
def test_layout_does_not_change_the_result(op, dtype, layout):
    problem = make(op, 50, d=33)
    operands = {name: problem.tensors[name].to(dtype) for name in OPERANDS[op]}
    strided = {}
    for name, x in operands.items():
        if layout == "transposed":
            strided[name] = x.T.contiguous().T
        elif layout == "every other column":
            strided[name] = torch.stack((x, torch.full_like(x, torch.nan)), -1).flatten(-2)[:, ::2]
        elif layout == "columns of a wider matrix":
            strided[name] = F.pad(x, (3, 5), value=torch.nan)[:, 3:-5]
        else:
            strided[name] = torch.stack((torch.full_like(x, torch.nan), x), 1).flatten(0, 1)[1::2]
    expected = problem.but(**operands).results(ops, backend="cpu")
    for name, result in problem.but(**strided).results(ops, backend="cpu").items():
        assert torch.equal(result, expected[name]), name


@needs_cpu
@each_op
def test_expanded_features(op):
    problem = make(op, 50, d=33)
    first, _second = OPERANDS[op]
    expanded = problem.but(**{first: problem.tensors[first][:1].expand(50, 33)})
    contiguous = problem.but(**{first: expanded.tensors[first].contiguous()})
    expected = contiguous.results(ops, backend="cpu")
    for name, result in expanded.results(ops, backend="cpu").items():
        assert torch.equal(result, expected[name]), name


@each_backend
def test_one_tensor_on_both_sides(backend):
    features = make("clip_loss", 20, d=8).tensors["image_features"].requires_grad_()
    (grad,) = torch.autograd.grad(ops.clip_loss(features, features, 10.0, backend=backend), features)
    wide = features.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(reference.clip_loss(wide, wide, 10.0), wide)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-6)


@each_backend
@pytest.mark.parametrize("op", [op for op in OPS if op != "linear_cross_entropy"])
@pytest.mark.parametrize("lead", [(5,), (2, 3)])
def test_leading_dimensions_are_the_mean_of_their_problems(op, lead, backend):
    problem = make(op, 9, None if op in SQUARE else 12, 8, lead=lead)
    count = math.prod(lead)
    losses = []
    for i in range(count):
        one = {name: x.flatten(0, len(lead) - 1)[i] for name, x in problem.tensors.items() if x.ndim > 0}
        of_rows = {
            name: x.flatten(0, len(lead) - 1)[i] for name, x in problem.options.items() if hasattr(x, "ndim")
        }
        losses.append(problem.but(**one, **of_rows).to(torch.float64).loss(reference))
    expected = torch.stack(losses).mean()
    assert problem.loss(ops, backend=backend).item() == pytest.approx(expected.item(), rel=1e-5)


@needs_cpu
@each_op
@pytest.mark.parametrize("lead", [(5,), (2, 3), (1, 1, 40)])
def test_leading_dimensions_gradients(op, lead):
    check_accuracy(
        [make(op, 9, None if op in SQUARE else 12, 8, lead=lead, seed=seed) for seed in range(DRAWS)]
    )


@needs_cpu
def test_leading_dimension_of_stride_zero():
    problem = make("info_nce", 9, 12, 8, lead=(4,))
    shared = problem.but(keys=problem.tensors["keys"][0].expand(4, 12, 8))
    expected = shared.but(keys=shared.tensors["keys"].contiguous()).results(ops, backend="cpu")
    for name, result in shared.results(ops, backend="cpu").items():
        assert torch.equal(result, expected[name]), name


# Edges.


@each_backend
@each_op
def test_no_rows_give_nan_and_zero_gradients(op, backend):
    problem = make(op, 0, 0 if op in SQUARE else 6, 8)
    results = problem.results(ops, backend=backend)
    assert results.pop("loss").isnan()
    for name, grad in results.items():
        assert grad.abs().sum() == 0, name


@each_backend
@pytest.mark.parametrize("op", [op for op in OPS if op != "linear_cross_entropy"])
def test_no_problems_give_nan_and_zero_gradients(op, backend):
    results = make(op, 4, d=8, lead=(0,)).results(ops, backend=backend)
    assert results.pop("loss").isnan()
    for name, grad in results.items():
        assert grad.abs().sum() == 0, name


@each_backend
@each_op
def test_no_width_is_a_loss_of_equal_logits(op, backend):
    problem = make(op, 4, d=0)
    expected = problem.to(torch.float64).loss(reference)
    assert problem.loss(ops, backend=backend).item() == pytest.approx(expected.item(), rel=1e-6)


@each_backend
@pytest.mark.parametrize("op", ["clip_loss", "info_nce"])
def test_one_pair_is_certain(op, backend):
    results = make(op, 1, d=8).results(ops, backend=backend)
    for name, result in results.items():
        assert result.abs().max() == 0, name


@needs_cpu
@each_op
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_non_finite_features_spread_as_in_eager(op, value, side):
    problem = make(op, 60, d=16)
    name = OPERANDS[op][side]
    features = problem.tensors[name].clone()
    features[13, 5] = value
    problem = problem.but(**{name: features})
    if op == "info_nce":
        problem = problem.but(key_mask=None)
    expected, results = problem.results(reference), problem.results(ops, backend="cpu")
    if op == "clip_loss":
        del results["gradient of logit_bias"]  # zero whatever the features are: the bias cancels
    for name, result in results.items():
        assert torch.equal(result.isnan(), expected[name].isnan()), name


@needs_cpu
@pytest.mark.parametrize("op", ["clip_loss", "siglip_loss"])
@pytest.mark.parametrize("argument", ["logit_scale", "logit_bias"])
def test_nan_scale_or_bias_gives_nan(op, argument):
    results = make(op, 9, d=8).but(**{argument: torch.tensor(math.nan)}).results(ops, backend="cpu")
    if op == "clip_loss":
        assert results.pop("gradient of logit_bias") == 0
    assert all(result.isnan().all() for result in results.values())


@needs_cpu
@each_op
@pytest.mark.parametrize("scale", [0.0, -3.0])
def test_scale_need_not_be_positive(op, scale):
    check_accuracy(
        [make(op, 50, d=17, seed=seed).but(logit_scale=torch.tensor(scale)) for seed in range(DRAWS)]
    )


@needs_cpu
def test_tiny_values_do_not_vanish():
    problem = make("clip_loss", 16, d=8)
    tiny = {name: problem.tensors[name] * 1e-30 for name in OPERANDS["clip_loss"]}
    check_accuracy([problem.but(**tiny, logit_scale=torch.tensor(1e30))])
