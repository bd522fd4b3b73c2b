"""Token ids of documents of any length, window by window.

A document that fits into one window is tokenized at once. A longer document is tokenized in overlapping windows. Two
windows are joined at a token in the overlap where both have the same tokens on both sides: text beyond the edges does
not influence tokens there, so the result is that of the whole document. The cut shows in the tokens only if an overlap
has no such place (a word of thousands of characters may have none).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np

WINDOW = 1 << 16
"""Characters; a tokenizer takes some 170 bytes of memory for each."""
OVERLAP = 1 << 12
AGREE = 8
"""The number of tokens that must be the same on both sides of a join."""
BYTE_VOCAB = 257
END_OF_DOCUMENT = 256
_LINE = re.compile(r"(?<=\S\n)(?=\S)")


class Encoder(Protocol):
    """Converts documents into token ids."""

    vocab_size: int
    """Greater than every id."""
    end: int
    """The id that ends a document."""

    def ids(self, document: Iterable[str]) -> Iterator[np.ndarray]:
        """The token ids of a document, given and returned in pieces."""


class Bytes:
    """UTF-8 bytes as tokens, for the tiny model."""

    vocab_size, end = BYTE_VOCAB, END_OF_DOCUMENT

    def ids(self, document: Iterable[str]) -> Iterator[np.ndarray]:
        """The bytes of a document."""
        for piece in document:
            yield np.frombuffer(piece.encode("utf-8", "replace"), np.uint8)


class Pretrained:
    """A tokenizer of transformers."""

    def __init__(self, tokenizer: Any, end: int) -> None:
        self._tokenizer, self.end = tokenizer, end
        # Vocabularies may have gaps, so an id may exceed the number of tokens.
        highest = max(tokenizer.get_vocab().values(), default=0)
        self.vocab_size = max(len(tokenizer), highest + 1, end + 1)

    def ids(self, document: Iterable[str]) -> Iterator[np.ndarray]:
        """The token ids of a document."""
        pieces = map(_without_surrogates, document)
        if self._tokenizer.is_fast:
            return in_windows(self._tokens, pieces)
        return (self._ids_alone(text) for text in in_lines(pieces))

    def _tokens(self, text: str) -> Tokenized:
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        places = np.asarray(found["offset_mapping"], np.int64).reshape(-1, 2)
        return Tokenized(np.asarray(found["input_ids"], np.int64), places[:, 0], places[:, 1])

    def _ids_alone(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)


def _without_surrogates(text: str) -> str:
    """The text with "?" for halves of surrogate pairs, which JSON may contain and tokenizers refuse."""
    return text.encode("utf-8", "replace").decode("utf-8")


@dataclass(frozen=True)
class Tokenized:
    """A window's tokens: their ids, and their first and last characters in the window."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def since(self, token: int) -> Tokenized:
        """The tokens from `token` on, in a window that begins there."""
        at = self.starts[token]
        return Tokenized(self.ids[token:], self.starts[token:] - at, self.ends[token:] - at)

    def borders(self) -> dict[int, int]:
        """The places between tokens that do not overlap: {character: number of the token that starts there}."""
        clean = np.flatnonzero(self.starts[1:] >= self.ends[:-1]) + 1
        return dict(zip(self.starts[clean].tolist(), clean.tolist(), strict=True))


def in_windows(
    tokenize: Callable[[str], Tokenized], pieces: Iterable[str], window: int = WINDOW, overlap: int = OVERLAP
) -> Iterator[np.ndarray]:
    """Tokenize a document of any length in windows of about `window` characters."""
    text, before = "", None
    for piece in chain(_at_most(pieces, window), [None]):
        text += piece or ""
        if piece is not None and len(text) < window + overlap:
            continue
        tokens, first = tokenize(text), 0
        if before is not None:
            given, first = _join(before, tokens, overlap)
            yield before.ids[:given]
        if piece is None:
            yield tokens.ids[first:]
            return
        cut = int(np.searchsorted(tokens.starts, len(text) - overlap))
        if cut >= len(tokens.ids):  # No token begins in the overlap.
            yield tokens.ids[first:]
            text, before = "", None
            continue
        cut = max(cut, first)
        yield tokens.ids[first:cut]
        text, before = text[tokens.starts[cut] :], tokens.since(cut)


def _at_most(pieces: Iterable[str], length: int) -> Iterator[str]:
    for piece in pieces:
        for start in range(0, len(piece), length):
            yield piece[start : start + length]


def _join(before: Tokenized, after: Tokenized, overlap: int) -> tuple[int, int]:
    """The join of two windows: the number of tokens to use of the first, and the first token to use of the second."""
    one, other = before.borders(), after.borders()
    middle = overlap // 2
    for agree in (AGREE, 1):
        for place in sorted(one.keys() & other.keys(), key=lambda at: abs(at - middle)):
            i, j = one[place], other[place]
            if agree <= min(i, j) and all(
                np.array_equal(mine[i - agree : i + agree], theirs[j - agree : j + agree])
                for mine, theirs in ((before.ids, after.ids), (before.starts, after.starts))
            ):
                return i, j
    given = int(np.searchsorted(before.starts, middle))
    at = before.ends[given - 1] if given else 0
    return given, int(np.searchsorted(after.starts, at))


def in_lines(pieces: Iterable[str], window: int = WINDOW) -> Iterator[str]:
    """Split a document into windows that end with a line if possible: for tokenizers without character offsets.

    Hardly any tokenizer makes a token across a line end between two characters that are not spaces.
    """
    text = ""
    for piece in chain(_at_most(pieces, window), [None]):
        text += piece or ""
        if piece is None:
            if text:
                yield text
            return
        if len(text) >= 2 * window:
            cuts = [found.start() for found in _LINE.finditer(text, window)]
            cut = cuts[-1] if cuts else text.rfind(" ", window)
            cut = cut if cut > 0 else len(text)
            yield text[:cut]
            text = text[cut:]
