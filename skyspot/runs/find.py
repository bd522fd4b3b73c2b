"""Find a run by its folder, its URL, or its name in a project's folder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from skyspot.errors import SkyspotError, UsageError, did_you_mean, shown
from skyspot.runs import location, workers
from skyspot.runs.location import Location, reading
from skyspot.task.mounts import CHECKPOINT_DIR
from skyspot.task.options import NAME, SETTINGS, WRITTEN, written_task
from trainer.layout.names import FINAL, MANIFEST, CheckpointName, RunPaths

_RUN_ENTRIES = {"run.json", "attempts", "checkpoints", FINAL}
MAX_NAMES = 5
Resolve = Callable[[Location], Location]
"""Finds the URL of a bucket that SkyPilot created, which only SkyPilot knows."""


def open_existing(run: str, project: Path = Path(), resolve: Resolve = lambda where: where) -> RunPaths:
    """Open the folder of a run that has started.

    A text with a `/` is a URL or a folder. A bare name is a run's folder in the working folder, else a run that was
    launched from this project (`.skyspot/<name>.yaml`), else a run in the bucket that skyspot.yaml names.

    Args:
        run: The user's argument.
        project: The project's folder.
        resolve: Gives the URL of the bucket of a launched run.

    Raises:
        UsageError: there is no such run; the message names the places that were searched.
        UnreadableError: the bucket cannot be read from this machine.
        SkyspotError: the folder is not a run's folder.
    """
    paths = location.open_run(_place(run, project, resolve))
    _refuse_other(paths.root, workers.call(paths.root, _names, paths, seconds=workers.TIMEOUT_S))
    return paths


def _place(run: str, project: Path, resolve: Resolve) -> Location:
    if "://" in run:
        return Location("", run.rstrip("/"))
    if not run:
        raise UsageError("RUN is empty; give a run's folder, URL or name")
    folder = Path(run)
    is_name = "/" not in run and run not in (".", "..")
    is_folder, begun = workers.call(folder.absolute(), _kind, folder.absolute(), seconds=workers.TIMEOUT_S)
    if is_name and not begun:
        found = _written(run, project) or (None if is_folder else _in_the_bucket(run, project))
        if found is not None:
            return resolve(found)
    if not is_folder:
        raise UsageError(_unknown(run, project) if is_name else f"{run}: no such folder")
    return Location(str(folder.absolute()), None)


def _kind(folder: Path) -> tuple[bool, bool]:
    """True if a path is a folder, and a run's folder."""
    return folder.is_dir(), any((folder / name).exists() for name in _RUN_ENTRIES)


def _written(name: str, project: Path) -> Location | None:
    """The location in the task YAML of a run; None if there is no such file."""
    path = written_task(name, project)
    if not path.is_file():
        return None
    from skyspot.task import document

    tasks = document.tasks(path.read_bytes().decode("utf-8", "replace"))
    if not tasks:
        raise UsageError(f"{path} is not readable as YAML; give the run's folder or URL")
    places = [where for where in dict.fromkeys(map(location.of_task, tasks)) if where is not None]
    if not places:
        raise UsageError(f"{path} sets no {CHECKPOINT_DIR}; give the run's folder or URL")
    if len(places) > 1:
        found = ", ".join(str(where) for where in places)
        raise UsageError(f"{name} is a pipeline of {len(places)} runs; give the folder or URL of one: {found}")
    return places[0]


def _in_the_bucket(name: str, project: Path) -> Location | None:
    """The location of a run in the bucket of skyspot.yaml; None if that names no bucket."""
    from skyspot.task import buckets
    from skyspot.task.settings import read_settings

    bucket = read_settings(project / SETTINGS).get("bucket")
    if not bucket or not NAME.fullmatch(name):
        return None
    store = buckets.checkpoints(bucket)
    return location.of_folder(f"{store.folder}/{name}", store.mounts)


def _unknown(name: str, project: Path) -> str:
    near = did_you_mean(name, [path.stem for path in (project / WRITTEN).glob("*.yaml")])
    return (
        f"no run {shown(name)} here: no folder of that name, no {WRITTEN}/{name}.yaml, and no bucket in "
        f"skyspot.yaml.{near or ' Give its folder or URL, like s3://my-checkpoints/run-001'}"
    )


def _names(paths: RunPaths) -> list[str]:
    """The names of a folder's entries."""
    with reading(paths), suppress(FileNotFoundError, NotADirectoryError):
        return sorted(entry.name for entry in paths.root.iterdir())
    return []


def _refuse_other(root: Path, names: list[str]) -> None:
    """Refuse a folder that is not a run's folder."""
    if _RUN_ENTRIES & set(names):
        return
    if not names:
        raise SkyspotError(f"{root} is empty or missing. `skyspot queue` shows runs that have not started yet")
    if MANIFEST in names or any(CheckpointName.parse(name) for name in names):
        raise SkyspotError(f"{root} is inside a run's folder; give the run's folder")
    more = ", ..." if len(names) > MAX_NAMES else ""
    raise SkyspotError(
        f"{root} is not a run's folder: it has no checkpoints/ and no attempts/, only "
        f"{', '.join(shown(name) for name in names[:MAX_NAMES])}{more}"
    )
