"""SpotRun: one attempt at a run, from the rendezvous to the exit code; the public API for a training script.

    from trainer import SpotRun

    with SpotRun("/checkpoints/my-run", save_every="auto") as run:
        run.register(model=model, optimizer=optimizer, scheduler=scheduler)
        for batch in run.steps(loader, until=10_000):
            ...
        run.finish(export=lambda folder: torch.save(model.state_dict(), folder / "model.pt"))

Or the loop is the trainer's, and makes resumes exact on any number of processes: `SpotRun(RunConfig(...))` and
`run.train(model, optimizer, samples=dataset, loss=loss_sum)`.

The attempt ends with an exit code of README's table (ending.py). SIGTERM is handled from the block's beginning on; an
earlier one ends the process, and the launcher exits with 75. This module imports torch only inside the block.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from trainer.attempt.ending import FINISHED
from trainer.errors import RunError
from trainer.launch import others
from trainer.machine import home
from trainer.training import starting
from trainer.training.config import HANG_TIMEOUT_S, RunConfig
from trainer.training.lifecycle import Lifecycle

if TYPE_CHECKING:
    import torch
    from torch import nn

    from trainer.training.folder_loop import FolderLoop
    from trainer.training.loop import Loop
    from trainer.training.own_loop import OwnLoop
    from trainer.training.sampler import Order, RunSampler
    from trainer.training.samples import Samples

Batch = TypeVar("Batch")

others.begin()  # Early: a launcher that ends before this line leaves the process running.


class SpotRun(Lifecycle):
    """One attempt at a run.

    Attributes for scripts: `state`, to change too; `rank`, `world_size`, `grace_s`, `paths` and `attempt`, to read.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | RunConfig,
        binding: Mapping[str, Any] | None = None,
        *,
        save_every: int | Literal["auto"] = "auto",
        keep: int = 3,
        keep_every: int = 0,
        allow_config_change: Sequence[str] = (),
        hang_timeout: float = HANG_TIMEOUT_S,
        report_to: str | Sequence[str] = (),
    ) -> None:
        """Describe the run.

        Args:
            folder: The run's folder in the bucket, for a loop of the program's own; or the settings, for `train`. The
                further arguments belong to a folder.
            binding: Values that may not change between attempts, by name; compared with those of the newest whole
                checkpoint.
            save_every: Steps between checkpoints; "auto" derives them from the cost of a save and of preemptions.
            keep: The number of newest checkpoints to keep; at least 2.
            keep_every: Keep the first checkpoint at or after each multiple of so many steps for good; 0: none.
            allow_config_change: Names in `binding` that may differ from the run's first attempt.
            hang_timeout: Seconds that may pass between two batches, once the first step has ended: where training
                stands still for longer, the attempt ends with 75 and leaves the stacks of its threads. 0: no limit.
            report_to: Experiment trackers that get what `log` records: "tensorboard", "wandb", "trackio".

        Raises:
            SystemExit: a value makes no sense; a line says which.
        """
        starting.refuse_while_imported()
        note = starting.take_place()
        home.stand_in()
        of_own = not isinstance(folder, RunConfig)
        if isinstance(folder, RunConfig):
            config = folder
        else:
            config = starting.own_config(
                folder, save_every, keep, keep_every, allow_config_change, hang_timeout=hang_timeout,
                report_to=report_to,
            )  # fmt: skip
        starting.refuse_missing_trackers(config)
        if binding is None:
            binding = {} if of_own else starting.default_binding(config)
        if not isinstance(binding, Mapping):
            starting.refuse(f"SpotRun(binding={binding!r:.60}): give a dict of names and values")
        super().__init__(config, dict(binding))
        self.notes.append(note)
        self.unwinds, self.has_own_loop = True, of_own
        self.state: dict[str, Any] = {}
        """Plain values of a loop of one's own (a best metric, a counter); saved with what is registered."""
        self._own: OwnLoop | None = None
        self._framework: FolderLoop | None = None
        self._training: Loop | None = None

    def __dir__(self) -> list[str]:
        """The API alone, for completion in notebooks and editors: the modules of this package use more of a run."""
        own = [name for name in vars(SpotRun) if not name.startswith("_")]
        return sorted([*own, "state", "rank", "world_size", "grace_s", "paths", "attempt"])

    def rank0_does(self, name: str, work: Callable[[], Any]) -> Any:
        """Let rank 0 do something that may take long (a download, say), while the other ranks wait.

        Args:
            name: Tells this work from other work, the same on every rank.
            work: What rank 0 does; it returns a JSON value.

        Returns:
            that value, on every rank. An error of rank 0 ends the attempt.
        """
        return self.group.rank0_does(f"user/{name}", work, self.check_stop)

    def train(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        samples: Samples,
        loss: Callable[[nn.Module, Any], torch.Tensor],
        max_steps: int | None = None,
        lr_factor: Callable[[int], float] | None = None,
        held_out: Samples | None = None,
        save_model: Callable[..., None] | None = None,
        extra: Mapping[str, Any] | None = None,
        tokens: str | None = None,
        find_unused_parameters: bool | None = None,
    ) -> None:
        """Train to the end, and export the model; returns when both are done, at once if they were before.

        So code after it runs in every attempt that finds the run finished.

        Args:
            model: On any device, with its initial weights: the same on every rank.
            optimizer: Over the model's parameters.
            samples: The samples to train on.
            loss: (model, batch) -> the *sum* of the losses over the batch, 0-d.
            max_steps: Where training ends; None: as the config says.
            lr_factor: Step (from 1) -> the factor of each group's initial learning rate in that step. None: the
                optimizer's own rates, which a scheduler in `extra` may change.
            held_out: The samples to evaluate on, every `eval_interval_steps`.
            save_model: Writes the trained model into an empty local folder, for `final/`; None: its tensors, as
                safetensors. If it has a parameter `write` (`export.Write`), it can stream large tensors through that,
                without a copy on local disk.
            extra: Objects with `state_dict` and `load_state_dict`, saved with the model (an EMA copy, say). A scheduler
                is stepped by the program, in `optimizer.register_step_post_hook`.
            tokens: The folder of prepared data, for the checkpoints' manifests.
            find_unused_parameters: With several processes, whether they look in each step for parameters that got no
                gradient; a model with branches needs it. None: if the first batch leaves one without.

        Raises:
            RunError: an option makes no sense, or this is the second call.
            StateError: the checkpoint does not fit.
        """
        from trainer.training.arguments import agreed_steps
        from trainer.training.closing import is_trained
        from trainer.training.loop import Loop

        if self.has_own_loop:
            raise RunError('train() needs SpotRun(RunConfig(...)). With SpotRun("folder"), use register and steps')
        if self._training or self.final_is_whole:
            raise RunError(
                "train() was called before, and this run is finished. Give a second phase a run of its own, or write "
                "the loop yourself: docs/your-own-script.md"
            )
        if is_trained(self, agreed_steps(self.config.max_steps, max_steps)):
            return
        self._training = Loop(
            self, model, optimizer, samples=samples, loss=loss, max_steps=max_steps, lr_factor=lr_factor,
            held_out=held_out, save_model=save_model, extra=extra, tokens=tokens,
            find_unused_parameters=find_unused_parameters,
        )  # fmt: skip
        self._training.train()

    # -- a loop of the program's own -----------------------------------------------------------------------------------

    def register(self, *unnamed: Any, **objects: Any) -> None:
        """Register what steps change, and restore it in place from the newest whole checkpoint, if there is one.

        Args:
            unnamed: Refused: a checkpoint needs names.
            objects: Modules, optimizers, and anything with `state_dict` and `load_state_dict` (schedulers, scalers, EMA
                copies, metrics, stateful loaders), under any names; generators of torch, numpy and Python too. A module
                comes before its optimizer, or with it. Wrappers (DistributedDataParallel, FSDP2, torch.compile,
                accelerate) do not matter.

        Raises:
            RunError: an object cannot be saved, or has no name.
            StateError: the checkpoint was saved with other objects, names or shapes.
        """
        if unnamed:
            raise RunError("register(): give each object a name, as in run.register(model=model)")
        self._loop().register(objects)

    def sampler(
        self,
        dataset: Sized,
        *,
        global_batch_size: int,
        micro_batch_size: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        order: Order | None = None,
    ) -> RunSampler:
        """The samples of each step, the same on any number of processes: `DataLoader(..., batch_sampler=this)`.

        An epoch follows the other without a gap; a step may span two. Each item is loaded under generators (random,
        numpy, torch) that are seeded with (seed, epoch, place in the epoch), in loader workers too. `steps` takes the
        number of batches of a step from here.

        Args:
            dataset: A map-style data set: `len()`, and `[id]`.
            global_batch_size: Samples of a step, on all processes together; binds the run.
            micro_batch_size: Samples of a batch; None: one batch of each process is a step.
            seed: Of the order, and of the items' random numbers; binds the run.
            shuffle: Whether each epoch has a random order of its own.
            order: Epoch (from 0) -> ids of its samples, any number of them, in their order (weighted, a curriculum). It
                may draw random numbers. It replaces `shuffle`.

        Raises:
            RunError: a value makes no sense, or the processes do not share a step equally.
        """
        options = {"seed": seed, "shuffle": shuffle, "order": order}
        return self._loop().sampler(
            dataset, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, **options
        )

    def seeded(self, seed: int = 0) -> AbstractContextManager[None]:
        """Generators (random, numpy, torch) for the batch that the loop has: `with run.seeded(): loss = ...`.

        They are seeded with (seed, step, number of the batch in the step over all processes), so that dropout is the
        same on any number of processes. The program's own streams are put back afterwards.

        Args:
            seed: Of the random numbers.
        """
        return self._loop().seeded(seed)

    def steps(self, loader: Iterable[Batch], *, until: int, accumulate: int | None = None) -> Iterator[Batch]:
        """Yield batches, until `until` optimizer steps are done in the whole run, over all attempts.

        Each `next()` ends the step before it: there the run is saved, and there a stop ends the attempt. The first one
        continues with the batch after the checkpoint's.

        A program may call it several times. A call with the same loader goes on in its order, another loader begins at
        its start, and a call whose steps are done yields nothing.

        Args:
            loader: Makes the batches of one epoch each time it is iterated over.
            until: The number of steps in all, not more steps.
            accumulate: Batches of a step, 1 by default; `ends_step` tells the last one. With `sampler`, it is known.

        Raises:
            RunError: the loader is empty.
        """
        return self._loop().steps(loader, until, accumulate)

    @property
    def step(self) -> int:
        """Steps done in the whole run; those of the checkpoint once something is registered."""
        return self._own.contents.done if self._own else self.steps_done

    @property
    def epoch(self) -> int:
        """The epoch of the loader, from 0."""
        return self._own.contents.data.epoch if self._own else 0

    @property
    def ends_step(self) -> bool:
        """True if the batch that the loop has now is the last one of its step."""
        return self._loop().ends_step

    def log(self, **metrics: Any) -> None:
        """Record metrics of this step (`loss=`, for example), for the run's records; rank 0's count.

        Args:
            metrics: Numbers, tensors with one element, or text, by name. Later values replace earlier ones.

        Raises:
            RunError: a value is none of these.
        """
        (self._framework or self._loop()).log(metrics)

    def finish(self, export: Callable[[Path], None] | None = None) -> None:
        """End the training, at whatever step: save it, and export the model into the run's `final/`.

        While `train` runs, the loss function or a hook may call it on any rank. Training then ends with the step that
        is under way, or with the last one if none is; `train` exports, and returns.

        Args:
            export: Writes the trained model into an empty local folder, on rank 0; None: the registered modules'
                tensors, as safetensors. `train` has `save_model` instead.

        Raises:
            RunError: no step was done.
        """
        if self.has_own_loop:
            (self._framework or self._loop()).finish(export)
        elif self._training is None or export is not None:
            raise RunError("with train(), call finish() without arguments, while it runs; train() exports by itself")
        else:
            self._training.state.enough = True

    # -- a framework's loop (trainer.hf, trainer.lightning) ------------------------------------------------------------

    def resume_from(self) -> str | None:
        """Return a local folder with the newest whole checkpoint, for the framework to resume from; None without one.

        Raises:
            RunError: no callback was made for this run.
            StateError: something else than this framework saved the checkpoint.
        """
        if self._framework is None:
            raise RunError("resume_from(): first give SpotCallback(run) to the trainer's callbacks")
        folder = self._framework.fetch()
        return None if folder is None else str(folder)

    def _framework_loop(self, framework: str) -> FolderLoop:
        """Return what a framework's callback saves with (folder_loop.py); the same one at each call.

        Args:
            framework: The name of what writes and reads the checkpoint's files.
        """
        self._refuse_after_end()
        if self._framework is None:
            from trainer.training.folder_loop import FolderLoop

            self._framework = FolderLoop(self, framework, self.state)
        return self._framework

    def _refuse_after_end(self) -> None:
        if not self.has_own_loop:
            raise RunError('a loop of your own needs SpotRun("folder"), not a RunConfig, which is for train()')
        if self._exit is not None:  # The program has caught what the end of the attempt raised, or the block is over.
            self.leave(FINISHED)

    def _loop(self) -> OwnLoop:
        self._refuse_after_end()
        if self._own is None:
            from trainer.training.own_loop import OwnLoop

            self._own = OwnLoop(self, self.state)
        return self._own
