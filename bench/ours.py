"""Saves and restores as the trainer does (trainer/training/checkpointer.py)."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

from bench.training import Training
from trainer.attempt.record import open_attempt
from trainer.checkpoint import restore, state
from trainer.checkpoint.boundary import Boundary
from trainer.checkpoint.saving import SavePolicy, Saver
from trainer.layout.manifest import read_manifest
from trainer.layout.names import AttemptName, RunPaths, list_checkpoints
from trainer.ranks.group import RankGroup
from trainer.training import rng
from trainer.training.journal import Journal


class Ours:
    """`trainer.checkpoint.saving.Saver`, driven by any number of ranks."""

    def __init__(self, folder: Path, training: Training) -> None:
        self.training = training
        self.group = RankGroup()
        self.group.form_groups(on_gpu=False)
        self.paths = RunPaths(folder / "run")
        self.printed: list[str] = []
        self.begun = copy.deepcopy(state.options_of(training.optimizer))
        attempt = None
        if self.group.rank == 0:
            attempt = open_attempt(self.paths, launch="bench", config={}, binding={})
        name = self.group.rank0_does("attempt", lambda: str(attempt.name) if attempt else None)
        self.records = Journal(attempt) if attempt else None
        self.saver = Saver(
            self.group, self.paths, attempt, self.records, SavePolicy(latest=2), self.printed.append, threading.Event()
        )
        self.saver.adopt(name, None)
        self.attempt = AttemptName.parse(name)

    def prepare(self) -> None:
        """Prepare, as the training loop does after an attempt's first step."""
        self.saver.prepare(self._state(0))

    def _state(self, step: int) -> state.State:
        return state.collect(
            self.training.model, [self.training.optimizer], {"step": step, "evaluated": 0}, {}, [self.begun]
        )

    def save(self, step: int) -> None:
        """Do the training thread's part of a save."""
        rank = self.group.rank
        whole = self._state(step)
        if self.records:
            self.records.cut()
        self.saver.start(
            Boundary(
                step=step,
                samples=step,
                state=whole,
                own={f"{state.RANDOM}{rank}": rng.save_streams()},
                plain=whole.plain if rank == 0 else None,
                facts={"step": step, "world_size": self.group.world_size} if rank == 0 else None,
            )
        )

    def before_step(self) -> None:
        """Wait until the optimizer may change the state."""
        self.saver.await_copied()

    def durable(self) -> None:
        """Wait until the save is committed."""
        self.saver.await_copied()
        self.saver.wait()
        assert self.saver.committed, self.printed

    def over(self) -> bool:
        """Whether the work after a save is done too: its record, the read-back, the pruning."""
        return not any(thread.name == "save" for thread in threading.enumerate())

    def settle(self) -> None:
        self.durable()
        self.saver.settle()

    def clear(self) -> None:
        """Do nothing: the saver deletes older checkpoints in the background, and that time counts."""

    def kept(self) -> Path:
        """The newest checkpoint."""
        return self.paths.checkpoint(list_checkpoints(self.paths)[0])

    def share_bytes(self) -> list[int]:
        """Bytes of the newest checkpoint that each rank staged and wrote."""
        files = read_manifest(self.kept()).files
        return [record.bytes for name, record in sorted(files.items()) if name.startswith("share-")]


def load(folder: Path, training: Training) -> None:
    """Load into a new model, hashing every byte."""
    begun = copy.deepcopy(state.options_of(training.optimizer))
    live = state.collect(training.model, [training.optimizer], {}, {}, [begun])
    found = restore.load(folder, live)
    state.apply(training.model, [training.optimizer], found.tensors, found.plain, [begun])
