# SPDX-License-Identifier: Apache-2.0
"""What each rank of the tests of open_clip's losses runs. Not tests: a spawned process imports it by name."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peers.loading import import_open_clip

from vlmkernels.integrations import open_clip as ours


def features(dtype: torch.dtype = torch.float32, rows: int = 37) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs that are near each other, so that the losses have something to say."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(rows, 24, generator=generator)
    texts = images + torch.randn(rows, 24, generator=generator)
    return F.normalize(images, dim=-1).to(dtype), F.normalize(texts, dim=-1).to(dtype)


def averaged_gradients(rank: int, size: int, name: str, use_ours: bool) -> list:
    """What DDP leaves of a step on this rank's half of the batch: parameters of two towers, scale and bias."""
    module = ours if use_ours else import_open_clip().loss
    options: dict[str, Any] = {"rank": rank, "world_size": size}
    if name == "ClipLoss":
        options |= {"local_loss": True, "gather_with_grad": True}
    images, texts = (x.chunk(size)[rank] for x in features(rows=12))
    torch.manual_seed(13)
    towers = torch.nn.ModuleList([torch.nn.Linear(24, 16), torch.nn.Linear(24, 16)])
    scalars = [torch.tensor(x, requires_grad=True) for x in (7.0, -3.0)[: 1 + (name == "SigLipLoss")]]
    u, v = (F.normalize(tower(x), dim=-1) for tower, x in zip(towers, (images, texts), strict=True))
    loss = getattr(module, name)(**options)(u, v, *scalars)
    grads = torch.autograd.grad(loss, [*towers.parameters(), *scalars])
    for grad in grads:
        if size > 1:
            dist.all_reduce(grad)
    return [(grad / size).numpy() for grad in grads]
