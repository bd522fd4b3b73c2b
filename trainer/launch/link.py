"""A rank's end of the pipes to its launcher. Standard library only."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

DEFAULT_GRACE_S = 25.0
"""Seconds from SIGTERM to SIGKILL, where nobody says otherwise."""
PEER_GONE = "peer-gone"
LISTENS = "listens"
# Words that a rank leaves in the store for all others, whatever those are doing.
CRASHED = "crashed"
STOPPED = "stopped"
END_WRITTEN = "end-written"


def grace(asked_s: float | None) -> tuple[float, str]:
    """(how many seconds a script has from SIGTERM to SIGKILL, what to say of that; empty where all is as asked).

    The launcher kills when its own grace is over, whatever the script asks for: the smaller of both counts.

    Args:
        asked_s: What the script asks for; None: as long as there is.
    """
    try:
        given_s = float(os.environ["SKYSPOT_GRACE_S"])
    except (KeyError, ValueError):
        return (DEFAULT_GRACE_S if asked_s is None else asked_s), ""
    if asked_s is None or asked_s <= given_s:
        return (given_s if asked_s is None else asked_s), ""
    return given_s, (
        f"grace_s is {asked_s:g}, and the launcher kills {given_s:g} s after SIGTERM: {given_s:g} s it is "
        f"(python -m trainer.launch --grace {asked_s:g} gives more)"
    )


class Link:
    """Words to and from the launcher; without a launcher, words to nobody."""

    def __init__(self, read: int | None = None, write: int | None = None, said: int | None = None) -> None:
        self._read, self._write, self._said = read, write, said

    @classmethod
    def from_env(cls) -> Link:
        """The link that the launcher left in SKYSPOT_LINK, as three file descriptors."""
        text = os.environ.get("SKYSPOT_LINK", "")
        try:
            read, write, said = (int(part) for part in text.split(","))
            for descriptor in (read, write, said):
                os.fstat(descriptor)
        except (ValueError, OSError):
            return cls()
        return cls(read, write, said)

    def is_first_to_say(self, what: str) -> bool:
        """Whether no other rank of this machine has asked that of the same words, be it gone since or not."""
        if self._said is None:
            return True
        line = _line(what)
        with suppress(OSError):
            fcntl.lockf(self._said, fcntl.LOCK_EX)
            try:
                said = os.pread(self._said, os.fstat(self._said).st_size, 0)
                if line in said.splitlines(keepends=True):
                    return False
                os.pwrite(self._said, line, len(said))
            finally:
                fcntl.lockf(self._said, fcntl.LOCK_UN)
        return True

    def has_been_said(self, what: str) -> bool:
        """Whether a rank of this machine has asked `is_first_to_say` of the same words."""
        if self._said is not None:
            with suppress(OSError):
                said = os.pread(self._said, os.fstat(self._said).st_size, 0)
                return _line(what) in said.splitlines(keepends=True)
        return False

    def say_attempt(self, run_dir: Path, attempt: object) -> None:
        """Name the attempt, so that the launcher can have its end recorded if this rank dies."""
        self._say("attempt " + json.dumps({"run_dir": str(run_dir), "attempt": str(attempt)}))

    def say_ended(self) -> None:
        """The attempt's end event is written."""
        self._say("ended")

    def say_exit(self, code: int) -> None:
        """This rank leaves with `code`: counts even where the process cannot be reaped."""
        self._say(f"exit {code}")

    def watch(self, on_peer_gone: Callable[[], None]) -> None:
        """Call back, on a thread of its own, when the launcher says that another rank left."""
        if self._read is not None:
            self._say(LISTENS)
            threading.Thread(target=self._listen, args=(on_peer_gone,), daemon=True, name="launcher").start()

    def _say(self, line: str) -> None:
        if self._write is not None:
            with suppress(OSError):
                os.write(self._write, line.encode("ascii", "backslashreplace") + b"\n")

    def _listen(self, on_peer_gone: Callable[[], None]) -> None:
        assert self._read is not None
        heard = b""
        with suppress(OSError):
            while data := os.read(self._read, 4096):
                heard += data
                if PEER_GONE.encode() + b"\n" in heard:
                    on_peer_gone()
                    return


def _line(what: str) -> bytes:
    """How words stand in the file of what the ranks of a machine have said."""
    return repr(what).encode() + b"\n"
