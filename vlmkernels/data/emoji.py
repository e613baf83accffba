# SPDX-License-Identifier: Apache-2.0
"""The bundled emoji set: some 3,900 emoji with names, keywords and groups, in up to three drawing styles.

The pictures lie in ``bundled/emoji`` (64 x 64 px, with transparency); ``ATTRIBUTION.md`` there says who drew
them and under which licences they are. ``bundled/build_emoji.py`` makes that folder.

Three fixed splits, none of which depends on random state:

* ``"train"``: the styles in ``TRAIN_STYLES``, without the held-out concepts.
* ``"test_style"``: the same concepts in ``HELD_OUT_STYLE``, which no training picture has (distribution
  shift). With ``base_only=True`` these are the classes of the zero-shot test, one per name.
* ``"held_out_concepts"``: about one concept in ten of every subgroup, in all styles, for classifying groups
  and subgroups of things never seen. A concept goes as a family: all its skin tones, genders and directions.

Flags are kept as a group of their own. Some names share one picture, so that no classifier of names can pass
98%: territories that fly their country's flag, families (Twemoji and Noto have one silhouette for many), and
occupations that OpenMoji draws alike for person and man.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import EllipsisType

import torch
import torch.nn.functional as F

STYLES = ("noto", "openmoji", "twemoji")
TRAIN_STYLES = ("noto", "openmoji")
HELD_OUT_STYLE = "twemoji"
SPLITS = ("train", "test_style", "held_out_concepts")

NAME_TEMPLATES = (
    "{}",
    "an emoji of {}",
    "a picture of {}",
    "an icon of {}",
    "a drawing of {}",
    "a small picture showing {}",
    "the {} emoji",
)
GROUP_TEMPLATES = (
    "{}",
    "an emoji about {}",
    "a picture from the group {}",
    "an emoji of the kind {}",
)

_KEYWORD_TEMPLATES = (
    "{name}: {keywords}",
    "{keywords}: {name}",
    "an emoji of {name}, {keywords}",
    "{keywords}",
)
_TOPIC_TEMPLATES = (
    "{name}, {topic}",
    "an emoji of {name}, of the kind {topic}",
    "an emoji about {topic}: {name}",
)
_KEYWORDS_PER_CAPTION = 3

_FOLDER = Path(__file__).parent / "bundled" / "emoji"
_PEOPLE = {"man", "woman", "person", "boy", "girl", "child", "adult"}


@dataclass(frozen=True)
class Emoji:
    """One emoji, as Unicode describes it.

    Attributes:
        index: its place in ``EmojiSet.emojis``, which is Unicode's order.
        char: the character sequence itself.
        name: the English CLDR short name, for instance ``"waving hand: light skin tone"``; unique.
        keywords: CLDR keywords; a skin-tone variant has those of its base.
        group: Unicode group, for instance ``"Animals & Nature"``.
        subgroup: Unicode subgroup, for instance ``"animal-mammal"``.
        skin_tone: None, ``"light"``, ``"medium-light"``, ``"medium"``, ``"medium-dark"`` or ``"dark"``; two
            people of different tones have both, ``"light+dark"``.
        gender: None where the concept has no gender variants; else ``"person"``, ``"man"``, ``"woman"``,
            ``"child"``, ``"boy"``, ``"girl"``, or ``"man+woman"`` for a couple. Families are described by
            their adults.
        base: index of the entry without skin tone; its own index for such an entry.
        styles: the loaded styles that draw it.
        family: index of the first entry of its concept family: one concept's tones, genders and directions.
        held_out: whether its family is kept from training.
        version: the Unicode emoji version that introduced it.
    """

    index: int
    char: str
    name: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str
    skin_tone: str | None
    gender: str | None
    base: int
    styles: tuple[str, ...]
    family: int = -1
    held_out: bool = False
    version: float = 0.0

    @property
    def code_points(self) -> tuple[int, ...]:
        """The code points of ``char``."""
        return tuple(ord(c) for c in self.char)


@lru_cache(maxsize=1)
def _metadata() -> dict:
    return json.loads((_FOLDER / "metadata.json").read_text(encoding="ascii"))


def _known(what: str, value: str, allowed: Iterable[str]) -> str:
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"emoji: unknown {what} {value!r}; known are {', '.join(map(repr, allowed))}")
    return value


def _as_tuple(value: str | Iterable[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def load(styles: str | Sequence[str] = STYLES) -> EmojiSet:
    """Opens the bundled set.

    Args:
        styles: the drawing styles wanted, some of ``STYLES``.

    Returns:
        The set. Its pictures are decoded when first asked for, style by style, and kept.

    Raises:
        ValueError: a style is unknown.

    Example:
        >>> emojis = load()
        >>> pairs = emojis.select(split="train", group="Animals & Nature", base_only=True)
        >>> emojis.images(pairs[:8]).shape
        torch.Size([8, 3, 64, 64])
    """
    return EmojiSet(styles)


class EmojiSet:
    """The emoji, and their pictures in the loaded styles. See `load`.

    Attributes:
        emojis: all entries, in Unicode order; ``emojis[i].index == i``.
        styles: the loaded styles, in the order of ``STYLES``.
    """

    def __init__(self, styles: str | Sequence[str] = STYLES) -> None:
        wanted = [_known("style", s, STYLES) for s in _as_tuple(styles)]
        if not wanted:
            raise ValueError(f"emoji: no style asked for; known are {', '.join(map(repr, STYLES))}")
        self.styles: tuple[str, ...] = tuple(s for s in STYLES if s in wanted)
        self.emojis: list[Emoji] = []
        self._cells: list[dict[str, int]] = []
        self._atlases: dict[str, torch.Tensor] = {}
        self._trained: list[bool] = []
        self._read()

    def _read(self) -> None:
        data = _metadata()
        position = {column: i for i, column in enumerate(data["columns"])}
        rows = data["emojis"]
        for index, row in enumerate(rows):
            value = {column: row[i] for column, i in position.items()}
            cells = {s: cell for s, cell in zip(data["styles"], value.pop("cells"), strict=True) if cell >= 0}
            keywords = value.pop("keywords")
            if keywords is None:
                keywords = rows[value["base"]][position["keywords"]]
            value["held_out"] = bool(value["held_out"])
            drawn = tuple(s for s in self.styles if s in cells)
            self.emojis.append(Emoji(index=index, keywords=tuple(keywords), styles=drawn, **value))
            self._cells.append(cells)
            self._trained.append(not value["held_out"] and any(s in cells for s in TRAIN_STYLES))

    def __len__(self) -> int:
        return len(self.emojis)

    def __repr__(self) -> str:
        return f"EmojiSet({len(self)} emoji, styles {', '.join(self.styles)})"

    def __getstate__(self) -> dict:
        """Leaves the decoded pictures out, so that worker processes decode what they need."""
        return {**self.__dict__, "_atlases": {}}

    @property
    def groups(self) -> tuple[str, ...]:
        """The Unicode groups, in order."""
        return tuple(dict.fromkeys(e.group for e in self.emojis))

    @property
    def subgroups(self) -> tuple[str, ...]:
        """The Unicode subgroups, in order."""
        return tuple(dict.fromkeys(e.subgroup for e in self.emojis))

    def select(
        self,
        *,
        split: str | None = None,
        styles: str | Sequence[str] | None = None,
        group: str | None = None,
        subgroup: str | None = None,
        skin_tone: str | EllipsisType | None = ...,
        gender: str | EllipsisType | None = ...,
        base_only: bool = False,
    ) -> list[tuple[int, str]]:
        """Lists pictures as (emoji index, style) pairs, sorted by index and then in the order of ``STYLES``.

        Args:
            split: None for everything, or one of ``SPLITS`` (see the top of this file).
            styles: only these styles; they narrow the split and do not widen it.
            group: only this Unicode group.
            subgroup: only this Unicode subgroup.
            skin_tone: only this skin tone; None selects the entries without one. Left out: any.
            gender: only this gender; None selects the entries without one. Left out: any.
            base_only: only entries without skin tone. Their names are the classes of the name test.

        Raises:
            ValueError: a split, style, group, subgroup, skin tone or gender is unknown, or a style absent.
        """
        if split is not None:
            _known("split", split, SPLITS)
        if group is not None:
            _known("group", group, self.groups)
        if subgroup is not None:
            _known("subgroup", subgroup, self.subgroups)
        if isinstance(skin_tone, str):
            _known("skin tone", skin_tone, sorted({e.skin_tone for e in self.emojis if e.skin_tone}))
        if isinstance(gender, str):
            _known("gender", gender, sorted({e.gender for e in self.emojis if e.gender}))
        chosen = self._split_styles(split, self.styles if styles is None else _as_tuple(styles))
        admitted = self._split_filter(split)

        pairs: list[tuple[int, str]] = []
        for e in self.emojis:
            if group not in (None, e.group) or subgroup not in (None, e.subgroup):
                continue
            if skin_tone not in (..., e.skin_tone) or gender not in (..., e.gender):
                continue
            if (base_only and e.base != e.index) or not admitted(e):
                continue
            pairs.extend((e.index, style) for style in e.styles if style in chosen)
        return pairs

    def _split_styles(self, split: str | None, styles: tuple[str, ...]) -> set[str]:
        chosen = {self._loaded(style) for style in styles}
        if split == "train":
            chosen &= set(TRAIN_STYLES)
        elif split == "test_style":
            chosen &= {HELD_OUT_STYLE}
        return chosen

    def _split_filter(self, split: str | None) -> Callable[[Emoji], bool]:
        if split == "held_out_concepts":
            return lambda e: e.held_out
        if split is None:
            return lambda e: True
        return lambda e: self._trained[e.index]

    def _loaded(self, style: str) -> str:
        _known("style", style, STYLES)
        if style not in self.styles:
            raise ValueError(
                f"emoji: style {style!r} is not loaded; loaded are {', '.join(map(repr, self.styles))}"
            )
        return style

    def _atlas(self, style: str) -> torch.Tensor:
        """Decodes a style, once, to [pictures, 4, cell, cell] uint8: straight (not premultiplied) RGBA."""
        atlas = self._atlases.get(style)
        if atlas is None:
            import numpy as np
            from PIL import Image

            with Image.open(_FOLDER / f"{style}.webp") as picture:
                pixels = torch.from_numpy(np.array(picture.convert("RGBA")))
            cell = _metadata()["cell"]
            rows, columns = pixels.shape[0] // cell, pixels.shape[1] // cell
            grid = pixels.view(rows, cell, columns, cell, 4).permute(0, 2, 4, 1, 3)
            atlas = self._atlases[style] = grid.reshape(rows * columns, 4, cell, cell)
        return atlas

    def _cell(self, index: int, style: str) -> int:
        self._loaded(style)
        if not 0 <= index < len(self.emojis):
            raise ValueError(f"emoji: index {index} is outside 0 to {len(self.emojis) - 1}")
        cell = self._cells[index].get(style)
        if cell is None:
            e = self.emojis[index]
            raise ValueError(f"emoji: {style} has no picture of {e.name!r}; styles that have one: {e.styles}")
        return cell

    def rgba(self, pairs: Sequence[tuple[int, str]]) -> torch.Tensor:
        """Returns pictures as they are stored, [N, 4, 64, 64] uint8: straight (not premultiplied) RGBA."""
        cell = _metadata()["cell"]
        out = torch.empty(len(pairs), 4, cell, cell, dtype=torch.uint8)
        cells = [self._cell(index, style) for index, style in pairs]
        for style in dict.fromkeys(style for _, style in pairs):
            rows = torch.tensor([i for i, (_, s) in enumerate(pairs) if s == style])
            out[rows] = self._atlas(style)[torch.tensor([cells[i] for i in rows.tolist()])]
        return out

    def alpha(self, index: int, style: str) -> torch.Tensor:
        """Returns how opaque a picture is, [1, 64, 64] uint8: 255 on the emoji, 0 on the background."""
        return self.rgba([(index, style)])[0, 3:]

    def image(
        self,
        index: int,
        style: str,
        *,
        size: int | None = None,
        background: Sequence[int] | torch.Tensor = (255, 255, 255),
    ) -> torch.Tensor:
        """Returns one picture, [3, S, S] uint8. See `images`."""
        return self.images([(index, style)], size=size, background=background)[0]

    def images(
        self,
        pairs: Sequence[tuple[int, str]],  # N of (emoji index, style)
        *,
        size: int | None = None,
        background: Sequence[int] | torch.Tensor = (255, 255, 255),
    ) -> torch.Tensor:
        """Returns pictures on a plain background.

        Args:
            pairs: what `select` returns, or part of it.
            size: S, the side in pixels; the default is the stored 64. Other sizes are resampled (bicubic,
                antialiased).
            background: red, green and blue from 0 to 255; or a tensor [N, 3] with one colour per picture. On
                dark ones OpenMoji's black outlines and some black symbols of every style do not show.

        Returns:
            [N, 3, S, S] uint8.

        Raises:
            ValueError: a style is unknown, not loaded or has no such picture, an index is out of range, or
                size or background make no sense.
        """
        if size is not None and size < 1:
            raise ValueError(f"emoji: size must be at least 1, got {size}")
        colour = torch.as_tensor(background, dtype=torch.float32)
        if colour.shape not in ((3,), (len(pairs), 3)):
            raise ValueError(f"emoji: background must have shape [3] or [N, 3], got {list(colour.shape)}")
        if colour.numel() and not 0 <= colour.min() <= colour.max() <= 255:
            raise ValueError("emoji: background must lie between 0 and 255")

        pixels = self.rgba(pairs).float()
        alpha = pixels[:, 3:] / 255
        mixed = torch.lerp(colour.reshape(-1, 3, 1, 1), pixels[:, :3], alpha)
        if size is not None and size != mixed.shape[-1] and len(pairs):
            mixed = F.interpolate(
                mixed, size=(size, size), mode="bicubic", antialias=True, align_corners=False
            )
        elif size is not None:
            mixed = mixed[..., :size, :size] if len(pairs) else mixed.new_empty(0, 3, size, size)
        return mixed.round().clamp(0, 255).to(torch.uint8)


def splits() -> dict[str, list[tuple[int, str]]]:
    """Returns the three fixed splits, by name, with all skin tones and genders."""
    emojis = load()
    return {name: emojis.select(split=name) for name in SPLITS}


def spoken_name(emoji: Emoji) -> str:
    """Turns a CLDR name into words that fit into a sentence.

    >>> flag = next(e for e in load().emojis if e.name == "flag: Japan")
    >>> spoken_name(flag)
    'flag of Japan'
    """
    head, colon, rest = emoji.name.partition(": ")
    if not colon:
        return emoji.name
    if head == "flag":
        return f"flag of {rest}"
    if head == "keycap":
        return f"keycap {rest}"
    details = rest.split(", ")
    people = [f"a {d}".replace("a adult", "an adult") for d in details if d in _PEOPLE]
    features = [d for d in details if d not in _PEOPLE and d != "facing right"]
    text = f"{head} facing right" if "facing right" in details else head
    if people:
        text += " of " + _enumerate(people)
    if features:
        text += " with " + _enumerate(features)
    return text


def spoken_group(name: str) -> str:
    """Turns a group's or subgroup's name into plain words: ``"Food & Drink"`` into ``"food and drink"``."""
    return name.lower().replace("&", "and").replace("-", " ")


def _enumerate(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def captions(emoji: Emoji) -> list[str]:
    """Lists an emoji's captions: its name, keywords, group and subgroup in every template, in a fixed order.

    Keywords are taken three at a time. `random_caption` draws from the same templates, with any keywords.
    """
    name = spoken_name(emoji)
    found = [t.format(name) for t in NAME_TEMPLATES]
    step = _KEYWORDS_PER_CAPTION
    chunks = [emoji.keywords[i : i + step] for i in range(0, len(emoji.keywords), step)]
    found += [t.format(name=name, keywords=", ".join(c)) for t in _KEYWORD_TEMPLATES for c in chunks]
    topics = [spoken_group(emoji.subgroup), spoken_group(emoji.group)]
    found += [t.format(name=name, topic=topic) for t in _TOPIC_TEMPLATES for topic in topics]
    return list(dict.fromkeys(found))


def random_caption(emoji: Emoji, generator: torch.Generator) -> str:
    """Draws one caption: the name (two in five), keywords (two in five), or the name and group (one in five).

    Args:
        emoji: what to describe.
        generator: a CPU generator; the same state gives the same caption.
    """

    def draw(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    name, kind = spoken_name(emoji), draw(5)
    if kind == 4:
        topic = spoken_group(emoji.subgroup if draw(2) else emoji.group)
        return _TOPIC_TEMPLATES[draw(len(_TOPIC_TEMPLATES))].format(name=name, topic=topic)
    if kind < 2 or not emoji.keywords:
        return NAME_TEMPLATES[draw(len(NAME_TEMPLATES))].format(name)
    count = 1 + draw(min(_KEYWORDS_PER_CAPTION, len(emoji.keywords)))
    order = torch.randperm(len(emoji.keywords), generator=generator)[:count].tolist()
    words = ", ".join(emoji.keywords[i] for i in order)
    return _KEYWORD_TEMPLATES[draw(len(_KEYWORD_TEMPLATES))].format(name=name, keywords=words)
