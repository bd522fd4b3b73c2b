"""The file system that fails where it is told to: each of its abilities, on a real mount."""

import errno
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import faultfs
import pytest
from bucket_lab import is_mounted, until
from faultfs import Client
from support import clean_env

pytestmark = pytest.mark.skipif(faultfs.missing() is not None, reason=str(faultfs.missing()))


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Client, Path]]:
    folder = tmp_path_factory.mktemp("faultfs")
    behind = folder / "behind"
    behind.mkdir()
    with faultfs.mounted(behind, folder / "m") as client:
        yield client, behind


@pytest.fixture
def faults(mount: tuple[Client, Path]) -> Iterator[Client]:
    client, _ = mount
    yield client
    client.clear()


@pytest.fixture
def here(mount: tuple[Client, Path], request: pytest.FixtureRequest) -> Path:
    """A folder on the mount for each test."""
    folder = mount[0].point / request.node.name.translate(str.maketrans("[]/", "---"))
    folder.mkdir()
    return folder


@pytest.fixture
def behind(mount: tuple[Client, Path], here: Path) -> Path:
    """The same folder, behind the mount."""
    return mount[1] / here.name


def write(path: Path, data: bytes = b"abcd" * 25, pieces: int = 4) -> None:
    """As the trainer does: front to back, fsync, close."""
    with path.open("xb", buffering=0) as file:
        size = len(data) // pieces
        for start in range(0, len(data), size):
            assert file.write(data[start : start + size]) == size
        os.fsync(file.fileno())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def number_of(call: Callable[[], object]) -> int:
    """The error that a call fails with."""
    with pytest.raises(OSError) as caught:  # noqa: PT011 - its number is what is asked for
        call()
    return caught.value.errno or 0


def test_what_is_written_front_to_back_is_in_the_folder_behind(here: Path, behind: Path) -> None:
    (here / "deep").mkdir()
    write(here / "deep" / "a", os.urandom(3_000_000), pieces=3)
    assert (behind / "deep" / "a").read_bytes() == (here / "deep" / "a").read_bytes()
    (here / "deep" / "a").write_bytes(b"anew")  # Emptied as it is opened.
    assert (behind / "deep" / "a").read_bytes() == b"anew"
    assert names(here) == ["deep"]
    (here / "deep" / "a").unlink()
    (here / "deep").rmdir()
    assert not any(behind.iterdir())


def seek_back(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        file.write(b"12345678")
        file.seek(0)
        file.write(b"1")


def leave_a_hole(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        file.seek(5)
        file.write(b"1")


def cut(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        file.write(b"12345678")
        file.truncate(0)


def write_by_mmap(path: Path) -> None:
    with path.open("w+b", buffering=0) as file:
        file.write(b"12345678")
        mmap.mmap(file.fileno(), 8)


REFUSED: dict[str, tuple[Callable[[Path], object], int]] = {
    "seeking back": (seek_back, errno.EPERM),
    "a hole": (leave_a_hole, errno.EPERM),
    "appending": (lambda path: path.open("ab"), errno.EPERM),
    "writing over": (lambda path: path.open("r+b"), errno.EPERM),
    "cutting": (cut, errno.EPERM),
    "cutting by name": (lambda path: os.truncate(path, 1), errno.EPERM),
    "renaming": (lambda path: path.rename(path.with_name("b")), errno.EPERM),
    "linking": (lambda path: path.with_name("b").hardlink_to(path), errno.EPERM),
    "a symbolic link": (lambda path: path.with_name("b").symlink_to(path), errno.EPERM),
    "mmap": (write_by_mmap, errno.ENODEV),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_goofys_refuses_is_refused(here: Path, what: str) -> None:
    (here / "a").write_bytes(b"1234")
    call, number = REFUSED[what]
    assert number_of(lambda: call(here / "a")) == number


def test_a_file_that_is_open_can_be_deleted_and_no_trace_is_left(here: Path, behind: Path) -> None:
    write(here / "a")
    with (here / "a").open("rb"):
        (here / "a").unlink()
        assert not any(behind.iterdir())


CALLS: dict[str, Callable[[Path], object]] = {
    "open": lambda folder: (folder / "full").read_bytes(),
    "create": lambda folder: write(folder / "new"),
    "write": lambda folder: write(folder / "new"),
    "fsync": lambda folder: write(folder / "new"),
    "close": lambda folder: write(folder / "new"),
    "mkdir": lambda folder: (folder / "new").mkdir(),
    "unlink": lambda folder: (folder / "full").unlink(),
    "read": lambda folder: (folder / "full").read_bytes(),
    "list": lambda folder: names(folder),
}
NUMBERS = [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.ENOTCONN, errno.EACCES]


@pytest.mark.parametrize("call", CALLS)
def test_any_call_fails_as_it_was_told_to_and_hits_are_counted(faults: Client, here: Path, call: str) -> None:
    write(here / "full")
    for hits, number in enumerate(NUMBERS, start=1):
        faults.fail(call, number)
        assert number_of(lambda: CALLS[call](here)) == number
        assert faults.hits() == hits
        (here / "new").unlink(missing_ok=True)
    CALLS[call](here)
    assert faults.clear() == len(NUMBERS)
    assert faults.hits() == 0


def test_the_nth_call_fails_and_so_many_after_it_on_files_of_that_name_alone(faults: Client, here: Path) -> None:
    faults.fail("write", errno.ENOSPC, after=5, times=2, suffix=".bin")
    write(here / "other")
    write(here / "1.bin")
    assert faults.hits() == 0
    for name in ("2.bin", "3.bin"):
        assert number_of(lambda name=name: write(here / name)) == errno.ENOSPC
    assert len((here / "2.bin").read_bytes()) == 25  # Its second write() was the sixth.
    write(here / "4.bin")
    assert faults.hits() == 2


def test_a_fault_that_nothing_ran_into_is_not_counted(faults: Client, here: Path) -> None:
    faults.fail("mkdir", errno.EIO)
    write(here / "a")
    assert faults.clear() == 0
    (here / "b").mkdir()  # Forgotten.


@pytest.mark.parametrize("call", ["write", "close", "list"])
def test_a_call_hangs_until_it_is_let_go_and_others_do_not(faults: Client, here: Path, call: str) -> None:
    (here / "beside").mkdir()  # While a folder is listed, the kernel lets nobody write into it.
    write(here / "full")
    faults.hang(call)
    thread = threading.Thread(target=CALLS[call], args=(here,), daemon=True)
    thread.start()
    until("it hangs", lambda: faults.hits() == 1)
    write(here / "beside" / "a")
    assert thread.is_alive()
    assert faults.clear() == 1
    thread.join(10)
    assert not thread.is_alive()


def test_a_call_is_delayed(faults: Client, here: Path) -> None:
    faults.delay("fsync", 0.3)
    begun = time.monotonic()
    write(here / "a")
    assert time.monotonic() - begun >= 0.3
    assert faults.hits() == 1


def test_a_write_takes_less_than_it_is_given_and_says_so(faults: Client, here: Path) -> None:
    faults.cut_short(0.4, after=1)
    with (here / "a").open("xb", buffering=0) as file:
        assert [file.write(b"0123456789") for _ in range(3)] == [10, 4, 10]
    assert (here / "a").read_bytes() == b"0123456789" + b"0123" + b"0123456789"
    assert faults.hits() == 1


def test_a_file_is_torn_as_it_is_closed_and_nobody_says_so(faults: Client, here: Path, behind: Path) -> None:
    faults.tear(0.5, suffix=".bin", after=1)
    for name in ("a.txt", "1.bin", "2.bin", "3.bin"):
        write(here / name)
    assert [len((behind / name).read_bytes()) for name in ("a.txt", "1.bin", "2.bin", "3.bin")] == [100, 100, 50, 100]
    assert (here / "2.bin").stat().st_size == 50
    assert faults.hits() == 1


def test_a_listing_is_stale_and_a_file_is_not(faults: Client, here: Path) -> None:
    for name in ("early", "deleted"):
        write(here / name)
    then = time.monotonic() + 0.3
    until("that is a while ago", lambda: time.monotonic() > then + 2)
    write(here / "late")
    (here / "folder").mkdir()
    (here / "deleted").unlink()
    assert names(here) == ["early", "folder", "late"]
    faults.stale(time.monotonic() - then)
    assert names(here) == ["deleted", "early"]
    assert (here / "late").read_bytes()  # It is there all the same.
    assert number_of((here / "deleted").stat) == errno.ENOENT
    assert faults.hits() == 1
    until("it is seen", lambda: names(here) == ["early", "folder", "late"], 5)
    faults.stale(60)
    faults.clear()
    assert names(here) == ["early", "folder", "late"]


def test_nothing_is_left_over_when_the_process_that_mounted_it_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys, time, pathlib\n"
        f"sys.path.insert(0, {str(Path(faultfs.__file__).parent)!r})\n"
        "import faultfs\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "with faultfs.mounted(folder, folder / 'm') as client:\n"
        "    client.hang('list')\n"
        "    print(client.daemon.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=clean_env())
    assert process.stdout
    daemon = int(process.stdout.readline())
    point = tmp_path / "m" / "mount"
    assert is_mounted(point)
    process.kill()
    process.communicate()
    until("neither is there", lambda: not is_mounted(point) and not Path(f"/proc/{daemon}/cmdline").exists())
