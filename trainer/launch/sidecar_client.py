"""The launcher's end of its child that touches the bucket in its stead (sidecar.py). Standard library only."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from trainer.attempt.ending import STOP_REQUEST, SUPERSEDED, Ending
from trainer.layout.exit_codes import EXIT_FAILED

END_EVENT_S = 5.0
STOPS = {ending.cause: ending for ending in (SUPERSEDED, STOP_REQUEST)}
"""What the keeper may say of an attempt that has to end."""


class Keeper:
    """A child of the launcher's own that records the attempt of a script that does not do so itself."""

    def __init__(self, run_dir: Path, launch_id: str) -> None:
        """Have the attempt begun; what becomes of it is learnt from `listen`."""
        self.attempt = ""
        """Its name, once it is begun."""
        self.leave: int | None = None
        """The exit code, where there is nothing to do."""
        self.stop: Ending | None = None
        """Why the attempt has to end."""
        self._heard = b""
        self.errors, its_errors = os.pipe()
        """What it says on stderr, to be passed on. It hangs in the bucket, and must not hold the job's own pipe."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trainer.launch.sidecar", str(run_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=its_errors,
            env={**os.environ, "SKYSPOT_LAUNCH": launch_id},
            start_new_session=True,
        )
        os.close(its_errors)
        assert self._process.stdout
        self.pipe = self._process.stdout.fileno()
        """Readable when there is something to listen to."""
        os.set_blocking(self.pipe, False)

    def listen(self) -> bool:
        """Take in what it says; False where it will say no more."""
        try:
            data = os.read(self.pipe, 4096)
        except BlockingIOError:
            return True
        *lines, self._heard = (self._heard + data).split(b"\n")
        for line in lines:
            word, _, rest = line.decode("ascii", "replace").partition(" ")
            if word == "attempt":
                self.attempt = rest
            elif word == "leave" and rest.isdigit():
                self.leave = int(rest)
            elif word in STOPS:
                self.stop = STOPS[word]
        if not data and not self.attempt and self.leave is None:
            self.leave = EXIT_FAILED
        return bool(data)

    def close(self, code: int, ending: Ending, ended: bool, seconds: float = END_EVENT_S) -> None:
        """Have the end event written, unless a rank wrote one; within so many seconds."""
        with suppress(OSError, subprocess.TimeoutExpired):
            self._process.communicate(b"" if ended else f"end {code} {ending.cause}\n".encode(), timeout=seconds)
        self._process.kill()


def write_end(attempt: dict[str, str], code: int, ending: Ending, seconds: float) -> None:
    """Have the end event of a dead rank 0 written by a child, which may hang in the bucket in our stead."""
    command = [
        sys.executable,
        "-m",
        "trainer.launch.sidecar",
        "--end",
        str(code),
        ending.cause,
        attempt["run_dir"],
        attempt["attempt"],
    ]
    with suppress(OSError, subprocess.TimeoutExpired):
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        try:
            os.write(2, child.communicate(timeout=seconds)[1])
        finally:
            child.kill()
