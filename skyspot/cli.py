"""The command line: parse, call one function, echo."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from skyspot import __version__
from skyspot.errors import SkyspotError, did_you_mean

EPILOG = "A first look, on this machine alone: skyspot rehearse"


class _Group(click.Group):
    """Commands in the order of their use; the nearest name for an unknown one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            raise click.UsageError(f"{error.message.rstrip('.')}.{did_you_mean(args[0], self.commands)}", ctx) from None


def _not_yet(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value is not None:
        raise click.UsageError(f"{parameter.opts[0]} is not in this release.", ctx)


SHARED: list[Any] = [
    click.argument("task", default="finetune", metavar="[TASK]"),
    click.option(
        "--gpus", metavar="A100:8[,L4:8]", help="Accelerators a node, the preferred first; A100*:8: every kind."
    ),
    click.option("-n", "--name", metavar="RUN", help="The run's name; made up where it is not given."),
    click.option("--bucket", metavar="URL|PATH", help="Where checkpoints go; without it SkyPilot makes a bucket."),
    click.option("--data", metavar="URL|stdlib|PATH", help="What to train on; a bucket's URL is mounted at /data."),
    click.option("--infra", metavar="INFRA", help="Restrict every rung to a place: aws, gcp/us-central1, slurm/c/p."),
    click.option("--prefer", metavar="INFRA", multiple=True, help="A first rung there; may be given several times."),
    click.option("--on-demand-last", is_flag=True, default=None, help="End the ladder with on-demand machines."),
    click.option("--use-spot/--no-use-spot", default=None, help="Ask for machines that may be reclaimed (default)."),
    click.option("--max-hourly-cost", type=float, metavar="USD", help="Of a node, on every rung."),
    click.option("--max-spend", metavar="USD", callback=_not_yet, expose_value=False, help="Not in this release."),
    click.option("--deadline", metavar="TIME", callback=_not_yet, expose_value=False, help="Not in this release."),
    click.option("--num-nodes", type=int, metavar="N", help="Nodes."),
    click.option("--save-every", metavar="STEPS", help="Steps between checkpoints."),
    click.option(
        "--strategy", type=click.Choice(["failover", "eager_next_region"]), help="SkyPilot's recovery strategy."
    ),
    click.option("--env", metavar="K=V", multiple=True, help="An environment variable of the task."),
    click.option("--env-file", type=click.Path(path_type=Path), metavar="FILE", help="Several, in dotenv's format."),
    click.option("--secret", metavar="K[=V]", multiple=True, help="A secret of the task; only its name is written."),
    click.option("--set", "parameters", metavar="KEY=VALUE", multiple=True, help="A parameter of the template."),
]


def shared_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every task command has; the command gets them as one `options.Options`."""

    @functools.wraps(command)
    def with_options(**flags: Any) -> Any:
        from skyspot import options

        names = [
            "task", "gpus", "name", "bucket", "data", "infra", "prefer", "on_demand_last", "use_spot",
            "max_hourly_cost", "num_nodes", "save_every", "strategy", "env", "env_file", "secret", "parameters",
        ]  # fmt: skip
        given = {name: flags.pop(name) for name in names}
        file = given.pop("env_file")
        env = options.pairs("--env", given["env"], value_needed=True)
        given["env"] = {**(options.env_file(file) if file else {}), **env}
        given["secret"] = options.pairs("--secret", given["secret"], value_needed=False)
        for text in given["parameters"]:
            if "=" not in text:
                raise click.UsageError(f"--set: {text!a} is not KEY=VALUE, like --set max_steps=1000.")
        given["parameters"] = dict(text.split("=", 1) for text in given["parameters"])
        return command(options=options.merged(given, Path.cwd()), **flags)

    for option in reversed(SHARED):
        with_options = option(with_options)
    return with_options


@click.group(cls=_Group, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="skyspot", message="%(prog)s %(version)s")
def cli() -> None:
    """Train on GPUs that can be taken away at any moment, and lose nothing."""


@cli.command()
@shared_options
@click.option("-o", "output", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Write it there.")
@click.option("--json", "as_json", is_flag=True, help="Name, notes and YAML, for a program.")
def render(options: Any, output: Path | None, as_json: bool) -> None:
    r"""Print the task YAML of a template, or of a YAML of your own.

    TASK is a template's name (default: finetune), a path to a .yaml.j2, or a plain SkyPilot .yaml. With -o, DIR gets
    .skyspot/<run>.yaml and its payload, so that `sky jobs launch .skyspot/<run>.yaml` works there.

    \b
    Example: skyspot render --gpus A100:8,L4:8 --on-demand-last -n run-001 -o .
    """
    from skyspot.render import task_yaml

    rendered = task_yaml(options)
    path = None
    if output is not None:
        from skyspot import payload

        path = payload.write(rendered, output)
    if as_json:
        document = {"name": rendered.name, "path": str(path) if path else None, "notes": list(rendered.notes)}
        click.echo(json.dumps({**document, "yaml": rendered.text}, indent=2))
        return
    for note in rendered.notes:
        click.echo(note, err=True)
    if path is None:
        click.echo(rendered.text, nl=False)
    else:
        click.echo(f"Wrote {path}")
        click.echo(f"Next: sky jobs launch {path.relative_to(output or '.')} -n {rendered.name}", err=True)


@cli.command()
@shared_options
@click.option(
    "--preemptions", type=int, default=5, metavar="N", show_default=True, help="How often to take the machine."
)
@click.option("--kinds", metavar="A,B", help="aws-notice, sigterm, kill, kill-in-save, torn; default: all, in turn.")
@click.option("--seed", type=int, default=0, metavar="N", help="Of the instants at which machines are taken.")
@click.option(
    "--processes", default="1,2", metavar="1,2", show_default=True, help="First: the run's; then: a leg's changes."
)
@click.option("--mount", multiple=True, metavar="DEST=FOLDER", help="A folder that stands in for a bucket.")
@click.option("--setup", is_flag=True, help="Run the task's `setup` on each new machine too.")
@click.option("--compare", metavar="GLOB", help="Result files, within the bucket, to compare byte for byte.")
@click.option(
    "--keep", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER", help="Leave everything there."
)
@click.option("--json", "as_json", is_flag=True, help="The result, for a program.")
def rehearse(
    options: Any,
    preemptions: int,
    kinds: str | None,
    seed: int,
    processes: str,
    mount: tuple[str, ...],
    setup: bool,
    compare: str | None,
    keep: Path | None,
    as_json: bool,
) -> None:
    r"""Run a task on this machine, take the machine away again and again, and say whether it resumes exactly.

    No account, no GPU, no download: the default task trains a small model on the standard library's own source.

    \b
    Examples: skyspot rehearse
              skyspot rehearse my-task.yaml --compare 'results/*.json' --mount /data=./sample
    """
    from skyspot import rehearse_cli

    code = rehearse_cli.run(
        options, preemptions, kinds, seed, processes, mount, setup=setup, compare=compare, keep=keep, as_json=as_json
    )
    sys.exit(code)


@cli.group(cls=_Group)
def templates() -> None:
    """List, show or eject the templates."""


@templates.command("list")
@click.option("--json", "as_json", is_flag=True, help="For a program.")
def templates_list(as_json: bool) -> None:
    """List the templates, and where each was found."""
    from skyspot import template

    found = [template.read(path) for path in template.names().values()]
    if as_json:
        rows = [{"name": t.name, "path": str(t.path), "bundled": t.bundled, "about": t.about} for t in found]
        click.echo(json.dumps(rows, indent=2))
        return
    width = max(len(t.name) for t in found)
    for t in found:
        where = "" if t.bundled else f"  ({t.path})"
        click.echo(f"{t.name:<{width}}  {t.about}{where}")


@templates.command("show")
@click.argument("name")
def templates_show(name: str) -> None:
    r"""Show a template: its parameters, then its text.

    \b
    Example: skyspot templates show finetune
    """
    from skyspot import template

    found = template.find(name)
    click.echo(f"{found.name}: {found.about}\n")
    click.echo("Parameters, set by --set KEY=VALUE:")
    width = max(len(p.name) for p in found.parameters)
    for p in found.parameters:
        default = "(needed)" if p.default is None else f"(default: {p.default})"
        click.echo(f"  {p.name:<{width}}  {p.help} {default}")
    click.echo(f"\n{found.text}", nl=False)


@templates.command("eject")
@click.argument("name")
def templates_eject(name: str) -> None:
    """Copy a template into ./templates/, for editing; it is then found before the bundled one."""
    from skyspot import template

    click.echo(f"Wrote {template.eject(name, Path())}")


def main() -> None:
    """The console script: the one place that prints errors."""
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as leaving:
        sys.exit(leaving.exit_code)
    except click.ClickException as error:
        message = error.format_message()
        ctx = getattr(error, "ctx", None)
        if isinstance(error, click.NoSuchOption) and ctx is not None:
            known = [option for parameter in ctx.command.get_params(ctx) for option in parameter.opts]
            message = f"No such option: {error.option_name}.{did_you_mean(error.option_name, known)}"
        click.echo(f"Error: {message}", err=True)
        sys.exit(error.exit_code)
    except SkyspotError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("trainer"):
            raise
        click.echo(
            "Error: a trainer.py here hides skyspot's package of that name: rename it, or go elsewhere", err=True
        )
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
