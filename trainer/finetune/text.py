r"""Reading a source's files as documents, each in pieces of text, so that memory does not grow with the size of a file.

A .txt file is one document. Each line of a .jsonl file is one document: its `text` field. Both may be gzipped. Text is
UTF-8; line ends become "\n", as in Python's text files.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from trainer.bucket.deadlines import opened, within
from trainer.finetune.sources import DataError, SourceFile, as_data_error, kind_of

BLOCK_BYTES = 1 << 16
LONG_LINE = 4 << 20
"""A longer line of .jsonl, in bytes, is parsed in pieces."""
LONG_STRING = 1 << 16
TAIL = 200
_LINE_END = re.compile(rb"\r\n?|\n")
_BOM = "\ufeff"


def documents(
    files: Iterable[SourceFile], check_stop: Callable[[], None], errors: str = "strict"
) -> Iterator[Iterator[str]]:
    """Read the documents of files. Each document must be read to its end before the next.

    Args:
        files: The files to read, in order.
        check_stop: Called at least once per 64 KB; raises to stop.
        errors: `replace` to tolerate bytes that are not UTF-8.

    Raises:
        DataError: a file is unreadable or has not the format of its ending; the message names line and byte.
        OSError: a file cannot be read now.
    """
    for file in files:
        check_stop()
        if kind_of(file.path).startswith(".jsonl"):
            yield from _lines_of(file.path, check_stop)
        else:
            yield _text_of(file.path, check_stop, errors)


def _blocks(path: Path, check_stop: Callable[[], None]) -> Iterator[bytes]:
    """The bytes of a file, decompressed if it is gzipped."""
    zipped = path.name.lower().endswith(".gz")
    try:
        with opened(path, f"the data file {path.name}", where=path) as raw:
            file = gzip.GzipFile(fileobj=raw) if zipped else raw
            while True:
                with within("reading the data", where=path):
                    block = file.read(BLOCK_BYTES)
                if not block:
                    return
                yield block
                check_stop()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}). Copy it again, or leave it out") from None
    except OSError as error:
        raise as_data_error(with_path(error, path), str(path)) from None


def with_path(error: OSError, path: Path) -> OSError:
    """An error of a call on an open file, with the file's path."""
    if error.filename is None and error.errno is not None:
        return OSError(error.errno, error.strerror, str(path))
    return error


class _Utf8:
    """An incremental decoder that reports the position of a wrong byte in the file."""

    def __init__(self, path: Path, errors: str = "strict", at: int = 0, line: int = 1) -> None:
        self._path, self._at, self._line = path, at, line
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)
        self._after_return = False

    def decode(self, data: bytes, final: bool = False) -> str:
        """Decode the next bytes.

        Raises:
            DataError: the bytes are not UTF-8.
        """
        pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(data, final)
        except UnicodeDecodeError as error:
            byte = self._at - pending + error.start
            line = self._line + self._line_ends(data[: max(0, error.start - pending)])
            raise DataError(_not_utf8(self._path, line, byte, data if self._at == 0 else b"")) from None
        self._line += self._line_ends(data)
        self._after_return = data.endswith(b"\r") if data else self._after_return
        self._at += len(data)
        return text

    def _line_ends(self, data: bytes) -> int:
        ends = data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")
        return ends - (self._after_return and data.startswith(b"\n"))


def _not_utf8(path: Path, line: int, byte: int, opening: bytes) -> str:
    if opening.startswith((b"\xff\xfe", b"\xfe\xff")):
        return f"{path}: not UTF-8 but UTF-16. Convert it (iconv -f UTF-16 -t UTF-8), or leave it out"
    of_what = " of the decompressed text" if path.name.lower().endswith(".gz") else ""
    return f"{path}, line {line}: not UTF-8 at byte {byte}{of_what}. Convert the file, or leave it out"


def _text_of(path: Path, check_stop: Callable[[], None], errors: str) -> Iterator[str]:
    """The pieces of a text file."""
    utf8 = _Utf8(path, errors)
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    first = True
    for block in _blocks(path, check_stop):
        text = newlines.decode(utf8.decode(block))
        if text:
            yield text.removeprefix(_BOM) if first else text
            first = False
    yield newlines.decode(utf8.decode(b"", final=True), final=True)


def _lines_of(path: Path, check_stop: Callable[[], None]) -> Iterator[Iterator[str]]:
    """The `text` of each line, as pieces."""
    line, number, start, searched, ended = bytearray(), 1, 0, 0, False
    blocks = _blocks(path, check_stop)
    while True:
        end = _LINE_END.search(line, searched)
        if end and (ended or end.end() < len(line) or end.group() != b"\r"):  # A "\n" may follow after "\r".
            yield from _document(bytes(line[: end.start()]), path, number, start)
            start, number, searched = start + end.end(), number + 1, 0
            del line[: end.end()]
        elif ended:
            break
        elif len(line) > LONG_LINE:
            long = LongLine(path, number, start, line, blocks)
            yield long.pieces()
            line, start, number, searched = long.rest, long.end, number + 1, 0
        else:
            searched = max(0, len(line) - 1)
            block = next(blocks, None)
            ended = block is None
            line += block or b""
    yield from _document(bytes(line), path, number, start)


def _document(line: bytes, path: Path, number: int, start: int) -> Iterator[Iterator[str]]:
    if line.strip():
        yield iter([_parsed(line, path, number, start)])


def _parsed(line: bytes, path: Path, number: int, start: int) -> str:
    """The `text` of a line of .jsonl; `start` is the line's first byte in the file."""
    text = _Utf8(path, at=start, line=number).decode(line, final=True)
    if start == 0 and text.startswith(_BOM):
        text, start = text[1:], len(_BOM.encode())
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        at = start + len(text[: getattr(error, "pos", 0)].encode())
        raise DataError(f"{path}, line {number}: not JSON at byte {at} ({_reason(error)})") from None
    return _text_field(found, path, number, start)


def _reason(error: BaseException) -> str:
    """The reason why a line is not JSON, without the position in the line."""
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(": line ")[0]


def _text_field(found: object, path: Path, number: int, start: int) -> str:
    text = found.get("text") if isinstance(found, dict) else None
    if not isinstance(text, str):
        raise DataError(f"{path}, line {number} (from byte {start}): no `text` field that holds a string")
    return text


class LongLine:
    """A line of .jsonl that is too long to parse at once.

    Its long strings are replaced by marks and read piece by piece; the rest of the line is parsed as JSON at the end.
    """

    _MARK = "\x00long"
    _CONTENT = re.compile(r'(?:[^"\\]+|\\(?:u[0-9a-fA-F]{4}|[^u]))*')
    _LONGEST_ESCAPE = 6
    _TEXT_KEY = re.compile(r'[{,]\s*"text"\s*:\s*$')

    def __init__(self, path: Path, number: int, start: int, opening: bytearray, blocks: Iterator[bytes]) -> None:
        """Begin a line at byte `start` of the file; `opening` is its part that was read, and `blocks` follow."""
        self._path, self._number, self._start = path, number, start
        self._opening, self._blocks = opening, blocks
        self._short: list[str] = []
        """The line without its long strings; `_tail` is its end."""
        self._tail = ""
        self._short_length = self._depth = self._long_texts = 0
        self._surrogate = ""
        """The first half of a surrogate pair, if a piece ended within the pair."""
        self.rest = bytearray()
        """The bytes that were read beyond the line, known when all pieces were read."""
        self.end = start
        """The first byte of the next line."""

    def pieces(self) -> Iterator[str]:
        """The pieces of the line's `text`."""
        text, at, inside, streaming, wanted = "", 0, False, False, False
        for piece in self._line():
            text, at = text[at:] + piece, 0
            while at < len(text):
                if not inside:
                    quote = text.find('"', at)
                    self._keep(text[at:] if quote < 0 else text[at:quote], structure=True)
                    at, inside = (len(text), False) if quote < 0 else (quote + 1, True)
                    streaming = False
                    continue
                content = self._CONTENT.match(text, at)
                assert content  # It may be empty.
                end, closed = content.end(), text.startswith('"', content.end())
                if not closed and len(text) - end >= self._LONGEST_ESCAPE:
                    raise self._error("Invalid \\\\escape")
                if closed and not streaming and end - at <= LONG_STRING:
                    self._keep(f'"{text[at:end]}"')
                elif closed or streaming or end - at > LONG_STRING:
                    if not streaming:
                        streaming, wanted = True, self._is_text_value()
                        self._keep(json.dumps(self._MARK if wanted else ""))
                    decoded = self._decoded(text[at:end], last=closed)
                    if wanted:
                        yield decoded
                    at = end
                if not closed:
                    break
                at, inside = end + 1, False
        if inside:
            raise self._error("Unterminated string")
        yield from self._at_the_end()

    def _line(self) -> Iterator[str]:
        """The decoded line, block by block."""
        utf8 = _Utf8(self._path, at=self._start, line=self._number)
        data, first = bytes(self._opening), True
        self._opening = bytearray()
        while data:
            end = _LINE_END.search(data)
            text = utf8.decode(data[: end.start()] if end else data, final=bool(end))
            yield text.removeprefix(_BOM) if first and self._start == 0 else text
            first = False
            if end:
                self.end += end.end()
                self.rest += data[end.end() :]
                if end.group() == b"\r" and not self.rest:
                    self.rest += next(self._blocks, b"")
                    if self.rest.startswith(b"\n"):
                        self.end += 1
                        del self.rest[:1]
                return
            self.end += len(data)
            data = next(self._blocks, b"")
        yield utf8.decode(b"", final=True)

    def _decoded(self, content: str, last: bool) -> str:
        """A part of a string with its escapes decoded; the part may begin or end within a surrogate pair."""
        try:
            text = self._surrogate + str(json.loads(f'"{content}"'))
        except ValueError as error:
            raise self._error(_reason(error)) from None
        if self._surrogate and "\udc00" <= text[1:2] <= "\udfff":
            text = text[:2].encode("utf-16", "surrogatepass").decode("utf-16") + text[2:]
        self._surrogate = ""
        if not last and "\ud800" <= text[-1:] <= "\udbff":
            self._surrogate = text[-1]
            text = text[:-1]
        return text

    def _is_text_value(self) -> bool:
        """True if the string that begins here is the value of the line's `text`."""
        is_text = self._depth == 1 and self._TEXT_KEY.search(self._tail) is not None
        self._long_texts += is_text
        return is_text

    def _keep(self, text: str, structure: bool = False) -> None:
        self._short.append(text)
        self._short_length += len(text)
        self._tail = (self._tail + text[-TAIL:])[-TAIL:]
        if structure:
            self._depth += text.count("{") + text.count("[") - text.count("}") - text.count("]")
        if self._short_length > 2 * LONG_LINE:
            raise DataError(
                f"{self._path}, line {self._number} (from byte {self._start}): more than {2 * LONG_LINE >> 20} MB "
                "besides its long strings. Remove the other fields"
            )

    def _error(self, reason: str) -> DataError:
        return DataError(f"{self._path}, line {self._number} (from byte {self._start}): not JSON ({reason})")

    def _at_the_end(self) -> Iterator[str]:
        """Check the whole line, and yield a short `text`."""

        def no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
            if self._long_texts and sum(key == "text" for key, _ in pairs) > 1:
                raise ValueError("duplicate key 'text'")
            return dict(pairs)

        try:
            found = json.loads("".join(self._short), object_pairs_hook=no_duplicates)
        except (ValueError, RecursionError) as error:
            raise self._error(_reason(error)) from None
        text = _text_field(found, self._path, self._number, self._start)
        if not self._long_texts:
            yield text
