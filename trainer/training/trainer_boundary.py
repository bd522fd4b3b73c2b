"""TrainerBoundary: the last boundary of Hugging Face's Trainer, for a stop that drops the micro-steps after it.

The Trainer writes its own files of the state that it is in. What a micro-step changes is put back before it does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from transformers.trainer_callback import ExportableState

from trainer.checkpoint import forward_state
from trainer.training import rng
from trainer.training.folder_loop import FolderLoop
from trainer.training.kept import mark

COUNTED = ("total_flos", "num_input_tokens_seen")
"""What a Trainer's state counts in micro-steps."""


class MicroSteps:
    """The batches of a Trainer's steps; a stop may drop those of a step that is not over."""

    def __init__(self, trainer: Any, loop: FolderLoop) -> None:
        """Begin before the first step.

        Args:
            trainer: The Trainer.
            loop: The run's.
        """
        self._trainer, self._loop = trainer, loop
        self._boundary: TrainerBoundary | None = None
        self._left = 0
        """Batches of the step that follow the one under way."""
        self._is_dropped = False

    def begin_step(self) -> None:
        """Begin the first batch of a step."""
        self._left = self._trainer.args.gradient_accumulation_steps - 1
        self._loop.begin_micro_step(self._left)

    def end(self) -> None:
        """End a batch that does not end its step, and begin the next one.

        Raises:
            Leaving: it is time to stop, and the step before is saved.
        """
        self._loop.end_micro_step(self._left, self._is_kept, self._drop)
        self._left = max(0, self._left - 1)
        self._loop.begin_micro_step(self._left)

    def _is_kept(self) -> bool:
        return self._boundary is not None and self._boundary.is_whole()

    def _drop(self) -> None:
        self._is_dropped = True

    def keep(self, own: Callable[[], dict[str, Any]]) -> None:
        """Keep this boundary, if a stop may drop batches after it.

        Args:
            own: Returns what the callback saves of it.
        """
        self._boundary = TrainerBoundary(self._trainer, own()) if self._loop.may_drop else None

    def go_back(self) -> dict[str, Any] | None:
        """Be at the last boundary, if batches after it were dropped; returns what the callback saves of it."""
        if not self._is_dropped or self._boundary is None:
            return None
        self._boundary.go_back()
        return self._boundary.own


class TrainerBoundary:
    """What a micro-step may change, as it was at a boundary: streams, buffers, counts, and what callbacks save."""

    def __init__(self, trainer: Any, own: dict[str, Any]) -> None:
        """Keep it.

        Args:
            trainer: The Trainer, between two steps.
            own: What the callback saves of this boundary.
        """
        self.own = copy.deepcopy(own)
        self._trainer, self._streams = trainer, rng.streams()
        self._passes = forward_state.keep(trainer.model)
        self._logged, self._flos = len(trainer.state.log_history), trainer.current_flos
        self._counted = {name: getattr(trainer.state, name) for name in COUNTED}
        exported = [one for one in trainer.callback_handler.callbacks if isinstance(one, ExportableState)]
        self._callbacks = [(one, copy.deepcopy(one.state().get("attributes", {}))) for one in exported]
        self._callbacks.append((trainer.control, dict(vars(trainer.control))))
        self._marks = self._look()

    def _look(self) -> list[tuple[int, int]]:
        return [mark(parameter) for parameter in self._trainer.model.parameters()]

    def is_whole(self) -> bool:
        """True if nothing has changed the parameters; where FSDP2 has left some gathered, they are others."""
        return self._look() == self._marks

    def go_back(self) -> None:
        """Put it back."""
        trainer = self._trainer
        rng.put_back(self._streams)
        forward_state.put_back(trainer.model, self._passes)
        del trainer.state.log_history[self._logged :]
        trainer.current_flos = self._flos
        for name, value in self._counted.items():
            setattr(trainer.state, name, value)
        for one, attributes in self._callbacks:
            for name, value in attributes.items():
                setattr(one, name, value)
