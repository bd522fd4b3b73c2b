"""The first processes of a rehearsal's machine. Run as a file, in new mount and process namespaces.

    python -I -S namespace.py PARENT BUILD ROOT SCRIPT SECONDS [DAEMONS]

The started process stays outside and waits; its child is the first process inside. When the first process ends, the
kernel kills every other process inside, whatever its session, group or environment. So killing one process takes the
whole machine. The machine also dies with its parent process, PARENT. When the script has exited, its remaining
processes get SIGTERM and SECONDS to exit, as under SkyPilot: at SIGTERM a shell exits at once, while the program it
waited for saves. The file SCRIPT.left exists from then on.

DAEMONS is a JSON list of commands: the file systems of the machine's buckets, which are mounted before BUILD runs. They
say `mounted`, outlive every other process inside, and say `finished` when they are asked to finish at the end.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
FAILED = 125


def main(parent: str, build: str, root: str, script: str, seconds: str, daemons: str = "") -> int:
    """Build the root with one shell script, run another in it, and return its exit status as a shell would."""
    _die_with_parent()
    if os.getppid() != int(parent):
        return FAILED  # It died before.
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # These are meant for the task, which is in the same process group.
    alive, this = os.pipe()
    first = os.fork()
    if first == 0:
        _die_with_parent()
        os.close(this)
        if select.select([alive], [], [], 0)[0]:
            os._exit(FAILED)  # It died before. Its id says nothing inside.
        os.close(alive)
        os._exit(_inside(build, root, script, float(seconds), daemons))
    return _status(os.waitpid(first, 0)[1])


def _inside(build: str, root: str, script: str, seconds: float, commands: str) -> int:
    daemons = []
    try:
        daemons = _mount(commands) if commands else []
    except OSError as error:
        print(f"Error: cannot mount the machine's buckets: {error}", file=sys.stderr, flush=True)
        return FAILED
    built = subprocess.run(["/bin/sh", build], capture_output=True, text=True)
    if built.returncode:
        print(f"Error: cannot mount the machine's folders: {built.stderr.strip()}", file=sys.stderr, flush=True)
        return FAILED
    task = os.fork()
    if task == 0:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        os.chroot(root)
        os.chdir("/")
        os.execvp("bash", ["bash", script])
    while True:  # The first process inside adopts all orphans.
        pid, status = os.wait()
        if pid == task:
            with open(f"{script}.left", "x"):  # noqa: PTH123 (quick to start: no pathlib)
                pass
            _terminate_rest(seconds, root, {os.getpid(), *(daemon.pid for daemon in daemons)})
            _finish(daemons)
            return _status(status)


def _mount(commands: str) -> list[subprocess.Popen[bytes]]:
    """Start the daemons, and wait until each has mounted its bucket.

    Raises:
        OSError: one did not; with its last words.
    """
    daemons = []
    with open(f"{commands}.log", "w+b") as log:  # noqa: PTH123
        for command in json.load(open(commands)):  # noqa: PTH123, SIM115
            daemons.append(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
                )
            )
        for daemon in daemons:
            if not daemon.stdout or daemon.stdout.readline() != b"mounted\n":
                daemon.wait()
                log.seek(0)
                raise OSError((log.read().decode(errors="replace").strip().splitlines() or ["no reason given"])[-1])
    return daemons


def _finish(daemons: list[subprocess.Popen[bytes]]) -> None:
    """Let the daemons upload what waits."""
    for daemon in daemons:
        with suppress(OSError):
            assert daemon.stdin
            assert daemon.stdout
            daemon.stdin.write(b"finish\n")
            daemon.stdin.flush()
            daemon.stdout.readline()


def _terminate_rest(seconds: float, root: str, stay: set[int]) -> None:
    """Send SIGTERM to all remaining processes, and wait until they have exited or the time is up.

    Those that stay block it.
    """
    if os.getpid() != 1:  # Outside, it would reach every process of the user.
        raise RuntimeError("this is not the first process of a namespace")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    with suppress(ProcessLookupError):
        os.kill(-1, signal.SIGTERM)
    end = time.monotonic() + seconds
    with suppress(ChildProcessError):  # All have exited.
        while time.monotonic() < end:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                # The last one to exit is a child of this one, as all orphans are.
                if not {int(name) for name in os.listdir(f"{root}/proc") if name.isdigit()} - stay:  # noqa: PTH208
                    return
                signal.sigtimedwait({signal.SIGCHLD}, max(0.0, end - time.monotonic()))


def _status(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:7]))
