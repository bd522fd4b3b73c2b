"""Exit codes of an attempt. Only 75 is in a task's `recover_on_exit_codes`."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_PREEMPTED = 75
EXIT_SUPERSEDED = 76
EXIT_STOPPED = 79
EXIT_NO_PROGRESS = 80

EXIT_PRECEDENCE = (EXIT_FAILED, EXIT_NO_PROGRESS, EXIT_STOPPED, EXIT_SUPERSEDED, EXIT_PREEMPTED, EXIT_DONE)
"""A launcher whose ranks ended with several codes returns the first of these that any rank had."""

EXIT_FAILURES = (EXIT_FAILED, EXIT_NO_PROGRESS)
"""The codes after which the user has to act: the last message is printed as an error."""
