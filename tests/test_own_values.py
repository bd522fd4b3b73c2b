"""What each rank has for itself, in extras and in its modules' extra state: each gets its own back, or the first's."""

from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import one_rank
import pytest
import torch
import torch.distributed as dist
from support import event
from torch import nn

from trainer.checkpoint import extras, restore, writing
from trainer.checkpoint.state import State, StateError, apply, collect
from trainer.checkpoint.values import decode
from trainer.layout.manifest import Manifest, read_manifest
from trainer.layout.names import MANIFEST, STATE, RunPaths, list_checkpoints
from trainer.ranks.group import RankGroup

NAME = "0000000002-a0001-0000ff-1"
Seats = Callable[[Callable[[RankGroup], Any]], list[Any]]


@pytest.fixture
def on_two_ranks() -> Seats:
    """Does something on each of two ranks, threads of this process; its results by rank."""

    def on_both(work: Callable[[RankGroup], Any]) -> list[Any]:
        found: dict[int, Any] = {}
        store = dist.HashStore()

        def on_one(rank: int) -> None:
            group = RankGroup()
            group.rank, group.world_size = rank, 2
            group._control = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=30))
            found[rank] = work(group)

        threads = [threading.Thread(target=on_one, args=(rank,), daemon=True) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return [found[0], found[1]]

    return on_both


class Keeping(nn.Linear):
    """A module with extra state: any value."""

    def __init__(self, value: object = 0) -> None:
        super().__init__(4, 1)
        self.value = value

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, value: Any) -> None:
        self.value = value


def write(folder: Path, split: list[tuple[State, dict[str, torch.Tensor]]], **facts: object) -> None:
    """Commit a checkpoint of all ranks, what they share in the first one's share."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = split[0][0]
    files = {STATE: writing.write_state(folder, whole.plain)}
    for rank, (_, own) in enumerate(split):
        name = writing.share_name(rank)
        (folder / name).unlink(missing_ok=True)
        files[name] = writing.write_tensors(folder / name, {**(whole.tensors if rank == 0 else {}), **own})
    writing.write_manifest(folder, Manifest("checkpoint", files, {"step": 2, **facts}))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, io.BytesIO):
        return isinstance(other, io.BytesIO) and one.getvalue() == other.getvalue()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    return bool(one == other)


ALIKE = {"count": 1, "table": torch.ones(3)}
OTHERS = {
    "nothing": ALIKE,
    "a value": {**ALIKE, "count": 2},
    "an element": {**ALIKE, "table": torch.tensor([1.0, 2.0, 1.0])},
    "a shape": {**ALIKE, "table": torch.zeros(5)},
    "kinds": {"count": torch.zeros(2), "table": None},
    "a file": {**ALIKE, "count": io.BytesIO(b"fp8")},
}


@pytest.mark.parametrize("kind", ["extra", "module"])
@pytest.mark.parametrize("differs", OTHERS)
def test_each_rank_gets_its_own_values_back_and_with_other_ranks_all_get_the_firsts(
    tmp_path: Path, on_two_ranks: Seats, kind: str, differs: str
) -> None:
    values = [ALIKE, OTHERS[differs]]

    def state(value: object) -> tuple[nn.Module, State]:
        torch.manual_seed(0)
        model = Keeping(value if kind == "module" else 0)
        return model, collect(model, [], {}, {"tally": value} if kind == "extra" else {})

    split = on_two_ranks(lambda group: extras.split(group, state(values[group.rank])[1]))
    write(tmp_path / NAME, split)
    assert any(own for _, own in split) == (differs != "nothing")

    def get(rank: int, ranks: int) -> tuple[Any, list[str]]:
        model, live = state(values[rank])  # Of the same form, as a program makes it.
        loaded = restore.load(tmp_path / NAME, live, rank, ranks)
        tensors, plain, of_first = extras.joined(loaded.tensors, loaded.plain, rank, ranks, ranks_then=2)
        _, extra = apply(model, [], tensors, plain)
        return (extra["tally"] if kind == "extra" else model.value), of_first

    for rank in range(2):
        value, of_first = get(rank, 2)
        assert same(value, values[rank])
        assert not of_first
    for rank, ranks in ((0, 1), (1, 3)):
        value, of_first = get(rank, ranks)
        assert same(value, values[0])
        assert of_first == ([] if differs == "nothing" else ["extra" if kind == "extra" else "get_extra_state"])


def test_a_release_that_gives_each_rank_the_firsts_values_of_modules_refuses_them(on_two_ranks: Seats) -> None:
    split = on_two_ranks(lambda group: extras.split(group, collect(Keeping({"count": group.rank}), [], {})))
    with pytest.raises(StateError, match="unknown type"):
        decode(split[0][0].plain["modules"], split[0][0].tensors)


class Tally:
    def __init__(self) -> None:
        self.count, self.table = 0, torch.zeros(3)

    def state_dict(self) -> dict[str, object]:
        return {"count": self.count, "table": self.table}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.count, self.table = saved["count"], saved["table"]


def test_a_run_of_two_processes_goes_on_with_one_and_says_whose_values_it_has(
    tmp_path: Path, on_two_ranks: Seats, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, runs = tmp_path / "run", list[one_rank.InProcess]()
    tally, model = Tally(), Keeping({"count": 3, "table": torch.ones(2)})
    tally.count, tally.table = 5, torch.tensor([1.0, 2.0, 3.0])

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if runs[0].steps_done == 2 and not runs[0].notices.received.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
            runs[0].notices.received.wait(10)
        return one_rank.squares(model, batch)

    options: dict[str, Any] = {"model": lambda: model, "before": runs.append}
    assert one_rank.train(run_dir, loss=loss, extra={"tally": tally}, **options).code == 75
    paths = RunPaths(run_dir)
    for name in list_checkpoints(paths):  # As two processes would have saved it.
        folder = paths.checkpoint(name)
        facts = {**read_manifest(folder).facts, "world_size": 2}
        saved = restore.load(folder, collect(model, [], {}))
        firsts = State(saved.tensors, saved.plain, frozenset(), frozenset())
        other = {key: {"dict": [["tally", {"dict": [["count", 9]]}]]} for key in ("extra", "modules")}
        rest = {key: tensor for key, tensor in saved.tensors.items() if not key.startswith(("extra.", "module."))}
        states = firsts, replace(firsts, tensors=rest, plain={**saved.plain, **other})
        split = on_two_ranks(lambda group, states=states: extras.split(group, states[group.rank]))
        (folder / MANIFEST).unlink()
        (folder / STATE).unlink()
        write(folder, split, **facts)
    capsys.readouterr()
    tally, model = Tally(), Keeping({"count": 0, "table": torch.zeros(2)})
    left = one_rank.train(run_dir, extra={"tally": tally}, **options)
    assert left.code == 0, left.error
    assert event(run_dir, "restored")["rejected"] == []
    assert event(run_dir, "restored")["step"] > 0
    assert same(tally.state_dict(), {"count": 5, "table": torch.tensor([1.0, 2.0, 3.0])})
    assert same(model.value, {"count": 3, "table": torch.ones(2)})
    assert (
        "extra and get_extra_state: each process saved its own values, and the number of processes has changed; all "
        "processes now use those of rank 0"
    ) in capsys.readouterr().out


class Name(str):
    """Counts how often names are looked up."""

    hashed: ClassVar[list[None]] = []

    def __hash__(self) -> int:
        Name.hashed.append(None)
        return super().__hash__()


def test_the_work_of_a_save_grows_as_the_number_of_tensors_that_differ(on_two_ranks: Seats) -> None:
    def looks(count: int) -> int:
        def split(group: RankGroup) -> tuple[State, dict[str, torch.Tensor]]:
            tensors = {Name(f"extra.{number}"): torch.full((1,), group.rank) for number in range(count)}
            plain: dict[str, Any] = {"extra": {"dict": [["tally", None]]}, "modules": {"dict": []}}
            return extras.split(group, State(tensors, plain, frozenset(), frozenset()))

        Name.hashed.clear()
        assert [len(own) for _, own in on_two_ranks(split)] == [count, count]
        return len(Name.hashed)

    assert looks(400) < 2.2 * looks(200)
