# SPDX-License-Identifier: Apache-2.0
"""CaSED: classification without a list of classes, by captions retrieved from a large database.

Conti et al., "Vocabulary-free Image Classification" (2023; released code altndrr/vic, and altndrr/vicss for the
journal's extension to segmentation, which lives in `cased_dense.py`). For an image's unit feature f:

```
captions = the 10 most similar of the database; near copies (cosine above 0.94) count once
c        = normalise(mean normalise(text(caption)))          the centroid of the captions, unfiltered
K        = text features of the words mined from the captions (`candidate_words`)
p        = alpha softmax(s f K' / tau) + (1 - alpha) softmax(s c K' / tau)        alpha 0.7, tau 1, s about 100
```

Retrieval is `vk.FlatIndex`: exact, over millions of captions in bounded memory, from int8 codes where asked for.

    vlmkernels classify picture.png --open-vocabulary --captions captions.txt
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmkernels._files import write_text_atomically
from vlmkernels.data import emoji
from vlmkernels.methods.zeroshot._classifier import (
    Explanation,
    Reason,
    encoder_of,
    features_of,
    scale_of,
    unit,
)
from vlmkernels.methods.zeroshot._words import Tagger, candidate_words, closed_class_tagger
from vlmkernels.ops.flat_index import FlatIndex
from vlmkernels.systems import register_system

__all__ = ["CaSED", "CaptionBank", "WordPrediction", "emoji_captions"]

_ADD_ROWS = 8192


class CaptionBank:
    """Captions and the index of their features.

    Args:
        captions: texts; id i of the index is caption i.
        index: cosine index of their features.

    Raises:
        ValueError: Their numbers differ, or the index has another metric.
    """

    def __init__(self, captions: Sequence[str], index: FlatIndex) -> None:
        if len(captions) != len(index) or not len(index):
            raise ValueError(f"CaptionBank: got {len(captions)} captions and {len(index)} vectors")
        if index.metric != "cosine":
            raise ValueError(f"CaptionBank: expected a cosine index, got {index.metric!r}")
        self.captions, self.index = captions, index

    @classmethod
    def build(
        cls, encoder: Any, captions: Sequence[str], *, storage: str = "float32", exact: bool = True
    ) -> CaptionBank:
        """Encodes captions in batches into an index of the given storage (see `vk.FlatIndex`)."""
        if not len(captions):
            raise ValueError("CaptionBank.build: there is no caption")
        encoder, index = encoder_of(encoder), None
        for start in range(0, len(captions), _ADD_ROWS):
            rows = encoder.texts(list(captions[start : start + _ADD_ROWS]))
            index = FlatIndex(rows.shape[1], storage=storage, exact=exact) if index is None else index
            index.add(rows)
        return cls(captions, index)  # type: ignore[arg-type]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the index and the captions into a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.index.save(Path(folder) / "captions.index")
        write_text_atomically(
            Path(folder) / "captions.json", json.dumps(list(self.captions), ensure_ascii=False)
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, mmap: bool = False) -> CaptionBank:
        """Reads what `save` wrote; `mmap` leaves the vectors on disk."""
        captions = json.loads((Path(folder) / "captions.json").read_text(encoding="utf-8"))
        return cls(captions, FlatIndex.load(Path(folder) / "captions.index", mmap=mmap))


@lru_cache(maxsize=1)
def emoji_captions() -> tuple[str, ...]:
    """Returns the default database: every caption of every base emoji, from names, keywords and groups."""
    entries = (e for e in emoji.load().emojis if e.base == e.index)
    return tuple(dict.fromkeys(c for e in entries for c in emoji.captions(e)))


@dataclass
class WordPrediction:
    """What one image may show.

    Attributes:
        words: candidates, most probable first.
        probabilities: as many, summing to 1.
        captions: the captions they were mined from, most similar first, with their cosines.
    """

    words: list[str]
    probabilities: list[float]
    captions: list[tuple[str, float]]

    @property
    def word(self) -> str:
        """The most probable one."""
        return self.words[0]


@register_system("CaSED", "Vocabulary-free Image Classification", "open-vocabulary classification method")
class CaSED:
    """Vocabulary-free classifier; see the top of this file.

    Args:
        encoder: the model.
        bank: the captions; None: `emoji_captions`, encoded here.
        k: captions per image.
        alpha: weight of the image beside the captions; 1: CLIP over the candidates, 0: the captions alone.
        tau: temperature.
        dedup: cosine above which captions are copies; 1 or more: none are.
        template: prompt of a candidate word.
        centroid: "bank" takes the captions' vectors from the index (the same vectors where the same encoder made it),
            "encode" encodes them again, as the paper does, which an index of bare codes (`exact=False`) needs.
        tagger: see `candidate_words`.
        logit_scale: None: the model's.

    Raises:
        ValueError: Options out of range.
    """

    def __init__(
        self,
        encoder: Any,
        bank: CaptionBank | None = None,
        *,
        k: int = 10,
        alpha: float = 0.7,
        tau: float = 1.0,
        dedup: float = 0.94,
        template: str = "{}",
        centroid: str = "bank",
        tagger: Tagger = closed_class_tagger,
        logit_scale: float | None = None,
    ) -> None:
        if not 0 <= alpha <= 1 or tau <= 0:
            raise ValueError(f"CaSED: alpha must lie in [0, 1] and tau be positive, got {alpha} and {tau}")
        if centroid not in ("bank", "encode"):
            raise ValueError(f"CaSED: centroid must be 'bank' or 'encode', got {centroid!r}")
        self.encoder = encoder_of(encoder)
        self.bank = bank or CaptionBank.build(self.encoder, emoji_captions())
        if not 1 <= k <= len(self.bank.index):
            raise ValueError(f"CaSED: k must lie between 1 and {len(self.bank.index)}, got {k}")
        self.k, self.alpha, self.tau, self.dedup = k, alpha, tau, dedup
        self.template, self.centroid, self.tagger = template, centroid, tagger
        self.logit_scale = scale_of(self.encoder, logit_scale)
        self._rows: dict[str, int] = {}
        self._vectors = torch.zeros(0)

    def retrieve(self, images: Tensor) -> list[list[tuple[int, float]]]:
        """Returns, per image, the ids of its captions and their cosines, copies left out, best first."""
        found, _ = self._retrieve(features_of(images, self.encoder, "CaSED"))
        return found

    def _retrieve(self, features: Tensor) -> tuple[list[list[tuple[int, float]]], Tensor]:
        scores, ids = self.bank.index.search(features, self.k)
        vectors = self._caption_vectors(ids)
        found, centroids = [], []
        for row in range(len(features)):
            kept = _representatives(vectors[row], self.dedup)
            found.append([(int(ids[row, i]), float(scores[row, i])) for i in kept])
            centroids.append(unit(vectors[row, kept].mean(0)))
        return found, torch.stack(centroids) if centroids else features

    def _caption_vectors(self, ids: Tensor) -> Tensor:
        """Unit rows [N, k, D] of caption ids [N, k]."""
        if self.centroid == "bank":
            return unit(self.bank.index.reconstruct(ids.flatten())).view(*ids.shape, -1)
        flat, inverse = ids.unique(return_inverse=True)
        return self.encoder.texts([self.bank.captions[i] for i in flat.tolist()])[inverse]

    def _encode_words(self, words: Sequence[str]) -> Tensor:
        """Row numbers of words in the cache of their features."""
        new = [w for w in dict.fromkeys(words) if w not in self._rows]
        if new:
            rows = self.encoder.texts([self.template.replace("{}", w) for w in new])
            self._rows |= {w: len(self._rows) + i for i, w in enumerate(new)}
            self._vectors = torch.cat([self._vectors, rows]) if len(self._vectors) else rows
        return torch.tensor([self._rows[w] for w in words])

    def predict(self, images: Tensor) -> list[WordPrediction]:
        """Names images: pictures uint8 [N, 3, H, W], or features [N, D]."""
        features = features_of(images, self.encoder, "CaSED")
        if not len(features):
            return []
        found, centroids = self._retrieve(features)
        texts = [[self.bank.captions[i] for i, _ in captions] for captions in found]
        words = [candidate_words(t, tagger=self.tagger) for t in texts]
        return self.rank(features, centroids, words, found)

    def rank(
        self,
        features: Tensor,  # [N, D]
        centroids: Tensor,  # [N, D]
        words: Sequence[Sequence[str]],
        found: Sequence[Sequence[tuple[int, float]]],
    ) -> list[WordPrediction]:
        """Returns the probabilities of every image's own candidates; the images are scored together.

        Candidates are padded to the longest list, [N, longest]: no image meets another's words, and no array has a
        column for every word of the batch.
        """
        rows = self._encode_words([w for own in words for w in own]).split([len(own) for own in words])
        padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=-1)
        vectors = self._vectors[padded.clamp(min=0)]
        outside = padded < 0

        def softmax(x: Tensor) -> Tensor:
            logits = self.logit_scale / self.tau * torch.einsum("nd,nwd->nw", x, vectors)
            return logits.masked_fill(outside, -torch.inf).softmax(1)

        p = self.alpha * softmax(features) + (1 - self.alpha) * softmax(centroids)
        out = []
        for row, own in enumerate(words):
            best = p[row, : len(own)].sort(descending=True, stable=True)
            captions = [(self.bank.captions[i], s) for i, s in found[row]]
            out.append(
                WordPrediction([own[i] for i in best.indices.tolist()], best.values.tolist(), captions)
            )
        return out

    def explain(self, images: Tensor, count: int = 5) -> list[Explanation]:
        """Returns each image's word and the captions that it was mined from, most similar first."""
        return [
            Explanation(p.word, p.probabilities[0], [Reason(text, s) for text, s in p.captions[:count]])
            for p in self.predict(images)
        ]


def _representatives(vectors: Tensor, threshold: float) -> list[int]:
    """The first of every group of vectors [k, D] linked by cosines above the threshold."""
    k = len(vectors)
    linked = (vectors @ vectors.T > threshold) | torch.eye(k, dtype=torch.bool)
    # k steps at most reach every member of a connected component; k is about ten
    for _ in range(k):
        wider = (linked.float() @ linked.float()) > 0
        if torch.equal(wider, linked):
            break
        linked = wider
    first = linked.int().argmax(1)
    return [i for i in range(k) if int(first[i]) == i]
