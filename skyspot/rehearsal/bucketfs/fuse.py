"""mfusepy with what it leaves out: an open file's handle in every call, rename's flags, and writes without a copy."""

from __future__ import annotations

import ctypes
from typing import Any

import mfusepy

_FD, _SEEK = 2, 4  # FUSE_BUF_IS_FD, FUSE_BUF_FD_SEEK


class _Buffer(ctypes.Structure):
    """struct fuse_buf; libfuse 3.17 has added its last field."""

    _fields_ = (
        ("size", ctypes.c_size_t), ("flags", ctypes.c_int), ("mem", ctypes.c_void_p), ("fd", ctypes.c_int),
        ("pos", ctypes.c_int64), ("mem_size", ctypes.c_size_t),
    )  # fmt: skip


class _Buffers(ctypes.Structure):
    """struct fuse_bufvec, of one buffer."""

    _fields_ = (("count", ctypes.c_size_t), ("idx", ctypes.c_size_t), ("off", ctypes.c_size_t), ("buf", _Buffer))


_size = mfusepy._libfuse.fuse_buf_size
_size.restype, _size.argtypes = ctypes.c_size_t, (ctypes.c_void_p,)
_copy = mfusepy._libfuse.fuse_buf_copy
_copy.restype, _copy.argtypes = ctypes.c_ssize_t, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)


def size_of_buffer(buffer: Any) -> int:
    """Return how many bytes a write brings."""
    return int(_size(buffer))


def copy_buffer(buffer: Any, fd: int, offset: int, size: int) -> int:
    """Write the first bytes that a write brings to a file; return how many.

    Raises:
        OSError: they could not be written.
    """
    target = _Buffers(1, 0, 0, _Buffer(size, _FD | _SEEK, None, fd, offset, 0))
    done = int(_copy(ctypes.byref(target), buffer, 0))
    if done < 0:
        raise OSError(-done, "write")
    return done


class Fuse(mfusepy.FUSE):  # type: ignore[misc]
    """libfuse's callbacks. The path is None where a file is open."""

    def write_buf(self, path: bytes | None, buffer: Any, offset: int, info: Any) -> int:
        """Write."""
        return int(self.operations.write_buf(buffer, offset, info.contents.fh))

    def read(self, path: bytes | None, buffer: Any, size: int, offset: int, info: Any) -> int:
        """Read straight into libfuse's memory."""
        return int(self.operations.read(buffer, size, offset, info.contents.fh))

    def rename_fuse_3(self, old: bytes, new: bytes, flags: int) -> int:
        """Rename, with renameat2's flags."""
        return int(self.operations.rename(self._text(old), self._text(new), flags))

    def truncate_fuse_3(self, path: bytes | None, length: int, info: Any) -> int:
        """Cut or extend."""
        return int(self.operations.truncate(self._text(path), length, _contents(info)))

    def chmod_fuse_3(self, path: bytes | None, mode: int, info: Any) -> int:
        """Change the mode."""
        return int(self.operations.chmod(self._text(path), mode, _contents(info)))

    def chown_fuse_3(self, path: bytes | None, uid: int, gid: int, info: Any) -> int:
        """Change the owner; an id of all ones means none."""
        uid, gid = (-1 if number == 0xFFFFFFFF else number for number in (uid, gid))
        return int(self.operations.chown(self._text(path), uid, gid, _contents(info)))

    def utimens_fuse_3(self, path: bytes | None, times: Any, info: Any) -> int:
        """Change the times."""
        both = times.contents
        ns = [time.tv_sec * 10**9 + time.tv_nsec for time in (both.actime, both.modtime)]
        return int(self.operations.utimens(self._text(path), tuple(ns), _contents(info)))

    def _text(self, path: bytes | None) -> str | None:
        return None if path is None else path.decode(self.encoding, self.errors)


def _contents(info: Any) -> Any:
    return info.contents if info else None
