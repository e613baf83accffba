# SPDX-License-Identifier: Apache-2.0
"""CLIP's byte-level BPE tokenizer: OpenAI's vocabulary, or one trained from captions.

Scheme (Radford et al. 2021; Sennrich et al. 2016): clean and lower-case the text, split it into words, spell
each word in bytes, mark the last byte of a word by `</w>`, merge the pairs of lowest rank. The vocabulary is
the 256 byte symbols, the same with `</w>`, one entry per merge, then the start and the end token, which so
has the largest id.
"""

from __future__ import annotations

import gzip
import html
import importlib.util
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmkernels._files import write_text_atomically

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Tokenizer", "clean_text", "find_openai_merges", "tokenizer_for"]

START, END = "<|startoftext|>", "<|endoftext|>"
_END_OF_WORD = "</w>"
_FORMAT = "vlmkernels-tokenizer"
_OPENAI_VOCAB = 49408
_OPENAI_FILE = "bpe_simple_vocab_16e6.txt.gz"
_SPECIALS = re.compile(r"<\|(?:startoftext|endoftext)\|>")
_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"""
_SPECIALS_OR_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|" + _WORDS
_WHITE_SPACE = re.compile(r"\s+")


def _fix_table() -> dict[int, str]:
    """What ftfy does to single characters: quotes, ligatures, full-width forms, Windows-1252 controls."""
    table = dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc", "'") | dict.fromkeys(
        "\u201c\u201d\u201e\u201f", '"'
    )
    ligatures = [*range(0xFB00, 0xFB05), 0xFB06, 0x132, 0x133, *range(0x1C4, 0x1CD), 0x1F1, 0x1F2, 0x1F3]
    widths = [0x3000, *range(0xFF01, 0xFFF0)]
    table |= {chr(code): unicodedata.normalize("NFKC", chr(code)) for code in ligatures + widths}
    table["\u0149"] = "'n"
    for byte in range(0x80, 0xA0):
        fixed = bytes([byte]).decode("cp1252", errors="ignore")
        if fixed:
            table[chr(byte)] = table.get(fixed, fixed)
    return str.maketrans(table)


_FIXES = _fix_table()
_CONTROLS = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")


def _fix_text(text: str) -> str:
    """ftfy's text fixing; without ftfy, its rules for single characters."""
    try:
        import ftfy
    except ImportError:
        return unicodedata.normalize("NFC", _CONTROLS.sub("", text.translate(_FIXES)))
    return ftfy.fix_text(text)


def clean_text(text: str, *, fix_text: bool = True) -> str:
    """Cleans a caption as CLIP does: fixes unicode, unescapes HTML twice, collapses white space, lower-cases.

    Args:
        text: Any string.
        fix_text: Repair mis-decoded unicode with `ftfy`. Where ftfy is not installed, its rules for quotes,
            ligatures, full-width forms, control characters and composition still apply; only mis-decoded text
            stays as it is.

    Returns:
        The cleaned text.
    """
    if fix_text:
        text = _fix_text(text)
    text = html.unescape(html.unescape(text)).strip()
    return _WHITE_SPACE.sub(" ", text).strip().lower()


def _byte_alphabet() -> list[str]:
    """GPT-2's byte symbols in CLIP's order: 188 printable bytes, then the other 68 from code point 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _byte_decoder() -> dict[str, int]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return dict(zip(_byte_alphabet(), printable + others, strict=True))


def find_openai_merges() -> Path | None:
    """Returns the merges file inside an installed open_clip or clip package, without importing it."""
    for package in ("open_clip", "clip"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (Path(folder) / _OPENAI_FILE).is_file():
                return Path(folder) / _OPENAI_FILE
    return None


class Tokenizer:
    """Byte-level BPE in CLIP's scheme. Make one by `openai`, `train` or `load`.

    Args:
        merges: Pairs of symbols, best first.
        context_length: Default length of the rows that a call gives.
        fix_text: Whether cleaning repairs unicode (see `clean_text`).

    Raises:
        ValueError: If a merge joins symbols that are not in the vocabulary before it, or repeats one.

    Example:
        >>> import vlmkernels as vk
        >>> tokenizer = vk.data.Tokenizer.train(["a red heart", "a red car"], vocab_size=520)
        >>> tokenizer(["a red heart"], context_length=8).shape
        torch.Size([1, 8])
        >>> tokenizer.decode(tokenizer("a red heart"))
        ['a red heart']
    """

    def __init__(
        self, merges: Sequence[tuple[str, str]], *, context_length: int = 77, fix_text: bool = True
    ) -> None:
        from tokenizers import Regex, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend

        if context_length < 2:
            raise ValueError(f"Tokenizer: context_length must be at least 2, got {context_length}")
        self.merges = [(str(a), str(b)) for a, b in merges]
        self.context_length = context_length
        self.fix_text = fix_text
        symbols = _byte_alphabet()
        vocab = {
            symbol: i for i, symbol in enumerate(symbols + [symbol + _END_OF_WORD for symbol in symbols])
        }
        for a, b in self.merges:
            if a not in vocab or b not in vocab or a + b in vocab:
                raise ValueError(
                    f"Tokenizer: merge {(a, b)!r} joins unknown symbols or repeats an earlier one"
                )
            vocab[a + b] = len(vocab)
        self.start_id = len(vocab)
        self.end_id = len(vocab) + 1
        self._tokens = [*vocab, START, END]
        self._bytes = _byte_decoder()
        model = models.BPE(vocab=vocab, merges=self.merges, end_of_word_suffix=_END_OF_WORD)
        self._backend: tokenizers.Tokenizer = Backend(model)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

        def splitter(pattern: str) -> tokenizers.pre_tokenizers.PreTokenizer:
            return pre_tokenizers.Split(Regex(f"(?i:{pattern})"), behavior="removed", invert=True)

        self._backend.pre_tokenizer = pre_tokenizers.Sequence([splitter(_WORDS), byte_level])
        self._splitter_with_specials = splitter(_SPECIALS_OR_WORDS)

    @property
    def vocab_size(self) -> int:
        """Number of ids, the start and the end token included."""
        return len(self._tokens)

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, context_length={self.context_length})"

    @classmethod
    def openai(cls, path: str | os.PathLike[str] | None = None, *, context_length: int = 77) -> Tokenizer:
        """Reads OpenAI's vocabulary (49,408 ids) from its merges file.

        Args:
            path: `bpe_simple_vocab_16e6.txt.gz`, or transformers' `merges.txt`; None looks inside an
                installed open_clip or clip package. Nothing is downloaded.
            context_length: Default length of the rows that a call gives.

        Raises:
            FileNotFoundError: If there is no such file, or no package that carries it.
            ValueError: If the file holds fewer merges than the vocabulary needs.
        """
        found = find_openai_merges() if path is None else Path(path)
        if found is None or not found.is_file():
            where = (
                "no installed open_clip or clip package carries it"
                if found is None
                else f"no such file: {found}"
            )
            raise FileNotFoundError(
                f"Tokenizer.openai: OpenAI's merges file ({_OPENAI_FILE}) was not found: {where}; pass its "
                "path, or train a vocabulary of your own with Tokenizer.train(captions)"
            )
        raw = found.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
        # The first line names the version; the file holds far more merges than the vocabulary uses.
        needed = _OPENAI_VOCAB - 512 - 2
        pairs = [tuple(line.split()) for line in text.split("\n")[1 : needed + 1]]
        if len(pairs) != needed or any(len(pair) != 2 for pair in pairs):
            raise ValueError(
                f"Tokenizer.openai: {found} must hold a version line and {needed} merges, got fewer"
            )
        return cls(pairs, context_length=context_length)  # type: ignore[arg-type]

    @classmethod
    def train(
        cls,
        captions: Iterable[str],
        vocab_size: int = 4096,
        *,
        context_length: int = 77,
        min_frequency: int = 2,
        fix_text: bool = False,
    ) -> Tokenizer:
        """Learns a vocabulary from captions; the same captions in the same order give the same vocabulary.

        Args:
            captions: Texts; cleaned as in encoding.
            vocab_size: Most ids, the 512 byte symbols and the two special tokens included. Few captions may
                give fewer.
            context_length: Default length of the rows that a call gives.
            min_frequency: Pairs that occur less often are not merged.
            fix_text: Whether cleaning repairs unicode; off by default, so that ids never depend on ftfy being
                installed.

        Raises:
            ValueError: If vocab_size leaves no room for the byte symbols, or there is no caption.
        """
        from tokenizers import trainers

        if vocab_size < 514:
            raise ValueError(
                f"Tokenizer.train: vocab_size must be at least 514 (bytes and specials), got {vocab_size}"
            )
        texts = [clean_text(caption, fix_text=fix_text) for caption in captions]
        if not texts:
            raise ValueError("Tokenizer.train: captions must hold at least one text, got none")
        symbols = _byte_alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            min_frequency=min_frequency,
            show_progress=False,
            # Ties are broken by ids. Only special tokens have ids that do not depend on a random order of the
            # words.
            special_tokens=symbols + [symbol + _END_OF_WORD for symbol in symbols],
            end_of_word_suffix=_END_OF_WORD,
        )
        backend = cls([])._backend
        backend.train_from_iterator(texts, trainer)
        return cls(
            _read_merges(json.loads(backend.to_str()))[: vocab_size - 514],
            context_length=context_length,
            fix_text=fix_text,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the tokenizer as JSON, atomically."""
        write_text_atomically(path, json.dumps(self.to_dict(), ensure_ascii=False))

    def to_dict(self) -> dict[str, Any]:
        """Returns what `save` writes."""
        return {
            "format": _FORMAT,
            "version": 1,
            "context_length": self.context_length,
            "fix_text": self.fix_text,
            "merges": [f"{a} {b}" for a, b in self.merges],
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Reads what `save` wrote, or the `tokenizer.json` of a transformers CLIP.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is neither.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"Tokenizer.load: {path} is no valid JSON: {error}") from error
        return cls.from_dict(content)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Tokenizer:
        """Builds a tokenizer from the contents of a file (see `load`).

        Raises:
            ValueError: If the contents are no tokenizer of this scheme.
        """
        if isinstance(content, dict) and content.get("format") == _FORMAT:
            merges = [tuple(merge.split(" ")) for merge in content["merges"]]
            return cls(merges, context_length=content["context_length"], fix_text=content["fix_text"])
        if (
            not isinstance(content, dict)
            or content.get("model", {}).get("end_of_word_suffix") != _END_OF_WORD
        ):
            raise ValueError(
                "Tokenizer.load: expected a file of Tokenizer.save, or the tokenizer.json of a CLIP"
            )
        tokenizer = cls(_read_merges(content))
        vocab = content["model"]["vocab"]
        if any(vocab.get(token) != i for i, token in enumerate(tokenizer._tokens)):
            raise ValueError("Tokenizer.load: the file orders its vocabulary in another way than CLIP does")
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Returns the ids of one text, without start and end token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, without start and end tokens."""
        cleaned = [clean_text(text, fix_text=self.fix_text) for text in texts]
        encodings = self._backend.encode_batch(cleaned, add_special_tokens=False)
        return [
            self._encode_with_specials(text) if _SPECIALS.search(text) else encoding.ids
            for text, encoding in zip(cleaned, encodings, strict=True)
        ]

    def _encode_with_specials(self, text: str) -> list[int]:
        """As OpenAI's code: special tokens spelled out in a text become their ids, where a word may start."""
        ids: list[int] = []
        for word, _ in self._splitter_with_specials.pre_tokenize_str(text):
            if word in (START, END):
                ids.append(self.start_id if word == START else self.end_id)
            else:
                ids.extend(self._backend.encode(word, add_special_tokens=False).ids)
        return ids

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Encodes texts for a model: start, ids, end, zeros; too long texts are cut and keep the end token.

        Args:
            texts: One text or several.
            context_length: Length L of the rows; None = the tokenizer's own.

        Returns:
            int64 `[B, L]`.

        Raises:
            TypeError: If texts is neither a string nor a sequence of strings.
            ValueError: If context_length is less than 2.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"Tokenizer: texts must be strings, got {type(text).__name__}")
        length = self.context_length if context_length is None else context_length
        if length < 2:
            raise ValueError(f"Tokenizer: context_length must be at least 2, got {length}")
        rows = torch.zeros(len(texts), length, dtype=torch.int64)
        for row, ids in zip(rows, self.encode_batch(texts), strict=True):
            ids = [self.start_id, *ids[: length - 2], self.end_id]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def decode(self, ids: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> str | list[str]:
        """Turns ids back into (cleaned) text; what follows the first end token is padding and is left out.

        Args:
            ids: One row, or `[B, L]`.

        Returns:
            A string for one row, a list of strings for several.

        Raises:
            ValueError: If an id is outside of the vocabulary.
        """
        rows = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if rows and not isinstance(rows[0], int):
            return [self._decode_row(list(row)) for row in rows]  # type: ignore[arg-type]
        return self._decode_row(rows)  # type: ignore[arg-type]

    def _decode_row(self, ids: list[int]) -> str:
        raw = bytearray()
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"Tokenizer.decode: ids must be in [0, {self.vocab_size}), got {i}")
            if i == self.end_id:
                break
            if i == self.start_id:
                continue
            token = self._tokens[i]
            raw.extend(self._bytes[symbol] for symbol in token.removesuffix(_END_OF_WORD))
            if token.endswith(_END_OF_WORD):
                raw.append(ord(" "))
        return raw.decode("utf-8", errors="replace").rstrip(" ")


def _read_merges(content: dict[str, Any]) -> list[tuple[str, str]]:
    # Versions of the tokenizers library write a merge as "a b" or as ["a", "b"].
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in content["model"]["merges"])
    return [(a, b) for a, b in merges]


def tokenizer_for(model: nn.Module) -> Tokenizer:
    """Returns the tokenizer that belongs to a model: the one saved with it, or OpenAI's for its 49,408 ids.

    Args:
        model: A model of `vk.models` with a text tower.

    Returns:
        A tokenizer whose default context length is the model's.

    Raises:
        TypeError: If the model has no text tower's configuration.
        ValueError: If the model came without a tokenizer and its vocabulary is not OpenAI's, or the sizes
            differ.
        FileNotFoundError: If OpenAI's merges file is needed and not installed.
    """
    text = getattr(getattr(model, "config", None), "text", None)
    if text is None:
        raise TypeError(f"tokenizer_for: expected a model with config.text, got {type(model).__name__}")
    state = getattr(model, "tokenizer_state", None)
    if state is not None:
        tokenizer = Tokenizer.from_dict(state)
    elif text.vocab_size == _OPENAI_VOCAB:
        tokenizer = Tokenizer.openai()
    else:
        raise ValueError(
            f"tokenizer_for: the model has a vocabulary of its own ({text.vocab_size} ids) and no tokenizer "
            "came with its weights; use the one it was trained with, or Tokenizer.train(captions)"
        )
    if tokenizer.vocab_size != text.vocab_size:
        raise ValueError(
            f"tokenizer_for: the tokenizer has {tokenizer.vocab_size} ids, the model's vocabulary "
            f"{text.vocab_size}"
        )
    tokenizer.context_length = text.context_length
    return tokenizer
