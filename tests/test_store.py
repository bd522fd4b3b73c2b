"""What the ranks leave each other in the store is deleted once all have read it, and nobody waits for what is gone."""

import random
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from bucket_lab import until
from support import PROGRAMS, launch

from trainer.ranks import heartbeat
from trainer.ranks.group import RankGroup
from trainer.ranks.store import peek

RANKS = 3


@pytest.fixture
def seats(monkeypatch: pytest.MonkeyPatch) -> list[RankGroup]:
    """The ranks of an attempt, all in this process; the first serves the store."""
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.01)
    listener = socket.create_server(("127.0.0.1", 0))
    for name, value in {
        "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1",
        "SKYSPOT_STORE_PORT": listener.getsockname()[1], "SKYSPOT_LISTEN_FD": listener.detach(),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    found = []
    for rank in range(RANKS):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        found.append(RankGroup(timeout_s=30.0))
    return found


def at_once(seats: list[RankGroup], work: Callable[[RankGroup], Any]) -> list[Any]:
    """What each rank gets, all at the same time."""
    found: list[Any] = [None] * len(seats)

    def one(rank: int) -> None:
        found[rank] = work(seats[rank])

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(len(seats))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank waits for what is gone"
    return found


def test_what_all_have_read_is_deleted(seats: list[RankGroup]) -> None:
    before = seats[0].store.num_keys()

    def much(seat: RankGroup) -> list[Any]:
        late = random.Random(seat.rank)
        found = []
        for number in range(30):
            time.sleep(late.choice((0.0, 0.0, 0.005)))  # A late reader still finds it.
            found.append(seat.rank0_does(f"work/{number}", lambda number=number: {"number": number}))
            found.append(seat.gather(f"all/{number}", [seat.rank, number]))
        return found

    expected = [one for n in range(30) for one in ({"number": n}, [[rank, n] for rank in range(RANKS)])]
    assert at_once(seats, much) == [expected] * RANKS
    until("nothing is left", lambda: seats[0].store.num_keys() == before)


def test_a_beat_that_is_deleted_at_any_moment_keeps_nobody_waiting(seats: list[RankGroup]) -> None:
    """With `check` and then `get` the reader would wait for the key until the store's own time-out."""
    store, stop = seats[1].connection(), threading.Event()

    def come_and_go() -> None:
        mine = seats[2].connection()
        while not stop.is_set():
            mine.set("beat/one", "1.0")
            mine.delete_key("beat/one")

    writer = threading.Thread(target=come_and_go, daemon=True)
    writer.start()
    begun = time.monotonic()
    found = {peek(store, "beat/one") for _ in range(2000)}
    stop.set()
    writer.join(30)
    assert found <= {b"", b"1.0"}
    assert time.monotonic() - begun < seats[1].timeout_s


@pytest.mark.parametrize("store", [dist.HashStore(), "tcp"], ids=["alone", "several"])
def test_peeking_tells_what_is_there(store: Any, seats: list[RankGroup]) -> None:
    store = seats[1].store if store == "tcp" else store
    assert peek(store, "nowhere") == b""
    assert not store.check(["nowhere"])
    store.set("here", "1.5")
    assert peek(store, "here") == b"1.5"
    assert store.get("here") == b"1.5"


def test_a_run_that_saves_often_leaves_few_keys(tmp_path: Path) -> None:
    (tmp_path / "counts.py").write_text(
        f"import sys\nsys.path.insert(0, r'{PROGRAMS}')\nimport mlp\n"
        "class Run(mlp.SpotRun):\n"
        "    def part(self, *ending, **more):\n"
        "        if self.rank == 0: print('keys', self.group.store.num_keys(), flush=True)\n"
        "        super().part(*ending, **more)\n"
        "mlp.SpotRun = Run\nmlp.main()\n"
    )
    ended = launch(tmp_path / "counts.py", "--dir", tmp_path / "run", "--save-every", 1, processes=2)
    assert ended.code == 0, ended.output
    [line] = [line for line in ended.output.splitlines() if line.startswith("keys")]
    assert int(line.split()[1]) < 20, "twelve saves left 77"
