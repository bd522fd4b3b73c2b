"""`skyspot templates list`, `show` and `eject`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from skyspot.cli.group import Group
from skyspot.cli.options import json_option
from skyspot.errors import UsageError
from skyspot.task import template


@click.group(cls=Group)
def templates() -> None:
    """List, show or eject the templates."""


@templates.command("list")
@json_option("Print the templates as JSON.")
def list_templates(as_json: bool) -> None:
    """List the templates and where each was found."""
    found = []
    for path in template.names().values():
        try:
            found.append(template.read(path))
        except UsageError as error:
            click.echo(f"Error: {error}", err=True)
    if as_json:
        rows = [{"name": t.name, "path": str(t.path), "bundled": t.bundled, "about": t.about} for t in found]
        click.echo(json.dumps(rows, indent=2))
        return
    width = max(len(t.name) for t in found)
    for t in found:
        where = "" if t.bundled else f"  ({t.path})"
        click.echo(f"{t.name:<{width}}  {t.about}{where}")


@templates.command()
@click.argument("name")
def show(name: str) -> None:
    """Show a template: its parameters, then its text.

    \b
    Example: skyspot templates show finetune
    """  # noqa: D301
    found = template.find(name)
    click.echo(f"{found.name}: {found.about}\n")
    click.echo("Parameters (--set KEY=VALUE):")
    width = max((len(p.name) for p in found.parameters), default=0)
    for p in found.parameters:
        default = "(required)" if p.default is None else "(optional)" if p.default == "" else f"(default: {p.default})"
        click.echo(f"  {p.name:<{width}}  {p.help} {default}")
    click.echo(f"\n{found.text}", nl=False)


@templates.command()
@click.argument("name")
def eject(name: str) -> None:
    """Copy a template into ./templates/ for editing; the copy then takes precedence over the bundled one."""
    click.echo(f"Wrote {template.eject(name, Path())}")
