"""The training loop: the same samples, random numbers and learning rate at every step, on any number of ranks.

Step k (counted from 0 here) takes the next B samples of the run's order: [k*B, (k+1)*B), unless B was changed during
the run. They are cut into micro-steps; rank r of w runs the micro-steps r, r+w, ..., and one of zero weight where none
is left, so that every rank joins every collective. `Computation.update` ends a step. Between two steps lies a boundary,
and only boundaries are saved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from trainer.attempt.history import RECORDS_S
from trainer.bucket.hashing import fingerprint
from trainer.checkpoint import buffers, extras
from trainer.checkpoint.finite import NotFiniteError
from trainer.checkpoint.state import not_seen
from trainer.layout.names import CheckpointName
from trainer.machine.loader_workers import died_at_stop
from trainer.ranks.agreement import MESSAGE_INTS, Message, Row, exact_sum
from trainer.ranks.exchange import Exchange
from trainer.training import export, finite, micro_batch, rng
from trainer.training.arguments import agreed_steps, check_arguments
from trainer.training.closing import Closing
from trainer.training.computation import Computation, make_accelerator, refuse_lazy
from trainer.training.config import AUTO
from trainer.training.evaluation import Evaluation
from trainer.training.joining import open_session
from trainer.training.participant import Participant
from trainer.training.report import Report, StepResult
from trainer.training.samples import Loader, MicroStep, Samples
from trainer.training.training_state import TrainingState
from trainer.training.waits import Waits


class Loop:
    """One attempt's training."""

    _ended = False
    """The program has ended training with the last step done, as all ranks have agreed."""

    def __init__(
        self,
        run: Participant,
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
        """Describe the training; the arguments are those of `SpotRun.train`.

        Raises:
            RunError: an argument makes no sense.
        """
        check_arguments(
            model, optimizer, samples, held_out if run.config.eval_interval_steps else None, extra or {}, lr_factor
        )
        self.run, self.config, self.group = run, run.config, run.group
        self.samples, self.held_out, self.save_model = samples, held_out, save_model or export.save_tensors
        self.max_steps = steps = agreed_steps(run.config.max_steps, max_steps)
        accelerator = make_accelerator(run)
        refuse_lazy(model)
        export.check_save_model(self.save_model)
        made = buffers.forms(model)
        unseen = not_seen(model)
        # For its device and its precision. Passes wraps it for several ranks.
        prepared: nn.Module = accelerator.prepare_model(model, evaluation_mode=True)
        scaler = torch.amp.GradScaler(accelerator.device.type) if self.config.precision == "fp16" else None
        self.state = TrainingState(
            self.config, prepared, optimizer, scaler, extra or {}, made, steps, accelerator.device, tokens
        )
        self._report_unsaved(unseen)
        self.weights: list[float] = []
        """The weights of the next step's micro-steps, of all ranks."""
        self._data_s = 0.0
        """Seconds that this rank has waited for its samples, in all."""
        self.loader = Loader(samples, self.state, self.group.rank, self.group.world_size)
        self.computation = Computation(self.state, accelerator, self.group, loss, lr_factor, find_unused_parameters)

    def _report_unsaved(self, unseen: list[str]) -> None:
        """Name what checkpoints leave out of the model."""
        if unseen:
            self.run.print_line(
                f"Not saved: {', '.join(unseen[:5])}. They are in the model's state_dict(), but are neither parameters "
                "nor buffers; implement get_extra_state and set_extra_state to save them."
            )
        if self.state.base.line:
            self.run.print_line(self.state.base.line)

    def train(self) -> None:
        """Train to the end, or leave at a stop."""
        self._begin()
        state, session = self.state, self.session
        self._start_first_step()
        prepared, before, was_ended = False, state.kept.buffers, state.enough
        scheduled = self._scheduled()
        self._ended = was_ended
        while state.done < self.max_steps and not session.stop and not self._ended:
            self.evaluation.run_if_due()
            if session.stop or not self._step():
                break
            if not prepared:
                prepared = True
                self._report_unsaved_buffers(before)
                before = {}
                self._report_unstepped(scheduled)
                session.prepare()
            if session.is_due() and state.done < self.max_steps and not session.stop:
                session.save()
            session.saver.check()
        if session.stop and state.done < self.max_steps and not self._ended:
            self.closing.stop(session.stop)
        if session.stop:
            # The steps come first; then evaluation and export, as far as time allows.
            session.save_last(session.stop)
        # The checkpoint of this step may not say yet that training has ended.
        resave = self.evaluation.run_if_due() or self._ended != was_ended
        self.closing.finish(session.stop, resave)

    # -- the beginning -------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Bind the run, and load its newest whole checkpoint."""
        run, config, state = self.run, self.config, self.state
        run.begin_records()
        self.group.rank0_does("bind", self._bind, run.check_stop)
        extras.refuse_other_names(self.group, state.extra, run.check_stop)
        self.session = open_session(run, state, config.save_interval_steps)
        self._choose_micro_batch()
        self.computation.join(self.samples, run.print_line)
        self.computation.throw_away_pass(self.samples)
        state.enough = False  # Nothing that the loss function does in that pass counts.
        run.check_stop()
        self.session.restore()
        run.skipped = state.watch.skipped
        self.report = Report(run, state, time.monotonic())
        self.evaluation = Evaluation(run, state, self.computation, self.session, self.held_out)
        self.closing = Closing(run, self.session, state, self.report.close, self._export)

    def _choose_micro_batch(self) -> None:
        """Choose the size of the micro-batch, if it is `auto`: the same on all ranks."""
        run, state, whole = self.run, self.state, self.config.global_batch_size
        if self.config.micro_batch_size != AUTO:
            return
        tried: list[int] = []

        def begin() -> list[int]:
            assert run.attempt
            attempt, facts = run.attempt, run.newest.facts if run.newest else {}
            before = run.retry(lambda: micro_batch.too_large_before(attempt), RECORDS_S)
            return micro_batch.first_size(whole, self.group.world_size, state.device_name, facts, before)

        state.micro_batch_size, known = self.group.rank0_does("micro-batch", begin, run.check_stop)
        while not known and not self.group.all_ranks(self.computation.fits(self.samples)):
            tried.append(state.micro_batch_size)
            state.micro_batch_size = micro_batch.smaller(whole, state.micro_batch_size)
        why = "as before" if known else f"{tried[-1]} do not fit into memory" if tried else "they fit into memory"
        run.print_line(f"Micro-batch: {state.micro_batch_size} samples ({why}); {whole} in a step, as ever.")

    def _export(self, last: CheckpointName) -> None:
        export.export(self.run, self.state.model, self.save_model, last)

    def _bind(self) -> None:
        """Rank 0: complete what binds the run, and compare it.

        Raises:
            Leaving: the data has another length than at the run's start, or --allow-config-change names no field.
        """
        if "data_key" not in self.run.binding:  # A data key says more than a length.
            self.run.bind(n_samples=len(self.samples))
        self.run.refuse_unknown_names()

    def _start_first_step(self) -> None:
        """Keep what the first boundary needs, and exchange the weights of the first step's micro-steps."""
        self.state.keep_boundary()
        if self.state.done < self.max_steps:
            own = Row(weights=tuple(micro.weight for micro in self._fetch(self.state.done)))
            self._take_in_weights(self.group.exchange([*Message().to_ints(), *own.to_ints()]).wait())

    def _take_in_weights(self, received: list[list[int]]) -> list[Row]:
        """Keep the weights of the next step, if the rows carry them; returns what the rows say of micro-steps."""
        rows = [Row.from_ints(row[MESSAGE_INTS:]) for row in received]
        self.weights = [weight for row in rows for weight in row.weights]
        return rows

    def _report_unsaved_buffers(self, before: buffers.Kept) -> None:
        """Name each buffer that steps change and no checkpoint holds: a resume would train differently."""
        for name in buffers.not_kept(before, self.state.kept.buffers, self.state.model):
            self.run.print_line(
                f"Buffer {name} changes during training but is not persistent: it is not saved, and a resume starts "
                "with its initial value. register_buffer(..., persistent=True) saves it."
            )

    def _scheduled(self) -> dict[str, int]:
        """How often each scheduler of the optimizer in `extra` was stepped, by name."""
        extra, optimizer = self.state.extra, self.state.optimizer
        found = {name: thing for name, thing in extra.items() if isinstance(thing, LRScheduler)}
        return {name: thing.last_epoch for name, thing in found.items() if thing.optimizer is optimizer}

    def _report_unstepped(self, before: Mapping[str, int]) -> None:
        """Name each scheduler that the first step did not step: `train` never does."""
        for name in [name for name, count in self._scheduled().items() if count == before[name]]:
            self.run.print_line(
                f"train(extra={{{name!r}: ...}}): train() does not step this {type(self.state.extra[name]).__name__}, "
                "and the first step's hooks did not. Step it in optimizer.register_step_post_hook, with the same "
                "values on all processes, or write the loop yourself: docs/your-own-script.md"
            )

    # -- a step --------------------------------------------------------------------------------------------------------

    def _step(self) -> bool:
        """Do one step; False where it is dropped, because a stop leaves no time or the program has ended training."""
        while (done := self._try_step()) is None:
            self._halve_micro_batch()
        return done

    def _halve_micro_batch(self) -> None:
        """Cut the step under way into smaller micro-steps, because memory ran out on a rank. Nothing of it was kept."""
        state, run = self.state, self.run
        size = state.micro_batch_size
        self._drop_step()
        state.micro_batch_size = micro_batch.smaller(self.config.global_batch_size, size)
        self.computation.ran_out = False
        self.loader.forget()
        run.print_line(
            f"step {state.done + 1}: out of memory with a micro-batch of {size}; done again with "
            f"{state.micro_batch_size}"
        )
        self._start_first_step()

    def _fetch(self, step: int) -> list[MicroStep]:
        """This rank's micro-steps of a step (from 0).

        Where a loader's worker has died at a stop, the step under way is dropped, and the last boundary saved: nothing
        is fetched once the optimizer has begun. Other ranks may have gone on.
        """
        started = time.monotonic()
        try:
            return self.loader.fetch(step)
        except RuntimeError as error:
            if self.group.world_size == 1 and died_at_stop(error, self.run.stop_received):
                self._drop_step()
                self.session.take_in([self.session.message()])
                if self.session.stop:
                    self.closing.stop(self.session.stop)
            raise
        finally:
            self._data_s += time.monotonic() - started

    def _drop_step(self) -> None:
        """Drop the gradients of a step, and what its forward passes have changed."""
        self.state.optimizer.zero_grad(set_to_none=True)
        self.state.put_back_boundary()

    def _try_step(self) -> bool | None:
        """Do one step, as `_step`; None where memory ran out on a rank."""
        state, session = self.state, self.session
        started, busy = time.monotonic(), not session.saver.idle
        held_s, data_s = session.saver.held_s, self._data_s
        step, micros = state.done, self._fetch(state.done)
        total, losses, rows = exact_sum(self.weights), [], list[Row]()
        for number, micro in enumerate(micros):
            last = number == len(micros) - 1
            round_started = time.monotonic()
            weights: tuple[float, ...] = ()
            if last and step + 1 < self.max_steps:
                weights = tuple(part.weight for part in self._fetch(step + 1))
            loss, exchange = self._micro_step(step, micro, total, last, weights)
            losses.append(loss)
            received = exchange.wait()
            rows += self._take_in_weights(received)
            session.take_in(received, round_started)
            if not number and step and session.consensus.enough:
                self._ended = state.enough = True
            stops = session.stop and not last and not session.leaves_time(len(micros) - number - 1)
            if self._ended or stops:
                self._drop_step()
                return False
        if self.config.micro_batch_size == AUTO and not self.group.all_ranks(not self.computation.ran_out):
            return None
        norm, overflow = self.computation.clip()
        gathered = self.computation.gather(losses, norm)
        # The scaler deals with an overflow of fp16: it is no fault.
        trouble = finite.trouble(gathered.losses, [] if overflow else gathered.norms)
        lr = self.computation.update(step, self._is_dropped(step, trouble), session.await_copied)
        state.done = self.run.steps_done = step + 1
        state.keep_boundary()
        seconds = time.monotonic() - started
        if self.run.journal:
            session.take_in_costs(seconds, busy)
        waits = Waits(session.saver.held_s - held_s, self._data_s - data_s)
        result = StepResult(gathered.losses, rows, lr, norm, total, seconds, waits)
        self.report.step(result, session.saver.committed_step)
        if state.watch.is_enough:
            self._end_not_finite(trouble)
        return True

    def _micro_step(
        self, step: int, micro: MicroStep, total: float, last: bool, weights: tuple[float, ...]
    ) -> tuple[torch.Tensor, Exchange]:
        """Run one micro-step; returns its loss sum, and the exchange that goes on at the same time."""
        with rng.seeded(rng.micro_step_seed(self.config.seed, step, micro.index)):
            row = self._row(micro, weights)
            exchange = self.group.exchange([*self.session.message(self.state.enough), *row.to_ints()])
            with self.group.detect_lost_peer(exchange):
                return self.computation.forward_and_backward(micro, total, last), exchange

    def _row(self, micro: MicroStep, weights: tuple[float, ...]) -> Row:
        """What this rank says of its micro-step, whose generators are seeded already."""
        if not micro.weight > 0:
            return Row(weights=weights)
        return Row(
            fingerprint(micro.index, micro.ids.tobytes()), fingerprint(micro.index, torch.initial_seed()), weights
        )

    def _is_dropped(self, step: int, trouble: str | None) -> bool:
        """Count and print values that are not finite; returns whether to drop the update of the step."""
        watch, on_nan = self.state.watch, self.config.on_nan
        dropped = watch.step(trouble)
        if trouble and watch.should_report():
            after = "; training goes on, and this is printed once"
            if on_nan != finite.IGNORE:
                limit, in_total = finite.IN_A_ROW[on_nan], f", {watch.skipped} in total" if dropped else ""
                after = "; its update is dropped" if dropped else ""
                after += f" ({watch.row} in a row{in_total}; the run ends after {limit} in a row)"
            self.run.print_line(f"step {step + 1}: {trouble}{after}")
        self.run.skipped = watch.skipped
        return dropped

    def _end_not_finite(self, trouble: str | None) -> NoReturn:
        """End the run after too many steps that are not finite. Never returns."""
        self.session.saver.wait()
        skip = "; --on-nan skip drops such updates" if self.config.on_nan == finite.STOP else ""
        raise NotFiniteError(
            f"step {self.state.done}: {trouble}, as in the {self.state.watch.row - 1} steps before. "
            f"{self.session.saver.last_finite()}; a relaunch resumes there. Check the learning rate and the data{skip}"
        )
