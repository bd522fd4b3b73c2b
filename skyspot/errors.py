"""What may go wrong through no fault of ours: said in a line or two, with the remedy, and never with a traceback."""

from __future__ import annotations

from collections.abc import Iterable


class SkyspotError(Exception):
    """Something failed. Exit status 1."""

    exit_code = 1


class UsageError(SkyspotError):
    """What was asked for makes no sense. Exit status 2."""

    exit_code = 2


class NotYamlError(UsageError):
    """A text that is to be a task is no YAML."""

    def __init__(self, message: str, line: int, problem: str) -> None:
        """Say it in a line.

        Args:
            message: All of it.
            line: From 1: where it is seen.
            problem: What is wrong there.
        """
        super().__init__(message)
        self.line, self.problem = line, problem


class UnreadableError(SkyspotError):
    """A run's folder cannot be read from this machine; the message says why."""


class NoAnswerError(UnreadableError):
    """A bucket did not answer in time."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'nearest'?`, or nothing where nothing is near."""
    lower: dict[str, str] = {}
    for name in known:
        lower.setdefault(name.lower(), name)
    import difflib  # A millisecond of every command's start.

    near = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.5 if len(word) < 5 else 0.6)
    return f" Did you mean {lower[near[0]]!r}?" if near else ""


def shown(value: str, limit: int = 60) -> str:
    """A value as it may stand in a message: one line, escaped, cut."""
    text = ascii(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
