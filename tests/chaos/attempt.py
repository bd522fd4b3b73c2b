"""One attempt of a tiny run by the trainer's real code, a process per rank: restores, reports, trains and saves."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import truth
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from trainer.attempt.identity import identity
from trainer.bucket import deadlines
from trainer.checkpoint import commit, restore, staging, writing
from trainer.checkpoint.errors import BucketError
from trainer.checkpoint.saving import SavePolicy, Saver
from trainer.checkpoint.shards import local
from trainer.checkpoint.state import State
from trainer.layout.exit_codes import EXIT_PREEMPTED
from trainer.ranks.group import RankGroup
from trainer.ranks.peers import is_peer_trouble
from trainer.training.contents import Restored
from trainer.training.host import open_host
from trainer.training.session import Session


@dataclass(frozen=True)
class Plan:
    """The work of an attempt, and the faults inside its processes."""

    run_dir: Path
    run: int
    steps: int
    """The number of steps after the restore; each is saved."""
    ranks: int = 1
    """Number of processes. With several, two of the tensors are sharded over them."""
    kill_at: tuple[str, int] | None = None
    """Where SIGKILL strikes: (one of writing.POINTS, the number of the save in this attempt)."""
    kill_rank: int = 0
    """The rank that gets the SIGKILL."""
    clock_s: float = 0.0
    """Seconds by which its clock is wrong."""
    step_s: float = 0.0
    limit_s: float = 120.0
    """A call into the bucket counts as hanging after this many seconds."""
    begin_at: int = 0
    """The first step if there is nothing to restore."""
    home: Path | None = None
    """HOME, if the attempt has a machine of its own; None: it shares this process's HOME."""
    plant: Callable[[], None] = field(default=lambda: None)
    """Plants a mistake in the code."""


STANDS_STILL_S = 60.0

FAILURES = 3
"""An attempt ends after this many failed saves in a row."""

PEER_GONE_PATIENCE_S = 0.1
"""Seconds that a rank continues after another one is gone: it may find a reason of its own to leave."""


def run(plan: Plan, rank: int, peer_gone: int, send: Callable[[dict[str, Any]], None]) -> int:
    """Run one rank from start to exit; returns its exit code.

    Sends {"restored": step or None, "digest": ...}, then {"committed": step} after each commit.

    Args:
        plan: What the attempt does.
        rank: Which of its processes this is.
        peer_gone: A pipe that becomes readable once another rank is gone.
        send: Sends a message to the campaign.
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
    threading.Thread(target=_leave_what_hangs, args=(send,), daemon=True).start()
    savers: list[Saver] = []
    if plan.ranks > 1:
        threading.Thread(target=_leave_with_the_others, args=(peer_gone, savers, send), daemon=True).start()
    try:
        _train(plan, rank, send, savers)
    except BucketError as error:
        return error.code
    except Exception as error:
        if plan.ranks == 1 or not is_peer_trouble(error):
            raise
        return _code_without_a_peer(savers)
    return 0


class Contents:
    """A run's tensors at a step; nothing of them is trained."""

    position = spoilt_remedy = ""
    only_finite = spoilt_ends = False
    watched: frozenset[str] = frozenset()

    def __init__(self, plan: Plan, rank: int) -> None:
        self.plan, self.rank, self.done = plan, rank, plan.begin_at
        self.tensors = _tensors(plan, rank)
        self.restored: dict[str, Any] = {"restored": None}
        """The message about the restore."""

    @property
    def samples_done(self) -> int:
        return self.done

    def collect(self) -> State:
        steady = frozenset(name for name in self.tensors if name != "model.seen")
        plain = {"step": self.done, "run": self.plan.run}
        return State(dict(sorted(self.tensors.items())), plain, frozenset({"model.seen"}), steady)

    def streams(self) -> None:
        return None

    def facts(self) -> dict[str, Any]:
        return {"config": {}}

    def load(self, restored: Restored) -> None:
        for key, tensor in restored.tensors.items():
            if key in self.tensors:
                local(self.tensors[key]).copy_(local(tensor))
        self.done = restored.plain["step"]
        digest = truth.digest({key: local(tensor).numpy() for key, tensor in self.tensors.items()})
        self.restored = {
            "restored": self.done, "checkpoint": str(restored.name), "run": restored.plain["run"], "digest": digest
        }  # fmt: skip

    def step(self) -> None:
        """Become what the run is after one more step."""
        self.done += 1
        for key, array in truth.cut(truth.state(self.plan.run, self.done), self.rank, self.plan.ranks).items():
            local(self.tensors[key]).copy_(torch.from_numpy(array))


def _train(plan: Plan, rank: int, send: Callable[[dict[str, Any]], None], savers: list[Saver]) -> None:
    group = RankGroup(timeout_s=30.0)
    group.form_groups(on_gpu=False)
    host = open_host(plan.run_dir, group, "chaos", {"run": plan.run})
    host.print_line = lambda text: None  # type: ignore[method-assign]
    if host.attempt:
        host.run_id = restore.retry_read(lambda: identity(host.paths, host.binding), lambda: None)
    contents = Contents(plan, rank)
    session = Session(host, contents, SavePolicy(2, 0, FAILURES), save_every=1)
    saver, seen = session.saver, contents.tensors["model.seen"]
    savers.append(saver)
    session.restore()
    send(contents.restored)
    session.prepare()
    reported = 0
    for _ in range(plan.steps):
        seen.fill_(-1)  # Like a forward pass, which changes buffers immediately.
        time.sleep(plan.step_s)
        session.await_copied()
        contents.step()
        if host.journal:
            host.journal.line({"step": contents.done, "loss": 0.0})
        _wait(saver)
        reported = _report_committed(saver, reported, send)
        session.save()
    seen.fill_(-1)
    _wait(saver)
    _report_committed(saver, reported, send)
    saver.settle()
    group.mark_left()
    group.await_others_left(STANDS_STILL_S)


def _tensors(plan: Plan, rank: int) -> dict[str, torch.Tensor]:
    """Build this rank's tensors at step 0."""
    mine = truth.cut(truth.state(plan.run, 0), rank, plan.ranks)
    tensors = {name: torch.from_numpy(array) for name, array in mine.items()}
    if plan.ranks > 1:
        mesh = DeviceMesh("cpu", list(range(plan.ranks)))
        for name in truth.CUT:
            tensors[name] = DTensor.from_local(
                tensors[name], mesh, [Shard(0)], run_check=False, shape=torch.Size([truth.WIDE]), stride=(1,)
            )
    return tensors


def _leave_with_the_others(peer_gone: int, savers: list[Saver], send: Callable[[dict[str, Any]], None]) -> None:
    """Leave soon after a peer is gone, with the attempt's exit code, as SpotRun does."""
    os.read(peer_gone, 1)
    time.sleep(PEER_GONE_PATIENCE_S)
    code = _code_without_a_peer(savers)
    send({"left": code})
    os._exit(code)


def _code_without_a_peer(savers: list[Saver]) -> int:
    trouble = savers[0].trouble if savers else None
    return trouble.code if trouble else EXIT_PREEMPTED


def _leave_what_hangs(send: Callable[[dict[str, Any]], None]) -> None:
    """End the attempt when a call hangs, in whatever thread, as SpotRun does."""
    overdue = deadlines.await_overdue()
    send({"left": overdue.code})
    os._exit(overdue.code)


def _wait(saver: Saver) -> None:
    while not saver.idle:
        saver._decided.wait(0.02)
    saver.check()


def _report_committed(saver: Saver, reported: int, send: Callable[[dict[str, Any]], None]) -> int:
    step = saver.committed_step or 0
    if step > reported and saver.committed and saver.committed.attempt == saver._attempt_name:
        send({"committed": step})
    return max(step, reported)
