"""One stop: an attempt runs until it is in its phase, is told to stop, and is judged by what it leaves."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import warm
from hub_server import HubServer
from metadata_servers import AwsServer, AzureServer, GcpServer, Server
from stop_left import mixed, newest, read, torn
from stop_plan import CLOUDS, LAST_PHASE, SAVES, WORDS, Stop
from support import PROGRAMS, clean_env, event

from trainer.launch.supervisor import KILL_AFTER_GRACE_S, LEAVE_AFTER_KILL_S

MARGIN_S = 20.0
"""What a machine with other work may take longer; the results say how long it took."""
OVER_S = KILL_AFTER_GRACE_S + LEAVE_AFTER_KILL_S + MARGIN_S
"""Seconds after its notice within which an attempt must be gone. The launcher kills its ranks, and leaves."""
STANDS_STILL_S = 600.0
LEFT_S = 60.0
"""Seconds for which processes may outlive their launcher."""
HOLDS_S = 0.2
"""Seconds that an attempt has for leaving by itself, once it says that it holds, before its machine is taken."""
APART_S = 5.0
"""Seconds between the deadlines of two ranks: those that pass between their rows of one round, on a busy machine."""
AT_ONCE = ("import", "model download")
"""The phases in which a second word comes at once: none of them says that the first was heard."""
MORE_STEPS = 2
"""Steps that may end after a stop was heard: the one under way, and the one in which the ranks agree."""
PR_SET_CHILD_SUBREAPER = 36
SERVERS: dict[str, type[Server]] = {"aws": AwsServer, "gcp": GcpServer, "azure": AzureServer}


@dataclass(frozen=True)
class Outcome:
    """What is seen of a stop."""

    code: int
    """The launcher's exit code."""
    seconds: float | None
    """From the first word to the launcher's exit; None: the attempt was not in its phase."""
    lost: int
    """Optimizer steps that were done and are in no whole checkpoint."""
    first_step: int | None
    """The first optimizer step that the attempt did; None: it did none."""
    before: int
    """The newest whole checkpoint's step before the attempt."""
    torn: tuple[str, ...] = ()
    """Checkpoints that count as committed and are not whole."""
    left: tuple[str, ...] = ()
    """Processes that outlived the launcher."""
    stood_still: bool = False
    """It did not end, and was killed."""
    committed_s: float | None = None
    """Seconds from the word to the commit, as the attempt recorded it."""
    notice: str = ""
    """The id of the notice for which the attempt ended, as it recorded it."""
    refused: tuple[str, ...] = ()
    """Requests that a metadata service refused."""
    asked_in_training: bool = False
    """The training thread of a rank asked the metadata service."""
    more_steps: int = 0
    """Steps that ended after rank 0 had heard of the stop."""
    stopped_at: tuple[int | None, ...] = ()
    """By rank: the boundary at which it stopped; None: at none."""
    deadlines: tuple[float, ...] = ()
    """The deadlines by which the ranks stopped, in seconds after the word."""
    mixed: tuple[str, ...] = ()
    """Whole checkpoints that hold the state of another step than they say."""
    held: bool = False
    """It held once it had saved, until a signal came."""
    output: str = ""


def judge(stop: Stop, seen: Outcome) -> str | None:
    """Judge how a stop ended: the problem, or None."""
    expected = 0 if stop.phase == LAST_PHASE else 75
    if seen.stood_still:
        return f"it did not end within {STANDS_STILL_S:g} s"
    if seen.refused:
        return f"the metadata service refused {seen.refused[0]}"
    if seen.seconds is None:
        return f"it was never in its phase; it ended with {seen.code}" + (seen.notice and f", for {seen.notice}")
    if seen.asked_in_training:
        return "the training thread asked the metadata service"
    if stop.fits and (problem := _apart(stop, seen)):
        return problem  # Before the exit code, which it may change.
    if seen.code != expected:
        return f"it ended with {seen.code}, not {expected}"
    if seen.seconds > stop.notice_s + OVER_S:
        return f"it was gone after {seen.seconds:.1f} s, with a notice of {stop.notice_s:g} s"
    if seen.left:
        return f"processes are left: {', '.join(seen.left)}"
    return _torn(seen) or (_late(stop, seen) if stop.fits else None)


def _apart(stop: Stop, seen: Outcome) -> str | None:
    """What the ranks have not agreed on; None: nothing."""
    if len(set(seen.stopped_at)) > 1:
        where = (f"rank {rank} at {'none' if at is None else at}" for rank, at in enumerate(seen.stopped_at))
        return f"the ranks stopped at different steps: {', '.join(where)}"
    # A rank learns through the store of another's notice beside a signal, a moment later.
    if not WORDS[stop.word].second and seen.deadlines and max(seen.deadlines) - min(seen.deadlines) > APART_S:
        these = " and ".join(f"{deadline:.0f} s" for deadline in seen.deadlines)
        return f"the ranks have different deadlines: {these} after the word"
    return None


def _torn(seen: Outcome) -> str | None:
    """What is wrong with the checkpoints; None: nothing."""
    if seen.torn:
        return f"not whole: {', '.join(seen.torn)}"
    if seen.mixed:
        return f"the checkpoint of {seen.mixed[0]}"
    if seen.first_step not in (None, seen.before + 1):
        return f"its first step was {seen.first_step}, and step {seen.before} had been saved"
    return None


def _late(stop: Stop, seen: Outcome) -> str | None:
    """What is wrong with a stop whose save fits its notice; None: nothing."""
    if seen.more_steps > MORE_STEPS:
        return f"it did {seen.more_steps} more steps after it had heard of the stop"
    word = WORDS[stop.word]
    # A second word that comes at once may end a rank before it has heard the first.
    at_once = word.second and stop.phase in AT_ONCE
    if word.first in CLOUDS and stop.phase != LAST_PHASE and not at_once and not seen.held:
        return "it did not hold until its machine was taken"
    if (seen.committed_s or 0.0) > stop.notice_s:
        return f"it committed {seen.committed_s:.1f} s after the word, with a notice of {stop.notice_s:g} s"
    if seen.lost:
        return f"{seen.lost} steps were lost, although a save of {stop.save_s:g} s fits {stop.notice_s:g} s"
    return None


class Scene:
    """An attempt, and the words that it is told."""

    def __init__(self, stop: Stop, run_dir: Path, control: Path, plant: str = "") -> None:
        self.stop, self.run_dir, self.control, self.plant = stop, run_dir, control, plant
        self.word = WORDS[stop.word]
        self.servers: dict[str, Any] = {}
        self.process: subprocess.Popen[str]
        self.struck_at: float | None = None
        self._told = threading.Lock()
        self._attempts_before = len(list((run_dir / "attempts").glob("*")))

    def play(self) -> Outcome:
        """Run the attempt to its end, and return what is seen."""
        (self.control / "home").mkdir(parents=True)
        warm.nursery()
        before, known = newest(self.run_dir), set(psutil.Process().children(recursive=True))
        still = threading.Event()
        timer = threading.Timer(STANDS_STILL_S, self._end_what_stands_still, [still, known])
        lines = []
        with self._served() as (env, more), self._started(env, self._command(before, more)) as process, _adopting():
            self.process = process
            timer.start()
            assert process.stdout
            for line in process.stdout:
                lines.append(line)
                self._hear(line)
            code = self._code()
            ended_at = time.monotonic()
            timer.cancel()
            left = self._left(known)
        done = [int(line) for line in read(self.control / "steps").split()]
        end: Any = event(self.run_dir, "end") if self._has_recorded() else {}
        stops = [read(self.control / f"stopped-{rank}").split() for rank in range(self.stop.ranks)]
        return Outcome(
            code=code,
            seconds=None if self.struck_at is None else ended_at - self.struck_at,
            lost=max([before, *done]) - newest(self.run_dir),
            first_step=done[0] if done else None,
            before=before,
            torn=torn(self.run_dir, self.stop.fits),
            left=left,
            stood_still=still.is_set(),
            committed_s=end.get("committed_s") if done else None,
            notice=(end.get("notice") or {}).get("id", ""),
            refused=tuple(line for server in self.servers.values() for line in server.refused),
            asked_in_training=(self.control / "asked-in-training").exists(),
            more_steps=len(read(self.control / "more-steps").split()),
            stopped_at=tuple(int(one[0]) if one else None for one in stops),
            deadlines=tuple(float(one[1]) - (self.struck_at or 0.0) for one in stops if one),
            mixed=mixed(self.run_dir),
            held=(self.control / "held").exists(),
            output="".join(lines),
        )

    def _hear(self, line: str) -> None:
        """Answer a line of the attempt's output."""
        if "@reached" in line:
            self.tell_first()
        if "@heard" in line and self.word.second:
            self.tell(self.word.second)
        if "holding until this machine is taken" in line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(HOLDS_S)
            self.tell("SIGTERM launcher")  # The cloud takes it now.

    def _started(self, env: dict[str, str], command: list[str]) -> subprocess.Popen[str]:
        return warm.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

    def _has_recorded(self) -> bool:
        """True if this attempt has opened its record in the run's folder."""
        return len(list((self.run_dir / "attempts").glob("*"))) > self._attempts_before

    # -- the attempt ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _served(self) -> Iterator[tuple[dict[str, str], list[str]]]:
        """Serve what the attempt asks; gives its environment, and more of its arguments."""
        # A home of its own makes it a machine of its own: no notice counts as that of an earlier attempt here.
        env = {"HOME": str(self.control / "home"), "SKYSPOT_NOTICE_POLL_S": "0.05", "OMP_NUM_THREADS": "1"}
        more = list[str]()
        over = threading.Event()
        with contextlib.ExitStack() as stack:
            for cloud in self.word.clouds:
                self.servers[cloud] = server = stack.enter_context(SERVERS[cloud]())
                if isinstance(server, AzureServer):
                    server.schedule("Freeze", 300.0)  # It takes no machine.
                env |= self.servers[cloud].env
            if self.stop.phase == "model download":
                hub = HubServer({"models/org/net": {"c" * 40: {"config.json": b"{}"}}})

                def asked() -> None:
                    self.tell_first()
                    over.wait(STANDS_STILL_S)  # The attempt is in the middle of its download until it has ended.

                hub.on_request = asked
                stack.enter_context(hub.serving())
                more = ["--hub", hub.url]
            stack.callback(over.set)
            yield clean_env(**env), more

    def _command(self, before: int, more: list[str]) -> list[str]:
        stop, launcher = self.stop, [sys.executable, "-m", "trainer.launch", "--processes", str(self.stop.ranks)]
        launcher += ["--grace", f"{stop.notice_s if self.word.first not in SERVERS else 25:g}"]
        launcher += ["--gcp-notice", f"{stop.notice_s:g}"] if "gcp" in self.word.clouds else []
        program = [PROGRAMS / "stopped.py", "--dir", self.run_dir, "--control", self.control, "--phase", stop.phase]
        program += ["--at-rank", stop.at_rank, "--slow-save", stop.save_s, *more]
        program += ["--cloud"] if self.word.first in SERVERS else []
        program += ["--save-every", 2] if stop.phase in SAVES else []
        program += ["--steps", before + 3] if stop.phase == LAST_PHASE else []
        program += ["--point", stop.point] if stop.phase == "a save under way" else []
        program += ["--plant", self.plant] if self.plant else []
        command = [*launcher, *map(str, program)]
        return ["bash", "-c", '"$@"; exit $?', "bash", *command] if self.word.shell else command

    def _code(self) -> int:
        """Wait for the launcher; a shell in front of it may be gone already, and then it is our child."""
        code = self.process.wait()
        if self.word.shell and code < 0:
            with contextlib.suppress(ChildProcessError, ValueError):
                code = os.waitstatus_to_exitcode(os.waitpid(int(read(self.control / "launcher")), 0)[1])
        return code

    # -- the words -----------------------------------------------------------------------------------------------------

    def tell_first(self) -> None:
        """Tell the attempt to stop, once."""
        with self._told:
            if self.struck_at is not None:
                return
            self.struck_at = time.monotonic()
        self.tell(self.word.first)
        (self.control / "announced").touch()
        if self.word.second and self.stop.phase in AT_ONCE:
            self.tell(self.word.second)

    def tell(self, word: str) -> None:
        """Send one word."""
        if word in self.servers:
            self.servers[word].announce(self.stop.notice_s)
        else:
            name, _, where = word.partition(" ")
            self._send(signal.Signals[name], where)

    def _send(self, number: signal.Signals, where: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            if where == "launcher":
                os.kill(int(read(self.control / "launcher")), number)  # Not known: an error. 0 would be this campaign.
            elif where == "rank":
                os.kill(int(read(self.control / f"rank-{self.stop.at_rank}")), number)
            elif where == "group":
                os.killpg(self.process.pid, number)
            else:
                for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, number)

    # -- what is left --------------------------------------------------------------------------------------------------

    def _end_what_stands_still(self, still: threading.Event, known: set[psutil.Process]) -> None:
        still.set()
        for process in set(psutil.Process().children(recursive=True)) - known:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _left(self, known: set[psutil.Process]) -> tuple[str, ...]:
        """The processes that outlive the launcher by LEFT_S; they are ended."""
        others = list(set(psutil.Process().children(recursive=True)) - known)
        _, alive = psutil.wait_procs(others, LEFT_S)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive)
        return tuple(f"process {process.pid}" for process in alive)


@contextlib.contextmanager
def _adopting() -> Iterator[None]:
    """Have every process below this one that loses its parent become its child, so that none gets lost."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0)
