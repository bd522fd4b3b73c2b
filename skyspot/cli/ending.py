"""The end of a rehearsal: the report of its preempted run. It changes neither the verdict nor the exit status."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from skyspot.errors import SkyspotError
from skyspot.money.prices import Price
from skyspot.rehearsal.left_records import told
from skyspot.rehearsal.reports import Reports
from skyspot.rehearsal.result import PREEMPTED, Leg, Result
from skyspot.wording import duration, printable
from trainer.layout.lifetime import UNSEEN_S

if TYPE_CHECKING:
    from skyspot.money.report import Report
    from skyspot.money.timeline import Band


@dataclass(frozen=True)
class Ending:
    """The report of the preempted run, ready to be shown."""

    report: Report | None = None
    bands: Sequence[Band] = ()
    document: Mapping[str, Any] | None = None
    """The report as JSON."""
    page: str = ""
    """The report as HTML, if it was asked for."""
    missing: str = ""
    """Why there is no report."""


def ending_of(result: Result, text: str, reports: Reports) -> Ending:
    """The report of a rehearsal's preempted run.

    Args:
        result: The rehearsal.
        text: The YAML of its task.
        reports: What was asked for.
    """
    try:
        return _ending(result, text, reports) if result.records else Ending(missing=result.unrecorded)
    except Exception as error:  # Whatever it is, the verdict stands.
        return Ending(missing=told(error))


def _ending(result: Result, text: str, reports: Reports) -> Ending:
    from skyspot.money import timeline
    from skyspot.money.attempts import lives
    from skyspot.money.report import Given, report_of, to_json

    assert result.records
    price = reports.prices or _stated(text)
    prices = {life.name: price for life in lives(result.records.attempts)} if price else {}
    leg = next(one for one in result.legs if one.name == PREEMPTED)
    # Its machines are gone: an attempt without an end does not run any more.
    found = report_of(result.records, Given(now=math.inf, prices=prices, waits={}, notes=(_note(leg),)))
    bands = timeline.timeline_of(result.records, found)
    page = ""
    if reports.html:
        from skyspot.page.page import page as page_of

        page = page_of(found, result.records, time.time())
    return Ending(found, bands, {**to_json(found), "timeline": timeline.to_json(bands)}, page)


def _stated(text: str) -> Price | None:
    """The price that skyspot.yaml states for a task."""
    from skyspot.money.pricing import first_stated
    from skyspot.task import document, settings

    stated = settings.stated_prices(Path())
    return first_stated(document.tasks(text)[0], stated) if stated else None


def _note(leg: Leg) -> str:
    often = f", here every {duration(leg.seconds / leg.preempted)}" if leg.preempted else ""
    return (
        f"A rehearsal takes its machine far more often than a cloud does{often}, and {UNSEEN_S:.0f} s are added for "
        "each attempt without an end. `skyspot plan` estimates what the whole run costs."
    )


def show(ending: Ending, reports: Reports, as_json: bool) -> None:
    """Print the report in short, if prices are known or it was asked for, and write its page."""
    from skyspot.cli import page_file, report_tables

    report, asked = ending.report, reports.html or reports.prices
    if report is None:
        if asked:
            click.echo(f"No report: {printable(ending.missing)}.", err=as_json)
        return
    if not as_json and (asked or report.spend.usd is not None):
        click.echo("Report of the preempted run:")
        report_tables.show_short(report, ending.bands)
        click.echo(f"Note: {printable(report.notes[-1])}")
    if reports.html:
        try:
            page_file.write(reports.html, ending.page)
            click.echo(f"Page: {printable(str(reports.html))}", err=as_json)
        except SkyspotError as error:
            click.echo(f"No page: {error}", err=True)
