# SPDX-License-Identifier: Apache-2.0
"""What the zero-shot tests share: the shipped model, and the bundled pictures' features, computed once a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from vlmkernels.data import emoji, tokenizer_for
from vlmkernels.models import create
from vlmkernels.train.evaluation import Encoder

Pairs = list[tuple[int, str]]


@lru_cache(maxsize=1)
def shipped() -> Encoder:
    model = create("emoji-clip", pretrained=True)
    return Encoder(model, tokenizer_for(model))  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def opened() -> emoji.EmojiSet:
    return emoji.load()


@lru_cache(maxsize=32)
def encoded(pairs: tuple[tuple[int, str], ...]) -> Tensor:
    return shipped().images(opened().images(pairs, size=48))


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    """The emoji model that ships, in eval mode."""
    return shipped()


@pytest.fixture(scope="session")
def emojis() -> emoji.EmojiSet:
    return opened()


@pytest.fixture(scope="session")
def features() -> Callable[[Pairs], Tensor]:
    """Unit features of (emoji index, style) pairs, each list encoded once."""
    return lambda pairs: encoded(tuple(pairs))


@pytest.fixture(scope="session")
def every_fourth(emojis: emoji.EmojiSet) -> tuple[Pairs, list[emoji.Emoji]]:
    """Every fourth base emoji in the held-out style, with their entries: row i of both is one class."""
    pairs = emojis.select(split="test_style", base_only=True)[::4]
    return pairs, [emojis.emojis[i] for i, _ in pairs]


def random_unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Unit rows without structure."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=-1).to(dtype)


@pytest.fixture(scope="session")
def unit_rows() -> Callable[..., Tensor]:
    """`unit_rows(N, D, seed=, dtype=)`: unit rows without structure, float64 by default."""
    return random_unit


@pytest.fixture(scope="session")
def unseen(emojis: emoji.EmojiSet) -> tuple[Pairs, Tensor, list[str]]:
    """Pictures in all styles of concepts that the model was not trained on, their classes, and the classes' names."""
    pairs = emojis.select(split="held_out_concepts", base_only=True)
    classes = sorted({i for i, _ in pairs})
    labels = torch.tensor([classes.index(i) for i, _ in pairs])
    return pairs, labels, [emoji.spoken_name(emojis.emojis[i]) for i in classes]
