"""Calls that touch a bucket, made where one that never returns does no harm.

A call into a mount whose daemon hangs cannot be interrupted, and not even SIGKILL ends the process that made it. So the
calls into a mounted folder are made by a child process, over pipes of our own; those into a cloud's bucket, which only
wait for the network, by a thread that nothing waits for at the end.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from skyspot.errors import NoAnswerError, UnreadableError

ANSWER_S = 20.0
"""How long a bucket may take for one look into it."""
_DISKS = {
    "apfs", "bcachefs", "btrfs", "devtmpfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "reiserfs", "squashfs",
    "tmpfs", "vfat", "xfs", "zfs",
}  # fmt: skip
"""Kinds of file systems that wait for nobody else."""
_MOST_LINKS = 40
_GONE = "the process that reads the folder has died"
_T = TypeVar("_T")
_Answer = tuple[Any, BaseException | None]
_Numbered = tuple[int, _Answer]


def call(root: Path, function: Callable[..., _T], *args: Any, seconds: float | None = None) -> _T:
    """What `function(*args)` gives, which looks into a bucket or a folder.

    Args:
        root: The folder that it looks into; one of a cloud's bucket is no Path.
        function: A function of a module's own; a child process may be the one that calls it.
        args: What it takes; can be pickled where `is_apart`.
        seconds: How long to wait for it; None: as long as it takes. Ctrl-C always ends the wait.

    Raises:
        NoAnswerError: it has not returned by then.
    """
    if is_apart(root):
        return _child().ask(root, function, args, seconds)
    if isinstance(root, Path):
        return function(*args)
    answers: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(_outcome(function, args)), daemon=True).start()
    return _taken(answers, root, seconds)


def is_apart(root: Path) -> bool:
    """Whether a child process makes the calls into a folder."""
    return isinstance(root, Path) and _may_hang(root)


def each(work: Sequence[Callable[[], _T]], seconds: float, threads: int) -> list[_T | None]:
    """What each piece of work gives, side by side; None for what is not over after `seconds`."""
    _, answers = begun(work, threads)
    found: list[_T | None] = [None] * len(work)
    end = time.monotonic() + seconds
    with suppress(queue.Empty):
        for _ in work:
            number, (result, error) = answers.get(timeout=max(0.0, end - time.monotonic()))
            if error is not None:
                raise error
            found[number] = result
    return found


def begun(
    work: Sequence[Callable[[], Any]], threads: int
) -> tuple[queue.SimpleQueue[int], queue.SimpleQueue[_Numbered]]:
    """Begin pieces of work on threads that nothing waits for; gives the numbers to do, and each number's answer."""
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    answers: queue.SimpleQueue[_Numbered] = queue.SimpleQueue()
    for number in range(len(work)):
        todo.put(number)

    def take() -> None:
        with suppress(queue.Empty):
            while True:
                number = todo.get_nowait()
                answers.put((number, _outcome(work[number], ())))

    for _ in range(min(threads, len(work))):
        threading.Thread(target=take, daemon=True).start()
    return todo, answers


def _outcome(function: Callable[..., Any], args: Sequence[Any]) -> _Answer:
    try:
        return function(*args), None
    except BaseException as error:
        return None, error


def _taken(answers: queue.SimpleQueue[_Answer], root: Any, seconds: float | None) -> Any:
    try:
        result, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise NoAnswerError(f"{root} does not answer: nothing within {seconds:.0f} s") from None
    if error is not None:
        raise error
    return result


# -- mounts ------------------------------------------------------------------------------------------------------------


def _may_hang(folder: Path) -> bool:
    """Whether a folder lies in something else than this machine's disks; told without touching what might hang."""
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
        if links > _MOST_LINKS:
            return False
        if target.startswith("/"):
            at = ""
        left += [step for step in reversed(target.split("/")) if step not in ("", ".")]
    return False


def _kinds() -> dict[str, str] | None:
    """The kind of file system at each mount point; None where the system does not say."""
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


# -- the child ---------------------------------------------------------------------------------------------------------


_starting = threading.Lock()


def _child() -> _Child:
    with _starting:  # Alone, `cache` lets each thread that comes meanwhile make one.
        return _only_child()


@cache
def _only_child() -> _Child:
    return _Child()


class _Child:
    """A process that makes calls for us, each on a thread of its own."""

    def __init__(self) -> None:
        # Python puts the working folder first; a json.py there is not ours to import.
        start = "import sys; sys.path[:] = eval(sys.argv[1]); from skyspot.runs import aside; aside.serve()"
        # A session of its own: Ctrl-C is ours alone. It leaves when its stdin ends, with us.
        self._process = subprocess.Popen(
            [sys.executable, "-c", start, repr(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._lock = threading.Lock()
        self._asked: dict[int, queue.SimpleQueue[_Answer]] = {}
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def ask(self, root: Path, function: Callable[..., _T], args: Sequence[Any], seconds: float | None) -> _T:
        assert self._process.stdin
        answers: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
        with self._lock:
            number = len(self._asked)
            self._asked[number] = answers
            try:
                pickle.dump((number, function, tuple(args)), self._process.stdin)
                self._process.stdin.flush()
            except OSError:
                raise UnreadableError(_GONE) from None
        found: _T = _taken(answers, root, seconds)
        return found

    def _listen(self) -> None:
        assert self._process.stdout
        with suppress(EOFError, OSError):
            while True:
                number, answer = pickle.load(self._process.stdout)
                self._asked[number].put(answer)
        for answers in list(self._asked.values()):
            answers.put((None, UnreadableError(_GONE)))


def serve() -> None:
    """Be the child: make the calls that come in, until nothing more can come."""
    requests, replies, lock = sys.stdin.buffer, sys.stdout.buffer, threading.Lock()

    def work(number: int, function: Callable[..., Any], args: Sequence[Any]) -> None:
        answer = _outcome(function, args)
        try:
            data = pickle.dumps((number, answer))
            pickle.loads(data)  # An exception that takes several arguments is often written and not read.
        except Exception:
            data = pickle.dumps((number, (None, RuntimeError(f"{answer[1] or type(answer[0])}"))))
        with lock, suppress(OSError):
            _write(replies, data)

    with suppress(EOFError, KeyboardInterrupt):
        while True:
            threading.Thread(target=work, args=pickle.load(requests), daemon=True).start()
    os._exit(0)


def _write(stream: BinaryIO, data: bytes) -> None:
    stream.write(data)
    stream.flush()
