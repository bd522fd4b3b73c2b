"""Folder: the contents of a run whose checkpoints a framework writes as files, on a local disk of each machine.

A rank offers the files that it wrote. They are read piece by piece while they are copied into the rank's share, front
to back, so they take no memory of their own. A checkpoint is fetched back onto a local disk, once for each machine,
with the files of all ranks; there too they are read and hashed without a copy in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint.damage import DamagedError
from trainer.checkpoint.reading import fresh
from trainer.checkpoint.state import State, StateError
from trainer.checkpoint.values import decode, encode
from trainer.layout.names import is_safe_name
from trainer.machine import scratch
from trainer.ranks.group import RankGroup
from trainer.training import rng
from trainer.training.changes import machine_facts
from trainer.training.contents import Restored
from trainer.training.export import make_locally

FILE = "file."
"""The prefix of the tensors (uint8, one dimension) that are a file's bytes; a path in the folder follows."""

Write = Callable[[Path], Path]
"""Has the framework write this rank's files into an empty local folder; returns the folder below it that holds them."""


class Folder:
    """A checkpoint as a folder of files; the session saves it, and fetches it to a local disk."""

    only_finite = spoilt_ends = False
    spoilt_remedy = ""
    watched: frozenset[str] = frozenset()

    def __init__(self, group: RankGroup, framework: str, config: Mapping[str, Any], state: dict[str, Any]) -> None:
        """Begin with nothing restored.

        Args:
            group: The ranks.
            framework: The name of what writes and reads the files.
            config: The settings, for the manifests; `max_steps` follows when it is known.
            state: Plain values that are saved too, restored in place.
        """
        self.framework, self.config, self.state = framework, dict(config), state
        self.done = 0
        self.write: Write | None = None
        """Writes this rank's files; None until the framework has begun to train."""
        self.needed = 0
        """The expected bytes of this rank's files."""
        self.fetched: Path | None = None
        """The local folder of the restored checkpoint."""
        self.facts_restored: Mapping[str, Any] = {}
        """The facts of its manifest; empty if nothing was restored."""
        self.streams_restored: torch.Tensor | None = None
        """This rank's random streams in it (`rng.save_streams`), for a framework that does not restore them itself."""
        self._group = group
        self._written, self._of_fetch = ExitStack(), ExitStack()

    # -- saved ---------------------------------------------------------------------------------------------------------

    samples_done = property(lambda self: self.done)
    """Steps: the number of samples is not known."""
    position = property(lambda self: f"step {self.done}")

    def collect(self) -> State:
        """The files of this boundary, which the framework writes now; before it trains, none."""
        counters = {"step": self.done, "state": dict(self.state)}
        plain = {"framework": self.framework, "counters": encode(counters, "counters", {})}
        return State({}, plain, frozenset(), frozenset(), files=self._write() if self.write else {})

    def _write(self) -> dict[str, Path]:
        """Have the files written, after those of the last save, which is over, are deleted."""
        assert self.write
        write = self.write
        self._written.close()
        made = self._written.enter_context(scratch.folder("save", self.needed))
        held: list[Path] = []
        with self._group.before_gather("files"):  # The others wait, however long this takes.
            make_locally(lambda: held.append(write(made)), made, self.needed)
        mine = {file.relative_to(held[0]).as_posix(): file for file in held[0].rglob("*") if file.is_file()}
        for name in mine:
            if not is_safe_name(name):
                raise StateError(f"{name[:80]!r} cannot name a file in the bucket")
        # Two machines may both write a common file: it is saved once.
        everyones = self._group.gather("files", sorted(mine))
        of_lower = {name for names in everyones[: self._group.rank] for name in names}
        files = {f"{FILE}{name}": mine[name] for name in sorted(mine.keys() - of_lower)}
        self.needed = sum(file.stat().st_size for file in files.values())
        return files

    def streams(self) -> torch.Tensor:
        """This rank's random streams."""
        return rng.save_streams()

    def facts(self) -> dict[str, Any]:
        """What a manifest says of the settings and the machine."""
        return {"config": self.config, "machine": machine_facts()}

    # -- restored ------------------------------------------------------------------------------------------------------

    def open(self, needed: int) -> None:
        """Make the local folder that a checkpoint is fetched into.

        Args:
            needed: The expected bytes.
        """

        def make() -> str:
            return str(self._of_fetch.enter_context(scratch.folder("resume", needed)))

        self.fetched = Path(self._group.machine_does("resume", make))

    def memory(self, name: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> torch.Tensor | None:
        """A file in the local folder to read a tensor into; on each machine, the first rank reads."""
        if not name.startswith(FILE):
            return fresh(name, dtype, sizes)
        path = name[len(FILE) :]
        if not is_safe_name(path) or dtype != torch.uint8 or len(sizes) != 1:
            raise DamagedError(f"{name[:80]!r} is not a file of a folder")
        if self._group.local_rank:
            return None
        assert self.fetched
        with scratch.local(self.fetched):
            return _new_file(self.fetched / path, sizes[0])

    def load(self, restored: Restored) -> None:
        """Take on what was restored; the files are in the local folder already.

        Raises:
            StateError: something else saved the checkpoint.
        """
        found = restored.plain.get("framework")
        if found != self.framework:
            what = f"by {found}" if found else "with run.register() or run.train()"
            raise StateError(f"checkpoint {restored.name} was saved {what}, not by {self.framework}. Start a new run")
        assert self.fetched
        if not self._group.local_rank:  # What a damaged checkpoint left there, which was tried before.
            for file in list(self.fetched.rglob("*")):
                if file.is_file() and f"{FILE}{file.relative_to(self.fetched).as_posix()}" not in restored.tensors:
                    file.unlink()
        counters = decode(restored.plain.get("counters"), restored.tensors)
        self.state.clear()
        self.state.update(counters.get("state", {}))
        self.done, self.streams_restored = restored.manifest.step, restored.streams
        self.facts_restored = restored.manifest.facts

    def forget_fetched(self) -> None:
        """Delete the local folder of the restored checkpoint, once every rank of this machine has read it."""
        self._of_fetch.close()


def _new_file(path: Path, count: int) -> torch.Tensor:
    """The bytes of a new local file. Its blocks are allocated now: a full disk would kill the process later."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        if not count:
            return torch.empty(0, dtype=torch.uint8)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, count)
        else:
            file.truncate(count)
    return torch.from_file(str(path), True, count, dtype=torch.uint8)
