# SPDX-License-Identifier: Apache-2.0
"""What the ranks of the tests of sharded indexes run, and the problems they share with the one process."""

from __future__ import annotations

import itertools
import os
import signal
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import vlmkernels as vk

DIM = 16
STORAGES = [("float32", True), ("bfloat16", True), ("int8", True), ("bfloat16", False), ("int8", False)]
METRICS = ("dot", "cosine", "l2")
KINDS = [
    dict(zip(("metric", "storage", "exact"), (m, *s), strict=True))
    for m, s in itertools.product(METRICS, STORAGES)
]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def database() -> Tensor:
    """Rows that repeat all over, so that ties cross the shards; zeros and NaN; a few of their own."""
    few = randn(7, DIM)
    special = torch.cat([torch.zeros(3, DIM), torch.full((2, DIM), torch.nan), -few])
    return torch.cat([few.repeat(9, 1), special, randn(50, DIM, seed=1)])


def queries() -> Tensor:
    return torch.cat([randn(4, DIM, seed=2), database()[:2], torch.zeros(1, DIM)])


def ids() -> Tensor:
    return torch.randperm(1000, generator=torch.Generator().manual_seed(3))[: len(database())]


def parts(count: int) -> list[Tensor]:
    """Which rows each of the shards has; scattered, unequal, and the last has none where there are three or more."""
    order = torch.randperm(len(database()), generator=torch.Generator().manual_seed(4))
    filled = count if count < 3 else count - 1
    return [*(order[i::filled] for i in range(filled)), *(order[:0] for _ in range(count - filled))]


def answers(index: vk.FlatIndex | vk.ShardedIndex) -> list[np.ndarray]:
    """What is asked of an index: searches, with a filter and with more than there is, ranges, vectors."""
    allowed = ids()[::3]
    threshold = {"dot": 1.0, "cosine": 0.2, "l2": -20.0}[index.metric]
    found = [
        *index.search(queries(), 12),
        *index.search(queries(), 500),
        *index.search(queries(), 5, torch.cat([allowed, torch.tensor([5000])])),
        *index.range_search(queries(), threshold),
        index.reconstruct(allowed),
    ]
    return [x.numpy() for x in found]


def answers_of_a_rank(rank: int, size: int, folder: str) -> list[list[np.ndarray]]:
    """Every kind of index, filled rank by rank; then one that is written, read again and changed."""
    rows, results = parts(size)[rank], []
    for options in KINDS:
        index = vk.ShardedIndex([vk.FlatIndex(DIM, **options)], group=dist.group.WORLD)
        index.add(database()[rows], ids()[rows])
        results.append(answers(index))
    index.save(folder)
    loaded = vk.ShardedIndex.load(folder, mmap=True, group=dist.group.WORLD)
    results.append(answers(loaded))
    removed = loaded.remove(ids()[:20])
    own = loaded.add(randn(3 + rank, DIM, seed=rank + 50)).numpy()
    results.append([np.array([removed, len(loaded)]), own, *(x.numpy() for x in loaded.search(queries(), 9))])
    return results


def refusals_of_a_rank(rank: int, size: int) -> list[str]:
    """What a rank hears when one of them is wrong; and that the index still answers afterwards."""
    index = vk.ShardedIndex([vk.FlatIndex(DIM)], group=dist.group.WORLD)
    index.add(randn(4, DIM, seed=rank), torch.arange(4) + 10 * rank)
    heard = []

    def attempt(function: Any) -> None:
        try:
            function()
            heard.append("nothing")
        except (TypeError, ValueError) as error:
            heard.append(str(error))

    attempt(lambda: index.search(randn(2, DIM, seed=rank), 3))
    attempt(lambda: index.search(randn(2, DIM), 3 + rank))
    attempt(lambda: index.add(randn(1, DIM), torch.tensor([10 * (1 - rank)])))
    attempt(lambda: index.add(randn(1, DIM), torch.tensor([77])))
    attempt(lambda: index.add(randn(1, DIM + rank)))
    attempt(lambda: index.add(randn(1, DIM), torch.tensor([80]) if rank else None))
    attempt(lambda: index.remove(torch.tensor([0, 500])))
    attempt(lambda: vk.ShardedIndex([vk.FlatIndex(DIM + rank)], group=dist.group.WORLD))
    scores, _ = index.search(randn(2, DIM), 100)
    return [*heard, str(len(index)), str(int(scores.isfinite().sum(1)[0]))]


def search_beside_a_dying_rank(rank: int, size: int) -> str:
    index = vk.ShardedIndex([vk.FlatIndex(DIM)], group=dist.group.WORLD)
    index.add(randn(4, DIM, seed=rank))
    index.search(randn(2, DIM), 3)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        index.search(randn(2, DIM), 3)
    except RuntimeError as error:
        return str(error)
    return "no error"
