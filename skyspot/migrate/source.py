"""The task YAML of what TASK names: a template, or a SkyPilot YAML of the user's own."""

from __future__ import annotations

from pathlib import Path

from skyspot.task import render
from skyspot.task.options import Options
from skyspot.task.render import Rendered


def task_yaml(options: Options) -> Rendered:
    """The task YAML of a template, a template's path, or a plain SkyPilot YAML.

    Raises:
        UsageError: whatever is wrong with what was asked for, in a line.
    """
    if options.task.endswith((".yaml", ".yml")):
        from skyspot.migrate import plain  # Not for a template: it would be half of its time.

        return plain.rendered(Path(options.task), options)
    return render.from_template(options)
