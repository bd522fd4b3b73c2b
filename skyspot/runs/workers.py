"""Worker threads and a worker process for calls that touch a bucket and may never return.

A call into a mount whose daemon hangs cannot be interrupted, and not even SIGKILL ends the process that made it. So a
child process makes the calls into a mounted folder, over pipes of our own. A thread makes the calls into a cloud's
bucket, which only wait for the network; nothing waits for that thread when the program ends.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from skyspot.errors import NoAnswerError, UnreadableError

TIMEOUT_S = 20.0
"""Longest time for one look into a bucket."""
_DISKS = {
    "apfs", "bcachefs", "btrfs", "devtmpfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "reiserfs", "squashfs",
    "tmpfs", "vfat", "xfs", "zfs",
}  # fmt: skip
"""Kinds of file systems that need no daemon and no network."""
_MAX_LINKS = 40
_DEAD = "the process that reads the folder has died"
_T = TypeVar("_T")
_Outcome = tuple[Any, BaseException | None]
_Numbered = tuple[int, _Outcome]


def call(root: Path, function: Callable[..., _T], *args: Any, seconds: float | None = None) -> _T:
    """The result of `function(*args)`, which looks into a bucket or a folder.

    Args:
        root: The folder that the function looks into; the folder of a cloud's bucket is no Path.
        function: A module-level function; the worker process may call it.
        args: Its arguments; they can be pickled if the call `is_isolated`.
        seconds: Longest wait; None waits until the function returns. Ctrl-C always ends the wait.

    Raises:
        NoAnswerError: the function has not returned in time.
    """
    if is_isolated(root):
        return _worker().call(root, function, args, seconds)
    if isinstance(root, Path):
        return function(*args)
    return call_in_thread(root, function, *args, seconds=seconds)


def call_in_thread(asked: object, function: Callable[..., _T], *args: Any, seconds: float | None) -> _T:
    """The result of `function(*args)`, which waits for the network, from a thread of its own.

    Args:
        asked: What the function waits for, as the message names it.
        function: The function.
        args: Its arguments.
        seconds: Longest wait; None waits until the function returns. Ctrl-C always ends the wait.

    Raises:
        NoAnswerError: the function has not returned in time.
    """
    outcomes: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
    threading.Thread(target=lambda: outcomes.put(_outcome(function, args)), daemon=True).start()
    result: _T = _await(outcomes, asked, seconds)
    return result


def is_isolated(root: Path) -> bool:
    """True if the worker process makes the calls into a folder."""
    return isinstance(root, Path) and _may_hang(root)


def run_all(work: Sequence[Callable[[], _T]], seconds: float, threads: int) -> list[_T | None]:
    """The result of each piece of work, run side by side; None for work that has not finished after `seconds`."""
    _, outcomes = start(work, threads)
    results: list[_T | None] = [None] * len(work)
    end = time.monotonic() + seconds
    with suppress(queue.Empty):
        for _ in work:
            number, (result, error) = outcomes.get(timeout=max(0.0, end - time.monotonic()))
            if error is not None:
                raise error
            results[number] = result
    return results


def start(
    work: Sequence[Callable[[], Any]], threads: int
) -> tuple[queue.SimpleQueue[int], queue.SimpleQueue[_Numbered]]:
    """Start pieces of work on daemon threads; returns the queue of numbers to do, and the queue of outcomes."""
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    outcomes: queue.SimpleQueue[_Numbered] = queue.SimpleQueue()
    for number in range(len(work)):
        todo.put(number)

    def take() -> None:
        with suppress(queue.Empty):
            while True:
                number = todo.get_nowait()
                outcomes.put((number, _outcome(work[number], ())))

    for _ in range(min(threads, len(work))):
        threading.Thread(target=take, daemon=True).start()
    return todo, outcomes


def in_order(work: Sequence[Callable[[], _T]], threads: int) -> Generator[_T, None, None]:
    """The results of pieces of work in their order, run on several threads.

    A process waits for concurrent.futures' threads when it exits. It does not wait for these: Ctrl-C ends the program
    immediately, even if a bucket hangs.
    """
    todo, outcomes = start(work, threads)
    ready: dict[int, _Outcome] = {}
    try:
        for number in range(len(work)):
            while number not in ready:
                other, outcome = outcomes.get()
                ready[other] = outcome
            result, error = ready.pop(number)
            if error is not None:
                raise error
            yield result
    finally:
        with suppress(queue.Empty):
            while True:
                todo.get_nowait()


def _outcome(function: Callable[..., Any], args: Sequence[Any]) -> _Outcome:
    try:
        return function(*args), None
    except BaseException as error:
        return None, error


def _await(outcomes: queue.SimpleQueue[_Outcome], asked: object, seconds: float | None) -> Any:
    try:
        result, error = outcomes.get(timeout=seconds)
    except queue.Empty:
        raise NoAnswerError(f"{asked} did not answer within {seconds:.0f} s") from None
    if error is not None:
        raise error
    return result


# -- mounts ------------------------------------------------------------------------------------------------------------


def _may_hang(folder: Path) -> bool:
    """True if a folder is on something else than this machine's disks; touches nothing that might hang."""
    kinds = _kinds()
    if kinds is None:
        return True
    left = list(reversed(folder.absolute().parts[1:]))
    at, links = "", 0
    if kinds.get("/", "overlay") not in _DISKS:
        return True
    while left:
        part = left.pop()
        if part == "..":
            at = at.rpartition("/")[0]
            continue
        new = f"{at}/{part}"
        if kinds.get(new, "overlay") not in _DISKS:
            return True
        try:
            target = str(Path(new).readlink())
        except OSError:  # Mostly: it is no link.
            at = new
            continue
        links += 1
        if links > _MAX_LINKS:
            return False
        if target.startswith("/"):
            at = ""
        left += [step for step in reversed(target.split("/")) if step not in ("", ".")]
    return False


def _kinds() -> dict[str, str] | None:
    """The kind of file system at each mount point; None if the system has no /proc."""
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    found = {}
    for line in lines:
        before, _, after = line.partition(" - ")
        point = before.split()[4]
        for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
            point = point.replace(code, character)
        found[point] = after.split()[0]
    return found


# -- the worker process ------------------------------------------------------------------------------------------------


_starting = threading.Lock()


def _worker() -> _WorkerProcess:
    with _starting:  # `cache` alone lets each of several threads start one.
        return _only_worker()


@cache
def _only_worker() -> _WorkerProcess:
    return _WorkerProcess()


class _WorkerProcess:
    """A child process that makes calls for us, each on its own thread."""

    def __init__(self) -> None:
        # Python puts the working folder first in sys.path; a json.py there is not ours to import.
        code = "import sys; sys.path[:] = eval(sys.argv[1]); from skyspot.runs import workers; workers.serve()"
        # It has its own session, so Ctrl-C reaches only us. It exits when its stdin closes, at the latest when we end.
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, repr(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._lock = threading.Lock()
        self._calls: dict[int, queue.SimpleQueue[_Outcome]] = {}
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def call(self, root: Path, function: Callable[..., _T], args: Sequence[Any], seconds: float | None) -> _T:
        assert self._process.stdin
        outcomes: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
        with self._lock:
            number = len(self._calls)
            self._calls[number] = outcomes
            try:
                pickle.dump((number, function, tuple(args)), self._process.stdin)
                self._process.stdin.flush()
            except OSError:
                raise UnreadableError(_DEAD) from None
        result: _T = _await(outcomes, root, seconds)
        return result

    def _listen(self) -> None:
        assert self._process.stdout
        with suppress(EOFError, OSError):
            while True:
                number, outcome = pickle.load(self._process.stdout)
                self._calls[number].put(outcome)
        for outcomes in list(self._calls.values()):
            outcomes.put((None, UnreadableError(_DEAD)))


def serve() -> None:
    """Run the worker process: make the calls that arrive on stdin until it closes."""
    requests, replies, lock = sys.stdin.buffer, sys.stdout.buffer, threading.Lock()

    def work(number: int, function: Callable[..., Any], args: Sequence[Any]) -> None:
        outcome = _outcome(function, args)
        try:
            data = pickle.dumps((number, outcome))
            pickle.loads(data)  # Many exceptions with several arguments can be pickled but not unpickled.
        except Exception:
            data = pickle.dumps((number, (None, RuntimeError(f"{outcome[1] or type(outcome[0])}"))))
        with lock, suppress(OSError):
            _write(replies, data)

    with suppress(EOFError, KeyboardInterrupt):
        while True:
            threading.Thread(target=work, args=pickle.load(requests), daemon=True).start()
    os._exit(0)


def _write(stream: BinaryIO, data: bytes) -> None:
    stream.write(data)
    stream.flush()
