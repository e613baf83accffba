# SPDX-License-Identifier: Apache-2.0
"""ZPE: weights for a pool of prompt templates, found without labels, and the classifier they give.

Allingham et al., "A Simple Zero-shot Prompt Weighting Technique to Improve Prompt Ensembling in Text-Image Models"
(2023; released notebook in google/uncertainty-baselines). With L[n,p,c] = s <f_n, t_pc> on the logit scale:

```
offset[p,c] = (mean over pretraining-like images of L + mean over test images of L) / 2
score[p]    = mean_n max_c (L[n,p,c] - offset[p,c])
w           = softmax(score);  W_c = sum_p w_p s t_pc          W is not normalised again
```

The scores alone use the debiased logits; the classifier uses the raw ones. Both means are linear in the image, so they
are the logits of the mean feature: the sets are multiplied with the texts once instead of once each. The maximum over
classes is taken from blocks of logits that stay in the cache; nothing of size N x P x C exists.

    vlmkernels classify picture.png --method zpe
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmkernels.methods.zeroshot._classifier import (
    Explanation,
    LinearClassifier,
    LinearHead,
    cache_block,
    check_choice,
    check_features,
    check_templates,
    features_of,
    prompt_features,
    row_blocks,
    scale_of,
    top_reasons,
)
from vlmkernels.systems import register_system

__all__ = ["ZPE", "select_templates", "zpe_classifier", "zpe_scores", "zpe_weights"]

DEBIASES = ("none", "test", "pretrain", "pretrain_star", "both")
WEIGHTINGS = ("equal", "score", "score10", "softmax")
#: The paper's thresholds for selecting templates: ImageNet and its variants, fine-grained sets.
SELECT_IMAGENET, SELECT_FINE_GRAINED = 0.5, 2.0


def _offset(
    text: Tensor,
    images: Tensor,
    pretrain: Tensor | None,
    logit_scale: float,
    debias: str,
    generic_text: Tensor | None,
    test_fraction: float,
) -> Tensor:
    """What is subtracted from the logits, [P, C] (or [P, 1])."""
    zero = text.new_zeros(text.shape[:2])
    if debias == "none":
        return zero
    test = images[: max(1, round(test_fraction * len(images)))].mean(0)
    if debias == "test":
        return text @ (logit_scale * test)
    if pretrain is None or not len(pretrain):
        raise ValueError(f"zpe_scores: debias {debias!r} needs pretraining-like images")
    before = pretrain.mean(0)
    if debias == "pretrain":
        return text @ (logit_scale * before)
    if debias == "pretrain_star":
        generic = text if generic_text is None else generic_text
        return (generic @ (logit_scale * before)).mean(1, keepdim=True).expand_as(zero)
    return text @ (0.5 * logit_scale * (test + before))


@torch.no_grad()
def _largest_logits(text: Tensor, offset: Tensor, images: Tensor) -> Tensor:
    """`max_c (<x_n, t_pc> - offset[p,c])`, [N, P], a block of images and templates at a time."""
    templates, classes, width = text.shape
    out = images.new_empty(len(images), templates)
    at_once, together = cache_block(classes)
    room = images.new_empty(min(len(images), at_once) * min(together, templates) * classes)
    for first in range(0, templates, together):
        part = slice(first, first + together)
        rows, before = text[part].reshape(-1, width), -offset[part].reshape(-1, 1)
        for some in row_blocks(len(images), 1, at_once):
            x = images[some]
            # [p, C, n]: torch multiplies many rows with few columns faster than the other way round
            logits = room[: len(rows) * len(x)].view(len(rows), len(x))
            torch.addmm(before, rows, x.T, out=logits)
            out[some, part] = logits.view(-1, classes, len(x)).amax(1).T
    return out


def zpe_scores(
    text: Tensor,  # [P, C, D]
    images: Tensor,  # [N, D]
    pretrain: Tensor | None = None,  # [M, D]
    *,
    logit_scale: float = 100.0,
    debias: str = "both",
    per_example: bool = False,
    generic_text: Tensor | None = None,  # [P, G, D]
    test_fraction: float = 1.0,
) -> Tensor:
    """Returns the score of every template, [P], or [N, P] per image.

    Args:
        text: every template with every class, unit rows.
        images: unlabelled images to classify, unit rows.
        pretrain: images that resemble pretraining data (the paper: 20,000 of LAION-400M).
        logit_scale: s; with 1 instead of about 100 the softmax over templates would be almost uniform.
        debias: "both" (the paper's), "test", "pretrain", "none", or "pretrain_star": the pretraining offset averaged
            over a large generic class list, one number per template.
        per_example: keep the scores of single images.
        generic_text: the templates with a generic class list, for "pretrain_star"; None: the classes themselves.
        test_fraction: share of the images, from the front, that the test offset is averaged over.

    Raises:
        ValueError: Shapes that do not fit, an unknown debias, no images, or none where they are needed.
    """
    check_choice("zpe_scores", "debias", debias, DEBIASES)
    if text.ndim != 3:
        raise ValueError(f"zpe_scores: text must be [P, C, D], got {list(text.shape)}")
    check_features("zpe_scores", "images", images, text.shape[2])
    if not len(images):
        raise ValueError("zpe_scores: there is no image")
    if not 0 < test_fraction <= 1:
        raise ValueError(f"zpe_scores: test_fraction must lie in (0, 1], got {test_fraction}")
    if pretrain is not None:
        check_features("zpe_scores", "pretrain", pretrain, text.shape[2])
    offset = _offset(text, images, pretrain, logit_scale, debias, generic_text, test_fraction)
    scores = _largest_logits(text, offset, logit_scale * images)
    return scores if per_example else scores.mean(0)


def zpe_weights(scores: Tensor, weighting: str = "softmax") -> Tensor:
    """Turns scores [..., P] into weights that sum to 1 over the last dimension.

    Args:
        scores: of `zpe_scores`.
        weighting: "softmax" (temperature 1, the paper's), "score" (in proportion), "score10" (to the tenth power) or
            "equal". The proportional ones clamp negative scores to 0.

    Raises:
        ValueError: An unknown weighting.
    """
    check_choice("zpe_weights", "weighting", weighting, WEIGHTINGS)
    if weighting == "softmax":
        return scores.softmax(-1)
    if weighting == "equal":
        return torch.full_like(scores, 1 / scores.shape[-1])
    powers = scores.clamp(min=0).double()
    powers = powers / powers.amax(-1, keepdim=True).clamp(
        min=1e-300
    )  # so that the tenth power cannot overflow
    powers = powers.pow(10) if weighting == "score10" else powers
    total = powers.sum(-1, keepdim=True)
    weights = torch.where(total > 0, powers / total, 1 / scores.shape[-1])
    return weights.to(scores.dtype)


def select_templates(scores: Tensor, threshold: float) -> Tensor:
    """Returns which templates lie above the median by more than `threshold` median absolute deviations, bool [P].

    ```
    (score - median) / MAD > threshold,  MAD = median |score - median|
    ```

    One-sided, without the factor that makes MAD consistent. Where over half of the scores coincide (MAD 0), those
    above the median stay for a threshold of 0 or more, and those at or above it for a negative one. Where nothing
    would stay, the best template does (the released notebook records an accuracy of 0 there).
    """
    deviation = scores - scores.quantile(0.5)
    mad = deviation.abs().quantile(0.5)
    if threshold == -torch.inf:
        return torch.ones_like(scores, dtype=torch.bool)
    kept = deviation > threshold * mad
    if mad == 0 and threshold < 0:
        kept = deviation >= 0
    if not bool(kept.any()):
        kept = torch.zeros_like(kept)
        kept[scores.argmax()] = True
    return kept


def zpe_classifier(text: Tensor, weights: Tensor) -> Tensor:
    """Returns the weighted class vectors `sum_p w_p t_pc`, [C, D], not normalised again."""
    return torch.einsum("p,pcd->cd", weights, text)


@register_system(
    "ZPE",
    "A Simple Zero-shot Prompt Weighting Technique to Improve Prompt Ensembling in Text-Image Models",
    "zero-shot inference method",
)
class ZPE(LinearClassifier):
    """Zero-shot classifier from a weighted pool of templates; see the top of this file.

    Args:
        encoder: the model; None where `text` is given.
        classes: C names.
        templates: the pool, P templates with {} for the name.
        debias, weighting, per_example, test_fraction: as in `zpe_scores` and `zpe_weights`.
        select_threshold: keep the templates of `select_templates` alone; None: all, weighted.
        generic_classes: the class list of "pretrain_star".
        logit_scale: None: the model's.
        text: ready features [P, C, D] instead of an encoder.

    Attributes:
        template_scores: [P] after `fit`.
        weights: [P] after `fit`; 0 for templates that were not selected.

    Raises:
        ValueError: Options that make no sense.
    """

    def __init__(
        self,
        encoder: Any,
        classes: Sequence[str],
        templates: Sequence[str],
        *,
        debias: str = "both",
        weighting: str = "softmax",
        select_threshold: float | None = None,
        per_example: bool = False,
        test_fraction: float = 1.0,
        generic_classes: Sequence[str] | None = None,
        logit_scale: float | None = None,
        text: Tensor | None = None,
    ) -> None:
        super().__init__(classes, encoder)
        check_templates("ZPE", templates)
        check_choice("ZPE", "debias", debias, DEBIASES)
        check_choice("ZPE", "weighting", weighting, WEIGHTINGS)
        if per_example and select_threshold is not None:
            raise ValueError("ZPE: select_threshold works on the scores of a data set, not per example")
        if text is None:
            text = prompt_features(self._encoder_for("text"), classes, templates).transpose(0, 1)
        self.text = text
        self.templates = list(templates)
        self.debias, self.weighting, self.per_example = debias, weighting, per_example
        self.select_threshold, self.test_fraction = select_threshold, test_fraction
        self.logit_scale = scale_of(self.encoder, logit_scale)
        self.generic_text = None
        if generic_classes is not None and self.encoder is not None:
            self.generic_text = prompt_features(self.encoder, generic_classes, templates).transpose(0, 1)
        self._offset: Tensor | None = None

    def fit(self, images: Tensor, pretrain: Tensor | None = None) -> ZPE:
        """Weighs the templates for unlabelled images.

        Args:
            images: those to classify, features or pictures.
            pretrain: pretraining-like ones, for the debiases that use them.
        """
        features = self.features(images)
        before = None if pretrain is None else features_of(pretrain, self.encoder, "ZPE")
        self.template_scores = zpe_scores(
            self.text,
            features,
            before,
            logit_scale=self.logit_scale,
            debias=self.debias,
            generic_text=self.generic_text,
            test_fraction=self.test_fraction,
        )
        weights = zpe_weights(self.template_scores, self.weighting)
        if self.select_threshold is not None:
            weights = weights * select_templates(self.template_scores, self.select_threshold)
            weights = weights / weights.sum()
        self.weights = weights
        self.head = LinearHead(self.logit_scale * zpe_classifier(self.text, weights))
        self._offset = _offset(
            self.text, features, before, self.logit_scale, self.debias, self.generic_text, self.test_fraction
        )
        return self

    def _check_fitted(self) -> None:
        if self._offset is None:
            raise ValueError("ZPE: call fit with the images to classify first")

    def _scores(self, features: Tensor) -> Tensor:
        self._check_fitted()
        if not self.per_example:
            return self.head.logits(features)
        # [n, P] weights per image; a second pass over the templates keeps one [n, C] block at a time
        best = _largest_logits(self.text, self._offset, self.logit_scale * features)  # type: ignore[arg-type]
        weights = zpe_weights(best, self.weighting)
        out = features.new_zeros(len(features), len(self.classes))
        for text, weight in zip(self.text, weights.T, strict=True):
            out += weight[:, None] * (self.logit_scale * features @ text.T)
        return out

    def _predict(self, features: Tensor, k: int) -> Any:
        self._check_fitted()
        if self.per_example:
            return super(LinearClassifier, self)._predict(features, k)
        return self.head(features, k)

    def explain(self, images: Tensor, count: int = 5) -> list[Explanation]:
        """Returns, per image, its class and what the strongest templates contribute to its logit."""
        self._check_fitted()
        features = self.features(images)
        prediction = self.predict(features)
        found = []
        for row, label in enumerate(prediction.labels.tolist()):
            parts = self.weights * self.logit_scale * (self.text[:, label] @ features[row])
            score = float(prediction.scores[row, 0])
            found.append(Explanation(self.classes[label], score, top_reasons(self.templates, parts, count)))
        return found
