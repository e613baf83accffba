# SPDX-License-Identifier: Apache-2.0
"""Loss modules: golden values, options reach the ops, no hidden state."""

import math

import pytest
import torch
import torch.nn.functional as F

from vlmkernels import models
from vlmkernels.nn import ClipLoss, InfoNCELoss, LinearCrossEntropyLoss, MultiPositiveLoss, SigLipLoss
from vlmkernels.ops.contrastive import info_nce


@pytest.fixture
def features():
    """The features whose losses are known to eight digits."""
    i = torch.arange(4, dtype=torch.float64)[:, None]
    j = torch.arange(3, dtype=torch.float64)
    angle = 1 + 3 * i + j
    image = angle.sin()
    return F.normalize(image, dim=-1), F.normalize(image + 0.5 * angle.cos(), dim=-1)


def test_golden_values(features):
    u, v = features
    labels = torch.tensor([0, 0, 1, 2])
    assert float(ClipLoss()(u, v, 10.0)) == pytest.approx(0.69855462, abs=5e-9)
    assert float(ClipLoss(label_smoothing=0.1)(u, v, 10.0)) == pytest.approx(1.59538933, abs=5e-9)
    assert float(SigLipLoss()(u, v, 10.0, -10.0)) == pytest.approx(1.65556897, abs=5e-9)
    assert float(MultiPositiveLoss()(u, v, 10.0, labels, labels)) == pytest.approx(5.17085093, abs=5e-9)
    assert float(InfoNCELoss()(u, v, 10.0)) == pytest.approx(0.70429036, abs=5e-9)
    assert float(InfoNCELoss()(v, u, 10.0)) == pytest.approx(0.69281888, abs=5e-9)


def test_aligned_orthonormal_features():
    eye = torch.eye(8, dtype=torch.float64)
    assert float(ClipLoss()(eye, eye, 1.0)) == pytest.approx(1.27400884, abs=5e-9)
    assert float(ClipLoss()(eye, eye, 1 / 0.07)) == pytest.approx(
        math.log1p(7 * math.exp(-1 / 0.07)), rel=1e-9
    )
    assert float(SigLipLoss()(eye, eye, 10.0, -10.0)) == pytest.approx(0.69346497, abs=5e-9)
    zero = torch.zeros(8, 4, dtype=torch.float64)
    assert float(SigLipLoss()(zero, zero, 10.0, -10.0)) == pytest.approx(10.00036319, abs=5e-9)


def test_options_reach_the_ops(features):
    u, v = (x.float() for x in features)
    with pytest.raises(ValueError, match="backend"):
        ClipLoss(backend="abacus")(u, v, 10.0)
    rows = InfoNCELoss(reduction="none")(u, v, 10.0, positives=torch.tensor([3, 2, 1, 0]))
    assert rows.shape == (4,)
    masked = InfoNCELoss()(u[:2], v, 10.0, key_mask=torch.tensor([True, True, False, False]))
    torch.testing.assert_close(masked, info_nce(u[:2], v[:2], 10.0))
    half = ClipLoss(compute_dtype=torch.bfloat16)(u, v, 10.0)
    assert half.dtype == torch.float32
    assert float(half) != float(ClipLoss()(u, v, 10.0))


def test_linear_cross_entropy_equals_torch():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(2, 3, 8), torch.randn(11, 8), torch.randn(11)
    targets = torch.tensor([[1, -7, 3], [10, 0, -7]])
    loss = LinearCrossEntropyLoss(ignore_index=-7, label_smoothing=0.1, logit_scale=2.0)(
        hidden, weight, targets, bias
    )
    logits = 2.0 * hidden @ weight.t() + bias
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-7, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    "loss", [ClipLoss, SigLipLoss, MultiPositiveLoss, InfoNCELoss, LinearCrossEntropyLoss]
)
def test_losses_have_no_state(loss):
    assert not loss().state_dict()
    assert not list(loss().buffers())


def test_a_models_output_fits():
    model = models.create("emoji-clip", vision={"layers": 1}, text={"layers": 1}, init_logit_bias=-10.0)
    out = model(torch.randn(4, 3, 48, 48), torch.randint(0, 4095, (4, 8)))
    for loss in (ClipLoss(), SigLipLoss()):
        model.zero_grad()
        loss(**out).backward(retain_graph=True)
        assert model.logit_scale.grad.abs() > 0
        assert model.visual.proj.grad.abs().sum() > 0
