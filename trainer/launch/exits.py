"""The launcher's exit code: computed from those of the ranks, and given on exit. Standard library only."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from trainer.errors import TrainerError
from trainer.layout.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_PRECEDENCE, EXIT_PREEMPTED, EXIT_USAGE


def code_of(status: int | None) -> int:
    """Return a rank's exit code; a rank that a signal ended, or that never ended, counts as preempted."""
    return EXIT_PREEMPTED if status is None or status < 0 else status


def reported_code(text: str) -> int | None:
    """Return the exit code in a report to the launcher; None if the text is no exit code."""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else None


def combined_code(statuses: Sequence[int | None]) -> int:
    """Return the exit code for all ranks: the first of EXIT_PRECEDENCE; 1 if a rank has another one."""
    codes = {code_of(status) for status in statuses}
    if codes - set(EXIT_PRECEDENCE):
        return EXIT_FAILED
    return next((known for known in EXIT_PRECEDENCE if known in codes and known), EXIT_DONE)


def leave_with(main: Callable[[], int]) -> None:
    """Run a launcher's main function and leave with its code, even if a thread or a child hangs."""
    try:
        code = main()
    except TrainerError as error:
        print(f"Error: {error}", file=sys.stderr)
        code = EXIT_USAGE  # Whatever the error's own code is: no rank was started.
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
