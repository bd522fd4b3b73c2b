"""What a task command was asked for: flags beat skyspot.yaml, which beats the template's defaults."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from skyspot.errors import UsageError, did_you_mean, shown
from skyspot.ladder import STRATEGIES, check_infra
from skyspot.yamltext import refuse_unwritable

SETTINGS = "skyspot.yaml"
NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
ENV = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")


@dataclass(frozen=True)
class Options:
    """The options that launch, render, plan and rehearse share. None, or empty: not given."""

    task: str = "finetune"
    gpus: str | None = None
    name: str | None = None
    bucket: str | None = None
    data: str | None = None
    infra: str | None = None
    prefer: tuple[str, ...] = ()
    on_demand_last: bool | None = None
    use_spot: bool | None = None
    max_hourly_cost: float | None = None
    num_nodes: int | None = None
    save_every: str | None = None
    strategy: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    secret: Mapping[str, str | None] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """`--set`: as text from the command line, as YAML's types from skyspot.yaml."""
    ignore: tuple[str, ...] = ()
    """Codes of lint's rules whose findings are notes."""
    flags: frozenset[str] | None = None
    """Names of those that the command line itself gave, beside skyspot.yaml; None: all of them."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense, whoever asked for it.

        Raises:
            UsageError: says which option, and why.
        """
        for option in ("task", "name", "bucket", "data", "infra", "save_every", "strategy"):
            if getattr(self, option) == "":
                raise UsageError(f"{'TASK' if option == 'task' else flag(option)}: it is empty")
        if self.name is not None and not NAME.fullmatch(self.name):
            raise UsageError(f"--name: {shown(self.name)}: letters, digits, `.`, `_` and `-` alone, at most 63")
        if self.infra is not None:
            check_infra("--infra", self.infra)
        for place in self.prefer:
            check_infra("--prefer", place)
        if self.strategy is not None and self.strategy not in STRATEGIES:
            raise UsageError(f"--strategy: {shown(self.strategy)} is none of {', '.join(STRATEGIES)}")
        if self.max_hourly_cost is not None and not 0 < self.max_hourly_cost < 1e6:
            raise UsageError(f"--max-hourly-cost: {self.max_hourly_cost} is not a price in USD")
        if self.num_nodes is not None and not 1 <= self.num_nodes <= 10000:
            raise UsageError(f"--num-nodes: {self.num_nodes} is not a number of nodes")
        for what, names in (("--env", self.env), ("--secret", self.secret)):
            for key in names:
                if not ENV.fullmatch(key):
                    raise UsageError(f"{what}: {shown(key)} is not the name of an environment variable")
                if key.startswith("SKYPILOT_"):
                    raise UsageError(f"{what}: {key}: names that begin with SKYPILOT_ are SkyPilot's own")
        for key, value in self.env.items():
            refuse_unwritable(f"--env {key}", value)
        _check_codes("--ignore", self.ignore)

    def given(self) -> list[str]:
        """Names of the options that were given."""
        names = [item.name for item in dataclasses.fields(self) if item.name != "flags"]
        return [name for name in names if getattr(self, name) not in (None, (), {})]


def _check_codes(option: str, codes: Collection[str]) -> None:
    for code in codes:
        from skyspot.lint_rules import check_code  # Rarely needed.

        check_code(option, code)


def flag(name: str) -> str:
    """The command line's spelling of an option's name."""
    return "--set" if name == "parameters" else f"--{name.replace('_', '-')}"


def blamed(message: str, options: Options) -> str:
    """An error's message, with skyspot.yaml named where it gave the option that the message is about."""
    return message if options.flags is None else _blamed(message, {*options.given()} - options.flags)


def _blamed(message: str, from_file: Collection[str]) -> str:
    found = re.match(r"--([a-z-]+)", message)
    name = found[1].replace("-", "_").replace("set", "parameters") if found else ""
    return f"{SETTINGS}: {message[2:]}" if name in from_file else message


def flags_alone(options: Options) -> tuple[Options, list[str]]:
    """The options without what skyspot.yaml gave, and the names of what that was: for a task that says it itself."""
    if options.flags is None:
        return options, []
    left = [name for name in options.given() if name not in {*options.flags, "task", "ignore"}]
    bare = Options()
    return dataclasses.replace(options, **{name: getattr(bare, name) for name in left}), left


def pairs(option: str, texts: tuple[str, ...], value_needed: bool) -> dict[str, str | None]:
    """`K=V` as a mapping; a bare `K` takes the value that K has here, or None where none is needed.

    Raises:
        UsageError: no `=` in it, and no value here.
    """
    found: dict[str, str | None] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if equals:
            found[key] = value
        elif not value_needed:
            found[key] = None
        elif key in os.environ:
            found[key] = os.environ[key]
        else:
            raise UsageError(f"{option}: {shown(text)} is not KEY=VALUE, and no variable of that name is set here")
    return found


def env_file(path: Path) -> dict[str, str]:
    """The variables of a dotenv file.

    Raises:
        UsageError: it cannot be read.
    """
    from dotenv.parser import parse_stream

    found: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for binding in parse_stream(file):
                if binding.error:
                    raise UsageError(f"--env-file {path}, line {binding.original.line}: not KEY=VALUE")
                if binding.key is not None:
                    found[binding.key] = binding.value or ""
    except FileNotFoundError:
        raise UsageError(f"--env-file {path}: no such file") from None
    except OSError as error:
        raise UsageError(f"--env-file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--env-file {path}: not UTF-8") from None
    return found


def merged(flags: Mapping[str, Any], folder: Path) -> Options:
    """The options of a command, from its flags and from skyspot.yaml in the working folder."""
    settings = read_settings(folder / SETTINGS)
    values: dict[str, Any] = dict(settings)
    said: set[str] = set()
    for key, value in flags.items():
        if value in (None, (), {}):
            continue
        if key in ("env", "secret", "parameters"):
            value = {**values.get(key, {}), **value}
        elif key == "ignore":
            value = tuple(dict.fromkeys([*values.get(key, ()), *value]))
        values[key] = value
        said.add(key)
    try:
        return Options(**values, flags=frozenset(said))
    except UsageError as error:
        raise UsageError(_blamed(str(error), values.keys() - said)) from None


def read_settings(path: Path) -> dict[str, Any]:
    """What skyspot.yaml says, by the names of Options; empty where there is none.

    Raises:
        UsageError: unreadable, an unknown key (the nearest is given), or a value of another type.
    """
    try:
        text = path.read_text(encoding="utf-8")
        document = yaml.safe_load(text)
        _refuse_twins(path.name, yaml.compose(text))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path.name}: not readable as YAML: {' '.join(str(error).split())[:160]}") from None
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise UsageError(f"{path.name}: it has to hold options by name, like `bucket: s3://my-bucket`")
    known = {
        item.name.replace("parameters", "set"): item for item in dataclasses.fields(Options) if item.name != "flags"
    }
    found: dict[str, Any] = {}
    for key, value in document.items():
        name = str(key).replace("-", "_")
        if name in ("max_spend", "deadline"):
            raise UsageError(f"{path.name}: {key} is not in this release")
        if name not in known:
            near = did_you_mean(name, known)
            raise UsageError(f"{path.name}: unknown key {shown(str(key))}.{near}")
        if value is not None:
            found[known[name].name] = _typed(path.name, name, value)
    return found


def _refuse_twins(where: str, node: yaml.Node | None) -> None:
    """Refuse a key that stands there twice: YAML's loader silently takes the last."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        twins = [one for one, _ in node.value if one.value == key.value] if isinstance(key, yaml.ScalarNode) else []
        if len(twins) > 1:
            raise UsageError(
                f"{where}, line {twins[1].start_mark.line + 1}: {shown(key.value)} stands there a second time"
            )
        _refuse_twins(where, value)


def _as_text(value: Any) -> str:
    """A value of skyspot.yaml as the text that the command line would have."""
    return str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)


def _typed(where: str, name: str, value: Any) -> Any:
    """A value of skyspot.yaml, of its option's type."""
    problem = UsageError(f"{where}: {name}: {shown(str(value))} is not what this option takes")
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
        if name == "ignore":
            _check_codes(f"{where}: ignore", places)
        return tuple(places)
    if name in ("env", "set"):
        if not isinstance(value, dict):
            raise problem
        for key, item in value.items():
            if not isinstance(key, str):
                raise UsageError(f"{where}: {name}: the key {key} is not text to YAML: put it in quotes")
            if name == "env" and (item is None or isinstance(item, (dict, list))):
                raise UsageError(f"{where}: env: {key} needs a value that is text or a number")
        return {key: _as_text(item) for key, item in value.items()} if name == "env" else value
    if name == "secret":
        keys = value if isinstance(value, list) else [value]
        if not all(isinstance(key, str) for key in keys):
            raise UsageError(f"{where}: secret: a list of names; values are never written into a file")
        return dict.fromkeys(keys)
    if isinstance(value, (dict, list)):
        raise problem
    return _as_text(value)
