"""Lightning: a callback that makes a `lightning.pytorch` training survive preemptions.

    with SpotRun("/checkpoints/my-run", save_every="auto") as run:
        trainer = lightning.Trainer(max_epochs=3, callbacks=[SpotCallback(run)])
        trainer.fit(model)
        run.finish()

A checkpoint holds the module and its optimizers as a loop of one's own saves them, and the rest of what Lightning puts
into its own checkpoints (loops, schedulers, callbacks, precision, data module, hooks). A boundary lies where Lightning
asks for the next batch: validation, schedulers and callbacks of the step are done then.

It uses parts of Lightning that are not public, all of them in this file. Therefore only tested releases are supported.
"""

from __future__ import annotations

from trainer import check  # isort: skip

check.require("lightning")

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from trainer.errors import RunError
from trainer.training.feed import Feed
from trainer.training.own_loop import OwnLoop
from trainer.training.registrable import has_state
from trainer.training.run import SpotRun
from trainer.training.stepping import Stepping

SAVED_APART = ("optimizer_states", "hparams_name", "hyper_parameters", "hparams_type")
"""Keys of Lightning's checkpoint that are saved in another form, or are not read by `fit`."""
OWN_METRICS = ("step", "lr", "world_size", "step_s", "loss")


class SpotCallback(Callback):  # type: ignore[misc]  # Lightning's annotations cover only a part.
    """Saves, stops and resumes `Trainer.fit`. Checkpoint callbacks are set aside: the run's folder has the checkpoints.

    Not supported: strategies other than one device and DDP; several training loaders at once. Within an epoch, the
    means of metrics logged with `on_epoch=True` begin again at a resume.
    """

    def __init__(self, run: SpotRun) -> None:
        """Describe the callback.

        Args:
            run: The attempt, in whose `with` block `fit` is called.
        """
        self._run = run
        self._state: LightningState | None = None
        self._stepping: Stepping | None = None
        self._feed: Feed | None = None
        """Of the training loader, once it is there."""
        self._samples_of_a_batch = 0
        self._losses: list[torch.Tensor] = []
        """Of the batches of the step under way."""

    @property
    def _loop(self) -> OwnLoop:
        return self._run._loop()

    # -- hooks, in the order of their calls ----------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take Lightning's own checkpoints and signal handlers out of the way, and follow its training loader.

        Raises:
            RunError: the trainer cannot be made safe; the message says why.
        """
        if stage != "fit":
            return
        self._refuse(trainer)
        aside = [one for one in trainer.callbacks if isinstance(one, Checkpoint)]
        if aside:
            # A new list: Lightning is iterating over the old one.
            trainer.callbacks = [one for one in trainer.callbacks if one not in aside]
            names = ", ".join(sorted({type(one).__name__ for one in aside}))
            self._run.print_line(f"{names} is set aside: {self._run.paths.root} holds the checkpoints of this run")
        restore = trainer._checkpoint_connector.resume_start

        def resume_start(path: Any = None, **options: Any) -> None:
            if path and trainer.state.fn == stage:
                raise RunError(
                    f"SpotCallback: fit(ckpt_path={str(path)!r:.80}) and the run's folder cannot both be resumed from. "
                    "Remove ckpt_path; load weights to begin with into the module before fit()"
                )
            restore(path, **options)

        trainer._checkpoint_connector.resume_start = resume_start
        # Its handler of SIGTERM ends the training within an epoch, or begins a collective in the handler.
        trainer._signal_connector.register_signal_handlers = lambda: None
        self._state = LightningState(trainer, pl_module)
        self._follow(trainer, self._state)

    def _refuse(self, trainer: Trainer) -> None:
        run, strategy = self._run, type(trainer.strategy)
        if self._state is not None:
            raise RunError("SpotCallback: a run has one fit(). Start a run of its own for the second")
        if strategy not in (SingleDeviceStrategy, DDPStrategy):
            raise RunError(
                f'SpotCallback: {strategy.__name__} is not supported; use strategy="ddp", or one device. A loop of '
                "your own with run.register() supports FSDP2"
            )
        if trainer.world_size != run.world_size:
            raise RunError(
                f"SpotCallback: the Trainer uses {trainer.world_size} processes, and {run.world_size} started. Start "
                f"the script with `python -m trainer.launch --processes N`, and give Trainer(devices=N)"
            )

    def _follow(self, trainer: Trainer, state: LightningState) -> None:
        """Have each training loader end steps, and the loops begin a resume at a boundary."""
        inner, epoch_loop = trainer.strategy.process_dataloader, trainer.fit_loop.epoch_loop
        begin_epoch = epoch_loop.on_run_start

        def process_dataloader(loader: Any) -> Any:
            loader = inner(loader)
            if not trainer.training:
                return loader
            return (_StatefulLoader if has_state(loader) else _Loader)(loader, self, trainer)

        def on_run_start(data_fetcher: Any) -> None:
            begin_epoch(data_fetcher)
            if epoch_loop.restarting:
                # Lightning would pass by a validation, or repeat a scheduler's step: it saves within a step, we after.
                epoch_loop._batches_that_stepped = state.batches_that_stepped
                epoch_loop.restarting = False

        trainer.strategy.process_dataloader = process_dataloader
        epoch_loop.on_run_start = on_run_start

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore everything in place.

        Raises:
            StateError: the run's checkpoint does not fit.
        """
        optimizers = {f"optimizer{number or ''}": one for number, one in enumerate(trainer.optimizers)}
        self._run.register(model=pl_module, lightning=self._state, **optimizers)
        self._loop.contents.loop = "lightning"
        self._share_anew(trainer)
        self._loop.set_end(None if trainer.max_steps == -1 else trainer.max_steps)

    def _share_anew(self, trainer: Trainer) -> None:
        """After a checkpoint of more or fewer processes: continue after as many samples, once the loader is there."""
        if self._feed and self._feed.share_anew(trainer.accumulate_grad_batches):
            current = trainer.fit_loop.epoch_loop.batch_progress.current
            current.ready = current.started = current.processed = current.completed = self._loop.contents.data.batches

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare for the first step."""
        loader = trainer.fit_loop._combined_loader
        if loader is not None and len(loader.flattened) > 1:
            raise RunError("SpotCallback: several training loaders are not supported; combine their data sets in one")
        self._stepping = self._loop.begin_steps(_end(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss of a batch."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor):
            self._losses.append(loss.detach())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics of a validation, for the records of the step that it follows."""
        if self._stepping and not trainer.sanity_checking:
            metrics = {name: value for name, value in trainer.callback_metrics.items() if name not in OWN_METRICS}
            self._stepping.log(metrics)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the step that was done last."""
        assert self._state
        self._state.has_ended = True
        self.end_step(trainer)
        self._loop.save_last()

    # -- steps ---------------------------------------------------------------------------------------------------------

    def end_step(self, trainer: Trainer) -> None:
        """End a step, if one was done since the last boundary: save it if it is time, and leave at a stop.

        Raises:
            Leaving: it is time to stop, and the step is saved.
        """
        contents = self._loop.contents
        if self._stepping is None or trainer.global_step == contents.done:
            return
        assert self._state
        if not self._state.is_live:
            self._state.is_live = True
            contents.known = frozenset(self._state.state_dict())
        data = contents.data
        data.epoch, data.batches = self._state.position()
        data.samples = data.batches * self._samples_of_a_batch
        if self._losses:
            self._stepping.log({"loss": torch.stack(self._losses).mean()})
            self._losses = []
        self._stepping.boundary(trainer.global_step, is_last=self._state.has_ended)

    def give(self, batch: Any) -> None:
        """Take in a batch that Lightning is about to get."""
        if self._stepping:
            self._stepping.give(batch)

    def feed(self, loader: Any, trainer: Trainer) -> Feed:
        """The batches of a loader from the checkpoint's position on."""
        run = self._run
        feed = Feed(loader, self._loop.contents, run.world_size, run.print_line, keeps_its_place=has_state(loader))
        if feed.sampler:
            raise RunError("SpotCallback: run.sampler() is for run.steps; Lightning makes a sampler of its own")
        self._feed, self._samples_of_a_batch = feed, feed.samples_of_a_batch()
        self._share_anew(trainer)
        return feed


class _Loader:
    """A training loader; each batch that is asked for ends the step before it."""

    def __init__(self, loader: Any, callback: SpotCallback, trainer: Trainer) -> None:
        self._loader, self._callback, self._trainer = loader, callback, trainer
        self._feed = callback.feed(loader, trainer)

    def __iter__(self) -> Iterator[Any]:
        self._callback.end_step(self._trainer)  # The last one of the epoch before.
        data = self._callback._loop.contents.data
        if data.streams_at_restore is None:
            data.epoch, data.batches = self._trainer.current_epoch, 0
        for batch in self._feed.epoch():
            self._callback.give(batch)
            yield batch
            self._callback.end_step(self._trainer)

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    @property
    def worker_init_fn(self) -> Any:
        """Set by Lightning, if the program asks it to seed workers."""
        return self._loader.worker_init_fn

    @worker_init_fn.setter
    def worker_init_fn(self, value: Any) -> None:
        self._loader.worker_init_fn = value


class _StatefulLoader(_Loader):
    """One that restores its own position; Lightning saves it with its loops."""

    def state_dict(self) -> dict[str, Any]:
        """The loader's."""
        state: dict[str, Any] = self._loader.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the loader."""
        self._loader.load_state_dict(state)


class LightningState:
    """What Lightning's checkpoints hold besides the module's tensors and the optimizers.

    Attributes:
        is_live: A step is done in this attempt. Before, a program's hooks are not asked for what they save.
        has_ended: Lightning's loops have ended.
        batches_that_stepped: The step of loggers, as it was restored.
    """

    __slots__ = ("_module", "_trainer", "batches_that_stepped", "has_ended", "is_live")

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self._module = trainer, module
        self.is_live = self.has_ended = False
        self.batches_that_stepped = 0

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

    def state_dict(self) -> dict[str, Any]:
        """Lightning's checkpoint at a boundary, without what is registered apart."""
        if not self.is_live:
            return {}
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

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore loops, schedulers, callbacks, precision and data module, as Lightning does."""
        connector = self._trainer._checkpoint_connector
        checkpoint = {"state_dict": self._module.state_dict(), **saved, "optimizer_states": []}
        connector._loaded_checkpoint = checkpoint
        connector.restore_datamodule()
        self._module.on_load_checkpoint(checkpoint)
        connector.restore_callbacks()
        connector.restore_training_state()
        connector._loaded_checkpoint = {}
        self.batches_that_stepped = saved["batches_that_stepped"]
        self._trainer.should_stop = saved["should_stop"]


def _same_tensors(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """True if two state dicts have the same names, and tensors in the same memory."""
    return one.keys() == other.keys() and all(
        not isinstance(value, torch.Tensor) or value.data_ptr() == other[name].data_ptr() for name, value in one.items()
    )


def _end(trainer: Trainer) -> int:
    """The step at which training ends; 0: unknown."""
    with suppress(MisconfigurationException):  # The number of batches of a step changes between epochs.
        steps = trainer.estimated_stepping_batches
        return int(steps) if math.isfinite(steps) and steps > 0 else 0
    return 0
