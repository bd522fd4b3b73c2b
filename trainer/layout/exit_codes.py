"""The exit codes of an attempt. 75 alone is in a task's `recover_on_exit_codes`."""

from __future__ import annotations

# Exit codes: 75 alone is in a task's `recover_on_exit_codes`.
EXIT_DONE = 0

EXIT_FAILED = 1

EXIT_USAGE = 2

EXIT_PREEMPTED = 75

EXIT_SUPERSEDED = 76

EXIT_STOPPED = 79

EXIT_NO_PROGRESS = 80

# What a launcher returns when its ranks gave several: the first of these that any rank gave.
EXIT_PRECEDENCE = (EXIT_FAILED, EXIT_NO_PROGRESS, EXIT_STOPPED, EXIT_SUPERSEDED, EXIT_PREEMPTED, EXIT_DONE)

STOP_REQUEST_S = 120.0
"""How long a stop that was asked for (`RunPaths.stop`) may take, and is held for SkyPilot's cancel."""
