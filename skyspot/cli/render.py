"""`skyspot render`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click

from skyspot.cli.options import ignore_option, json_option, task_options
from skyspot.migrate.source import task_yaml
from skyspot.task.options import MAX_SPEND, Options
from skyspot.task.render import Rendered, headed


@click.command()
@task_options
@click.option(
    "-o", "output", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Write the YAML into DIR."
)
@click.option("--diff", is_flag=True, help="Print the changes to a plain YAML as a unified diff.")
@ignore_option
@json_option("Print name, notes and YAML as JSON.")
def render(options: Options, output: Path | None, diff: bool, as_json: bool) -> None:
    """Print the task YAML of a template or of your own YAML.

    TASK is a template's name (default: finetune), a path to a .yaml.j2, or a plain SkyPilot .yaml, which is migrated
    to today's spelling. With -o, the YAML and its payload are written to DIR/.skyspot; `sky jobs launch
    .skyspot/RUN.yaml` then works in DIR.

    \b
    Examples: skyspot render --gpus A100:8,L4:8 --on-demand-last -n run-001 -o .
              skyspot render --diff old.yaml
    """  # noqa: D301
    if diff and (output is not None or as_json):
        raise click.UsageError("--diff prints only the diff: remove -o and --json.")
    rendered = task_yaml(options)
    if MAX_SPEND in rendered.text:
        from skyspot.money.travel import priced  # Without a limit, nobody reckons with prices.

        rendered = replace(rendered, text=priced(rendered.text, Path()))
    if rendered.before is not None:
        from skyspot.cli.lint import check_file  # Not for a template: lint would take a third of its time.

        check_file(rendered, options)
    if diff:
        _print_diff(rendered, options)
        return
    path = None
    if output is not None:
        from skyspot.task import payload

        path = payload.write(headed(rendered, Path(options.task)), output)
    if as_json:
        document = {"name": rendered.name, "path": str(path) if path else None, "notes": list(rendered.notes)}
        click.echo(json.dumps({**document, "yaml": rendered.text}, indent=2))
        return
    _print_notes(rendered)
    if path is None:
        click.echo(rendered.text, nl=False)
    else:
        click.echo(f"Wrote {path}")
        click.echo(f"Next: sky jobs launch {path.relative_to(output or '.')} -n {rendered.name}", err=True)


def _print_diff(rendered: Rendered, options: Options) -> None:
    from skyspot.task.sheet import difference

    if rendered.before is None:
        raise click.UsageError(f"--diff compares a plain YAML with its migration; {options.task} is a template.")
    _print_notes(rendered)
    click.echo(difference(rendered.before, rendered.text, options.task), nl=False)


def _print_notes(rendered: Rendered) -> None:
    for note in rendered.notes:
        click.echo(note, err=True)
