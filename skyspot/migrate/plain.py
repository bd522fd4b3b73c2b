"""Plain SkyPilot YAMLs: migrated to today's spelling, with the command line's options filled in, as text."""

from __future__ import annotations

import re
import time
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
    """A sentence per change of the migration, with the line numbers of the original file."""
    notes: tuple[str, ...]


_TAKEN = {
    "task", "gpus", "infra", "prefer", "on_demand_last", "use_spot", "max_hourly_cost", "num_nodes", "strategy", "env",
    "secret", "name", "ignore", "max_spend", "deadline", "spend_allowance",
}  # fmt: skip
"""The options that apply to a plain YAML."""


def rendered(path: Path, options: Options) -> Rendered:
    """Apply the options to a user's SkyPilot YAML; the rest stays unchanged.

    Raises:
        UsageError: the file or an option is invalid; names the place.
    """
    options, left = flags_alone(options)
    refused = [name for name in options.given() if name not in _TAKEN]
    if refused:
        option = flag(refused[0])
        raise UsageError(f"{option} applies to templates only; {path} is a plain SkyPilot YAML. Edit it instead")
    before = edits.read(path)
    try:
        found = edited(before, options)
        text = found.pipeline.text
        if options.has_limits:
            from skyspot.task.limits import with_limits  # Rarely needed.

            text = with_limits(text, options.max_spend, options.deadline, options.spend_allowance, time.time())
    except UsageError as error:
        raise UsageError(f"{path}{', ' if str(error).startswith('line') else ': '}{error}") from None
    name = options.name or found.pipeline.document.name or _name_of(path)
    if not NAME.fullmatch(name):
        raise UsageError(f"{path}: {shown(name)} is not a valid run name. Set another one with -n")
    notes = [*(f"{path}, {change}." for change in found.changes), *found.notes]
    if left:
        notes.append(f"Ignored from skyspot.yaml: {', '.join(left)} (skyspot.yaml applies to templates only).")
    return Rendered(name, text, tuple(notes), False, before)


def _name_of(path: Path) -> str:
    """Name a run after its file: `my task.yaml` becomes my-task."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem)[:63].strip("._-") or path.stem


def edited(text: str, options: Options) -> Edited:
    """Edit a task YAML for submission; in a pipeline, each task is edited.

    Raises:
        UsageError: an option or an old spelling is invalid; names the place.
    """
    found = pipeline.split(text)
    several = len(found.tasks) > 1
    if several and options.num_nodes is not None:
        raise UsageError(
            f"--num-nodes applies to a single task, but this pipeline has {len(found.tasks)}. Edit the file instead"
        )
    asking = [number for number in found.tasks if options.gpus is None or not several]
    if options.gpus is not None and several:
        asking = [number for number in found.tasks if edits.accelerators(document.tasks(found.documents[number])[0])]
        if not asking:
            raise UsageError("--gpus: no task of this pipeline requests accelerators. Edit the file instead")
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
    """Name the tasks that `--gpus` does not change."""
    kept = [name for name, number in zip(names(found, options), found.tasks, strict=True) if number not in asking]
    if not options.gpus or not kept:
        return ()
    return (f"--gpus leaves {', '.join(kept)} unchanged: no accelerators are requested there.",)


def names(found: Pipeline, options: Options) -> list[str]:
    """List the tasks' names for messages."""
    document = found.document
    return document.names(options.name or document.name or "task")


def _with_options(text: str, options: Options, asks: bool) -> str:
    """Apply the options to one task; `--gpus` only if `asks`."""
    wanted = options.gpus if asks else None
    if wanted or options.prefer or options.infra or options.on_demand_last or options.use_spot is not None:
        found = document.read(text).tasks[0]
        groups = gpus.parse(wanted) if wanted else edits.accelerators(found)
        use_spot = options.use_spot if options.use_spot is not None else edits.uses_spot(found)
        rungs = ladder.rungs(
            groups,
            prefer=list(options.prefer),
            infra=options.infra,
            use_spot=bool(use_spot if use_spot is not None else wanted),
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
