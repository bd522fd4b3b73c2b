"""A watcher's trace: calls on a bucket, of which some are known in full only later."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from skyspot.rehearsal.bucketfs.trace import GAP, Call

_BEGINS = ("create", "write")
_WAKE_S = 0.05


class Calls:
    """The calls of one machine on one bucket, in memory and in the trace."""

    def __init__(self, trace: Path) -> None:
        """Begin an empty trace."""
        self.trace = trace
        self.all: list[Call] = []
        self._more = threading.Condition()
        self._file = trace.open("w")

    def add(self, name: str, path: str, **more: Any) -> int:
        """Add a call that ends now; return its number. `more` is the rest of `Call`."""
        call = Call(len(self.all), time.monotonic(), name, path, **more)
        with self._more:
            self.all.append(call)
            self._file.write(_line(call))
            self._file.flush()
            self._more.notify_all()
        return call.number

    def amend(self, number: int, **more: Any) -> None:
        """Change what is known of a call. The trace has it after `save`."""
        self.all[number] = replace(self.all[number], **more)

    def gap(self, why: str) -> None:
        """Write down that some calls were missed."""
        if not any(call.name == GAP for call in self.all):
            self.add(GAP, "", to=why)

    def save(self) -> None:
        """Write the whole trace anew, and close it."""
        self._file.close()
        self.trace.write_text("".join(map(_line, self.all)))

    def wait_for_a_write(self, paths: str, seconds: float, goes_on: Callable[[], bool]) -> bool:
        """Wait until somebody begins to write a file; return whether somebody did.

        Args:
            paths: A regular expression of the files' paths.
            seconds: How long to wait.
            goes_on: Asked again and again; False ends the wait.
        """
        end, seen, wanted = time.monotonic() + seconds, len(self.all), re.compile(paths)
        begun = {call.handle for call in self.all[:seen] if call.name in _BEGINS}
        while time.monotonic() < end and goes_on():
            with self._more:
                if len(self.all) == seen:
                    self._more.wait(_WAKE_S)
                fresh = self.all[seen:]
            seen += len(fresh)
            if any(call.name in _BEGINS and call.handle not in begun and wanted.search(call.path) for call in fresh):
                return True
        return False


def _line(call: Call) -> str:
    return json.dumps(asdict(call)) + "\n"
