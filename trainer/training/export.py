"""The exported model, `final/`: the one folder that is emptied and written again if it is not whole."""

from __future__ import annotations

import inspect
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import nn

from trainer.attempt.ending import SUPERSEDED, Leaving
from trainer.attempt.record import newer_attempt, superseded
from trainer.bucket.deadlines import read_manifest, within, within_bytes
from trainer.bucket.hashing import CHUNK_BYTES, Hasher
from trainer.bucket.retry import retry
from trainer.checkpoint.names import named_tensors, without_compilation
from trainer.checkpoint.writing import write_manifest, write_tensors
from trainer.errors import AttemptError, RunError, TrainerError
from trainer.layout.documents import fsync
from trainer.layout.manifest import FileRecord, Manifest
from trainer.layout.names import MANIFEST, CheckpointName, is_safe_name
from trainer.machine import scratch
from trainer.machine.scratch import ScratchError
from trainer.training.console import print_line
from trainer.training.participant import Participant

EMPTY_S = 600.0
"""Time to delete an older `final/`; each of its files takes a request or two."""


class Write(Protocol):
    """Streams tensors into a safetensors file in `final/`, front to back, without a copy on local disk."""

    def __call__(
        self, name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write one new file; `name` may contain folders."""


def save_tensors(
    model: nn.Module,
    folder: Path,
    write: Write | None = None,
    name: str = "model.safetensors",
    whole: Mapping[int, torch.Tensor] | None = None,
) -> None:
    """Write a model's weights into one file: the export of a model that has no `save_pretrained`.

    The value of a module's `get_extra_state` is exported if it is a tensor: safetensors holds nothing else.

    Args:
        model: The model.
        folder: A local folder, for a file without `write`.
        write: Streams the file.
        name: The file's.
        whole: The whole of each tensor that is cut over the ranks, by the cut one's id.
    """
    held = model.state_dict(keep_vars=True)
    tensors, others = named_tensors({key: (whole or {}).get(id(value), value) for key, value in held.items()})
    tensors = {key: value.detach() for key, value in tensors.items()}
    if others:
        print_line(f"Not exported, because a safetensors file holds tensors only: {', '.join(others)}")
    if write:
        write(name, tensors)
    else:
        write_tensors(folder / name, tensors)


def check_save_model(save_model: Callable[..., None]) -> None:
    """Refuse, before training, a function that could not be called after it.

    Raises:
        RunError: it does not take (model, folder).
    """
    with suppress(ValueError, TypeError):  # A built-in function does not list its parameters.
        signature = inspect.signature(save_model)
        try:
            signature.bind(None, Path(), **({"write": None} if "write" in signature.parameters else {}))
        except TypeError as error:
            raise RunError(f"save_model{signature} must accept save_model(model, folder) ({error})") from None


def _streams(save_model: Callable[..., None]) -> bool:
    """True if it takes `write`, besides the model and the folder."""
    with suppress(ValueError, TypeError):
        return "write" in inspect.signature(save_model).parameters
    return False


def export(run: Participant, model: nn.Module, save_model: Callable[..., None], last: CheckpointName) -> None:
    """Write `final/` from the model, which has the weights of the `last` checkpoint; on rank 0 only.

    save_pretrained seeks and renames, which a bucket's mount may refuse. So it writes to local disk, and the files are
    then copied front to back, MANIFEST.json last; all of them again if the bucket fails for a moment. A `save_model`
    that takes `write` streams its weights through it instead, without a copy of the model on local disk.

    Raises:
        AttemptError: the bucket cannot be written for ten minutes, or a file of `save_model` cannot be exported.
        ScratchError: the local disk is full.
    """

    def check_time() -> None:
        if run.notices.first():
            raise InterruptedError("no time is left to retry")

    with without_compilation(model) as bare:
        streams = _streams(save_model)
        needed = 0 if streams else sum(tensor.nbytes for tensor in chain(bare.parameters(), bare.buffers()))
        try:
            with scratch.folder("final", needed) as made:
                if not streams:
                    make_locally(lambda: save_model(bare, made), made, needed)

                def work() -> None:
                    _publish(run, made, last, (lambda write: save_model(bare, made, write=write)) if streams else None)

                retry(run.paths, work, check_time, begun=True, limit_s=math.inf)  # Each call has its own limit.
        except (AttemptError, ScratchError) as error:
            raise type(error)(
                f"the model could not be exported: {error} Checkpoint {last} is whole; the next attempt exports it",
                error.code,
            ) from None


def make_locally(save: Callable[[], None], made: Path, needed: int) -> None:
    """Have `save_model` write into a local folder.

    Raises:
        ScratchError: a local disk is full. Libraries raise their own errors for that, so the disk itself is checked.
    """
    try:
        save()
    except TrainerError:
        raise
    except Exception as error:
        if where := _full_disk(error, made):
            raise scratch.full(where, needed=needed if made.is_relative_to(where) else 0) from None
        raise


def _full_disk(error: Exception, made: Path) -> Path | None:
    """The folder that is full, if this is why a function that writes into `made` failed."""
    place = made.parent.parent
    if not (isinstance(error, OSError) and error.errno in scratch.FULL):
        return place if scratch.is_full(made) else None
    where = Path(scratch.blamed(error, place))
    return place if where.is_relative_to(made) else where.parent if error.filename else where


def _refuse_if_superseded(run: Participant) -> None:
    with within("looking for other attempts"):
        newer = newer_attempt(run.attempt) if run.attempt else None
    if newer:
        raise Leaving(SUPERSEDED, superseded(newer))


def _publish(run: Participant, made: Path, last: CheckpointName, save: Callable[[Write], None] | None) -> None:
    """Empty `final/`; then stream the weights into it, or copy the files that were made."""
    _refuse_if_superseded(run)
    final = run.paths.final
    files: dict[str, FileRecord] = {}
    _empty(final)

    def begin(name: str) -> Path:
        _refuse_name(name, files)
        _refuse_if_superseded(run)
        with within("making a folder for the exported model"):
            (final / name).parent.mkdir(parents=True, exist_ok=True)
        return final / name

    if save:
        failed: list[OSError] = []

        def write(name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
            target = begin(name)
            try:
                files[name] = write_tensors(target, tensors, metadata)
            except OSError as error:
                failed.append(error)
                raise

        for entry in made.iterdir():  # From an earlier try.
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        try:
            make_locally(lambda: save(write), made, 0)
        except Exception:
            if failed:  # The bucket's error, which `save_model` may have wrapped.
                raise failed[0] from None
            raise
    for source in sorted(path for path in made.rglob("*") if path.is_file()):
        name = source.relative_to(made).as_posix()
        target = begin(name)
        files[name] = copy(source, target)
    saved = read_manifest(run.paths.checkpoint(last)).facts
    facts = {key: saved.get(key) for key in ("run_id", "step", "config", "binding", "metrics", "until")}
    write_manifest(final, Manifest("final", files, {**facts, "max_steps": last.step, "checkpoint": str(last)}))


def _refuse_name(name: str, files: Mapping[str, FileRecord]) -> None:
    """Refuse a file that the manifest of `final/` could not list.

    Raises:
        AttemptError: its name is taken, or cannot name a file in a bucket.
    """
    if name == MANIFEST:
        raise AttemptError(f"save_model wrote {MANIFEST}, a name reserved by the trainer. Use another name.")
    if not is_safe_name(name):
        raise AttemptError(f"save_model wrote {name[:80]!r}, which cannot name a file in the bucket. Use another name.")
    if name in files:
        raise AttemptError(f"save_model wrote {name[:80]!r} twice. Use another name for one of them.")


def _empty(final: Path) -> None:
    """Delete an older `final/`, its manifest first, so that what an interruption leaves behind does not count."""
    with within("deleting an older exported model", EMPTY_S):
        with suppress(FileNotFoundError):
            (final / MANIFEST).unlink()
        if final.exists():
            shutil.rmtree(final)
        final.mkdir(parents=True)


@contextmanager
def _closed(writer: BinaryIO, count: int) -> Iterator[None]:
    """Close a file, with a deadline: some mounts upload it then."""
    try:
        yield
    finally:
        with within_bytes("closing the exported model's file", count):
            writer.close()


def copy(source: Path, target: Path) -> FileRecord:
    """Copy a file front to back, and hash it."""
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
