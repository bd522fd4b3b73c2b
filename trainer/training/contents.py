"""Contents: what a session saves at a boundary and loads; the session does not know how steps change it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from trainer.checkpoint.state import State
from trainer.layout.manifest import Manifest
from trainer.layout.names import CheckpointName


@dataclass(frozen=True)
class Restored:
    """A whole checkpoint, as one rank loads it."""

    name: CheckpointName
    manifest: Manifest
    tensors: Mapping[str, torch.Tensor]
    """On the host; cut over the ranks where the live ones are."""
    plain: Mapping[str, Any]
    """What state.json holds."""
    streams: torch.Tensor | None
    """This rank's random streams; None where none were saved, or by another number of processes."""
    same_processes: bool
    """As many processes as now have saved it."""


class Contents(Protocol):
    """Everything that steps change."""

    @property
    def done(self) -> int:
        """Steps done in the whole run."""

    @property
    def samples_done(self) -> int:
        """Samples that the run has consumed."""

    @property
    def position(self) -> str:
        """Where the run is in its data, as a line says it."""

    @property
    def only_finite(self) -> bool:
        """A checkpoint with NaN or infinite weights does not count."""

    @property
    def spoilt_ends(self) -> bool:
        """The attempt ends if the checkpoint of this boundary is not finite."""

    @property
    def spoilt_remedy(self) -> str:
        """How to go on with such a checkpoint all the same; empty if that cannot be chosen."""

    @property
    def watched(self) -> frozenset[str]:
        """Names of the tensors that make a checkpoint not finite. The optimizer's state always does."""

    def collect(self) -> State:
        """The live tensors and values, as they are saved.

        Raises:
            StateError: a value cannot be saved.
        """

    def streams(self) -> torch.Tensor | None:
        """This rank's random streams, on the host (`rng.save_streams`)."""

    def facts(self) -> Mapping[str, Any]:
        """Fields of the manifest beside those that the session knows."""

    def load(self, restored: Restored) -> None:
        """Load a checkpoint.

        Raises:
            StateError: it does not fit.
        """
