"""Measure the start-up time of the command line, beside `python -c "import click"`, and that of a plan.

    make bench

The commands take turns, so that a noisy machine disturbs all of them alike; medians and ratios are printed. The
bounds, relative to the bare import: --help at most 2x, render at most 3x; relative to `python -c pass`: the launcher's
own time, without the two Pythons that it takes, at most 6x, and a plan over catalogs of 100,000 rows at most 25x, which
is 0.5 s where a Python takes 20 ms. Exit status 1 means that one does not hold.
"""

from __future__ import annotations

import csv
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROUNDS = 21
PYTHON, CLICK = "python -c pass", "import click"
LAUNCHER, PLAN = "launcher, one empty rank", "skyspot plan, 100,000 rows"
COMMANDS = {
    PYTHON: [sys.executable, "-c", "pass"],
    CLICK: [sys.executable, "-c", "import click"],
    "skyspot --help": [sys.executable, "-m", "skyspot", "--help"],
    "skyspot render": [sys.executable, "-m", "skyspot", "render", "--gpus", "A100:8", "-n", "run-001"],
    LAUNCHER: [sys.executable, "-m", "trainer.launch", "--processes", "1", "empty.py"],
    PLAN: [sys.executable, "-m", "skyspot", "plan", "--gpus", "A100:8,A10G:8", "--on-demand-last"],
}
BOUNDS = {"skyspot --help": (2.0, CLICK), "skyspot render": (3.0, CLICK), PLAN: (25.0, PYTHON)}
"""By command: the bound, and what it is relative to."""
LAUNCHER_BOUND = 6.0

ROWS = {"aws": 80_000, "gcp": 20_000}
NAMED = {"aws": 800, "gcp": 3_200}
"""Rows that name what the plan asks for: two machines in all zones of AWS; N1 hosts and an A2 of Google Cloud."""
_COLUMNS = (
    "InstanceType", "AcceleratorName", "AcceleratorCount", "vCPUs", "MemoryGiB", "GpuInfo", "Price", "SpotPrice",
    "Region", "AvailabilityZone",
)  # fmt: skip
_INFO = "{'Gpus': [{'Name': 'GPU', 'Count': 8, 'MemoryInfo': {'SizeInMiB': 40960}}], 'TotalGpuMemoryInMiB': 327680}"


def write_catalogs(runtime: Path) -> None:
    """Write catalogs as SkyPilot downloads them; their machines are as in ROWS.

    Args:
        runtime: SKY_RUNTIME_DIR.
    """
    for cloud, count in ROWS.items():
        path = runtime / ".sky" / "catalogs" / "v8" / cloud / "vms.csv"
        path.parent.mkdir(parents=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(_COLUMNS)
            writer.writerows(_rows(cloud, count))


def _rows(cloud: str, count: int) -> Iterator[tuple[object, ...]]:
    for number in range(count):
        zone, kind = divmod(number, 200)
        name, gpu = f"x{kind}.large", f"G{kind}" if kind % 3 == 0 else ""
        if cloud == "gcp":  # Hosts and accelerators have rows of their own.
            name, gpu = ("", gpu) if gpu else (name, "")
            if kind < 32:
                name, gpu = {0: ("a2-highgpu-8g", ""), 1: ("", "A100")}.get(kind, (f"n1-standard-{kind}", ""))
        elif kind < 2:
            name, gpu = (("p4d.24xlarge", "A100"), ("g5.48xlarge", "A10G"))[kind]
        price = 30 + zone / 100
        yield (name, gpu, 8.0 if gpu else "", 96.0 if name else "", 680.0 if name else "", _INFO if gpu else "",
               price, price / 3, f"r{zone // 3}", f"r{zone // 3}-{'abc'[zone % 3]}")  # fmt: skip


def main() -> int:
    """Print the table; returns 1 if a bound does not hold."""
    with tempfile.TemporaryDirectory() as home:
        env = {**os.environ, "HOME": home, "SKY_RUNTIME_DIR": home}
        Path(home, "empty.py").touch()
        write_catalogs(Path(home))
        seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
        for _ in range(ROUNDS):
            for name, command in COMMANDS.items():
                begun = time.perf_counter()
                subprocess.run(command, capture_output=True, env=env, cwd=home, check=True)
                seconds[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    print(f"Python {platform.python_version()}, {os.cpu_count()} CPUs, medians of {ROUNDS} rounds")
    for name, median in medians.items():
        bound, base = BOUNDS.get(name, (None, CLICK))
        said = f" of {base}  (bound {bound:g}x)" if bound else ""
        print(f"{name:32} {median * 1000:7.1f} ms  {median / medians[base]:5.2f}x{said}")
    # The launcher's command starts two Pythons, its own and an empty rank's; the rest is the launcher's own time.
    share = medians[LAUNCHER] - 2 * medians[PYTHON]
    times = share / medians[PYTHON]
    print(f"{'the launcher itself':32} {share * 1000:7.1f} ms  {times:5.2f}x of a Python  (bound {LAUNCHER_BOUND:g}x)")
    over = any(medians[name] > bound * medians[base] for name, (bound, base) in BOUNDS.items())
    return int(times > LAUNCHER_BOUND or over)


if __name__ == "__main__":
    sys.exit(main())
