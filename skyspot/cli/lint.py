"""lint between the terminal and its rules; and the part of it that `render` shows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import click

from skyspot.cli.format import many
from skyspot.errors import UsageError
from skyspot.lint import linter, rules
from skyspot.lint.rules import Finding
from skyspot.migrate.source import task_yaml
from skyspot.task import document, edits
from skyspot.task.options import ENV, NAME, Options, flags_alone
from skyspot.task.render import Rendered


def run(options: Options, more: Sequence[str], as_json: bool) -> int:
    """`skyspot lint`; returns the exit status: 1 where there is an error, or a file that cannot be rendered."""
    rows: list[dict[str, object]] = []
    errors = 0
    tasks = (options.task, *more)
    for name in tasks:
        try:
            found = _findings(dataclasses.replace(options, task=name))
        except UsageError as error:
            if len(tasks) == 1:
                raise
            errors += 1
            click.echo(f"Error: {error}", err=True)
            continue
        errors += sum(finding.level == "error" for finding in found)
        rows += [as_row(finding, name) for finding in found]
        if not as_json:
            for finding in found:
                click.echo(linter.shown(finding, name))
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    elif not rows and not errors:
        click.echo(f"No findings in {many(len(tasks), 'task')}.")
    return 1 if errors else 0


def _findings(options: Options) -> list[Finding]:
    """The findings of one task, and on stderr what was changed in an old YAML before it was looked at."""
    path = Path(options.task)
    plain = options.task.endswith((".yaml", ".yml"))
    if plain:
        options, _ = flags_alone(options)
        options = dataclasses.replace(options, env={**_without_values(path), **options.env}, flags=None)
    if not plain or not NAME.fullmatch(path.stem):
        options = dataclasses.replace(options, name=options.name or "lint")
    try:
        rendered = task_yaml(options)
    except UsageError:
        if plain and (unreadable := _unreadable(path)):
            return unreadable
        raise
    if plain:
        for note in rendered.notes:
            click.echo(note, err=True)
    return linter.findings_in(rendered.before or rendered.text, rendered.text, options.ignore)


def _unreadable(path: Path) -> list[Finding]:
    """Where a file is no YAML; nothing where it is, or is no text."""
    try:
        found = linter.findings(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return []
    return [finding for finding in found if finding.name == "not-yaml"]


def _without_values(path: Path) -> dict[str, str]:
    """The variables that a launch has to give a value (`--env`), each as what a shell would put in its place."""
    try:
        tasks = document.read(edits.read(path)).tasks
    except UsageError:
        return {}  # Rendering it says why.
    entries = [entry for one in tasks for entry in one.env_entries.items()]
    return {name: f"${name}" for name, found in entries if ENV.fullmatch(name) and found.is_null}


def check_file(rendered: Rendered, options: Options) -> None:
    """Show what `render` has to say of a plain YAML: the keys that SkyPilot does not know, and what else the file is.

    Raises:
        UsageError: SkyPilot would refuse to read the file.
    """
    found = linter.of_the_file(linter.findings_in(rendered.before or "", rendered.text, options.ignore))
    refused = linter.refused(found)
    path = Path(options.task)
    for finding in found:
        if finding not in refused:
            click.echo(linter.shown(finding, path), err=True)
    if refused:
        said = "\n".join(linter.shown(finding, path) for finding in refused)
        raise UsageError(f"SkyPilot would refuse this file:\n{said}")


def as_row(finding: Finding, path: object) -> dict[str, object]:
    """A finding for a program."""
    return {"path": str(path), **dataclasses.asdict(finding)}


def show_rules(as_json: bool) -> None:
    """`skyspot lint --list`."""
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(rule) for rule in rules.RULES], indent=2))
        return
    for rule in rules.RULES:
        click.echo(f"{rule.code} ({rule.level})\n  {rule.about}.")
