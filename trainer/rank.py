"""A rank's end of the pipes to its launcher. Standard library only."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PEER_GONE = "peer-gone"
LISTENS = "listens"
# Words that a rank leaves in the store for all others, whatever those are doing.
CRASHED = "crashed"
STOPPED = "stopped"
END_WRITTEN = "end-written"


class Link:
    """Words to and from the launcher; without a launcher, words to nobody."""

    def __init__(self, read: int | None = None, write: int | None = None) -> None:
        self._read, self._write = read, write

    @classmethod
    def from_env(cls) -> Link:
        """The link that the launcher left in SKYSPOT_LINK, as two file descriptors."""
        text = os.environ.get("SKYSPOT_LINK", "")
        try:
            read, write = (int(part) for part in text.split(","))
            os.fstat(read)
            os.fstat(write)
        except (ValueError, OSError):
            return cls()
        return cls(read, write)

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
