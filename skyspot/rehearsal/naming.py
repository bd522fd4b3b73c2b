"""What a file's name tells: its kind, the number of the save it belongs to, and whether it looks like a checkpoint."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import pairwise

_VARYING = re.compile(
    r"(?P<random>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"  # a UUID
    r"|(?<![a-z0-9])tmp[a-z0-9_]{6,}(?![a-z0-9_])"  # tempfile's names
    r"|(?<![a-z0-9])(?![a-f]\d+(?![a-z0-9]))(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{6,}(?![a-z0-9]))"  # a hash
    r"|(?P<number>\d+)",
    re.IGNORECASE,
)
ANY = "[A-Za-z0-9_-]+"
"""A regular expression of what a number or a random part may be in the file of another save."""
_WORD = re.compile(r"([A-Za-z][A-Za-z_]*?)[-_=.\s]*$")
_COUNTERS = {
    *("step", "steps", "iter", "iteration", "iterations", "epoch", "ep", "ckpt", "checkpoint", "update", "updates"),
    *("batch", "round", "gen", "generation", "it", "save", "snapshot", "e", "s"),
}
_STEPS = {"step", "steps", "iter", "iteration", "iterations", "update", "updates", "checkpoint", "ckpt"}
_SHARDS = {
    *("of", "rank", "shard", "share", "part", "worker", "proc", "process", "tp", "pp", "dp", "gpu", "node", "size"),
    *("world", "split", "chunk", "rng_state"),
}
_PIECES = {"shard", "share", "part", "split", "chunk"}
ENOUGH_PIECES = 4
"""Fewer numbered parts are rather those of one save."""
_CALLED = re.compile(
    r"ckpt|checkpoint|(?<![a-z])(state|model|weights|snapshot|latest|last|resume|params|optim)", re.IGNORECASE
)
_CHECKPOINTS = re.compile(
    r"\.(pt|pth|ckpt|safetensors|npz|npy|pkl|pickle|bin|h5|hdf5|msgpack|distcp|keras|weights|tar|joblib|state|dat|"
    rf"sqlite3?|db)$|{_CALLED.pattern}",
    re.IGNORECASE,
)
_LOGS = re.compile(
    r"(^|/)(wandb|mlruns|tensorboard|trackio|\.aim)/|tfevents|\.(log|out|err|jsonl|ndjson|wandb)(\.\d+)?$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Name:
    """A path, taken apart."""

    path: str
    kind: str
    """The path with every number and random part replaced by `#`: files of one kind differ in these alone."""
    numbers: tuple[int | None, ...]
    """What stands at each `#`; None: a random part."""
    words: tuple[str, ...]
    """The word before each `#`, in lower case; may be empty."""
    shards: tuple[bool, ...]
    """True if the number at each `#` counts the parts of one save: a rank, a shard."""
    folders: int
    """How many of them are in the names of folders."""


def parse(path: str) -> Name:
    """Take a path apart."""
    numbers: list[int | None] = []
    words, shards, folders, end = [], [], 0, 0
    for found in _VARYING.finditer(path):
        before = path[max(end, path.rfind("/", 0, found.start()) + 1) : found.start()]
        named = _WORD.search(before)
        word = named[1].lower() if named else ""
        numbers.append(int(found["number"]) if found["number"] else None)
        words.append(word.rpartition("_")[2] if word != "rng_state" else word)
        of = path.startswith("-of-", found.end()) or path.startswith("_of_", found.end())
        in_folder = "/" in path[found.end() :]
        shards.append(of or words[-1] in _SHARDS or (path.endswith(".distcp") and not in_folder))
        folders += in_folder
        end = found.end()
    return Name(path, _VARYING.sub("#", path), tuple(numbers), tuple(words), tuple(shards), folders)


def kind_in_a_save(path: str) -> str:
    """The kind of a file within its save, by its name alone: only numbers that may tell the save are replaced by `#`.

    Those are the counters (`step_9/layer_0` gives `step_#/layer_0`), or without any all but those of a rank or shard.
    """
    name = parse(path)
    tells = [not shard and word in _COUNTERS for word, shard in zip(name.words, name.shards, strict=True)]
    if not any(tells):
        tells = [not shard for shard in name.shards]
    stays = ["#" if told else part for part, told in zip(spelled(path), tells, strict=True)]
    return "".join(part + stay for part, stay in zip(name.kind.split("#"), [*stays, ""], strict=True))


def spelled(path: str) -> list[str]:
    """What stands at each `#` of the path's kind, as it is spelled."""
    return [found[0] for found in _VARYING.finditer(path)]


def label_places(names: Sequence[Name]) -> tuple[int, ...]:
    """Which numbers of a kind's names tell the save: those that change over the run and never go down.

    Several if the first does not tell enough (`fold_0/epoch_3.pt`). Empty: none does.

    Args:
        names: The names of files of one kind, in the order in which an undisturbed run began to write them.
    """
    if not names:
        return ()
    first = names[0]
    counted_folder = any(
        word in _COUNTERS and not shard
        for word, shard in zip(first.words[: first.folders], first.shards[: first.folders], strict=True)
    )
    chosen: tuple[int, ...] = ()
    for place in range(len(first.numbers)):
        counter = first.words[place] in _COUNTERS
        if first.shards[place] or (not counter and (chosen or (counted_folder and place >= first.folders))):
            continue
        values = [name.numbers[place] for name in names]
        if None not in values and len(set(values)) > 1 and _never_down(names, (*chosen, place)):
            chosen = (*chosen, place)
    if chosen and not any(first.words[place] in _COUNTERS for place in chosen):
        chosen = _to_the_second(names, chosen)
    chosen = chosen or _pieces(names)
    if not chosen:  # Of the only save, its name tells the step all the same.
        for place, word in enumerate(first.words):
            values = [name.numbers[place] for name in names]
            if word in _COUNTERS and not first.shards[place] and None not in values and len(set(values)) == 1:
                return (place,)
    return chosen


def _to_the_second(names: Sequence[Name], chosen: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers of a time of day (`01-42-38`), of which `chosen` has the first that changes, the minute.

    The parts of one save have the same numbers in each save; a second does not.
    """
    for place in range(chosen[-1] + 1, len(names[0].numbers)):
        found: dict[tuple[int, ...], set[int | None]] = {}
        for name in names:
            found.setdefault(at(name.numbers, chosen), set()).add(name.numbers[place])
        usual = max(Counter(map(frozenset, found.values())).values())
        several = any(len(values) > 1 for values in found.values())
        told = not names[0].shards[place] and not any(None in values for values in found.values())
        if told and several and 2 * usual <= len(found) and _never_down(names, (*chosen, place)):
            chosen = (*chosen, place)
    return chosen


def _pieces(names: Sequence[Name]) -> tuple[int, ...]:
    """The number that tells the pieces of a run's output, each written once and in turn: `shard_0007`."""
    for place, word in enumerate(names[0].words):
        values = [number for name in names if (number := name.numbers[place]) is not None]
        in_turn = len(values) == len(names) and all(after > before for before, after in pairwise(values))
        if word in _PIECES and not names[0].path.endswith(".distcp") and in_turn and len(values) >= ENOUGH_PIECES:
            return (place,)
    return ()


def _never_down(names: Sequence[Name], places: tuple[int, ...]) -> bool:
    """True if the numbers grow, for the files of each rank."""
    newest: dict[tuple[int | None, ...], list[int]] = {}
    for name in names:
        rank = tuple(number for number, shard in zip(name.numbers, name.shards, strict=True) if shard)
        values = [number or 0 for number in at(name.numbers, places)]
        if values < newest.get(rank, values):
            return False
        newest[rank] = values
    return True


def at(numbers: tuple[int | None, ...], places: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers at some places; -1 where a name has none."""
    return tuple(-1 if place >= len(numbers) or (found := numbers[place]) is None else found for place in places)


def label(name: Name, places: tuple[int, ...]) -> str:
    """Say a save's number as its files' names do: `step 10`, `epoch 3, step 120`, `40`."""
    return ", ".join(f"{name.words[place]} {name.numbers[place]}".strip() for place in places)


def step(name: Name, places: tuple[int, ...]) -> int | None:
    """The step in a name; None if the number counts something else, or nothing tells what."""
    for place in reversed(places):
        if name.words[place] in _STEPS:
            return name.numbers[place]
    return None


def looks_like_checkpoint(path: str) -> bool:
    """True if the name is one that savers give to checkpoints."""
    return bool(_CHECKPOINTS.search(path)) and not looks_like_log(path)


def is_called_checkpoint(path: str) -> bool:
    """True if a word in the name says so, not its suffix alone: `model.zip`, not `evaluations.npz`."""
    return bool(_CALLED.search(path)) and not looks_like_log(path)


def is_best(path: str) -> bool:
    """True if the name is one that savers give to the best checkpoint so far."""
    return "best" in path.lower()


def looks_like_log(path: str) -> bool:
    """True if the name is one that loggers give to their files."""
    return bool(_LOGS.search(path))


def matches(path: str, globs: Sequence[str]) -> bool:
    """True if a path matches one of the globs, or lies in a folder that does."""
    parts = path.split("/")
    heads = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    return any(fnmatch(head, glob.removesuffix("/")) for glob in globs for head in heads)


def exactly(path: str) -> str:
    """A regular expression of one path."""
    return f"^{re.escape(path)}$"


def expression(kind: str) -> str:
    """A regular expression of the paths of a kind."""
    return ANY.join(re.escape(part) for part in kind.split("#"))
