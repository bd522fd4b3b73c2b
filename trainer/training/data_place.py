"""DataPlace: where a run with a loop of its own is in its data, and the random streams that belong to that place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trainer.training import rng
from trainer.training.contents import Restored


class DataPlace:
    """The place between two batches; the feed moves it, and checkpoints hold it."""

    def __init__(self) -> None:
        """Begin at the start of the first loader."""
        self.epoch = self.batches = self.samples = 0
        """The epoch of the loader; this rank's batches of it that are consumed; the samples of it, of all ranks.

        Without a sampler of ours, the samples are reckoned from the loader's batch size.
        """
        self.is_last = False
        """The last of these ends the epoch; only a loader that accelerate has prepared tells."""
        self.ahead: rng.Streams | None = None
        """This rank's random streams before the next batch was read, by a loader that reads one ahead."""
        self.ahead_at_restore: torch.Tensor | None = None
        self.processes_then: int | None = None
        """How many processes saved the checkpoint, until the loop begins, if they were more or fewer than now."""
        self.loader = 0
        """The number of the loader that they belong to, among those that the run has used (phases.py)."""
        self.until: int | None = None
        """Where the call of `steps` with it ends."""
        self.first_until: int | None = None
        """Where the run's first call of `steps` ends."""
        self.epoch_streams: torch.Tensor | None = None
        """This rank's random streams at the beginning of the epoch."""
        self.epoch_generators: list[torch.Tensor] = []
        """The states of the loader's own generators then."""
        self.streams_at_restore: torch.Tensor | None = None
        """Those of the checkpoint, until the loop begins."""

    def begin_loader(self, number: int) -> None:
        """Be at the start of another loader."""
        self.epoch += int(self.batches > 0 or self.samples > 0)
        self.loader, self.batches, self.samples, self.is_last, self.ahead = number, 0, 0, False, None

    def counters(self) -> dict[str, Any]:
        """What a checkpoint's counters say of the place."""
        names = ("epoch", "batches", "samples", "is_last", "loader", "until", "first_until")
        return {name: getattr(self, name) for name in names}

    def streams(self) -> torch.Tensor:
        """This rank's place in its data, and its random streams: now, at the epoch's start, ahead, the loader's."""
        # Ranks that have loaders of different lengths are at different places.
        place = torch.tensor([self.epoch, self.batches, self.samples, self.is_last]).view(torch.uint8)
        ahead = None if self.ahead is None else rng.save_streams(self.ahead)
        return rng.pack([place, rng.save_streams(), self.epoch_streams, ahead, *self.epoch_generators])

    def load(self, counters: Mapping[str, Any], restored: Restored) -> None:
        """Be at the place of a checkpoint.

        Args:
            counters: Those of `counters`.
            restored: The checkpoint.
        """
        self.epoch, self.batches, self.samples = (counters[name] for name in ("epoch", "batches", "samples"))
        self.processes_then = None if restored.same_processes else restored.manifest.facts.get("world_size")
        self.is_last = counters["is_last"]
        self.loader, self.until = counters.get("loader", 0), counters.get("until")
        self.first_until = counters.get("first_until")
        if restored.streams is not None:
            place, *found = rng.unpack(restored.streams)
            assert place is not None
            self.epoch, self.batches, self.samples, is_last = place.view(torch.int64).tolist()
            self.is_last = bool(is_last)
            self.streams_at_restore, self.epoch_streams, self.ahead_at_restore, *generators = found
            self.epoch_generators = [state for state in generators if state is not None]
