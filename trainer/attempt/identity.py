"""The identity of this attempt's run: reads it while the bucket may fail, and records it. Standard library only."""

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
"""The time for which a torn run.json may still be one that another first attempt is writing."""
UNREADABLE_S = 30.0
"""The time for which a checkpoint may be unreadable before an older one is taken."""


def newest_readable(
    paths: RunPaths, run_id: str | None, check_stop: Callable[[], None] = lambda: None, only_finite: bool = False
) -> tuple[CheckpointName, Manifest] | None:
    """The newest committed checkpoint (see `newest_committed`); raises what `retry` raises.

    A checkpoint that is unreadable for half a minute, or forbidden, is skipped if there is an older one.
    """
    end = time.monotonic() + UNREADABLE_S

    def pass_over(error: OSError) -> bool:
        return error.errno in REFUSED or (error.errno not in MOUNT_GONE and time.monotonic() > end)

    return retry(paths, lambda: newest_committed(paths, run_id, pass_over, only_finite), check_stop)


def new_run_id(binding: Mapping[str, Any]) -> str:
    """The id of a new run: a hash of the binding configuration, so that two first attempts agree on it."""
    return hashlib.sha256(json.dumps(dict(binding), sort_keys=True, default=str).encode()).hexdigest()[:16]


def identity(paths: RunPaths, binding: Mapping[str, Any]) -> str | None:
    """The run's id as recorded in its folder; None if there is no record of it.

    The id in run.json counts if this attempt's binding or a checkpoint agrees with it, or if there is no checkpoint.
    Otherwise the id of most checkpoints counts. So neither a run.json nor a checkpoint that was copied here from
    another run changes the identity of this run.

    Raises:
        OSError: the bucket cannot be read.
    """
    return _agreed(known_id(paths)[0], paths, binding)


def _agreed(known: str | None, paths: RunPaths, binding: Mapping[str, Any]) -> str | None:
    """The run's id (see `identity`), given the id in run.json."""
    return known if known == new_run_id(binding) else id_among(known, _manifests(paths))


def _manifests(paths: RunPaths) -> Iterator[tuple[CheckpointName, Manifest]]:
    for name in list_checkpoints(paths):
        with suppress(LayoutError, FileNotFoundError):
            yield name, read_manifest(paths.checkpoint(name))


def keep_identity(paths: RunPaths, binding: Mapping[str, Any]) -> None:
    """Write run.json if it is missing, torn, or belongs to another run."""
    known, torn = known_id(paths)
    end = time.monotonic() + BEING_WRITTEN_S
    while torn and time.monotonic() < end:  # Another first attempt may be writing it right now.
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
    """Refuse a run that a newer release began, before anything is written into it.

    Raises:
        LayoutVersionError: run.json has a newer layout.
        OSError: run.json cannot be read.
    """
    try:
        document = read_json(paths.run_json)
        check_seal(document)
        check_version(document)
    except LayoutVersionError as error:
        raise LayoutVersionError(f"{paths.run_json}: {error}") from None
    except (FileNotFoundError, LayoutError):
        pass
