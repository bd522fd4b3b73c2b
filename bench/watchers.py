"""Measure what the watchers cost a training loop: the thread that asks for the cloud's notice, and the hang guard.

    python -m bench.watchers [--rounds N] [--seconds S] [--report FILE]

One process trains. Blocks of steps with both threads and without take turns, in the other order in the next round. The
threads are those of a run; AWS's metadata service is a server on loopback, in a process of its own. The steps are
short: longer ones hide more. Exit status 1 means that the whole 95 % interval of the ratio lies over the bound.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from bench import machine, sections
from bench.report import table
from skyspot.rehearsal.metadata import AwsMetadata
from trainer.notices.received import Notices
from trainer.training.hangs import HangGuard

BOUND = 1.02
STATE_BYTES, BATCH = 2_000_000, 8
HANG_TIMEOUT_S = 600.0
RESAMPLES = 10_000
SHARE = 0.95


@dataclass(frozen=True)
class Figures:
    """Seconds of a block by round, and how many steps a block has."""

    steps: int
    without: Sequence[float]
    watched: Sequence[float]

    def ratios(self) -> list[float]:
        """The time of a step with the watchers, as a multiple of that without, by round."""
        return [watched / without for watched, without in zip(self.watched, self.without, strict=True)]


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of their median, by bootstrap (percentiles of the medians of resampled ratios)."""
    dice = random.Random(0)
    medians = sorted(statistics.median(dice.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    tail = (1 - SHARE) / 2
    return medians[round(tail * (RESAMPLES - 1))], medians[round((1 - tail) * (RESAMPLES - 1))]


def broken(figures: Figures) -> list[str]:
    """List the bounds that did not hold."""
    low, high = interval(figures.ratios())
    return [f"a step takes {low:.3f}x to {high:.3f}x with the watchers, bound {BOUND}x"] if low > BOUND else []


def described(figures: Figures) -> str:
    """The table, as Markdown."""
    ratios = figures.ratios()
    without, watched = (1000 * statistics.median(some) / figures.steps for some in (figures.without, figures.watched))
    low, high = interval(ratios)
    return table(
        ["A step without", "with", "Ratio", "95 % interval", "By round"],
        [
            [
                f"{without:.3f} ms", f"{watched:.3f} ms", f"{statistics.median(ratios):.3f}x",
                f"{low:.3f}x to {high:.3f}x", f"{min(ratios):.3f} to {max(ratios):.3f}",
            ]
        ],
    )  # fmt: skip


def measured(rounds: int, seconds: float) -> Figures:
    """Let blocks with the watchers and without take turns."""
    step = _training()
    for _ in range(5):
        step()
    steps = max(5, round(seconds / (_block(step, 20) / 20)))
    took: dict[bool, list[float]] = {False: [], True: []}
    with _metadata_service() as url:
        os.environ["AWS_EC2_METADATA_SERVICE_ENDPOINT"] = url
        for number in range(rounds):
            for is_watched in (False, True) if number % 2 else (True, False):
                took[is_watched].append(_watched_block(step, steps) if is_watched else _block(step, steps))
    return Figures(steps, took[False], took[True])


def _training() -> Callable[[], object]:
    from bench.training import Training, keep_freed_memory

    keep_freed_memory()
    training = Training(STATE_BYTES, threads=max(1, (os.cpu_count() or 1) // 2))
    training.batch = BATCH
    return training.step


def _block(step: Callable[[], object], steps: int, beat: Callable[[], object] = lambda: None) -> float:
    begun = time.perf_counter()
    for _ in range(steps):
        step()
        beat()
    return time.perf_counter() - begun


def _watched_block(step: Callable[[], object], steps: int) -> float:
    notices, guard = Notices(25.0), HangGuard(HANG_TIMEOUT_S, lambda _: None)
    notices.watch(say=lambda _: None)
    guard.begin()
    try:
        return _block(step, steps, guard.beat)
    finally:
        guard.end()
        notices.end()


@contextmanager
def _metadata_service() -> Iterator[str]:
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=_serve, args=(its,), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        ours.close()
        its.close()
        process.terminate()
        process.join()


def _serve(pipe: Connection) -> None:
    with AwsMetadata() as server:
        pipe.send(server.url)
        time.sleep(1_000_000)


def main() -> int:
    """Measure, and write the report; returns 1 if the bound does not hold."""
    parser = argparse.ArgumentParser(description="Measure what the watchers cost a training loop.")
    parser.add_argument("--rounds", type=int, default=15, help="(15)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of a block of steps (6)")
    parser.add_argument("--report", type=Path, default=sections.PERFORMANCE, help="file for the report")
    options = parser.parse_args()
    before = machine.load()
    figures = measured(options.rounds, options.seconds)
    text = sections.paragraphs(
        sections.when("python -m bench.watchers", (before, machine.load())),
        "The same loop in one process, with the thread that asks AWS's metadata service every 5 s (a server on "
        "loopback) and the hang guard, and without. The two take turns, "
        f"{options.rounds} blocks of {options.seconds:g} s each. Times are medians; the ratio is that of "
        "neighbouring blocks, its interval is bootstrapped. Bound: the interval contains a value at or under "
        f"{BOUND}x.",
        described(figures),
    )
    return sections.report(options.report, sections.WATCHERS, text, broken(figures))


if __name__ == "__main__":
    sys.exit(main())
