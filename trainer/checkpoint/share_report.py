"""A rank's share of a save: writing it into the checkpoint's folder, and the report of it that rank 0 waits for."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path

import torch

from trainer.bucket.deadlines import within
from trainer.checkpoint import writing
from trainer.checkpoint.boundary import Boundary
from trainer.checkpoint.errors import describe, fatal_code
from trainer.checkpoint.finite import is_spoilt
from trainer.checkpoint.shards import Part
from trainer.checkpoint.staging import Copy
from trainer.layout.manifest import FileRecord


@dataclass(frozen=True)
class ShareReport:
    """A rank's report of its share."""

    bytes: int = 0
    hash: str = ""
    torn: str | None = None
    """A tensor that was changed while it was copied."""
    spoilt: str = ""
    """A tensor that is not finite and should be; empty if all are."""
    error: str | None = None
    """The reason why the share could not be written; None if it was."""
    code: int | None = None
    """The exit code that the error ends the attempt with at once."""

    def to_json(self) -> str:
        """The report as text for the store."""
        return json.dumps(asdict(self))


def write_share(folder: Path, rank: int, boundary: Boundary, copy: Copy, past_cache: bool) -> ShareReport:
    """Write a rank's share into a checkpoint's folder, which is made if it is missing.

    Args:
        folder: The checkpoint's.
        rank: This rank.
        boundary: What is saved.
        copy: The state's tensors, as far as they are this rank's.
        past_cache: Whether to write past the system's cache.
    """
    try:
        with within("making a folder"):
            folder.mkdir(parents=True, exist_ok=True)
        writing.at_point("folder-made")
        written = _write_tensors(folder / writing.share_name(rank), rank, boundary, copy, past_cache)
        writing.at_point("share-written")
        return ShareReport(written.bytes, written.hash, copy.torn, _spoilt(boundary, copy))
    except OSError as error:
        return ShareReport(error=describe(error, folder), code=fatal_code(error))


def _write_tensors(path: Path, rank: int, boundary: Boundary, copy: Copy, past_cache: bool) -> FileRecord:
    own = [
        Part(name, tensor.dtype, tuple(tensor.shape), (0,) * tensor.ndim, tuple(tensor.shape), (rank,))
        for name, tensor in boundary.own.items()
    ]
    with ExitStack() as opened:
        # Opened all at once: a process that leaves meanwhile deletes the files.
        files = {
            name: opened.enter_context(path.open("rb", buffering=0)) for name, path in boundary.state.files.items()
        }
        for name, file in files.items():
            count = os.fstat(file.fileno()).st_size
            own.append(Part(name, torch.uint8, (count,), (0,), (count,), (rank,)))
        parts = [*copy.parts, *own]
        here: dict[str, torch.Tensor | FileIO] = {**boundary.own, **files}
        side_by_side = writing.in_order(parts)[: len(copy.parts)] == copy.parts  # No part of `own` in between.
        return writing.write_share(
            path,
            parts,
            lambda part: here[part.name] if part.name in here else copy.fetch(part),
            copy.memory if side_by_side and past_cache else None,
        )


def _spoilt(boundary: Boundary, copy: Copy) -> str:
    """The name of a watched tensor of this rank's share that is not finite; empty if all are finite."""
    for part in copy.parts:
        # An optimizer may keep an infinite value on purpose; NaN is always wrong.
        if part.name in boundary.watched and is_spoilt(copy.here(part), infinite=part.name.startswith("model.")):
            return part.name
    return ""
