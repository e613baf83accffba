# SPDX-License-Identifier: Apache-2.0
"""CAB: does a model shown two objects give the asked one's attribute, or the other's? The Concept Association Bias.

Tang et al., "When are Lemons Purple? The Concept Association Bias of CLIP" (2023). Objects with a typical colour are
put on one canvas in pairs of different colours; "In this picture, the color of the {A} is {colour}." is scored for
every colour, and the best one is the answer. Measures (names ours; the paper reports the first three):

```
acc_single   one object alone              acc_true   two objects, right = the asked one's colour
acc_swap     the same answers, right = the other one's colour;   gap = acc_swap - acc_true, in [-1, 1]
```

CAB shows as acc_true well below acc_single with acc_swap above acc_true, and vanishes for weak associations (shapes of
any colour, or recoloured objects). Protocol details beyond the abstract are (reconstructed): two instances per ordered
pair, both asked, positions balanced. The paper's own formula of a CAB score was not verified. Ties count as their
expectation under a random choice.

The mitigation that the paper measures, a small Transformer over image and text embeddings fine-tuned on questions, is
`CABReader`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.methods.zeroshot._classifier import encoder_of
from vlmkernels.nn.transformer import LayerNorm, Transformer
from vlmkernels.ops.contrastive import linear_cross_entropy
from vlmkernels.systems import register_system

__all__ = [
    "COLOURS",
    "CABReader",
    "CABResult",
    "Thing",
    "Trial",
    "cab_probe",
    "encoder_scores",
    "make_pairs",
    "make_singles",
    "part_whole_trials",
    "recolour",
]

#: The colours of the paper's labels, with the red, green and blue that `recolour` tints with.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 45, 40),
    "green": (60, 155, 60),
    "yellow": (240, 205, 50),
    "orange": (240, 130, 30),
    "purple": (130, 60, 160),
}
TEMPLATE = "In this picture, the color of the {object} is {value}."
PART_TEMPLATE = "In this picture, the {object} belongs to the {value}."

#: Pictures uint8 [n, 3, H, W] and m texts to scores [n, m].
ScoreFunction = Callable[[Tensor, Sequence[str]], Tensor]


@dataclass(frozen=True)
class Thing:
    """An object with its picture.

    Attributes:
        name: as the sentence says it.
        value: its colour (or the whole that a part belongs to).
        picture: uint8 [3, h, w].
        mask: bool [h, w], where it is.
    """

    name: str
    value: str
    picture: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Trial:
    """One question about one picture.

    Attributes:
        picture: uint8 [3, H, W].
        asked: name of the object asked for.
        true: its value.
        other: the other object's value; None in pictures of one object.
        side: 0 where the asked object is left (or alone), 1 where it is right.
    """

    picture: Tensor
    asked: str
    true: str
    other: str | None
    side: int = 0


def recolour(picture: Tensor, mask: Tensor, colour: Sequence[int]) -> Tensor:
    """Gives an object another colour and keeps its shading: grey-scale, then tint.

    ```
    out = colour * grey / mean grey of the object,   clipped
    ```

    Args:
        picture: uint8 [3, h, w].
        mask: bool [h, w]; the rest stays.
        colour: red, green, blue from 0 to 255.
    """
    luma = (picture.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    mean = luma[mask].mean().clamp(min=1.0)
    tinted = torch.tensor(colour, dtype=torch.float32)[:, None, None] * (luma / mean)
    return torch.where(mask, tinted.round().clamp(0, 255).to(torch.uint8), picture)


def _draw(things: Sequence[Thing], places: Sequence[tuple[int, int]], size: tuple[int, int]) -> Tensor:
    canvas = torch.full((3, *size), 255, dtype=torch.uint8)
    for thing, (top, left) in zip(things, places, strict=True):
        h, w = thing.mask.shape
        part = canvas[:, top : top + h, left : left + w]
        part.copy_(torch.where(thing.mask, thing.picture, part))
    return canvas


def make_singles(things: Sequence[Thing], *, size: int | None = None) -> list[Trial]:
    """Returns a trial per object, alone in the middle of a white canvas of `size` pixels (None: twice its side)."""
    trials = []
    for thing in things:
        h, w = thing.mask.shape
        side = size or 2 * max(h, w)
        picture = _draw([thing], [((side - h) // 2, (side - w) // 2)], (side, side))
        trials.append(Trial(picture, thing.name, thing.value, None))
    return trials


def make_pairs(
    things: Sequence[Thing],
    generator: torch.Generator,
    *,
    size: int | None = None,
    jitter: int = 4,
    pairs: int | None = None,
) -> list[Trial]:
    """Returns trials of two objects with different values side by side; both are asked for, in either order.

    Every ordered pair gives one picture, so that each object is left and right equally often; objects keep their size,
    since larger ones dominate. Pairs of one value, or of one name, are left out.

    Args:
        things: objects of one size.
        generator: of the jitter and of the choice.
        size: side of the canvas in pixels; None: twice the objects' side.
        jitter: objects move by up to so many pixels.
        pairs: at most so many unordered pairs, drawn at random; None: all.

    Raises:
        ValueError: No two objects have different values, or the objects differ in size.
    """
    if len({t.mask.shape for t in things}) != 1:
        raise ValueError("make_pairs: the objects must have one size")
    chosen = [(a, b) for a, b in itertools.combinations(things, 2) if a.value != b.value and a.name != b.name]
    if not chosen:
        raise ValueError("make_pairs: no two objects have different values")
    if pairs is not None:
        order = torch.randperm(len(chosen), generator=generator)[:pairs].tolist()
        chosen = [chosen[i] for i in order]
    h, w = things[0].mask.shape
    side = size or 2 * max(h, w)
    trials = []
    for pair in chosen:
        for left, right in (pair, pair[::-1]):
            moves = torch.randint(-jitter, jitter + 1, (4,), generator=generator).tolist()
            limits = (side - h, max(0, side // 2 - w), side - h, side - w)
            starts = (
                (side - h) // 2,
                (side // 2 - w) // 2,
                (side - h) // 2,
                side // 2 + (side // 2 - w) // 2,
            )
            y0, x0, y1, x1 = (
                min(max(0, s + m), limit) for s, m, limit in zip(starts, moves, limits, strict=True)
            )
            picture = _draw([left, right], [(y0, x0), (y1, max(x1, side // 2))], (side, side))
            trials.append(Trial(picture, left.name, left.value, right.value, 0))
            trials.append(Trial(picture, right.name, right.value, left.value, 1))
    return trials


def part_whole_trials(
    wholes: Sequence[Thing], parts: dict[str, str], generator: torch.Generator, **options: Any
) -> list[Trial]:
    """Returns trials beyond colour: two wholes in the picture, and the question which one a part belongs to.

    Args:
        wholes: objects; their values are not used.
        parts: whole's name to the name of one of its parts (reconstructed).
        generator, options: as in `make_pairs`.
    """
    things = [Thing(parts[w.name], w.name, w.picture, w.mask) for w in wholes if w.name in parts]
    return make_pairs(things, generator, **options)


@dataclass
class CABResult:
    """What the probe measures.

    Attributes:
        acc_single: accuracy on single objects; NaN without any.
        acc_true: two objects, scored against the asked one.
        acc_swap: the same answers, scored against the other one.
        by_side: acc_true where the asked object is left, and right.
        answers: per pair trial the answered value (the first of equals).
    """

    acc_single: float
    acc_true: float
    acc_swap: float
    by_side: tuple[float, float]
    answers: list[str] = field(default_factory=list, repr=False)

    @property
    def gap(self) -> float:
        """acc_swap - acc_true: 1 = always the other one's value, -1 = always the right one, 0 = no preference."""
        return self.acc_swap - self.acc_true


@register_system(
    "CAB",
    "When are Lemons Purple? The Concept Association Bias of CLIP",
    "benchmark of binding attributes to objects",
)
def cab_probe(
    score: ScoreFunction,
    pairs: Sequence[Trial],
    values: Sequence[str],
    *,
    singles: Sequence[Trial] = (),
    template: str = TEMPLATE,
    batch_size: int = 256,
) -> CABResult:
    """Asks about pictures of two objects, and of one; see the top of this file.

    Args:
        score: pictures and texts to scores; `encoder_scores` makes one of a model.
        pairs: trials of two objects.
        values: the possible answers.
        singles: trials of one object.
        template: sentence with {object} and {value}; the same for every model that is compared.
        batch_size: pictures at once.

    Raises:
        ValueError: A trial's value is not among the answers, there is no pair, or the template lacks a place.
    """
    if not pairs or not all("{" + part + "}" in template for part in ("object", "value")):
        raise ValueError(
            "cab_probe: expected trials of two objects, and a template with {object} and {value}"
        )
    for trial in (*pairs, *singles):
        if trial.true not in values or (trial.other is not None and trial.other not in values):
            raise ValueError(f"cab_probe: values must hold {trial.true!r} and {trial.other!r}")
    single, _, _ = _answers(score, singles, values, template, batch_size)
    true, swap, answers = _answers(score, pairs, values, template, batch_size)
    side = torch.tensor([t.side for t in pairs])
    return CABResult(
        acc_single=float(single.mean()) if len(single) else float("nan"),
        acc_true=float(true.mean()),
        acc_swap=float(swap.mean()),
        by_side=tuple(float(true[side == s].mean()) for s in (0, 1)),  # type: ignore[arg-type]
        answers=answers,
    )


def _answers(
    score: ScoreFunction, trials: Sequence[Trial], values: Sequence[str], template: str, batch_size: int
) -> tuple[Tensor, Tensor, list[str]]:
    """Per trial the answer, and the probability of the true and of the other value when ties are drawn."""
    objects = {name: i for i, name in enumerate(dict.fromkeys(t.asked for t in trials))}
    numbers = {value: i for i, value in enumerate(values)}
    texts = [template.format(object=o, value=v) for o in objects for v in values]
    rows = []
    for start in range(0, len(trials), batch_size):
        part = trials[start : start + batch_size]
        # the trials of one picture share it; the texts of the asked object are gathered from all of them
        distinct = {id(t.picture): t.picture for t in part}
        position = {key: i for i, key in enumerate(distinct)}
        every = score(torch.stack(list(distinct.values())), texts)
        every = every.view(len(distinct), len(objects), len(values))
        rows.append(every[[position[id(t.picture)] for t in part], [objects[t.asked] for t in part]])
    if not rows:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64), []
    found = torch.cat(rows)
    best = found == found.amax(1, keepdim=True)
    share = best.double() / best.sum(1, keepdim=True)
    true = share.gather(1, torch.tensor([[numbers[t.true]] for t in trials]))[:, 0]
    others = torch.tensor([[-1 if t.other is None else numbers[t.other]] for t in trials])
    swap = torch.where(others >= 0, share.gather(1, others.clamp(min=0)), 0.0)[:, 0]
    return true, swap, [values[i] for i in found.argmax(1).tolist()]


def encoder_scores(model: Any) -> ScoreFunction:
    """Returns the score function of a model with `encode_image` and `encode_text`: cosines; texts are encoded once."""
    encoder = encoder_of(model)
    kept: dict[tuple[str, ...], Tensor] = {}

    def score(pictures: Tensor, texts: Sequence[str]) -> Tensor:
        key = tuple(texts)
        if key not in kept:
            kept[key] = encoder.texts(texts)
        return encoder.images(pictures) @ kept[key].T

    return score


class CABReader(nn.Module):
    """The mitigation: a small Transformer over image and text embeddings, read out as an answer.

    The sequence is a learned start token, the image embedding(s) and the text embedding(s); the answer is a linear
    classifier of the start token. Encoders stay frozen unless their parameters are trained along.

    Args:
        width: D of the embeddings.
        answers: number of answers.
        layers, heads: of the Transformer.
    """

    def __init__(self, width: int, answers: int, *, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.start = nn.Parameter(0.02 * torch.randn(width))
        self.kind = nn.Parameter(0.02 * torch.randn(2, width))  # image, text
        self.transformer = Transformer(width, layers, heads)
        self.norm = LayerNorm(width)
        self.answer = nn.Linear(width, answers)

    def hidden(self, images: Tensor, texts: Tensor) -> Tensor:
        """Returns the start token's final state [B, D].

        Args:
            images: [B, D], or [B, L, D] of tokens.
            texts: [B, D] or [B, T, D].
        """
        images = images[:, None] if images.ndim == 2 else images
        texts = texts[:, None] if texts.ndim == 2 else texts
        start = self.start.expand(len(images), 1, -1)
        x = torch.cat([start, images + self.kind[0], texts + self.kind[1]], 1)
        return self.norm(self.transformer(x)[:, 0])

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """Returns logits of the answers [B, A]."""
        return self.answer(self.hidden(images, texts))

    def loss(self, images: Tensor, texts: Tensor, answers: Tensor) -> Tensor:
        """Returns the cross-entropy of the answers [B]."""
        return linear_cross_entropy(
            self.hidden(images, texts), self.answer.weight, answers, bias=self.answer.bias
        )

    def fit(
        self,
        images: Tensor,
        questions: Tensor,
        answers: Tensor,
        *,
        steps: int = 200,
        batch_size: int = 64,
        lr: float = 1e-3,
        seed: int = 0,
    ) -> list[float]:
        """Trains on questions about pictures, encoders frozen; returns the losses.

        Args:
            images: features of the pictures, [N, D] or [N, L, D].
            questions: features of the questions, [N, D] or [N, T, D].
            answers: int64 [N].
            steps, batch_size, lr, seed: of AdamW.
        """
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=0.01)
        losses = []
        self.train()
        for _ in range(steps):
            rows = torch.randint(len(images), (min(batch_size, len(images)),), generator=generator)
            loss = self.loss(images[rows], questions[rows], answers[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        self.eval()
        return losses


def resized(thing: Thing, side: int) -> Thing:
    """Returns a thing whose square picture has another side."""
    picture = F.interpolate(thing.picture[None].float(), (side, side), mode="bilinear", antialias=True)
    mask = F.interpolate(thing.mask[None, None].float(), (side, side), mode="bilinear")[0, 0] > 0.5
    return Thing(thing.name, thing.value, picture.round().clamp(0, 255).to(torch.uint8)[0], mask)
