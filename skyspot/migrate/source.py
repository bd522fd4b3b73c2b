"""The task YAML of what TASK names: a template, or a SkyPilot YAML of the user's own."""

from __future__ import annotations

from pathlib import Path

from skyspot.task import render
from skyspot.task.options import Options
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
