"""The command line: parse, call one function, echo."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from skyspot import __version__
from skyspot.errors import SkyspotError, UsageError, did_you_mean

EPILOG = "A first look, on this machine alone: skyspot rehearse"


class _Group(click.Group):
    """Commands in the order of their use; the nearest name for an unknown one."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            raise click.UsageError(f"{error.message.rstrip('.')}.{did_you_mean(args[0], self.commands)}", ctx) from None


def _complete_task(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[Any]:
    """Templates by name, and files."""
    from click.shell_completion import CompletionItem

    from skyspot.task import template

    found = [CompletionItem(name) for name in template.names() if name.startswith(incomplete)]
    return [*found, CompletionItem(incomplete, type="file")] if incomplete or not found else found


def _complete_run(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Runs whose task YAML lies here."""
    return sorted(path.stem for path in Path(".skyspot").glob("*.yaml") if path.stem.startswith(incomplete))


def _complete_run_or_folder(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[Any]:
    """Runs by name, and folders."""
    from click.shell_completion import CompletionItem

    found = [CompletionItem(name) for name in _complete_run(_ctx, _parameter, incomplete)]
    return [*found, CompletionItem(incomplete, type="dir")] if incomplete or not found else found


def _complete_gpus(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Accelerators by name, after the last comma."""
    from skyspot.task.gpus import NAMES

    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}:" for name in NAMES if name.lower().startswith(last.lower())]


SHARED: list[Any] = [
    click.argument("task", required=False, metavar="[TASK]", shell_complete=_complete_task),
    click.option(
        "--gpus",
        metavar="A100:8[,L4:8]",
        shell_complete=_complete_gpus,
        help="Accelerators a node, the preferred first; A100*:8: every kind.",
    ),
    click.option(
        "-n",
        "--name",
        metavar="RUN",
        shell_complete=_complete_run,
        help="The run's name; made up where it is not given.",
    ),
    click.option("--bucket", metavar="URL|NAME|PATH", help="Where checkpoints go; without it SkyPilot makes a bucket."),
    click.option("--data", metavar="URL|stdlib|HUB_ID|PATH", help="What to train on; a URL is mounted at /data."),
    click.option("--infra", metavar="INFRA", help="Restrict every rung to a place: aws, gcp/us-central1, slurm/c/p."),
    click.option("--prefer", metavar="INFRA", multiple=True, help="A first rung there; may be given several times."),
    click.option("--on-demand-last/--no-on-demand-last", default=None, help="End the ladder with on-demand machines."),
    click.option("--use-spot/--no-use-spot", default=None, help="Ask for machines that may be reclaimed (default)."),
    click.option("--max-hourly-cost", type=float, metavar="USD", help="Of a node, on every rung."),
    click.option("--num-nodes", type=int, metavar="N", help="Nodes."),
    click.option("--save-every", metavar="STEPS|auto", help="Steps between checkpoints."),
    click.option(
        "--strategy",
        type=click.Choice(["failover", "eager_next_region"], case_sensitive=False),
        help="SkyPilot's recovery strategy.",
    ),
    click.option("--env", metavar="K=V", multiple=True, help="An environment variable of the task."),
    click.option("--env-file", type=click.Path(path_type=Path), metavar="FILE", help="Several, in dotenv's format."),
    click.option("--secret", metavar="K[=V]", multiple=True, help="A secret of the task; only its name is written."),
    click.option("--set", "parameters", metavar="KEY=VALUE", multiple=True, help="A parameter of the template."),
]


def _check_codes(option: str, codes: Sequence[str]) -> None:
    """Refuse a code that is no lint rule's."""
    if codes:
        from skyspot.lint.rules import check_code  # Rarely needed.

        for code in codes:
            check_code(option, code)


def shared_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that every task command has; the command gets them as one `options.Options`."""

    @functools.wraps(command)
    def with_options(**flags: Any) -> Any:
        from skyspot.task import options, settings

        names = [
            "task", "gpus", "name", "bucket", "data", "infra", "prefer", "on_demand_last", "use_spot",
            "max_hourly_cost", "num_nodes", "save_every", "strategy", "env", "env_file", "secret", "parameters",
            "ignore",
        ]  # fmt: skip
        given = {name: flags.pop(name) for name in names if name in flags}
        file = given.pop("env_file")
        env = options.pairs("--env", given["env"], value_needed=True)
        given["env"] = {**(options.env_file(file) if file else {}), **env}
        given["secret"] = options.pairs("--secret", given["secret"], value_needed=False)
        for text in given["parameters"]:
            if "=" not in text:
                raise click.UsageError(f"--set: {text!a} is not KEY=VALUE, like --set max_steps=1000.")
        given["parameters"] = dict(text.split("=", 1) for text in given["parameters"])
        _check_codes("--ignore", given.get("ignore", ()))
        merged = settings.merged(given, Path.cwd())
        _check_codes(f"{options.SETTINGS}: ignore", merged.ignore)
        try:
            return command(options=merged, **flags)
        except UsageError as error:
            raise UsageError(options.blamed(str(error), merged)) from None

    for option in reversed(SHARED):
        with_options = option(with_options)
    return with_options


@click.group(cls=_Group, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="skyspot", message="%(prog)s %(version)s")
def cli() -> None:
    """Train on GPUs that can be taken away at any moment, and lose nothing."""


def _complete_rule(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """The codes of lint's rules."""
    from skyspot.lint.rules import CODES

    return [code for code in CODES if code.startswith(incomplete)]


ignore_option = click.option(
    "--ignore",
    metavar="CODE",
    multiple=True,
    shell_complete=_complete_rule,
    help="Turn the findings of a lint rule into notes. Repeatable.",
)
verbose_option = click.option("--verbose", is_flag=True, expose_value=False, help="Show SkyPilot's errors whole.")
"""`main` looks for it where an error comes out."""


@cli.command(short_help="Submit a task as a managed job that comes back.")
@shared_options
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@click.option("-d", "--detach", is_flag=True, help="Do not follow the logs.")
@click.option("--dryrun", is_flag=True, help="Have SkyPilot validate it; submit nothing.")
@click.option("--replace", is_flag=True, help="Where a job of this name is alive: let it save, and take its place.")
@click.option("--update-trainer", is_flag=True, help="Replace the run's copy of the trainer by this release's.")
@ignore_option
@click.option("--json", "as_json", is_flag=True, help="The plan and the job's id, for a program; needs -y or --dryrun.")
@verbose_option
def launch(options: Any, **how: bool) -> None:
    """Submit a task as a SkyPilot managed job that comes back after every preemption.

    Renders and checks it, shows what will be asked for, asks, submits, and follows the logs. Ctrl-C leaves the job
    running. Under the name of an earlier run it resumes that run: `skyspot launch -n RUN` is enough.

    \b
    Examples: skyspot launch --gpus A100:8
              skyspot launch my-task.yaml -n run-001 --on-demand-last
    """  # noqa: D301
    from skyspot.cli import launch as launch_cli

    sys.exit(launch_cli.run(options, launch_cli.How(**how)))


@cli.command()
@shared_options
@click.option("-o", "output", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Write it there.")
@click.option("--diff", is_flag=True, help="Print what changes in a plain YAML, as a diff that `patch` takes.")
@ignore_option
@click.option("--json", "as_json", is_flag=True, help="Name, notes and YAML, for a program.")
def render(options: Any, output: Path | None, diff: bool, as_json: bool) -> None:
    """Print the task YAML of a template, or of a YAML of your own.

    TASK is a template's name (default: finetune), a path to a .yaml.j2, or a plain SkyPilot .yaml, which comes out in
    today's spelling. With -o, DIR gets .skyspot/<run>.yaml and its payload, so that `sky jobs launch
    .skyspot/<run>.yaml` works there.

    \b
    Examples: skyspot render --gpus A100:8,L4:8 --on-demand-last -n run-001 -o .
              skyspot render --diff old.yaml
    """  # noqa: D301
    from skyspot.migrate.source import task_yaml
    from skyspot.task.render import headed

    if diff and (output is not None or as_json):
        raise click.UsageError("--diff prints the change and nothing else: leave out -o and --json.")
    rendered = task_yaml(options)
    if rendered.before is not None:
        from skyspot.cli import lint as lint_cli  # Not for a template: lint would be a third of its time.

        lint_cli.check_file(rendered, options)
    if diff:
        if rendered.before is None:
            raise click.UsageError(f"--diff: {options.task} is a template. A plain YAML has a before and an after.")
        from skyspot.task.sheet import difference

        for note in rendered.notes:
            click.echo(note, err=True)
        click.echo(difference(rendered.before, rendered.text, options.task), nl=False)
        return
    path = None
    if output is not None:
        from skyspot.task import payload

        path = payload.write(headed(rendered, Path(options.task)), output)
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


@cli.command(short_help="Check task YAMLs without submitting them.")
@shared_options
@click.argument("more", nargs=-1, metavar="[TASK]...", shell_complete=_complete_task)
@ignore_option
@click.option("--list", "list_rules", is_flag=True, help="List the rules by their codes.")
@click.option("--json", "as_json", is_flag=True, help="The findings, or the rules, for a program.")
def lint(options: Any, more: tuple[str, ...], list_rules: bool, as_json: bool) -> None:
    """Check task YAMLs: unknown keys, and what SkyPilot accepts now and a run regrets later.

    Needs no network and no SkyPilot. Exit status 1: an error was found, which `launch` would refuse. A comment
    `# skyspot: ignore[CODE]` on the line, or alone on the line above, turns a finding into a note, as --ignore does.

    \b
    Examples: skyspot lint my-task.yaml other.yaml
              skyspot lint --list
    """  # noqa: D301
    from skyspot.cli import lint as lint_cli

    if list_rules:
        lint_cli.show_rules(as_json)
        return
    sys.exit(lint_cli.run(options, more, as_json))


@cli.command(short_help="Preempt a task here; does it resume exactly?")
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
@click.option("--task", "part", metavar="NAME", help="The task of a pipeline to rehearse.")
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
    part: str | None,
    setup: bool,
    compare: str | None,
    keep: Path | None,
    as_json: bool,
) -> None:
    """Run a task on this machine, take the machine away again and again, and say whether it resumes exactly.

    No account, no GPU, no download: the default task trains a small model on the standard library's own source.

    \b
    Examples: skyspot rehearse
              skyspot rehearse my-task.yaml --compare 'results/*.json' --mount /data=./sample
    """  # noqa: D301
    from skyspot.cli import rehearse as rehearse_cli

    code = rehearse_cli.run(
        options,
        preemptions,
        kinds,
        seed,
        processes,
        mount,
        part=part,
        setup=setup,
        compare=compare,
        keep=keep,
        as_json=as_json,
    )
    sys.exit(code)


@cli.group(cls=_Group)
def templates() -> None:
    """List, show or eject the templates."""


@templates.command("list")
@click.option("--json", "as_json", is_flag=True, help="For a program.")
def templates_list(as_json: bool) -> None:
    """List the templates, and where each was found."""
    from skyspot.task import template

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


@templates.command("show")
@click.argument("name")
def templates_show(name: str) -> None:
    """Show a template: its parameters, then its text.

    \b
    Example: skyspot templates show finetune
    """  # noqa: D301
    from skyspot.task import template

    found = template.find(name)
    click.echo(f"{found.name}: {found.about}\n")
    click.echo("Parameters, set by --set KEY=VALUE:")
    width = max((len(p.name) for p in found.parameters), default=0)
    for p in found.parameters:
        default = "(needed)" if p.default is None else f"(default: {p.default})"
        click.echo(f"  {p.name:<{width}}  {p.help} {default}")
    click.echo(f"\n{found.text}", nl=False)


@templates.command("eject")
@click.argument("name")
def templates_eject(name: str) -> None:
    """Copy a template into ./templates/, for editing; it is then found before the bundled one."""
    from skyspot.task import template

    click.echo(f"Wrote {template.eject(name, Path())}")


@cli.command(short_help="Show managed jobs with their training.")
@click.option("-a", "--all", "everything", is_flag=True, help="Those that have ended, too.")
@click.option("--json", "as_json", is_flag=True, help="For a program.")
@verbose_option
def queue(everything: bool, as_json: bool) -> None:
    """Show SkyPilot's managed jobs with the training beside them; why a job that is starting has no machine yet."""
    from skyspot.cli import launch as launch_cli

    launch_cli.queue(everything, as_json)


@cli.command()
@click.argument("job", metavar="NAME|ID", shell_complete=_complete_run)
@click.option("--controller", is_flag=True, help="The controller's log: why there is no machine.")
@click.option("--follow/--no-follow", default=True, help="Whether to stay until the job ends (default).")
@verbose_option
def logs(job: str, controller: bool, follow: bool) -> None:
    """Show a job's log. Ctrl-C leaves the job running."""
    from skyspot.cli import launch as launch_cli

    sys.exit(launch_cli.logs(job, controller, follow))


@cli.command()
@click.argument("job", metavar="NAME|ID", shell_complete=_complete_run)
@click.option("--grace", type=float, default=90.0, show_default=True, metavar="S", help="Seconds it has to save.")
@click.option("--now", is_flag=True, help="Cancel at once; SIGTERM will have it save.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@verbose_option
def cancel(job: str, grace: float, now: bool, yes: bool) -> None:
    """Have a job save, then cancel it. A later launch under the same name goes on from there."""
    from skyspot.cli import launch as launch_cli

    launch_cli.cancel(job, grace, now, yes)


@cli.group(cls=_Group)
def checkpoints() -> None:
    """List or verify a run's checkpoints.

    RUN is the run's folder, its URL (s3://, gs://, az://, r2://, or whatever else fsspec reads), or its name: where
    .skyspot/RUN.yaml is here, or in the bucket that skyspot.yaml names.
    """


@checkpoints.command("list", short_help="List them, newest first.")
@click.argument("run", metavar="RUN", shell_complete=_complete_run_or_folder)
@click.option("--json", "as_json", is_flag=True, help="For a program.")
def checkpoints_list(run: str, as_json: bool) -> None:
    """List a run's checkpoints, newest first: step, age, size, attempt, and whether sizes are as they should be.

    Age is by the record of the attempt that saved it; ~ marks one that has none. Nothing is hashed.

    \b
    Examples: skyspot checkpoints list run-001
              skyspot checkpoints list s3://my-checkpoints/run-001 --json
    """  # noqa: D301
    from skyspot.cli import checkpoints as checkpoints_cli

    checkpoints_cli.show(run, as_json)


@checkpoints.command("verify", short_help="Read them again: does every file hash to what its manifest says?")
@click.argument("run", metavar="RUN", shell_complete=_complete_run_or_folder)
@click.option("--json", "as_json", is_flag=True, help="For a program.")
def checkpoints_verify(run: str, as_json: bool) -> None:
    """Read a run's checkpoints and its exported model again, and compare every file's hash with its manifest.

    Exit status 0: a checkpoint is committed, and all that are committed are whole. What a preemption left of a save is
    not committed: it is shown, and is no error.

    \b
    Example: skyspot checkpoints verify s3://my-checkpoints/run-001
    """  # noqa: D301
    from skyspot.cli import checkpoints as checkpoints_cli

    sys.exit(checkpoints_cli.verify(run, as_json))


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
        if error.__cause__ is not None and "--verbose" in sys.argv[1:]:
            import traceback

            sys.tracebacklimit = 1000  # SkyPilot sets it to 0.
            traceback.print_exception(error.__cause__)
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
    except OSError as error:
        # What nobody nearer to it knew a better word for: a full disk behind stdout, say.
        if "--verbose" in sys.argv[1:]:
            import traceback

            traceback.print_exc()
        where = f"{error.filename}: " if error.filename else ""
        with suppress(OSError):
            click.echo(f"Error: {where}{error.strerror or error}", err=True)
        os._exit(1)
