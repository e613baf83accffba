# SPDX-License-Identifier: Apache-2.0
"""GDA: classes as Gaussians with one covariance, a linear classifier in closed form added to the zero-shot logits.

Wang et al., "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation" (2024; released code mrflogs/ICLR24; the
unsupervised variant from the project page). With features x of length 1, D wide, and N of them,

```
mu_k = mean of class k (not normalised);  Sigma = sum (x - mu_y)(x - mu_y)' / (N - 1)
P    = D pinv((N - 1) Sigma + tr(Sigma) I)                     ridge of Kubokawa and Srivastava, "ks"
W_k  = P mu_k;  b_k = log p_k - mu_k' P mu_k / 2
logits = 100 x T' + alpha (x W' + b)
```

alpha is tiny because W is huge. What remains after fitting is one linear layer (`LinearHead`). Means, sums and the
factorisation are float64. The scatter's products are made in the features' own precision, some hundred rows at a time,
which errs as much as rounding the features once more does; half of them, since it is symmetric. W solves two triangular
systems where there are fewer classes than dimensions. No N x N, N x K or K x D x D array is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmkernels.methods.zeroshot._classifier import (
    BLOCK_ELEMENTS,
    CACHE_ELEMENTS,
    LinearClassifier,
    LinearHead,
    check_choice,
    check_features,
    check_labels,
    class_vectors,
    prompt_features,
    row_blocks,
    scale_of,
)
from vlmkernels.ops.topk import topk_similarity
from vlmkernels.systems import register_system

__all__ = ["ALPHAS", "GDA", "fit_gda", "fit_gda_em", "fit_gda_new", "gda_logits"]

#: The released code's candidates for alpha, and its value before any search.
ALPHAS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
START_ALPHA = 0.1
_SHRINKAGES = ("ks", "none")
#: Columns of a strip of the symmetric scatter.
_STRIP = 128


def precision_matrix(covariance: Tensor, rows: int, shrinkage: str = "ks") -> Tensor:
    """Returns the precision [D, D] of a covariance [D, D] estimated from `rows` vectors.

    "ks": `D pinv((rows - 1) S + tr(S) I)`; "none": `pinv(S)`. A covariance of 0 (single shots) gives 0.
    """
    check_choice("precision_matrix", "shrinkage", shrinkage, _SHRINKAGES)
    if shrinkage == "none":
        return torch.linalg.pinv(covariance, hermitian=True)
    factor = _ridge_factor(covariance, rows)
    if factor is None:
        return torch.zeros_like(covariance)
    return len(covariance) * torch.cholesky_inverse(factor)


def _ridge_factor(covariance: Tensor, rows: int) -> Tensor | None:
    """Cholesky factor of `(rows - 1) S + tr(S) I`; None where S is 0."""
    trace = covariance.diagonal().sum()
    if trace <= 0:
        return None
    ridge = (rows - 1) * covariance
    ridge.diagonal().add_(trace)
    return torch.linalg.cholesky(ridge)


def class_means(x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Returns float64 means [K, D] (0 for a class without rows) and counts [K]."""
    counts = torch.bincount(y, minlength=classes)
    total = x.new_zeros(classes, x.shape[1], dtype=torch.float64)
    for rows in row_blocks(len(x), x.shape[1], CACHE_ELEMENTS // 2):
        total.index_add_(0, y[rows], x[rows].double())
    return total / counts.clamp(min=1)[:, None], counts


def _scatter(x: Tensor, y: Tensor, means: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over rows of weight (x - mean_y)(x - mean_y)', float64 [D, D]."""
    d = x.shape[1]
    out = means.new_zeros(d, d)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    near = means.to(dtype)
    for rows in row_blocks(len(x), d, CACHE_ELEMENTS // 2):
        centred = x[rows].to(dtype) - near[y[rows]]
        weighted = centred if weights is None else centred * weights[rows, None].to(dtype)
        for first in range(0, d, _STRIP):  # from the diagonal on
            out[first : first + _STRIP, first:] += centred[:, first : first + _STRIP].T @ weighted[:, first:]
    return out.triu() + out.triu(1).T


def _linear(means: Tensor, precision: Tensor, prior: Tensor | None) -> tuple[Tensor, Tensor]:
    return _with_bias(means @ precision, means, prior)


def _with_bias(weight: Tensor, means: Tensor, prior: Tensor | None) -> tuple[Tensor, Tensor]:
    classes = len(means)
    log_prior = means.new_full((classes,), 1 / classes).log() if prior is None else prior.double().log()
    return weight, log_prior - 0.5 * (weight * means).sum(1)


def _check_prior(prior: Tensor | None, classes: int) -> None:
    if prior is not None and (prior.shape != (classes,) or bool((prior < 0).any())):
        raise ValueError(f"fit_gda: prior must be [{classes}], none negative, got {list(prior.shape)}")


def fit_gda(
    x: Tensor,  # [N, D]
    y: Tensor,  # [N]
    classes: int,
    *,
    shrinkage: str = "ks",
    prior: Tensor | None = None,  # [K]
    covariance: str = "pooled",
) -> tuple[Tensor, Tensor]:
    """Fits the classifier.

    Args:
        x: features; every augmented view is a row of its own.
        y: classes, integers.
        classes: K.
        shrinkage: "ks" or "none", see `precision_matrix`.
        prior: class priors, for long tails; None: equal.
        covariance: "pooled", `1/(N-1)` over all centred rows, or "class_mean", the mean of the classes' own unbiased
            covariances, which the base-to-new variant uses for its base classes (classes of one row count as 0).

    Returns:
        `(W, b)`: float64 [K, D] and [K].

    Raises:
        ValueError, TypeError: Shapes, labels or options that do not fit; fewer than two rows.
    """
    check_features("fit_gda", "x", x)
    y = check_labels("fit_gda", y, len(x), classes)
    check_choice("fit_gda", "shrinkage", shrinkage, _SHRINKAGES)
    check_choice("fit_gda", "covariance", covariance, ("pooled", "class_mean"))
    _check_prior(prior, classes)
    if len(x) < 2:
        raise ValueError(f"fit_gda: expected at least two rows, got {len(x)}")
    means, counts = class_means(x, y, classes)
    if covariance == "pooled":
        sigma = _scatter(x, y, means) / (len(x) - 1)
    else:
        sigma = _scatter(x, y, means, 1 / (counts - 1).clamp(min=1).double()[y]) / classes
    if shrinkage == "none" or classes >= x.shape[1]:
        return _linear(means, precision_matrix(sigma, len(x), shrinkage), prior)
    factor = _ridge_factor(sigma, len(x))
    if factor is None:
        return _with_bias(torch.zeros_like(means), means, prior)
    return _with_bias(x.shape[1] * torch.cholesky_solve(means.T, factor).T, means, prior)


def fit_gda_new(
    text_new: Tensor,  # [K, D]
    x_base: Tensor,  # [N, D]
    *,
    k: int = 64,
    text_copies: int = 16,
) -> tuple[Tensor, Tensor]:
    """Fits new classes that have no pictures, from the base pictures most similar to their names.

    ```
    X_w = the k rows of x_base most similar to w;  mu_w = mean of X_w and `text_copies` copies of w
    S_w = (X_w - w)'(X_w - w) / (k - 1);  P = mean_w D pinv((k - 1) S_w + tr(S_w) I)
    ```

    The inverse of each class is that of a k x k matrix (Woodbury), not of a D x D one.

    Args:
        text_new: text features of the new classes, unit rows.
        x_base: pictures' features of the base classes.
        k: how many pictures; at most N.
        text_copies: weight of the text in the mean (16 beside 64 pictures: one fifth).

    Returns:
        `(W, b)`: float64 [K, D] and [K], equal priors.

    Raises:
        ValueError, TypeError: Shapes or counts that do not fit.
    """
    check_features("fit_gda_new", "text_new", text_new)
    check_features("fit_gda_new", "x_base", x_base, text_new.shape[1])
    if not 2 <= k <= len(x_base) or text_copies < 0:
        raise ValueError(
            f"fit_gda_new: k must lie between 2 and {len(x_base)} and text_copies not be negative"
        )
    _, nearest = topk_similarity(text_new, x_base, k)
    d = text_new.shape[1]
    precision = torch.zeros(d, d, dtype=torch.float64, device=x_base.device)
    means = torch.empty(len(text_new), d, dtype=torch.float64, device=x_base.device)
    for row, (w, chosen) in enumerate(zip(text_new.double(), nearest, strict=True)):
        pictures = x_base[chosen].double()
        means[row] = (pictures.sum(0) + text_copies * w) / (k + text_copies)
        a = pictures - w
        ridge = a.square().sum() / (k - 1)
        if ridge <= 0:
            continue
        # inverse of a'a + r I = (I - a' (a a' + r I)^-1 a) / r
        gram = a @ a.T
        gram.diagonal().add_(ridge)
        inner = torch.linalg.solve(gram, a)
        precision.addmm_(a.T, inner, alpha=-float(d / ridge))
        precision.diagonal().add_(d / ridge)
    return _linear(means, precision / len(text_new), None)


def fit_gda_em(
    x: Tensor,  # [N, D]
    text: Tensor,  # [K, D]
    *,
    alpha: float = START_ALPHA,
    logit_scale: float = 100.0,
    iterations: int = 10,
    tolerance: float = 1e-4,
    shrinkage: str = "ks",
) -> tuple[Tensor, Tensor]:
    """Fits without labels, by expectation and maximisation from the zero-shot classifier.

    ```
    E: g_ik = softmax_k(100 x_i T' + alpha (x_i W' + b))            the first time without the second part
    M: mu_k = sum_i g_ik x_i / sum_i g_ik;  Sigma = (1/K) sum_k [sum_i g_ik (x_i - mu_k)(x_i - mu_k)' / sum_i g_ik]
    ```

    The N x K responsibilities are recomputed block by block, never kept. The paper's number of iterations
    and alpha were not found.

    Args:
        x: features without labels, unit rows.
        text: class vectors, unit rows.
        alpha: weight of the Gaussian part in the E-step.
        logit_scale: of the zero-shot part.
        iterations: at most; 0 is not allowed, one gives a single M-step.
        tolerance: stop when no mean moves by more than this.
        shrinkage: as in `fit_gda`.

    Returns:
        `(W, b)`: float64 [K, D] and [K].

    Raises:
        ValueError, TypeError: Shapes or numbers that do not fit.
    """
    check_features("fit_gda_em", "x", x)
    check_features("fit_gda_em", "text", text, x.shape[1])
    if iterations < 1:
        raise ValueError(f"fit_gda_em: iterations must be at least 1, got {iterations}")
    zero_shot, before = logit_scale * text.double(), None
    weight, bias = zero_shot, None
    for _ in range(iterations):
        means, sigma = soft_moments(x, weight, bias)
        gaussian, offset = _linear(means, precision_matrix(sigma, len(x), shrinkage), None)
        weight, bias = zero_shot + alpha * gaussian, alpha * offset
        if before is not None and float((means - before).abs().max()) <= tolerance:
            break
        before = means
    return gaussian, offset


def soft_moments(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the M-step's means [K, D] and covariance [D, D] for responsibilities softmax(x weight' + bias)."""
    classes = len(weight)

    def blocks() -> Any:
        for rows in row_blocks(len(x), max(classes, x.shape[1]), BLOCK_ELEMENTS // 2):
            part = x[rows].double()
            logits = part @ weight.T if bias is None else torch.addmm(bias, part, weight.T)
            yield part, logits.softmax(1)

    mass = x.new_zeros(classes, dtype=torch.float64)
    total = x.new_zeros(classes, x.shape[1], dtype=torch.float64)
    for part, g in blocks():
        mass += g.sum(0)
        total += g.T @ part
    mass = mass.clamp(min=torch.finfo(torch.float64).tiny)
    means = total / mass[:, None]
    # sum_k sum_i g_ik/m_k (x_i - mu_k)(x_i - mu_k)' = sum_i (sum_k g_ik/m_k) x_i x_i' - sum_k mu_k mu_k'
    second = -means.T @ means
    for part, g in blocks():
        second += part.T @ (part * (g @ (1 / mass))[:, None])
    return means, second / classes


def gda_logits(
    x: Tensor, text: Tensor, weight: Tensor, bias: Tensor, alpha: float, logit_scale: float = 100.0
) -> Tensor:
    """Returns `logit_scale x text' + alpha (x weight' + bias)`, [N, K]."""
    return gda_head(text, weight, bias, alpha, logit_scale).logits(x)


def gda_head(
    text: Tensor, weight: Tensor, bias: Tensor, alpha: float, logit_scale: float = 100.0
) -> LinearHead:
    """Folds both parts into one linear head, in the text's dtype; the sum is made in float64."""
    folded = logit_scale * text.double() + alpha * weight
    return LinearHead(folded.to(text.dtype), (alpha * bias).to(text.dtype))


@register_system(
    "GDA",
    "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation",
    "training-free adaptation method",
)
class GDA(LinearClassifier):
    """Zero-shot logits plus a Gaussian classifier; see the top of this file.

    Args:
        encoder: the model; None where `text` is given.
        classes: K names.
        templates: prompts for the names.
        text: ready class vectors [K, D], instead of an encoder.
        alpha: weight of the Gaussian part; `search_alpha` chooses it.
        shrinkage: "ks" or "none".
        logit_scale: of the zero-shot part; None: the model's (100 without a model).

    Raises:
        ValueError: Neither encoder nor text.
    """

    def __init__(
        self,
        encoder: Any,
        classes: Sequence[str],
        templates: Sequence[str] = ("a photo of a {}.",),
        *,
        text: Tensor | None = None,
        alpha: float = START_ALPHA,
        shrinkage: str = "ks",
        logit_scale: float | None = None,
    ) -> None:
        super().__init__(classes, encoder)
        check_choice("GDA", "shrinkage", shrinkage, _SHRINKAGES)
        if text is None:
            text = class_vectors(prompt_features(self._encoder_for("text"), classes, templates))
        self.text = check_features("GDA", "text", text)
        self.shrinkage, self.alpha = shrinkage, alpha
        self.logit_scale = scale_of(self.encoder, logit_scale)
        self.weight = torch.zeros_like(text, dtype=torch.float64)
        self.bias = torch.zeros(len(text), dtype=torch.float64)
        self._fold()

    def _fold(self) -> None:
        self.head = gda_head(self.text, self.weight, self.bias, self.alpha, self.logit_scale)

    def fit(
        self, images: Tensor, labels: Tensor, *, prior: Tensor | None = None, covariance: str = "pooled"
    ) -> GDA:
        """Fits the Gaussian part to labelled images; until then the classifier is the zero-shot one."""
        self.weight, self.bias = fit_gda(
            self.features(images),
            labels,
            len(self.classes),
            shrinkage=self.shrinkage,
            prior=prior,
            covariance=covariance,
        )
        self._fold()
        return self

    def fit_new(self, base_images: Tensor, *, k: int = 64, text_copies: int = 16) -> GDA:
        """Fits classes without pictures from those of other classes; see `fit_gda_new`."""
        self.weight, self.bias = fit_gda_new(
            self.text, self.features(base_images), k=k, text_copies=text_copies
        )
        self._fold()
        return self

    def fit_unlabelled(self, images: Tensor, *, iterations: int = 10) -> GDA:
        """Fits to images without labels; see `fit_gda_em`."""
        self.weight, self.bias = fit_gda_em(
            self.features(images),
            self.text,
            alpha=self.alpha,
            logit_scale=self.logit_scale,
            iterations=iterations,
            shrinkage=self.shrinkage,
        )
        self._fold()
        return self

    def search_alpha(
        self, images: Tensor, labels: Tensor, alphas: Sequence[float] = ALPHAS
    ) -> dict[float, float]:
        """Chooses alpha by accuracy on validation images: strict improvements only, so ties keep the earliest.

        Returns:
            The accuracy of every candidate.
        """
        features = self.features(images)
        labels = check_labels("GDA.search_alpha", labels, len(features), len(self.classes))
        found: dict[float, float] = {}
        for alpha in alphas:
            head = gda_head(self.text, self.weight, self.bias, alpha, self.logit_scale)
            found[alpha] = float((head.top(features)[1][:, 0] == labels).float().mean())
        best, self.alpha = -1.0, START_ALPHA
        for alpha, accuracy in found.items():
            if accuracy > best:
                best, self.alpha = accuracy, alpha
        self._fold()
        return found

    def subset(self, classes: Sequence[int]) -> GDA:
        """Returns a classifier of some of the classes: fitted on all, applied to a shifted set that has only these."""
        rows = torch.as_tensor(classes)
        part = GDA(
            self.encoder,
            [self.classes[i] for i in rows.tolist()],
            text=self.text[rows],
            alpha=self.alpha,
            shrinkage=self.shrinkage,
            logit_scale=self.logit_scale,
        )
        part.weight, part.bias = self.weight[rows], self.bias[rows]
        part._fold()
        return part
