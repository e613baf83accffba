# SPDX-License-Identifier: Apache-2.0
"""open_clip's losses and ours: signatures, values, gradients, and training steps of open_clip's own models."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from group_programs import run_group
from open_clip_ranks import averaged_gradients, features
from oracle import assert_as_accurate

from vlmkernels.integrations import open_clip as ours

pytestmark = pytest.mark.usefixtures("ignored_warnings")

NAMES = ("ClipLoss", "SigLipLoss", "CoCaLoss")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_signatures_are_open_clips(open_clip, name, method):
    theirs = inspect.signature(getattr(getattr(open_clip.loss, name), method)).parameters
    mine = inspect.signature(getattr(getattr(ours, name), method)).parameters
    positional = [p for p in mine.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert [(p.name, p.default) for p in positional] == [(p.name, p.default) for p in theirs.values()]


def gradients(loss: Any, dtype: torch.dtype, *, scale: float, bias: float | None, pick: Any = None) -> list:
    leaves = [x.requires_grad_() for x in features(dtype)]
    leaves.append(torch.tensor(scale, dtype=dtype, requires_grad=True))
    if bias is not None:
        leaves.append(torch.tensor(bias, dtype=dtype, requires_grad=True))
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize(("name", "bias"), [("ClipLoss", None), ("ClipLoss", -3.0), ("SigLipLoss", -10.0)])
def test_values_and_gradients_are_open_clips(open_clip, name, bias):
    theirs, mine = getattr(open_clip.loss, name)(), getattr(ours, name)()
    options = {"scale": 14.3, "bias": bias}
    exact = gradients(theirs, torch.float64, **options)
    eager = gradients(theirs, torch.float32, **options)
    results = gradients(mine, torch.float32, **options)
    for what, a, b, c in zip(
        ("loss", "images", "texts", "scale", "bias"), results, eager, exact, strict=False
    ):
        # A bias cancels in CLIP's softmax: its gradient is 0 here and the rounding of 0 there.
        assert_as_accurate(a, b, c, what, at_least=1e-7 if what in ("scale", "bias") else 0.0)


def test_siglip_without_bias(open_clip):
    value = ours.SigLipLoss()(*features(), torch.tensor(10.0), None)
    torch.testing.assert_close(value, open_clip.loss.SigLipLoss()(*features(), torch.tensor(10.0), None))


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_output_dict(open_clip, name):
    arguments = (*features(), torch.tensor(10.0), torch.tensor(-10.0))
    theirs = getattr(open_clip.loss, name)()(*arguments, output_dict=True)
    mine = getattr(ours, name)()(*arguments, output_dict=True)
    assert list(mine) == list(theirs)
    torch.testing.assert_close(mine, theirs)


def captions() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    hidden, weight = torch.randn(37, 9, 24, generator=generator), torch.randn(50, 24, generator=generator)
    labels = torch.randint(0, 50, (37, 9), generator=generator)
    labels[:, 7:] = 3
    return hidden, weight, labels


@pytest.mark.parametrize("clip_loss_weight", [0, 0.7])
@pytest.mark.parametrize("output_dict", [False, True])
def test_coca_is_open_clips(open_clip, clip_loss_weight, output_dict):
    hidden, weight, labels = captions()
    logits = hidden @ weight.T
    results = []
    for module in (open_clip.loss, ours):
        loss = module.CoCaLoss(2.0, clip_loss_weight, pad_id=3)
        result = loss(*features(), logits, labels, torch.tensor(10.0), output_dict=output_dict)
        results.append(
            {k: float(x) for k, x in result.items()} if output_dict else [float(x) for x in result]
        )
    assert results[1] == pytest.approx(results[0], rel=1e-6)  # two roundings of float32


def test_coca_without_logits_is_coca():
    """Two factors instead of their product: the same loss, and gradients to both."""
    hidden, weight, labels = (x.requires_grad_() if x.is_floating_point() else x for x in captions())
    loss = ours.CoCaLoss(2.0, 1.0, pad_id=3)
    results = []
    for logits in (hidden @ weight.T, ours.CaptionHead(hidden, weight)):
        _, caption = loss(*features(), logits, labels, torch.tensor(10.0))
        results.append((caption, *torch.autograd.grad(caption, (hidden, weight))))
    torch.testing.assert_close(results[1], results[0])


def tiny_model(open_clip: Any, kind: str) -> torch.nn.Module:
    from open_clip.coca_model import CoCa, MultimodalCfg
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(11)
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"context_length": 12, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    if kind == "clip":
        return CLIP(24, CLIPVisionCfg(**vision), CLIPTextCfg(**text))
    if kind == "siglip":
        return CLIP(24, CLIPVisionCfg(**vision), CLIPTextCfg(**text), init_logit_bias=-10.0)
    pooled = {
        "attentional_pool": True,
        "attn_pooler_queries": 4,
        "attn_pooler_heads": 2,
        "output_tokens": True,
    }
    embed = {"embed_cls": True, "output_tokens": True}
    decoder = MultimodalCfg(width=32, context_length=12, heads=2, layers=1, mlp_ratio=2)
    model = CoCa(32, decoder, CLIPTextCfg(**text, **embed), CLIPVisionCfg(**vision, **pooled))
    torch.nn.init.normal_(model.text_decoder.text_projection, std=0.1)  # open_clip leaves it as it finds it
    return model


@pytest.mark.parametrize("kind", ["clip", "siglip", "coca"])
def test_training_steps_give_the_same_parameters(open_clip, same_training, varied, kind):
    """What open_clip's training loop does, three steps of it: the move of every parameter is compared."""
    model = tiny_model(open_clip, kind)
    model.output_dict = True
    generator = torch.Generator().manual_seed(12)
    images = torch.randn(6, 3, 32, 32, generator=generator)
    ids = torch.randint(1, 49, (6, 12), generator=generator)
    ids[:, -1] = 49

    def run(dtype: torch.dtype, use_ours: bool, draw: int) -> list[torch.Tensor]:
        module = ours if use_ours else open_clip.loss
        losses = {"clip": module.ClipLoss, "siglip": module.SigLipLoss}
        loss = module.CoCaLoss(2.0, 1.0) if kind == "coca" else losses[kind]()
        twin = varied(model, dtype, draw).train()
        before = [p.detach().clone() for p in twin.parameters()]
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
        for _ in range(3):
            out = twin(images.to(dtype), ids)
            terms = loss(**out, output_dict=True)
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
        return [p.detach() - old for p, old in zip(twin.parameters(), before, strict=True)]

    same_training(run, "moves of the parameters")


def test_horovod_is_refused():
    with pytest.raises(NotImplementedError, match="use_horovod"):
        ours.ClipLoss(use_horovod=True)


def test_an_unknown_exchange_is_refused():
    with pytest.raises(ValueError, match="dist_impl must be one of"):
        ours.SigLipLoss(dist_impl="carrier pigeon")


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_several_processes_need_a_process_group(name):
    """Without one, each rank would silently train on its own batch."""
    with pytest.raises(ValueError, match="is not initialised"):
        getattr(ours, name)(rank=0, world_size=2)(*features(), 10.0, -10.0)


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_ranks_train_as_open_clips_and_as_one_process(open_clip, name):
    theirs, mine = (run_group(2, averaged_gradients, name, use_ours) for use_ours in (False, True))
    alone = averaged_gradients(0, 1, name, True)
    # Some ten roundings of float32 separate the orders of summation, of gradients below one.
    for rank in range(2):
        for a, b, c in zip(mine[rank], theirs[rank], alone, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(a, c, rtol=1e-4, atol=1e-6)


@pytest.fixture
def two_ranks():
    """A process group of two ranks, of which this process is the first and the other one does not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("name", "op"), [("ClipLoss", "clip_loss"), ("SigLipLoss", "siglip_loss")])
def test_the_group_reaches_the_loss(monkeypatch, two_ranks, name, op, given):
    groups = []
    monkeypatch.setattr(ours, op, lambda *args, group, **options: groups.append(group) or torch.zeros(()))
    loss = getattr(ours, name)(rank=0, world_size=2, group=two_ranks if given else None)
    loss(*features(), 10.0, -10.0)
    assert groups == [two_ranks]


def test_a_world_size_that_is_not_the_groups_is_refused(two_ranks):
    with pytest.raises(ValueError, match="world_size must be the number of ranks in the group, 2, got 3"):
        ours.ClipLoss(rank=0, world_size=3)(*features(), 10.0)
