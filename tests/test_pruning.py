"""What counts as in the store, what goes behind that, and what stays: whatever a living attempt writes."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bucket_lab
import one_rank
import pytest
import torch
import torch.distributed as dist
from bucket_lab import Store, mounted, until
from support import clean_env

from trainer.attempt.record import Attempt, open_attempt, record
from trainer.bucket.mounts import Mount, Proof, UploadLog
from trainer.bucket.verify import problem
from trainer.checkpoint import pruning
from trainer.checkpoint.pruning import DEAD_S, LiveAttempts, Pruner, delete
from trainer.checkpoint.writing import share_name, write_manifest, write_state, write_tensors
from trainer.layout.documents import LayoutError
from trainer.layout.exit_codes import EXIT_PREEMPTED
from trainer.layout.manifest import Manifest, read_manifest
from trainer.layout.names import MANIFEST, STATE, AttemptName, CheckpointName, RunPaths, list_checkpoints
from trainer.machine.token import machine_token

needs_rclone = pytest.mark.skipif(bucket_lab.missing() is not None, reason=str(bucket_lab.missing()))
ATTEMPT = """
import sys
from pathlib import Path
from trainer.attempt.record import open_attempt
from trainer.layout.names import RunPaths
print(open_attempt(RunPaths(Path(sys.argv[1])), launch="l", config={}, binding={}).name, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def on_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes this process one of the machine of a name; it begins on `here`."""

    def move(name: str) -> None:
        monkeypatch.setenv("HOME", str(tmp_path / "machines" / name))

    move("here")
    return move


@pytest.fixture
def paths(tmp_path: Path, on_machine: Callable[[str], None]) -> RunPaths:
    return RunPaths(tmp_path / "run")


def begin(paths: RunPaths) -> Attempt:
    return open_attempt(paths, launch="l", config={}, binding={})


def end(attempt: Attempt) -> None:
    record(attempt, "end", code=EXIT_PREEMPTED, cause="signal")


@contextmanager
def running(paths: RunPaths) -> Iterator[tuple[AttemptName, Callable[[], None]]]:
    """(name, kill) of an attempt in a process of its own that waits to be killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", ATTEMPT, paths.root], env=clean_env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )

    def kill() -> None:
        process.kill()
        process.communicate()

    try:
        assert process.stdout
        name = AttemptName.parse(process.stdout.readline().decode().strip())
        assert name
        yield name, kill
    finally:
        kill()


def beside(work: Callable[..., None], *args: object) -> threading.Thread:
    """A thread that does something, and keeps no failed test waiting."""
    thread = threading.Thread(target=work, args=args, daemon=True)
    thread.start()
    return thread


def half(paths: RunPaths, by: AttemptName, step: int) -> CheckpointName:
    """A checkpoint that its attempt has not committed."""
    name = CheckpointName(step, by, 1)
    folder = paths.checkpoint(name)
    folder.mkdir(parents=True)
    write_tensors(folder / share_name(0), {"a": torch.full((5,), step)})
    return name


def commit(
    paths: RunPaths, by: AttemptName, step: int, ranks: int = 1, others: RunPaths | None = None, **facts: object
) -> CheckpointName:
    """A whole checkpoint; `others`: the run's folder as the ranks but the first see it."""
    name = CheckpointName(step, by, 1)
    files = {}
    for rank in range(ranks):
        folder = (others or paths if rank else paths).checkpoint(name)
        folder.mkdir(parents=True, exist_ok=True)
        files[share_name(rank)] = write_tensors(folder / share_name(rank), {"a": torch.full((5,), step)})
    folder = paths.checkpoint(name)
    files[STATE] = write_state(folder, {})
    write_manifest(folder, Manifest("checkpoint", files, {"step": step, "attempt": str(by), **facts}))
    return name


def damage(paths: RunPaths, name: CheckpointName) -> None:
    """Flip a bit of a share."""
    share = paths.checkpoint(name) / share_name(0)
    data = bytearray(share.read_bytes())
    data[-1] ^= 1
    share.write_bytes(data)


def is_whole(paths: RunPaths, name: CheckpointName) -> bool:
    with suppress(LayoutError):
        return problem(paths.checkpoint(name), read_manifest(paths.checkpoint(name))) is None
    return False


def steps(paths: RunPaths) -> list[int]:
    return [name.step for name in list_checkpoints(paths)]


@dataclass
class Rank0:
    """What rank 0 of an attempt does behind its saves."""

    pruner: Pruner
    attempt: Attempt
    said: list[str]
    store: Any

    @classmethod
    def of(cls, attempt: Attempt, *, latest: int = 2, every: int = 0, ranks: int = 1, store: Any = None) -> Rank0:
        said: list[str] = []
        pruner = Pruner(attempt.paths, attempt, latest, every, ranks, said.append)
        return cls(pruner, attempt, said, store or dist.HashStore())

    def after(self, name: CheckpointName, hurried: bool = False) -> None:
        """A save was committed."""
        hurry = threading.Event()
        if hurried:
            hurry.set()
        self.pruner.committed(name, read_manifest(self.attempt.paths.checkpoint(name)), self.store, hurry)

    def save(self, *steps: int) -> None:
        for step in steps:
            self.after(commit(self.attempt.paths, self.attempt.name, step))


# -- who lives ---------------------------------------------------------------------------------------------------------


@dataclass
class Clock:
    now: float = 5000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Stands until it is put forward."""
    stands = Clock()
    monkeypatch.setattr(time, "monotonic", stands)
    return stands


def test_an_attempt_of_this_machine_writes_for_as_long_as_its_process_is_there(paths: RunPaths) -> None:
    living = LiveAttempts(paths)
    with running(paths) as (name, kill):
        assert [living.may_write(name) for _ in range(3)] == [True, True, True]
        kill()
        assert not living.may_write(name)
        assert not LiveAttempts(paths).may_write(name), "nor does who has not seen it before wait"


def from_another_machine(paths: RunPaths, name: AttemptName, on_machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on_machine("there")


def from_another_host_with_the_same_home(
    paths: RunPaths, name: AttemptName, on_machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "there")


def of_two_machines(paths: RunPaths, name: AttemptName, on_machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    record(Attempt(paths, name, "l", machine_token()), "machines", machines=[machine_token(), "0123456789abcdef"])


def with_a_torn_start(paths: RunPaths, name: AttemptName, on_machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    paths.event(name, 1, "start").write_text('{"host"')


def without_records(paths: RunPaths, name: AttemptName, on_machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(paths.attempt(name))


UNSEEN = [
    from_another_machine,
    from_another_host_with_the_same_home,
    of_two_machines,
    with_a_torn_start,
    without_records,
]


@pytest.mark.parametrize("change", UNSEEN, ids=lambda change: change.__name__)
def test_an_attempt_whose_process_cannot_be_seen_is_dead_after_600_s_of_silence(
    paths: RunPaths, on_machine: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None]
) -> None:
    with running(paths) as (name, kill):
        kill()
        change(paths, name, on_machine, monkeypatch)
    living = LiveAttempts(paths)
    assert living.may_write(name)
    clock.now += DEAD_S - 1
    assert living.may_write(name)
    clock.now += 1
    assert not living.may_write(name)


def test_an_attempt_lives_for_as_long_as_its_progress_changes_whatever_its_clock_says(
    paths: RunPaths, on_machine: Any, clock: Clock
) -> None:
    on_machine("there")
    name = begin(paths).name
    on_machine("here")
    living = LiveAttempts(paths)
    for number in range(4):
        paths.progress(name).write_text(f'{{"time": 0, "step": {number}}}')
        assert living.may_write(name)
        clock.now += DEAD_S - 1
        assert living.may_write(name)
        clock.now += 1 + number
    assert not living.may_write(name)
    assert LiveAttempts(paths).may_write(name), "who has not watched it cannot know"


def test_an_attempt_that_has_ended_writes_no_more_wherever_it_was(paths: RunPaths, on_machine: Any) -> None:
    on_machine("there")
    ended, torn = begin(paths), begin(paths)
    end(ended)
    end(torn)
    paths.event(torn.name, 2, "end").write_text('{"time"')
    on_machine("here")
    assert not LiveAttempts(paths).may_write(ended.name)
    assert LiveAttempts(paths).may_write(torn.name), "whose end is torn, it may have been taken, or be writing it"


# -- what goes, on a mount that writes through -------------------------------------------------------------------------


def test_nothing_goes_but_behind_two_that_read_back_whole(paths: RunPaths) -> None:
    mine = Rank0.of(begin(paths), latest=1)
    mine.save(1)
    assert steps(paths) == [1]
    damaged = commit(paths, mine.attempt.name, 2)
    damage(paths, damaged)
    mine.after(damaged)
    assert steps(paths) == [2, 1]
    assert mine.said == [
        f"Checkpoint {damaged} does not read back as it was written: share-00000.safetensors does not match the hash "
        "in its manifest"
    ]
    mine.save(3)
    assert steps(paths) == [3, 2, 1], "of two that are newer, one is damaged"
    mine.save(4)
    assert steps(paths) == [4, 3]


def test_the_first_checkpoint_at_or_after_each_multiple_is_kept_for_good(paths: RunPaths) -> None:
    """Whatever the interval: with one that the multiples do not divide hardly any would be one."""
    mine = Rank0.of(begin(paths), every=100)
    mine.save(90, 130, 170, 240, 250, 410, 430, 440, 450)
    assert steps(paths) == [450, 440, 410, 240, 130]
    # What is half written, or is not finite, is not what is kept; of one step the newest attempt's is.
    half(paths, mine.attempt.name, 500)
    mine.after(commit(paths, mine.attempt.name, 510, finite=False))
    mine.save(520, 610)
    again = Rank0.of(begin(paths), every=100)
    again.save(610, 650, 660, 670)
    assert [(name.step, name.attempt) for name in list_checkpoints(paths)] == [
        *((step, again.attempt.name) for step in (670, 660, 610)),
        *((step, mine.attempt.name) for step in (520, 410, 240, 130)),
    ]


def test_one_that_does_not_read_back_is_kept_for_good_only_where_its_multiple_has_no_other(paths: RunPaths) -> None:
    mine = Rank0.of(begin(paths), every=100)
    mine.save(90)
    for step in (130, 210):
        damaged = commit(paths, mine.attempt.name, step)
        damage(paths, damaged)
        mine.after(damaged)
        if step == 130:
            mine.save(170)
    mine.save(310, 320, 330)
    assert steps(paths) == [330, 320, 310, 210, 170], "170 is the first whole one at or after 100"


def test_one_that_the_restore_found_damaged_is_not_what_is_kept_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_rank.pruned_before_the_next_save(monkeypatch)
    paths, runs = RunPaths(tmp_path / "run"), list[one_rank.InProcess]()

    def taken(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if runs[0].steps_done == 6:
            until("a commit", lambda: any(paths.root.glob("checkpoints/*/MANIFEST.json")))
            raise ValueError("taken")
        return one_rank.squares(model, batch)

    options: dict[str, Any] = {"max_steps": 15, "keep_every": 4, "keep_latest": 2}
    one_rank.train(paths.root, loss=taken, before=runs.append, save_interval_steps=5, **options)
    [first] = list_checkpoints(paths)
    damage(paths, first)
    assert one_rank.train(paths.root, save_interval_steps=3, **options).code == 0
    assert (first.step, steps(paths)) == (5, [15, 12, 9, 6])


@pytest.mark.parametrize("restores", [False, True])
def test_one_that_is_not_finite_makes_no_other_superfluous_than_its_like(paths: RunPaths, restores: bool) -> None:
    mine = Rank0.of(begin(paths))
    mine.save(1, 2, 3)
    assert steps(paths) == [3, 2]
    for step in range(4, 10):
        name = commit(paths, mine.attempt.name, step, finite=False)
        mine.after(name)
    assert steps(paths) == [9, 8, 3, 2]
    next_one = Rank0.of(begin(paths))  # Which knows of the others what their manifests say.
    if restores:
        next_one.pruner.restored(name, finite=False)
    next_one.save(10)
    assert steps(paths) == ([10, 9, 3, 2] if restores else [10, 9, 8, 3, 2])
    next_one.save(11)
    assert steps(paths) == [11, 10]


def test_what_was_read_whole_at_the_restore_counts(paths: RunPaths) -> None:
    before = begin(paths)
    names = [commit(paths, before.name, step) for step in (1, 2, 3)]
    stranger, mine = Rank0.of(begin(paths)), Rank0.of(begin(paths))
    stranger.save(4)
    assert steps(paths) == [4, 3, 2, 1]
    mine.pruner.restored(names[2])
    mine.after(commit(paths, mine.attempt.name, 5))
    assert steps(paths) == [5, 4, 3]


def test_what_is_committed_while_another_is_read_back_is_looked_at_after_that(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, go_on, real = threading.Event(), threading.Event(), pruning.problem

    def slow(folder: Path, *more: Any) -> str | None:
        if CheckpointName.parse(folder.name).step == 2:  # type: ignore[union-attr]
            reading.set()
            assert go_on.wait(60)
        return real(folder, *more)

    monkeypatch.setattr(pruning, "problem", slow)
    mine = Rank0.of(begin(paths))
    mine.save(1)
    thread = beside(mine.save, 2)
    assert reading.wait(60)
    mine.save(3, 4)
    assert steps(paths) == [4, 3, 2, 1], "neither read nor waited"
    go_on.set()
    thread.join(60)
    assert steps(paths) == [4, 3, 2], "those of 2 and 4 were read; that of 3 is no older"
    mine.save(5)
    assert steps(paths) == [5, 4]


def passed_by(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> Rank0:
    """Two of five checkpoints were read while the others were saved."""
    mine = Rank0.of(begin(paths))
    with monkeypatch.context() as patch:
        mine.save(1)
        patch.setattr(Pruner, "prune", lambda _: None)
        names = [commit(paths, mine.attempt.name, step) for step in (2, 3, 4)]
        mine.pruner._known.add(names[0])
        mine.save(5)
    assert steps(paths) == [5, 4, 3, 2, 1]
    return mine


def test_at_the_end_no_more_are_left_than_are_kept_and_those_are_read(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = passed_by(paths, monkeypatch)
    mine.pruner.finish(mine.store)
    assert steps(paths) == [5, 4]
    assert {name.step for name in mine.pruner._known} == {5, 4}


def test_at_the_end_nothing_goes_but_behind_as_many_as_are_kept_that_read_back_whole(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = passed_by(paths, monkeypatch)
    damage(paths, list_checkpoints(paths)[1])
    mine.pruner.finish(mine.store)
    assert steps(paths) == [5, 4, 3], "4 is damaged"


def test_a_run_whose_reading_lags_behind_its_saves_ends_with_as_many_as_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, paths = pruning.problem, RunPaths(tmp_path / "run")

    def slow(folder: Path, *more: Any) -> str | None:
        if CheckpointName.parse(folder.name).step == 2:  # type: ignore[union-attr]
            until("step 6", lambda: (paths.checkpoint(names()[0]) / MANIFEST).exists() and names()[0].step == 6)
        return real(folder, *more)

    def names() -> list[CheckpointName]:
        return list_checkpoints(paths)

    monkeypatch.setattr(pruning, "problem", slow)
    assert one_rank.train(paths.root, save_interval_steps=1, keep_latest=2, max_steps=6).code == 0
    assert [name.step for name in names()] == [6, 5]


def test_in_a_hurry_nothing_is_deleted(paths: RunPaths) -> None:
    mine = Rank0.of(begin(paths))
    mine.save(1, 2)
    mine.after(commit(paths, mine.attempt.name, 3), hurried=True)
    assert steps(paths) == [3, 2, 1]
    mine.save(4)
    assert steps(paths) == [4, 3]


def test_what_a_living_attempt_writes_stays_and_goes_once_it_is_dead(paths: RunPaths) -> None:
    with running(paths) as (other, kill):
        mine = Rank0.of(begin(paths), every=5)
        for step in (5, 6, 50):
            half(paths, other, step)
        commit(paths, other, 4)
        half(paths, mine.attempt.name, 8)
        mine.save(10, 11, 12)
        # 4 is written to no more, and 8 was given up; 10 is kept for good.
        assert steps(paths) == [50, 12, 11, 10, 6, 5]
        kill()
        mine.save(13)
        assert steps(paths) == [50, 13, 12, 10], "half a checkpoint is not kept for good, and a newer one stays"


def test_a_prune_that_was_interrupted_is_finished_by_a_later_attempt(paths: RunPaths) -> None:
    with running(paths) as (first, kill):
        names = [commit(paths, first, step) for step in (1, 2, 3)]
        # What cannot be deleted interrupts it as a preemption would.
        obstacle = paths.checkpoint(names[1]) / share_name(1)
        obstacle.mkdir()
        mine = Rank0.of(begin(paths))
        mine.save(4)
        with pytest.raises(OSError, match=obstacle.name):
            mine.save(5)
        assert steps(paths) == [5, 4, 2], "the others go all the same"
        assert not (paths.checkpoint(names[1]) / MANIFEST).exists()
        assert (paths.checkpoint(names[1]) / STATE).exists()
        obstacle.rmdir()
        mine.save(6)
        assert steps(paths) == [6, 5, 2], "it looks like something that the first attempt, which lives, is writing"
        kill()
        later = Rank0.of(begin(paths))
        later.save(7, 8)
        assert steps(paths) == [8, 7]


def test_a_prune_of_its_own_that_was_interrupted_is_finished_by_the_same_attempt(paths: RunPaths) -> None:
    mine = Rank0.of(begin(paths))
    mine.save(1, 2)
    obstacle = paths.checkpoint(CheckpointName(1, mine.attempt.name, 1)) / "zzz"
    obstacle.mkdir()
    with pytest.raises(OSError, match="zzz"):
        mine.save(3)
    assert steps(paths) == [3, 2, 1]
    obstacle.rmdir()
    mine.save(4)
    assert steps(paths) == [4, 3]


def test_prepared_data_that_a_dead_attempt_did_not_finish_goes(paths: RunPaths) -> None:
    with running(paths) as (other, kill):
        with running(paths) as (name, kill_the_opener):
            kill_the_opener()
        mine = Rank0.of(Attempt(paths, name, "l", machine_token()))  # As one that a child of the launcher's opened.
        kept = {f"whole-{other}", f"mine-{mine.attempt.name}", "a0001-notes", "something"}
        for folder in (*kept, f"torn-{other}"):
            (paths.tokens / folder).mkdir(parents=True)
            (paths.tokens / folder / "train.bin").write_bytes(b"1")
        (paths.tokens / f"whole-{other}" / MANIFEST).write_bytes(b"{}")
        mine.save(1, 2)
        assert {folder.name for folder in paths.tokens.iterdir()} == {*kept, f"torn-{other}"}
        kill()
        mine.save(3)
        assert {folder.name for folder in paths.tokens.iterdir()} == kept


def test_two_that_delete_the_same_folders_do_not_disturb_each_other(paths: RunPaths) -> None:
    mine = begin(paths).name
    for step in range(20):
        commit(paths, mine, step, ranks=4)
    folders = [paths.checkpoint(name) for name in list_checkpoints(paths)]
    other = beside(lambda: [delete(folder) for folder in folders])
    for folder in folders:
        delete(folder)
    other.join()
    assert steps(paths) == []


# -- several ranks behind mounts with a cache --------------------------------------------------------------------------


@pytest.fixture
def store() -> dist.TCPStore:
    """Rank 0's."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def connection(store: dist.TCPStore) -> dist.TCPStore:
    """Another rank's."""
    return dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)


@pytest.fixture
def seen_as(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have what is made from now on take the temporary folder for a mount with a cache."""

    def see(proof: Proof, log: Path | None = None) -> None:
        found = Mount(tmp_path.resolve(), "rclone with a cache", proof, log)
        monkeypatch.setattr(pruning, "mount_of", lambda path: found)
        monkeypatch.setattr(pruning, "LOOK_S", 0.01)

    return see


def uploaded(log: Path, paths: RunPaths, name: CheckpointName, *files: str) -> None:
    """As rclone says it; `seen_as` has the mount begin above the run's folder."""
    with log.open("a") as lines:
        for file in files:
            path = f"{paths.root.name}/checkpoints/{name}/{file}"
            lines.write(f"2026/11/25 19:31:56 INFO  : {path}: vfs cache: upload succeeded try #1\n")


SHARES = [share_name(rank) for rank in range(3)]


@pytest.mark.parametrize("late", [*SHARES, STATE, MANIFEST])
def test_a_checkpoint_counts_once_all_machines_have_uploaded_what_their_ranks_wrote(
    paths: RunPaths, tmp_path: Path, store: dist.TCPStore, seen_as: Callable[..., None], late: str
) -> None:
    """Rank 0 runs on a machine of its own, ranks 1 and 2 share one."""
    logs = {tmp_path / "one.log": [SHARES[0], STATE, MANIFEST], tmp_path / "two.log": SHARES[1:]}
    one, two = logs
    for log in logs:
        log.touch()
    attempt = begin(paths)
    seen_as(Proof.UPLOAD_LOG, one)
    mine = Rank0.of(attempt, ranks=3, store=store)
    seen_as(Proof.UPLOAD_LOG, two)
    others = {rank: (Pruner(paths, None, 2, 0, 3, print), connection(store)) for rank in (1, 2)}
    names = [commit(paths, attempt.name, step, ranks=3) for step in (1, 2, 3)]
    for name in names:
        for log, files in logs.items():
            uploaded(log, paths, name, *(file for file in files if file != late or name == names[0]))
    reports = [
        beside(pruner.report, name, rank, connected, threading.Event())
        for name in names
        for rank, (pruner, connected) in others.items()
    ]
    waiting = 2 if late in SHARES[1:] else 0
    until("the others have reported", lambda: sum(report.is_alive() for report in reports) == waiting)
    for name in names:
        mine.after(name)
    assert steps(paths) == [3, 2, 1], "only the first is in the store"
    for log, files in logs.items():
        if late in files:
            uploaded(log, paths, names[1], late)
            uploaded(log, paths, names[2], late)
    until("all have reported", lambda: not any(report.is_alive() for report in reports))
    mine.after(commit(paths, attempt.name, 4, ranks=3))
    assert steps(paths) == [4, 3, 2], "and the newest, of which nothing is in the store, is none to count on"
    mine.save(5)
    assert steps(paths) == [5, 4, 3, 2]
    for name in names:
        assert not any(store.check([f"uploaded/{name}/{rank}"]) for rank in (1, 2)), "what was read is deleted"


@pytest.mark.parametrize("why", ["a hurry", "an upload that never comes"])
def test_a_rank_reports_no_share_that_it_has_not_seen_uploaded(
    paths: RunPaths,
    tmp_path: Path,
    store: dist.TCPStore,
    seen_as: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    why: str,
) -> None:
    log, hurried = tmp_path / "log", threading.Event()
    attempt = begin(paths)
    seen_as(Proof.UPLOAD_LOG, log)
    monkeypatch.setattr(pruning, "UPLOADED_S", 60.0 if why == "a hurry" else 0.1)
    name = commit(paths, attempt.name, 1, ranks=2)
    uploaded(log, paths, name, share_name(0), STATE, MANIFEST)
    other = Pruner(paths, None, 2, 0, 2, print)
    report = beside(other.report, name, 1, connection(store), hurried)
    if why == "a hurry":
        time.sleep(0.1)
        assert report.is_alive()
        hurried.set()
    until("it has given up", lambda: not report.is_alive())
    assert not store.check([f"uploaded/{name}/1"])
    uploaded(log, paths, name, share_name(1))
    other.report(name, 1, connection(store), hurried)
    assert store.check([f"uploaded/{name}/1"])


@pytest.mark.parametrize("proof", [Proof.READ_BACK, Proof.NOTHING])
def test_a_rank_whose_machine_has_no_log_of_uploads_reports_nothing(
    paths: RunPaths, store: dist.TCPStore, seen_as: Callable[..., None], proof: Proof
) -> None:
    seen_as(proof)
    name = commit(paths, begin(paths).name, 1, ranks=2)
    Pruner(paths, None, 2, 0, 2, print).report(name, 1, connection(store), threading.Event())
    assert not store.check([f"uploaded/{name}/1"])


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with bucket_lab.store(tmp_path_factory.mktemp("s3")) as serving:
        yield serving


@needs_rclone
@pytest.mark.parametrize("comes", [True, False], ids=["that comes", "that is lost with its machine"])
def test_on_two_machines_nothing_goes_before_a_share_of_the_other_one(
    bucket: Store, tmp_path: Path, store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch, comes: bool
) -> None:
    monkeypatch.setattr(pruning, "LOOK_S", 0.05)
    quick, late = ("--vfs-write-back", "0.1s"), ("--vfs-write-back", "60s")
    with (
        mounted(bucket, tmp_path / "one", *quick, cached=True) as one,
        mounted(bucket, tmp_path / "two", *(quick if comes else late), cached=True) as two,
    ):
        run = tmp_path.name
        here, there, behind = RunPaths(one.point / run), RunPaths(two.point / run), RunPaths(bucket.behind / run)
        mine, log = Rank0.of(begin(here), ranks=2, store=store), UploadLog(one.log)
        other, hurried = Pruner(there, None, 2, 0, 2, print), threading.Event()
        names, reports = [], []
        for step in (1, 2, 3, 4):
            names.append(commit(here, mine.attempt.name, step, ranks=2, others=there))
            reports.append(beside(other.report, names[-1], 1, connection(store), hurried))
            mine.after(names[-1])
        files = [f"{run}/checkpoints/{name}/{file}" for name in names for file in (share_name(0), STATE, MANIFEST)]
        until("all of rank 0's are in the store", lambda: all(log.has(file) for file in files))
        if comes:
            until("all of rank 1's are", lambda: not any(report.is_alive() for report in reports))
        names.append(commit(here, mine.attempt.name, 5, ranks=2, others=there))
        mine.after(names[4])
        hurried.set()
        until("nobody reports any more", lambda: not any(report.is_alive() for report in reports))
        gone = [name for name in names if not (here.checkpoint(name) / MANIFEST).exists()]
        whole = [name for name in names if name not in gone and is_whole(behind, name)]
        if comes:
            assert gone in (names[:2], names[:3])
            assert len(whole) >= 2
        else:
            assert gone == []
            assert whole == []
            assert all((there.checkpoint(name) / share_name(1)).read_bytes() for name in names), "it reads back there"


# -- what another machine wrote, read back through a cache -------------------------------------------------------------


HERE, THERE, ELSEWHERE = "here", "there", "elsewhere"


@pytest.mark.parametrize("proof", [Proof.UPLOAD_LOG, Proof.NOTHING])
@pytest.mark.parametrize(
    ("machines", "proven"),
    [([THERE], True), ([THERE, ELSEWHERE], True), ([HERE], False), ([THERE, HERE], False), ([HERE, THERE], False)],
    ids=lambda value: " and ".join(value) if isinstance(value, list) else "",
)
def test_behind_a_cache_it_counts_what_was_read_whole_and_written_by_other_machines_alone(
    paths: RunPaths,
    tmp_path: Path,
    on_machine: Callable[[str], None],
    seen_as: Callable[..., None],
    proof: Proof,
    machines: list[str],
    proven: bool,
) -> None:
    before = began_on(machines, paths, on_machine)
    names = [commit(paths, before.name, step) for step in (1, 2, 3)]
    (tmp_path / "log").touch()
    seen_as(proof, tmp_path / "log")
    mine = Rank0.of(begin(paths))
    mine.pruner.restored(names[2])
    mine.save(4)
    assert steps(paths) == ([4, 3, 2] if proven else [4, 3, 2, 1])


def began_on(names: list[str], paths: RunPaths, on_machine: Callable[[str], None]) -> Attempt:
    """An attempt of some machines, rank 0's first; this process is back `here` afterwards."""
    tokens = []
    for name in reversed(names):
        on_machine(name)
        tokens.append(machine_token())
    attempt = begin(paths)
    if len(tokens) > 1:
        record(attempt, "machines", machines=tokens)
    on_machine(HERE)
    return attempt


def left_behind(paths: RunPaths, restored: CheckpointName) -> list[int]:
    """The steps that are there after an attempt has restored a checkpoint and saved the step after it."""
    mine = Rank0.of(begin(paths))
    mine.pruner.restored(restored)
    mine.save(restored.step + 1)
    return steps(paths)


def test_behind_a_cache_nothing_counts_whose_writer_is_not_known(
    paths: RunPaths, on_machine: Callable[[str], None], seen_as: Callable[..., None]
) -> None:
    before = began_on([THERE], paths, on_machine)
    names = [commit(paths, before.name, step) for step in (1, 2, 3)]
    paths.event(before.name, 1, "start").write_text('{"machine"')
    seen_as(Proof.NOTHING)
    assert left_behind(paths, names[2]) == [4, 3, 2, 1]


def test_behind_a_cache_a_machine_that_was_given_another_token_meanwhile_is_the_same(
    paths: RunPaths, on_machine: Callable[[str], None], seen_as: Callable[..., None]
) -> None:
    names = [commit(paths, begin(paths).name, step) for step in (1, 2, 3)]
    seen_as(Proof.NOTHING)
    mine = Rank0.of(begin(paths))
    on_machine(ELSEWHERE)  # As where its home is deleted while the attempt runs.
    mine.pruner.restored(names[2])
    mine.save(4)
    assert steps(paths) == [4, 3, 2, 1]


def test_behind_a_cache_older_ones_of_other_machines_are_read_until_enough_count(
    paths: RunPaths, on_machine: Callable[[str], None], seen_as: Callable[..., None]
) -> None:
    there = began_on([THERE], paths, on_machine).name
    for step in (0, 1, 2):
        commit(paths, there, step, run_id="ours")
    commit(paths, there, 3, run_id="another's")
    commit(paths, begin(paths).name, 4, run_id="ours")
    damage(paths, commit(paths, there, 5, run_id="ours"))
    half(paths, there, 6)
    restored = commit(paths, there, 7, run_id="ours")
    seen_as(Proof.NOTHING)
    mine = Rank0.of(begin(paths))
    mine.pruner.restored(restored)
    mine.save(8)
    assert steps(paths) == [8, 7, 6, 5, 4, 3, 2], "2 is the first that counts beside 7"
    mine.save(9, 10)
    assert steps(paths) == [10, 9, 8, 7, 6, 5, 4, 3, 2], "what this one wrote counts for nothing here"


def test_behind_a_cache_older_ones_that_are_not_finite_make_no_other_superfluous(
    paths: RunPaths, on_machine: Callable[[str], None], seen_as: Callable[..., None]
) -> None:
    there = began_on([THERE], paths, on_machine).name
    for step in range(4):
        commit(paths, there, step, run_id="ours", finite=step < 2)
    restored = commit(paths, there, 4, run_id="ours")
    seen_as(Proof.NOTHING)
    assert left_behind(paths, restored) == [5, 4, 3, 1, 0]


# -- what was believed and not so --------------------------------------------------------------------------------------


def test_a_machine_without_a_home_is_one_machine_all_the_same(
    paths: RunPaths, seen_as: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/proc/nowhere")
    before = begin(paths)
    names = [commit(paths, before.name, step) for step in (1, 2, 3)]
    seen_as(Proof.NOTHING)
    assert left_behind(paths, names[2]) == [4, 3, 2, 1]


def test_whose_machines_cannot_all_be_read_may_have_been_this_one(
    paths: RunPaths, on_machine: Callable[[str], None], seen_as: Callable[..., None]
) -> None:
    before = began_on([THERE, HERE], paths, on_machine)
    paths.event(before.name, 2, "machines").write_text('{"machi')
    names = [commit(paths, before.name, step, ranks=2) for step in (1, 2, 3)]
    seen_as(Proof.NOTHING)
    assert left_behind(paths, names[2]) == [4, 3, 2, 1]


def test_an_attempt_whose_process_is_seen_is_alive_however_long_it_is_silent(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    living, name = LiveAttempts(paths), begin(paths).name  # This very process.
    assert living.may_write(name)
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + DEAD_S)
    assert living.may_write(name)


def test_another_process_under_the_number_of_one_that_is_gone_is_not_it(paths: RunPaths) -> None:
    name = begin(paths).name
    event = paths.event(name, 1, "start")
    fields = json.loads(event.read_bytes())
    assert LiveAttempts(paths).may_write(name)
    event.write_text(json.dumps({**fields, "pid_started": fields["pid_started"] - 1}))
    assert not LiveAttempts(paths).may_write(name)


def test_the_launchers_sidecar_lives_on_where_a_listing_fails(paths: RunPaths, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom trainer.launch import sidecar\n"
        "sidecar.LOOK_S = 0.05\nsidecar.record_attempt(Path(sys.argv[1]))\n"
    )
    sidecar = subprocess.Popen(
        [sys.executable, "-c", program, paths.root], env=clean_env(), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert sidecar.stdout
        name = sidecar.stdout.readline().split()[1]
        paths.attempts.rename(tmp_path / "aside")
        paths.attempts.symlink_to(paths.attempts)  # Every listing fails with ELOOP.
        with pytest.raises(subprocess.TimeoutExpired):
            sidecar.wait(1)
        paths.attempts.unlink()
        (tmp_path / "aside").rename(paths.attempts)
        (paths.attempts / f"a{int(name[1:5]) + 1:04d}-ffffff").mkdir()
        assert sidecar.stdout.readline() == "stop superseded\n"
    finally:
        sidecar.kill()
        sidecar.communicate()
