# SPDX-License-Identifier: Apache-2.0
"""The options of the contrastive losses: bias, labels, positives, masks, ignored targets, smoothing, reductions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contrastive_problems import BACKENDS, DRAWS, OPERANDS, OPS, check_accuracy, make, row_gradient

from vlmkernels import _native
from vlmkernels.ops import contrastive as ops
from vlmkernels.ops.reference import contrastive as reference

needs_cpu = pytest.mark.skipif(
    _native.cpu_reason is not None, reason=f"vlmkernels._cpu: {_native.cpu_reason}"
)

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_op = pytest.mark.parametrize("op", OPS)


@each_backend
def test_clip_loss_bias_changes_nothing(backend):
    problem = make("clip_loss", 33, d=8)
    without = problem.but(logit_bias=None).loss(ops, backend=backend)
    assert problem.loss(ops, backend=backend).item() == pytest.approx(without.item(), rel=1e-6)
    assert problem.results(ops, backend=backend)["gradient of logit_bias"].item() == pytest.approx(
        0.0, abs=1e-6
    )


@each_backend
@each_op
def test_scale_may_be_a_number(op, backend):
    problem = make(op, 20, d=8)
    scale = problem.tensors["logit_scale"].item()
    tensor_loss = problem.loss(ops, backend=backend)
    assert torch.equal(
        problem.but(logit_scale=None).loss(ops, backend=backend, logit_scale=scale), tensor_loss
    )


@each_backend
def test_labels_without_a_match_leave_the_mean(backend):
    problem = make("multi_positive_loss", 6, 5, 8)
    image_labels, text_labels = torch.tensor([3, 3, -7, 8, 9, 2**40]), torch.tensor([3, 8, 8, 2**40, 77])
    problem = problem.but(image_labels=image_labels, text_labels=text_labels)
    u, v = (problem.tensors[name].double() for name in OPERANDS["multi_positive_loss"])
    logits = problem.tensors["logit_scale"].double() * u @ v.T
    p, q = logits.log_softmax(-1), logits.T.log_softmax(-1)
    images = -(p[0, 0] + p[1, 0] + (p[3, 1] + p[3, 2]) / 2 + p[5, 3]) / 4
    texts = -((q[0, 0] + q[0, 1]) / 2 + q[1, 3] + q[2, 3] + q[3, 5]) / 4
    expected = ((images + texts) / 2).item()
    assert problem.loss(ops, backend=backend).item() == pytest.approx(expected, rel=1e-5)


@each_backend
def test_no_equal_labels_give_nan_and_zero_gradients(backend):
    problem = make("multi_positive_loss", 6, 5, 8)
    problem = problem.but(image_labels=torch.arange(6), text_labels=torch.arange(5) + 10)
    results = problem.results(ops, backend=backend)
    assert results.pop("loss").isnan()
    for name, grad in results.items():
        assert grad.abs().sum() == 0, name


@each_backend
def test_info_nce_default_positives_are_the_first_keys(backend):
    problem = make("info_nce", 6, 17, 8)
    first = problem.but(positives=torch.arange(6), key_mask=None)
    assert torch.equal(first.but(positives=None).loss(ops, backend=backend), first.loss(ops, backend=backend))


@each_backend
def test_info_nce_masked_keys_are_as_good_as_absent(backend):
    problem = make("info_nce", 6, 17, 8).but(positives=torch.tensor([0, 1, 2, 3, 4, 5]))
    mask = torch.arange(17) < 9
    results = problem.but(key_mask=mask).results(ops, backend=backend)
    keys = problem.tensors["keys"]
    shorter = problem.but(keys=keys[:9], key_mask=None).results(ops, backend=backend)
    torch.testing.assert_close(results["loss"], shorter["loss"])
    torch.testing.assert_close(results["gradient of queries"], shorter["gradient of queries"])
    assert results["gradient of keys"][9:].abs().max() == 0


@each_backend
def test_info_nce_masked_key_may_hold_anything_but_nan(backend):
    problem = make("info_nce", 6, 17, 8).but(positives=torch.arange(6), key_mask=torch.arange(17) < 9)
    keys = problem.tensors["keys"].clone()
    keys[12] = 1e30
    results = problem.but(keys=keys).results(ops, backend=backend)
    expected = problem.results(ops, backend=backend)
    torch.testing.assert_close(results["loss"], expected["loss"])


@each_backend
@pytest.mark.parametrize("lead", [(), (5,)])
def test_info_nce_masked_positive_is_refused(lead, backend):
    problem = make("info_nce", 6, 17, 8, lead=lead).but(key_mask=torch.zeros(*lead, 17, dtype=torch.bool))
    for positives in (problem.options["positives"], None):
        with pytest.raises(ValueError, match=r"vk\.info_nce: positives must be usable keys"):
            problem.but(positives=positives).loss(ops, backend=backend)


def test_masked_positive_has_infinite_loss_in_the_definition():
    problem = make("info_nce", 6, 17, 8).but(positives=torch.arange(6), key_mask=torch.arange(17) != 2)
    losses = problem.loss(reference, reduction="none")
    assert losses.isinf().tolist() == [False, False, True, False, False, False]


@each_backend
@pytest.mark.parametrize("op", ["info_nce", "linear_cross_entropy"])
@pytest.mark.parametrize("lead", [(), (3,)])
def test_reductions_agree(op, lead, backend):
    problem = make(op, 20, 30, 8, lead=lead, seed=1)
    each = problem.loss(ops, backend=backend, reduction="none")
    assert each.shape == (*lead, 20)
    counted = (
        problem.options["targets"] != -100
        if op == "linear_cross_entropy"
        else torch.ones(*lead, 20, dtype=bool)
    )
    assert each[~counted].abs().sum() == 0
    assert problem.loss(ops, backend=backend, reduction="sum").item() == pytest.approx(
        each.sum().item(), rel=1e-5
    )
    assert problem.loss(ops, backend=backend).item() == pytest.approx(each[counted].mean().item(), rel=1e-5)


@needs_cpu
@pytest.mark.parametrize("op", ["info_nce", "linear_cross_entropy"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_other_reductions_are_as_accurate_as_eager(op, reduction, compute_dtype):
    problems = [make(op, 77, 130, 33, seed=seed).but(reduction=reduction) for seed in range(DRAWS)]
    upstream = row_gradient(problems[0]) if reduction == "none" else 0.37
    check_accuracy(problems, upstream=upstream, compute_dtype=compute_dtype)


@each_backend
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignore_index_may_be_a_class(smoothing, backend):
    hidden, weight = (make("info_nce", 12, 5, 8).tensors[name] for name in ("queries", "keys"))
    targets = torch.arange(12) % 5
    loss = ops.linear_cross_entropy(
        hidden, weight, targets, ignore_index=3, label_smoothing=smoothing, backend=backend
    )
    expected = F.cross_entropy(hidden @ weight.T, targets, ignore_index=3, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@each_backend
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_targets_ignored_give_nan_and_zero_gradients(smoothing, backend):
    problem = make("linear_cross_entropy", 12, 5, 8)
    problem = problem.but(targets=torch.full((12,), -100), label_smoothing=smoothing)
    results = problem.results(ops, backend=backend)
    assert results.pop("loss").isnan()
    for name, grad in results.items():
        assert grad.abs().sum() == 0, name


@each_backend
def test_one_hidden_vector(backend):
    hidden, weight = (make("info_nce", 1, 5, 8).tensors[name] for name in ("queries", "keys"))
    loss = ops.linear_cross_entropy(hidden[0], weight, torch.tensor(2), backend=backend)
    assert loss.item() == pytest.approx(
        F.cross_entropy(hidden @ weight.T, torch.tensor([2])).item(), rel=1e-5
    )


@each_backend
@each_op
def test_loss_is_float32_for_half_precision_features(op, backend):
    problem = make(op, 9, d=8)
    half = problem.but(**{name: problem.tensors[name].bfloat16() for name in OPERANDS[op]})
    results = half.results(ops, backend=backend)
    assert results["loss"].dtype == torch.float32
    for name in OPERANDS[op]:
        assert results[f"gradient of {name}"].dtype == torch.bfloat16
    assert results["gradient of logit_scale"].dtype == torch.float32


@each_op
def test_float64_stays_float64(op):
    results = make(op, 9, d=8).to(torch.float64).results(ops)
    assert all(result.dtype == torch.float64 for result in results.values())
