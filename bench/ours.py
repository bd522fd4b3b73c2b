"""Saves and restores as the trainer does (trainer/training/session.py)."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench.training import Training
from trainer.checkpoint import restore, state
from trainer.checkpoint.saving import SavePolicy
from trainer.layout.manifest import read_manifest
from trainer.layout.names import list_checkpoints
from trainer.ranks.group import RankGroup
from trainer.training import rng
from trainer.training.contents import Restored
from trainer.training.host import open_host
from trainer.training.session import Session


class Measured:
    """The contents of a checkpoint: a model and its optimizer."""

    position = spoilt_remedy = ""
    only_finite = spoilt_ends = False
    watched: frozenset[str] = frozenset()

    def __init__(self, training: Training) -> None:
        self.training = training
        self.begun = copy.deepcopy(state.options_of(training.optimizer))
        self.done = 0

    @property
    def samples_done(self) -> int:
        return self.done

    def collect(self) -> state.State:
        counters = {"step": self.done, "evaluated": 0}
        return state.collect(self.training.model, [self.training.optimizer], counters, {}, [self.begun])

    def streams(self) -> torch.Tensor:
        return rng.save_streams()

    def facts(self) -> Mapping[str, Any]:
        return {}

    def load(self, restored: Restored) -> None:
        raise NotImplementedError  # `load` below is measured.


class Ours:
    """The trainer's `Session`, driven by any number of ranks."""

    def __init__(self, folder: Path, training: Training) -> None:
        self.group = RankGroup()
        self.group.form_groups(on_gpu=False)
        self.host = open_host(folder / "run", self.group, "bench")
        self.printed: list[str] = []
        self.host.print_line = self.printed.append  # type: ignore[method-assign]
        self.contents = Measured(training)
        self.session = Session(self.host, self.contents, SavePolicy(latest=2))
        self.session.restore()
        self.saver = self.session.saver

    def prepare(self) -> None:
        """Prepare, as the training loop does after an attempt's first step."""
        self.session.prepare()

    def save(self, step: int) -> None:
        """Do the training thread's part of a save."""
        self.contents.done = step
        self.session.save()

    def before_step(self) -> None:
        """Wait until the optimizer may change the state."""
        self.session.await_copied()

    def durable(self) -> None:
        """Wait until the save is committed."""
        self.session.await_copied()
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
        return self.host.paths.checkpoint(list_checkpoints(self.host.paths)[0])

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
