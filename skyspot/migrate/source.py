"""The task YAML of what TASK names: a template, or a SkyPilot YAML of the user's own."""

from __future__ import annotations

from pathlib import Path

from skyspot.task import render
from skyspot.task.options import Options, written_task
from skyspot.task.render import Rendered


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
    """The task YAML that was written for a run, if nothing but the run's name was given; None: there is none."""
    known = written_task(options.name, folder) if options.name else None
    given = options.flags if options.flags is not None else set(options.given()) - {"task"}
    alone = given <= {"name", "ignore"} and options.task == Options.task
    return known if known and alone and known.exists() else None
