"""A rank as the launcher sees it: its process, its pipes, and what it has reported. Standard library only."""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from trainer.launch.environment import Environment
from trainer.launch.exits import reported_code
from trainer.launch.link import ATTEMPT, ENDED, EXIT, LEAVE_AT_ONCE, LISTENS, NOTICE, PEER_GONE
from trainer.layout.exit_codes import EXIT_PREEMPTED

ZOMBIE_S = 2.0
"""For how long a rank must be a zombie before it counts as one that cannot be reaped."""
CLOSING_S = 600.0
"""The same of one that exited with 0 and did not report its end: some mounts upload a whole file inside close()."""
_PR_SET_PDEATHSIG = 1
_EXIT_CODE = 49
"""Place of the exit code after that of the state in /proc/PID/stat (proc(5): 52 and 3)."""


@dataclass
class Rank:
    """One rank of this node."""

    process: subprocess.Popen[bytes]
    to_rank: int
    from_rank: int
    received: bytes = b""
    """Bytes from its pipe after the last whole line."""
    reported_code: int | None = None
    """The exit code that it reported before it left."""
    code: int | None = None
    """Its exit code; None while it runs."""
    zombie_since: float | None = None
    listens: bool = False
    """It reads on its pipe that another rank left."""
    taken_at: float | None = None
    """When the cloud takes this machine, on the monotonic clock; None if this rank has heard of no notice."""
    ended: bool = False
    """It wrote the attempt's end event."""
    attempt: dict[str, str] = field(default_factory=dict)
    """The run's folder and the attempt's name, once it has reported them."""

    def receive(self) -> bool:
        """Read what the rank reports; False if its pipe is closed, or is empty and does not block."""
        try:
            data = os.read(self.from_rank, 65536)
        except OSError:
            data = b""
        *lines, self.received = (self.received + data).split(b"\n")
        for line in lines:
            message, _, rest = line.decode("ascii", "replace").partition(" ")
            if message == ATTEMPT:
                with suppress(ValueError):
                    self.attempt = json.loads(rest)
            elif message == LISTENS:
                self.listens = True
            elif message == ENDED:
                self.ended = True
            elif message == NOTICE:
                with suppress(ValueError):
                    self.taken_at = time.monotonic() + float(rest)
            elif message == EXIT and self.reported_code is None:
                self.reported_code = reported_code(rest)
        return bool(data)

    def drain(self) -> None:
        """Read the last reports of a rank that is gone."""
        os.set_blocking(self.from_rank, False)
        while self.receive():
            pass

    def handles_sigterm(self) -> bool:
        """True if the process has a handler for SIGTERM; also where the system does not tell."""
        try:
            caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", Path(f"/proc/{self.process.pid}/status").read_text(), re.M)
        except OSError:
            return True
        return not caught or bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)

    def tell_peer_gone(self) -> None:
        """Tell the rank on its pipe that another rank left."""
        self._tell(PEER_GONE)

    def tell_to_leave(self) -> None:
        """Tell the rank on its pipe to leave at once."""
        self._tell(LEAVE_AT_ONCE)

    def _tell(self, message: bytes) -> None:
        with suppress(OSError):
            os.write(self.to_rank, message + b"\n")

    def stays_a_zombie(self) -> bool:
        """True if the rank has exited and cannot be reaped, because one of its threads hangs in a dead mount.

        Every process with threads is a zombie for a moment when it leaves; that one is reaped soon, with its own code.
        A script that is done may close its last file for minutes; it is not done before that file is in the bucket.
        """
        if not is_zombie(self.process.pid):
            self.zombie_since = None
            return False
        self.zombie_since = self.zombie_since or time.monotonic()
        limit_s = CLOSING_S if self._exited_with_0() and not self.ended else ZOMBIE_S
        return time.monotonic() - self.zombie_since >= limit_s

    def status_as_zombie(self) -> int:
        """The exit status of a rank that stays a zombie: 0 if it has ended its run and exited with 0.

        A thread of it may still close a file in a slow mount. Otherwise the mount may be dead: it counts as killed.
        """
        return 0 if self.ended and self._exited_with_0() else -signal.SIGKILL

    def _exited_with_0(self) -> bool:
        try:
            return _stat(self.process.pid)[_EXIT_CODE] == "0"
        except (OSError, IndexError):
            return False


def start_rank(command: Sequence[str], number: int, environment: Environment, printed: int) -> tuple[Rank, int, int]:
    """Start a rank in a process group of its own; it dies with the launcher.

    Args:
        command: The command line of the rank.
        number: Its number on this node.
        environment: The environment of this node's ranks.
        printed: The file of printed messages, which it inherits.

    Returns:
        the rank, and the file descriptors from which to read its stdout and its stderr.
    """
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def in_child() -> None:
        # Otherwise a Ctrl-C or a kill of the launcher's process group would reach the rank twice.
        os.setpgid(0, 0)
        # A closed terminal ends no rank: the launcher passes it on as a SIGTERM.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if hasattr(libc, "prctl"):
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(EXIT_PREEMPTED)

    (rank_reads, to_rank), (from_rank, rank_writes) = os.pipe(), os.pipe()
    (out, rank_out), (err, rank_err) = os.pipe(), os.pipe()
    inherited = [rank_reads, rank_writes, printed]
    if environment.ports and number == 0:
        inherited.append(environment.ports.store.fileno())
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=rank_out,
        stderr=rank_err,
        pass_fds=inherited,
        env=environment.of_rank(number, f"{rank_reads},{rank_writes},{printed}"),
        preexec_fn=in_child,
    )
    for descriptor in (rank_reads, rank_writes, rank_out, rank_err):
        os.close(descriptor)
    return Rank(process, to_rank, from_rank), out, err


def is_zombie(pid: int) -> bool:
    """True if the process has exited, even if a thread of it hangs and keeps wait() from returning."""
    try:
        return _stat(pid)[0] in "ZX"
    except (OSError, IndexError):
        return False


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
