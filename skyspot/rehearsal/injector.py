"""The instant at which a machine is taken, and the taking, in the way of the preemption's kind."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass

from skyspot.rehearsal import faults
from skyspot.rehearsal.faults import Preemption
from skyspot.rehearsal.machine import Machine
from skyspot.rehearsal.metadata import AwsMetadata
from skyspot.rehearsal.result import Row
from skyspot.rehearsal.view import View
from skyspot.rehearsal.watch import Watch, wait_for_save, walk
from trainer.layout.exit_codes import EXIT_PREEMPTED
from trainer.layout.names import CheckpointName

NOTICE_S = 120.0
NOTICE_WITHOUT_RECORDS_S = 10.0
TERM_PATIENCE_S = 45.0
LOOK_S = 0.01
LEFT_WITH_0 = "SkyPilot would call it SUCCEEDED; unless all was done, leave with a code of recover_on_exit_codes"
WITHOUT_A_WRITE = 0.7  # Of the undisturbed run: a task that had written nothing until then is struck all the same.


@dataclass(frozen=True)
class Injector:
    """What is to happen to one machine."""

    planned: Preemption | None
    """None: it runs to the end."""
    machine: Machine
    watch: Watch
    server: AwsMetadata
    view: View
    reference_s: float
    """What the undisturbed run took."""
    written_s: float
    """How long it went on after it had first written into its bucket; 0 where it never did."""
    records: bool
    """Whether the task keeps attempt records."""

    def due(self, step: int | None) -> bool:
        """Whether this is the instant."""
        planned = self.planned
        if planned is None:
            return False
        if planned.at_fraction is not None:
            alive_s = self.watch.alive_s()
            due = alive_s > 0 and alive_s >= planned.at_fraction * self.written_s
            if self.written_s <= (1 - WITHOUT_A_WRITE) * self.reference_s:
                due = due or time.monotonic() - self.machine.started >= WITHOUT_A_WRITE * self.reference_s
            return due and (planned.kind != "torn" or bool(walk(self.watch.bucket)))
        if step is None:
            return False
        if planned.kind == "torn" and self.watch.committed() < 2:
            return False
        if planned.after_resume is not None:
            return step >= (self.watch.first_step or 0) + planned.after_resume - 1
        return step >= (planned.at_step or 0)

    def take(self, number: int, processes: int) -> tuple[Row, int | None]:
        """Take the machine; returns the attempt's row, and what the task left with, where it left."""
        assert self.planned
        kind, hit, code = self.planned.kind, True, None
        if kind == "kill":
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
            code, ended = self._warn(kind)
        if code == 0:
            early = "finished before the machine was taken"
            if kind in ("sigterm", "aws-notice") and not self.records:
                early = f"left with 0 at {'SIGTERM' if kind == 'sigterm' else 'the notice'}: {LEFT_WITH_0}"
            return Row(number, "finished", early, processes), 0
        return Row(number, kind, ended, processes, hit=hit), code

    def _where(self) -> str:
        return f" at step {self.watch.step}" if self.watch.step else ""

    def _look(self) -> None:
        self.view.step(self.watch.look())

    def _kill_in_save(self) -> tuple[bool, str]:
        """Wait for a checkpoint that is being written, and kill; whether that hit, and how it ended."""
        self.watch.forget_files()

        def goes_on() -> bool:
            self._look()
            return self.machine.poll() is None

        wait_for_save(self.watch, max(60.0, 2 * self.reference_s), goes_on)
        self.machine.kill()
        self._look()
        hit = self.watch.saving()
        after = f" after step {self.watch.step}" if self.watch.step else ""
        return hit, f"killed while saving{after}" if hit else f"killed{after}; the save was over already"

    def _warn(self, kind: str) -> tuple[int | None, str]:
        """Give the word, let the task save, take the machine."""
        notice = kind == "aws-notice"
        patience = TERM_PATIENCE_S
        if notice:
            if not self.records and not self.watch.attempt():
                # Nothing says whether it heard: a short notice, or a short task would be over before its machine goes.
                patience = min(NOTICE_WITHOUT_RECORDS_S, max(0.3, 0.1 * self.reference_s))
            else:
                patience = NOTICE_S
            self.server.announce(patience)
        else:
            self.machine.signal(signal.SIGTERM)
        end = time.monotonic() + patience
        while time.monotonic() < end and self.machine.poll() is None and not (notice and self.watch.ended()):
            self._look()
            time.sleep(LOOK_S)
        code = self.machine.poll()
        self.machine.kill()
        self.server.clear()
        self._look()
        odd = f", left with {code}" if code not in (None, EXIT_PREEMPTED, -signal.SIGTERM, 128 + signal.SIGTERM) else ""
        return code, f"{'spot notice' if notice else 'SIGTERM'}{self._where()}{odd}"


def _short(torn: str | None) -> str:
    """A torn file's folder and name, short enough for a table."""
    if torn is None:
        return "nothing"
    parts = torn.split("/")
    name = CheckpointName.parse(parts[-2]) if len(parts) > 1 else None
    return f"checkpoint {name.step}" if name else parts[-1]
