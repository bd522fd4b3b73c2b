"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from skyspot.cli.completion import complete_gpus, complete_rule, complete_run, complete_task
from skyspot.errors import UsageError
from skyspot.task.ladder import STRATEGIES

TASK_OPTIONS: list[Any] = [
    click.argument("task", required=False, metavar="[TASK]", shell_complete=complete_task),
    click.option(
        "--gpus",
        metavar="A100:8[,L4:8]",
        shell_complete=complete_gpus,
        help="Accelerators per node, in order of preference; 'A100*:8' means every A100 variant.",
    ),
    click.option(
        "-n", "--name", metavar="RUN", shell_complete=complete_run, help="The run's name; generated if not given."
    ),
    click.option(
        "--bucket", metavar="URL|NAME|PATH", help="Where checkpoints are stored; by default SkyPilot creates a bucket."
    ),
    click.option("--data", metavar="URL|stdlib|HUB_ID|PATH", help="The training data; a URL is mounted at /data."),
    click.option("--infra", metavar="INFRA", help="Run only in this place: aws, gcp/us-central1, slurm/c/p."),
    click.option("--prefer", metavar="INFRA", multiple=True, help="Try this place first. Repeatable."),
    click.option(
        "--on-demand-last/--no-on-demand-last", default=None, help="Fall back to on-demand machines at the end."
    ),
    click.option("--use-spot/--no-use-spot", default=None, help="Use machines that can be preempted (default)."),
    click.option("--max-hourly-cost", type=float, metavar="USD", help="Maximum price per node and hour."),
    click.option(
        "--max-spend",
        metavar="USD",
        help="Save and stop at about this spend, over all attempts; `none` removes the limit.",
    ),
    click.option(
        "--deadline", metavar="DURATION|TIME", help="Save and stop by then: 12h from now on, or 2026-12-01T08:00."
    ),
    click.option(
        "--spend-allowance", metavar="DURATION", help="Time that each attempt costs beside what is recorded (5m)."
    ),
    click.option("--num-nodes", type=int, metavar="N", help="Number of nodes."),
    click.option("--save-every", metavar="STEPS|auto", help="Number of steps between checkpoints."),
    click.option(
        "--strategy",
        type=click.Choice(STRATEGIES, case_sensitive=False),
        help="SkyPilot's recovery strategy.",
    ),
    click.option("--env", metavar="K=V", multiple=True, help="Set an environment variable of the task. Repeatable."),
    click.option(
        "--env-file", type=click.Path(path_type=Path), metavar="FILE", help="Read variables from a .env file."
    ),
    click.option(
        "--secret", metavar="K[=V]", multiple=True, help="Set a secret; the YAML holds only its name. Repeatable."
    ),
    click.option(
        "--set", "parameters", metavar="KEY=VALUE", multiple=True, help="Set a parameter of the template. Repeatable."
    ),
]
ignore_option = click.option(
    "--ignore",
    metavar="CODE",
    multiple=True,
    shell_complete=complete_rule,
    help="Turn the findings of a lint rule into notes. Repeatable.",
)
verbose_option = click.option(
    "--verbose", is_flag=True, expose_value=False, help="Show the traceback of SkyPilot's errors."
)
"""Read by `main` when it prints an error."""


def json_option(help_text: str) -> Callable[[Any], Any]:
    """The option --json of a command."""
    return click.option("--json", "as_json", is_flag=True, help=help_text)


def task_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that describe a task; the command gets them as one `options.Options`."""

    @functools.wraps(command)
    def with_options(**flags: Any) -> Any:
        from skyspot.task import options, settings

        names = [
            "task", "gpus", "name", "bucket", "data", "infra", "prefer", "on_demand_last", "use_spot",
            "max_hourly_cost", "max_spend", "deadline", "spend_allowance", "num_nodes", "save_every", "strategy", "env",
            "env_file", "secret", "parameters",
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

    for option in reversed(TASK_OPTIONS):
        with_options = option(with_options)
    return with_options


def _check_codes(option: str, codes: Sequence[str]) -> None:
    """Refuse a code that no lint rule has."""
    if codes:
        from skyspot.lint.rules import check_code  # Rarely needed.

        for code in codes:
            check_code(option, code)
