"""How long the command line keeps a person waiting, beside `python -c "import click"`, in one run.

    make bench

Rounds take turns, so that a noisy machine disturbs all alike; medians and ratios are printed. The bounds that the project
holds itself to: --help at most 2x, render at most 3x, of the bare import.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time

ROUNDS = 21
COMMANDS = {
    "import click": [sys.executable, "-c", "import click"],
    "skyspot --help": [sys.executable, "-m", "skyspot", "--help"],
    "skyspot render": [sys.executable, "-m", "skyspot", "render", "--gpus", "A100:8", "-n", "run-001"],
    "launcher (start to first word of a rank)": [
        sys.executable, "-m", "trainer.launch", "--processes", "1", os.devnull,
    ],
}  # fmt: skip
BOUNDS = {"skyspot --help": 2.0, "skyspot render": 3.0}


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as home:
        env = {**os.environ, "HOME": home, "PYTHONDONTWRITEBYTECODE": ""}
        script = os.path.join(home, "rank.py")
        with open(script, "w") as file:
            file.write("import os, time\nprint(time.monotonic() - float(os.environ['SKYSPOT_LAUNCHED_AT']))\n")
        COMMANDS["launcher (start to first word of a rank)"][-1] = script
        seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
        own: list[float] = []
        for _ in range(ROUNDS):
            for name, command in COMMANDS.items():
                begun = time.perf_counter()
                done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=home, check=True)
                seconds[name].append(time.perf_counter() - begun)
                if name.startswith("launcher"):
                    own.append(float(done.stdout))
        bare = statistics.median(_timed([sys.executable, "-c", "import os"], env, home) for _ in range(ROUNDS))
    base = statistics.median(seconds["import click"])
    print(f"Python {platform.python_version()}, {os.cpu_count()} CPUs, medians of {ROUNDS} rounds")
    for name, found in seconds.items():
        median = statistics.median(found)
        bound = f"  (bound {BOUNDS[name]:g}x)" if name in BOUNDS else ""
        print(f"{name:42} {median * 1000:7.1f} ms  {median / base:5.2f}x{bound}")
    share = statistics.median(own) - bare
    print(f"launcher's own share of a start            {share * 1000:7.1f} ms  (bound 100 ms; a bare Python taken off)")


def _timed(command: list[str], env: dict[str, str], home: str) -> float:
    begun = time.perf_counter()
    subprocess.run(command, env=env, cwd=home, check=True)
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
