# SPDX-License-Identifier: Apache-2.0
"""Gradient caching: gradients of the whole batch, random states repeated, memory of a micro-batch."""

from __future__ import annotations

import doctest
import os
import random
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cached_problems import LOSSES, ROWS, Pair, gradients, problem, tower
from group_programs import run_group
from torch import Tensor, nn
from train_ranks import cached_over_ranks

import vlmkernels as vk
from vlmkernels.train import cached
from vlmkernels.train.cached import CachedContrastive


def assert_same_gradients(
    found: dict[str, Tensor | None], wanted: dict[str, Tensor | None], **near: float
) -> None:
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert (found[name] is None) == (grad is None), name
        if grad is not None:
            torch.testing.assert_close(
                found[name], grad, **near, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("micro_batch", [1, 5, 23, 100])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_the_whole_batch(name: str, micro_batch: int) -> None:
    model, images, texts = problem()
    loss = LOSSES[name](**model(images, texts))
    loss.backward()
    wanted = gradients(model)
    value = CachedContrastive(model, LOSSES[name], micro_batch=micro_batch)(images, texts)
    assert not value.requires_grad
    torch.testing.assert_close(value, loss.detach(), rtol=1e-10, atol=1e-10)
    assert_same_gradients(gradients(model), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_float32_gradients_differ_by_rounding_alone(name: str) -> None:
    exact, images, texts = problem()
    LOSSES[name](**exact(images, texts)).backward()
    truth = gradients(exact)
    model, images, texts = problem(torch.float32)
    LOSSES[name](**model(images, texts)).backward()
    plain = gradients(model)
    CachedContrastive(model, LOSSES[name], micro_batch=4)(images, texts)
    for key, found in gradients(model).items():
        if truth[key] is not None:
            ours, theirs = ((x - truth[key]).abs().max() for x in (found, plain[key]))
            # sums of 23 rows in another order: a few units in the last place of the largest gradient
            assert ours <= 1.2 * theirs + 8 * torch.finfo(torch.float32).eps * truth[key].abs().max(), key


def test_towers_may_be_two_modules_with_inputs_of_any_kind() -> None:
    torch.manual_seed(0)
    first, second = tower(12, 8, 0.0).double(), tower(7, 8, 0.0).double()
    scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    images, ids, mask = (
        torch.randn(ROWS, 12).double(),
        torch.randn(ROWS, 7).double(),
        torch.rand(ROWS, 1).double(),
    )

    def texts(inputs: dict[str, Any]) -> Tensor:
        return second(inputs["ids"] * inputs["mask"][0])

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return vk.clip_loss(F.normalize(a, dim=-1), F.normalize(b, dim=-1), scale.exp())

    everything = nn.ModuleList([first, second, nn.ParameterList([scale])])
    inputs = {"ids": ids, "mask": (mask, ids)}
    loss(first(images), texts(inputs)).backward()
    wanted = gradients(everything)
    CachedContrastive((first, texts), loss, micro_batch=4)(images, inputs)
    assert_same_gradients(gradients(everything), wanted, rtol=1e-10, atol=1e-10)


def test_one_module_may_be_both_towers() -> None:
    torch.manual_seed(0)
    both = tower(7, 8, 0.0).double()
    a, b = torch.randn(2, ROWS, 7).double()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return vk.siglip_loss(F.normalize(x, dim=-1), F.normalize(y, dim=-1), 5.0, -1.0)

    loss(both(a), both(b)).backward()
    wanted = gradients(both)
    CachedContrastive((both, both), loss, micro_batch=6)(a, b)
    assert_same_gradients(gradients(both), wanted, rtol=1e-10, atol=1e-10)


def test_two_pictures_to_a_caption() -> None:
    model, _, texts = problem()
    images = torch.randn(2 * ROWS, 12).double()
    rows = torch.arange(ROWS)

    def loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor, **_: Any) -> Tensor:
        return vk.multi_positive_loss(image_features, text_features, logit_scale, rows.repeat(2), rows)

    loss(**model(images, texts)).backward()
    wanted = gradients(model)
    CachedContrastive(model, loss, micro_batch=10)(images, texts)
    assert_same_gradients(gradients(model), wanted, rtol=1e-10, atol=1e-10)


def test_a_frozen_tower_gets_no_gradient() -> None:
    model, images, texts = problem()
    model.image.requires_grad_(False)
    LOSSES["clip"](**model(images, texts)).backward()
    wanted = gradients(model)
    CachedContrastive(model, LOSSES["clip"], micro_batch=5)(images, texts)
    assert wanted["image.0.weight"] is None
    assert_same_gradients(gradients(model), wanted, rtol=1e-10, atol=1e-10)


def test_batches_accumulate_with_their_weight() -> None:
    model, images, texts = problem()
    more = torch.randn(ROWS, 12, generator=torch.Generator().manual_seed(5)).double()
    for x in (images, more):
        (LOSSES["clip"](**model(x, texts)) / 2).backward()
    wanted = gradients(model)
    step = CachedContrastive(model, LOSSES["clip"], micro_batch=5)
    for x in (images, more):
        value = step(x, texts, weight=1 / 2)
    torch.testing.assert_close(value, LOSSES["clip"](**model(more, texts)).detach())
    assert_same_gradients(gradients(model), wanted, rtol=1e-10, atol=1e-10)


# What is random


def in_parts(model: Callable[..., Any], *inputs: Tensor, parts: int) -> dict[str, Tensor]:
    """The outputs of a batch that runs in parts, with its whole graph."""
    cut = [[x[len(x) * i // parts : len(x) * (i + 1) // parts] for x in inputs] for i in range(parts)]
    outputs = [model(*part) for part in cut]
    joined = {name: torch.cat([o[name] for o in outputs]) for name in ("image_features", "text_features")}
    return outputs[-1] | joined


class Noisy(Pair):
    """Augments with every generator that people use."""

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        images = images * random.uniform(0.5, 1.5) + float(np.random.normal())  # noqa: NPY002 (the global one)
        return super().forward(images + torch.randn_like(images), texts)


def test_dropout_and_augmentation_are_drawn_once() -> None:
    torch.manual_seed(0)
    model = Noisy(dropout=0.4).double()
    _, images, texts = problem()

    def seeds() -> None:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002 (the global one)

    def drawn() -> tuple[float, ...]:
        return float(torch.rand(())), random.random(), float(np.random.random())  # noqa: NPY002 (the global one)

    seeds()
    loss = LOSSES["clip"](**in_parts(model, images, texts, parts=5))
    loss.backward()
    wanted, next_numbers = gradients(model), drawn()
    seeds()
    value = CachedContrastive(model, LOSSES["clip"], micro_batch=5)(images, texts)
    assert drawn() == next_numbers  # as if the batch had run once
    torch.testing.assert_close(value, loss.detach(), rtol=1e-12, atol=1e-12)
    assert_same_gradients(gradients(model), wanted, rtol=1e-10, atol=1e-10)


def test_attention_dropout_is_drawn_once() -> None:
    class Attends(Pair):
        def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
            q = images.view(-1, 3, 1, 4).expand(-1, -1, 2, -1).repeat(1, 1, 1, 2)
            attended = vk.attention(q, q, q, dropout_p=0.5)[:, :, 0, :4].reshape(-1, 12)
            return super().forward(attended, texts)

    torch.manual_seed(0)
    model = Attends()
    _, images, texts = problem(torch.float32)
    torch.manual_seed(3)
    LOSSES["clip"](**in_parts(model, images, texts, parts=5)).backward()
    wanted = gradients(model)
    torch.manual_seed(3)
    CachedContrastive(model, LOSSES["clip"], micro_batch=5)(images, texts)
    # the loss sums in float32; another mask would change these gradients by their own size
    assert_same_gradients(gradients(model), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("around", [False, True], ids=["as context", "around the call"])
def test_autocast_holds_in_both_runs(around: bool) -> None:
    model, images, texts = problem(torch.float32)
    seen = []
    model.image.register_forward_hook(lambda module, args, out: seen.append(out.dtype))

    def cast() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    with cast():
        outputs = in_parts(model, images, texts, parts=5)
        if around:
            loss = LOSSES["clip"](**outputs)
    if not around:
        loss = LOSSES["clip"](**outputs)
    loss.backward()
    wanted = gradients(model)
    seen.clear()
    if around:
        with cast():
            value = CachedContrastive(model, LOSSES["clip"], micro_batch=5)(images, texts)
    else:
        value = CachedContrastive(model, LOSSES["clip"], micro_batch=5, context=cast)(images, texts)
    assert seen == 2 * 5 * [torch.bfloat16]
    torch.testing.assert_close(value, loss.detach(), rtol=1e-6, atol=1e-6)
    # bfloat16 products are the same ones; their sums over micro-batches are in float32 here and there
    assert_same_gradients(gradients(model), wanted, rtol=1e-2, atol=1e-3)


def test_without_gradients_only_the_loss_is_computed() -> None:
    model, images, texts = problem()
    with torch.no_grad():
        value = CachedContrastive(model, LOSSES["clip"], micro_batch=5)(images, texts)
    torch.testing.assert_close(value, LOSSES["clip"](**model(images, texts)).detach())
    assert all(p.grad is None for p in model.parameters())


# Memory


class Kept:
    """A tensor in something that can be watched."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps for backward, and their peak."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        super().__init__(self._pack, lambda kept: kept.x)

    def _pack(self, x: Tensor) -> Any:
        kept = Kept(x.detach())  # an output that holds on to itself would never be dropped
        size = x.numel() * x.element_size()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(kept, self._dropped, size)
        return kept

    def _dropped(self, size: int) -> None:
        self.now -= size


def saved_by(rows: int, micro_batch: int) -> int:
    """The most that is kept of the towers' activations."""
    model, images, texts = problem(torch.float32, rows=rows)

    def loss(image_features: Tensor, text_features: Tensor, **_: Any) -> Tensor:
        return image_features.sum() + text_features.sum()  # keeps nothing of its own

    saved = SavedBytes()
    with saved:
        CachedContrastive(model, loss, micro_batch=micro_batch)(images, texts)
    return saved.peak


def test_activations_do_not_grow_with_the_number_of_micro_batches() -> None:
    few, many = saved_by(2 * 16, 16), saved_by(64 * 16, 16)
    assert many == few
    assert saved_by(64 * 16, 64 * 16) > 20 * many


@pytest.mark.slow
def test_a_batch_of_32768_trains_in_less_than_a_gigabyte() -> None:
    """Its logits alone would take 4 GiB, and the towers' activations 1.5 GiB."""
    program = """
import resource, sys, torch, vlmkernels as vk
from cached_problems import Pair, clip
torch.manual_seed(0)
model = Pair(width=1024)
rows = int(sys.argv[1])
images, texts = torch.randn(rows, 12), torch.randn(rows, 7)
def loss(image_features, text_features, logit_scale, **_):
    return vk.clip_loss(image_features[:, :32], text_features[:, :32], logit_scale)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
value = vk.train.CachedContrastive(model, loss, micro_batch=256)(images, texts)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert value.isfinite() and all(p.grad.isfinite().all() for n, p in model.named_parameters() if n != "logit_bias")
print((after - before) / 1024)
"""
    run = subprocess.run(
        [sys.executable, "-c", program, "32768"],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert run.returncode == 0, run.stderr
    # features [32768, 1024] of two towers, and their gradients, are 0.5 GiB
    assert float(run.stdout) < 900


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


# Processes


def test_ranks_exchange_gradients_once_and_get_those_of_one_process() -> None:
    ranks = run_group(2, cached_over_ranks)
    for name, loss in LOSSES.items():
        model, images, texts = problem()
        for weight in (0.25, 0.75):
            (weight * loss(**model(images, texts))).backward()
        wanted = gradients(model)
        for rank in ranks:
            found, reductions = rank[name]
            assert reductions == 1, name
            for key, grad in wanted.items():
                if grad is not None:
                    np.testing.assert_allclose(found[key], grad.numpy(), rtol=1e-9, atol=1e-10, err_msg=key)


# Refusals, documentation


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: CachedContrastive(m, LOSSES["clip"], micro_batch=0),
            "micro_batch must be an int of at least 1",
        ),
        (lambda m: CachedContrastive((m, 3), LOSSES["clip"], micro_batch=1), "must be callable"),
        (
            lambda m: CachedContrastive((m, m), min, micro_batch=1)(torch.ones(2)),
            "2 towers need as many inputs",
        ),
        (lambda m: CachedContrastive(m, min, micro_batch=1)(torch.ones(0, 2)), "must have rows"),
        (
            lambda m: CachedContrastive(m, min, micro_batch=1)((torch.ones(1), torch.ones(2))),
            r"equal numbers of rows, got \[\[1\], \[2\]\]",
        ),
        (
            lambda m: CachedContrastive(m, min, micro_batch=1)(torch.ones(2), parts=0),
            "parts must be at least 1",
        ),
    ],
)
def test_bad_arguments_are_named(make: Callable[[nn.Module], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"CachedContrastive: .*{message}"):
        make(nn.Identity())


def test_docstring_examples() -> None:
    results = doctest.testmod(cached, extraglobs={"vk": vk})
    assert results.attempted > 5 and not results.failed
