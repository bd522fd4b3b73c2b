"""The injector decides when to take a machine, and takes it in the way of the planned preemption."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from skyspot.rehearsal import failure, faults
from skyspot.rehearsal.boundaries import describe
from skyspot.rehearsal.evidence import Changes
from skyspot.rehearsal.faults import WARNED, Preemption, Warned
from skyspot.rehearsal.machine import Machine
from skyspot.rehearsal.metadata import Metadata
from skyspot.rehearsal.result import Row
from skyspot.rehearsal.view import View
from skyspot.rehearsal.watch import Watch, wait_for_save, walk
from trainer.layout.exit_codes import EXIT_PREEMPTED
from trainer.layout.names import CheckpointName

NOTICE_WITHOUT_RECORDS_S = 10.0
LOOK_S = 0.01
_AT_SIGTERM = (-signal.SIGTERM, 128 + signal.SIGTERM)
LATE, HALF_WAY = 0.7, 0.5
"""A task whose undisturbed run first wrote after the first of these fractions of its time is preempted after the second
one, even if it has written nothing. The difference is for a machine that runs the task faster than that run."""

_WHEN = {"before": "before", "middle": "in the middle of", "after": "after"}


@dataclass(frozen=True)
class Injector:
    """The planned preemption of one machine."""

    planned: Preemption | None
    """None: the machine runs to the end."""
    machine: Machine
    watch: Watch
    server: Metadata | None
    """The metadata service of the machine's cloud; None if it has none."""
    view: View
    reference_s: float
    """Duration of the undisturbed run."""
    written_s: float
    """Its duration after its first write to the bucket; 0 if it never wrote."""
    records: bool
    """True if the task keeps attempt records."""
    has_all_files: Callable[[], bool]
    """True if the bucket has what the undisturbed run left there."""
    saved: Changes | None = None
    """Tells when enough saves are there to preempt the task; None: it may be preempted at any time."""
    in_save: Callable[[float, Callable[[], bool]], bool] | None = None
    """Waits until a checkpoint is being written, for so many seconds and while the other goes on; None: the sizes of
    files tell."""

    def due(self, step: int | None) -> bool:
        """True if it is time to preempt."""
        planned = self.planned
        if planned is None:
            return False
        if planned.place is not None:
            return self.machine.struck() is not None
        if planned.at_fraction is not None:
            if self.saved and not self.saved.enough():
                return False
            alive_s = self.watch.alive_s()
            due = alive_s > 0 and alive_s >= planned.at_fraction * self.written_s
            if self.written_s <= (1 - LATE) * self.reference_s:
                due = due or time.monotonic() - self.machine.started >= HALF_WAY * self.reference_s
            return due and (planned.kind != "torn" or bool(walk(self.watch.bucket)))
        if step is None:
            return False
        if planned.saved and not self.watch.committed():
            return False
        if planned.kind == "torn" and self.watch.committed() < 2:
            return False
        if planned.after_resume is not None:
            return step >= (self.watch.first_step or 0) + planned.after_resume - 1
        return step >= (planned.at_step or 0)

    def take(self, number: int, processes: int) -> tuple[Row, int | None]:
        """Take the machine. Return the attempt's row, and the task's exit code if it exited."""
        assert self.planned
        kind, hit, code, heard, stays_down = self.planned.kind, True, None, "", ""
        if self.planned.place is not None:
            call = self.machine.struck()
            assert call
            self.machine.kill()
            ended = f"killed {_WHEN[call.struck]} the {describe(call)}"
        elif kind == "kill":
            self.machine.kill()
            ended = f"killed{self._where()}"
        elif kind == "torn":
            where = self._where()
            self.machine.kill()
            torn = faults.tear(self.watch.bucket, self.watch.run_folder)
            hit, ended = torn is not None, f"killed{where}, {_short(torn)} torn"
        elif kind == "kill-in-save":
            hit, ended = self._kill_in_save()
            code = self.machine.poll()
            if code == 0:
                return Row(number, "finished", "finished", processes), 0
        else:
            warned = WARNED[kind]
            code, ended = self._warn(warned)
            heard = kind if warned.signal or (self.server and self.server.told) else ""
            if code is None and self.watch.ended():
                heard = ""  # It saved and left; its launcher holds.
            stays_down = failure.at_sigterm(self.machine.log)
        if code == 0:
            ended, early = "finished before the machine was taken", False
            if heard and not self.records and not self.has_all_files():
                early = True
                ended = f"exited with 0 at {warned.label if warned.signal else 'the notice'}"
            return Row(number, "finished", ended, processes, exited_early=early, heard=heard), 0
        return Row(number, kind, ended, processes, hit=hit, stays_down=stays_down, heard=heard), code

    def _where(self) -> str:
        return f" at step {self.watch.step}" if self.watch.step else ""

    def _look(self) -> None:
        self.view.step(self.watch.look())

    def _kill_in_save(self) -> tuple[bool, str]:
        """Wait until a checkpoint is being written, and kill. Return whether it hit a save, and a description."""
        self.watch.forget_files()

        def goes_on() -> bool:
            self._look()
            return self.machine.poll() is None

        patience = max(60.0, 2 * self.reference_s)
        if self.in_save:
            self.in_save(patience, goes_on)
        else:
            wait_for_save(self.watch, patience, goes_on)
        self.machine.kill()
        self._look()
        hit = self.in_save is not None or self.watch.saving()  # The trace tells better, later.
        after = f" after step {self.watch.step}" if self.watch.step else ""
        return hit, f"killed while saving{after}" if hit else f"killed{after}, when the save had finished"

    def _warn(self, warned: Warned) -> tuple[int | None, str]:
        """Send the notice or signal, let the task save, and take the machine."""
        self.machine.noticed_s = begun = time.monotonic()
        left_s = warned.notice_s
        if warned.signal:
            self.machine.signal(warned.signal)
        elif self.server:
            if warned.tells_time:
                left_s = self._shortened_s(warned)
            self.server.announce(left_s)
        while self.machine.poll() is None and not (not warned.signal and self.watch.ended()):
            heard = warned.signal or (self.server and self.server.told)
            if time.monotonic() - begun >= (left_s if heard else self._shortened_s(warned)):
                break
            self._look()
            time.sleep(LOOK_S)
        code = self.machine.poll()
        self.machine.kill()
        if self.server:
            self.server.clear()
        self._look()
        deadly = (-warned.signal, 128 + warned.signal) if warned.signal else ()
        odd = "" if code in (None, EXIT_PREEMPTED, *_AT_SIGTERM, *deadly) else f", exited with {code}"
        return code, f"{warned.label}{self._where()}{odd}"

    def _shortened_s(self, warned: Warned) -> float:
        """The length of a notice of which no record tells whether the task got it.

        With a long notice, a short task would finish first.
        """
        if self.records or self.watch.attempt():
            return warned.notice_s
        return min(warned.notice_s, NOTICE_WITHOUT_RECORDS_S, max(0.3, 0.1 * self.reference_s))


def _short(torn: str | None) -> str:
    """Shorten a torn file's path for the table."""
    if torn is None:
        return "nothing"
    parts = torn.split("/")
    name = CheckpointName.parse(parts[-2]) if len(parts) > 1 else None
    return f"checkpoint {name.step}" if name else parts[-1]
