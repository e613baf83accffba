# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the model tests: small configurations, and independent implementations where installed."""

import warnings

import pytest
import torch
from peers.loading import import_open_clip

from vlmkernels.models import CLIP, CLIPConfig, TextConfig, VisionConfig

_TEXT = TextConfig(vocab_size=99, context_length=12, width=64, layers=2, heads=2)
VIT = CLIPConfig(
    48, VisionConfig(image_size=32, layers=3, width=64, patch_size=8, heads=4, mlp_width=96), _TEXT
)
CONV = CLIPConfig(
    48, VisionConfig(image_size=32, layers=2, width=64, patch_size=8, stem="conv"), _TEXT, act="gelu"
)
RESNET = CLIPConfig(48, VisionConfig(image_size=64, layers=(1, 2, 1, 1), width=16), _TEXT)
CONFIGS = {"vit": VIT, "conv": CONV, "resnet": RESNET}


def build(config: CLIPConfig) -> CLIP:
    """A model in which every parameter matters: no zeros, no ones, no shared values."""
    torch.manual_seed(0)
    model = CLIP(config).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point() and value.ndim:
                value.add_(0.1 * torch.randn_like(value))
    return model


@pytest.fixture(params=CONFIGS)
def model(request) -> CLIP:
    return build(CONFIGS[request.param])


@pytest.fixture
def vit() -> CLIP:
    return build(VIT)


@pytest.fixture
def resnet() -> CLIP:
    return build(RESNET)


def batch(config: CLIPConfig, size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images and id rows: start, words, end, zeros, with ends at different places."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(size, 3, config.vision.image_size, config.vision.image_size, generator=generator)
    vocab = config.text.vocab_size
    ids = torch.randint(1, vocab - 2, (size, config.text.context_length), generator=generator)
    ids[:, 0] = vocab - 2
    for row, length in zip(ids, range(3, 3 + size), strict=True):
        row[length] = vocab - 1
        row[length + 1 :] = 0
    return images, ids


@pytest.fixture
def make_batch():
    return batch


@pytest.fixture
def make_model():
    return build


@pytest.fixture(scope="session")
def open_clip():
    """open_clip, whatever build of torchvision is beside it."""
    module = import_open_clip()
    if module is None:
        pytest.skip("needs open_clip and torchvision")
    return module


@pytest.fixture(scope="session")
def transformers():
    """transformers, imported without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers", reason="needs transformers")
