# SPDX-License-Identifier: Apache-2.0
"""Lion against its paper's update, the parameter groups, and the average of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlmkernels.train.optim import Lion, WeightAverage, create_optimizer, parameter_groups


def test_lion_follows_algorithm_2_of_its_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    gradients = torch.randn(6, 7, 5, generator=generator, dtype=torch.float64)
    lr, first, second, decay = 0.01, 0.9, 0.99, 0.3
    p = nn.Parameter(start.clone())
    optimizer = Lion([p], lr=lr, betas=(first, second), weight_decay=decay)
    w, m = start.clone(), torch.zeros_like(start)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
        update = torch.sign(first * m + (1 - first) * g)
        w = w - lr * (update + decay * w)
        m = second * m + (1 - second) * g
        torch.testing.assert_close(p.data, w, rtol=1e-12, atol=1e-12)


def test_lion_moves_by_the_learning_rate_whatever_the_gradient() -> None:
    p = nn.Parameter(torch.zeros(3))
    optimizer = Lion([p], lr=0.5)
    p.grad = torch.tensor([1e-8, -1e8, 0.0])
    optimizer.step()
    assert p.tolist() == [-0.5, 0.5, 0.0]


def test_lion_leaves_parameters_without_gradient_alone() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Lion([p, q], lr=0.1, weight_decay=0.5)
    p.grad = torch.ones(2)
    optimizer.step()
    assert q.tolist() == [1.0, 1.0]
    assert optimizer.state_dict()["state"].keys() == {0}


def test_lion_returns_the_loss_of_its_closure() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = Lion([p], lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2.0


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"weight_decay": -0.1}], ids=["lr", "betas", "decay"]
)
def test_lion_refuses_values_out_of_range(wrong: dict) -> None:
    with pytest.raises(ValueError, match="Lion: "):
        Lion([nn.Parameter(torch.ones(1))], **wrong)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.positional_embedding = nn.Parameter(torch.zeros(4, 2))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def test_only_matrices_decay() -> None:
    model = _Model()
    decayed, free = parameter_groups(model, 0.2)
    assert [p is model.linear.weight for p in decayed["params"]] == [True]
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.2, 0.0)
    everything = {id(p) for group in (decayed, free) for p in group["params"]}
    assert everything == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_optimizers_by_name_lower_a_loss(name: str) -> None:
    model = nn.Linear(4, 1)
    optimizer = create_optimizer(name, model, lr=0.05, weight_decay=0.0)
    x = torch.randn(32, 4)
    y = x.sum(1, keepdim=True)
    losses = []
    for _ in range(100):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_unknown_optimizer_is_named() -> None:
    with pytest.raises(ValueError, match="adamw, lion, got 'sgd'"):
        create_optimizer("sgd", nn.Linear(1, 1), lr=1.0, weight_decay=0.0)


def test_average_follows_the_weights_and_copies_counters() -> None:
    model = _Model()
    average = WeightAverage(model, 0.5)
    before = model.linear.weight.detach().clone()
    with torch.no_grad():
        model.linear.weight.add_(1.0)
        model.norm.num_batches_tracked.fill_(7)
    average.update(model)
    decay = min(0.5, 2 / 11)
    torch.testing.assert_close(average.state["linear.weight"], before + (1 - decay))
    assert average.state["norm.num_batches_tracked"] == 7
    for _ in range(60):
        average.update(model)
    torch.testing.assert_close(average.state["linear.weight"], model.linear.weight.detach())
