"""A bucket in memory that writes its trace as the daemon does, for the tests of what a trace tells."""

import os
import re
from collections.abc import Callable

from skyspot.rehearsal.bucketfs.strike import Strike, changes
from skyspot.rehearsal.bucketfs.trace import Call
from skyspot.rehearsal.replay import Attempt

PAGE = 128 * 1024


class TakenError(Exception):
    """The machine is gone."""


class Fs:
    """The files that outlive the machines, and the calls of the machine that is here now."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[object, int, int]] = {}
        """path -> (what was written, how many bytes that is, how many of them are there)"""
        self.time = 100.0
        self.calls: list[Call] = []
        self.began_s = 0.0
        self.strike: Strike | None = None
        self._left = self._handle = 0
        self.process = "python train.py"

    def attempt(self, script: Callable[["Fs"], None], strike: Strike | None = None) -> Attempt:
        """Run a script on a new machine, to its end or until it is taken."""
        self.calls, self.strike, self.began_s = [], strike, self.time
        self._left = strike.number if strike else 0
        self.time += 2.0
        finished = True
        try:
            script(self)
        except TakenError:
            finished = False
        self.time += 0.1
        return Attempt(self.calls, finished, None, self.began_s, self.time)

    def tick(self, seconds: float = 1.0) -> None:
        self.time += seconds

    def take(self) -> None:
        """The machine is taken between two calls."""
        raise TakenError

    # -- calls

    def call(self, name: str, path: str, do: Callable[[], object] = lambda: 0, half: object = None, **more) -> None:
        self.time += 0.0001
        struck = ""
        strike = self.strike
        if strike and strike.counts(name, path) and changes(name, more.get("flags", 0), more.get("size", 0)):
            self._left -= 1
            struck = strike.phase if self._left < 0 else ""
        if struck == "middle" and callable(half):
            half()
        elif struck in ("", "after"):
            do()
        self.calls.append(
            Call(len(self.calls), self.time, name, path, pid=7, process=self.process, struck=struck, **more)
        )
        if struck:
            raise TakenError

    def open(self, path: str, flags: int) -> int:
        self._handle += 1
        new = path not in self.files
        name = "create" if new else "open"

        def do() -> None:
            if new or flags & os.O_TRUNC:
                self.files[path] = (None, 0, 0)

        self.call(name, path, do, flags=flags, handle=self._handle)
        return self._handle

    def put(self, handle: int, path: str, what: object, size: int, total: int, offset: int = 0) -> None:
        def do(size: int = size) -> None:
            there = max(self.files[path][2], offset + size) if self.files[path][0] in (None, what) else offset + size
            self.files[path] = (what, total, there)

        self.call("write", path, do, lambda: do(size // 2), handle=handle, offset=offset, size=size)

    def close(self, handle: int, path: str, size: int) -> None:
        self.call("close", path, handle=handle, size=size)

    # -- what programs do

    def write(self, path: str, what: object = None, size: int = 300_000, flags: int = os.O_TRUNC) -> None:
        """open(path, "wb"), some writes, close; with flags=0 as with "r+b"."""
        handle = self.open(path, os.O_WRONLY | os.O_CREAT | flags)
        for offset in range(0, size, PAGE):
            self.put(handle, path, what, min(PAGE, size - offset), size, offset)
        self.close(handle, path, size)

    def append(self, path: str, size: int = 90) -> None:
        handle = self.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        offset = self.files[path][2]

        def do(size: int = size) -> None:
            self.files[path] = ("log", offset + size, offset + size)

        self.call("write", path, do, lambda: do(size // 2), handle=handle, offset=offset, size=size)
        self.close(handle, path, size)

    def read(self, path: str, part: int | None = None) -> object:
        """What a file holds; None: nothing, or it is not whole."""
        if path not in self.files:
            return None
        what, total, there = self.files[path]
        self._handle += 1
        handle = self._handle
        self.call("open", path, flags=os.O_RDONLY, handle=handle)
        until = there if part is None else part
        for offset in range(0, until, PAGE):
            self.call("read", path, handle=handle, offset=offset, size=min(PAGE, until - offset))
        self.call("close", path, handle=handle)
        return what if there == total and what is not None else None

    def rename(self, path: str, to: str) -> None:
        def do() -> None:
            for old in [one for one in self.files if one == path or one.startswith(f"{path}/")]:
                self.files[to + old[len(path) :]] = self.files.pop(old)

        self.call("rename", path, do, to=to)

    def unlink(self, path: str) -> None:
        self.call("unlink", path, lambda: self.files.pop(path))

    def mkdir(self, path: str) -> None:
        self.call("mkdir", path)

    def rmtree(self, folder: str) -> None:
        for path in self.list(f"{re.escape(folder)}/"):
            self.unlink(path)
        self.call("rmdir", folder)

    def list(self, pattern: str) -> list[str]:
        """The paths that a regular expression finds something in, by the numbers in them."""
        found = [path for path in self.files if re.match(pattern, path)]
        return sorted(found, key=lambda path: [int(number) for number in re.findall(r"\d+", path)])
