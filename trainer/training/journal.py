"""Journal: rank 0's writer of metrics, events and progress.json.

It writes on its own thread, so that a slow bucket never delays a step. The thread also looks every few seconds for
a reason to stop: a newer attempt, or a stop request. Limits have a thread of their own.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from trainer.attempt.limits import Reached, Reckoning, await_limit, shown_time, this_run
from trainer.attempt.record import Attempt, StopReason, record, stop_reason, times
from trainer.bucket.deadlines import within
from trainer.bucket.hashing import hash_bytes
from trainer.layout.documents import to_json
from trainer.training.console import print_line

LOOK_S = 5.0
RECENT_STEPS = 100
"""A stop is reckoned to wait for a step as long as the longest of so many."""


@dataclass
class _Segment:
    """A metrics file: opened at its first line, closed before the manifest of the checkpoint that lists it."""

    path: Path
    first_step: int
    last_step: int
    lines: list[bytes]
    file: BinaryIO | None = None


class Journal:
    """Writes in the background. `history` lists the closed metrics files of the steps up to now, oldest first."""

    def __init__(self, attempt: Attempt, reckoning: Reckoning | None = None) -> None:
        self.attempt, self._reckoning = attempt, reckoning
        self.history: list[dict[str, Any]] = []
        self.stop_reason: StopReason | None = None
        self.on_line: Callable[[dict[str, Any]], None] = lambda metrics: None
        """Called with each line of metrics; it must not block."""
        self.stop_takes_s: Callable[[], float] = lambda: 0.0
        """Returns the seconds that a stop may take, from the boundary at which it is agreed on."""
        self._step_s, self._steps = 0.0, 0
        """Seconds of a step, as a moving average without the first one of the attempt; how many were measured."""
        self._recent_s: deque[float] = deque(maxlen=RECENT_STEPS)
        """Seconds of the newest steps, without the first one of the attempt."""
        self._line_at: float | None = None
        self._late: set[bool] = set()
        """What was said of the deadline: whether on-demand machines can still meet it."""
        self._left = threading.Event()
        """Set once nothing is to be stopped any more."""
        self._reported: set[int | None] = set()
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._segment: _Segment | None = None
        self._last: Path | None = None
        """The newest metrics file; none is opened twice."""
        self._ended: list[_Segment] = []
        self._progress: dict[str, Any] = {}
        self._over = self._ends = False
        self._ending = threading.Lock()
        """Held while it is decided whether the thread does a task."""
        self._thread = threading.Thread(target=self._work, daemon=True, name="records")
        self._thread.start()

    def line(self, metrics: dict[str, Any]) -> None:
        """Add a line of metrics, with the time of the monotonic clock where it has none."""
        data = json.dumps({"monotonic": round(time.monotonic(), 4), **metrics}, allow_nan=False).encode() + b"\n"
        self._measure(metrics)
        self._tasks.put(lambda: self._append(metrics["step"], data))
        self.on_line(metrics)

    def _measure(self, metrics: dict[str, Any]) -> None:
        """Take in the time of a step; of a program that does not measure it, the time between two lines."""
        now, before, step_s = time.monotonic(), self._line_at, metrics.get("step_s")
        if step_s is None and ("eval_loss" in metrics or "eval_s" in metrics):
            return
        self._line_at = now
        seconds = float(step_s) if isinstance(step_s, (int, float)) else now - before if before is not None else 0.0
        self._steps += 1
        if self._steps <= 2:
            self._recent_s.clear()
        self._recent_s.append(seconds)
        self._step_s = seconds if self._steps <= 2 else 0.8 * self._step_s + 0.2 * seconds

    def hold_limits(self, on_stop: Callable[[StopReason], None]) -> None:
        """Look at the run's limits every few seconds from now on, in a thread that touches no bucket.

        Args:
            on_stop: Called in that thread once a limit is reached; `stop_reason` says which.
        """

        def reached(seconds: float) -> Reached | None:
            return self._reckoning.reached(seconds) if self._reckoning else None

        def ahead_s() -> float:
            return max(list(self._recent_s), default=0.0) + self.stop_takes_s()

        def work() -> None:
            if not (found := await_limit(reached, LOOK_S, ahead_s, self._left)):
                return
            limit, seconds = found
            self._tasks.put(lambda: record(self.attempt, "limit", **limit.facts))
            reason = StopReason(limit.ending, limit.message, time.monotonic() + seconds)
            self.stop_reason = self.stop_reason or reason
            on_stop(self.stop_reason)

        threading.Thread(target=work, daemon=True, name="limits").start()

    def event(self, name: str, **fields: Any) -> None:
        """Record an event of the attempt."""
        self._do(lambda: record(self.attempt, name, **fields))

    def progress(self, progress: dict[str, Any]) -> None:
        """Set the contents of progress.json, which is written every few seconds."""
        self._progress = progress

    def cut(self) -> None:
        """End the open metrics file; later lines go into a new one. Called at a boundary that is saved."""
        self._tasks.put(self._cut)

    def history_until(self, step: int) -> Future[list[dict[str, Any]]]:
        """The closed metrics files up to a step at which `cut` was called; fails if one cannot be written."""
        found: Future[list[dict[str, Any]]] = Future()

        def work() -> None:
            try:
                self._close_ended()
                found.set_result([part for part in self.history if part["last_step"] <= step])
            except BaseException as error:
                found.set_exception(error)

        self._do(work)
        return found

    def flush(self, seconds: float) -> None:
        """Wait until everything so far is written and progress.json is current, for `seconds` at most."""
        done = threading.Event()
        self._tasks.put(self._write_progress)
        self._tasks.put(done.set)
        done.wait(seconds)

    def end(self) -> None:
        """End the thread, after what was given to it so far; a save that is under way then does its own records."""

        def end() -> None:
            self._over = True
            for segment in (*self._ended, self._segment):
                if segment and segment.file:
                    segment.file.close()
                    segment.file = None

        self._left.set()
        with self._ending:
            self._ends = True
            self._tasks.put(end)

    def _do(self, task: Callable[[], None]) -> None:
        """Have the thread do a task; once the thread is to end, do it here, after all that it has to do."""
        with self._ending:
            if not self._ends:
                self._tasks.put(task)
                return
        self._thread.join()
        task()

    def _work(self) -> None:
        look_at = 0.0
        while not self._over:
            with suppress(queue.Empty):
                task = self._tasks.get(timeout=max(0.01, look_at - time.monotonic()))
                self._try("writing the attempt's records", task)
            if time.monotonic() >= look_at and not self._over:
                look_at = time.monotonic() + LOOK_S
                # Each on its own: a bucket that refuses one of them may answer the others.
                self._try("looking for other attempts", self._look)
                self._try("writing the attempt's progress", self._write_progress)
                self._try("writing the attempt's records", self._warn_of_deadline)

    def _try(self, what: str, task: Callable[[], None]) -> None:
        try:
            with within(what):
                task()
        except OSError as error:
            self._report(error)
        except Exception as error:  # A record that cannot be made must not delay a save.
            print_line(f"A record of this attempt could not be made: {type(error).__name__}: {error}")

    def _look(self) -> None:
        if self.stop_reason is None and (found := stop_reason(self.attempt)):
            self.stop_reason = self.stop_reason or found  # A limit may have been reached meanwhile.

    def _warn_of_deadline(self) -> None:
        """Say once that only on-demand machines can still meet the deadline; once, that not even they can."""
        step, until = self._progress.get("step"), self._progress.get("max_steps")
        if self.stop_reason or not (self._reckoning and self._steps > 1 and step is not None and until):
            return
        facts = self._reckoning.too_late_for_spot(until - step, self._step_s)
        if facts is None or self._late & {False, facts["on_demand_in_time"]}:
            return
        in_time, at = facts["on_demand_in_time"], shown_time(facts["deadline"])
        self._late.add(in_time)
        says = "Only on-demand machines can still finish" if in_time else "Not even on-demand machines can finish"
        what = "one more preemption" if in_time else "the change to them"
        needed_s = facts["needed_s"] if in_time else facts["needed_s"] - facts["allowance_s"]
        command = f". To change to them: skyspot launch -n {this_run()} --no-use-spot --replace" if in_time else ""
        print_line(
            f"{says} by {at}: {facts['steps_left']} steps and {what} take {needed_s / 3600:.2g} h, and "
            f"{facts['left_s'] / 3600:.2g} h are left{command}"
        )
        record(self.attempt, "too-late-for-spot", **facts)

    def _report(self, error: OSError) -> None:
        """Print what cannot be written, once for each kind of error; only the next save decides what follows."""
        if error.errno not in self._reported:
            self._reported.add(error.errno)
            print_line(f"{error.filename or self.attempt.paths.root}: {error.strerror or error}; training goes on")

    def _append(self, step: int, data: bytes) -> None:
        if self._segment is None:
            path = self.attempt.paths.metrics(self.attempt.name, step)
            if path == self._last:  # An evaluation, after `cut` at the same boundary.
                path = self.attempt.paths.metrics(self.attempt.name, step + 1)
            self._last = path
            self._segment = _Segment(path, step, step, [])
        segment = self._segment
        segment.lines.append(data)
        segment.last_step = step
        if segment.file is None:
            segment.file = segment.path.open("wb", buffering=0)
            segment.file.write(b"".join(segment.lines))
        else:
            segment.file.write(data)

    def _cut(self) -> None:
        if self._segment is not None:
            self._ended.append(self._segment)
            self._segment = None

    def _close_ended(self) -> None:
        while self._ended:
            segment = self._ended[0]
            data = b"".join(segment.lines)
            file, segment.file = segment.file, None
            if file is not None:
                file.close()
            if not segment.path.exists() or segment.path.stat().st_size != len(data):
                segment.path.write_bytes(data)  # A write to it has failed: write it whole.
            self.history.append(
                {
                    "path": str(segment.path.relative_to(self.attempt.paths.root)),
                    "bytes": len(data),
                    "hash": hash_bytes(data),
                    "first_step": segment.first_step,
                    "last_step": segment.last_step,
                }
            )
            self._ended.pop(0)

    def _write_progress(self) -> None:
        data = to_json({**times(), **self._progress})  # Before the first step it shows that the attempt lives.
        self.attempt.paths.progress(self.attempt.name).write_bytes(data)
