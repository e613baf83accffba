# SPDX-License-Identifier: Apache-2.0
"""What the ranks of the training tests run: a spawned process imports it by name."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from cached_problems import LOSSES, labels, problem
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from vlmkernels.train.batch_norm import synchronize_batch_norm
from vlmkernels.train.cached import CachedContrastive

BATCH_NORM_ROWS = (1, 4, 3)
BATCH_NORM_OPTIONS = ((0.1, True), (None, False))  # momentum, affine


def batch_norm_problem(momentum: float | None, affine: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """A convolution between two batch norms, their input, and the gradient of what comes out."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    layers = [
        nn.BatchNorm2d(3, momentum=momentum, affine=affine),
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, momentum=momentum, affine=affine),
    ]
    rows = sum(BATCH_NORM_ROWS)
    x = 3 + torch.randn(rows, 3, 6, 6, generator=generator, dtype=torch.float64)
    return nn.Sequential(*layers).double(), x, torch.randn(rows, 4, 4, 4, generator=generator).double()


def batch_norm_step(model: nn.Module, x: Tensor, grad: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Output and gradient of the input after two steps."""
    x = x.clone().requires_grad_()
    model(2 * x.detach())
    out = model(x)
    out.backward(grad)
    return out.detach().numpy(), x.grad.numpy()


def batch_norm_over_ranks(rank: int, size: int) -> list[dict[str, np.ndarray]]:
    results = []
    mine = slice(sum(BATCH_NORM_ROWS[:rank]), sum(BATCH_NORM_ROWS[: rank + 1]))
    for options in BATCH_NORM_OPTIONS:
        model, x, grad = batch_norm_problem(*options)
        assert synchronize_batch_norm(model, dist.group.WORLD) == 2
        out, grad_x = batch_norm_step(model, x[mine], grad[mine])
        for p in model.parameters():
            dist.all_reduce(p.grad)
        found = {name: p.grad.numpy() for name, p in model.named_parameters()}
        found |= {name: b.numpy() for name, b in model.named_buffers()}
        results.append(found | {"out": out, "x": grad_x})
    return results


def cached_over_ranks(rank: int, size: int) -> dict[str, tuple[dict[str, np.ndarray], int]]:
    """Gradients of two accumulated batches under DDP, and how often a bucket was reduced."""
    results = {}
    for name, loss in LOSSES.items():
        model, images, texts = problem()
        if name != "siglip":
            model.logit_bias.requires_grad_(False)  # DDP waits for every parameter
        parallel = nn.parallel.DistributedDataParallel(model)
        reductions: list[int] = []

        def count(seen, bucket):  # DDP wants other annotations than strings, or none
            seen.append(1)
            return allreduce_hook(dist.group.WORLD, bucket)

        parallel.register_comm_hook(reductions, count)
        step = CachedContrastive(parallel, loss, micro_batch=4)
        cut = 9  # unequal shards
        mine = slice(0, cut) if rank == 0 else slice(cut, None)
        for number, weight in enumerate((0.25, 0.75)):
            step(
                images[mine],
                texts[mine],
                weight=weight,
                synchronize=number == 1,
                group=dist.group.WORLD,
                labels=labels()[mine],
            )
        results[name] = (
            {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None},
            len(reductions),
        )
    return results
