# SPDX-License-Identifier: Apache-2.0
"""The zero-shot papers' programs written straightforwardly in torch: every matrix of their formulas is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def classify(images: Tensor, classes: Tensor, scale: float, k: int) -> tuple[Tensor, Tensor]:
    """Softmax of all logits, then topk."""
    return (scale * images @ classes.T).softmax(1).topk(k)


def zpe_scores(text: Tensor, images: Tensor, pretrain: Tensor, scale: float) -> Tensor:
    """ZPE: logits [N, P, C] of both sets, their means, the debiased maximum."""
    test = scale * torch.einsum("nd,pcd->npc", images, text)
    before = scale * torch.einsum("nd,pcd->npc", pretrain, text)
    return (test - 0.5 * (test.mean(0) + before.mean(0))).amax(2).mean(0)


def description_scores(images: Tensor, bank: Sequence[Tensor]) -> Tensor:
    """Classification by description: a product and a mean per class."""
    return torch.stack([(images @ t.T).mean(1) for t in bank], 1)


def perception_probabilities(images: Tensor, text: Tensor, scale: float, temperature: float) -> Tensor:
    """PerceptionCLIP: logits [N, C, Z], both softmaxes."""
    logits = scale * torch.einsum("nd,czd->ncz", images, text)
    joint = (logits / temperature).flatten(1).softmax(1).view_as(logits)
    return (joint.sum(1, keepdim=True) * logits.softmax(1)).sum(2)


def frechet(probabilities: Tensor, squared: Tensor) -> Tensor:
    """Loki: the whole matrix of variances."""
    return (probabilities @ squared).argmin(1)


def gda(x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """GDA as its released code fits it: a mean per class, the centred rows, their covariance, a pseudo-inverse."""
    means = torch.stack([x[y == c].mean(0) for c in range(classes)])
    centred = torch.cat([x[y == c] - means[c] for c in range(classes)])
    n, d = centred.shape
    sigma = torch.cov(centred.T)
    precision = d * torch.linalg.pinv(
        (n - 1) * sigma + sigma.trace() * torch.eye(d, dtype=x.dtype), hermitian=True
    )
    return means @ precision, -0.5 * (means @ precision * means).sum(1)


def gda_new(text: Tensor, x: Tensor, k: int, copies: int) -> Tensor:
    """GDA's new classes: a pseudo-inverse of D x D for each."""
    d = x.shape[1]
    total = torch.zeros(d, d, dtype=x.dtype)
    means = []
    for w in text:
        near = x[(x @ w).topk(k).indices]
        s = (near - w).T @ (near - w) / (k - 1)
        total += d * torch.linalg.pinv((k - 1) * s + s.trace() * torch.eye(d, dtype=x.dtype), hermitian=True)
        means.append(torch.cat([near, w.expand(copies, -1)]).mean(0))
    return torch.stack(means) @ total / len(text)


def mutual_scores(z: Tensor, top: float) -> Tensor:
    """MuSc: distances of every pair of pictures' patches.

    The released code also has a form with all other pictures at once, of L times (N - 1) L distances: 19 instead of 29
    ms at 20 x 64 x 256, but 2.5 instead of 1.9 s at 60 x 256 x 512.
    """
    n = len(z)
    nearest = torch.stack([torch.stack([torch.cdist(a, b).amin(1) for b in z], 1) for a in z])  # [N, L, N]
    nearest[torch.arange(n), :, torch.arange(n)] = torch.inf
    return nearest.topk(max(1, int(top * (n - 1))), dim=2, largest=False).values.mean(2)


def support_logits(
    f: Tensor, keys: Tensor, captions: Tensor, onehot: Tensor, w: Tensor, weights: Sequence[float]
) -> Tensor:
    """CapS-Adapter: affinities and KL [N, M] in full, products with the one-hot labels."""
    alpha, beta, gamma, delta = weights
    a = (1 - delta) * f @ keys.T + delta * f @ captions.T
    p, q = (f @ w.T / 0.5).softmax(1), (keys @ w.T / 0.5).softmax(1)
    kl = (p * p.log()).sum(1, keepdim=True) - p @ q.log().T
    b = (kl - kl.min()) / (kl.max() - kl.min()) * (a.max() - a.min()) + a.min()
    return 100 * f @ w.T + alpha * (-beta * (1 - a)).exp() @ onehot - gamma * b @ onehot


def column_errors(scores: Tensor, labels: Tensor, c: int, features: Tensor, candidates: Tensor) -> Tensor:
    """Greedy prompt search: the classifier evaluated in full for every candidate of a class."""
    wrong = []
    for candidate in candidates:
        changed = scores.clone()
        changed[:, c] = features @ candidate
        wrong.append((changed.argmax(1) != labels).sum())
    return torch.stack(wrong)


def votes(x: Tensor, vocabulary: Tensor, clusters: Tensor, k: int) -> Tensor:
    """S3A: all similarities to the vocabulary, their argmax, counts by cluster and word."""
    answers = (x @ vocabulary.T).argmax(1)
    counts = x.new_zeros(k, len(vocabulary))
    counts.index_put_((clusters, answers), x.new_ones(()), accumulate=True)
    return counts / counts.sum(1, keepdim=True)


def blurred_outside(picture: Tensor, masks: Tensor, radius: float) -> list[Tensor]:
    """FGVP's best mark as its released code draws it: Pillow blurs the picture for every candidate, and pastes."""
    from PIL import Image, ImageFilter

    sharp = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    out = []
    for mask in masks:
        copy = sharp.filter(ImageFilter.GaussianBlur(radius))
        copy.paste(sharp, mask=Image.fromarray(mask.numpy()))
        out.append(torch.from_numpy(np.array(copy)).permute(2, 0, 1))
    return out


def answers_by_trial(encoder: Any, trials: Sequence[Any], values: Sequence[str], template: str) -> list[str]:
    """CAB: every trial's picture, and the sentences of the object it asks for (encoded once an object)."""
    texts: dict[str, Tensor] = {}
    pictures = torch.cat(
        [
            encoder.images(torch.stack([t.picture for t in trials[i : i + 256]]))
            for i in range(0, len(trials), 256)
        ]
    )
    answers = []
    for row, trial in zip(pictures, trials, strict=True):
        if trial.asked not in texts:
            sentences = [template.format(object=trial.asked, value=v) for v in values]
            texts[trial.asked] = encoder.texts(sentences)
        answers.append(values[int((row @ texts[trial.asked].T).argmax())])
    return answers


def second_step(
    features: Tensor, sets: Tensor, captions: dict[tuple[int, int], Tensor], own: Tensor
) -> Tensor:
    """FuDD: image by image, the captions of every pair of its set, averaged and compared."""
    out = []
    for f, members in zip(features, sets.tolist(), strict=True):
        row = []
        for i in members:
            texts = [captions.get((i, j), own[i : i + 1]) for j in members if j != i]
            row.append(f @ F.normalize(torch.cat(texts).unique(dim=0).mean(0), dim=0))
        out.append(torch.stack(row))
    return torch.stack(out)
