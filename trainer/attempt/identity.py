"""Which run the folder belongs to: its id, its layout's version, its newest checkpoint. Standard library only."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from trainer.bucket.retry import MOUNT_GONE, REFUSED, retry
from trainer.layout.documents import (
    LAYOUT_VERSION,
    LayoutError,
    LayoutVersionError,
    check_seal,
    check_version,
    read_json,
    sealed,
    write_once,
)
from trainer.layout.identity import id_among, known_id, newest_committed
from trainer.layout.manifest import Manifest, read_manifest
from trainer.layout.names import CheckpointName, RunPaths, list_checkpoints

BEING_WRITTEN_S = 1.0

UNREADABLE_S = 30.0


def newest_readable(
    paths: RunPaths, run_id: str | None, check_stop: Callable[[], None] = lambda: None, only_finite: bool = False
) -> tuple[CheckpointName, Manifest] | None:
    """The newest committed checkpoint (`newest_committed`); errors as of `retry`.

    One that cannot be looked at for half a minute, or is forbidden, is passed over where there is another.
    """
    end = time.monotonic() + UNREADABLE_S

    def pass_over(error: OSError) -> bool:
        return error.errno in REFUSED or (error.errno not in MOUNT_GONE and time.monotonic() > end)

    return retry(paths, lambda: newest_committed(paths, run_id, pass_over, only_finite), check_stop)


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
