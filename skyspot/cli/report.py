"""`skyspot report`."""

from __future__ import annotations

import json
import time

import click

from skyspot.cli.completion import complete_run_or_folder
from skyspot.cli.options import json_option, verbose_option
from skyspot.errors import SkyspotError
from skyspot.runs.location import Location


@click.command()
@click.argument("run", metavar="RUN", shell_complete=complete_run_or_folder)
@click.option(
    "--prices", metavar="SPOT,ONDEMAND", help="Price of a node in USD an hour, for attempts that recorded none."
)
@json_option("Print the report as JSON.")
@verbose_option
def report(run: str, prices: str | None, as_json: bool) -> None:
    """Show what a run did with its time and money: each attempt, goodput, lost steps, spend, the save interval.

    RUN is the run's folder, its URL, or its name, as for `skyspot checkpoints`. It may be running. docs/report.md
    explains every figure.

    \b
    Examples: skyspot report run-001
              skyspot report s3://my-checkpoints/run-001 --prices 9.83,32.77
    """  # noqa: D301
    from skyspot.cli import report_tables
    from skyspot.jobs.waits import ask_skypilot
    from skyspot.money.attempts import lives
    from skyspot.money.report import Given, report_of, to_json
    from skyspot.money.spend import read_prices
    from skyspot.runs import find
    from skyspot.runs.records import read_records

    stated = read_prices(prices) if prices else None
    paths = find.open_existing(run, resolve=_resolved)
    records = read_records(paths)
    if not records.attempts:
        raise SkyspotError(f"{paths.root}: no attempt has begun, so there is nothing to report")
    known = ask_skypilot(lives(records.attempts))
    given = Given(
        now=time.time(),
        prices={str(one.name): stated for one in records.attempts} if stated else {},
        waits=known.waits,
        asked_for=known.asked_for,
        notes=known.notes,
    )
    found = report_of(records, given)
    if as_json:
        click.echo(json.dumps(to_json(found), indent=2))
    else:
        report_tables.show(found)


def _resolved(where: Location) -> Location:
    """A location with the URL of its bucket, which SkyPilot knows if it created the bucket."""
    from skyspot.jobs.training import resolved  # Rarely needed.

    return resolved(where)
