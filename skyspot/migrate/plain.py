"""A SkyPilot YAML of the user's -> today's spelling, with the options of the command line put in, as text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from skyspot.errors import UsageError, shown
from skyspot.migrate import migration
from skyspot.task import document, edits, gpus, ladder, pipeline
from skyspot.task.options import NAME, Options, flag, flags_alone
from skyspot.task.pipeline import Pipeline
from skyspot.task.render import Rendered


@dataclass(frozen=True)
class Edited:
    """A task YAML after its edits."""

    pipeline: Pipeline
    changes: tuple[str, ...]
    """What the migration changed, a sentence each; the lines are those of the file as it was."""
    notes: tuple[str, ...]


_TAKEN = {
    "task", "gpus", "infra", "prefer", "on_demand_last", "use_spot", "max_hourly_cost", "num_nodes", "strategy", "env",
    "secret", "name", "ignore",
}  # fmt: skip
"""The options that mean something for a plain YAML."""


def rendered(path: Path, options: Options) -> Rendered:
    """A SkyPilot YAML of the user's, as it is but for what was asked for.

    Raises:
        UsageError: whatever is wrong with the file or with what was asked for; says where.
    """
    options, left = flags_alone(options)
    refused = [name for name in options.given() if name not in _TAKEN]
    if refused:
        option = flag(refused[0])
        raise UsageError(f"{option} means nothing for {path}: it is a plain YAML, not a template. Edit the file itself")
    before = edits.read(path)
    try:
        found = edited(before, options)
    except UsageError as error:
        raise UsageError(f"{path}{', ' if str(error).startswith('line') else ': '}{error}") from None
    name = options.name or found.pipeline.document.name or _name_of(path)
    if not NAME.fullmatch(name):
        raise UsageError(f"{path}: the name {shown(name)} cannot be a file's; -n gives it another")
    notes = [*(f"{path}, {change}." for change in found.changes), *found.notes]
    if left:
        notes.append(
            f"skyspot.yaml: {', '.join(left)} left out: it holds for templates, {path} says everything itself."
        )
    return Rendered(name, found.pipeline.text, tuple(notes), False, before)


def _name_of(path: Path) -> str:
    """The name of a run that only its file names: `my task.yaml` is the run my-task."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem)[:63].strip("._-") or path.stem


def edited(text: str, options: Options) -> Edited:
    """A task YAML as it is to be submitted; of a pipeline, each task is edited.

    Raises:
        UsageError: an option or an old spelling in it means nothing; says where.
    """
    found = pipeline.split(text)
    several = len(found.tasks) > 1
    if several and options.num_nodes is not None:
        raise UsageError(
            f"--num-nodes: a pipeline of {len(found.tasks)} tasks says for each how many nodes it has. Edit the file"
        )
    asking = [number for number in found.tasks if options.gpus is None or not several]
    if options.gpus is not None and several:
        asking = [number for number in found.tasks if edits.accelerators(document.tasks(found.documents[number])[0])]
        if not asking:
            raise UsageError("--gpus: no task of this pipeline asks for accelerators. Edit the file")
    changes: list[str] = []
    for number in found.tasks:

        def edit(part: str, asks: bool = number in asking) -> str:
            migrated = migration.to_today(part, given={*options.env, *options.secret})
            changes.extend(migrated.changes)
            return _with_options(migrated.text, options, asks)

        found = found.edited(number, edit)
    if options.name is not None:
        found = found.named(options.name, edits.with_name)
    return Edited(found, tuple(changes), _left(found, options, asking) if several else ())


def _left(found: Pipeline, options: Options, asking: list[int]) -> tuple[str, ...]:
    """Which tasks keep what they ask for beside `--gpus`."""
    kept = [name for name, number in zip(names(found, options), found.tasks, strict=True) if number not in asking]
    return (f"--gpus: not for {', '.join(kept)}, without accelerators in the file.",) if options.gpus and kept else ()


def names(found: Pipeline, options: Options) -> list[str]:
    """The tasks' names in messages."""
    said = found.document
    return said.names(options.name or said.name or "task")


def _with_options(text: str, options: Options, asks: bool) -> str:
    """One task with the options; `--gpus` where `asks`."""
    asked = options.gpus if asks else None
    if asked or options.prefer or options.infra or options.on_demand_last or options.use_spot is not None:
        found = document.read(text).tasks[0]
        groups = gpus.parse(asked) if asked else edits.accelerators(found)
        use_spot = options.use_spot if options.use_spot is not None else edits.uses_spot(found)
        rungs = ladder.rungs(
            groups,
            prefer=list(options.prefer),
            infra=options.infra,
            use_spot=bool(use_spot if use_spot is not None else asked),
            on_demand_last=bool(options.on_demand_last),
        )
        text = edits.with_rungs(text, [rung.to_yaml() for rung in rungs])
    if options.strategy is not None:
        text = edits.with_strategy(text, options.strategy.upper())
    if options.max_hourly_cost is not None:
        text = edits.with_resource(text, "max_hourly_cost", options.max_hourly_cost)
    if options.num_nodes is not None:
        text = edits.with_entry(text, "num_nodes", str(options.num_nodes))
    if options.env:
        text = edits.with_entries(text, "envs", dict(options.env))
    for key in options.secret:
        text = edits.without_empty_env(text, key)
    if options.secret:
        text = edits.with_entries(text, "secrets", dict.fromkeys(options.secret))
    return text
