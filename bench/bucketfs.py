"""What a bucket served through FUSE costs a script that computes and saves, beside a bucket that is bound.

    python bench/bucketfs.py [--rate GB] [--rounds N] [--folder FOLDER]

Rounds take turns on the same kind of machine of a rehearsal, in the folder where rehearsals run (TMPDIR). The script
times itself. It saves so many GB a second on average (1 by default), or as fast as the disk takes them. The bound that
the project holds itself to: at most 1.10x, as the median of the pairs. Exit status 1 means that it did not hold: do
not measure on a machine that does something else.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from skyspot.rehearsal.machine import Machine, bucketfs_missing
from skyspot.rehearsal.task import read_task

BOUND = 1.10
SAVES, SAVE_MIB = 24, 64
POINT = "/checkpoints"
SCRIPT = """
import sys, time, zlib
block, work = b"x" * ({mib} << 20), memoryview(bytes(1 << 20))
begun = time.perf_counter()
for number in range({saves}):
    for _ in range({work}):
        zlib.crc32(work)
    with open(f"{point}/save-{{number % 2}}", "wb") as file:
        file.write(block)
print(time.perf_counter() - begun)
"""


def seconds(folder: Path, served: bool, work: int, saves: int = SAVES) -> float:
    """How long the script takes on one new machine."""
    bucket = folder / "bucket"
    bucket.mkdir(exist_ok=True)
    task = read_task(f"run: unused\nfile_mounts: {{{POINT}: {{name: bucket, mode: MOUNT}}}}\n", folder, {}, None)
    machine = Machine(task, folder / "leg" / "machine", {POINT: bucket}, {}, {POINT: "local"} if served else {})
    machine.log.unlink(missing_ok=True)
    try:
        program = folder / "program.py"
        program.write_text(SCRIPT.format(mib=SAVE_MIB, saves=saves, work=work, point=POINT))
        machine.start(f"python {program}")
        while machine.poll() is None:
            time.sleep(0.02)
        return float(machine.log.read_text())
    finally:
        machine.take()


def calibrate(folder: Path, gb_per_s: float) -> int:
    """How often the script sums up a MiB between two saves, for that average."""
    save_s = seconds(folder, False, 0) / SAVES
    unit_s = (seconds(folder, False, 1000, 1) - save_s) / 1000
    return max(0, int(((SAVE_MIB << 20) / 1e9 / gb_per_s - save_s) / unit_s))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rate", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if missing := bucketfs_missing():
        print(f"A bucket served through FUSE: not measured: {missing}")
        return
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="skyspot-bench-") as name:
        folder = Path(name)
        work = calibrate(folder, options.rate)
        pairs = [(seconds(folder, False, work), seconds(folder, True, work)) for _ in range(options.rounds)]
    ratios = [served / bound for bound, served in pairs]
    size_gb = SAVES * SAVE_MIB * (1 << 20) / 1e9
    for title, index in (("bound", 0), ("served through FUSE", 1)):
        median = statistics.median(pair[index] for pair in pairs)
        print(f"{title:20} {median:6.2f} s  {size_gb / median:5.2f} GB/s")
    ratio = statistics.median(ratios)
    print(
        f"{len(pairs)} pairs: {' '.join(f'{one:.2f}' for one in sorted(ratios))}; median {ratio:.2f}x (bound {BOUND}x)"
    )
    sys.exit(ratio > BOUND)


if __name__ == "__main__":
    main()
