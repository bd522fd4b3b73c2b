"""Text to packed samples of tokens, prepared once per run and kept in the bucket.

A later attempt, on another machine, trains on the very bytes that the first one prepared, even if the source or the
tokenizer's library has changed or gone since.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from trainer.bucket.deadlines import read_manifest, within, within_bytes
from trainer.bucket.hashing import Hasher
from trainer.finetune import hub
from trainer.finetune.encoding import Bytes, Encoder, Pretrained
from trainer.finetune.sources import (
    DataError,
    Source,
    files_of,
    is_hidden,
    is_hub_id,
    is_read,
    kind_of,
    nothing_readable,
)
from trainer.finetune.text import documents
from trainer.layout.documents import LayoutError, fsync, write_once
from trainer.layout.manifest import FileRecord, Manifest, sizes_agree
from trainer.layout.names import MANIFEST, AttemptName, RunPaths
from trainer.machine import scratch

if TYPE_CHECKING:
    from trainer.finetune.config import TrainConfig
    from trainer.finetune.model import ModelFiles

HELD_OUT_ONE_IN = 100
PIECE_BYTES = 1 << 20
LOOK_TOKENS = 1 << 15
"""After so many tokens we look for a stop."""


def download(data: str, revision: str | None, check_stop: Callable[[], None]) -> tuple[Path, Source]:
    """The .txt and .jsonl files of a data set of the Hub: their folder on local disk, and what is in it.

    Raises:
        DataError: there are none.
        HubError: it cannot be downloaded.
    """
    left_out: list[str] = []

    def wanted(names: list[str]) -> list[str]:
        left_out[:] = [name for name in names if not is_read(name) and not is_hidden(name)]
        return [name for name in names if is_read(name)]

    root = hub.download(data, kind="dataset", option="--data", wanted=wanted, revision=revision, check_stop=check_stop)
    kinds = Counter(kind_of(Path(name)) or "no ending" for name in left_out)
    if not root.is_dir():
        raise nothing_readable(data, kinds)
    return root, Source(files_of(data, root).files, kinds)


def data_key(config: TrainConfig, tokenizer: str | None = None) -> str:
    """The name of prepared data, 16 hexadecimal digits.

    It is a hash of the source, its files' names and sizes, the tokenizer's name and the length of a sample. For
    `stdlib` and a data set of the Hub it is the source's name alone: the first machine decides what is in it, and a
    resume does not need it.

    Args:
        config: Names all of that.
        tokenizer: Its name, where it is not the config's.

    Raises:
        DataError: the source is not there.
        OSError: it cannot be looked at just now.
    """
    by_name = config.data == "stdlib" or is_hub_id(config.data)
    files = [] if by_name else [[file.name, file.bytes] for file in files_of(config.data).files]
    source = config.data if by_name else "files"
    text = json.dumps([source, files, tokenizer or tokenizer_name(config), config.seq_len])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tokenizer_name(config: TrainConfig) -> str:
    """`bytes` for the tiny model, else the model whose tokenizer it is."""
    return "bytes" if config.model == "tiny" else config.model


def whole_manifest(paths: RunPaths, folder: str) -> Manifest | None:
    """The manifest of a folder of prepared data that is committed and whose files have the right sizes; else None.

    Raises:
        OSError: it cannot be looked at.
    """
    try:
        manifest = read_manifest(paths.tokens / folder)
        return manifest if sizes_agree(paths.tokens / folder, manifest) is None else None
    except LayoutError:
        return None


def whole_folders(paths: RunPaths, key: str) -> Iterator[tuple[str, Manifest]]:
    """The whole folders of prepared data that there are for a key.

    Raises:
        OSError: they cannot be looked at.
    """
    with within("looking for prepared data"):
        if not paths.tokens.is_dir():
            return
        names = sorted(entry.name for entry in os.scandir(paths.tokens) if entry.name.startswith(f"{key}-"))
    for name in names:
        with within("looking for prepared data"):
            manifest = whole_manifest(paths, name)
        if manifest:
            yield name, manifest


def prepare(
    paths: RunPaths,
    attempt: AttemptName,
    config: TrainConfig,
    check_stop: Callable[[], None],
    *,
    model: ModelFiles | None = None,
    revision: str | None = None,
    avoid: Collection[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Pack the data into `tokens/<key>-<attempt>/`, or find the whole folder that is there; returns its name.

    Args:
        paths: The run's.
        attempt: Whose folder it becomes.
        config: Names the source, the tokenizer and the length of a sample.
        check_stop: Called between pieces of work, several times a second; raises to stop.
        model: Where the tokenizer's files are; None: where the config says.
        revision: Which commit of a data set of the Hub; None for the newest.
        avoid: Folders that look whole and are not.
        say: Prints what a user should know of the source.

    Raises:
        DataError: the data is unreadable, or too small.
        ScratchError: the local disk is full.
        HubError: the Hub does not have it, or did not answer.
        OSError: the source cannot be read just now, or the bucket cannot be written.
    """
    key = data_key(config)
    for name, _ in whole_folders(paths, key):
        if name not in avoid:
            return name
    root = None
    if is_hub_id(config.data):
        root, source = download(config.data, revision, check_stop)
    else:
        source = files_of(config.data)
    if line := source.left_out_line(config.data):
        say(line)
    encoder = _encoder(config, model)
    dtype = "<u2" if encoder.vocab_size <= 1 << 16 else "<u4"
    # Packed on local disk first: how many samples there are decides which are held out.
    size = sum(file.bytes for file in source.files)
    with scratch.folder("packing", size) as made, (made / "packed").open("w+b", buffering=PIECE_BYTES) as packed:
        count = _pack(packed, made, source, encoder, dtype, config, check_stop)
        if count <= len(source.files):
            raise DataError(f"--data {config.data}: no text in its {len(source.files)} files")
        samples = count // config.seq_len
        held_out = max(1, samples // HELD_OUT_ONE_IN)
        if samples - held_out < config.global_batch_size:
            raise DataError(
                f"--data {config.data}: its {count} tokens make {samples} samples of {config.seq_len}. One is held "
                f"out, and a batch takes {config.global_batch_size}. Give more text or a smaller batch"
            )
        folder = _new_folder(paths, f"{key}-{attempt}", avoid)
        rows = _Rows(packed, samples, held_out, config.seq_len * np.dtype(dtype).itemsize)
        files = {
            "train.bin": _write(folder / "train.bin", rows.pieces(held_out=False), check_stop),
            "held_out.bin": _write(folder / "held_out.bin", rows.pieces(held_out=True), check_stop),
        }
    facts = {
        "key": key,
        "source": config.data,
        "tokenizer": tokenizer_name(config),
        "seq_len": config.seq_len,
        "vocab_size": encoder.vocab_size,
        "dtype": dtype,
        "n_train": samples - held_out,
        "n_held_out": held_out,
        **({"data_revision": root.name} if root else {}),
        **({"model_revision": model.revision} if model and model.revision else {}),
    }
    with within("writing MANIFEST.json of prepared data"):
        write_once(folder / MANIFEST, Manifest("tokens", files, facts).to_json())
    return folder.name


def _new_folder(paths: RunPaths, name: str, avoid: Collection[str]) -> Path:
    """An empty folder for prepared data."""
    while name in avoid:  # Damaged, and made by this very attempt: it stays as it is.
        name += "-again"
    folder = paths.tokens / name
    with within("making a folder for prepared data"):
        if folder.exists():  # An earlier try of this attempt failed half-way.
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    return folder


def _pack(
    packed: BinaryIO,
    made: Path,
    source: Source,
    encoder: Encoder,
    dtype: str,
    config: TrainConfig,
    check_stop: Callable[[], None],
) -> int:
    """Write the tokens of all documents, one after the other; returns how many there are."""
    count = looked = 0
    end = np.asarray([encoder.end], dtype=dtype)
    for document in documents(source.files, check_stop, "replace" if config.data == "stdlib" else "strict"):
        for ids in encoder.ids(document):
            with scratch.local(made):
                packed.write(ids.astype(dtype).tobytes())
            count += len(ids)
            if count - looked > LOOK_TOKENS:
                check_stop()
                looked = count
        with scratch.local(made):
            packed.write(end.tobytes())
        count += 1
    with scratch.local(made):
        packed.flush()
    return count


def _encoder(config: TrainConfig, model: ModelFiles | None) -> Encoder:
    if config.model == "tiny":
        return Bytes()
    from trainer.finetune.model import load_tokenizer

    tokenizer = load_tokenizer(config, model)
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError(f"--model {config.model}: its tokenizer has no end-of-text token to put between documents")
    return Pretrained(tokenizer, end)


class _Rows:
    """The samples of a packed file. Those that are held out are evenly spread: they are of every part of the text."""

    def __init__(self, packed: BinaryIO, samples: int, held_out: int, row_bytes: int) -> None:
        self._packed, self._samples, self._held_out, self._row_bytes = packed, samples, held_out, row_bytes

    def pieces(self, *, held_out: bool) -> Iterator[bytes]:
        """The held-out samples, or the others, about a megabyte at a time."""
        step = max(1, PIECE_BYTES // self._row_bytes)
        for start in range(0, self._samples, step):
            stop = min(start + step, self._samples)
            self._packed.seek(start * self._row_bytes)
            rows = np.frombuffer(self._packed.read((stop - start) * self._row_bytes), np.uint8)
            rows = rows.reshape(stop - start, self._row_bytes)
            first, last = (-(-at * self._held_out // self._samples) for at in (start, stop))
            chosen = np.zeros(stop - start, dtype=bool)
            chosen[np.arange(first, last) * self._samples // self._held_out - start] = True
            yield rows[chosen if held_out else ~chosen].tobytes()


def _write(path: Path, pieces: Iterator[bytes], check_stop: Callable[[], None]) -> FileRecord:
    """Stream pieces into a new file, front to back."""
    hasher, size = Hasher(), 0
    with within("opening a file of prepared data"):
        file = path.open("xb", buffering=0)
    try:
        for piece in pieces:
            check_stop()
            data = memoryview(piece)
            hasher.update(data)
            size += len(data)
            while data:
                with within("writing prepared data"), _named(path):
                    data = data[file.write(data) :]
        with within_bytes("an fsync of prepared data", size), _named(path):
            fsync(file.fileno())
    finally:
        with within_bytes("a close of prepared data", size), _named(path):
            file.close()
    return FileRecord(size, hasher.hexdigest())


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of calls on an open file name it."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
