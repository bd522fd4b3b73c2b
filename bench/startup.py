"""Measure the start-up time of the command line, beside `python -c "import click"`.

    make bench

The commands take turns, so that a noisy machine disturbs all of them alike; medians and ratios are printed. The
bounds, relative to the bare import: --help at most 2x, render at most 3x; relative to `python -c pass`: the launcher's
own time, without the two Pythons that it takes, at most 6x. Exit status 1 means that one does not hold.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 21
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import click": [sys.executable, "-c", "import click"],
    "skyspot --help": [sys.executable, "-m", "skyspot", "--help"],
    "skyspot render": [sys.executable, "-m", "skyspot", "render", "--gpus", "A100:8", "-n", "run-001"],
    "launcher, one empty rank": [sys.executable, "-m", "trainer.launch", "--processes", "1", "empty.py"],
}
BOUNDS = {"skyspot --help": 2.0, "skyspot render": 3.0}
LAUNCHER_BOUND = 6.0


def main() -> int:
    """Print the table; returns 1 if a bound does not hold."""
    with tempfile.TemporaryDirectory() as home:
        env = {**os.environ, "HOME": home}
        Path(home, "empty.py").touch()
        seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
        for _ in range(ROUNDS):
            for name, command in COMMANDS.items():
                begun = time.perf_counter()
                subprocess.run(command, capture_output=True, env=env, cwd=home, check=True)
                seconds[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    base = medians["import click"]
    print(f"Python {platform.python_version()}, {os.cpu_count()} CPUs, medians of {ROUNDS} rounds")
    for name, median in medians.items():
        bound = f"  (bound {BOUNDS[name]:g}x)" if name in BOUNDS else ""
        print(f"{name:32} {median * 1000:7.1f} ms  {median / base:5.2f}x{bound}")
    # The launcher's command starts two Pythons, its own and an empty rank's; the rest is the launcher's own time.
    share = medians["launcher, one empty rank"] - 2 * medians["python -c pass"]
    times = share / medians["python -c pass"]
    print(f"{'the launcher itself':32} {share * 1000:7.1f} ms  {times:5.2f}x of a Python  (bound {LAUNCHER_BOUND:g}x)")
    return int(times > LAUNCHER_BOUND or any(medians[name] > bound * base for name, bound in BOUNDS.items()))


if __name__ == "__main__":
    sys.exit(main())
