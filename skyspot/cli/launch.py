"""`skyspot launch`: prepare the task, show the plan, ask, submit, follow the log."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from skyspot.cli import tables
from skyspot.cli.format import many
from skyspot.cli.jobs import confirm, follow_log, log
from skyspot.cli.options import ignore_option, json_option, task_options, verbose_option
from skyspot.errors import SkyspotError, UsageError
from skyspot.jobs import client, stop
from skyspot.jobs.client import Job
from skyspot.jobs.launch import (
    Existing,
    Launch,
    check,
    find_existing,
    prepare,
    refuse,
    refuse_errors,
    with_prices,
    write,
)
from skyspot.lint.linter import shown
from skyspot.money.expected import Preemptions
from skyspot.money.plan import Length, TaskPlan, plan_task
from skyspot.money.pricing import read_market
from skyspot.task import settings
from skyspot.task.options import SETTINGS, Options
from skyspot.wording import figure
from trainer.layout.events import number

REPLACED_S = 600.0


@dataclass(frozen=True)
class Flags:
    """The options of `launch` that do not describe the task."""

    yes: bool
    detach: bool
    dryrun: bool
    replace: bool
    update_trainer: bool
    as_json: bool


@click.command()
@task_options
@click.option("-y", "--yes", is_flag=True, help="Submit without asking.")
@click.option("-d", "--detach", is_flag=True, help="Do not follow the log.")
@click.option("--dryrun", is_flag=True, help="Validate the task with SkyPilot; submit nothing.")
@click.option("--replace", is_flag=True, help="Let an active job of this name save, then replace it.")
@click.option("--update-trainer", is_flag=True, help="Replace the run's copy of the trainer with this release's.")
@ignore_option
@json_option("Print the plan and the job ID as JSON; needs -y or --dryrun.")
@verbose_option
def launch(options: Options, **flags: Any) -> None:
    """Submit a task as a managed job that resumes after every preemption.

    Renders and checks the task, shows the plan, asks, submits, and follows the log. Ctrl-C stops following; the job
    keeps running. The name of an earlier run resumes that run: `skyspot launch -n RUN` is enough.

    \b
    Examples: skyspot launch --gpus A100:8
              skyspot launch my-task.yaml -n run-001 --on-demand-last
    """  # noqa: D301
    sys.exit(_launch(options, Flags(**flags)))


def _launch(options: Options, flags: Flags) -> int:
    """Launch; returns the exit status."""
    if flags.as_json and not (flags.yes or flags.dryrun):
        raise UsageError("--json cannot prompt; add -y or --dryrun")
    folder = Path()
    planned = prepare(options, folder)
    _print_remarks(planned, flags)
    refuse_errors(planned)
    for unchecked in check(planned) if flags.dryrun else []:
        click.echo(f"Note: not checked: {unchecked}", err=True)
    existing = find_existing(planned, dryrun=flags.dryrun)
    if existing.progress and existing.progress.finished and not existing.differs:
        return _print_finished(planned, existing, flags)
    refuse(planned, existing, flags.replace)
    costs = _costs(planned, existing, folder)
    planned = with_prices(planned, costs, flags.update_trainer)
    if not flags.as_json:
        tables.show_plan(planned, existing, costs)
        for passed in [text for one in costs for text in one.run_limits_passed]:
            click.echo(f"Over limit: {passed}", err=True)
    if flags.dryrun:
        return _report(planned, existing, costs, flags, None, "not submitted")
    if not flags.yes and not confirm("Submit?"):
        click.echo("Nothing was submitted.")
        return 1
    if existing.living:
        _replace(existing.living)
    write(planned, flags.update_trainer)
    if options.bucket is None and planned.makes_bucket:
        _remember(planned.makes_bucket, folder)
    job_id = client.submit(planned.text, planned.name, planned.secrets, quiet=flags.as_json)
    return _report(planned, existing, costs, flags, job_id, "resumed" if existing.resumes else "new")


def _costs(planned: Launch, existing: Existing, folder: Path) -> list[TaskPlan]:
    """The plan of each task, at the prices on this machine; its length if the run has begun and says how long it is."""
    market = read_market([part.task for part in planned.parts], settings.stated_prices(folder))
    return [
        replace(plan_task(part.task, part.name, market, _length(one), Preemptions(), None), spent_usd=_spent(one))
        for part, one in planned.each(existing)
    ]


def _spent(existing: Existing) -> float:
    """What a run has spent, in USD, if a limit has stopped it; else 0: only its whole records say."""
    return number(existing.progress.limit, "spent_usd") or 0.0 if existing.progress else 0.0


def _length(existing: Existing) -> Length | None:
    """What is left of a run; None: unknown."""
    progress, speed = existing.progress, existing.speed
    if progress is None or speed is None or progress.max_steps is None:
        return None
    left = max(0, progress.max_steps - (progress.committed_step or 0))
    return Length(left * speed.step_s / 3600, f"{many(left, 'step')} that are left, at {figure(speed.step_s)} s a step")


def _print_remarks(planned: Launch, flags: Flags) -> None:
    """Print the notes and lint's findings; errors come with the refusal."""
    if not flags.as_json:
        for note in planned.notes:
            click.echo(note, err=True)
    for finding in planned.findings:
        if finding.level != "error":
            click.echo(shown(finding, planned.linted), err=True)


def _print_finished(planned: Launch, existing: Existing, flags: Flags) -> int:
    if flags.as_json:
        click.echo(json.dumps(tables.plan_json(planned, existing, None, "finished"), indent=2))
    else:
        click.echo(f"Run {planned.name} is finished; the model is in {planned.where}/final. Nothing was submitted.")
    return 0


def _report(
    planned: Launch, existing: Existing, costs: list[TaskPlan], flags: Flags, job_id: int | None, state: str
) -> int:
    """Print the result and the next commands; follow the log."""
    if flags.as_json:
        click.echo(json.dumps(tables.plan_json(planned, existing, job_id, state, costs), indent=2))
        return 0
    if job_id is None:
        click.echo("Dry run: nothing was written or submitted.")
        return 0
    click.echo(f"Submitted managed job {job_id}; its task is in {planned.path}")
    click.echo("  skyspot queue                 show its progress (SkyPilot's own: sky jobs queue)")
    click.echo(f"  skyspot logs {planned.name:<16} follow its log")
    click.echo(f"  skyspot cancel {planned.name:<14} save and stop")
    return 0 if flags.detach else follow_log(job_id, planned.name)


def _replace(living: Job) -> None:
    log(f"Replacing job {living.id} ...")
    stop.request_save(living, stop.SAVE_S, log)
    client.cancel(living.id)
    if not stop.await_end(living.id, REPLACED_S):
        raise SkyspotError(f"job {living.id} did not end within {REPLACED_S:.0f} s; nothing was submitted")


def _remember(bucket: str, folder: Path) -> None:
    if settings.remember_bucket(bucket, folder):
        log(f"Wrote `bucket: {bucket}` to {SETTINGS}; later runs use this bucket too.")
    else:
        log(f"{SETTINGS} could not be changed; pass --bucket {bucket} from now on.")
