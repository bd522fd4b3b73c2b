"""The training loop: the same samples, random numbers and learning rate at every step, on whatever ranks are there.

Step k (counted from 0 here) takes the next B samples of the run's order: [k*B, (k+1)*B), unless B was changed on the
way. They are cut into micro-steps; rank r of w runs the micro-steps r, r+w, ..., and one of zero weight where it has
none, so that every rank joins every collective.
All that a step changes is changed in `_apply`; between two steps lies a boundary, and only boundaries are saved.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from trainer.attempt.ending import STOP_REQUEST, STOPS, Hold, Leaving
from trainer.attempt.history import RECORDS_S
from trainer.attempt.notices import Notice
from trainer.attempt.record import record, superseded
from trainer.bucket.deadlines import within
from trainer.bucket.hashing import fingerprint
from trainer.bucket.retry import retry
from trainer.checkpoint import buffers, extras, interval, state
from trainer.checkpoint.boundary import Boundary
from trainer.checkpoint.finite import NotFiniteError, watched
from trainer.checkpoint.names import unwrap
from trainer.checkpoint.restore import NOT_FINITE, find_whole
from trainer.checkpoint.saving import SavePolicy, Saver
from trainer.errors import RunError
from trainer.layout.exit_codes import STOP_REQUEST_S
from trainer.layout.names import CheckpointName
from trainer.ranks.agreement import KINDS, MASK, Row, Stop, exact_sum, from_bits, to_bits
from trainer.ranks.exchange import Exchange
from trainer.training import changes, export, finite, gradients, rng
from trainer.training.display import Progress
from trainer.training.metrics import Records, last_step_done
from trainer.training.order import micro_steps, step_ids
from trainer.training.participant import Participant

MAX_THREADS = 1024
SAY_WAITED_S = 1.0
"""A wait of training's for a save that is worth a word."""


class Samples(Protocol):
    """What a run trains on: a map-style data set that makes its own batches."""

    def __len__(self) -> int:
        """How many samples there are."""

    def batch(self, ids: np.ndarray) -> Any:
        """The samples of these ids as a tree of tensors, on the CPU; a pure function of the ids."""

    def weight(self, batch: Any) -> float:
        """How many terms the sum of losses over this batch has (tokens, or samples), or what they weigh together."""


@dataclass(frozen=True)
class Micro:
    """One micro-step of one rank."""

    index: int
    """Its number in the step, from 0."""
    ids: np.ndarray
    batch: Any
    weight: float
    """0 where the rank only keeps the others company."""


@dataclass(frozen=True)
class Said:
    """What the ranks told each other of a step's end."""

    losses: list[float]
    """Sums, in the order of micro-steps."""
    norms: list[float]
    """Of the gradients, by rank."""


class Loop:
    """One attempt's training."""

    def __init__(
        self,
        run: Participant,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        samples: Samples,
        loss: Callable[[nn.Module, Any], torch.Tensor],
        max_steps: int | None = None,
        lr_factor: Callable[[int], float] = lambda step: 1.0,
        held_out: Samples | None = None,
        save_model: Callable[..., None] = export.save_tensors,
        extra: Mapping[str, Any] | None = None,
        tokens: str | None = None,
    ) -> None:
        """Describe the training.

        Args:
            run: The attempt.
            model: On any device, with its initial weights: the same on every rank.
            optimizer: Over the model's parameters.
            samples: What to train on.
            loss: (model, batch) -> the *sum* of the losses over the batch, 0-d.
            max_steps: Where training ends; the config's where None. Better said in the config: only that is known
                when an attempt begins and looks whether the run is finished.
            lr_factor: What each group's initial learning rate is multiplied by, for the step (from 1) about to be done.
            held_out: What to evaluate on, every `eval_interval_steps`.
            save_model: Writes the trained model into an empty local folder, for `final/`. Where it takes `write` too
                (`export.Write`), it may stream large tensors through that, and no local disk has to hold them.
            extra: Objects with `state_dict` and `load_state_dict`, saved with the model (an EMA copy, say).
            tokens: The folder of prepared data that the checkpoints shall name.
        """
        self.run_, self.config, self.group = run, run.config, run.group
        self.samples, self.loss, self.lr_factor, self.held_out = samples, loss, lr_factor, held_out
        self.save_model, self.extra, self.tokens = save_model, dict(extra or {}), tokens
        steps = max_steps if max_steps is not None else run.config.max_steps
        if steps is None:
            raise RunError("max_steps: neither the config nor train() says where training ends")
        self.max_steps = steps
        self.optimizer = optimizer
        self.accelerator = self._accelerator()
        self.device = self.accelerator.device
        _refuse_lazy(model)
        export.check_save_model(save_model)
        self.made = buffers.forms(model)
        if unseen := state.not_seen(model):
            run.say(
                f"not saved: {', '.join(unseen[:5])}: the model's state_dict() has them besides its parameters and "
                "buffers; get_extra_state and set_extra_state would have them saved"
            )
        self.model: nn.Module = self.accelerator.prepare(model)
        self.scaler = torch.amp.GradScaler(self.device.type) if self.config.precision == "fp16" else None
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self.begun = copy.deepcopy(state.options_of(optimizer))
        self.done = 0
        self.offset = 0
        """By how much the samples consumed are more than the steps done make, after the global batch size changed."""
        self.evaluated = 0
        self.watch = finite.Watch(self.config.on_nan)
        self.watched = watched(self.model)
        self.stop: Stop | None = None
        self.round_s = 0.0
        self.left_s = 0.0
        """Until the agreed stop's deadline, when the ranks last told each other: the same on all."""
        self.restored_at = 0.0
        self.saved_at = 0
        """The boundary that was last saved, or restored."""
        self.save_every = 0
        """Steps between checkpoints, as all ranks heard it from rank 0."""
        self.interval = interval.Interval(
            self.config.save_interval_steps, interval.notice_seconds(run.grace_s), self._tell_interval
        )
        self._said_slow = False
        self._weights: list[float] = []
        """Of the next step's micro-steps, of all ranks."""
        self._buffers: buffers.Kept = {}
        self._fetched: dict[int, list[Micro]] = {}
        self.threads = torch.get_num_threads()

    def _accelerator(self) -> Accelerator:
        if self.config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        # Accumulation is this loop's own; the variable would override the argument.
        os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
        on_gpu = torch.cuda.is_available() and not self.config.cpu
        self.run_.await_all_ready()
        self.group.form_groups(on_gpu)
        if self.group.world_size == 1:
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
                os.environ.pop(name, None)  # Alone, accelerate would take them as a reason to open a port.
        # fp16 brings torch's own scaler instead: accelerate has none on the CPU.
        precision = "bf16" if self.config.precision == "bf16" else "no"
        accelerator = Accelerator(cpu=not on_gpu, mixed_precision=precision, gradient_accumulation_steps=1)
        assert accelerator.gradient_accumulation_steps == 1
        assert accelerator.num_processes == self.group.world_size
        return accelerator

    # -- the attempt, top to bottom ----------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end, or leave on the way."""
        run = self.run_
        records = Records(run.attempt) if run.attempt else None
        run.records = records
        self.records = records
        policy = SavePolicy(self.config.keep_latest, self.config.keep_every, self.config.save_failures)
        self.group.rank0_does("bind", self._bind, run.check_stop)
        extras.refuse_other_names(self.group, self.extra, run.check_stop)
        self.saver = Saver(self.group, run.paths, run.attempt, records, policy, run.say, run.notices.heard)
        run.trouble = lambda: self.saver.trouble
        self.throw_away_pass()
        run.check_stop()
        self.restore()
        self.progress = Progress(self.max_steps, self.done) if run.rank == 0 else None
        self._keep_buffers()
        if self.done < self.max_steps:
            row = Row(weights=tuple(micro.weight for micro in self._fetch(self.done)))
            self._hear([self.group.exchange(row.to_ints()).wait()], None)
        prepared, before = False, self._buffers
        while self.done < self.max_steps and not self.stop:
            self._evaluate_if_due()
            if self.stop or not self._step():
                break
            if not prepared:
                prepared = True
                self._say_what_is_not_saved(before)
                before = {}
                self.saver.prepare(extras.split(self.group, self._whole_state({}))[0])
            if self._save_is_due() and self.done < self.max_steps and not self.stop:
                self._save()
            self.saver.check()
        if self.stop and self.done < self.max_steps:
            self._end_at(self.stop)
        if self.stop:
            self._save_last(self.stop.deadline)  # First what could not be had again; then the rest, as far as it gets.
        self._finish(again=self._evaluate_if_due())

    def _bind(self) -> None:
        """Rank 0: all that binds the run is known by now.

        Raises:
            Leaving: the data is of another length than the run was begun with, or what may change is no name.
        """
        if "data_key" not in self.run_.binding:  # That says more than a length does.
            self.run_.bind(n_samples=len(self.samples))
        self.run_.refuse_unknown_names()

    def throw_away_pass(self) -> None:
        """One forward and backward whose results are dropped, before anything is restored.

        DistributedDataParallel regroups its buckets after the first backward pass it sees. Without this pass that
        would be the first step after a resume, whose sums would then run in another order than the undisturbed run's.
        """
        ids = micro_steps(step_ids(self.config.seed, len(self.samples), self.config.global_batch_size, 0),
                          self.config.micro_batch_size)[0]  # fmt: skip
        kept = buffers.keep(self.model)
        with rng.seeded(rng.micro_step_seed(self.config.seed, 0, 0)):
            batch = self.samples.batch(ids)
            loss = self._forward(batch) / (_weigh(self.samples, batch) or 1)
            (self.scaler.scale(loss) if self.scaler else loss).backward()
        self.optimizer.zero_grad(set_to_none=True)
        buffers.put_back(self.model, kept)

    def restore(self) -> None:
        """Load the newest whole checkpoint, if there is one; records it and says so in a line."""
        run, started = self.run_, time.monotonic()
        found = find_whole(
            self.group, run.paths, self._whole_state({}), run.check_stop, run.run_id,
            only_finite=self.config.on_nan != finite.IGNORE,
        )  # fmt: skip
        counters: dict[str, Any] = {}
        checkpoint_name: CheckpointName | None = None
        is_finite, changed = True, dict[str, list[Any]]()
        if found.loaded:
            manifest = found.loaded.manifest
            tensors, plain, first_ranks = extras.joined(
                found.loaded.tensors,
                found.loaded.plain,
                self.group.rank,
                self.group.world_size,
                manifest.facts.get("world_size"),
            )
            counters, extra = state.apply(self.model, [self.optimizer], tensors, plain, [self.begun], self.made)
            if first_ranks:
                run.say(
                    "extra: each process had values of its own, and now there are other processes: all go on with the "
                    "first one's"
                )
            self._load_extra(extra, checkpoint_name=str(found.loaded.name))
            if self.scaler and counters.get("scaler"):
                self.scaler.load_state_dict(counters["scaler"])
            self.done, self.evaluated = manifest.step, counters.get("evaluated")
            if counters.get("step") != self.done or type(self.evaluated) is not int:
                raise state.StateError(f"checkpoint {found.loaded.name}: its state.json is of another step")
            if self.done > self.max_steps:
                raise RunError(
                    f"{run.paths.root} stands at step {self.done} already, which is beyond the {self.max_steps} steps "
                    "asked for: ask for as many or more, or give the run another name"
                )
            if manifest.facts.get("world_size") == self.group.world_size:
                own = found.loaded.tensors.get(f"{state.RANDOM}{self.group.rank}")
                if own is not None:
                    rng.load_streams(own)
                machine = manifest.facts.get("machine")
                threads = machine.get("threads") if isinstance(machine, Mapping) else None
                if type(threads) is int and 0 < threads <= MAX_THREADS:
                    self.threads = threads
                torch.set_num_threads(self.threads)
            changed = changes.changes(manifest.facts, self._facts())
            checkpoint_name, is_finite = found.loaded.name, manifest.finite
            self.watch.load_state_dict(counters.get("watch"))
            run.skipped = self.watch.skipped
            samples = manifest.facts.get("samples")
            if type(samples) is int and samples >= 0:
                self.offset = samples - self.done * self.config.global_batch_size
            if self.records:
                self.records.history = list(manifest.facts.get("metrics", []))
        self.saver.adopt(str(run.attempt_name), checkpoint_name, is_finite)
        self.saved_at = self.done
        run.steps_done, run.committed_step = self.done, self.saver.committed_step
        self._whole_state({})  # What could not be saved is refused now, not at the first save.
        self.restored_at = time.monotonic()
        seconds = self.restored_at - started
        # What the attempts before this one tell takes a request each: the others wait for it, and not in a collective.
        self.group.rank0_does(
            "restored", lambda: self._record_restore(checkpoint_name, found.rejected, changed, seconds), run.check_stop
        )

    def _load_extra(self, saved: Mapping[str, Any], checkpoint_name: str) -> None:
        """Load what a user registered.

        Raises:
            StateError: other things are registered than were saved.
        """
        for name in sorted(saved.keys() ^ self.extra.keys()):
            raise state.StateError(
                f"extra {name!r} is registered, and checkpoint {checkpoint_name} has none: a run goes on with what it "
                "was begun with; begin another one"
                if name in self.extra
                else f"checkpoint {checkpoint_name} has extra {name!r}, which would be lost: register it as before"
            )
        for name, thing in self.extra.items():
            thing.load_state_dict(saved[name])

    def _record_restore(
        self,
        name: CheckpointName | None,
        rejected: list[dict[str, str]],
        changed: dict[str, list[Any]],
        seconds: float,
    ) -> None:
        """Rank 0: record the restore, say it in a line, and learn what this run's saves have cost so far."""
        run, attempt = self.run_, self.run_.attempt
        assert attempt
        done = retry(run.paths, lambda: last_step_done(attempt), run.check_stop, begun=True, limit_s=RECORDS_S)
        lost = max(0, done - self.done)
        fields = {
            "step": self.done,
            "samples": self.samples_done,
            "checkpoint": str(name) if name else None,
            "from_attempt": str(name.attempt) if name else None,
            "lost_steps": lost,
            "seconds": round(seconds, 4),
            "rejected": rejected,
            "changed": changed,
        }
        retry(run.paths, lambda: record(attempt, "restored", **fields), run.check_stop, begun=True)
        for refused in rejected:
            passed = refused["reason"].startswith(NOT_FINITE)
            what = "is passed by" if passed else "is not whole"
            more = ". --on-nan ignore would take it" if passed else ""
            run.say(f"checkpoint {refused['checkpoint']} {what}: {refused['reason']}; taking the one before{more}")
        if name:
            run.say(
                f"resumed at step {self.done} from checkpoint {name} of attempt {name.attempt}: "
                f"{self.samples_done} samples consumed, {lost} lost steps, {seconds:.1f} s"
            )
            if changed:
                run.say(changes.sentence(self.done, changed))
        elif lost or rejected:
            run.say(f"starting from step 0: no whole checkpoint yet, {lost} lost steps")
        with within("reading the attempts' records", RECORDS_S):
            self.interval.learn(run.paths, attempt.name, self.done)

    @property
    def samples_done(self) -> int:
        """How many samples the run has consumed."""
        return self.done * self.config.global_batch_size + self.offset

    # -- a step ------------------------------------------------------------------------------------------------------

    def _fetch(self, step: int) -> list[Micro]:
        """This rank's micro-steps of a step."""
        if step in self._fetched:
            return self._fetched[step]
        ids = step_ids(self.config.seed, len(self.samples), self.config.global_batch_size, step, self.offset)
        parts = micro_steps(ids, self.config.micro_batch_size)
        rank, ranks = self.group.rank, self.group.world_size
        mine = []
        for first in range(0, len(parts), ranks):
            index = first + rank
            part = parts[index] if index < len(parts) else parts[0]
            batch = self.samples.batch(part)
            weight = _weigh(self.samples, batch) if index < len(parts) else 0.0
            mine.append(Micro(index, part, batch, weight))
        self._fetched = {key: value for key, value in self._fetched.items() if key >= step}
        self._fetched[step] = mine
        return mine

    def _step(self) -> bool:
        """Do one step; False where a stop came that left no time for it (nothing has changed then)."""
        started, busy = time.monotonic(), not self.saver.idle
        step, micros = self.done, self._fetch(self.done)
        total, losses, rows = exact_sum(self._weights), [], []
        for number, micro in enumerate(micros):
            last = number == len(micros) - 1
            round_started = time.monotonic()
            weights: tuple[float, ...] = ()
            if last and step + 1 < self.max_steps:
                weights = tuple(part.weight for part in self._fetch(step + 1))
            loss, told = self._micro_step(step, micro, total, last, weights)
            losses.append(loss)
            rows.append(told.wait())
            self._hear(rows[-1:], round_started)
            if self.stop and not last and not self._fits(len(micros) - number - 1, Row.from_ints(rows[-1][0])):
                self.optimizer.zero_grad(set_to_none=True)
                buffers.put_back(self.model, self._buffers)
                return False
        norm, overflow = self._clip()
        said = self._gather_losses(losses, norm)
        # An overflow of half precision is the scaler's matter, and no fault.
        trouble = finite.trouble(said.losses, [] if overflow else said.norms)
        lr = self._apply(step, self._is_dropped(step, trouble))
        self.done = self.run_.steps_done = step + 1
        self._keep_buffers()
        seconds = time.monotonic() - started
        if self.records:
            self._take_in_costs(seconds, busy)
        self._after_step(step, said.losses, rows, lr, norm, total, seconds)
        if self.watch.is_enough:
            self._end_not_finite(trouble)
        return True

    def _micro_step(
        self, step: int, micro: Micro, total: float, last: bool, weights: tuple[float, ...]
    ) -> tuple[torch.Tensor, Exchange]:
        """Forward and backward of one micro-step; returns its loss sum and the exchange that was begun beside it."""
        with rng.seeded(rng.micro_step_seed(self.config.seed, step, micro.index)):
            told = self.group.exchange(self._row(micro, weights).to_ints())
            with self.group.detect_lost_peer(told):
                return self._forward_and_backward(micro, total, last), told

    def _forward_and_backward(self, micro: Micro, total: float, last: bool) -> torch.Tensor:
        kept = {} if micro.weight else buffers.keep(self.model)
        wait = nullcontext() if last else self.accelerator.no_sync(self.model)
        with wait:
            loss = self._forward(micro.batch)
            scaled = loss * (float(bool(micro.weight)) * self.group.world_size / (total or 1))
            (self.scaler.scale(scaled) if self.scaler else scaled).backward()
        buffers.put_back(self.model, kept)
        return loss.detach()

    def _forward(self, batch: Any, model: nn.Module | None = None) -> torch.Tensor:
        half: AbstractContextManager[Any] = nullcontext()
        if self.config.precision == "fp16":
            half = torch.autocast(self.device.type, torch.float16)
        with half:
            return self.loss(model or self.model, to_device(batch, self.device))

    def _row(self, micro: Micro | None = None, weights: tuple[float, ...] = ()) -> Row:
        notice = self.run_.notices.first()
        now = time.monotonic()
        save_s = (self.saver.commit_s or 0.0) if self.saver.commit_s is not None else 0.0
        counted = micro is not None and micro.weight > 0
        requested = bool(self.records and self.records.stop_requested)
        kind = notice.kind if notice else "stop-request" if requested else ""
        left = [notice.deadline - now] if notice else [STOP_REQUEST_S] if requested else []
        if self.stop:
            left.append(self.stop.deadline - now)
        return Row(
            stop=KINDS.index(kind),
            left_ms=max(0, round(min(left, default=0.0) * 1000)),
            superseded=int(bool(self.records and self.records.superseded_by)),
            order=fingerprint(micro.index, micro.ids.tobytes()) if counted and micro else 0,
            rng=fingerprint(micro.index, torch.initial_seed()) if counted and micro else 0,
            round_ms=round(self.round_s * 1000),
            save_ms=math.ceil(save_s * 1000),
            save_every=self.interval.steps if self.run_.rank == 0 else 0,
            weights=weights,
        )

    def _hear(self, rounds: Sequence[list[list[int]]], round_started: float | None) -> None:
        """Take over what all ranks said in a round: the same conclusion on every rank.

        `round_started` is None where it was no round of a step: its time says nothing of how long one takes.
        """
        rows = [Row.from_ints(row) for row in rounds[-1]]
        self._weights = [weight for row in rows for weight in row.weights]
        self.save_every = rows[0].save_every
        if round_started is not None:
            seconds = time.monotonic() - round_started
            self.round_s = seconds if not self.round_s else 0.8 * self.round_s + 0.2 * seconds
        asked = [row for row in rows if row.stop or self.stop]
        first = min(asked, key=lambda row: row.left_ms, default=Row())
        self.left_s = first.left_ms / 1000
        if self.stop:
            return
        if rows[0].superseded:
            self.stop = Stop("superseded", time.monotonic())
        elif asked:
            self.stop = Stop(KINDS[first.stop], time.monotonic() + self.left_s)
        if self.stop:
            self.run_.stopping = self.stop.ending
            self.saver.hurry(self.stop.deadline)

    def _fits(self, rounds_left: int, rank0: Row) -> bool:
        """Whether the rest of this step and a save fit before the deadline: from what all ranks were told alike."""
        assert self.stop
        if not self.stop.ending.saves:
            return False
        return rounds_left * rank0.round_ms + 1.5 * rank0.save_ms < 1000 * self.left_s

    def _clip(self) -> tuple[float, bool]:
        """Clip the gradients; (their norm before, whether the loss scale of half precision was too high for them)."""
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        norm = float(gradients.clip(self.model, self.config.max_grad_norm))
        # A scale that was lowered to 1 and is too high still is none: what is not finite comes from elsewhere.
        overflow = self.scaler is not None and not math.isfinite(norm) and self.scaler.get_scale() > 1
        return norm, overflow

    def _is_dropped(self, step: int, trouble: str | None) -> bool:
        """Take in what of a step is not finite, and say it; whether the step's update is to be dropped."""
        dropped = self.watch.step(trouble)
        if trouble and self.watch.worth_saying():
            after = "; training goes on, and this is said once"
            if self.config.on_nan != finite.IGNORE:
                limit, all_ = finite.IN_A_ROW[self.config.on_nan], f", {self.watch.skipped} in all" if dropped else ""
                after = "; its update is dropped" if dropped else ""
                after += f" ({self.watch.row} in a row{all_}; the run ends after {limit} in a row)"
            self.run_.say(f"step {step + 1}: {trouble}{after}")
        self.run_.skipped = self.watch.skipped
        return dropped

    def _end_not_finite(self, trouble: str | None) -> None:
        """End the run; never returns."""
        self.saver.wait()
        skip = "; --on-nan skip drops such updates" if self.config.on_nan == finite.STOP else ""
        raise NotFiniteError(
            f"step {self.done}: {trouble}, as in the {self.watch.row - 1} steps before. {self.saver.last_finite()}: a "
            f"relaunch goes on from there. Look at the learning rate and the data{skip}"
        )

    def _apply(self, step: int, dropped: bool) -> float:
        """Set the learning rate from the global step, and let the optimizer step unless it is dropped; the LR."""
        factor = self.lr_factor(step + 1)
        self.saver.await_copied()
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        if dropped:
            buffers.put_back(self.model, self._buffers)
        elif self.scaler:
            self.scaler.step(self.optimizer)  # A step that the scaler skips for an overflow counts as a step.
        else:
            self.optimizer.step()
        if self.scaler:
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return float(self.optimizer.param_groups[0]["lr"])

    def _after_step(
        self,
        step: int,
        losses: list[float],
        rows: list[list[list[int]]],
        lr: float,
        norm: float,
        total: float,
        seconds: float,
    ) -> None:
        """Rank 0 writes the line of metrics and shows the progress."""
        if self.run_.attempt is None or self.records is None or self.progress is None:
            return
        # Summed in the order of micro-steps, so that the sum does not depend on which rank ran which.
        loss = finite_or_none(math.fsum(losses) / (total or 1)) if all(map(math.isfinite, losses)) else None
        told = [Row.from_ints(row) for round_ in rows for row in round_]
        order, seeds = sum(row.order for row in told) & MASK, sum(row.rng for row in told) & MASK
        skipped = {"skipped": self.watch.skipped} if self.watch.skipped else {}
        self.records.line(
            {
                "step": step + 1,
                "loss": loss,
                "lr": lr,
                "samples": self.samples_done,
                "order": f"{order:016x}",
                "rng": f"{seeds:016x}",
                "tokens": total,
                "grad_norm": finite_or_none(norm),
                "step_s": round(seconds, 5),
                "world_size": self.group.world_size,
                **skipped,
            }
        )
        tokens_per_s, eta_s = self.progress.rates(self.done, total)
        committed = self.saver.committed_step
        self.records.progress(
            {
                "step": self.done,
                "max_steps": self.max_steps,
                "loss": loss,
                "lr": lr,
                "tokens_per_s": round(tokens_per_s, 1),
                "committed_step": committed,
                "eta_s": round(eta_s, 1),
                **skipped,
            }
        )
        self.progress.step(self.done, loss, lr, tokens_per_s, eta_s, committed)
        self.run_.committed_step = committed
        if self.restored_at:
            now = time.monotonic()
            self.records.event(
                "first-step",
                step=self.done,
                seconds=round(now - self.run_.launched_at, 3),
                after_restore_s=round(now - self.restored_at, 3),
            )
            self.restored_at = 0.0

    def _gather_losses(self, losses: list[torch.Tensor], norm: float) -> Said:
        """What the step gave on all ranks."""
        mine = torch.stack(losses).double().tolist()
        rows = self.group.exchange([to_bits(value) for value in (*mine, norm)]).wait()
        # Some ranks' last micro-steps may only have kept the others company.
        count = -(-self.config.global_batch_size // self.config.micro_batch_size)
        ordered = [from_bits(row[number]) for number in range(len(mine)) for row in rows]
        return Said(ordered[:count], [from_bits(row[-1]) for row in rows])

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _evaluate_if_due(self) -> bool:
        """Evaluate where this boundary asks for it and it has not been done; whether it was."""
        every = self.config.eval_interval_steps
        if not self.held_out or not every or not self.done or self.done % every or self.evaluated >= self.done:
            return False
        started = time.monotonic()
        loss = self._evaluate()
        if loss is None:
            return False
        self.evaluated = self.done
        if self.records:
            self.records.line(
                {"step": self.done, "eval_loss": finite_or_none(loss), "eval_s": round(time.monotonic() - started, 4)}
            )
            self.run_.say(f"step {self.done}  held-out loss {loss:.4f}")
        return True

    def _evaluate(self) -> float | None:
        """The mean loss over the held-out samples; None where a stop was agreed on meanwhile and steps are left."""
        assert self.held_out
        parts = micro_steps(np.arange(len(self.held_out)), self.config.micro_batch_size)
        model, ranks = unwrap(self.model), self.group.world_size
        losses, weights = [], []
        modes = {module: module.training for module in model.modules()}
        # Each rank has seen other samples since: all evaluate the model that would be saved.
        own = buffers.keep(model)
        self._refuse_unlike_buffers(model)
        self.group.broadcast(tensor for _, tensor in model.named_buffers())
        model.eval()
        try:
            with rng.set_aside(), torch.no_grad():
                for first in range(0, len(parts), ranks):
                    told = self.group.exchange(self._row().to_ints())
                    index = first + self.group.rank
                    if index < len(parts):
                        batch = self.held_out.batch(parts[index])
                        losses.append(float(self._forward(batch, model)))
                        weights.append(_weigh(self.held_out, batch))
                    heard, kept = told.wait(), self._weights
                    self._hear([heard], None)
                    self._weights = kept
                    if self.stop and self.done < self.max_steps:
                        return None
        finally:
            buffers.put_back(model, own)
            for module, training in modes.items():  # Not model.train(): some may be frozen in eval mode.
                module.training = training
        weights += [0.0] * (-(-len(parts) // ranks) - len(weights))
        rows = self.group.exchange([to_bits(value) for value in (math.fsum(losses), *weights)]).wait()
        total = exact_sum(from_bits(bits) for row in rows for bits in row[1:])
        return math.fsum(from_bits(row[0]) for row in rows) / (total or 1)

    # -- boundaries --------------------------------------------------------------------------------------------------

    def _keep_buffers(self) -> None:
        self._buffers = buffers.keep(self.model)

    def _refuse_unlike_buffers(self, model: nn.Module) -> None:
        """See that rank 0's buffers fit the others': a broadcast would hang, or mix them up.

        Raises:
            StateError: they do not.
        """
        own = [f"{name}{buffers.form(tensor)}" for name, tensor in model.named_buffers()]
        rows = self.group.exchange([fingerprint(*own)]).wait()
        if any(row != rows[0] for row in rows):
            raise state.StateError(
                "the ranks' buffers differ in their names or shapes: rank 0's count, and fit no other"
            )

    def _say_what_is_not_saved(self, before: buffers.Kept) -> None:
        """A buffer that steps change, and that is not persistent, makes a resume another training: worth a line."""
        for name in buffers.not_kept(before, self._buffers, self.model):
            self.run_.say(
                f"buffer {name} changes as the model trains and is not persistent: it is not saved, and a resume "
                "begins with it as the program makes it (register_buffer(..., persistent=True) saves it)"
            )

    def _whole_state(self, counters: Mapping[str, Any]) -> state.State:
        extra = {name: thing.state_dict() for name, thing in self.extra.items()}
        return state.collect(self.model, [self.optimizer], counters, extra, [self.begun], self.made)

    def _boundary(self, *, last: bool = False) -> Boundary:
        """What is to be saved of where the run stands."""
        counters = {
            "step": self.done,
            "evaluated": self.evaluated,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "watch": self.watch.state_dict(),
        }
        whole, own = extras.split(self.group, self._whole_state(counters))
        rank = self.group.rank
        facts = self._facts() if self.run_.attempt else None
        if self.records:
            self.records.cut()
        return Boundary(
            step=self.done,
            samples=self.samples_done,
            state=whole,
            own={f"{state.RANDOM}{rank}": rng.save_streams(), **own},
            plain=whole.plain if rank == 0 else None,
            facts=facts,
            last=last,
            watched=self.watched | {name for name in whole.tensors if name.startswith("optim.")},
            spoilt_ends=self.config.on_nan != finite.IGNORE and not self.watch.row,
        )

    def _facts(self) -> dict[str, Any]:
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        return {
            "run_id": self.run_.run_id,
            "step": self.done,
            "samples": self.samples_done,
            "world_size": self.group.world_size,
            "attempt": str(self.run_.attempt_name),
            "config": self.config.to_json(),
            "binding": self.run_.binding,
            "machine": {
                "device": device,
                "instruction_set": torch.backends.cpu.get_cpu_capability(),
                "torch": torch.__version__,
                "threads": self.threads,
            },
            "tokens": self.tokens,
        }

    def _save_is_due(self) -> bool:
        """The same on all ranks: where the interval is not given, it is rank 0's word of this step."""
        if self.config.save_interval_steps is not None:
            return self.done % self.config.save_interval_steps == 0
        return self.done - self.saved_at >= self.save_every

    def _save(self, *, last: bool = False) -> None:
        """Begin to save where the run stands."""
        since, self.saved_at = self.done - self.saved_at, self.done
        self.saver.start(self._boundary(last=last))
        waited_s = self.saver.waited_s
        if waited_s > SAY_WAITED_S and not last and not self._said_slow:
            self._said_slow = True
            self.run_.say(
                f"a save takes longer than the {since} steps between two: training waited {waited_s:.1f} s for it. "
                "Save less often (--save-every), or say auto"
            )

    def _take_in_costs(self, step_s: float, beside_a_save: bool) -> None:
        """Rank 0: how long a step took, and what a save that is over has cost."""
        saver = self.saver
        self.interval.stepped(step_s, beside_a_save or not saver.idle)
        if self.saved_at == saver.committed_step and saver.idle and saver.commit_s is not None:
            self.interval.saved(self.saved_at, saver.begun_s, saver.stall_s, saver.commit_s)

    def _tell_interval(self, choice: interval.Choice, costs: interval.Costs) -> None:
        self.run_.say(f"a checkpoint every {choice.steps} steps: {choice.why}")
        if self.records:
            self.records.event(
                "interval", steps=choice.steps, why=choice.why, step_s=costs.step_s, cost_s=costs.cost_s,
                commit_s=costs.commit_s,
            )  # fmt: skip

    def _save_last(self, deadline: float | None, again: bool = False) -> None:
        """Save the boundary that was reached, unless it is committed already (or `again`: more is known of it)."""
        self.saver.wait()
        if self.done and (again or self.saver.committed_step != self.done):
            self._save(last=True)
            self.saver.wait(None if deadline is None else max(0.1, deadline - time.monotonic()))
        self.run_.committed_step = self.saver.committed_step

    def _end_at(self, stop: Stop) -> None:
        """Save the last boundary if it fits, and leave; never returns."""
        run = self.run_
        if self.progress:
            self.progress.close()
        if not stop.ending.saves:
            newer = self.records.superseded_by if self.records else None
            raise Leaving(stop.ending, superseded(newer))
        if stop.ending is STOP_REQUEST:
            self._end_as_asked()
        notice = run.notices.first() or Notice(stop.kind, stop.kind, time.monotonic(), stop.deadline - time.monotonic())
        run.say(f"{stop.kind}: {max(0.0, stop.deadline - time.monotonic()):.0f} s left; saving step {self.done}")
        # One writer at a time; and rank 0's clock decides for all.
        self.saver.wait(max(0.0, stop.deadline - time.monotonic()))
        save_s = self.saver.commit_s or 0.0
        if self.group.rank0_does("last-save", lambda: save_s <= stop.deadline - time.monotonic()):
            self._save_last(stop.deadline)
        else:
            run.committed_step = self.saver.committed_step
            run.say(f"a save takes {save_s:.1f} s and does not fit: the last committed step is {run.committed_step}")
        committed_s = time.monotonic() - notice.at if self.saver.committed_step == self.done else None
        if committed_s is not None:
            run.say(f"step {self.done} is committed, {committed_s:.1f} s after the word")
        ending = STOPS[notice.kind]  # This rank's own: a signal may have come before another machine's notice.
        if ending.hold is Hold.MACHINE_TAKEN:
            run.write_end(ending, notice=notice, committed_s=committed_s)
            run.hold(ending.hold_s(stop.deadline))
        run.leave(ending, notice=notice, committed_s=committed_s)

    def _end_as_asked(self) -> None:
        """Save, and hold until SkyPilot's cancel comes: leaving at once would show a failed job. Never returns."""
        run = self.run_
        run.say(f"a stop was asked for: saving step {self.done}")
        self._save_last(None)
        run.write_end(STOP_REQUEST)
        saved = self.saver.committed_step == self.done
        said = f"step {self.done} is committed" if saved else f"the last committed step is {self.saver.committed_step}"
        run.say(f"{said}; waiting for SkyPilot to cancel this job")
        run.notices.signalled.wait(STOP_REQUEST.hold_s())
        run.leave(STOP_REQUEST)

    def _finish(self, again: bool) -> None:
        """The last checkpoint, then the exported model."""
        run, saver = self.run_, self.saver
        self._save_last(self.stop.deadline if self.stop else None, again)
        while not self.stop and saver.committed_step != self.done:
            self._save(last=True)
            saver.wait()  # Raises once too many saves in a row have failed.
        # Rank 0's word: another rank may not have heard of the commit before the deadline.
        committed, is_finite = self.group.rank0_does(
            "last-committed", lambda: [saver.committed_step == self.done, saver.finite == saver.committed]
        )
        if not committed:
            assert self.stop
            self._end_at(self.stop)
        if not is_finite and self.config.on_nan != finite.IGNORE:
            raise NotFiniteError(
                f"the weights after the last step ({self.done}) are not finite (NaN or infinite): nothing is exported. "
                f"{saver.last_finite()}: a relaunch goes on from there"
            )
        if self.progress:
            self.progress.close()
        name = saver.committed
        # All steps are done: a stop that comes now is better answered by finishing.
        self.group.rank0_does("export", lambda: self._export(name))
        run.final_is_whole = True
        run.say(f"finished: {self.max_steps} steps, model in {run.paths.final}")
        saver.settle()

    def _export(self, name: CheckpointName) -> None:
        """Rank 0: make `final/`; where this machine is going, what fails for that is for the next one to do."""
        try:
            export.export(self.run_, self.model, self.save_model, name)
        except Exception as error:
            notice = self.run_.notices.first()
            stop = self.stop or (Stop(notice.kind, notice.deadline) if notice else None)
            if not stop:
                raise
            self.run_.say(f"the model is not exported yet ({error}): the next attempt does it")
            self._end_at(stop)


def _refuse_lazy(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise RunError(f"{name} has no shape yet: run one batch through the model before train()")


def to_device(batch: Any, device: torch.device) -> Any:
    """A tree of tensors, on the device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def _weigh(samples: Samples, batch: Any) -> float:
    """What a batch weighs.

    Raises:
        RunError: that is no number, or below 0.
    """
    weight = samples.weight(batch)
    with suppress(TypeError, ValueError):
        number = float(weight)
        if math.isfinite(number) and number >= 0:
            return number
    raise RunError(f"{type(samples).__name__}.weight() gave {weight!r}: it has to be a number, 0 or more")


def finite_or_none(value: float) -> float | None:
    """The value; None where it is not a finite number, because JSON has none."""
    return value if math.isfinite(value) else None
