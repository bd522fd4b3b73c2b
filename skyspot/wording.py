"""Wording that every command shares."""

from __future__ import annotations

from collections.abc import Sequence


def first_few(names: Sequence[str], most: int) -> str:
    """The first names of many, and the number of the others: `a, b, c and 2 more`. One more is named, too."""
    more = len(names) - most
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:most])} and {more} more"


def many(count: int, what: str) -> str:
    """`1 attempt`, `2 attempts`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def figure(value: float) -> str:
    """A quantity in three digits, and never with an exponent: `0.163`, `12.5`, `1,234`."""
    if 0 < value < 1e-4:
        return "<0.0001"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def amount(usd: float) -> str:
    """An amount that a person stated, in USD: `25`, `12.50`, `1,250,000`."""
    return f"{usd:,.2f}".removesuffix(".00")


def duration(seconds: float) -> str:
    """A duration in its two largest units: `2 h 36 min`, `41 min 10 s`, `12.3 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def printable(text: str) -> str:
    r"""Text on one line; what a terminal would obey or hide is escaped, as in Python: `\x1b`."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
