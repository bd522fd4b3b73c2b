"""What each kind of mount permits: a table, and the remedy for what it refuses.

SkyPilot mounts S3 with goofys, GCS with gcsfuse, Azure with blobfuse2; `cached` is MOUNT_CACHED: rclone with a full
cache.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

SEEK, APPEND, CUT, LINK, SYMLINK = "seek back", "append", "truncate", "hard link", "symbolic link"
RENAME_FULL, MAP = "rename a folder", "mmap write"


@dataclass(frozen=True)
class Manners:
    """One kind of mount."""

    direct: bool = False
    """Whether a write reaches the bucket at once; otherwise a file arrives there whole, at its close or later."""
    refuses: dict[str, int] = field(default_factory=dict)
    """The errno for each thing that it refuses."""
    rename_copies: bool = False
    """Whether a rename is a copy of each file and then a deletion, so that a kill can leave both."""
    fsync_uploads: bool = False
    upload_after_s: float | None = None
    """Seconds from close to the upload's start; None: close() waits for the upload."""
    upload_bytes_per_s: float = 1e8


MANNERS = {
    "local": Manners(direct=True),
    "s3": Manners(
        refuses={
            SEEK: errno.EPERM,
            APPEND: errno.EPERM,
            CUT: errno.EPERM,
            LINK: errno.EPERM,
            SYMLINK: errno.EPERM,
            RENAME_FULL: errno.ENOTEMPTY,
            MAP: errno.ENODEV,
        },
        rename_copies=True,
    ),
    "gcs": Manners(refuses={LINK: errno.ENOSYS}, rename_copies=True, fsync_uploads=True),
    "azure": Manners(refuses={LINK: errno.ENOSYS}, rename_copies=True),
    "cached": Manners(refuses={LINK: errno.ENOSYS, SYMLINK: errno.ENOSYS}, rename_copies=True, upload_after_s=1.0),
}

REMEDIES = {
    SEEK: "write the file front to back (torch.save does, safetensors.save_file does not), or to a local folder and "
    "copy it",
    APPEND: "open a new file for each attempt, or append to a local file and copy it",
    CUT: "write a new file instead of cutting one, or write to a local folder and copy it (safetensors 0.8 cuts its "
    "files)",
    LINK: "write the file twice, or its name into a small file (`latest.txt`)",
    SYMLINK: "write the name into a small file (`latest.txt`)",
    RENAME_FULL: "write the files into their folder's final name, and a marker file last",
    MAP: "write to a local file and copy it",
}
