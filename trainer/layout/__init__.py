"""The contract: where everything lies in a run's folder in the bucket, and how it is named, written and read.

The folder `<run>/` is the only thing that outlives a machine. The trainer writes it, the command line on a laptop
reads it, so this module needs nothing but the standard library.

    <run>/run.json                                         identity
    <run>/attempts/<attempt>/NNNN-<event>.json             one small object an event
    <run>/attempts/<attempt>/progress.json                 rewritten whole, read tolerantly
    <run>/attempts/<attempt>/metrics-<first step>.jsonl    a line a step
    <run>/checkpoints/<step>-<attempt>-<save>/             shares, state.json, then MANIFEST.json
    <run>/tokens/<key>-<attempt>/                          packed samples, then MANIFEST.json
    <run>/stop/<launch>.json                               a request to save and stop
    <run>/final/                                           the exported model, then MANIFEST.json

Whatever is read here may have been torn by a preemption or written by somebody else: nothing that is read is trusted
before it is checked, and nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.errors import TrainerError

LAYOUT_VERSION = 1
MANIFEST = "MANIFEST.json"
STATE = "state.json"
"""What every checkpoint has beside its shares."""
MAX_JSON_BYTES = 256 << 20

# Exit codes: 75 alone is in a task's `recover_on_exit_codes`.
EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_PREEMPTED = 75
EXIT_SUPERSEDED = 76
EXIT_STOPPED = 79
EXIT_NO_PROGRESS = 80
# What a launcher returns when its ranks gave several: the first of these that any rank gave.
EXIT_PRECEDENCE = (EXIT_FAILED, EXIT_NO_PROGRESS, EXIT_STOPPED, EXIT_SUPERSEDED, EXIT_PREEMPTED, EXIT_DONE)

_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}

STOP_REQUEST_S = 120.0
"""How long a stop that was asked for (`RunPaths.stop`) may take, and is held for SkyPilot's cancel."""

_ATTEMPT = re.compile(r"a(\d{4,9})-([0-9a-f]{6})")
_CHECKPOINT = re.compile(r"(\d{10})-(a\d{4,9}-[0-9a-f]{6})-(\d{1,6})")
_EVENT = re.compile(r"(\d{4,9})-([a-z][a-z-]{0,31})\.json")
_METRICS = re.compile(r"metrics-(\d{10})\.jsonl")
_HASH = re.compile(r"[0-9a-f]{32}")
_NO_FACTS = {"layout_version", "kind", "files", "seal"}
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]")


class LayoutError(TrainerError):
    """Something in a run's folder is not what the layout says: torn, tampered with, or written by a newer release."""


class LayoutVersionError(LayoutError):
    """A file was written by a release whose layout is newer than this one's."""


@dataclass(frozen=True, order=True)
class AttemptName:
    """`a0003-1f6c2e`: a number that grows, and a random part that keeps two attempts of one number apart."""

    number: int
    token: str

    def __str__(self) -> str:
        return f"a{self.number:04d}-{self.token}"

    @classmethod
    def parse(cls, text: str) -> AttemptName | None:
        """The name in `text`, or None where it is not an attempt's."""
        found = _ATTEMPT.fullmatch(text)
        return cls(int(found[1]), found[2]) if found else None


@dataclass(frozen=True, order=True)
class CheckpointName:
    """`0000000040-a0003-1f6c2e-2`: ordered by step, then attempt, then save, so that the newest is the greatest."""

    step: int
    attempt: AttemptName
    save: int

    def __str__(self) -> str:
        return f"{self.step:010d}-{self.attempt}-{self.save}"

    @classmethod
    def parse(cls, text: str) -> CheckpointName | None:
        """The name in `text`, or None where it is not a checkpoint's."""
        found = _CHECKPOINT.fullmatch(text)
        attempt = AttemptName.parse(found[2]) if found else None
        return cls(int(found[1]), attempt, int(found[3])) if found and attempt else None


@dataclass(frozen=True)
class RunPaths:
    """Every path of a run's folder; no other module joins them."""

    root: Path

    @property
    def run_json(self) -> Path:
        """Identity of the run."""
        return self.root / "run.json"

    @property
    def attempts(self) -> Path:
        """Folder of all attempts' records."""
        return self.root / "attempts"

    @property
    def checkpoints(self) -> Path:
        """Folder of all checkpoints."""
        return self.root / "checkpoints"

    @property
    def tokens(self) -> Path:
        """Folder of all prepared data."""
        return self.root / "tokens"

    @property
    def final(self) -> Path:
        """Folder of the exported model."""
        return self.root / "final"

    def attempt(self, attempt: AttemptName) -> Path:
        """Folder of one attempt's records."""
        return self.attempts / str(attempt)

    def event(self, attempt: AttemptName, number: int, event: str) -> Path:
        """File of one event; `number` counts from 1."""
        return self.attempt(attempt) / f"{number:04d}-{event}.json"

    def progress(self, attempt: AttemptName) -> Path:
        """The attempt's small, rewritten progress file."""
        return self.attempt(attempt) / "progress.json"

    def metrics(self, attempt: AttemptName, first_step: int) -> Path:
        """The metrics file that opens with the line of `first_step`."""
        return self.attempt(attempt) / f"metrics-{first_step:010d}.jsonl"

    def checkpoint(self, name: CheckpointName) -> Path:
        """Folder of one checkpoint."""
        return self.checkpoints / str(name)

    def stop(self, launch: str) -> Path:
        """The request to save and stop that holds for every attempt of `launch`."""
        return self.root / "stop" / f"{file_safe(launch)}.json"


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of one file."""

    bytes: int
    """Size in bytes."""
    hash: str
    """xxh3-128 of the contents, 32 hexadecimal digits."""


@dataclass(frozen=True)
class Manifest:
    """The last file written into a folder: it makes the folder committed."""

    kind: str
    """`checkpoint`, `tokens` or `final`."""
    files: Mapping[str, FileRecord]
    """Every other file of the folder, by its path relative to it, with `/`."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else is known. Of a checkpoint: run_id, step, samples (consumed so far), world_size, attempt, config,
    binding, machine, tokens (folder name), finite (False: its weights hold NaN or infinite values; older ones do not
    say it), metrics (list of {path, bytes, hash, first_step, last_step})."""

    @property
    def step(self) -> int:
        """The step that the folder stands at; 0 where it has none."""
        return int(self.facts.get("step", 0))

    @property
    def finite(self) -> bool:
        """Whether a checkpoint's weights are free of NaN and infinite values, as far as it is known."""
        return self.facts.get("finite") is not False

    @property
    def total_bytes(self) -> int:
        """Size of all files together, in bytes."""
        return sum(record.bytes for record in self.files.values())

    def to_json(self) -> bytes:
        """The manifest as it is written."""
        files = {name: {"bytes": record.bytes, "hash": record.hash} for name, record in sorted(self.files.items())}
        return sealed({"layout_version": LAYOUT_VERSION, "kind": self.kind, **self.facts, "files": files})

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Read a manifest, trusting nothing in it.

        Raises:
            LayoutError: it is torn, or names files outside of its folder, or sizes or hashes that cannot be.
            LayoutVersionError: it was written by a newer release.
        """
        document = from_json(data)
        if not isinstance(document, dict):
            raise LayoutError("not a JSON object")
        check_seal(document)
        check_version(document)
        kind, listed = document.get("kind"), document.get("files")
        if not isinstance(kind, str) or not isinstance(listed, dict):
            raise LayoutError("it has no `kind` or no `files`")
        files = {}
        for name, record in listed.items():
            if not is_safe_name(name):
                raise LayoutError(f"it lists a file outside of its folder: {name[:80]!r}")
            size = record.get("bytes") if isinstance(record, dict) else None
            digest = record.get("hash") if isinstance(record, dict) else None
            if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 50:
                raise LayoutError(f"{name}: its size cannot be {size!r}")
            if not isinstance(digest, str) or not _HASH.fullmatch(digest):
                raise LayoutError(f"{name}: its hash is not one")
            files[name] = FileRecord(size, digest)
        facts = {key: value for key, value in document.items() if key not in _NO_FACTS}
        step = facts.get("step", 0)
        if type(step) is not int or step < 0:
            raise LayoutError(f"step is {str(step)[:80]!r}, not a count")
        return cls(kind, files, facts)


@dataclass(frozen=True)
class Event:
    """One record of an attempt's life."""

    number: int
    name: str
    fields: Mapping[str, Any]


def to_json(value: Any) -> bytes:
    """JSON as this layout writes it: ASCII, NaN refused (write None)."""
    return json.dumps(value, indent=1, allow_nan=False).encode("ascii")


def sealed(document: Mapping[str, Any]) -> bytes:
    """A JSON object that carries a hash of itself: a manifest is hashed by no other file."""
    document = {key: document[key] for key in document if key != "seal"}
    return to_json({**document, "seal": _seal(json.loads(to_json(document)))})


def check_seal(document: Mapping[str, Any]) -> None:
    """See that an object that carries a hash of itself is as it was written.

    Raises:
        LayoutError: it is not.
    """
    rest = {key: document[key] for key in document if key != "seal"}
    try:
        broken = len(rest) < len(document) and document["seal"] != _seal(rest)
    except (RecursionError, ValueError) as error:
        raise LayoutError(f"not what this layout writes ({error})") from None
    if broken:
        raise LayoutError("it does not hash to what it says itself")


def _seal(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(text.encode("ascii"), digest_size=16).hexdigest()


def from_json(data: bytes) -> Any:
    """JSON as this layout reads it.

    Raises:
        LayoutError: not JSON, NaN or infinity in it, a key twice, or nested too deeply.
    """

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise LayoutError("a key stands in it twice")
        return found

    def no_constant(name: str) -> Any:
        raise LayoutError(f"{name} stands in it")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=no_twins, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise LayoutError(f"not readable as JSON ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        LayoutError: the file is not one, or is too large to be one.
        OSError: it cannot be read.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise LayoutError(f"{path.name}: too large")
    document = from_json(path.read_bytes())
    if not isinstance(document, dict):
        raise LayoutError(f"{path.name}: not a JSON object")
    return document


def write_once(path: Path, data: bytes) -> None:
    """Write a new file front to back. Never over an old one: no mount that SkyPilot uses does that safely.

    Raises:
        FileExistsError: the file is there already.
        OSError: the write, the fsync or the close failed; the file may be there in part.
    """
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        fsync(file.fileno())


def fsync(descriptor: int) -> None:
    """Fsync where the file system has it; some FUSE mounts and pipes answer EINVAL or ENOTSUP."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def check_version(document: Mapping[str, Any]) -> None:
    """Refuse what a newer release wrote.

    Raises:
        LayoutVersionError: the layout is newer.
        LayoutError: there is no version.
    """
    version = document.get("layout_version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise LayoutError("it has no layout version")
    if version > LAYOUT_VERSION:
        raise LayoutVersionError(
            f"written with layout version {version}; this release reads up to {LAYOUT_VERSION}. Upgrade skyspot."
        )


def is_safe_name(name: str) -> bool:
    """Whether a file name in a manifest stays inside the manifest's folder."""
    parts = PurePosixPath(name).parts
    return (
        0 < len(name) <= 512
        and name.isprintable()
        and "\\" not in name
        and not name.startswith("/")
        and str(PurePosixPath(name)) == name
        and ".." not in parts
        and name not in (".", MANIFEST)
    )


def file_safe(text: str) -> str:
    """`text` as part of a file name: anything unusual becomes `_`, at most 120 characters."""
    return _UNSAFE.sub("_", text)[:120] or "_"


def _names(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]  # Not os.scandir: the folder may be a bucket's, on a laptop.
    except (FileNotFoundError, NotADirectoryError):
        return []


def list_attempts(paths: RunPaths) -> list[AttemptName]:
    """All attempts that have a folder, oldest first."""
    return sorted(name for name in map(AttemptName.parse, _names(paths.attempts)) if name)


def list_checkpoints(paths: RunPaths) -> list[CheckpointName]:
    """All checkpoint folders, committed or not, newest first."""
    return sorted((name for name in map(CheckpointName.parse, _names(paths.checkpoints)) if name), reverse=True)


def list_metrics(paths: RunPaths, attempt: AttemptName) -> list[tuple[int, Path]]:
    """An attempt's metrics files as (first step, path), in the order of steps."""
    found = [(_METRICS.fullmatch(name), name) for name in _names(paths.attempt(attempt))]
    return sorted((int(match[1]), paths.attempt(attempt) / name) for match, name in found if match)


def read_whole(path: Path) -> bytes:
    """What is in a small file.

    Raises:
        LayoutError: it is too large to be one.
        OSError: it cannot be read.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise LayoutError("too large to be one")
    return path.read_bytes()


def read_manifest(folder: Path, read: Callable[[Path], bytes] = read_whole) -> Manifest:
    """The manifest of a folder; `read` gives a file's contents, or raises what `read_whole` does.

    Raises:
        LayoutError: it is missing (so the folder is not committed), unreadable or torn.
        LayoutVersionError: it is from a newer release.
    """
    path = folder / MANIFEST
    try:
        return Manifest.parse(read(path))
    except FileNotFoundError:
        raise LayoutError("not committed: it has no MANIFEST.json") from None
    except LayoutVersionError as error:
        raise LayoutVersionError(f"{path}: {error}") from None
    except LayoutError as error:
        raise LayoutError(f"not committed: MANIFEST.json: {error}") from None


def says_not_there(error: OSError) -> bool:
    """Whether an error tells that a file is not as it was written; any other says nothing of the file."""
    # A bucket's errors have no number.
    return error.errno in _NOT_THERE or isinstance(error, FileNotFoundError)


def sizes_agree(folder: Path, manifest: Manifest, size_of: Callable[[str], int] | None = None) -> str | None:
    """The first listed file that is missing or has another size, as a sentence; None where all agree.

    Cheap, and blind to flipped bits: who restores hashes as well. `size_of` gives the size of a file of the manifest,
    in bytes, or raises OSError: for who knows it from a listing.

    Raises:
        OSError: a file cannot be looked at, which says nothing of it.
    """
    for name, record in manifest.files.items():
        try:
            size = size_of(name) if size_of else (folder / name).stat().st_size
        except OSError as error:
            if not says_not_there(error):
                raise
            return f"{name}: {error.strerror or error}"
        if size != record.bytes:
            return f"{name}: {size} bytes, its manifest says {record.bytes}"
    return None


def newest_committed(
    paths: RunPaths,
    run_id: str | None = None,
    pass_over: Callable[[OSError], bool] = lambda error: False,
    only_finite: bool = False,
) -> tuple[CheckpointName, Manifest] | None:
    """The newest checkpoint whose files have the sizes that its manifest says; None where there is none.

    Args:
        paths: The run's.
        run_id: Another run's checkpoints are passed over; None: all count.
        pass_over: Whether one that cannot be looked at for this is passed over, if another one can.
        only_finite: Those whose weights are not finite are passed over.

    Raises:
        LayoutVersionError: a newer release wrote it.
        OSError: the bucket cannot be read.
    """
    unreadable: OSError | None = None
    for name in list_checkpoints(paths):
        try:
            manifest = read_manifest(paths.checkpoint(name))
            mine = belongs(manifest, name) and is_of(manifest, run_id) and (manifest.finite or not only_finite)
            if mine and sizes_agree(paths.checkpoint(name), manifest) is None:
                return name, manifest
        except LayoutVersionError:
            raise
        except (LayoutError, FileNotFoundError):
            continue
        except OSError as error:
            if not pass_over(error):
                raise
            unreadable = unreadable or error
    if unreadable:
        raise unreadable
    return None


def known_id(paths: RunPaths) -> tuple[str | None, bool]:
    """(the run's id as run.json has it, whether that is torn).

    Raises:
        OSError: it cannot be read.
    """
    try:
        document = read_json(paths.run_json)
        check_seal(document)
        known = document.get("run_id")
        return (known, False) if isinstance(known, str) else (None, True)
    except FileNotFoundError:
        return None, False
    except LayoutError:
        return None, True


def id_among(known: str | None, found: Iterable[tuple[CheckpointName, Manifest]]) -> str | None:
    """Which run a folder is of: as run.json says, if a checkpoint agrees or there is none; else as most of them say.

    Args:
        known: What run.json says.
        found: The folder's checkpoints, newest first; asked for no more of them than it takes.
    """
    ids = Counter[str]()
    for name, manifest in found:
        its = manifest.facts.get("run_id")
        if not isinstance(its, str) or manifest.facts.get("attempt", str(name.attempt)) != str(name.attempt):
            continue
        if its == known:
            return known
        ids[its] += 1
    return ids.most_common(1)[0][0] if ids else known


def belongs(manifest: Manifest, name: CheckpointName) -> bool:
    """Whether a checkpoint's manifest is of its own folder, and not copied there with another one's files."""
    step, attempt = manifest.step, manifest.facts.get("attempt", str(name.attempt))
    return (manifest.kind, step, attempt) == ("checkpoint", name.step, str(name.attempt))


def is_of(manifest: Manifest, run_id: str | None) -> bool:
    """Whether a checkpoint is of this run, as far as both are known."""
    return run_id is None or manifest.facts.get("run_id") in (None, run_id)


def read_events(
    paths: RunPaths, attempt: AttemptName, names: Collection[str] = (), *, all_of_them: bool = False
) -> list[Event]:
    """An attempt's events in order. One that is torn is left out: the machine was taken while it was written.

    Args:
        paths: The run's.
        attempt: The attempt.
        names: Only events of these names: each costs a request to the bucket. None: all.
        all_of_them: Leave none out.

    Raises:
        LayoutError, OSError: `all_of_them` are wanted, and one cannot be read.
    """
    events = []
    for name in _names(paths.attempt(attempt)):
        match = _EVENT.fullmatch(name)
        if not match or (names and match[2] not in names):
            continue
        try:
            fields = read_json(paths.attempt(attempt) / name)
            events.append(Event(int(match[1]), match[2], fields))
        except (LayoutError, OSError):
            if all_of_them:
                raise
    return sorted(events, key=lambda event: (event.number, event.name))


def parse_event(file: str) -> tuple[int, str] | None:
    """(number, event) of the name of an event's file; None where it is not one."""
    found = _EVENT.fullmatch(file)
    return (int(found[1]), found[2]) if found else None


def last_event_number(paths: RunPaths, attempt: AttemptName) -> int:
    """The highest number that an event of the attempt has, torn ones included; 0 where there is none."""
    return max((int(match[1]) for match in map(_EVENT.fullmatch, _names(paths.attempt(attempt))) if match), default=0)


def event_named(events: list[Event], name: str) -> Mapping[str, Any] | None:
    """The fields of the last event of that name; None where there is none."""
    return next((event.fields for event in reversed(events) if event.name == name), None)


def read_metrics(data: bytes) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file; reading stops at the first that is torn."""
    for line in data.split(b"\n"):
        if not line:
            continue
        try:
            document = from_json(line)
        except LayoutError:
            return
        if isinstance(document, dict) and isinstance(document.get("step"), int):
            yield document


def read_progress(paths: RunPaths, attempt: AttemptName) -> dict[str, Any]:
    """The attempt's progress; empty where it is missing or torn."""
    try:
        return read_json(paths.progress(attempt))
    except (LayoutError, OSError):
        return {}
