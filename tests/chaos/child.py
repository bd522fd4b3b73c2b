"""One attempt of a tiny run, in a process of its own: restores, says what it got, trains on, saves. The real code."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import truth
from wait import readable

from trainer import attempt as attempts
from trainer import checkpoint, patience, restore, saving, staging
from trainer.layout import RunPaths
from trainer.records import Records
from trainer.saving import Boundary, BucketError, Keeping, Saver
from trainer.state import State
from trainer.together import Together


@dataclass(frozen=True)
class Plan:
    """What an attempt does, and what befalls it from inside."""

    run_dir: Path
    run: int
    steps: int
    """How many to do and save after the restore."""
    kill_at: tuple[str, int] | None = None
    """(one of checkpoint.POINTS, which save of this attempt)."""
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


class _Seat(Together):
    """A rank that is alone."""


def run(plan: Plan, say: Callable[[dict[str, Any]], None]) -> int:
    """The attempt's life; returns its exit code.

    Says {"restored": step or None, "digest": ...}, then {"committed": step} after each save that counts.
    """
    saving.FIRST_RETRY_S = 0.01
    restore.FIRST_RETRY_S = 0.001
    if plan.home:
        os.environ["HOME"] = str(plan.home)
    staging.RESERVE_BYTES = 0
    patience.LIMIT_S = plan.limit_s
    if plan.clock_s:
        real = time.time
        time.time = lambda: real() + plan.clock_s
    plan.plant()
    saves = [0]

    def at_point(point: str) -> None:
        saves[0] += point == "folder-made"
        if plan.kill_at == (point, saves[0]):
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.at_point = at_point
    threading.Thread(target=_leave_what_hangs, args=(say,), daemon=True).start()
    paths = RunPaths(plan.run_dir)
    binding = {"run": plan.run}
    attempt = attempts.open_attempt(paths, launch="chaos", config={}, binding=binding)
    together = _Seat()
    tensors = {name: torch.from_numpy(array) for name, array in truth.state(plan.run, 0).items()}
    steady = frozenset(name for name in tensors if name != "model.seen")
    live = State(dict(sorted(tensors.items())), {}, frozenset({"model.seen"}), steady)
    try:
        run_id = restore.again(lambda: attempts.identity(paths, binding), lambda: None)
        found = restore.find_whole(together, paths, live, lambda: None, run_id)
    except BucketError as error:
        return error.code
    step, name = plan.begin_at, None
    if found.loaded:
        name = found.loaded.name
        for key, tensor in found.loaded.tensors.items():
            if key in tensors:
                tensors[key].copy_(tensor)
        step = found.loaded.plain["step"]
        attempts.record(attempt, "restored", step=step, checkpoint=str(name))
        say({"restored": step, "checkpoint": str(name), "run": found.loaded.plain["run"],
             "digest": truth.digest({key: tensor.numpy() for key, tensor in tensors.items()})})  # fmt: skip
    else:
        attempts.record(attempt, "restored", step=0, checkpoint=None)
        say({"restored": None})
    records = Records(attempt)
    saver = Saver(together, paths, attempt, records, Keeping(2, 0, FAILURES), lambda text: None, threading.Event())
    saver.adopt(str(attempt.name), name)
    saver.prepare(live)
    said = 0
    try:
        for _ in range(plan.steps):
            tensors["model.seen"].fill_(-1)  # A forward pass: buffers change at once.
            time.sleep(plan.step_s)
            saver.await_copied()
            step += 1
            for key, array in truth.state(plan.run, step).items():
                tensors[key].copy_(torch.from_numpy(array))
            facts = {"run_id": run_id, "step": step, "attempt": str(attempt.name),
                     "world_size": 1, "binding": binding, "config": {}}  # fmt: skip
            records.line({"step": step, "loss": 0.0})
            records.cut()
            _wait(saver)
            said = _tell(saver, said, say)
            saver.start(Boundary(step, step, live, {}, {"step": step, "run": plan.run}, facts))
        tensors["model.seen"].fill_(-1)
        _wait(saver)
        _tell(saver, said, say)
        saver.settle()
    except BucketError as error:
        return error.code
    return 0


def _leave_what_hangs(say: Callable[[dict[str, Any]], None]) -> None:
    """As SpotRun: a call that hangs ends the attempt, whatever thread it is in."""
    while not (overdue := patience.overdue()):
        time.sleep(0.02)
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
    """The attempt, as the parent sees it."""

    plan: Plan
    pid: int
    pipe: int
    heard: list[dict[str, Any]] = field(default_factory=list)
    status: int | None = None
    ordered: bool = False
    """Whether it was to be killed."""
    must_end_with: set[int] | None = None
    """The only exit codes that are right, where it is known what the fault hit."""
    stood_still: bool = False
    """It had to be killed because it did not end."""
    _rest: bytes = b""

    def listen(self) -> bool:
        """Take in what it says; False once it says no more."""
        data = os.read(self.pipe, 65536)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.heard += [json.loads(line) for line in lines]
        return bool(data)

    def kill(self) -> None:
        """As a machine that is taken."""
        self.ordered = True
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        """Until it has ended, and all that it said is heard; one that stands still is ended."""
        end = time.monotonic() + STANDS_STILL_S
        while readable(self.pipe, end - time.monotonic()):
            if not self.listen():
                break
        else:
            self.stood_still = True
            os.kill(self.pid, signal.SIGKILL)
        os.close(self.pipe)
        _, self.status = os.waitpid(self.pid, 0)

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
        """Whether it has not ended yet."""
        return self.status is None and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    @property
    def was_killed(self) -> bool:
        """Whether a SIGKILL ended it; else it was over before."""
        return self.status is not None and os.WIFSIGNALED(self.status)

    def end(self, allowed: set[int]) -> str | None:
        """What is wrong with how it ended; None where nothing is."""
        assert self.status is not None
        if self.stood_still:
            return f"did not end within {STANDS_STILL_S:g} s"
        if os.WIFSIGNALED(self.status):
            number = os.WTERMSIG(self.status)
            return None if self.ordered and number == signal.SIGKILL else f"was ended by signal {number}"
        code = os.WEXITSTATUS(self.status)
        return None if code in allowed else f"ended with {code}, and not with {' or '.join(map(str, sorted(allowed)))}"

    @property
    def restored(self) -> dict[str, Any] | None:
        """What it said of its restore."""
        return next((line for line in self.heard if "restored" in line), None)

    @property
    def left(self) -> bool:
        """Whether it has said its last word. A thread in a call that hangs keeps its pipe open even after its end."""
        return any("left" in line for line in self.heard)

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
    pid = os.fork()
    if pid:
        os.close(theirs)
        return Child(plan, pid, ours, ordered=plan.kill_at is not None)
    code = 70
    try:
        os.close(ours)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its worker.

        def say(what: dict[str, Any]) -> None:
            os.write(theirs, json.dumps(what).encode() + b"\n")

        try:
            np.random.seed(int.from_bytes(os.urandom(4), "little"))
            code = run(plan, say)
        except BaseException:
            import traceback

            say({"crash": traceback.format_exc()[-1500:]})
        say({"left": code})
    finally:
        os._exit(code)
