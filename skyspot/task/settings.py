"""skyspot.yaml, a project's defaults: flags override it, and it overrides the template's defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from skyspot.errors import UsageError, did_you_mean, shown
from skyspot.task.options import SETTINGS, Options, blamed_on

if TYPE_CHECKING:
    from skyspot.task.stated_prices import StatedPrice

PRICES = "prices"
"""The key of skyspot.yaml that is no option: prices of machines, for a plan."""


def merged(flags: Mapping[str, Any], folder: Path) -> Options:
    """Merge a command's flags with skyspot.yaml in the working folder."""
    settings = read_settings(folder / SETTINGS)
    values: dict[str, Any] = {key: value for key, value in settings.items() if key != PRICES}
    from_flags: set[str] = set()
    for key, value in flags.items():
        if value in (None, (), {}):
            continue
        if key in ("env", "secret", "parameters"):
            value = {**values.get(key, {}), **value}
        elif key == "ignore":
            value = tuple(dict.fromkeys([*values.get(key, ()), *value]))
        values[key] = value
        from_flags.add(key)
    try:
        return Options(**values, flags=frozenset(from_flags))
    except UsageError as error:
        raise UsageError(blamed_on(str(error), values.keys() - from_flags)) from None


def stated_prices(folder: Path) -> tuple[StatedPrice, ...]:
    """The prices of machines that skyspot.yaml in a folder states.

    Raises:
        UsageError: as of read_settings.
    """
    found: tuple[StatedPrice, ...] = read_settings(folder / SETTINGS).get(PRICES, ())
    return found


def read_settings(path: Path) -> dict[str, Any]:
    """Read skyspot.yaml into the names of Options, and PRICES; empty if there is no file.

    Raises:
        UsageError: the file is unreadable, a key is unknown (names the nearest), or a value has the wrong type.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = yaml.safe_load(text)
        node = yaml.compose(text)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path.name}: not readable as YAML: {' '.join(str(error).split())[:160]}") from None
    if document is None or node is None:
        return {}
    from skyspot.task.nodes import refuse_twins  # Not needed without a file.

    try:
        refuse_twins(node)
    except UsageError as error:
        raise UsageError(f"{path.name}, {error}") from None
    if not isinstance(document, dict):
        raise UsageError(f"{path.name}: expected options by name, like `bucket: s3://my-bucket`")
    known = {
        item.name.replace("parameters", "set"): item for item in dataclasses.fields(Options) if item.name != "flags"
    }
    found: dict[str, Any] = {}
    for key, value in document.items():
        name = str(key).replace("-", "_")
        if name == PRICES:
            from skyspot.task.stated_prices import read_stated  # Rarely there.

            found[PRICES] = read_stated(path.name, value) if value is not None else ()
            continue
        if name not in known:
            near = did_you_mean(name, [*known, PRICES])
            raise UsageError(f"{path.name}: unknown key {shown(str(key))}.{near}")
        if value is not None:
            found[known[name].name] = _typed(path.name, name, value)
    return found


def _as_text(value: Any) -> str:
    """Convert a value of skyspot.yaml to the text it would have on the command line."""
    return str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)


def _typed(where: str, name: str, value: Any) -> Any:
    """Check a value of skyspot.yaml and convert it to its option's type."""
    problem = UsageError(f"{where}: {name}: {shown(str(value))} is not a valid value for this option")
    if name in ("on_demand_last", "use_spot"):
        if not isinstance(value, bool):
            raise problem
        return value
    if name in ("max_hourly_cost", "num_nodes"):
        wanted = (int,) if name == "num_nodes" else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise problem
        return value
    if name in ("prefer", "ignore"):
        places = value if isinstance(value, list) else [value]
        if not all(isinstance(place, str) for place in places):
            raise problem
        return tuple(places)
    if name in ("env", "set"):
        if not isinstance(value, dict):
            raise problem
        for key, item in value.items():
            if not isinstance(key, str):
                raise UsageError(f"{where}: {name}: YAML does not read the key {key} as text. Put it in quotes")
            if name == "env" and (item is None or isinstance(item, (dict, list))):
                raise UsageError(f"{where}: env: {key} must be text or a number")
        return {key: _as_text(item) for key, item in value.items()} if name == "env" else value
    if name == "secret":
        keys = value if isinstance(value, list) else [value]
        if not all(isinstance(key, str) for key in keys):
            raise UsageError(f"{where}: secret: give a list of names; a file must not contain secret values")
        return dict.fromkeys(keys)
    if isinstance(value, (dict, list)):
        raise problem
    return _as_text(value)


def remember_bucket(name: str, folder: Path) -> bool:
    """Write the bucket that SkyPilot creates into skyspot.yaml for later runs; False if that fails."""
    path = folder / SETTINGS
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        new = f"{text}{'' if not text or text.endswith(chr(10)) else chr(10)}bucket: {name}\n"
        before = yaml.safe_load(text) or {}
        if not isinstance(before, dict) or yaml.safe_load(new) != {**before, "bucket": name}:
            return False
        path.write_text(new, encoding="utf-8")
    except (OSError, yaml.YAMLError):
        return False
    return True
