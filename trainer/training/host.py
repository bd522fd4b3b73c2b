"""Host: the process that a session runs in, as one rank of an attempt: its group, the run's folder, its records."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.attempt.limits import Reckoning
from trainer.attempt.record import Attempt, open_attempt
from trainer.bucket.deadlines import within
from trainer.layout.names import AttemptName, RunPaths
from trainer.machine.flag import Flag
from trainer.ranks.agreement import Stop
from trainer.training.hangs import HangGuard

if TYPE_CHECKING:
    from trainer.attempt.ending import Ending
    from trainer.ranks.group import RankGroup
    from trainer.trackers.tracking import Tracking
    from trainer.training.journal import Journal


class Host:
    """One rank's process. A `Participant` adds notices and exit codes; without them, nothing asks it to stop."""

    group: RankGroup
    attempt_name: AttemptName

    def __init__(self, paths: RunPaths, binding: dict[str, Any]) -> None:
        self.paths, self.binding = paths, binding
        self.remedies: dict[str, str] = {}
        """By name of a value that binds the run: how to give it the run's value, for a message."""
        self.run_id: str | None = None
        """Rank 0: the run's id; checkpoints of other runs do not count."""
        self.attempt: Attempt | None = None
        """Rank 0's record of the attempt; None on other ranks."""
        self.journal: Journal | None = None
        """Rank 0's metrics and events; None on other ranks."""
        self.report_to: tuple[str, ...] = ()
        """Names of the experiment trackers."""
        self.tracking: Tracking | None = None
        """Rank 0's trackers; None on other ranks, and without trackers."""
        self.reckoning: Reckoning | None = None
        """Rank 0: what the run has spent, if it has a limit."""
        self.stop_received = Flag()
        """Set once this rank knows that it has to stop; from then on no wait is long."""
        self.hinted = threading.Event()
        """Set while the cloud expects to take this rank's machine and no save has followed."""
        self.stopping: Ending | None = None
        """The stop that all ranks have agreed on; from then on, peers that leave are expected."""
        self.trouble: Callable[[], BaseException | None] = lambda: None
        """Returns the error for which all ranks are about to leave; a rank that left for it already is no lost peer."""
        self.last_committed: Callable[[], int | None] = lambda: self.committed_step
        """Returns the last committed step, also within a step."""
        self.hangs = HangGuard(0.0, lambda seconds: None)
        """Ends the attempt where training stands still."""
        self.has_own_loop = False
        """The program has a loop of its own, and no `RunConfig`."""
        self.steps_done = 0
        self.committed_step: int | None = None

    def own_stop(self) -> Stop | None:
        """This rank's reason to stop; None without one."""
        return None

    def deadline(self, stop: Stop) -> float:
        """When an agreed stop has to be over, in monotonic seconds; may come to be another one than was agreed on."""
        return stop.deadline

    def check_stop(self) -> None:
        """Raise if it is time to stop. Called while this rank waits, outside of the steps."""

    def print_line(self, text: str) -> None:
        """Print a line; ranks other than 0 print nothing."""
        if self.group.rank == 0:
            from trainer.training.console import print_line

            print_line(text)

    def begin_records(self) -> None:
        """Rank 0: start to write metrics and events, unless a limit has begun them already."""
        from trainer.training.journal import Journal

        if self.attempt and not self.journal:
            self.journal = Journal(self.attempt, self.reckoning)

    def begin_tracking(self, config: Mapping[str, Any]) -> None:
        """Rank 0: start the experiment trackers, once the state is restored.

        Args:
            config: The settings, for readers.
        """
        if not (self.report_to and self.journal and self.attempt):
            return
        from trainer.trackers.tracker import tracked
        from trainer.trackers.tracking import Tracking

        try:
            with within("reading the attempts' names"):
                run = tracked(self.paths, self.attempt.name, config)
        except OSError as error:
            self.print_line(f"{', '.join(self.report_to)}: {error}. Training goes on without.")
            return
        self.journal.event("tracking", to=list(self.report_to), id=run.id)
        self.tracking = Tracking(
            self.report_to, run, self.journal.history, lambda: self.last_committed(), self.print_line
        )
        self.journal.on_line = self.tracking.line

    def end_tracking(self, is_finished: bool, deadline: float | None) -> None:
        """Rank 0: let the trackers take what they have, for a few seconds; as of `Tracking.end`."""
        tracking, self.tracking = self.tracking, None
        if tracking and (late := tracking.end(is_finished, deadline)):
            self.print_line(f"{', '.join(late)}: not all metrics got there in time. The run's records have them.")


def open_host(folder: Path, group: RankGroup, launch: str, binding: Mapping[str, Any] | None = None) -> Host:
    """Open an attempt for a program that ends by itself: no launcher, no notices, no check of what binds the run.

    Args:
        folder: The run's.
        group: The ranks, with their process groups.
        launch: The name of the launch, for the records.
        binding: What binds the run.
    """
    host = Host(RunPaths(folder), dict(binding or {}))
    host.group = group
    if group.rank == 0:
        host.attempt = open_attempt(host.paths, launch=launch, config={}, binding=host.binding)
    name = AttemptName.parse(
        group.rank0_does(f"attempt/{folder.name}", lambda: str(host.attempt and host.attempt.name))
    )
    assert name
    host.attempt_name = name
    host.begin_records()
    return host
