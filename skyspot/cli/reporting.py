"""The options of `skyspot rehearse` that write its result into files."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from skyspot.rehearsal.reports import Reports

_FILE = click.Path(path_type=Path, dir_okay=False)
_OPTIONS: list[Any] = [
    click.option("--junit", type=_FILE, metavar="FILE", help="Write the result as JUnit XML."),
    click.option(
        "--summary", type=_FILE, metavar="FILE", help="Append the result as Markdown, as to $GITHUB_STEP_SUMMARY."
    ),
]


def report_options(run: Callable[..., Any]) -> Callable[..., Any]:
    """The options of the reports; the command gets them as `reports`."""

    @functools.wraps(run)
    def with_options(junit: Path | None, summary: Path | None, **flags: Any) -> Any:
        return run(reports=Reports(junit, summary), **flags)

    for option in reversed(_OPTIONS):
        with_options = option(with_options)
    return with_options
