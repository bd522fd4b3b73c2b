"""Comparing two files byte by byte, in pieces."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from pathlib import Path

from skyspot.rehearsal.compare.difference import MISSING, Difference, excerpts

PIECE = 1 << 20
WINDOW = 4 * 64
"""Bytes to read on both sides of a difference: more characters than an excerpt shows, at 4 bytes each."""
_CONTINUATION = bytes(range(0x80, 0xC0))
"""The bytes of a UTF-8 character after its first."""


@dataclass(frozen=True)
class Spot:
    """The first byte at which two files differ. One of them may end there."""

    offset: int
    line: int
    """From 1."""
    line_start: int
    """The offset of the line's first byte."""


def first_difference(left: Path, right: Path) -> Spot | None:
    """Find the first byte at which two files differ; None if they are the same."""
    offset, line, line_start = 0, 1, 0
    with left.open("rb") as one, right.open("rb") as two:
        while True:
            before, after = one.read(PIECE), two.read(PIECE)
            same = before
            if before != after:
                pairs = enumerate(zip(before, after, strict=False))
                same = before[: next((n for n, (a, b) in pairs if a != b), min(len(before), len(after)))]
            elif not before:
                return None
            line += same.count(b"\n")
            last = same.rfind(b"\n")
            line_start = offset + last + 1 if last >= 0 else line_start
            offset += len(same)
            if before != after:
                return Spot(offset, line, line_start)


def describe(left: Path, right: Path, spot: Spot) -> Difference:
    """Show the difference: of texts the line around it, else the two bytes."""
    texts = _line(left, spot), _line(right, spot)
    if texts[0] is None or texts[1] is None:
        bytes_there = _byte(left, spot.offset), _byte(right, spot.offset)
        return Difference(f"byte {spot.offset}", *bytes_there, _sizes(left, right))
    ends = [path.stat().st_size == spot.offset for path in (left, right)]
    before, after = (
        (f"{excerpt} (end of file)" if text else "(end of file)") if ends_here else excerpt
        for text, excerpt, ends_here in zip(texts, excerpts(texts[0], texts[1]), ends, strict=True)
    )
    return Difference(f"line {spot.line}, column {_column(left, spot)}", before, after)


def _line(path: Path, spot: Spot) -> str | None:
    """The line around a spot, with its end; None if the file is no text."""
    start = max(spot.line_start, spot.offset - WINDOW)
    with path.open("rb") as file:
        head = file.read(1024)
        file.seek(start)
        before, after = file.read(spot.offset - start), file.read(WINDOW)
    if start > spot.line_start:
        before = before.lstrip(_CONTINUATION)
    first, newline, _ = after.partition(b"\n")
    try:
        _decoded(head)
        text = _decoded(before + first + newline)
    except UnicodeDecodeError:
        return None
    return None if b"\0" in head or "\0" in text else text


def _decoded(data: bytes) -> str:
    """Decode UTF-8 that may end within a character."""
    return codecs.getincrementaldecoder("utf-8")().decode(data)


def _column(path: Path, spot: Spot) -> int:
    """The column in characters, from 1."""
    column, left = 1, spot.offset - spot.line_start
    with path.open("rb") as file:
        file.seek(spot.line_start)
        while left > 0 and (data := file.read(min(PIECE, left))):
            column += len(data.translate(None, delete=_CONTINUATION))
            left -= len(data)
        following = file.read(1)
    # A difference within a character belongs to it.
    return column - 1 if following and following in _CONTINUATION else column


def _byte(path: Path, offset: int) -> str:
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(1)
    return f"0x{data.hex()}" if data else MISSING


def _sizes(left: Path, right: Path) -> str:
    sizes = [path.stat().st_size for path in (left, right)]
    return f"{sizes[0]} and {sizes[1]} bytes long" if sizes[0] != sizes[1] else ""
