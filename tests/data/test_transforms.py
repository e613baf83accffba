# SPDX-License-Identifier: Apache-2.0
"""Image preprocessing: what comes out, and that its paths agree."""

import pytest
import torch
from PIL import Image

from vlmkernels import models
from vlmkernels.data import OPENAI_MEAN, OPENAI_STD, ImageTransform, transform_for


def picture(width, height, mode="RGB"):
    torch.manual_seed(0)
    image = Image.effect_noise((width, height), 60).convert("RGB")
    return image.convert(mode)


def pixels(image):
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1)


def test_mean_and_deviation():
    out = ImageTransform(4)(Image.new("RGB", (9, 5), (255, 0, 51)))
    expected = [(value - m) / s for value, m, s in zip((1.0, 0.0, 0.2), OPENAI_MEAN, OPENAI_STD, strict=True)]
    torch.testing.assert_close(out, torch.tensor(expected)[:, None, None].expand(3, 4, 4))
    assert out.is_contiguous()


@pytest.mark.parametrize("size", [(64, 64), (65, 64), (640, 200), (31, 90), (1, 1)])
def test_every_size_becomes_square(size):
    assert ImageTransform(64)(picture(*size)).shape == (3, 64, 64)
    assert ImageTransform(64, train=True)(picture(*size)).shape == (3, 64, 64)


def test_centre_is_kept():
    image = Image.new("RGB", (30, 10), "white")
    image.paste("black", (10, 0, 20, 10))
    assert ImageTransform(10).denormalize(ImageTransform(10)(image)).max() == 0


def test_resizing_is_pillows_bicubic():
    image = picture(90, 60)
    transform = ImageTransform(20)
    expected = image.resize((30, 20), Image.Resampling.BICUBIC).crop((5, 0, 25, 20))
    assert torch.equal(transform.denormalize(transform(image)), pixels(expected))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "RGBA", "LA", "I"])
def test_every_mode_becomes_rgb(mode):
    image = picture(20, 20, "L").convert(mode) if mode in ("LA", "I") else picture(20, 20, mode)
    assert ImageTransform(16)(image).shape == (3, 16, 16)


def test_transparency_shows_the_background():
    image = Image.new("RGBA", (8, 8), (0, 255, 0, 0))
    white, green = ImageTransform(8), ImageTransform(8, background=None)
    assert (white.denormalize(white(image)) == 255).all()
    assert green.denormalize(green(image))[:, 0, 0].tolist() == [0, 255, 0]
    blue = ImageTransform(8, background=(0, 0, 255))
    palette = Image.new("P", (8, 8), 0)
    palette.info["transparency"] = 0
    assert blue.denormalize(blue(palette))[:, 0, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize("size", [(24, 24), (40, 30)])
def test_tensors_and_pictures_agree(size):
    image = picture(*size)
    transform = ImageTransform(24)
    tensor = pixels(image)
    assert torch.equal(transform(tensor), transform(image))
    assert torch.equal(transform(torch.stack([tensor, tensor])), torch.stack([transform(image)] * 2))


def test_empty_batch():
    assert ImageTransform(8)(torch.zeros(0, 3, 20, 20, dtype=torch.uint8)).shape == (0, 3, 8, 8)


def test_training_crops_are_random_and_seeded():
    transform = ImageTransform(32, train=True, scale=(0.5, 0.8))
    batch = torch.stack([pixels(picture(32, 32))] * 6)
    for value in (picture(50, 40), batch):
        first = transform(value, generator=torch.Generator().manual_seed(1))
        assert torch.equal(transform(value, generator=torch.Generator().manual_seed(1)), first)
        assert not torch.equal(transform(value, generator=torch.Generator().manual_seed(2)), first)
    out = transform(batch)
    assert not torch.allclose(out[0], out[1])


@pytest.mark.parametrize("kind", ["picture", "batch"])
def test_training_crops_stay_inside_and_have_the_right_size(kind):
    # A ramp from left to right: its slope after resizing tells the side of the crop, its ends the place.
    ramp = torch.arange(64, dtype=torch.uint8).mul(4).expand(3, 64, 64).contiguous()
    transform = ImageTransform(64, mean=(0, 0, 0), std=(1, 1, 1), train=True, scale=(0.25, 0.49))
    image = Image.frombytes("RGB", (64, 64), bytes(ramp.permute(1, 2, 0).flatten().tolist()))
    generator = torch.Generator().manual_seed(0)
    sides = []
    for _ in range(20):
        out = transform(ramp[None] if kind == "batch" else image, generator=generator)
        row = out.reshape(3, 64, 64)[0, 32] * 255 / 4
        assert -0.5 <= row.min() <= row.max() <= 63.5
        sides.append(float(row[50] - row[14]) / 36)
    assert 0.5 - 0.03 <= min(sides) < max(sides) <= 0.7 + 0.03
    assert max(sides) - min(sides) > 0.1


def test_full_scale_in_training_is_the_picture():
    transform = ImageTransform(32, train=True, scale=(1.0, 1.0))
    batch = pixels(picture(32, 32))[None]
    torch.testing.assert_close(transform(batch), transform.normalize(batch), rtol=1e-5, atol=1e-5)


def test_denormalize_is_the_inverse():
    batch = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    transform = ImageTransform(16)
    assert torch.equal(transform.denormalize(transform.normalize(batch)), batch)


def test_transform_for_a_model():
    model = models.create(
        "emoji-clip", vision={"layers": 1, "image_mean": (0.5, 0.5, 0.5)}, text={"layers": 1}
    )
    transform = transform_for(model)
    assert (transform.size, transform.mean, transform.train) == (48, (0.5, 0.5, 0.5), False)
    assert transform_for(model, train=True).train
    assert model.encode_image(transform(picture(80, 70))[None]).shape == (1, 256)
    with pytest.raises(TypeError, match=r"expected a model with config\.vision, got Linear"):
        transform_for(torch.nn.Linear(1, 1))


def test_bad_inputs_are_named():
    transform = ImageTransform(8)
    with pytest.raises(TypeError, match="expected a Pillow picture or a uint8 tensor, got str"):
        transform("cat.png")
    with pytest.raises(TypeError, match=r"tensors must be uint8, got torch\.float32"):
        transform(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r"must be \[3, H, W\] or \[B, 3, H, W\], got \[8, 8, 3\]"):
        transform(torch.zeros(8, 8, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="size must be positive, got 0"):
        ImageTransform(0)
    with pytest.raises(ValueError, match=r"scale must be a range within \(0, 1\], got \(0.9, 0.8\)"):
        ImageTransform(8, scale=(0.9, 0.8))


def test_siglip_squashes_and_align_squashes_and_crops():
    image = picture(90, 60)
    siglip, align = (transform_for(models.create(name)) for name in ("siglip-emoji", "align-emoji"))
    expected = image.resize((48, 48), Image.Resampling.BICUBIC)
    assert torch.equal(siglip.denormalize(siglip(image)), pixels(expected))
    large = image.resize((57, 57), Image.Resampling.BILINEAR)  # 48 * 346 / 289
    assert torch.equal(align.denormalize(align(image)), pixels(large.crop((4, 4, 52, 52))))
    with pytest.raises(ValueError, match="resize must be one of"):
        ImageTransform(8, resize="fit")
