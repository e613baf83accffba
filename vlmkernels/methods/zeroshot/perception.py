# SPDX-License-Identifier: Apache-2.0
"""PerceptionCLIP: infer the context of a picture (background, style, ...) first, then classify given that context.

An et al., "More Context, Less Distraction: Visual Classification by Inferring and Conditioning on Contextual
Attributes" (2024; released code umd-huang-lab/perceptionCLIP). With F[n,y,z] = s cos(image, "main(class y), phrase z.")
and Z composite context values:

```
P(z|x)   = sum_y exp(F/T) / sum_yz exp(F/T)       "with_y", the default
         = softmax_z(F0[n,z] / T)                 "without_y", the class word replaced by a generic noun
P(y|x,z) = softmax_y(F[n,:,z])                    temperature 1, never T
P(y|x)   = sum_z P(z|x) P(y|x,z)
```

Everything is in log space, and the sum over z runs online (as a softmax over z that rescales what it has), some values
at a time, so that only blocks of [n, z, C] that stay in the cache exist, never [N, C, Z]. A block of logits is
exponentiated in place, and both sums over y come from those exponentials where T allows.

    vlmkernels classify picture.png --method perception
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmkernels.methods.zeroshot._classifier import (
    Classifier,
    Explanation,
    cache_block,
    check_choice,
    encoder_of,
    features_of,
    row_blocks,
    scale_of,
    top_reasons,
    unit,
)
from vlmkernels.ops.topk import zero_shot
from vlmkernels.systems import register_system

__all__ = ["FACTORS", "TEMPERATURES", "PerceptionCLIP", "attribute_probe", "composite_values"]

Factors = Mapping[str, Mapping[str, Sequence[str]]]

#: The temperatures that the paper sweeps.
TEMPERATURES = (0.5, 0.8, 1.0, 3.0, 5.0, 10.0)


def _single(values: str) -> dict[str, list[str]]:
    return {v: [v] for v in values.split("|")}


#: Factors that are ready to use. A value with the empty phrase says "nothing of the kind", without a comma.
FACTORS: dict[str, dict[str, list[str]]] = {
    "waterbirds background": {"land": ["on land"], "water": ["on water"]},
    "background": {
        "others": [""],
        **{
            v: [f"with {v} in the background"]
            for v in [
                "land",
                "water",
                "forest",
                "sky",
                "street",
                "grass",
                "tree",
                "flowers",
                "beach",
                "human",
                "branch",
            ]
        },
    },
    "orientation": {"upright": ["", "upright"], "upside down": ["upside down"], "rotated": ["rotated"]},
    "illumination": {"normal": [""], "bright": ["bright"], "dark": ["dark"]},
    "quality": {
        "normal": ["", "sharp"],
        "blurred": ["blurred", "out of focus"],
        "noisy": ["noisy", "grainy"],
    },
    "gender": {"male": ["male"], "female": ["female"], "unknown": [""]},
    "age": {"young": ["young"], "old": ["old"], "unknown": [""]},
    "size": {"small": ["small"], "medium": ["", "medium"], "large": ["large"]},
    "art": {
        "photo": [""],
        **_single("painting|sketch|cartoon|sculpture|toy|embroidery|origami|graffiti|tattoo"),
    },
    "skin tone": {
        "none": [""],
        **{t: [f"{t} skin tone"] for t in ("light", "medium-light", "medium", "medium-dark", "dark")},
    },
    "drawing style": {
        "others": [""],
        "flat": ["flat colours"],
        "outlined": ["black outlines"],
        "shaded": ["shaded"],
    },
}


def _exponentials(x: Tensor, spare: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The sum over dimension 1 of `exp(x)`, and `exp(T x)`; `x`, at most 0, and `spare` are overwritten."""
    if temperature in (1, 2, 3):  # a power costs less than a second exponential
        spread = x.exp_().sum(1)
        return spread, x if temperature == 1 else x.pow_(temperature)
    spread = torch.exp(x, out=spare).sum(1)
    return spread, x.mul_(temperature).exp_()


def composite_values(factors: Factors) -> list[tuple[str, list[str]]]:
    """Returns the Cartesian product of factors: (name of the value, its phrases).

    A composite value's phrases are all combinations of its parts' phrases, joined by ", "; empty ones add no comma.

    Raises:
        ValueError: A factor has no value, or a value no phrase.
    """
    for name, values in factors.items():
        if not values or any(not phrases for phrases in values.values()):
            raise ValueError(f"composite_values: factor {name!r} needs values with phrases, got {values!r}")
    found = []
    for chosen in itertools.product(*(values.items() for values in factors.values())):
        name = ", ".join(value for value, _ in chosen)
        combinations = itertools.product(*(phrases for _, phrases in chosen))
        found.append((name, [", ".join(p for p in parts if p) for parts in combinations]))
    return found


@register_system(
    "PerceptionCLIP",
    "More Context, Less Distraction: Visual Classification by Inferring and Conditioning on Contextual Attributes",
    "zero-shot inference method",
)
class PerceptionCLIP(Classifier):
    """Classifier that conditions on inferred context; see the top of this file.

    Args:
        encoder: the model; None where `text` is given.
        classes: C names.
        factors: factor name to value name to phrases, as `FACTORS` has them; no factor: plain CLIP.
        main: prompt with {} for the class; a phrase follows after ", ", then ".".
        temperature: T, of the inference of context alone.
        infer: "with_y" or "without_y".
        generic: the noun in place of the class, for "without_y".
        logit_scale: None: the model's.
        text: ready features [C, Z, D] of every class with every value, instead of an encoder.
        context_text: ready features [Z, D] of the values alone, for "without_y".

    Raises:
        ValueError: Options or shapes that do not fit.
    """

    def __init__(
        self,
        encoder: Any,
        classes: Sequence[str],
        factors: Factors,
        *,
        main: str = "a photo of a {}",
        temperature: float = 1.0,
        infer: str = "with_y",
        generic: str = "object",
        logit_scale: float | None = None,
        text: Tensor | None = None,
        context_text: Tensor | None = None,
    ) -> None:
        super().__init__(classes, encoder)
        check_choice("PerceptionCLIP", "infer", infer, ("with_y", "without_y"))
        if temperature <= 0:
            raise ValueError(f"PerceptionCLIP: temperature must be positive, got {temperature}")
        values = composite_values(factors)
        self.values = [name for name, _ in values]
        self.temperature, self.infer = temperature, infer
        self.logit_scale = scale_of(self.encoder, logit_scale)
        if text is None:
            text = torch.stack([self._encode(main, name, values) for name in classes])
            if infer == "without_y":
                context_text = self._encode(main, generic, values)
        if text.shape[:2] != (len(self.classes), len(values)):
            expected = f"[{len(self.classes)}, {len(values)}, D]"
            raise ValueError(f"PerceptionCLIP: text must be {expected}, got {list(text.shape)}")
        if infer == "without_y" and context_text is None:
            raise ValueError("PerceptionCLIP: 'without_y' needs context_text")
        self.text = text  # class-major, as in the released code
        self._by_value = text.transpose(0, 1).contiguous()  # [Z, C, D]
        self.context_text = context_text

    def _encode(self, main: str, name: str, values: Sequence[tuple[str, list[str]]]) -> Tensor:
        """Unit rows [Z, D]: the mean of every value's phrases."""
        start = main.replace("{}", name)
        prompts = [f"{start}, {p}." if p else f"{start}." for _, phrases in values for p in phrases]
        parts = self._encoder_for("text").texts(prompts).split([len(phrases) for _, phrases in values])
        return unit(torch.stack([p.mean(0) for p in parts]))

    def infer_context(self, images: Tensor) -> Tensor:
        """Returns P(z|x), [N, Z]; columns are `values`."""
        features = self.features(images)
        scale = self.logit_scale / self.temperature
        if self.infer == "without_y":
            return (scale * features @ self.context_text.T).softmax(1)  # type: ignore[union-attr]
        # log sum_y exp(F / T) is the log-sum-exp that vk.zero_shot gives, value by value
        lse = [zero_shot(features, classes, scale, k=1)[2] for classes in self._by_value]
        return torch.stack(lse, 1).softmax(1)

    def predict_proba(self, images: Tensor) -> Tensor:
        """Returns P(y|x), [N, C]; rows sum to 1."""
        return self.scores(images)

    @torch.no_grad()
    def _scores(self, features: Tensor) -> Tensor:
        out = features.new_empty(len(features), len(self.classes))
        at_once, together = cache_block(len(self.classes))
        room = features.new_empty(2, at_once * min(together, len(self.values)) * len(self.classes))
        for rows in row_blocks(len(features), 1, at_once):
            out[rows] = self._marginal(features[rows], together, room).T
        return out

    def _marginal(self, features: Tensor, together: int, room: Tensor) -> Tensor:
        """Sum over z of P(z|x) P(y|x,z), [C, n], with the normaliser of P(z|x) found on the way."""
        n, classes, t = len(features), len(self.classes), self.temperature
        joint = self.infer == "with_y"
        total = features.new_zeros(classes, n)
        top = features.new_full((n,), -torch.inf)
        mass = torch.zeros_like(top)
        # with_y: logits are made at temperature T, where both sums over y can be had from one exponential
        scaled = self.logit_scale / (t if joint else 1.0) * features.T
        for first in range(0, len(self.values), together):
            part = self._by_value[first : first + together]
            # [z, C, n]: torch multiplies many rows with few columns faster than the other way round
            logits, spare = room[:, : part.shape[0] * classes * n].view(2, -1, n)
            torch.mm(part.view(-1, part.shape[2]), scaled, out=logits)
            logits, spare = (x.view(-1, classes, n) for x in (logits, spare))
            largest = logits.amax(1, keepdim=True)
            logits.sub_(largest)
            if joint:
                spread, likely = _exponentials(logits, spare, t)
                weight = largest[:, 0] + spread.log_()
            else:
                weight = self.context_text[first : first + together] @ scaled / t  # type: ignore[index]
                likely = logits.exp_()
            higher = torch.maximum(top, weight.amax(0))
            fade, gain = (top - higher).exp_(), (weight - higher).exp_()
            share = gain / likely.sum(1)
            total.mul_(fade).add_(likely.mul_(share[:, None]).sum(0))
            mass.mul_(fade).add_(gain.sum(0))
            top = higher
        return total / mass

    def explain(self, images: Tensor, count: int = 5) -> list[Explanation]:
        """Returns each image's class and the contexts that were inferred, most probable first."""
        features = self.features(images)
        prediction, context = self._predict(features, 1), self.infer_context(features)
        return [
            Explanation(
                self.classes[label],
                float(prediction.scores[row, 0]),
                top_reasons(self.values, context[row], count),
            )
            for row, label in enumerate(prediction.labels.tolist())
        ]


def attribute_probe(
    encoder: Any,
    pictures: Tensor,
    names: Sequence[str],
    phrases: Mapping[str, str],
    *,
    main: str = "a photo of a {}",
) -> dict[str, float]:
    """Returns the mean cosine of pictures with their class's prompt under each attribute text: the probing experiment.

    Args:
        encoder: the model.
        pictures: [N, 3, H, W] after a known change (upside down, dark, ...), or their features.
        names: N class names.
        phrases: by label ("none", "correct", "wrong", "random letters"), the attribute text; "" adds none.
    """
    encoder = encoder_of(encoder)
    features = features_of(pictures, encoder, "attribute_probe")
    distinct = list(dict.fromkeys(names))
    row = torch.tensor([distinct.index(n) for n in names])
    found = {}
    for label, phrase in phrases.items():
        prompts = [main.replace("{}", n) + (f", {phrase}." if phrase else ".") for n in distinct]
        found[label] = float((features * encoder.texts(prompts)[row]).sum(1).mean())
    return found
