"""OwnLoop: what a user's own training loop uses of an attempt: registered objects, steps, metrics, the export."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from trainer.checkpoint import extras
from trainer.checkpoint.shards import is_cut
from trainer.errors import RunError
from trainer.layout.names import CheckpointName
from trainer.ranks.peers import collective
from trainer.training import buckets, export, rng
from trainer.training.arguments import check_steps
from trainer.training.closing import Closing, is_finished
from trainer.training.joining import join, open_session
from trainer.training.participant import Participant
from trainer.training.registered import Registered
from trainer.training.sampler import RunSampler
from trainer.training.stepping import Stepping

Batch = TypeVar("Batch")


class OwnLoop:
    """One attempt of a program that trains in a loop of its own."""

    def __init__(self, run: Participant, state: dict[str, Any]) -> None:
        """Join the other ranks.

        Args:
            run: The attempt.
            state: Plain values that are saved too.
        """
        self._run, config = run, run.config
        join(run)
        run.group.rank0_does("bind", lambda: run.bind(), run.check_stop)
        self.contents = Registered(config.on_nan != "ignore", config.to_json())
        self.contents.state = state
        self._session = open_session(run, self.contents, config.save_interval_steps)
        self._stepping: Stepping | None = None
        self._until: int | None = None
        self._export: Callable[[CheckpointName], None] = lambda name: None

    # -- before the first step -----------------------------------------------------------------------------------------

    def register(self, objects: Mapping[str, Any]) -> None:
        """Add objects, and load them from the newest whole checkpoint.

        Raises:
            RunError: an object cannot be registered.
            StateError: the checkpoint does not fit.
        """
        if self._stepping:
            raise RunError("register() must be called before the first step")
        for line in self.contents.add(objects):
            self._run.print_line(line)
        if self._run.world_size > 2:  # Of two values, the sum does not depend on the order.
            for thing in objects.values():
                buckets.settle_at_first_pass(thing)
        extras.refuse_other_names(self._run.group, objects, self._run.check_stop)
        self._run.check_stop()
        self._session.load()

    def _begin(self) -> Stepping:
        """End the time for registering."""
        if self._stepping is None:
            run, contents = self._run, self.contents
            if not contents.kinds():  # run.state alone would not be restored: register() does that.
                raise RunError(
                    "run.register(model=model, optimizer=optimizer, ...) is missing: nothing is registered, so nothing "
                    "would be saved"
                )
            contents.refuse_missing()
            self._session.begin()
            closing = Closing(run, self._session, contents, self._close, lambda name: self._export(name))
            self._closing = closing
            self._stepping = Stepping(run, contents, self._session, closing)
        return self._stepping

    def _close(self) -> None:
        if self._stepping:
            self._stepping.close()

    # -- a framework's loop ------------------------------------------------------------------------------------------

    def set_end(self, until: int | None) -> None:
        """Tell the step at which training is to end; None: the framework counts in epochs."""
        self._until, self.contents.config["max_steps"] = until, until

    def begin_steps(self, until: int) -> Stepping:
        """Prepare for the steps of a framework that has the loop: it ends each with the stepping's `boundary`.

        Args:
            until: Where training ends; 0: unknown.
        """
        stepping = self._begin()
        stepping.begin(until)
        return stepping

    def save_last(self, resave: bool = False) -> None:
        """Save the step that was done last, and wait until that is decided; `resave` as of `Session.save_last`."""
        stop = self._session.stop
        self._session.save_last(stop, resave)

    # -- the steps -----------------------------------------------------------------------------------------------------

    def sampler(self, dataset: Any, **options: Any) -> RunSampler:
        """Make a sampler, whose order binds the run once `steps` gets its loader; as of `SpotRun.sampler`.

        Raises:
            RunError: a value makes no sense.
        """
        return RunSampler(dataset, rank=self._run.rank, world_size=self._run.world_size, **options)

    def seeded(self, seed: int) -> AbstractContextManager[None]:
        """Run under generators of the batch that the loop has now; as of `SpotRun.seeded`."""
        stepping, run = self._begin(), self._run
        index = stepping.index * run.world_size + run.rank
        return rng.seeded(rng.micro_step_seed(seed, self.contents.done, index))

    def steps(self, loader: Iterable[Batch], until: int, accumulate: int | None) -> Iterator[Batch]:
        """Yield batches; as of `SpotRun.steps`."""
        check_steps(loader, until)
        stepping = self._begin()
        self.set_end(until)
        if self.contents.done < until and self._is_finished():  # It was ended early.
            return iter(())
        return stepping.steps(loader, until, accumulate)

    @property
    def ends_step(self) -> bool:
        """The batch that the loop has now is the last one of its step."""
        return self._begin().ends_step

    def log(self, values: Mapping[str, Any]) -> None:
        """Keep metrics of the step that the loop is in."""
        if isinstance(loss := values.get("loss"), str):
            raise RunError(f"run.log(loss={loss!r:.60}): the loss is a number. Log text under another name")
        self._begin().log(dict(values))

    def _is_finished(self) -> bool:
        """True if `final/` is whole and was exported from this step, with this end of training."""
        return is_finished(self._run, self.contents.done, self._until)

    # -- the end -------------------------------------------------------------------------------------------------------

    def finish(self, write: Callable[[Path], None] | None) -> None:
        """Save the last step, and export the model; as of `SpotRun.finish`.

        Raises:
            RunError: no step was done, or the run is past the last call of `steps`, or this is no function.
        """
        if write is not None and not callable(write):
            raise RunError(
                f"finish({write!r}): give a function that writes into a folder, as in "
                "run.finish(lambda folder: torch.save(model.state_dict(), folder / 'model.pt'))"
            )
        self._begin()
        if self._is_finished():
            return
        if self._until is not None and self.contents.done > self._until:
            raise RunError(
                f"{self._run.paths.root} is already at step {self.contents.done}, past until={self._until}. Raise it, "
                "or use another run name. `len(loader)` depends on the number of processes"
            )
        if not self.contents.done:
            raise RunError("finish(): no step was done, so there is nothing to export")
        whole = _gathered(self.contents.models, self._run.rank == 0) if write is None else {}

        def save_all(models: nn.Module, folder: Path, write: export.Write | None = None) -> None:
            _save_all(models, whole, folder, write)

        save_model = save_all if write is None else lambda _, folder: write(folder)
        self._export = lambda name: export.export(self._run, self.contents.models, save_model, name)
        self._closing.finish(self._session.stop, resave=False)


def _gathered(models: nn.Module, keep: bool) -> dict[int, torch.Tensor]:
    """The whole of each tensor that is cut over the ranks, on the host, by the id of the cut one. All ranks call it.

    Args:
        models: The registered modules.
        keep: False on a rank that only takes part in the collectives.
    """
    whole = {}
    for tensor in models.state_dict(keep_vars=True).values():
        if isinstance(tensor, torch.Tensor) and is_cut(tensor):
            with collective():
                full = tensor.full_tensor().detach()
            if keep:
                whole[id(tensor)] = full.cpu()
    return whole


def _save_all(
    models: nn.Module, whole: Mapping[int, torch.Tensor], folder: Path, write: export.Write | None = None
) -> None:
    """Write each registered module: the only one into `model.safetensors`, several into files with their names."""
    for name, module in models._modules.items():
        if module is not None:
            file = "model" if len(models._modules) == 1 else name
            export.save_tensors(module, folder, write, f"{file}.safetensors", whole)
