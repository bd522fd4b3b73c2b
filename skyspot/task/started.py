"""The command of a task that starts a script with skyspot's launcher, or one that imports skyspot's trainer."""

from __future__ import annotations

import re
from pathlib import Path

from skyspot.errors import UsageError, shown

_IMPORT = re.compile(r"^\s*(?:from|import)\s+trainer\b", re.MULTILINE)


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


def needs_trainer(command: str, workdir: str) -> bool:
    """True if a command starts skyspot's trainer or launcher, or a script of the workdir that imports the trainer."""
    from skyspot.task import shell  # Most templates have no such command.

    return any(map(shell.starts_our_trainer, shell.commands(command))) or imports_trainer(command, workdir)


def imports_trainer(command: str, workdir: str) -> bool:
    """True if a command names a script of the workdir that imports the trainer."""
    from skyspot.task import shell

    scripts = [word.text for one in shell.commands(command) for word in one.words if word.text.endswith(".py")]
    return bool(workdir) and any(_imports_trainer(Path(workdir).expanduser(), script) for script in scripts)


def _imports_trainer(workdir: Path, script: str) -> bool:
    """True if a script imports skyspot's trainer, and no module of that name that lies beside it."""
    path = workdir / script
    try:
        if (path.parent / "trainer").exists() or (path.parent / "trainer.py").exists():
            return False
        return _IMPORT.search(path.read_text(encoding="utf-8", errors="replace")) is not None
    except OSError:
        return False
