# SPDX-License-Identifier: Apache-2.0
"""S3A: names for unlabelled pictures from a huge vocabulary, by clusters that vote, and self-training on the result.

Zhang et al., "Towards Realistic Zero-Shot Classification via Self Structural Semantic Alignment" (2024; released code
sheng-eatamath/S3A). Pictures X (N, D), vocabulary E (V, D), K clusters; M is (K, V):

```
cluster   k-means on X; K given, or estimated by the silhouette (`estimate_clusters`)
vote      M[k,v] = share of cluster k whose nearest word is v
assign    one word per cluster, all different, at the largest total M (Hungarian)
reassign  every picture to the most similar of those words; three times in all
prompt    phrases that tell a cluster's 3 best words apart, from a `DescriptionSource`
realign   score(word) = sum over its phrases of weight x hits among the pictures' 3 nearest phrases; assign, reassign
train     CE(student, teacher's argmax) where the teacher is sure + 0.25 CE(student, structural label)
```

Nearest words and k-means assignments are exact top-1 searches (`nearest_rows`); the cross-entropies over the whole
vocabulary are `vk.linear_cross_entropy`, so no N x V array is made. In the released realignment only the candidate
under evaluation has normalised weights; here every candidate's weights sum to 1.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmkernels.methods.zeroshot._classifier import TextImageEncoder, check_features, nearest_rows, unit
from vlmkernels.methods.zeroshot._descriptions import DescriptionSource
from vlmkernels.methods.zeroshot._metrics import assign
from vlmkernels.ops.contrastive import linear_cross_entropy
from vlmkernels.ops.topk import topk_similarity, zero_shot
from vlmkernels.systems import register_system

__all__ = [
    "S3ATrainer",
    "Structure",
    "cluster_vote",
    "estimate_clusters",
    "k_means",
    "phrase_bank",
    "realign",
    "silhouette",
]


@dataclass
class Structure:
    """Names for pictures.

    Attributes:
        labels: int64 [N], the vocabulary word of every picture.
        clusters: int64 [N], the clusters that voted last, 0 to K - 1 without gaps.
        words: int64 [K], the word of each of these clusters.
        votes: [K, V], their M.
    """

    labels: Tensor
    clusters: Tensor
    words: Tensor
    votes: Tensor


def k_means(
    x: Tensor, k: int, *, starts: int = 17, iterations: int = 1000, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, float]:
    """Clusters rows, best of several starts (k-means++ seeds, Lloyd's steps).

    Args:
        x: [N, D].
        k: clusters, at most N.
        starts: how many (the paper: 17).
        iterations: at most, per start.
        generator: of the seeds.

    Returns:
        `(labels [N], centres [k, D], sum of squared distances)`.

    Raises:
        ValueError: k is out of range.
    """
    check_features("k_means", "x", x)
    if not 1 <= k <= len(x) or starts < 1:
        raise ValueError(f"k_means: expected 1 <= k <= {len(x)} and starts >= 1, got {k} and {starts}")
    best: tuple[Tensor, Tensor, float] | None = None
    for _ in range(starts):
        found = _lloyd(x, _spread_seeds(x, k, generator), iterations)
        if best is None or found[2] < best[2]:
            best = found
    return best  # type: ignore[return-value]


def _spread_seeds(x: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
    """k-means++: each next seed with probability proportional to its squared distance from the nearest one so far."""
    chosen = [int(torch.randint(len(x), (), generator=generator))]
    nearest = (x - x[chosen[0]]).square().sum(1)
    for _ in range(k - 1):
        weights = nearest.double()
        weights = weights if weights.sum() > 0 else torch.ones_like(weights)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        nearest = torch.minimum(nearest, (x - x[chosen[-1]]).square().sum(1))
    return x[chosen].clone()


def _lloyd(x: Tensor, centres: Tensor, iterations: int) -> tuple[Tensor, Tensor, float]:
    labels = torch.full((len(x),), -1)
    for _ in range(iterations):
        score, new = nearest_rows(x, centres, "l2")
        if torch.equal(new, labels):
            break
        labels = new
        counts = torch.bincount(labels, minlength=len(centres))
        sums = torch.zeros_like(centres).index_add_(0, labels, x)
        # a cluster that lost its rows takes the row that is farthest from its centre
        empty = (counts == 0).nonzero()[:, 0]
        far = score.argsort()[: len(empty)]
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
        centres[empty] = x[far]
    score, labels = nearest_rows(x, centres, "l2")
    return labels, centres, float(-score.double().sum())


def silhouette(x: Tensor, labels: Tensor) -> float:
    """Returns the mean silhouette (Rousseeuw 1987) with squared Euclidean distances, which need sums per cluster only.

    A row's mean squared distance to a cluster is |x|^2 - 2 x . mean + mean |.|^2, so no N x N distances are made;
    single rows count 0, as usual.
    """
    labels = labels.unique(return_inverse=True)[1]
    k = int(labels.max()) + 1
    if k < 2:
        return 0.0
    x = x.double()
    counts = torch.bincount(labels).double()
    sums = x.new_zeros(k, x.shape[1]).index_add_(0, labels, x)
    squares = x.new_zeros(k).index_add_(0, labels, x.square().sum(1))
    total = (
        counts * x.square().sum(1, keepdim=True) - 2 * x @ sums.T + squares
    )  # summed squared distances, [N, k]
    own = labels[:, None]
    size = counts[labels]
    a = total.gather(1, own)[:, 0] / (size - 1).clamp(min=1)
    b = (total / counts).scatter(1, own, torch.inf).amin(1)
    value = (b - a) / torch.maximum(a, b).clamp(min=1e-12)
    return float(torch.where(size > 1, value, 0.0).mean())


def estimate_clusters(
    x: Tensor,
    *,
    low: int = 50,
    high: int = 2000,
    sample: int = 30_000,
    starts: int = 1,
    generator: torch.Generator | None = None,
) -> int:
    """Estimates K: interval bisection on the silhouette, in three rounds.

    Rounds search [low, high], then [low, K1], then [K2, (K1 + K2) / 2]; a bisection keeps the half whose end scores
    better. At least `sample` rows or half of them, whichever is more, take part.

    Args:
        x: [N, D].
        low, high: the first interval.
        sample: rows.
        starts: of each k-means.
        generator: of sample and seeds.

    Raises:
        ValueError: The interval is empty.
    """
    if not 2 <= low <= high:
        raise ValueError(f"estimate_clusters: expected 2 <= low <= high, got {low} and {high}")
    count = min(len(x), max(sample, len(x) // 2))
    rows = x[torch.randperm(len(x), generator=generator)[:count]]
    high = min(high, count - 1)
    low = min(low, high)
    known: dict[int, float] = {}

    def score(k: int) -> float:
        if k not in known:
            labels, _, _ = k_means(rows, k, starts=starts, iterations=30, generator=generator)
            known[k] = silhouette(rows, labels)
        return known[k]

    def bisect(a: int, b: int) -> int:
        while b - a > 1:
            middle = (a + b) // 2
            a, b = (a, middle) if score(a) >= score(b) else (middle, b)
        return a if score(a) >= score(b) else b

    first = bisect(low, high)
    second = bisect(low, first)
    return bisect(min(second, first), max(second, (first + second) // 2))


def _votes(nearest: Tensor, clusters: Tensor, vocabulary: int) -> Tensor:
    """M [K, V]: rows sum to 1."""
    k = int(clusters.max()) + 1
    out = torch.zeros(k, vocabulary)
    out.index_put_((clusters, nearest), torch.ones(len(nearest)), accumulate=True)
    return out / out.sum(1, keepdim=True)


def _assign(votes: Tensor) -> Tensor:
    """One word per cluster, at the largest total; only words with votes can matter, plus as many others as clusters."""
    voted = votes.amax(0) > 0
    spare = (~voted).nonzero()[: len(votes), 0]
    columns = torch.cat([voted.nonzero()[:, 0], spare])
    return columns[assign(votes[:, columns])]


def cluster_vote(
    x: Tensor,  # [N, D]
    vocabulary: Tensor,  # [V, D]
    k: int,
    *,
    iterations: int = 3,
    init: Tensor | None = None,
    starts: int = 17,
    one_to_one: bool = True,
    generator: torch.Generator | None = None,
) -> Structure:
    """Names clusters by votes.

    Args:
        x: pictures, unit rows.
        vocabulary: words, unit rows, at least K.
        k: clusters.
        iterations: rounds of vote, assign and reassign; 0: the clusters as they are, named once.
        init: clusters to begin with, [N], instead of k-means.
        starts: of k-means.
        one_to_one: False takes every cluster's own best word, which collides: the ablation.
        generator: of k-means.

    Raises:
        ValueError: Shapes or counts that do not fit.
    """
    check_features("cluster_vote", "x", x)
    check_features("cluster_vote", "vocabulary", vocabulary, x.shape[1])
    if k > len(vocabulary):
        raise ValueError(f"cluster_vote: {k} clusters need as many words, got {len(vocabulary)}")
    clusters = k_means(x, k, starts=starts, generator=generator)[0] if init is None else init
    clusters = clusters.unique(return_inverse=True)[1]
    nearest = nearest_rows(x, vocabulary)[1]
    structure: Structure | None = None
    for _ in range(max(iterations, 1)):
        votes = _votes(nearest, clusters, len(vocabulary))
        words = _assign(votes) if one_to_one else votes.argmax(1)
        labels = words[clusters] if iterations == 0 else reassign(x, vocabulary, words)
        structure = Structure(labels, clusters, words, votes)
        # words that no picture chose vanish, and clusters are numbered anew
        clusters = labels.unique(return_inverse=True)[1]
    return structure  # type: ignore[return-value]


def reassign(x: Tensor, vocabulary: Tensor, words: Tensor) -> Tensor:
    """Gives every picture the most similar of some words: [N] indices into the vocabulary."""
    chosen = words.unique()
    return chosen[nearest_rows(x, vocabulary[chosen])[1]]


@dataclass
class Phrases:
    """The phrases of one candidate word.

    Attributes:
        features: unit rows [P, D].
        weights: [P], summing to 1.
    """

    features: Tensor
    weights: Tensor


def phrase_bank(
    encoder: TextImageEncoder,
    source: DescriptionSource,
    names: Sequence[str],
    structure: Structure,
    *,
    candidates: int = 3,
    templates: Sequence[str] = ("{}",),
    join: str = "{phrase} {name}",
) -> list[dict[int, Phrases]]:
    """Asks, per cluster, for phrases that tell its best words apart.

    Args:
        encoder: the model.
        source: its `discriminate` answers; phrases that come several times weigh more.
        names: the vocabulary.
        structure: of `cluster_vote`.
        candidates: words per cluster (3).
        templates: prompts around "phrase name"; averaged.
        join: how a phrase and its name become one text.

    Returns:
        Per cluster: candidate word to its phrases; a word without phrases has its bare name.
    """
    found: list[dict[int, Phrases]] = []
    for row in structure.votes:
        count = min(candidates, int((row > 0).sum()))
        words = row.topk(max(count, 1)).indices.tolist()
        answers = source.discriminate([names[w] for w in words])
        of_word = {}
        for word, phrases in zip(words, answers, strict=True):
            weights = Counter(phrases) or Counter({"": 1})
            texts = [
                t.replace("{}", join.format(phrase=p, name=names[word]).strip())
                for p in weights
                for t in templates
            ]
            rows = encoder.texts(texts).view(len(weights), len(templates), -1).mean(1)
            values = torch.tensor(list(weights.values()), dtype=torch.float32)
            of_word[word] = Phrases(unit(rows), values / values.sum())
        found.append(of_word)
    return found


def realign(
    x: Tensor,
    structure: Structure,
    vocabulary: Tensor,
    bank: Sequence[dict[int, Phrases]],
    *,
    hits: int = 3,
) -> Structure:
    """Chooses each cluster's word again, by how often pictures hit its candidates' phrases.

    Args:
        x: pictures [N, D].
        structure: of `cluster_vote`.
        vocabulary: [V, D]; pictures are reassigned to words, not to phrases.
        bank: of `phrase_bank`, one entry per cluster.
        hits: phrases counted per picture.

    Raises:
        ValueError: The bank has another number of clusters.
    """
    if len(bank) != len(structure.words):
        raise ValueError(f"realign: {len(structure.words)} clusters but {len(bank)} entries in the bank")
    votes = torch.zeros_like(structure.votes)
    for cluster, candidates in enumerate(bank):
        members = x[structure.clusters == cluster]
        features = torch.cat([p.features for p in candidates.values()])
        k = min(hits, len(features))
        near = topk_similarity(members, features, k)[1]
        counts = torch.bincount(near.flatten(), minlength=len(features)).float()
        sizes = [len(p.weights) for p in candidates.values()]
        for (word, phrases), own in zip(candidates.items(), counts.split(sizes), strict=True):
            votes[cluster, word] = float((phrases.weights * own).sum()) / max(len(members), 1)
    words = _assign(votes)
    return Structure(reassign(x, vocabulary, words), structure.clusters, words, votes)


@dataclass
class S3AConfig:
    """Settings of the self-training, the paper's for ViT-B/16.

    Attributes:
        epochs: 30; at most `most_steps` steps in all.
        most_steps: 30,000.
        batch_size: 128.
        lr: for a batch of 256; scaled in proportion.
        last_lr: the cosine's end, scaled likewise.
        weight_decay: of AdamW.
        layer_decay: factor of the learning rate per block from the top.
        threshold: confidence above which the teacher's answer counts (Pets 0.7, CIFAR-100 0.3).
        structural_weight: weight of the structural labels.
        logit_scale: of the classifier.
        ema: decay of the teacher, from the first to the second value over `ema_steps`.
        ema_steps: 2000.
        first_epochs: epochs on the labels given; later ones vote again on the teacher's features.
    """

    epochs: int = 30
    most_steps: int = 30_000
    batch_size: int = 128
    lr: float = 2e-5
    last_lr: float = 1e-6
    weight_decay: float = 0.05
    layer_decay: float = 0.65
    threshold: float = 0.5
    structural_weight: float = 0.25
    logit_scale: float = 100.0
    ema: tuple[float, float] = (0.999, 0.9998)
    ema_steps: int = 2000
    first_epochs: int = 2


def s3a_loss(
    student: Tensor, teacher: Tensor, vocabulary: Tensor, structural: Tensor, config: S3AConfig
) -> Tensor:
    """The loss of a batch: pseudo-labels of a sure teacher and structural labels, both over the whole vocabulary.

    Args:
        student: unit rows [B, D] of the strong view, with a gradient.
        teacher: unit rows [B, D] of the weak view.
        vocabulary: [V, D].
        structural: [B] words.
        config: settings.
    """
    with torch.no_grad():
        probability, answer, _ = zero_shot(teacher, vocabulary, config.logit_scale, k=1)
    sure = probability[:, 0] > config.threshold
    targets = torch.where(sure, answer[:, 0], -100)
    total = student.sum() * 0.0
    if bool(sure.any()):
        # the mean over the batch, not over the sure ones: few pseudo-labels weigh little
        pseudo = linear_cross_entropy(
            student, vocabulary, targets, logit_scale=config.logit_scale, reduction="sum"
        )
        total = total + pseudo / len(student)
    if config.structural_weight:
        structure = linear_cross_entropy(student, vocabulary, structural, logit_scale=config.logit_scale)
        total = total + config.structural_weight * structure
    return total


@dataclass
class Step:
    """What one step of training saw."""

    loss: float
    sure: float
    lr: float = 0.0


@register_system(
    "S3A",
    "Towards Realistic Zero-Shot Classification via Self Structural Semantic Alignment",
    "unlabelled self-training method",
)
class S3ATrainer:
    """Self-training of an image tower; see the top of this file.

    Args:
        student: pictures (whatever the views give) to features [B, D]; trained in place.
        vocabulary: frozen words, unit rows [V, D].
        strong: (uint8 pictures, generator) to the student's view (the paper: crops of scale (0.3, 1), RandAugment m9).
        weak: the same for the teacher's.
        config: settings.
        seed: of views, order and clusters.

    Attributes:
        teacher: an exponential moving average of the student, in eval mode.
        history: a `Step` per step.
    """

    def __init__(
        self,
        student: nn.Module,
        vocabulary: Tensor,
        *,
        strong: Callable[[Tensor, torch.Generator], Tensor],
        weak: Callable[[Tensor, torch.Generator], Tensor],
        config: S3AConfig | None = None,
        seed: int = 0,
    ) -> None:
        self.student = student
        # a copy of its own, never trained: the released helper calls train() on wrapped models, here nothing does
        self.teacher = copy.deepcopy(student).eval().requires_grad_(False)
        self.vocabulary = check_features("S3ATrainer", "vocabulary", vocabulary).detach()
        self.strong, self.weak = strong, weak
        self.config = config or S3AConfig()
        self.generator = torch.Generator().manual_seed(seed)
        self.history: list[Step] = []

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters with layer-wise learning rates: block b of depth L at `layer_decay ** (L - b)`, the head at 1."""
        depth = 1 + max(
            (b for n, _ in self.student.named_parameters() if (b := _block_of(n)) is not None), default=-1
        )
        groups: dict[tuple[int, bool], list[Tensor]] = {}
        for name, parameter in self.student.named_parameters():
            if not parameter.requires_grad:
                continue
            block = _block_of(name)
            first = any(part in name for part in ("conv1", "embedding", "ln_pre"))
            level = block + 1 if block is not None else (0 if first and depth else depth + 1)
            groups.setdefault((level, parameter.ndim > 1), []).append(parameter)
        return [
            {
                "params": parameters,
                "scale": self.config.layer_decay ** (depth + 1 - level) if depth else 1.0,
                "weight_decay": self.config.weight_decay if decays else 0.0,
            }
            for (level, decays), parameters in groups.items()
        ]

    def fit(self, pictures: Tensor, labels: Tensor, clusters: Tensor | None = None) -> S3ATrainer:
        """Trains on unlabelled pictures.

        Args:
            pictures: uint8 [N, 3, H, W].
            labels: structural words [N] of `cluster_vote` or `realign`.
            clusters: where later votes begin (those of `realign`); None: the labels.

        Raises:
            ValueError: As many labels as pictures are needed.
        """
        if len(labels) != len(pictures):
            raise ValueError(f"S3ATrainer.fit: {len(pictures)} pictures but {len(labels)} labels")
        c = self.config
        init = labels if clusters is None else clusters
        groups = self.parameter_groups()
        optimizer = torch.optim.AdamW(groups, lr=0.0)
        per_epoch = math.ceil(len(pictures) / c.batch_size)
        steps, step = min(c.epochs * per_epoch, c.most_steps), 0
        scale = c.batch_size / 256
        structural = labels
        for epoch in range(c.epochs):
            if epoch >= c.first_epochs:
                features = self.encode(pictures)
                structural = cluster_vote(
                    features, self.vocabulary, len(init.unique()), init=init, generator=self.generator
                ).labels
            for rows in torch.randperm(len(pictures), generator=self.generator).split(c.batch_size):
                if step >= steps:
                    return self
                lr = scale * (c.last_lr + (c.lr - c.last_lr) * 0.5 * (1 + math.cos(math.pi * step / steps)))
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["scale"]
                self._step(optimizer, pictures[rows], structural[rows], step, lr)
                step += 1
        return self

    def _step(self, optimizer: Any, pictures: Tensor, structural: Tensor, step: int, lr: float) -> None:
        c = self.config
        with torch.no_grad():
            teacher = unit(self.teacher(self.weak(pictures, self.generator)))
        student = unit(self.student(self.strong(pictures, self.generator)))
        loss = s3a_loss(student, teacher, self.vocabulary, structural, c)
        optimizer.zero_grad()
        if loss.requires_grad and bool(loss.detach() != 0):
            loss.backward()
            optimizer.step()
        self.update_teacher(c.ema[0] + (c.ema[1] - c.ema[0]) * min(1.0, step / max(c.ema_steps, 1)))
        sure = float(
            (zero_shot(teacher, self.vocabulary, c.logit_scale, k=1)[0] > c.threshold).float().mean()
        )
        self.history.append(Step(float(loss.detach()), sure, lr))

    @torch.no_grad()
    def update_teacher(self, decay: float) -> None:
        """Moves the teacher towards the student; 1 leaves it where it is. Buffers are copied."""
        for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mine.lerp_(theirs.detach(), 1 - decay)
        if decay < 1:
            for kept, new in zip(self.teacher.buffers(), self.student.buffers(), strict=True):
                kept.copy_(new)

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Returns the teacher's unit features [N, D] of the weak views."""
        parts = [
            unit(self.teacher(self.weak(p, self.generator))) for p in pictures.split(self.config.batch_size)
        ]
        return torch.cat(parts)


def _block_of(name: str) -> int | None:
    """Number of the transformer block that a parameter belongs to."""
    found = re.search(r"\bresblocks\.(\d+)\.|\bblocks\.(\d+)\.|\blayers\.(\d+)\.", name)
    if found is None or "conv1" in name:  # a stem's blocks are no transformer blocks
        return None
    return int(next(g for g in found.groups() if g))
