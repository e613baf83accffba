# SPDX-License-Identifier: Apache-2.0
"""The parameter groups, layer decay, optimisers by name, and the average of the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlmkernels.models import create
from vlmkernels.train.optim import WeightAverage, create_optimizer, parameter_groups


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


def _layers(names: list[str], decay: float = 0.5) -> dict[str, float]:
    """Factors on the learning rate by name, of a model with parameters of these names."""
    model = nn.Module()
    for name in names:
        *path, last = name.split(".")
        place = model
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.register_parameter(last, nn.Parameter(torch.zeros(2, 2)))
    by_id = {
        id(p): group["lr_scale"]
        for group in parameter_groups(model, 0.1, layer_decay=decay)
        for p in group["params"]
    }
    return {name: by_id[id(p)] for name, p in model.named_parameters()}


def test_layers_learn_more_slowly_the_further_they_are_from_the_end() -> None:
    clip = {
        "visual.conv1.weight": 1 / 8,
        "visual.positional_embedding": 1 / 8,
        "visual.transformer.resblocks.0.mlp.c_fc.weight": 1 / 4,
        "visual.transformer.resblocks.1.mlp.c_fc.weight": 1 / 2,
        "visual.proj": 1.0,
        "transformer.resblocks.0.attn.in_proj_weight": 1 / 2,
        "token_embedding.weight": 1 / 4,
        "positional_embedding": 1 / 4,
        "text_projection": 1.0,
        "logit_scale": 1.0,
    }
    assert _layers(list(clip)) == clip
    hugging_face = {
        "vision_model.embeddings.patch_embedding.weight": 1 / 8,
        "vision_model.pre_layrnorm.weight": 1 / 8,
        "vision_model.encoder.layers.0.layer_norm1.weight": 1 / 4,
        "vision_model.encoder.layers.1.layer_norm1.weight": 1 / 2,
        "vision_model.post_layernorm.weight": 1.0,
        "text_model.encoder.layers.0.mlp.fc1.weight": 1 / 2,
        "text_model.embeddings.token_embedding.weight": 1 / 4,
        "visual_projection.weight": 1.0,
    }
    assert _layers(list(hugging_face)) == hugging_face
    timm = {"patch_embed.proj.weight": 1 / 4, "blocks.0.mlp.fc1.weight": 1 / 2, "head.weight": 1.0}
    assert _layers(list(timm)) == timm


def test_layer_decay_reaches_the_learning_rate_of_a_real_model() -> None:
    model = create("ViT-B-32", vision={"layers": 2, "width": 64}, text={"layers": 3, "width": 64})
    optimizer = create_optimizer("adamw", model, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(model.logit_scale)] == 1.0
    assert rates[id(model.visual.conv1.weight)] == 1 / 8
    assert rates[id(model.token_embedding.weight)] == 1 / 16
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    # no decay: two groups, in the order in which checkpoints number their parameters
    plain = parameter_groups(model, 0.1)
    assert [(g["weight_decay"], g["lr_scale"]) for g in plain] == [(0.1, 1.0), (0.0, 1.0)]


def test_layer_decay_out_of_range_or_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer_decay must lie in \(0, 1\], got 0"):
        parameter_groups(nn.Linear(2, 2), 0.1, layer_decay=0.0)
    with pytest.raises(ValueError, match="needs a model with numbered blocks"):
        parameter_groups(nn.Linear(2, 2), 0.1, layer_decay=0.9)


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
