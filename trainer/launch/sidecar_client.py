"""The launcher's end of the sidecar, its child that touches the bucket (sidecar.py). Standard library only."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from trainer.attempt.ending import END_EVENT_S, ENDINGS, Ending
from trainer.launch.exits import reported_code
from trainer.layout.exit_codes import EXIT_FAILED


class Sidecar:
    """A child of the launcher that records the attempt of a script that does not do so itself."""

    def __init__(self, run_dir: Path, launch_id: str, launched_at: float, grace_s: float) -> None:
        """Start the sidecar; `receive` reads what it sends.

        Args:
            run_dir: The run's folder.
            launch_id: The launch's id.
            launched_at: When the launcher started, on the monotonic clock.
            grace_s: Seconds from SIGTERM to SIGKILL.
        """
        self.attempt = ""
        """The attempt's name, once the sidecar has opened it."""
        self.exit_code: int | None = None
        """The launcher's exit code, if no rank is to be started."""
        self.stop: Ending | None = None
        """The reason to end the attempt; None: none yet."""
        self._received = b""
        self.errors, its_errors = os.pipe()
        """Where to read its stderr. The launcher relays it: a sidecar that hangs must not hold the job's own pipe."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trainer.launch.sidecar", str(run_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=its_errors,
            env={
                **os.environ,
                "SKYSPOT_LAUNCH": launch_id,
                "SKYSPOT_LAUNCHED_AT": repr(launched_at),
                "SKYSPOT_GRACE_S": repr(grace_s),
            },
            start_new_session=True,
        )
        os.close(its_errors)
        assert self._process.stdout
        self.pipe = self._process.stdout.fileno()
        """Readable when there is something to receive."""
        os.set_blocking(self.pipe, False)

    def receive(self) -> bool:
        """Read what it sends; False if its pipe is closed."""
        try:
            data = os.read(self.pipe, 4096)
        except BlockingIOError:
            return True
        *lines, self._received = (self._received + data).split(b"\n")
        for line in lines:
            message, _, rest = line.decode("ascii", "replace").partition(" ")
            if message == "attempt":
                self.attempt = rest
            elif message == "leave" and (code := reported_code(rest)) is not None:
                self.exit_code = code
            elif message == "stop" and rest in ENDINGS:
                self.stop = ENDINGS[rest]
        if not data and not self.attempt and self.exit_code is None:
            self.exit_code = EXIT_FAILED
        return bool(data)

    def close(self, code: int, ending: Ending, ended: bool, seconds: float = END_EVENT_S) -> None:
        """Have the end event written, unless a rank has written it; wait no longer than `seconds`."""
        with suppress(OSError, subprocess.TimeoutExpired):
            self._process.communicate(b"" if ended else f"end {code} {ending.cause}\n".encode(), timeout=seconds)
        self._process.kill()


def write_end(attempt: dict[str, str], code: int, ending: Ending, seconds: float) -> None:
    """Have a child write the end event of a dead rank 0: it may hang in the bucket, and the launcher does not."""
    sidecar = [sys.executable, "-m", "trainer.launch.sidecar"]
    command = [*sidecar, "--end", str(code), ending.cause, attempt["run_dir"], attempt["attempt"]]
    with suppress(OSError, subprocess.TimeoutExpired):
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        try:
            os.write(2, child.communicate(timeout=seconds)[1])
        finally:
            child.kill()
