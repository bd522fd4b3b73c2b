"""A throw-away machine: a folder and a HOME, the task's mount points, its processes, and taking it all away.

Where the system allows it, the task's absolute mount points stand in a mount namespace of its own: an empty root in
memory, the real root's folders bound in, the buckets bound on top; and its processes in a namespace of theirs, so that
none survives it (inside.py). Nothing of the user's own root is touched. Elsewhere the paths are rewritten in the
environment and in `run`, and processes are found by a mark in their environment.
"""

from __future__ import annotations

import functools
import glob
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from skyspot.errors import SkyspotError
from skyspot.rehearsal.task import MachineMount, RehearsalTask

MARK = "SKYSPOT_REHEARSAL"
LEFT = "run.sh.left"
"""In a namespace, the file that is there once the script has left."""
LEAVE_S = 30.0
"""What SkyPilot gives those whom a script leaves behind, from their SIGTERM on (sky.skylet.subprocess_daemon)."""


@functools.cache
def namespace_command() -> tuple[str, ...] | None:
    """How to enter namespaces of a machine's own here; None where the system does not allow them. Tried once, whole."""
    if not sys.platform.startswith("linux") or os.environ.get("SKYSPOT_REHEARSE_WITHOUT_NAMESPACE"):
        return None
    flags = "-mp" if os.geteuid() == 0 else "-rmp"
    command = ("unshare", flags, sys.executable, "-I", "-S", str(Path(__file__).with_name("namespace.py")))
    with tempfile.TemporaryDirectory(prefix="skyspot-probe-") as folder:
        root, script, build = Path(folder, "root"), Path(folder, "run.sh"), Path(folder, "build.sh")
        script.write_text("exit 42\n")
        build.write_text(_namespace_script(root, {}, (), frozenset()))
        try:
            done = subprocess.run([*command, str(build), str(root), str(script), "1"], capture_output=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return command if done.returncode == 42 else None


class Machine:
    """One machine of a rehearsal, from its start until it is taken."""

    def __init__(self, task: RehearsalTask, folder: Path, buckets: Mapping[str, Path], env: Mapping[str, str]) -> None:
        """Set the machine up: HOME, copies, the interpreter, the mount points.

        Args:
            task: The task that it runs.
            folder: Its disk; made here, and wiped by `take`.
            buckets: The folders that outlive it, by mount point.
            env: Variables besides the task's own.
        """
        self.task, self.folder = task, folder
        self._buckets = dict(buckets)
        self._token = secrets.token_hex(8)
        self.home = folder / "home"
        self.log = folder.parent / f"{folder.name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self.started = 0.0
        self.left_at: float | None = None
        """When the script was seen to have left (monotonic seconds); what it left behind may have time to leave."""
        for place in (self.home, self.home / "sky_workdir", folder / "tmp", self.home / "skyspot"):
            place.mkdir(parents=True, exist_ok=True)
        if task.workdir:
            copy_folder(task.workdir, self.home / "sky_workdir", leave_out=folder.parent.parent, uploaded=True)
        for mount in task.mounts:
            self._place(mount)
        interpreter = self.home / "skyspot" / "python"
        interpreter.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        interpreter.chmod(0o755)
        self.env = self._environment(env)

    def _place(self, mount: MachineMount) -> None:
        """Copy what is copied; a bucket under `~` becomes a link."""
        if mount.survives and not mount.path.startswith("~"):
            return
        target = self.home / mount.path.removeprefix("~/") if mount.path.startswith("~") else None
        if target is None:
            target = self.folder / "mounts" / mount.path.strip("/").replace("/", "_")
            self._buckets[mount.path] = target
        target.parent.mkdir(parents=True, exist_ok=True)
        if mount.survives:
            target.symlink_to(self._buckets[mount.path])
        elif mount.folder is not None and mount.folder.is_dir():
            copy_folder(mount.folder, target, leave_out=self.folder.parent.parent, uploaded=mount.uploaded)
        elif mount.folder is not None:
            shutil.copy(mount.folder, target)

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        base = {
            key: os.environ[key] for key in ("PATH", "LANG", "TERM", "USER", "LOGNAME", "SHELL") if key in os.environ
        }
        base["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), base.get("PATH", "/usr/bin:/bin")])
        envs = {**self.task.envs, **more}
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
        (self.folder / LEFT).unlink(missing_ok=True)
        enter = namespace_command()
        script.write_text(f"cd ~/sky_workdir\n{commands if enter else self._rewritten(commands)}\n")
        command = ["bash", str(script)]
        if enter:
            root, build = self.folder / "root", self.folder / "build.sh"
            read_only = frozenset(mount.path for mount in self.task.mounts if mount.read_only)
            needed = (self.folder.parent.parent, Path(sys.prefix), Path(sys.base_prefix))
            build.write_text(_namespace_script(root, self._absolute(), needed, read_only))
            command = [*enter, str(build), str(root), str(script), str(LEAVE_S)]
        self.started, self.left_at = time.monotonic(), None
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
        if not enter:
            self._watch_over(self.process.pid)

    def _watch_over(self, group: int) -> None:
        """See that the task goes when this program is killed; in a namespace the kernel does that."""
        self._dismiss_guard()
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", 'read -r word || kill -9 "-$1"', "guard", str(group)],
            stdin=subprocess.PIPE,  # At its end, without a word: this program is gone.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _dismiss_guard(self) -> None:
        if self._guard:
            self._guard.communicate(b"over\n")
            self._guard = None

    def poll(self) -> int | None:
        """The exit status of what was started; None while it runs, or what it left behind has time to leave."""
        assert self.process
        code = self.process.poll()
        first = self.left_at is None and (code is not None or (self.folder / LEFT).exists())
        if first:
            self.left_at = time.monotonic()
        if code is None or namespace_command():  # In a namespace it ends when all have left (inside.py).
            return code
        behind = self._processes()
        for process in behind if first else ():
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        assert self.left_at is not None
        return None if behind and time.monotonic() < self.left_at + LEAVE_S else code

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
                self._kill_first_inside()
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
        self._dismiss_guard()

    def _kill_first_inside(self) -> None:
        """In a namespace all go with the first process; the one that waits outside ends when they are gone."""
        if not namespace_command():
            return
        assert self.process
        pid, first = self.process.pid, list[int]()
        try:  # At once, and not after a look at every process: a save that is to be hit may be over in no time.
            first = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except OSError:
            with suppress(psutil.Error):
                first = [process.pid for process in psutil.Process(pid).children()]
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            for number in first:
                os.kill(number, signal.SIGKILL)
            if first:  # Else it has not come so far yet.
                self.process.wait(10)

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


def copy_folder(source: Path, target: Path, leave_out: Path, *, uploaded: bool) -> None:
    """Copy a folder.

    Args:
        source: What is copied.
        target: Where to; it may be there.
        leave_out: The rehearsal's own folder, which may lie in `source`.
        uploaded: Whether SkyPilot would upload it: then without what is ignored there.

    Raises:
        SkyspotError: it cannot be copied; says what.
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
    """What SkyPilot does not upload, relative to the folder: what `.skyignore` names, or else what git ignores.

    As sky.data.storage_utils.get_excluded_files has it: a pattern that begins with `/` counts from the folder, any
    other at every depth, and there is no `!`; where git ignores the whole folder, nothing is left out. Unlike there,
    what git submodules ignore is taken along.
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


def _namespace_script(root: Path, binds: Mapping[str, Path], needed: Sequence[Path], read_only: frozenset[str]) -> str:
    """A shell script that builds the machine's root in memory. It writes nothing outside.

    Args:
        root: Where.
        binds: What the task's mount points show: folders or files.
        needed: Folders of the rehearsal's own: seen inside too, also where a mount point lies over them.
        read_only: The mount points that the task may not write to.
    """
    # A link in a mount point's path would lead out of the new root.
    binds = {os.path.realpath(target): folder for target, folder in binds.items()}
    read_only = frozenset(os.path.realpath(target) for target in read_only)
    needed = [Path(os.path.realpath(place)) for place in needed]
    absent = {target for target in binds if not os.path.exists(target)}  # noqa: PTH110 (Path's raises on 13)
    quoted = shlex.quote(str(root))
    lines = ["set -e", f"mkdir -p {quoted}", f"mount -t tmpfs -o mode=755 tmpfs {quoted}"]

    def bind(path: str) -> None:
        """Bring a real path into the new root, leaving room for the mount points below it that are not there."""
        source, here = shlex.quote(path), shlex.quote(f"{root}{path}")
        if path in absent:
            return
        below = [target for target in absent if target.startswith(path.rstrip("/") + "/")]
        real = Path(path)
        if real.is_symlink():
            lines.append(f"ln -s {shlex.quote(str(real.readlink()))} {here}")
        elif real.is_dir() and below:
            if path != "/":
                lines.append(f"mkdir -p {here}")
            for name in _names(path):
                bind(f"{path.rstrip('/')}/{name}")
        elif real.is_dir() or real.is_file():
            make = f"mkdir -p {here}" if real.is_dir() else f": > {here}"
            # Others work in /tmp meanwhile: what is gone by now is left out.
            lines.append(f"{make} && {{ mount --rbind {source} {here} || [ ! -e {source} ]; }}")

    bind("/")
    lines.append(f"mount -t proc proc {shlex.quote(f'{root}/proc')}")  # Of the new processes' own.
    for target, folder in sorted(binds.items()):
        here, parent = shlex.quote(f"{root}{target}"), shlex.quote(str(Path(f"{root}{target}").parent))
        if target in absent or any(MachineMount(other, None, True).holds(target) for other in binds if other != target):
            make = f"mkdir -p {here}" if folder.is_dir() else f"mkdir -p {parent} && : > {here}"
            lines.append(f"[ -e {here} ] || {{ {make}; }}")
        lines.append(f"mount --bind {shlex.quote(str(folder))} {here}")
        if target in read_only:
            lines.append(f"mount -o remount,bind,ro {here}")
    for place in dict.fromkeys(needed):
        if any(MachineMount(target, None, True).holds(str(place)) for target in binds):
            here = shlex.quote(f"{root}{place}")
            lines.append(f"mkdir -p {here} && mount --rbind {shlex.quote(str(place))} {here}")
    return "\n".join(lines) + "\n"


def _names(folder: str) -> list[str]:
    try:
        return sorted(path.name for path in Path(folder).iterdir())
    except OSError:
        return []
