"""The command of a task that starts a script with skyspot's launcher."""

from __future__ import annotations

import re

from skyspot.errors import UsageError, shown


def launched(command: str, processes: str) -> str:
    """Return the command that starts a script with skyspot's launcher; the command itself if no number is given.

    Args:
        command: A Python script with its arguments; `python` may precede it.
        processes: The number of processes on each node; `auto`: one per accelerator; empty: start the command as it is.

    Raises:
        UsageError: it is no number, or the command is no script.
    """
    if not processes:
        return command
    if processes != "auto" and not re.fullmatch("[1-9][0-9]{0,2}", processes):
        raise UsageError(f"--set processes: {shown(processes)} is neither a number of processes nor `auto`")
    script = re.sub(r"\Apython3?[ ]+", "", command.strip())
    if not re.match(r"[^\s-]\S*\.py(?:\s|\Z)", script):
        raise UsageError(
            "--set processes starts a Python script with skyspot's launcher; --set command must be that script and its "
            f"arguments (train.py --lr 0.1), not {shown(command)}"
        )
    count = "" if processes == "auto" else f"--processes {processes} "
    return f"python -m trainer.launch {count}{script}"


def needs_trainer(command: str) -> bool:
    """True if a command starts skyspot's trainer or launcher."""
    from skyspot.task import shell  # Most templates have no such command.

    return any(shell.starts_our_trainer(found) for found in shell.commands(command))
