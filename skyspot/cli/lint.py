"""`skyspot lint`; and the findings that `render` and `rehearse` show."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from skyspot.cli.completion import complete_task
from skyspot.cli.format import many
from skyspot.cli.options import ignore_option, json_option, task_options
from skyspot.errors import UsageError
from skyspot.lint import linter, rules
from skyspot.lint.rules import Finding
from skyspot.migrate.source import task_yaml
from skyspot.task import document, edits
from skyspot.task.options import ENV, NAME, Options, flags_alone
from skyspot.task.render import Rendered


@click.command()
@task_options
@click.argument("more", nargs=-1, metavar="[TASK]...", shell_complete=complete_task)
@ignore_option
@click.option("--list", "list_rules", is_flag=True, help="List the rules.")
@json_option("Print the findings, or the rules, as JSON.")
def lint(options: Options, more: tuple[str, ...], list_rules: bool, as_json: bool) -> None:
    """Check task YAMLs for unknown keys, and for what SkyPilot accepts but a long run cannot survive.

    Needs no network and no SkyPilot. Exits 1 if it finds an error, which `launch` would refuse. A comment
    `# skyspot: ignore[CODE]` on the line, or alone on the line above, turns a finding into a note, as --ignore does.

    \b
    Examples: skyspot lint my-task.yaml other.yaml
              skyspot lint --list
    """  # noqa: D301
    if list_rules:
        _print_rules(as_json)
    else:
        sys.exit(_lint(options, more, as_json))


def _lint(options: Options, more: Sequence[str], as_json: bool) -> int:
    """Print the findings of all tasks; returns 1 if there is an error, or a file that cannot be rendered."""
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
        rows += [{"path": name, **dataclasses.asdict(finding)} for finding in found]
        if not as_json:
            for finding in found:
                click.echo(linter.shown(finding, name))
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    elif not rows and not errors:
        click.echo(f"No findings in {many(len(tasks), 'task')}.")
    return 1 if errors else 0


def _findings(options: Options) -> list[Finding]:
    """The findings of one task; prints what was changed in an old YAML before the check."""
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
    """The finding that a file is no YAML; none if it is YAML, or no text."""
    try:
        found = linter.findings(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return []
    return [finding for finding in found if finding.name == "not-yaml"]


def _without_values(path: Path) -> dict[str, str]:
    """The variables that a launch must give a value (`--env`), each with `$NAME` for its value."""
    try:
        tasks = document.read(edits.read(path)).tasks
    except UsageError:
        return {}  # Rendering reports why.
    entries = [entry for one in tasks for entry in one.env_entries.items()]
    return {name: f"${name}" for name, found in entries if ENV.fullmatch(name) and found.is_null}


def check_file(rendered: Rendered, options: Options) -> None:
    """Print the findings that `render` and `rehearse` show for a plain YAML: unknown keys, and the like.

    Raises:
        UsageError: SkyPilot would refuse the file.
    """
    found = linter.of_the_file(linter.findings_in(rendered.before or "", rendered.text, options.ignore))
    refused = linter.refused(found)
    path = Path(options.task)
    for finding in found:
        if finding not in refused:
            click.echo(linter.shown(finding, path), err=True)
    if refused:
        lines = "\n".join(linter.shown(finding, path) for finding in refused)
        raise UsageError(f"SkyPilot would refuse this file:\n{lines}")


def _print_rules(as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(rule) for rule in rules.RULES], indent=2))
        return
    for rule in rules.RULES:
        click.echo(f"{rule.code} ({rule.level})\n  {rule.about}.")
