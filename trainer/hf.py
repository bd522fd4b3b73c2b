"""Hugging Face's Trainer, and TRL's, made safe: a callback that saves, stops and resumes as any run of this trainer.

    from trainer import SpotRun  # before torch
    from trainer.hf import SpotCallback

    with SpotRun("/checkpoints/my-run", save_every="auto") as run:
        trainer = Trainer(model, args, train_dataset=data, callbacks=[SpotCallback(run)])
        trainer.train(resume_from_checkpoint=run.resume_from())
        run.finish()

The Trainer writes its own files, to a local disk. They are copied into the run's bucket and committed with a manifest;
before a resume they are verified and fetched. What the Trainer would do with checkpoints in `output_dir` is set aside:
`save_strategy`, `save_steps`, `save_total_limit`, `get_last_checkpoint`.
"""

from __future__ import annotations

from trainer import check  # isort: skip

check.require("transformers", "accelerate")

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import Trainer, TrainerCallback

from trainer.checkpoint.finite import NotFiniteError
from trainer.checkpoint.shards import local
from trainer.errors import RunError
from trainer.machine import scratch
from trainer.training import trl_counts
from trainer.training.cut_models import unsupported_cut
from trainer.training.drawn_ahead import DrawnAhead
from trainer.training.folder_loop import FolderLoop, move_into
from trainer.training.frozen_base import frozen_digest
from trainer.training.trainer_batch import batch_remedy, keep_global_batch
from trainer.training.trainer_boundary import MicroSteps
from trainer.training.trainer_evaluation import BeforeEvaluation
from trainer.training.trainer_order import TrainerOrder, grouping

if TYPE_CHECKING:
    from trainer.training.run import SpotRun

# Without a GPU, each of several processes loads its optimizer onto the device "cpu:0", which torch.load does not know.
torch.serialization.register_package(
    1000, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


class SpotCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no types.
    """Saves a `Trainer`'s run at the end of a step, stops it at a notice, and resumes it."""

    def __init__(self, run: SpotRun, *, exact: bool = False) -> None:
        """Prepare a callback for one `Trainer`, for its `callbacks`.

        Args:
            run: The attempt, inside its `with` block.
            exact: Draw the samples in an order of ours, so that each step has the same ones on any number of processes.
                It replaces the Trainer's sampler; an epoch has whole steps then.
        """
        self._run, self._exact = run, exact
        self._loop: FolderLoop = run._framework_loop("transformers")
        self._args: Any = None
        self._trainer: Any = None
        self._original_save: Any = None
        self._original_step: Any = None
        self._lr: float | None = None
        self._is_asked = self._is_after_epoch = False
        """A save is to be made at the end of the epoch whose last step is done."""
        self._owes_evaluation = False
        """The evaluation of the boundary that is saved or restored is still to be done."""
        self._before_evaluation: BeforeEvaluation | None = None
        """The boundary, while its evaluation goes on."""
        self._micro_steps: Any = None
        self._has_ended = False
        """The Trainer's loop has ended, and its last step is saved."""
        self._sum: Any = None
        """The sum of losses since the last log, as the Trainer holds it."""
        self._owed_sum = 0.0
        """What an earlier attempt added to it."""
        self._frozen = 0
        self._ahead: DrawnAhead | None = None
        self._final = ExitStack()

    # -- before the first step -----------------------------------------------------------------------------------------

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set aside what the Trainer would do with checkpoints, and hold the global batch.

        Raises:
            RunError: an argument contradicts this callback, or the installed TRL or peft is not supported.
        """
        self._args, run, trainer = args, self._run, _calling_trainer()
        if found := check.unsupported(*_frameworks(trainer)):
            raise RunError(found)
        if found := unsupported_cut(trainer):
            raise RunError(f"SpotCallback does not support {found}")
        for name, remedy in _REFUSED.items():
            if getattr(args, name, False):
                raise RunError(f"TrainingArguments({name}=True) does not work with SpotCallback: {remedy}")
        if args.save_strategy != "no":
            run.print_line("save_strategy and save_total_limit are set aside: SpotRun's save_every and keep decide")
        args.save_strategy = transformers.trainer_utils.SaveStrategy.NO
        args.restore_callback_states_from_checkpoint = True  # The patience of early stopping, for example.
        first = self._loop.first_value("global_batch_size")
        batch = keep_global_batch(args, first, run.print_line)
        if type(first) is int:
            run.remedies["global_batch_size"] = batch_remedy(args, first)
        self._loop.bind(global_batch_size=batch, exact=self._exact)
        grouped = grouping(args)
        if grouped and self._exact:
            run.print_line(f"{grouped} is set aside: exact=True decides about the order of the samples")
        elif grouped:
            run.print_line(
                f"{grouped}: the Trainer draws another order when it resumes within an epoch, so samples may come "
                "twice or not at all in this epoch"
            )
        if self._exact:
            seed = args.seed if args.data_seed is None else args.data_seed
            trainer._get_train_sampler = lambda *_: TrainerOrder(trainer, seed, batch)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin or go on with the run.

        Raises:
            RunError: the Trainer was not started as this module's example does.
        """
        loop, self._trainer = self._loop, _calling_trainer()
        if self._args is not args:
            raise RunError("give SpotCallback(run) to the Trainer when it is made: Trainer(..., callbacks=[...])")
        if not loop.is_restored or state.global_step != loop.contents.done:
            raise RunError("call trainer.train(resume_from_checkpoint=run.resume_from())")
        self._frozen = frozen_digest(self._trainer.model, self._run.group)
        mine, ended = self._load_own(), False
        if mine:
            self._owed_sum, self._owes_evaluation = mine["loss_sum"], mine["owes_evaluation"]
            self._trainer._total_loss_scalar, self._trainer._globalstep_last_logged = mine["logged_sum"], mine["logged"]
            ended = mine["ended_at"] == state.max_steps
            trl_counts.load(self._trainer, mine["counts"])
        if loop.contents.facts_restored.get("world_size", args.world_size) != args.world_size:
            self._trainer._load_rng_state = lambda checkpoint: None
            self._run.print_line(
                "the number of processes has changed: random numbers (dropout) begin anew, as the Trainer's seed makes "
                "them"
            )
        same = loop.contents.facts_restored.get("world_size") == args.world_size
        ahead = mine.get("ahead") if mine and same else None
        self._ahead = DrawnAhead(self._trainer, ahead, self._run.resume_from(), loop.give)
        self._micro_steps = MicroSteps(self._trainer, loop)
        loop.begin(self._write, state.max_steps, _bytes_of(self._trainer.model))
        self._original_save, self._trainer._save_checkpoint = self._trainer._save_checkpoint, self._save
        self._original_step, self._trainer._maybe_log_save_evaluate = (
            self._trainer._maybe_log_save_evaluate,
            self._end_of_step,
        )
        if loop.is_finished() or ended or state.global_step >= state.max_steps:
            self._train_no_more()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Do the evaluation that a stop has cut short."""
        self._evaluate_owed(state, control)
        if control.should_training_stop:
            self._train_no_more()

    def _evaluate_owed(self, state: Any, control: Any) -> None:
        """Do the evaluation that belongs to the restored boundary, if a stop has cut it short."""
        if self._owes_evaluation:
            trainer, folder = self._trainer, str(self._loop.contents.fetched)
            trainer._load_rng_state(folder)
            owed, self._owed_sum = self._owed_sum, 0.0  # It is the next step's.
            self._owes_evaluation, self._is_after_epoch = False, True
            control.should_evaluate = True
            self._end_of_step(torch.tensor(0.0), None, trainer.model_wrapped, None, state.epoch, None, 0.0)
            self._owed_sum = owed
            trainer._save_rng_state(folder)  # The Trainer restores it from there when the epoch begins.

    def _train_no_more(self) -> None:
        """Let the Trainer's loop find no batch: it would train a step before it looks whether it is done."""
        self._trainer.get_batch_samples = lambda *_: ([], None)

    def _load_own(self) -> dict[str, Any] | None:
        """What this callback saved beside the Trainer's files, of this rank or else of rank 0.

        Raises:
            RunError: the frozen part of the model is not the one that the run was started with.
        """
        folder = self._run.resume_from()
        if folder is None:
            return None
        places = [Path(folder) / _own_file(rank) for rank in (self._run.rank, 0)]
        mine: dict[str, Any] = json.loads(next(place for place in places if place.is_file()).read_text())
        same = self._loop.contents.facts_restored.get("world_size") == self._run.world_size
        if mine["frozen"] != self._frozen and (same or not self._trainer.is_fsdp_enabled):
            raise RunError(
                "the frozen base model differs from the one that this run was started with; its checkpoints hold only "
                "what is trained. Use that model, or start a new run"
            )
        return mine

    # -- the steps -----------------------------------------------------------------------------------------------------

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin the first batch of a step."""
        self._micro_steps.begin_step()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End a batch that does not end its step; a stop may drop it.

        Raises:
            Leaving: it is time to stop, and the step before is saved.
        """
        self._micro_steps.end()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Begin to agree with the other ranks, and note the learning rate."""
        self._loop.start_step()
        lr = optimizer.param_groups[0].get("lr") if optimizer is not None else None
        self._lr = None if lr is None else float(lr)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the step."""
        self._is_after_epoch = False
        self._loop.end_step(self._lr, args.gradient_accumulation_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Record the Trainer's metrics."""
        kept = {name: value for name, value in (logs or {}).items() if isinstance(value, (int, float))}
        kept.pop("learning_rate", None)
        self._loop.log(kept)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look for a stop during an evaluation or a prediction.

        One that a callback begins is a part of a step's end, which cannot be repeated: a stop waits for it.
        """
        self._run.hangs.beat()
        if self._run.final_is_whole:
            return
        if self._trainer is None:
            self._run.check_stop()  # Before the first step: there is nothing to save.
        elif self._before_evaluation or self._has_ended:
            self._loop.look(self._before_evaluation.may_go_back if self._before_evaluation else lambda: True)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note that the Trainer is between two epochs."""
        self._is_after_epoch = True

    def _end_of_step(self, loss_sum: Any, *others: Any, **named: Any) -> None:
        """Decide about a save; the Trainer calls it after each step and each epoch, in place of its own method."""
        loop, control, state = self._loop, self._trainer.control, self._trainer.state
        self._sum = loss_sum
        if self._owed_sum:
            loss_sum += self._owed_sum
            self._owed_sum = 0.0
        if loop.stops:  # An evaluation may take too long; the next attempt does it.
            self._owes_evaluation |= control.should_evaluate
            control.should_evaluate = False
        else:
            self._owes_evaluation = False
        self._is_asked = control.should_save = self._is_asked or control.should_save or loop.wants_save
        if not self._is_after_epoch and state.epoch == int(state.epoch):
            control.should_save = False  # What follows at the epoch's end, an evaluation perhaps, belongs to this step.
        else:
            self._is_asked = False
        if control.should_evaluate:
            self._before_evaluation = BeforeEvaluation(self._trainer, self._run.group)
        self._original_step(loss_sum, *others, **named)
        self._before_evaluation = None
        self._micro_steps.keep(self._own)

    def _save(self, *_: Any) -> None:
        """Save this boundary, in place of the Trainer's own method; leaves at a stop."""
        self._before_evaluation = None  # It is over.
        self._loop.save()

    def _write(self, folder: Path) -> Path:
        """Have the Trainer write this rank's files into a local folder; returns the checkpoint's folder.

        Raises:
            NotFiniteError: the weights are not finite.
        """
        trainer, args, state = self._trainer, self._args, self._trainer.state
        self._refuse_spoilt()
        own = self._micro_steps.go_back() or self._own()
        if self._before_evaluation is not None:
            self._before_evaluation.go_back()
            own["owes_evaluation"] = True
        kept, args.output_dir = args.output_dir, str(folder)
        try:
            self._original_save(trainer.model_wrapped, None)
        finally:
            args.output_dir = kept
        place = folder / f"checkpoint-{state.global_step}"
        place.mkdir(parents=True, exist_ok=True)
        (place / _own_file(self._run.rank)).write_text(json.dumps(own, default=float))
        return place

    def _own(self) -> dict[str, Any]:
        """What this callback saves beside the Trainer's files."""
        trainer = self._trainer
        return {
            "loss_sum": float(self._sum) + self._owed_sum if self._sum is not None else self._owed_sum,
            "logged_sum": trainer._total_loss_scalar,
            "logged": trainer._globalstep_last_logged,
            "owes_evaluation": self._owes_evaluation,
            "ended_at": trainer.state.max_steps if trainer.control.should_training_stop else None,
            "frozen": self._frozen,
            "counts": trl_counts.save(trainer),
            "ahead": self._ahead.save() if self._ahead else None,
        }

    def _refuse_spoilt(self) -> None:
        """Refuse to save weights that are not finite.

        Raises:
            NotFiniteError: a trainable parameter holds NaN or infinity.
        """
        if self._run.config.on_nan == "ignore":
            return
        for name, parameter in self._trainer.model.named_parameters():
            if parameter.requires_grad and not torch.isfinite(local(parameter)).all():
                raise NotFiniteError(
                    f"step {self._trainer.state.global_step}: {name} is not finite (NaN or infinite). "
                    f"{self._loop.last_finite}; a relaunch resumes there"
                )

    # -- the end -------------------------------------------------------------------------------------------------------

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save the last step, and prepare the export of the model."""
        loop, trainer = self._loop, self._trainer
        self._evaluate_owed(state, control)  # At the end of the last epoch.
        for name in ("_save_checkpoint", "_maybe_log_save_evaluate", "_load_rng_state", "get_batch_samples"):
            trainer.__dict__.pop(name, None)
        if loop.is_finished():
            return
        loop.save()
        self._has_ended = True
        loop.export_files = self._save_model
        if trainer.is_fsdp_enabled:  # All ranks have to take part.
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
            made = self._final.enter_context(scratch.folder("final", _bytes_of(trainer.model)))
            self._save_model(made)
            loop.export_files = move_into(made)

    def _save_model(self, folder: Path) -> None:
        """Write the model as the Trainer does, for `final/`."""
        self._trainer.save_model(str(folder), _internal_call=True)
        (folder / "training_args.bin").unlink(missing_ok=True)  # A pickle; it names folders of this machine.


_REFUSED = {
    "load_best_model_at_end": "older checkpoints are pruned. EarlyStoppingCallback and metric_for_best_model work "
    "without it",
    "save_only_model": "a resume needs the optimizer's state",
    "auto_find_batch_size": "a smaller batch would begin the run anew. Set per_device_train_batch_size",
    "enable_jit_checkpoint": "SpotCallback stops at SIGTERM itself",
}


def _own_file(rank: int) -> str:
    """The file in a checkpoint that holds what this callback saves, for each rank."""
    return f"skyspot-{rank}.json"


def _calling_trainer() -> Any:
    """The Trainer that called an event: no event passes it.

    Raises:
        RunError: none did.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if isinstance(found := frame.f_locals.get("self"), Trainer):
            return found
    raise RunError("SpotCallback works with transformers' Trainer and its subclasses only")


def _frameworks(trainer: Any) -> list[str]:
    """TRL, peft, or both, if the trainer or its model comes from there."""
    kinds = (*type(trainer).__mro__, *type(trainer.model).__mro__)
    return sorted({kind.__module__.partition(".")[0] for kind in kinds} & {"peft", "trl"})


def _bytes_of(model: torch.nn.Module) -> int:
    """The expected bytes of a checkpoint: the weights, and two moments of each trained one."""
    return sum(parameter.nbytes * (3 if parameter.requires_grad else 1) for parameter in model.parameters())
