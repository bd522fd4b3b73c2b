"""mfusepy with what it leaves out: an open file's handle in every call, and rename's flags."""

from __future__ import annotations

from typing import Any

import mfusepy


class Fuse(mfusepy.FUSE):  # type: ignore[misc]
    """libfuse's callbacks. The path is None where a file is open."""

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
