"""A task YAML as lint sees it: every value with its line, whatever strange thing stands in its place."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import yaml

from skyspot.shell import Command, Word, commands, starts_our_trainer

Level = Literal["error", "warning", "note"]
# What a user's YAML may call the same thing: the newer name first.
_ACCELERATORS = ("accelerators", "gpus")
# No machine of these is rented by the hour, so that "on-demand" has no price there.
OWN_MACHINES = ("kubernetes", "slurm", "ssh")
WORKDIR = "~/sky_workdir"
_HOME = re.compile(r"^(?:\$HOME|\$\{HOME\})(?=/|$)")
# `80GB+:8` and `nvidia:24GB:1` stand for all accelerators of that memory.
_MEMORY = re.compile(r"(?:[^:]*:)?\d+[GMT]B\+?(?::.*)?", re.IGNORECASE)
_NOT_READABLE = (ValueError, TypeError, AttributeError, LookupError, OverflowError, yaml.YAMLError)


@dataclass(frozen=True)
class Finding:
    """Something that SkyPilot takes now and the run regrets later, or that its server refuses."""

    line: int
    """From 1: of the key or value concerned."""
    level: Level
    """`error`: it fails on SkyPilot's server, or loses training for sure, or costs money without end.

    `note`: a person has overruled it.
    """
    name: str
    """The code of its rule, like `prefix-under-mount`: skyspot/lint_rules.py has them all."""
    reason: str
    remedy: str
    task: str = ""
    """Of a pipeline: the task concerned."""


@dataclass(frozen=True)
class At:
    """A value in the file, and the line of its key; of an item of a list, its own line."""

    node: yaml.Node
    line: int

    @cached_property
    def entries(self) -> dict[str, At]:
        """The entries of a mapping, merge keys followed; empty where it is none."""
        return dict(_entries(self.node, set()))

    def get(self, *keys: str) -> At | None:
        """The entry of the first of these keys that is there."""
        return next((self.entries[key] for key in keys if key in self.entries), None)

    @property
    def items(self) -> list[At]:
        """The items of a list; empty where it is none."""
        if not isinstance(self.node, yaml.SequenceNode):
            return []
        return [At(item, item.start_mark.line + 1) for item in self.node.value]

    @property
    def value(self) -> Any:
        """A scalar as YAML 1.1 types it; None where it is null, not a scalar, or not what its tag says."""
        if not isinstance(self.node, yaml.ScalarNode):
            return None
        try:
            return yaml.constructor.SafeConstructor().construct_object(self.node)
        except _NOT_READABLE:
            return None

    @property
    def is_null(self) -> bool:
        """Whether there is nothing, or a null."""
        return self.node.tag == "tag:yaml.org,2002:null"

    @property
    def text(self) -> str:
        """A scalar as it is written; empty where it is none."""
        return self.node.value if isinstance(self.node, yaml.ScalarNode) and self.value is not None else ""

    def plain(self, depth: int = 4) -> Any:
        """The value in Python's types, for comparing; what lies deeper than `depth` is left out."""
        if depth and isinstance(self.node, yaml.MappingNode):
            return {key: value.plain(depth - 1) for key, value in self.entries.items()}
        if depth and isinstance(self.node, yaml.SequenceNode):
            return [item.plain(depth - 1) for item in self.items]
        return self.value


def _entries(node: yaml.Node, seen: set[int]) -> Iterator[tuple[str, At]]:
    """Key and value, what is merged in before what stands in the mapping itself; no node twice."""
    if not isinstance(node, yaml.MappingNode) or id(node) in seen:
        return
    seen.add(id(node))
    merged = [value for key, value in node.value if key.tag == "tag:yaml.org,2002:merge"]
    for value in merged:
        # Of several, the first has the last word.
        for source in reversed(value.value) if isinstance(value, yaml.SequenceNode) else [value]:
            yield from _entries(source, seen)
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            yield key.value, At(value, key.start_mark.line + 1)


@dataclass(frozen=True)
class Script:
    """`run` or `setup`, and what it starts."""

    at: At | None
    commands: tuple[Command, ...]

    def line(self, word: Word) -> int:
        """The line of the file in which a word of it stands."""
        assert self.at
        if isinstance(self.at.node, yaml.ScalarNode) and self.at.node.style == "|":
            return int(self.at.node.start_mark.line) + 2 + word.line
        return self.at.line


@dataclass(frozen=True)
class Rung:
    """One thing that is asked for: an entry of `ordered` or `any_of` over the rest of `resources`, or that alone."""

    settings: Mapping[str, At]
    line: int

    @property
    def cloud(self) -> str | None:
        """The cloud that it is restricted to, in small letters; None: any."""
        place = self.settings.get("infra") or self.settings.get("cloud")
        name = place.text.partition("/")[0].strip().lower() if place else ""
        return {"k8s": "kubernetes", "*": None, "": None}.get(name, name)

    @property
    def use_spot(self) -> bool:
        """Whether it asks for machines that may be reclaimed."""
        found = self.settings.get("use_spot")
        return found is not None and found.value is True

    @property
    def accelerators(self) -> list[tuple[str, int]]:
        """Name and line of each accelerator that would do, those asked for by their memory left out."""
        asked = next((self.settings[key] for key in _ACCELERATORS if key in self.settings), None)
        if asked is None:
            return []
        named = [(key, item.line) for key, item in asked.entries.items()]
        named += [(item.text, item.line) for item in asked.items]
        named += [(asked.text, asked.line)]
        names = [(text.partition(":")[0].strip(), line) for text, line in named if not _MEMORY.fullmatch(text)]
        return [(name, line) for name, line in names if name]


@dataclass(frozen=True)
class Mount:
    """One entry of file_mounts."""

    target: str
    mode: str
    """MOUNT, MOUNT_CACHED, COPY, or whatever stands there."""
    name: str
    source: str
    """Empty where SkyPilot is to make the bucket of that name, or where several files are named."""
    read_only: bool
    line: int
    mode_line: int

    @property
    def lasts(self) -> bool:
        """Whether what a program writes there goes into a bucket."""
        return self.mode in ("MOUNT", "MOUNT_CACHED")


@dataclass(frozen=True)
class Task:
    """One document of the file."""

    root: At

    @cached_property
    def resources(self) -> At | None:
        """`resources`."""
        return self.root.get("resources")

    @cached_property
    def ordered(self) -> bool:
        """Whether the rungs are tried in their order; else SkyPilot takes the cheapest."""
        found = self.resources.get("ordered") if self.resources else None
        return found is not None and bool(found.items)

    @cached_property
    def rungs(self) -> list[Rung]:
        """All that is asked for; one, where it is not a list."""
        if not self.resources:
            return [Rung({}, self.root.line)]
        base = {key: value for key, value in self.resources.entries.items() if key not in ("ordered", "any_of")}
        listed = self.resources.get("ordered", "any_of")
        entries = listed.items if listed else []
        if not entries:
            return [Rung(base, self.resources.line)]
        return [Rung({**base, **entry.entries}, entry.line) for entry in entries]

    @property
    def preemptible(self) -> bool:
        """Whether the machine may be taken while the job runs: spot, or a place in a Slurm queue."""
        return any(rung.use_spot or rung.cloud == "slurm" for rung in self.rungs)

    @cached_property
    def nodes(self) -> int:
        """How many nodes each attempt has."""
        found = self.root.get("num_nodes")
        return found.value if found is not None and type(found.value) is int else 1

    @cached_property
    def env_entries(self) -> dict[str, At]:
        """`envs`."""
        found = self.root.get("envs")
        return found.entries if found else {}

    @cached_property
    def envs(self) -> dict[str, str]:
        """The environment that `setup` and `run` find, secrets left out."""
        return {key: found.text for key, found in self.env_entries.items()}

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
        """The command of `run` that starts our trainer or launcher."""
        return next((command for command in self.run.commands if starts_our_trainer(command)), None)

    @cached_property
    def mounts(self) -> list[Mount]:
        """What `file_mounts` puts on the machine."""
        found = self.root.get("file_mounts")
        return [self._mount(target, source) for target, source in found.entries.items()] if found else []

    def _mount(self, target: str, entry: At) -> Mount:
        def text(key: str) -> str:
            found = entry.get(key)
            return self.filled_in(found.text) if found else ""

        where = clean_path(self.filled_in(target))
        if not isinstance(entry.node, yaml.MappingNode):
            return Mount(where, "COPY", "", self.filled_in(entry.text), False, entry.line, entry.line)
        mode = entry.get("mode")
        config = entry.get("config")
        settings = config.get("mount", "mount_cached") if config else None
        read_only = settings.get("read_only") if settings else None
        return Mount(
            target=where,
            # In 0.14 the default is MOUNT (sky/data/storage.py: DEFAULT_STORAGE_MODE).
            mode=mode.text.upper() if mode and mode.text else "MOUNT",
            name=text("name"),
            source=text("source"),
            read_only=read_only is not None and read_only.value is True,
            line=entry.line,
            mode_line=mode.line if mode else entry.line,
        )

    @cached_property
    def volumes(self) -> list[str]:
        """Where the task's volumes are mounted."""
        found = self.root.get("volumes")
        return [clean_path(self.filled_in(target)) for target in found.entries] if found else []

    def filled_in(self, text: str) -> str:
        """A text of file_mounts as SkyPilot fills it in from `envs` (sky/task.py: _fill_in_env_vars)."""
        return re.sub(r"\$\{?\b([a-zA-Z_]\w*)\b\}?", lambda found: self.envs.get(found[1], found[0]), text)


def clean_path(path: str, folder: str = WORKDIR) -> str:
    """A path on the node, absolute or from `~`; a relative one starts from `folder`."""
    path = _HOME.sub("~", path)
    if not path.startswith(("/", "~")):
        path = f"{folder}/{path}"
    return posixpath.normpath(path)


def within(path: str, folder: str) -> bool:
    """Whether a path is the folder, or lies in it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def tasks(text: str) -> list[Task]:
    """The documents of a task YAML that are mappings.

    Raises:
        yaml.YAMLError, RecursionError, ValueError, OverflowError: it is not YAML.
    """
    nodes = [node for node in yaml.compose_all(text, Loader=yaml.SafeLoader) if isinstance(node, yaml.MappingNode)]
    return [Task(At(node, node.start_mark.line + 1)) for node in nodes]
