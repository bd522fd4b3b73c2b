"""Feed: the batches of a user's loader, epoch after epoch, from the batch at which a checkpoint was saved.

With a sampler of ours, it begins at the sample at which the checkpoint was saved. A `DataLoader` over a map-style data
set with another sampler is fast-forwarded by the sampler's indices, drawn again under the random streams with which the
epoch began; no skipped sample is loaded. So is a subclass with `DataLoader`'s own `__iter__`. Anything else is read
again, unless it is registered: then it keeps its place. A loader that accelerate has prepared is one of the last two
(accelerate_loader.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from torch.utils.data import DataLoader

from trainer.bucket.hashing import MASK
from trainer.errors import RunError
from trainer.training import accelerate_loader, generators, rng, stateful_loaders
from trainer.training.data_place import DataPlace
from trainer.training.progress import Rereading
from trainer.training.registered import Registered
from trainer.training.sampler import MicroBatch, Place, RunSampler
from trainer.training.seeded_items import seeded_loader
from trainer.training.skipping import can_skip, skipping


class Feed:
    """Yields batches, and keeps in the contents which of them are consumed (`DataPlace`)."""

    def __init__(
        self,
        loader: Iterable[Any],
        contents: Registered,
        processes: int,
        print_line: Callable[[str], None],
        keeps_its_place: bool | None = None,
    ) -> None:
        """Look at the loader.

        Args:
            loader: As it is given to `SpotRun.steps`.
            contents: What is registered, and the run's place in its data.
            processes: How many processes there are.
            print_line: Prints a line, on rank 0.
            keeps_its_place: The loader restores its own position; None: if it or its data set is registered.

        Raises:
            RunError: the loader cannot resume, or uses a sampler of ours in a way in which it does not work.
        """
        self._loader, self._contents, self._processes, self._print_line = loader, contents, processes, print_line
        self._data = contents.data
        self.sampler = sampler_of(loader)
        """Ours, if the loader has one."""
        self.order = 0
        """The fingerprint of the samples that this rank has got in the step, if the loader has a sampler of ours."""
        if keeps_its_place is None:
            keeps_its_place = stateful_loaders.keeps_its_place(loader, contents.others, print_line)
        self._keeps_its_place = keeps_its_place
        self.is_shared_anew = False
        """The epoch was begun by more or fewer processes."""
        self._is_prepared = accelerate_loader.is_prepared(loader) and not self._keeps_its_place
        self._rereading = Rereading(print_line)
        self._counted: dict[str, int] | None = None if self._keeps_its_place else {}
        """What samplers and the data set counted when the epoch before began; None once one is named."""

    def epochs(self) -> Iterator[Any]:
        """Yield batch after batch, for ever.

        Raises:
            RunError: an epoch has no batch.
        """
        if self.sampler:
            yield from self._sampled(self.sampler)
        data = self._data
        each = self.samples_of_a_batch()
        self.share_anew()
        while True:
            count = 0
            for batch in self.epoch():
                count += 1
                data.batches += 1
                data.samples += each
                yield batch
            if not count and not data.batches:
                raise RunError(
                    f"steps(loader): a {type(self._loader).__name__} can be read only once. Give the loader itself, "
                    "or an object whose __iter__ begins anew"
                    if iter(self._loader) is self._loader
                    else "steps(loader): the loader has no batch. Check the length of the data set, and drop_last "
                    "where it is shorter than a batch"
                )
            data.epoch += 1
            data.batches, data.samples, data.is_last = 0, 0, False

    def samples_of_a_batch(self) -> int:
        """The samples of one batch of each process together; the loader's batches, where it tells no size."""
        with suppress(AttributeError, TypeError):
            return int(self._loader.total_batch_size)  # type: ignore[attr-defined]  # Of a prepared loader.
        return (getattr(self._loader, "batch_size", None) or 1) * self._processes

    def _sampled(self, sampler: RunSampler) -> Iterator[Any]:
        """Yield the batches of our sampler, for ever."""
        data = self._data
        sampler.place = place = Place(data.epoch, data.samples)
        with rng.set_aside():  # A DataLoader draws a seed for its workers.
            iterator = self._batches(sampler.micro_batches(place))
        if data.streams_at_restore is not None:
            rng.load_streams(data.streams_at_restore)
        data.streams_at_restore = data.epoch_streams = data.processes_then = None
        for count, micro in enumerate(sampler.micro_batches(place)):
            batch = next(iterator)
            number = count % sampler.accumulate
            self.order = ((self.order if number else 0) + micro.fingerprint) & MASK
            if number == sampler.accumulate - 1:  # Steps are consumed whole.
                data.epoch, data.samples, data.batches = micro.after.epoch, micro.after.taken, 0
            yield batch

    def _batches(self, micro_batches: Iterator[MicroBatch]) -> Iterator[Any]:
        """What the loop gets: the loader's batches, or the samples' ids where the sampler itself is the loader."""
        if isinstance(self._loader, DataLoader):
            return iter(seeded_loader(self._loader, micro_batches))
        return (micro.ids for micro in micro_batches)

    def share_anew(self, accumulate: int = 1) -> bool:
        """After a checkpoint of more or fewer processes: continue after as many samples of the epoch.

        Args:
            accumulate: Batches of a step, where a resume has to begin with the first one of a step.

        Returns:
            True if it was such a checkpoint, saved within an epoch.

        Raises:
            RunError: the loader keeps its own position, which is one of another number of processes.
        """
        data, then, each = self._data, self._data.processes_then, self.samples_of_a_batch()
        data.processes_then = None
        if then is None or not data.batches:
            return False
        is_own = self._contents.loop == "steps"  # run.sampler() is not for a framework's loop.
        if self._keeps_its_place:
            remedy = ", or use run.sampler(), which fits any number" if is_own else ", or use a plain DataLoader"
            raise RunError(
                f"the loader keeps its own position within its epoch, which {then} processes saved, and which does not "
                f"fit {self._processes}. Start {then}{remedy}"
            )
        data.batches = data.samples // each // accumulate * accumulate
        hint = ". run.sampler() keeps the order on any number of processes" if is_own else ""
        self._print_line(
            f"{then} processes consumed {data.samples} samples of epoch {data.epoch}; {self._processes} "
            f"continue after {data.batches} batches each. Random numbers are new, and samples may come twice or "
            f"not at all in this epoch{hint}"
        )
        data.samples, self.is_shared_anew = data.batches * each, data.batches > 0
        return True

    def epoch(self) -> Iterator[Any]:
        """Yield the batches of the epoch that are not consumed yet."""
        data, restored = self._data, self._data.streams_at_restore
        data.streams_at_restore = None
        self._set_epoch(data.epoch)
        self._name_counters()
        skip = data.batches if restored is not None or self.is_shared_anew else 0
        self.is_shared_anew = False

        shared = self._shared_generators()
        kept = [generators.save(one) for one in shared]

        def then() -> None:
            if restored is not None:
                rng.load_streams(restored)
                for generator, state in zip(shared, kept, strict=True):
                    generators.load(generator, state)

        if not skip:
            then()
            data.epoch_streams = rng.save_streams()
            data.epoch_generators = [generators.save(one) for one in self._generators()]
            yield from self._prepared(None) if self._is_prepared else self._loader
            return
        if restored is None:
            data.epoch_streams = rng.save_streams()
        elif data.epoch_streams is not None:
            rng.load_streams(data.epoch_streams)
        if self._keeps_its_place:  # Its generators are where they were, too.
            iterator = iter(self._loader)  # It draws a seed for its workers.
            then()
            yield from iterator
            return
        for generator, state in zip(self._generators(), data.epoch_generators, strict=False):
            generators.load(generator, state)
        if self._is_prepared:
            now = rng.save_streams() if restored is None else restored
            yield from self._prepared(accelerate_loader.Place(skip, data.is_last, data.ahead_at_restore, now))
        elif can_skip(self._loader):
            yield from skipping(self._loader, skip, then)
        else:
            yield from self._read_again(skip, then)

    def go_back(self, place: DataPlace) -> bool:
        """Be at a place at which a batch was asked for that did not come; False if that cannot be done.

        A loader with workers draws nothing from the program's streams here, but at the beginning of an epoch.
        """
        data = self._data
        if not self.sampler and (data.epoch != place.epoch or not place.batches):
            if self._keeps_its_place or data.epoch_streams is None:
                return False
            rng.load_streams(data.epoch_streams)
            for generator, state in zip(self._generators(), data.epoch_generators, strict=True):
                generators.load(generator, state)
        vars(data).update(vars(place))
        return True

    def _prepared(self, place: accelerate_loader.Place | None) -> Iterator[Any]:
        """The batches of a loader that accelerate has accelerate_loader."""
        loader, data = self._loader, self._data

        def reads(ahead: rng.Streams) -> None:
            data.ahead = ahead

        for batch in accelerate_loader.batches(loader, place, reads, self._report):
            data.is_last = bool(loader.end_of_dataloader)  # type: ignore[attr-defined]
            yield batch

    def _read_again(self, skip: int, then: Callable[[], None]) -> Iterator[Any]:
        """Read the consumed batches once more, and yield the rest."""
        iterator = iter(self._loader)
        for number in range(skip):
            if next(iterator, self) is self:
                break  # The source has become shorter.
            self._report(number + 1, skip)
        then()
        yield from iterator

    def _name_counters(self) -> None:
        """Name a sampler that counts epochs itself: after a resume it begins with the order of the first one."""
        if self._counted is None:
            return
        parts = [part for part in self._parts() if not (hasattr(part, "set_epoch") or hasattr(part, "state_dict"))]
        found = [(type(part), name, value) for part in parts for name, value in getattr(part, "__dict__", {}).items()]
        # By name: another number may be a position, which begins anew in each epoch.
        now = {
            f"{kind.__name__}.{name}": value for kind, name, value in found if "epoch" in name and type(value) is int
        }
        changed = [name for name, value in now.items() if self._counted.get(name, value) != value]
        self._counted = None if changed else now
        if changed:
            self._print_line(
                f"{changed[0]} counts epochs and is not saved: after a resume it begins with its first value. Give its "
                "class set_epoch(epoch), which is called in each epoch"
            )

    def _report(self, done: int, count: int) -> None:
        """Show how many consumed batches are read again."""
        self._rereading.step(self._data.epoch, done, count)

    def _parts(self) -> list[Any]:
        """The loader, its samplers, those inside them, and its data set, as far as it has them."""
        parts = [self._loader]
        for part in parts:  # It grows meanwhile.
            inner = (getattr(part, name, None) for name in ("sampler", "batch_sampler"))
            parts += [one for one in inner if one is not None and not any(one is known for known in parts)]
        return [*parts, getattr(self._loader, "dataset", None)]

    def _generators(self) -> list[generators.Generator]:
        """The generators that draw the order, if the loader has its own."""
        return generators.held_by(self._parts()[:-1])

    def _shared_generators(self) -> list[generators.Generator]:
        """Those that are registered, because the loop draws from them too.

        With workers, the order is drawn ahead of the loop: then a registered state is not that of the order.
        """
        if getattr(self._loader, "num_workers", 0):
            return []
        registered = self._contents.others.values()
        return [one for one in self._generators() if any(one is thing for thing in registered)]

    def _set_epoch(self, epoch: int) -> None:
        """Tell the sampler or data set the epoch, as DistributedSampler and IterableDatasets of a Hub want it."""
        for part in self._parts():
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)
                return


def sampler_of(loader: Iterable[Any]) -> RunSampler | None:
    """The loader's sampler, if it is ours.

    Raises:
        RunError: the loader uses it in a way in which it does not work.
    """
    if isinstance(loader, RunSampler):
        return loader
    inner = getattr(loader, "batch_sampler", None)
    uses = [loader, inner, *(getattr(part, name, None) for part in (loader, inner) for name in _INNER)]
    found = next((part for part in uses if isinstance(part, RunSampler)), None)
    if found is None:
        return None
    if type(loader).__module__.startswith("accelerate."):
        raise RunError(
            "steps(loader): run.sampler() gives each process its own samples, so the loader must not be given to "
            "accelerator.prepare(). Move each batch to accelerator.device"
        )
    if found is not inner or not isinstance(loader, DataLoader):
        raise RunError("steps(loader): use run.sampler(...) in DataLoader(dataset, batch_sampler=run.sampler(...))")
    if not getattr(loader, "in_order", True):
        raise RunError("steps(loader): with in_order=False, the order of the samples is not fixed. Use in_order=True")
    return found


_INNER = ("sampler", "batch_sampler", "base_dataloader")
"""Where samplers and loaders hold others."""
