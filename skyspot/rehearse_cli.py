"""From the command line's words to a rehearsal, and from its result to the terminal."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

import click

from skyspot import job, payload, preempt, rehearse
from skyspot.errors import UsageError, shown
from skyspot.options import Options
from skyspot.rehearsal import Settings, check_settings
from skyspot.rehearse_view import View
from skyspot.render import task_yaml


def run(
    options: Options,
    preemptions: int,
    kinds: str | None,
    seed: int,
    processes: str,
    mount: tuple[str, ...],
    *,
    setup: bool,
    compare: str | None,
    keep: Path | None,
    as_json: bool,
) -> int:
    """Rehearse; returns the exit status: 0 where the run resumed exactly, 1 where not or not checked."""
    settings = Settings(
        preemptions=preemptions,
        kinds=tuple(kind.strip() for kind in kinds.split(",") if kind.strip()) if kinds is not None else preempt.KINDS,
        seed=seed,
        processes=_numbers(processes),
        setup=setup,
        keep=keep,
        env={key: _secret(key, value) for key, value in options.secret.items()},
    )
    check_settings(settings)
    rendered = task_yaml(options if options.name else dataclasses.replace(options, name=_name(options)))
    # Relative paths in a task start from the working folder, as SkyPilot has it, wherever the YAML lies.
    trainer = payload.trainer_folder() if rendered.trainer else None
    task = job.read(rendered.text, Path.cwd(), _stand_ins(mount), trainer)
    if compare is not None:
        task, settings = _comparing(task, settings, compare)
    if trainer and not setup:
        _check_python(trainer)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    with View(quiet=as_json) as view:
        for note in rendered.notes:
            if not note.startswith(("Run name", "No --bucket", "Hint")):
                view.say(note)
        result = rehearse.rehearse(task, settings, view)
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
    else:
        view.result(result)
    return 0 if result.exact else 1


def _secret(name: str, value: str | None) -> str:
    value = value if value is not None else os.environ.get(name)
    if value is None:
        raise UsageError(f"--secret {name}: no value, and no variable of that name is set here")
    return value


def _comparing(task: job.Job, settings: Settings, pattern: str) -> tuple[job.Job, Settings]:
    """The job and settings for a pattern of result files: relative to the bucket, or from a mount point on."""
    if not pattern or ".." in Path(pattern).parts:
        raise UsageError(
            f"--compare: {shown(pattern)} is not a pattern of files within the bucket, like 'results/*.json'"
        )
    if pattern.startswith("/"):
        found = [mount.target for mount in task.mounts if mount.survives and mount.holds(pattern)]
        if not found:
            raise UsageError(f"--compare: {shown(pattern)} lies in none of the task's buckets")
        inside = pattern[len(found[0]) :].strip("/")
        return dataclasses.replace(task, compared_in=found[0]), dataclasses.replace(settings, compare=inside or "*")
    lasting = [mount.target for mount in task.mounts if mount.survives]
    if len(lasting) > 1 and task.bucket:
        note = f"--compare looks in {task.bucket.target}; a pattern like {lasting[-1]}/... names another bucket."
        task = dataclasses.replace(task, notes=(*task.notes, note))
    return task, dataclasses.replace(settings, compare=pattern)


def _check_python(trainer: Path) -> None:
    """The machines of a rehearsal have this Python: see that it can train.

    Raises:
        UsageError: it cannot; says what is missing.
    """
    done = subprocess.run(
        [sys.executable, "-m", "trainer.check"], cwd=trainer.parent, capture_output=True, text=True, timeout=120
    )
    if done.returncode:
        missing = "; ".join(done.stderr.strip().splitlines()[:4])
        raise UsageError(f"this Python cannot train ({missing}): pip install 'skyspot[trainer]'")


def _name(options: Options) -> str | None:
    return None if options.task.endswith((".yaml", ".yml")) else "rehearsal"


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--processes: {shown(text)} is not a list of numbers, like 1,2") from None


def _stand_ins(mount: tuple[str, ...]) -> dict[str, Path]:
    found = {}
    for text in mount:
        target, equals, folder = text.partition("=")
        if not equals or not target.startswith(("/", "~/")):
            raise UsageError(f"--mount: {shown(text)} is not DEST=FOLDER, like /data=./sample")
        place = Path(folder).expanduser()
        if not place.is_dir():
            raise UsageError(f"--mount {target}: {folder}: no such folder")
        found[target.rstrip("/") or "/"] = place.resolve()
    return found


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
