"""`skyspot plan`: the ladder with prices, and what the training will likely cost."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from skyspot.cli import cost_tables
from skyspot.cli.columns import say
from skyspot.cli.completion import complete_run_or_folder
from skyspot.cli.format import many
from skyspot.cli.options import ignore_option, json_option, task_options
from skyspot.errors import UsageError
from skyspot.migrate.source import task_yaml, written_for, written_text
from skyspot.money import plan as money
from skyspot.money.comparison import read_stated_prices
from skyspot.money.expected import BETWEEN_S, RECOVERY_S, SAVE_COST_S, Preemptions
from skyspot.money.plan import Length, TaskPlan
from skyspot.money.pricing import read_market
from skyspot.rehearsal.limits import format_duration
from skyspot.task import document, settings
from skyspot.task.document import Document, Task
from skyspot.task.durations import read_duration
from skyspot.task.options import Options
from skyspot.wording import figure

PASSED = 3
"""The exit status where a limit would be passed."""


@dataclass(frozen=True)
class Flags:
    """The options of `plan` that do not describe the task."""

    hours: float | None
    steps: int | None
    step_seconds: float | None
    speed_of: str | None
    prices: str | None
    preempted_every: str | None
    recovery: str | None
    save_interval: str | None
    save_cost: str | None
    everything: bool
    as_json: bool


@click.command()
@task_options
@click.option("--hours", type=float, metavar="H", help="Hours of training, without preemptions.")
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Steps of training, at a measured speed.")
@click.option("--step-seconds", type=float, metavar="S", help="Seconds of a step, for --steps.")
@click.option(
    "--speed-of",
    metavar="RUN",
    shell_complete=complete_run_or_folder,
    help="Measure the speed in this run's records; by default in those of -n.",
)
@click.option(
    "--prices",
    metavar="ONDEMAND,SPOT_ONE,SPOT_MANY,MIX[:HOURS]",
    help="Compare these prices of a node, in USD an hour, instead of the catalogs'.",
)
@click.option(
    "--preempted-every", metavar="DURATION", help=f"Mean time between preemptions ({format_duration(BETWEEN_S)})."
)
@click.option(
    "--recovery", metavar="DURATION", help=f"Time until it trains again afterwards ({format_duration(RECOVERY_S)})."
)
@click.option("--save-interval", metavar="DURATION", help="Time between saves (the best one, by Young and Daly).")
@click.option(
    "--save-cost", metavar="DURATION", help=f"Training time that a save costs ({format_duration(SAVE_COST_S)})."
)
@click.option("--all", "everything", is_flag=True, help="Show all places, not only the cheapest.")
@ignore_option
@json_option("Print the plan, with all places, as JSON.")
def plan(options: Options, **flags: Any) -> None:
    """Show what each rung of the ladder costs, and what the training will likely cost.

    Reads the price catalogs that SkyPilot has downloaded to this machine, and `prices` in skyspot.yaml. Needs no
    network and no SkyPilot; only --speed-of reads a run's bucket. Exits 3 if a rung costs more than its
    --max-hourly-cost, or if the run is expected to pass --max-spend or --deadline.

    \b
    Examples: skyspot plan --gpus A100:8,A10G:8 --on-demand-last --hours 20
              skyspot plan my-task.yaml --steps 5000 --step-seconds 1.8
              skyspot plan --hours 20 --prices 32.77,9.83,7.20,5.50:24
    """  # noqa: D301
    sys.exit(_plan(options, Flags(**flags)))


def _plan(options: Options, flags: Flags) -> int:
    """Print the plan; returns the exit status."""
    stated = read_stated_prices(flags.prices) if flags.prices is not None else None
    speed = _speed(options, flags)
    if stated and stated.mix_hours is not None and speed is None:
        raise UsageError("--prices: MIX:HOURS is compared with the hours of the others. Add --hours H, or drop :HOURS")
    file, name, notes = _read(options)
    market = read_market(file.tasks, settings.stated_prices(Path()))
    plans = [
        money.plan_task(task, title, market, speed.length if speed else None, _losses(task, flags, speed), stated)
        for title, task in zip(file.names(name), file.tasks, strict=True)
    ]
    if flags.as_json:
        click.echo(json.dumps(money.plan_json(plans, market, notes), indent=2))
    else:
        for note in notes:
            click.echo(note, err=True)
        say(cost_tables.market_lines(market))
        for number, one in enumerate(plans, 1):
            _show(one, number if len(plans) > 1 else 0, flags)
    passed = [text for one in plans for text in one.limits_passed]
    for text in passed if not flags.as_json else []:
        click.echo(f"Over limit: {text}", err=True)
    return PASSED if passed else 0


def _show(one: TaskPlan, number: int, flags: Flags) -> None:
    what = f"\nTask {number}, {one.name}" if number else f"\n{one.name}"
    click.echo(f"{what}: {many(len(one.rungs), 'rung')}, {many(one.nodes, 'node')}")
    if one.limits_line:
        click.echo(f"Limits: {one.limits_line}")
    cost_tables.show_ladder(one, flags.everything)
    if one.ways:
        cost_tables.show_comparison(one)


def _read(options: Options) -> tuple[Document, str, Sequence[str]]:
    """The task, its name, and notes; for a run's name alone, the file that was written for it."""
    written = written_for(options, Path())
    text = written_text(written, options) if written else None
    if written:
        options = Options(task=str(written), name=options.name)
    elif not options.task.endswith((".yaml", ".yml")):
        # Neither a new run's name nor its bucket plays a part.
        rendered = task_yaml(replace(options, name=options.name or "plan", bucket=options.bucket or "/checkpoints"))
        notes = [note for note in rendered.notes if note.startswith(("Hint:", "Note:"))]
        return document.read(rendered.text), options.name or options.task, notes
    from skyspot.cli.lint import check_file  # Not for a template: the import would take a fifth of the time.

    rendered = task_yaml(options)
    check_file(rendered, options)
    return document.read(text or rendered.text), rendered.name, rendered.notes


@dataclass(frozen=True)
class _Speed:
    """The length of the training, and the time of a step where that is known."""

    length: Length
    step_s: float | None


def _speed(options: Options, flags: Flags) -> _Speed | None:
    """The length that the options give; None: none.

    Raises:
        UsageError: the options contradict each other, or there is no speed for --steps.
    """
    for option, value in (("--hours", flags.hours), ("--step-seconds", flags.step_seconds)):
        if value is not None and not 0 < value < 1e6:
            raise UsageError(f"{option}: must be above 0 and below 1,000,000, not {value:g}")
    if flags.hours is not None:
        if flags.steps is not None:
            raise UsageError("--steps gives the length, and so does --hours. Drop one of them")
        return _Speed(Length(flags.hours, f"{flags.hours:g} h of training"), flags.step_seconds)
    if flags.steps is None:
        for option, given in (("--step-seconds", flags.step_seconds), ("--speed-of", flags.speed_of)):
            if given is not None:
                raise UsageError(f"{option} is for --steps N")
        return None
    if flags.step_seconds is not None:
        step_s, why = flags.step_seconds, f"{flags.steps} steps of {figure(flags.step_seconds)} s"
    else:
        step_s, why = _measured(options, flags)
        why = f"{flags.steps} steps of {figure(step_s)} s ({why})"
    hours = flags.steps * step_s / 3600
    return _Speed(Length(hours, f"{why}, {figure(hours)} h of training"), step_s)


def _measured(options: Options, flags: Flags) -> tuple[float, str]:
    """The seconds of a step by a run's records, and where they are from."""
    run = flags.speed_of or options.name
    if run is None:
        raise UsageError("--steps needs a speed: add --step-seconds S, or --speed-of RUN to measure it in a run")
    from skyspot.runs.find import open_existing  # Rarely needed.
    from skyspot.runs.speed import measured_speed

    found = measured_speed(open_existing(run))
    if found is None:
        raise UsageError(f"--speed-of: {run} has no record of a step; add --step-seconds S instead")
    return found.step_s, f"the mean of {many(found.steps, 'step')} of {run}"


def _losses(task: Task, flags: Flags, speed: _Speed | None) -> Preemptions:
    """What to expect of preemptions; the task's own save interval counts where a step's time is known."""

    def seconds(option: str, text: str | None, default: float) -> float:
        return default if text is None else read_duration(option, text)

    interval = None if flags.save_interval is None else read_duration("--save-interval", flags.save_interval)
    every = task.envs.get("SKYSPOT_SAVE_EVERY", "")
    if interval is None and speed and speed.step_s and every.isdecimal() and int(every):
        interval = int(every) * speed.step_s
    return Preemptions(
        between_s=seconds("--preempted-every", flags.preempted_every, BETWEEN_S),
        recovery_s=seconds("--recovery", flags.recovery, RECOVERY_S),
        save_cost_s=seconds("--save-cost", flags.save_cost, SAVE_COST_S),
        save_interval_s=interval,
    )
