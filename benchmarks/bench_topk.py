# SPDX-License-Identifier: Apache-2.0
"""Exact top-k search beside FAISS and beside a product with torch.topk; streams beside the memory's read rate.

    pytest benchmarks/bench_topk.py --benchmark-columns=median,iqr,rounds        # all rows, some minutes, 10 GiB
    pytest benchmarks/bench_topk.py -k "100000 and int8"                         # some rows
    pytest benchmarks/bench_topk.py --save-results                               # and keep the figures

Calls alternate, peer first; `ratio` = peer / ours. The peer always has float32 vectors, ours what the row's dtype says;
"int8 exact" gives the float32 answer. Rows with one query state the bytes of the rows over the time, and the share of
the read rate that is probed right before and after each call. `rescored` counts rows scored exactly, per query.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from peers import topk as peers
from torch import Tensor

import vlmkernels as vk
from vlmkernels import _native

D = 512
STORAGES = ("float32", "bfloat16", "int8")
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
KINDS = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8"}
each_storage = pytest.mark.parametrize("storage", STORAGES)


def spread(rows: int, seed: int) -> Tensor:
    """Normalised rows without structure."""
    x = torch.randn(rows, D, generator=torch.Generator().manual_seed(seed))
    return x.div_(torch.linalg.vector_norm(x, dim=-1, keepdim=True))


def cone(rows: int, seed: int) -> Tensor:
    """Like CLIP's features: a common direction, and five dimensions ten times as large as the others."""
    scale = torch.ones(D)
    scale[[3, 99, 200, 301, 444]] = 10
    direction = torch.randn(D, generator=torch.Generator().manual_seed(1000)) * scale
    noise = torch.randn(rows, D, generator=torch.Generator().manual_seed(seed))
    return F.normalize(direction + 0.7 * noise * scale, dim=-1)


@pytest.fixture(scope="module", autouse=True)
def large() -> Iterator[Callable[[int], Tensor]]:
    """`large(M)`: the database of M rows, kept until another size is asked for."""
    kept: dict[int, Tensor] = {}

    def database(rows: int) -> Tensor:
        if rows not in kept:
            kept.clear()
            gc.collect()
            kept[rows] = spread(rows, 1)
        return kept[rows]

    yield database
    kept.clear()


def filled(database: Tensor, storage: str, metric: str = "dot") -> vk.FlatIndex:
    index = vk.FlatIndex(database.shape[1], metric=metric, storage=storage)
    index.add(database)
    return index


def check(ours: tuple[Tensor, ...], scores: Tensor, atol: float = 1e-5) -> None:
    """The same best scores, to the rounding of a float32 product; an exact bfloat16 or int8 index is no exception."""
    torch.testing.assert_close(ours[0], scores, rtol=1e-4, atol=atol)


@each_storage
def test_one_query(benchmark, row, large, threads, storage: str) -> None:
    database, query = large(1_000_000), spread(1, 2)
    index = filled(database, storage)
    check(index.search(query, 10), peers.topk(query, database, 10)[0])
    seconds, shares = [], []

    def measured() -> None:
        before = _native.cpu.peak("read", 0.05, threads)
        start = time.perf_counter()
        index.search(query, 10)
        seconds.append(time.perf_counter() - start)
        rate = len(index) * D * BYTES[storage] / seconds[-1] / 1e9
        shares.append(rate / max(before, _native.cpu.peak("read", 0.05, threads)))

    benchmark.pedantic(measured, rounds=15, warmup_rounds=1)
    ms = statistics.median(seconds[1:]) * 1e3
    row(
        f"search 1 x 1000000 x {D} k=10 {storage}",
        shape=[1, 1_000_000, D],
        dtype=storage,
        ms=ms,
        gbytes=len(index) * D * BYTES[storage] / ms / 1e6,
        share_of_read=statistics.median(shares[1:]),
        rescored=index.search_with_stats(query, 10)[2].rescored,
        rounds=15,
    )


@each_storage
@pytest.mark.parametrize(("n", "m", "k"), [(1000, 100_000, 10), (256, 1_000_000, 100)])
def test_faiss(pairs, row, share_of_peak, large, threads, n: int, m: int, k: int, storage: str) -> None:
    database, queries = large(m), spread(n, 2)
    index, peer = filled(database, storage), peers.faiss_index(database, threads)
    search = peers.faiss_search(peer, queries, k)
    check(index.search(queries, k), torch.from_numpy(search()[0]))
    times = pairs(lambda: index.search(queries, k), search, 5 if m == 100_000 else 3)
    row(
        f"search {n} x {m} x {D} k={k} {storage} beside FAISS",
        shape=[n, m, D],
        dtype=storage,
        peer="FAISS IndexFlatIP",
        **times,
        **share_of_peak(KINDS[storage], 2.0 * n * m * D, times["ms"]),
        peer_gflops=2.0 * n * m * D / times["peer_ms"] / 1e6,
        rescored=index.search_with_stats(queries, k)[2].rescored / n,
    )


@each_storage
def test_product_and_topk(pairs, row, large, storage: str) -> None:
    n, m, k = 1000, 100_000, 10
    database, queries = large(m), spread(n, 2)
    index = filled(database, storage)
    check(index.search(queries, k), peers.topk(queries, database, k)[0])
    times = pairs(lambda: index.search(queries, k), lambda: peers.topk(queries, database, k), 5)
    row(
        f"search {n} x {m} x {D} k={k} {storage} beside torch",
        shape=[n, m, D],
        dtype=storage,
        peer="matmul + topk, float32",
        **times,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_few_classes(pairs, row, dtype: str) -> None:
    n, c, k = 64, 1000, 5
    queries, classes = spread(n, 2), spread(c, 1)
    mine = [x.to(getattr(torch, dtype)) for x in (queries, classes)]
    # Both sides of a product of unit vectors rounded to eight bits of mantissa.
    rounding = 2**-8 if dtype == "bfloat16" else 1e-5
    check(vk.topk_similarity(*mine, k, backend="cpu"), peers.topk(queries, classes, k)[0], atol=rounding)
    times = pairs(
        lambda: vk.topk_similarity(*mine, k, backend="cpu"), lambda: peers.topk(queries, classes, k), 301
    )
    row(
        f"topk_similarity {n} x {c} x {D} k={k} {dtype}",
        shape=[n, c, D],
        dtype=dtype,
        peer="matmul + topk, float32",
        **times,
    )


def test_zero_shot(pairs, row) -> None:
    n, c, k = 64, 1000, 5
    images, classes = spread(n, 2), spread(c, 1)
    ours, theirs = vk.zero_shot(images, classes, 100.0, k=k), peers.zero_shot(images, classes, 100.0, k)
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-5, atol=0)
    times = pairs(
        lambda: vk.zero_shot(images, classes, 100.0, k=k, backend="cpu"),
        lambda: peers.zero_shot(images, classes, 100.0, k),
        301,
    )
    row(f"zero_shot {n} x {c} x {D} k={k}", shape=[n, c, D], dtype="float32", peer="eager", **times)


@each_storage
@pytest.mark.parametrize("n", [1, 64])
def test_filter(pairs, row, large, threads, n: int, storage: str) -> None:
    m, k = 100_000, 10
    database, queries = large(m), spread(n, 2)
    allowed = torch.rand(m, generator=torch.Generator().manual_seed(3)) < 0.1
    index, peer = filled(database, storage), peers.faiss_index(database, threads)
    search = peers.faiss_search(peer, queries, k, allowed)
    check(index.search(queries, k, allowed), torch.from_numpy(search()[0]))
    times = pairs(lambda: index.search(queries, k, allowed), search, 9)
    unfiltered = []
    for _ in range(9):
        start = time.perf_counter()
        index.search(queries, k)
        unfiltered.append(time.perf_counter() - start)
    row(
        f"search {n} x {m} x {D} k={k} {storage}, a tenth allowed",
        shape=[n, m, D],
        dtype=storage,
        peer="FAISS IndexFlatIP, IDSelectorBitmap",
        **times,
        unfiltered_ms=statistics.median(unfiltered) * 1e3,
    )


@pytest.mark.parametrize("features", ["cone", "emoji-clip"])
def test_structured_features(pairs, row, threads, features: str) -> None:
    if features == "cone":
        database, queries = cone(100_000, 1), cone(1000, 2)
    else:
        database, queries = emoji_features()
    index, peer = filled(database, "int8"), peers.faiss_index(database, threads)
    search = peers.faiss_search(peer, queries, 10)
    check(index.search(queries, 10), torch.from_numpy(search()[0]))
    times = pairs(lambda: index.search(queries, 10), search, 3)
    stats = index.search_with_stats(queries, 10)[2]
    row(
        f"search {len(queries)} x {len(database)} x {database.shape[1]} k=10 int8, {features}",
        shape=[len(queries), len(database), database.shape[1]],
        dtype="int8",
        peer="FAISS IndexFlatIP",
        **times,
        rescored=stats.rescored / len(queries),
        widened=stats.widened,
    )


def emoji_features() -> tuple[Tensor, Tensor]:
    """The shipped model's features: drawings of two styles, and names of all emoji as queries."""
    from vlmkernels.cli._models import load_encoder, text_features
    from vlmkernels.data import emoji

    encoder = load_encoder("emoji-clip")
    size = encoder.model.config.vision.image_size
    drawings = []
    for style in emoji.STYLES[:2]:
        data = emoji.load(style)
        drawings.append(encoder.images(data.images(data.select(base_only=True), size=size)))
    names = [e.name for e in emoji.load(emoji.STYLES[0]).emojis][:1000]
    queries = torch.cat([text_features(encoder, [name], ["{}"]) for name in names])
    return F.normalize(torch.cat(drawings), dim=-1), F.normalize(queries, dim=-1)
