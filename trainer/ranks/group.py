"""How the ranks of one attempt find each other, agree, and wait for each other.

Two ways to wait. In a collective, for work of one length on all ranks: it has a timeout, after which a peer counts as
gone. On the store, for work that only one rank does and that may take long: the worker leaves a heartbeat, and a
missing heartbeat, not a long task, is the failure.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trainer.launch.link import CRASHED
from trainer.launch.nodes import Nodes, NodesError
from trainer.ranks.heartbeat import BEAT_S, Heart

FIRST_SEAT_S = 660.0
BIND_PATIENCE_S = 60.0
CONNECT_S = 5.0
UNEQUAL_PATIENCE_S = 10.0
LOST_S = 8.0
"""Without a sign of life for so long a peer counts as gone, where a rank asks because something of its own failed."""
ALIVE_S = 2.0
"""For so long at least it is asked: the launcher's word of a peer's end may come a little later."""


_NOTHING = "-"
"""What nobody writes under a key that is peeked at."""


class PeerGoneError(Exception):
    """Another rank of this attempt is gone, or gives no sign of life."""


def is_peer_trouble(error: BaseException) -> bool:
    """Whether an error says by its type that a peer is gone rather than that this rank has a fault of its own."""
    return isinstance(error, (PeerGoneError, dist.DistError))


def may_be_peer_trouble(error: BaseException | None) -> bool:
    """Whether an error may be that of a collective within the user's own code, which has no type of its own.

    DistributedDataParallel's, in a forward or backward pass, raise a plain RuntimeError, as user code does.
    """
    while error is not None:
        if type(error) is RuntimeError or is_peer_trouble(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _collective() -> Iterator[None]:
    """What fails within it fails for a peer.

    Raises:
        PeerGoneError: it failed.
    """
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        raise PeerGoneError(f"a collective failed: {error}") from error


class Exchange:
    """One all-reduce under way: each rank's integers, each in its own row, seen by all."""

    def __init__(self, rows: torch.Tensor, work: dist.Work | None) -> None:
        self._rows = rows
        self._work = work

    def wait(self) -> list[list[int]]:
        """The rows of all ranks, by rank."""
        if self._work is not None:
            with _collective():
                self._work.wait()
        rows: list[list[int]] = self._rows.tolist()
        return rows


class Together:
    """This rank's seat among the ranks of an attempt.

    Without a launcher (no RANK in the environment) there is one rank, and no network.
    """

    def __init__(self, timeout_s: float = 120.0, check_stop: Callable[[], None] = lambda: None) -> None:
        """Take the seat.

        Args:
            timeout_s: Without a sign of life for so long a peer counts as gone.
            check_stop: Called now and then while this rank waits for the others; raises to stop.

        Raises:
            PeerGoneError: rank 0's store is not to be had.
            NodesError: another machine runs another number of processes.
        """
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._nodes = Nodes.from_env()
        self.several_nodes = self.world_size > 1 and self._nodes.several
        self.timeout_s = timeout_s
        self._control: dist.ProcessGroup | None = None
        self._calls: Counter[str] = Counter()
        """How often something of a name was done by rank 0 for all, or gathered."""
        self._heart = Heart(self.connection)
        port = os.environ.get("SKYSPOT_STORE_PORT") or os.environ.get("MASTER_PORT") or 0
        self._address = (os.environ.get("MASTER_ADDR", ""), int(port))
        self._seats = b""
        """What rank 0 wrote over its store: no other attempt's says the same."""
        if self.world_size == 1:
            self.store: Any = dist.HashStore()
        elif self.several_nodes:
            self.store = self._serve(check_stop) if self.rank == 0 else self._join(check_stop)
        else:
            # Rank 0 opens the attempt in the bucket first; the launcher tells us if it dies over that.
            listen = os.environ.get("SKYSPOT_LISTEN_FD")
            patience_s = max(self.timeout_s, FIRST_SEAT_S)
            self.store = self._reach(patience_s, int(listen) if self.rank == 0 and listen else None)

    def _reach(self, seconds: float, listen: int | None = None) -> Any:
        """A connection to rank 0's store; with a listening socket, the store itself."""
        store = dist.TCPStore(
            *self._address,
            is_master=listen is not None,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            master_listen_fd=listen,
        )
        store.set_timeout(timedelta(seconds=self.timeout_s))
        return store

    def _serve(self, check_stop: Callable[[], None]) -> Any:
        """Rank 0 on several machines: the store, as soon as an older attempt has let go of the port."""
        end = time.monotonic() + BIND_PATIENCE_S
        while True:
            check_stop()
            try:
                listener = socket.create_server(("", self._address[1]), backlog=512)
                break
            except OSError as error:
                if time.monotonic() > end:
                    raise PeerGoneError(
                        f"port {self._address[1]} has been in use here for {BIND_PATIENCE_S:g} s ({error.strerror}): "
                        "an older attempt is alive"
                    ) from None
                time.sleep(min(0.5, BIND_PATIENCE_S))
        store = self._reach(self.timeout_s, listener.detach())
        seats = {"start": self._nodes.start, "world_size": self.world_size, "random": secrets.token_hex(8)}
        self._seats = json.dumps(seats).encode()
        store.add("seat/0", 1)
        store.set("seats", self._seats)
        return store

    def _join(self, check_stop: Callable[[], None]) -> Any:
        """Another rank on several machines: a seat in the store that is rank 0's of this very attempt.

        Another's store may answer at that address: another task's, or an older attempt's, whose seats are taken. Then
        we ask again until it is gone.
        """
        end, unequal_since = time.monotonic() + FIRST_SEAT_S, 0.0
        while time.monotonic() < end:
            check_stop()
            with suppress(OSError, RuntimeError, ValueError, AttributeError):  # Whatever a stranger may answer.
                socket.create_connection(self._address, CONNECT_S).close()  # TCPStore itself would warn at each try.
                store = self._reach(CONNECT_S)
                seats = store.get("seats") if wait_for(store, "seats", CONNECT_S) else b"{}"
                said = json.loads(seats)
                ours = said.get("start") == self._nodes.start
                if ours and said.get("world_size") != self.world_size:
                    unequal_since = unequal_since or time.monotonic()
                    if time.monotonic() - unequal_since > UNEQUAL_PATIENCE_S:
                        self._refuse_unequal(store, said.get("world_size"))
                elif ours and store.add(f"seat/{self.rank}", 1) == 1:
                    self._seats = seats
                    return store
            time.sleep(0.3)
        raise PeerGoneError(f"rank {self.rank}: rank 0 does not answer at {self._address[0]}:{self._address[1]}")

    def _refuse_unequal(self, store: Any, theirs: object) -> None:
        """End the attempt on all machines, with the reason."""
        trouble = (
            f"machine 0 reckons with {theirs} processes in all, machine {self._nodes.rank} with {self.world_size}: "
            "all machines must run as many (--processes, SKYPILOT_NUM_GPUS_PER_NODE)"
        )
        store.set(CRASHED, trouble)
        raise NodesError(trouble)

    def connection(self) -> Any:
        """A store connection of its own for a background thread: a blocking get holds up every other user of one.

        Raises:
            PeerGoneError: another attempt's store answers there by now.
        """
        if self.world_size == 1:
            return self.store
        store = self._reach(self.timeout_s)
        if self.several_nodes and store.get("seats") != self._seats:
            raise PeerGoneError("rank 0 is gone, and another attempt serves its store there")
        return store

    def say(self, key: str, text: str) -> None:
        """Leave a word for all ranks in the store, where that is still there."""
        if self.world_size > 1:
            with suppress(Exception):
                self.store.set(key, text or "-")

    def is_first(self, key: str) -> bool:
        """Whether this rank is the first to ask that of the store."""
        return self.world_size == 1 or self.store.add(key, 1) == 1

    def heard(self, key: str, seconds: float = 0.0, store: Any = None) -> str | None:
        """A word that some rank left, waiting for it so long; None where there is none, or no store any more."""
        with suppress(Exception):
            store = store or self.store
            if store.check([key]) or (seconds and wait_for(store, key, seconds)):
                return str(store.get(key).decode(errors="replace"))
        return None

    def form_groups(self, on_gpu: bool) -> None:
        """Make the process groups: the default one for gradients, and a gloo one for agreement."""
        if self.world_size == 1:
            return
        timeout = timedelta(seconds=self.timeout_s)
        with _collective():
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
        with _collective():
            return Exchange(rows, dist.all_reduce(rows, group=self._control, async_op=True))

    @contextmanager
    def judging(self, told: Exchange) -> Iterator[None]:
        """A context for a micro-step's passes, beside which `told` is under way: tells what a peer is the cause of.

        Raises:
            PeerGoneError: the passes failed, and the exchange with them; or so late that a collective has timed out.
        """
        begun = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if self.world_size > 1 and type(error) is RuntimeError:
                told.wait()
                if time.monotonic() - begun >= self.timeout_s:
                    raise PeerGoneError(f"a collective took {self.timeout_s:g} s: {error}") from error
            raise

    def lost_a_peer(self, gone: threading.Event) -> bool:
        """Whether another rank is really gone, where something failed that may be why: looked at for a few seconds.

        Args:
            gone: Set once the launcher says that a rank of this machine has left.
        """
        others = {rank: b"" for rank in range(self.world_size) if rank != self.rank}
        alive: set[int] = set()
        begun = time.monotonic()
        while time.monotonic() - begun < LOST_S and not gone.wait(0.1):
            try:
                beats = {rank: peek(self.store, _alive(rank)) for rank in others}
            except Exception:  # Rank 0 serves the store.
                return True
            alive |= {rank for rank, beat in beats.items() if others[rank] not in (b"", beat)}
            others.update(beats)
            if len(alive) == len(others) and time.monotonic() - begun > ALIVE_S:
                return False
        return True

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite each tensor with rank 0's."""
        if self.world_size > 1:
            for tensor in tensors:
                whole = tensor.contiguous()
                with _collective():
                    dist.broadcast(whole, 0)
                if whole is not tensor:
                    tensor.copy_(whole)

    def live(self) -> AbstractContextManager[None]:
        """A context in which this rank gives signs of life that `lost_a_peer` of the others sees."""
        return self.beating(_alive(self.rank))

    def publish(self, key: str, value: Any) -> None:
        """Put a JSON value into the store, once."""
        self.store.set(key, json.dumps(value))

    def await_value(self, key: str, beat: str = "", check_stop: Callable[[], None] = lambda: None) -> Any:
        """Wait for a published value, for as long as the worker's heartbeat `beat` goes on.

        Raises:
            PeerGoneError: no value, and no new heartbeat for the time-out.
        """
        last_beat, changed = b"", time.monotonic()
        while True:
            check_stop()
            if wait_for(self.store, key, BEAT_S):
                return json.loads(self.store.get(key))
            if beat and (now := peek(self.store, beat)) not in (b"", last_beat):
                last_beat, changed = now, time.monotonic()
            if time.monotonic() - changed > self.timeout_s:
                raise PeerGoneError(f"rank {self.rank}: no word of {key!r} for {self.timeout_s:g} s")

    def rank0_does(self, name: str, work: Callable[[], Any], check_stop: Callable[[], None] = lambda: None) -> Any:
        """Let rank 0 do something that may take long; every rank gets its JSON value.

        Raises:
            PeerGoneError: rank 0 gives no sign of life any more.
        """
        return self._one_does(name, self.rank == 0, self.world_size - 1, work, check_stop)

    def machine_does(self, name: str, work: Callable[[], Any], check_stop: Callable[[], None] = lambda: None) -> Any:
        """Let the first rank of each machine do something; the machine's other ranks get its JSON value.

        Raises:
            PeerGoneError: that rank gives no sign of life any more.
        """
        machine = self._nodes.rank if self.several_nodes else 0
        return self._one_does(f"{name}/{machine}", self.local_rank == 0, self.local_world_size - 1, work, check_stop)

    def _one_does(
        self, name: str, is_me: bool, readers: int, work: Callable[[], Any], check_stop: Callable[[], None]
    ) -> Any:
        if not readers:
            return work()
        # The ranks call it in the same order: the n-th call of a name is the same one on all.
        self._calls[name] += 1
        done, beat = f"done/{name}/{self._calls[name]}", f"beat/{name}"
        if not is_me:
            value = self.await_value(done, beat, check_stop)
            self._forget(f"read/{done}", readers, done)
            return value
        with self.beating(beat):
            value = work()
        self.publish(done, value)
        return value

    def _forget(self, counter: str, readers: int, *keys: str) -> None:
        """Delete keys that this rank has read, once all readers have: each says so, and the last one deletes."""
        with suppress(Exception):  # Rank 0 may have left with its store: then nothing is left to delete.
            if self.store.add(counter, 1) == readers:
                for key in (*keys, counter):
                    self.store.delete_key(key)

    def beating(self, key: str) -> AbstractContextManager[None]:
        """A context in which a heartbeat goes out under `key`, for as long as others may wait for this rank."""
        return self._heart.beating(key) if self.world_size > 1 else nullcontext()

    def coming_to(self, name: str) -> AbstractContextManager[None]:
        """A context for what this rank does before `gather(name)`: the others wait there for as long as that takes."""
        return self.beating(f"beat/{name}/{self.rank}")

    def gather(self, name: str, value: Any, check_stop: Callable[[], None] = lambda: None) -> list[Any]:
        """Every rank's JSON value, on every rank; each rank beats while it waits."""
        if self.world_size == 1:
            return [value]
        self._calls[f"gather {name}"] += 1
        key = f"{name}/{self._calls[f'gather {name}']}"
        with self.coming_to(name):
            self.publish(f"{key}/{self.rank}", value)
            values = [
                self.await_value(f"{key}/{rank}", f"beat/{name}/{rank}", check_stop) for rank in range(self.world_size)
            ]
        self._forget(f"read/{key}", self.world_size, *(f"{key}/{rank}" for rank in range(self.world_size)))
        return values

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


def _alive(rank: int) -> str:
    return f"beat/alive/{rank}"


def peek(store: Any, key: str) -> bytes:
    """What is under a key that its writer may delete at any moment; empty where there is nothing.

    A `get` after a `check` would wait for the key where it is deleted in between.
    """
    found: bytes = store.compare_set(key, _NOTHING, _NOTHING)
    return b"" if found == _NOTHING.encode() else found


def wait_for(store: Any, key: str, seconds: float) -> bool:
    """Whether the key appears in the store within the time.

    Asked for again and again rather than waited for: a wait that runs out prints a warning of c10d's each time.
    """
    end, pause = time.monotonic() + seconds, 0.001
    while not store.check([key]):
        left = end - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(left, pause))
        pause = min(0.05, 2 * pause)
    return True
