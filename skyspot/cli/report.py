"""`skyspot report`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from skyspot.cli import page_file
from skyspot.cli.completion import complete_run_or_folder
from skyspot.cli.options import json_option, verbose_option
from skyspot.errors import SkyspotError
from skyspot.runs.location import Location
from skyspot.wording import printable

if TYPE_CHECKING:
    from skyspot.money.prices import RungPrice


@click.command()
@click.argument("run", metavar="RUN", shell_complete=complete_run_or_folder)
@click.option(
    "--prices", metavar="SPOT,ONDEMAND", help="Price of a node in USD an hour, for attempts that recorded none."
)
@click.option(
    "--html", type=click.Path(path_type=Path), metavar="FILE", help="Write the report as a page: one file, no network."
)
@json_option("Print the report as JSON.")
@verbose_option
def report(run: str, prices: str | None, html: Path | None, as_json: bool) -> None:
    """Show what a run did with its time and money: each attempt, goodput, lost steps, spend, the save interval.

    RUN is the run's folder, its URL, or its name, as for `skyspot checkpoints`. It may be running. docs/report.md
    explains every figure.

    \b
    Examples: skyspot report run-001
              skyspot report s3://my-checkpoints/run-001 --prices 9.83,32.77
              skyspot report run-001 --html report.html
    """  # noqa: D301
    from skyspot.cli import report_tables
    from skyspot.jobs.waits import ask_skypilot
    from skyspot.money import timeline
    from skyspot.money.attempts import lives
    from skyspot.money.matching import by_attempt, match_rungs
    from skyspot.money.report import Given, report_of, to_json
    from skyspot.money.spend import read_prices
    from skyspot.runs import find
    from skyspot.runs.records import read_records

    stated = read_prices(prices) if prices is not None else None
    if html:
        page_file.check(html)  # Before all records are read, which may take minutes.
    paths = find.open_existing(run, resolve=_resolved)
    records = read_records(paths)
    if not records.attempts:
        raise SkyspotError(f"{paths.root}: no attempt has begun, so there is nothing to report")
    own = lives(records.attempts)
    known, matches = ask_skypilot(own), match_rungs(own, _ladder(run))
    given = Given(
        now=time.time(),
        prices=by_attempt(own, matches, stated),
        waits=known.waits,
        matches=matches,
        asked_for=known.asked_for,
        notes=known.notes,
    )
    found = report_of(records, given)
    bands = timeline.timeline_of(records, found)
    if as_json:
        click.echo(json.dumps({**to_json(found), "timeline": timeline.to_json(bands)}, indent=2))
    else:
        report_tables.show(found, bands)
    if html:
        from skyspot.page.page import page

        page_file.write(html, page(found, records, given.now))
        click.echo(f"Page: {printable(str(html))}", err=as_json)


def _ladder(run: str) -> tuple[RungPrice, ...]:
    """The ladder of the run's task with its prices, if the run was launched from this project; else empty."""
    from skyspot.money.pricing import price_ladder, read_market
    from skyspot.task import document, settings
    from skyspot.task.options import NAME, written_task

    if not NAME.fullmatch(run) or not (path := written_task(run)).is_file():
        return ()
    tasks = document.tasks(path.read_bytes().decode("utf-8", "replace"))
    if len(tasks) != 1:
        return ()
    return price_ladder(tasks[0], read_market(tasks, settings.stated_prices(Path())))


def _resolved(where: Location) -> Location:
    """A location with the URL of its bucket, which SkyPilot knows if it created the bucket."""
    from skyspot.jobs.training import resolved  # Rarely needed.

    return resolved(where)
