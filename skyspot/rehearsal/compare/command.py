"""Comparing two files or folders with a command of the user's (`--compare-with`)."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from skyspot.errors import UsageError, shown
from skyspot.rehearsal.compare.difference import Sides
from skyspot.rehearsal.compare.rules import Findings
from skyspot.rehearsal.interrupts import undisturbed
from skyspot.rehearsal.processes import MARK, Guard, kill_below
from skyspot.rehearsal.verdict import Verdict

LIMIT_S = 600.0
"""Time that one comparison may take."""
LAST_LINES = 8
_NOT_RUN = (126, 127)
"""The shell's exit statuses for a command that cannot be executed, or is not there."""


def check(command: str) -> None:
    """Refuse a command whose program is not there.

    Raises:
        UsageError: it is empty, its quotes are not closed, or the shell does not find its first word.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--compare-with {shown(command)}: {error}") from None
    if not words:
        raise UsageError("--compare-with: the command is empty")
    if not re.fullmatch(r"[\w./~+-]+", words[0]):
        return  # An assignment, a redirection or a group: the shell will say it.
    found = subprocess.run(
        ["bash", "-c", 'command -v -- "$1"', "bash", os.path.expanduser(words[0])],  # noqa: PTH111 (a name stays one)
        capture_output=True,
    )
    if found.returncode:
        raise UsageError(f"--compare-with: {shown(words[0])}: command not found")


def compare(command: str, left: Path, right: Path, name: str, sides: Sides, findings: Findings) -> Verdict | None:
    """Run the command with two paths; the verdict if it does not call them equal.

    Its last lines are shown: as a note, or in the verdict.
    """
    code, lines = _run(command, left, right)
    if code == 0:
        findings.notes += [f"--compare-with on {name}: {line}" for line in lines]
        return None
    output = "".join(f"\n  {line}" for line in lines)
    if code is None:
        return Verdict(False, False, f"not checked: --compare-with on {name} took more than {LIMIT_S:.0f} s{output}")
    if code in _NOT_RUN:
        return Verdict(False, False, f"not checked: --compare-with could not be run (exit {code}){output}")
    what = f"{name} differs between the {sides.left} and the {sides.right} run"
    return Verdict(False, True, f"NOT exact: {what}: --compare-with exited with {code}{output}", "files")


def _run(command: str, left: Path, right: Path) -> tuple[int | None, list[str]]:
    """The exit status, None after the time limit; and the last lines of output."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            ["bash", "-c", f'{command} "$@"', "compare-with", str(left), str(right)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, MARK: str(left)},
        )
        guard = Guard(process.pid, str(left))
        try:
            code: int | None = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with undisturbed():
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kill_below(str(left))  # What it left in the background, too.
                guard.dismiss()
        output.seek(max(0, output.seek(0, os.SEEK_END) - 16384))
        text = output.read().decode(errors="replace").replace("\r", "\n")
    return code, [line for line in text.splitlines() if line.strip()][-LAST_LINES:]
