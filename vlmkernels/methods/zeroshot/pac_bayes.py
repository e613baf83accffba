# SPDX-License-Identifier: Apache-2.0
"""PAC-Bayes bounds for prompts: a prompt is a hypothesis, a language model the prior, and the bound is not vacuous.

Akinwande et al., "Understanding prompt engineering may not require rethinking generalization" (2024). For K class
prompts theta, n labelled training pictures with error r, and any prior fixed before their labels were seen:

```
KL          = -log P(theta) = -sum_k sum_t log p(theta^k_t | before), end of text included, in nats    point mass
mcallester  R <= r + sqrt((KL + log(n / delta) + 2) / (2n - 1))
occam       R <= r + sqrt((KL + log(1 / delta)) / (2n))                                      (reconstructed)
kl_inverse  R <= max{q: kl(r || q) <= (KL + log(2 sqrt(n) / delta)) / n}                     (reconstructed)
```

each with probability at least 1 - delta, for the 0/1 error. The first author's articles print the fraction without the
root; the published figures (2.3% and 8.6% with n = 50,000) fit the root, which is used. The paper's delta was not
found. The greedy search replaces one class's prompt at a time, so only one column of the n x K scores changes:
candidates are compared with the best of the other columns in blocks, and no n x |vocabulary| array is kept.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from vlmkernels.methods.zeroshot._classifier import check_features, check_labels, row_blocks
from vlmkernels.systems import register_system

__all__ = [
    "BigramModel",
    "CausalModel",
    "PromptModel",
    "SearchResult",
    "greedy_prompt_search",
    "pac_bayes_bound",
    "prompt_kl",
    "uniform_kl",
]

_KINDS = ("mcallester", "occam", "kl_inverse")


@register_system(
    "PAC-Bayes for prompts",
    "Understanding prompt engineering may not require rethinking generalization",
    "generalisation bound + prompt search",
)
def pac_bayes_bound(
    train_error: float,
    kl: float,
    n: int,
    delta: float = 0.01,
    kind: str = "mcallester",
    *,
    hypotheses: int = 1,
) -> float:
    """Returns an upper bound on the error of prompts on new pictures, at most 1.

    Args:
        train_error: r, share of wrong training answers.
        kl: KL of `prompt_kl` or `uniform_kl`, in nats.
        n: training pictures; those used for choosing anything else do not count.
        delta: probability that the bound may fail.
        kind: "mcallester", "occam" or "kl_inverse", see the top of this file.
        hypotheses: how many bounds are compared; delta is split among them.

    Raises:
        ValueError: A number out of range, or an unknown kind.
    """
    if not 0 <= train_error <= 1 or kl < 0 or n < 1 or not 0 < delta < 1 or hypotheses < 1:
        raise ValueError(
            "pac_bayes_bound: expected 0 <= train_error <= 1, kl >= 0, n >= 1, 0 < delta < 1 and hypotheses >= 1, "
            f"got {train_error}, {kl}, {n}, {delta} and {hypotheses}"
        )
    if kind not in _KINDS:
        raise ValueError(f"pac_bayes_bound: kind must be one of {list(_KINDS)}, got {kind!r}")
    delta = delta / hypotheses
    if kind == "mcallester":
        return min(1.0, train_error + math.sqrt((kl + math.log(n / delta) + 2) / (2 * n - 1)))
    if kind == "occam":
        return min(1.0, train_error + math.sqrt((kl + math.log(1 / delta)) / (2 * n)))
    return inverse_kl(train_error, (kl + math.log(2 * math.sqrt(n) / delta)) / n)


def binary_kl(r: float, q: float) -> float:
    """Returns kl(r || q) of two Bernoulli distributions, in nats."""
    terms = ((r, q), (1 - r, 1 - q))
    if any(a > 0 and b <= 0 for a, b in terms):
        return math.inf
    return sum(a * math.log(a / b) for a, b in terms if a > 0)


def inverse_kl(r: float, limit: float) -> float:
    """Returns the largest q with kl(r || q) <= limit, by bisection from above: never below the true value."""
    low, high = r, 1.0
    if binary_kl(r, 1.0) <= limit:
        return 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if binary_kl(r, middle) <= limit else (low, middle)
    return high


def uniform_kl(classes: int, length: int, vocabulary: int = 49_408) -> float:
    """Returns the KL under the uniform prior on sequences: `K L log|V|`, the comparison of the paper (L at most 77)."""
    return classes * length * math.log(vocabulary)


class PromptModel(Protocol):
    """A prior over texts."""

    def log_probability(self, text: str) -> float:
        """Natural logarithm of a text's probability, end of text included."""
        ...

    def next_words(self, text: str, count: int) -> list[str]:
        """The most probable words after a text."""
        ...


def prompt_kl(prompts: Sequence[str], model: PromptModel) -> float:
    """Returns the KL of a point mass on prompts, in nats: summed over independent classes (reconstructed)."""
    return -sum(model.log_probability(p) for p in prompts)


class BigramModel:
    """A word bigram model with additive smoothing and an open vocabulary: a prior without dependencies.

    Probabilities of all texts over the vocabulary plus one unknown word sum to 1, the end of text is a word. It must be
    fitted on texts that have nothing to do with the training pictures' labels, or the bound is void.

    Args:
        texts: what it learns from.
        smoothing: added to every count.
        unknown_words: how many words the unknown one stands for; its probability is shared among them.
    """

    _START, _END = "<start>", "<end>"

    def __init__(self, texts: Iterable[str], *, smoothing: float = 0.1, unknown_words: int = 49_408) -> None:
        if smoothing <= 0:
            raise ValueError(f"BigramModel: smoothing must be positive, got {smoothing}")
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)
        words: set[str] = set()
        for text in texts:
            sequence = [self._START, *self._split(text), self._END]
            words.update(sequence[1:])
            for a, b in itertools.pairwise(sequence):
                self._counts[a][b] += 1
        self.words = sorted(words | {self._END})
        self._known = set(self.words)
        self.smoothing, self.unknown_words = smoothing, unknown_words
        self._totals = {a: sum(c.values()) for a, c in self._counts.items()}

    @staticmethod
    def _split(text: str) -> list[str]:
        return text.lower().split()

    def word_log_probability(self, word: str, before: str) -> float:
        """Log-probability of a word (or the end) after another (or the start)."""
        count = self._counts[before][word] if before in self._counts else 0
        total = self._totals.get(before, 0) + self.smoothing * (len(self.words) + 1)
        value = math.log((count + self.smoothing) / total)
        return value if word in self._known else value - math.log(self.unknown_words)

    def log_probability(self, text: str) -> float:
        """As `PromptModel.log_probability`."""
        sequence = [self._START, *self._split(text), self._END]
        return sum(self.word_log_probability(b, a) for a, b in itertools.pairwise(sequence))

    def next_words(self, text: str, count: int) -> list[str]:
        """As `PromptModel.next_words`; words that never followed come in alphabetical order."""
        before = (self._split(text) or [self._START])[-1]
        counts = self._counts.get(before, Counter())
        ranked = sorted((w for w in self.words if w != self._END), key=lambda w: (-counts[w], w))
        return ranked[:count]


@dataclass
class CausalModel:
    """A causal language model of `transformers` that the user has loaded (the paper: LLaMA-7B), as a prior.

    Texts are scored by the language model's own tokenizer; CLIP's tokens have to be decoded first (reconstructed).

    Attributes:
        model: called as `model(ids).logits`.
        tokenizer: `tokenizer(text).input_ids`, with `eos_token_id` and, where it has one, `bos_token_id`.
    """

    model: Any
    tokenizer: Any

    def _ids(self, text: str) -> list[int]:
        start = getattr(self.tokenizer, "bos_token_id", None)
        ids = [i for i in self.tokenizer(text).input_ids if i not in (start, self.tokenizer.eos_token_id)]
        return [self.tokenizer.eos_token_id if start is None else start, *ids]

    @torch.no_grad()
    def log_probability(self, text: str) -> float:
        """As `PromptModel.log_probability`."""
        ids = self._ids(text)
        log_p = self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return float(
            log_p[torch.arange(len(ids)), torch.tensor([*ids[1:], self.tokenizer.eos_token_id])].sum()
        )

    @torch.no_grad()
    def next_words(self, text: str, count: int) -> list[str]:
        """As `PromptModel.next_words`: the most probable next tokens, decoded."""
        logits = self.model(torch.tensor([self._ids(text)])).logits[0, -1]
        return [self.tokenizer.decode([i]).strip() for i in logits.topk(count).indices.tolist()]


@dataclass
class SearchResult:
    """What `greedy_prompt_search` found.

    Attributes:
        prompts: one per class.
        train_error: theirs.
        kl: theirs under the prior; 0.0 without one.
        errors: training error after every accepted word, from the initial prompts on.
    """

    prompts: list[str]
    train_error: float
    kl: float = 0.0
    errors: list[float] = field(default_factory=list)

    def bound(self, n: int, delta: float = 0.01, kind: str = "mcallester") -> float:
        """Returns the bound on the error, see `pac_bayes_bound`."""
        return pac_bayes_bound(self.train_error, self.kl, n, delta, kind)


def greedy_prompt_search(
    features: Tensor,  # [n, D]
    labels: Tensor,  # [n]
    classes: int,
    encode_text: Callable[[Sequence[str]], Tensor],
    vocabulary: Sequence[str],
    *,
    model: PromptModel | None = None,
    most_words: int = 3,
    init: str | Sequence[str] = "",
    pruned_to: int | None = None,
    kl_weight: float = 0.0,
) -> SearchResult:
    """Builds class prompts word by word, each time the word that lowers the training error most.

    Classes take turns (the paper's order and length were not found); a word is appended only where it lowers the
    objective, error + kl_weight KL / n, so neither it nor, with kl_weight 0, the training error ever rises.

    Args:
        features: training pictures, unit rows; the encoders never saw their labels.
        labels: their classes.
        classes: K.
        encode_text: texts to unit rows.
        vocabulary: words that may be appended.
        model: the prior, for pruning and for the KL.
        most_words: words appended per class at most.
        init: where every prompt begins ("a photo of"), or one beginning per class.
        pruned_to: only so many words that the prior finds likely after the prompt are tried (and in the vocabulary).
        kl_weight: of structural risk minimisation; 0: plain greedy (the paper's weight was not found).

    Raises:
        ValueError: Shapes, labels or options that do not fit.
    """
    check_features("greedy_prompt_search", "features", features)
    labels = check_labels("greedy_prompt_search", labels, len(features), classes)
    if not len(features) or not len(vocabulary) or most_words < 0:
        raise ValueError("greedy_prompt_search: expected pictures, a vocabulary and most_words >= 0")
    if model is None and (pruned_to is not None or kl_weight):
        raise ValueError("greedy_prompt_search: pruned_to and kl_weight need a model")
    prompts = [init] * classes if isinstance(init, str) else list(init)
    if len(prompts) != classes:
        raise ValueError(f"greedy_prompt_search: {classes} classes but {len(prompts)} beginnings")
    n = len(features)
    scores = features @ encode_text(prompts).T
    log_p = [model.log_probability(p) if model else 0.0 for p in prompts]
    allowed = set(vocabulary)

    def objective(error: float, kl: float) -> float:
        return error + kl_weight * kl / n

    error = float((scores.argmax(1) != labels).double().mean())
    best, errors = objective(error, -sum(log_p)), [error]
    for _ in range(most_words):
        for c in range(classes):
            words: Sequence[str] = vocabulary
            if pruned_to is not None and model is not None:
                words = [w for w in model.next_words(prompts[c], pruned_to) if w in allowed]
            if not words:
                continue
            texts = [f"{prompts[c]} {w}".strip() for w in words]
            columns = encode_text(texts)
            wrong = column_errors(features, labels, scores, c, columns)
            values = wrong.double() / n
            if kl_weight and model is not None:
                rest = -sum(log_p) + log_p[c]
                kls = torch.tensor([rest - model.log_probability(t) for t in texts], dtype=torch.float64)
                values = values + kl_weight * kls / n
            i = int(values.argmin())
            if float(values[i]) < best - 1e-12:
                best, prompts[c] = float(values[i]), texts[i]
                scores[:, c] = features @ columns[i]
                log_p[c] = model.log_probability(texts[i]) if model else 0.0
                errors.append(float(wrong[i]) / n)
    error = float((scores.argmax(1) != labels).double().mean())
    return SearchResult(prompts, error, -sum(log_p) if model else 0.0, errors)


def column_errors(features: Tensor, labels: Tensor, scores: Tensor, c: int, columns: Tensor) -> Tensor:
    """Counts wrong answers for every candidate of class c, int64 [candidates], without evaluating the other columns.

    A picture of class c is right where the candidate exceeds the best other column (or equals it and c comes first);
    a picture of another class is right where its own column was best among the others and the candidate stays below.

    Args:
        features: [n, D].
        labels: [n].
        scores: [n, K], all columns as they are now.
        c: the class whose column changes.
        columns: candidates' text features [candidates, D].
    """
    others = scores.clone()
    others[:, c] = -torch.inf
    top, winner = others.max(1)
    own = labels == c
    right_without = winner == labels
    wrong = torch.zeros(len(columns), dtype=torch.int64)
    for rows in row_blocks(len(features), len(columns)):
        candidate = features[rows] @ columns.T
        bound = top[rows, None]
        # argmax takes the first of equals
        wins = torch.where((c < winner[rows])[:, None], candidate >= bound, candidate > bound)
        right = torch.where(own[rows, None], wins, right_without[rows, None] & ~wins)
        wrong += (~right).sum(0)
    return wrong
