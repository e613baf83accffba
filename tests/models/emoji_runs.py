# SPDX-License-Identifier: Apache-2.0
"""Short training runs on the bundled emoji for the behavioural checks of the models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vlmkernels.data import Augment, Tokenizer, emoji
from vlmkernels.data.augment import AugmentConfig
from vlmkernels.train.loop import has_bfloat16
from vlmkernels.train.optim import parameter_groups
from vlmkernels.train.schedule import warmup_cosine

MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)


def fit(
    model: nn.Module,
    losses: Callable[[int], dict[str, Tensor]],
    steps: int,
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    seed: int = 0,
) -> list[float]:
    """Trains with AdamW, warm-up and cosine; `losses(step)` gives a dict with "loss". Returns the loss per step."""
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=(0.9, 0.98), fused=True)
    seen = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * warmup_cosine(step, steps=steps, warmup=max(1, steps // 20))
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
            loss = losses(step)["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if hasattr(model, "after_step"):
            model.after_step(step + 1, steps)
        seen.append(float(loss.detach()))
    model.eval()
    return seen


def normalise(images: Tensor) -> Tensor:
    """uint8 `[..., 3, S, S]` to what an image tower takes."""
    return (images.float() / 255 - MEAN) / STD


class Pictures:
    """Emoji without skin tone, decoded once: augmented views and plain ones."""

    def __init__(self, pairs: list[tuple[int, str]], size: int, augment: float = 1.0) -> None:
        self.set = emoji.load()
        self.pairs, self.size = pairs, size
        self.rgba = self.set.rgba(pairs)
        self.entries = [self.set.emojis[index] for index, _ in pairs]
        self.augment = Augment(size, AugmentConfig(flip=0.0).scaled(augment))

    def __len__(self) -> int:
        return len(self.pairs)

    def views(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Augmented and normalised views of some rows, `[N, 3, S, S]`."""
        return (self.augment(self.rgba[rows], generator) - MEAN) / STD

    def plain(self, rows: Tensor | None = None) -> Tensor:
        """Normalised pictures on white, `[N, 3, S, S]`."""
        pairs = self.pairs if rows is None else [self.pairs[i] for i in rows.tolist()]
        return normalise(self.set.images(pairs, size=self.size))


def emoji_tokenizer(vocab_size: int = 2048, context_length: int = 32) -> Tokenizer:
    """A tokenizer learned from the names, keywords and subgroups of all emoji."""
    entries = emoji.load("noto").emojis
    texts = [emoji.spoken_name(e) + " " + " ".join(e.keywords) for e in entries if e.base == e.index]
    texts += [emoji.spoken_group(e.subgroup) for e in entries]
    return Tokenizer.train(texts, vocab_size, context_length=context_length)


def trimmed(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Ids without the columns that are padding in every row."""
    from vlmkernels.train.evaluation import trim

    return trim(tokenizer(texts), tokenizer.end_id)
