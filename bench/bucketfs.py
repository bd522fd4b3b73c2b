"""What a bucket served through FUSE costs a script that computes and saves, beside a bucket that is bound.

    python -m bench.bucketfs [--rate GB] [--rounds N] [--folder FOLDER] [--realtime] [--report FILE]

Rounds take turns on the same kind of machine of a rehearsal, in the folder where rehearsals run (TMPDIR). The script
times itself. It saves so many GB a second on average (1 by default), or as fast as the disk takes them. The bound that
the project holds itself to: at most 1.10x, as the median of the pairs. Exit status 1 means that it did not hold. The
daemon works beside the script, which needs a second core. On a machine that does something else, `--realtime` (as root)
has the script and the daemon run before all other programs.

The processor's time is that of the script and of the daemon, per GB written. The second table has single calls.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench import sections
from bench.machine import load
from bench.report import table
from skyspot.rehearsal.machine import Machine, bucketfs_missing
from skyspot.rehearsal.task import read_task

BOUND = 1.10
SAVES, SAVE_MIB = 24, 64
POINT = "/checkpoints"
SCRIPT = """
import sys, time, zlib
block, work = b"x" * ({mib} << 20), memoryview(bytes(1 << 20))
print("begun", flush=True)
begun, used = time.perf_counter(), time.process_time()
for number in range({saves}):
    for _ in range({work}):
        zlib.crc32(work)
    with open(f"{point}/save-{{number % 2}}", "wb") as file:
        file.write(block)
print(time.perf_counter() - begun, time.process_time() - used, flush=True)
"""
CALLS = """
import os, time
os.chdir("{point}")
part, log = bytes(64 << 10), open("log", "a")

def line():
    print("step 1 loss 0.5", file=log, flush=True)

def replace():
    with open("tmp", "w") as file:
        file.write("step 1")
    os.replace("tmp", "small")

def write():
    data.write(part)

def look():
    os.path.exists("small")

print("begun", flush=True)
with open("data", "wb", buffering=0) as data:
    for do in (line, replace, write, look):
        begun = time.perf_counter()
        for _ in range(200):
            do()
        print((time.perf_counter() - begun) / 200 * 1e6, flush=True)
"""
NAMES = ("a line to a log, flushed", "a small file, renamed over another", "a write of 64 KiB", "a look for a file")


@dataclass(frozen=True)
class Cost:
    """What one run took, in seconds."""

    wall: float
    script: float
    """Of the processor."""
    daemon: float
    """Of the processor."""


def run(folder: Path, served: bool, program: str) -> tuple[list[str], float]:
    """Run a program on one new machine; return the lines after its first, and the daemon's processor time since."""
    bucket = folder / "bucket"
    bucket.mkdir(exist_ok=True)
    task = read_task(f"run: unused\nfile_mounts: {{{POINT}: {{name: bucket, mode: MOUNT}}}}\n", folder, {}, None)
    machine = Machine(task, folder / "leg" / "machine", {POINT: bucket}, {}, {POINT: "local"} if served else {})
    machine.log.unlink(missing_ok=True)
    used: list[float] = []
    try:
        (folder / "program.py").write_text(program)
        machine.start(f"python {folder / 'program.py'}")
        daemon: psutil.Process | None = None
        while machine.poll() is None:
            time.sleep(0.02)
            if machine.log.stat().st_size and served:
                daemon = daemon or find_daemon(machine)
                with suppress(psutil.Error):
                    used.append(sum(daemon.cpu_times()[:2]))
        return machine.log.read_text().splitlines()[1:], used[-1] - used[0] if used else 0.0
    finally:
        machine.take()


def find_daemon(machine: Machine) -> psutil.Process:
    """Find the process that serves the machine's bucket."""
    assert machine.process
    inside = psutil.Process(machine.process.pid).children(recursive=True)
    return next(one for one in inside if any("bucketfs.serve" in word for word in one.cmdline()))


def seconds(folder: Path, served: bool, work: int, saves: int = SAVES) -> Cost:
    """What the script that computes and saves takes."""
    program = SCRIPT.format(mib=SAVE_MIB, saves=saves, work=work, point=POINT)
    (line,), daemon = run(folder, served, program)
    wall, script = map(float, line.split())
    return Cost(wall, script, daemon)


def calibrate(folder: Path, gb_per_s: float) -> int:
    """How often the script sums up a MiB between two saves, for that average."""
    save_s = seconds(folder, False, 0).wall / SAVES
    unit_s = (seconds(folder, False, 1000, 1).wall - save_s) / 1000
    return max(0, int(((SAVE_MIB << 20) / 1e9 / gb_per_s - save_s) / unit_s))


def described(pairs: list[tuple[Cost, Cost]], calls: list[list[str]]) -> str:
    """The tables, as Markdown: of the script, bound and served, and of single calls."""
    size_gb = SAVES * SAVE_MIB * (1 << 20) / 1e9
    rows = []
    for title, index in (("bound", 0), ("served through FUSE", 1)):
        wall, script, daemon = (
            statistics.median(getattr(pair[index], name) for pair in pairs) for name in ("wall", "script", "daemon")
        )
        rows.append([title, f"{wall:.2f} s", f"{size_gb / wall:.2f} GB/s", f"{script / size_gb:.2f} s",
                     f"{daemon / size_gb:.2f} s"])  # fmt: skip
    header = ["The bucket", "The script takes", "Rate", "Its CPU per GB", "The daemon's"]
    single = [[name, *(f"{float(cost):.0f} us" for cost in costs)] for name, *costs in zip(NAMES, *calls, strict=True)]
    return f"{table(header, rows)}\n\n{table(['A call', 'bound', 'served through FUSE'], single)}"


def median_ratio(pairs: list[tuple[Cost, Cost]]) -> float:
    """How many times as long the script takes."""
    return statistics.median(served.wall / bound.wall for bound, served in pairs)


def main() -> int:
    """Measure, print and report; returns 1 if the bound does not hold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--realtime", action="store_true")
    parser.add_argument("--report", type=Path, default=sections.PERFORMANCE, help="file for the report")
    options = parser.parse_args()
    if missing := bucketfs_missing():
        print(f"A bucket served through FUSE: not measured: {missing}")
        return 0
    if options.realtime:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    before = load()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="skyspot-bench-") as name:
        folder = Path(name)
        work = calibrate(folder, options.rate)
        pairs = [(seconds(folder, False, work), seconds(folder, True, work)) for _ in range(options.rounds)]
        calls = [run(folder, served, CALLS.format(point=POINT))[0] for served in (False, True)]
    ratio = median_ratio(pairs)
    holds = "holds" if ratio <= BOUND else "does **not** hold"
    each = " ".join(f"{median_ratio([pair]):.2f}" for pair in sorted(pairs, key=lambda pair: median_ratio([pair])))
    command = (
        f"python -m bench.bucketfs --rate {options.rate:g} --rounds {len(pairs)}{' --realtime' * options.realtime}"
    )
    text = sections.paragraphs(
        f"A script that computes and saves {options.rate:g} GB/s, in a bucket that `skyspot rehearse` serves through "
        f"FUSE and in one that is bound: {ratio:.2f} times as long (median of {len(pairs)} pairs: {each}). The bound "
        f"is {BOUND:g}x, and it {holds}.",
        described(pairs, calls),
        sections.when(command, (before, load())),
    )
    print(text)
    sections.put(options.report, sections.BUCKETFS, text)
    return int(ratio > BOUND)


if __name__ == "__main__":
    sys.exit(main())
