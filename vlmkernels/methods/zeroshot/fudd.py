# SPDX-License-Identifier: Apache-2.0
"""FuDD: classes that a first pass confuses are told apart by descriptions written for each pair of them.

Esfandiarpoor and Bach, "Follow-Up Differential Descriptions: Language Models Resolve Ambiguities for Image
Classification" (2024; released code BatsResearch/fudd):

```
S      = the k most similar classes by "a photo of a {}."                                    k = 10
D_i    = captions of class i over all pairs {i, j} in S, each once
t_i    = normalise(mean_{D_i} normalise(text(caption)));  answer = argmax_{i in S} <f, t_i>
```

A pair without descriptions gives both classes the default template. The captions come from a `DescriptionSource` (the
paper's prompt and model were not found in the repository; GPT-3.5 is (reconstructed)); the default is the emoji set's
keywords. Every caption is encoded once. The truth outside of S cannot be recovered: report `recall` beside accuracy.

    vlmkernels classify picture.png --method fudd --explain
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmkernels.methods.zeroshot._classifier import (
    Classifier,
    Explanation,
    LinearHead,
    Prediction,
    PromptClassifier,
    check_choice,
    scale_of,
    top_reasons,
    unit,
)
from vlmkernels.methods.zeroshot._descriptions import DescriptionSource, Difference, default_source
from vlmkernels.systems import register_system

__all__ = ["FuDD", "pair_key"]

PairTable = Mapping[tuple[int, int], Sequence[Difference]]
_AGGREGATES = ("embedding", "similarity", "probability")
_CONTROLS = ("none", "other", "other_attributes")


def pair_key(i: int, j: int) -> tuple[int, int]:
    """Returns the unordered pair of two classes, smaller index first.

    Raises:
        ValueError: They are the same.
    """
    if i == j:
        raise ValueError(f"pair_key: a class is not paired with itself, got {i} twice")
    return (i, j) if i < j else (j, i)


@register_system(
    "FuDD",
    "Follow-Up Differential Descriptions: Language Models Resolve Ambiguities for Image Classification",
    "zero-shot inference method",
)
class FuDD(Classifier):
    """Two-step classifier with pairwise descriptions; see the top of this file.

    Args:
        encoder: the model.
        classes: C names.
        differences: by `pair_key`, lists of (attribute, caption of the smaller index, caption of the larger); or a
            `DescriptionSource`; None: the bundled one.
        k: how many classes the second step tells apart; at most C.
        template: of step one, and of pairs without descriptions; the text is capitalised (the rest of it becomes lower
            case, as Python's `capitalize` does) where `capitalize` is set.
        capitalize: as in the released code.
        aggregate: "embedding" (similarity of the mean, the paper's), "similarity" (mean of similarities) or
            "probability" (mean of the softmax over S of each class's first caption, second caption, ...; classes with
            fewer repeat theirs: (reconstructed)).
        control: "none"; "other": each class gets as many of its captions against classes outside of S as it had
            differential ones, drawn without replacement; "other_attributes": only those of attributes that the
            differential ones do not use. The paper's ablations.
        seed: of the control's draws.

    Raises:
        ValueError: Options out of range.
    """

    def __init__(
        self,
        encoder: Any,
        classes: Sequence[str],
        differences: PairTable | DescriptionSource | None = None,
        *,
        k: int = 10,
        template: str = "a photo of a {}.",
        capitalize: bool = True,
        aggregate: str = "embedding",
        control: str = "none",
        seed: int = 0,
    ) -> None:
        super().__init__(classes, encoder)
        check_choice("FuDD", "aggregate", aggregate, _AGGREGATES)
        check_choice("FuDD", "control", control, _CONTROLS)
        if k < 1:
            raise ValueError(f"FuDD: k must be at least 1, got {k}")
        self.k = min(k, len(self.classes))
        self.aggregate, self.control, self.seed = aggregate, control, seed
        self._templates = [template.replace("{}", name) for name in self.classes]
        if capitalize:
            self._templates = [text.capitalize() for text in self._templates]
        self._table: dict[tuple[int, int], list[Difference]] = {}
        self._source: DescriptionSource | None = None
        if isinstance(differences, Mapping):
            self._table = {pair_key(*pair): list(found) for pair, found in differences.items()}
        else:
            self._source = differences or default_source()
        self.logit_scale = scale_of(self.encoder)
        self._rows: dict[str, int] = {}
        self._bank = torch.zeros(0)
        self.first = LinearHead(self._encode(self._templates))

    def pair(self, i: int, j: int) -> list[Difference]:
        """Returns the descriptions of a pair, (attribute, caption of i, caption of j); asked for once."""
        key = pair_key(i, j)
        if key not in self._table:
            names = (self.classes[key[0]], self.classes[key[1]])
            self._table[key] = [] if self._source is None else list(self._source.differences(*names))
        return (
            self._table[key]
            if key == (i, j)
            else [(a, second, first) for a, first, second in self._table[key]]
        )

    def captions(self, i: int, others: Sequence[int]) -> dict[str, str]:
        """Returns the captions of class i against other classes, with their attributes: each caption once."""
        found: dict[str, str] = {}
        for j in sorted(others):
            if j == i:
                continue
            for attribute, caption, _ in self.pair(i, j) or [("template", self._templates[i], "")]:
                found.setdefault(caption, attribute)
        return found or {self._templates[i]: "template"}

    def _chosen(self, i: int, members: Sequence[int]) -> list[str]:
        """The captions of class i in the set S: differential, or one of the controls."""
        differential = self.captions(i, members)
        if self.control == "none":
            return list(differential)
        outside = [j for j in range(len(self.classes)) if j not in members]
        others = {c: a for c, a in self.captions(i, outside).items() if c not in differential}
        if self.control == "other_attributes":
            others = {c: a for c, a in others.items() if a not in set(differential.values())}
        pool = sorted(others)
        draws = torch.Generator().manual_seed(self.seed * 1_000_003 + i)
        order = torch.randperm(len(pool), generator=draws)[: len(differential)].tolist()
        return [pool[p] for p in order] or [self._templates[i]]

    def _learn(self, texts: Iterable[str]) -> None:
        """Encodes what is new; each text goes through the model once in the life of this classifier."""
        new = [t for t in dict.fromkeys(texts) if t not in self._rows]
        if new:
            rows = self.encoder.texts(new)  # type: ignore[union-attr]
            self._rows |= {t: len(self._rows) + i for i, t in enumerate(new)}
            self._bank = torch.cat([self._bank, rows]) if len(self._bank) else rows

    def _encode(self, texts: Sequence[str]) -> Tensor:
        """Unit rows of texts."""
        self._learn(texts)
        return self._bank[[self._rows[t] for t in texts]]

    def _second(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The sets S [N, k] and the second step's scores of their members [N, k]."""
        _, sets = self.first.top(features, self.k)
        scores = features.new_zeros(sets.shape)
        # images that confuse the same classes share their captions; all captions of the call are encoded at once
        by_set: dict[tuple[int, ...], list[int]] = {}
        for row, members in enumerate(sets.sort(1).values.tolist()):
            by_set.setdefault(tuple(members), []).append(row)
        chosen = {members: [self._chosen(i, members) for i in members] for members in by_set}
        self._learn(c for lists in chosen.values() for captions in lists for c in captions)
        for members, rows in by_set.items():
            values = self._score(features[rows], chosen[members])
            place = torch.searchsorted(torch.tensor(members), sets[rows])
            scores[rows] = values.gather(1, place)
        return sets, scores

    def _score(self, features: Tensor, captions: Sequence[Sequence[str]]) -> Tensor:
        """Scores [n, k] of features [n, D] against the captions of the k members."""
        if self.aggregate == "embedding":  # the mean of a class points where the sum of its captions does
            rows = self._bank[[self._rows[t] for c in captions for t in c]]
            owner = torch.tensor([i for i, c in enumerate(captions) for _ in c])
            sums = rows.new_zeros(len(captions), rows.shape[1]).index_add_(0, owner, rows)
            return features @ unit(sums).T
        texts = [self._encode(c) for c in captions]
        if self.aggregate == "similarity":
            return torch.stack([(features @ t.T).mean(1) for t in texts], 1)
        longest = max(len(t) for t in texts)
        repeated = torch.stack([t[torch.arange(longest) % len(t)] for t in texts], 1)  # [longest, k, D]
        logits = self.logit_scale * torch.einsum("nd,lkd->lnk", features, repeated)
        return logits.softmax(-1).mean(0)

    def _scores(self, features: Tensor) -> Tensor:
        """Second-step scores of the classes in S, -inf elsewhere."""
        sets, values = self._second(features)
        out = features.new_full((len(features), len(self.classes)), -torch.inf)
        return out.scatter_(1, sets, values)

    def _check_k(self, k: int) -> None:
        if not 1 <= k <= self.k:
            raise ValueError(f"FuDD: k must lie between 1 and the size {self.k} of the second step, got {k}")

    def _predict(self, features: Tensor, k: int) -> Prediction:
        sets, values = self._second(features)
        # equal scores in ascending class: sort by class first, then stably by score
        order = sets.argsort(1)
        sets, values = sets.gather(1, order), values.gather(1, order)
        best = values.sort(dim=1, descending=True, stable=True)
        return Prediction(sets.gather(1, best.indices)[:, :k], best.values[:, :k])

    def recall(self, images: Tensor, labels: Tensor) -> float:
        """Returns the share of images whose class is in S, an upper bound on the accuracy."""
        _, sets = self.first.top(self.features(images), self.k)
        return float((sets == labels[:, None]).any(1).float().mean())

    def all_pairs(self) -> LinearHead:
        """Returns the one-pass variant: every class against all others (k = C), C(C-1)/2 pairs."""
        everyone = range(len(self.classes))
        rows = [self._encode(self._chosen(i, everyone)).mean(0) for i in everyone]
        return LinearHead(unit(torch.stack(rows)))

    def baseline(self, templates: Sequence[str] | None = None) -> PromptClassifier:
        """Returns the paper's baselines: its one template, or the templates given (("{}.",) for bare names)."""
        return PromptClassifier(self.encoder, self.classes, templates or ("a photo of a {}.",))

    def explain(self, images: Tensor, count: int = 5) -> list[Explanation]:
        """Returns each image's class and its differential captions by similarity, after the set they had to resolve."""
        features = self.features(images)
        sets, _ = self._second(features)
        prediction = self._predict(features, 1)
        found = []
        for row, label in enumerate(prediction.labels.tolist()):
            members = sorted(sets[row].tolist())
            captions = self._chosen(label, members)
            similarity = self._encode(captions) @ features[row]
            reasons = top_reasons(captions, similarity, count)
            found.append(Explanation(self.classes[label], float(prediction.scores[row, 0]), reasons))
        return found
