"""Other ways to save and load: torch.save, accelerate, and torch.distributed.checkpoint (DCP)."""

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

warnings.filterwarnings("ignore", module="torch")  # DCP warns at every call that there is only one process.


class Peer:
    """One way to save. Each save goes to a new place; the previous one is deleted outside the measured time."""

    def __init__(self, folder: Path, training: Training) -> None:
        self.folder, self.training = folder, training
        folder.mkdir(parents=True, exist_ok=True)
        self.place = folder

    def save(self, step: int) -> None:
        self.place = self.folder / f"step-{step}"
        self.write()

    def write(self) -> None:
        """Do the part of a save that blocks the training thread."""
        raise NotImplementedError

    def before_step(self) -> None:
        """Wait until the optimizer may change the state."""

    def durable(self) -> None:
        """Wait until the save would survive a power failure."""

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
    """accelerate does not call fsync; `durable` does afterwards."""

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
        """Do nothing: accelerate leaves it to the system when the files reach the disk."""

    def clear(self) -> None:
        self.durable()  # So that its writes do not disturb the next way.
        super().clear()


class DcpSave(Peer):
    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.training.model, self.training.optimizer)
        return {"model": model, "optimizer": optimizer}

    def write(self) -> None:
        dcp.save(self.state(), checkpoint_id=self.place)  # Its writer calls fsync for each file.


class DcpAsync(DcpSave):
    """async_save by default: copies the state on the training thread, then writes it on another one."""

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
    """async_save with a stager that keeps its memory and copies in the background: the best it offers without a GPU."""

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
    """Leaves the optimizer's state in the file until it is used: digest() uses it, after the measured time."""
    load_torch(place, training, mmap=True)


def load_accelerate(place: Path, training: Training) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(training.model, training.optimizer)
    accelerator.load_state(str(place))


def load_dcp(place: Path, training: Training) -> float:
    """Load; returns the seconds of `dcp.load` alone, into existing tensors."""
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
