"""lint between the terminal and its rules; and the part of it that `render` shows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import click

from skyspot import lint, lint_rules
from skyspot.errors import UsageError
from skyspot.lint import Finding
from skyspot.options import Options
from skyspot.render import Rendered, task_yaml
from skyspot.words import many


def run(options: Options, more: Sequence[str], as_json: bool) -> int:
    """`skyspot lint`; returns the exit status: 1 where there is an error, or a file that cannot be rendered."""
    rows: list[dict[str, object]] = []
    errors = 0
    tasks = (options.task, *more)
    for task in tasks:
        try:
            found = _findings(dataclasses.replace(options, task=task))
        except UsageError as error:
            if len(tasks) == 1:
                raise
            errors += 1
            click.echo(f"Error: {error}", err=True)
            continue
        errors += sum(finding.level == "error" for finding in found)
        rows += [as_row(finding, task) for finding in found]
        if not as_json:
            for finding in found:
                click.echo(lint.shown(finding, task))
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    elif not rows and not errors:
        click.echo(f"No findings in {many(len(tasks), 'task')}.")
    return 1 if errors else 0


def _findings(options: Options) -> list[Finding]:
    """The findings of one task, and on stderr what was changed in an old YAML before it was looked at."""
    template = not options.task.endswith((".yaml", ".yml"))
    rendered = task_yaml(dataclasses.replace(options, name=options.name or "lint") if template else options)
    if not template:
        for note in rendered.notes:
            click.echo(note, err=True)
    return lint.findings_in(rendered.before or rendered.text, rendered.text, options.ignore)


def check_file(rendered: Rendered, options: Options) -> None:
    """Show what `render` has to say of a plain YAML: the keys that SkyPilot does not know, and what else the file is.

    Raises:
        UsageError: SkyPilot would refuse to read the file.
    """
    found = lint.of_the_file(lint.findings_in(rendered.before or "", rendered.text, options.ignore))
    refused = lint.refused(found)
    path = Path(options.task)
    for finding in found:
        if finding not in refused:
            click.echo(lint.shown(finding, path), err=True)
    if refused:
        said = "\n".join(lint.shown(finding, path) for finding in refused)
        raise UsageError(f"SkyPilot would refuse this file:\n{said}")


def as_row(finding: Finding, path: object) -> dict[str, object]:
    """A finding for a program."""
    return {"path": str(path), **dataclasses.asdict(finding)}


def show_rules(as_json: bool) -> None:
    """`skyspot lint --list`."""
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(rule) for rule in lint_rules.RULES], indent=2))
        return
    for rule in lint_rules.RULES:
        click.echo(f"{rule.code} ({rule.level})\n  {rule.about}.")
