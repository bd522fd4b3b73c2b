"""The exported model, `final/`: the one folder that is emptied and written again where it is not whole."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from torch import nn

from trainer.attempt import newer_attempt, superseded
from trainer.checkpoint import write_manifest, write_tensors
from trainer.hashing import CHUNK_BYTES, Hasher
from trainer.layout import EXIT_SUPERSEDED, CheckpointName, FileRecord, Manifest, fsync, read_manifest
from trainer.patience import within, within_bytes
from trainer.state import unwrap

if TYPE_CHECKING:
    from trainer.run import SpotRun


def save_tensors(model: nn.Module, folder: Path) -> None:
    """Write a model's weights into `model.safetensors`: what is exported of a model that has no `save_pretrained`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_tensors(folder / "model.safetensors", tensors)


def export(run: SpotRun, model: nn.Module, save_model: Callable[[nn.Module, Path], None], last: CheckpointName) -> None:
    """Make `final/` from the model as it stands, which is as the `last` checkpoint has it; rank 0 alone.

    save_pretrained seeks and renames, which a bucket's mount may refuse: it writes to local disk, and the files are
    then copied front to back, MANIFEST.json last.
    """
    from trainer.run import Leaving

    def let_a_newer_one() -> None:
        newer = newer_attempt(run.attempt) if run.attempt else None
        if newer:
            raise Leaving(EXIT_SUPERSEDED, "superseded", superseded(newer))

    let_a_newer_one()
    final = run.paths.final
    with tempfile.TemporaryDirectory(prefix="skyspot-final-") as made:
        save_model(unwrap(model), Path(made))
        let_a_newer_one()
        if final.exists():
            shutil.rmtree(final)
        final.mkdir(parents=True)
        files = {}
        for source in sorted(path for path in Path(made).rglob("*") if path.is_file()):
            name = source.relative_to(made).as_posix()
            let_a_newer_one()
            (final / name).parent.mkdir(parents=True, exist_ok=True)
            files[name] = copy(source, final / name)
        kept = read_manifest(run.paths.checkpoint(last)).facts
        facts = {key: kept.get(key) for key in ("run_id", "step", "config", "binding", "metrics")}
        write_manifest(final, Manifest("final", files, {**facts, "max_steps": last.step, "checkpoint": str(last)}))


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
