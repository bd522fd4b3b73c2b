"""A task's environment variables: their values as text, and put into other parts of the task."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_VARIABLE = re.compile(r"\$\{?\b([a-zA-Z_][a-zA-Z0-9_]*)\b\}?")


def as_text(value: Any) -> str:
    """A YAML value as the text that an environment variable holds."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


def filled_in(value: Any, envs: Any) -> Any:
    """A part of a task with its own variables put in, in keys and values, as SkyPilot does (sky/task.py)."""
    known = {str(key): as_text(item) for key, item in envs.items()} if isinstance(envs, Mapping) else {}

    def fill(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {fill(str(key)): fill(item) for key, item in part.items()}
        if isinstance(part, list):
            return [fill(item) for item in part]
        return _VARIABLE.sub(lambda found: known.get(found[1], found[0]), part) if isinstance(part, str) else part

    return fill(value)
