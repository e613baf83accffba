# SPDX-License-Identifier: Apache-2.0
"""CaSED for segmentation: cells are means of the crops over them, regions get words, measures on small cases."""

from __future__ import annotations

import pytest
import torch

from vlmkernels.data import emoji
from vlmkernels.methods.zeroshot import CaptionBank, CaSED
from vlmkernels.methods.zeroshot.cased_dense import (
    dense_features,
    name_cells,
    name_regions,
    segmentation_scores,
)

NAMES = ("strawberry", "bicycle", "hot beverage", "raised fist")


@pytest.fixture(scope="module")
def canvas(emojis) -> tuple[torch.Tensor, torch.Tensor]:
    """Two emoji side by side, and their masks."""
    picture, masks = (
        torch.full((3, 64, 128), 255, dtype=torch.uint8),
        torch.zeros(2, 64, 128, dtype=torch.bool),
    )
    for i, name in enumerate(NAMES[:2]):
        index = next(e.index for e in emojis.emojis if e.name == name)
        picture[:, :, 64 * i : 64 * i + 64] = emojis.image(index, "twemoji")
        masks[i, :, 64 * i : 64 * i + 64] = emojis.alpha(index, "twemoji")[0] > 127
    return picture, masks


@pytest.fixture(scope="module")
def system(encoder, emojis) -> CaSED:
    entries = [e for e in emojis.emojis if e.name in NAMES]
    return CaSED(encoder, CaptionBank.build(encoder, [c for e in entries for c in emoji.captions(e)]))


def test_cells_are_means_of_their_crops(canvas) -> None:
    class Numbers:
        """Every crop's feature is a unit vector of its own."""

        def images(self, pictures: torch.Tensor) -> torch.Tensor:
            return torch.eye(len(pictures), 32)

        def texts(self, texts):
            return torch.zeros(len(texts), 32)

    got = dense_features(Numbers(), canvas[0], grids=(1, 2, 4), cells=4)
    assert got.shape == (4, 4, 32)
    # the top right cell: the whole picture (0), the second of 2 x 2 (2), the fourth of 4 x 4 (8)
    assert got[0, 3].nonzero()[:, 0].tolist() == [0, 2, 8]
    torch.testing.assert_close(got.norm(dim=2), torch.ones(4, 4))
    both = dense_features(Numbers(), canvas[0], grids=(2,), cells=4, overlap=True)
    assert both[1, 1].nonzero()[:, 0].tolist() == [0, 1, 3, 4]


def test_regions_get_their_words(system, canvas) -> None:
    picture, masks = canvas
    for vocabulary in ("region", "picture"):
        kept, found = name_regions(system, picture, masks=masks, vocabulary=vocabulary)
        assert kept is masks and len(found) == 2
    words = [p.word for p in name_regions(system, picture, masks=masks, background=(255, 255, 255))[1]]
    scores = segmentation_scores(words, list(NAMES[:2]), encoder=system.encoder)
    assert scores["jaccard_nearest"] == 1


def test_cells_get_words(system, canvas) -> None:
    found = name_cells(system, canvas[0], grids=(1, 2), cells=4)
    assert len(found) == 4 and all(len(row) == 4 and row[0].words for row in found)


def test_measures_on_a_small_case() -> None:
    got = segmentation_scores(["cat", "cat", "big dog", "cat"], ["cat", "cat", "dog", "dog"])
    assert got["jaccard_hard"] == pytest.approx((2 / 3 + 0) / 2)
    assert got["recall_hard"] == pytest.approx((1 + 0) / 2)
    assert got["jaccard_overlap"] == pytest.approx((2 / 3 + 0.5 / 2) / 2)


def test_bad_input(system, canvas) -> None:
    with pytest.raises(ValueError, match="vocabulary must"):
        name_regions(system, canvas[0], vocabulary="all")
    with pytest.raises(ValueError, match="masks must"):
        name_regions(system, canvas[0], masks=canvas[1][:, :5])
    with pytest.raises(ValueError, match="grids must"):
        dense_features(system.encoder, canvas[0], grids=(32,))
    with pytest.raises(ValueError, match="words for"):
        segmentation_scores([], [])
