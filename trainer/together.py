"""How the ranks of one attempt find each other, agree, and wait for each other.

Two ways to wait. In a collective, for work of one length on all ranks: it has a timeout, after which a peer counts as
gone. On the store, for work that only one rank does and that may take long: the worker leaves a heartbeat, and a
missing heartbeat, not a long task, is the failure.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

BEAT_S = 1.0
FIRST_SEAT_S = 660.0
_PEER_TROUBLE = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|socket|timed? ?out|recvvector|tcpstore",
    re.IGNORECASE,
)


class PeerGoneError(Exception):
    """Another rank of this attempt is gone, or gives no sign of life."""


def is_peer_trouble(error: BaseException) -> bool:
    """Whether an error says that a peer is gone rather than that this rank has a fault of its own."""
    return isinstance(error, (PeerGoneError, dist.DistError)) or (
        type(error) is RuntimeError and _PEER_TROUBLE.search(str(error)) is not None
    )


class Exchange:
    """One all-reduce under way: each rank's integers, each in its own row, seen by all."""

    def __init__(self, rows: torch.Tensor, work: dist.Work | None) -> None:
        self._rows = rows
        self._work = work

    def wait(self) -> list[list[int]]:
        """The rows of all ranks, by rank."""
        if self._work is not None:
            self._work.wait()
        rows: list[list[int]] = self._rows.tolist()
        return rows


class Together:
    """This rank's seat among the ranks of an attempt.

    Without a launcher (no RANK in the environment) there is one rank, and no network.
    """

    def __init__(self, timeout_s: float = 120.0) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.timeout_s = timeout_s
        self._control: dist.ProcessGroup | None = None
        self._seats = 0
        if self.world_size == 1:
            self.store: Any = dist.HashStore()
            self._connect = lambda: self.store
        else:
            self._connect = self._new_connection
            self.store = self._new_connection()

    def _new_connection(self) -> Any:
        listen = os.environ.get("SKYSPOT_LISTEN_FD")
        first = self.rank == 0 and self._seats == 0
        self._seats += 1
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=first,
            # Rank 0 opens the attempt in the bucket first; the launcher tells us if it dies over that.
            timeout=timedelta(seconds=max(self.timeout_s, FIRST_SEAT_S)),
            wait_for_workers=False,
            master_listen_fd=int(listen) if first and listen else None,
        )
        store.set_timeout(timedelta(seconds=self.timeout_s))
        return store

    def connection(self) -> Any:
        """A store connection of its own for a background thread: a blocking get holds up every other user of one."""
        return self._connect()

    def form_groups(self, on_gpu: bool) -> None:
        """Make the process groups: the default one for gradients, and a gloo one for agreement."""
        if self.world_size == 1:
            return
        timeout = timedelta(seconds=self.timeout_s)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("gradients", self.connection()),
            rank=self.rank,
            world_size=self.world_size,
            timeout=timeout,
        )
        self._control = dist.new_group(backend="gloo", timeout=timeout)

    def exchange(self, row: Sequence[int]) -> Exchange:
        """Start to tell all ranks this rank's integers (64 bit). Every rank calls it in the same order."""
        rows = torch.zeros(self.world_size, len(row), dtype=torch.int64)
        rows[self.rank] = torch.tensor(row, dtype=torch.int64)
        if self._control is None:
            return Exchange(rows, None)
        return Exchange(rows, dist.all_reduce(rows, group=self._control, async_op=True))

    def publish(self, key: str, value: Any) -> None:
        """Put a JSON value into the store, once."""
        self.store.set(key, json.dumps(value))

    def await_value(self, key: str, beat: str = "", between: Callable[[], None] = lambda: None) -> Any:
        """Wait for a published value, for as long as the worker's heartbeat `beat` goes on.

        Raises:
            PeerGoneError: no value, and no new heartbeat for the time-out.
        """
        last_beat, changed = b"", time.monotonic()
        while True:
            between()
            if wait_for(self.store, key, BEAT_S):
                return json.loads(self.store.get(key))
            if beat and self.store.check([beat]) and (now := self.store.get(beat)) != last_beat:
                last_beat, changed = now, time.monotonic()
            if time.monotonic() - changed > self.timeout_s:
                raise PeerGoneError(f"rank {self.rank}: no word of {key!r} for {self.timeout_s:g} s")

    def rank0_does(self, name: str, work: Callable[[], Any], between: Callable[[], None] = lambda: None) -> Any:
        """Let rank 0 do something that may take long; every rank gets its JSON value.

        Raises:
            PeerGoneError: rank 0 gives no sign of life any more.
        """
        done, beat = f"done/{name}", f"beat/{name}"
        if self.world_size == 1:
            return work()
        if self.rank:
            return self.await_value(done, beat, between)
        with self.beating(beat):
            value = work()
        self.publish(done, value)
        return value

    def beating(self, key: str) -> _Heartbeat:
        """A context in which a heartbeat goes out under `key`."""
        return _Heartbeat(self.connection, key)

    def gather(self, name: str, value: Any, between: Callable[[], None] = lambda: None) -> list[Any]:
        """Every rank's JSON value, on every rank; each rank beats while it waits."""
        if self.world_size == 1:
            return [value]
        with self.beating(f"beat/{name}/{self.rank}"):
            self.publish(f"{name}/{self.rank}", value)
            return [
                self.await_value(f"{name}/{rank}", f"beat/{name}/{rank}", between) for rank in range(self.world_size)
            ]

    def say_left(self) -> None:
        """Tell rank 0 that this rank needs the store no more."""
        if self.world_size > 1:
            with suppress(Exception):
                self.store.set(f"left/{self.rank}", "1")

    def await_others_left(self, seconds: float) -> None:
        """Rank 0 serves the store, so it leaves last; but it does not wait for ever."""
        if self.world_size == 1 or self.rank:
            return
        end = time.monotonic() + seconds
        for rank in range(1, self.world_size):
            with suppress(Exception):
                wait_for(self.store, f"left/{rank}", max(0.01, end - time.monotonic()))


def wait_for(store: Any, key: str, seconds: float) -> bool:
    """Whether the key appears in the store within the time."""
    try:
        store.wait([key], timedelta(seconds=seconds))
    except (dist.DistStoreError, RuntimeError) as error:
        if "imeout" in str(error) or "timed out" in str(error).lower():
            return False
        raise
    return True


class _Heartbeat:
    def __init__(self, connect: Callable[[], Any], key: str) -> None:
        self._connect, self._key = connect, key
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name=f"beat {key}")

    def _beat(self) -> None:
        with suppress(Exception):  # A dead store ends the attempt elsewhere.
            store = self._connect()
            while True:
                store.set(self._key, repr(time.monotonic()))
                if self._over.wait(BEAT_S):
                    return

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()
