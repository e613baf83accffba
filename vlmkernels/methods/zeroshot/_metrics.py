# SPDX-License-Identifier: Apache-2.0
"""Measures that several methods share: assignment, cluster accuracy, word overlap, groups, area under the ROC curve."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from vlmkernels.methods.zeroshot._classifier import TextImageEncoder

__all__ = [
    "assign",
    "auroc",
    "cluster_accuracy",
    "group_accuracy",
    "semantic_iou",
    "semantic_similarity",
]


def assign(profit: Tensor) -> Tensor:
    """Returns the assignment of rows to different columns with the largest total profit (Hungarian method).

    Shortest augmenting paths with potentials (Jonker and Volgenant 1987): O(R^2 C) for R rows and C columns.

    Args:
        profit: [R, C] finite, R at most C.

    Returns:
        int64 [R], the column of every row.

    Raises:
        ValueError: Another shape, more rows than columns, or values that are not finite.
    """
    import numpy as np

    if profit.ndim != 2 or profit.shape[0] > profit.shape[1]:
        raise ValueError(f"assign: expected [R, C] with R at most C, got {list(profit.shape)}")
    cost = -profit.detach().cpu().double().numpy()
    if not np.isfinite(cost).all():
        raise ValueError("assign: expected finite values")
    rows, columns = cost.shape
    u, v = np.zeros(rows), np.zeros(columns)
    owner = np.full(columns, -1)
    for row in range(rows):
        distance = np.full(columns, np.inf)
        before = np.full(columns, -1)  # the column that comes before on the shortest path; -1: the row itself
        done = np.zeros(columns, dtype=bool)
        column, current, reached = -1, row, 0.0
        while True:
            step = reached + cost[current] - u[current] - v
            closer = ~done & (step < distance)
            distance[closer] = step[closer]
            before[closer] = column
            column = int(np.argmin(np.where(done, np.inf, distance)))
            reached = distance[column]
            done[column] = True
            if owner[column] < 0:
                break
            current = owner[column]
        u[row] += reached
        finished = done.copy()
        finished[column] = False
        u[owner[finished]] += reached - distance[finished]
        v[finished] -= reached - distance[finished]
        while column >= 0:
            previous = before[column]
            owner[column] = row if previous < 0 else owner[previous]
            column = previous
    out = torch.empty(rows, dtype=torch.int64)
    taken = np.flatnonzero(owner >= 0)
    out[torch.from_numpy(owner[taken])] = torch.from_numpy(taken)
    return out


def cluster_accuracy(predicted: Sequence[Hashable], true: Sequence[Hashable]) -> float:
    """Returns the share of images whose predicted name matches, under the best one-to-one renaming.

    Renaming predictions changes nothing, and any bijection gives 1.

    Raises:
        ValueError: The lists are empty or of different lengths.
    """
    if not len(predicted) or len(predicted) != len(true):
        raise ValueError(f"cluster_accuracy: expected equal lengths, got {len(predicted)} and {len(true)}")
    rows = {p: i for i, p in enumerate(dict.fromkeys(predicted))}
    columns = {t: i for i, t in enumerate(dict.fromkeys(true))}
    counts = torch.zeros(len(rows), len(columns))
    for p, t in zip(predicted, true, strict=True):
        counts[rows[p], columns[t]] += 1
    if len(rows) > len(columns):
        counts = counts.T
    return float(counts[torch.arange(len(counts)), assign(counts)].sum()) / len(true)


def _words(text: str) -> set[str]:
    return set(re.sub(r"[^a-z0-9 ]", " ", text.lower()).split())


def semantic_iou(predicted: Sequence[str], true: Sequence[str]) -> float:
    """Returns the mean overlap of the words of prediction and truth: intersection over union."""
    values = []
    for p, t in zip(predicted, true, strict=True):
        a, b = _words(p), _words(t)
        values.append(len(a & b) / len(a | b) if a | b else 1.0)
    return sum(values) / len(values)


def semantic_similarity(encoder: TextImageEncoder, predicted: Sequence[str], true: Sequence[str]) -> float:
    """Returns the mean cosine of predicted and true names, by any encoder of sentences with `texts`."""
    return float((encoder.texts(list(predicted)) * encoder.texts(list(true))).sum(1).mean())


def group_accuracy(
    predicted: Tensor, labels: Tensor, groups: Tensor
) -> tuple[float, float, dict[tuple[int, int], float]]:
    """Returns average accuracy, that of the worst (group, label) cell, and all cells; empty cells do not exist.

    Args:
        predicted: [N].
        labels: [N].
        groups: [N], for instance the background.
    """
    right = predicted == labels
    cells = {}
    for group, label in sorted({(int(g), int(y)) for g, y in zip(groups, labels, strict=True)}):
        chosen = (groups == group) & (labels == label)
        cells[group, label] = float(right[chosen].float().mean())
    return float(right.float().mean()), min(cells.values()), cells


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Returns the area under the ROC curve: the share of pairs that scores order rightly, ties counting half.

    Args:
        scores: [N], larger = more likely positive.
        positive: bool [N] with both values.

    Raises:
        ValueError: Only one of the two values occurs.
    """
    scores, positive = scores.flatten().double(), positive.flatten().bool()
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        raise ValueError("auroc: expected positives and negatives")
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts - 1) / 2)[inverse]  # mean rank among equals, from 1
    rank_sum = float(ranks[positive].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)
