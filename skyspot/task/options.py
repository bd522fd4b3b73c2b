"""The options of the task commands, checked whether they come from flags or skyspot.yaml."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skyspot.errors import UsageError, shown
from skyspot.task.emitter import refuse_unwritable
from skyspot.task.ladder import STRATEGIES, check_infra

SETTINGS = "skyspot.yaml"
WRITTEN = ".skyspot"
"""The project's folder for the task YAMLs of runs, with their payloads."""
MAX_SPEND = "SKYSPOT_MAX_SPEND"
"""The variable of a task with its spend limit."""
NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
ENV = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")


@dataclass(frozen=True)
class Options:
    """The options shared by launch, render, plan and rehearse. None or empty: not given."""

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
    max_spend: str | None = None
    """USD, or `none`."""
    deadline: str | None = None
    """A duration, a time, or `none`."""
    spend_allowance: str | None = None
    """A duration."""
    num_nodes: int | None = None
    save_every: str | None = None
    strategy: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    secret: Mapping[str, str | None] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """`--set`: text from the command line, or values of YAML's types from skyspot.yaml."""
    ignore: tuple[str, ...] = ()
    """Codes of lint rules whose findings become notes."""
    flags: frozenset[str] | None = None
    """Names of the options given on the command line, not in skyspot.yaml; None: all of them."""

    def __post_init__(self) -> None:
        """Refuse invalid values.

        Raises:
            UsageError: names the option and the reason.
        """
        for option in ("task", "name", "bucket", "data", "infra", "save_every", "strategy", "max_spend", "deadline"):
            if getattr(self, option) == "":
                raise UsageError(f"{'TASK' if option == 'task' else flag(option)}: the value is empty")
        if self.name is not None and not NAME.fullmatch(self.name):
            raise UsageError(f"--name: {shown(self.name)}: use only letters, digits, `.`, `_` and `-`, at most 63")
        if self.infra is not None:
            check_infra("--infra", self.infra)
        for place in self.prefer:
            check_infra("--prefer", place)
        if self.strategy is not None and self.strategy not in STRATEGIES:
            raise UsageError(f"--strategy: {shown(self.strategy)} is not one of {', '.join(STRATEGIES)}")
        if self.max_hourly_cost is not None and not 0 < self.max_hourly_cost < 1e6:
            raise UsageError(f"--max-hourly-cost: {self.max_hourly_cost} is not a valid price in USD")
        if self.num_nodes is not None and not 1 <= self.num_nodes <= 10000:
            raise UsageError(f"--num-nodes: {self.num_nodes} is not a valid number of nodes")
        for what, names in (("--env", self.env), ("--secret", self.secret)):
            for key in names:
                if not ENV.fullmatch(key):
                    raise UsageError(f"{what}: {shown(key)} is not the name of an environment variable")
                if key.startswith("SKYPILOT_"):
                    raise UsageError(f"{what}: {key}: names that begin with SKYPILOT_ are reserved for SkyPilot")
        for key, value in self.env.items():
            refuse_unwritable(f"--env {key}", value)

    @property
    def has_limits(self) -> bool:
        """True if a limit in money or time is given, or taken away."""
        return any(one is not None for one in (self.max_spend, self.deadline, self.spend_allowance))

    def given(self) -> list[str]:
        """List the names of the given options."""
        names = [item.name for item in dataclasses.fields(self) if item.name != "flags"]
        return [name for name in names if getattr(self, name) not in (None, (), {})]


def written_task(name: str, folder: Path = Path()) -> Path:
    """Path of the task YAML that `launch` and `render -o` write for a run."""
    return folder / WRITTEN / f"{name}.yaml"


def secret_value(name: str, given: str | None) -> str:
    """The value of a secret: the given value, or the environment variable of that name.

    Raises:
        UsageError: there is neither.
    """
    value = given if given is not None else os.environ.get(name)
    if value is None:
        raise UsageError(f"secret {name} has no value; pass --secret {name}=VALUE or set the variable {name}")
    return value


def flag(name: str) -> str:
    """Return an option's spelling on the command line."""
    return "--set" if name == "parameters" else f"--{name.replace('_', '-')}"


def blamed(message: str, options: Options) -> str:
    """Name skyspot.yaml in an error message if the option came from there."""
    return message if options.flags is None else blamed_on(message, {*options.given()} - options.flags)


def blamed_on(message: str, from_file: Collection[str]) -> str:
    """Name skyspot.yaml in an error message if its option is one of these."""
    found = re.match(r"--([a-z-]+)", message)
    name = found[1].replace("-", "_").replace("set", "parameters") if found else ""
    return f"{SETTINGS}: {message[2:]}" if name in from_file else message


def flags_alone(options: Options) -> tuple[Options, list[str]]:
    """Drop the options from skyspot.yaml, for a plain task; also return the names of the dropped options."""
    if options.flags is None:
        return options, []
    left = [name for name in options.given() if name not in {*options.flags, "task", "ignore"}]
    bare = Options()
    return dataclasses.replace(options, **{name: getattr(bare, name) for name in left}), left


def pairs(option: str, texts: tuple[str, ...], value_needed: bool) -> dict[str, str | None]:
    """Parse `K=V`; a bare `K` takes its value from the environment, or None if no value is needed.

    Raises:
        UsageError: there is no `=`, and no such environment variable.
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
    """Read the variables of a .env file.

    Raises:
        UsageError: the file cannot be read.
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
