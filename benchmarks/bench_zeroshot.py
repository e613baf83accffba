# SPDX-License-Identifier: Apache-2.0
"""Zero-shot methods beside the straightforward torch programs of their papers, as the problem grows.

    pytest benchmarks/bench_zeroshot.py --benchmark-columns=median,iqr,rounds      # all sizes, five minutes, 6 GiB
    pytest benchmarks/bench_zeroshot.py -k small                                   # the smallest size of each
    pytest benchmarks/bench_zeroshot.py --save-results

Sizes are called small, medium and large, so that a method's curve is three rows. Calls alternate, peer first; both
results are compared before they are timed, then the memory that each side adds at its highest is measured by one more
call. Encoders take no part: features are given, as after one pass over the data. What is made once for many calls is
not timed on either side: an index of captions or of labels' embeddings, Loki's D2, a head.

Where a row says what bounds it, both sides make the same product, and only what surrounds it can be saved. With 2
threads of the AMD EPYC (233 GFLOP/s at most) torch multiplies 512-dimensional features at 175 to 205 GFLOP/s.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from measures import difference
from peers import zeroshot as peers
from torch import Tensor

from vlmkernels.methods.zeroshot import (
    FuDD,
    LinearHead,
    PerceptionCLIP,
    SupportAdapter,
    encoder_of,
    fit_gda,
    fit_gda_new,
    mark,
)
from vlmkernels.methods.zeroshot.cab import TEMPLATE, Trial, cab_probe, encoder_scores
from vlmkernels.methods.zeroshot.loki import EmbeddingMetric, TreeMetric, frechet_predict
from vlmkernels.methods.zeroshot.musc import mutual_score
from vlmkernels.methods.zeroshot.pac_bayes import column_errors
from vlmkernels.methods.zeroshot.s3a import cluster_vote
from vlmkernels.methods.zeroshot.zpe import zpe_scores
from vlmkernels.models import create
from vlmkernels.ops.flat_index import FlatIndex

D = 512
SIZES = ("small", "medium", "large")
ROUNDS = {"small": 9, "medium": 5, "large": 3}


def sized(**values: tuple[Any, Any, Any]) -> pytest.MarkDecorator:
    """Parametrises `size` and named numbers: `sized(n=(1, 2, 3))` gives n = 1 at "small", and so on."""
    rows = [(size, *(v[i] for v in values.values())) for i, size in enumerate(SIZES)]
    return pytest.mark.parametrize(("size", *values), rows, ids=SIZES)


def unit(*shape: int, seed: int = 0, width: int = D) -> Tensor:
    """Normalised rows without structure, [*shape, width]."""
    x = torch.randn(*shape, width, generator=torch.Generator().manual_seed(seed))
    return x.div_(x.norm(dim=-1, keepdim=True))


def near(centres: Tensor, y: Tensor, spread: float, seed: int = 0) -> Tensor:
    """Normalised rows about centres [K, D], the y-th each."""
    noise = unit(len(y), seed=seed, width=centres.shape[1])
    return F.normalize(noise.mul_(spread).add_(centres[y]), dim=1)


def same(ours: Tensor, theirs: Tensor, most: float = 1e-4) -> None:
    """Refuses to time programs that compute different things."""
    assert difference(ours, theirs) < most


@pytest.fixture
def compare(pairs, memory, row):
    """`compare(name, ours, theirs, size, **figures)`: times, memory and the row."""

    def run(name: str, ours: Any, theirs: Any, size: str, **figures: Any) -> None:
        times = pairs(ours, theirs, ROUNDS[size])
        row(name, **{"dtype": "float32", **figures}, **times, **memory(ours, theirs))

    return run


@sized(n=(1000, 4000, 4000), c=(1000, 10_000, 50_000))
def test_head(compare, size: str, n: int, c: int) -> None:
    """Bound by the product, 2 N C D: the exact log-sum-exp needs float32 accuracy of all logits.

    N = C = 1000 is 5.1 ms of product at torch's rate, and the peer's softmax and topk over 4 MB, which its cache holds,
    take 1.6 ms more: 2x is out of reach. What grows is the peer's passes over N x C logits in memory; at 4000 x 50,000
    the product is 1.0 s, all that ours takes, of the peer's 1.7 s.
    """
    x, classes = unit(n), unit(c, seed=1)
    head = LinearHead(100 * classes)
    same(head(x, 5).scores, peers.classify(x, classes, 100.0, 5)[0])
    compare(
        f"zero-shot head {n} x {c}",
        lambda: head(x, 5),
        lambda: peers.classify(x, classes, 100.0, 5),
        size,
        shape=[n, c, D],
        peer="softmax of all logits",
    )


@sized(n=(500, 1000, 1000), p=(20, 40, 80), c=(100, 300, 1000))
def test_zpe(compare, size: str, n: int, p: int, c: int) -> None:
    """One product instead of two (means of logits are logits of means), and no pass over [N, P, C] in memory."""
    text, x, before = unit(p, c), unit(n, seed=1), unit(n, seed=2)
    same(zpe_scores(text, x, before), peers.zpe_scores(text, x, before, 100.0))
    compare(
        f"ZPE {n} x {p} x {c}",
        lambda: zpe_scores(text, x, before),
        lambda: peers.zpe_scores(text, x, before, 100.0),
        size,
        shape=[n, p, c, D],
        peer="logits N x P x C",
    )


@sized(n=(1000, 4000, 10_000), c=(100, 300, 1000))
def test_description(compare, size: str, n: int, c: int) -> None:
    """A mean of similarities is the similarity of the mean: one row per class instead of 3 to 10."""
    x, bank = unit(n), [unit(3 + i % 8, seed=i) for i in range(c)]
    head = LinearHead(torch.stack([t.mean(0) for t in bank]))
    same(head.logits(x), peers.description_scores(x, bank))
    compare(
        f"by description {n} x {c}",
        lambda: head.top(x),
        lambda: peers.description_scores(x, bank).max(1),
        size,
        shape=[n, c, D],
        peer="a mean per class",
    )


@sized(n=(500, 1000, 2000), c=(100, 200, 1000), z=(12, 36, 48))
def test_perception(compare, size: str, n: int, c: int, z: int) -> None:
    """Bound by the product, 2 N C Z D: every probability takes part, so none can be left out.

    500 x 100 x 12 is 3.1 ms of product, and the peer's softmaxes over 2.4 MB, which its cache holds, take 2.1 ms more;
    ours 1.1. Where the logits leave the cache they cost the peer as much as the product, ours a fifth of it.
    """
    text, x = unit(c, z), unit(n, seed=1)
    factor = {"context": {str(i): [str(i)] for i in range(z)}}
    ours = PerceptionCLIP(None, [str(i) for i in range(c)], factor, temperature=3.0, text=text)
    same(ours.predict_proba(x), peers.perception_probabilities(x, text, 100.0, 3.0))
    compare(
        f"PerceptionCLIP {n} x {c} x {z}",
        lambda: ours.predict_proba(x),
        lambda: peers.perception_probabilities(x, text, 100.0, 3.0),
        size,
        shape=[n, c, z, D],
        peer="logits N x C x Z",
    )


@sized(n=(500, 1000, 1000), k=(1000, 1000, 1000), v=(2000, 20_000, 100_000))
def test_loki_embeddings(compare, size: str, n: int, k: int, v: int) -> None:
    """A thousand observed classes, as ImageNet has, among V: a search in D dimensions instead of a product in K.

    With K below D the product with D2 is the smaller one: pass D2 itself then.
    """
    e = unit(v)
    p = (5 * torch.randn(n, k, generator=torch.Generator().manual_seed(1))).softmax(1)
    metric = EmbeddingMetric(e)
    d2 = (2 - 2 * e[:k] @ e.T).clamp_(
        min=0
    )  # what the released code keeps; making it is not timed, nor the index
    labels, variance = frechet_predict(p, metric)
    theirs = peers.frechet(p, d2)
    same(variance[:, 0], (p * d2[:, theirs].T).sum(1), 1e-5)
    assert (labels[:, 0] == theirs).double().mean() > 0.99  # float32 ties fall either way
    compare(
        f"Loki {n} x {k} x {v}",
        lambda: frechet_predict(p, metric),
        lambda: peers.frechet(p, d2),
        size,
        shape=[n, k, v, D],
        peer="p @ D2, argmin",
    )


@sized(n=(500, 1000, 1000), k=(1000, 1000, 1000), v=(2000, 20_000, 100_000))
def test_loki_tree(compare, size: str, n: int, k: int, v: int) -> None:
    """Sums over subtrees of the observed labels' ancestors: the number of labels does not matter."""
    generator = torch.Generator().manual_seed(0)
    parents = [-1] + [
        int(torch.randint(max(0, i - 200) // 8, i // 8 + 1, (), generator=generator)) for i in range(1, v)
    ]
    tree = TreeMetric(parents)
    observed = torch.randperm(v, generator=generator)[:k]
    p = (5 * torch.randn(n, k, generator=generator)).softmax(1)
    columns = torch.arange(v)
    d2 = torch.cat([tree.squared(observed, part) for part in columns.split(2000)], 1)
    labels, variance = frechet_predict(p, tree, observed)
    theirs = peers.frechet(p, d2)
    same(variance[:, 0], (p * d2[:, theirs].T).sum(1), 1e-5)
    assert (labels[:, 0] == theirs).double().mean() > 0.99
    compare(
        f"Loki in a tree {n} x {k} x {v}",
        lambda: frechet_predict(p, tree, observed),
        lambda: peers.frechet(p, d2),
        size,
        shape=[n, k, v],
        peer="p @ D2, argmin",
    )


@sized(n=(20, 50, 100), m=(10_000, 100_000, 1_000_000))
def test_cased_retrieval(compare, size: str, n: int, m: int) -> None:
    """The ten best captions by int8 codes, with exact scores of what these leave open."""
    bank, x = unit(m), unit(n, seed=1)
    index = FlatIndex(D, storage="int8")
    index.add(bank)
    same(index.search(x, 10)[0], (x @ bank.T).topk(10)[0])
    compare(
        f"CaSED retrieval {n} x {m} int8",
        lambda: index.search(x, 10),
        lambda: (x @ bank.T).topk(10),
        size,
        shape=[n, m, D],
        dtype="int8",
        peer="matmul + topk, float32",
    )


@sized(classes=(50, 1000, 10_000), shots=(16, 16, 4), d=(256, 512, 768))
def test_gda(compare, size: str, classes: int, shots: int, d: int) -> None:
    """Half of the scatter's products, two triangular systems instead of all eigenvectors, no loop over classes."""
    y = torch.arange(classes).repeat_interleave(shots)
    x = near(unit(classes, seed=1, width=d), y, 0.5, seed=2)
    # float32 products in the scatter; the peer in float64 is the truth here
    same(fit_gda(x, y, classes)[0], peers.gda(x.double(), y, classes)[0], 1e-5)
    compare(
        f"GDA {len(x)} x {classes} x {d}",
        lambda: fit_gda(x, y, classes),
        lambda: peers.gda(x, y, classes),
        size,
        shape=[len(x), classes, d],
        peer="released code",
    )


@sized(classes=(10, 40, 60), d=(128, 256, 512))
def test_gda_new(compare, size: str, classes: int, d: int) -> None:
    """Inverses of 64 x 64 matrices (Woodbury) instead of D x D ones."""
    x, text = unit(5000, width=d), unit(classes, seed=1, width=d)
    same(fit_gda_new(text, x)[0], peers.gda_new(text.double(), x.double(), 64, 16), 1e-6)
    compare(
        f"GDA base-to-new {classes} x {d}",
        lambda: fit_gda_new(text, x),
        lambda: peers.gda_new(text, x, 64, 16),
        size,
        shape=[classes, 5000, d],
        peer="a pinv each",
    )


@sized(n=(20, 60, 10), length=(64, 256, 1369), width=(256, 512, 1024))
def test_musc(compare, size: str, n: int, length: int, width: int) -> None:
    """A product per pair of pictures instead of two. Many pictures at "medium", the paper's patches at "large".

    At "small" the released code's other form is the faster peer: 3.6 times ours.
    """
    z = unit(n, length, width=width)
    same(mutual_score(z), peers.mutual_scores(z, 0.3))
    compare(
        f"MuSc {n} x {length} x {width}",
        lambda: mutual_score(z),
        lambda: peers.mutual_scores(z, 0.3),
        size,
        shape=[n, length, width],
        peer="cdist of pairs",
    )


@sized(n=(500, 2000, 2000), classes=(50, 200, 1000))
def test_support_adapter(compare, size: str, n: int, classes: int) -> None:
    """Image and caption keys mixed before the product, votes added up by class, the KL of a class in one row."""
    y = torch.arange(classes * 16) % classes
    w = unit(classes, seed=3)
    f = near(w, torch.arange(n) % classes, 2.0)
    keys, captions = near(w, y, 2.0, seed=1), near(w, y, 1.0, seed=2)
    weights = (1.0, 5.5, 2.0, 0.3)
    adapter = SupportAdapter(keys, y, w, captions)
    adapter.fit_range(f, 0.3)
    onehot = F.one_hot(y).float()
    # in float64: the peer's KL cancels in float32, the more classes the more
    wide = [x.double() for x in (f, keys, captions, onehot, w)]
    same(adapter.logits(f, *weights), peers.support_logits(*wide, weights))
    del wide
    compare(
        f"CapS-Adapter {n} x {len(y)}",
        lambda: adapter.logits(f, *weights),
        lambda: peers.support_logits(f, keys, captions, onehot, w, weights),
        size,
        shape=[n, len(y), classes, D],
        peer="N x M matrices",
    )


@sized(n=(500, 2000, 10_000), classes=(10, 50, 100), words=(200, 1000, 4000))
def test_prompt_search(compare, size: str, n: int, classes: int, words: int) -> None:
    """A candidate changes one column of the scores: all candidates of a class against the best of the other columns."""
    f, text, candidates = unit(n), unit(classes, seed=1), unit(words, seed=2)
    y, scores = torch.arange(n) % classes, f @ text.T
    ours = column_errors(f, y, scores, 3, candidates)
    few = peers.column_errors(scores, y, 3, f, candidates[:50])
    assert (ours[:50] - few).abs().max() <= 1  # a tie of rounding
    compare(
        f"prompt search {n} x {classes}, 50 words",
        lambda: column_errors(f, y, scores, 3, candidates[:50]),
        lambda: peers.column_errors(scores, y, 3, f, candidates[:50]),
        size,
        shape=[n, classes, D],
        peer="all columns",
    )


@sized(n=(1000, 5000, 10_000), k=(20, 100, 200), v=(21_000, 21_000, 21_000))
def test_s3a_votes(compare, size: str, n: int, k: int, v: int) -> None:
    """The paper's 21,000 words: one product, 2 N V D, here of int8 codes that are made in the call.

    1000 pictures are 105 ms of product and 45 ms of argmax to torch; the codes are 25 ms to make and 40 to search.
    """
    x, words, clusters = unit(n), unit(v, seed=1), torch.arange(n) % k

    def ours() -> Tensor:
        return cluster_vote(x, words, k, iterations=0, init=clusters, one_to_one=False).votes

    same(ours(), peers.votes(x, words, clusters, k))
    compare(
        f"S3A votes {n} x {v}",
        ours,
        lambda: peers.votes(x, words, clusters, k),
        size,
        shape=[n, v, k, D],
        peer="matmul, argmax, counts",
    )


class _Ready:
    """An encoder of texts that are numbers: rows of a table."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def images(self, pictures: Tensor) -> Tensor:
        return pictures

    def texts(self, texts: list[str]) -> Tensor:
        return self.table[[int(t) for t in texts]]


@sized(n=(100, 400, 1000), classes=(20, 40, 80))
def test_fudd(compare, size: str, n: int, classes: int) -> None:
    """Images that confuse the same classes share their captions."""
    count = classes * (classes - 1)
    table = unit(classes + 2 * count)
    numbers = iter(range(classes, len(table)))
    pairs_of = {
        (i, j): [("x", str(next(numbers)), str(next(numbers))) for _ in range(2)]
        for i in range(classes)
        for j in range(i + 1, classes)
    }
    x = near(table, torch.arange(n) % classes, 0.3, seed=1)
    ours = FuDD(_Ready(table), [str(i) for i in range(classes)], pairs_of, template="{}", capitalize=False)
    captions = {}
    for (i, j), found in pairs_of.items():
        captions[i, j] = table[[int(a) for _, a, _ in found]]
        captions[j, i] = table[[int(b) for _, _, b in found]]
    sets, got = ours._second(x)  # captions are encoded before the clock starts
    same(got, peers.second_step(x, sets, captions, table[:classes]))
    compare(
        f"FuDD {n} x {classes}",
        lambda: ours._second(x),
        lambda: peers.second_step(x, sets, captions, table[:classes]),
        size,
        shape=[n, classes, D],
        peer="image by image",
    )


@sized(n=(5, 20, 50), side=(384, 384, 384))
def test_fgvp(compare, size: str, n: int, side: int) -> None:
    """One blur a picture instead of one a candidate; ours is the exact Gaussian, Pillow's three boxes instead."""
    generator = torch.Generator().manual_seed(0)
    picture = F.interpolate(
        255 * torch.rand(1, 3, 12, 16, generator=generator), (side, side * 4 // 3), mode="bilinear"
    )
    picture = picture[0].to(torch.uint8)
    coarse = torch.rand(n, 1, 8, 10, generator=generator)
    masks = F.interpolate(coarse, (side, side * 4 // 3), mode="bilinear")[:, 0] > 0.6
    boxes = torch.tensor([[0, 0, side * 4 // 3, side]]).expand(n, 4)
    ours, theirs = mark(picture, masks, boxes), peers.blurred_outside(picture, masks, 100.0)
    assert (
        max((a.float() - b.float()).abs().mean() for a, b in zip(ours, theirs, strict=True)) < 2
    )  # grey levels
    compare(
        f"FGVP {n} marks {side} x {side * 4 // 3}",
        lambda: mark(picture, masks, boxes),
        lambda: peers.blurred_outside(picture, masks, 100.0),
        size,
        shape=[n, 3, side, side * 4 // 3],
        dtype="uint8",
        peer="released code, Pillow",
    )


@sized(n=(50, 200, 400), objects=(10, 20, 20))
def test_cab(compare, size: str, n: int, objects: int) -> None:
    """The one row with an encoder, the bundled model, since what the probe saves is encoding: both questions about a
    picture share it. Bound by the encoder, hence 2 at most.
    """
    values = ["red", "green", "yellow", "orange", "purple"]
    encoder = encoder_of(create("emoji-clip", pretrained=True))
    pictures = torch.randint(
        256, (n // 2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    trials = [
        Trial(picture, f"object {i % objects}", values[i % 5], values[(i + 1) % 5], i % 2)
        for i, picture in enumerate(picture for picture in pictures for _ in range(2))
    ]

    def ours() -> list[str]:
        return cab_probe(encoder_scores(encoder), trials, values).answers

    def theirs() -> list[str]:
        return peers.answers_by_trial(encoder, trials, values, TEMPLATE)

    assert sum(a == b for a, b in zip(ours(), theirs(), strict=True)) >= n - 2  # ties of rounding
    compare(
        f"CAB {n} trials, {objects} objects",
        ours,
        theirs,
        size,
        shape=[n, objects, len(values)],
        peer="a picture a trial",
    )
