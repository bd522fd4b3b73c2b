"""Where a run's folder lies, seen from this machine, and what it says about the training.

A run's folder is found through the task YAML that was submitted: SKYSPOT_CHECKPOINT_DIR, and the bucket that is mounted
there. Buckets are read through fsspec; what reads a cloud's is in the extra of that cloud's name.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyspot.errors import SkyspotError, UnreadableError
from skyspot.home import expanded
from skyspot.runs import aside
from skyspot.task.mounts import CHECKPOINT_DIR, Mount, innermost
from trainer.layout.documents import MAX_JSON_BYTES, LayoutError
from trainer.layout.events import event_named, read_events, read_progress
from trainer.layout.manifest import Manifest, read_manifest
from trainer.layout.names import AttemptName, RunPaths, list_attempts, list_checkpoints

if TYPE_CHECKING:  # It needs PyYAML, which looking at checkpoints does not.
    from skyspot.task.document import Task

_EXTRAS = {
    "s3": "aws", "s3a": "aws", "r2": "aws", "gs": "gcp", "gcs": "gcp", "az": "azure", "abfs": "azure", "abfss": "azure",
}  # fmt: skip
_LOGIN = {
    "aws": "`aws configure`",
    "gcp": "`gcloud auth application-default login`",
    "azure": "AZURE_STORAGE_CONNECTION_STRING",
}
_STORES = {"s3": "s3", "gcs": "gs", "r2": "r2", "azure": "az"}


@dataclass(frozen=True)
class Location:
    """A run's folder as the task YAML describes it."""

    inside: str
    """The folder relative to the bucket; absolute where no bucket is mounted."""
    url: str | None
    """The bucket's URL; None where no bucket is mounted, or SkyPilot made it and alone knows in which store."""
    made: str | None = None
    """The name of the bucket that SkyPilot makes."""

    def __str__(self) -> str:
        bucket = self.url or self.made
        return f"{bucket}/{self.inside}".rstrip("/") if bucket else self.inside


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    attempts: int
    step: int | None
    max_steps: int | None
    loss: float | None
    committed_step: int | None
    committed_at: float | None
    """When the newest checkpoint was committed, unix seconds by the node's clock."""
    finished: bool
    cause: str | None
    """Why the newest attempt ended; None while it goes on."""


def location(task: Task) -> Location | None:
    """Where the run of a task lies; None where it does not say."""
    return located(task.envs.get(CHECKPOINT_DIR, ""), task.mounts)


def located(folder: str, mounts: Iterable[Mount]) -> Location | None:
    """Where a folder on the node lies, given what is mounted there; None where it is no folder of one's own choice."""
    if not folder.startswith("/"):
        return None
    mount = innermost([one for one in mounts if one.is_bucket], folder)
    if mount is None:
        return Location(folder, None)
    inside = folder[len(mount.path) :].strip("/")
    if "://" in mount.source:
        return Location(inside, mount.source.rstrip("/"))
    scheme = _STORES.get(mount.store.lower())
    if mount.name:
        return Location(inside, f"{scheme}://{mount.name}") if scheme else Location(inside, None, mount.name)
    return None


def open_run(where: Location) -> RunPaths:
    """The run's folder, to be read from here; it need not be there yet.

    Raises:
        UnreadableError: the bucket cannot be read from this machine; says why.
    """
    if where.url is None and where.made is not None:
        raise UnreadableError(f"SkyPilot made the bucket {where.made}, and has not said in which store")
    if where.url is None:
        root = Path(where.inside)
        if not aside.call(root, os.path.isdir, root.parent, seconds=aside.ANSWER_S):
            raise UnreadableError(f"{root.parent} is not on this machine")
        return RunPaths(root)
    return RunPaths(_remote(where.url, where.inside))


def _remote(url: str, inside: str) -> Path:
    """A bucket's folder as a path; fsspec's file systems behind pathlib's interface."""
    scheme, _, rest = url.partition("://")
    options: dict[str, Any] = {}
    if scheme == "https" and ".blob.core.windows.net/" in rest:
        host, _, rest = rest.partition("/")
        scheme, options = "az", {"account_name": host.partition(".")[0]}
    if scheme in ("file", "local"):
        return Path(rest, inside)
    extra = _EXTRAS.get(scheme)
    if scheme == "r2":
        scheme, options = "s3", _r2_options()
    try:
        from upath import UPath

        # Listings and contents change while we look.
        path: Any = UPath(f"{scheme}://{rest}", use_listings_cache=False, skip_instance_cache=True, **options)
        path.fs.invalidate_cache()  # Imports what reads this kind of bucket.
    except ImportError as error:
        if extra is None:
            raise UnreadableError(f"{scheme}:// is not read from here: {_first_line(error)}") from None
        raise UnreadableError(f"{url} cannot be read without pip install 'skyspot[{extra}]'") from None
    except Exception as error:  # Whatever a file system's constructor makes of the URL.
        raise UnreadableError(f"{url} is not read from here: {_first_line(error)}{_login(scheme, error)}") from error
    found: Path = path / inside if inside else path
    return found


def _r2_options() -> dict[str, Any]:
    """Cloudflare's endpoint and credentials, from where SkyPilot has them."""
    folder = expanded("~/.cloudflare")
    known = configparser.ConfigParser()
    try:
        account = (folder / "accountid").read_text().strip()
        known.read_string((folder / "r2.credentials").read_text())
        key, secret = known["r2"]["aws_access_key_id"], known["r2"]["aws_secret_access_key"]
    except (OSError, KeyError, configparser.Error):
        raise UnreadableError(f"r2:// needs {folder}/accountid and r2.credentials, as SkyPilot does") from None
    return {"endpoint_url": f"https://{account}.r2.cloudflarestorage.com", "key": key, "secret": secret}


def progress(paths: RunPaths) -> Progress | None:
    """How far the run has come; None where nothing was begun.

    Raises:
        UnreadableError: the bucket did not let us look, or did not answer.
    """
    return aside.call(paths.root, _progress, paths, seconds=aside.ANSWER_S)


def _progress(paths: RunPaths) -> Progress | None:
    with reading(paths):
        attempts = list_attempts(paths)
        if not attempts:
            return None
        newest = attempts[-1]
        now = read_progress(paths, newest)
        events = read_events(paths, newest)
        end, restored = event_named(events, "end"), event_named(events, "restored") or {}
        saved = event_named(events, "saved") or {}
        finished = final_manifest(paths) is not None
        step = now.get("step", restored.get("step"))
        committed = saved.get("step", restored.get("step") or None)
        at = saved.get("time")
        if at is None and committed:
            at = _saved_at(paths, attempts, committed)
        return Progress(
            attempts=len(attempts),
            step=_int(step),
            max_steps=_int(now.get("max_steps")),
            loss=now["loss"] if isinstance(now.get("loss"), float) else None,
            committed_step=_int(committed),
            committed_at=float(at) if isinstance(at, (int, float)) else None,
            finished=finished,
            cause=str(end.get("cause")) if end else None,
        )


def _saved_at(paths: RunPaths, attempts: list[AttemptName], step: Any) -> Any:
    """When a checkpoint that an earlier attempt wrote was committed."""
    for attempt in reversed(attempts):
        for event in reversed(read_events(paths, attempt)):
            if event.name == "saved" and event.fields.get("step") == step:
                return event.fields.get("time")
    return None


def final_manifest(paths: RunPaths) -> Manifest | None:
    """What `final/` says of itself; None while there is none."""
    try:
        return read_manifest(paths.final)
    except (LayoutError, OSError):
        return None


def binding(paths: RunPaths) -> Mapping[str, Any]:
    """What the run was begun with and may not change, by name; empty where nothing was begun.

    As the trainer has it: the newest committed checkpoint says, or, while there is none, the first attempt that was
    not refused.

    Raises:
        UnreadableError: the bucket did not let us look, or did not answer.
    """
    return aside.call(paths.root, _binding, paths, seconds=aside.ANSWER_S)


def _binding(paths: RunPaths) -> Mapping[str, Any]:
    with reading(paths):
        return _bound(paths)


def _bound(paths: RunPaths) -> Mapping[str, Any]:
    for name in list_checkpoints(paths):
        with suppress(LayoutError, OSError):
            found = read_manifest(paths.checkpoint(name)).facts.get("binding")
            if isinstance(found, Mapping):
                return found
    for attempt in list_attempts(paths):
        events = read_events(paths, attempt)
        start = event_named(events, "start") or {}
        if (event_named(events, "end") or {}).get("cause") != "refused" and isinstance(start.get("binding"), Mapping):
            return dict(start["binding"])
    return {}


@contextmanager
def reading(paths: RunPaths) -> Iterator[None]:
    """Turn whatever a bucket's library raises into one line; a mistake of ours keeps its traceback.

    Raises:
        UnreadableError: the folder cannot be read from here, or what stands in it is not what the layout says.
    """
    try:
        yield
    except SkyspotError:
        raise
    except LayoutError as error:
        raise UnreadableError(str(error)) from None
    except Exception as error:
        if isinstance(paths.root, Path) and not isinstance(error, OSError):
            raise
        remedy = _login(str(paths.root).partition("://")[0], error)
        raise UnreadableError(f"{paths.root} cannot be read from here: {_first_line(error)}{remedy}") from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0].rstrip(".") if text else type(error).__name__


def _login(scheme: str, error: BaseException) -> str:
    """Where a bucket's credentials come from, where it is them that an error is about."""
    extra = _EXTRAS.get(scheme)
    if extra and (isinstance(error, PermissionError) or "credential" in f"{type(error).__name__} {error}".lower()):
        return f". Credentials come from {_LOGIN[extra]}"
    return ""


def sizes_below(folder: Path) -> dict[str, int]:
    """The size, in bytes, of every file below a folder, by its path relative to it, with `/`.

    Of a bucket it takes one listing, however many there are.

    Raises:
        OSError: it cannot be listed. A folder that is not there has no file.
    """
    found: dict[str, int] = {}
    if isinstance(folder, Path):
        for parent, _, names in os.walk(folder):
            for name in names:
                with suppress(OSError):  # Pruned meanwhile, or a link to nothing.
                    path = Path(parent, name)
                    found[path.relative_to(folder).as_posix()] = path.stat().st_size
        return found
    bucket: Any = folder
    prefix = f"{bucket.path.rstrip('/')}/"
    try:
        listed = bucket.fs.find(bucket.path, detail=True)
    except FileNotFoundError:
        return found
    for name, info in listed.items():
        if name.startswith(prefix):
            size = info.get("size")
            found[name[len(prefix) :]] = size if isinstance(size, int) else int(bucket.fs.size(name))
    return found


def read_listed(path: Path, size: int) -> bytes:
    """What is in a small file whose size a listing gave; of a bucket in one request.

    Raises:
        LayoutError: it is too large to be one.
        OSError: it cannot be read.
    """
    if size > MAX_JSON_BYTES:
        raise LayoutError("too large to be one")
    if isinstance(path, Path):
        return path.read_bytes()
    bucket: Any = path
    return bytes(bucket.fs.cat_file(bucket.path, start=0, end=size)) if size else b""


def _int(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
