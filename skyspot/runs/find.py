"""Which run a person means: its folder, its URL, or its name in a project's folder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from skyspot.errors import SkyspotError, UsageError, did_you_mean, shown
from skyspot.runs import aside, location
from skyspot.runs.location import Location
from skyspot.task.mounts import CHECKPOINT_DIR
from skyspot.task.options import NAME, SETTINGS, WRITTEN, written_task
from trainer.layout.names import MANIFEST, CheckpointName, RunPaths

_OF_A_RUN = {"run.json", "attempts", "checkpoints", "final"}
SHOWN = 5
Resolve = Callable[[Location], Location]
"""Finds the URL of a bucket that SkyPilot made and alone knows."""


def opened(run: str, project: Path = Path(), resolve: Resolve = lambda where: where) -> RunPaths:
    """The folder of a run that was begun, to be read from here.

    Whatever has a `/` in it is a URL or a folder. A bare name is a run's folder here, or else a run that was launched
    from this project (`.skyspot/<name>.yaml`), or else one in the bucket that skyspot.yaml names.

    Args:
        run: What the person wrote.
        project: The project's folder.
        resolve: Asked for the bucket of a run that was launched.

    Raises:
        UsageError: there is no such run; says where it was looked for.
        UnreadableError: its bucket cannot be read from this machine; says why.
        SkyspotError: what is there is not a run's folder.
    """
    paths = location.open_run(_place(run, project, resolve))
    _refuse_other(paths.root, aside.call(paths.root, _names, paths, seconds=aside.ANSWER_S))
    return paths


def _place(run: str, project: Path, resolve: Resolve) -> Location:
    if "://" in run:
        return Location("", run.rstrip("/"))
    if not run:
        raise UsageError("RUN is empty: give a run's folder, its URL or its name")
    folder = Path(run)
    is_name = "/" not in run and run not in (".", "..")
    is_folder, begun = aside.call(folder.absolute(), _kind, folder.absolute(), seconds=aside.ANSWER_S)
    if is_name and not begun:
        found = _written(run, project) or (None if is_folder else _in_the_bucket(run, project))
        if found is not None:
            return resolve(found)
    if not is_folder:
        raise UsageError(_unknown(run, project) if is_name else f"{run}: no such folder")
    return Location(str(folder.absolute()), None)


def _kind(folder: Path) -> tuple[bool, bool]:
    """Whether it is a folder, and a run's."""
    return folder.is_dir(), any((folder / name).exists() for name in _OF_A_RUN)


def _written(name: str, project: Path) -> Location | None:
    """Where the task YAML of a run has its folder; None where there is no such file."""
    path = written_task(name, project)
    if not path.is_file():
        return None
    from skyspot.task import document

    tasks = document.tasks(path.read_bytes().decode("utf-8", "replace"))
    if not tasks:
        raise UsageError(f"{path} is not readable as YAML: give the run's folder or its URL")
    places = [where for where in dict.fromkeys(map(location.location, tasks)) if where is not None]
    if not places:
        raise UsageError(f"{path} names no {CHECKPOINT_DIR}: give the run's folder or its URL")
    if len(places) > 1:
        found = ", ".join(str(where) for where in places)
        raise UsageError(f"{name} is a pipeline of {len(places)} runs. Give the folder or the URL of one: {found}")
    return places[0]


def _in_the_bucket(name: str, project: Path) -> Location | None:
    """Where a run of this name would lie in the bucket of skyspot.yaml; None where that names none."""
    from skyspot.task import buckets
    from skyspot.task.settings import read_settings

    bucket = read_settings(project / SETTINGS).get("bucket")
    if not bucket or not NAME.fullmatch(name):
        return None
    store = buckets.checkpoints(bucket)
    return location.located(f"{store.folder}/{name}", store.mounts)


def _unknown(name: str, project: Path) -> str:
    near = did_you_mean(name, [path.stem for path in (project / WRITTEN).glob("*.yaml")])
    return (
        f"no run {shown(name)} here: no folder of that name, no {WRITTEN}/{name}.yaml, and no bucket in "
        f"skyspot.yaml.{near or ' Give its folder or its URL, like s3://my-checkpoints/run-001'}"
    )


def _names(paths: RunPaths) -> list[str]:
    """What a folder holds."""
    with location.reading(paths), suppress(FileNotFoundError, NotADirectoryError):
        return sorted(entry.name for entry in paths.root.iterdir())
    return []


def _refuse_other(root: Path, names: list[str]) -> None:
    """Stop where a folder is none of a run's."""
    if _OF_A_RUN & set(names):
        return
    if not names:
        raise SkyspotError(f"{root}: nothing is there. `skyspot queue` shows runs that are about to begin")
    if MANIFEST in names or any(CheckpointName.parse(name) for name in names):
        raise SkyspotError(f"{root} lies inside of a run's folder: give that one")
    more = ", ..." if len(names) > SHOWN else ""
    raise SkyspotError(
        f"{root} is not a run's folder: it has no checkpoints/ and no attempts/, but "
        f"{', '.join(shown(name) for name in names[:SHOWN])}{more}"
    )
