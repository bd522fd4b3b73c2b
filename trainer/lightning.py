"""Lightning: a callback that makes a `lightning.pytorch` training survive preemptions.

    with SpotRun("/checkpoints/my-run", save_every="auto") as run:
        trainer = lightning.Trainer(max_epochs=3, callbacks=[SpotCallback(run)])
        trainer.fit(model)
        run.finish()

A checkpoint holds the module and its optimizers as a loop of one's own saves them, and the rest of what Lightning puts
into its own checkpoints (loops, schedulers, callbacks, precision, data module, hooks). A boundary lies where Lightning
asks for the next batch: validation, schedulers and callbacks of the step are done then. A notice within a validation
has the state before it saved, and the next attempt begins with the validation.

It uses parts of Lightning that are not public, all of them in this file and in training/lightning_state.py. Therefore
only tested releases are supported.
"""

from __future__ import annotations

from trainer import check  # isort: skip

check.require("lightning")

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from trainer.bucket.hashing import fingerprint
from trainer.errors import RunError
from trainer.training import rng
from trainer.training.feed import Feed
from trainer.training.held import Held, summary
from trainer.training.lightning_state import LightningState
from trainer.training.own_loop import OwnLoop
from trainer.training.registrable import has_state
from trainer.training.run import SpotRun
from trainer.training.stepping import Stepping

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
        self._held: Held | None = None
        """The state at a step's end, while its validation goes on."""
        self._streams: torch.Tensor | None = None
        """The random streams then."""
        self._looks = False
        """All ranks look for a stop before each batch of the validation."""
        self._repeats = False
        """The validation that goes on is that of the restored step."""

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
                # The fit loop's too: it would not step a ReduceLROnPlateau at this epoch's end.
                trainer.fit_loop._restarting = epoch_loop.restarting = False
            if state.owes_validation:
                self._validate_owed(trainer, state, data_fetcher)

        trainer.strategy.process_dataloader = process_dataloader
        epoch_loop.on_run_start = on_run_start
        epoch_loop.val_loop.run = lambda validate=epoch_loop.val_loop.run: self._validate(trainer, state, validate)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore everything in place.

        Raises:
            StateError: the run's checkpoint does not fit.
        """
        optimizers = {f"optimizer{number or ''}": one for number, one in enumerate(trainer.optimizers)}
        max_steps = trainer.max_steps
        self._run.register(model=pl_module, lightning=self._state, **optimizers)
        self._loop.contents.loop = "lightning"
        self._share_anew(trainer)
        if self._feed and self._loop.contents.done:
            # A look at trainer.estimated_stepping_batches has begun the loader, and perhaps read a batch ahead.
            trainer.fit_loop._load_combined_loader_states()
            iter(trainer.fit_loop._data_fetcher)
        self._loop.set_end(None if max_steps == -1 else max_steps)

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
        assert self._state
        self._state.restore_metrics()
        self._stepping = self._loop.begin_steps(_end(trainer))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin a micro-step."""
        if self._stepping:
            self._stepping.accumulate = trainer.accumulate_grad_batches
            self._stepping.begin_micro_step(-(batch_idx + 1) % trainer.accumulate_grad_batches)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss of a batch; a stop may drop the batches of a step that is not over.

        Raises:
            Leaving: it is time to stop, and the step before is saved.
        """
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor):
            self._losses.append(loss.detach())
        if self._stepping and trainer.global_step == self._loop.contents.done:
            self._stepping.end_micro_step(-(batch_idx + 1) % trainer.accumulate_grad_batches)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics of a validation, for the records of the step that it follows."""
        if self._stepping and not trainer.sanity_checking:
            metrics = {name: value for name, value in trainer.callback_metrics.items() if name not in OWN_METRICS}
            self._stepping.log(metrics)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the step that was done last."""
        assert self._state
        has_validated = self._repeats and trainer.global_step == self._loop.contents.done
        self._state.has_ended = True
        if has_validated:
            self._describe(trainer)
        self.end_step(trainer)
        self._loop.save_last(resave=has_validated)

    # -- validations ---------------------------------------------------------------------------------------------------

    def _validate(self, trainer: Trainer, state: LightningState, validate: Callable[[], Any]) -> Any:
        """Run Lightning's validation; a stop may leave it with the state before it."""
        if self._stepping is None or trainer.sanity_checking:
            return validate()
        has_step = trainer.global_step != self._loop.contents.done
        # Within a step with accumulation, there is no state that could be saved.
        self._looks = (has_step or state.owes_validation) and self._has_equal_validations(trainer)
        if self._looks and has_step:
            self._streams = rng.save_streams()
            self._describe(trainer)
            state.keep()
            self._held = Held(self._run.group, lambda: summary(self._loop.contents.collect(), self._run.rank))
        try:
            return validate()
        finally:
            self._looks, self._held = False, None
            state.release()

    def _has_equal_validations(self, trainer: Trainer) -> bool:
        """True if all ranks have as many batches to validate with, so that all look as often."""
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.setup_data()
        lengths = fingerprint(*map(str, loop.max_batches))
        rows = self._run.group.exchange([lengths, sum(loop.max_batches) == math.inf]).wait()
        return len(rows) == 1 or all(row == [lengths, False] for row in rows)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Leave at a stop, with the state before the validation.

        Raises:
            Leaving: it is time to stop, and the step is saved.
        """
        self._run.hangs.beat()
        if self._looks and self._stepping:
            self._stepping.look(trainer.global_step, self._go_back)

    def _go_back(self) -> bool:
        """Be where the validation began, if it has left the state as it was; all ranks call it."""
        if self._held is None:
            return True  # The restored state is saved.
        if not self._held.is_unchanged():
            self._looks = False
            self._run.print_line("The validation uses other weights than the training, so the run stops after it")
            return False
        assert self._streams is not None
        rng.load_streams(self._streams)
        self._log_loss()
        return True

    def _validate_owed(self, trainer: Trainer, state: LightningState, data_fetcher: Any) -> None:
        """Do what follows the restored step: its validation, and the schedulers' steps."""
        epoch_loop, data = trainer.fit_loop.epoch_loop, self._loop.contents.data
        state.restore_limits()
        streams, is_last = data.streams_at_restore, epoch_loop._num_ready_batches_reached()
        if streams is not None:  # The loader was not begun.
            assert self._feed
            for _ in self._feed.epoch() if is_last else ():
                pass  # None is left; but the next epoch's order follows from this one's.
            rng.load_streams(streams)
        epoch_loop._should_check_val_fx = lambda _: True
        self._repeats = True
        try:
            epoch_loop.on_advance_end(data_fetcher)
        finally:
            del epoch_loop._should_check_val_fx
        state.owes_validation = False
        if streams is not None and not is_last:
            data.streams_at_restore = rng.save_streams()

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
        self._describe(trainer)
        self._log_loss()
        self._stepping.boundary(trainer.global_step, is_last=self._state.has_ended)

    def _describe(self, trainer: Trainer) -> None:
        """Have the contents hold the state after the step that was done last."""
        contents, state = self._loop.contents, self._state
        assert state
        if not state.is_live:
            state.is_live = True
            contents.known = frozenset(state.state_dict())
        data = contents.data
        data.epoch, data.batches = state.position()
        data.samples = data.batches * self._samples_of_a_batch

    def _log_loss(self) -> None:
        if self._losses and self._stepping:
            self._stepping.log({"loss": torch.stack(self._losses).mean()})
            self._losses = []

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
        if data.streams_at_restore is None and not self._feed.is_shared_anew:
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


def _end(trainer: Trainer) -> int:
    """The step at which training ends; 0: unknown."""
    with suppress(MisconfigurationException):  # The number of batches of a step changes between epochs.
        steps = trainer.estimated_stepping_batches
        return int(steps) if math.isfinite(steps) and steps > 0 else 0
    return 0
