"""The parent of all ranks of a machine: starts them, passes signals on, and leaves with their exit code.

It is the parent of every rank, even of a single one, and never touches the bucket: a call into the bucket that hangs
blocks a rank, and the launcher can still leave. It relays the ranks' output through pipes of its own, so that a rank
which cannot be killed does not hold the job's pipes open. Standard library only.
"""

from __future__ import annotations

import os
import secrets
import selectors
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from trainer.attempt.ending import DIED, END_EVENT_S, FINISHED, NOTICE, SIGNAL, Ending, Hold
from trainer.launch.cloud import Cloud, hold_s
from trainer.launch.environment import Environment, LocalPorts, printed_file
from trainer.launch.exits import code_of, combined_code
from trainer.launch.nodes import Nodes
from trainer.launch.others import refuse_beneath_another
from trainer.launch.rank import Rank, is_zombie, start_rank
from trainer.launch.relay import Lines, Relay, say
from trainer.launch.sidecar_client import Sidecar, write_end
from trainer.layout.names import file_safe
from trainer.machine import home
from trainer.notices.presses import PRESSES, Presses

KILL_AFTER_GRACE_S = 3.0
LEAVE_AFTER_KILL_S = 4.0
LEAST_END_EVENT_S = 0.5
RELAY_S = 1.0
KILL_AFTER_PRESSES_S = 3.0
LOOK_S = 0.5


def launch(command: Sequence[str], *, processes: int, grace_s: float, sidecar_dir: Path | None = None) -> int:
    """Run a command once per rank, to the end; returns an exit code of README's table.

    Args:
        command: The command line of each rank.
        processes: The number of ranks on each machine.
        grace_s: Seconds from SIGTERM to SIGKILL.
        sidecar_dir: The run's folder, in which a sidecar records the attempt of a script that does not do so itself.

    Raises:
        NodesError: SkyPilot's variables contradict each other.
        LaunchError: another launcher has started this one.
    """
    refuse_beneath_another()
    nodes = Nodes.from_env()
    home.stand_in()
    return Supervisor(list(command), processes, grace_s, sidecar_dir, nodes).run()


class Supervisor:
    """One start of all ranks of this machine."""

    def __init__(
        self, command: list[str], processes: int, grace_s: float, sidecar_dir: Path | None, nodes: Nodes
    ) -> None:
        self._command, self._processes, self._grace_s, self._nodes = command, processes, grace_s, nodes
        self._started = time.monotonic()
        self._launch_id = file_safe(os.environ.get("SKYPILOT_TASK_ID") or f"local-{secrets.token_hex(4)}")
        self._selector = selectors.DefaultSelector()
        self._ranks: list[Rank] = []
        self._relay = Relay()
        self._cloud: Cloud | None = None
        self._ports: LocalPorts | None = None
        self._signalled = False
        """A signal has set the ranks' deadline: SIGTERM, SIGINT or SIGHUP."""
        self._announced = False
        """SIGUSR1 has announced a time limit (Slurm), which only the script may know."""
        self._stopped: Ending | None = None
        """The stop that the sidecar reported, for a script that does not look itself."""
        self._kill_at: float | None = None
        self._presses = Presses()
        self._killed = False
        self._sidecar_dir = sidecar_dir if nodes.leads else None
        self._sidecar: Sidecar | None = None

    def run(self) -> int:
        """Start the ranks and wait until all have left; returns the exit code."""
        self._catch_signals()
        if self._sidecar_dir:
            sidecar = self._start_sidecar(self._sidecar_dir)
            while not sidecar.attempt and sidecar.exit_code is None and not (self._signalled or self._announced):
                self._wait(None)
            is_told = self._signalled or self._announced
            code = SIGNAL.code if is_told else sidecar.exit_code
            if code is not None:
                sidecar.close(code, SIGNAL, ended=not is_told)
                self._relay.end(RELAY_S)
                return code
        self._start_ranks()
        while not self._over():
            self._wait(self._next_look())
            self._look()
        return self._finish()

    def _wait(self, seconds: float | None) -> None:
        """Wait for a signal, the sidecar or a rank, but not longer than `seconds`, and take in what comes."""
        for key, _ in self._selector.select(seconds):
            if key.data == "signal":
                self._pass_on(os.read(key.fd, 4096))
            elif isinstance(key.data, Sidecar):
                if not key.data.receive():
                    self._selector.unregister(key.fd)
            else:
                rank: Rank = key.data
                if not rank.receive():
                    self._selector.unregister(key.fd)
                if rank.reported_code is not None:
                    self._left(rank, rank.reported_code)

    # -- the start ---------------------------------------------------------------------------------------------------

    def _catch_signals(self) -> None:
        """Have signals wake up the selector; a handler itself does nothing."""
        wake_read, wake_write = os.pipe()
        for descriptor in (wake_read, wake_write):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGCHLD]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # Under nohup, it is ignored.
            numbers.append(signal.SIGHUP)
        for number in numbers:
            signal.signal(number, lambda *_: None)
        self._selector.register(wake_read, selectors.EVENT_READ, "signal")

    def _start_sidecar(self, run_dir: Path) -> Sidecar:
        self._sidecar = sidecar = Sidecar(run_dir, self._launch_id, self._started, self._grace_s)
        self._selector.register(sidecar.pipe, selectors.EVENT_READ, sidecar)
        self._relay.begin(sidecar.errors, 2, Lines(bars=False))
        return sidecar

    def _start_ranks(self) -> None:
        self._ports = None if self._nodes.several else LocalPorts()
        attempt = self._sidecar.attempt if self._sidecar else ""
        environment = Environment(
            self._nodes, self._processes, self._launch_id, self._started, self._grace_s, attempt, self._ports
        )
        printed = printed_file()
        pipes: list[tuple[int, int, int]] = []
        for number in range(self._processes):
            rank, out, err = start_rank(self._command, number, environment, printed)
            self._ranks.append(rank)
            self._selector.register(rank.from_rank, selectors.EVENT_READ, rank)
            pipes += [(out, 1, number), (err, 2, number)]
        self._cloud = Cloud(self._ranks, printed)
        if self._ports:
            self._ports.store.close()
        for source, target, number in pipes:
            raw = number == 0 and (self._processes == 1 or os.isatty(target))
            self._relay.begin(source, target, None if raw else Lines(bars=number == 0))

    # -- while they run ----------------------------------------------------------------------------------------------

    def _pass_on(self, numbers: bytes) -> None:
        for number in numbers:
            if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                self._signalled = True
                self._set_deadline()
            self._announced = self._announced or number == signal.SIGUSR1
            if number in (signal.SIGTERM, signal.SIGHUP):  # One that has heard of the notice has got its SIGTERM.
                self._send(signal.SIGTERM, [rank for rank in self._ranks if rank.listens or not rank.taken_at])
            elif number in (signal.SIGINT, signal.SIGUSR1):
                self._send(number)
            if number == signal.SIGINT and self._presses.count() == PRESSES:
                self._have_leave_at_once()

    def _have_leave_at_once(self) -> None:
        """Have the ranks leave at once, because Ctrl-C was pressed again and again."""
        self._kill_at = time.monotonic() + KILL_AFTER_PRESSES_S
        for rank in self._ranks:
            rank.taken_at = None
            if rank.code is None:
                rank.tell_to_leave()

    def _send(self, number: int, ranks: Sequence[Rank] | None = None) -> None:
        for rank in self._ranks if ranks is None else ranks:
            if rank.code is None:
                with suppress(ProcessLookupError):
                    rank.process.send_signal(number)

    def _set_deadline(self) -> None:
        """From now on the ranks have the grace to leave; then they are killed."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self._grace_s + KILL_AFTER_GRACE_S

    def _look(self) -> None:
        """Reap ranks that have left, end the attempt if the sidecar asks for it, and kill ranks that are late."""
        for rank in self._ranks:
            if rank.code is None:
                status = rank.process.poll()
                if status is not None or rank.stays_a_zombie():
                    self._reap(rank, rank.status_as_zombie() if status is None else status)
        if self._sidecar and not self._stopped and not self._ranks[0].attempt:
            self._stopped = self._sidecar.stop
            if self._stopped:
                self._set_deadline()
                self._send(signal.SIGTERM)
        self._pass_on_notice()
        self._await_notice()
        if self._kill_at is not None and time.monotonic() >= self._kill_at and not self._killed:
            self._killed = True
            late = [str(self._number(rank)) for rank in self._ranks if rank.code is None]
            self._send(signal.SIGKILL)
            if late:
                say(f"rank {', '.join(late)} did not leave in time: killed")

    def _pass_on_notice(self) -> None:
        """Send a SIGTERM to ranks that do not watch for notices; they have until the machine is taken."""
        assert self._cloud
        for rank in self._cloud.pass_on():
            if not self._signalled:
                self._send(signal.SIGTERM, [rank])
            if self._kill_at is None and rank.taken_at:
                self._kill_at = rank.taken_at + KILL_AFTER_GRACE_S

    def _await_notice(self) -> None:
        """Kill no rank before the cloud takes this machine: SkyPilot may pass its notice on as a SIGTERM."""
        taken_at = max((rank.taken_at for rank in self._ranks if rank.taken_at), default=0.0)
        if self._kill_at is not None and self._signalled and not self._killed:
            self._kill_at = max(self._kill_at, taken_at + KILL_AFTER_GRACE_S)

    def _reap(self, rank: Rank, status: int) -> None:
        """Take in a rank's end. The code that it reported last counts more than how its process ended."""
        if rank.from_rank in self._selector.get_map():
            rank.drain()
            self._selector.unregister(rank.from_rank)
        if status < 0 and rank.reported_code is None and self._kill_at is None:
            self._print_killed(rank, signal.Signals(-status))
        self._left(rank, status if rank.reported_code is None else rank.reported_code)

    def _print_killed(self, rank: Rank, by: signal.Signals) -> None:
        """Print which signal ended a rank that nothing had told to leave: it cannot print that itself."""
        hint = ". Linux does that where memory runs out" if by is signal.SIGKILL else ""
        say(f"rank {self._number(rank)} was killed by {by.name}{hint}")

    def _number(self, rank: Rank) -> int:
        return self._nodes.rank * self._processes + self._ranks.index(rank)

    def _left(self, rank: Rank, code: int) -> None:
        if rank.code is not None:
            return
        rank.code = code_of(code)
        if rank.code == 0 and not (self._nodes.leads and rank is self._ranks[0]):
            return  # Rank 0 leaves last; until then the others may come and go.
        if rank.code != 0:
            self._set_deadline()
            others = [other for other in self._ranks if other.code is None]
            for other in others:
                other.tell_peer_gone()
            # To a rank that reads its pipe, a SIGTERM would look like one from outside.
            self._send(signal.SIGTERM, [other for other in others if not (other.listens or other.taken_at)])

    def _over(self) -> bool:
        if all(rank.code is not None for rank in self._ranks):
            return True
        return self._kill_at is not None and time.monotonic() >= self._kill_at + LEAVE_AFTER_KILL_S

    def _next_look(self) -> float:
        if any(rank.code is None and rank.zombie_since for rank in self._ranks):
            return 0.02
        if self._kill_at is None:
            return LOOK_S
        return min(LOOK_S, max(0.01, self._kill_at - time.monotonic()))

    # -- the end -----------------------------------------------------------------------------------------------------

    def _finish(self) -> int:
        """Wait for the last processes, have the end event written, and return the exit code of all ranks."""
        code = self._stopped.code if self._stopped else combined_code([rank.code for rank in self._ranks])
        first = self._ranks[0]
        begun = time.monotonic()
        # All remaining steps share the remaining time: each of them may meet the same dead mount.
        leave_by = min(begun, self._kill_at or begun) + LEAVE_AFTER_KILL_S
        # A rank that reported its exit gets a moment to leave; one that cannot be reaped is left behind.
        for rank in self._ranks:
            while rank.process.poll() is None and not is_zombie(rank.process.pid) and time.monotonic() < leave_by:
                if time.monotonic() > begun + 1:
                    rank.process.kill()
                time.sleep(0.005)
            if (rank.process.returncode or 0) < 0:
                # It was killed: its children (a process pool, say) would wait for work for ever.
                with suppress(OSError):
                    os.killpg(rank.process.pid, signal.SIGKILL)
        end_event_s = min(END_EVENT_S, max(LEAST_END_EVENT_S, leave_by - time.monotonic()))
        notice = self._cloud.takes(code) if self._cloud and not self._stopped else None
        ending = NOTICE if notice else self._ending(code)
        if self._sidecar:
            self._sidecar.close(code, ending, first.ended, end_event_s)
        elif first.attempt and not first.ended:
            write_end(first.attempt, code, ending, end_event_s)
        self._relay.end(RELAY_S)
        if self._stopped and self._stopped.hold is Hold.JOB_CANCELLED:
            self._hold(self._stopped.hold_s())
        if notice:
            say("holding until this machine is taken")
            self._signalled = False  # One that came beside the notice changes nothing.
            self._hold(hold_s(notice))
        return code

    def _ending(self, code: int) -> Ending:
        """How the attempt has ended, without a notice. To a script that fails, SIGUSR1 may mean something else."""
        if self._signalled or (self._announced and code == SIGNAL.code):
            return SIGNAL
        return self._stopped or (DIED if code else FINISHED)

    def _hold(self, seconds: float) -> None:
        """Wait for a signal, as a script with records of its own does.

        For SkyPilot's cancel: leaving would show a failed job. For the machine's end: it would start another attempt.
        """
        end = time.monotonic() + seconds
        while not self._signalled and (left := end - time.monotonic()) > 0:
            self._wait(left)
