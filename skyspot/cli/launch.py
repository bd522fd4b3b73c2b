"""launch, queue, logs and cancel between the terminal and SkyPilot: ask, say what goes on and what to type next."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from skyspot.cli import tables
from skyspot.errors import SkyspotError, UsageError
from skyspot.jobs import client, training
from skyspot.jobs import launch as launching
from skyspot.jobs.client import Job
from skyspot.jobs.launch import Before, Launch
from skyspot.lint import linter
from skyspot.task import settings
from skyspot.task.options import SETTINGS, Options

REPLACED_S = 600.0
GRACE_S = 90.0


@dataclass(frozen=True)
class How:
    """How to launch."""

    yes: bool = False
    detach: bool = False
    dryrun: bool = False
    replace: bool = False
    update_trainer: bool = False
    as_json: bool = False


def run(options: Options, how: How) -> int:
    """`skyspot launch`; returns the exit status."""
    if how.as_json and not (how.yes or how.dryrun):
        raise UsageError("--json asks nothing: say -y as well, or --dryrun")
    folder = Path()
    launch = launching.prepare(options, folder)
    if not how.as_json:
        for note in launch.notes:
            click.echo(note, err=True)
    for finding in launch.findings:
        if finding.level != "error":
            click.echo(linter.shown(finding, launch.linted), err=True)
    launching.refuse_errors(launch)
    unchecked = launching.check(launch) if how.dryrun else []
    for what in unchecked:
        click.echo(f"Note: not checked: {what}", err=True)
    before = launching.look_before(launch, dryrun=how.dryrun)
    if before.progress and before.progress.finished and not before.differs:
        return _finished(launch, before, how)
    launching.refuse(launch, before, how.replace)
    if not how.as_json:
        tables.show_plan(launch, before)
    if how.dryrun:
        return _end(launch, before, how, None, "not submitted")
    if not how.yes and not _confirm("Submit?"):
        click.echo("Nothing was submitted.")
        return 1
    if before.living:
        _replace(before.living)
    launching.write(launch, how.update_trainer)
    if options.bucket is None and launch.makes_bucket:
        _remember(launch.makes_bucket, folder)
    job_id = client.submit(launch.text, launch.name, launch.secrets, quiet=how.as_json)
    return _end(launch, before, how, job_id, "resumed" if before.resumes else "new")


def _finished(launch: Launch, before: Before, how: How) -> int:
    if how.as_json:
        click.echo(json.dumps(tables.plan_json(launch, before, None, "finished"), indent=2))
    else:
        click.echo(f"Run {launch.name} is finished: {launch.where}/final holds the model. Nothing was submitted.")
    return 0


def _end(launch: Launch, before: Before, how: How, job_id: int | None, state: str) -> int:
    """Say what was done and what to type next; follow the logs."""
    if how.as_json:
        click.echo(json.dumps(tables.plan_json(launch, before, job_id, state), indent=2))
        return 0
    if job_id is None:
        click.echo("Dry run: nothing was written or submitted.")
        return 0
    click.echo(f"Submitted as managed job {job_id}; the task is {launch.path}")
    click.echo("  skyspot queue                 how far it is (SkyPilot's own: sky jobs queue)")
    click.echo(f"  skyspot logs {launch.name:<16} what it says")
    click.echo(f"  skyspot cancel {launch.name:<14} save, and stop")
    return 0 if how.detach else _follow(job_id, launch.name, controller=False, follow=True)


def _confirm(question: str) -> bool:
    try:
        return click.confirm(question, default=False)
    except click.Abort:
        if sys.stdin.isatty():
            raise
        raise UsageError("nobody is here to answer: -y goes on without asking") from None


def _replace(living: Job) -> None:
    click.echo(f"Replacing job {living.id} ...", err=True)
    training.ask_to_save(living, GRACE_S, _say)
    client.cancel(living.id)
    if not training.await_end(living.id, REPLACED_S):
        raise SkyspotError(f"job {living.id} did not end within {REPLACED_S:.0f} s: nothing was submitted")


def _remember(bucket: str, folder: Path) -> None:
    if settings.remember_bucket(bucket, folder):
        click.echo(f"Wrote `bucket: {bucket}` into {SETTINGS}: later runs go there too", err=True)
    else:
        click.echo(f"{SETTINGS} could not be changed: say --bucket {bucket} from now on", err=True)


def _say(text: str) -> None:
    click.echo(text, err=True)


def _follow(job_id: int, name: str, *, controller: bool, follow: bool) -> int:
    try:
        return client.follow_logs(job_id, controller=controller, follow=follow)
    except KeyboardInterrupt:
        click.echo(f"\nJob {job_id} goes on. `skyspot logs {name}` follows it again, `skyspot cancel {name}` ends it.")
        return 0


def queue(everything: bool, as_json: bool) -> None:
    """`skyspot queue`."""
    found = client.queue(living=not everything)
    seen = training.look(found)
    if as_json:
        click.echo(json.dumps(tables.queue_json(seen), indent=2))
    elif seen:
        tables.show_queue(seen)
    else:
        click.echo("No managed job." if everything else "No managed job is alive; --all shows those that ended.")


def _pick(target: str, living: bool, yes: bool = False) -> Job:
    found: Sequence[Job] = client.queue(living=False)
    confirm = (lambda _: True) if yes else _confirm if sys.stdin.isatty() else None
    job = training.pick(found, target, confirm)
    if living and not job.living:
        raise SkyspotError(f"job {job.id} ({job.name}) has ended: {job.status}")
    return job


def logs(target: str, controller: bool, follow: bool) -> int:
    """`skyspot logs`; returns the exit status."""
    job = _pick(target, living=False)
    return _follow(job.id, job.name, controller=controller, follow=follow)


def cancel(target: str, grace_s: float, now: bool, yes: bool) -> None:
    """`skyspot cancel`."""
    job = _pick(target, living=True, yes=yes)
    saved = False if now else training.ask_to_save(job, grace_s, _say)
    client.cancel(job.id)
    how = "It had saved. " if saved else ""
    click.echo(
        f"Job {job.id} ({job.name}) is being cancelled. {how}`skyspot launch -n {job.name}` goes on with the run."
    )
