"""`skyspot checkpoints list` and `verify`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import click
from rich import filesize
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from skyspot.cli.completion import complete_run_or_folder
from skyspot.cli.format import ago, many
from skyspot.cli.group import Group
from skyspot.cli.options import json_option
from skyspot.runs import find
from skyspot.runs.checkpoints import Checkpoint, list_all
from skyspot.runs.location import Location
from skyspot.runs.verification import bytes_to_hash, verify
from trainer.layout.names import FINAL, RunPaths

UNLIMITED = 1 << 16
"""Columns of a line that goes to no terminal."""


@click.group(cls=Group)
def checkpoints() -> None:
    """List or verify a run's checkpoints.

    RUN is the run's folder, its URL (s3://, gs://, az://, r2://, or another that fsspec reads), or its name. A name is
    found through .skyspot/RUN.yaml in this folder, or in the bucket that skyspot.yaml names.
    """


@checkpoints.command("list", short_help="List checkpoints, newest first.")
@click.argument("run", metavar="RUN", shell_complete=complete_run_or_folder)
@json_option("Print the checkpoints as JSON.")
def list_checkpoints(run: str, as_json: bool) -> None:
    """List a run's checkpoints, newest first: step, age, size, attempt, and whether the file sizes are right.

    The age comes from the record of the attempt that saved the checkpoint; ~ marks a checkpoint without a record.
    Nothing is hashed.

    \b
    Examples: skyspot checkpoints list run-001
              skyspot checkpoints list s3://my-checkpoints/run-001 --json
    """  # noqa: D301
    paths = find.open_existing(run, resolve=_resolved)
    out = _console()
    found = _list(paths, out, as_json)
    if as_json:
        click.echo(json.dumps([_fields(one) for one in found], indent=2))
    elif not found:
        click.echo(f"{paths.root}: no checkpoint yet")
    else:
        out.print(_table(found))
        for note in _notes(found):
            click.echo(note)


@checkpoints.command("verify", short_help="Hash every file and compare it with its manifest.")
@click.argument("run", metavar="RUN", shell_complete=complete_run_or_folder)
@json_option("Print the checkpoints as JSON.")
def verify_checkpoints(run: str, as_json: bool) -> None:
    """Read a run's checkpoints and exported model, and compare every file's hash with its manifest.

    Exits 0 if there is a committed checkpoint and all committed checkpoints are whole. An interrupted save is not
    committed: it is listed, and is no error.

    \b
    Example: skyspot checkpoints verify s3://my-checkpoints/run-001
    """  # noqa: D301
    paths = find.open_existing(run, resolve=_resolved)
    out = _console()
    listed = _list(paths, out, as_json)
    width = max((len(one.name) for one in listed), default=0)
    found = []
    with _bar(out, as_json, DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=bytes_to_hash(listed))
        for one in verify(paths, listed, lambda count: bar.advance(task, count)):
            found.append(one)
            if not as_json:
                out.print(Text.assemble(f"{one.name:<{width}}  ", _verdict(one)))
    if as_json:
        click.echo(json.dumps([_fields(one) for one in found], indent=2))
    else:
        click.echo(_summary(found))
    committed = [one for one in found if one.committed]
    is_good = any(one.name != FINAL for one in committed) and all(one.whole for one in committed)
    sys.exit(0 if is_good else 1)


def _resolved(where: Location) -> Location:
    """A location with the URL of its bucket, which SkyPilot knows if it created the bucket."""
    from skyspot.jobs.training import resolved  # Rarely needed.

    return resolved(where)


def _list(paths: RunPaths, out: Console, as_json: bool) -> list[Checkpoint]:
    with _bar(out, as_json, MofNCompleteColumn()) as bar:
        task = bar.add_task("", total=None)
        return list_all(paths, lambda done, of: bar.update(task, completed=done, total=of))


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=UNLIMITED)


def _bar(out: Console, as_json: bool, *columns: ProgressColumn) -> Progress:
    """A transient progress bar; on stderr if stdout is JSON, and none without a terminal."""
    console = Console(stderr=True) if as_json or not out.is_terminal else out
    return Progress(
        BarColumn(),
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=False,
        redirect_stderr=False,
    )


def _fields(one: Checkpoint) -> dict[str, Any]:
    """A checkpoint as JSON."""
    return {
        "checkpoint": one.name, "step": one.step, "attempt": one.attempt, "bytes": one.bytes,
        "committed": one.committed, "whole": one.whole, "problem": one.problem,
        "finite": one.finite, "saved_at": one.saved_at, "saved_by": one.saved_by,
    }  # fmt: skip


def _table(found: Sequence[Checkpoint]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("step", "saved", "bytes"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("attempt", no_wrap=True)
    table.add_column("state", overflow="fold")
    for one in found:
        table.add_row(
            FINAL if one.name == FINAL else str(one.step),
            f"{'~' if one.saved_by == 'mtime' else ''}{ago(one.saved_at)}",
            filesize.decimal(one.bytes),
            one.attempt or "-",
            Text(one.problem, _style(one)) if one.problem else Text(f"sizes agree{_not_finite(one)}"),
        )
    return table


def _notes(found: Sequence[Checkpoint]) -> list[str]:
    """Explanations of the words that the table uses."""
    notes = []
    if any(one.saved_by == "mtime" for one in found):
        notes.append("~ is the modification time of MANIFEST.json, which copying a folder changes.")
    if any(one.manifest and not one.problem for one in found):
        notes.append("Sizes agree: nothing was hashed; `skyspot checkpoints verify` hashes every file.")
    if not all(one.finite for one in found):
        notes.append(
            "Not finite: the weights contain NaN or infinite values. A resume skips it, except with --on-nan ignore."
        )
    if any(_left_over(one) for one in found):
        notes.append("Not committed: an interrupted save; harmless, a resume skips it.")
    return notes


def _verdict(one: Checkpoint) -> Text:
    size = filesize.decimal(one.bytes)
    if one.whole:
        return Text(f"whole, {size}{_not_finite(one)}", "green" if one.finite else "yellow")
    return Text(f"{'DAMAGED: ' if one.damaged else ''}{one.problem}", _style(one))


def _not_finite(one: Checkpoint) -> str:
    return "" if one.finite else ", not finite"


def _style(one: Checkpoint) -> str:
    return "bold red" if one.damaged else "yellow" if one.committed else "dim"


def _left_over(one: Checkpoint) -> bool:
    return not one.committed and one.name != FINAL


def _summary(found: Sequence[Checkpoint]) -> str:
    """The number of whole checkpoints, and the step from which a resume would start."""
    committed = [one for one in found if one.committed and one.name != FINAL]
    if not committed:
        return "No checkpoint is committed; a resume would start from step 0."
    counts = [
        (sum(bool(one.whole) for one in committed), "whole"),
        (sum(one.damaged for one in committed), "damaged"),
        (sum(one.whole is None for one in committed), "unreadable"),
    ]
    states = ", ".join(f"{count} {word}" for count, word in counts if count)
    text = f"{many(len(committed), 'checkpoint')} committed: {states}."
    if any(one.whole for one in found if one.name == FINAL):
        return text
    for one in committed:
        if one.whole is None:
            return text
        if one.whole and one.resumable:
            return f"{text} A resume would start from step {one.step}."
    return f"{text} A resume would start from step 0."
