"""The nodes that an attempt runs on, from SkyPilot's variables. Standard library only."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from trainer.errors import TrainerError

# Below the ports that Linux assigns by itself (from 32768) and Kubernetes assigns to services (from 30000), above those
# of Ray's workers (10002 to 19999), with which SkyPilot starts the job.
FIRST_PORT = 20000
PORTS = 10000
_SIOCGIFADDR = 0x8915


class NodesError(TrainerError):
    """SkyPilot's variables are wrong, or the nodes contradict each other; the message gives both values."""


@dataclass(frozen=True)
class Nodes:
    """The nodes of an attempt, and this node's rank among them."""

    count: int = 1
    rank: int = 0
    ips: tuple[str, ...] = ("127.0.0.1",)
    task_id: str = ""
    job_id: str = ""
    """SkyPilot's number for one start of the task on these machines; a later start on them has another number."""

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Nodes:
        """Read SKYPILOT_NUM_NODES, SKYPILOT_NODE_RANK and SKYPILOT_NODE_IPS; a single node if they are not set.

        Raises:
            NodesError: one of them is not a number, or there are too few addresses.
        """
        numbers = []
        for name, default in (("SKYPILOT_NUM_NODES", "1"), ("SKYPILOT_NODE_RANK", "0")):
            text = env.get(name) or default
            if not re.fullmatch("[0-9]{1,9}", text):
                raise NodesError(f"{name}: {text!r} is not a number")
            numbers.append(int(text))
        count, rank = numbers
        if count <= 1:
            return cls()
        ips = tuple(env.get("SKYPILOT_NODE_IPS", "").split())
        if len(ips) < count:
            raise NodesError(f"SKYPILOT_NODE_IPS has {len(ips)} addresses, but SKYPILOT_NUM_NODES is {count}")
        if rank >= count:
            raise NodesError(f"SKYPILOT_NODE_RANK is {rank}, but SKYPILOT_NUM_NODES is {count}")
        return cls(count, rank, ips, env.get("SKYPILOT_TASK_ID", ""), env.get("SKYPILOT_INTERNAL_JOB_ID", ""))

    @property
    def several(self) -> bool:
        """True if there is more than one node."""
        return self.count > 1

    @property
    def leads(self) -> bool:
        """True if global rank 0 runs on this node."""
        return self.rank == 0

    @property
    def port(self) -> int:
        """The port on the first node at which rank 0 serves the store; every node computes it from the task's id."""
        return FIRST_PORT + int.from_bytes(hashlib.sha256(self.task_id.encode()).digest()[:4], "big") % PORTS

    @property
    def start(self) -> str:
        """An id that all ranks of one start share, and that no other task and no later start on these machines has.

        On new machines the id may be the same again, but their addresses differ.
        """
        return f"{self.task_id}/{self.job_id}"


def interface_of(ip: str) -> str | None:
    """Return the network interface that has an address; None if this machine has none.

    By itself gloo listens on the address of the host's name. On Debian's images that is 127.0.1.1, which no other
    machine can reach.
    """
    with suppress(OSError, ImportError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as query:
        import fcntl

        for _, name in socket.if_nameindex():
            with suppress(OSError):
                answer = fcntl.ioctl(query.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == ip:
                    return name
    return None
