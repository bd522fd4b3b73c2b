"""The reader of torch files, by a process of the task's Python: skyspot does not import torch."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from skyspot.rehearsal.compare.rules import FormatError, Key
from skyspot.rehearsal.compare.tensors import PIECE, Entry, Tensor, pieces_of

PROGRAM = Path(__file__).with_name("torch_program.py")
_MAGIC = (b"PK\x03\x04", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.")
"""How files of torch.save begin: a zip archive, or the pickled number of the older format."""


@contextmanager
def torch_entries(path: Path, python: str) -> Iterator[list[Entry]]:
    """List what a torch file holds. The tensors can be read once, in their order.

    Raises:
        FormatError: it is no torch file, this Python has no torch, or a class would have to be unpickled.
    """
    with path.open("rb") as file:
        if not file.read(20).startswith(_MAGIC):
            raise FormatError("no torch file")
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                [python, str(PROGRAM), str(path)],
                stdin=subprocess.PIPE,  # Its end says that this program is dead.
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        except OSError as error:
            raise FormatError(f"{python}: {error.strerror}") from None
        assert process.stdin
        assert process.stdout
        with process.stdin, process.stdout:
            try:
                first = process.stdout.readline()
                if not first.endswith(b"\n"):
                    process.wait()
                    errors.seek(0)
                    lines = errors.read().decode(errors="replace").strip().splitlines()
                    raise FormatError(lines[-1] if lines else f"{python} ended without a word")
                yield _entries(json.loads(first), process.stdout)
            finally:
                process.kill()
                process.wait()


def _entries(header: dict[str, object], stream: IO[bytes]) -> list[Entry]:
    listed: list[dict[str, object]] = header["entries"]  # type: ignore[assignment]
    found: list[Entry] = []
    place, offset = [0], 0
    for entry in listed:
        path: tuple[Key, ...] = tuple(entry["path"])  # type: ignore[arg-type]
        if "dtype" not in entry:
            found.append((path, entry["value"]))
            continue
        size = int(entry["bytes"])  # type: ignore[call-overload]
        found.append(
            (path, Tensor(str(entry["dtype"]), tuple(entry["shape"]),  # type: ignore[arg-type]
                          _Forward(stream, place, offset, size), str(header["order"])))
        )  # fmt: skip
        offset += size
    return found


class _Forward:
    """Reads one tensor of a stream; the ones before it are skipped."""

    def __init__(self, stream: IO[bytes], place: list[int], start: int, size: int) -> None:
        self.stream, self.place, self.start, self.size = stream, place, start, size

    def __call__(self) -> Iterator[bytes]:
        """Read its bytes, PIECE at a time."""
        assert self.place[0] <= self.start, "the tensors are read in their order"
        while self.place[0] < self.start:
            self._read(min(PIECE, self.start - self.place[0]))
        yield from pieces_of(self._read, self.size)

    def _read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.place[0] += len(data)
        if len(data) < size:
            raise FormatError("torch ended before the last tensor")
        return data
