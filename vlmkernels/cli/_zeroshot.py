# SPDX-License-Identifier: Apache-2.0
"""The zero-shot methods as `vlmkernels classify --method` and its gallery make them: one classifier from labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmkernels.cli._models import DEFAULT_MODEL, PHOTO_TEMPLATES, templates_for
from vlmkernels.data import emoji
from vlmkernels.methods.zeroshot import (
    ZPE,
    CachedDescriptions,
    CaptionBank,
    CaSED,
    Classifier,
    DescriptionSource,
    DescriptorClassifier,
    EmojiDescriptions,
    FuDD,
    Loki,
    PerceptionCLIP,
    PromptClassifier,
)
from vlmkernels.methods.zeroshot.perception import FACTORS
from vlmkernels.train.evaluation import Encoder

METHODS = ("clip", "zpe", "description", "fudd", "perception", "loki")
#: Pictures from which on the mean over them says something about the pictures rather than about one of them.
_ENOUGH_PICTURES = 8
_MORE_TEMPLATES = (
    "an image of {}",
    "a close-up of {}",
    "{} in a picture",
    "a cartoon of {}",
    "a symbol of {}",
)


def is_emoji_model(encoder: Encoder) -> bool:
    """Whether a model was trained on the bundled set, whose captions read otherwise than photos'."""
    return encoder.model.config.name == DEFAULT_MODEL


def description_source(path: str | None) -> DescriptionSource:
    """Returns the descriptions in a JSON file, or those of the bundled emoji."""
    return EmojiDescriptions() if path is None else CachedDescriptions(path)


def build_classifier(
    method: str,
    encoder: Encoder,
    labels: Sequence[str],
    features: Tensor,
    *,
    templates: Sequence[str] | None = None,
    descriptions: str | None = None,
    context: Sequence[str] | None = None,
) -> Any:
    """Makes a classifier.

    Args:
        method: one of `METHODS`.
        encoder: the model.
        labels: the classes.
        features: of the pictures to classify, which some methods adapt to.
        templates: the user's prompts.
        descriptions: a JSON file of descriptions.
        context: names of `FACTORS`.

    Returns:
        A `Classifier`; those with reasons have `explain`.

    Raises:
        ValueError: An unknown method or context.
    """
    chosen = templates_for(encoder, templates)
    emojis = is_emoji_model(encoder)
    makers: dict[str, Callable[[], Classifier]] = {
        "clip": lambda: PromptClassifier(encoder, labels, chosen),
        "zpe": lambda: _zpe(encoder, labels, features, templates),
        "description": lambda: DescriptorClassifier(
            encoder,
            labels,
            source=description_source(descriptions),
            sentence=_keyword_caption if emojis else None,
        ),
        "fudd": lambda: FuDD(
            encoder,
            labels,
            description_source(descriptions),
            template=chosen[0] if emojis or templates else "a photo of a {}.",
            capitalize=not emojis and not templates,
        ),
        "perception": lambda: _perception(encoder, labels, context, templates),
        "loki": lambda: Loki.self_derived(PromptClassifier(encoder, labels, chosen)),
    }
    if method not in makers:
        raise ValueError(f"--method: expected one of {list(METHODS)}, got {method!r}")
    return makers[method]()


def _keyword_caption(name: str, keyword: str) -> str:
    return f"{name}: {keyword}"


def _zpe(encoder: Encoder, labels: Sequence[str], features: Tensor, templates: Sequence[str] | None) -> ZPE:
    """Subtracts the means that there are pictures for: of the user's, if there are several, and of the bundled set."""
    pool = tuple(dict.fromkeys((*(templates or emoji.NAME_TEMPLATES), *PHOTO_TEMPLATES, *_MORE_TEMPLATES)))
    several, known = len(features) >= _ENOUGH_PICTURES, is_emoji_model(encoder)
    debias = {(True, True): "both", (True, False): "test", (False, True): "pretrain", (False, False): "none"}
    pretrain = None
    if known:
        data = emoji.load()
        pairs = data.select(split="train", styles="noto", base_only=True)[::8]
        pretrain = encoder.images(data.images(pairs, size=encoder.model.config.vision.image_size))
    classifier = ZPE(encoder, labels, templates or pool, debias=debias[several, known])
    return classifier.fit(features, pretrain)


def _perception(
    encoder: Encoder, labels: Sequence[str], context: Sequence[str] | None, templates: Sequence[str] | None
) -> PerceptionCLIP:
    emojis = is_emoji_model(encoder)
    names = context or (["skin tone"] if emojis else ["art", "background"])
    unknown = [n for n in names if n not in FACTORS]
    if unknown:
        raise ValueError(f"--context: expected some of {list(FACTORS)}, got {unknown[0]!r}")
    main = (templates or (["an emoji of {}"] if emojis else ["a photo of a {}"]))[0]
    return PerceptionCLIP(encoder, labels, {n: FACTORS[n] for n in names}, main=main)


def build_open_vocabulary(encoder: Encoder, captions: str | None) -> CaSED:
    """Makes CaSED over captions: a file with one per line, a folder of `CaptionBank.save`, or the bundled set's own."""
    if captions is None:
        return CaSED(encoder)
    if Path(captions).is_dir():
        return CaSED(encoder, CaptionBank.load(captions, mmap=True))
    lines = [line.strip() for line in Path(captions).read_text(encoding="utf-8").splitlines()]
    lines = list(dict.fromkeys(line for line in lines if line))
    if not lines:
        raise ValueError(f"--captions: {captions} holds no caption")
    bank = CaptionBank.build(encoder, lines)
    return CaSED(encoder, bank, k=min(10, len(lines)))


@torch.no_grad()
def classify(
    classifier: Any, labels: Sequence[str], features: Tensor, *, top: int, explain: bool
) -> list[dict[str, Any]]:
    """Returns, per picture, the best labels with their probabilities or scores and, where asked for, the reasons."""
    prediction = classifier.predict(features, k=min(top, len(labels), getattr(classifier, "k", len(labels))))
    # Log-sum-exps come with a softmax over all classes; other methods have scores of their own.
    probable = prediction.lse is not None or isinstance(classifier, PerceptionCLIP)
    kind = "probability" if probable else "score"
    rows: list[dict[str, Any]] = [
        {
            "labels": [
                {"label": labels[i], kind: round(s, 6)}
                for i, s in zip(
                    prediction.indices[row].tolist(), prediction.scores[row].tolist(), strict=True
                )
            ]
        }
        for row in range(len(features))
    ]
    if explain and hasattr(classifier, "explain"):
        for row, why in zip(rows, classifier.explain(features), strict=True):
            row["reasons"] = [{"text": r.text, "score": round(r.score, 6)} for r in why.reasons]
    return rows


@torch.no_grad()
def name_freely(system: CaSED, features: Tensor, *, top: int, explain: bool) -> list[dict[str, Any]]:
    """Returns, per picture, the best words and, where asked for, the captions they come from."""
    rows = []
    for p in system.predict(features):
        best = zip(p.words[:top], p.probabilities[:top], strict=True)
        row: dict[str, Any] = {"labels": [{"label": w, "probability": round(q, 6)} for w, q in best]}
        if explain:
            row["reasons"] = [{"text": text, "score": round(score, 6)} for text, score in p.captions[:5]]
        rows.append(row)
    return rows
