# SPDX-License-Identifier: Apache-2.0
"""Top-k similarity and zero-shot classification on a GPU, beside a product with torch.topk, and the memory's rate.

    pytest -m gpu benchmarks/bench_gpu_topk.py
    pytest benchmarks/bench_gpu_topk.py --dry                            # the same Python on small problems

bfloat16 rows. Scores and indices are compared with float64 products over the whole database, for some of the queries.
The peer goes through its queries in blocks whose scores take 4 GiB, so that they fit.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gpu_measures import Arena, Call
from peers import topk as peer
from torch import Tensor

import vlmkernels as vk

pytestmark = pytest.mark.gpu

WIDTH = 512
ROWS = 1_000_000
PEER_SCORES = 2**31
CHECKED = 32
BLOCK = 100_000
#: Scores are float32 of float64 sums.
TOLERANCE = 1e-6


def normalised(arena: Arena, rows: int, width: int, seed: int) -> Tensor:
    return F.normalize(arena.randn(rows, width, seed=seed), dim=-1).to(arena.half)


def exact_topk(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """By float64 products, a block of the database at a time; for few queries."""
    scores = torch.cat([queries.double() @ rows.double().T for rows in database.split(BLOCK)], 1)
    # descending scores, equal ones in ascending index
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return scores.gather(1, order), order


def blocked_topk(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    parts = [peer.topk(part, database, k) for part in queries.split(max(PEER_SCORES // len(database), 1))]
    scores, indices = zip(*parts, strict=True)
    return torch.cat(scores), torch.cat(indices)


def inside(function: object) -> Call:
    def call() -> object:
        with torch.no_grad():
            return function()

    return call


@pytest.mark.parametrize(("n", "k"), [(10_000, 10), (10_000, 100), (1, 10), (64, 10)])
def test_search(arena: Arena, n: int, k: int) -> None:
    run_n, run_k, m, width = (
        arena.size(n, min(n, 5)),
        arena.size(k, 3),
        arena.size(ROWS, 300),
        arena.size(WIDTH, 24),
    )
    queries, database = normalised(arena, run_n, width, 0), normalised(arena, m, width, 1)
    some = queries[-CHECKED:]
    scores, indices = exact_topk(some, database, run_k)

    def error(result: tuple[Tensor, Tensor]) -> float:
        found, where = (x[-CHECKED:] for x in result)
        wrong = (where != indices).double().mean().item()
        return max((found.double() - scores).abs().max().item(), wrong)

    few = n <= 64
    arena.contest(
        f"topk_similarity {n} x {ROWS} x {WIDTH} k={k} bfloat16",
        op="topk_similarity",
        ours=lambda backend: inside(lambda: vk.topk_similarity(queries, database, run_k, backend=backend)),
        peers={"product and topk": lambda: inside(lambda: blocked_topk(queries, database, run_k))},
        check=error,
        tolerance=TOLERANCE,
        shape=[run_n, m, width],
        k=run_k,
        operations=2.0 * run_n * m * width,
        moved=2.0 * m * width if few else 0.0,
        seconds=1.0,
    )


def test_zero_shot(arena: Arena) -> None:
    """256 images, 1000 classes, k = 5: normalisation, logits, softmax, topk and log-sum-exp; launches are counted."""
    n, c, width, k = arena.size(256, 9), arena.size(1000, 30), arena.size(WIDTH, 24), 5
    images, classes = (arena.randn(rows, width, seed=rows).to(arena.half) for rows in (n, c))
    exact = peer.zero_shot(images.double(), classes.double(), 100.0, k)
    compiled = arena.compiled(peer.zero_shot)

    def error(result: tuple[Tensor, Tensor, Tensor]) -> float:
        return (result[0].double() - exact[0]).abs().max().item()

    def ours(backend: str) -> Call:
        return inside(lambda: vk.zero_shot(images, classes, 100.0, k=k, backend=backend))

    outcome = arena.contest(
        "zero_shot 256 x 1000 x 512 k=5 bfloat16",
        op="zero_shot",
        ours=ours,
        peers={
            "eager": lambda: inside(lambda: peer.zero_shot(images, classes, 100.0, k)),
            "compiled": lambda: inside(lambda: compiled(images, classes, 100.0, k)),
        },
        compiles=("compiled",),
        check=error,
        tolerance=1e-4,
        shape=[n, c, width],
        k=k,
        seconds=0.3,
        figures=lambda backend: {"launches": arena.launches(ours(backend))},
    )
    assert arena.prepare or outcome.times
