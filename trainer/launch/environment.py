"""The environment variables, ports and file that the launcher gives to each rank. Standard library only."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass

from trainer.launch.nodes import Nodes, interface_of


def reserve_port() -> socket.socket:
    """Return a socket bound to a free port on loopback, on which rank 0 of a plain torch script can still listen.

    It is bound but does not listen: the kernel gives the port to nobody else, and a process may bind it with
    SO_REUSEADDR, as torch does.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


def printed_file() -> int:
    """Return a file without a name that the ranks inherit; in memory if possible, because the disk may be full.

    The ranks note there which messages they have printed, so that an error that all of them meet is printed once.
    """
    with suppress(OSError):
        if hasattr(os, "memfd_create"):
            return os.memfd_create("printed")
    with suppress(OSError), tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
    return os.open(os.devnull, os.O_RDWR)  # Then each rank prints it.


class LocalPorts:
    """Two ports on loopback, for the ranks of a single node; other programs cannot take them."""

    def __init__(self) -> None:
        self.store = socket.create_server(("127.0.0.1", 0), backlog=512)
        """Rank 0 of a script with SpotRun inherits this socket and serves the store on it."""
        self.master = reserve_port()
        """MASTER_PORT, for rank 0 of a plain torch script."""


@dataclass(frozen=True)
class Environment:
    """The environment of the ranks of this node."""

    nodes: Nodes
    processes: int
    """The number of ranks on this node."""
    launch_id: str
    started: float
    """When the launcher started, on the monotonic clock."""
    grace_s: float
    attempt: str
    """The name of the attempt that the sidecar has opened; empty if there is no sidecar."""
    ports: LocalPorts | None
    """On a single node; several nodes agree on a port."""

    def of_rank(self, rank: int, link: str) -> dict[str, str]:
        """Return the environment of one rank.

        Args:
            rank: Its number on this node.
            link: The file descriptors of its link, for SKYSPOT_LINK.
        """
        nodes = self.nodes
        env = {
            **os.environ,
            "RANK": str(nodes.rank * self.processes + rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(nodes.count * self.processes),
            "LOCAL_WORLD_SIZE": str(self.processes),
            "MASTER_ADDR": nodes.ips[0] if nodes.several else "127.0.0.1",
            "MASTER_PORT": str(self.ports.master.getsockname()[1] if self.ports else nodes.port),
            "NODE_RANK": str(nodes.rank),
            "SKYSPOT_LINK": link,
            "SKYSPOT_LAUNCH": self.launch_id,
            "SKYSPOT_LAUNCHED_AT": repr(self.started),
            "SKYSPOT_GRACE_S": repr(self.grace_s),
            "PYTHONUNBUFFERED": "1",
            # c10d prints C++ frames around the one line with the reason.
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
            # A crash in native code prints the stacks of Python.
            "PYTHONFAULTHANDLER": os.environ.get("PYTHONFAULTHANDLER", "1"),
        }
        for name in ("SKYSPOT_STORE_PORT", "SKYSPOT_LISTEN_FD", "SKYSPOT_TTY", "SKYSPOT_ATTEMPT"):
            env.pop(name, None)
        self._tune(env)
        if self.ports:
            env["SKYSPOT_STORE_PORT"] = str(self.ports.store.getsockname()[1])
            if rank == 0:
                env["SKYSPOT_LISTEN_FD"] = str(self.ports.store.fileno())
        if nodes.leads and rank == 0 and sys.stdout.isatty():
            size = shutil.get_terminal_size()
            env.update(SKYSPOT_TTY="1", COLUMNS=str(size.columns), LINES=str(size.lines))
        if self.attempt:
            env["SKYSPOT_ATTEMPT"] = self.attempt
        return env

    def _tune(self, env: dict[str, str]) -> None:
        """Set the number of threads, how they wait, and gloo's network interface, unless the user has set them."""
        if self.processes > 1:
            env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.processes)))
        # Threads that spin for long while they wait for each other stop each other if anything else wants a core: two
        # trainings on two cores were nine times as slow. With no spinning at all, short operations are slow.
        if "OMP_WAIT_POLICY" not in env:
            env.setdefault("GOMP_SPINCOUNT", "5000")
        if self.nodes.several and "GLOO_SOCKET_IFNAME" not in env:
            interface = interface_of(self.nodes.ips[self.nodes.rank])
            if interface:
                env["GLOO_SOCKET_IFNAME"] = interface
