# SPDX-License-Identifier: Apache-2.0
"""What each rank of the tests of DDP and FSDP runs. Not tests: a spawned process imports it by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import vlmkernels as vk

TINY_CLIP: dict[str, Any] = {
    "embed_dim": 32,
    "vision": {"image_size": 16, "width": 32, "patch_size": 8, "heads": 2, "layers": 2},
    "text": {"layers": 1, "width": 32, "heads": 2, "context_length": 12, "vocab_size": 60},
}
ROWS = 8


def tiny_clip() -> nn.Module:
    torch.manual_seed(0)
    return vk.models.create("ViT-B-32", **TINY_CLIP).train()


def pairs(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (rows, 12), generator=generator)
    ids[:, -1] = 59  # the end of text is the largest id
    return torch.randn(rows, 3, 16, 16, generator=generator), ids


def train_clip(rank: int, size: int, wrappers: tuple[str, ...]) -> dict[str, dict[str, np.ndarray]]:
    """Parameters after three steps on this rank's share of the batch, by wrapper."""
    results = {}
    for wrapper in wrappers:
        model = clip = tiny_clip()
        if wrapper == "ddp":
            model = nn.parallel.DistributedDataParallel(clip)
        elif wrapper == "fsdp":
            from torch.distributed.fsdp import fully_shard

            for block in (*clip.visual.transformer.resblocks, *clip.transformer.resblocks):
                fully_shard(block)
            # it shards no scalars, so that each rank keeps this one and its gradient is averaged below
            model = fully_shard(clip, ignored_params={clip.logit_scale})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rows = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
        images, ids = (x[rows] for x in pairs())
        group = dist.group.WORLD if size > 1 else None
        for _ in range(3):
            loss = vk.nn.ClipLoss(group=group)(**model(images, ids))
            optimizer.zero_grad()
            loss.backward()
            if wrapper == "fsdp":
                dist.all_reduce(clip.logit_scale.grad)
                clip.logit_scale.grad /= size
            optimizer.step()
        whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in clip.named_parameters()}
        results[wrapper] = {name: p.detach().numpy().copy() for name, p in whole.items()}
    return results
