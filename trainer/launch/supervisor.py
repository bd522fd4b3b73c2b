"""Starts one process per accelerator, passes signals on, and keeps their exit codes. Standard library only.

    python -m trainer.launch [--processes N] [--grace S] [--checkpoint-dir FOLDER] SCRIPT [ARGS ...]

The launcher is the parent of every rank, also of a single one, and never touches the bucket: whatever hangs there hangs
a rank, and the launcher can still leave. It relays the ranks' output through pipes of its own, so that a rank which
cannot be killed does not hold the job's pipes open.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.attempt.ending import DIED, FINISHED, SIGNAL, Ending, Hold
from trainer.errors import TrainerError
from trainer.launch.grace import DEFAULT_GRACE_S
from trainer.launch.link import LISTENS, PEER_GONE
from trainer.launch.nodes import Nodes, interface_of
from trainer.launch.relay import Lines, Relay
from trainer.launch.sidecar_client import END_EVENT_S, Keeper, write_end
from trainer.layout.exit_codes import EXIT_DONE, EXIT_FAILED, EXIT_PRECEDENCE, EXIT_PREEMPTED, EXIT_USAGE
from trainer.layout.names import file_safe
from trainer.machine import home

KILL_AFTER_GRACE_S = 3.0
LEAVE_AFTER_KILL_S = 4.0
LEAST_END_EVENT_S = 0.5
RELAY_S = 1.0
LOOK_S = 0.5
ZOMBIE_S = 2.0
_PR_SET_PDEATHSIG = 1


class LaunchError(TrainerError):
    """The ranks cannot be started; the message says why and what to do."""


@dataclass
class _Rank:
    """A rank as its launcher sees it."""

    process: subprocess.Popen[bytes]
    to_rank: int
    from_rank: int
    heard: bytes = b""
    code: int | None = None
    """What it left with; None while it is there."""
    zombie_since: float | None = None
    listens: bool = False
    """It hears on its pipe that another rank left."""
    ended: bool = False
    """It wrote the attempt's end event."""
    attempt: dict[str, str] = field(default_factory=dict)


def process_count(asked: int | None, cpu: bool) -> int:
    """How many ranks to start: SKYSPOT_PROCESSES (a rehearsal's), what was asked for, one per accelerator, or 1.

    Raises:
        LaunchError: a number that is none.
    """
    for name, text in (("SKYSPOT_PROCESSES", os.environ.get("SKYSPOT_PROCESSES")), ("--processes", asked)):
        if text not in (None, ""):
            if not re.fullmatch("[0-9]{1,9}", str(text)) or not 1 <= int(str(text)) <= 1024:
                raise LaunchError(f"{name}: {text!r} is not a number of processes")
            return int(str(text))
    if cpu:
        return 1
    per_node = os.environ.get("SKYPILOT_NUM_GPUS_PER_NODE", "")
    if re.fullmatch("[0-9]{1,9}", per_node) and int(per_node):
        return int(per_node)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([part for part in visible.split(",") if part.strip() not in ("", "-1")]))
    return max(1, sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in Path("/dev").glob("nvidia[0-9]*")))


def launch(command: Sequence[str], *, processes: int, grace_s: float, keeper_dir: Path | None = None) -> int:
    """Run a command once per rank, to the end; returns the exit code of the stop table.

    Args:
        command: What each rank executes.
        processes: How many ranks on each machine.
        grace_s: Seconds from SIGTERM to SIGKILL.
        keeper_dir: The run's folder, where a child of the launcher's own shall record the attempt (for scripts that do
            not do so themselves).

    Raises:
        NodesError: SkyPilot's variables contradict each other.
    """
    nodes = Nodes.from_env()
    home.stand_in()
    return _Launch(list(command), processes, grace_s, keeper_dir, nodes).run()


def reserve_port() -> socket.socket:
    """A free port on loopback that nobody else is given, and that rank 0 of a plain torch script can still serve.

    Bound but not listening: the kernel hands it to nobody, and whoever binds it with SO_REUSEADDR, as torch does, may.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


def _shared_file() -> int:
    """A file without a name that the ranks inherit; in memory where that can be had, as the disk may be full."""
    with suppress(OSError):
        if hasattr(os, "memfd_create"):
            return os.memfd_create("said")
    with suppress(OSError), tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
    return os.open(os.devnull, os.O_RDWR)  # Then each rank says it.


class _Launch:
    """One start of all ranks of this machine."""

    def __init__(
        self, command: list[str], processes: int, grace_s: float, keeper_dir: Path | None, nodes: Nodes
    ) -> None:
        self._command, self._processes, self._grace_s, self._nodes = command, processes, grace_s, nodes
        self._started = time.monotonic()
        self._launch_id = file_safe(os.environ.get("SKYPILOT_TASK_ID") or f"local-{secrets.token_hex(4)}")
        self._selector = selectors.DefaultSelector()
        self._ranks: list[_Rank] = []
        self._relay = Relay()
        self._signalled = False
        self._stopped: Ending | None = None
        """Why the keeper had the attempt of a script ended that does not look itself."""
        self._kill_at: float | None = None
        self._killed = False
        self._reserved: socket.socket | None = None
        self._said = _shared_file()
        """What the ranks have said of their ends: a mistake that all of them meet is said once."""
        self._keeper_dir = keeper_dir if nodes.leads else None
        self._keeper: Keeper | None = None

    def run(self) -> int:
        wake_read, wake_write = os.pipe()
        for descriptor in (wake_read, wake_write):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        self._selector.register(wake_read, selectors.EVENT_READ, "signal")
        if self._keeper_dir:
            self._keeper = Keeper(self._keeper_dir, self._launch_id)
            self._selector.register(self._keeper.pipe, selectors.EVENT_READ, "keeper")
            self._relay.begin(self._keeper.errors, 2, Lines(bars=False))
            while not self._keeper.attempt and self._keeper.leave is None and not self._signalled:
                self._take_in(None)
            if self._signalled or self._keeper.leave is not None:
                code = SIGNAL.code if self._signalled else self._keeper.leave
                assert code is not None
                self._keeper.close(code, SIGNAL, ended=not self._signalled)
                self._relay.end(RELAY_S)
                return code
        self._start_ranks()
        while not self._over():
            self._take_in(self._next_look())
            self._look()
        return self._finish()

    def _take_in(self, seconds: float | None) -> None:
        """Wait for a word of anybody's, at most so long."""
        for key, _ in self._selector.select(seconds):
            if key.data == "signal":
                self._pass_on(os.read(key.fd, 4096))
            elif key.data == "keeper":
                assert self._keeper
                if not self._keeper.listen():
                    self._selector.unregister(key.fd)
            else:
                self._listen(key.data)

    # -- the start ---------------------------------------------------------------------------------------------------

    def _start_ranks(self) -> None:
        listener = None
        if not self._nodes.several:
            listener = socket.create_server(("127.0.0.1", 0), backlog=512)
            self._reserved = reserve_port()
        libc = ctypes.CDLL(None)
        parent = os.getpid()
        pipes: list[tuple[int, int, int]] = []

        def in_child() -> None:
            # Its own process group: a Ctrl-C or a kill of the launcher's group would otherwise reach it twice.
            os.setpgid(0, 0)
            if hasattr(libc, "prctl"):
                libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != parent:
                    os._exit(EXIT_PREEMPTED)

        for rank in range(self._processes):
            (rank_reads, to_rank), (from_rank, rank_writes) = os.pipe(), os.pipe()
            (out, rank_out), (err, rank_err) = os.pipe(), os.pipe()
            inherited = [rank_reads, rank_writes, self._said, *([listener.fileno()] if listener and rank == 0 else [])]
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=rank_out,
                stderr=rank_err,
                pass_fds=inherited,
                env=self._environment(rank, listener, f"{rank_reads},{rank_writes},{self._said}"),
                preexec_fn=in_child,
            )
            for descriptor in (rank_reads, rank_writes, rank_out, rank_err):
                os.close(descriptor)
            self._ranks.append(_Rank(process, to_rank, from_rank))
            self._selector.register(from_rank, selectors.EVENT_READ, self._ranks[-1])
            pipes += [(out, 1, rank), (err, 2, rank)]
        if listener:
            listener.close()
        for source, target, rank in pipes:
            raw = rank == 0 and (self._processes == 1 or os.isatty(target))
            self._relay.begin(source, target, None if raw else Lines(bars=rank == 0))

    def _environment(self, rank: int, listener: socket.socket | None, link: str) -> dict[str, str]:
        nodes = self._nodes
        env = {
            **os.environ,
            "RANK": str(nodes.rank * self._processes + rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(nodes.count * self._processes),
            "LOCAL_WORLD_SIZE": str(self._processes),
            "MASTER_ADDR": nodes.ips[0] if nodes.several else "127.0.0.1",
            "MASTER_PORT": str(self._reserved.getsockname()[1] if self._reserved else nodes.port),
            "NODE_RANK": str(nodes.rank),
            "SKYSPOT_LINK": link,
            "SKYSPOT_LAUNCH": self._launch_id,
            "SKYSPOT_LAUNCHED_AT": repr(self._started),
            "SKYSPOT_GRACE_S": repr(self._grace_s),
            "PYTHONUNBUFFERED": "1",
            # c10d prints C++ frames around the one line that says what is wrong.
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        }
        for name in ("SKYSPOT_STORE_PORT", "SKYSPOT_LISTEN_FD", "SKYSPOT_TTY", "SKYSPOT_ATTEMPT"):
            env.pop(name, None)
        if self._processes > 1:
            env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self._processes)))
        # Threads that spin for long while they wait for each other stand still where anything else wants a core: nine
        # times as slow with two trainings on two cores. Not to spin at all makes short operations slow on a quiet one.
        if "OMP_WAIT_POLICY" not in env:
            env.setdefault("GOMP_SPINCOUNT", "5000")
        if nodes.several and "GLOO_SOCKET_IFNAME" not in env and (interface := interface_of(nodes.ips[nodes.rank])):
            env["GLOO_SOCKET_IFNAME"] = interface
        if listener:
            env["SKYSPOT_STORE_PORT"] = str(listener.getsockname()[1])
            if rank == 0:
                env["SKYSPOT_LISTEN_FD"] = str(listener.fileno())
        if nodes.leads and rank == 0 and sys.stdout.isatty():
            size = shutil.get_terminal_size()
            env.update(SKYSPOT_TTY="1", COLUMNS=str(size.columns), LINES=str(size.lines))
        if self._keeper and self._keeper.attempt:
            env["SKYSPOT_ATTEMPT"] = self._keeper.attempt
        return env

    # -- while they run ----------------------------------------------------------------------------------------------

    def _pass_on(self, numbers: bytes) -> None:
        for number in numbers:
            if number in (signal.SIGTERM, signal.SIGINT):
                self._signalled = True
                self._doom()
                self._send(number)

    def _send(self, number: int, ranks: Sequence[_Rank] | None = None) -> None:
        for rank in self._ranks if ranks is None else ranks:
            if rank.code is None:
                with suppress(ProcessLookupError):
                    rank.process.send_signal(number)

    def _doom(self) -> None:
        """From now on there is an end to waiting."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self._grace_s + KILL_AFTER_GRACE_S

    def _listen(self, rank: _Rank) -> None:
        """Take in what a rank says on its link."""
        try:
            data = os.read(rank.from_rank, 65536)
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(rank.from_rank)
            return
        rank.heard += data
        while b"\n" in rank.heard:
            line, rank.heard = rank.heard.split(b"\n", 1)
            word, _, rest = line.decode("ascii", "replace").partition(" ")
            if word == "attempt":
                with suppress(ValueError):
                    rank.attempt = json.loads(rest)
            elif word == LISTENS:
                rank.listens = True
            elif word == "ended":
                rank.ended = True
            elif word == "exit" and rest.isdigit():
                self._left(rank, int(rest))

    def _look(self) -> None:
        """See who is gone, and kill who should be."""
        for rank in self._ranks:
            if rank.code is None:
                gone = rank.process.poll()
                if gone is not None or self._stays_a_zombie(rank):
                    self._drain(rank)  # What it said last counts more than how it went.
                    self._left(rank, -signal.SIGKILL if gone is None else gone)
        if self._keeper and not self._stopped and not self._ranks[0].attempt:
            self._stopped = self._keeper.stop
            if self._stopped:
                self._doom()
                self._send(signal.SIGTERM)
        if self._kill_at is not None and time.monotonic() >= self._kill_at and not self._killed:
            self._killed = True
            self._send(signal.SIGKILL)

    def _stays_a_zombie(self, rank: _Rank) -> bool:
        """Whether a rank has exited and cannot be reaped: a thread of it hangs in a dead mount.

        Any process with threads is a zombie for a moment when it leaves; that one is reaped soon, with its own code.
        """
        if not _is_zombie(rank.process.pid):
            rank.zombie_since = None
            return False
        rank.zombie_since = rank.zombie_since or time.monotonic()
        return time.monotonic() - rank.zombie_since >= ZOMBIE_S

    def _drain(self, rank: _Rank) -> None:
        os.set_blocking(rank.from_rank, False)
        while rank.from_rank in self._selector.get_map():
            before = rank.heard
            self._listen(rank)
            if rank.heard == before:
                break

    def _left(self, rank: _Rank, code: int) -> None:
        if rank.code is not None:
            return
        rank.code = code_of(code)
        if rank.code == 0 and not (self._nodes.leads and rank is self._ranks[0]):
            return  # Rank 0 leaves last; until then the others may come and go.
        if rank.code != 0:
            self._doom()
            for other in self._ranks:
                if other.code is None:
                    with suppress(OSError):
                        os.write(other.to_rank, PEER_GONE + b"\n")
            # To who hears the pipe a SIGTERM would look like one from outside.
            self._send(signal.SIGTERM, [other for other in self._ranks if not other.listens])

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
        code = self._stopped.code if self._stopped else first_of_the_table([rank.code for rank in self._ranks])
        first = self._ranks[0]
        begun = time.monotonic()
        # All that is left to do shares the time that there is: each step may meet the same dead mount.
        leave_by = min(begun, self._kill_at or begun) + LEAVE_AFTER_KILL_S
        # Who said that it leaves is given a moment to do so; who cannot be reaped is left behind.
        for rank in self._ranks:
            while rank.process.poll() is None and not _is_zombie(rank.process.pid) and time.monotonic() < leave_by:
                if time.monotonic() > begun + 1:
                    rank.process.kill()
                time.sleep(0.005)
        end_event_s = min(END_EVENT_S, max(LEAST_END_EVENT_S, leave_by - time.monotonic()))
        ending = SIGNAL if self._signalled else self._stopped or (DIED if code else FINISHED)
        if self._keeper:
            self._keeper.close(code, ending, first.ended, end_event_s)
        elif first.attempt and not first.ended:
            write_end(first.attempt, code, ending, end_event_s)
        self._relay.end(RELAY_S)
        if self._stopped and self._stopped.hold is Hold.JOB_CANCELLED:
            self._await_cancel(self._stopped.hold_s())
        return code

    def _await_cancel(self, seconds: float) -> None:
        """Hold for SkyPilot's cancel, as a script with records of its own does: leaving would show a failed job."""
        end = time.monotonic() + seconds
        while not self._signalled and (left := end - time.monotonic()) > 0:
            self._take_in(left)


def code_of(status: int | None) -> int:
    """What a rank's end counts as: by a signal, or not at all, is as if its machine had been taken."""
    return EXIT_PREEMPTED if status is None or status < 0 else status


def first_of_the_table(statuses: Sequence[int | None]) -> int:
    """What all ranks' ends count as together: the first of the stop table; 1 where one is not in it."""
    codes = {code_of(status) for status in statuses}
    if codes - set(EXIT_PRECEDENCE):
        return EXIT_FAILED
    return next((known for known in EXIT_PRECEDENCE if known in codes and known), EXIT_DONE)


def _is_zombie(pid: int) -> bool:
    """Whether the process has exited, though a thread of it may hang on and keep wait() from returning."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (OSError, IndexError):
        return False


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> Any:
            raise LaunchError(message)

    parser = Parser(
        prog="python -m trainer.launch", description="Run a script once per accelerator.", allow_abbrev=False
    )
    parser.add_argument("--processes", type=int, metavar="N", help="ranks; default: one per accelerator, or 1")
    parser.add_argument(
        "--grace", type=float, default=DEFAULT_GRACE_S, metavar="S", help="seconds from SIGTERM to SIGKILL (25)"
    )
    parser.add_argument(
        "--checkpoint-dir",
        type=Path,
        metavar="FOLDER",
        default=os.environ.get("SKYSPOT_CHECKPOINT_DIR") or None,
        help="the run's folder: record the attempt there; default: SKYSPOT_CHECKPOINT_DIR",
    )
    parser.add_argument("--cpu", action="store_true", help="one rank, whatever GPUs there are")
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGS")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m trainer.launch`."""
    options = _parse(sys.argv[1:] if argv is None else argv)
    script = Path(options.script)
    if not script.is_file():
        raise LaunchError(f"{script}: no such script")
    in_the_way = script.resolve().parent / "trainer.py"
    if in_the_way.exists():
        raise LaunchError(f"{in_the_way} hides skyspot's package of that name from {script.name}: rename it")
    if options.grace < 0:
        raise LaunchError(f"--grace: {options.grace} is less than 0")
    return launch(
        [sys.executable, str(script), *options.arguments],
        processes=process_count(options.processes, options.cpu),
        grace_s=options.grace,
        keeper_dir=Path(options.checkpoint_dir) if options.checkpoint_dir else None,
    )


def leave_with(main_program: Any) -> None:
    """Run a launcher's main program and leave with its code, whatever thread or child may hang."""
    try:
        code = main_program()
    except TrainerError as error:
        print(f"Error: {error}", file=sys.stderr)
        code = EXIT_USAGE  # Whatever it is: no rank was started.
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
