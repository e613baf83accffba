# SPDX-License-Identifier: Apache-2.0
"""Classification by description: a class scores the mean similarity of the image with its descriptors.

Menon and Vondrick, "Visual Classification via Description from Large Language Models" (2022; released code
sachit-menon/classify_by_description_release):

```
t_cj   = normalise(text("{class}, which has {descriptor_j}"))
s[n,c] = mean_j <f_n, t_cj> = <f_n, mean_j t_cj>          the mean is not normalised again; no temperature
```

That it is linear makes the whole bank of sentences one row per class; normalising the mean again would be another
method (FuDD's aggregation). Defaults are the released code's: name first, mean, a bare class name as the baseline
(`PromptClassifier(encoder, classes, ("{}",))`). Each image's reasons are the descriptors of its class by similarity.

    vlmkernels classify picture.png --method description --explain
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmkernels.methods.zeroshot._classifier import (
    Explanation,
    LinearClassifier,
    LinearHead,
    Prediction,
    check_choice,
    row_blocks,
    top_reasons,
)
from vlmkernels.methods.zeroshot._descriptions import DescriptionSource, default_source
from vlmkernels.systems import register_system

__all__ = ["DescriptorClassifier", "descriptor_clause", "descriptor_sentence"]

_MODES = ("prepend", "append", "omit")
_AGGREGATES = ("mean", "max", "sum")
_VERBS = ("has ", "often ", "typically ", "may ", "can ")


def descriptor_clause(descriptor: str, *, article_rule: str = "word") -> str:
    """Turns a descriptor into a clause: "four legs" -> "which has four legs", "a tail" -> "which is a tail".

    Args:
        descriptor: a phrase; "" gives "".
        article_rule: "word" reads an article where "a" or "an" is a word of its own; "released" reproduces the released
            code, whose test for a leading "a" also fires on "antlers".

    Raises:
        ValueError: An unknown rule.
    """
    check_choice("descriptor_clause", "article_rule", article_rule, ("word", "released"))
    text = descriptor.replace("_", " ").strip()
    if not text:
        return ""
    low = text.lower()
    article = low.startswith("a") if article_rule == "released" else low.startswith(("a ", "an "))
    if article or low.startswith("used"):
        return f"which is {text}"
    return f"which {text}" if low.startswith(_VERBS) else f"which has {text}"


def descriptor_sentence(
    name: str, descriptor: str, mode: str = "prepend", *, article_rule: str = "word", end: str = ""
) -> str:
    """Joins a class name and a descriptor.

    Args:
        name: the class; underscores become spaces.
        descriptor: "" leaves the name alone.
        mode: "prepend" ("dog, which has four legs"), "append" ("which has four legs, dog") or "omit" (the clause
            alone; the name where there is no descriptor, since an empty sentence has no meaning).
        article_rule: as in `descriptor_clause`.
        end: appended; the released code ends ImageNet's sentences in ".".

    Raises:
        ValueError: An unknown mode or rule.
    """
    check_choice("descriptor_sentence", "mode", mode, _MODES)
    name, clause = name.replace("_", " "), descriptor_clause(descriptor, article_rule=article_rule)
    if not clause:
        return name + end
    return {"prepend": f"{name}, {clause}", "append": f"{clause}, {name}", "omit": clause}[mode] + end


@register_system(
    "Classification by description",
    "Visual Classification via Description from Large Language Models",
    "zero-shot inference method",
)
class DescriptorClassifier(LinearClassifier):
    """Classes as lists of descriptors; see the top of this file.

    Args:
        encoder: the model.
        descriptors: class names to descriptors, in class order; or a sequence of class names, described by `source`.
        source: where descriptors come from when only names are given; None: the bundled emoji data.
        aggregate: "mean", "max" or "sum" over a class's descriptors.
        mode: as in `descriptor_sentence`.
        article_rule: as in `descriptor_clause`.
        end: as in `descriptor_sentence`.
        sentence: makes the sentence of a name and a descriptor instead, for encoders whose captions read otherwise.

    Attributes:
        descriptors: by class name; a class without any has one empty descriptor, its bare name.

    Raises:
        ValueError: No class, or an unknown option.
    """

    def __init__(
        self,
        encoder: Any,
        descriptors: Mapping[str, Sequence[str]] | Sequence[str],
        *,
        source: DescriptionSource | None = None,
        aggregate: str = "mean",
        mode: str = "prepend",
        article_rule: str = "word",
        end: str = "",
        sentence: Callable[[str, str], str] | None = None,
    ) -> None:
        check_choice("DescriptorClassifier", "aggregate", aggregate, _AGGREGATES)
        if not isinstance(descriptors, Mapping):
            source = source or default_source()
            descriptors = {name: source.descriptors(name) for name in descriptors}
        super().__init__(list(descriptors), encoder)
        self.descriptors = {name: list(found) or [""] for name, found in descriptors.items()}
        self.aggregate, self.mode, self.article_rule, self.end = aggregate, mode, article_rule, end
        self.sentence = sentence
        sentences = [self._sentence(n, d) for n, found in self.descriptors.items() for d in found]
        self.bank = self.encoder.texts(sentences)  # type: ignore[union-attr]
        counts = torch.tensor([len(found) for found in self.descriptors.values()])
        self._starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self._owner = torch.arange(len(counts)).repeat_interleave(counts)
        total = self.bank.new_zeros(len(counts), self.bank.shape[1]).index_add_(0, self._owner, self.bank)
        self.head = LinearHead(total if aggregate == "sum" else total / counts[:, None])

    def _sentence(self, name: str, descriptor: str) -> str:
        if self.sentence is not None and descriptor:
            return self.sentence(name, descriptor)
        return descriptor_sentence(name, descriptor, self.mode, article_rule=self.article_rule, end=self.end)

    def edited(self, name: str, descriptors: Sequence[str]) -> DescriptorClassifier:
        """Returns a classifier in which one class has other descriptors; this one stays as it is.

        Raises:
            ValueError: There is no such class.
        """
        if name not in self.descriptors:
            raise ValueError(f"DescriptorClassifier.edited: there is no class {name!r}")
        return DescriptorClassifier(
            self.encoder,
            self.descriptors | {name: list(descriptors)},
            aggregate=self.aggregate,
            mode=self.mode,
            article_rule=self.article_rule,
            end=self.end,
            sentence=self.sentence,
        )

    def _scores(self, features: Tensor) -> Tensor:
        if self.aggregate != "max":
            return super()._scores(features)
        parts = []
        for rows in row_blocks(len(features), len(self.bank)):
            similarity = features[rows] @ self.bank.T
            lowest = similarity.new_full((len(similarity), len(self.classes)), -torch.inf)
            owner = self._owner.expand_as(similarity)
            parts.append(lowest.scatter_reduce_(1, owner, similarity, "amax"))
        return torch.cat(parts) if parts else features.new_zeros(0, len(self.classes))

    def _predict(self, features: Tensor, k: int) -> Prediction:
        if self.aggregate == "max":
            return super(LinearClassifier, self)._predict(features, k)
        scores, indices = self.head.top(features, k)  # the method has no softmax, so none is reported
        return Prediction(indices, scores)

    def explain(self, images: Tensor, count: int = 5, *, label: int | None = None) -> list[Explanation]:
        """Returns the descriptors of each image's class, most similar first.

        Args:
            images: as in `predict`.
            count: how many.
            label: explain this class instead of the predicted one.
        """
        features = self.features(images)
        found = []
        for row, best in enumerate(self._predict(features, 1).labels.tolist()):
            c = best if label is None else label
            start, stop = int(self._starts[c]), int(self._starts[c + 1])
            similarity = self.bank[start:stop] @ features[row]
            score = getattr(similarity, self.aggregate)()
            name = self.classes[c]
            texts = [d or name for d in self.descriptors[name]]
            found.append(Explanation(name, float(score), top_reasons(texts, similarity, count)))
        return found
