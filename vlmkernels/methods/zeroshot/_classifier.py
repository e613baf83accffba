# SPDX-License-Identifier: Apache-2.0
"""What every zero-shot method shares: the encoder, the classifier's shape, and the one head on `vk.zero_shot`.

Letters: N images, C classes, P prompts of a class, D width, k answers. Features are unit rows unless a docstring says
otherwise; `logit_scale` is already exponentiated (about 100 for CLIP).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkernels.data import tokenizer_for
from vlmkernels.models import CLIP
from vlmkernels.ops.flat_index import FlatIndex
from vlmkernels.ops.topk import topk_similarity, zero_shot
from vlmkernels.train.evaluation import Encoder

#: Elements of the largest temporary of a method that works in blocks of rows: 16 MiB of float32.
BLOCK_ELEMENTS = 2**22
#: Elements of a block that several passes go over: 4 MiB of float32, which the last cache keeps.
CACHE_ELEMENTS = 2**20
DEFAULT_SCALE = 100.0
#: Queries times rows over their sum from which codes save more products than it takes to make them.
_WORTH_CODES = 800


@runtime_checkable
class TextImageEncoder(Protocol):
    """Pictures and texts to unit vectors of one space; `vlmkernels.train.Encoder` is one."""

    def images(self, pictures: Tensor) -> Tensor:
        """Encodes uint8 [N, 3, H, W] to unit rows [N, D]."""
        ...

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Encodes N texts to unit rows [N, D]."""
        ...


@dataclass
class ModelEncoder:
    """Any model with `encode_image` and `encode_text`, with the two functions that prepare their inputs.

    Attributes:
        model: the model.
        preprocess: uint8 pictures [n, 3, H, W] to what `encode_image` takes.
        tokenize: a list of texts to what `encode_text` takes.
        batch_size: how many at once.
    """

    model: Any
    preprocess: Callable[[Tensor], Tensor]
    tokenize: Callable[[list[str]], Tensor]
    batch_size: int = 256

    @torch.no_grad()
    def images(self, pictures: Tensor) -> Tensor:
        """Encodes uint8 [N, 3, H, W] to unit rows [N, D]."""
        parts = [self.model.encode_image(self.preprocess(p)) for p in pictures.split(self.batch_size)]
        return unit(torch.cat(parts))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Encodes N texts to unit rows [N, D]."""
        parts = [
            self.model.encode_text(self.tokenize(list(texts[i : i + self.batch_size])))
            for i in range(0, len(texts), self.batch_size)
        ]
        return unit(torch.cat(parts))


def encoder_of(
    model: Any,
    *,
    preprocess: Callable[[Tensor], Tensor] | None = None,
    tokenize: Callable[[list[str]], Tensor] | None = None,
) -> TextImageEncoder:
    """Returns an encoder for a model: itself if it is one, `Encoder` for a model of this package, else `ModelEncoder`.

    Raises:
        TypeError: The model has no `encode_image` and `encode_text`, or is of another package and `preprocess` or
            `tokenize` is missing.
    """
    if isinstance(model, TextImageEncoder):
        return model
    if not (hasattr(model, "encode_image") and hasattr(model, "encode_text")):
        raise TypeError(
            f"encoder_of: expected a model with encode_image and encode_text, got {type(model).__name__}"
        )
    if preprocess is not None and tokenize is not None:
        return ModelEncoder(model, preprocess, tokenize)
    if isinstance(model, CLIP):
        return Encoder(model, tokenizer_for(model))
    raise TypeError(f"encoder_of: {type(model).__name__} needs preprocess and tokenize")


def scale_of(encoder: Any, given: float | None = None) -> float:
    """Returns `given`, else the exponentiated `logit_scale` of an encoder's model, else `DEFAULT_SCALE`."""
    if given is not None:
        return given
    scale = getattr(getattr(encoder, "model", None), "logit_scale", None)
    return DEFAULT_SCALE if scale is None else float(scale.detach().exp())


def unit(x: Tensor) -> Tensor:
    """Scales rows to length 1; half precision becomes float32 first."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def class_vectors(prompts: Tensor) -> Tensor:
    """Turns prompts [C, P, D] into class vectors [C, D]: normalise each, average, normalise again."""
    return unit(unit(prompts).mean(1))


def prompt_features(encoder: TextImageEncoder, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Encodes every name in every template: [C, P, D]."""
    # replace, not format: names may hold braces, and a template its name twice
    texts = [template.replace("{}", name) for name in names for template in templates]
    return encoder.texts(texts).view(len(names), len(templates), -1)


def check_features(owner: str, name: str, x: Tensor, width: int | None = None) -> Tensor:
    """Returns features [N, D] as they are.

    Raises:
        TypeError: They are no floating tensor.
        ValueError: They are no matrix, or not `width` wide.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(
            f"{owner}: {name} must be a floating tensor, got {getattr(x, 'dtype', type(x).__name__)}"
        )
    if x.ndim != 2 or (width is not None and x.shape[1] != width):
        raise ValueError(f"{owner}: {name} must be [N, {width or 'D'}], got {list(x.shape)}")
    return x


def check_labels(owner: str, labels: Tensor, rows: int, classes: int) -> Tensor:
    """Returns int64 labels [N].

    Raises:
        ValueError: There are not as many as rows, or one lies outside of 0 to `classes` - 1.
    """
    if labels.shape != (rows,) or labels.is_floating_point():
        raise ValueError(
            f"{owner}: labels must be [{rows}] integers, got {labels.dtype} {list(labels.shape)}"
        )
    if rows and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"{owner}: labels must lie between 0 and {classes - 1}")
    return labels.long()


def check_choice(owner: str, name: str, value: str, allowed: Sequence[str]) -> str:
    """Returns `value`.

    Raises:
        ValueError: It is not among `allowed`.
    """
    if value not in allowed:
        raise ValueError(f"{owner}: {name} must be one of {list(allowed)}, got {value!r}")
    return value


def row_blocks(rows: int, width: int, elements: int = BLOCK_ELEMENTS) -> Iterator[slice]:
    """Cuts `rows` into slices whose block of `width` columns stays within `elements`."""
    step = max(1, elements // max(width, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def nearest_rows(queries: Tensor, bank: Tensor, metric: str = "dot") -> tuple[Tensor, Tensor]:
    """The best row of a bank for every query: scores and int64 indices, both [N], exactly as `vk.topk_similarity`.

    Where there are many of both, the bank is searched by int8 codes: a `FlatIndex` made for this one call scores only
    what the codes leave open, which is worth its making.
    """
    n, m = len(queries), len(bank)
    if queries.dtype == bank.dtype == torch.float32 and n * m > _WORTH_CODES * (n + m):
        index = FlatIndex(bank.shape[1], metric=metric, storage="int8", device=bank.device)
        index.add(bank.detach())
        scores, rows = index.search(queries.detach(), 1)
    else:
        scores, rows = topk_similarity(queries, bank, 1, metric=metric)
    return scores[:, 0], rows[:, 0]


def cache_block(columns: int, rows: int = 512) -> tuple[int, int]:
    """How many rows (at most `rows`), and how many groups of `columns`, a block holds that stays in the cache.

    Rows are at least 32 where there are so many, since a product of fewer reads its other side too often.
    """
    rows = max(1, min(rows, max(32, CACHE_ELEMENTS // columns)))
    return rows, max(1, CACHE_ELEMENTS // (rows * columns))


@dataclass
class Prediction:
    """The k best classes of every image, best first.

    Attributes:
        indices: int64 [N, k].
        scores: [N, k]: probabilities where `lse` is there, else the method's own scores.
        lse: [N] log-sum-exp of all logits, where the method has a softmax over all classes.
    """

    indices: Tensor
    scores: Tensor
    lse: Tensor | None = None

    @property
    def labels(self) -> Tensor:
        """The best class, int64 [N]."""
        return self.indices[:, 0]


@dataclass
class Reason:
    """One reason for a label: what (a descriptor, a caption, an attribute, a region) and how much it counted."""

    text: str
    score: float


@dataclass
class Explanation:
    """Why an image got its label.

    Attributes:
        label: the class's name.
        score: its score.
        reasons: the strongest first.
    """

    label: str
    score: float
    reasons: list[Reason] = field(default_factory=list)


def joined(parts: Sequence[tuple[Tensor, Tensor]], features: Tensor, k: int) -> Prediction:
    """Returns the prediction of blocks of features, from every block's indices and scores [n, k]."""
    none = (torch.zeros(0, k, dtype=torch.int64), features.new_zeros(0, k))
    indices, scores = zip(*(parts or [none]), strict=True)
    return Prediction(torch.cat(indices), torch.cat(scores))


def top_reasons(texts: Sequence[str], scores: Tensor, count: int) -> list[Reason]:
    """Returns the `count` best of as many texts as scores, best first."""
    best = scores.sort(descending=True, stable=True)
    return [
        Reason(texts[i], s)
        for s, i in zip(best.values[:count].tolist(), best.indices[:count].tolist(), strict=True)
    ]


class LinearHead:
    """Logits `features @ weight.T + bias`, and their k largest softmax probabilities without the [N, C] logits.

    The rows are as they come (nothing is normalised), so that averaged prompts, weighted prompts and fitted classifiers
    all go through one head. `vk.zero_shot` does the work: it ranks cosines, so with unequal rows or a bias both sides
    get two more columns that turn the product into one,

    ```
    R = max_c |(w_c, b_c)|;  x' = (x, 1, 0) / r;  w'_c = (w_c, b_c, sqrt(R^2 - |w_c|^2 - b_c^2)) / R;  r = |(x, 1)|
    x . w_c + b_c = r R cos(x', w'_c)
    ```

    and its `logit_scale` is `r R`, one number because all `x` are unit rows.

    Args:
        weight: [C, D].
        bias: [C] or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        check_features("LinearHead", "weight", weight)
        if bias is not None and bias.shape != (len(weight),):
            raise ValueError(f"LinearHead: bias must be [{len(weight)}], got {list(bias.shape)}")
        self.weight, self.bias = weight, bias
        squared = weight.double().square().sum(1)
        self._equal = bias is None and float(squared.max() - squared.min()) <= 1e-6 * float(squared.max())
        if self._equal:
            self._scale, self._classes = float(squared.max().sqrt()), weight
            return
        more = weight.new_zeros(len(weight)) if bias is None else bias
        squared = squared + more.double().square()
        radius = squared.max().sqrt()
        rest = (radius.square() - squared).clamp(min=0).sqrt().to(weight.dtype)
        self._scale = float(radius) * 2**0.5
        self._classes = torch.cat([weight, more[:, None], rest[:, None]], 1)

    @property
    def classes(self) -> int:
        """C."""
        return len(self.weight)

    def logits(self, features: Tensor) -> Tensor:
        """Returns the logits of unit rows [N, D]: [N, C]."""
        return F.linear(features, self.weight, self.bias)

    def __call__(self, features: Tensor, k: int = 1) -> Prediction:
        """Returns the k most probable classes of unit rows [N, D], and the log-sum-exp of all logits."""
        check_features("LinearHead", "features", features, self.weight.shape[1])
        if self._scale == 0:  # all logits are 0
            n, c = len(features), self.classes
            indices = torch.arange(k).expand(n, k)
            return Prediction(indices, features.new_full((n, k), 1 / c), features.new_full((n,), c).log())
        x = features
        if not self._equal:
            x = torch.cat(
                [features, features.new_ones(len(features), 1), features.new_zeros(len(features), 1)], 1
            )
        probabilities, indices, lse = zero_shot(x, self._classes, self._scale, k=k)
        return Prediction(indices, probabilities, lse)

    def top(self, features: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """Returns the k largest logits of rows [N, D] of any length and their classes, both [N, k]."""
        if self.bias is None:
            return topk_similarity(features, self.weight, k)
        ones = features.new_ones(len(features), 1)
        return topk_similarity(
            torch.cat([features, ones], 1), torch.cat([self.weight, self.bias[:, None]], 1), k
        )


class Classifier(ABC):
    """The shape of every classifier here: `fit` where it needs data, `predict`, `scores`, and `explain` where it can.

    Images are unit features [N, D], or uint8 pictures [N, 3, H, W] where the classifier has an encoder.

    Args:
        classes: C names.
        encoder: what encodes pictures and prompts; None: features only.
    """

    def __init__(self, classes: Sequence[str], encoder: Any = None) -> None:
        if not len(classes):
            raise ValueError(f"{type(self).__name__}: there is no class")
        self.classes = list(classes)
        self.encoder = None if encoder is None else encoder_of(encoder)

    def features(self, images: Tensor) -> Tensor:
        """Returns unit features [N, D] of pictures or of features.

        Raises:
            TypeError, ValueError: `images` is neither, or there is no encoder for pictures.
        """
        return features_of(images, self.encoder, type(self).__name__)

    def _encoder_for(self, instead: str) -> TextImageEncoder:
        """The encoder, which is needed where the ready features `instead` are not given."""
        if self.encoder is None:
            raise ValueError(f"{type(self).__name__}: pass an encoder or {instead}")
        return self.encoder

    def scores(self, images: Tensor) -> Tensor:
        """Returns the score of every class, [N, C]; `predict` does not keep these."""
        return self._scores(self.features(images))

    def predict(self, images: Tensor, k: int = 1) -> Prediction:
        """Returns the k best classes of every image.

        Raises:
            ValueError: k is not between 1 and C.
        """
        self._check_k(k)
        return self._predict(self.features(images), k)

    def _check_k(self, k: int) -> None:
        if not 1 <= k <= len(self.classes):
            raise ValueError(f"{type(self).__name__}: k must lie between 1 and {len(self.classes)}, got {k}")

    @abstractmethod
    def _scores(self, features: Tensor) -> Tensor: ...

    def _predict(self, features: Tensor, k: int) -> Prediction:
        parts = []
        for rows in row_blocks(len(features), len(self.classes)):
            # stable: equal scores in ascending class, as everywhere in the package
            best = self._scores(features[rows]).sort(dim=1, descending=True, stable=True)
            parts.append((best.indices[:, :k], best.values[:, :k]))
        return joined(parts, features, k)


def features_of(images: Tensor, encoder: TextImageEncoder | None, owner: str) -> Tensor:
    """Returns unit features [N, D] of uint8 pictures [N, 3, H, W], or of features [N, D].

    Raises:
        TypeError: `images` is neither.
        ValueError: Pictures without an encoder, or another shape.
    """
    if isinstance(images, Tensor) and images.dtype == torch.uint8:
        if encoder is None:
            raise ValueError(f"{owner}: pictures need an encoder; this one was made without")
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"{owner}: pictures must be uint8 [N, 3, H, W], got {list(images.shape)}")
        return encoder.images(images)
    return unit(check_features(owner, "images", images))


class LinearClassifier(Classifier):
    """A classifier whose scores are linear in the features; subclasses give it `head`."""

    head: LinearHead

    def _scores(self, features: Tensor) -> Tensor:
        return self.head.logits(features)

    def _predict(self, features: Tensor, k: int) -> Prediction:
        return self.head(features, k)


class PromptClassifier(LinearClassifier):
    """CLIP's own zero-shot classifier (Radford et al. 2021, section 3.1.4): the baseline of every method here.

    Args:
        encoder: the model.
        classes: C names.
        templates: prompts with {} for the name, averaged per class.
        logit_scale: None: the model's.
    """

    def __init__(
        self,
        encoder: Any,
        classes: Sequence[str],
        templates: Sequence[str] = ("a photo of a {}.",),
        *,
        logit_scale: float | None = None,
    ) -> None:
        super().__init__(classes, encoder)
        check_templates("PromptClassifier", templates)
        self.logit_scale = scale_of(self.encoder, logit_scale)
        prompts = prompt_features(self.encoder, classes, templates)  # type: ignore[arg-type]
        self.head = LinearHead(self.logit_scale * class_vectors(prompts))


def check_templates(owner: str, templates: Sequence[str]) -> None:
    """Refuses an empty list of templates, and one without a place for the name.

    Raises:
        ValueError: as above.
    """
    if isinstance(templates, str) or not templates:
        raise ValueError(f"{owner}: templates must be a list of at least one, got {templates!r}")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"{owner}: expected {{}} where the name goes, got {template!r}")
