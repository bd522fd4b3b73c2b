"""Reporter: gives one tracker the run's curve, on a thread of its own. Whatever the tracker does, training goes on."""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from trainer.errors import one_line
from trainer.trackers.curve import Point
from trainer.trackers.tracker import THREAD, Tracker

LOOK_S = 1.0
"""How often to look whether a checkpoint was committed."""
PUBLISH_S, PUBLISH_AT_MOST_S, PUBLISH_SHARE = 30.0, 600.0, 0.05
"""Seconds between two copies into the bucket: so large a share of the attempt's time, but in these bounds."""
MAX_WAITING = 100_000
"""A tracker that has so many lines to take is given up: it hangs."""
BATCH = 200
"""Points from the records between two pauses."""


@dataclass(frozen=True)
class End:
    """The attempt ends; no line follows."""

    everything: bool
    """All steps are done and saved: those that wait for a later checkpoint count too."""


class Reporter:
    """The thread of one tracker."""

    def __init__(
        self,
        tracker: Tracker,
        source: Callable[[], Iterable[Point]],
        committed: Callable[[], int | None],
        print_line: Callable[[str], None],
    ) -> None:
        """Start.

        Args:
            tracker: Where the curve goes.
            source: Returns the points up to the step that was restored.
            committed: Returns the last committed step.
            print_line: Prints a line.
        """
        self.over = threading.Event()
        """Nothing more is done."""
        self.tracker = tracker
        self._source, self._committed, self._print_line = source, committed, print_line
        self._lines: queue.SimpleQueue[Point | End] = queue.SimpleQueue()
        self._ends = threading.Event()
        """The attempt ends."""
        self._first = 0
        self._waiting: deque[Point] = deque()
        """Points that a checkpoint has to follow first; one for each step."""
        self._taken = self._handled = self._published = 0
        """Points of the training that were taken; that the thread has handled; that were handled when it published."""
        self._begun = time.monotonic()
        self._publish_at = math.inf
        self._said: set[str] = set()
        self._thread = threading.Thread(target=self._work, daemon=True, name=THREAD)
        self._thread.start()

    def take(self, point: Point) -> None:
        """Take a point of the training; returns at once."""
        if self.over.is_set():
            return
        if self._lines.qsize() >= MAX_WAITING:
            self._give_up("it takes no metrics")
        else:
            self._taken += 1
            self._lines.put(point)

    @property
    def is_idle(self) -> bool:
        """Everything that was taken is published, but for what waits for a checkpoint."""
        return self._published == self._taken

    def end(self, everything: bool) -> None:
        """Have the thread end, after what it has so far; `over` is set then."""
        self._ends.set()
        self._lines.put(End(everything))

    def _work(self) -> None:
        try:
            self._first = self.tracker.start()
            self._print_line(f"{self.tracker.name}: {self.tracker.where()}{self._note()}")
            self._catch_up()
            while not self.over.is_set() and self._take_in():
                pass
            with self._refusals():
                self.tracker.finish(publish=not self.over.is_set())
        except BaseException as error:
            self._give_up(one_line(error))
        finally:
            self.over.set()

    def _note(self) -> str:
        return "" if self.tracker.rewinds else " (a step appears there once a later one is committed)"

    def _give_up(self, why: str) -> None:
        if not self.over.is_set():
            self.over.set()
            self._print_line(f"{self.tracker.name}: {why}. It gets no more of this attempt; training goes on")

    def _catch_up(self) -> None:
        """Give the tracker what it lacks of the steps before this attempt; nothing is published before it has all."""
        for point in paced(self._source(), self._ends):
            self._add(point)
        self._release()
        self._publish()

    def _take_in(self) -> bool:
        """Take in what comes next, a point or nothing for a while; False at the end."""
        try:
            found: Point | End | None = self._lines.get(timeout=LOOK_S)
        except queue.Empty:
            found = None
        if isinstance(found, End):
            self._release(found.everything)
            return False
        if found:
            self._add(found)
            self._handled += 1
        self._release()
        if time.monotonic() >= self._publish_at and self._published < self._handled:
            self._publish()
        return True

    def _add(self, point: Point) -> None:
        if point.step < self._first or not point.values:
            return
        if self.tracker.rewinds:
            self.tracker.log(point)
        elif self._waiting and self._waiting[-1].step == point.step:
            values = {**self._waiting[-1].values, **point.values}
            self._waiting[-1] = replace(self._waiting[-1], values=values)
        else:
            self._waiting.append(point)

    def _release(self, everything: bool = False) -> None:
        """Log the points that wait, up to the one before the last committed step, or all.

        The committed step itself waits for the next checkpoint, and the last one that was taken for one more: a line
        of its evaluation may follow.
        """
        committed = self._committed() or 0
        while self._waiting and (everything or (len(self._waiting) > 1 and self._waiting[0].step < committed)):
            self.tracker.log(self._waiting.popleft())

    def _publish(self) -> None:
        """Publish; what the bucket refuses is tried again with the next part."""
        with self._refusals():
            self.tracker.publish()
            self._published = self._handled
        now = time.monotonic()
        pause_s = min(PUBLISH_AT_MOST_S, max(PUBLISH_S, PUBLISH_SHARE * (now - self._begun)))
        self._publish_at = now + pause_s

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Print what the bucket refuses, once for each error."""
        try:
            yield
        except OSError as error:
            line = f"{error.filename or self.tracker.where()}: {error.strerror or error}"
            if line not in self._said:
                self._said.add(line)
                self._print_line(f"{self.tracker.name}: {line}; training goes on")


def paced(points: Iterable[Point], hurry: threading.Event) -> Iterator[Point]:
    """Yield points with pauses as long as the work between them, so that training keeps its processor.

    Args:
        points: The points.
        hurry: Once it is set, there is no pause.
    """
    begun = time.monotonic()
    for number, point in enumerate(points, start=1):
        yield point
        if number % BATCH == 0:
            hurry.wait(min(1.0, time.monotonic() - begun))
            begun = time.monotonic()
