"""The options of `skyspot rehearse` that write its result into files."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from skyspot.cli import page_file
from skyspot.money.spend import read_prices
from skyspot.rehearsal.reports import Reports
from skyspot.rehearsal.repro import Repro

_FILE = click.Path(path_type=Path, dir_okay=False)
_OPTIONS: list[Any] = [
    click.option("--junit", type=_FILE, metavar="FILE", help="Write the result as JUnit XML."),
    click.option(
        "--summary", type=_FILE, metavar="FILE", help="Append the result as Markdown, as to $GITHUB_STEP_SUMMARY."
    ),
    click.option(
        "--repro",
        type=click.IntRange(min=1),
        metavar="N",
        help="If row N of the table fails, write skyspot-repro-N.sh, which repeats it alone.",
    ),
    click.option("--html", type=_FILE, metavar="FILE", help="Write the report of the preempted run as a page."),
    click.option(
        "--prices", metavar="SPOT,ONDEMAND", help="Price of a node in USD an hour, for the report of the preempted run."
    ),
]

_OWN = (
    "kinds", "preemptions", "every_write", "at", "processes", "keep", "junit", "summary", "repro", "html",
    "prices", "as_json",
)  # fmt: skip
"""Names of the options that a repetition sets itself or leaves out."""


def report_options(run: Callable[..., Any]) -> Callable[..., Any]:
    """The options of the reports; the command gets them as `reports`."""

    @functools.wraps(run)
    def with_options(
        junit: Path | None, summary: Path | None, repro: int | None, html: Path | None, prices: str | None, **flags: Any
    ) -> Any:
        wanted, stated = None, read_prices(prices) if prices is not None else None
        if html:
            page_file.check(html)
        if repro is not None:
            words = arguments(click.get_current_context())
            wanted = Repro(repro, Path.cwd(), words, flags["processes"])
        return run(reports=Reports(junit, summary, wanted, html, stated), **flags)

    for option in reversed(_OPTIONS):
        with_options = option(with_options)
    return with_options


def arguments(context: click.Context) -> str:
    """The task and options of the command line as a shell would read them, without what a repetition chooses itself.

    The value of a secret is left out: it is read from the environment.
    """
    words = []
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in _OWN or context.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[name]
        for one in value if isinstance(value, tuple) else [value]:
            words.append(_word(parameter, str(one).partition("=")[0] if name == "secret" else one))
    return shlex.join(words)


def _word(parameter: click.Parameter, value: Any) -> str:
    if isinstance(parameter, click.Argument):
        return str(value)
    flag = max(parameter.opts, key=len)
    if isinstance(value, bool):
        return flag if value else parameter.secondary_opts[0]
    return f"{flag}={value}"
