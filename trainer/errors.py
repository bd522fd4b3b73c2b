"""Base of all errors that are printed in a line or two, without a traceback. Standard library only."""

from __future__ import annotations

import sys
from types import TracebackType


class TrainerError(Exception):
    """A user's mistake, or a failure of what the attempt depends on; the message says what, where and the remedy.

    Attributes:
        code: The exit code of the attempt that the error ends: that of the error's class, unless the error has its own.
            A launcher that has not begun an attempt exits with 2 whatever the error is.
    """

    code = 1  # layout.exit_codes.EXIT_FAILED; layout imports this module.

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class AttemptError(TrainerError):
    """Something that the attempt depends on fails before the first step or after the last."""


class RunError(TrainerError):
    """The training script, or its use of the trainer, is wrong."""


def say_mistakes() -> None:
    """Have Python print a `TrainerError` that nobody catches in a line, without a traceback."""
    others = sys.excepthook
    if getattr(others, "says_mistakes", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, TrainerError):
            print(f"Error: {error}", file=sys.stderr, flush=True)
        else:
            others(kind, error, trace)

    hook.says_mistakes = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or else its type."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def one_line(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    return f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__
