"""What others offer for the same: torch.save, accelerate, and torch.distributed.checkpoint (DCP)."""

from __future__ import annotations

import os
import shutil
import time
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from bench.training import Training

warnings.filterwarnings("ignore", module="torch")  # DCP warns that there is one process, each time.


class Peer:
    """One way to save; each save goes to a new place, and the one before is deleted outside of what is timed."""

    def __init__(self, folder: Path, training: Training) -> None:
        self.folder, self.training = folder, training
        folder.mkdir(parents=True, exist_ok=True)
        self.place = folder

    def save(self, step: int) -> None:
        self.place = self.folder / f"step-{step}"
        self.write()

    def write(self) -> None:
        """What blocks the training thread."""
        raise NotImplementedError

    def before_step(self) -> None:
        """What the optimizer has to wait for."""

    def durable(self) -> None:
        """Wait until it would survive a loss of power."""

    def over(self) -> bool:
        return True

    def settle(self) -> None:
        self.durable()

    def clear(self) -> None:
        """Delete all but the newest."""
        for place in self.folder.iterdir():
            if place != self.place:
                shutil.rmtree(place) if place.is_dir() else place.unlink()

    def kept(self) -> Path:
        return self.place


class TorchSave(Peer):
    def write(self) -> None:
        torch.save(
            {"model": self.training.model.state_dict(), "optimizer": self.training.optimizer.state_dict()}, self.place
        )
        fsync(self.place)


class AccelerateSave(Peer):
    """It does not ask for the disk: `durable` does, after it."""

    def __init__(self, folder: Path, training: Training) -> None:
        super().__init__(folder, training)
        self.accelerator = Accelerator(cpu=True)
        self.accelerator.prepare(training.model, training.optimizer)

    def write(self) -> None:
        self.accelerator.save_state(str(self.place))

    def durable(self) -> None:
        for path in self.place.iterdir():
            fsync(path)

    def settle(self) -> None:
        """Nothing: it leaves the disk to the system."""

    def clear(self) -> None:
        self.durable()  # So that its writing does not disturb who comes next.
        super().clear()


class DcpSave(Peer):
    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.training.model, self.training.optimizer)
        return {"model": model, "optimizer": optimizer}

    def write(self) -> None:
        dcp.save(self.state(), checkpoint_id=self.place)  # Its writer calls fsync for each file.


class DcpAsync(DcpSave):
    """As it comes: the state is copied on the training thread, then written on another."""

    stager: DefaultStager | None = None

    def __init__(self, folder: Path, training: Training) -> None:
        super().__init__(folder, training)
        self.staged: Future[Any] | None = None
        self.written: Future[Any] | None = None

    def write(self) -> None:
        begun = dcp.async_save(self.state(), checkpoint_id=self.place, async_stager=self.stager)
        if isinstance(begun, Future):
            self.written = begun
        else:
            self.staged, self.written = begun.staging_completion, begun.upload_completion

    def before_step(self) -> None:
        if self.staged:
            self.staged.result()

    def durable(self) -> None:
        if self.written:
            self.written.result()

    def over(self) -> bool:
        return self.written is None or self.written.done()


class DcpAsyncStaged(DcpAsync):
    """With a stager of one's own, that keeps its memory and copies beside the training: the most it offers here."""

    def __init__(self, folder: Path, training: Training) -> None:
        super().__init__(folder, training)
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=False
            )
        )


def load_torch(place: Path, training: Training, mmap: bool = False) -> None:
    found = torch.load(place, mmap=mmap, weights_only=True)
    training.model.load_state_dict(found["model"])
    training.optimizer.load_state_dict(found["optimizer"])


def load_torch_mapped(place: Path, training: Training) -> None:
    """The optimizer's state stays in the file until it is used: digest() uses it, after the clock has stopped."""
    load_torch(place, training, mmap=True)


def load_accelerate(place: Path, training: Training) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(training.model, training.optimizer)
    accelerator.load_state(str(place))


def load_dcp(place: Path, training: Training) -> float:
    """Seconds of `dcp.load` alone, into tensors that were made before."""
    model, optimizer = get_state_dict(training.model, training.optimizer)
    begun = time.perf_counter()
    dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=place)
    alone_s = time.perf_counter() - begun
    set_state_dict(training.model, training.optimizer, model_state_dict=model, optim_state_dict=optimizer)
    return alone_s


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
