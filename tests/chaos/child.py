"""The processes of an attempt, seen from outside: by the campaign and, in its place, by a launcher."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from attempt import STANDS_STILL_S, Plan, run
from wait import readable

from trainer.layout.exit_codes import EXIT_PRECEDENCE, EXIT_PREEMPTED


@dataclass
class Child:
    """An attempt's processes, seen by the campaign, which also does the work of their launcher."""

    plan: Plan
    pids: list[int]
    """Process ids by rank."""
    pipe: int
    gone_pipes: list[int]
    """By rank: a pipe that tells it that another rank is gone."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    ordered: bool = False
    """Whether the campaign killed it, or one of its ranks."""
    must_end_with: set[int] | None = None
    """The only allowed exit codes, if it is known what the fault hit."""
    stood_still: bool = False
    """It did not end in time and was killed."""
    trained_s: float = 0.0
    """Seconds from its restore to its end."""
    _restored_at: float = 0.0
    _rest: bytes = b""
    _looks: threading.Thread | None = None

    def __post_init__(self) -> None:
        """Watch for ranks that leave, if there are several."""
        if self.plan.ranks > 1:
            self._looks = threading.Thread(target=self._see_who_leaves, daemon=True)
            self._looks.start()

    def _see_who_leaves(self) -> None:
        with selectors.DefaultSelector() as selector:
            for pid in self.pids:
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
            while selector.get_map():
                for key, _ in selector.select():
                    selector.unregister(key.fd)
                    os.close(key.fd)  # type: ignore[arg-type]
                    ended = os.waitid(os.P_PID, key.data, os.WEXITED | os.WNOWAIT)
                    if ended and (ended.si_code, ended.si_status) != (os.CLD_EXITED, 0):
                        self._announce_gone()

    def _announce_gone(self) -> None:
        """Announce to all ranks that one is gone."""
        for pipe in self.gone_pipes:
            with contextlib.suppress(BrokenPipeError):  # That rank has left too.
                os.write(pipe, b"x")

    def read(self) -> bool:
        """Read the messages that have arrived; False once there are no more."""
        data = os.read(self.pipe, 65536)
        *lines, self._rest = (self._rest + data).split(b"\n")
        received = [json.loads(line) for line in lines]
        self.messages += received
        self._restored_at = self._restored_at or (time.monotonic() if self.restores else 0.0)
        if any(message.get("left") for message in received):  # Its process may still hang, or be a zombie.
            self._announce_gone()
        return bool(data)

    def kill(self, rank: int | None = None) -> None:
        """Send SIGKILL to all ranks, as when a machine is taken, or to one rank alone."""
        self.ordered = True
        for pid in self.pids if rank is None else [self.pids[rank]]:
            os.kill(pid, signal.SIGKILL)

    def wait(self) -> None:
        """Wait until it has ended and all its messages are read; kill it after STANDS_STILL_S."""
        end = time.monotonic() + STANDS_STILL_S
        while readable(self.pipe, end - time.monotonic()):
            if not self.read():
                break
        else:
            self.stood_still = True
            self.kill()
        os.close(self.pipe)
        self.trained_s = time.monotonic() - self._restored_at if self._restored_at else 0.0
        if self._looks:
            self._looks.join()
        self.statuses = [os.waitpid(pid, 0)[1] for pid in self.pids]
        for pipe in self.gone_pipes:
            os.close(pipe)

    def wait_until_it_leaves(self) -> None:
        """Wait until all its ranks have reported that they leave; a process may be unable to end while a call hangs."""
        end = time.monotonic() + STANDS_STILL_S
        while not self.left:
            if not readable(self.pipe, end - time.monotonic()):
                self.stood_still = True
                return
            if not self.read():
                return

    def read_all(self) -> None:
        """Read all messages that have arrived."""
        while readable(self.pipe, 0) and self.read():
            pass

    @property
    def lives(self) -> bool:
        """Whether its first rank is alive."""
        if self.statuses:
            return False
        return os.waitid(os.P_PID, self.pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    @property
    def was_killed(self) -> bool:
        """Whether SIGKILL ended one of its ranks; if not, the attempt had already ended."""
        return any(map(os.WIFSIGNALED, self.statuses))

    def end(self, allowed: set[int]) -> str | None:
        """Check how it ended, against the allowed exit codes: the problem, or None."""
        assert self.statuses
        if self.stood_still:
            return f"did not end within {STANDS_STILL_S:g} s"
        numbers = {os.WTERMSIG(status) for status in self.statuses if os.WIFSIGNALED(status)}
        if numbers - ({signal.SIGKILL} if self.ordered else set()):
            return f"was ended by signal {max(numbers)}"
        codes = {os.WEXITSTATUS(status) for status in self.statuses if os.WIFEXITED(status)}
        if strange := codes - set(EXIT_PRECEDENCE):
            return f"ended with {max(strange)}"
        if numbers:  # The other ranks leave for that reason, unless everything was saved.
            wrong = codes - (allowed - {0}) - {EXIT_PREEMPTED} - (set() if self.unsaved else {0})
            return f"ended with {max(wrong)} although a rank was killed" if wrong else None
        code = next(known for known in EXIT_PRECEDENCE if known in codes)  # As the launcher does.
        return None if code in allowed else f"ended with {code}, not {' or '.join(map(str, sorted(allowed)))}"

    @property
    def restores(self) -> list[dict[str, Any]]:
        """Its ranks' messages about their restores."""
        return [line for line in self.messages if "restored" in line]

    @property
    def restored(self) -> dict[str, Any] | None:
        """The first message about a restore."""
        return next(iter(self.restores), None)

    @property
    def all_restored(self) -> bool:
        """Whether all its ranks have restored."""
        return len(self.restores) == self.plan.ranks

    @property
    def left(self) -> bool:
        """Whether all its ranks have reported that they leave; a hanging thread keeps the pipe open even then."""
        return len({line["rank"] for line in self.messages if "left" in line}) == self.plan.ranks

    @property
    def committed(self) -> int:
        """The last step that it reported as committed."""
        return max((line["committed"] for line in self.messages if "committed" in line), default=0)

    @property
    def unsaved(self) -> int:
        """Number of its steps after the last one that it reported as committed; it saves every step."""
        begun_at = (self.restored or {}).get("restored") or self.plan.begin_at
        return int(begun_at) + self.plan.steps - max(self.committed, begun_at)

    @property
    def crash(self) -> str | None:
        """The traceback of a crash; None if there was none."""
        return next((line["crash"] for line in self.messages if "crash" in line), None)


def start(plan: Plan) -> Child:
    """Fork the processes of an attempt; the slow imports are already done here."""
    ours, theirs = os.pipe()
    listener = socket.create_server(("127.0.0.1", 0)) if plan.ranks > 1 else None
    gone_pipes, pids = [], []
    for rank in range(plan.ranks):
        peer_gone, announce = os.pipe()
        gone_pipes.append(announce)
        pid = os.fork()
        if not pid:
            os.close(ours)
            _live(plan, rank, peer_gone, theirs, listener)
        os.close(peer_gone)
        pids.append(pid)
    os.close(theirs)
    if listener:
        listener.close()
    return Child(plan, pids, ours, gone_pipes, ordered=plan.kill_at is not None)


def _live(plan: Plan, rank: int, peer_gone: int, pipe: int, listener: socket.socket | None) -> None:
    """Run the forked process; never returns."""
    code = 70
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: the process ends with its worker.
        for ours in (1, 2):  # No output: its messages go through the pipe.
            os.dup2(os.open(os.devnull, os.O_WRONLY), ours)
        if listener:  # As the launcher does.
            ranks, place = str(plan.ranks), listener.getsockname()
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks,
                MASTER_ADDR=place[0], SKYSPOT_STORE_PORT=str(place[1]), SKYSPOT_LISTEN_FD=str(listener.fileno()),
            )  # fmt: skip
            if rank:
                listener.close()

        def send(what: dict[str, Any]) -> None:
            os.write(pipe, json.dumps({"rank": rank, **what}).encode() + b"\n")

        try:
            np.random.seed(int.from_bytes(os.urandom(4), "little"))
            code = run(plan, rank, peer_gone, send)
        except BaseException:
            import traceback

            send({"crash": traceback.format_exc()[-1500:]})
        send({"left": code})
    finally:
        os._exit(code)
