"""Prepared data on a machine's disk: one copy for all of its ranks, deleted once they have mapped it."""

import errno
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from trainer.errors import AttemptError
from trainer.finetune import data, model, tokens
from trainer.finetune.config import parse
from trainer.layout.exit_codes import EXIT_PREEMPTED
from trainer.layout.names import AttemptName, RunPaths
from trainer.machine import scratch
from trainer.ranks.group import RankGroup


class Rank:
    """One rank of four on two machines, as far as `on_this_machine` asks: a thread, with a seat in a shared store."""

    def __init__(self, rank: int, store: Any, paths: RunPaths) -> None:
        self.paths = paths
        group = RankGroup.__new__(RankGroup)
        group.rank, group.local_rank, group.world_size, group.local_world_size = rank, rank % 2, 4, 2
        group._calls = Counter()
        group.unsupervised, group.node_rank = True, rank // 2
        group.store, group.timeout_s = store, 120.0
        group.heartbeat = self.beating  # type: ignore[method-assign,assignment]
        self.group = group
        self.beats: list[str] = []
        """The signs of life that it gives."""

    @contextmanager
    def beating(self, key: str) -> Iterator[None]:
        self.beats.append(key)
        yield
        self.beats.remove(key)

    def check_stop(self) -> None:
        pass

    def retry(self, work: Callable[[], Any], limit_s: float | None = None) -> Any:
        return work()


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunPaths, str]:
    (tmp_path / "local").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "local"))
    (tmp_path / "a.txt").write_text("to be or not to be " * 500)
    paths = RunPaths(tmp_path / "run")
    config = parse(["--checkpoint-dir", "x", "--data", str(tmp_path / "a.txt"), "--seq-len", "16"])
    return paths, data.prepare(paths, AttemptName(1, "abcdef"), config, lambda: None)


def at_once(work: Callable[[Rank], Any], ranks: list[Rank]) -> list[Any]:
    """The result or the error of each rank."""
    found: dict[int, Any] = {}

    def run(number: int) -> None:
        try:
            found[number] = work(ranks[number])
        except BaseException as error:
            found[number] = error

    threads = [
        threading.Thread(target=run, args=(number,), daemon=True, name=str(number)) for number in range(len(ranks))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found.get(number) for number in range(len(ranks))]


def test_each_machine_reads_the_bucket_once_and_keeps_nothing(
    prepared: tuple[RunPaths, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, folder = prepared
    copied, real = [], tokens._copy

    def counted(source: Path, *args: Any) -> None:
        copied.append(source.name)
        real(source, *args)

    monkeypatch.setattr(tokens, "_copy", counted)
    store = dist.HashStore()
    found = at_once(
        lambda rank: tokens.on_this_machine(rank, folder, ExitStack(), None),  # type: ignore[arg-type]
        [Rank(rank, store, paths) for rank in range(4)],
    )
    assert sorted(copied) == ["held_out.bin"] * 2 + ["train.bin"] * 2
    assert not list((tmp_path / "local").iterdir())
    whole = (paths.tokens / folder / "train.bin").read_bytes()
    assert [one.train.tobytes() for one in found] == [whole] * 4


def test_each_machine_finds_its_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []

    def find(name: str, revision: str | None, check_stop: Callable[[], None]) -> model.ModelFiles:
        found.append(threading.current_thread().name)
        return model.ModelFiles(f"/of rank {threading.current_thread().name}/{name}", revision)

    def files(rank: Rank) -> model.ModelFiles:
        mine = model.ModelFiles("/chosen", "commit") if rank.group.rank == 0 else None
        return model.on_this_machine(rank, "org/net", "commit", mine)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "find_model", find)
    store = dist.HashStore()
    all_files = at_once(files, [Rank(number, store, RunPaths(Path("/nowhere"))) for number in range(4)])
    assert found == ["2"], "rank 0 has found its own before"
    expected = ["/chosen"] * 2 + ["/of rank 2/org/net"] * 2
    assert all_files == [model.ModelFiles(folder, "commit") for folder in expected]


def test_a_machine_that_waits_for_a_slower_one_sees_its_ranks_alive(
    prepared: tuple[RunPaths, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, folder = prepared
    store, real, waited_for = dist.HashStore(), tokens._copy, list[str]()
    ranks = [Rank(number, store, paths) for number in range(4)]
    for rank in ranks:
        real_wait = rank.group.await_value
        rank.group.await_value = (  # type: ignore[method-assign]
            lambda key, beat="", check_stop=None, wait=real_wait: waited_for.append(beat) or wait(key, beat)  # type: ignore[func-returns-value]
        )

    def slow(source: Path, target: Path, *args: Any) -> None:
        """Machine 1 begins to copy when machine 0 waits for it."""
        if threading.current_thread().name == "2":
            end = time.monotonic() + 50
            while not (seen[0] in waited_for and seen[0] in ranks[2].beats and seen[1] in ranks[3].beats):
                assert time.monotonic() < end, [rank.beats for rank in ranks]
                time.sleep(0.01)
        real(source, target, *args)

    seen = ["beat/tokens-mapped/2", "beat/tokens-mapped/3"]
    monkeypatch.setattr(tokens, "_copy", slow)
    found = at_once(lambda rank: tokens.on_this_machine(rank, folder, ExitStack(), None), ranks)  # type: ignore[arg-type]
    assert all(isinstance(one, tokens.Tokens) for one in found), found


def test_a_machine_that_reads_other_bytes_leaves_for_another(prepared: tuple[RunPaths, str]) -> None:
    paths, folder = prepared
    path = paths.tokens / folder / "train.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    rank = Rank(0, dist.HashStore(), paths)
    with pytest.raises(AttemptError, match="although rank 0 could read it") as ended:
        tokens.on_this_machine(rank, folder, ExitStack(), None)  # type: ignore[arg-type]
    assert ended.value.code == EXIT_PREEMPTED


def test_a_file_that_was_read_wrong_once_is_read_again(
    prepared: tuple[RunPaths, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, folder = prepared
    manifest, real, reads = tokens.manifest_of(paths, folder), tokens._read, []

    def once_wrong(file: Any) -> bytes:
        chunk = real(file)
        reads.append(chunk)
        return chunk[:-1] + b"\xff" if len(reads) == 1 else chunk

    monkeypatch.setattr(tokens, "_read", once_wrong)
    with tokens.copied(paths, folder, manifest) as local:
        assert (local / "train.bin").read_bytes() == (paths.tokens / folder / "train.bin").read_bytes()


def test_a_stop_is_heard_while_data_is_copied(prepared: tuple[RunPaths, str], tmp_path: Path) -> None:
    class StopNow(Exception):
        pass

    def check_stop() -> None:
        raise StopNow

    paths, folder = prepared
    with pytest.raises(StopNow), tokens.copied(paths, folder, tokens.manifest_of(paths, folder), check_stop):
        pass
    assert not list((tmp_path / "local").iterdir())


@pytest.mark.parametrize("while_", ["packing", "copying"])
def test_a_full_local_disk_is_named_and_not_the_bucket(
    prepared: tuple[RunPaths, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, while_: str
) -> None:
    paths, folder = prepared

    class Full:
        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

    real = Path.open

    def opened(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = real(path, mode, *args, **options)
        return Full(file) if "w" in mode and str(path).startswith(str(tmp_path / "local")) else file

    monkeypatch.setattr(Path, "open", opened)
    config = parse(["--checkpoint-dir", "x", "--data", str(tmp_path / "a.txt"), "--seq-len", "8"])

    def work() -> None:
        if while_ == "copying":
            ExitStack().enter_context(tokens.copied(paths, folder, tokens.manifest_of(paths, folder)))
        else:
            data.prepare(paths, AttemptName(2, "abcdef"), config, lambda: None)

    with pytest.raises(scratch.ScratchError, match=f"^{tmp_path}/local/.*No space left on device.*set TMPDIR"):
        work()
    assert not list((tmp_path / "local").iterdir())


def test_a_bucket_that_is_full_is_named_by_its_file(
    prepared: tuple[RunPaths, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, _ = prepared

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(data, "fsync", full)
    config = parse(["--checkpoint-dir", "x", "--data", str(tmp_path / "a.txt"), "--seq-len", "8"])
    with pytest.raises(OSError, match=r"No space left on device: .*train\.bin"):
        data.prepare(paths, AttemptName(2, "abcdef"), config, lambda: None)


def test_the_highest_id_is_found_in_either_part() -> None:
    import numpy as np

    rows = np.arange(12, dtype="<u2").reshape(3, 4)
    assert tokens.Tokens("f", "k", rows, rows + 5, 99).highest_id() == 16
    assert tokens.Tokens("f", "k", rows + 9, rows, 99).highest_id() == 20
