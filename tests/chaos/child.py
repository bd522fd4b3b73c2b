"""One attempt of a tiny run, in processes of its own: restores, says what it got, trains on, saves. The real code."""

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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import truth
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from wait import readable

from trainer.attempt.identity import identity
from trainer.attempt.record import open_attempt, record
from trainer.bucket import deadlines
from trainer.checkpoint import commit, restore, staging, writing
from trainer.checkpoint.boundary import Boundary
from trainer.checkpoint.errors import BucketError
from trainer.checkpoint.saving import SavePolicy, Saver
from trainer.checkpoint.shards import local
from trainer.checkpoint.state import State
from trainer.layout.exit_codes import EXIT_PRECEDENCE, EXIT_PREEMPTED
from trainer.layout.names import RunPaths
from trainer.ranks.group import RankGroup
from trainer.ranks.peers import is_peer_trouble
from trainer.training.journal import Journal


@dataclass(frozen=True)
class Plan:
    """What an attempt does, and what befalls it from inside."""

    run_dir: Path
    run: int
    steps: int
    """How many to do and save after the restore."""
    ranks: int = 1
    """Its processes. Where they are several, two of the tensors are cut over them."""
    kill_at: tuple[str, int] | None = None
    """(one of checkpoint.POINTS, which save of this attempt)."""
    kill_rank: int = 0
    """Whom that befalls."""
    clock_s: float = 0.0
    """How far its clock is off."""
    step_s: float = 0.0
    limit_s: float = 120.0
    """After how long a call into the bucket counts as hanging."""
    begin_at: int = 0
    """The step that it begins at where nothing is there to restore."""
    home: Path | None = None
    """A machine of its own, with what it remembers; None: all share one."""
    plant: Callable[[], None] = field(default=lambda: None)
    """Puts a fault into the code."""


STANDS_STILL_S = 60.0
FAILURES = 3
"""So many saves in a row may fail until the attempt ends."""
PEER_GONE_PATIENCE_S = 0.1
"""How long a rank goes on that has heard of another's end: it may have a reason of its own to leave with."""


def run(plan: Plan, rank: int, told: int, say: Callable[[dict[str, Any]], None]) -> int:
    """A rank's life; returns its exit code.

    Says {"restored": step or None, "digest": ...}, then {"committed": step} after each save that counts.

    Args:
        plan: What the attempt does.
        rank: Which of its processes this is.
        told: Something can be read there once another rank is gone.
        say: Says it to the campaign.
    """
    commit.FIRST_RETRY_S = 0.01
    restore.FIRST_RETRY_S = 0.001
    if plan.home:
        os.environ["HOME"] = str(plan.home)
    staging.RESERVE_BYTES = 0
    deadlines.LIMIT_S, deadlines.LOOK_S = plan.limit_s, 0.02
    if plan.clock_s:
        real = time.time
        time.time = lambda: real() + plan.clock_s
    plan.plant()
    saves = [0]

    def at_point(point: str) -> None:
        saves[0] += point == "folder-made"
        if plan.kill_at == (point, saves[0]) and plan.kill_rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    writing.at_point = at_point
    threading.Thread(target=_leave_what_hangs, args=(say,), daemon=True).start()
    savers: list[Saver] = []
    if plan.ranks > 1:
        threading.Thread(target=_leave_with_the_others, args=(told, savers, say), daemon=True).start()
    try:
        _train(plan, rank, say, savers)
    except BucketError as error:
        return error.code
    except Exception as error:
        if plan.ranks == 1 or not is_peer_trouble(error):
            raise
        return _code_without_a_peer(savers)
    return 0


def _train(plan: Plan, rank: int, say: Callable[[dict[str, Any]], None], savers: list[Saver]) -> None:
    paths = RunPaths(plan.run_dir)
    binding = {"run": plan.run}
    attempt = open_attempt(paths, launch="chaos", config={}, binding=binding) if rank == 0 else None
    group = RankGroup(timeout_s=30.0)
    group.form_groups(on_gpu=False)
    attempt_name = group.rank0_does("attempt", lambda: str(attempt.name) if attempt else None)
    tensors = _tensors(plan, rank)
    steady = frozenset(name for name in tensors if name != "model.seen")
    live = State(dict(sorted(tensors.items())), {}, frozenset({"model.seen"}), steady)
    run_id = restore.retry_read(lambda: identity(paths, binding), lambda: None) if attempt else None
    found = restore.find_whole(group, paths, live, lambda: None, run_id)
    step, name = plan.begin_at, found.loaded.name if found.loaded else None
    if attempt:
        restored = name.step if name else 0
        record(attempt, "restored", step=restored, checkpoint=str(name) if name else None)
    if found.loaded:
        for key, tensor in found.loaded.tensors.items():
            if key in tensors:
                local(tensors[key]).copy_(local(tensor))
        step = found.loaded.plain["step"]
        say({"restored": step, "checkpoint": str(name), "run": found.loaded.plain["run"],
             "digest": truth.digest({key: local(tensor).numpy() for key, tensor in tensors.items()})})  # fmt: skip
    else:
        say({"restored": None})
    records = Journal(attempt) if attempt else None
    saver = Saver(group, paths, attempt, records, SavePolicy(2, 0, FAILURES), lambda text: None, threading.Event())
    savers.append(saver)
    saver.adopt(attempt_name, name)
    saver.prepare(live)
    said = 0
    for _ in range(plan.steps):
        tensors["model.seen"].fill_(-1)  # A forward pass: buffers change at once.
        time.sleep(plan.step_s)
        saver.await_copied()
        step += 1
        for key, array in truth.cut(truth.state(plan.run, step), rank, plan.ranks).items():
            local(tensors[key]).copy_(torch.from_numpy(array))
        facts = {"run_id": run_id, "step": step, "attempt": attempt_name,
                 "world_size": plan.ranks, "binding": binding, "config": {}}  # fmt: skip
        if records:
            records.line({"step": step, "loss": 0.0})
            records.cut()
        _wait(saver)
        said = _tell(saver, said, say)
        saver.start(Boundary(step, step, live, {}, {"step": step, "run": plan.run}, facts))
    tensors["model.seen"].fill_(-1)
    _wait(saver)
    _tell(saver, said, say)
    saver.settle()
    group.mark_left()
    group.await_others_left(STANDS_STILL_S)


def _tensors(plan: Plan, rank: int) -> dict[str, torch.Tensor]:
    """The state of step 0, as this rank has it."""
    mine = truth.cut(truth.state(plan.run, 0), rank, plan.ranks)
    tensors = {name: torch.from_numpy(array) for name, array in mine.items()}
    if plan.ranks > 1:
        mesh = DeviceMesh("cpu", list(range(plan.ranks)))
        for name in truth.CUT:
            tensors[name] = DTensor.from_local(
                tensors[name], mesh, [Shard(0)], run_check=False, shape=torch.Size([truth.WIDE]), stride=(1,)
            )
    return tensors


def _leave_with_the_others(told: int, savers: list[Saver], say: Callable[[dict[str, Any]], None]) -> None:
    """As SpotRun: a rank whose peer is gone leaves soon, with what the attempt ends with."""
    os.read(told, 1)
    time.sleep(PEER_GONE_PATIENCE_S)
    code = _code_without_a_peer(savers)
    say({"left": code})
    os._exit(code)


def _code_without_a_peer(savers: list[Saver]) -> int:
    trouble = savers[0].trouble if savers else None
    return trouble.code if trouble else EXIT_PREEMPTED


def _leave_what_hangs(say: Callable[[dict[str, Any]], None]) -> None:
    """As SpotRun: a call that hangs ends the attempt, whatever thread it is in."""
    overdue = deadlines.await_overdue()
    say({"left": overdue.code})
    os._exit(overdue.code)


def _wait(saver: Saver) -> None:
    while not saver.idle:
        saver._decided.wait(0.02)
    saver.check()


def _tell(saver: Saver, said: int, say: Callable[[dict[str, Any]], None]) -> int:
    step = saver.committed_step or 0
    if step > said and saver.committed and saver.committed.attempt == saver._attempt_name:
        say({"committed": step})
    return max(step, said)


@dataclass
class Child:
    """The attempt, as the campaign sees it, and its launcher."""

    plan: Plan
    pids: list[int]
    """By rank."""
    pipe: int
    tell: list[int]
    """By rank: where it hears that another one is gone."""
    heard: list[dict[str, Any]] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    ordered: bool = False
    """Whether it, or a rank of it, was to be killed."""
    must_end_with: set[int] | None = None
    """The only exit codes that are right, where it is known what the fault hit."""
    stood_still: bool = False
    """It had to be killed because it did not end."""
    trained_s: float = 0.0
    """How long it went on after its restore."""
    _restored_at: float = 0.0
    _rest: bytes = b""
    _looks: threading.Thread | None = None

    def __post_init__(self) -> None:
        """Look who leaves, where there are others to tell."""
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
                        self._tell_all()

    def _tell_all(self) -> None:
        """Tell all ranks that one is gone."""
        for pipe in self.tell:
            with contextlib.suppress(BrokenPipeError):  # That one has left as well.
                os.write(pipe, b"x")

    def listen(self) -> bool:
        """Take in what it says; False once it says no more."""
        data = os.read(self.pipe, 65536)
        *lines, self._rest = (self._rest + data).split(b"\n")
        words = [json.loads(line) for line in lines]
        self.heard += words
        self._restored_at = self._restored_at or (time.monotonic() if self.restores else 0.0)
        if any(word.get("left") for word in words):  # It may hang on, and be no more than a zombie.
            self._tell_all()
        return bool(data)

    def kill(self, rank: int | None = None) -> None:
        """As a machine that is taken; with a rank, that one alone."""
        self.ordered = True
        for pid in self.pids if rank is None else [self.pids[rank]]:
            os.kill(pid, signal.SIGKILL)

    def wait(self) -> None:
        """Until it has ended, and all that it said is heard; one that stands still is ended."""
        end = time.monotonic() + STANDS_STILL_S
        while readable(self.pipe, end - time.monotonic()):
            if not self.listen():
                break
        else:
            self.stood_still = True
            self.kill()
        os.close(self.pipe)
        self.trained_s = time.monotonic() - self._restored_at if self._restored_at else 0.0
        if self._looks:
            self._looks.join()
        self.statuses = [os.waitpid(pid, 0)[1] for pid in self.pids]
        for pipe in self.tell:
            os.close(pipe)

    def wait_until_it_leaves(self) -> None:
        """Until it has said its last word: it may not be able to end before what it hangs in is let go."""
        end = time.monotonic() + STANDS_STILL_S
        while not self.left:
            if not readable(self.pipe, end - time.monotonic()):
                self.stood_still = True
                return
            if not self.listen():
                return

    def hear(self) -> None:
        """Take in what it has said so far."""
        while readable(self.pipe, 0) and self.listen():
            pass

    @property
    def lives(self) -> bool:
        """Whether it (its first rank) has not ended yet."""
        if self.statuses:
            return False
        return os.waitid(os.P_PID, self.pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    @property
    def was_killed(self) -> bool:
        """Whether a SIGKILL ended one of its ranks; else it was over before."""
        return any(map(os.WIFSIGNALED, self.statuses))

    def end(self, allowed: set[int]) -> str | None:
        """What is wrong with how it ended; None where nothing is."""
        assert self.statuses
        if self.stood_still:
            return f"did not end within {STANDS_STILL_S:g} s"
        numbers = {os.WTERMSIG(status) for status in self.statuses if os.WIFSIGNALED(status)}
        if numbers - ({signal.SIGKILL} if self.ordered else set()):
            return f"was ended by signal {max(numbers)}"
        codes = {os.WEXITSTATUS(status) for status in self.statuses if os.WIFEXITED(status)}
        if strange := codes - set(EXIT_PRECEDENCE):
            return f"ended with {max(strange)}"
        if numbers:  # The others leave because of it, unless all was done.
            wrong = codes - (allowed - {0}) - {EXIT_PREEMPTED} - (set() if self.unsaved else {0})
            return f"ended with {max(wrong)}, and a rank was killed" if wrong else None
        code = next(known for known in EXIT_PRECEDENCE if known in codes)  # As the launcher.
        return None if code in allowed else f"ended with {code}, and not with {' or '.join(map(str, sorted(allowed)))}"

    @property
    def restores(self) -> list[dict[str, Any]]:
        """What its ranks said of their restore."""
        return [line for line in self.heard if "restored" in line]

    @property
    def restored(self) -> dict[str, Any] | None:
        """What the first one said of it."""
        return next(iter(self.restores), None)

    @property
    def all_restored(self) -> bool:
        """Whether all its ranks have restored."""
        return len(self.restores) == self.plan.ranks

    @property
    def left(self) -> bool:
        """Whether it has said its last word. A thread in a call that hangs keeps its pipe open even after its end."""
        return len({line["rank"] for line in self.heard if "left" in line}) == self.plan.ranks

    @property
    def committed(self) -> int:
        """The last step that it knew to be committed."""
        return max((line["committed"] for line in self.heard if "committed" in line), default=0)

    @property
    def unsaved(self) -> int:
        """How many of its steps, each of which it saves, come after the last that it knew to be committed."""
        begun_at = (self.restored or {}).get("restored") or self.plan.begin_at
        return int(begun_at) + self.plan.steps - max(self.committed, begun_at)

    @property
    def crash(self) -> str | None:
        """The traceback, where it had one."""
        return next((line["crash"] for line in self.heard if "crash" in line), None)


def start(plan: Plan) -> Child:
    """Fork an attempt: what takes seconds to import is there already."""
    ours, theirs = os.pipe()
    listener = socket.create_server(("127.0.0.1", 0)) if plan.ranks > 1 else None
    tell, pids = [], []
    for rank in range(plan.ranks):
        told, telling = os.pipe()
        tell.append(telling)
        pid = os.fork()
        if not pid:
            os.close(ours)
            _live(plan, rank, told, theirs, listener)
        os.close(told)
        pids.append(pid)
    os.close(theirs)
    if listener:
        listener.close()
    return Child(plan, pids, ours, tell, ordered=plan.kill_at is not None)


def _live(plan: Plan, rank: int, told: int, pipe: int, listener: socket.socket | None) -> None:
    """What becomes of the fork; never returns."""
    code = 70
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its worker.
        for ours in (1, 2):  # What it has to say goes through the pipe.
            os.dup2(os.open(os.devnull, os.O_WRONLY), ours)
        if listener:  # As the launcher tells its processes.
            ranks, place = str(plan.ranks), listener.getsockname()
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks,
                MASTER_ADDR=place[0], SKYSPOT_STORE_PORT=str(place[1]), SKYSPOT_LISTEN_FD=str(listener.fileno()),
            )  # fmt: skip
            if rank:
                listener.close()

        def say(what: dict[str, Any]) -> None:
            os.write(pipe, json.dumps({"rank": rank, **what}).encode() + b"\n")

        try:
            np.random.seed(int.from_bytes(os.urandom(4), "little"))
            code = run(plan, rank, told, say)
        except BaseException:
            import traceback

            say({"crash": traceback.format_exc()[-1500:]})
        say({"left": code})
    finally:
        os._exit(code)
