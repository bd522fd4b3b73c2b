"""A difference between two results, shown so that one can see it."""

from __future__ import annotations

from dataclasses import dataclass

MISSING = "(missing)"
BEFORE, AFTER = 30, 40
"""Characters of an excerpt before and after the first one that differs."""


@dataclass(frozen=True)
class Sides:
    """Names of the two runs that are compared."""

    left: str = "undisturbed"
    right: str = "preempted"


@dataclass(frozen=True)
class Difference:
    """The first difference between two results. `left` and `right` are never the same text."""

    what: str
    """Where it is: a key, a tensor, a row and column, a line and column, a byte."""
    left: str
    right: str
    more: str = ""
    """How far it goes."""

    def text(self, sides: Sides) -> str:
        """Format the difference."""
        return (
            f"{self.what}: {self.left} {sides.left}, {self.right} {sides.right}{f' ({self.more})' if self.more else ''}"
        )


def excerpts(left: str, right: str, *, quoted: bool = True) -> tuple[str, str]:
    """Cut two texts around the first character that differs, and escape what cannot be seen.

    Args:
        left: A text.
        right: A text that differs from it.
        quoted: Whether to quote the excerpts. A text in JSON is quoted already.
    """
    at = next((n for n, (one, two) in enumerate(zip(left, right, strict=False)) if one != two), None)
    if at is None:
        at = min(len(left), len(right))
    # Characters outside ASCII can look alike.
    plain = left[at : at + 1].isascii() and right[at : at + 1].isascii()
    return _excerpt(left, at, plain, quoted), _excerpt(right, at, plain, quoted)


def _excerpt(text: str, at: int, plain: bool, quoted: bool) -> str:
    start = at - BEFORE if at > BEFORE + 10 else 0
    end = at + AFTER
    shown = "".join(_escaped(character, plain, quoted) for character in text[start:end])
    shown = f"'{shown}'" if quoted else shown
    return f"{'...' if start else ''}{shown}{'...' if end < len(text) else ''}"


def _escaped(character: str, plain: bool, quoted: bool) -> str:
    visible = character.isprintable() and (plain or character.isascii())
    if visible and not (quoted and character == "\\"):
        return character
    return character.encode("unicode_escape").decode()
