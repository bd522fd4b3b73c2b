"""The sampler, seeded items and loader workers: the same samples and random numbers, whoever loads them."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import PROGRAMS, Ended, column, event, launch, losses
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset
from torch.utils.data.dataloader import _BaseDataLoaderIter
from torchdata.stateful_dataloader import StatefulDataLoader

from trainer.bucket.hashing import MASK
from trainer.errors import RunError
from trainer.machine import loader_workers
from trainer.training import progress, rng
from trainer.training.feed import Feed
from trainer.training.registered import Registered
from trainer.training.registrable import load_into, state_of
from trainer.training.sampler import MicroBatch, Place, RunSampler
from trainer.training.samples import Loader
from trainer.training.seeded_items import seeded_loader

SCRIPT = PROGRAMS / "sampled_loop.py"


class Noisy(Dataset[Any]):
    """Items that draw random numbers from all three generators."""

    def __init__(self, count: int = 22) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, torch.rand(()).item() + np.random.rand() + random.random()


class Prepared(DataLoader[Any]):
    """Like a loader of accelerate's."""

    __module__ = "accelerate.data_loader"


class Own(DataLoader[Any]):
    """A subclass as libraries have it: other arguments, the same batches."""

    def __init__(self, dataset: Dataset[Any], whole: int) -> None:
        super().__init__(dataset, batch_size=whole, shuffle=True)
        self.whole = whole


class DrawnAtOnce(Sampler[list[int]]):
    """Draws an epoch's batches in `__iter__` itself, which is no generator."""

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[list[int]]:
        return iter([ids.tolist() for ids in torch.randperm(22).split(4)])


class Drawing(Sampler[int]):
    """Draws each epoch's order from a generator of its own, of any kind."""

    def __init__(self, dice: Any) -> None:
        self._dice = dice

    def __len__(self) -> int:
        return 22

    def __iter__(self) -> Iterator[int]:
        ids = list(range(22))
        self._dice.shuffle(ids)
        return iter(ids)


class Counting(Sampler[int]):
    """Shuffles by the number of the epoch, which it counts itself."""

    def __init__(self) -> None:
        self.epoch = 0

    def __len__(self) -> int:
        return 22

    def __iter__(self) -> Iterator[int]:
        dice = torch.Generator().manual_seed(self.epoch)
        self.epoch += 1
        return iter(torch.randperm(22, generator=dice).tolist())


class Told(Counting):
    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Twice(Own):
    """Yields something else than DataLoader does."""

    def __iter__(self) -> Any:
        return (batch for batch in super().__iter__() for _ in range(2))


class Counted(Noisy):
    loaded = 0

    def __getitem__(self, index: int) -> tuple[int, float]:
        self.loaded += 1
        return index, torch.rand(()).item()


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(22))


class Sifted(IterableDataset[Any]):
    """Leaves items out at random."""

    def __iter__(self) -> Iterator[int]:
        return (number for number in range(44) if torch.rand(()) < 0.5)


class BatchByBatch(Sampler[list[int]]):
    """Draws each batch from the global random numbers when it is asked for."""

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[list[int]]:
        return (torch.randint(22, (4,)).tolist() for _ in range(6))


class Dicing(Noisy):
    """Items that draw from a generator of the data set's own."""

    def __init__(self) -> None:
        super().__init__()
        self.dice = torch.Generator().manual_seed(1)

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, torch.rand((), generator=self.dice).item()


def sampler(rank: int = 0, ranks: int = 1, count: int = 22, whole: int = 8, micro: int | None = 2, **more: Any) -> Any:
    options = {"seed": 3, "shuffle": True, "order": None, **more}
    return RunSampler(range(count), whole, micro, rank=rank, world_size=ranks, **options)


def steps(ranks: int, count: int, place: Place | None = None, **more: Any) -> list[list[MicroBatch]]:
    """The micro-batches of the first steps from all ranks, in their order."""
    found = []
    parts = [sampler(rank, ranks, **more) for rank in range(ranks)]
    streams = [part.micro_batches(place or Place()) for part in parts]
    for _ in range(count):
        step = [micro for stream, part in zip(streams, parts, strict=True) for micro in islice(stream, part.accumulate)]
        found.append(sorted(step, key=lambda micro: micro.first))
    return found


# -- the order ---------------------------------------------------------------------------------------------------------


def test_each_step_has_the_same_samples_and_seeds_on_any_number_of_ranks() -> None:
    one = steps(1, 9)
    assert steps(2, 9) == steps(4, 9) == one
    ids = [index for step in one for micro in step for index in micro.ids]
    assert [sorted(ids[at : at + 22]) for at in (0, 22, 44)] == [list(range(22))] * 3
    assert ids[:22] != ids[22:44]
    seeds = [seed for step in one for micro in step for seed in micro.seeds]
    assert len(set(seeds)) == len(seeds)


def test_a_resume_continues_where_the_last_step_ended() -> None:
    whole = steps(2, 9)
    for done in (1, 3, 8):  # The third step ends in the second epoch.
        assert steps(4, 9 - done, whole[done - 1][-1].after) == whole[done:]


def test_the_fingerprint_of_a_step_does_not_depend_on_how_it_is_cut() -> None:
    prints = [[sum(micro.fingerprint for micro in step) for step in steps(ranks, 5)] for ranks in (1, 4)]
    cut = [sum(micro.fingerprint for micro in step) & MASK for step in steps(1, 5, micro=None)]
    assert [value & MASK for value in prints[0]] == [value & MASK for value in prints[1]] == cut
    assert len(set(cut)) == 5
    swapped = [replace(micro, ids=micro.ids[::-1]) for micro in steps(1, 1)[0]]
    assert sum(micro.fingerprint for micro in swapped) & MASK != cut[0]


def test_unshuffled_weighted_and_growing_orders() -> None:
    plain = [index for step in steps(1, 3, shuffle=False) for micro in step for index in micro.ids]
    assert plain == [*range(22), 0, 1]

    def weighted(epoch: int) -> torch.Tensor:  # Draws from the global generator.
        return torch.multinomial(torch.arange(1.0, 23.0), 22, replacement=True)

    one = steps(1, 6, order=weighted)
    torch.rand(5)
    assert steps(2, 6, order=weighted) == one
    growing = steps(1, 4, order=lambda epoch: range(8 * min(2, epoch + 1)))
    assert [step[-1].after for step in growing] == [Place(0, 8), Place(1, 8), Place(1, 16), Place(2, 8)]


def test_the_same_sample_twice_in_an_epoch_gets_other_random_numbers() -> None:
    (step,) = steps(1, 1, order=lambda epoch: [5] * 8)
    assert len({seed for micro in step for seed in micro.seeds}) == 8


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"whole": 9, "ranks": 2}, "2 processes do not get equal numbers of whole batches"),
        ({"whole": 8, "ranks": 3}, "These numbers of processes do: 1, 2, 4"),
        ({"whole": 8, "micro": None, "ranks": 3}, "3 processes cannot share it equally"),
        ({"whole": 0}, "run.sampler(global_batch_size=0): give a number of samples"),
        ({"micro": 2.0}, "run.sampler(micro_batch_size=2.0): give a number of samples"),
        ({"count": 0}, "the data set is empty"),
    ],
)
def test_a_size_that_makes_no_sense_is_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError) as caught:
        sampler(**more)
    assert message in str(caught.value)


@pytest.mark.parametrize("order", [[], [22], [-1], [0.5], [[1, 2]]])
def test_an_order_that_is_no_list_of_ids_is_refused(order: Any) -> None:
    with pytest.raises(RunError, match="order\\(0\\)"):
        steps(1, 1, order=lambda epoch: order)


def test_a_stream_has_no_sampler() -> None:
    with pytest.raises(RunError, match="a Stream is not a map-style data set"):
        RunSampler(Stream(), 8, 2, seed=0, shuffle=True, order=None, rank=0, world_size=1)


# -- the feed: batches before and after a resume -----------------------------------------------------------------------


@dataclass
class Saved:
    """What a checkpoint holds of the data."""

    place: tuple[int, int, int]
    streams: torch.Tensor
    states: dict[str, Any]
    processes: int


@dataclass
class Fed:
    batches: list[Any]
    saved: Saved
    lines: list[str] = field(default_factory=list)


Make = Callable[[], tuple[Any, dict[str, Any]]]
"""Makes a loader, and what of it is registered."""


def feed(make: Make, count: int, saved: Saved | None = None, processes: int = 1) -> Fed:
    """Take so many batches in a new attempt, from a checkpoint on."""
    torch.manual_seed(1)
    loader, registered = make()
    contents, lines = Registered(True, {}), list[str]()
    contents.others = registered
    if saved:
        contents.data.epoch, contents.data.batches, contents.data.samples = saved.place
        for name, thing in registered.items():
            load_into(name, thing, saved.states[name])
        if saved.processes == processes:
            _place, contents.data.streams_at_restore, contents.data.epoch_streams, _ahead, *generators = rng.unpack(
                saved.streams
            )
            contents.data.epoch_generators = [state for state in generators if state is not None]
        else:
            contents.data.processes_then = saved.processes
    for thing in registered.values():
        state_of(thing)  # As a session does before the first step.
    torch.manual_seed(2)
    batches = []
    for batch in islice(Feed(loader, contents, processes, lines.append).epochs(), count):
        own = [torch.rand((), generator=one).item() for one in registered.values() if isinstance(one, torch.Generator)]
        batches.append((batch, (torch.rand(()).item(), *own)))  # What a step draws.
    states = {name: state_of(thing) for name, thing in registered.items()}
    place = (contents.data.epoch, contents.data.batches, contents.data.samples)
    return Fed(batches, Saved(place, contents.streams(), states, processes), lines)


def same(left: Any, right: Any) -> bool:
    return repr(left) == repr(right)


def fed_in_pieces(make: Make, pieces: list[int]) -> list[Any]:
    found, saved = [], None
    for count in pieces:
        part = feed(make, count, saved)
        found += part.batches
        saved = part.saved
    return found


def sampled(workers: int, kind: type[Noisy] = Noisy, **more: Any) -> Make:
    def make() -> tuple[Any, dict[str, Any]]:
        batches = RunSampler(kind(), 8, 4, seed=3, shuffle=True, order=None, rank=0, world_size=1)
        return DataLoader(kind(), batch_sampler=batches, num_workers=workers, **more), {}

    return make


def test_items_that_draw_random_numbers_are_the_same_with_any_number_of_workers_and_after_any_resume() -> None:
    whole = feed(sampled(0), 12).batches
    assert same(feed(sampled(2, persistent_workers=True), 12).batches, whole)
    assert same(fed_in_pieces(sampled(0), [2, 2, 4, 4]), whole)
    assert same(fed_in_pieces(sampled(2), [6, 6]), whole)
    draws = [drawn for (_, drawn), _ in whole]
    assert len({round(value, 9) for batch in draws for value in batch.tolist()}) == 48


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")  # torch's, where there is no accelerator.
@pytest.mark.parametrize("workers", [0, 1])
def test_a_sampler_works_with_pinned_memory(workers: int) -> None:
    pinned = sampled(workers, pin_memory=True)
    loader, _ = pinned()
    assert seeded_loader(loader, iter(())).pin_memory, "what loads the batches pins them"
    assert same(fed_in_pieces(pinned, [2, 4]), feed(sampled(0), 6).batches)


def test_without_seeds_of_their_own_items_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = feed(sampled(0), 6).batches
    monkeypatch.setattr(rng, "seed_host", lambda seed: None)
    assert not same(feed(sampled(0), 6).batches, whole)


def test_a_users_own_init_function_sees_its_own_data_set() -> None:
    def init(worker: int) -> None:
        torch.utils.data.get_worker_info().dataset.count = 100 + worker

    class Telling(Noisy):
        def __getitem__(self, index: int) -> tuple[int, float]:
            return self.count, 0.0

    batches = RunSampler(Noisy(), 4, 2, seed=3, shuffle=True, order=None, rank=0, world_size=1)
    loader = DataLoader(Telling(), batch_sampler=batches, num_workers=2, worker_init_fn=init)
    first, second = feed(lambda: (loader, {}), 2).batches
    assert [first[0][0].tolist(), second[0][0].tolist()] == [[100, 100], [101, 101]]


def test_a_data_set_that_loads_many_items_at_once_is_seeded_by_the_batch() -> None:
    class Many(Noisy):
        def __getitems__(self, ids: list[int]) -> list[tuple[int, float]]:
            return [self[index] for index in ids]

    def make() -> tuple[Any, dict[str, Any]]:
        batches = RunSampler(Many(), 8, 4, seed=3, shuffle=True, order=None, rank=0, world_size=1)
        return DataLoader(Many(), batch_sampler=batches), {}

    assert same(fed_in_pieces(make, [4, 4]), feed(make, 8).batches)


def test_a_step_that_is_left_in_its_middle_is_not_consumed() -> None:
    made = sampler(whole=8, micro=2)
    assert feed(lambda: (made, {}), 6).saved.place == (0, 0, 8)


def test_the_sampler_itself_as_a_loader_gives_ids() -> None:
    made = sampler(whole=4)
    assert [ids for ids, _ in feed(lambda: (made, {}), 2).batches] == [micro.ids for micro in steps(1, 1, whole=4)[0]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataLoader(Noisy(), sampler=sampler(), batch_size=None), "use run.sampler(...) in DataLoader("),
        (lambda: DataLoader(Noisy(), batch_sampler=torch.utils.data.BatchSampler(sampler(), 1, True)), "use run.samp"),
        (lambda: DataLoader(Noisy(), batch_sampler=sampler(), num_workers=1, in_order=False), "in_order=False"),
        (lambda: Prepared(Noisy(), batch_sampler=sampler()), "must not be given to accelerator.prepare()"),
    ],
)
def test_a_sampler_in_the_wrong_place_is_refused(make: Any, message: str) -> None:
    with pytest.raises(RunError) as caught:
        feed(lambda: (make(), {}), 1)
    assert message in str(caught.value)


def test_more_or_fewer_processes_without_the_sampler_continue_after_as_many_samples() -> None:
    class Plain(Noisy):
        def __getitem__(self, index: int) -> tuple[int, float]:
            return index, 0.0

    def make() -> tuple[Any, dict[str, Any]]:
        return DataLoader(Plain(), batch_size=2), {}

    saved = feed(make, 3, processes=2).saved  # 12 samples.
    fed = feed(make, 6, saved)
    assert [batch[0].tolist() for batch, _ in fed.batches][:5] == [[12, 13], [14, 15], [16, 17], [18, 19], [20, 21]]
    assert fed.saved.place == (1, 1, 2)
    assert fed.lines[0].startswith("2 processes consumed 12 samples of epoch 0; 1 continue after 6 batches each.")


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_registered_loader_on_other_processes_is_refused() -> None:
    def make() -> tuple[Any, dict[str, Any]]:
        loader = StatefulDataLoader(Noisy(), batch_size=2)
        return loader, {"loader": loader}

    saved = feed(make, 3, processes=2).saved
    with pytest.raises(
        RunError, match=r"which 2 processes saved, and which does not fit 1\. Start 2, or use run\.sampler"
    ):
        feed(make, 1, saved)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_keeps_the_place_of_the_consumed_batch(workers: int) -> None:
    class Plain(Noisy):
        def __getitem__(self, index: int) -> tuple[int, float]:
            return index, 0.0

    def make() -> tuple[Any, dict[str, Any]]:
        loader = StatefulDataLoader(Plain(), batch_size=4, shuffle=True, num_workers=workers)
        return loader, {"loader": loader}

    # 6 batches an epoch: three resumes within one, at its end, within the second, and after it.
    assert same(fed_in_pieces(make, [1, 2, 2, 1, 2, 5, 3]), feed(make, 16).batches)


def hub_stream(buffer: int = 0) -> Any:
    import datasets

    def rows(shards: list[int]) -> Iterator[dict[str, int]]:
        for shard in shards:
            yield from ({"id": 10 * shard + number} for number in range(5))

    stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1, 2, 3]})
    return stream.shuffle(seed=3, buffer_size=buffer) if buffer else stream


def test_a_stream_of_the_hub_keeps_the_place_of_the_consumed_batch() -> None:
    def make() -> tuple[Any, dict[str, Any]]:
        stream = hub_stream()
        return DataLoader(stream, batch_size=4), {"data": stream}

    # 5 batches an epoch.
    assert same(fed_in_pieces(make, [1, 1, 2, 1, 6, 3]), feed(make, 14).batches)


def test_a_stream_of_the_hub_read_by_workers_is_refused() -> None:
    stream = hub_stream()
    with pytest.raises(RunError, match=r"register\(data=...\): the loader's workers read copies"):
        feed(lambda: (DataLoader(stream, batch_size=4, num_workers=2), {"data": stream}), 1)


def test_a_shuffle_buffer_is_named() -> None:
    stream = hub_stream(buffer=6).map(lambda row: row)
    fed = feed(lambda: (DataLoader(stream, batch_size=4), {"data": stream}), 1)
    assert fed.lines[0].startswith("data has a shuffle buffer, and its state_dict() does not hold")
    whole = hub_stream()
    assert not feed(lambda: (DataLoader(whole, batch_size=4), {"data": whole}), 1).lines


def test_a_stream_with_a_shuffle_buffer_that_is_not_registered_is_read_again() -> None:
    def make() -> tuple[Any, dict[str, Any]]:
        return DataLoader(hub_stream(buffer=6), batch_size=4), {}

    assert same(fed_in_pieces(make, [2, 1, 5]), feed(make, 8).batches)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_reading_again_is_shown_by_lines_or_a_bar(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "REREADING_S", 0.0)
    monkeypatch.setenv("SKYSPOT_TTY", str(int(is_terminal)))
    saved = feed(lambda: (DataLoader(Stream(), batch_size=2), {}), 3).saved
    lines = feed(lambda: (DataLoader(Stream(), batch_size=2), {}), 1, saved).lines
    hint = "A map-style data set, or a loader with state_dict that is registered, needs no second reading"
    said = [f"reading the consumed batches of epoch 0 again: {done} of 3. {hint}" for done in (1, 2, 3)]
    shown = capsys.readouterr().out
    if is_terminal:
        assert lines == said[:1], "the hint comes once"
        assert "reading again 0/3 |" in shown
    else:
        assert lines == said
        assert not shown


@pytest.mark.parametrize(("kind", "loaded"), [(Own, 6), (Twice, 12)])
def test_a_loader_of_a_class_of_ones_own_is_fast_forwarded_unless_it_iterates_by_itself(
    kind: type[Own], loaded: int
) -> None:
    made = list[Counted]()

    def make() -> tuple[Any, dict[str, Any]]:
        made.append(Counted())
        return kind(made[-1], 4), {}

    whole, before = feed(make, 6).batches, feed(make, 4)
    assert same(before.batches + feed(make, 2, before.saved).batches, whole)
    assert made[-1].loaded == loaded


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}])
@pytest.mark.parametrize("order", [{"shuffle": True, "batch_size": 4}, {"batch_sampler": DrawnAtOnce()}])
def test_an_order_that_is_drawn_beside_the_steps_is_the_same_after_any_resume(
    monkeypatch: pytest.MonkeyPatch, workers: dict[str, Any], order: dict[str, Any]
) -> None:
    monkeypatch.setattr(_BaseDataLoaderIter, "_reset", _BaseDataLoaderIter._reset)  # Undoes the next line.
    loader_workers.seed_each_epoch()

    def make() -> tuple[Any, dict[str, Any]]:
        return DataLoader(TensorDataset(torch.arange(22)), **workers, **order), {}

    # 6 batches an epoch: resumes within the first, within the second, and at the end of the third.
    assert same(fed_in_pieces(make, [3, 5, 10, 2]), feed(make, 20).batches)


def test_a_registered_generator_may_draw_both_the_order_and_what_the_loop_needs() -> None:
    def make() -> tuple[Any, dict[str, Any]]:
        dice = torch.Generator().manual_seed(3)
        return DataLoader(TensorDataset(torch.arange(22)), 4, shuffle=True, generator=dice), {"dice": dice}

    assert same(fed_in_pieces(make, [3, 3, 2, 8]), feed(make, 16).batches)


@pytest.mark.parametrize(
    "dice",
    [
        lambda: random.Random(3),
        lambda: np.random.RandomState(3),
        *(
            lambda kind=kind: np.random.Generator(kind(3))
            for kind in (np.random.PCG64, np.random.MT19937, np.random.Philox)
        ),
    ],
)
def test_a_sampler_with_a_generator_of_its_own_draws_the_same_order_after_any_resume(dice: Callable[[], Any]) -> None:
    def make() -> tuple[Any, dict[str, Any]]:
        return DataLoader(TensorDataset(torch.arange(22)), 4, sampler=Drawing(dice())), {}

    assert same(fed_in_pieces(make, [3, 5, 4, 4]), feed(make, 16).batches)


def test_a_sampler_that_counts_epochs_itself_is_named_once_and_one_that_is_told_them_is_exact() -> None:
    def make(order: Sampler[int]) -> Make:
        return lambda: (DataLoader(TensorDataset(torch.arange(22)), 4, sampler=order), {})

    (line,) = feed(make(Counting()), 20).lines
    assert line.startswith("Counting.epoch counts epochs and is not saved: after a resume it begins with its first val")
    whole = feed(make(Told()), 20)
    assert not whole.lines
    assert same(fed_in_pieces(lambda: make(Told())(), [8, 12]), whole.batches)


def shared_with_the_loop() -> tuple[Any, dict[str, Any]]:
    dice = torch.Generator().manual_seed(3)
    items = TensorDataset(torch.arange(22))
    return DataLoader(items, 4, shuffle=True, generator=dice, num_workers=1), {"dice": dice}


def registered_buffer() -> tuple[Any, dict[str, Any]]:
    stream = hub_stream(buffer=6)
    return DataLoader(stream, batch_size=4), {"data": stream}


EXCEPTED: dict[str, Make] = {
    "loader workers draw": lambda: (DataLoader(Noisy(), 4, num_workers=1), {}),
    "an IterableDataset draws": lambda: (DataLoader(Sifted(), 4), {}),
    "a sampler counts epochs": lambda: (DataLoader(TensorDataset(torch.arange(22)), 4, sampler=Counting()), {}),
    "a registered shuffle buffer": registered_buffer,
    "a sampler draws batch by batch, and workers": lambda: (
        DataLoader(TensorDataset(torch.arange(22)), batch_sampler=BatchByBatch(), num_workers=1),
        {},
    ),
    "a generator of loop and loader, and workers": shared_with_the_loop,
    "a data set with a generator of its own": sampled(0, Dicing),
}


@pytest.mark.parametrize("name", EXCEPTED)
def test_what_the_table_of_guarantees_excepts_is_not_exact(name: str) -> None:
    """Its footnotes name them; the resume is in the second epoch."""
    make = EXCEPTED[name]
    assert not same(fed_in_pieces(make, [8, 4]), feed(make, 12).batches), "it is exact: the footnote can go"


def drawn(rank: int, ranks: int, asked: list[int]) -> dict[tuple[int, int], list[float]]:
    """What the micro-steps of the trainer's own loop drew, by (step, micro-step)."""

    class Drawing:
        def __len__(self) -> int:
            return 22

        def batch(self, ids: Any) -> Any:
            return [Noisy()[index][1] for index in ids]

        def weight(self, batch: Any) -> float:
            return len(batch)

    config = SimpleNamespace(seed=3, global_batch_size=8)
    loader = Loader(Drawing(), SimpleNamespace(config=config, offset=0, micro_batch_size=2), rank, ranks)  # type: ignore[arg-type]
    return {(step, micro.index): micro.batch for step in asked for micro in loader.fetch(step)}


def test_samples_of_the_trainers_own_loop_that_draw_random_numbers_are_the_same_on_any_rank_and_after_a_resume() -> (
    None
):
    torch.manual_seed(1)
    whole, before = drawn(0, 1, [0, 1, 2]), torch.get_rng_state()
    torch.rand(3)
    assert drawn(0, 2, [1, 2]) | drawn(1, 2, [1, 2]) == {key: value for key, value in whole.items() if key[0]}
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before), "the program's own streams stay"


# -- signals and workers -----------------------------------------------------------------------------------------------

SIGNALLED = """
import multiprocessing, os, signal, subprocess, sys
import torch
from torch.utils.data import DataLoader, TensorDataset
from trainer.machine import loader_workers

if sys.argv[1] == "protected":
    loader_workers.protect_all()
    loader_workers.protect_all()
signal.signal(signal.SIGTERM, lambda *_: None)
multiprocessing.set_start_method(sys.argv[2])
batches = iter(DataLoader(TensorDataset(torch.arange(40)), batch_size=2, num_workers=2))
for _ in range(2):
    next(batches)  # Of each worker one: both are up.
workers = batches._workers
if sys.argv[1] == "plain":
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # The loader's own handler would raise wherever this process is.
subprocess.run(["kill", *(str(worker.pid) for worker in workers), str(os.getpid())], check=True)
if sys.argv[1] == "plain":
    for worker in workers:
        worker.join()
    sys.exit(f"ended: {[worker.exitcode for worker in workers]}")
left = len(list(batches))
again = iter(DataLoader(TensorDataset(torch.arange(40)), batch_size=2, num_workers=2))
next(again)
print(left, flush=True)  # Alive workers are ended by the exit of this process.
"""


@pytest.mark.slow
@pytest.mark.parametrize(("protected", "method"), [(True, "fork"), (False, "fork")])
def test_a_signal_to_all_processes_does_not_end_a_loaders_workers(protected: bool, method: str) -> None:
    command = [sys.executable, "-c", SIGNALLED, "protected" if protected else "plain", method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, start_new_session=True)
    assert (done.returncode == 0) is protected, done.stdout + done.stderr
    assert ("ended: [-15, -15]" in done.stderr) is not protected, done.stderr


# -- whole attempts ----------------------------------------------------------------------------------------------------


def own(run_dir: Path, *args: object, processes: int = 1) -> Ended:
    ended = launch(SCRIPT, "--dir", run_dir, *args, processes=processes)
    assert "Traceback" not in ended.output, ended.output
    return ended


def test_a_run_with_workers_stopped_by_a_signal_to_all_continues_on_two_processes_with_the_same_samples(
    tmp_path: Path,
) -> None:
    assert own(tmp_path / "whole").code == 0
    stopped = own(tmp_path / "run", "--workers", 2, "--strike", 5)
    assert stopped.code == 75, stopped.output
    assert event(tmp_path / "run", "end")["committed_step"] == 5
    assert losses(tmp_path / "run") == {step: loss for step, loss in losses(tmp_path / "whole").items() if step <= 5}
    done = own(tmp_path / "run", "--workers", 1, processes=2)
    assert done.code == 0, done.output
    for key in ("order", "drawn"):
        assert column(tmp_path / "run", key) == column(tmp_path / "whole", key), key
    world_sizes = column(tmp_path / "run", "world_size")
    assert world_sizes == [1] * 5 + [2] * (len(world_sizes) - 5), "it went on where it was"
    assert len(world_sizes) > 5
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    refused = own(tmp_path / "run", "--until", 10, "--global-batch-size", 16)
    assert refused.code == 1
    assert "this run was started with global_batch_size=8, not global_batch_size=16" in refused.output
