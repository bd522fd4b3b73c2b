"""Prepared data: text packed into samples of tokens, once per run, in the bucket.

Later attempts, on other machines, train on the very bytes that the first attempt prepared, even if the source or the
tokenizer library has changed or disappeared since.
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
from typing import TYPE_CHECKING, Any, BinaryIO

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
from trainer.finetune.text import documents, with_path
from trainer.layout.documents import LayoutError, fsync, write_once
from trainer.layout.manifest import FileRecord, Manifest, sizes_agree
from trainer.layout.names import MANIFEST, AttemptName, RunPaths
from trainer.machine import scratch

if TYPE_CHECKING:
    from trainer.finetune.config import TrainConfig
    from trainer.finetune.model import ModelFiles

HELD_OUT_ONE_IN = 100
PIECE_BYTES = 1 << 20
CHECK_STOP_TOKENS = 1 << 15
"""Tokens between two checks for a stop."""


def download(data: str, revision: str | None, check_stop: Callable[[], None]) -> tuple[Path, Source]:
    """Download the .txt and .jsonl files of a data set of the Hub; returns their local folder and its contents.

    Raises:
        DataError: it has no such files.
        HubError: it cannot be downloaded.
    """
    ignored: list[str] = []

    def choose(names: list[str]) -> list[str]:
        ignored[:] = [name for name in names if not is_read(name) and not is_hidden(name)]
        return [name for name in names if is_read(name)]

    root = hub.download(hub.Repository(data, "dataset", revision), choose=choose, check_stop=check_stop)
    kinds = Counter(kind_of(Path(name)) or "no ending" for name in ignored)
    if not root.is_dir():
        raise nothing_readable(data, kinds)
    return root, Source(files_of(data, root, check_stop).files, kinds)


def local_source(config: TrainConfig, check_stop: Callable[[], None] = lambda: None) -> Source | None:
    """The files of a source on this machine; None for `stdlib` and a data set of the Hub.

    Raises:
        DataError: the source does not exist.
        OSError: the source cannot be read now.
    """
    by_name = config.data == "stdlib" or is_hub_id(config.data)
    return None if by_name else files_of(config.data, check_stop=check_stop)


def data_key(config: TrainConfig, source: Source | None, tokenizer: str | None = None) -> str:
    """The name of prepared data, 16 hexadecimal digits.

    It hashes the source's file names and sizes, the tokenizer's name and the length of a sample. For `stdlib` and a
    data set of the Hub it hashes the source's name instead of its files: the first machine decides on the content, and
    a resume does not need the source.

    Args:
        config: Names the source, the tokenizer and the length of a sample.
        source: The result of `local_source`.
        tokenizer: Replaces the config's tokenizer name.
    """
    files = [[file.name, file.bytes] for file in source.files] if source else []
    name = "files" if source else config.data
    text = json.dumps([name, files, tokenizer or tokenizer_name(config), config.tokens_per_sample])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tokenizer_name(config: TrainConfig) -> str:
    """`bytes` for the tiny model, or else the model that the tokenizer belongs to."""
    return "bytes" if config.model == "tiny" else config.model


def whole_manifest(paths: RunPaths, folder: str) -> Manifest | None:
    """The manifest of a folder of prepared data; None unless it is committed and its files have the right sizes.

    Raises:
        OSError: the folder cannot be read now.
    """
    try:
        manifest = read_manifest(paths.tokens / folder)
        return manifest if sizes_agree(paths.tokens / folder, manifest) is None else None
    except LayoutError:
        return None


def whole_folders(paths: RunPaths, key: str) -> Iterator[tuple[str, Manifest]]:
    """All whole folders of prepared data for a key, with their manifests.

    Raises:
        OSError: the folders cannot be read now.
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
    print_line: Callable[[str], None] = lambda line: None,
) -> str:
    """Pack the data into `tokens/<key>-<attempt>/`, unless a whole folder exists; returns the folder's name.

    Args:
        paths: The paths of the run.
        attempt: The attempt that prepares the data.
        config: Names the source, the tokenizer and the length of a sample.
        check_stop: Called between pieces of work, several times a second; raises to stop.
        model: The files of the tokenizer; None: at the config's path.
        revision: The commit of a data set of the Hub; None for the newest.
        avoid: Folders that look whole but are damaged.
        print_line: Prints a note for the user.

    Raises:
        DataError: the data is unreadable or too small.
        ScratchError: the local disk is full.
        HubError: the Hub does not have the data, or did not answer.
        OSError: the source cannot be read now, or the bucket cannot be written.
    """
    listed = local_source(config, check_stop)
    key = data_key(config, listed)
    if found := next((name for name, _ in whole_folders(paths, key) if name not in avoid), None):
        return found
    source, data_revision = (listed, None) if listed else _find_source(config, revision, check_stop)
    if line := source.ignored_line(config.data):
        print_line(line)
    encoder = _encoder(config, model)
    dtype = "<u2" if encoder.vocab_size <= 1 << 16 else "<u4"
    # Packed on local disk first: the number of samples decides which of them are held out.
    size = source.total_bytes
    with scratch.folder("packing", size) as made, (made / "packed").open("w+b", buffering=PIECE_BYTES) as packed:
        n_tokens = _pack(packed, made, source, encoder, dtype, config, check_stop)
        n_samples, n_held_out = _split(config, source, n_tokens)
        folder = _new_folder(paths, f"{key}-{attempt}", avoid)
        rows = _Rows(packed, n_samples, n_held_out, config.tokens_per_sample * np.dtype(dtype).itemsize)
        files = _write_samples(folder, rows, check_stop)
    facts = {
        "key": key,
        "source": config.data,
        "tokenizer": tokenizer_name(config),
        "seq_len": config.tokens_per_sample,
        "vocab_size": encoder.vocab_size,
        "dtype": dtype,
        "n_train": n_samples - n_held_out,
        "n_held_out": n_held_out,
        "data_revision": data_revision,
        "model_revision": model.revision if model else None,
    }
    _commit(folder, files, facts)
    return folder.name


def _find_source(
    config: TrainConfig, revision: str | None, check_stop: Callable[[], None]
) -> tuple[Source, str | None]:
    """The files of `stdlib` or of a data set of the Hub, and its commit."""
    if config.data == "stdlib":
        return files_of(config.data), None
    root, source = download(config.data, revision, check_stop)
    return source, root.name


def _split(config: TrainConfig, source: Source, n_tokens: int) -> tuple[int, int]:
    """The number of samples, and how many of them are held out.

    Raises:
        DataError: there are too few to train on.
    """
    if n_tokens <= len(source.files):
        raise DataError(f"--data {config.data}: no text in its {len(source.files)} files")
    n_samples = n_tokens // config.tokens_per_sample
    n_held_out = max(1, n_samples // HELD_OUT_ONE_IN)
    if n_samples - n_held_out < config.global_batch_size:
        raise DataError(
            f"--data {config.data}: {n_tokens} tokens give only {n_samples} samples of {config.tokens_per_sample} "
            f"tokens. {n_held_out} held out, a batch needs {config.global_batch_size}. Give more text or a smaller "
            "batch"
        )
    return n_samples, n_held_out


def _new_folder(paths: RunPaths, name: str, avoid: Collection[str]) -> Path:
    """A new folder for prepared data."""
    while name in avoid:  # This very attempt made it, and it is damaged: it stays as it is.
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
    """Write the tokens of all documents, one after the other; returns their number."""
    count = checked = 0
    end = np.asarray([encoder.end], dtype=dtype)
    for document in documents(source.files, check_stop, "replace" if config.data == "stdlib" else "strict"):
        for ids in encoder.ids(document):
            with scratch.local(made):
                packed.write(ids.astype(dtype).tobytes())
            count += len(ids)
            if count - checked > CHECK_STOP_TOKENS:
                check_stop()
                checked = count
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
    """The samples of a packed file. The held-out ones are evenly spread over the text."""

    def __init__(self, packed: BinaryIO, samples: int, held_out: int, row_bytes: int) -> None:
        self._packed, self._samples, self._held_out, self._row_bytes = packed, samples, held_out, row_bytes

    def pieces(self, *, held_out: bool) -> Iterator[bytes]:
        """The held-out samples, or all others, about a megabyte at a time."""
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


def _write_samples(folder: Path, rows: _Rows, check_stop: Callable[[], None]) -> dict[str, FileRecord]:
    train = _write(folder / "train.bin", rows.pieces(held_out=False), check_stop)
    held_out = _write(folder / "held_out.bin", rows.pieces(held_out=True), check_stop)
    return {"train.bin": train, "held_out.bin": held_out}


def _write(path: Path, pieces: Iterator[bytes], check_stop: Callable[[], None]) -> FileRecord:
    """Write pieces into a new file, front to back."""
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


def _commit(folder: Path, files: dict[str, FileRecord], facts: dict[str, Any]) -> None:
    """Write the manifest, which makes the folder valid; facts that are None are left out."""
    manifest = Manifest("tokens", files, {name: value for name, value in facts.items() if value is not None})
    with within("writing MANIFEST.json of prepared data"):
        write_once(folder / MANIFEST, manifest.to_json())


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Add the path to errors of calls on an open file."""
    try:
        yield
    except OSError as error:
        raise with_path(error, path) from None
