"""`skyspot queue`, `logs` and `cancel`."""

from __future__ import annotations

import json
import sys

import click

from skyspot.cli import tables
from skyspot.cli.completion import complete_run
from skyspot.cli.options import json_option, verbose_option
from skyspot.errors import SkyspotError, UsageError
from skyspot.jobs import client, stop, training
from skyspot.jobs.client import Job


@click.command()
@click.option("-a", "--all", "everything", is_flag=True, help="Include finished jobs.")
@json_option("Print the jobs as JSON.")
@verbose_option
def queue(everything: bool, as_json: bool) -> None:
    """List managed jobs with their training progress, and why a starting job has no machine yet."""
    found = training.track(client.queue(living=not everything))
    if as_json:
        click.echo(json.dumps(tables.queue_json(found), indent=2))
    elif found:
        tables.show_queue(found)
    else:
        click.echo("No jobs." if everything else "No active jobs. Use --all to include finished ones.")


@click.command()
@click.argument("job", metavar="NAME|ID", shell_complete=complete_run)
@click.option("--controller", is_flag=True, help="Show the controller's log, which says why there is no machine.")
@click.option("--follow/--no-follow", default=True, help="Follow the log until the job ends (default).")
@verbose_option
def logs(job: str, controller: bool, follow: bool) -> None:
    """Show a job's log. Ctrl-C stops following; the job keeps running."""
    picked = _pick(job)
    sys.exit(follow_log(picked.id, picked.name, controller=controller, follow=follow))


@click.command()
@click.argument("job", metavar="NAME|ID", shell_complete=complete_run)
@click.option(
    "--grace", type=float, default=stop.SAVE_S, show_default=True, metavar="S", help="Seconds to wait for the save."
)
@click.option("--now", is_flag=True, help="Cancel immediately; the trainer still saves when it gets SIGTERM.")
@click.option("-y", "--yes", is_flag=True, help="Cancel without asking.")
@verbose_option
def cancel(job: str, grace: float, now: bool, yes: bool) -> None:
    """Let a job save, then cancel it. A later launch with the same name resumes the run."""
    picked = _pick(job, yes=yes)
    if not picked.living:
        raise SkyspotError(f"job {picked.id} ({picked.name}) has already ended: {picked.status}")
    saved = False if now else stop.request_save(picked, grace, log)
    client.cancel(picked.id)
    how = " It has saved." if saved else ""
    click.echo(
        f"Job {picked.id} ({picked.name}) is being cancelled.{how} `skyspot launch -n {picked.name}` resumes the run."
    )


def _pick(target: str, yes: bool = False) -> Job:
    """The job that a name or an ID means."""
    ask = (lambda _: True) if yes else confirm if sys.stdin.isatty() else None
    return training.pick(client.queue(living=False), target, ask)


def confirm(question: str) -> bool:
    """Ask a question that needs a terminal; the default answer is no."""
    try:
        return click.confirm(question, default=False)
    except click.Abort:
        if sys.stdin.isatty():
            raise
        raise UsageError("no terminal to confirm on; pass -y to submit without asking") from None


def log(text: str) -> None:
    """Print a line of progress."""
    click.echo(text, err=True)


def follow_log(job_id: int, name: str, *, controller: bool = False, follow: bool = True) -> int:
    """Print a job's log; returns the exit status."""
    try:
        return client.follow_logs(job_id, controller=controller, follow=follow)
    except KeyboardInterrupt:
        click.echo(
            f"\nJob {job_id} keeps running. `skyspot logs {name}` follows it again, `skyspot cancel {name}` ends it."
        )
        return 0
