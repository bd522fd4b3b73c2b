"""The rules of a comparison, and what it found besides differences."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from skyspot.errors import SkyspotError

Key = str | int
"""A key of an object, or an index of a list."""


class FormatError(SkyspotError):
    """A file cannot be read in the format that its name promises."""


@dataclass(frozen=True)
class Pattern:
    """A glob of result files."""

    glob: str
    """Relative to the bucket."""
    mount: str | None = None
    """The mount point of its bucket; None: the bucket of the run."""


@dataclass(frozen=True)
class Comparison:
    """The files to compare, and the rules by which they are equal. The default is byte for byte."""

    patterns: tuple[Pattern, ...] = ()
    tolerance: float | None = None
    """Floats a and b are equal if |a - b| <= tolerance + tolerance * |b|, where b is of the undisturbed run."""
    ignored_keys: tuple[str, ...] = ()
    """JSON keys at any depth, CSV columns, and names of tensors."""
    command: str | None = None
    """A shell command that compares two paths; exit status 0: equal."""
    python: str = sys.executable
    """The task's Python, which reads torch files."""

    @property
    def names_results(self) -> bool:
        """True if there are files to compare."""
        return bool(self.patterns) or self.command is not None

    @property
    def by_value(self) -> bool:
        """True if files that are not byte-identical may be equal by their values."""
        return self.tolerance is not None or bool(self.ignored_keys)

    @property
    def globs(self) -> str:
        """The globs, for a message."""
        return ", ".join(pattern.glob for pattern in self.patterns)


@dataclass
class Findings:
    """What comparisons by value found besides differences."""

    largest: float = 0.0
    """The largest difference within the tolerance."""
    largest_in: str = ""
    """The key, column or tensor that has it."""
    ignored: set[str] = field(default_factory=set)
    """The ignored keys that were found."""
    notes: list[str] = field(default_factory=list)

    def ignores(self, path: Sequence[Key], rules: Comparison) -> bool:
        """True if a value is ignored, by one of its keys or by its whole dotted name."""
        if not rules.ignored_keys:
            return False
        found = {str(key) for key in path} | {".".join(map(str, path))}
        found &= set(rules.ignored_keys)
        self.ignored |= found
        return bool(found)

    def record(self, gap: float, where: str) -> None:
        """Record a difference within the tolerance."""
        if gap > self.largest:
            self.largest, self.largest_in = gap, where


def is_close(left: float, right: float, tolerance: float | None) -> bool:
    """True if two numbers are equal within the tolerance. Integers must be equal, and NaN equals NaN.

    Args:
        left: The number of the undisturbed run.
        right: The other number.
        tolerance: Relative and absolute, as numpy.isclose's rtol and atol; None: 0.
    """
    if left == right or (left != left and right != right):
        return True
    if not tolerance or (isinstance(left, int) and isinstance(right, int)):
        return False
    try:
        gap = abs(left - right)
        return gap <= tolerance + tolerance * abs(left) and gap != float("inf")
    except OverflowError:  # An integer beyond all floats.
        return False


def dotted(path: Sequence[Key]) -> str:
    """Format the path of a value: `history[3].loss`."""
    text = ""
    for key in path:
        if isinstance(key, int):
            text += f"[{key}]"
        elif re.fullmatch(r"[\w./ -]+", key):
            text += f".{key}" if text else key
        else:
            text += f"[{key!a}]"
    return text


def short(number: float, digits: int = 6) -> str:
    """Format a number: `1e-6`."""
    return re.sub(r"e([+-])0+(?=\d)", r"e\1", f"{number:.{digits}g}")
