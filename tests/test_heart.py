"""Signs of life: at once, again and again, for as long as they are asked for, over one connection."""

import socket
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist
from bucket_lab import until

from trainer.ranks import heartbeat
from trainer.ranks.group import RankGroup
from trainer.ranks.heartbeat import Heartbeats
from trainer.ranks.store import peek


@pytest.fixture
def store() -> dist.HashStore:
    return dist.HashStore()


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.01)


def beat(store: Any, key: str) -> bytes:
    return peek(store, key)


def goes_on(store: Any, key: str) -> None:
    before = beat(store, key)
    until(f"{key} beats", lambda: beat(store, key) not in (b"", before))


@pytest.mark.usefixtures("often")
def test_each_wait_has_its_beat_for_as_long_as_it_lasts(store: dist.HashStore) -> None:
    mine = Heartbeats(lambda: store)
    with mine.sent("one"):
        goes_on(store, "one")
        with mine.sent("two"):
            goes_on(store, "two")
            goes_on(store, "one")
        for _ in range(2):  # The round that was under way may have had it still.
            goes_on(store, "one")
        for _ in range(3):
            goes_on(store, "one")
            assert beat(store, "two") == b"", "it is deleted once nobody waits for it"
    until("the last one is deleted too", lambda: not store.check(["one"]))


def test_a_beat_comes_at_once(store: dist.HashStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_S", 600.0)
    mine = Heartbeats(lambda: store)
    with mine.sent("one"):
        until("the first beats", lambda: beat(store, "one"))
        with mine.sent("two"):
            until("the second beats", lambda: beat(store, "two"))
    with mine.sent("three"):
        until("the third beats", lambda: beat(store, "three"))


@pytest.mark.usefixtures("often")
def test_a_store_that_cannot_be_reached_for_a_moment_is_asked_again(store: dist.HashStore) -> None:
    tries: list[float] = []

    def connect() -> Any:
        tries.append(time.monotonic())
        if len(tries) < 3:
            raise RuntimeError("connection refused")
        return store

    with Heartbeats(connect).sent("one"):
        goes_on(store, "one")
    assert len(tries) == 3


def test_work_that_is_over_does_not_wait_for_the_connection() -> None:
    """torch asks the name server at each connection: five seconds, where the answer is lost."""
    begun, left, late = threading.Event(), threading.Event(), threading.Event()

    def connect() -> Any:
        begun.set()
        if not left.wait(20):
            late.set()
        return dist.HashStore()

    with Heartbeats(connect).sent("one"):
        assert begun.wait(10)
    left.set()
    assert not late.is_set()


@pytest.fixture
def seat(monkeypatch: pytest.MonkeyPatch) -> RankGroup:
    """The first of two ranks; it serves the store."""
    listener = socket.create_server(("127.0.0.1", 0))
    for name, value in {
        "RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
        "SKYSPOT_STORE_PORT": listener.getsockname()[1], "SKYSPOT_LISTEN_FD": listener.detach(),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    return RankGroup(timeout_s=30.0)


@pytest.mark.usefixtures("often")
def test_many_waits_make_one_connection(seat: RankGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []
    real = dist.TCPStore

    def counted(*args: Any, **options: Any) -> Any:
        made.append(time.monotonic())
        return real(*args, **options)

    monkeypatch.setattr(dist, "TCPStore", counted)
    for number in range(20):
        assert seat.rank0_does(f"work/{number}", lambda: 1) == 1
        with seat.heartbeat(f"beat/{number}"):
            goes_on(seat.store, f"beat/{number}")
    assert len(made) == 1


@pytest.mark.usefixtures("often")
def test_no_thread_is_in_a_call_of_c10ds_once_the_attempt_has_ended(seat: RankGroup) -> None:
    """If Python ended meanwhile, the call would abort the process."""
    before = set(threading.enumerate())
    with seat.stay_alive():
        [thread] = set(threading.enumerate()) - before
        goes_on(seat.store, "beat/alive/0")
        seat.let_go(20)
        assert not thread.is_alive()


def test_nobody_waits_for_a_rank_that_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    alone, before = RankGroup(), threading.active_count()
    with alone.heartbeat("one"):
        assert threading.active_count() == before
