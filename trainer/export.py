"""The exported model, `final/`: the one folder that is emptied and written again where it is not whole."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from torch import nn

from trainer.attempt import AttemptError, newer_attempt, persist, superseded
from trainer.checkpoint import write_manifest, write_tensors
from trainer.hashing import CHUNK_BYTES, Hasher
from trainer.layout import EXIT_SUPERSEDED, MANIFEST, CheckpointName, FileRecord, Manifest, fsync
from trainer.patience import read_manifest, within, within_bytes
from trainer.state import unwrap

if TYPE_CHECKING:
    from trainer.run import SpotRun

EMPTY_S = 600.0
"""Each of its files takes a request or two."""


def save_tensors(model: nn.Module, folder: Path) -> None:
    """Write a model's weights into `model.safetensors`: what is exported of a model that has no `save_pretrained`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_tensors(folder / "model.safetensors", tensors)


def export(run: SpotRun, model: nn.Module, save_model: Callable[[nn.Module, Path], None], last: CheckpointName) -> None:
    """Make `final/` from the model as it stands, which is as the `last` checkpoint has it; rank 0 alone.

    save_pretrained seeks and renames, which a bucket's mount may refuse: it writes to local disk, and the files are
    then copied front to back, MANIFEST.json last; all of them again where the bucket fails for a moment.

    Raises:
        AttemptError: the bucket cannot be written, for ten minutes.
    """

    def in_time() -> None:
        if run.notices.first():
            raise InterruptedError("no time is left to try again")

    def work() -> None:
        _publish(run, Path(made), last)

    with tempfile.TemporaryDirectory(prefix="skyspot-final-") as made:
        save_model(unwrap(model), Path(made))
        try:
            persist(run.paths, work, in_time, begun=True, limit_s=math.inf)  # Each call has a limit of its own.
        except AttemptError as error:
            raise AttemptError(
                f"the model could not be exported: {error} Checkpoint {last} is whole: the next attempt exports it",
                error.code,
            ) from None


def _let_a_newer_one(run: SpotRun) -> None:
    from trainer.run import Leaving

    with within("looking for other attempts"):
        newer = newer_attempt(run.attempt) if run.attempt else None
    if newer:
        raise Leaving(EXIT_SUPERSEDED, "superseded", superseded(newer))


def _publish(run: SpotRun, made: Path, last: CheckpointName) -> None:
    """Copy the files that were made to an empty `final/`."""
    _let_a_newer_one(run)
    final, files = run.paths.final, {}
    _empty(final)
    for source in sorted(path for path in made.rglob("*") if path.is_file()):
        name = source.relative_to(made).as_posix()
        _let_a_newer_one(run)
        with within("making a folder for the exported model"):
            (final / name).parent.mkdir(parents=True, exist_ok=True)
        files[name] = copy(source, final / name)
    kept = read_manifest(run.paths.checkpoint(last)).facts
    facts = {key: kept.get(key) for key in ("run_id", "step", "config", "binding", "metrics")}
    write_manifest(final, Manifest("final", files, {**facts, "max_steps": last.step, "checkpoint": str(last)}))


def _empty(final: Path) -> None:
    """Delete what is there, the manifest first: what is left after an interruption does not count."""
    with within("deleting an older exported model", EMPTY_S):
        with suppress(FileNotFoundError):
            (final / MANIFEST).unlink()
        if final.exists():
            shutil.rmtree(final)
        final.mkdir(parents=True)


@contextmanager
def _closed(writer: BinaryIO, count: int) -> Iterator[None]:
    """Closes a file, in which some mounts upload it, and sees whether that hangs."""
    try:
        yield
    finally:
        with within_bytes("closing the exported model's file", count):
            writer.close()


def copy(source: Path, target: Path) -> FileRecord:
    """Copy a file front to back, hashing it."""
    hasher, size = Hasher(), 0
    with within("making the exported model's file"):
        writer = target.open("xb")
    with source.open("rb") as reader, _closed(writer, source.stat().st_size):
        while chunk := reader.read(CHUNK_BYTES):
            hasher.update(chunk)
            with within("writing the exported model"):
                writer.write(chunk)
            size += len(chunk)
        with within_bytes("an fsync of the exported model", size):
            writer.flush()
            fsync(writer.fileno())
    return FileRecord(size, hasher.hexdigest())
