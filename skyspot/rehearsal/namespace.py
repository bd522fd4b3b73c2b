"""The first processes of a rehearsal's machine. Run as a file, in new mount and process namespaces.

    python -I -S inside.py BUILD ROOT SCRIPT SECONDS

The process that is started stays outside and waits; its child is the first process inside. When that one goes, however
it goes, the kernel kills everything else inside, whatever session, group or environment it went into: so a machine is
taken by killing one process. It dies with whoever started it, too. When the script has left, what it started gets
SIGTERM and SECONDS to leave, as under SkyPilot: at SIGTERM a shell is gone at once, while what it waited for saves.
SCRIPT.left is there from then on.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
FAILED = 125


def main(build: str, root: str, script: str, seconds: str) -> int:
    """Build the root with a shell script, run another one in it to its end; returns its exit status as a shell's."""
    _die_with_parent()
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # They are for the task, which is of the same process group.
    first = os.fork()
    if first == 0:
        os._exit(_inside(build, root, script, float(seconds)))
    return _status(os.waitpid(first, 0)[1])


def _inside(build: str, root: str, script: str, seconds: float) -> int:
    _die_with_parent()
    built = subprocess.run(["/bin/sh", build], capture_output=True, text=True)
    if built.returncode:
        print(f"the machine's mounts could not be made: {built.stderr.strip()}", file=sys.stderr, flush=True)
        return FAILED
    task = os.fork()
    if task == 0:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        os.chroot(root)
        os.chdir("/")
        os.execvp("bash", ["bash", script])
    while True:  # As the first process inside, it is the parent of all that lost theirs.
        pid, status = os.wait()
        if pid == task:
            with open(f"{script}.left", "x"):  # noqa: PTH123 (quick to start: no pathlib)
                pass
            _see_off(seconds)
            return _status(status)


def _see_off(seconds: float) -> None:
    """Ask all that is still there to leave, and wait until it has, or the time is over."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    with suppress(ProcessLookupError):
        os.kill(-1, signal.SIGTERM)
    end = time.monotonic() + seconds
    with suppress(ChildProcessError):  # All have left.
        while time.monotonic() < end:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                signal.sigtimedwait({signal.SIGCHLD}, max(0.0, end - time.monotonic()))


def _status(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:5]))
