# SPDX-License-Identifier: Apache-2.0
"""Exact nearest neighbours as programs find them today: FAISS's flat index, and a matrix product followed by topk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def faiss_index(database: Tensor, threads: int) -> Any:
    """`faiss.IndexFlatIP` of float32 rows [M, D], which it copies."""
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(database.shape[1])
    index.add(database.numpy())
    return index


def faiss_search(index: Any, queries: Tensor, k: int, allowed: Tensor | None = None) -> Callable[[], Any]:
    """A call that gives `(scores, ids)` of queries [N, D]; `allowed` [M] as a bitmap selector."""
    import faiss
    import numpy

    rows = queries.numpy()
    if allowed is None:
        return lambda: index.search(rows, k)
    bits = numpy.packbits(allowed.numpy(), bitorder="little")
    selector = faiss.IDSelectorBitmap(bits)
    parameters = faiss.SearchParameters(sel=selector)
    # the selector keeps pointers into the bits
    parameters.kept_alive = (bits, selector)
    return lambda: index.search(rows, k, params=parameters)


def topk(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All N x M products in memory, then torch's selection."""
    scores, indices = torch.topk(queries @ database.T, k)
    return scores, indices


def zero_shot(images: Tensor, classes: Tensor, scale: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise, logits, softmax, topk, log-sum-exp."""
    logits = scale * F.normalize(images, dim=-1) @ F.normalize(classes, dim=-1).T
    probabilities, indices = logits.softmax(-1).topk(k)
    return probabilities, indices, logits.logsumexp(-1)
