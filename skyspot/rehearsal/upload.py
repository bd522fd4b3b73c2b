"""What SkyPilot would bring to a machine: a folder is copied, without what it would not upload."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
from pathlib import Path

from skyspot.errors import SkyspotError


def copy_folder(source: Path, target: Path, leave_out: Path, *, uploaded: bool) -> None:
    """Copy a folder.

    Args:
        source: The folder to copy.
        target: The destination; it may exist.
        leave_out: The rehearsal's own folder, which may be in `source`.
        uploaded: Whether SkyPilot would upload it; ignored files are then left out.

    Raises:
        SkyspotError: a file cannot be copied; names it.
    """
    unwanted = _ignored(source) if uploaded else set()

    def ignore(folder: str, names: list[str]) -> set[str]:
        inside = os.path.relpath(folder, source)
        return {
            name
            for name in names
            if name == "__pycache__"
            or os.path.normpath(f"{inside}/{name}") in unwanted
            or Path(folder, name).resolve() == leave_out
        }

    try:
        shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True, ignore=ignore)
    except shutil.Error as error:
        where, _, reason = error.args[0][0]
        raise SkyspotError(f"{where}: {reason}") from None
    except OSError as error:
        raise SkyspotError(f"{error.filename or source}: {error.strerror}") from None


def _ignored(source: Path) -> set[str]:
    """List the files that SkyPilot does not upload, relative to the folder: from `.skyignore`, or else git's.

    As in sky.data.storage_utils.get_excluded_files: a pattern that begins with `/` is relative to the folder, any other
    matches at every depth, and there is no `!`; if git ignores the whole folder, nothing is left out. Unlike there,
    files that git submodules ignore are copied.
    """
    try:
        lines = [line.strip() for line in (source / ".skyignore").read_text(errors="replace").splitlines()]
    except OSError:
        return _ignored_by_git(source)
    found = set()
    for line in lines:
        if line and not line.startswith("#"):
            pattern = line[1:] if line.startswith("/") else f"**/{line}"
            found.update(glob.glob(pattern, root_dir=source, recursive=True))  # noqa: PTH207 (Path's takes hidden files)
    return {os.path.normpath(name) for name in found}


def _ignored_by_git(source: Path) -> set[str]:
    command = ["git", "-c", "safe.directory=*", "-C", str(source), "ls-files", "-z"]
    try:
        done = subprocess.run(
            [*command, "--others", "--ignored", "--exclude-standard", "--directory"], capture_output=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return set()
    names = [os.fsdecode(name) for name in done.stdout.split(b"\0") if name] if done.returncode == 0 else []
    return set() if "./" in names else {os.path.normpath(name) for name in names}
