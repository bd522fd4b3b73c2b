"""The task YAML of what TASK names: a template, or a SkyPilot YAML of the user's own."""

from __future__ import annotations

import time
from pathlib import Path

from skyspot.errors import UsageError
from skyspot.task import render
from skyspot.task.options import Options, flags_alone, written_task
from skyspot.task.render import Rendered

_CHANGES = ("max_spend", "deadline", "spend_allowance", "use_spot")
"""The options that change the written task of a run, beside its name."""


def task_yaml(options: Options) -> Rendered:
    """Make the task YAML from a template's name or path, or from a plain SkyPilot YAML.

    Raises:
        UsageError: the file or an option is invalid.
    """
    if options.task.endswith((".yaml", ".yml")):
        from skyspot.migrate import plain  # Not for a template: the import would take half of its time.

        return plain.rendered(Path(options.task), options)
    return render.from_template(options)


def written_for(options: Options, folder: Path) -> Path | None:
    """The task YAML that was written for a run, if its name alone was given, or limits or a market with it.

    None: the options describe a task.

    Raises:
        UsageError: limits or a market are to change, and there is no such run.
    """
    known = written_task(options.name, folder) if options.name else None
    given = options.flags if options.flags is not None else set(options.given()) - {"task"}
    alone = given <= {"name", "ignore", *_CHANGES} and options.task == Options.task
    if known is None or not alone:
        return None
    if not known.exists() and not given.isdisjoint(_CHANGES):
        raise UsageError(
            f"this project has no run {options.name} to change: {known} does not exist. To start a new run, name its "
            f"task, too: `{options.task} -n {options.name}`"
        )
    return known if known.exists() else None


def written_text(path: Path, options: Options) -> str:
    """The task YAML that was written for a run, with the changes that the options ask for beside its name.

    Raises:
        UsageError: the file cannot be read, or an option makes no sense for it.
    """
    from skyspot.task import edits, limits  # Not for a template.

    text, (asked, _) = edits.read(path), flags_alone(options)
    if asked.use_spot is not None:
        text = limits.with_market(text, asked.use_spot)
    return limits.with_limits(text, asked.max_spend, asked.deadline, asked.spend_allowance, time.time())
