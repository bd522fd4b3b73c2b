"""Reading a data source: its files, and their documents piece by piece."""

import errno
import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trainer.finetune import sources, text
from trainer.finetune.sources import DataError


def tree(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def names(root: Path) -> list[str]:
    return [file.name for file in sources.files_of(str(root)).files]


def read(root: Path, errors: str = "strict") -> list[str]:
    found = text.documents(sources.files_of(str(root)).files, lambda: None, errors)
    return ["".join(document) for document in found]


# -- which files ------------------------------------------------------------------------------------------------------


def test_endings_in_capitals_and_gzipped_files_are_read(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "src",
        {
            "A.TXT": "one",
            "b.txt.gz": gzip.compress(b"two"),
            "c.Jsonl": '{"text": "three"}\n',
            "d.JSONL.GZ": gzip.compress(b'{"text": "four"}\n{"text": "five"}'),
        },
    )
    assert read(root) == ["one", "two", "three", "four", "five"]
    assert read(root / "b.txt.gz") == ["two"]


def test_dot_files_and_what_archives_leave_are_no_text(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "src",
        {"a.txt": "a", "._a.txt": b"\0\5\26\7\xff", ".hidden.txt": "h", "__MACOSX/._a.txt": b"\xff", ".git/x.txt": "x"},
    )
    tree(root, {"__MACOSX/b.txt": "b", "c/__MACOSX/d.txt": "d"})
    assert names(root) == ["a.txt"]
    assert not sources.files_of(str(root)).ignored


def test_linked_folders_are_followed_once_and_without_loops(tmp_path: Path) -> None:
    tree(tmp_path / "elsewhere", {"deep/b.txt": "b"})
    root = tree(tmp_path / "src", {"real/a.txt": "a"})
    (root / "0-linked").symlink_to(tmp_path / "elsewhere")
    (root / "0-again").symlink_to(root / "real")
    (root / "real" / "loop").symlink_to(root)
    (root / "file.txt").symlink_to(tmp_path / "elsewhere" / "deep" / "b.txt")
    (root / "gone.txt").symlink_to(tmp_path / "nowhere")
    (root / "self.txt").symlink_to(root / "self.txt")
    assert names(root) == ["0-linked/deep/b.txt", "file.txt", "real/a.txt"]
    assert sources.files_of(str(root)).ignored == {"broken links": 2}


def test_a_stop_ends_the_listing_at_each_folder_and_file(tmp_path: Path) -> None:
    """Each takes a request; a source may have a million files."""

    class StopNow(Exception):
        pass

    root = tree(tmp_path / "src", {"a.txt": "a", "b.txt": "b", "sub/c.txt": "c", "sub/deep/d.txt": "d"})
    for passed in range(3 + 4):
        left = iter(range(passed))

        def check_stop(left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise StopNow

        with pytest.raises(StopNow):
            sources.files_of(str(root), check_stop=check_stop)


def test_what_is_left_out_is_counted_in_a_line(tmp_path: Path) -> None:
    root = tree(tmp_path / "src", {"a.txt": "a", "b.pdf": "", "c.PDF": "", "d.docx": "", "e.tar.gz": "", "README": ""})
    line = sources.files_of(str(root)).ignored_line("/data")
    assert line is not None
    assert line.startswith("--data /data: 5 files ignored: .pdf (2), ")
    assert {".docx (1)", ".gz (1)", "no ending (1)"} <= set(
        line.partition(": ")[2].split(": ")[1].split(". ")[0].split(", ")
    )
    assert sources.files_of(str(root / "a.txt")).ignored_line("/data") is None


def test_a_folder_without_text_says_what_it_has(tmp_path: Path) -> None:
    root = tree(tmp_path / "src", {"a.parquet": "x", "b.parquet": "x"})
    with pytest.raises(DataError, match=r"no \.txt or \.jsonl file in it\. It has other files: \.parquet \(2\)\."):
        sources.files_of(str(root))


@pytest.mark.parametrize(("number", "kind"), [(errno.EACCES, DataError), (errno.EIO, OSError)])
def test_a_folder_that_cannot_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    """Ignored silently, the run would train on half of the text; transient errors are retried."""
    root = tree(tmp_path / "src", {"a.txt": "a", "sub/b.txt": "b"})
    real = os.scandir

    def forbidden(path: Any) -> Any:
        if Path(path).name == "sub":
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(kind, match="sub") as refused:
        sources.files_of(str(root))
    assert os.strerror(number) in str(refused.value)


# -- their text -------------------------------------------------------------------------------------------------------


def test_line_ends_and_marks_at_the_beginning_are_as_in_a_text_file(tmp_path: Path) -> None:
    tree(
        tmp_path,
        {"a.txt": b"\xef\xbb\xbfone\r\ntwo\rthree\n\0", "b.jsonl": b'\xef\xbb\xbf{"text": "x"}\r\n\r{"text": "y"}\r'},
    )
    assert read(tmp_path) == ["one\ntwo\nthree\n\0", "x", "y"]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 16])
def test_pieces_of_any_size_are_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(text, "BLOCK_BYTES", block)
    content = "é\r\n€ 𝄞\r\r\n\n" * 3 + "\r"
    lines = [json.dumps({"text": f"{n} é𝄞\n"}, ensure_ascii=n % 2 == 0) for n in range(5)]
    tree(tmp_path, {"a.txt": content, "b.jsonl": "\r\n".join(lines), "c.txt.gz": gzip.compress(content.encode())})
    expected = content.replace("\r\n", "\n").replace("\r", "\n")
    assert read(tmp_path) == [expected, *(json.loads(line)["text"] for line in lines), expected]


WRONG = [
    ("a.txt", b"one\ntw\xc3\xa9 \xffo", "a.txt, line 2: not UTF-8 at byte 9. "),
    ("a.txt", b"one\r\n\r\n\xff", "line 3: not UTF-8 at byte 7"),
    ("a.txt", b"cut \xe2\x82", "line 1: not UTF-8 at byte 4"),
    ("a.txt", "text".encode("utf-16"), "not UTF-8 but UTF-16"),
    ("a.txt.gz", gzip.compress(b"ok\n\xff", mtime=0), "line 2: not UTF-8 at byte 3 of the decompressed text"),
    ("a.txt.gz", gzip.compress(b"long enough to be cut" * 9, mtime=0)[:-9], "not a whole gzip file"),
    ("a.txt.gz", b"no gzip", "not a whole gzip file"),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xc3\xa9\xff"}\n', "a.jsonl, line 2: not UTF-8 at byte 26"),
    ("a.jsonl", '{"text": "é"}\n{"text": é}\n'.encode(), "line 2: not JSON at byte 24 (Expecting value)"),
    ("a.jsonl", b'\xef\xbb\xbf{"text": nope}', "line 1: not JSON at byte 12"),
    ("a.jsonl", b'{"text": "a"}\n\n{"body": 1}\n', "line 3 (from byte 15): no `text` field"),
    ("a.jsonl", b'{"text": "a"}\r{"text": 1}', "line 2 (from byte 14): no `text` field"),
    ("a.jsonl", b"[" * 100_000, "line 1: not JSON at byte 0 (nested too deeply)"),
]


@pytest.mark.parametrize("block", [5, 1 << 16])
@pytest.mark.parametrize(("name", "content", "said"), WRONG)
def test_what_is_wrong_with_a_file_is_said_with_its_line_and_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, said: str, block: int
) -> None:
    monkeypatch.setattr(text, "BLOCK_BYTES", block)
    tree(tmp_path, {name: content})
    with pytest.raises(DataError) as refused:
        read(tmp_path)
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EACCES, DataError), (errno.EIO, OSError), (errno.ENOTCONN, OSError)]
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    tree(tmp_path, {"a.txt": "a"})

    def fails(*args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(text, "opened", fails)
    with pytest.raises(kind, match=r"a\.txt") as refused:
        read(tmp_path)
    assert type(refused.value) is kind or isinstance(refused.value, OSError)


def test_a_source_that_hangs_is_what_the_attempt_leaves_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call on the source has a deadline like one on the bucket, and the error names the source."""
    from trainer.bucket import deadlines

    tree(tmp_path, {"a.txt": "a"})
    watched = []

    def look(*args: Any, **options: Any) -> Any:
        watched.extend((call.what, call.where) for call in deadlines._under_way.values())
        return opened(*args, **options)

    opened = Path.open
    monkeypatch.setattr(Path, "open", look)
    assert read(tmp_path) == ["a"]
    assert watched == [("opening the data file a.txt", tmp_path / "a.txt")]


# -- lines of any length ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lines and strings count as long from a few bytes on."""

    def set_block(block: int) -> None:
        monkeypatch.setattr(text, "BLOCK_BYTES", block)
        monkeypatch.setattr(text, "LONG_LINE", 150)
        monkeypatch.setattr(text, "LONG_STRING", 8)

    return set_block


@pytest.mark.parametrize("block", [1, 5, 64, 1 << 16])
def test_a_long_line_gives_the_text_that_json_gives(
    tmp_path: Path, small_limits: Callable[[int], None], block: int
) -> None:
    rng = random.Random(0)
    alphabet = ["a", "é", "𝄞", "\n", '"', "\\", "\t", "\ud83d", " ", "/", "{", "]", "text"]
    lines = []
    for number in range(60):
        body = "".join(rng.choices(alphabet, k=rng.choice([3, 150, 400])))
        extra = {
            "id": number,
            "note": "".join(rng.choices(alphabet[:6], k=40)),
            "deep": {"text": "not this one" * 3, "n": [1]},
        }
        fields = [("text", body), *extra.items()]
        rng.shuffle(fields)
        ascii_only = bool(number % 2) or "\ud83d" in body + str(extra["note"])
        lines.append(json.dumps(dict(fields), ensure_ascii=ascii_only))
    tree(tmp_path, {"a.jsonl": "\n".join(lines) + ("\r\n" if block % 2 else "")})
    small_limits(block)
    assert read(tmp_path) == [json.loads(line)["text"] for line in lines]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "' + "a" * 300, "Unterminated string"),
        ('{"text": "' + "a" * 300 + '\\x"}', "escape"),
        ('{"text": "' + "a" * 300 + '"', "Expecting"),
        ('{"text": "' + "a" * 300 + '", "text": "b"}', "duplicate key 'text'"),
        ('{"other": "' + "a" * 300 + '"}', "no `text` field"),
        ('{"text": "' + "a" * 300 + "\t" + '"}', "Invalid control character"),
    ],
)
def test_what_is_wrong_with_a_long_line_is_said(
    tmp_path: Path, small_limits: Callable[[int], None], line: str, said: str
) -> None:
    tree(tmp_path, {"a.jsonl": '{"text": "first"}\n' + line + '\n{"text": "last"}\n'})
    small_limits(16)
    with pytest.raises(DataError, match=r"a\.jsonl, line 2 \(from byte 18\): ") as refused:
        read(tmp_path)
    assert said in str(refused.value)


MEASURE = """
import resource, sys
from trainer.finetune import sources
from trainer.finetune import text
files = sources.files_of(sys.argv[1]).files
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = sum(len(piece) for document in text.documents(files, lambda: None) for piece in document)
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_reading_takes_little_memory_whatever_the_size(tmp_path: Path, name: str) -> None:
    """A file of 60 MB that is a single line."""
    piece, count = b"to be or not to be " * 1000, 3200
    with gzip.open(tmp_path / name, "wb", 1) if name.endswith(".gz") else (tmp_path / name).open("wb") as file:
        file.write(b'{"id": 1, "text": "' if name == "a.jsonl" else b"")
        for _ in range(count):
            file.write(piece)
        file.write(b'"}' if name == "a.jsonl" else b"")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / name], capture_output=True, text=True, check=True, timeout=120
    )
    read_, grown_kb = map(int, done.stdout.split())
    assert read_ == len(piece) * count
    assert grown_kb < 50_000
