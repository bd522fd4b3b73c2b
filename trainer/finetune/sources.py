"""The files of a data source: a folder, a file, a data set of the Hugging Face Hub, or Python's own source code."""

from __future__ import annotations

import errno
import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.bucket.deadlines import within
from trainer.errors import TrainerError

STDLIB_BYTES = 8 << 20
READ = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
_NOT_THERE = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL
}  # fmt: skip
"""Errors that waiting does not mend."""


class DataError(TrainerError):
    """The data cannot be trained on; the message says why and what to do."""


@dataclass(frozen=True)
class SourceFile:
    """One file to read."""

    name: str
    """Its path relative to the source."""
    path: Path
    bytes: int


@dataclass(frozen=True)
class Source:
    """What a data source has."""

    files: list[SourceFile]
    """Those that are read, by name."""
    left_out: Counter[str]
    """How many files are not read, by ending."""

    def left_out_line(self, data: str) -> str | None:
        """What was left out, as a sentence; None where nothing was."""
        if not self.left_out:
            return None
        count = sum(self.left_out.values())
        files = "file" if count == 1 else "files"
        return f"--data {data}: {count} {files} left out: {_counted(self.left_out)}. Read: {_KINDS}"


_KINDS = ".txt and .jsonl, also as .gz"


def is_hub_id(data: str) -> bool:
    """Whether the source is a data set of the Hugging Face Hub, ORGANIZATION/NAME; an existing path comes first."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", data)) and not _exists(Path(data))


def is_read(name: str) -> bool:
    """Whether a file of this relative path is read."""
    return not any(map(is_hidden, name.split("/"))) and kind_of(Path(name)) in READ


def kind_of(path: Path) -> str:
    """The ending that says how a file is read, in lower case: `.txt`, `.jsonl`, `.txt.gz`, ..."""
    name = path.name.lower()
    return next((kind for kind in READ if name.endswith(kind)), path.suffix.lower())


def files_of(data: str, root: Path | None = None) -> Source:
    """The files of a data source.

    Args:
        data: The source, as --data has it.
        root: Where a data set of the Hub was downloaded to.

    Raises:
        DataError: there is no such folder or file, or nothing readable in it.
        OSError: it cannot be looked at just now.
    """
    if data == "stdlib":
        return Source(_stdlib(), Counter())
    try:
        return _files_of(data, root or Path(data))
    except OSError as error:
        raise as_data_error(error, f"--data {data}: {error.filename or data}") from None


def as_data_error(error: OSError, where: str) -> Exception:
    """The line for a source that cannot be read for good; the error itself where it may be over in a moment."""
    if error.errno in _NOT_THERE or error.errno is None:
        return DataError(f"{where}: {error.strerror or error}")
    return error


def _files_of(data: str, root: Path) -> Source:
    with within("looking at the data", where=root):
        is_file, is_folder = root.is_file(), root.is_dir()
    if not is_file and not is_folder:
        raise DataError(
            f"--data {data}: no such folder or file on this machine. Mount a folder of .txt or .jsonl files, name a "
            "data set of the Hugging Face Hub (ORGANIZATION/NAME), or use stdlib"
        )
    found = [(root.name, root)] if is_file else sorted(_walk(root))
    files, left_out = [], Counter[str]()
    for name, path in found:
        with within("looking at the data", where=path):
            try:
                status = path.stat()
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP):
                    raise
                left_out["broken links"] += 1
                continue
        if not stat.S_ISREG(status.st_mode):
            left_out["not a file"] += 1
        elif (kind := kind_of(path)) in READ:
            files.append(SourceFile(name, path, status.st_size))
        else:
            left_out[kind or "no ending"] += 1
    if not files:
        raise nothing_readable(data, left_out)
    return Source(files, left_out)


def nothing_readable(data: str, left_out: Counter[str]) -> DataError:
    """The line for a source without any text."""
    others = f" It has other files: {_counted(left_out)}." if left_out else ""
    return DataError(
        f"--data {data}: no .txt or .jsonl file in it.{others} Convert other formats (parquet, say) to .jsonl with a "
        "`text` field"
    )


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{kind} ({number})" for kind, number in kinds.most_common(8)) + ", ..." * (len(kinds) > 8)


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    """The files below a folder as (relative path, path), through links to folders, each folder once.

    Real folders come before linked ones: so a file is known by the same name with and without links to it.
    """
    seen: set[str] = set()
    folders, links = [root], []
    while folders or links:
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
    """Whether it is a folder or a link to one; a link that leads nowhere is none."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def is_hidden(name: str) -> bool:
    """Whether a file or folder is the file system's, an archive's or a tool's rather than somebody's text."""
    return name.startswith(".") or name == "__MACOSX"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _stdlib() -> list[SourceFile]:
    """The standard library's own source, up to 8 MB of it; a text that is on every machine with a Python."""
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
