"""Attempts: their numbers, their records, and what those say about whether to go on. Standard library only.

Only global rank 0 opens an attempt and writes its events; a second attempt that is alive at the same time writes into
folders of its own, because every name has a random part.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeVar

from trainer.attempt import ending
from trainer.bucket import deadlines
from trainer.errors import TrainerError
from trainer.layout.documents import (
    LAYOUT_VERSION,
    LayoutError,
    LayoutVersionError,
    check_seal,
    check_version,
    read_json,
    sealed,
    to_json,
    write_once,
)
from trainer.layout.events import Event, event_named, last_event_number, read_events
from trainer.layout.exit_codes import EXIT_FAILED, EXIT_PREEMPTED
from trainer.layout.identity import id_among, is_of, known_id, newest_committed
from trainer.layout.manifest import Manifest, read_manifest
from trainer.layout.names import AttemptName, CheckpointName, RunPaths, file_safe, list_attempts, list_checkpoints
from trainer.machine import home, scratch

START_RETRY_S = 600.0
BEING_WRITTEN_S = 1.0
UNREADABLE_S = 30.0
RECORDS_S = 600.0
"""How long reading what other attempts recorded may take: each tells it in a few objects of its own."""
OWN_DOING_IN_A_ROW = 3
ANY_END_IN_A_ROW = 10
FULL = scratch.FULL
REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM}
MOUNT_GONE = {errno.ENOTCONN, errno.ESTALE, errno.ENODEV}
# Waiting helps against none of these.
_HOPELESS = FULL | REFUSED | {errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EISDIR}
_lock = threading.Lock()
_T = TypeVar("_T")


_PROCESS_TOKEN = secrets.token_hex(8)
_numbers: dict[Path, int] = {}
"""The last event that this process wrote, by attempt: a listing may not show it yet."""


class AttemptError(TrainerError):
    """The bucket cannot be used before the first step; the attempt ends with `code`."""


@dataclass(frozen=True)
class Attempt:
    """One life of the machines."""

    paths: RunPaths
    name: AttemptName
    launch: str
    machine: str
    """A token that lasts as long as the machine's disk."""


def launch_id() -> str:
    """The launcher's, or SkyPilot's, id of this submission, the same across recoveries; without one, made up."""
    if known := os.environ.get("SKYSPOT_LAUNCH"):
        return known
    task = os.environ.get("SKYPILOT_TASK_ID")
    return file_safe(task) if task else f"local-{secrets.token_hex(4)}"


def machine_token() -> str:
    """This machine's token, made where it is missing."""
    if folder := home.cache():
        path = folder / "machine"
        with suppress(OSError, ValueError):
            token = path.read_text().strip()
            if re.fullmatch(r"[0-9a-f]{16}", token):
                return token
        with suppress(OSError):
            token = secrets.token_hex(8)
            path.write_text(token)
            return token
    # Nowhere to keep it: then as long as the system runs.
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
        return hashlib.sha256(boot).hexdigest()[:16]
    return _PROCESS_TOKEN


def process_started(pid: object) -> int | None:
    """When a process of this machine started, in ticks since the system did; None where there is none, or no /proc."""
    with suppress(OSError, ValueError, IndexError):
        state, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if state in (b"Z", b"X") else int(fields[18])
    return None


def check_bucket(paths: RunPaths) -> None:
    """Refuse to train into a folder that is lost with the machine.

    Raises:
        AttemptError: no bucket is mounted where SKYSPOT_MOUNT says, or the folder that the run's folder goes into is
        missing.
    """
    with deadlines.within("looking at the mount", START_RETRY_S, EXIT_FAILED):
        _check_bucket(paths, os.environ.get("SKYSPOT_MOUNT"))


def _check_bucket(paths: RunPaths, mount: str | None) -> None:
    if not mount:
        if not paths.root.parent.is_dir():
            raise AttemptError(
                f"{paths.root.parent}: no such folder. It is not made here, because a bucket that failed to mount "
                "would look the same: mount it, or make the folder yourself."
            )
        return
    try:
        device = Path(mount).stat().st_dev
    except OSError as error:
        raise AttemptError(f"{mount}: {error.strerror}. SKYSPOT_MOUNT names it as the bucket's mount.") from None
    if device == Path("/").stat().st_dev:
        raise AttemptError(
            f"{mount}: no bucket is mounted there (it lies on the machine's own disk, which goes with the machine). "
            "Nothing was written. Look at the mount in the job's log; unset SKYSPOT_MOUNT for a shared folder."
        )


def persist(
    paths: RunPaths,
    work: Callable[[], _T],
    check_stop: Callable[[], None] = lambda: None,
    *,
    begun: bool = False,
    limit_s: float | None = None,
) -> _T:
    """Do something in the bucket before training begins, again and again for ten minutes while the bucket refuses it.

    Args:
        paths: The run's.
        work: What to do; may be done twice.
        check_stop: Called while waiting; raises to stop.
        begun: Whether the attempt is recorded: then a mount that is gone, or hangs, is a matter for a new machine.
        limit_s: How long one try may take, once it is; None: as long as any call.

    Raises:
        AttemptError: it cannot be done; at once where waiting cannot help.
        ScratchError: a disk of this machine's is full, and not the bucket.
    """
    end, wait_s, said = time.monotonic() + START_RETRY_S, 0.5, False
    limit_s, code = (limit_s, EXIT_PREEMPTED) if begun else (START_RETRY_S, EXIT_FAILED)
    while True:
        try:
            with deadlines.within("a call before the first step", limit_s, code):
                return work()
        except OSError as error:
            where = scratch.blamed(error, paths.root)
            if error.errno in FULL and not where.startswith(str(paths.root)):
                raise scratch.full(Path(where), error.strerror) from None
            gone = begun and error.errno in MOUNT_GONE
            if gone or error.errno in _HOPELESS or time.monotonic() > end:
                recorded = "The attempt cannot be recorded there, so nothing was trained"
                what = "It cannot be read or written" if begun else recorded
                raise AttemptError(
                    f"{where}: {error.strerror or error}. {what}; nothing that was committed is lost.",
                    EXIT_PREEMPTED if gone else EXIT_FAILED,
                ) from None
            if not said:
                said = True
                print(f"{paths.root}: {error.strerror or error}; asking again for a while", file=sys.stderr, flush=True)
        pause(wait_s, check_stop)
        wait_s = min(30.0, 2 * wait_s)


def newest_readable(
    paths: RunPaths, run_id: str | None, check_stop: Callable[[], None] = lambda: None, only_finite: bool = False
) -> tuple[CheckpointName, Manifest] | None:
    """The newest committed checkpoint (`newest_committed`); errors as of `persist`.

    One that cannot be looked at for half a minute, or is forbidden, is passed over where there is another.
    """
    end = time.monotonic() + UNREADABLE_S

    def pass_over(error: OSError) -> bool:
        return error.errno in REFUSED or (error.errno not in MOUNT_GONE and time.monotonic() > end)

    return persist(paths, lambda: newest_committed(paths, run_id, pass_over, only_finite), check_stop)


def pause(seconds: float, check_stop: Callable[[], None]) -> None:
    """Wait, and look in between whether there is a reason to stop; it raises then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        check_stop()
        time.sleep(0.05)


def setup_seconds() -> int | None:
    """How long setup.sh took on this machine; None where it did not run."""
    folder = home.home()
    with suppress(OSError, ValueError):
        return int((folder / "skyspot" / "setup-seconds").read_text()) if folder else None
    return None


def open_attempt(
    paths: RunPaths,
    *,
    launch: str,
    config: Mapping[str, Any],
    binding: Mapping[str, Any] | None,
    check_stop: Callable[[], None] = lambda: None,
    **facts: Any,
) -> Attempt:
    """Begin an attempt: take the next number and write its `start` event.

    Args:
        paths: The run's.
        launch: The launch's id.
        config: For whoever reads the record.
        binding: What binds the run; None where that is not known, nor which run it is (`adopt`).
        check_stop: Called while waiting; raises to stop.
        facts: What `start` says besides.

    Raises:
        AttemptError: the bucket refused that for ten minutes, or at once where waiting cannot help.
        LayoutVersionError: a newer release has begun this run.
    """
    fields = {
        "layout_version": LAYOUT_VERSION,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pid_started": process_started(os.getpid()),
        "python": platform.python_version(),
        "setup_s": setup_seconds(),
        "config": dict(config),
        "binding": dict(binding or {}),
        **facts,
    }

    def take_a_number() -> Attempt:
        check_release(paths)
        taken = [name.number for name in list_attempts(paths)]
        taken += [name.attempt.number for name in list_checkpoints(paths)]
        name = AttemptName(1 + max(taken, default=0), secrets.token_hex(3))
        paths.attempt(name).mkdir(parents=True)
        return Attempt(paths, name, launch, machine_token())

    attempt = persist(paths, take_a_number, check_stop)
    persist(paths, lambda: record(attempt, "start", launch=launch, machine=attempt.machine, **fields), check_stop)
    if binding is not None:
        persist(paths, lambda: keep_identity(paths, binding), check_stop)
    return attempt


def adopt(paths: RunPaths, name: AttemptName, launch: str, binding: Mapping[str, Any], **facts: Any) -> Attempt:
    """Take over the attempt that the launcher's child opened for a script which turns out to keep records itself.

    Raises:
        OSError: it cannot be recorded.
    """
    attempt = Attempt(paths, name, launch, machine_token())
    record(attempt, "bound", binding=binding, **facts)
    keep_identity(paths, binding)
    return attempt


def record(attempt: Attempt, event: str, **fields: Any) -> None:
    """Write the attempt's next event; times are unix seconds.

    Raises:
        OSError: it could not be written.
    """
    with _lock:
        folder = attempt.paths.attempt(attempt.name)
        number = 1 + max(last_event_number(attempt.paths, attempt.name), _numbers.get(folder, 0))
        path = attempt.paths.event(attempt.name, number, event)
        try:
            write_once(path, to_json({"time": round(time.time(), 3), **fields}))
        except FileExistsError:  # Of a try that failed half-way, and that the listing does not show yet.
            _numbers[folder] = number
            raise
        _numbers[folder] = number


def newer_attempt(attempt: Attempt) -> AttemptName | None:
    """The highest attempt that outnumbers this one; None where there is none."""
    names = [name for name in list_attempts(attempt.paths) if name.number > attempt.name.number]
    return names[-1] if names else None


def superseded(newer: AttemptName | None) -> str:
    """What an attempt says that stops for a newer one."""
    return f"a newer attempt exists ({newer}): this one stops"


def stop_requested(attempt: Attempt) -> bool:
    """Whether somebody asked every attempt of this launch to save and stop; the file's being there is the request."""
    return attempt.paths.stop(attempt.launch).exists()


def machines(events: list[Event]) -> set[str]:
    """The tokens of an attempt's machines, as far as they are recorded."""
    found = {str((event_named(events, "start") or {}).get("machine"))}
    listed = (event_named(events, "machines") or {}).get("machines")
    return found | set(map(str, listed if isinstance(listed, list) else []))


def new_run_id(binding: Mapping[str, Any]) -> str:
    """A run's id at its beginning: a hash of the binding configuration, so that two first attempts agree."""
    return hashlib.sha256(json.dumps(dict(binding), sort_keys=True, default=str).encode()).hexdigest()[:16]


def identity(paths: RunPaths, binding: Mapping[str, Any]) -> str | None:
    """The run's id as its folder has it; None where nothing tells.

    run.json's, as long as what binds this attempt or a checkpoint agrees with it, or there is none; else that of most
    checkpoints. So neither a run.json nor a checkpoint that was copied here from another run makes this run another.

    Raises:
        OSError: the bucket cannot be read.
    """
    return _agreed(known_id(paths)[0], paths, binding)


def _agreed(known: str | None, paths: RunPaths, binding: Mapping[str, Any]) -> str | None:
    """`identity`, where it is known what run.json says."""
    return known if known == new_run_id(binding) else id_among(known, _manifests(paths))


def _manifests(paths: RunPaths) -> Iterator[tuple[CheckpointName, Manifest]]:
    for name in list_checkpoints(paths):
        with suppress(LayoutError, FileNotFoundError):
            yield name, read_manifest(paths.checkpoint(name))


def keep_identity(paths: RunPaths, binding: Mapping[str, Any]) -> None:
    """Write run.json where it is missing or torn, or is another run's."""
    known, torn = known_id(paths)
    end = time.monotonic() + BEING_WRITTEN_S
    while torn and time.monotonic() < end:  # Another first attempt may be writing it at this very moment.
        time.sleep(0.02)
        known, torn = known_id(paths)
    true = _agreed(known, paths, binding) or new_run_id(binding)
    if known == true:
        return
    data = sealed({"layout_version": LAYOUT_VERSION, "run_id": true})
    if torn or known is not None:
        paths.run_json.unlink(missing_ok=True)
    with suppress(FileExistsError):
        write_once(paths.run_json, data)


def check_release(paths: RunPaths) -> None:
    """Refuse a run that a newer release has begun, before anything is written into it.

    Raises:
        LayoutVersionError: its run.json is of a newer layout.
        OSError: it cannot be read.
    """
    try:
        document = read_json(paths.run_json)
        check_seal(document)
        check_version(document)
    except LayoutVersionError as error:
        raise LayoutVersionError(f"{paths.run_json}: {error}") from None
    except (FileNotFoundError, LayoutError):
        pass


def is_finished(
    paths: RunPaths, run_id: str | None, binding: Mapping[str, Any], problem: Callable[[Path, Manifest], str | None]
) -> bool:
    """Whether `final/` is whole, and of the very length that is asked for.

    Args:
        paths: The run's.
        run_id: Which run this is.
        binding: Its `max_steps` and `epochs` say where training ends, as far as they are known.
        problem: Reads and hashes a folder's files.

    Raises:
        AttemptError: it is another run's model, which would be deleted at the end.
        OSError: it cannot be read.
    """
    try:
        manifest = deadlines.read_manifest(paths.final)
    except LayoutVersionError:
        raise
    except LayoutError:
        return False
    if not is_of(manifest, run_id):
        raise AttemptError(
            f"{paths.final} holds the model of another run ({manifest.facts['run_id']}, and this is {run_id}): move "
            "it away, or give this run another name or folder. It is left as it is"
        )
    if manifest.kind != "final" or manifest.facts.get("step") != manifest.facts.get("max_steps"):
        return False
    then = manifest.facts.get("binding")
    if isinstance(then, Mapping) and any(then.get(key) != binding.get(key) for key in ("max_steps", "epochs")):
        return False
    return problem(paths.final, manifest) is None


def ended(events: list[Event]) -> Mapping[str, Any]:
    """The fields of an attempt's end event; empty where it has none."""
    return event_named(events, "end") or {}


def _by_own_doing(events: list[Event], machine: str) -> bool:
    """Whether an attempt ended without anybody's asking: a 75 with no notice before it, or gone without a word here."""
    end = ended(events)
    if not end:
        return machine in machines(events)
    return end.get("code") == EXIT_PREEMPTED and end.get("cause") not in (ending.NOTICE.cause, ending.SIGNAL.cause)


def no_progress(attempt: Attempt, newest_step: int, *, sees_progress: bool = True) -> str | None:
    """Why this launch should stop for good: it starts again and again and gets nowhere. None where it gets somewhere.

    Three attempts in a row that ended by their own doing, or ten however they ended, without a checkpoint above the one
    that the first of them restored and without new data prepared.

    Args:
        attempt: The one that has just begun.
        newest_step: The step that it is about to restore.
        sees_progress: Whether the script keeps its checkpoints where they are seen from here. Where it does not, ten
            preemptions of a run that gets on look like a standstill, and only ends by its own doing count.
    """
    before: list[tuple[AttemptName, list[Event]]] = []
    for name in reversed(list_attempts(attempt.paths)):
        if name >= attempt.name:
            continue
        events = read_events(attempt.paths, name, ("start", "machines", "restored", "end"))
        if (event_named(events, "start") or {}).get("launch") != attempt.launch:
            break
        before.append((name, events))
    for count, own in ((OWN_DOING_IN_A_ROW, True), (ANY_END_IN_A_ROW, False)):
        row = before[:count]
        if not own and not sees_progress:
            continue
        if len(row) < count or (own and not all(_by_own_doing(events, attempt.machine) for _, events in row)):
            continue
        if newest_step > _restored_step(row[-1][1]) or _new_tokens(attempt.paths, {str(name) for name, _ in row}):
            continue
        said = "; ".join(f"{name}: {_last_error(events)}" for name, events in reversed(row))
        return f"no progress: {count} attempts in a row ended at step {newest_step}. {said}"
    return None


def _restored_step(events: list[Event]) -> int:
    restored, start = event_named(events, "restored"), event_named(events, "start")
    step = restored.get("step") if restored else (start or {}).get("newest_step")
    return step if isinstance(step, int) else 0


def _new_tokens(paths: RunPaths, attempts: Collection[str]) -> bool:
    """Whether one of the attempts left a whole folder of prepared data."""
    with suppress(OSError):
        for folder in paths.tokens.iterdir():
            if any(folder.name.endswith(f"-{name}") for name in attempts):
                with suppress(LayoutError, OSError):
                    read_manifest(folder)
                    return True
    return False


def _last_error(events: list[Event]) -> str:
    end = ended(events)
    text = str(end.get("error") or end.get("cause") or "ended without a word").strip().splitlines()
    return text[0][:200] if text else "ended without a word"


def plain_binding(binding: Mapping[str, Any]) -> dict[str, Any]:
    """What binds a run, as it is recorded: numbers of numpy and torch as numbers, paths as text, tuples as lists.

    Raises:
        AttemptError: a value that cannot be recorded.
    """
    return {str(name): _plain(value, f"binding {name!r}") for name, value in binding.items()}


def _plain(value: Any, where: str) -> Any:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where) for key, item in value.items()}
    raise AttemptError(f"{where}: {value!r:.80} cannot be recorded; use finite numbers, text, lists and dicts")


def binding_problem(
    paths: RunPaths,
    attempt: Attempt,
    binding: Mapping[str, Any],
    allowed: Collection[str],
    newest: Manifest | None,
    is_same: Callable[[str, Mapping[str, Any]], bool] = lambda name, first: False,
) -> str | None:
    """Which field differs from what the run was begun with, and what to do; None where none does.

    Compared with the newest whole checkpoint, or, while there is none, with the first attempt that was not refused.
    A value of another spelling may be the same thing: `is_same` tells, given the field's name and what bound first.
    """
    first = first_binding(paths, attempt, newest)
    if first is None:
        return None
    for name in sorted(binding.keys() & first.keys()):
        if json.dumps(binding[name], default=str) != json.dumps(first[name]) and name not in allowed:
            if is_same(name, first):
                continue
            return (
                f"{paths.root} is a run with {name} {first[name]!r}, and this attempt asks for {binding[name]!r}. "
                f"Give it another name or folder, or change the run with --allow-config-change {name}"
            )
    return None


def first_binding(paths: RunPaths, attempt: Attempt, newest: Manifest | None) -> Mapping[str, Any] | None:
    """What bound the run first: the newest checkpoint's record of it, or the first attempts'; None where there is none.

    Of the attempts, those count that were not refused, up to the first that knew all: the others' values fill in what
    it did not come to know.
    """
    if newest:
        found = newest.facts.get("binding")
        return found if isinstance(found, Mapping) else None
    known: dict[str, Any] = {}
    for name in list_attempts(paths):
        if name == attempt.name:
            continue
        events = read_events(paths, name, ("start", "bound", "end"))
        start, bound = event_named(events, "start"), event_named(events, "bound")
        if start and ended(events).get("cause") != ending.REFUSED.cause:
            known = {**(start.get("binding") or {}), **((bound or {}).get("binding") or {}), **known}
            if bound:
                break
    return known or None


def ignored_notices(paths: RunPaths, name: AttemptName, machine: str) -> set[str]:
    """Ids of the notices that ended an attempt on this very machine: it is still here, so they are over."""
    found = set()
    for other in list_attempts(paths):
        if other == name:
            continue
        events = read_events(paths, other, ("start", "machines", "end"))
        notice = ended(events).get("notice")
        if machine in machines(events) and isinstance(notice, Mapping):
            found.add(str(notice.get("id")))
    return found
