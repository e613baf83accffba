# SPDX-License-Identifier: Apache-2.0
"""Scenes of emoji: boxes, masks and pictures agree."""

import pytest
import torch
import torch.nn.functional as F

from vlmkernels.data import draw_canvases, emoji


@pytest.fixture(scope="module")
def emojis():
    return emoji.load()


@pytest.fixture(scope="module")
def animals(emojis):
    return emojis.select(split="train", group="Animals & Nature", base_only=True)


def draw(emojis, pairs, seed=0, count=6, **options):
    return draw_canvases(emojis, pairs, count, torch.Generator().manual_seed(seed), size=64, **options)


def test_boxes_enclose_their_masks_exactly(emojis, animals):
    scenes = draw(emojis, animals)
    for n in range(6):
        masks = scenes.masks(n)
        assert len(masks) == scenes.present[n].sum() == len(scenes.pairs[n])
        for mask, box in zip(masks, scenes.boxes[n], strict=False):
            rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
            x, y, width, height = (64 * box).tolist()
            assert (x - width / 2, x + width / 2) == pytest.approx((int(columns[0]), int(columns[-1]) + 1))
            assert (y - height / 2, y + height / 2) == pytest.approx((int(rows[0]), int(rows[-1]) + 1))
    assert not scenes.boxes[~scenes.present].any()


def test_the_background_is_plain_and_objects_differ_from_it(emojis, animals):
    scenes = draw(emojis, animals, background=(255.0, 255.0))
    plain = (scenes.images == 255).all(1)
    covered = scenes.labels > 0
    # Soft edges, less than half opaque, lie around an object and belong to none.
    near = F.max_pool2d(covered.float().unsqueeze(1), 7, 1, 3)[:, 0] > 0
    assert plain[~near].float().mean() > 0.98
    assert plain[covered].float().mean() < 0.5


def test_scenes_have_the_wanted_number_of_distinct_objects(emojis, animals):
    scenes = draw(emojis, animals, objects=(3, 3), scale=(0.2, 0.3))
    for pairs in scenes.pairs:
        assert 1 <= len(pairs) <= 3
        assert len({index for index, _ in pairs}) == len(pairs)
    assert sum(map(len, scenes.pairs)) > 15


def test_the_same_generator_state_gives_the_same_scenes(emojis, animals):
    one, other, third = draw(emojis, animals), draw(emojis, animals), draw(emojis, animals, seed=1)
    assert torch.equal(one.images, other.images) and one.pairs == other.pairs
    assert not torch.equal(one.images, third.images)


def test_bad_ranges_are_named(emojis, animals):
    with pytest.raises(ValueError, match=r"objects must be a range within \[1, "):
        draw(emojis, animals, objects=(0, 2))
    with pytest.raises(ValueError, match=r"scale must be a range within \(0, 1\]"):
        draw(emojis, animals, scale=(0.5, 1.5))
