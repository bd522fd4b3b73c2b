"""The replay: from the calls on a bucket to the versions of its files, and to what was read of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from skyspot.rehearsal.bucketfs.trace import DELETED, MAPPED, Call

_WRITES = os.O_WRONLY | os.O_RDWR
_COPY_CALLS, _COPY_S = 4, 0.1
"""A file is written as a copy if no more calls and seconds lie between the last read and the first write."""
_SLACK_BYTES = 4096
_SLACK = 0.02
"""A reader may pass over padding: this much of a file, and it has been read whole all the same."""


@dataclass(frozen=True)
class Attempt:
    """What is known of one attempt."""

    calls: Sequence[Call]
    """All of its calls on the bucket, in order."""
    finished: bool = False
    """It came to its end by itself, with exit code 0."""
    listing: Mapping[str, int] | None = None
    """What lay in the bucket when it began, path to size in bytes; None: what the traces before it say.

    Give it where a strike tore a file or a mount lost what it had not uploaded.
    """
    began_s: float | None = None
    """When it started, on the monotonic clock; None: at its first call."""
    ended_s: float | None = None
    """When it ended; None: at its last call."""
    noticed_s: float | None = None
    """When it got a notice or SIGTERM, on the monotonic clock: it may have made one save more. None: it got none."""
    left: bool = False
    """It left by itself, with any exit code: after a notice or SIGTERM, at that."""
    reads_seen: bool = True
    """False: the trace tells of writes alone."""
    remains: Mapping[str, int] | None = None
    """What lay in the bucket when the machine had been taken, path to size in bytes; None: what the trace says."""
    arrives_later: bool = False
    """True if a file arrives in the bucket later than at its close."""


@dataclass(eq=False)
class Version:
    """One content of one file: from the first call that made it until it is replaced or deleted."""

    number: int
    """In the order in which a leg's versions were begun."""
    attempt: int
    """The attempt that wrote it, from 1."""
    begun: int
    """Number of that call, in its attempt."""
    begun_s: float
    """Its time, on the monotonic clock."""
    places: list[tuple[int, float, str]]
    """Where it has been: (number of the call that put it there, its time, path), oldest first."""
    size: int = 0
    """Bytes."""
    closed: int | None = None
    """Number of the call that closed it, after the last write; None: it is open."""
    closed_s: float = 0.0
    appended: bool = False
    """Opened to append to."""
    in_place: bool = False
    """Written over an older content that was not cut to nothing first."""
    writes: int = 0
    gone: tuple[int, int, str] | None = None
    """(attempt, number of the call, name of the call) that deleted or replaced it; None: it is there."""
    cut: bool = False
    """Not whole: the machine was taken while it was open, or the file was torn afterwards."""
    copy_of: Version | None = None
    """The version that was read while this one was written, or just before, if both have one size."""
    synced: tuple[int, float] | None = None
    """The last fsync since the last write: (number of the call, its time)."""
    arrived: bool = False
    """Uploaded, where a file arrives in the bucket later than at its close."""
    writers: set[int] = field(default_factory=set)
    """The open handles that have written to it."""

    @property
    def born(self) -> str:
        """Its first path."""
        return self.places[0][2]

    @property
    def path(self) -> str:
        """Its last path."""
        return self.places[-1][2]


@dataclass
class Reading:
    """What one attempt has read of one version that an earlier attempt wrote."""

    version: Version
    path: str
    """Where it was then."""
    first: int
    """Number of the first call that read bytes of it."""
    opened: int
    """Number of the last call that opened it to read."""
    spans: list[tuple[int, int]] = field(default_factory=list)
    seen: bool = False
    """A read was seen; otherwise it was opened, and may have been mapped into memory."""

    @property
    def size(self) -> int:
        """Bytes of it that were read, each counted once."""
        total = end = 0
        for start, stop in sorted(self.spans):
            total += max(0, stop - max(start, end))
            end = max(end, stop)
        return total

    @property
    def whole(self) -> bool:
        """True if all of it was read, up to some padding."""
        return self.size >= self.version.size - max(_SLACK_BYTES, int(_SLACK * self.version.size))


@dataclass
class _Handle:
    version: Version | None
    flags: int
    wrote: bool = False


@dataclass
class Written:
    """One attempt, replayed."""

    number: int
    versions: list[Version]
    """Those that it began, in order."""
    readings: list[Reading]
    """What it read of earlier attempts' files, in the order of the first bytes."""
    there: dict[str, Version]
    """What lay in the bucket when it began, by path."""
    left: dict[str, Version]
    """What lay there when it ended or was taken, by path."""
    left_cut: frozenset[int]
    """Numbers of the versions that were not whole then."""
    cut: frozenset[int]
    """Numbers of the versions that were not whole when it began."""
    calls: Sequence[Call]
    began_s: float
    """When it started, on the monotonic clock; its first call if that is all that is known."""
    ended_s: float
    """When it ended; its last call if that is all that is known."""


class Bucket:
    """The files of one leg, call by call."""

    def __init__(self) -> None:
        """Begin with what the run did not write: nothing is known of it."""
        self.files: dict[str, Version] = {}
        self.versions: list[Version] = []
        self._arrived: dict[str, Version] = {}
        """The files that have arrived in the bucket, where they do so later than at their close."""
        self._attempt = 0
        self._handles: dict[int, _Handle] = {}
        self._readings: dict[int, Reading] = {}
        self._last_read: tuple[Version, Call] | None = None

    def replay(self, attempt: Attempt) -> Written:
        """Follow one attempt's calls."""
        self._attempt += 1
        self._handles, self._readings, self._last_read = {}, {}, None
        calls = list(attempt.calls)
        if attempt.listing is not None:
            self._reconcile(attempt.listing)
        there, first = dict(self.files), len(self.versions)
        cut = frozenset(version.number for version in self.versions if version.cut)
        for call in calls:
            self._apply(call)
        if attempt.remains is not None:
            if attempt.arrives_later:
                self._lose(attempt.remains)
            self._reconcile(attempt.remains)
        for version in self.versions:
            version.cut = version.cut or (version.closed is None and not version.appended)
            version.writers.clear()
        # Of a file that the strike left empty there is nothing to read; to open it is to have read it.
        found = [
            one for one in self._readings.values() if one.spans or (one.version.number in cut and not one.version.size)
        ]
        readings = sorted(found, key=lambda one: one.first)
        began_s = attempt.began_s if attempt.began_s is not None else calls[0].time if calls else 0.0
        ended_s = attempt.ended_s if attempt.ended_s is not None else calls[-1].time if calls else began_s
        left_cut = frozenset(version.number for version in self.versions if version.cut)
        return Written(
            self._attempt,
            self.versions[first:],
            readings,
            there,
            dict(self.files),
            left_cut,
            cut,
            calls,
            began_s,
            ended_s,
        )

    def _reconcile(self, listing: Mapping[str, int]) -> None:
        for path, version in list(self.files.items()):
            if path not in listing:
                self._remove(path, (self._attempt, -1, "lost"))
            elif listing[path] != version.size and not version.appended and version.size:
                version.cut, version.size = True, listing[path]

    def _lose(self, listing: Mapping[str, int]) -> None:
        """Have what had not arrived when the machine was taken be lost, and what it was to replace be there still."""
        for version in self.versions:
            version.cut = version.cut or (version.attempt == self._attempt and not version.arrived)
        for path in {*self.files, *self._arrived}:
            older = self._arrived.get(path)
            if self.files.get(path) is older:
                continue
            self._remove(path, (self._attempt, -1, "lost"))
            if older and path in listing:
                older.gone, self.files[path] = None, older

    # -- calls -------------------------------------------------------------------------------------------------------

    def _apply(self, call: Call) -> None:
        if call.error or call.refused or call.struck == "before":
            return
        name = call.name
        if name in ("create", "open"):
            self._open(call)
        elif name == "write":
            self._write(call)
        elif name in ("read", MAPPED) and call.size:
            self._read(call)
        elif name == "truncate":
            self._truncate(call)
        elif name == "fsync":
            self._fsync(call)
        elif name == "close":
            self._close(call)
        elif name == "rename" and call.struck != "middle":
            self._rename(call)
        elif name in ("symlink", "link"):
            self._link(call)
        elif name == "upload" and call.path in self.files:
            self._arrived[call.path] = self.files[call.path]
            self.files[call.path].arrived = True
        elif name == "unlink":
            self._arrived.pop(call.path, None)
            self._remove(call.path, (self._attempt, call.number, "unlink"))

    def _begin(self, call: Call, path: str, in_place: bool = False) -> Version:
        old = self.files.get(path)
        if old:
            old.gone = (self._attempt, call.number, call.name)
        new = Version(
            len(self.versions), self._attempt, call.number, call.time, [(call.number, call.time, path)],
            size=old.size if old and in_place else 0, in_place=in_place,
        )  # fmt: skip
        self.versions.append(new)
        self.files[path] = new
        return new

    def _open(self, call: Call) -> None:
        version = self.files.get(call.path)
        writes = call.name == "create" or bool(call.flags & _WRITES)
        fresh = version is not None and version.attempt == self._attempt and version.size == 0 and not version.writes
        if call.name == "create" or (writes and call.flags & os.O_TRUNC and not fresh):
            version = self._begin(call, call.path)
        if version and writes and call.flags & os.O_APPEND:
            version.appended = True
        if version and not writes and version.attempt < self._attempt:
            reading = self._readings.setdefault(version.number, Reading(version, call.path, call.number, call.number))
            reading.opened = call.number
        if version and (call.name == "create" or (writes and call.flags & os.O_TRUNC)):
            version.writers.add(call.handle)
            version.closed = None
        self._handles[call.handle] = _Handle(version, call.flags)

    def _held(self, call: Call) -> Version | None:
        handle = self._handles.get(call.handle)
        if handle and handle.version:
            return handle.version
        return self.files.get(call.path.removesuffix(DELETED))

    def _write(self, call: Call) -> None:
        version, handle = self._held(call), self._handles.get(call.handle)
        appends = bool(handle and handle.flags & os.O_APPEND)
        # A child process that inherited the handle may have closed it meanwhile.
        goes_on = bool(version and (call.handle in version.writers or version.writers or (handle and handle.wrote)))
        if version is None:
            if call.path.endswith(DELETED):
                return
            version = self._begin(call, call.path, in_place=True)
        elif version.appended or appends:
            version.appended = True
        elif not goes_on and call.offset >= version.size > 0:
            version.appended = True  # Opened anew, and written on at its end.
        elif self._is_overwritten(version, call, goes_on):
            if version.closed is None and version.synced:
                version.closed, version.closed_s = version.synced
            version = self._begin(call, version.path, in_place=True)
        if handle:
            handle.version, handle.wrote = version, True
        size = call.size // 2 if call.struck == "middle" else call.size
        version.size = max(version.size, call.offset + size)
        version.writes += 1
        version.writers.add(call.handle)
        version.closed = version.synced = None

    def _is_overwritten(self, version: Version, call: Call, goes_on: bool) -> bool:
        """True if a write begins another content: in a file that was whole already, or synchronised to the disk."""
        if version.attempt < self._attempt or version.gone:
            return not version.gone
        if not goes_on:
            return bool(version.writes)
        return version.synced is not None and call.offset < version.size

    def _read(self, call: Call) -> None:
        version = self._held(call)
        if version is None:
            return
        self._last_read = version, call
        if version.attempt == self._attempt:
            return
        reading = self._readings.setdefault(version.number, Reading(version, call.path, call.number, call.number))
        reading.first = reading.first if reading.spans else call.number
        reading.seen = reading.seen or call.name != MAPPED
        reading.spans.append((call.offset, call.offset + call.size))

    def _truncate(self, call: Call) -> None:
        version = self._held(call)
        if version is None:
            return
        if call.size == 0 and version.size and not version.appended:
            self._begin(call, version.path)
            if call.handle in self._handles:
                self._handles[call.handle].version = self.files[version.path]
        else:
            version.size = call.size

    def _fsync(self, call: Call) -> None:
        version = self._held(call)
        if version and version.writers and version.synced is None:
            version.synced = (call.number, call.time)

    def _close(self, call: Call) -> None:
        version = self._held(call)
        if version is None or call.handle not in version.writers:
            return
        version.writers.discard(call.handle)
        if not version.writers:
            version.closed, version.closed_s = call.number, call.time
            version.copy_of = self._original(version)

    def _original(self, version: Version) -> Version | None:
        if self._last_read is None:
            return None
        other, call = self._last_read
        just_before = version.begun - call.number <= _COPY_CALLS and version.begun_s - call.time < _COPY_S
        return other if other is not version and other.size == version.size > 0 and just_before else None

    def _rename(self, call: Call) -> None:
        moved = {path: path for path in self.files if path == call.path or path.startswith(f"{call.path}/")}
        for path in moved:
            if path in self._arrived:
                self._arrived[call.to + path[len(call.path) :]] = self._arrived.pop(path)
            version = self.files.pop(path)
            new = call.to + path[len(call.path) :]
            if new in self.files:
                self._remove(new, (self._attempt, call.number, "rename"))
            self.files[new] = version
            version.places.append((call.number, call.time, new))

    def _link(self, call: Call) -> None:
        if call.name == "link" and call.path in self.files:
            version = self.files[call.path]
            self.files[call.to] = version
            version.places.append((call.number, call.time, call.to))
            return
        version = self._begin(call, call.path)
        version.closed, version.closed_s = call.number, call.time

    def _remove(self, path: str, why: tuple[int, int, str]) -> None:
        version = self.files.pop(path, None)
        if version and version not in self.files.values():  # It may have another name: a hard link.
            version.gone = why
