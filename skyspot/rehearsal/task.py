"""A task as a rehearsal runs it: commands, environment, and mounts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from skyspot.errors import UsageError, did_you_mean, shown
from skyspot.home import expanded
from skyspot.rehearsal import mounting
from skyspot.rehearsal.interpreter import Interpreter, this_interpreter
from skyspot.task import document
from skyspot.task.buckets import MOUNT_POINT
from skyspot.task.document import Task
from skyspot.task.mounts import CHECKPOINT_DIR, TRAINER, Mount, innermost, within


@dataclass(frozen=True)
class MachineMount:
    """One entry of file_mounts."""

    path: str
    """On the machine: absolute, or from `~/`."""
    folder: Path | None
    """The folder mounted there; None: an empty bucket of the rehearsal."""
    survives: bool
    """True if it outlives the machine (a mounted bucket); else it is copied to each new machine."""
    read_only: bool = False
    source: str | None = None
    """The mount's `source`; None: SkyPilot would create the bucket."""
    uploaded: bool = False
    """True if SkyPilot uploads `folder`, without ignored files."""
    kind: str | None = None
    """The kind of mount that SkyPilot would use, a key of MANNERS; None: the task does not tell."""

    def holds(self, path: str) -> bool:
        """True if an absolute path is in this mount."""
        return within(path, self.path)


@dataclass(frozen=True)
class RehearsalTask:
    """The task that a machine runs."""

    name: str
    run: str
    setup: str
    envs: dict[str, str]
    mounts: tuple[MachineMount, ...]
    workdir: Path | None
    recover_on: frozenset[int]
    notes: tuple[str, ...]

    unset_secrets: frozenset[str] = frozenset()
    """Secrets without a value in the task."""
    compared_in: str | None = None
    """The first mount point named by `--compare`."""
    gpus_per_node: int = 0
    """SKYPILOT_NUM_GPUS_PER_NODE."""
    interpreter: Interpreter = field(default_factory=this_interpreter)
    """The Python of its machines."""

    @property
    def lasting(self) -> tuple[MachineMount, ...]:
        """The mounts that outlive a machine."""
        return tuple(mount for mount in self.mounts if mount.survives)

    @property
    def names_bucket(self) -> bool:
        """True if SKYSPOT_CHECKPOINT_DIR names the bucket that holds the run."""
        return self._named_bucket() is not None

    def _named_bucket(self) -> MachineMount | None:
        return innermost(self.lasting, self.envs.get(CHECKPOINT_DIR, ""))

    @property
    def bucket(self) -> MachineMount | None:
        """The mount with the run's folder.

        It is the mount of SKYSPOT_CHECKPOINT_DIR, else /checkpoints, else the one named by `--compare`, else the first
        that SkyPilot would create, else the first. Results may lie in another bucket.
        """
        named_bucket = self._named_bucket()
        found = (
            ([named_bucket] if named_bucket else [])
            or [mount for mount in self.lasting if mount.path == MOUNT_POINT]
            or [mount for mount in self.lasting if mount.path == self.compared_in]
            or [mount for mount in self.lasting if mount.source is None and not mount.read_only]
            or list(self.lasting)
        )
        return found[0] if found else None

    def lasting_at(self, path: str | None) -> MachineMount | None:
        """The lasting mount at a mount point; None: the bucket."""
        return next((mount for mount in self.lasting if mount.path == path), self.bucket)

    @property
    def run_folder(self) -> str | None:
        """The run's folder relative to its bucket, if the task names it."""
        folder, bucket = self.envs.get(CHECKPOINT_DIR), self.bucket
        if not folder or not bucket:
            return None
        return folder[len(bucket.path.rstrip("/")) :].strip("/") if bucket.holds(folder) else None


def read_task(text: str, base: Path, stand_ins: Mapping[str, Path], payload: Path | None) -> RehearsalTask:
    """Read a task YAML for a rehearsal.

    Args:
        text: The task YAML.
        base: The folder for its relative paths.
        stand_ins: Folders that stand in for buckets, by mount point (`--mount`).
        payload: The trainer's folder, for a rendered template without a written payload.

    Raises:
        UsageError: a bucket with data has no stand-in, or a folder is missing.
    """
    task = document.read(text).tasks[0]
    for section in ("file_mounts", "envs", "secrets", "resources"):
        found = task.root.get(section)
        if found is not None and not found.is_null and not found.is_mapping:
            raise UsageError(f"`{section}` is not a mapping, so SkyPilot would refuse the task")
    if not task.run.text.strip():
        raise UsageError("the task has no `run`, so there is nothing to rehearse")
    notes = [f"The task's {task.num_nodes} nodes are rehearsed as one."] if task.num_nodes != 1 else []
    envs = {**task.envs, **{key: value for key, value in task.secrets.items() if value is not None}}
    mounts = _mounts(task, envs.get(CHECKPOINT_DIR), base, stand_ins, payload)
    run_folder = envs.get(CHECKPOINT_DIR) or MOUNT_POINT
    for mount in mounts:
        if mount.survives and mount.folder is None and mount.source and not mount.holds(run_folder):
            notes.append(f"{mount.path} starts empty; --mount {mount.path}=FOLDER puts files there.")
    workdir = _workdir(task, base)
    if workdir is None and (found := task.root.get("workdir")) is not None and not found.is_null:
        notes.append("workdir is not a local folder, so the machines start without it.")
    return RehearsalTask(
        name=task.name or "task",
        run=task.run.text,
        setup=task.setup.text,
        envs=envs,
        mounts=tuple(mounts),
        workdir=workdir,
        recover_on=frozenset(code for code, _ in task.rungs[0].recover_on),
        notes=tuple(notes),
        unset_secrets=frozenset(key for key, value in task.secrets.items() if value is None),
        gpus_per_node=_gpus_per_node(task),
    )


def _gpus_per_node(task: Task) -> int:
    """The number of accelerators that the first rung requests; a part of one counts as one, as with SkyPilot."""
    accelerators = task.rungs[0].accelerators
    if not accelerators:
        return 0
    _, _, count = accelerators[0][0].partition(":")
    try:
        return max(0, math.ceil(float(count))) if count.strip() else 1
    except (ValueError, OverflowError):
        return 1


def _mounts(
    task: Task, folder: str | None, base: Path, stand_ins: Mapping[str, Path], payload: Path | None
) -> list[MachineMount]:
    """The task's mounts, and one for a run's folder that lies in none of them."""
    unused = dict(stand_ins)
    mounts = [
        dataclasses.replace(_mount(mount, base, unused, payload), kind=mounting.kind_of(mount, task))
        for mount in task.mounts
    ]
    for target in unused:
        near = did_you_mean(target, {mount.path for mount in mounts})
        raise UsageError(f"--mount {target}: the task mounts nothing there.{near}")
    if folder and folder.startswith("/") and not any(mount.survives and mount.holds(folder) for mount in mounts):
        # A shared file system of the nodes: the rehearsal mounts an empty folder there.
        parent = Path(folder).parent
        mounts.append(MachineMount(folder if parent == Path("/") else str(parent), None, True, kind="local"))
    return mounts


def _workdir(task: Task, base: Path) -> Path | None:
    """The task's working folder on this machine; None where it names none.

    Raises:
        UsageError: the folder is missing.
    """
    if task.workdir is None:
        return None
    workdir = base / expanded(task.workdir)
    if not workdir.is_dir():
        raise UsageError(f"workdir: {workdir}: no such folder")
    return workdir


def _mount(mount: Mount, base: Path, stand_ins: dict[str, Path], payload: Path | None) -> MachineMount:
    """Convert one entry of file_mounts, as SkyPilot would."""
    target, read_only, source = mount.path, mount.read_only, mount.source or None
    stand_in = stand_ins.pop(target, None)
    if mount.is_bucket:
        if stand_in is not None:
            return MachineMount(target, stand_in, mount.mode != "COPY", read_only, source)
        if mount.lasts and source is not None and "://" not in source:
            place = base / expanded(source)
            if not place.is_dir():
                raise UsageError(f"file_mounts: {target}: {place}: no such folder")
            return MachineMount(target, place, True, read_only, source, uploaded=True)
        if mount.lasts and not read_only and (source is None or mount.states_mode) and not mount.sources:
            return MachineMount(target, None, True, source=source)
    if stand_in is not None:
        return MachineMount(target, stand_in, False)
    text = str(source or [*mount.sources])
    if "://" in text:
        raise UsageError(
            f"{target} holds data from {shown(text)}, which a rehearsal does not download. "
            f"Pass a local folder instead: --mount {target}=FOLDER"
        )
    place = base / expanded(text)
    if not place.exists() and payload is not None and target == TRAINER:
        place = payload
    if not place.exists():
        raise UsageError(f"file_mounts: {target}: {place}: no such file or folder")
    return MachineMount(target, place, False, uploaded=True)
