"""The one reader of task YAMLs: the tasks, and what each requests, mounts and starts.

It accepts files that SkyPilot would refuse, keeps the line of every value for lint's findings, and fills in the task's
own variables as SkyPilot does. Edits of a file's text are made in sheet.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import yaml

from skyspot.errors import NotYamlError
from skyspot.task.known_keys import HEADER
from skyspot.task.located import Located
from skyspot.task.mounts import Mount, clean_path
from skyspot.task.nodes import UNREADABLE, not_yaml
from skyspot.task.shell import Command, Word, commands, starts_our_trainer

# Two names for the same key, the newer first.
_ACCELERATORS = ("accelerators", "gpus")
_VARIABLE = re.compile(r"\$\{?\b([a-zA-Z_][a-zA-Z0-9_]*)\b\}?")


@dataclass(frozen=True)
class Script:
    """`run` or `setup`, with its commands."""

    at: Located | None
    commands: tuple[Command, ...]

    @property
    def text(self) -> str:
        """The script's text; empty if there is none."""
        return self.at.text if self.at else ""

    def line(self, word: Word) -> int:
        """Return the line of one of its words in the file."""
        assert self.at
        return int(self.at.node.start_mark.line) + 2 + word.line if self.at.is_verbatim else self.at.line


@dataclass(frozen=True)
class Rung:
    """One alternative of `resources`: an entry of `ordered` or `any_of` with the common settings, or these alone."""

    settings: Mapping[str, Located]
    line: int

    @cached_property
    def values(self) -> dict[str, Any]:
        """The settings in Python's types."""
        return {key: found.plain() for key, found in self.settings.items()}

    @property
    def place(self) -> str:
        """cloud[/region[/zone]] as written; empty if SkyPilot may choose."""
        parts = [self.values[key] for key in ("cloud", "region", "zone") if self.values.get(key)]
        return str(self.values.get("infra") or "/".join(map(str, parts)))

    @property
    def cloud(self) -> str | None:
        """The cloud that it is restricted to, in lower case; None: any."""
        place = self.settings.get("infra") or self.settings.get("cloud")
        name = place.text.partition("/")[0].strip().lower() if place else ""
        return {"k8s": "kubernetes", "*": None, "": None}.get(name, name)

    @property
    def use_spot(self) -> bool:
        """True if it requests spot instances."""
        return self.values.get("use_spot") is True

    @property
    def recover_on(self) -> list[tuple[int, int]]:
        """The exit codes on which SkyPilot recovers the job, each with its line."""
        recovery = self.settings.get("job_recovery")
        # `strategy: none` discards all of job_recovery: Resources.__init__.
        strategy = recovery.get("strategy") if recovery else None
        codes = recovery.get("recover_on_exit_codes") if recovery else None
        if codes is None or (strategy and strategy.value == "none"):
            return []
        return [(code.value, code.line) for code in codes.items or [codes] if type(code.value) is int]

    @property
    def max_hourly_cost(self) -> Any:
        """The maximum price per node and hour in USD; None: no limit."""
        return self.values.get("max_hourly_cost")

    @property
    def accelerators(self) -> tuple[tuple[str, int], ...]:
        """The acceptable accelerators, each as NAME[:COUNT] with its line."""
        stated = next((found for key in _ACCELERATORS if (found := self.settings.get(key)) and not found.is_null), None)
        if stated is None:
            return ()
        # {A100: 8}, and also {A100:8}, which YAML reads as a key without a value.
        named = [(f"{key}:{_number(item)}" if item.text else key, item.line) for key, item in stated.entries.items()]
        named += [(item.text, item.line) for item in stated.items]
        named += [(stated.text, stated.line)]
        return tuple((text, line) for text, line in named if text)


def _number(count: Located) -> str:
    return f"{count.value:g}" if isinstance(count.value, float) else count.text


@dataclass(frozen=True)
class Task:
    """One task of the file."""

    root: Located

    @cached_property
    def name(self) -> str | None:
        """The task's name; None if it has none."""
        return _name(self.root)

    # -- resources ----------------------------------------------------------------------------------------------------

    @cached_property
    def resources(self) -> Located | None:
        """`resources`."""
        return self.root.get("resources")

    @cached_property
    def _listed(self) -> Located | None:
        """The list of rungs; None if `resources` is a single rung."""
        lists = [found for key in ("ordered", "any_of") if self.resources and (found := self.resources.get(key))]
        return next((found for found in lists if found.items or found.entries or found.text), None)

    @cached_property
    def rungs_are_odd(self) -> bool:
        """True if SkyPilot would refuse `resources` because it, or a rung, is not a mapping."""
        if self.resources is None or self.resources.is_null:
            return False
        listed = self._listed
        return not self.resources.is_mapping or (
            listed is not None and not (listed.is_list and all(one.is_mapping for one in listed.items))
        )

    @cached_property
    def ordered(self) -> bool:
        """True if the rungs are tried in order; else SkyPilot takes the cheapest."""
        found = self.resources.get("ordered") if self.resources else None
        return found is not None and bool(found.items)

    @property
    def listed(self) -> bool:
        """True if the rungs are a list, even of one."""
        return self._listed is not None

    @cached_property
    def rungs(self) -> tuple[Rung, ...]:
        """All rungs, each with the common settings; a single one if there is no list."""
        if not self.resources:
            return (Rung({}, self.root.line),)
        base = {key: value for key, value in self.resources.entries.items() if key not in ("ordered", "any_of")}
        listed = self._listed.items if self._listed else []
        if not listed:
            return (Rung(base, self.resources.line),)
        return tuple(Rung({**base, **entry.entries}, entry.line) for entry in listed)

    @property
    def preemptible(self) -> bool:
        """True if the job can lose its machine: a spot instance, or a Slurm node."""
        return any(rung.use_spot or rung.cloud == "slurm" for rung in self.rungs)

    @cached_property
    def num_nodes(self) -> int:
        """The number of nodes."""
        found = self.root.get("num_nodes")
        return found.value if found is not None and type(found.value) is int and found.value else 1

    # -- the environment -----------------------------------------------------------------------------------------------

    @cached_property
    def env_entries(self) -> dict[str, Located]:
        """`envs` with line numbers."""
        found = self.root.get("envs")
        return found.entries if found else {}

    @cached_property
    def envs(self) -> dict[str, str]:
        """The environment of `setup` and `run` without secrets, as text like SkyPilot's (sky/task.py)."""
        return {key: "" if found.value is None else str(found.value) for key, found in self.env_entries.items()}

    @cached_property
    def secrets(self) -> dict[str, str | None]:
        """The task's secrets; None: the value is given elsewhere."""
        found = self.root.get("secrets")
        entries = found.entries if found else {}
        return {key: None if one.is_null else str(one.plain()) for key, one in entries.items()}

    def filled_in(self, text: str) -> str:
        """Fill `envs` into a text of file_mounts, volumes or workdir, like SkyPilot's _fill_in_env_vars."""
        return _VARIABLE.sub(lambda found: self.envs.get(found[1], found[0]), text)

    # -- scripts -------------------------------------------------------------------------------------------------------

    @cached_property
    def run(self) -> Script:
        """`run`."""
        return self._script("run")

    @cached_property
    def setup(self) -> Script:
        """`setup`."""
        return self._script("setup")

    def _script(self, key: str) -> Script:
        found = self.root.get(key)
        return Script(found, tuple(commands(found.text, self.envs)) if found else ())

    @cached_property
    def trainer(self) -> Command | None:
        """The command in `run` that starts our trainer or launcher."""
        return next((command for command in self.run.commands if starts_our_trainer(command)), None)

    # -- files on the machine ------------------------------------------------------------------------------------------

    @cached_property
    def workdir(self) -> str | None:
        """The folder that is copied to the machine; None: there is none, or it is a repository to clone."""
        found = self.root.get("workdir")
        return self.filled_in(found.text) if found is not None and isinstance(found.value, str) else None

    @cached_property
    def mounts(self) -> tuple[Mount, ...]:
        """The entries of `file_mounts`."""
        found = self.root.get("file_mounts")
        return tuple(self._mount(target, source) for target, source in found.entries.items()) if found else ()

    def _mount(self, target: str, entry: Located) -> Mount:
        def text(key: str) -> str:
            found = entry.get(key)
            return self.filled_in(found.text) if found else ""

        path = clean_path(self.filled_in(target))
        if not entry.is_mapping:
            source = self.filled_in(entry.text)
            return Mount(path, source, mode="COPY", is_bucket=False, line=entry.line, mode_line=entry.line)
        mode, config, sources = entry.get("mode"), entry.get("config"), entry.get("source")
        settings = config.get("mount", "mount_cached") if config else None
        read_only = settings.get("read_only") if settings else None
        return Mount(
            path=path,
            source=text("source"),
            name=text("name"),
            # In 0.14 the default is MOUNT (sky/data/storage.py: DEFAULT_STORAGE_MODE).
            mode=mode.text.upper() if mode and mode.text else "MOUNT",
            store=text("store"),
            read_only=read_only is not None and read_only.value is True,
            states_mode=mode is not None,
            sources=tuple(self.filled_in(one.text) for one in sources.items) if sources else (),
            line=entry.line,
            mode_line=mode.line if mode else entry.line,
        )

    @cached_property
    def volumes(self) -> list[str]:
        """The mount points of the task's volumes."""
        found = self.root.get("volumes")
        return [clean_path(self.filled_in(target)) for target in found.entries] if found else []


@dataclass(frozen=True)
class Document:
    """A task YAML: one task, or the tasks of a pipeline or job group."""

    tasks: tuple[Task, ...]
    header: Located | None = None
    """The first document, if it is not a task but names the job and how its tasks run."""

    @property
    def name(self) -> str | None:
        """The job's name: the header's, or the only task's."""
        if self.header is not None:
            return _name(self.header)
        return self.tasks[0].name if len(self.tasks) == 1 else None

    @property
    def is_group(self) -> bool:
        """True if the tasks run in parallel."""
        execution = self.header.get("execution") if self.header else None
        return execution is not None and execution.value == "parallel"

    def names(self, job: str) -> list[str]:
        """List the tasks' names in a job of this name; SkyPilot numbers tasks without a name."""
        if len(self.tasks) == 1:
            return [job]
        return [f"{job}-{number}" if task.name is None else task.name for number, task in enumerate(self.tasks)]


def _name(root: Located) -> str | None:
    found = root.get("name")
    return None if found is None or found.value is None else str(found.value)


def read(text: str) -> Document:
    """Read a task YAML; every document counts as a task, whatever it contains.

    Raises:
        NotYamlError: the text is not YAML.
    """
    try:
        found = [Located(node, node.start_mark.line + 1) for node in yaml.compose_all(text, Loader=yaml.SafeLoader)]
    except UNREADABLE as error:
        raise not_yaml(error, text) from None
    header = found[0] if len(found) > 1 and _is_header(found[0]) else None
    return Document(tuple(Task(one) for one in found if one is not header and not one.is_null), header)


def tasks(text: str) -> tuple[Task, ...]:
    """Read the tasks of a text; none if it is not YAML."""
    try:
        return read(text).tasks
    except NotYamlError:
        return ()


def _is_header(first: Located) -> bool:
    """True if a first document is a header, as in sky/utils/dag_utils.py."""
    return "name" in first.entries and first.entries.keys() <= {*HEADER}
