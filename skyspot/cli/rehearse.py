"""`skyspot rehearse`."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import click

from skyspot.cli import ending
from skyspot.cli.comparing import comparing_options, located
from skyspot.cli.lint import check_file
from skyspot.cli.options import json_option, task_options
from skyspot.cli.reporting import report_options
from skyspot.errors import UsageError, did_you_mean, shown
from skyspot.home import expanded
from skyspot.migrate.source import task_yaml
from skyspot.money.travel import priced
from skyspot.rehearsal import engine, faults
from skyspot.rehearsal.bucketfs.manners import MANNERS
from skyspot.rehearsal.compare.rules import Comparison
from skyspot.rehearsal.interpreter import Interpreter, find_interpreter
from skyspot.rehearsal.interrupts import interrupted_once
from skyspot.rehearsal.reports import Reports
from skyspot.rehearsal.result import Result, Settings, check_settings
from skyspot.rehearsal.task import RehearsalTask, read_task
from skyspot.rehearsal.view import View
from skyspot.task import payload, pipeline
from skyspot.task.durations import read_duration
from skyspot.task.mounts import TRAINER
from skyspot.task.options import MAX_SPEND, Options, secret_value
from skyspot.task.render import Rendered


@click.command()
@task_options
@click.option("--preemptions", type=int, default=5, metavar="N", show_default=True, help="Number of preemptions.")
@click.option(
    "--kinds",
    metavar="A,B",
    help=f"{', '.join(faults.KINDS)}; default: the first {len(faults.DEFAULT_KINDS)}, in turn.",
)
@click.option("--every-write", is_flag=True, help="Also preempt at every call of one save: kill-at-write at each.")
@click.option("--at", metavar="PLACE", help="Preempt once, at this place in a save, as --repro writes it.")
@click.option(
    "--mount-like",
    type=click.Choice(list(MANNERS)),
    help="The kind of mount of the task's buckets; default: what SkyPilot would mount.",
)
@click.option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    metavar="GLOB",
    help="The files of a checkpoint in the bucket, where they are not recognized. Repeatable.",
)
@click.option("--seed", type=int, default=0, metavar="N", help="Random seed for when machines are taken.")
@click.option(
    "--processes",
    default="1,2",
    metavar="1,2",
    show_default=True,
    help="Processes for the main runs, then for the run that changes its number of processes.",
)
@click.option(
    "--mount", "mounts", multiple=True, metavar="DEST=FOLDER", help="Use a local folder in place of a bucket."
)
@click.option("--task", "part", metavar="NAME", help="The task of a pipeline to rehearse.")
@click.option("--setup", is_flag=True, help="Also run the task's `setup` on each new machine.")
@click.option(
    "--python", metavar="VENV|PYTHON", help="The Python of the machines; default: the one that skyspot runs with."
)
@click.option(
    "--gpus-per-node",
    type=int,
    metavar="N",
    help="SKYPILOT_NUM_GPUS_PER_NODE; default: the number of accelerators that the task requests.",
)
@click.option(
    "--timeout",
    metavar="DURATION",
    help="How long an attempt may run, like 90s or 2h. Default: 30m, or 10 times the undisturbed run if longer.",
)
@comparing_options
@click.option(
    "--keep", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER", help="Keep all files in FOLDER."
)
@report_options
@json_option("Print the result as JSON.")
def rehearse(
    options: Options,
    preemptions: int,
    kinds: str | None,
    every_write: bool,
    at: str | None,
    mount_like: str | None,
    checkpoints: tuple[str, ...],
    seed: int,
    processes: str,
    mounts: tuple[str, ...],
    part: str | None,
    setup: bool,
    python: str | None,
    gpus_per_node: int | None,
    timeout: str | None,
    comparison: Comparison,
    assume_reproducible: bool,
    keep: Path | None,
    reports: Reports,
    as_json: bool,
) -> None:
    """Run a task on this machine, preempt it again and again, and check that it resumes exactly.

    Needs no account, no GPU and no download: the default task trains a small model on Python's own source code.

    \b
    Examples: skyspot rehearse
              skyspot rehearse my-task.yaml --compare 'results/*.json' --mount /data=./sample
    """  # noqa: D301
    settings = Settings(
        preemptions=preemptions,
        kinds=tuple(kind.strip() for kind in kinds.split(",") if kind.strip())
        if kinds is not None
        else faults.DEFAULT_KINDS,
        every_write=every_write,
        at=at,
        mount_like=mount_like,
        checkpoints=checkpoints,
        seed=seed,
        processes=_numbers(processes),
        setup=setup,
        gpus_per_node=gpus_per_node,
        interpreter=find_interpreter(python) if python is not None else None,
        timeout_s=read_duration("--timeout", timeout) if timeout is not None else None,
        compare=comparison,
        assume_reproducible=assume_reproducible,
        keep=keep,
        env={key: secret_value(key, value) for key, value in options.secret.items()},
    )
    check_settings(settings)
    sys.exit(0 if _rehearse(options, settings, mounts, part, reports, as_json).exact else 1)


def _rehearse(
    options: Options,
    settings: Settings,
    mounts: tuple[str, ...],
    part: str | None,
    reports: Reports,
    as_json: bool,
) -> Result:
    """Run the rehearsal, print its result and write its reports."""
    rendered = task_yaml(options if options.name else dataclasses.replace(options, name=_name(options)))
    if MAX_SPEND in rendered.text:
        rendered = dataclasses.replace(rendered, text=priced(rendered.text, Path.cwd()))
    if rendered.before is not None:
        check_file(rendered, options)
    # Relative paths in a task start from the working folder, as SkyPilot has it, wherever the YAML lies.
    trainer = payload.trainer_folder() if rendered.trainer else None
    task = read_task(text := _one_task(rendered, part), Path.cwd(), _stand_ins(mounts), trainer)
    task, comparison = located(task, settings.compare)
    task, settings = _with_secrets(task, dataclasses.replace(settings, compare=comparison))
    ours = [mount.folder for mount in task.mounts if mount.path == TRAINER and mount.folder]
    if ours and not settings.setup:
        _check_python(ours[0], settings.interpreter)
    reports.begin(task.name)
    with interrupted_once(), View(quiet=as_json) as view:
        for note in rendered.notes:
            if not note.startswith(("Run name", "No --bucket", "Hint")):
                view.print_line(note)
        result = engine.rehearse(task, settings, view)
    last = ending.ending_of(result, text, reports)
    if as_json:
        click.echo(json.dumps({**result.to_json(), "report": last.document}, indent=2))
    else:
        view.result(result)
    if line := reports.write(task.name, result):
        click.echo(line, err=as_json)
    ending.show(last, reports, as_json)
    return result


def _one_task(rendered: Rendered, part: str | None) -> str:
    """The text of the task to rehearse; `part` names a task of a pipeline.

    Raises:
        UsageError: a pipeline needs a name, or has no task of that name.
    """
    found = pipeline.split(rendered.text)
    if len(found.tasks) == 1:
        if part is not None:
            raise UsageError("--task: this file is not a pipeline; remove --task")
        return found.task_texts[0]
    texts = dict(zip(found.document.names(rendered.name), found.task_texts, strict=True))
    names = ", ".join(texts)
    if part is None:
        raise UsageError(f"a rehearsal runs one task of a pipeline; add --task with one of {names}")
    if part not in texts:
        raise UsageError(f"--task: no task is named {shown(part)}; the tasks are {names}.{did_you_mean(part, texts)}")
    return texts[part]


def _with_secrets(task: RehearsalTask, settings: Settings) -> tuple[RehearsalTask, Settings]:
    """The task and settings with the values of its secrets that are set in this environment."""
    unset = sorted(task.unset_secrets - settings.env.keys())
    here = {name: os.environ[name] for name in unset if name in os.environ}
    notes = [
        f"secret {name} is not set in this environment; the task ran without it." for name in unset if name not in here
    ]
    return (
        dataclasses.replace(task, notes=(*task.notes, *notes)),
        dataclasses.replace(settings, env={**here, **settings.env}),
    )


def _check_python(trainer: Path, interpreter: Interpreter | None) -> None:
    """Check that the Python of a rehearsal's machines can train.

    Raises:
        UsageError: it cannot; the message names what is missing.
    """
    path = os.pathsep.join([str(trainer.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [str(interpreter.path) if interpreter else sys.executable, "-m", "trainer.check"],
        cwd=trainer.parent,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        missing = done.stderr.strip().splitlines()
        more = f"; {len(missing) - 3} more" if len(missing) > 3 else ""
        python = interpreter.path if interpreter else sys.executable
        raise UsageError(
            f"{python} cannot train ({'; '.join(missing[:3])}{more}): "
            f"{python} -m pip install -r {trainer / 'requirements.lock'}"
        )


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
        place = expanded(folder)
        if not place.is_dir():
            raise UsageError(f"--mount {target}: {folder}: no such folder")
        found[target.rstrip("/") or "/"] = place.resolve()
    return found
