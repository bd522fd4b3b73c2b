"""The processes of a rehearsal, found by a mark in their environment: a path of the rehearsal's folder.

They inherit it, whatever session or group they move to. Only a process that clears its environment escapes; where a
machine has its own process namespace, the kernel takes that one too.
"""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress

import psutil

MARK = "SKYSPOT_REHEARSAL"
"""The variable whose value is the mark."""
_PATIENCE_S = 60.0
"""Time after which a process that the kernel does not end (a hung disk) is given up."""
_WATCH = 'read -r line || { kill -9 "-$1"; exec "$2" -I -c "$3" "$4"; }'
_KILL = (
    "import sys; sys.path[:] = {path!r}; from skyspot.rehearsal.processes import kill_below; kill_below(sys.argv[1])"
)


def below(place: str) -> list[psutil.Process]:
    """List the living processes whose mark is a path or lies below it."""
    found = []
    for process in psutil.process_iter():
        try:
            mark = process.environ().get(MARK, "")
            if f"{mark}/".startswith(f"{place}/") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def kill_below(place: str) -> None:
    """SIGKILL these processes until none is left."""
    end = time.monotonic() + _PATIENCE_S
    while (found := below(place)) and time.monotonic() < end:
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=5)


def is_held(place: str, without: str) -> bool:
    """True if a process has its working folder or an open file below a path; the file `without` does not count."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            paths = [process.cwd(), *(file.path for file in process.open_files())]
            if any(f"{path}/".startswith(f"{place}/") and path != without for path in paths):
                return True
    return False


class Guard:
    """Kills a process group, and the processes with its mark, when this program is killed."""

    def __init__(self, group: int, mark: str) -> None:
        """Start to watch over them."""
        code = _KILL.format(path=[entry for entry in sys.path if entry])
        self._watch = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH, "guard", str(group), sys.executable, code, mark],
            stdin=subprocess.PIPE,  # End of file without a line: this program is dead.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def dismiss(self) -> None:
        """Stop watching."""
        self._watch.communicate(b"over\n")
