# SPDX-License-Identifier: Apache-2.0
"""Augmentation: nothing changes when everything is off, each change does its own thing, and seeds repeat."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vlmkernels.data.augment import Augment, AugmentConfig, blend_styles

OFF = AugmentConfig().scaled(0.0)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _pictures(n: int = 8, size: int = 16, channels: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (n, channels, size, size), generator=_generator(7), dtype=torch.uint8)


def test_everything_off_puts_pictures_on_white() -> None:
    pictures = _pictures()
    out = Augment(16, OFF)(pictures, _generator())
    x = pictures.double() / 255
    expected = x[:, :3] * x[:, 3:] + 1 - x[:, 3:]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)


def test_pictures_without_transparency_stay_as_they_are() -> None:
    pictures = _pictures(channels=3)
    out = Augment(16, OFF)(pictures, _generator())
    torch.testing.assert_close(out, pictures / 255, rtol=0, atol=2e-6)


def test_the_generator_decides() -> None:
    augment, pictures = Augment(12), _pictures()
    first = augment(pictures, _generator(1))
    assert first.shape == (8, 3, 12, 12)
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, augment(pictures, _generator(1)))
    assert not torch.equal(first, augment(pictures, _generator(2)))


def test_input_is_not_written_to() -> None:
    pictures = _pictures()
    before = pictures.clone()
    Augment(16)(pictures, _generator())
    blend_styles(pictures, pictures.flip(0), _generator(), share=1.0)
    assert torch.equal(pictures, before)


def test_only_pictures_that_may_be_are_mirrored() -> None:
    pictures = _pictures(64, channels=3)
    augment = Augment(16, dataclasses.replace(OFF, flip=0.5))
    may = torch.arange(64) < 32
    out = augment(pictures, _generator(), may_flip=may)
    x = pictures / 255
    same = (out - x).abs().flatten(1).amax(1) < 1e-5
    mirrored = (out - x.flip(-1)).abs().flatten(1).amax(1) < 1e-5
    assert torch.equal(same ^ mirrored, torch.ones(64, dtype=torch.bool))
    assert 5 < mirrored[:32].sum() < 27
    assert not mirrored[32:].any()


def test_gray_pictures_have_no_colour() -> None:
    out = Augment(16, dataclasses.replace(OFF, gray=1.0))(_pictures(channels=3), _generator())
    assert (out.amax(1) - out.amin(1)).max() < 1e-5


def test_hue_keeps_grey_pictures_grey() -> None:
    grey = _pictures(channels=3)[:, :1].expand(-1, 3, -1, -1)
    out = Augment(16, dataclasses.replace(OFF, hue=0.5))(grey, _generator())
    torch.testing.assert_close(out, grey / 255, rtol=0, atol=1e-5)


def test_backgrounds_show_only_through_transparency() -> None:
    pictures = torch.zeros(16, 4, 16, 16, dtype=torch.uint8)
    pictures[:, 3, 4:12, 4:12] = 255  # a black square
    out = Augment(16, dataclasses.replace(OFF, background=1.0))(pictures, _generator())
    assert out[:, :, 5:11, 5:11].max() < 1e-5
    corner = out[:, :, 0, 0]
    assert (corner < 0.99).any(1).sum() >= 14


def test_outlines_surround_the_shape() -> None:
    pictures = torch.full((4, 4, 16, 16), 255, dtype=torch.uint8)
    pictures[:, 3] = 0
    pictures[:, 3, 4:12, 4:12] = 255  # a white square on nothing
    out = Augment(16, dataclasses.replace(OFF, outline=1.0))(pictures, _generator())
    assert (out[:, :, 3, 4:12] < 0.3).all()
    assert (out[:, :, 2] == 1).all()


def test_erased_rectangles_leave_the_rest() -> None:
    pictures = _pictures(32, channels=3)
    out = Augment(16, dataclasses.replace(OFF, erase=1.0))(pictures, _generator())
    changed = ((out - pictures / 255).abs() > 1e-5).any(1).flatten(1).float().mean(1)
    assert (changed > 0.005).all()
    assert (changed < 0.4).all()


def test_blending_mixes_only_the_share() -> None:
    first, second = _pictures(100), _pictures(100).flip(0)
    assert torch.equal(blend_styles(first, second, _generator(), share=0.0), first)
    mixed = blend_styles(first, second, _generator(), share=0.5)
    changed = (mixed != first).flatten(1).any(1).sum()
    assert 35 < changed < 65


def test_blending_a_picture_with_itself_changes_nothing_visible() -> None:
    pictures = _pictures(20)
    mixed = blend_styles(pictures, pictures, _generator(), share=1.0)
    over_white = [x[:, :3].float() * x[:, 3:] / 255 - x[:, 3:].float() for x in (mixed, pictures)]
    assert (over_white[0] - over_white[1]).abs().max() <= 1.0


def test_empty_batches_work() -> None:
    assert Augment(16)(_pictures(0), _generator()).shape == (0, 3, 16, 16)


@pytest.mark.parametrize(
    "pictures",
    [torch.zeros(2, 4, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)],
    ids=["dtype", "channels"],
)
def test_other_pictures_are_refused(pictures: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"Augment: pictures must be uint8"):
        Augment(16)(pictures, _generator())


def test_other_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="size must be at least 8"):
        Augment(4)
    with pytest.raises(ValueError, match=r"may_flip must have shape \[8\]"):
        Augment(16)(_pictures(), _generator(), may_flip=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="strength must lie between 0 and 2"):
        AugmentConfig().scaled(3.0)
    with pytest.raises(ValueError, match="second must have first's shape"):
        blend_styles(_pictures(3), _pictures(4), _generator())
