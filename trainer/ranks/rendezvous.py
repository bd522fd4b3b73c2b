"""The meeting of an attempt's ranks: rank 0 serves a store, and every other rank joins it."""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from trainer.bucket.retry import pauses, retry_loop
from trainer.launch import others
from trainer.launch.nodes import Nodes, NodesError
from trainer.ranks.messages import CRASHED
from trainer.ranks.peers import PeerGoneError
from trainer.ranks.store import wait_for

JOIN_S = 660.0
"""Seconds that a rank waits for rank 0's store: rank 0 first opens the attempt, which may take it ten minutes."""
BIND_PATIENCE_S = 60.0
"""Seconds that rank 0 waits for an older attempt to release the port."""
BIND_PAUSE_S = 0.5
CONNECT_S = 5.0
HINT_S = 30.0
"""Seconds after which a rank says that it waits for rank 0."""
UNEQUAL_PATIENCE_S = 10.0
"""Seconds that a node which expects another number of processes waits before it ends the attempt."""


class Rendezvous:
    """The place where the ranks of an attempt meet: rank 0's store, at an address that all know."""

    def __init__(self, rank: int, world_size: int, timeout_s: float) -> None:
        """Read the address from the environment; connects to nothing yet.

        Args:
            rank: This rank.
            world_size: The number of ranks.
            timeout_s: The seconds that a call to the store may block.
        """
        self.nodes = Nodes.from_env()
        self.unsupervised = world_size > 1 and not others.supervised()
        """No launcher of ours watches all ranks: there are several nodes, or another launcher started the ranks."""
        foreign = self.unsupervised and "SKYSPOT_LAUNCH" not in os.environ
        self._start = others.start_id() if foreign else self.nodes.start
        self._prefix = f"skyspot/{self._start}" if foreign else ""
        self._agent_serves = foreign and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        """torchrun's agent serves a store at the address, for all its restarts."""
        self._rank, self._world_size, self._timeout_s = rank, world_size, timeout_s
        port = os.environ.get("SKYSPOT_STORE_PORT") or os.environ.get("MASTER_PORT") or 0
        self._address = (os.environ.get("MASTER_ADDR", ""), int(port))
        self._seats = b""
        """The record that rank 0 put into its store: no other attempt's store has the same."""

    def open(self, check_stop: Callable[[], None]) -> Any:
        """Return this rank's first connection to the store; on rank 0, the store itself.

        Raises:
            PeerGoneError: rank 0's store cannot be reached.
            NodesError: another node runs another number of processes.
        """
        if self._world_size == 1:
            return dist.HashStore()
        if self.unsupervised:
            return self._serve(check_stop) if self._rank == 0 else self._join(check_stop)
        # Rank 0 opens the attempt in the bucket first; if it dies over that, the launcher tells us.
        listen = os.environ.get("SKYSPOT_LISTEN_FD")
        return self._connect(max(self._timeout_s, JOIN_S), int(listen) if self._rank == 0 and listen else None)

    def reconnect(self) -> Any:
        """Return another connection, for a background thread: a blocking get holds up every other user of one.

        Raises:
            PeerGoneError: another attempt's store answers at the address by now.
        """
        store = self._connect(self._timeout_s)
        if self.unsupervised and store.get("seats") != self._seats:
            raise PeerGoneError("rank 0 is gone, and another attempt serves its store there")
        return store

    def _connect(self, seconds: float, listen: int | None = None, serves: bool = False) -> Any:
        """Return a connection to rank 0's store; with a listening socket, or where it serves, the store itself."""
        store: Any = dist.TCPStore(
            *self._address,
            is_master=serves or listen is not None,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            # The program's own init_process_group uses this server too, whichever of the two comes first.
            multi_tenant=self.unsupervised,
            master_listen_fd=listen,
        )
        store.set_timeout(timedelta(seconds=self._timeout_s))
        return dist.PrefixStore(self._prefix, store) if self._prefix else store

    def _serve(self, check_stop: Callable[[], None]) -> Any:
        """Put this start's record into the store from rank 0, and serve it unless torchrun's agent does."""
        check_stop()
        if self._agent_serves or dist.is_initialized():
            store = self._connect(self._timeout_s, serves=not self._agent_serves)
        else:
            store = self._connect(self._timeout_s, self._listen(check_stop))
        seats = {"start": self._start, "world_size": self._world_size, "random": secrets.token_hex(8)}
        self._seats = json.dumps(seats).encode()
        store.add("seat/0", 1)
        store.set("seats", self._seats)
        return store

    def _listen(self, check_stop: Callable[[], None]) -> int:
        """Return a socket that listens on the port, as soon as an older attempt has released it."""
        port = self._address[1]

        def final_error(error: Exception, no_try_left: bool) -> Exception | None:
            if not isinstance(error, OSError):
                return error
            reason = f"port {port} has been in use on this node for {BIND_PATIENCE_S:g} s ({error.strerror})"
            return PeerGoneError(f"{reason}: an older attempt is still running") if no_try_left else None

        return retry_loop(
            lambda: socket.create_server(("", port), backlog=512),
            final_error,
            pauses(BIND_PATIENCE_S, BIND_PAUSE_S, BIND_PAUSE_S),
            check_stop,
        ).detach()

    def _join(self, check_stop: Callable[[], None]) -> Any:
        """Claim this rank's seat in the store of this very attempt's rank 0.

        Another store may answer at that address: another task's, or that of an older attempt, whose seats are taken.
        Then this rank tries again until that store is gone.
        """
        begun, unequal_since, hinted = time.monotonic(), 0.0, False
        while time.monotonic() < begun + JOIN_S:
            check_stop()
            if self._rank == 1 and not hinted and time.monotonic() > begun + HINT_S:
                hinted = True
                print(f"waiting for rank 0 at {self._address[0]}:{self._address[1]}", file=sys.stderr, flush=True)
            with suppress(OSError, RuntimeError, ValueError, AttributeError):  # A stranger may answer anything.
                socket.create_connection(self._address, CONNECT_S).close()  # TCPStore itself would warn at each try.
                store = self._connect(CONNECT_S)
                seats = store.get("seats") if wait_for(store, "seats", CONNECT_S) else b"{}"
                record = json.loads(seats)
                ours = record.get("start") == self._start
                if ours and record.get("world_size") != self._world_size:
                    unequal_since = unequal_since or time.monotonic()
                    if time.monotonic() - unequal_since > UNEQUAL_PATIENCE_S:
                        self._refuse_unequal(store, record.get("world_size"))
                elif ours and store.add(f"seat/{self._rank}", 1) == 1:
                    self._seats = seats
                    return store
            time.sleep(0.3)
        raise PeerGoneError(f"rank {self._rank}: rank 0 does not answer at {self._address[0]}:{self._address[1]}")

    def _refuse_unequal(self, store: Any, theirs: object) -> None:
        """End the attempt on all nodes, with the reason."""
        reason = (
            f"node 0 expects {theirs} processes in total, node {self.nodes.rank} expects {self._world_size}; "
            "every node must start the same number (--processes, SKYPILOT_NUM_GPUS_PER_NODE)"
        )
        store.set(CRASHED, reason)
        raise NodesError(reason)
