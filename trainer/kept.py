"""The launcher's end of its child that touches the bucket in its stead (keeper.py). Standard library only."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from trainer.layout import EXIT_FAILED, EXIT_STOPPED, EXIT_SUPERSEDED

END_EVENT_S = 5.0
STOPS = {"superseded": EXIT_SUPERSEDED, "stop-request": EXIT_STOPPED}
"""What the keeper may say of an attempt that has to end, and what the launcher then leaves with."""


class Keeper:
    """A child of the launcher's own that records the attempt of a script that does not do so itself."""

    def __init__(self, run_dir: Path, launch_id: str) -> None:
        self._run_dir, self._launch_id = run_dir, launch_id
        self.attempt = ""
        self._process: subprocess.Popen[bytes] | None = None

    def open(self) -> int | None:
        """Begin the attempt; returns the exit code where there is nothing to do."""
        env = {**os.environ, "SKYSPOT_LAUNCH": self._launch_id}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trainer.keeper", str(self._run_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            start_new_session=True,
        )
        assert self._process.stdout
        word, _, rest = self._process.stdout.readline().decode().strip().partition(" ")
        if word == "attempt":
            self.attempt = rest
            os.set_blocking(self._process.stdout.fileno(), False)
            return None
        return int(rest) if word == "leave" else EXIT_FAILED

    def said(self) -> str | None:
        """Why the attempt has to end: a newer one has begun, or somebody asked for a stop. None: it need not."""
        assert self._process
        assert self._process.stdout
        words = (self._process.stdout.read() or b"").decode().split()
        return next((word for word in words if word in STOPS), None)

    def close(self, code: int, cause: str, ended: bool) -> None:
        """Have the end event written, unless a rank wrote one; within a few seconds."""
        assert self._process
        with suppress(OSError, subprocess.TimeoutExpired):
            self._process.communicate(b"" if ended else f"end {code} {cause}\n".encode(), timeout=END_EVENT_S)
        self._process.kill()


def write_end(attempt: dict[str, str], code: int, cause: str) -> None:
    """Have the end event of a dead rank 0 written by a child, which may hang in the bucket in our stead."""
    command = [
        sys.executable,
        "-m",
        "trainer.keeper",
        "--end",
        str(code),
        cause,
        attempt["run_dir"],
        attempt["attempt"],
    ]
    with suppress(OSError, subprocess.TimeoutExpired):
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            child.wait(END_EVENT_S)
        finally:
            child.kill()
