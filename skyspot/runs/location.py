"""The location of a run's folder, and how it is opened on this machine.

The submitted task YAML gives the location: SKYSPOT_CHECKPOINT_DIR, and the bucket that is mounted there. Buckets are
read through fsspec; the extra of each cloud installs the library that reads its buckets.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyspot.errors import SkyspotError, UnreadableError
from skyspot.home import expanded
from skyspot.runs import workers
from skyspot.task.mounts import CHECKPOINT_DIR, Mount, innermost
from trainer.layout.documents import LayoutError
from trainer.layout.names import RunPaths

if TYPE_CHECKING:  # It imports PyYAML, which listing checkpoints does not need.
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
    """The location of a run's folder, from the task YAML."""

    inside: str
    """The folder relative to the bucket; absolute if no bucket is mounted."""
    url: str | None
    """The bucket's URL; None if no bucket is mounted, or if only SkyPilot knows the store of the bucket it created."""
    made: str | None = None
    """The name of the bucket that SkyPilot creates."""

    def __str__(self) -> str:
        bucket = self.url or self.made
        return f"{bucket}/{self.inside}".rstrip("/") if bucket else self.inside


def of_task(task: Task) -> Location | None:
    """The location of a task's run; None if the task does not name it."""
    return of_folder(task.envs.get(CHECKPOINT_DIR, ""), task.mounts)


def of_folder(folder: str, mounts: Iterable[Mount]) -> Location | None:
    """The location of a folder on the node, given its mounts; None if the folder or its bucket has no name."""
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
    """Open a run's folder for reading; the folder may not exist yet.

    Raises:
        UnreadableError: the bucket cannot be read from this machine.
    """
    if where.url is None and where.made is not None:
        raise UnreadableError(f"the bucket {where.made} has no URL in the task, so its store is unknown")
    if where.url is None:
        root = Path(where.inside)
        if not workers.call(root, os.path.isdir, root.parent, seconds=workers.TIMEOUT_S):
            raise UnreadableError(f"{root.parent} is not on this machine")
        return RunPaths(root)
    return RunPaths(_remote(where.url, where.inside))


def _remote(url: str, inside: str) -> Path:
    """A bucket's folder as a path: fsspec behind pathlib's interface."""
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

        # Listings and contents change while we read.
        path: Any = UPath(f"{scheme}://{rest}", use_listings_cache=False, skip_instance_cache=True, **options)
        path.fs.invalidate_cache()  # Imports the library that reads this kind of bucket.
    except ImportError as error:
        if extra is None:
            raise UnreadableError(f"{scheme}:// cannot be read from this machine: {_first_line(error)}") from None
        raise UnreadableError(f"{url} cannot be read without pip install 'skyspot[{extra}]'") from None
    except Exception as error:  # A file system's constructor may raise anything.
        raise UnreadableError(
            f"{url} cannot be read from this machine: {_first_line(error)}{_login(scheme, error)}"
        ) from error
    found: Path = path / inside if inside else path
    return found


def _r2_options() -> dict[str, Any]:
    """Cloudflare's endpoint and credentials, from SkyPilot's files."""
    folder = expanded("~/.cloudflare")
    known = configparser.ConfigParser()
    try:
        account = (folder / "accountid").read_text().strip()
        known.read_string((folder / "r2.credentials").read_text())
        key, secret = known["r2"]["aws_access_key_id"], known["r2"]["aws_secret_access_key"]
    except (OSError, KeyError, configparser.Error):
        raise UnreadableError(f"r2:// needs SkyPilot's files {folder}/accountid and {folder}/r2.credentials") from None
    return {"endpoint_url": f"https://{account}.r2.cloudflarestorage.com", "key": key, "secret": secret}


@contextmanager
def reading(paths: RunPaths) -> Iterator[None]:
    """Turn the exceptions of a bucket's library into one line; our own bugs keep their traceback.

    Raises:
        UnreadableError: the folder cannot be read from this machine, or violates the layout.
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
        raise UnreadableError(f"{paths.root} cannot be read from this machine: {_first_line(error)}{remedy}") from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0].rstrip(".") if text else type(error).__name__


def _login(scheme: str, error: BaseException) -> str:
    """The source of a bucket's credentials, if an error is about credentials."""
    extra = _EXTRAS.get(scheme)
    if extra and (isinstance(error, PermissionError) or "credential" in f"{type(error).__name__} {error}".lower()):
        return f". Credentials come from {_LOGIN[extra]}"
    return ""
