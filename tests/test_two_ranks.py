"""What two ranks are needed for: a peer that is gone or is not, extras that differ, weights that are not integers."""

import socket
import threading
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import one_rank
import pytest
import torch
import torch.distributed as dist
from programs import branches, odd
from support import PROGRAMS, column, event, launch, weights

from trainer.checkpoint import extras
from trainer.checkpoint.state import StateError
from trainer.errors import RunError
from trainer.launch.link import Link
from trainer.ranks import group, heartbeat
from trainer.ranks.exchange import Exchange
from trainer.ranks.group import RankGroup
from trainer.ranks.peers import PeerGoneError, is_peer_trouble, may_be_peer_trouble

ODD, BRANCHES = PROGRAMS / "odd.py", PROGRAMS / "branches.py"


@pytest.mark.slow
def test_two_ranks_are_as_one_with_sparse_gradients_float_weights_a_nan_and_extras_of_their_own(tmp_path: Path) -> None:
    run_dir, alone = tmp_path / "run", tmp_path / "alone"
    failed = launch(ODD, "--dir", run_dir, "--fail", "the data's socket timed out: connection reset", processes=2)
    assert failed.code == 1, failed.output
    assert "Traceback" in failed.output
    assert "socket timed out" in failed.output
    assert event(run_dir, "end")["cause"] != "finished"
    for rank in range(2):
        assert f"rank {rank} heard [0, 1, 2]" in failed.output, "each call of a name has an answer of its own"
    ended = launch(ODD, "--dir", run_dir, processes=2)
    assert ended.code == 0, ended.output
    assert event(run_dir, "restored")["step"] == 4
    torch.manual_seed(0)
    left = one_rank.train(
        alone, model=odd.Bag, samples=odd.Rows(), loss=odd.loss, max_steps=odd.STEPS,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        **{key: value for key, value in odd.OPTIONS.items() if key != "cpu"},
    )  # fmt: skip
    assert left.code == 0, left.error
    for key in ("order", "rng", "lr", "samples", "tokens"):
        assert column(run_dir, key) == column(alone, key), key
    dropped = [value is None for value in column(alone, "loss")]
    assert [value is None for value in column(run_dir, "loss")] == dropped
    assert sum(dropped) == 2, "one in each epoch"
    updates = odd.STEPS - 2 - (not dropped[-1])  # Told of just before the last.
    for rank in range(2):
        own = updates * (rank + 1)
        assert f"rank {rank} had {own} {[float(own)] * 3} {[float(updates)] * 3}" in ended.output
    for name, data in weights(alone).items():
        ours = torch.frombuffer(bytearray(weights(run_dir)[name]), dtype=torch.float32)
        assert torch.allclose(ours, torch.frombuffer(bytearray(data), dtype=torch.float32), atol=1e-5), name


def seats(monkeypatch: pytest.MonkeyPatch) -> list[RankGroup]:
    """The seats of two ranks of one machine in this process."""
    served = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    found = []
    for rank in range(2):
        for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("MASTER_ADDR", "127.0.0.1"),
                            ("SKYSPOT_STORE_PORT", served.port)):  # fmt: skip
            monkeypatch.setenv(name, str(value))
        found.append(RankGroup())
    found[0].served = served  # type: ignore[attr-defined]
    return found


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> list[RankGroup]:
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.05)
    monkeypatch.setattr(group, "ALIVE_S", 0.2)
    return seats(monkeypatch)


def test_a_peer_is_gone_where_the_launcher_says_so_or_its_heart_stands_still(
    two: list[RankGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = threading.Event()
    with ExitStack() as alive:
        alive.enter_context(two[0].stay_alive())
        with two[1].stay_alive():
            assert not two[0].lost_a_peer(gone)
            assert not two[1].lost_a_peer(gone)
            monkeypatch.setattr(group, "LOST_S", 1.0)
            monkeypatch.setattr(two[0], "world_size", 3)
            assert two[0].lost_a_peer(gone), "rank 1 beats, and rank 2 does not"
            monkeypatch.setattr(two[0], "world_size", 2)
        assert two[0].lost_a_peer(gone), "rank 1 beats no more"
        monkeypatch.setattr(group, "LOST_S", 600.0)
        threading.Timer(0.2, gone.set).start()
        begun = time.monotonic()
        assert two[0].lost_a_peer(gone)
        assert time.monotonic() - begun < 300


def test_a_peer_is_gone_where_the_store_is_gone(two: list[RankGroup], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 serves the store, and is gone with it."""
    monkeypatch.setattr(group, "LOST_S", 600.0)
    gone = threading.Event()
    del two[0].served  # type: ignore[attr-defined]
    begun = time.monotonic()
    assert two[1].lost_a_peer(gone)
    assert time.monotonic() - begun < 300


def test_a_network_interface_that_this_machine_does_not_have_is_no_lost_peer(
    two: list[RankGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    for rank in two:
        with pytest.raises(RunError, match=r"GLOO_SOCKET_IFNAME=nowhere0: this machine has no network interface") as it:
            rank.form_groups(on_gpu=False)
        assert not is_peer_trouble(it.value)
    [(_, there), *_] = socket.if_nameindex()
    assert there in str(it.value)


def test_a_failed_exchange_is_a_peer_that_is_gone_and_a_failed_pass_beside_it_too(two: list[RankGroup]) -> None:
    class Work:
        def __init__(self, fails: bool) -> None:
            self.fails = fails

        def wait(self) -> None:
            if self.fails:
                raise RuntimeError("Connection closed by peer")

    def told(fails: bool) -> Exchange:
        return Exchange(torch.zeros(2, 1), Work(fails))  # type: ignore[arg-type]

    with pytest.raises(PeerGoneError):
        told(True).wait()
    with pytest.raises(PeerGoneError), two[0].detect_lost_peer(told(True)):
        raise RuntimeError("Connection closed by peer")
    with pytest.raises(RuntimeError, match="timed out"), two[0].detect_lost_peer(told(False)):
        raise RuntimeError("my own socket timed out")
    two[0].timeout_s = 0.0
    with pytest.raises(PeerGoneError), two[0].detect_lost_peer(told(False)):
        raise RuntimeError("Timed out waiting 120000ms")


@pytest.mark.parametrize(
    ("error", "certain", "doubtful"),
    [
        (RuntimeError("launch timed out"), False, True),
        (RuntimeError("any"), False, True),
        (ValueError("socket"), False, False),
        (torch.OutOfMemoryError("gloo"), False, False),
        (dist.DistNetworkError("failed to recv"), True, True),
        (PeerGoneError("gone"), True, True),
    ],
)
def test_the_text_of_an_error_tells_nothing(error: Exception, certain: bool, doubtful: bool) -> None:
    assert is_peer_trouble(error) == certain
    assert may_be_peer_trouble(error) == doubtful


@pytest.mark.parametrize(("said", "code", "cause"), [("my own mistake", 1, "error"), ("another", 75, "peer-gone")])
def test_a_rank_that_left_for_the_same_error_is_no_lost_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, code: int, cause: str
) -> None:
    def fail(run: one_rank.InProcess) -> None:
        run.world_size, run.link = 2, Link(printed=words.fileno())
        monkeypatch.setattr(run.group, "lost_a_peer", lambda gone: True)
        raise RuntimeError("my own mistake")

    with (tmp_path / "said").open("w+b") as words:
        Link(printed=words.fileno()).is_first_to_print(f"RuntimeError: {said}")
        left = one_rank.train(tmp_path / "run", before=fail)
    assert (left.code, left.cause) == (code, cause)


def test_rank_0_does_something_anew_each_time(two: list[RankGroup]) -> None:
    heard: list[Any] = []

    def second() -> None:
        heard.extend(two[1].rank0_does("same", lambda: None) for _ in range(3))
        heard.extend(two[1].gather("all", 10 + number) for number in range(2))

    thread = threading.Thread(target=second, daemon=True)
    thread.start()
    said = [two[0].rank0_does("same", lambda number=number: number) for number in range(3)]
    gathered = [two[0].gather("all", number) for number in range(2)]
    thread.join(60)
    assert said == heard[:3] == [0, 1, 2]
    assert gathered == heard[3:] == [[0, 10], [1, 11]]


def test_what_one_rank_prepares_may_take_longer_than_the_timeout(
    two: list[RankGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time-out is almost over at each heartbeat that rank 1 sees."""
    beats, enough, heard, added = set[bytes](), threading.Event(), list[Any](), [0.0]
    real_peek, real_clock = group.peek, time.monotonic

    def peek(store: Any, key: str) -> bytes:
        beat = real_peek(store, key)
        if beat and beat not in beats:
            beats.add(beat)
            added[0] += 0.9 * two[1].timeout_s
        if len(beats) > 3:
            enough.set()
        return beat

    monkeypatch.setattr(group, "BEAT_S", 0.05)
    monkeypatch.setattr(group, "peek", peek)
    monkeypatch.setattr(time, "monotonic", lambda: real_clock() + added[0])
    thread = threading.Thread(target=lambda: heard.append(two[1].rank0_does("prepare", lambda: None)), daemon=True)
    thread.start()
    assert two[0].rank0_does("prepare", lambda: enough.wait(60)) is True
    thread.join(60)
    assert heard == [True]


def test_extras_of_other_names_are_refused_on_every_rank(two: list[RankGroup]) -> None:
    said: list[str] = []

    def register(rank: int) -> None:
        with pytest.raises(StateError) as refused:
            extras.refuse_other_names(two[rank], ["tally"] if rank == 0 else [], lambda: None)
        said.append(str(refused.value))

    thread = threading.Thread(target=register, args=(1,), daemon=True)
    thread.start()
    register(0)
    thread.join(60)
    assert len(said) == 2
    for line in said:
        assert "rank 0 registers tally, rank 1 nothing" in line


@pytest.mark.parametrize("on_host", [True, False])
def test_tensors_of_extras_that_differ_in_a_few_of_many_elements_are_seen_to_differ(
    on_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each rank has seen of the samples, say: a mask of a million, with a few marks."""
    if not on_host:
        monkeypatch.setattr(extras, "_integers", lambda tensor, real=extras._integers: extras._sums(real(tensor)))
    masks = [torch.zeros(1_000_000, dtype=torch.bool) for _ in range(3)]
    masks[0][[17, 500_001]] = masks[1][[17, 500_002]] = masks[2][[17, 500_001]] = True
    others = [torch.tensor(1.5), torch.zeros(0, 3), torch.randn(3, 4).t(), torch.zeros(5, dtype=torch.bfloat16)]
    one, other, same = (extras.digests([*others, mask]) for mask in masks)
    assert one[-1] != other[-1]
    assert one == same
    assert one[:-1] == other[:-1]


@pytest.mark.parametrize("find", [None, "no"])
def test_a_model_with_branches_and_methods_of_its_own_trains_on_two_ranks_as_on_one(
    tmp_path: Path, find: str | None
) -> None:
    ended = launch(BRANCHES, "--dir", tmp_path / "run", *(["--find", find] if find else []), processes=2)
    if find:
        assert ended.code == 1
        assert "Error: a parameter got no gradient in the step before" in ended.output
        assert "find_unused_parameters=True" in ended.output
        assert "Traceback" not in ended.output
        return
    assert ended.code == 0, ended.output
    assert ended.output.count("right.weight, right.bias, nowhere.weight and others got no gradient") == 1
    torch.manual_seed(0)
    left = one_rank.train(
        tmp_path / "alone", model=branches.Branches, samples=branches.Rows(), loss=branches.loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
        **{key: value for key, value in branches.OPTIONS.items() if key != "cpu"},
    )  # fmt: skip
    assert left.code == 0, left.error
    ours, alone = column(tmp_path / "run", "loss"), column(tmp_path / "alone", "loss")
    assert torch.tensor(ours).allclose(torch.tensor(alone), rtol=1e-5), (ours, alone)
    assert weights(tmp_path / "run")["nowhere.weight"] == weights(tmp_path / "alone")["nowhere.weight"]
