"""Measure the throughput and the memory of a training loop with skyspot, beside the same loop without.

    python -m bench.loop [--rounds N] [--seconds S] [--report FILE]

Both loops run in a process each, and take turns: a block of steps of one, then of the other, in the other order in the
next round. The bounds that the project holds itself to: 0.98x the throughput, and 1.02x the memory besides one copy of
the state. Exit status 1 means that one did not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from bench import machine, sections
from bench.report import table
from bench.sections import REPO
from bench.sizes import shown, size

THROUGHPUT, MEMORY = 0.98, 1.02
BARE, OURS = "bare", "ours"


@dataclass(frozen=True)
class Case:
    """A loop that is measured."""

    state: str
    """The size of model and optimizer state."""
    batch: int
    ways: dict[str, str]
    """What bench/loop_child.py does for BARE and for OURS."""
    has_bounds: bool = True


_PLAIN, _TRAINER = {BARE: "bare", OURS: "steps"}, {BARE: "hf-bare", OURS: "hf"}
CASES = {
    "`run.steps`, short steps": Case("2MB", 8, _PLAIN, has_bounds=False),
    "`run.steps`": Case("1GB", 16, _PLAIN),
    "Hugging Face Trainer": Case("1GB", 16, _TRAINER),
}


@dataclass
class Figures:
    """What was measured of one loop."""

    case: Case
    steps: int = 0
    """Steps of a block."""
    seconds: dict[str, list[float]] = field(default_factory=lambda: {BARE: [], OURS: []})
    """Of a block, by way and round."""
    peak_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def state_bytes(self) -> int:
        return size(self.case.state)

    def ratios(self) -> list[float]:
        """The throughput under run.steps as a share of the bare loop's, by round."""
        return [bare / ours for bare, ours in zip(self.seconds[BARE], self.seconds[OURS], strict=True)]

    @property
    def throughput(self) -> float:
        return statistics.median(self.ratios())

    @property
    def memory(self) -> float:
        """The memory besides one copy of the state, as a multiple of the bare loop's."""
        return (self.peak_bytes[OURS] - self.state_bytes) / self.peak_bytes[BARE]


def measured(folder: Path, case: Case, rounds: int, seconds: float) -> Figures:
    """Let both loops take turns."""
    figures = Figures(case)
    with ExitStack() as open_ones:
        pipes = {}
        for way in (BARE, OURS):
            pipes[way] = _start(open_ones, folder / way, case.ways[way], case)
        for pipe in pipes.values():
            _block(pipe, 5)
        figures.steps = max(5, round(seconds / (min(_block(pipe, 5)[0] for pipe in pipes.values()) / 5)))
        for number in range(rounds):
            for way in (BARE, OURS) if number % 2 else (OURS, BARE):
                took, figures.peak_bytes[way] = _block(pipes[way], figures.steps)
                figures.seconds[way].append(took)
        for pipe in pipes.values():
            pipe.send(0)
    return figures


def _start(open_ones: ExitStack, folder: Path, way: str, case: Case) -> Connection:
    folder.mkdir(parents=True)
    listening = open_ones.enter_context(socket.socket(socket.AF_UNIX))
    listening.bind(str(folder / "socket"))
    listening.listen()
    listening.settimeout(0.2)
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    command = [
        sys.executable, "-m", "trainer.launch", "--processes", "1", str(REPO / "bench" / "loop_child.py"),
        "--way", way, "--address", str(folder / "socket"), "--folder", str(folder / "run"), "--batch", str(case.batch),
        "--size", str(size(case.state)), "--threads", threads,
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(REPO), "SKYSPOT_PROCESSES": "", "OMP_NUM_THREADS": threads}
    process = subprocess.Popen(command, cwd=REPO, env=env, stdout=subprocess.DEVNULL)
    open_ones.callback(process.wait)
    while True:
        with suppress(TimeoutError):
            pipe = Connection(listening.accept()[0].detach())
            open_ones.callback(pipe.close)  # A loop that waits for a request ends.
            return pipe
        if process.poll() is not None:
            raise SystemExit(f"{way}: loop_child.py ended with {process.returncode} before its first step")


def _block(pipe: Connection, steps: int) -> tuple[float, int]:
    pipe.send(steps)
    took, peak = pipe.recv()
    return float(took), int(peak)


def described(found: dict[str, Figures]) -> str:
    """The table, as Markdown."""
    rows = []
    for title, figures in found.items():
        bare, ours = (statistics.median(figures.seconds[way]) / figures.steps for way in (BARE, OURS))
        ratios = figures.ratios()
        rows.append(
            [
                title, shown(figures.state_bytes), f"{1000 * bare:.2f} ms", f"{1000 * ours:.2f} ms",
                f"{figures.throughput:.3f}x ({min(ratios):.3f} to {max(ratios):.3f})", f"{figures.memory:.2f}x",
            ]
        )  # fmt: skip
    return table(["", "State", "A step, bare", "with skyspot", "Throughput (by round)", "Memory"], rows)


def broken(found: dict[str, Figures]) -> list[str]:
    """List the bounds that did not hold."""
    lines = []
    for title, figures in found.items():
        if figures.case.has_bounds and figures.throughput < THROUGHPUT:
            lines.append(f"{title}: {figures.throughput:.3f}x the throughput, bound {THROUGHPUT}x")
        if figures.case.has_bounds and figures.memory > MEMORY:
            lines.append(f"{title}: {figures.memory:.3f}x the memory, bound {MEMORY}x")
    return lines


def main() -> int:
    """Measure, and write the report; returns 1 if a bound does not hold."""
    parser = argparse.ArgumentParser(description="Measure the throughput of a loop with skyspot.")
    parser.add_argument("--rounds", type=int, default=9, help="(9)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a block of steps (5)")
    parser.add_argument("--report", type=Path, default=sections.PERFORMANCE, help="file for the report")
    options = parser.parse_args()
    before, found = machine.load(), {}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        for number, (title, case) in enumerate(CASES.items()):
            found[title] = measured(Path(name) / str(number), case, options.rounds, options.seconds)
            print(json.dumps({title: found[title].seconds}), file=sys.stderr)
    text = sections.paragraphs(
        sections.when("python -m bench.loop", (before, machine.load())),
        f"The same loop bare and with skyspot, in a process each; they take turns, {options.rounds} blocks of "
        f"{options.seconds:g} s each. Figures are medians; the throughput is that of neighbouring blocks. `save_every` "
        '"auto" saves when it pays. Memory: the peak besides one copy of the state, as a multiple of the bare loop\'s. '
        f"Bounds, not for short steps: {THROUGHPUT}x, {MEMORY}x.",
        described(found),
    )
    return sections.report(options.report, sections.LOOP, text, broken(found))


if __name__ == "__main__":
    sys.exit(main())
