"""A task YAML as a rehearsal sees it: commands, environment, and what lies where on the machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyspot import task
from skyspot.envs import as_text, filled_in
from skyspot.errors import UsageError, did_you_mean, shown
from skyspot.home import expanded


@dataclass(frozen=True)
class Mount:
    """One entry of file_mounts."""

    target: str
    """On the machine: absolute, or from `~/`."""
    folder: Path | None
    """What stands there; None: an empty bucket of the rehearsal's own."""
    survives: bool
    """Whether it outlives the machine (a mounted bucket), or is copied to each new one."""
    read_only: bool = False
    source: str | None = None
    """The mount's `source`; None: it has none, SkyPilot would make the bucket."""
    uploaded: bool = False
    """Whether SkyPilot uploads `folder`, and so leaves out what is ignored there."""

    def holds(self, path: str) -> bool:
        """Whether an absolute path lies in it."""
        return path == self.target or path.startswith(self.target.rstrip("/") + "/")


@dataclass(frozen=True)
class Job:
    """What a machine is to do."""

    name: str
    run: str
    setup: str
    envs: dict[str, str]
    mounts: tuple[Mount, ...]
    workdir: Path | None
    recover_on: frozenset[int]
    notes: tuple[str, ...]

    unset_secrets: frozenset[str] = frozenset()
    """Secrets that the task names without a value."""
    compared_in: str | None = None
    """The mount point that `--compare` names."""

    @property
    def lasting(self) -> tuple[Mount, ...]:
        """The mounts that outlive a machine."""
        return tuple(mount for mount in self.mounts if mount.survives)

    @property
    def says_where(self) -> bool:
        """Whether SKYSPOT_CHECKPOINT_DIR says which bucket holds the run."""
        return self._saying_where() is not None

    def _saying_where(self) -> Mount | None:
        return innermost(self.lasting, self.envs.get("SKYSPOT_CHECKPOINT_DIR", ""))

    @property
    def bucket(self) -> Mount | None:
        """The mount with the run's folder.

        That of SKYSPOT_CHECKPOINT_DIR, else the one that `--compare` names, else /checkpoints, else the first that
        SkyPilot would make, else the first.
        """
        said = self._saying_where()
        found = (
            ([said] if said else [])
            or [mount for mount in self.lasting if mount.target == self.compared_in]
            or [mount for mount in self.lasting if mount.target == "/checkpoints"]
            or [mount for mount in self.lasting if mount.source is None and not mount.read_only]
            or list(self.lasting)
        )
        return found[0] if found else None

    @property
    def compared(self) -> Mount | None:
        """The mount that `--compare` searches."""
        named = [mount for mount in self.lasting if mount.target == self.compared_in]
        return named[0] if named else self.bucket

    @property
    def run_folder(self) -> str | None:
        """The run's folder relative to its bucket, where the task says."""
        folder, bucket = self.envs.get("SKYSPOT_CHECKPOINT_DIR"), self.bucket
        if not folder or not bucket:
            return None
        return folder[len(bucket.target.rstrip("/")) :].strip("/") if bucket.holds(folder) else None


def innermost(mounts: Iterable[Mount], path: str) -> Mount | None:
    """The mount that a path lies in; the deepest, where one lies in another."""
    return max((mount for mount in mounts if mount.holds(path)), key=lambda mount: len(mount.target), default=None)


def read(text: str, base: Path, stand_ins: Mapping[str, Path], payload: Path | None) -> Job:
    """Understand a task YAML.

    Args:
        text: The task YAML.
        base: The folder that its relative paths start from.
        stand_ins: Folders that stand in for buckets, by mount point (`--mount`).
        payload: The trainer's folder, for a rendered template whose payload is not written yet.

    Raises:
        UsageError: a bucket with data in it has no stand-in, or a folder is missing.
    """
    document = task.load(text)
    for section in ("file_mounts", "envs", "secrets", "resources"):
        if not isinstance(document.get(section) or {}, Mapping):
            raise UsageError(f"`{section}` is not a mapping: SkyPilot would refuse it")
    if not str(document.get("run") or "").strip():
        raise UsageError("the task has no `run`: there is nothing to rehearse")
    notes = []
    nodes = document.get("num_nodes") or 1
    if nodes != 1:
        notes.append(f"{nodes} nodes are rehearsed as one.")
    left = dict(stand_ins)
    mounts = [
        _mount(str(target), source, base, left, payload)
        for target, source in filled_in(document.get("file_mounts") or {}, document.get("envs") or {}).items()
    ]
    known = {mount.target for mount in mounts}
    for target in left:
        near = did_you_mean(target, known)
        raise UsageError(f"--mount {target}: the task mounts nothing there.{near}")
    envs = {str(key): as_text(value) for key, value in (document.get("envs") or {}).items()}
    secrets = document.get("secrets") or {}
    envs.update({str(key): as_text(value) for key, value in secrets.items() if value is not None})
    folder = envs.get("SKYSPOT_CHECKPOINT_DIR")
    if folder and folder.startswith("/") and not any(mount.survives and mount.holds(folder) for mount in mounts):
        # A shared file system that every node has: the rehearsal puts an empty one there.
        parent = Path(folder).parent
        mounts.append(Mount(folder if parent == Path("/") else str(parent), None, True))
    for mount in mounts:
        if mount.survives and mount.folder is None and mount.source and not mount.holds(folder or "/checkpoints"):
            notes.append(f"{mount.target} starts empty; --mount {mount.target}=FOLDER puts files there.")
    workdir = filled_in(document.get("workdir"), document.get("envs"))
    if isinstance(workdir, str):
        place = base / expanded(workdir)
        if not place.is_dir():
            raise UsageError(f"workdir: {place}: no such folder")
        workdir = place
    elif workdir is not None:
        notes.append("workdir is not a folder of this machine: the machines start without it.")
    resources = document.get("resources") or {}
    recovery = resources.get("job_recovery") if isinstance(resources, dict) else None
    codes = recovery.get("recover_on_exit_codes") if isinstance(recovery, dict) else None
    codes = codes if isinstance(codes, list) else [] if codes is None else [codes]
    return Job(
        name=str(document.get("name") or "task"),
        run=str(document["run"]),
        setup=str(document.get("setup") or ""),
        envs=envs,
        mounts=tuple(mounts),
        workdir=workdir if isinstance(workdir, Path) else None,
        recover_on=frozenset(code for code in codes if isinstance(code, int)),
        notes=tuple(notes),
        unset_secrets=frozenset(str(key) for key, value in secrets.items() if value is None),
    )


def _mount(target: str, source: Any, base: Path, stand_ins: dict[str, Path], payload: Path | None) -> Mount:
    """One entry of file_mounts, as SkyPilot means it."""
    target = target.rstrip("/") or "/"
    stand_in = stand_ins.pop(target, None)
    if isinstance(source, Mapping):
        url, mode = source.get("source"), str(source.get("mode") or "MOUNT").upper()
        read_only = _read_only(source.get("config"))
        if stand_in is not None:
            return Mount(target, stand_in, mode != "COPY", read_only, str(url) if url is not None else None)
        local = isinstance(url, str) and "://" not in url
        if mode in ("MOUNT", "MOUNT_CACHED") and local:
            place = base / expanded(str(url))
            if not place.is_dir():
                raise UsageError(f"file_mounts: {target}: {place}: no such folder")
            return Mount(target, place, True, read_only, str(url), uploaded=True)  # Into a bucket, and that is mounted.
        if mode in ("MOUNT", "MOUNT_CACHED") and not read_only and (url is None or "mode" in source):
            return Mount(target, None, True, source=str(url) if url is not None else None)
        source = url
    if stand_in is not None:
        return Mount(target, stand_in, False)
    text = str(source)
    if "://" in text:
        raise UsageError(
            f"{target} holds data from {shown(text)}, which a rehearsal does not fetch: "
            f"give a folder that stands in for it, --mount {target}=FOLDER"
        )
    place = base / expanded(text)
    if not place.exists() and payload is not None and target == "~/skyspot/trainer":
        place = payload
    if not place.exists():
        raise UsageError(f"file_mounts: {target}: {place}: no such file or folder")
    return Mount(target, place, False, uploaded=True)


def _read_only(config: Any) -> bool:
    """Whether a mount's `config: {mount: {read_only: true}}` is there."""
    mount = config.get("mount") if isinstance(config, Mapping) else None
    return isinstance(mount, Mapping) and bool(mount.get("read_only"))
