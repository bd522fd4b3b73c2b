"""From the command line's words to a rehearsal, and from its result to the terminal."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from types import FrameType

import click

from skyspot import job, payload, preempt, rehearse
from skyspot.errors import UsageError, shown
from skyspot.options import Options
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
    settings = rehearse.Settings(
        preemptions=preemptions,
        kinds=tuple(kind.strip() for kind in kinds.split(",")) if kinds is not None else preempt.KINDS,
        seed=seed,
        processes=_numbers(processes),
        setup=setup,
        compare=compare,
        keep=keep,
        env={key: value for key, value in options.secret.items() if value is not None},
    )
    rehearse.check_settings(settings)
    rendered = task_yaml(options if options.name else dataclasses.replace(options, name=_name(options)))
    base = Path(options.task).parent if options.task.endswith((".yaml", ".yml")) else Path()
    stand_ins = _stand_ins(mount)
    task = job.read(rendered.text, base.resolve(), stand_ins, payload.trainer_folder() if rendered.trainer else None)
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
        if not Path(folder).is_dir():
            raise UsageError(f"--mount {target}: {folder}: no such folder")
        found[target.rstrip("/") or "/"] = Path(folder).resolve()
    return found


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
