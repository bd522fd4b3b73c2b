"""A FUSE file system that permits only what goofys permits, and fails on request.

    python tests/faultfs.py FOLDER MOUNT_POINT CONTROL_SOCKET [ANYTHING ...]

It passes calls through to a folder, but a file can only be written once, front to back: no seeking back, append,
rename, link, truncation or mmap write. Requests come over a Unix socket as lines of JSON; each answer is the number of
faults that have hit so far. Further arguments have no effect; they show in the process's command line.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CALLS = ("open", "create", "write", "close", "fsync", "mkdir", "unlink", "read", "list")
"""The calls that can fail or hang on request."""


class Client:
    """The file system's remote control."""

    def __init__(self, control: Path, daemon: subprocess.Popen[bytes], point: Path) -> None:
        self.daemon, self.point = daemon, point
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(control))
        self._answers = self._socket.makefile("r")

    def _order(self, **order: Any) -> int:
        self._socket.sendall(json.dumps(order).encode() + b"\n")
        return int(json.loads(self._answers.readline())["hits"])

    def fail(self, call: str, number: int, *, after: int = 0, times: int = 1, suffix: str = "") -> None:
        """Make a call fail on paths that end in `suffix`: `times` in a row, after `after` successes.

        `unlink` includes rmdir(); `close` is every close() of a file, even of one that was only read.
        """
        self._order(do="fault", call=call, errno=number, after=after, times=times, suffix=suffix)

    def hang(self, call: str, *, after: int = 0, times: int = 1, suffix: str = "") -> None:
        """Make a call hang until `clear`, `times` times. Not even SIGKILL ends a process that waits for it."""
        self._order(do="fault", call=call, errno=0, after=after, times=times, suffix=suffix)

    def delay(self, call: str, seconds: float, *, after: int = 0, times: int = 1, suffix: str = "") -> None:
        """Make a call take `seconds` longer."""
        self._order(do="fault", call=call, errno=0, seconds=seconds, after=after, times=times, suffix=suffix)

    def cut_short(self, share: float, *, after: int = 0, times: int = 1, suffix: str = "") -> None:
        """Make a write() accept only a share of its bytes, at least one, and return that number."""
        self._order(do="fault", call="write", share=share, after=after, times=times, suffix=suffix)

    def tear(self, share: float, *, suffix: str = "", after: int = 0) -> None:
        """Keep only a share of the next file that is closed, and report success."""
        self._order(do="tear", share=share, suffix=suffix, after=after)

    def stale(self, seconds: float) -> None:
        """Make listings show the state of `seconds` ago."""
        self._order(do="stale", seconds=seconds)

    def clear(self) -> int:
        """Remove all faults and let hanging calls return; returns the number of hits since the last `clear`."""
        return self._order(do="clear")

    def hits(self) -> int:
        """Number of hits since the last `clear`."""
        return self._order(do="ask")

    def close(self) -> None:
        """Close the connection."""
        self._answers.close()
        self._socket.close()


def missing() -> str | None:
    """The reason why this machine cannot mount it; None if it can."""
    from bucket_lab import missing_fuse

    try:
        import mfusepy  # noqa: F401
    except ImportError:
        return "FUSE mounts: pip install mfusepy"
    except (OSError, AttributeError):
        return "FUSE mounts: apt install fuse3"
    return missing_fuse()


@contextlib.contextmanager
def mounted(backing: Path, folder: Path, *arguments: str, name: str = "") -> Iterator[Client]:
    """Mount it over `backing`, below `folder`.

    With a name, its process and its mount look like those of a daemon of that name, started with those arguments.
    """
    from bucket_lab import child, end, is_mounted, taken_away, until

    folder.mkdir(parents=True, exist_ok=True)
    point, control, log = folder / "mount", folder / "control", folder / "faultfs.log"
    point.mkdir(exist_ok=True)
    control.unlink(missing_ok=True)
    program, env = Path(sys.executable), {}
    if name:
        program = folder / name
        program.unlink(missing_ok=True)
        program.symlink_to(sys.executable)
        env = {"PYTHONPATH": os.pathsep.join(sys.path)}  # Under that name Python does not find its virtual environment.
    daemon = client = None
    with taken_away(point):
        try:
            daemon = child(program, __file__, backing, point, control, *arguments, env=env, log=log)
            until("the file system is mounted", lambda: is_mounted(point, daemon, log) and control.exists())
            client = Client(control, daemon, point)
            yield client
        finally:
            if client:
                client.close()
            end(daemon)


def serve(backing: str, point: str, control: str) -> None:
    """Run the file system."""
    import mfusepy

    lock = threading.Lock()
    faults: list[dict[str, Any]] = []
    state = {"hits": 0, "stale": 0.0}
    born: dict[str, float] = {}
    gone: dict[str, dict[str, float]] = {}

    def strike(call: str, path: str) -> float:
        """Fail, hang or delay a call if that was requested; returns the share of a write() to perform."""
        if not faults:
            return 1.0
        with lock:
            for fault in faults:
                if fault.get("call") == call and path.endswith(fault["suffix"]):
                    fault["after"] -= 1
                    if fault["after"] < 0 and fault["times"] > 0:
                        fault["times"] -= 1
                        state["hits"] += 1
                        break
            else:
                return 1.0
        if "share" in fault:
            return float(fault["share"])
        if not fault["errno"]:
            fault["let_go"].wait(fault.get("seconds"))
            return 1.0
        raise mfusepy.FuseOSError(fault["errno"])

    def listen() -> None:
        server = socket.socket(socket.AF_UNIX)
        server.bind(f"{control}.new")
        server.listen()
        os.rename(f"{control}.new", control)  # The path appears once the server answers.
        while True:
            connection, _ = server.accept()
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        for line in connection.makefile("r"):
            order = json.loads(line)
            with lock:
                if order["do"] == "clear":
                    for fault in faults:
                        fault["let_go"].set()
                    faults.clear()
                    state["stale"] = 0.0
                    hits, state["hits"] = state["hits"], 0
                else:
                    hits = state["hits"]
                    if order["do"] == "stale":
                        state["stale"] = order["seconds"]
                    elif order["do"] != "ask":
                        faults.append(order | {"let_go": threading.Event()})
            connection.sendall(json.dumps({"hits": hits}).encode() + b"\n")

    class Sequential(mfusepy.Operations):
        use_ns = True

        def _at(self, path: str) -> str:
            return backing + path

        def getattr(self, path, fh=None):
            found = os.lstat(self._at(path))
            keys = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks")
            return {key: getattr(found, key) for key in keys} | {
                f"st_{kind}time": getattr(found, f"st_{kind}time_ns") for kind in "acm"
            }

        def readdir(self, path, fh):
            strike("list", path)
            names = set(os.listdir(self._at(path)))
            if state["stale"]:
                then = time.monotonic() - state["stale"]
                old = {name for name, when in gone.get(path, {}).items() if when > then}
                fresh = {name for name in names if born.get(os.path.join(path, name), 0.0) > then}
                if old - names or fresh:
                    state["hits"] += 1
                names = (names - fresh) | old
            return [".", "..", *names]

        def mkdir(self, path, mode):
            strike("mkdir", path)
            os.mkdir(self._at(path), mode)
            born[path] = time.monotonic()

        def rmdir(self, path):
            strike("unlink", path)
            os.rmdir(self._at(path))
            gone.setdefault(os.path.dirname(path), {})[os.path.basename(path)] = time.monotonic()

        def unlink(self, path):
            strike("unlink", path)
            os.unlink(self._at(path))
            gone.setdefault(os.path.dirname(path), {})[os.path.basename(path)] = time.monotonic()

        def create(self, path, mode, fi=None):
            strike("create", path)
            handle = os.open(self._at(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            born[path] = time.monotonic()
            return handle

        def open(self, path, flags):
            strike("open", path)
            writes = flags & (os.O_WRONLY | os.O_RDWR)
            if writes and not flags & os.O_TRUNC and os.stat(self._at(path)).st_size:
                raise mfusepy.FuseOSError(errno.EPERM)
            return os.open(self._at(path), flags & (os.O_ACCMODE | os.O_TRUNC))

        def truncate(self, path, length, fh=None):
            if length != os.stat(self._at(path)).st_size:
                raise mfusepy.FuseOSError(errno.EPERM)

        def read(self, path, size, offset, fh):
            strike("read", path)
            return os.pread(fh, size, offset)

        def write(self, path, data, offset, fh):
            share = strike("write", path)
            if offset != os.fstat(fh).st_size:
                raise mfusepy.FuseOSError(errno.EPERM)
            return os.pwrite(fh, data if share == 1 else data[: max(1, int(len(data) * share))], offset)

        def fsync(self, path, datasync, fh):
            strike("fsync", path)
            return 0

        def flush(self, path, fh):
            strike("close", path)
            if fcntl.fcntl(fh, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                return 0
            with lock:
                for fault in list(faults):
                    if fault["do"] == "tear" and path.endswith(fault["suffix"]):
                        fault["after"] -= 1
                        if fault["after"] < 0:
                            faults.remove(fault)
                            os.truncate(self._at(path), int(os.fstat(fh).st_size * fault["share"]))
                            state["hits"] += 1
                            break
            return 0

        def release(self, path, fh):
            os.close(fh)
            return 0

        def statfs(self, path):
            found = os.statvfs(self._at(path))
            return {key: getattr(found, key) for key in ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_frsize")}

        def refused(self, *_):
            raise mfusepy.FuseOSError(errno.EPERM)

        rename = link = symlink = mknod = refused

        def chmod(self, path, mode):
            return 0

        def chown(self, path, uid, gid):
            return 0

        def utimens(self, path, times=None):
            return 0

    threading.Thread(target=listen, daemon=True).start()
    # Many daemons tell the kernel no name.
    subtype = {"subtype": "faultfs"} if Path(sys.executable).name.startswith("python") else {}
    # direct_io: each write() arrives here unchanged, and mmap writes are refused.
    # hard_remove: otherwise FUSE renames an open file that is deleted, which is not permitted here.
    mfusepy.FUSE(
        Sequential(), point, foreground=True, fsname="faultfs", entry_timeout=0, attr_timeout=0, negative_timeout=0,
        direct_io=True, hard_remove=True, **subtype,
    )  # fmt: skip


if __name__ == "__main__":
    serve(*sys.argv[1:4])
