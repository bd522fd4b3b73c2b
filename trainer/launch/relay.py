"""Passing on what children print, so that no two lines mix. Standard library only."""

from __future__ import annotations

import os
import threading
import time

LONGEST_LINE_BYTES = 64 * 1024
"""What is kept of a line whose end has not come; a longer one is passed on in pieces."""


class Lines:
    """What one child prints, cut into what may be passed on and what has to wait for its line's end."""

    def __init__(self, *, bars: bool) -> None:
        """Begin with nothing.

        Args:
            bars: Whether a progress bar, which returns to the start of its line again and again, is passed on as it
                goes. Else what is written over is dropped, as on a terminal, and the line comes when it ends.
        """
        self._bars = bars
        self._kept = b""

    def take(self, data: bytes) -> bytes:
        """Add what has come; what may be passed on of it."""
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
        """What is left where no more comes, on a line of its own."""
        rest, self._kept = self._kept, b""
        return rest + b"\n" if rest and not self._bars else rest


def _last_written(line: bytes) -> bytes:
    """A line from where it was last written over; a return at its end may be a part of that end."""
    start = line.rfind(b"\r", 0, max(0, len(line) - 1))
    return line if start < 0 else line[start:]


class Relay:
    """Threads that pass on what children print, each from its pipe."""

    def __init__(self) -> None:
        self._locks = {1: threading.Lock(), 2: threading.Lock()}
        self._threads: list[threading.Thread] = []

    def begin(self, source: int, target: int, lines: Lines | None) -> None:
        """Pass on what comes from one descriptor to another, 1 or 2, until its end.

        Args:
            source: Where to read; closed at its end.
            target: Where to write.
            lines: What is cut into lines; None: all goes as it comes.
        """
        thread = threading.Thread(target=self._pass_on, args=(source, target, lines), daemon=True)
        thread.start()
        self._threads.append(thread)

    def end(self, seconds: float) -> None:
        """Let what was said come out, within so long: who hangs holds its end of the pipe open."""
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
                        open_ = False  # Nobody reads any more; the child must not notice.
            if not data:
                os.close(source)
                return
