"""Shares written past the system's cache are the same files, and where that cannot be they are written as usual."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from needs import NOT_HERE, needs_root
from support import clean_env

from trainer.bucket.hashing import hash_file
from trainer.bucket.mounts import DISKS, mount_of
from trainer.checkpoint import writing
from trainer.checkpoint.shards import Part
from trainer.checkpoint.writing import paged_memory, write_share

SIZES = {"a": 1_300_001, "b": 7, "c": 0, "d": 2_500_000}


def share(shift: int = 0) -> tuple[list[Part], memoryview, Callable[[Part], torch.Tensor]]:
    """(parts, all but the last of them side by side in memory that begins `shift` bytes into a page, fetch)."""
    parts = [Part(name, torch.float32, (size,), (0,), (size,), (0,)) for name, size in SIZES.items()]
    own = Part("rng.0", torch.uint8, (5001,), (0,), (5001,), (0,))
    count = 4 * sum(SIZES.values())
    memory = paged_memory(count + shift)[shift:]
    memory[:] = torch.arange(count, dtype=torch.int64).mul(2654435761).to(torch.uint8).numpy().data
    found, at = {"rng.0": torch.arange(5001).to(torch.uint8)}, 0
    for name, size in SIZES.items():
        found[name] = torch.frombuffer(bytearray(memory[at : at + 4 * size]) or bytearray(4), dtype=torch.float32)[
            :size
        ]
        at += 4 * size
    return [*parts, own], memory, lambda part: found[part.name]


def flags_of(path: Path) -> int:
    """With which flags this process has a file open."""
    for link in Path("/proc/self/fd").iterdir():
        if link.exists() and link.resolve() == path:
            text = Path(f"/proc/self/fdinfo/{link.name}").read_text()
            return int(next(line for line in text.splitlines() if line.startswith("flags:")).split()[1], 8)
    raise AssertionError(f"{path} is not open")


@pytest.mark.parametrize("shift", [0, 1])
def test_a_share_past_the_cache_is_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: int) -> None:
    """From memory that does not begin at a page as well: the system refuses it, and it is written as usual."""
    if mount_of(tmp_path).kind not in DISKS:
        pytest.skip(f"files past the page cache: {NOT_HERE}: no disk under the temporary folder")
    parts, memory, fetch = share(shift)
    usual = write_share(tmp_path / "usual", parts, fetch)
    half = []
    monkeypatch.setattr(writing, "at_point", lambda point: half.append(flags_of(tmp_path / "past")))
    past = write_share(tmp_path / "past", parts, fetch, memory)
    assert past == usual
    assert (tmp_path / "past").read_bytes() == (tmp_path / "usual").read_bytes()
    assert [bool(flags & os.O_DIRECT) for flags in half] == [shift == 0]
    told: list[int] = []
    assert hash_file(tmp_path / "past", told.append, past_cache=True) == usual.hash
    assert sum(told) == usual.bytes


@pytest.mark.slow
def test_a_file_system_that_knows_no_way_past_the_cache_is_written_as_usual(tmp_path: Path) -> None:
    script = """
import subprocess, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "ramfs", "none", folder], check=True)
from test_past_cache import share
from trainer.checkpoint.writing import write_share
from trainer.bucket.hashing import hash_file
parts, memory, fetch = share()
usual = write_share(folder / "usual", parts, fetch)
assert write_share(folder / "past", parts, fetch, memory) == usual
assert hash_file(folder / "past", past_cache=True) == usual.hash
"""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip(needs_root("a file system without a way past the page cache"))
    command = ["unshare", "--mount", sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, env=clean_env(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_small_file_is_read_past_the_cache_with_little_memory(tmp_path: Path) -> None:
    """What a read asks for beyond the file's end, Linux fills with zeros: megabytes for each file of a checkpoint."""
    path = tmp_path / "small"
    path.write_bytes(bytes(range(250)) * 40)
    whole, times, before = hash_file(path), 20, resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert {hash_file(path, past_cache=True) for _ in range(times)} == {whole}
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / times < 200, "pages for each read"
