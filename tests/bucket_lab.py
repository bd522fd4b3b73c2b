"""A real S3 server over a local folder, and real FUSE mounts of it by rclone: one can look behind the mount."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

RCLONE = Path(sys.executable).with_name("rclone")
BUCKET = "bucket"
KEY, SECRET = "skyspot-test", "skyspot-secret"
PATIENCE_S = 20.0


def missing() -> str | None:
    """Why nothing can be mounted on this machine; None where it can."""
    if not Path("/dev/fuse").exists():
        return "no /dev/fuse"
    if os.geteuid() or not shutil.which("setpriv"):
        return "mounting takes root, and util-linux"
    if not RCLONE.exists():
        return "no rclone"
    return None if shutil.which("fusermount3") else "no fusermount3 (apt install fuse3)"


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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = child(
        RCLONE, "serve", "s3", behind.parent, "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}",
        "--config", "/dev/null", "--force-path-style", log=folder / "s3.log",
    )  # fmt: skip

    def answers() -> bool:
        assert server.poll() is None, (folder / "s3.log").read_text()
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return True
        return False

    try:
        until("the S3 server answers", answers)
        yield Store(behind, f"http://127.0.0.1:{port}")
    finally:
        server.kill()
        server.wait()


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
        """As a machine that is taken: what is not in the store is lost."""
        self.daemon.kill()
        self.daemon.wait()
        unmount(self.point)


@contextlib.contextmanager
def mounted(
    store: Store, folder: Path, *options: str, cached: bool = False, log_level: str = "INFO"
) -> Iterator[Mounted]:
    """Mount the bucket below a folder, with SkyPilot's options: without a cache, or with a full one (MOUNT_CACHED)."""
    folder.mkdir(parents=True, exist_ok=True)
    point, log = folder / "mount", folder / "mount.log"
    point.mkdir()
    mode = (
        ["--vfs-cache-mode", "full", "--cache-dir", str(folder / "cache"), "--vfs-fast-fingerprint"] if cached else []
    )
    daemon = child(
        RCLONE, "mount", f"x:{BUCKET}", point, "--dir-cache-time", "10s", "--log-file", log, "--log-level", log_level,
        *mode, *options, env=store.env, log=folder / "daemon.log",
    )  # fmt: skip
    try:

        def there() -> bool:
            assert daemon.poll() is None, log.read_text() + (folder / "daemon.log").read_text()
            return any(line.split()[4] == str(point) for line in mountinfo())

        until("the mount is there", there)
        yield Mounted(point, daemon, log)
    finally:
        daemon.kill()  # A frozen one, too.
        daemon.wait()
        unmount(point)


def mountinfo() -> list[str]:
    return Path("/proc/self/mountinfo").read_text().splitlines()


def unmount(point: Path) -> None:
    """Take a mount away, whatever still uses it."""
    if any(line.split()[4] == str(point) for line in mountinfo()):
        subprocess.run(["umount", "--lazy", str(point)], check=False, capture_output=True)
