"""The output of the launcher's children, passed on so that no two lines mix. Standard library only."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress

LONGEST_LINE_BYTES = 64 * 1024
"""The longest part of an unfinished line that is held back; a longer one is passed on in pieces."""
SAY_S = 1.0


class Lines:
    """Cuts the output of one child into what can be passed on and what must wait for the end of its line."""

    def __init__(self, *, bars: bool) -> None:
        """Start with no output.

        Args:
            bars: Pass on each state of a progress bar, which returns to the start of its line again and again. If not,
                overwritten text is dropped, as on a terminal, and the line is passed on when it ends.
        """
        self._bars = bars
        self._kept = b""

    def take(self, data: bytes) -> bytes:
        """Add new output; returns what can be passed on now."""
        kept = self._kept + data
        if self._bars:
            end = 1 + max(kept.rfind(b"\n"), kept.rfind(b"\r"))
            whole, kept = kept[:end], kept[end:]
        else:
            *lines, kept = map(_last_written, kept.split(b"\n"))
            whole = b"".join(line + b"\n" for line in lines)
        if len(kept) > LONGEST_LINE_BYTES:
            whole, kept = whole + kept, b""
        self._kept = kept
        return whole

    def rest(self) -> bytes:
        """Return what is left at the end of the output, as a line of its own."""
        rest, self._kept = self._kept, b""
        return rest + b"\n" if rest and not self._bars else rest


def _last_written(line: bytes) -> bytes:
    """Cut a line to what was last written over it; a carriage return at its end may belong to the line's end."""
    start = line.rfind(b"\r", 0, max(0, len(line) - 1))
    return line if start < 0 else line[start:]


class Relay:
    """Passes on the output of children, with one thread for each pipe."""

    def __init__(self) -> None:
        self._locks = {1: threading.Lock(), 2: threading.Lock()}
        self._threads: list[threading.Thread] = []

    def begin(self, source: int, target: int, lines: Lines | None) -> None:
        """Pass on the output from one file descriptor to another, 1 or 2, until it ends.

        Args:
            source: Where to read; it is closed at the end.
            target: Where to write.
            lines: How to cut the output into lines; None: pass it on as it comes.
        """
        thread = threading.Thread(target=self._pass_on, args=(source, target, lines), daemon=True)
        thread.start()
        self._threads.append(thread)

    def end(self, seconds: float) -> None:
        """Wait for the rest of the output, but not longer than `seconds`: a child that hangs keeps its pipe open."""
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _pass_on(self, source: int, target: int, lines: Lines | None) -> None:
        open_ = True
        while True:
            try:
                data = os.read(source, 65536)
            except OSError:
                data = b""
            part = data
            if lines:
                part = lines.take(data) if data else lines.rest()
            with self._locks[target]:
                while part and open_:
                    try:
                        part = part[os.write(target, part) :]
                    except OSError:
                        open_ = False  # Nobody reads the output any more; the child must not notice.
            if not data:
                os.close(source)
                return


def say(line: str) -> None:
    """Print a line of the launcher's own on stderr: stdout is the script's.

    It is printed on a thread, which is awaited for a moment: nobody may read what a full pipe holds.
    """

    def write() -> None:
        with suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)

    thread = threading.Thread(target=write, daemon=True, name="line")
    thread.start()
    thread.join(SAY_S)
