"""The base of all errors that are said to the user in a line or two, without a traceback. Standard library only."""

from __future__ import annotations


class TrainerError(Exception):
    """A mistake of the user's, or trouble with what a machine depends on; the message says what, where and the remedy.

    Attributes:
        code: The exit code of the attempt that the error ends: the class', unless the error was given its own. A
            launcher, which has begun no attempt yet, leaves with 2 whatever the error is.
    """

    code = 1  # layout.EXIT_FAILED; layout's own errors derive from this class.

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class AttemptError(TrainerError):
    """What the attempt depends on fails before the first step or after the last; the attempt ends with `code`."""


class RunError(TrainerError):
    """The training script, or what it asks for, is wrong."""


def one_line(error: BaseException) -> str:
    """An error's kind and first line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
