"""resume: loads the newest whole checkpoint into the training state, and records it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch

from trainer.attempt.history import RECORDS_S
from trainer.attempt.record import Attempt, record
from trainer.bucket.deadlines import within
from trainer.bucket.retry import retry
from trainer.checkpoint import extras
from trainer.checkpoint.restore import NOT_FINITE, Loaded, find_whole
from trainer.checkpoint.state import RANDOM, StateError
from trainer.errors import RunError
from trainer.layout.events import event_named, read_events, read_metrics
from trainer.layout.names import CheckpointName, list_attempts, list_metrics
from trainer.training import changes, finite, rng
from trainer.training.checkpointer import Checkpointer
from trainer.training.participant import Participant
from trainer.training.training_state import TrainingState

MAX_THREADS = 1024


def resume(run: Participant, state: TrainingState, checkpointer: Checkpointer, max_steps: int) -> float:
    """Load the newest whole checkpoint, if there is one; returns the time at which it was loaded, in monotonic seconds.

    Raises:
        StateError: the checkpoint does not fit the program.
        RunError: the run is past `max_steps` already.
    """
    started = time.monotonic()
    found = find_whole(
        run.group, run.paths, state.collect({}), run.check_stop, run.run_id,
        only_finite=state.config.on_nan != finite.IGNORE,
    )  # fmt: skip
    changed: dict[str, list[Any]] = {}
    if found.loaded:
        _load(run, state, found.loaded, max_steps)
        changed = changes.changes(found.loaded.manifest.facts, checkpointer.facts())
    name = found.loaded.name if found.loaded else None
    rejected = [parsed for one in found.rejected if (parsed := CheckpointName.parse(one["checkpoint"]))]
    is_finite = found.loaded.manifest.finite if found.loaded else True
    checkpointer.saver.adopt(str(run.attempt_name), name, is_finite, rejected)
    checkpointer.saved_at = state.done
    run.steps_done, run.committed_step = state.done, checkpointer.saver.committed_step
    state.collect({})  # Raises now, not at the first save, where a state cannot be saved.
    restored_at = time.monotonic()
    seconds = restored_at - started
    # Reading the records of earlier attempts takes a request each: other ranks wait on the store, not in a collective.
    run.group.rank0_does(
        "restored", lambda: _record(run, state, checkpointer, name, found.rejected, changed, seconds), run.check_stop
    )
    return restored_at


def _load(run: Participant, state: TrainingState, loaded: Loaded, max_steps: int) -> None:
    """Load a checkpoint, and what its manifest says of the run."""
    facts, group = loaded.manifest.facts, run.group
    tensors, plain, of_first_rank = extras.joined(
        loaded.tensors, loaded.plain, group.rank, group.world_size, facts.get("world_size")
    )
    counters = state.load(tensors, plain, str(loaded.name))
    if of_first_rank:
        run.print_line(
            f"{' and '.join(of_first_rank)}: each process saved its own values, and the number of processes has "
            "changed; all processes now use those of rank 0"
        )
    state.done, evaluated = loaded.manifest.step, counters.get("evaluated")
    if counters.get("step") != state.done or type(evaluated) is not int:
        raise StateError(f"checkpoint {loaded.name}: its state.json belongs to another step")
    state.evaluated = evaluated
    if state.done > max_steps:
        raise RunError(
            f"{run.paths.root} is already at step {state.done}, past max_steps ({max_steps}). Raise max_steps, or use "
            "another run name"
        )
    if facts.get("world_size") == group.world_size:
        own = loaded.tensors.get(f"{RANDOM}{group.rank}")
        if own is not None:
            rng.load_streams(own)
        machine = facts.get("machine")
        threads = machine.get("threads") if isinstance(machine, Mapping) else None
        if type(threads) is int and 0 < threads <= MAX_THREADS:
            state.threads = threads
        torch.set_num_threads(state.threads)
    state.watch.load_state_dict(counters.get("watch"))
    run.skipped = state.watch.skipped
    samples = facts.get("samples")
    if type(samples) is int and samples >= 0:
        state.offset = samples - state.done * state.config.global_batch_size
    if run.journal:
        run.journal.history = list(facts.get("metrics", []))


def _record(
    run: Participant,
    state: TrainingState,
    checkpointer: Checkpointer,
    name: CheckpointName | None,
    rejected: list[dict[str, str]],
    changed: dict[str, list[Any]],
    seconds: float,
) -> None:
    """Rank 0: record and print what was restored, and read what the saves of this run have cost so far."""
    attempt = run.attempt
    assert attempt
    done = retry(run.paths, lambda: last_step_done(attempt), run.check_stop, begun=True, limit_s=RECORDS_S)
    lost = max(0, done - state.done)
    fields = {
        "step": state.done,
        "samples": state.samples_done,
        "checkpoint": str(name) if name else None,
        "from_attempt": str(name.attempt) if name else None,
        "lost_steps": lost,
        "seconds": round(seconds, 4),
        "rejected": rejected,
        "changed": changed,
    }
    retry(run.paths, lambda: record(attempt, "restored", **fields), run.check_stop, begun=True)
    for checkpoint in rejected:
        skipped = checkpoint["reason"].startswith(NOT_FINITE)
        problem = "is skipped" if skipped else "is not whole"
        remedy = "; --on-nan ignore would use it" if skipped else ""
        run.print_line(
            f"Checkpoint {checkpoint['checkpoint']} {problem}: {checkpoint['reason']}. Using an older one{remedy}"
        )
    if name:
        run.print_line(
            f"resumed at step {state.done} from checkpoint {name} of attempt {name.attempt}: "
            f"{state.samples_done} samples consumed, {lost} lost steps, {seconds:.1f} s"
        )
        if changed:
            run.print_line(changes.sentence(state.done, changed))
    elif lost or rejected:
        run.print_line(f"starting from step 0: no whole checkpoint yet, {lost} lost steps")
    with within("reading the attempts' records", RECORDS_S):
        checkpointer.interval.learn(run.paths, attempt.name, state.done)


def last_step_done(attempt: Attempt) -> int:
    """The last step that an earlier attempt is known to have done; 0 where none did any.

    It looks at the newest attempt that restored a state, and at those after it, which ended before they restored one.
    """
    paths, steps = attempt.paths, [0]
    for name in reversed([name for name in list_attempts(paths) if name < attempt.name]):
        events = read_events(paths, name, ("restored", "end"))
        ended = event_named(events, "end")
        if ended and isinstance(ended.get("step"), int):
            steps.append(ended["step"])
        for _, path in list_metrics(paths, name)[-1:]:
            with suppress(OSError):
                steps += [line["step"] for line in read_metrics(path.read_bytes())]
        if event_named(events, "restored"):
            break
    return max(steps)
