"""LightningState: what Lightning's checkpoints hold besides the module's tensors and the optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from trainer.checkpoint.values import decode, encode

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

SAVED_APART = ("optimizer_states", "hparams_name", "hyper_parameters", "hparams_type")
"""Keys of Lightning's checkpoint that are saved in another form, or are not read by `fit`."""
OURS = "skyspot"
"""The key of what Lightning does not save; checkpoints of earlier releases do not have it."""


class LightningState:
    """Loops, schedulers, callbacks, precision, data module and hooks, as an object that can be registered.

    Attributes:
        is_live: A step is done in this attempt. Before, a program's hooks are not asked for what they save.
        has_ended: Lightning's loops have ended.
        batches_that_stepped: The step of loggers, as it was restored.
        owes_validation: The validation of the restored step was cut short by a stop, and is still to be done.
    """

    __slots__ = (
        "_kept",
        "_limits",
        "_metrics",
        "_module",
        "_trainer",
        "batches_that_stepped",
        "has_ended",
        "is_live",
        "owes_validation",
    )

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self._module = trainer, module
        self.is_live = self.has_ended = self.owes_validation = False
        self.batches_that_stepped = 0
        self._limits = trainer.fit_loop.epoch_loop.max_steps, False
        """Where training ends: the step, and whether the program has asked for an end."""
        self._metrics: dict[str, list[Any]] = {}
        self._kept: tuple[Any, dict[str, torch.Tensor]] | None = None

    @property
    def _schedulers(self) -> list[Any]:
        """Those that it saves, where a look for schedulers that nobody registered finds them."""
        return [config.scheduler for config in self._trainer.lr_scheduler_configs]

    def position(self) -> tuple[int, int]:
        """(the epoch, the number of its batches that were trained on)."""
        trainer = self._trainer
        if not self.has_ended:
            return trainer.current_epoch, trainer.fit_loop.batch_idx + 1
        if self._ended_within_an_epoch():
            return trainer.current_epoch - 1, trainer.fit_loop.batch_idx + 1
        return trainer.current_epoch, 0

    def _ended_within_an_epoch(self) -> bool:
        return not self._trainer.fit_loop.epoch_loop._num_ready_batches_reached()

    # -- what is saved -------------------------------------------------------------------------------------------------

    def keep(self) -> None:
        """Have the state be the present one, its tensors apart, until `release`: a validation is about to begin."""
        tensors: dict[str, torch.Tensor] = {}
        state = self.state_dict()
        state[OURS] = {**state[OURS], "owes_validation": True}
        self._kept = encode(state, "lightning", tensors), tensors

    def release(self) -> None:
        """Let the state be what it is at any time again."""
        self._kept = None

    def state_dict(self) -> dict[str, Any]:
        """Lightning's checkpoint at a boundary, without what is registered apart."""
        if not self.is_live:
            return {}
        if self._kept is not None:
            kept: dict[str, Any] = decode(*self._kept)
            return kept
        trainer = self._trainer
        checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        for name in SAVED_APART:
            checkpoint.pop(name, None)
        if _same_tensors(checkpoint["state_dict"], self._module.state_dict()):
            del checkpoint["state_dict"]  # Else a hook has put another one there.
        fit_loop = checkpoint["loops"]["fit_loop"]
        checkpoint["loops"] = {"fit_loop": fit_loop}
        if self.has_ended:
            self._undo_end(fit_loop)
        checkpoint["batches_that_stepped"] = trainer.fit_loop.epoch_loop._batches_that_stepped
        checkpoint["should_stop"] = trainer.should_stop
        metrics = {
            name: [value.item(), str(value.dtype).removeprefix("torch.")]
            for name, value in trainer._logger_connector._callback_metrics.items()
            if isinstance(value, torch.Tensor) and value.numel() == 1
        }
        checkpoint[OURS] = {"metrics": metrics, "owes_validation": False}
        return checkpoint

    def _undo_end(self, fit_loop: dict[str, Any]) -> None:
        """Make the state of the loops' end that of the boundary before it, so that more steps can follow."""
        if self._ended_within_an_epoch():
            for counts in fit_loop["epoch_progress"].values():
                counts["processed"] -= 1
                counts["completed"] -= 1
            return
        batches = fit_loop["epoch_loop.batch_progress"]
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False

    # -- what is restored ----------------------------------------------------------------------------------------------

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore loops, schedulers, callbacks, precision and data module, as Lightning does."""
        trainer, connector = self._trainer, self._trainer._checkpoint_connector
        checkpoint = {"state_dict": self._module.state_dict(), **saved, "optimizer_states": []}
        connector._loaded_checkpoint = checkpoint
        connector.restore_datamodule()
        self._module.on_load_checkpoint(checkpoint)
        connector.restore_callbacks()
        connector.restore_training_state()
        connector._loaded_checkpoint = {}
        self.batches_that_stepped, trainer.should_stop = saved["batches_that_stepped"], saved["should_stop"]
        ours = saved.get(OURS, {})
        self._metrics, self.owes_validation = ours.get("metrics", {}), ours.get("owes_validation", False)
        if self.owes_validation:
            # At one of its limits, Lightning would not enter its loops.
            epoch_loop = trainer.fit_loop.epoch_loop
            self._limits, trainer.should_stop = (self._limits[0], trainer.should_stop), False
            if self._limits[0] != -1:
                epoch_loop.max_steps = max(self._limits[0], epoch_loop.global_step + 1)

    def restore_limits(self) -> None:
        """Have training end where it should, now that Lightning is in its loops."""
        self._trainer.fit_loop.epoch_loop.max_steps, self._trainer.should_stop = self._limits

    def restore_metrics(self) -> None:
        """Give callbacks and schedulers the metrics that were logged last: one may monitor them in the next step."""
        for name, (value, dtype) in self._metrics.items():
            self._trainer._logger_connector._callback_metrics[name] = torch.tensor(value, dtype=getattr(torch, dtype))


def _same_tensors(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """True if two state dicts have the same names, and tensors in the same memory."""
    return one.keys() == other.keys() and all(
        not isinstance(value, torch.Tensor) or value.data_ptr() == other[name].data_ptr() for name, value in one.items()
    )
