"""What a task's attempt records tell of its attempts; empty for a task without skyspot's trainer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from skyspot.rehearsal import evidence, remedies
from skyspot.rehearsal.result import Row
from skyspot.rehearsal.verdict import History, Verdict
from skyspot.rehearsal.watch import Watch, list_runs
from skyspot.runs.limits import DEADLINE, MAX_SPEND
from skyspot.wording import first_few
from trainer.layout.documents import LayoutError
from trainer.layout.events import event_named, read_events
from trainer.layout.manifest import read_manifest, sizes_agree
from trainer.layout.names import CheckpointName, RunPaths, list_attempts, list_checkpoints


def first_save(paths: RunPaths | None) -> int | None:
    """The step of a run's first checkpoint."""
    for name in list_attempts(paths) if paths else []:
        for event in read_events(paths, name) if paths else []:
            if event.name == "saved" and isinstance(event.fields.get("step"), int):
                return int(event.fields["step"])
    return None


def fill(row: Row, watch: Watch) -> None:
    """Copy an attempt's records into its row, if it has some: a command under the launcher has them, without steps."""
    paths, attempt = watch.paths, watch.attempt()
    if not paths or not attempt:
        return
    watch.look()
    events = read_events(paths, attempt)
    first, end = event_named(events, "first-step") or {}, event_named(events, "end") or {}
    row.restored_step = restored_step(watch)
    row.first_step, row.last_step = _int(first.get("step")), watch.step
    row.first_step_s = _float(first.get("seconds"))
    row.committed_s = _float(end.get("committed_s"))
    if row.kind == "failed" and end.get("cause") in (MAX_SPEND, DEADLINE):
        row.ended = f"stopped at its limit ({end['cause']}), exit {end.get('code')}"


def judge_start(row: Row, watch: Watch, before: Row | None) -> None:
    """Write into a row what its attempt left and whether it resumed. For tasks with records, once the machine is gone.

    Args:
        row: The attempt's row.
        watch: What watched it.
        before: The row of the attempt before it; None: it is the leg's first.
    """
    row.left_step = _newest_whole(watch.paths) if watch.paths else None
    if watch.attempt() is None:
        return
    if row.resumed is not None and row.restored_step is not None:  # The calls tell less.
        row.resumed = f"step {row.restored_step}" if row.restored_step else "nothing"
    if before:
        _judge_start(row, before)


def _newest_whole(paths: RunPaths) -> int:
    """The step of the newest checkpoint that a resume must use; 0 if there is none."""
    return next((name.step for name in list_checkpoints(paths) if _is_whole(paths, name)), 0)


def _is_whole(paths: RunPaths, name: CheckpointName) -> bool:
    """True if a checkpoint is committed and its files have their sizes, so that it is not torn, and it is finite."""
    folder = paths.checkpoint(name)
    try:
        manifest = read_manifest(folder)
        return manifest.finite and sizes_agree(folder, manifest) is None
    except (LayoutError, OSError):
        return False


def _judge_start(row: Row, before: Row) -> None:
    """Write into a row whether its attempt resumed from the newest checkpoint, and if its start shows anything."""
    left, restored = before.left_step or 0, row.restored_step
    row.lost_work = restored is not None and restored < left
    if row.lost_work:
        row.resumed = f"step {restored}: LOST WORK" if restored else "nothing: LOST WORK"
    row.unproven = ""
    if before.struck and not left:
        row.unproven = "no checkpoint was complete"
    elif restored is None and row.kind == "finished":
        row.unproven = "nothing was left to do"


def run_folders(bucket: Path, there: Path | None) -> list[str]:
    """List the run folders in a leg's bucket, unless they are those that lay there at the start.

    Args:
        bucket: The leg's bucket.
        there: What was put into each leg's bucket; None: nothing.
    """
    before = {paths.root.relative_to(there) for paths in list_runs(there)} if there else set()
    found = [paths.root.relative_to(bucket) for paths in list_runs(bucket)]
    return [path.as_posix() for path in found if path not in before]


def judge(rows: Sequence[Row], same: bool, folders: Sequence[str] = ()) -> Verdict | None:
    """Judge whether the attempts of a leg resumed; None if each did, at least one of them from a checkpoint.

    Args:
        rows: The attempts.
        same: True if the leg's results are the undisturbed run's.
        folders: The run folders that its attempts made; more than one are too many.
    """
    if len(folders) > 1:
        text = f"LOST WORK: each attempt made a run folder of its own ({first_few(folders, 3)}): use one name"
        return Verdict(False, True, text, evidence.LOST if same else None, remedy=remedies.RUN_FOLDER.remedy)
    for before, row in pairwise(rows):
        if row.lost_work:
            did = f"went on from step {row.restored_step}" if row.restored_step else "began from nothing"
            there = f"the checkpoint of step {before.left_step} was complete"
            text = f"LOST WORK: attempt {row.number} {did} though {there}"
            return Verdict(False, True, text, evidence.LOST if same else None, remedy=remedies.RUN_FOLDER.remedy)
    if not same or any(row.restored_step for row in rows):
        return None
    text = "every strike came before its first checkpoint was complete; train longer, or save more often"
    return Verdict(False, False, f"not checked: {text}")


def restored_step(watch: Watch) -> int | None:
    """The step that an attempt resumed from."""
    paths, attempt = watch.paths, watch.attempt()
    events = read_events(paths, attempt) if paths and attempt else []
    return _int((event_named(events, "restored") or {}).get("step"))


def goodput(history: History | None, seconds: float) -> float | None:
    """The share of a leg's time that went into steps of the final history."""
    if not history or not seconds:
        return None
    return sum(float(line.get("step_s") or 0.0) for line in history.lines.values()) / seconds


def set_lost_steps(row: Row | None, restored: int | None) -> None:
    """Set an attempt's lost steps, which are known once the next attempt has resumed."""
    if row and row.last_step is not None and restored is not None:
        row.lost_steps = max(0, row.last_step - restored)


def _int(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _float(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
