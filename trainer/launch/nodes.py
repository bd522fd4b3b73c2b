"""Which machines an attempt runs on, as SkyPilot says it. Standard library only."""

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

# Below the ports that Linux hands out by itself (32768 on) and those of Kubernetes' services (30000 on), above those of
# Ray's workers (10002 to 19999), with which SkyPilot starts the job.
FIRST_PORT = 20000
PORTS = 10000
_SIOCGIFADDR = 0x8915


class NodesError(TrainerError):
    """SkyPilot's variables contradict each other; the message says how."""


@dataclass(frozen=True)
class Nodes:
    """The machines of an attempt, and which of them this is."""

    count: int = 1
    rank: int = 0
    ips: tuple[str, ...] = ("127.0.0.1",)
    task_id: str = ""
    job_id: str = ""
    """SkyPilot's number for one start of the task on these machines: a later one on the same machines has another."""

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> Nodes:
        """SKYPILOT_NUM_NODES, SKYPILOT_NODE_RANK and SKYPILOT_NODE_IPS; one machine where they are not set.

        Raises:
            NodesError: one of them is no number, or there are too few addresses.
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
            raise NodesError(f"SKYPILOT_NODE_IPS names {len(ips)} machines, SKYPILOT_NUM_NODES says {count}")
        if rank >= count:
            raise NodesError(f"SKYPILOT_NODE_RANK is {rank}, and there are {count} machines")
        return cls(count, rank, ips, env.get("SKYPILOT_TASK_ID", ""), env.get("SKYPILOT_INTERNAL_JOB_ID", ""))

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return self.count > 1

    @property
    def leads(self) -> bool:
        """Whether global rank 0 runs here."""
        return self.rank == 0

    @property
    def port(self) -> int:
        """Where rank 0 serves the store, on the first machine: known to all without a word, from the task's id."""
        return FIRST_PORT + int.from_bytes(hashlib.sha256(self.task_id.encode()).digest()[:4], "big") % PORTS

    @property
    def start(self) -> str:
        """What all ranks of one start know alike: neither another task's nor a later start's on these machines do.

        On new machines the number may be the same again; there the addresses are others.
        """
        return f"{self.task_id}/{self.job_id}"


def interface_of(ip: str) -> str | None:
    """The network interface that has an address; None where it is not seen here.

    gloo listens on the address that the host's name stands for, which on Debian's images is 127.0.1.1: no other machine
    would reach it there.
    """
    with suppress(OSError, ImportError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        import fcntl

        for _, name in socket.if_nameindex():
            with suppress(OSError):
                answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == ip:
                    return name
    return None
