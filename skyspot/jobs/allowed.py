"""The fields that a task's trainer allows to change: those of its command line, or else of its --config file."""

from __future__ import annotations

import posixpath
from pathlib import Path

from skyspot.errors import UsageError
from skyspot.home import expanded
from skyspot.task.document import Task
from skyspot.task.mounts import WORKDIR, clean_path, innermost, within
from skyspot.task.nodes import compose, entries
from skyspot.task.shell import Command, options, starts_our_trainer


def allowed(task: Task) -> set[str]:
    """Every field that the task names in `--allow-config-change`, or in `allow_config_change` of a file."""
    found: set[str] = set()
    for command in task.run.commands:
        if command.program not in ("echo", "printf"):
            # For the trainer too, the command line replaces the file's value.
            found |= {word.text for word in options(command, "--allow-config-change")} or _in_file(task, command)
    return found


def _in_file(task: Task, command: Command) -> set[str]:
    """The fields in the trainer's --config file; empty if the file is not on this machine or cannot be read."""
    files = list(options(command, "--config")) if starts_our_trainer(command) else []
    path = _here(task, files[-1].text) if files else None
    if path is None:
        return set()
    try:
        settings = entries(compose(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, UsageError):
        return set()  # The trainer says what is wrong.
    names = {str(key).replace("-", "_"): value for key, value in settings.items()}.get("allow_config_change") or []
    return {str(name) for name in (names if isinstance(names, list) else [names])}


def _here(task: Task, path: str) -> Path | None:
    """The file on this machine that SkyPilot copies to a path on the node; None if there is none."""
    place = clean_path(path)
    mount = innermost(task.mounts, place)
    source, target = (mount.source, mount.path) if mount else (task.workdir, WORKDIR)
    if not source or "://" in source or not within(place, target):
        return None
    return expanded(source) / posixpath.relpath(place, target)
