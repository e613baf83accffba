# SPDX-License-Identifier: Apache-2.0
"""Writing token by token: greedy, top-k and top-p sampling, and beam search over any decoder with a step function.

Nothing here knows a model. A decoder gets one token per row and gives the next logits; it keeps keys and values of
what came before and reorders them when beams change places.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkernels.nn.attention import MultiheadSelfAttention
from vlmkernels.ops.attention import attention

__all__ = ["GenerationConfig", "KeyValueCache", "StepDecoder", "generate"]

METHODS = ("greedy", "beam", "top_p", "top_k")


class StepDecoder(Protocol):
    """What `generate` drives: R rows of text, each continued by one token a step."""

    def step(self, tokens: Tensor) -> Tensor:
        """Takes the tokens `[R]` of the next position and returns the logits `[R, V]` of the one after it."""
        ...

    def reorder(self, rows: Tensor) -> None:
        """Makes row r continue what row `rows[r]` was; `rows` `[R']` may repeat and leave out."""
        ...


@dataclass(frozen=True)
class GenerationConfig:
    """How to write.

    Attributes:
        method: "greedy", "beam", "top_p" or "top_k".
        max_length: Most tokens of a text, start and end included.
        min_length: The end may not come before there are this many tokens (open_clip: 5).
        beams: Width of the beam search.
        length_penalty: Beam scores are divided by length to this power.
        normalize: Add log-probabilities in the beam search; False adds plain logits, as open_clip's code does.
        top_p: Sample from the smallest set of tokens with this probability.
        top_k: Sample from this many most probable tokens.
        temperature: Divides the logits before sampling.
    """

    method: str = "greedy"
    max_length: int = 30
    min_length: int = 0
    beams: int = 6
    length_penalty: float = 1.0
    normalize: bool = True
    top_p: float = 0.1
    top_k: int = 1
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"generate: method must be one of {list(METHODS)}, got {self.method!r}")
        for name, low in (("max_length", 2), ("beams", 1), ("top_k", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"generate: {name} must be at least {low}, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"generate: top_p must lie in (0, 1], got {self.top_p}")
        if not self.temperature > 0:
            raise ValueError(f"generate: temperature must be positive, got {self.temperature}")
        if not 0 <= self.min_length < self.max_length:
            raise ValueError(
                f"generate: min_length must lie in [0, max_length = {self.max_length}), got {self.min_length}"
            )


class KeyValueCache:
    """Keys and values of one self-attention layer for the positions seen so far, in memory reserved once.

    Args:
        length: Most positions.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.used = 0
        self._packed: Tensor | None = None

    def attend(self, layer: MultiheadSelfAttention, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """Runs a causal self-attention layer on new positions `x` `[R, L, D]` that follow the cached ones.

        Args:
            layer: Its projections are used; positions see themselves and what came before.
            x: Normalised inputs of the new positions.
            key_mask: Bool `[R, positions so far]`, the new ones included; True = may be attended to.

        Returns:
            `[R, L, D]`, equal to the layer's output for these positions in a pass over the whole text.
        """
        qkv = layer.project_qkv(x)
        rows, new, _, heads, width = qkv.shape
        if self._packed is None:
            self._packed = qkv.new_empty(rows, self.length, 2, heads, width)
        first, self.used = self.used, self.used + new
        self._packed[:, first : self.used] = qkv[:, :, 1:]
        k, v = self._packed[:, : self.used].unbind(2)
        out = attention(qkv[:, :, 0], k, v, key_mask=key_mask, is_causal=True, backend=layer.backend)
        return layer.out_proj(cast(Tensor, out).flatten(2))

    def reorder(self, rows: Tensor) -> None:
        """Makes row r continue what row `rows[r]` was."""
        if self._packed is not None:
            self._packed = self._packed[rows]


def generate(
    decoder: StepDecoder,
    prompt: Tensor,  # [B, P]
    config: GenerationConfig,
    *,
    end_id: int,
    pad_id: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continues prompts until they end.

    Args:
        decoder: Has B rows at the first step.
        prompt: int64 `[B, P]`, P >= 1, the same length for all; it counts towards the lengths.
        config: How.
        end_id: A text stops after this token, which is forced where the text would grow too long.
        pad_id: Fills texts that ended before the longest one.
        generator: For sampling.

    Returns:
        int64 `[B, at most max_length]`, prompt included.

    Raises:
        ValueError: If the prompt is empty or too long.
    """
    if prompt.ndim != 2 or not 1 <= prompt.shape[1] < config.max_length:
        raise ValueError(
            f"generate: prompt must be [B, P] with P from 1 to {config.max_length - 1}, got {list(prompt.shape)}"
        )
    for position in range(prompt.shape[1] - 1):
        decoder.step(prompt[:, position])
    if config.method == "beam":
        return _beam_search(decoder, prompt, config, end_id, pad_id)
    return _sample(decoder, prompt, config, end_id, pad_id, _chooser(config, generator))


def _chooser(config: GenerationConfig, generator: torch.Generator | None) -> Callable[[Tensor], Tensor]:
    """A function from logits `[R, V]` to tokens `[R]`."""
    if config.method == "greedy":
        return lambda logits: logits.argmax(dim=1)

    def draw(logits: Tensor) -> Tensor:
        probabilities = F.softmax(_filtered(logits, config) / config.temperature, dim=-1)
        return torch.multinomial(probabilities, 1, generator=generator)[:, 0]

    return draw


def _filtered(logits: Tensor, config: GenerationConfig) -> Tensor:
    """Minus infinity for what may not be drawn."""
    if config.method == "top_k":
        kept = logits.topk(min(config.top_k, logits.shape[1]), dim=1).values[:, -1:]
        return logits.masked_fill(logits < kept, -math.inf)
    ordered, order = logits.sort(dim=1, descending=True)
    before = F.softmax(ordered, dim=-1).cumsum(dim=1).roll(1, dims=1)
    before[:, 0] = 0.0
    # A token is drawn from while those before it do not reach top_p; so there is always one.
    return torch.full_like(logits, -math.inf).scatter(
        1, order, ordered.masked_fill(before >= config.top_p, -math.inf)
    )


def _without_early_end(logits: Tensor, length: int, config: GenerationConfig, end_id: int) -> Tensor:
    logits = logits.float()
    if length < config.min_length:
        logits = logits.clone()
        logits[:, end_id] = -math.inf
    return logits


def _sample(
    decoder: StepDecoder,
    text: Tensor,
    config: GenerationConfig,
    end_id: int,
    pad_id: int,
    choose: Callable[[Tensor], Tensor],
) -> Tensor:
    done = torch.zeros(len(text), dtype=torch.bool, device=text.device)
    while text.shape[1] < config.max_length and not bool(done.all()):
        logits = _without_early_end(decoder.step(text[:, -1]), text.shape[1], config, end_id)
        last = text.shape[1] + 1 == config.max_length
        token = torch.full_like(text[:, 0], end_id) if last else choose(logits)
        token = token.masked_fill(done, pad_id)
        done |= token == end_id
        text = torch.cat([text, token[:, None]], dim=1)
    return text


def _beam_search(
    decoder: StepDecoder, prompt: Tensor, config: GenerationConfig, end_id: int, pad_id: int
) -> Tensor:
    """Keeps the best unfinished texts of each row; a finished one competes by its score per token."""
    count, beams, device = len(prompt), config.beams, prompt.device
    decoder.reorder(torch.arange(count, device=device).repeat_interleave(beams))
    text = prompt.repeat_interleave(beams, dim=0)
    # The beams of a row are equal at first: only one may go on.
    scores = torch.full((count, beams), -math.inf, device=device)
    scores[:, 0] = 0.0
    finished: list[list[tuple[float, Tensor]]] = [[] for _ in range(count)]
    done = [False] * count
    first = torch.arange(count, device=device)[:, None] * beams

    def value(total: float, length: int) -> float:
        return total / length**config.length_penalty

    while text.shape[1] < config.max_length and not all(done):
        logits = _without_early_end(decoder.step(text[:, -1]), text.shape[1], config, end_id)
        gains = F.log_softmax(logits, dim=-1) if config.normalize else logits
        totals = (scores.view(-1, 1) + gains).view(count, -1)
        # Twice as many as beams: were all first ones ends, there would still be enough to go on with.
        best, where = totals.topk(min(2 * beams, totals.shape[1]), dim=1)
        vocabulary = logits.shape[1]
        origin, token = where // vocabulary, where % vocabulary
        ends = token == end_id
        length = text.shape[1] + 1
        for row in range(count):
            if done[row]:
                continue
            for rank in ends[row, :beams].nonzero()[:, 0].tolist():
                total = float(best[row, rank])
                if total > -math.inf:
                    words = text[row * beams + int(origin[row, rank])]
                    finished[row].append(
                        (value(total, length), torch.cat([words, token[row, rank : rank + 1]]))
                    )
            finished[row] = sorted(finished[row], key=lambda f: f[0], reverse=True)[:beams]
            done[row] = len(finished[row]) == beams and finished[row][-1][0] >= value(
                float(best[row, 0]), length
            )
        # The best that go on, in their order: ends sink to the back.
        going = best.masked_fill(ends, -math.inf).sort(dim=1, descending=True, stable=True).indices[:, :beams]
        scores = best.gather(1, going).masked_fill(ends.gather(1, going), -math.inf)
        source = (first + origin.gather(1, going)).flatten()
        decoder.reorder(source)
        text = torch.cat([text[source], token.gather(1, going).view(-1, 1)], dim=1)
    for row in range(count):
        if done[row]:
            continue
        for beam, total in enumerate(scores[row].tolist()):
            if total > -math.inf:
                words = text[row * beams + beam].clone()
                words[-1] = end_id  # too long: cut, as a sampled text is
                finished[row].append((value(total, len(words)), words))
    winners = [max(found, key=lambda f: f[0])[1] for found in finished]
    out = prompt.new_full((count, max(len(w) for w in winners)), pad_id)
    for row, words in enumerate(winners):
        out[row, : len(words)] = words
    return out
