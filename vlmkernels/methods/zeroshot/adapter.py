# SPDX-License-Identifier: Apache-2.0
"""Support adapters: zero-shot logits plus the votes of a labelled support set. CapS-Adapter; TIP-X, Tip-Adapter in it.

Wang et al., "CapS-Adapter: Caption-based MultiModal Adapter in Zero-Shot Classification" (2024; released code
WLuLi/CapS-Adapter); Udandarao et al., "SuS-X: Training-Free Name-Only Transfer of Vision-Language Models" (2023;
vishaal27/SuS-X), whose TIP-X formula is used where the CapS code departs from it; Zhang et al., "Tip-Adapter" (2022).
Support pictures F and captions G (M rows each), one-hot labels Q, class vectors W, test features f:

```
A      = (1 - delta) f F' + delta f G' = f ((1 - delta) F + delta G)'
cache  = exp(-beta (1 - A)) Q
KL     = sum_c P_x log(P_x / P_i);   P_x = softmax(f W' / T), P_i = softmax(F W' / T), T = 0.5
B      = KL rescaled linearly to the range of A
logits = 100 f W' + alpha cache + gamma (-B) Q
```

Tip-Adapter is delta = gamma = 0, TIP-X delta = 0, the released "M-Adapter" gamma = 0. Q is one-hot, so that `@ Q`
adds up segments; B is linear in KL, so that its votes need one C x C matrix; what is left of size N x M runs in blocks.
The ranges of A and KL are fixed once (`fit_range`) so that results do not depend on the batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkernels.methods.zeroshot._classifier import (
    Classifier,
    Explanation,
    Reason,
    TextImageEncoder,
    check_features,
    check_labels,
    class_vectors,
    encoder_of,
    prompt_features,
    row_blocks,
    scale_of,
    unit,
)
from vlmkernels.methods.zeroshot._descriptions import DescriptionSource, default_source
from vlmkernels.ops.topk import topk_similarity
from vlmkernels.systems import register_system

__all__ = [
    "SEARCH_GRIDS",
    "SMALL_TEMPLATES",
    "Support",
    "SupportAdapter",
    "caption_support",
    "combined_classifier",
    "retrieve_support",
    "support_features",
]

#: The seven templates of the "combined" text classifier.
SMALL_TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
#: The released grid: 20 alphas, 200 betas, 50 gammas, 11 deltas.
SEARCH_GRIDS: dict[str, tuple[float, ...]] = {
    "alpha": tuple(i * (50 - 0.1) / 20 + 0.1 for i in range(20)),
    "beta": tuple(i * (50 - 1) / 200 + 1 for i in range(200)),
    "gamma": tuple(i * (30 - 0.1) / 50 + 0.1 for i in range(50)),
    "delta": tuple(i / 10 for i in range(11)),
}


@dataclass
class Support:
    """A labelled support set.

    Attributes:
        images: uint8 [M, 3, H, W].
        captions: M texts.
        labels: int64 [M].
    """

    images: Tensor
    captions: list[str]
    labels: Tensor


def caption_support(
    images: Tensor,  # [N, 3, H, W]
    labels: Tensor,  # [N]
    classes: Sequence[str],
    captioner: Callable[[Tensor], str],
    generator: Callable[[str, int], Tensor | None],
    *,
    captioned: int = 4,
    per_class: int = 10,
    country: str | None = None,
    attempts: int = 5,
    seed: int = 0,
) -> Support:
    """Builds CapS's support set: a few pictures of every class are captioned, and captions seed new pictures.

    Args:
        images: uint8 pictures to draw those to be captioned from.
        labels: their classes.
        classes: C names.
        captioner: one picture to a caption (the paper: beams of 3, sampling, repetition penalty 1.5).
        generator: (prompt, seed) to one uint8 picture [3, H, W] of a fixed size, or None where it failed (the paper:
            latent diffusion v1-4, guidance 9.5, 85 steps). Nothing is bundled.
        captioned: pictures captioned per class.
        per_class: pictures made per class.
        country: adds "In {country}. " for sets about places.
        attempts: tries per picture; pictures that are black throughout are refused, as in the paper.
        seed: of the draws.

    Returns:
        The support; prompts are its captions.

    Raises:
        ValueError: A class has no picture, or the generator failed at every attempt.
    """
    labels = check_labels("caption_support", labels, len(images), len(classes))
    draws = torch.Generator().manual_seed(seed)
    made: list[Tensor] = []
    captions: list[str] = []
    for c, name in enumerate(classes):
        own = (labels == c).nonzero()[:, 0]
        if not len(own):
            raise ValueError(f"caption_support: class {name!r} has no picture")
        own = own[torch.randperm(len(own), generator=draws)[:captioned]]
        texts = [captioner(images[i]) for i in own.tolist()]
        # random order, every caption once before any comes again
        rounds = (torch.randperm(len(texts), generator=draws).tolist() for _ in itertools.count())
        order = itertools.islice(itertools.chain.from_iterable(rounds), per_class)
        for number, i in enumerate(order):
            place = "" if country is None else f"In {country}. "
            prompt = f"A photo of {name}. {place}{texts[i]}"
            tries = (generator(prompt, 1000 * attempts * c + attempts * number + t) for t in range(attempts))
            picture = next((p for p in tries if p is not None and bool(p.any())), None)
            if picture is None:
                raise ValueError(f"caption_support: no picture after {attempts} attempts for {prompt!r}")
            made.append(picture)
            captions.append(prompt)
    return Support(torch.stack(made), captions, torch.arange(len(classes)).repeat_interleave(per_class))


def retrieve_support(text: Tensor, bank: Tensor, per_class: int) -> tuple[Tensor, Tensor]:
    """Builds SuS-X's retrieved support set: for every class the most similar pictures of a large unlabelled bank.

    Args:
        text: class vectors [C, D].
        bank: features of the bank's pictures [M, D].
        per_class: pictures per class.

    Returns:
        Rows of the bank and their classes, int64 [C * per_class] each.
    """
    check_features("retrieve_support", "bank", bank, text.shape[1])
    rows = topk_similarity(text, bank, per_class, metric="cosine")[1]
    return rows.flatten(), torch.arange(len(text)).repeat_interleave(per_class)


def support_features(
    encoder: Any,
    support: Support,
    *,
    augment: Callable[[Tensor, int], Tensor] | None = None,
    passes: int = 10,
) -> tuple[Tensor, Tensor]:
    """Encodes a support set: features averaged over passes, then normalised.

    Args:
        encoder: the model.
        support: the set.
        augment: (uint8 pictures, pass) to uint8 pictures; None: the pictures as they are, in one pass.
        passes: how many, where `augment` is given. The captions have no randomness here, one pass is all passes.

    Returns:
        `(pictures, captions)`: unit rows [M, D] each. The released code averages what comes out of the model before
        it is normalised; an encoder that gives unit rows averages those.
    """
    encoder = encoder_of(encoder)
    count = passes if augment is not None else 1
    views = (support.images if augment is None else augment(support.images, i) for i in range(count))
    total = torch.stack([encoder.images(pictures) for pictures in views])
    return unit(total.mean(0)), encoder.texts(support.captions)


def combined_classifier(
    encoder: Any,
    classes: Sequence[str],
    source: DescriptionSource | None = None,
    templates: Sequence[str] = SMALL_TEMPLATES,
) -> Tensor:
    """Returns class vectors [C, D] from a language model's sentences and the templates, all of a class averaged.

    Args:
        encoder: the model.
        classes: C names.
        source: its descriptors are joined to the name ("name: descriptor"); None: the bundled source.
        templates: beside them.
    """
    encoder, source = encoder_of(encoder), source or default_source()
    prompts = prompt_features(encoder, classes, templates)
    rows = []
    for name, own in zip(classes, prompts, strict=True):
        sentences = [f"{name}: {d}" for d in source.descriptors(name)]
        every = torch.cat([own, encoder.texts(sentences)]) if sentences else own
        rows.append(class_vectors(every[None])[0])
    return torch.stack(rows)


@register_system(
    "CapS-Adapter",
    "CapS-Adapter: Caption-based MultiModal Adapter in Zero-Shot Classification",
    "training-free adaptation method",
)
class SupportAdapter(Classifier):
    """Zero-shot logits plus the votes of a support set; see the top of this file.

    Args:
        image_keys: F, unit rows [M, D].
        labels: classes of the support, [M].
        text_weights: W, class vectors [C, D].
        caption_keys: G, unit rows [M, D]; needed for delta > 0.
        classes: C names; None: numbers.
        encoder: for pictures in `predict`.
        temperature: T of the KL affinity.
        alpha, beta, gamma, delta: the weights above; Tip-Adapter's usual start is alpha 1, beta 5.5 (reconstructed).
        logit_scale: of the zero-shot part; None: the encoder's (100 without one).

    Attributes:
        kl_range: (min KL, max KL, min A, max A) once `fit_range` or `search` has fixed it.

    Raises:
        ValueError, TypeError: Shapes or numbers that do not fit.
    """

    def __init__(
        self,
        image_keys: Tensor,
        labels: Tensor,
        text_weights: Tensor,
        caption_keys: Tensor | None = None,
        *,
        classes: Sequence[str] | None = None,
        encoder: TextImageEncoder | None = None,
        temperature: float = 0.5,
        alpha: float = 1.0,
        beta: float = 5.5,
        gamma: float = 0.0,
        delta: float = 0.0,
        logit_scale: float | None = None,
    ) -> None:
        check_features("SupportAdapter", "text_weights", text_weights)
        super().__init__(classes or [str(c) for c in range(len(text_weights))], encoder)
        width = text_weights.shape[1]
        check_features("SupportAdapter", "image_keys", image_keys, width)
        labels = check_labels("SupportAdapter", labels, len(image_keys), len(self.classes))
        if caption_keys is not None and caption_keys.shape != image_keys.shape:
            raise ValueError(
                f"SupportAdapter: caption_keys must be {list(image_keys.shape)}, got {list(caption_keys.shape)}"
            )
        if temperature <= 0:
            raise ValueError(f"SupportAdapter: temperature must be positive, got {temperature}")
        # sorted by class, so that the votes of a class are one run of columns
        order = labels.argsort(stable=True)
        self.image_keys, self.support_labels = image_keys[order], labels[order]
        self.caption_keys = None if caption_keys is None else caption_keys[order]
        self.text_weights, self.temperature = text_weights, temperature
        self.alpha, self.beta, self.gamma, self.delta = alpha, beta, gamma, delta
        self.logit_scale = scale_of(encoder, logit_scale)
        self.kl_range: tuple[float, float, float, float] | None = None
        log_p = self._against_uniform(self.image_keys)[1]
        self._counts = torch.bincount(self.support_labels, minlength=len(self.classes))
        self._log_p = log_p
        # log(C P_i) added up per class: [C, C]
        self._log_sums = log_p.new_zeros(len(self.classes), len(self.classes)).index_add_(
            0, self.support_labels, log_p
        )

    def keys(self, delta: float) -> Tensor:
        """Returns `(1 - delta) F + delta G`, [M, D].

        Raises:
            ValueError: delta outside of [0, 1], or captions are needed and missing.
        """
        if not 0 <= delta <= 1:
            raise ValueError(f"SupportAdapter: delta must lie in [0, 1], got {delta}")
        if delta == 0:
            return self.image_keys
        if self.caption_keys is None:
            raise ValueError("SupportAdapter: delta > 0 needs caption_keys")
        return (1 - delta) * self.image_keys + delta * self.caption_keys

    def _against_uniform(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """P = softmax(f W' / T) and log(C P), both [N, C].

        KL(P_x || P_i) = sum P_x log(C P_x) - P_x . log(C P_i) for any factor C, since P_x sums to 1; with this one both
        terms are as small as the KL itself, which at T = 0.5 is a thousandth of log P.
        """
        relative = (features @ self.text_weights.T / self.temperature).log_softmax(1)
        relative += math.log(len(self.classes))
        return relative.exp().div_(len(self.classes)), relative

    def _votes(self, affinity: Tensor) -> Tensor:
        """`A @ Q` of affinities [M, n], a column per image: the rows of every class are added up, [n, C]."""
        out = affinity.new_zeros(len(self.classes), affinity.shape[1])
        return out.index_add_(0, self.support_labels, affinity).T

    def cache(self, features: Tensor, beta: float, delta: float) -> Tensor:
        """Returns `exp(-beta (1 - A)) Q`, [N, C], in blocks."""
        keys = self.keys(delta)
        parts = []
        for rows in row_blocks(len(features), len(keys)):
            affinity = keys @ features[rows].T
            parts.append(self._votes(affinity.sub_(1).mul_(beta).exp_()))
        return torch.cat(parts) if parts else features.new_zeros(0, len(self.classes))

    def kl(self, features: Tensor) -> Tensor:
        """Returns KL(test || support), [N, M]: the matrix that nothing here needs whole."""
        p, log_x = self._against_uniform(features)
        return (p * log_x).sum(1, keepdim=True) - p @ self._log_p.T

    def fit_range(self, features: Tensor, delta: float | None = None) -> tuple[float, float, float, float]:
        """Fixes the ranges of KL and A from features, for instance those of a validation set, block by block."""
        keys = self.keys(self.delta if delta is None else delta)
        lows, highs = [], []
        for rows in row_blocks(len(features), len(keys)):
            kl, affinity = self.kl(features[rows]), features[rows] @ keys.T
            lows.append((float(kl.min()), float(affinity.min())))
            highs.append((float(kl.max()), float(affinity.max())))
        if not lows:
            raise ValueError("SupportAdapter.fit_range: there is no image")
        low, high = [min(v) for v in zip(*lows, strict=True)], [max(v) for v in zip(*highs, strict=True)]
        self.kl_range = (low[0], high[0], low[1], high[1])
        return self.kl_range

    def _kl_votes(self, features: Tensor, limits: tuple[float, float, float, float]) -> Tensor:
        """`(-B) Q`, [N, C], with B = slope KL + shift and the KL of a class added up at once.

        sum_{i in c} KL_i = n_c sum P_x log(C P_x) - P_x . (sum_{i in c} log(C P_i))
        """
        low, high, least, most = limits
        slope = (most - least) / (high - low) if high > low else 0.0
        shift = least - slope * low
        p, log_x = self._against_uniform(features)
        counts = self._counts.to(p.dtype)
        added = (p * log_x).sum(1, keepdim=True) * counts - p @ self._log_sums.T
        return -(slope * added + shift * counts)

    def logits(
        self,
        features: Tensor,
        alpha: float | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        delta: float | None = None,
    ) -> Tensor:
        """Returns the logits [N, C] of unit rows, with these weights or those of the adapter.

        Where gamma is not 0 and no range was fixed, that of `features` is used, over the whole call.
        """
        alpha, beta, gamma, delta = (
            getattr(self, name) if value is None else value
            for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma), ("delta", delta))
        )
        out = self.logit_scale * features @ self.text_weights.T
        if alpha:
            out += alpha * self.cache(features, beta, delta)
        if gamma and len(features):
            limits, kept = self.kl_range, self.kl_range
            if limits is None:
                limits = self.fit_range(features, delta)
                self.kl_range = kept
            out += gamma * self._kl_votes(features, limits)
        return out

    def _scores(self, features: Tensor) -> Tensor:
        return self.logits(features)

    def search(
        self, features: Tensor, labels: Tensor, grids: dict[str, Sequence[float]] | None = None
    ) -> dict[str, float]:
        """Chooses the weights by accuracy on validation images, and fixes the range of KL there.

        For every (delta, beta) the votes are computed once; for every alpha the gammas with which an image is right
        form one interval (its margins are linear in gamma), so that all gammas cost one pass.

        Args:
            features: unit rows [N, D] of validation images, not of test images.
            labels: [N].
            grids: "alpha", "beta", "gamma", "delta" to ascending candidates; None: `SEARCH_GRIDS`, and delta 0 alone
                without captions.

        Returns:
            The best weights and their "accuracy"; the first of equals in the order delta, beta, alpha, gamma.

        Raises:
            ValueError: Unknown grids, or grids that do not ascend.
        """
        labels = check_labels("SupportAdapter.search", labels, len(features), len(self.classes))
        chosen = {
            **SEARCH_GRIDS,
            **({} if self.caption_keys is not None else {"delta": (0.0,)}),
            **(grids or {}),
        }
        if set(chosen) != set(SEARCH_GRIDS) or any(
            list(g) != sorted(g) or not len(g) for g in chosen.values()
        ):
            raise ValueError(f"SupportAdapter.search: grids must be ascending lists for {list(SEARCH_GRIDS)}")
        gammas = torch.tensor(chosen["gamma"], dtype=torch.float64)
        zero_shot = self.logit_scale * (features @ self.text_weights.T).double()
        best: dict[str, float] = {"accuracy": -1.0}
        best_range = None
        for delta in chosen["delta"]:
            limits = self.fit_range(features, delta)
            kl = self._kl_votes(features, limits).double()
            for beta in chosen["beta"]:
                cache = self.cache(features, beta, delta).double()
                for alpha in chosen["alpha"]:
                    right = _right_by_gamma(zero_shot + alpha * cache, kl, labels, gammas)
                    i = int(right.argmax())
                    accuracy = float(right[i]) / max(len(labels), 1)
                    if accuracy > best["accuracy"]:
                        best = {
                            "accuracy": accuracy,
                            "alpha": alpha,
                            "beta": beta,
                            "gamma": chosen["gamma"][i],
                            "delta": delta,
                        }
                        best_range = limits
        self.alpha, self.beta, self.gamma, self.delta = (best[n] for n in ("alpha", "beta", "gamma", "delta"))
        self.kl_range = best_range
        return best

    def explain(self, images: Tensor, count: int = 5) -> list[Explanation]:
        """Returns each image's class and the support rows that voted most for it ("support 12", in sorted order)."""
        features = self.features(images)
        prediction = self._predict(features, 1)
        found = []
        for row, label in enumerate(prediction.labels.tolist()):
            own = (self.support_labels == label).nonzero()[:, 0]
            votes = (self.beta * (self.keys(self.delta)[own] @ features[row] - 1)).exp()
            best = votes.sort(descending=True, stable=True)
            reasons = [
                Reason(f"support {int(own[i])}", float(v))
                for v, i in zip(best.values[:count], best.indices[:count], strict=True)
            ]
            found.append(Explanation(self.classes[label], float(prediction.scores[row, 0]), reasons))
        return found


def _right_by_gamma(base: Tensor, slope: Tensor, labels: Tensor, gammas: Tensor) -> Tensor:
    """Counts, for every gamma, the rows where `base + gamma slope` is largest at the label.

    A row is right where gamma times (slope_c - slope_y) is below base_y - base_c for all c: between two bounds.
    """
    gap = base.gather(1, labels[:, None]) - base
    rise = slope - slope.gather(1, labels[:, None])
    own = F.one_hot(labels, base.shape[1]).bool()
    crossing = gap / rise
    upper = crossing.masked_fill((rise <= 0) | own, torch.inf).amin(1)
    lower = crossing.masked_fill((rise >= 0) | own, -torch.inf).amax(1)
    flat_wrong = ((rise == 0) & (gap < 0) & ~own).any(1)
    right = (gammas[:, None] >= lower) & (gammas[:, None] <= upper) & ~flat_wrong
    return right.sum(1)
