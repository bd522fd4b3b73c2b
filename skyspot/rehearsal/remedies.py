"""What to do about a finding: the remedies that verdicts name, and docs/rehearse.md lists."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A fault that a rehearsal recognizes."""

    name: str
    """In Markdown."""
    remedy: str
    """In Markdown, without a full stop."""


@dataclass(frozen=True)
class Cause:
    """The likeliest cause of a wrong result."""

    text: str
    """What was seen."""
    finding: Finding


HALF_WRITTEN = Finding(
    "half-written file, `stays down`",
    "write to a temporary name in the same folder, then `os.replace` it; at a restart, skip a file that does not load",
)
MIXED = Finding(
    "a mixed pair of files of two saves",
    "put all state into one file; or a folder for each save, with a marker file written last, and pass over folders "
    "without it",
)
NOT_READ = Finding(
    "a file was not read, or was missing and it went on without",
    "load everything that you save, and fail if a part is missing",
)
DATA_ORDER = Finding(
    "the data order differs",
    "save and load the position in the data, or compute it from the step; save and load the random state of the "
    "shuffling, or seed each epoch by its number",
)
LEARNING_RATE = Finding(
    "the LR differs", "save and load the scheduler's state, or compute the LR from the number of steps done"
)
NO_CAUSE = Finding(
    "results differ, no cause named",
    "save and load what the step number does not tell: optimizer, scheduler, gradient scaler, random states (Python, "
    "NumPy, torch, CUDA), position in the data",
)
ONE_SLOT = Finding(
    "saves take turns between files, and one of these is wrong",
    "write the same state into each of them, in the same way",
)
MORE_STEPS = Finding(
    "trains more steps than asked",
    "save the number of steps done in all; train until the total, not `N more`; skip the batches of the epoch that are "
    "done",
)
FEWER_STEPS = Finding(
    "trains fewer steps than asked",
    "save the number of the next step or epoch, and go on with just that one",
)
BEST_LOST = Finding(
    "the best score so far was lost",
    "save the best score, the patience and their like in the checkpoint, and load them",
)
REPEATED_LINES = Finding(
    "a result has lines again",
    "at a restart, cut the file to the lines before the checkpoint; or write it anew from what the checkpoint holds",
)
NOT_USED = Finding(
    "LOST WORK: read no checkpoint, or did not use it",
    "look for a checkpoint at every start, without an option, and use what was loaded",
)
OLDER_USED = Finding(
    "LOST WORK: went on from an older checkpoint",
    "sort checkpoints by their number, not by name or time, and load the newest one that is complete",
)
DESTROYED = Finding(
    "LOST WORK: was destroyed while the next was written",
    "keep the old checkpoint until the new one is in place",
)
RUN_FOLDER = Finding(
    "LOST WORK: a task that uses skyspot's trainer or `SpotRun`",
    "give every attempt the same run folder (`$SKYSPOT_CHECKPOINT_DIR`), and delete or move nothing in it",
)
NEVER_SAVES = Finding("saves nothing before its end", "save every few minutes")
IRREGULAR = Finding("saves come at irregular steps", "save at fixed steps too, beside the best one")
AT_NOTICE = Finding(
    "wrong after `sigterm` only",
    "in the handler, only set a flag; save at the end of the step, with the step that is done. Or leave SIGTERM to its "
    "default: the last checkpoint is enough",
)
NOT_IN_TIME = Finding(
    "a save at SIGTERM or a notice was not over in time",
    "write to a temporary name in the same folder, then `os.replace` it, so that the last checkpoint stays whole; save "
    "less. Or leave SIGTERM to its default: the last checkpoint is enough",
)
EXITED_WITH_0 = Finding(
    "exited with 0 at SIGTERM or the notice",
    "exit with a code of `recover_on_exit_codes`, unless training is complete: SkyPilot takes 0 for success",
)
UNHEEDED = Finding(
    "ignored its notice or signal",
    "start it with `python -m trainer.launch`, which passes a cloud's notice on as SIGTERM; at SIGTERM (on Slurm, also "
    "at SIGUSR1), save and exit with a code of `recover_on_exit_codes`",
)
REFUSED = Finding("the mount refuses the operation", "the table of refusals above")
"""A verdict names the remedy for the operation."""
WORKERS = Finding("a data loader's workers died of SIGTERM", "ignore SIGTERM in the workers (`worker_init_fn`)")

UNSCHEDULED = Finding(
    "`run.steps`: the learning rate differs",
    "`run.register(scheduler=...)`: every scheduler, before the first step. Step it inside the loop: code around "
    "the loop runs again in each attempt. Compute a rate of your own from `run.step`",
)
UNREGISTERED = Finding(
    "`run.steps`: something is not registered",
    "`run.register(...)` all that steps change: modules, optimizers, schedulers, scalers, EMA copies, each "
    "`torch.Generator`; numbers go into `run.state`",
)
UNSAVED = Finding(
    "`run.steps`: an attribute is in no state_dict", "add it to the object's `state_dict` and `load_state_dict`"
)
UNSTATED = Finding(
    "`run.steps`: a counter or a best loss starts over", "keep it in `run.state`, which is saved and restored"
)
ELSEWHERE = Finding(
    "`run.steps`: the loop reads its data elsewhere",
    "give `run.steps` the loader: it then continues with the batch after the checkpoint's. A batch that the loop draws "
    "ahead goes into `run.state`",
)
BATCHES = Finding(
    "`run.steps`: the batches differ",
    "register what draws them (a `torch.Generator`, a stateful loader), and use no workers for random numbers",
)
STREAMS = Finding(
    "`run.steps`: the random numbers differ",
    "seed before the loop only; inside it, draw the same numbers in every attempt",
)
SEEDS = Finding(
    "`run.steps`: not seeded", "`torch.manual_seed(...)`, `random.seed`, `numpy.random.seed` before the model is built"
)
NONDETERMINISTIC = Finding(
    "`run.steps`: not deterministic",
    "`torch.use_deterministic_algorithms(True)`; nothing in a step may depend on the clock",
)
KEPT_APART = Finding(
    "Trainer, Lightning: a callback, collator or hook keeps state of its own",
    "keep it in `run.state`; or give it to the library's checkpoint: `state_dict` of a Lightning callback or data "
    "module, `on_save_checkpoint`, `ExportableState` of transformers. Draw random numbers from the global generators",
)

FINDINGS = (
    HALF_WRITTEN, MIXED, NOT_READ, DATA_ORDER, LEARNING_RATE, NO_CAUSE, ONE_SLOT, MORE_STEPS, FEWER_STEPS, BEST_LOST,
    REPEATED_LINES, NOT_USED, OLDER_USED, DESTROYED, RUN_FOLDER, NEVER_SAVES, IRREGULAR, AT_NOTICE, NOT_IN_TIME,
    EXITED_WITH_0, WORKERS, UNHEEDED, REFUSED,
    UNSCHEDULED, UNREGISTERED, UNSAVED, UNSTATED, ELSEWHERE, BATCHES, STREAMS, SEEDS, NONDETERMINISTIC,
    KEPT_APART,
)  # fmt: skip
"""All of them, in the order of the docs' table."""


def not_in_time(cause: Cause, cut_off: bool) -> Cause:
    """The cause of parts of a save, with why they are parts if that save was made at a signal and cut off."""
    if not cut_off or cause.finding not in (HALF_WRITTEN, MIXED):
        return cause
    why = "its save began at SIGTERM or a notice, and was not over when the machine was taken"
    return Cause(f"{cause.text}; {why}", NOT_IN_TIME)
