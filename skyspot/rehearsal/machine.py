"""A disposable machine: a folder with a HOME, the task's mount points, and its processes, all removed at the end.

If the system allows it, the task gets its own mount namespace: an empty root in memory, with the real root's folders
bound in and the buckets bound on top. Its processes get their own namespace, so that none survives (namespace.py). The
user's root stays untouched. On other systems, the paths are rewritten in the environment and in `run`, and processes
are found by a mark in their environment (processes.py).
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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from skyspot.rehearsal import scratch
from skyspot.rehearsal.bucketfs import served
from skyspot.rehearsal.bucketfs.served import Served
from skyspot.rehearsal.bucketfs.strike import Strike
from skyspot.rehearsal.bucketfs.trace import Call, read_from, read_trace
from skyspot.rehearsal.bucketfs.watcher import Watcher
from skyspot.rehearsal.interpreter import this_interpreter
from skyspot.rehearsal.needs import gpus_here
from skyspot.rehearsal.processes import MARK, Guard, below, kill_below
from skyspot.rehearsal.task import MachineMount, RehearsalTask
from skyspot.rehearsal.upload import copy_folder

WITHOUT_NAMESPACE = "SKYSPOT_REHEARSE_WITHOUT_NAMESPACE"
"""Set to any value: no namespaces."""
LEFT = "run.sh.left"
"""In a namespace, the file that exists once the script has exited."""
DAEMONS = "daemons.json"
"""The commands of the file systems' daemons."""
SHORT = "/skyspot-tmp"
"""In a namespace, TMPDIR. A socket's path has at most 107 bytes; a loader whose workers cannot make one hangs."""
PROBE_S = 60.0
"""What works here is tried; an answer that takes longer, on a busy machine too, is none."""
LEAVE_S = 30.0
"""Time from SIGTERM to SIGKILL that SkyPilot gives a script's remaining processes (sky.skylet.subprocess_daemon)."""


@functools.cache
def namespace_command() -> tuple[str, ...] | None:
    """The command that enters a machine's namespaces; None if the system does not allow them. Tried once."""
    if not sys.platform.startswith("linux") or os.environ.get(WITHOUT_NAMESPACE):
        return None
    flags = "-mp" if os.geteuid() == 0 else "-rmp"
    command = ("unshare", flags, sys.executable, "-I", "-S", str(Path(__file__).with_name("namespace.py")))
    with scratch.folder("probe") as folder:
        root, script, build = Path(folder, "root"), Path(folder, "run.sh"), Path(folder, "build.sh")
        script.write_text("exit 42\n")
        build.write_text(_namespace_script(root, {}, (), frozenset()))
        arguments = [os.getpid(), build, root, script, 1]
        try:
            done = subprocess.run([*command, *map(str, arguments)], capture_output=True, timeout=PROBE_S)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return command if done.returncode == 42 else None


def no_namespace() -> str:
    """Say why there are no mount namespaces."""
    if os.environ.get(WITHOUT_NAMESPACE):
        return f"{WITHOUT_NAMESPACE} is set, so mount namespaces are off"
    return "this system allows no mount namespace"


@functools.cache
def bucketfs_missing() -> str | None:
    """Say why buckets cannot be served through FUSE here; None if they can. Tried once."""
    enter = namespace_command()
    if enter is None:
        return no_namespace()
    if missing := served.missing():
        return missing
    with scratch.folder("probe") as folder:
        root, bucket, trace = folder / "root", folder / "bucket", folder / "trace"
        point = folder / "point"
        bucket.mkdir()
        point.mkdir()
        probe = Served(bucket, point, folder / "disk", trace, "local")
        served.write_daemons(folder / DAEMONS, [probe], root / "proc", None)
        (folder / "run.sh").write_text(f"echo > {shlex.quote(str(point))}/written && exit 42\n")
        (folder / "build.sh").write_text(_namespace_script(root, {}, (), frozenset()))
        arguments = [os.getpid(), folder / "build.sh", root, folder / "run.sh", 1, folder / DAEMONS]
        try:
            done = subprocess.run([*enter, *map(str, arguments)], capture_output=True, text=True, timeout=PROBE_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
        if done.returncode == 42 and trace.exists():
            return None
        return (done.stderr.strip().splitlines() or ["FUSE cannot be mounted here"])[-1]


class Machine:
    """One machine of a rehearsal, from its start until it is taken."""

    def __init__(
        self,
        task: RehearsalTask,
        folder: Path,
        buckets: Mapping[str, Path],
        env: Mapping[str, str],
        manners: Mapping[str, str] | None = None,
    ) -> None:
        """Set the machine up: HOME, copies, the interpreter, the mount points.

        Args:
            task: The task that it runs.
            folder: Its disk; created here, deleted by `take`.
            buckets: The folders that outlive it, by mount point.
            env: Variables in addition to the task's own.
            manners: The kind of mount of each bucket that is served through FUSE, by mount point: each call on it is
                then in its trace. The others are bound. Needs `bucketfs_missing() is None`.
        """
        self.task, self.folder = task, folder
        self._buckets = dict(buckets)
        self.served: dict[str, Served] = {}
        """What is served through FUSE, by mount point."""
        for number, (point, kind) in enumerate((manners or {}).items()):
            place, trace = folder / "buckets" / str(number), folder.parent / f"{folder.name}.{number}.trace"
            (place / "mount").mkdir(parents=True)
            self.served[point] = Served(buckets[point], place / "mount", place / "disk", trace, kind)
            self._buckets[point] = place / "mount"
        self.traces = {point: one.trace for point, one in self.served.items()}
        """The trace of each bucket that is served or watched, by mount point."""
        self.watchers: list[Watcher] = []
        """Those of buckets that are not served through FUSE; stopped with the machine."""
        self._looked: dict[str, int] = {}
        self._struck: Call | None = None
        self.home = folder / "home"
        self.log = folder.parent / f"{folder.name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._guard: Guard | None = None
        self.started = 0.0
        self.left_at: float | None = None
        """When the script was seen to have exited (monotonic seconds); its remaining processes may still be exiting."""
        self.noticed_s: float | None = None
        """When it got a notice or SIGTERM (monotonic seconds)."""
        for place in (self.home, self.home / "sky_workdir", folder / "tmp", self.home / "skyspot"):
            place.mkdir(parents=True, exist_ok=True)
        if task.workdir:
            copy_folder(task.workdir, self.home / "sky_workdir", leave_out=folder.parent.parent, uploaded=True)
        for mount in task.mounts:
            self._place(mount)
        bin_folder = folder / "bin"
        task.interpreter.install(self.home / "skyspot" / "python", bin_folder / "python", bin_folder / "python3")
        self.env = self._environment(env)

    def _place(self, mount: MachineMount) -> None:
        """Copy a mount's folder to the machine; a bucket under `~` becomes a link."""
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
        own = [str(self.folder / "bin"), str(self.task.interpreter.path.parent)]
        base["PATH"] = os.pathsep.join([*own, base.get("PATH", "/usr/bin:/bin")])
        envs = {**self.task.envs, **more}
        if namespace_command() is None:
            envs = {key: self._rewritten(value) for key, value in envs.items() if key != "SKYSPOT_MOUNT"}
        without_gpu = {} if gpus_here() else {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
        return {
            **base,
            "HF_HUB_OFFLINE": "1",
            **without_gpu,
            **envs,
            "HOME": str(self.home),
            "TMPDIR": SHORT if namespace_command() else str(self.folder / "tmp"),
            MARK: str(self.folder),
        }

    def _rewritten(self, text: str) -> str:
        """Replace the task's mount points in a text by the folders that stand in for them."""
        for target, folder in sorted(self._absolute().items(), key=lambda pair: -len(pair[0])):
            text = re.sub(rf"(?<![\w./~-]){re.escape(target)}(?![\w.-])", lambda _, f=folder: str(f), text)  # type: ignore[misc]
        return text

    def _absolute(self) -> dict[str, Path]:
        return {target: folder for target, folder in self._buckets.items() if target.startswith("/")}

    def start(self, commands: str, strike: tuple[str, Strike] | None = None) -> None:
        """Run a script on the machine in the background; its output goes to `log`.

        Args:
            commands: The script.
            strike: The mount point of the served bucket that a strike falls on, and where. `struck` then tells when to
                kill the machine.
        """
        script = self.folder / "run.sh"
        (self.folder / LEFT).unlink(missing_ok=True)
        enter = namespace_command()
        # Slurm sends SIGUSR1 to what its script starts, and not to the shell.
        script.write_text(f"trap : USR1; cd ~/sky_workdir; {commands if enter else self._rewritten(commands)}\n")
        command = ["bash", str(script)]
        if enter:
            root, build = self.folder / "root", self.folder / "build.sh"
            read_only = frozenset(mount.path for mount in self.task.mounts if mount.read_only)
            needed = (self.folder.parent.parent, *this_interpreter().folders, *self.task.interpreter.folders)
            binds = {**self._absolute(), SHORT: self.folder / "tmp"}
            build.write_text(_namespace_script(root, binds, needed, read_only))
            command = [*enter, str(os.getpid()), str(build), str(root), str(script), str(LEAVE_S)]
            if self.served:
                falls = (self.served[strike[0]], strike[1]) if strike else None
                served.write_daemons(self.folder / DAEMONS, list(self.served.values()), root / "proc", falls)
                command.append(str(self.folder / DAEMONS))
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
            self._dismiss_guard()
            self._guard = Guard(self.process.pid, str(self.folder))  # In a namespace the kernel does that.

    def _dismiss_guard(self) -> None:
        guard, self._guard = self._guard, None
        if guard:
            guard.dismiss()

    def poll(self) -> int | None:
        """The script's exit status; None while it or its remaining processes run."""
        assert self.process
        code = self.process.poll()
        first = self.left_at is None and (code is not None or (self.folder / LEFT).exists())
        if first:
            self.left_at = time.monotonic()
        if code is None or namespace_command():  # In a namespace it ends when all have exited (namespace.py).
            return code
        behind = below(str(self.folder))
        for process in behind if first else ():
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        assert self.left_at is not None
        return None if behind and time.monotonic() < self.left_at + LEAVE_S else code

    def calls(self, point: str) -> list[Call]:
        """List the calls on a bucket, by its mount point; also after the machine was taken."""
        return read_trace(self.traces[point])

    def struck(self) -> Call | None:
        """The call that the strike fell on; None before. Then the machine stands still and is to be killed."""
        for point, one in self.served.items() if self._struck is None else ():
            calls, self._looked[point] = read_from(one.trace, self._looked.get(point, 0))
            self._struck = next((call for call in calls if call.struck), self._struck)
        return self._struck

    def signal(self, number: int) -> None:
        """Signal the task's process group, as SkyPilot does."""
        assert self.process
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def take(self) -> None:
        """Kill all processes of the machine and delete its disk, even if it is interrupted in between."""
        try:
            self._remove()
        except KeyboardInterrupt:
            self._remove()  # Later interrupts are ignored (interrupts.py).
            raise

    def _remove(self) -> None:
        self.kill()
        scratch.delete_tree(self.folder)

    def kill(self) -> None:
        """SIGKILL every process of the machine, whatever its session or group."""
        for one in self.watchers:
            one.kill_comes()
        if self.process:
            if self.process.poll() is None:
                self._kill_first_inside()
            if self.process.poll() is None:
                self.signal(signal.SIGKILL)
            self.process.wait()  # Before psutil waits: it would take the exit status away.
        kill_below(str(self.folder))
        for one in self.watchers:
            one.stop()
        self._dismiss_guard()

    def _kill_first_inside(self) -> None:
        """Kill the first process in the namespace: all others die with it, and the process outside then ends."""
        if not namespace_command():
            return
        assert self.process
        pid, first = self.process.pid, list[int]()
        try:  # Fast, without a scan of all processes: the save to be hit may last milliseconds.
            first = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except OSError:
            with suppress(psutil.Error):
                first = [process.pid for process in psutil.Process(pid).children()]
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            for number in first:
                os.kill(number, signal.SIGKILL)
            if first:  # Otherwise it has not started yet.
                self.process.wait(10)


def _namespace_script(root: Path, binds: Mapping[str, Path], needed: Sequence[Path], read_only: frozenset[str]) -> str:
    """Write the shell script that builds the machine's root in memory. The script writes nothing outside.

    Args:
        root: The mount point of the new root.
        binds: The folder or file for each of the task's mount points.
        needed: The rehearsal's own folders: visible inside, even under a mount point.
        read_only: The mount points that the task must not write to.
    """
    # A symlink in a mount point's path would lead out of the new root.
    binds = {os.path.realpath(target): folder for target, folder in binds.items()}
    read_only = frozenset(os.path.realpath(target) for target in read_only)
    needed = [Path(os.path.realpath(place)) for place in needed]
    absent = {target for target in binds if not os.path.exists(target)}  # noqa: PTH110 (Path's raises on 13)
    quoted = shlex.quote(str(root))
    lines = ["set -e", f"mkdir -p {quoted}", f"mount -t tmpfs -o mode=755 tmpfs {quoted}"]

    def bind(path: str) -> None:
        """Bind a real path into the new root, with room for missing mount points below it."""
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
            # Other programs use /tmp meanwhile: a path that has vanished is left out.
            lines.append(f"{make} && {{ mount --rbind {source} {here} || [ ! -e {source} ]; }}")

    bind("/")
    lines.append(f"mount -t proc proc {shlex.quote(f'{root}/proc')}")  # For the new process namespace.
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
