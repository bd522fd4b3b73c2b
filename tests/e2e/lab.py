"""The lab: an unpatched SkyPilot API server and jobs controller on a real Slurm, with an S3 server, on loopback.

It lives in namespaces of its own (network, processes, mounts, host name), which run.py enters. There is no way out of
that network, nothing that the lab does is seen outside, and when the first process there ends, however it ends, the
kernel takes everything with it. Each Slurm node has a host name and a network namespace besides, on one bridge.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import install
import place
from place import (
    BIN,
    CLIENT,
    CLUSTER,
    ETC,
    FILES,
    FRESH,
    HOME,
    HOST,
    HOST_IP,
    LOG,
    LOGIN,
    NODE,
    NODE_IPS,
    NODE_TMP,
    NODES,
    ROOT,
    S3_DATA,
    S3_KEY,
    S3_PORT,
    S3_SECRET,
    SHARED,
    SKY_URL,
    SLURMD_PORT,
    SSH_PORT,
    STATE,
    UID,
    USER,
)  # fmt: skip

KILL_WAIT_S = 10
PROVISION_TIMEOUT_S = 30
PROJECT = HOME / "project"
NOTES = LOG / "notes.log"
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
QUEUE_AGE_S = 1
# SkyPilot sizes itself by this: 4 jobs controllers instead of one for each 0.8 GB of the machine. Each imports sky.
SKYPILOT_MEMORY_GB = 10
ERRORS_IN_A_ROW = 30


def user_environment(**more: str) -> dict[str, str]:
    """What the user's shell has, and nothing of this process' environment."""
    return {
        "HOME": str(HOME),
        "USER": USER,
        "LOGNAME": USER,
        "LANG": "C.UTF-8",
        "PATH": f"{CLIENT}/bin:{BIN}:{SYSTEM_PATH}",
        "SLURM_CONF": f"{ETC}/slurm.conf",
        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
        # SkyPilot builds a wheel of itself with pip. 0 switches build isolation off: pip inverts this variable.
        "PIP_NO_BUILD_ISOLATION": "0",
        **more,
    }


def as_user(command: list[Any]) -> list[str]:
    """A command line that runs `command` as the lab's user."""
    return [
        "setpriv", "--reuid", str(UID), "--regid", str(UID), "--init-groups", "--inh-caps=-all", *map(str, command),
    ]  # fmt: skip


def call(
    *command: Any, timeout: float = 120, check: bool = True, env: dict[str, str] | None = None, cwd: Path = HOME
) -> subprocess.CompletedProcess[str]:
    """Run a command as the lab's user to its end; its output is text."""
    done = subprocess.run(
        as_user(list(command)), capture_output=True, text=True, timeout=timeout, cwd=cwd, stdin=subprocess.DEVNULL,
        env=env or user_environment(), start_new_session=True,
    )  # fmt: skip
    if check and done.returncode:
        raise AssertionError(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def daemon(name: str, *command: Any) -> None:
    """Start something as the lab's user that stays; its output goes into the log of that name."""
    with (LOG / f"{name}.log").open("ab") as log:
        subprocess.Popen(
            as_user(list(command)), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/",
            env=user_environment(), start_new_session=True,
        )  # fmt: skip


def until(what: str, found: Callable[[], Any], seconds: float, story: Callable[[], str] | None = None) -> Any:
    """Ask again and again until the answer is true, and return it.

    Raises:
        AssertionError: not within `seconds`; it tells the story.
    """
    deadline = time.monotonic() + seconds
    while not (answer := found()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:.0f} s: {what}" + (f"\n{story()}" if story else ""))
        time.sleep(0.5)
    return answer


# --- up ---------------------------------------------------------------------------------------------------------------


def up(say: Callable[[str], None]) -> None:
    """Start everything, with nothing left from before. To be called once, inside the namespaces."""
    for step in (_folders, _namespace, _slurm, _s3, _sky, _check):
        started = time.monotonic()
        step()
        say(f"up: {step.__name__[1:]} {time.monotonic() - started:.1f} s")


def _folders() -> None:
    for folder in FRESH:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    install.link_tools()
    for tool in ("goofys", "sudo"):
        shutil.copy(FILES / tool, BIN / tool)
        (BIN / tool).chmod(0o755)
    PROJECT.mkdir()


def _namespace() -> None:
    """Files of /etc, the FUSE device and the network as the lab wants them; seen here alone."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=755,dev", "lab", ETC], check=True)
    addresses = {"localhost": "127.0.0.1", HOST: HOST_IP, **NODE_IPS}
    _in_place_of("/etc/hosts", "".join(f"{address} {name}\n" for name, address in addresses.items()))
    _in_place_of("/etc/passwd", _with_line(Path("/etc/passwd"), f"{USER}:*:{UID}:{UID}::{LOGIN}:/bin/bash"))
    # sshd without root wants to give the terminal to the group tty, or every `sky logs` is empty.
    groups = Path("/etc/group").read_text().splitlines()
    groups = [_with_member(line) if line.startswith("tty:") else line for line in groups]
    _in_place_of("/etc/group", "\n".join([*groups, f"{USER}:x:{UID}:"]) + "\n")
    if Path("/etc/fuse.conf").exists():
        _in_place_of("/etc/fuse.conf", "user_allow_other\n")
    if Path("/dev/fuse").exists():
        os.mknod(ETC / "fuse", 0o666 | 0o020000, os.makedev(10, 229))
        (ETC / "fuse").chmod(0o666)
        subprocess.run(["mount", "--bind", ETC / "fuse", "/dev/fuse"], check=True)
    subprocess.run(["hostname", HOST], check=True)
    _ip("link", "set", "lo", "up")
    _ip("link", "add", "lab", "type", "bridge")
    _ip("address", "add", f"{HOST_IP}/24", "dev", "lab")
    _ip("link", "set", "lab", "up")
    for folder in FRESH:
        subprocess.run(["chown", "-R", f"{UID}:{UID}", folder], check=True)


def _ip(*words: str, inside: int | None = None) -> None:
    """Set up the network, here or in the namespace of a process."""
    enter = ["nsenter", "--target", str(inside), "--net"] if inside else []
    subprocess.run([*enter, "ip", *words], check=True)


def _with_member(group: str) -> str:
    return f"{group}{USER}" if group.endswith(":") else f"{group},{USER}"


def _with_line(path: Path, line: str) -> str:
    return path.read_text().rstrip("\n") + f"\n{line}\n"


def _in_place_of(path: str, content: str) -> None:
    ours = ETC / Path(path).name
    ours.write_text(content)
    subprocess.run(["mount", "--bind", ours, path], check=True)


def _filled(name: str, target: Path, mode: int = 0o644, **words: object) -> None:
    text = (FILES / name).read_text()
    for key, value in {**vars(place), **words}.items():
        text = text.replace(f"@{key}@", str(value))
    target.write_text(text)
    target.chmod(mode)


def _slurm() -> None:
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={name} NodeAddr={address} Port={SLURMD_PORT} CPUs=16 RealMemory=64000"
        for name, address in NODE_IPS.items()
    )
    _filled("slurm.conf", ETC / "slurm.conf", NODE_LINES=nodes, KILL_WAIT=KILL_WAIT_S)
    _filled("task_prolog.sh", ETC / "task_prolog.sh", 0o755)
    _filled("sshd_config", ETC / "sshd_config")
    (STATE / "munge.key").write_bytes(os.urandom(128))
    (STATE / "munge.key").chmod(0o600)
    os.chown(STATE / "munge.key", UID, UID)
    for key in ("host_key", "user_key"):
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", STATE / key)
    call(
        "munged", f"--key-file={STATE}/munge.key", f"--socket={STATE}/munge.sock", f"--pid-file={STATE}/munged.pid",
        f"--log-file={LOG}/munged.log", f"--seed-file={STATE}/munge.seed",
    )  # fmt: skip
    daemon("slurmctld-out", "slurmctld", "-D")
    for name in NODES:
        _node(name)
    daemon("sshd", "/usr/sbin/sshd", "-D", "-f", ETC / "sshd_config", "-e")
    until("Slurm's nodes are idle", lambda: sinfo().count("idle") == 3 * len(NODES), 60, sinfo)


def _node(name: str) -> None:
    """Start a node: slurmd, with a host name and a network of its own."""
    wait = "until ip address show dev eth0 2>/dev/null | grep -q 'inet '; do sleep 0.05; done"
    slurmd = " ".join(as_user(["slurmd", "-D", "-N", name]))
    with (LOG / f"slurmd-{name}-out.log").open("ab") as log:
        pid = subprocess.Popen(
            ["unshare", "--net", "--uts", "sh", "-c", f"hostname {name}; {wait}; exec {slurmd}"], cwd="/",
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=user_environment(), start_new_session=True,
        ).pid  # fmt: skip
    here, there = Path("/proc/self/ns/net"), Path(f"/proc/{pid}/ns/net")
    until(f"{name} has its network", lambda: here.readlink() != there.readlink(), 10)
    _ip("link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", str(pid))
    _ip("link", "set", f"to-{name}", "master", "lab", "up")
    _ip("link", "set", "lo", "up", inside=pid)
    _ip("link", "set", "eth0", "up", inside=pid)
    _ip("address", "add", f"{NODE_IPS[name]}/24", "dev", "eth0", inside=pid)


def sinfo() -> str:
    """Partition, node and state, a line each."""
    return call("sinfo", "-h", "-N", "-o", "%P %N %T", check=False).stdout


def _s3() -> None:
    daemon(
        "s3", BIN / "rclone", "serve", "s3", "--addr", f"{HOST_IP}:{S3_PORT}", "--auth-key", f"{S3_KEY},{S3_SECRET}",
        "--vfs-cache-mode", "full", "--vfs-write-back", "0s", "--cache-dir", STATE / "s3cache", "--config", "/dev/null",
        S3_DATA,
    )  # fmt: skip
    # "vastdata" is the store of SkyPilot's that takes any S3 endpoint.
    _users_file(
        ".vastdata/vastdata.credentials",
        f"[vastdata]\naws_access_key_id = {S3_KEY}\naws_secret_access_key = {S3_SECRET}\n",
    )
    _users_file(".vastdata/vastdata.config", f"[profile vastdata]\nendpoint_url = http://{HOST_IP}:{S3_PORT}\n")


def _users_file(name: str, text: str) -> None:
    path = HOME / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    for owned in (path, path.parent):
        os.chown(owned, UID, UID)


def _sky() -> None:
    packages = next((CLIENT / "lib").glob("python3*")) / "site-packages"
    shutil.copy(FILES / "lab_offline.py", packages)
    _users_file(
        ".slurm/config",
        f"Host {CLUSTER}\n  HostName 127.0.0.1\n  Port {SSH_PORT}\n  User {USER}\n  IdentityFile {STATE}/user_key\n"
        "  IdentitiesOnly yes\n",
    )
    config = {
        "allowed_clouds": ["slurm", "vastdata"],
        "jobs": {"controller": {"consolidation_mode": True}},
        "slurm": {
            "provision_timeout": PROVISION_TIMEOUT_S,
            "cluster_configs": {CLUSTER: {"tmpdir": str(NODE_TMP)}},
        },
    }
    _users_file(".sky/config.yaml", json.dumps(config))
    plugin = {"class": "lab_offline.Offline", "parameters": {"url": f"{SKY_URL}/api/health"}}
    _users_file(".sky/plugins.yaml", json.dumps({"plugins": [plugin]}))
    memory = {"SKYPILOT_POD_MEMORY_GB_LIMIT": str(SKYPILOT_MEMORY_GB)}
    call("sky", "api", "start", timeout=180, env=user_environment(**memory))


def _check() -> None:
    call("sky", "check", "slurm", "vastdata", timeout=180)


def left_overs() -> list[str]:
    """Processes of the lab's user and mounts under `ROOT`, as seen from outside the namespaces; none after `down`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.stat().st_uid == UID:
                line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                found.append(f"process {process.name}: {line or '(no command line)'}")
        except OSError:
            continue
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    found += [f"mount: {line}" for line in mounts if line.split()[1].startswith(f"{ROOT}/")]
    return found


# --- for the tests ----------------------------------------------------------------------------------------------------


class Lab:
    """What a test does in the lab."""

    def __init__(self) -> None:
        self.shared = SHARED
        self.project = PROJECT
        self.started = time.monotonic()
        self._lock = threading.Lock()
        self._answered, self._closed = threading.Condition(), threading.Event()
        self._asking: threading.Thread | None = None
        self._agent: subprocess.Popen[str] | None = None
        self._queue: list[dict[str, Any]] | None = None
        self._errors: list[str] = []
        """Since the last answer."""

    def clock(self) -> float:
        """Seconds since this object was made."""
        return time.monotonic() - self.started

    def note(self, text: str) -> None:
        """A line for the report of how long things took."""
        with self._lock, NOTES.open("a") as notes:
            notes.write(f"{self.clock():6.1f} s  {text}\n")

    def skyspot(self, *arguments: Any, check: bool = True, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """`skyspot ...` as the user types it, in the project's folder."""
        return call("skyspot", *arguments, check=check, timeout=timeout, cwd=PROJECT)

    def sky(self, *arguments: Any, check: bool = True, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        """`sky ...` as the user types it, in the project's folder."""
        return call("sky", *arguments, check=check, timeout=timeout, cwd=PROJECT)

    def queue(self) -> list[dict[str, Any]]:
        """SkyPilot's managed jobs, as they last were; only the first call waits for an answer.

        Whoever watches a run to strike it at a step must not wait here meanwhile: it could be over by then.

        Raises:
            AssertionError: SkyPilot could not say, several times in a row.
        """
        with self._answered:
            if self._asking is None:
                self._asking = threading.Thread(target=self._ask_again, daemon=True, name="queue")
                self._asking.start()
            self._answered.wait_for(lambda: self._queue is not None or self._errors)
            if self._queue is None or len(self._errors) >= ERRORS_IN_A_ROW:
                raise AssertionError(f"SkyPilot's queue: {self._errors[-1]}")
            return self._queue

    def _ask_again(self) -> None:
        with (LOG / "queue-agent.log").open("ab") as log:
            self._agent = subprocess.Popen(
                as_user([CLIENT / "bin" / "python", FILES / "sky_queue.py"]), text=True, cwd=HOME,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=user_environment(),
            )  # fmt: skip
        assert self._agent.stdin
        assert self._agent.stdout
        while not self._closed.is_set():
            try:
                self._agent.stdin.write("\n")
                self._agent.stdin.flush()
                answer = json.loads(self._agent.stdout.readline())
            except (OSError, ValueError):
                answer = {"error": "the agent ended; see queue-agent.log"}
            with self._answered:
                self._queue = answer.get("jobs", self._queue)
                self._errors = [*self._errors, answer["error"]] if "error" in answer else []
                self._answered.notify_all()
            self._closed.wait(QUEUE_AGE_S)
        self._agent.communicate(timeout=20)  # It ends when its stdin does; both of its pipes are closed.

    def squeue(self) -> list[tuple[str, str, str, str, str]]:
        """Slurm's jobs: (id, name, state, partition, nodes)."""
        lines = call("squeue", "-h", "-o", "%i|%j|%T|%P|%N").stdout.splitlines()
        return [tuple(line.split("|", 4)) for line in lines]  # type: ignore[misc]

    def partition(self, name: str, state: str) -> None:
        """Set a partition UP or DOWN."""
        call("scontrol", "update", f"PartitionName={name}", f"State={state}")

    def unmount(self, folder: Path) -> None:
        """Take away the mount of a machine that is gone: the next has its own, but here they share a namespace."""
        subprocess.run(["umount", "--lazy", folder], check=False, capture_output=True)

    def close(self) -> None:
        """End the queue's agent."""
        self._closed.set()
        if self._asking:
            self._asking.join(60)


def processes_of(allocation: str) -> list[int]:
    """The processes of the user's that run inside a Slurm allocation, on all nodes."""
    found = []
    wanted = f"SLURM_JOB_ID={allocation}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.stat().st_uid == UID and wanted in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def kill(pids: list[int], number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to processes; those that are gone are left out."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def train_here(module: str, *options: Any) -> None:
    """A run to its end without SkyPilot, by the nodes' own Python: an undisturbed reference, or two local processes."""
    call(
        NODE / "bin" / "python", "-m", module, *options, timeout=400, cwd=ROOT / "source",
        env=user_environment(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT / "source")),
    )  # fmt: skip
