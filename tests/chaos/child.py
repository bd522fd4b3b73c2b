"""One attempt of a tiny run, in a process of its own: restores, says what it got, trains on, saves. The real code."""

from __future__ import annotations

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

from trainer import attempt as attempts
from trainer import checkpoint, patience, saving, staging
from trainer.layout import RunPaths
from trainer.records import Records
from trainer.restore import find_whole
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
    plant: Callable[[], None] = field(default=lambda: None)
    """Puts a fault into the code."""


class _Seat(Together):
    """A rank that is alone."""


def run(plan: Plan, say: Callable[[dict[str, Any]], None]) -> int:
    """The attempt's life; returns its exit code.

    Says {"restored": step or None, "digest": ...}, then {"committed": step} after each save that counts.
    """
    saving.FIRST_RETRY_S = 0.01
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
    paths = RunPaths(plan.run_dir)
    binding = {"run": plan.run}
    attempt = attempts.open_attempt(paths, launch="chaos", config={}, binding=binding)
    together = _Seat()
    tensors = {name: torch.from_numpy(array) for name, array in truth.state(plan.run, 0).items()}
    steady = frozenset(name for name in tensors if name != "model.seen")
    live = State(dict(sorted(tensors.items())), {}, frozenset({"model.seen"}), steady)
    found = find_whole(together, paths, live, lambda: None)
    step, name = 0, None
    if found.loaded:
        name = found.loaded.name
        for key, tensor in found.loaded.tensors.items():
            if key in tensors:
                tensors[key].copy_(tensor)
        step = found.loaded.plain["step"]
        attempts.record(attempt, "restored", step=step, checkpoint=str(name))
        say({"restored": step, "folder_step": name.step,
             "digest": truth.digest({key: tensor.numpy() for key, tensor in tensors.items()})})  # fmt: skip
    else:
        attempts.record(attempt, "restored", step=0, checkpoint=None)
        say({"restored": None})
    records = Records(attempt)
    saver = Saver(together, paths, attempt, records, Keeping(2, 0, 3), lambda text: None, threading.Event())
    saver.adopt(str(attempt.name), name)
    said = 0
    try:
        for _ in range(plan.steps):
            tensors["model.seen"].fill_(-1)  # A forward pass: buffers change at once.
            time.sleep(plan.step_s)
            saver.await_copied()
            step += 1
            for key, array in truth.state(plan.run, step).items():
                tensors[key].copy_(torch.from_numpy(array))
            facts = {"run_id": attempts.run_id(paths, binding), "step": step, "attempt": str(attempt.name),
                     "world_size": 1, "binding": binding, "config": {}}  # fmt: skip
            records.line({"step": step, "loss": 0.0})
            records.cut()
            _wait(saver)
            said = _tell(saver, said, say)
            saver.start(Boundary(step, step, live, {}, {"step": step}, facts))
        tensors["model.seen"].fill_(-1)
        _wait(saver)
        _tell(saver, said, say)
        saver.settle()
    except BucketError as error:
        return error.code
    return 0


def _wait(saver: Saver) -> None:
    """As SpotRun: a call that hangs ends the attempt."""
    while not saver.idle:
        saver._decided.wait(0.02)
        if overdue := patience.overdue():
            raise BucketError(overdue.what, overdue.code)
    saver.check()


def _tell(saver: Saver, said: int, say: Callable[[dict[str, Any]], None]) -> int:
    step = saver.committed_step or 0
    if step > said and saver.committed and saver.committed.attempt == saver._attempt_name:
        say({"committed": step})
    return max(step, said)


@dataclass
class Child:
    """The attempt, as the parent sees it."""

    pid: int
    pipe: int
    heard: list[dict[str, Any]] = field(default_factory=list)
    status: int | None = None
    _rest: bytes = b""

    def listen(self) -> bool:
        """Take in what it says; False once it says no more."""
        data = os.read(self.pipe, 65536)
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.heard += [json.loads(line) for line in lines]
        return bool(data)

    def kill(self) -> None:
        """As a machine that is taken."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        """Until it has ended, and all that it said is heard."""
        while self.listen():
            pass
        os.close(self.pipe)
        _, self.status = os.waitpid(self.pid, 0)

    @property
    def was_killed(self) -> bool:
        """Whether a SIGKILL ended it; else it was over before."""
        return self.status is not None and os.WIFSIGNALED(self.status)

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
    def crash(self) -> str | None:
        """The traceback, where it had one."""
        return next((line["crash"] for line in self.heard if "crash" in line), None)


def start(plan: Plan) -> Child:
    """Fork an attempt: what takes seconds to import is there already."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid:
        os.close(theirs)
        return Child(pid, ours)
    code = 70
    try:
        os.close(ours)

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
