"""A throw-away machine: a folder and a HOME, the task's mount points, its processes, and taking it all away.

Where the system allows it, the task's absolute mount points stand in a mount namespace of its own: an empty root in
memory, the real root's folders bound in, the buckets bound on top. Nothing of the user's own root is touched. Elsewhere
the paths are rewritten in the environment and in `run`.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from skyspot.job import Job, Mount

MARK = "SKYSPOT_REHEARSAL"


@dataclass(frozen=True)
class Namespace:
    """How to get a root folder of one's own here."""

    command: tuple[str, ...]
    """Runs a script inside; the script's path is to be added."""
    processes: bool
    """Whether its processes are its own too: then all of them end at once, with the first."""


@functools.cache
def namespace() -> Namespace | None:
    """The namespaces that the system allows; None where it allows none. Probed once."""
    if not sys.platform.startswith("linux") or os.environ.get("SKYSPOT_REHEARSE_WITHOUT_NAMESPACE"):
        return None
    mounts = "-m" if os.geteuid() == 0 else "-rm"
    root = "d=$(mktemp -d) && mount -t tmpfs tmpfs $d && mkdir $d/r && mount --rbind / $d/r"
    if _unshare_keeps_out_of_signals():
        command = ("unshare", mounts, "--pid", "--fork", "--kill-child", "/bin/sh")
        if _works([*command, "-c", f"{root} && mount -t proc proc $d/r/proc && chroot $d/r true"]):
            return Namespace(command, True)
    command = ("unshare", mounts, "/bin/sh")
    return Namespace(command, False) if _works([*command, "-c", f"{root} && chroot $d/r true"]) else None


def _works(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _unshare_keeps_out_of_signals() -> bool:
    """Whether `unshare --fork` outlives a SIGTERM that its child is to answer; old releases die of it."""
    try:
        said = subprocess.run(["unshare", "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    release = re.search(r"util-linux (\d+)\.(\d+)", said)
    return release is not None and (int(release[1]), int(release[2])) >= (2, 38)


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
        if namespace() is None:
            envs = {key: self._rewritten(value) for key, value in envs.items() if key != "SKYSPOT_MOUNT"}
        return {
            **base,
            **envs,
            "HOME": str(self.home),
            "TMPDIR": str(self.folder / "tmp"),
            "HF_HUB_OFFLINE": "1",
            MARK: str(self.folder),
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
        enter = namespace()
        script.write_text(f"cd ~/sky_workdir\n{commands if enter else self._rewritten(commands)}\n")
        command = ["bash", str(script)]
        if enter:
            outer = self.folder / "enter.sh"
            outer.write_text(_namespace_script(self.folder / "root", self._absolute(), script, enter.processes))
            command = [*enter.command, str(outer)]
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
        sweep(self.folder)

    def last_lines(self, count: int = 12) -> list[str]:
        """The end of the task's output."""
        try:
            text = self.log.read_text(errors="replace")
        except OSError:
            return []
        return text.replace("\r", "\n").splitlines()[-count:]


def sweep(folder: Path) -> None:
    """SIGKILL every process of the machines that lie in a folder, or of the one that is the folder."""
    while found := _processes(folder):
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, timeout=5)


def _processes(folder: Path) -> list[psutil.Process]:
    """The living processes that a machine in the folder started, known by what it put into their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            mark = process.environ().get(MARK)
            if mark and Path(mark).is_relative_to(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def _namespace_script(root: Path, binds: Mapping[str, Path], script: Path, processes: bool) -> str:
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
    program = f"bash {shlex.quote(str(script))}"
    if processes:
        lines.append(f"mount -t proc proc {shlex.quote(f'{root}/proc')}")
        # The first process of a namespace takes no signal that it has not asked for, and has to collect orphans: so a
        # shell is the first. Its own trap waits until the task, which gets each signal itself, has ended.
        program = f"bash -c {shlex.quote(f'trap : TERM INT; {program}; exit $?')}"
    lines.append(f"exec chroot {shlex.quote(str(root))} {program}")
    return "\n".join(lines) + "\n"
