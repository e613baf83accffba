# SPDX-License-Identifier: Apache-2.0
"""Loki: instead of the most probable label, the one with the smallest expected squared distance under a label metric.

Roberts et al., "Geometry-Aware Adaptation for Pretrained Models" (2023; released code SprocketLab/loki). With K
observed labels lambda_i, probabilities p over them, and a metric d on all V labels:

```
D2[i,v] = d(lambda_i, v)^2;  m[n,v] = sum_i p[n,i] D2[i,v];  prediction = argmin_v m[n,v]
```

so a label that was never observed can win. Metrics: a matrix, hops in a tree or in a graph, or distances of the labels'
own embeddings, for which the rule is a top-1 search: argmin_v sum_i p_i |E_i - E_v|^2 = argmax_v <E_v, sum_i p_i E_i>
for unit rows; no D2 exists. In a tree, m changes from a node to its child by sums over the child's subtree, and falls
only towards observed labels: the minimum is found among the K labels' ancestors, whatever V. Otherwise D2 is made and
searched in blocks of columns, so V may be 100,000. Only the direction of p matters, but its temperature matters much;
flat probabilities give the central label. The gain is in squared distance, not in accuracy: report both.

    vlmkernels classify picture.png --method loki
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkernels.methods.zeroshot._classifier import (
    BLOCK_ELEMENTS,
    CACHE_ELEMENTS,
    Classifier,
    Prediction,
    check_features,
    joined,
    row_blocks,
    unit,
)
from vlmkernels.ops.contrastive import linear_cross_entropy
from vlmkernels.ops.flat_index import FlatIndex
from vlmkernels.ops.topk import topk_similarity
from vlmkernels.systems import register_system

__all__ = [
    "EmbeddingMetric",
    "GraphMetric",
    "LabelMetric",
    "Loki",
    "MatrixMetric",
    "TreeMetric",
    "frechet_predict",
    "is_locus_cover",
    "loki_cross_entropy",
    "loki_surrogate",
    "mean_squared_distance",
    "next_class",
    "tree_locus",
]


#: Images in a call from which an index of the embeddings is worth its making.
_WORTH_INDEX = 64


class LabelMetric(Protocol):
    """Distances between V labels, a block of columns at a time."""

    @property
    def size(self) -> int:
        """V."""
        ...

    def squared(self, observed: Tensor, columns: Tensor) -> Tensor:
        """Returns squared distances [K, B] of labels `observed` [K] to labels `columns` [B]."""
        ...


@dataclass(frozen=True)
class MatrixMetric:
    """Distances as a matrix.

    Attributes:
        distance: [V, V], not squared.
    """

    distance: Tensor

    def __post_init__(self) -> None:
        if self.distance.ndim != 2 or self.distance.shape[0] != self.distance.shape[1]:
            raise ValueError(f"MatrixMetric: distance must be [V, V], got {list(self.distance.shape)}")

    @property
    def size(self) -> int:
        """V."""
        return len(self.distance)

    def squared(self, observed: Tensor, columns: Tensor) -> Tensor:
        """Returns squared distances [K, B]."""
        return self.distance[observed][:, columns].square()


@dataclass(frozen=True)
class EmbeddingMetric:
    """Euclidean distance of unit embeddings, the self-derived metric when they are the class texts.

    Attributes:
        embeddings: [V, D], unit rows.
    """

    embeddings: Tensor

    def __post_init__(self) -> None:
        check_features("EmbeddingMetric", "embeddings", self.embeddings)

    @property
    def size(self) -> int:
        """V."""
        return len(self.embeddings)

    @functools.cached_property
    def index(self) -> FlatIndex:
        """The embeddings as int8 codes beside the float32 ones, for exact searches; made when first asked for."""
        index = FlatIndex(
            self.embeddings.shape[1], metric="dot", storage="int8", device=self.embeddings.device
        )
        index.add(self.embeddings.detach())
        return index

    def squared(self, observed: Tensor, columns: Tensor) -> Tensor:
        """Returns squared distances [K, B]."""
        return (2 - 2 * self.embeddings[observed] @ self.embeddings[columns].T).clamp(min=0)


class TreeMetric:
    """Hops between the nodes of a rooted tree.

    Args:
        parents: for every node its parent's index; -1 for the root, of which there is one.

    Raises:
        ValueError: The indices are no tree.
    """

    def __init__(self, parents: Sequence[int]) -> None:
        self.parents = list(parents)
        if self.parents.count(-1) != 1 or any(not -1 <= p < len(self.parents) for p in self.parents):
            raise ValueError("TreeMetric: expected one root (-1) and parents among the nodes")
        chains = []
        for node in range(len(self.parents)):
            chain = [node]
            while self.parents[chain[-1]] >= 0:
                chain.append(self.parents[chain[-1]])
                if len(chain) > len(self.parents):
                    raise ValueError("TreeMetric: the parents form a cycle")
            chains.append(chain[::-1])
        self._parents = torch.tensor(self.parents)
        self.depth = torch.tensor([len(c) - 1 for c in chains])
        levels = int(self.depth.max()) + 1
        # ancestors[v, l] = the node at depth l on the way from the root to v; -1 below v
        self._ancestors = torch.tensor([c + [-1] * (levels - len(c)) for c in chains], dtype=torch.int32)

    @property
    def size(self) -> int:
        """V."""
        return len(self.parents)

    def hops(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Returns the number of hops [K, B], int64."""
        shared = torch.zeros(len(rows), len(columns), dtype=torch.int32)
        for level in range(self._ancestors.shape[1]):
            mine = self._ancestors[rows, level][:, None]
            shared += (mine == self._ancestors[columns, level]) & (mine >= 0)
        return self.depth[rows][:, None] + self.depth[columns] - 2 * (shared.long() - 1)

    def squared(self, observed: Tensor, columns: Tensor) -> Tensor:
        """Returns squared hops [K, B]."""
        return self.hops(observed, columns).square().float()

    def variances(self, probabilities: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the ancestors [S] of the observed labels, ascending, and their Frechet variances [S, N], float64.

        With the sums P of p, A(u) of p_i d(i,u), and those over the subtree of a child c of u, P_c and A_c(u):

        ```
        A(c) = A(u) + P - 2 P_c;   m(c) = m(u) + P + 2 A(u) - 4 A_c(u)
        ```

        A node outside of S has no observed label below, so that its m exceeds its parent's by P + 2 A(u).
        """
        nodes = self._ancestors[observed].unique().long()
        nodes = nodes[nodes >= 0]
        levels = [(self.depth[nodes] == d).nonzero()[:, 0] for d in range(int(self.depth[nodes].max()) + 1)]
        place = torch.empty(self.size, dtype=torch.int64)  # of a node within its level
        for level in levels:
            place[nodes[level]] = torch.arange(len(level))
        above = [place[self._parents[nodes[level]]] for level in levels]  # of the root: not used
        seen = [(self.depth[observed] == d).nonzero()[:, 0] for d in range(len(levels))]
        squares = self.depth[observed].double().square()
        out = torch.empty(len(nodes), len(probabilities), dtype=torch.float64)
        for block in row_blocks(len(probabilities), len(nodes), CACHE_ELEMENTS // 4):
            p = probabilities[block].T.contiguous().double()
            mass = [p.new_zeros(len(level), p.shape[1]) for level in levels]
            below = [torch.zeros_like(m) for m in mass]  # A_c(u) of a node c with parent u
            for d in range(len(levels) - 1, -1, -1):
                mass[d].index_add_(0, place[observed[seen[d]]], p[seen[d]])
                if d:
                    below[d] += mass[d]
                    mass[d - 1].index_add_(0, above[d], mass[d])
                    below[d - 1].index_add_(0, above[d], below[d])
            whole, far, value = mass[0], below[0], (squares @ p)[None]
            out[levels[0], block] = value
            for d in range(1, len(levels)):
                before = far[above[d]]
                value = value[above[d]].add_(whole).add_(before, alpha=2).sub_(below[d], alpha=4)
                far = before.add_(whole).sub_(mass[d], alpha=2)
                out[levels[d], block] = value
        return nodes, out

    @property
    def leaves(self) -> list[int]:
        """Nodes without children (a root with one child is none of them, unlike "degree one" would have it)."""
        inner = set(self.parents)
        return [v for v in range(self.size) if v not in inner]

    def path(self, a: int, b: int) -> list[int]:
        """Returns the nodes from a to b, both included."""
        up, down = [a], [b]
        while up[-1] != down[-1]:
            if self.depth[up[-1]] >= self.depth[down[-1]]:
                up.append(self.parents[up[-1]])
            else:
                down.append(self.parents[down[-1]])
        return up + down[-2::-1]


class GraphMetric:
    """Shortest paths in an undirected graph without weights, found from each observed label when it is asked for.

    Args:
        nodes: V.
        edges: pairs of nodes.

    Raises:
        ValueError: An edge leaves the nodes. Nodes that no path joins are `nodes` hops apart.
    """

    def __init__(self, nodes: int, edges: Iterable[tuple[int, int]]) -> None:
        self._neighbours: list[list[int]] = [[] for _ in range(nodes)]
        for a, b in edges:
            if not (0 <= a < nodes and 0 <= b < nodes):
                raise ValueError(f"GraphMetric: edge {(a, b)} leaves the {nodes} nodes")
            self._neighbours[a].append(b)
            self._neighbours[b].append(a)
        self._rows: dict[int, Tensor] = {}

    @property
    def size(self) -> int:
        """V."""
        return len(self._neighbours)

    def _from(self, start: int) -> Tensor:
        if start not in self._rows:
            far = [self.size] * self.size
            far[start], queue = 0, deque([start])
            while queue:
                node = queue.popleft()
                for neighbour in self._neighbours[node]:
                    if far[neighbour] == self.size and neighbour != start:
                        far[neighbour] = far[node] + 1
                        queue.append(neighbour)
            self._rows[start] = torch.tensor(far, dtype=torch.int32)
        return self._rows[start]

    def squared(self, observed: Tensor, columns: Tensor) -> Tensor:
        """Returns squared hops [K, B]."""
        return torch.stack([self._from(i)[columns] for i in observed.tolist()]).float().square()


def frechet_predict(
    probabilities: Tensor,  # [N, K]
    metric: LabelMetric | Tensor,
    observed: Tensor | None = None,  # [K]
    *,
    candidates: Tensor | None = None,  # [V']
    k: int = 1,
) -> tuple[Tensor, Tensor]:
    """Returns the labels with the smallest Frechet variance, [N, k], and those variances, ascending.

    Args:
        probabilities: of the observed labels, not negative; rows need not sum to 1.
        metric: a `LabelMetric`; or squared distances [K, V] as a tensor, rows by observed label.
        observed: label of every column of `probabilities`; None: labels 0 to K - 1.
        candidates: labels that may be predicted; None: all V.
        k: how many.

    Raises:
        ValueError, TypeError: Shapes, labels or k that do not fit.

    Equal variances come in ascending label. Variances of `EmbeddingMetric` come from its top-1 form.
    """
    check_features("frechet_predict", "probabilities", probabilities)
    rows = probabilities.shape[1]
    if isinstance(metric, Tensor):
        if metric.ndim != 2 or len(metric) != rows:
            raise ValueError(f"frechet_predict: distances must be [{rows}, V], got {list(metric.shape)}")
        size = metric.shape[1]
    else:
        size = metric.size
    observed = torch.arange(rows) if observed is None else observed
    if observed.shape != (rows,) or (not isinstance(metric, Tensor) and int(observed.max()) >= size):
        raise ValueError(f"frechet_predict: observed must be [{rows}] labels below {size}")
    many = size if candidates is None else len(candidates)
    if not 1 <= k <= many:
        raise ValueError(f"frechet_predict: k must lie between 1 and {many}, got {k}")
    if isinstance(metric, EmbeddingMetric):
        return _embedded(probabilities, metric, observed, candidates, k)
    if isinstance(metric, TreeMetric) and k == 1 and candidates is None:
        return _in_tree(probabilities, metric, observed)
    candidates = torch.arange(size) if candidates is None else candidates
    best = probabilities.new_empty(len(probabilities), 0)
    labels = torch.empty(len(probabilities), 0, dtype=torch.int64)
    for block in row_blocks(len(candidates), rows):
        columns = candidates[block]
        d2 = metric[:, columns] if isinstance(metric, Tensor) else metric.squared(observed, columns)
        bank = -d2.T.to(probabilities.dtype).contiguous()
        score, index = topk_similarity(probabilities, bank, min(k, len(columns)))
        # earlier blocks hold smaller positions, so a stable sort keeps ties in order
        merged = torch.cat([best, score], 1).sort(dim=1, descending=True, stable=True)
        labels = torch.cat([labels, columns[index]], 1).gather(1, merged.indices[:, :k])
        best = merged.values[:, :k]
    return labels, -best


def _embedded(
    p: Tensor, metric: EmbeddingMetric, observed: Tensor, candidates: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """A search for the embeddings nearest to their mean under p."""
    e = metric.embeddings.to(p.dtype)
    centre = p @ e[observed]
    if candidates is None and e.dtype == metric.embeddings.dtype == torch.float32 and len(p) >= _WORTH_INDEX:
        score, labels = metric.index.search(centre, k)
    elif candidates is None:
        score, labels = topk_similarity(centre, e, k)
    else:
        score, labels = topk_similarity(centre, e[candidates], k)
        labels = candidates[labels]
    return labels, 2 * p.sum(1, keepdim=True) - 2 * score


def _in_tree(p: Tensor, tree: TreeMetric, observed: Tensor) -> tuple[Tensor, Tensor]:
    """The best label of every row among the observed labels' ancestors, where all minima lie."""
    labels = torch.empty(len(p), 1, dtype=torch.int64)
    variance = p.new_empty(len(p), 1, dtype=torch.float32 if p.dtype != torch.float64 else p.dtype)
    for rows in row_blocks(len(p), len(observed)):
        nodes, values = tree.variances(p[rows], observed)
        # rounded first, so that equal variances stay equal; the first of equals is the smallest label
        best = values.to(variance.dtype).min(0)
        labels[rows, 0], variance[rows, 0] = nodes[best.indices], best.values
    labels[p.sum(1) == 0] = 0  # all variances are 0
    return labels, variance


def mean_squared_distance(predicted: Tensor, true: Tensor, metric: LabelMetric) -> float:
    """Returns the mean of d(predicted_n, true_n)^2; under the 0/1 metric it is the error rate."""
    total = 0.0
    for label in true.unique():
        rows = predicted[true == label]
        values, counts = rows.unique(return_counts=True)
        total += float((metric.squared(label[None], values)[0].double() * counts).sum())
    return total / len(true)


def tree_locus(tree: TreeMetric, observed: Iterable[int]) -> set[int]:
    """Returns the labels that some p over the observed ones can reach: the smallest subtree that spans them."""
    chosen = list(dict.fromkeys(observed))
    # paths from one observed node to all others already cover every pairwise path
    return {node for other in chosen for node in tree.path(chosen[0], other)}


def is_locus_cover(tree: TreeMetric, observed: Iterable[int]) -> bool:
    """Returns whether every label of the tree can be reached."""
    return len(tree_locus(tree, observed)) == tree.size


def next_class(tree: TreeMetric, observed: Iterable[int]) -> int | None:
    """Returns the label to observe next: the one farthest from the current locus; None where all can be reached.

    The paper's active selection; adding a random label is its baseline, and the size of the locus its measure.
    """
    locus = tree_locus(tree, observed)
    outside = [v for v in range(tree.size) if v not in locus]
    if not outside:
        return None
    inside = torch.tensor(sorted(locus))
    nearest = []
    for block in row_blocks(len(outside), len(inside)):
        nearest.append(tree.hops(torch.tensor(outside[block]), inside).amin(1))
    return outside[int(torch.cat(nearest).argmax())]


def loki_cross_entropy(probabilities: Tensor, squared_distance: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with the logits `-p @ D2`, the paper's training variant, without the [N, V] logits.

    Args:
        probabilities: [N, K], with a gradient.
        squared_distance: [K, V].
        targets: [N] labels among V.
    """
    return linear_cross_entropy(
        probabilities, -squared_distance.T.contiguous().to(probabilities.dtype), targets
    )


def loki_surrogate(
    probabilities: Tensor, squared_distance: Tensor, kind: str, *, step: float = 0.01
) -> Tensor:
    """The hard choice [N, V] as one-hot rows, with a gradient that training can use.

    Args:
        probabilities: [N, K].
        squared_distance: [K, V].
        kind: "straight_through": the gradient of softmax(-p @ D2); "projection": that of the projection of
            `-p @ D2 / step` onto the simplex (reconstructed from the released code's step size).
        step: of the projection.

    Raises:
        ValueError: An unknown kind.
    """
    logits = -probabilities @ squared_distance.to(probabilities.dtype)
    if kind == "straight_through":
        soft = logits.softmax(1)
    elif kind == "projection":
        soft = project_to_simplex(logits / step)
    else:
        raise ValueError(f"loki_surrogate: kind must be 'straight_through' or 'projection', got {kind!r}")
    hard = F.one_hot(logits.argmax(1), logits.shape[1]).to(soft.dtype)
    return hard + soft - soft.detach()


def project_to_simplex(x: Tensor) -> Tensor:
    """Returns the nearest point of the probability simplex to every row (Duchi et al. 2008)."""
    ordered = x.sort(dim=1, descending=True).values
    excess = (ordered.cumsum(1) - 1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype)
    count = (ordered > excess).sum(1, keepdim=True)
    return (x - excess.gather(1, count - 1)).clamp(min=0)


@register_system("Loki", "Geometry-Aware Adaptation for Pretrained Models", "zero-shot inference method")
class Loki(Classifier):
    """The rule on top of any classifier of the observed labels; see the top of this file.

    Args:
        base: a classifier whose `scores` are logits over the K observed labels.
        classes: names of all V labels.
        metric: on the V labels.
        observed: label of each of the base's classes; None: 0 to K - 1.
        candidates: labels that may be predicted; None: all.
        temperature: the base's logits are divided by it; check it first.

    Raises:
        ValueError: Sizes that do not fit.
    """

    def __init__(
        self,
        base: Classifier,
        classes: Sequence[str],
        metric: LabelMetric,
        *,
        observed: Tensor | None = None,
        candidates: Tensor | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(classes, base.encoder)
        if metric.size != len(self.classes):
            raise ValueError(f"Loki: the metric has {metric.size} labels, classes {len(self.classes)}")
        if temperature <= 0:
            raise ValueError(f"Loki: temperature must be positive, got {temperature}")
        self.base, self.metric, self.temperature = base, metric, temperature
        self.observed = torch.arange(len(base.classes)) if observed is None else observed
        self.candidates = candidates

    @classmethod
    def self_derived(cls, base: Any, **options: Any) -> Loki:
        """Returns the rule with the metric of a linear classifier's own class vectors."""
        return cls(base, base.classes, EmbeddingMetric(unit(base.head.weight)), **options)

    def probabilities(self, features: Tensor) -> Tensor:
        """Returns p over the observed labels, [N, K]."""
        return (self.base._scores(features) / self.temperature).softmax(1)

    def _scores(self, features: Tensor) -> Tensor:
        """Negated variances [N, V], those of other labels than the candidates at -inf."""
        out = features.new_full((len(features), len(self.classes)), -torch.inf)
        columns = torch.arange(len(self.classes)) if self.candidates is None else self.candidates
        p = self.probabilities(features)
        for block in row_blocks(len(columns), len(self.observed)):
            out[:, columns[block]] = -p @ self.metric.squared(self.observed, columns[block]).to(p.dtype)
        return out

    def _predict(self, features: Tensor, k: int) -> Prediction:
        parts = []
        for rows in row_blocks(len(features), len(self.observed), BLOCK_ELEMENTS):
            p = self.probabilities(features[rows])
            labels, variance = frechet_predict(p, self.metric, self.observed, candidates=self.candidates, k=k)
            parts.append((labels, -variance))
        return joined(parts, features, k)
