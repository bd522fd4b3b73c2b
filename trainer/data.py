"""Text to packed samples of tokens, prepared once per run and kept in the bucket.

A later attempt, on another machine, trains on the very bytes that the first one prepared, whatever has become of the
source or of the tokenizer's library meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from trainer import home
from trainer.hashing import CHUNK_BYTES, Hasher
from trainer.layout import (
    MANIFEST,
    AttemptName,
    FileRecord,
    LayoutError,
    LayoutVersionError,
    Manifest,
    RunPaths,
    fsync,
    sizes_agree,
    write_once,
)
from trainer.patience import opened, read_manifest, within, within_bytes

if TYPE_CHECKING:
    from trainer.config import TrainConfig

STDLIB_BYTES = 8 << 20
BYTE_VOCAB = 257
END_OF_DOCUMENT = 256
HELD_OUT_ONE_IN = 100
PIECE_BYTES = 1 << 20
LISTING_LAG_S = 20.0
"""Two mounts of one bucket see each other's new files after up to 10 s."""


class DataError(Exception):
    """The data cannot be trained on; the message says why and what to do."""


@dataclass(frozen=True)
class Tokens:
    """A run's prepared data, on local disk."""

    folder: str
    """Its name under tokens/."""
    key: str
    train: np.ndarray
    """(samples, seq_len)"""
    held_out: np.ndarray
    """(samples, seq_len); never trained on."""
    vocab_size: int


def sources(data: str) -> list[tuple[str, Path]]:
    """The files of a data source as (relative path, path), sorted.

    Raises:
        DataError: there is no such folder or file, or nothing readable in it.
    """
    if data == "stdlib":
        return _stdlib()
    root = _download(data) if is_hub_id(data) else Path(data)
    if root.is_file():
        found = [(root.name, root)]
    elif root.is_dir():
        found = sorted((path.relative_to(root).as_posix(), path) for path in root.rglob("*") if path.is_file())
    else:
        raise DataError(
            f"--data {data}: no such folder or file on this machine: mount a folder of .txt or .jsonl files, name a "
            "data set of the hub (ORGANISATION/NAME), or say stdlib"
        )
    readable = [(name, path) for name, path in found if path.suffix in (".txt", ".jsonl")]
    if not readable:
        raise DataError(
            f"--data {data}: no .txt or .jsonl file in it (parquet is not read in this release: convert it to .jsonl)"
        )
    return readable


def is_hub_id(data: str) -> bool:
    """Whether the source is a data set of the Hugging Face hub, ORGANISATION/NAME: a path that is there comes first."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", data)) and not Path(data).exists()


def _download(data: str) -> Path:
    """The .txt and .jsonl files of a hub's data set, on local disk.

    Raises:
        DataError: the hub does not answer, or does not have it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(data, repo_type="dataset", allow_patterns=["*.txt", "*.jsonl"]))
    except Exception as error:  # Its own errors, those of the network, and those of the disk.
        text = str(error).strip().splitlines()
        raise DataError(
            f"--data {data}: not to be had from the hub: {text[0] if text else type(error).__name__}"
        ) from None


def _stdlib() -> list[tuple[str, Path]]:
    """The standard library's own source, up to 8 MB of it; a text that is on every machine with a Python."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "__pycache__"}
    found, total = [], 0
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if skip.isdisjoint(name.parts):
            total += path.stat().st_size
            if total > STDLIB_BYTES:
                break
            found.append((name.as_posix(), path))
    return found


def data_key(config: TrainConfig) -> str:
    """What a folder of prepared data is known by, 16 hexadecimal digits: the source, its files' names and sizes, the
    tokenizer and the length of a sample. Of `stdlib` and of a hub's data set, the name alone: the first machine
    decides, and a resume does not need them.

    Raises:
        DataError: the source is not there.
    """  # noqa: D205
    by_name = config.data == "stdlib" or is_hub_id(config.data)
    files = [] if by_name else [[name, path.stat().st_size] for name, path in sources(config.data)]
    source = config.data if by_name else "files"
    text = json.dumps([source, files, tokenizer_name(config), config.seq_len])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tokenizer_name(config: TrainConfig) -> str:
    """`bytes` for the tiny model, else the model whose tokenizer it is."""
    return "bytes" if config.model == "tiny" else config.model


def is_whole(paths: RunPaths, folder: str) -> bool:
    """Whether a folder of prepared data is committed and has the sizes that its manifest says.

    Raises:
        OSError: it cannot be looked at.
    """
    try:
        return sizes_agree(paths.tokens / folder, read_manifest(paths.tokens / folder)) is None
    except LayoutError:
        return False


def _whole_folder(paths: RunPaths, key: str) -> str | None:
    """The whole folder of prepared data that is there for a key."""
    with within("looking for prepared data"):
        if not paths.tokens.is_dir():
            return None
        names = sorted(entry.name for entry in os.scandir(paths.tokens) if entry.name.startswith(f"{key}-"))
        return next((name for name in names if is_whole(paths, name)), None)


def prepare(paths: RunPaths, attempt: AttemptName, config: TrainConfig, between: Callable[[], None]) -> str:
    """Pack the data into `tokens/<key>-<attempt>/`, or find the whole folder that is there; returns its name.

    Args:
        paths: The run's.
        attempt: Whose folder it becomes.
        config: Names the source, the tokenizer and the length of a sample.
        between: Called between pieces of work; raises to stop.

    Raises:
        DataError: the data is unreadable, or too small.
        OSError: the bucket cannot be written.
    """
    key = data_key(config)
    found = _whole_folder(paths, key)
    if found:
        return found
    encode, vocab_size, end = _encoder(config)
    dtype = "<u2" if vocab_size <= 1 << 16 else "<u4"
    # Packed on local disk first: how many samples there are decides which are held out.
    with tempfile.TemporaryDirectory(prefix="skyspot-tokens-") as made:
        packed = Path(made) / "packed"
        count = 0
        with packed.open("wb") as file:
            for text in documents(config.data, between):
                ids = np.asarray([*encode(text), end], dtype=dtype)
                file.write(ids.tobytes())
                count += len(ids)
        samples = count // config.seq_len
        held_out = max(1, samples // HELD_OUT_ONE_IN)
        if samples - held_out < config.global_batch_size:
            raise DataError(
                f"--data {config.data}: {count} tokens make {samples} samples of {config.seq_len}; one is held "
                f"out, and a batch takes {config.global_batch_size}. Give more text or a smaller batch"
            )
        rows = np.memmap(packed, dtype=dtype, mode="r", shape=(samples, config.seq_len))
        # Evenly spread, so that they are of every part of the text.
        chosen = np.zeros(samples, dtype=bool)
        chosen[np.arange(held_out) * samples // held_out] = True
        folder = paths.tokens / f"{key}-{attempt}"
        with within("making a folder for prepared data"):
            if folder.exists():  # Of a try of this attempt's that failed half-way.
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
        files = {
            "train.bin": _write_rows(folder / "train.bin", rows, np.flatnonzero(~chosen), between),
            "held_out.bin": _write_rows(folder / "held_out.bin", rows, np.flatnonzero(chosen), between),
        }
    facts = {
        "key": key,
        "source": config.data,
        "tokenizer": tokenizer_name(config),
        "seq_len": config.seq_len,
        "vocab_size": vocab_size,
        "dtype": dtype,
        "n_train": samples - held_out,
        "n_held_out": held_out,
    }
    with within("writing MANIFEST.json of prepared data"):
        write_once(folder / MANIFEST, Manifest("tokens", files, facts).to_json())
    return folder.name


def documents(data: str, between: Callable[[], None]) -> Iterator[str]:
    """The texts of a source, one by one.

    Raises:
        DataError: a file is not UTF-8, or a line of .jsonl has no `text`; says which.
    """
    for _, path in sources(data):
        between()
        try:
            if path.suffix != ".jsonl":
                yield path.read_text(encoding="utf-8", errors="replace" if data == "stdlib" else "strict")
                continue
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _text_of(line, path, number)
                    if number % 1000 == 0:
                        between()
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 at byte {error.start}: convert it, or take it out") from None
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: not JSON ({error})") from None
    text = document.get("text") if isinstance(document, dict) else None
    if not isinstance(text, str):
        raise DataError(f"{path}, line {number}: no `text` field that holds a string")
    return text


def _encoder(config: TrainConfig) -> tuple[Callable[[str], Any], int, int]:
    """(text -> token ids, size of the vocabulary, the id that ends a document)."""
    if config.model == "tiny":
        return lambda text: text.encode("utf-8", "replace"), BYTE_VOCAB, END_OF_DOCUMENT
    from trainer.model import load_tokenizer

    tokenizer = load_tokenizer(config)
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError(f"--model {config.model}: its tokenizer has no end-of-text token to put between documents")
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], len(tokenizer), end


def _write_rows(path: Path, rows: np.ndarray, chosen: np.ndarray, between: Callable[[], None]) -> FileRecord:
    """Stream some rows into a new file, front to back."""
    hasher, size = Hasher(), 0
    per_piece = max(1, PIECE_BYTES // rows[0].nbytes)
    with within("opening a file of prepared data"):
        file = path.open("xb", buffering=0)
    try:
        for start in range(0, len(chosen), per_piece):
            between()
            data = memoryview(rows[chosen[start : start + per_piece]].tobytes())
            hasher.update(data)
            size += len(data)
            while data:
                with within("writing prepared data"):
                    data = data[file.write(data) :]
        with within_bytes("an fsync of prepared data", size):
            fsync(file.fileno())
    finally:
        with within_bytes("a close of prepared data", size):
            file.close()
    return FileRecord(size, hasher.hexdigest())


def open_tokens(
    paths: RunPaths,
    folder: str,
    cache: Path | None = None,
    patience_s: float = LISTING_LAG_S,
    between: Callable[[], None] = lambda: None,
) -> Tokens:
    """A run's prepared data, copied to local disk (hashed on the way) and memory-mapped: no step reads the bucket.

    Args:
        paths: The run's.
        folder: Its name under tokens/.
        cache: Where the copy goes.
        patience_s: How long another machine's mount may take to show the folder.
        between: Called while waiting; raises to stop.

    Raises:
        DataError: a file is not as its manifest says.
    """
    source, end = paths.tokens / folder, time.monotonic() + patience_s
    while True:
        try:
            manifest = read_manifest(source)
            break
        except LayoutVersionError:
            raise
        except LayoutError as error:
            if time.monotonic() >= end:
                raise DataError(f"{source}: {error}") from None
            between()
            time.sleep(0.5)
    facts = manifest.facts
    local = (cache or _cache()) / f"{folder}-{manifest.files['train.bin'].hash}"
    arrays = {}
    for name, count in (("train.bin", facts["n_train"]), ("held_out.bin", facts["n_held_out"])):
        path = local / name
        record = manifest.files[name]
        if not path.exists() or path.stat().st_size != record.bytes:
            _fetch(source / name, path, record)
        arrays[name] = np.memmap(path, dtype=facts["dtype"], mode="r", shape=(count, facts["seq_len"]))
    return Tokens(folder, facts["key"], arrays["train.bin"], arrays["held_out.bin"], facts["vocab_size"])


def _cache() -> Path:
    folder = home.cache()
    if folder is None:
        raise DataError("neither HOME nor a folder for temporary files can be written, to copy the data to: set TMPDIR")
    return folder / "tokens"


def _read(file: BinaryIO) -> bytes:
    with within("reading prepared data"):
        return file.read(CHUNK_BYTES)


def _fetch(source: Path, target: Path, record: FileRecord) -> None:
    """Copy a file to local disk; it appears there only when it hashed right."""
    target.parent.mkdir(parents=True, exist_ok=True)
    hasher = Hasher()
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as copy:
        try:
            with opened(source, "prepared data") as file:
                while chunk := _read(file):
                    hasher.update(chunk)
                    copy.write(chunk)
            copy.flush()
            if hasher.hexdigest() != record.hash:
                raise DataError(
                    f"{source}: it does not hash to what its manifest says. Delete its folder: it will be made again"
                )
            shutil.move(copy.name, target)
        except BaseException:
            Path(copy.name).unlink(missing_ok=True)
            raise
