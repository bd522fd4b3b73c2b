"""The recorder writes the trace, and stops everything when the strike falls. Part of the daemon."""

from __future__ import annotations

import functools
import json
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from skyspot.rehearsal.bucketfs.strike import Strike, changes

T = TypeVar("T")
PROCESS_CHARACTERS = 200


class Recorder:
    """One daemon's trace."""

    def __init__(self, trace: Path, proc: Path, strike: Strike | None) -> None:
        """Open the trace.

        Args:
            trace: The file; calls are added to it.
            proc: /proc of the machine's process namespace.
            strike: Where to stop; None: nowhere.
        """
        self._proc, self._strike = proc, strike
        self._number = trace.read_bytes().count(b"\n") if trace.exists() else 0
        self._file = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._writing = threading.Lock()
        self._turn = threading.Lock()
        """With a strike, calls that change the bucket take turns: the trace then has all that reached it."""
        self.has_strike = strike is not None
        self._left = strike.number if strike else 0
        self._stopped = False
        self.first_number = self._number

    def record(self, name: str, path: str, who: tuple[int, str], **more: Any) -> None:
        """Write one call, in one piece; the rest as in `Call`, without what is 0 or empty.

        The call that is struck is the last: afterwards this never returns.
        """
        said = "".join(
            f',"{key}":{value if type(value) is int else json.dumps(value)}' for key, value in more.items() if value
        )
        rest = f'"name":"{name}",{_quoted(path, *who)}{said}'
        with self._writing:
            if not self._stopped:
                self._stopped = bool(more.get("struck"))
                line = f'{{"number":{self._number},"time":{time.monotonic():.6f},{rest}}}\n'
                self._number += 1
                os.write(self._file, line.encode())
                return
        _block()  # It was under way when the strike fell: a read, or an open that changes nothing.

    def process(self, pid: int) -> str:
        """Return a process's command line: `python train.py`; empty if it is gone."""
        try:
            words = (self._proc / str(pid) / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        except OSError:
            return ""
        words[0] = words[0].rpartition(b"/")[2]
        return " ".join(b" ".join(words).decode(errors="replace").split())[:PROCESS_CHARACTERS]

    def wait_if_struck(self) -> None:
        """Never return once the strike has fallen."""
        if self._stopped:
            _block()

    def exclusively(self, call: Callable[[], T]) -> T:
        """Do something on the bucket that is no call of the machine's, unless the strike has fallen."""
        if self._strike is None:
            return call()
        with self._turn:
            self.wait_if_struck()
            return call()

    def change(
        self,
        do: Callable[[], T],
        name: str,
        path: str,
        who: tuple[int, str],
        *,
        half: Callable[[], object] | None = None,
        flags: int = 0,
        size: int = 0,
        **more: Any,
    ) -> T:
        """Do a call that changes the bucket, and record it; if the strike falls on it, never return.

        Args:
            do: The call.
            name: Its name; this and the rest as in `Call`.
            path: Its path.
            who: Who made it: pid and command line.
            half: What is left of it when the machine is lost in its middle; None: nothing.
            flags: How it opens.
            size: How much it writes.
            more: The rest of the call.
        """
        more |= {"flags": flags, "size": size}
        if self._strike is None:
            return self.report(do, name, path, who, **more)
        with self._turn:
            self.wait_if_struck()
            if not self._falls(name, path, flags, size):
                return self.report(do, name, path, who, **more)
            phase, done = self._strike.phase, {"before": None, "middle": half, "after": do}
            with suppress(OSError):
                (done[phase] or int)()
            self.record(name, path, who, struck=phase, **more)
        return _block()

    def report(self, do: Callable[[], T], name: str, path: str, who: tuple[int, str], **more: Any) -> T:
        """Do a call and record it."""
        try:
            result = do()
        except OSError as error:
            self.record(name, path, who, error=error.errno or 0, **more)
            raise
        self.record(name, path, who, **more)
        return result

    def _falls(self, name: str, path: str, flags: int, size: int) -> bool:
        assert self._strike
        if not changes(name, flags, size) or not self._strike.counts(name, path):
            return False
        self._left -= 1
        return self._left < 0


@functools.lru_cache(256)
def _quoted(path: str, pid: int, process: str) -> str:
    return json.dumps({"path": path, "pid": pid, "process": process}, separators=(",", ":"))[1:-1]


def _block() -> NoReturn:
    while True:
        threading.Event().wait()
