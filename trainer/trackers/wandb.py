"""Weights & Biases.

Its server takes no step back. So a step is logged once a later one is committed: none is done again, and each attempt
goes on behind the last step that the server has. Offline, nothing tells what an earlier attempt has logged: each one
logs the whole curve again, into a run of the same id, and the newest of them is the one to be synced.
"""

from __future__ import annotations

import os
import struct
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from trainer.machine import scratch
from trainer.trackers.curve import Point
from trainer.trackers.tracker import Snapshots, Tracked, free_accelerates_logger

CLOSED_S = 20.0
"""The time that its service may take to close an offline run."""
_BLOCK_BYTES, _HEAD, _WHOLE = 32768, struct.Struct("<IHB"), 1
"""Of a .wandb file, as wandb.sdk.internal.datastore describes it: LevelDB's format for logs."""


class Wandb:
    """A `Tracker`."""

    name = "wandb"
    rewinds = False

    def __init__(self, run: Tracked) -> None:
        self._run = run
        self._snapshots = Snapshots(run.paths.tracker(self.name), run.attempt)
        self._stack = ExitStack()
        self._writer: Any = None
        """accelerate's tracker."""

    def start(self) -> int:
        """As of `Tracker.start`."""
        free_accelerates_logger()
        import wandb
        from accelerate.tracking import WandBTracker

        # A run of its own, whatever the program does with wandb, and no hands on its output.
        settings = wandb.Settings(console="off", reinit="create_new")
        local = self._stack.enter_context(scratch.folder(self.name))
        env = os.environ
        name, run_id = env.get("WANDB_NAME") or self._run.paths.root.name, env.get("WANDB_RUN_ID") or self._run.id
        resume = {} if env.get("WANDB_MODE") == "offline" else {"resume": "allow"}
        self._writer = WandBTracker(
            env.get("WANDB_PROJECT") or "skyspot", id=run_id, name=name, config=dict(self._run.config),
            dir=str(local), settings=settings, **resume,
        )  # fmt: skip
        self._writer.start()
        return 0 if self._is_offline else int(self._writer.tracker.step)

    @property
    def _is_offline(self) -> bool:
        return bool(self._writer.tracker.offline)

    def where(self) -> str:
        """As of `Tracker.where`."""
        if self._is_offline:
            return f"offline; `wandb sync` the newest folder of {self._run.paths.tracker(self.name)}"
        return str(self._writer.tracker.url)

    def log(self, point: Point) -> None:
        """As of `Tracker.log`."""
        self._writer.log(point.values, step=point.step)

    @property
    def _file(self) -> Path:
        """An offline run's."""
        return Path(self._writer.tracker.settings.sync_file)

    def publish(self) -> None:
        """As of `Tracker.publish`. What its service has not written yet is missing."""
        if self._is_offline:
            self._snapshots.add({f"{self._file.parent.name}/{self._file.name}": self._file})

    def finish(self, publish: bool) -> None:
        """As of `Tracker.finish`."""
        is_offline, file = self._is_offline, self._file
        self._writer.finish()
        if publish and is_offline:
            until = time.monotonic() + CLOSED_S
            while not is_closed(file) and time.monotonic() < until:
                time.sleep(0.02)
            self.publish()
        self._stack.close()


def is_closed(file: Path) -> bool:
    """True if an offline run's last record says that it has ended: its service writes that after `finish` returns."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    with file.open("rb") as data:
        # A file is a header of as many bytes as each record has, and blocks, of which each begins with a record.
        begin = max(0, (file.stat().st_size - 1) // _BLOCK_BYTES * _BLOCK_BYTES)
        data.seek(begin or _HEAD.size)
        block, last = data.read(), b""
    while len(block) > _HEAD.size:
        _, size, kind = _HEAD.unpack_from(block)
        payload, block = block[_HEAD.size : _HEAD.size + size], block[_HEAD.size + size :]
        last = payload if kind == _WHOLE and len(payload) == size else b""
    try:
        return bool(Record.FromString(last).HasField("exit"))
    except DecodeError:
        return False
