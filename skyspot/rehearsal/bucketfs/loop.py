"""The daemon's loop: it answers reads and writes itself, and leaves all other requests to libfuse.

It is quicker than libfuse's own loop. Data goes through one buffer, which is used again, and a write is answered before
it is done, so that the script goes on meanwhile.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import mfusepy

MAX_WRITE = 1 << 20
_READ, _WRITE, _INTERRUPT = 15, 16, 36
_HEADER = struct.Struct("=IIQQIIIHH")
"""struct fuse_in_header: length, opcode, unique, node, user, group, pid."""
_TRANSFER = struct.Struct("=QQI20x")
"""struct fuse_read_in and fuse_write_in: handle, offset, size."""
_DATA = _HEADER.size + _TRANSFER.size
_ANSWER, _WRITTEN = struct.Struct("=IiQ"), struct.Struct("=IiQII")
_MOST_THREADS = 64
_libfuse = mfusepy._libfuse


class DataCalls(Protocol):
    """What the loop itself needs of the file system; libfuse has callbacks for the rest."""

    def read_into(self, fh: int, pid: int, offset: int, memory: memoryview) -> int:
        """Read into memory; return how much."""

    def write_from(
        self, fh: int, pid: int, offset: int, memory: memoryview, answer: Callable[[], None], done: Callable[[], None]
    ) -> None:
        """Write, and answer, maybe before; then the memory is free, unless it raises."""

    def settle(self) -> None:
        """Wait until writes that were answered are done."""


class _Arguments(ctypes.Structure):
    """struct fuse_args."""

    _fields_ = (("argc", ctypes.c_int), ("argv", ctypes.c_void_p), ("allocated", ctypes.c_int))


class _Buffer(ctypes.Structure):
    """struct fuse_buf; libfuse 3.17 has added its last field."""

    _fields_ = (
        ("size", ctypes.c_size_t), ("flags", ctypes.c_int), ("mem", ctypes.c_void_p), ("fd", ctypes.c_int),
        ("pos", ctypes.c_int64), ("mem_size", ctypes.c_size_t),
    )  # fmt: skip


for _name, _result, _takes in (
    ("fuse_new_31", ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)),
    ("fuse_mount", ctypes.c_int, (ctypes.c_void_p, ctypes.c_char_p)),
    ("fuse_get_session", ctypes.c_void_p, (ctypes.c_void_p,)),
    ("fuse_session_fd", ctypes.c_int, (ctypes.c_void_p,)),
    ("fuse_session_process_buf", None, (ctypes.c_void_p, ctypes.c_void_p)),
):
    getattr(_libfuse, _name).restype, getattr(_libfuse, _name).argtypes = _result, _takes


def main(served: DataCalls, count: int, arguments: Any, operations: Any, size: int, _data: None) -> int:
    """Mount, and serve until the unmount: in place of libfuse's fuse_main_real; return 0, or what failed.

    Args:
        served: The file system.
        count: How many arguments.
        arguments: libfuse's options, and at last the mount point.
        operations: The callbacks.
        size: Their size.
        _data: For the callbacks; none.
    """
    options = _Arguments(count - 1, ctypes.cast(arguments, ctypes.c_void_p), 0)
    fuse = _libfuse.fuse_new_31(ctypes.byref(options), operations, size, None)
    if not fuse:
        return 3
    if _libfuse.fuse_mount(fuse, arguments[count - 1]):
        return 4
    session = _libfuse.fuse_get_session(fuse)
    _Loop(served, session, _libfuse.fuse_session_fd(session)).work()
    return 0


class _Request:
    """Memory for one request."""

    __slots__ = ("memory", "whole")

    def __init__(self) -> None:
        # What is to be written begins on a page, which copies quicker.
        self.memory = memoryview(mmap.mmap(-1, MAX_WRITE + 2 * mmap.PAGESIZE))[mmap.PAGESIZE - _DATA :]
        place = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.whole = _Buffer(0, 0, place, -1, 0, len(self.memory))


class _Loop:
    """Threads that each read and do one request after another. There is always one that waits for a request."""

    def __init__(self, served: DataCalls, session: int, fd: int) -> None:
        self._served, self._session, self._fd = served, session, fd
        self._threads: list[threading.Thread] = []
        # A list's append and pop are atomic. What was used last is used next: it is in the processor's cache.
        self._free: list[_Request] = []
        self._waiting: list[None] = []  # One for each thread that waits.

    def work(self) -> None:
        """Do requests until the unmount."""
        while (request := self._next()) is not None:
            if not self._waiting and len(self._threads) < _MOST_THREADS:
                self._threads.append(threading.Thread(target=self.work, daemon=True))
                self._threads[-1].start()
            _, opcode, unique, _, _, _, pid, _, _ = _HEADER.unpack_from(request.memory)
            if opcode in (_READ, _WRITE):
                self._transfer(opcode, unique, pid, request)
                continue
            if opcode != _INTERRUPT:
                self._served.settle()
                _libfuse.fuse_session_process_buf(self._session, ctypes.byref(request.whole))
            self._free.append(request)

    def _next(self) -> _Request | None:
        """Wait for a request; None: it is unmounted."""
        request = self._free.pop() if self._free else _Request()
        while True:
            self._waiting.append(None)
            try:
                request.whole.size = os.readv(self._fd, [request.memory])
                return request
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return None
                if error.errno not in (errno.ENOENT, errno.EAGAIN):  # The request was taken back.
                    raise
            finally:
                self._waiting.pop()

    def _transfer(self, opcode: int, unique: int, pid: int, request: _Request) -> None:
        handle, offset, size = _TRANSFER.unpack_from(request.memory, _HEADER.size)
        data = request.memory[_DATA : _DATA + size]
        try:
            if opcode == _WRITE:
                answer = _WRITTEN.pack(_WRITTEN.size, 0, unique, size, 0)
                self._served.write_from(
                    handle, pid, offset, data, lambda: self._send(answer), lambda: self._free.append(request)
                )
                return
            done = self._served.read_into(handle, pid, offset, data)
            self._send(_ANSWER.pack(_ANSWER.size + done, 0, unique), data[:done])
        except OSError as error:
            self._send(_ANSWER.pack(_ANSWER.size, -(error.errno or errno.EIO), unique))
        except Exception:
            traceback.print_exc()
            self._send(_ANSWER.pack(_ANSWER.size, -errno.EIO, unique))
        self._free.append(request)

    def _send(self, *parts: bytes | memoryview) -> None:
        with suppress(OSError):  # Nobody waits for it any more.
            os.writev(self._fd, parts)
