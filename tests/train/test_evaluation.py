# SPDX-License-Identifier: Apache-2.0
"""Recall, chance and classification against counting by hand."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
import torch.nn.functional as F

from vlmkernels.train.evaluation import average_prompts, classification, retrieval, trim


def _unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_recall_counts_matches_among_the_first_k() -> None:
    queries, database = _unit(40, 8), _unit(30, 8, seed=1)
    query_labels = torch.arange(40) % 12
    database_labels = torch.arange(30) % 12
    result = retrieval(queries, database, query_labels, database_labels)
    order = (queries.double() @ database.double().T).argsort(1, descending=True)
    for k in (1, 5, 10):
        hits = [bool((database_labels[order[n, :k]] == query_labels[n]).any()) for n in range(len(queries))]
        assert result.recall[k] == pytest.approx(sum(hits) / 40)
    assert torch.equal(result.indices, order[:, :10])


def test_chance_is_the_share_of_draws_with_a_match() -> None:
    database_labels = torch.tensor([0, 0, 1, 2, 2, 2])
    query_labels = torch.tensor([0, 2, 7])  # 7 has no match
    result = retrieval(_unit(3, 4), _unit(6, 4, seed=1), query_labels, database_labels)
    for k in (1, 5):
        draws = list(combinations(range(6), k))
        share = [
            sum(any(database_labels[i] == label for i in draw) for draw in draws) / len(draws)
            for label in query_labels.tolist()
        ]
        assert result.chance[k] == pytest.approx(sum(share) / 3)
    assert result.recall[10] == pytest.approx(2 / 3)


def test_a_database_smaller_than_k_is_searched_whole() -> None:
    result = retrieval(_unit(4, 8), _unit(3, 8, seed=1), torch.tensor([0, 1, 2, 0]), torch.arange(3))
    assert result.recall[5] == result.recall[10] == 1.0
    assert result.chance[5] == 1.0


def test_nothing_to_search_is_an_error() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        retrieval(_unit(0, 4), _unit(3, 4), torch.zeros(0), torch.zeros(3))


def test_classification_and_confusion() -> None:
    classes = torch.eye(3)[:, None]  # one prompt each
    images = torch.eye(3)[[0, 0, 1, 2, 2]] + 0.01
    result = classification(images, classes, torch.tensor([0, 1, 1, 2, 2]), ["a", "b", "c"])
    assert result.accuracy == pytest.approx(0.8)
    assert result.chance == pytest.approx(1 / 3)
    assert result.majority == pytest.approx(0.4)
    assert result.confusion.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 2]]
    assert result.balanced == pytest.approx((1 + 0.5 + 1) / 3)


def test_labels_outside_the_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="labels from 0 to 2"):
        classification(_unit(2, 3), torch.eye(3)[:, None], torch.tensor([0, 3]), ["a", "b", "c"])


def test_prompts_are_averaged_on_the_sphere() -> None:
    prompts = _unit(5, 4, 8)
    expected = prompts.sum(1) / prompts.sum(1).norm(dim=-1, keepdim=True)
    torch.testing.assert_close(average_prompts(prompts), expected)


def test_trim_keeps_every_end_token() -> None:
    ids = torch.tensor([[8, 1, 9, 0, 0, 0], [8, 1, 2, 9, 0, 0]])
    assert trim(ids, 9).tolist() == [[8, 1, 9, 0], [8, 1, 2, 9]]
    assert trim(ids[:0], 9).shape == (0, 6)
