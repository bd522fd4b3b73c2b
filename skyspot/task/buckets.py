"""The stores of checkpoints and data: a bucket URL with or without a prefix, or a folder that every node has."""

from __future__ import annotations

import getpass
import hashlib
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyspot.errors import UsageError, shown
from skyspot.task.mounts import Mount

MOUNT_POINT = "/checkpoints"
DATA_POINT = "/data"
USER_ID = Path(".config", "skyspot", "user-id")
# No quote, `$` or blank: SkyPilot substitutes environment variables inside file_mounts.
_BUCKET = re.compile(r"(s3|gs|r2)://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(?:/([A-Za-z0-9._=/-]*))?")
_AZURE = re.compile(
    r"(https://[a-z0-9]{3,24}\.blob\.core\.windows\.net/[a-z0-9](?:[a-z0-9-]{1,61}[a-z0-9]))(?:/([A-Za-z0-9._=/-]*))?"
)
# A bucket name that SkyPilot accepts in any store.
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
_PATH = re.compile(r"/[A-Za-z0-9._/=+@,-]*")


@dataclass(frozen=True)
class Store:
    """A folder as a node sees it, and the mount that it needs."""

    folder: str
    """Absolute, on the node."""
    mount: str | None
    """The mount point; None: nothing is mounted."""
    source: dict[str, Any] | None
    """The bucket as an entry of file_mounts."""
    made: bool = False
    """True if SkyPilot creates the bucket."""

    @property
    def mounts(self) -> list[Mount]:
        """Its mount, as the reader of task YAMLs returns it."""
        if self.mount is None or self.source is None:
            return []
        return [Mount(self.mount, source=self.source.get("source", ""), name=self.source.get("name", ""))]


def is_url(text: str) -> bool:
    """True if a value looks like a URL."""
    return "://" in text


def _split(option: str, url: str, also: str = "") -> tuple[str, str]:
    """Split a URL into the bucket's URL and the prefix.

    Args:
        option: The option with the URL.
        url: Its value.
        also: What else the option takes, for the message.

    Raises:
        UsageError: the text is not a bucket URL.
    """
    found = _BUCKET.fullmatch(url)
    root, prefix = (f"{found[1]}://{found[2]}", found[3]) if found else ("", None)
    if not found:
        azure = _AZURE.fullmatch(url)
        if not azure:
            raise UsageError(
                f"{option}: {shown(url)} is neither a bucket URL (s3://, gs://, r2:// or "
                "https://ACCOUNT.blob.core.windows.net/CONTAINER, with or without a prefix) nor an absolute path"
                f"{also}"
            )
        root, prefix = azure[1], azure[2]
    parts = [part for part in (prefix or "").split("/") if part]
    if any(part in (".", "..") for part in parts):
        raise UsageError(f"{option}: {shown(url)}: a bucket's prefix cannot contain `.` or `..`")
    return root, "/".join(parts)


def checkpoints(bucket: str | None) -> Store:
    """The store for runs. Without a bucket, SkyPilot creates one for this user and keeps it.

    A prefix with mode MOUNT passes SkyPilot's validation but fails on its server. So the bucket's root is mounted, and
    the prefix becomes part of the folder.
    """
    if bucket is None:
        return Store(MOUNT_POINT, MOUNT_POINT, {"name": default_bucket_name(), "mode": "MOUNT"}, made=True)
    if bucket.startswith("/"):
        if not _PATH.fullmatch(bucket) or ".." in bucket.split("/"):
            raise UsageError(f"--bucket: {shown(bucket)}: use only letters, digits and ._/=+@,- in a path")
        return Store(bucket.rstrip("/") or "/", None, None)
    if _NAME.fullmatch(bucket):
        # A bare name: SkyPilot knows its store, or creates it. `launch` remembers a created bucket by its name.
        return Store(MOUNT_POINT, MOUNT_POINT, {"name": bucket, "mode": "MOUNT"}, made=True)
    root, prefix = _split("--bucket", bucket, ", nor a bucket's name (lower-case letters, digits and -, at least 3)")
    folder = f"{MOUNT_POINT}/{prefix}" if prefix else MOUNT_POINT
    return Store(folder, MOUNT_POINT, {"source": root, "mode": "MOUNT"})


def data(url: str) -> Store:
    """The store for training data, mounted read-only."""
    root, prefix = _split("--data", url)
    source = {"source": root, "mode": "MOUNT", "config": {"mount": {"read_only": True}}}
    return Store(f"{DATA_POINT}/{prefix}" if prefix else DATA_POINT, DATA_POINT, source)


def default_bucket_name() -> str:
    """`skyspot-<user>-<hash>`: unique to the user, and independent of the machine's name."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "user"
    safe = re.sub(r"[^a-z0-9]+", "-", user.lower()).strip("-")[:20] or "user"
    # Without a HOME that can be written, the name alone: two users of one name may get one bucket's name.
    known = _user_id() or hashlib.sha256(user.encode()).hexdigest()[:8]
    return f"skyspot-{safe}-{known}"


def _user_id() -> str | None:
    """The user's ID, generated once and kept under HOME; None if it cannot be kept."""
    try:
        path = Path.home() / USER_ID
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            made = path.with_name(f".{path.name}-{os.getpid()}")
            made.write_text(f"{secrets.token_hex(4)}\n", encoding="ascii")
            try:
                path.hardlink_to(made)
            except FileExistsError:  # Another command created it first.
                pass
            except OSError:  # The file system has no hard links.
                made.replace(path)
            made.unlink(missing_ok=True)
        found = path.read_text(encoding="ascii").strip()
    except (OSError, RuntimeError, UnicodeDecodeError):
        return None
    return found if re.fullmatch("[0-9a-f]{8}", found) else None
