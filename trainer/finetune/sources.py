"""The files of a data source: a folder, a file, a data set of the Hugging Face Hub, or Python's own source code."""

from __future__ import annotations

import errno
import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.bucket.deadlines import within
from trainer.errors import TrainerError

STDLIB_BYTES = 8 << 20
READABLE = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
_NOT_THERE = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL
}  # fmt: skip
"""Errors that a retry does not help against."""


class DataError(TrainerError):
    """The data cannot be trained on; the message names the reason and the remedy."""


@dataclass(frozen=True)
class SourceFile:
    """One file to read."""

    name: str
    """Its path relative to the source."""
    path: Path
    bytes: int


@dataclass(frozen=True)
class Source:
    """The files of a data source."""

    files: list[SourceFile]
    """The readable files, sorted by name."""
    ignored: Counter[str]
    """The number of ignored files per ending."""

    @property
    def total_bytes(self) -> int:
        """The size of all readable files."""
        return sum(file.bytes for file in self.files)

    def ignored_line(self, data: str) -> str | None:
        """A sentence about the ignored files; None if there are none."""
        if not self.ignored:
            return None
        count = sum(self.ignored.values())
        files = "file" if count == 1 else "files"
        return f"--data {data}: {count} {files} ignored: {_counted(self.ignored)}. Readable: {_KINDS}"


_KINDS = ".txt and .jsonl, also as .gz"


def is_hub_id(data: str) -> bool:
    """True for a data set of the Hugging Face Hub, ORGANIZATION/NAME; an existing path takes precedence."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", data)) and not _exists(Path(data))


def is_read(name: str) -> bool:
    """True if a file of this relative path is readable."""
    return not any(map(is_hidden, name.split("/"))) and kind_of(Path(name)) in READABLE


def kind_of(path: Path) -> str:
    """The ending that determines how a file is read, in lower case: `.txt`, `.jsonl`, `.txt.gz`, ..."""
    name = path.name.lower()
    return next((kind for kind in READABLE if name.endswith(kind)), path.suffix.lower())


def files_of(data: str, root: Path | None = None, check_stop: Callable[[], None] = lambda: None) -> Source:
    """List the files of a data source.

    Args:
        data: The value of --data.
        root: The local folder of a data set of the Hub.
        check_stop: Called for each folder and file, because each takes a request; raises to stop.

    Raises:
        DataError: there is no such folder or file, or it holds nothing readable.
        OSError: the source cannot be read now.
    """
    if data == "stdlib":
        return Source(_stdlib(), Counter())
    try:
        return _files_of(data, root or Path(data), check_stop)
    except OSError as error:
        raise as_data_error(error, f"--data {data}: {error.filename or data}") from None


def as_data_error(error: OSError, where: str) -> Exception:
    """A DataError if a retry cannot help; otherwise the error itself."""
    if error.errno in _NOT_THERE or error.errno is None:
        return DataError(f"{where}: {error.strerror or error}")
    return error


def _files_of(data: str, root: Path, check_stop: Callable[[], None]) -> Source:
    with within("looking at the data", where=root):
        is_file, is_folder = root.is_file(), root.is_dir()
    if not is_file and not is_folder:
        raise DataError(
            f"--data {data}: no such folder or file on this machine. Mount a folder of .txt or .jsonl files, name a "
            "data set of the Hugging Face Hub (ORGANIZATION/NAME), or use stdlib"
        )
    found = [(root.name, root)] if is_file else sorted(_walk(root, check_stop))
    files, ignored = [], Counter[str]()
    for name, path in found:
        check_stop()
        with within("looking at the data", where=path):
            try:
                status = path.stat()
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP):
                    raise
                ignored["broken links"] += 1
                continue
        if not stat.S_ISREG(status.st_mode):
            ignored["not a file"] += 1
        elif (kind := kind_of(path)) in READABLE:
            files.append(SourceFile(name, path, status.st_size))
        else:
            ignored[kind or "no ending"] += 1
    if not files:
        raise nothing_readable(data, ignored)
    return Source(files, ignored)


def nothing_readable(data: str, ignored: Counter[str]) -> DataError:
    """The error for a source without any text."""
    others = f" It has other files: {_counted(ignored)}." if ignored else ""
    return DataError(
        f"--data {data}: no .txt or .jsonl file in it.{others} Convert other formats (such as parquet) to .jsonl with "
        "a `text` field"
    )


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{kind} ({number})" for kind, number in kinds.most_common(8)) + ", ..." * (len(kinds) > 8)


def _walk(root: Path, check_stop: Callable[[], None]) -> Iterator[tuple[str, Path]]:
    """The files below a folder as (relative path, path); links to folders are followed, each folder is visited once.

    Real folders come before linked ones, so that a link does not change the name of a file.
    """
    seen: set[str] = set()
    folders: list[Path] = [root]
    links: list[Path] = []
    while folders or links:
        check_stop()
        folder = folders.pop() if folders else links.pop(0)
        with within("listing the data", where=folder):
            real = os.path.realpath(folder)
            if real in seen:
                continue
            seen.add(real)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                path = folder / entry.name
                if not _is_folder(entry):
                    yield path.relative_to(root).as_posix(), path
                elif entry.is_symlink():
                    links.append(path)
                else:
                    folders.append(path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """True for a folder or a link to one, but not for a broken link."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def is_hidden(name: str) -> bool:
    """True for a file or folder that a file system, an archive or a tool made, not an author."""
    return name.startswith(".") or name == "__MACOSX"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _stdlib() -> list[SourceFile]:
    """Up to 8 MB of the standard library's source: text that every machine with Python has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "__pycache__"}
    found, total = [], 0
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if skip.isdisjoint(name.parts):
            size = path.stat().st_size
            total += size
            if total > STDLIB_BYTES:
                break
            found.append(SourceFile(name.as_posix(), path, size))
    return found
