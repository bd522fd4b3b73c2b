"""Keeps the tests quick: a test that is not marked `slow` and takes longer than LIMIT_S fails.

What counts is the time that it would take on a quiet machine, so that no test fails because the machine is busy: while
more threads want to run than there are cores, a second counts as the part of it that each of them gets. So a test that
mostly waits counts as less than it takes there; on a quiet machine all of it counts. CPU seconds would be the better
figure, but the system does not tell those of ranks whose launcher leaves first. What is built once for all tests does
not count.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic  # By name: tests set time.monotonic.

import pytest

LIMIT_S = 20.0 if os.environ.get("CI") else 10.0
"""CI's machines are noisier than their load tells: there, what takes twice as long."""
LOOK_S = 0.2


def runnable() -> float:
    """How many threads of this machine run or want to, this one left out."""
    if sys.platform == "linux":
        return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]) - 1
    return os.getloadavg()[0]


class QuietClock:
    """Seconds of a quiet machine."""

    def __init__(self) -> None:
        self._cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._seconds, self._looked = 0.0, monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True, name="quiet clock")
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(LOOK_S):
            self.passed(monotonic(), runnable())

    def passed(self, now: float, wanted: float) -> None:
        """So many threads have wanted to run since the last look."""
        self._seconds += (now - self._looked) * min(1.0, self._cores / max(1.0, wanted))
        self._looked = now

    def now(self) -> float:
        """Seconds since some moment."""
        return self._seconds

    def stop(self) -> None:
        """End its thread."""
        self._over.set()
        self._thread.join()


class Budget:
    """What each test takes."""

    def __init__(self, clock: QuietClock) -> None:
        self._clock = clock
        self._taken = self._shared = 0.0
        self._building = 0

    @contextmanager
    def building(self) -> Iterator[None]:
        """This is built once for all tests, or waited for while another worker builds it."""
        begun = self._clock.now()
        self._building += 1
        try:
            yield
        finally:
            self._building -= 1
            if not self._building:
                self._shared += self._clock.now() - begun

    @contextmanager
    def taking(self) -> Iterator[None]:
        """The test does something of its own."""
        begun, shared = self._clock.now(), self._shared
        try:
            yield
        finally:
            self._taken += self._clock.now() - begun - (self._shared - shared)

    # -- pytest calls these ------------------------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self) -> Generator[None, None, None]:
        self._taken = 0.0
        with self.taking():
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Generator[None, None, None]:
        with self.taking():
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[object]) -> Generator[None, object, object]:
        if fixturedef.scope == "function":
            return (yield)
        with self.building():
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if call.when == "call" and report.passed and self._taken > LIMIT_S and not item.get_closest_marker("slow"):
            report.outcome = "failed"
            report.longrepr = (
                f"{item.nodeid} took {self._taken:.0f} s, and a test that is not slow may take {LIMIT_S:g}: "
                "make it quicker, or mark it slow where a quick one shows the same"
            )
        return report

    def pytest_unconfigure(self) -> None:
        self._clock.stop()
