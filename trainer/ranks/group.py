"""The ranks of one attempt: how they agree, and how they wait for each other.

There are two ways to wait. In a collective, for work that takes all ranks equally long: after a timeout a peer counts
as gone. On the store, for work that only one rank does and that may take long: that rank sends heartbeats, and a
missing heartbeat, not a long task, is the failure.
"""

from __future__ import annotations

import atexit
import json
import os
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

from trainer.errors import RunError
from trainer.ranks.exchange import Exchange
from trainer.ranks.heartbeat import BEAT_S, Heartbeats
from trainer.ranks.peers import PeerGoneError, collective
from trainer.ranks.rendezvous import Rendezvous
from trainer.ranks.store import peek, wait_for

LOST_S = 8.0
"""Seconds that `lost_a_peer` waits for a heartbeat before it counts a peer as gone."""
ALIVE_S = 2.0
"""Seconds that `lost_a_peer` looks at least: the launcher's message about a lost peer may come a little later."""


class RankGroup:
    """The ranks of an attempt, as this rank sees them.

    Without a launcher (no RANK in the environment) there is one rank, and no network.
    """

    def __init__(self, timeout_s: float = 120.0, check_stop: Callable[[], None] = lambda: None) -> None:
        """Join the group.

        Args:
            timeout_s: After so long without a heartbeat a peer counts as gone.
            check_stop: Called now and then while this rank waits for the others; raises to stop.

        Raises:
            PeerGoneError: rank 0's store cannot be reached.
            NodesError: another node runs another number of processes.
        """
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.timeout_s = timeout_s
        self._control: dist.ProcessGroup | None = None
        self._calls: Counter[str] = Counter()
        """The number of calls so far under each name: of `rank0_does`, `machine_does` and `gather`."""
        self._heartbeats = Heartbeats(self.connection)
        self._rendezvous = Rendezvous(self.rank, self.world_size, timeout_s)
        self.unsupervised = self._rendezvous.unsupervised
        """No launcher of ours watches all ranks: they tell each other through the store why they leave."""
        self.node_rank = int(os.environ.get("GROUP_RANK") or os.environ.get("NODE_RANK") or 0)
        self.store: Any = self._rendezvous.open(check_stop)

    def connection(self) -> Any:
        """Return a store connection for a background thread: a blocking get holds up every other user of one.

        Raises:
            PeerGoneError: another attempt's store answers at the address by now.
        """
        return self.store if self.world_size == 1 else self._rendezvous.reconnect()

    def form_groups(self, on_gpu: bool) -> None:
        """Make the process groups: the default one for gradients, unless the program has, and a gloo one for agreement.

        Raises:
            RunError: this machine does not have the network interface that gloo is told to use, or the program's own
                default group has other ranks.
            PeerGoneError: another rank cannot be reached.
        """
        if dist.is_initialized() and (dist.get_rank(), dist.get_world_size()) != (self.rank, self.world_size):
            raise RunError(
                f"torch.distributed counts this process as rank {dist.get_rank()} of {dist.get_world_size()}, but RANK "
                f"and WORLD_SIZE say rank {self.rank} of {self.world_size}: set both before SpotRun, with MASTER_ADDR "
                "and MASTER_PORT, or start the script with `python -m trainer.launch --processes N SCRIPT`"
            )
        if self.world_size == 1:
            return
        timeout = timedelta(seconds=self.timeout_s)
        refuse_unknown_interface()
        with collective():
            if not dist.is_initialized():
                dist.init_process_group(
                    "nccl" if on_gpu else "gloo",
                    store=dist.PrefixStore("gradients", self.connection()),
                    rank=self.rank,
                    world_size=self.world_size,
                    timeout=timeout,
                )
            self._control = dist.new_group(backend="gloo", timeout=timeout)

    # -- collectives -------------------------------------------------------------------------------------------------

    def exchange(self, row: Sequence[int]) -> Exchange:
        """Start to send this rank's integers (64 bit) to all ranks. Every rank calls it in the same order."""
        return Exchange.start(row, self.rank, self.world_size, self._control)

    def all_ranks(self, mine: bool) -> bool:
        """True if it holds on every rank. Every rank calls it in the same order."""
        return all(theirs for [theirs] in self.exchange([int(mine)]).wait())

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite each tensor with rank 0's."""
        if self.world_size > 1:
            for tensor in tensors:
                whole = tensor.contiguous()
                with collective():
                    dist.broadcast(whole, 0)
                if whole is not tensor:
                    tensor.copy_(whole)

    @contextmanager
    def detect_lost_peer(self, exchange: Exchange) -> Iterator[None]:
        """A context for a micro-step's passes beside `exchange`: tells a lost peer from an error of the user's.

        Raises:
            PeerGoneError: the passes failed and the exchange did too, or they failed after a collective's timeout.
        """
        begun = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if self.world_size > 1 and type(error) is RuntimeError:
                exchange.wait()
                if time.monotonic() - begun >= self.timeout_s:
                    raise PeerGoneError(f"a collective took {self.timeout_s:g} s: {error}") from error
            raise

    # -- heartbeats --------------------------------------------------------------------------------------------------

    def heartbeat(self, key: str) -> AbstractContextManager[None]:
        """A context in which heartbeats are sent under `key`, for as long as others may wait for this rank."""
        return self._heartbeats.sent(key) if self.world_size > 1 else nullcontext()

    def stay_alive(self) -> AbstractContextManager[None]:
        """A context in which this rank sends the heartbeats that `lost_a_peer` looks for on the other ranks."""
        return self.heartbeat(_alive(self.rank))

    def let_go(self, seconds: float) -> None:
        """Send no more heartbeats, and wait for up to `seconds` until their thread has ended.

        The process groups stay for the program; they are destroyed before Python ends.
        """
        self._heartbeats.end(seconds)
        atexit.register(destroy_groups, seconds)

    def before_gather(self, name: str) -> AbstractContextManager[None]:
        """A context for this rank's work before `gather(name)`: the others wait there for as long as that takes."""
        return self.heartbeat(f"beat/{name}/{self.rank}")

    def lost_a_peer(self, gone: threading.Event) -> bool:
        """Look for a few seconds whether another rank is gone, after an error that this may have caused.

        Args:
            gone: Set once the launcher reports that a rank of this node has left.
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

    # -- messages in the store ---------------------------------------------------------------------------------------

    def post_message(self, key: str, text: str) -> None:
        """Leave a message for all ranks in the store; does nothing if the store is gone."""
        if self.world_size > 1:
            with suppress(Exception):
                self.store.set(key, text or "-")

    def read_message(self, key: str, seconds: float = 0.0, store: Any = None) -> str | None:
        """Return a message that some rank posted, waiting for it; None if there is none, or the store is gone."""
        with suppress(Exception):
            store = store or self.store
            if store.check([key]) or (seconds and wait_for(store, key, seconds)):
                return str(store.get(key).decode(errors="replace"))
        return None

    def is_first(self, key: str) -> bool:
        """True if this rank is the first to ask for that key."""
        return self.world_size == 1 or self.store.add(key, 1) == 1

    # -- values that one rank publishes and others wait for ----------------------------------------------------------

    def publish(self, key: str, value: Any) -> None:
        """Put a JSON value into the store, once."""
        self.store.set(key, json.dumps(value))

    def await_value(
        self, key: str, beat: str = "", check_stop: Callable[[], None] = lambda: None, store: Any = None
    ) -> Any:
        """Wait for a published value, for as long as the heartbeat under `beat` goes on.

        Args:
            key: The value's.
            beat: The key of its writer's heartbeats; empty: there are none.
            check_stop: Called now and then; raises to stop.
            store: A background thread's connection; None: the main thread's.

        Raises:
            PeerGoneError: no value, and no new heartbeat within the timeout.
        """
        store = store or self.store
        last_beat, changed = b"", time.monotonic()
        while True:
            check_stop()
            if wait_for(store, key, BEAT_S):
                return json.loads(store.get(key))
            if beat and (now := peek(store, beat)) not in (b"", last_beat):
                last_beat, changed = now, time.monotonic()
            if time.monotonic() - changed > self.timeout_s:
                raise PeerGoneError(f"rank {self.rank}: waited {self.timeout_s:g} s for {key!r} without a heartbeat")

    def rank0_does(self, name: str, work: Callable[[], Any], check_stop: Callable[[], None] = lambda: None) -> Any:
        """Let rank 0 do something that may take long; every rank gets its JSON value.

        Raises:
            PeerGoneError: rank 0's heartbeats have stopped.
        """
        return self._one_does(name, self.rank == 0, self.world_size - 1, work, check_stop)

    def machine_does(self, name: str, work: Callable[[], Any], check_stop: Callable[[], None] = lambda: None) -> Any:
        """Let the first rank of each machine do something; the machine's other ranks get its JSON value.

        Raises:
            PeerGoneError: that rank's heartbeats have stopped.
        """
        first, others = self.local_rank == 0, self.local_world_size - 1
        return self._one_does(f"{name}/{self.node_rank}", first, others, work, check_stop)

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
            self._delete_after_all_read(f"read/{done}", readers, done)
            return value
        with self.heartbeat(beat):
            value = work()
        self.publish(done, value)
        return value

    def gather(self, name: str, value: Any, check_stop: Callable[[], None] = lambda: None) -> list[Any]:
        """Return every rank's JSON value, on every rank; each rank sends heartbeats while it waits."""
        if self.world_size == 1:
            return [value]
        self._calls[f"gather {name}"] += 1
        key = f"{name}/{self._calls[f'gather {name}']}"
        keys = [f"{key}/{rank}" for rank in range(self.world_size)]
        with self.before_gather(name):
            self.publish(keys[self.rank], value)
            values = [self.await_value(k, f"beat/{name}/{rank}", check_stop) for rank, k in enumerate(keys)]
        self._delete_after_all_read(f"read/{key}", self.world_size, *keys)
        return values

    def _delete_after_all_read(self, counter: str, readers: int, *keys: str) -> None:
        """Count that this rank has read the keys; the last of the readers deletes them."""
        with suppress(Exception):  # Rank 0 may have left with its store: then nothing is left to delete.
            if self.store.add(counter, 1) == readers:
                for key in (*keys, counter):
                    self.store.delete_key(key)

    # -- the end -----------------------------------------------------------------------------------------------------

    def mark_left(self) -> None:
        """Tell rank 0 that this rank needs the store no more."""
        if self.world_size > 1:
            with suppress(Exception):
                self.store.set(f"left/{self.rank}", "1")

    def await_others_left(self, seconds: float) -> None:
        """Wait, on rank 0, until the others need its store no more, but not longer than `seconds`."""
        if self.world_size == 1 or self.rank:
            return
        end = time.monotonic() + seconds
        for rank in range(1, self.world_size):
            with suppress(Exception):
                wait_for(self.store, f"left/{rank}", max(0.01, end - time.monotonic()))


def destroy_groups(seconds: float) -> None:
    """Destroy the process groups, but wait no longer than `seconds`.

    A thread of gloo's frees the tensors of its last collective. Where it does so while Python ends, the process aborts,
    or never ends (https://github.com/pytorch/pytorch/issues/190489).
    """
    if dist.is_initialized():
        thread = threading.Thread(target=dist.destroy_process_group, daemon=True, name="groups")
        thread.start()
        thread.join(seconds)


def refuse_unknown_interface() -> None:
    """Refuse a wrong GLOO_SOCKET_IFNAME, so that gloo's error does not count as a lost peer.

    Raises:
        RunError: this machine has no such interface, or it has no address.
    """
    for name in filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")):
        try:
            dist.ProcessGroupGloo.create_device(interface=name)
        except RuntimeError:
            there = ", ".join(interface for _, interface in socket.if_nameindex())
            raise RunError(
                f"GLOO_SOCKET_IFNAME={name}: this machine has no network interface {name} with an address. "
                f"Use one of {there}, or unset the variable"
            ) from None


def _alive(rank: int) -> str:
    return f"beat/alive/{rank}"
