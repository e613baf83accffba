# SPDX-License-Identifier: Apache-2.0
"""Where descriptions of classes come from: the bundled emoji data, a JSON file, or a language model of the user's.

A source answers three questions, each used by one or more methods; nothing is downloaded and no model is called unless
the user builds the source that does so.
"""

from __future__ import annotations

import json
import os
import re
import urllib.request
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from vlmkernels._files import write_text_atomically
from vlmkernels.data import emoji

#: (kind of attribute, caption of the first class, caption of the second)
Difference = tuple[str, str, str]


class DescriptionSource(Protocol):
    """What a method asks about classes. Every answer may be empty."""

    def descriptors(self, name: str) -> list[str]:
        """Visible features of a class, as short phrases."""
        ...

    def differences(self, name: str, other: str) -> list[Difference]:
        """Captions of two classes that contrast in one attribute each."""
        ...

    def discriminate(self, names: Sequence[str]) -> list[list[str]]:
        """Phrases that tell each of the names from the others; repeated phrases weigh more."""
        ...


class EmojiDescriptions:
    """The default source: the Unicode keywords, group and subgroup of the bundled emoji.

    Names it does not know have no descriptors; a plural or a part of a longer name does not count as known.
    """

    def __init__(self) -> None:
        self._entries: dict[str, emoji.Emoji] = {}
        for entry in emoji.load().emojis:
            self._entries.setdefault(entry.name.lower(), entry)
            self._entries.setdefault(emoji.spoken_name(entry).lower(), entry)

    def _entry(self, name: str) -> emoji.Emoji | None:
        return self._entries.get(name.strip().lower())

    def descriptors(self, name: str) -> list[str]:
        """The keywords that the name does not contain already."""
        entry = self._entry(name)
        if entry is None:
            return []
        words = set(re.findall(r"[a-z]+", name.lower()))
        return [k for k in entry.keywords if not set(re.findall(r"[a-z]+", k.lower())) <= words]

    def differences(self, name: str, other: str) -> list[Difference]:
        """The keywords of each that the other lacks; their subgroups where those differ."""
        own, others = self._entry(name), self._entry(other)
        if own is None or others is None:
            return []
        mine, theirs = self.descriptors(name), self.descriptors(other)
        only_mine = [k for k in mine if k not in theirs]
        only_theirs = [k for k in theirs if k not in mine]
        found: list[Difference] = []
        if only_mine or only_theirs:
            # one caption with all words, as captions of the set read; a side without any keeps its name
            found.append(("keyword", _caption(name, only_mine), _caption(other, only_theirs)))
        if own.subgroup != others.subgroup:
            captions = (f"{n}, {emoji.spoken_group(e.subgroup)}" for n, e in ((name, own), (other, others)))
            found.append(("kind", *captions))  # type: ignore[arg-type]
        return found

    def discriminate(self, names: Sequence[str]) -> list[list[str]]:
        """Each name's descriptors that none of the others has."""
        return own_phrases([self.descriptors(n) for n in names])


def _caption(name: str, words: Sequence[str]) -> str:
    return f"{name}: {', '.join(words)}" if words else name


def own_phrases(phrases: Sequence[Sequence[str]]) -> list[list[str]]:
    """Drops from every list the phrases that another list has, too; repetitions within a list stay."""
    return [
        [p for p in mine if not any(p in theirs for j, theirs in enumerate(phrases) if j != i)]
        for i, mine in enumerate(phrases)
    ]


@lru_cache(maxsize=1)
def default_source() -> EmojiDescriptions:
    """Returns the bundled source, read once."""
    return EmojiDescriptions()


class LanguageModelDescriptions:
    """Asks a language model, and reads the bullets of its answers.

    The wording of the prompts is ours; the papers' own is given where a specification of them is public.

    Args:
        generate: a prompt to an answer; see `transformers_generator` and `endpoint_generator`.
        repetitions: how often `discriminate` asks (S3A: 3); phrases that come again weigh more.
    """

    def __init__(self, generate: Callable[[str], str], *, repetitions: int = 3) -> None:
        if repetitions < 1:
            raise ValueError(f"LanguageModelDescriptions: repetitions must be at least 1, got {repetitions}")
        self.generate = generate
        self.repetitions = repetitions

    def descriptors(self, name: str) -> list[str]:
        """Visible features, asked for after two worked examples."""
        return bullets(self.generate(_DESCRIPTOR_PROMPT.format(name=name)))

    def differences(self, name: str, other: str) -> list[Difference]:
        """Lines of the form `- attribute | caption of the first | caption of the second`; others are left out."""
        found = []
        for line in bullets(self.generate(_DIFFERENCE_PROMPT.format(name=name, other=other))):
            parts = [part.strip() for part in line.split("|")]
            if len(parts) == 3 and name.lower() in parts[1].lower() and other.lower() in parts[2].lower():
                found.append((parts[0], parts[1], parts[2]))
        return found

    def discriminate(self, names: Sequence[str]) -> list[list[str]]:
        """Phrases per name over all repetitions; those that name a rival or that two names share are dropped."""
        phrases: list[list[str]] = [[] for _ in names]
        rivals = {n.lower() for n in names}
        for _ in range(self.repetitions):
            for i, name in enumerate(names):
                others = ", ".join(n for n in names if n != name)
                answer = bullets(self.generate(_DISCRIMINATE_PROMPT.format(name=name, others=others)))
                phrases[i] += [p for p in answer if p.lower() not in rivals]
        return own_phrases(phrases)


_DESCRIPTOR_PROMPT = """Q: Which visible features identify a zebra in a photo?
A: A zebra can be recognised by:
- black and white stripes
- a short upright mane
- four legs with hooves
- a tufted tail

Q: Which visible features identify a bicycle in a photo?
A: A bicycle can be recognised by:
- two spoked wheels
- a frame of thin tubes
- handlebars
- pedals and a chain

Q: Which visible features identify a {name} in a photo?
A: A {name} can be recognised by:
"""
_DIFFERENCE_PROMPT = """Two classes of pictures are easily confused: "{name}" and "{other}".
List visible attributes in which they differ. One line per attribute, in the form
- attribute | caption of a picture of {name} | caption of a picture of {other}
Each caption contains its class's name.
"""
_DISCRIMINATE_PROMPT = """Name short visible phrases that fit a picture of "{name}" but none of: {others}.
One phrase per line, each beginning with a hyphen.
"""


def bullets(answer: str) -> list[str]:
    """Returns the items of a bulleted or numbered list, without their marks, in order."""
    found = []
    for line in answer.splitlines():
        match = re.match(r"\s*(?:[-*•]|\d+[.)])\s*(.+?)\s*$", line)
        if match:
            found.append(match.group(1).rstrip("."))
    return found


class CachedDescriptions:
    """Answers kept in a JSON file: those in the file are read, others asked of `source` and written.

    ```
    {"descriptors": {name: [...]}, "differences": {"name\\u001fother": [[...], ...]},
     "discriminate": {"name\\u001fother\\u001f...": [[...], ...]}}
    ```

    Args:
        path: the file; it need not exist.
        source: asked for what the file lacks; None: what it lacks is empty.
    """

    def __init__(self, path: str | os.PathLike[str], source: DescriptionSource | None = None) -> None:
        self.path = Path(path)
        self.source = source
        kinds = ("descriptors", "differences", "discriminate")
        self._kept: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
        if self.path.exists():
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if not isinstance(data, dict) or any(not isinstance(data.get(k, {}), dict) for k in kinds):
                raise ValueError(
                    f"CachedDescriptions: {self.path} holds no object with objects {list(kinds)}"
                )
            self._kept |= {kind: data.get(kind, {}) for kind in kinds}
        elif source is None:
            raise FileNotFoundError(f"CachedDescriptions: there is no file {self.path} and no source to ask")

    def _ask(self, kind: str, names: Sequence[str], answer: Callable[[DescriptionSource], Any]) -> Any:
        key = "\x1f".join(names)
        if key not in self._kept[kind] and self.source is not None:
            self._kept[kind][key] = answer(self.source)
            write_text_atomically(self.path, json.dumps(self._kept, indent=1, ensure_ascii=False))
        return self._kept[kind].get(key)

    def descriptors(self, name: str) -> list[str]:
        """As `DescriptionSource.descriptors`."""
        return list(self._ask("descriptors", [name], lambda s: s.descriptors(name)) or [])

    def differences(self, name: str, other: str) -> list[Difference]:
        """As `DescriptionSource.differences`; a pair stored the other way round is turned."""
        turned = self._kept["differences"].get(f"{other}\x1f{name}")
        if turned is not None:
            return [(kind, second, first) for kind, first, second in turned]
        found = self._ask("differences", [name, other], lambda s: s.differences(name, other)) or []
        return [(kind, first, second) for kind, first, second in found]

    def discriminate(self, names: Sequence[str]) -> list[list[str]]:
        """As `DescriptionSource.discriminate`."""
        found = self._ask("discriminate", names, lambda s: s.discriminate(names))
        return [list(p) for p in found] if found else [[] for _ in names]


def transformers_generator(model: Any, tokenizer: Any, *, max_new_tokens: int = 100) -> Callable[[str], str]:
    """Returns a `generate` for a causal language model of `transformers` that the user has loaded; greedy."""

    def generate(prompt: str) -> str:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return str(tokenizer.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    return generate


def endpoint_generator(
    url: str, model: str, *, key: str | None = None, timeout: float = 60.0
) -> Callable[[str], str]:
    """Returns a `generate` for an endpoint that speaks OpenAI's chat protocol; temperature 0.

    Args:
        url: the endpoint's base, such as "http://localhost:8000/v1".
        model: its name there.
        key: sent as a bearer token where given.
        timeout: seconds to wait for an answer.

    Raises:
        ValueError: The URL is not http or https.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"endpoint_generator: expected an http or https URL, got {url!r}")

    def generate(prompt: str) -> str:
        body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
        headers = {"Content-Type": "application/json"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return str(json.load(response)["choices"][0]["message"]["content"])

    return generate
