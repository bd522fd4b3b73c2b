"""A throw-away machine: a folder and a HOME, the task's mount points, its processes, and taking it all away.

Where the system allows it, the task's absolute mount points stand in a mount namespace of its own: an empty root in
memory, the real root's folders bound in, the buckets bound on top. Nothing of the user's own root is touched. Elsewhere
the paths are rewritten in the environment and in `run`.
"""

from __future__ import annotations

import functools
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from skyspot.job import Job, Mount

MARK = "SKYSPOT_REHEARSAL"


@functools.cache
def namespace_command() -> tuple[str, ...] | None:
    """How to enter a mount namespace here; None where the system does not allow one. Probed once."""
    if not sys.platform.startswith("linux") or os.environ.get("SKYSPOT_REHEARSE_WITHOUT_NAMESPACE"):
        return None
    flags = ("-m",) if os.geteuid() == 0 else ("-rm",)
    probe = (
        "d=$(mktemp -d) && trap 'umount -R $d; rmdir $d' EXIT && mount -t tmpfs tmpfs $d && mkdir $d/r "
        "&& mount --rbind / $d/r && chroot $d/r true"
    )
    for shell in ("/bin/sh",):
        command = ("unshare", *flags, shell)
        try:
            done = subprocess.run([*command, "-c", probe], capture_output=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode == 0:
            return command
    return None


class Machine:
    """One machine of a rehearsal, from its start until it is taken."""

    def __init__(self, job: Job, folder: Path, buckets: Mapping[str, Path], env: Mapping[str, str]) -> None:
        """Set the machine up: HOME, copies, the interpreter, the mount points.

        Args:
            job: What it is to do.
            folder: Its disk; made here, and wiped by `take`.
            buckets: The folders that outlive it, by mount point.
            env: Variables besides the task's own.
        """
        self.job, self.folder = job, folder
        self._buckets = dict(buckets)
        self._token = secrets.token_hex(8)
        self.home = folder / "home"
        self.log = folder.parent / f"{folder.name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.started = 0.0
        for place in (self.home, self.home / "sky_workdir", folder / "tmp", self.home / "skyspot"):
            place.mkdir(parents=True, exist_ok=True)
        if job.workdir:
            shutil.copytree(job.workdir, self.home / "sky_workdir", dirs_exist_ok=True)
        for mount in job.mounts:
            self._place(mount)
        interpreter = self.home / "skyspot" / "python"
        interpreter.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        interpreter.chmod(0o755)
        self.env = self._environment(env)

    def _place(self, mount: Mount) -> None:
        """Copy what is copied; a bucket under `~` becomes a link."""
        if mount.survives and not mount.target.startswith("~"):
            return
        target = self.home / mount.target.removeprefix("~/") if mount.target.startswith("~") else None
        if target is None:
            target = self.folder / "mounts" / mount.target.strip("/").replace("/", "_")
            self._buckets[mount.target] = target
        target.parent.mkdir(parents=True, exist_ok=True)
        if mount.survives:
            target.symlink_to(self._buckets[mount.target])
        elif mount.folder is not None and mount.folder.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(mount.folder, target, dirs_exist_ok=True, ignore=ignore)
        elif mount.folder is not None:
            shutil.copy(mount.folder, target)

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        base = {
            key: os.environ[key] for key in ("PATH", "LANG", "TERM", "USER", "LOGNAME", "SHELL") if key in os.environ
        }
        base["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), base.get("PATH", "/usr/bin:/bin")])
        envs = {**self.job.envs, **more}
        if namespace_command() is None:
            envs = {key: self._rewritten(value) for key, value in envs.items() if key != "SKYSPOT_MOUNT"}
        return {
            **base,
            **envs,
            "HOME": str(self.home),
            "TMPDIR": str(self.folder / "tmp"),
            "HF_HUB_OFFLINE": "1",
            MARK: self._token,
        }

    def _rewritten(self, text: str) -> str:
        """A text with the task's mount points replaced by the folders that stand for them."""
        for target, folder in sorted(self._absolute().items(), key=lambda pair: -len(pair[0])):
            text = re.sub(rf"(?<![\w./~-]){re.escape(target)}(?![\w.-])", lambda _, f=folder: str(f), text)  # type: ignore[misc]
        return text

    def _absolute(self) -> dict[str, Path]:
        return {target: folder for target, folder in self._buckets.items() if target.startswith("/")}

    def start(self, commands: str) -> None:
        """Run a script on the machine, in the background; its output goes into `log`."""
        script = self.folder / "run.sh"
        enter = namespace_command()
        script.write_text(f"cd ~/sky_workdir\n{commands if enter else self._rewritten(commands)}\n")
        command = ["bash", str(script)]
        if enter:
            outer = self.folder / "enter.sh"
            outer.write_text(_namespace_script(self.folder / "root", self._absolute(), script))
            command = [*enter, str(outer)]
        self.started = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env=self.env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """The exit status of what was started; None while it runs."""
        assert self.process
        return self.process.poll()

    def signal(self, number: int) -> None:
        """Signal the task's process group, as SkyPilot does."""
        assert self.process
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def take(self) -> None:
        """Kill all that runs on the machine, at once, and wipe its disk."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL every process that was started here, whatever session or group it went into."""
        if self.process:
            if self.process.poll() is None:
                self.signal(signal.SIGKILL)
            self.process.wait()  # Before psutil waits: it would take the exit status away.
        while found := self._processes():
            for process in found:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(found, timeout=5)

    def _processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._token and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def last_lines(self, count: int = 12) -> list[str]:
        """The end of the task's output."""
        try:
            text = self.log.read_text(errors="replace")
        except OSError:
            return []
        return text.replace("\r", "\n").splitlines()[-count:]


def _namespace_script(root: Path, binds: Mapping[str, Path], script: Path) -> str:
    """A shell script that builds the root in memory, and goes there."""
    lines = [
        "set -e",
        f"mkdir -p {shlex.quote(str(root))}",
        f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(root))}",
    ]

    def bind(path: str) -> None:
        """Bring a real path into the new root, leaving room for the mount points below it."""
        here = f"{root}{path}"
        if any(target == path for target in binds):
            return
        below = [target for target in binds if target.startswith(path.rstrip("/") + "/")]
        real = Path(path)
        if real.is_symlink():
            lines.append(f"ln -s {shlex.quote(str(real.readlink()))} {shlex.quote(here)}")
        elif real.is_dir() and below:
            if path != "/":
                lines.append(f"mkdir -p {shlex.quote(here)}")
            for entry in sorted(os.scandir(real), key=lambda entry: entry.name):
                bind(f"{path.rstrip('/')}/{entry.name}")
        elif real.is_dir():
            lines.append(f"mkdir -p {shlex.quote(here)} && mount --rbind {shlex.quote(path)} {shlex.quote(here)}")
        elif real.is_file():
            lines.append(f": > {shlex.quote(here)} && mount --bind {shlex.quote(path)} {shlex.quote(here)}")

    if any(True for _ in binds):
        bind("/")
    else:
        lines.append(f"mount --rbind / {shlex.quote(str(root))}")
    for target, folder in sorted(binds.items()):
        here = shlex.quote(f"{root}{target}")
        lines.append(f"mkdir -p {here} && mount --bind {shlex.quote(str(folder))} {here}")
    lines.append(f"exec chroot {shlex.quote(str(root))} bash {shlex.quote(str(script))}")
    return "\n".join(lines) + "\n"
