"""Errors that users see as a line or two, with the remedy and without a traceback."""

from __future__ import annotations

from collections.abc import Iterable


class SkyspotError(Exception):
    """A failure. Exit status 1."""

    exit_code = 1


class UsageError(SkyspotError):
    """A mistake in the options, the settings or the task. Exit status 2."""

    exit_code = 2


class NotYamlError(UsageError):
    """A task file is not valid YAML."""

    def __init__(self, message: str, line: int, problem: str) -> None:
        """Describe the error.

        Args:
            message: The whole message.
            line: The line number, from 1.
            problem: The problem on that line.
        """
        super().__init__(message)
        self.line, self.problem = line, problem


class UnreadableError(SkyspotError):
    """A run's folder cannot be read from this machine."""


class NoAnswerError(UnreadableError):
    """A bucket did not answer in time."""


def in_a_line(error: Exception) -> str:
    """An error for the line that reports it: ours as it is, any other with its type and its first line."""
    if isinstance(error, SkyspotError):
        return str(error)
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".removesuffix(": ")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'nearest'?`, or an empty string if no known word is similar."""
    lower: dict[str, str] = {}
    for name in known:
        lower.setdefault(name.lower(), name)
    import difflib  # It costs a millisecond at start-up.

    near = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.5 if len(word) < 5 else 0.6)
    return f" Did you mean {lower[near[0]]!r}?" if near else ""


def shown(value: str, limit: int = 60) -> str:
    """A value for a message: on one line, escaped, and cut."""
    text = ascii(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
