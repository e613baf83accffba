# SPDX-License-Identifier: Apache-2.0
"""Candidate words of captions, as CaSED mines them: a fixed sequence of text filters and a part-of-speech test."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

#: Says of each word whether it may name something.
Tagger = Callable[[Sequence[str]], list[bool]]

_KEEP_ENDINGS = ("ss", "us", "is", "ies", "oes")
_MEDIUM = "image photo picture thumbnail logo symbol clipart portrait painting illustration icon profile"
_FUNCTION = """about above across after again against all also although always among and another any are around because
been before behind being below beneath beside between beyond both but can cannot could did does doing down during each
either else ever every few for from had has have having her here hers herself him himself his how however into its
itself just least less like many may maybe might more most much must near neither never nor not now off often once one
only onto other our ours out over own per perhaps please quite rather really same shall she should since some still such
than that the their theirs them then there these they this those though through thus too toward towards two under until
unto upon very was were what when where whether which while who whom whose why will with within without would yet you
your yours three four five six seven eight nine ten"""
_MEDIUM_WORDS = frozenset(_MEDIUM.split())
_FUNCTION_WORDS = frozenset(_FUNCTION.split())


def closed_class_tagger(words: Sequence[str]) -> list[bool]:
    """Keeps what is neither a function word nor an adverb in -ly: a stand-in for a tagger, of no dependency.

    The paper keeps nouns, adjectives, gerunds and past participles; finite verbs, rare in captions, pass here.
    """
    return [w not in _FUNCTION_WORDS and not (w.endswith("ly") and len(w) > 5) for w in words]


def nltk_tagger(words: Sequence[str]) -> list[bool]:
    """Keeps nouns, adjectives, gerunds and past participles, as the paper does; needs `nltk` and its tagger's data."""
    import nltk  # type: ignore[import-not-found]  # installed by whoever wants it

    allowed = ("NN", "JJ", "VBG", "VBN")
    return [tag.startswith(allowed) for _, tag in nltk.pos_tag(list(words))]


def singular(word: str) -> str:
    """Turns a plural in -s into its singular; words in -ss, -us, -is, -ies and -oes stay as they are."""
    if not word.endswith("s") or word.endswith(_KEEP_ENDINGS):
        return word
    return word[:-2] if word.endswith(("xes", "ches", "shes", "zes")) else word[:-1]


def candidate_words(
    captions: Sequence[str], *, tagger: Tagger = closed_class_tagger, least: int = 2, fallback: str = "object"
) -> list[str]:
    """Returns the words that captions may be about, each once, in order of appearance.

    All captions are joined first, so that a word twice in one caption counts as two. Then, in this order: <tokens>, web
    addresses, special characters (not - . ' &) and file extensions go (".word" counts as one), - and _ become spaces,
    words of fewer than three characters and other than letters go, the rest is lower-cased and made singular, words for
    the medium (photo, icon, ...) go; words that occur at least `least` times stay, or the most frequent where none
    does; the tagger decides last.

    Args:
        captions: texts.
        tagger: see `Tagger`.
        least: the count a word needs.
        fallback: the only candidate where nothing is left.
    """
    text = " ".join(captions)
    text = re.sub(r"<[^>]*>", " ", text)
    text = re.sub(r"https?://\S+|www\.\S+", " ", text)
    text = re.sub(r"[^\w\s\-.'&]", " ", text)
    text = re.sub(r"\.\w+", " ", text)
    text = re.sub(r"[-_]", " ", text)
    words = [w for w in text.split() if len(w) >= 3]
    words = [re.sub(r"[^A-Za-z]", "", w).lower() for w in words]
    words = [singular(w) for w in words if w]
    words = [w for w in words if w not in _MEDIUM_WORDS]
    counts = Counter(words)
    if not counts:
        return [fallback]
    needed = least if max(counts.values()) >= least else max(counts.values())
    frequent = [w for w, n in counts.items() if n >= needed]
    kept = [w for w, keep in zip(frequent, tagger(frequent), strict=True) if keep]
    return kept or [fallback]
