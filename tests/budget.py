"""Keeps the tests quick: a test that is not marked `slow` and takes longer than LIMIT_S, twice in a row, fails.

The limit applies to the time that a test would take on a quiet machine, so that no test fails because the machine is
busy: while more threads want to run than there are cores, a second counts as the share of it that each thread gets. On
a busy machine, a test that mostly waits therefore counts as less than it takes; on a quiet machine all of it counts.
While OVERLOADED times as many threads as cores want to run, nothing counts: memory and disk are then as short as cores.
CPU seconds would be better, but the system does not report those of ranks whose launcher leaves first. Setting up and
tearing down count, except for what tests share. A shared machine can be slow in ways that its load does not show, so a
test that took too long runs once more, and the shorter time counts.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic  # By name: tests set time.monotonic.

import pytest
from _pytest.runner import runtestprotocol

LIMIT_S = 10.0
LOOK_S = 0.2
OVERLOADED = 4


def runnable() -> float:
    """Number of threads on this machine that run or want to run, except this one."""
    if sys.platform == "linux":
        return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]) - 1
    return os.getloadavg()[0]


class QuietClock:
    """Counts the seconds that a quiet machine would have taken."""

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
        """Count the time since the last look, in which `wanted` threads wanted to run."""
        if wanted <= OVERLOADED * self._cores:
            self._seconds += (now - self._looked) * min(1.0, self._cores / max(1.0, wanted))
        self._looked = now

    def now(self) -> float:
        """Seconds since the clock started."""
        return self._seconds

    def stop(self) -> None:
        """End its thread."""
        self._over.set()
        self._thread.join()


class Budget:
    """Measures the time of each test, and fails those over the limit."""

    def __init__(self, clock: QuietClock) -> None:
        self._clock = clock
        self._taken = self._shared = 0.0
        self._building = 0
        self._undoing: dict[pytest.FixtureDef[object], ExitStack] = {}
        """By fixture that tests share: entered when its finalizers begin to run, closed when all have run."""

    @contextmanager
    def building(self) -> Iterator[None]:
        """Do not count time spent here: building or undoing what tests share, or waiting for another worker's build."""
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
        """Count time spent here as the test's own."""
        begun, shared = self._clock.now(), self._shared
        try:
            yield
        finally:
            self._taken += self._clock.now() - begun - (self._shared - shared)

    # -- pytest calls these ------------------------------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        reports = self._run(item, nextitem)
        first_s = self._taken
        if self._is_too_long(item, reports, first_s):
            reports = self._run(item, nextitem)
            least_s = min(first_s, self._taken)
            if self._is_too_long(item, reports, least_s):
                [call] = [report for report in reports if report.when == "call"]
                call.outcome = "failed"
                call.longrepr = (
                    f"{item.nodeid} took {least_s:.0f} s, and a test that is not slow may take {LIMIT_S:g}: "
                    "make it quicker, or mark it slow where a quick one shows the same"
                )
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _run(self, item: pytest.Item, nextitem: pytest.Item | None) -> list[pytest.TestReport]:
        self._taken = 0.0
        return runtestprotocol(item, log=False, nextitem=nextitem)

    def _is_too_long(self, item: pytest.Item, reports: list[pytest.TestReport], taken_s: float) -> bool:
        slow = item.get_closest_marker("slow")
        return not slow and taken_s > LIMIT_S and all(report.passed for report in reports)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self) -> Generator[None, None, None]:
        with self.taking():
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Generator[None, None, None]:
        with self.taking():
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self) -> Generator[None, None, None]:
        with self.taking():
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[object]) -> Generator[None, object, object]:
        if fixturedef.scope == "function":
            return (yield)
        with self.building():
            built = yield
        # The last of its finalizers is the first to run.
        undoing = self._undoing[fixturedef] = ExitStack()
        fixturedef.addfinalizer(lambda: undoing.enter_context(self.building()))
        return built

    def pytest_fixture_post_finalizer(self, fixturedef: pytest.FixtureDef[object]) -> None:
        if undoing := self._undoing.pop(fixturedef, None):
            undoing.close()

    def pytest_unconfigure(self) -> None:
        self._clock.stop()
