"""The console script: the group of commands, and `main`, which turns errors into a line and an exit code."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

import click

from skyspot import __version__
from skyspot.cli.group import LazyGroup
from skyspot.errors import SkyspotError, did_you_mean

COMMANDS = {
    "launch": ("skyspot.cli.launch", "Submit a task as a managed job that resumes after preemptions."),
    "render": ("skyspot.cli.render", "Print the task YAML of a template or of your own YAML."),
    "plan": ("skyspot.cli.plan", "Show what each rung costs, and what the training will likely cost."),
    "lint": ("skyspot.cli.lint", "Check task YAMLs without submitting them."),
    "rehearse": ("skyspot.cli.rehearse", "Preempt a task on this machine and check that it resumes."),
    "templates": ("skyspot.cli.templates", "List, show or eject the templates."),
    "queue": ("skyspot.cli.jobs", "List managed jobs with their training progress."),
    "logs": ("skyspot.cli.jobs", "Show a job's log."),
    "cancel": ("skyspot.cli.jobs", "Let a job save, then cancel it."),
    "report": ("skyspot.cli.report", "Show where a run's time and money went."),
    "checkpoints": ("skyspot.cli.checkpoints", "List or verify a run's checkpoints."),
}
"""Each command's module, and its line in `skyspot --help`."""


@click.group(
    cls=LazyGroup,
    commands_in=COMMANDS,
    epilog="To try it on this machine, without an account: skyspot rehearse",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="skyspot", message="%(prog)s %(version)s")
def cli() -> None:
    """Train on GPUs that can be taken away at any moment, and resume exactly."""


def main() -> None:
    """Run the command line; the one place that prints errors."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as leaving:
        sys.exit(leaving.exit_code)
    except click.ClickException as error:
        click.echo(f"Error: {_message(error)}", err=True)
        sys.exit(error.exit_code)
    except SkyspotError as error:
        if error.__cause__ is not None and _is_verbose():
            _print_traceback(error.__cause__)
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("trainer"):
            raise
        click.echo(
            "Error: a trainer.py in this folder hides skyspot's package `trainer`: rename it, or run skyspot from "
            "another folder",
            err=True,
        )
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        # No caller had a better message: the disk behind stdout is full, for example.
        if _is_verbose():
            _print_traceback(error)
        where = f"{error.filename}: " if error.filename else ""
        with suppress(OSError):
            click.echo(f"Error: {where}{error.strerror or error}", err=True)
        os._exit(1)


def _message(error: click.ClickException) -> str:
    ctx = getattr(error, "ctx", None)
    if not isinstance(error, click.NoSuchOption) or ctx is None:
        return error.format_message()
    known = [option for parameter in ctx.command.get_params(ctx) for option in parameter.opts]
    return f"No such option: {error.option_name}.{did_you_mean(error.option_name, known)}"


def _is_verbose() -> bool:
    return "--verbose" in sys.argv[1:]


def _print_traceback(error: BaseException) -> None:
    import traceback  # Rarely needed.

    sys.tracebacklimit = 1000  # SkyPilot sets it to 0.
    traceback.print_exception(error)
