"""BeforeEvaluation: what an evaluation by Hugging Face's Trainer changes, as it was before."""

from __future__ import annotations

import copy
from typing import Any

from transformers.trainer_callback import ExportableState

from trainer.ranks.group import RankGroup
from trainer.training import rng
from trainer.training.held import Held, digests


class BeforeEvaluation:
    """A boundary to which a stop within its evaluation goes back. Only the step's loss is logged in between."""

    def __init__(self, trainer: Any, group: RankGroup) -> None:
        """Keep the random streams, what callbacks count and ask for, and the log's length; look at the weights."""
        self._state, self._streams = trainer.state, rng.save_streams()
        self._logged = len(trainer.state.log_history)
        exported = [one for one in trainer.callback_handler.callbacks if isinstance(one, ExportableState)]
        self._callbacks = [(one, copy.deepcopy(one.state().get("attributes", {}))) for one in exported]
        self._callbacks.append((trainer.control, dict(vars(trainer.control))))
        # FSDP has whole parameters or parts of them in a module, as its passes need them.
        trained = [] if trainer.is_fsdp_enabled else [one for one in trainer.model.parameters() if one.requires_grad]
        self._held = Held(group, lambda: digests(trained))
        self._may_go_back = True

    def may_go_back(self) -> bool:
        """True unless the evaluation uses other weights than the training did; all ranks call it."""
        self._may_go_back = self._may_go_back and self._held.is_unchanged()
        return self._may_go_back

    def go_back(self) -> None:
        """Put back what was kept: a first of several evaluations may have been counted and logged."""
        rng.load_streams(self._streams)
        history = self._state.log_history
        history[self._logged :] = [line for line in history[self._logged :] if "loss" in line]
        for one, attributes in self._callbacks:
            for name, value in attributes.items():
                if name != "should_log":
                    setattr(one, name, value)
