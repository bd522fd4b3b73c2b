"""Twelve steps under every fault that a bucket and a preemption can bring: each run ends as if nothing had happened."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import one_rank
import pytest
import warm
from needs import needs_root
from support import PROGRAMS, REPO, clean_env, event, losses, mlp, weights

from trainer.bucket.hashing import hash_file
from trainer.checkpoint.restore import Found, find_whole
from trainer.checkpoint.state import State
from trainer.checkpoint.writing import POINTS
from trainer.layout.documents import sealed
from trainer.layout.manifest import read_manifest
from trainer.layout.names import MANIFEST, CheckpointName, RunPaths, list_attempts, list_checkpoints
from trainer.ranks.group import RankGroup


def newest(run_dir: Path) -> Path:
    paths = RunPaths(run_dir)
    return paths.checkpoint(list_checkpoints(paths)[0])


def share_of(folder: Path) -> Path:
    return folder / "share-00000.safetensors"


def torn_share(folder: Path) -> None:
    os.truncate(share_of(folder), share_of(folder).stat().st_size // 2)


def flipped_bit(folder: Path) -> None:
    data = bytearray(share_of(folder).read_bytes())
    data[-100] ^= 1
    share_of(folder).write_bytes(data)


def missing_share(folder: Path) -> None:
    share_of(folder).unlink()


def empty_share(folder: Path) -> None:
    share_of(folder).write_bytes(b"")


def flipped_state(folder: Path) -> None:
    data = bytearray((folder / "state.json").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "state.json").write_bytes(data)


def missing_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def torn_manifest(folder: Path) -> None:
    os.truncate(folder / MANIFEST, (folder / MANIFEST).stat().st_size // 2)


def empty_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_bytes(b"")


def manifest_of_another_folder(folder: Path) -> None:
    other = next(path for path in folder.parent.iterdir() if path != folder)
    shutil.copy(other / MANIFEST, folder / MANIFEST)


DAMAGE = [
    torn_share, flipped_bit, missing_share, empty_share, flipped_state, missing_manifest, torn_manifest, empty_manifest,
    manifest_of_another_folder,
]  # fmt: skip


def assert_as_undisturbed(run_dir: Path, whole: Path) -> None:
    assert losses(run_dir) == losses(whole)
    assert weights(run_dir)
    assert weights(run_dir) == weights(whole)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before(run_dir: Path, damage) -> None:
    import torch
    from safetensors.torch import load_file

    paths = RunPaths(run_dir)
    newer, older = (load_file(share_of(paths.checkpoint(name))) for name in list_checkpoints(paths))
    state = State(
        {name: torch.zeros_like(tensor) for name, tensor in sorted(older.items())}, {}, frozenset(), frozenset()
    )

    def find() -> Found:
        return find_whole(RankGroup(), paths, state, lambda: None)

    def found_is(tensors: dict[str, torch.Tensor]) -> bool:
        loaded = find().loaded
        assert loaded
        assert loaded.tensors.keys() == tensors.keys()
        return all(torch.equal(loaded.tensors[name], tensors[name]) for name in tensors)

    assert found_is(newer)
    assert not find().rejected
    damage(newest(run_dir))
    assert found_is(older)
    [rejected] = find().rejected
    assert rejected["checkpoint"] == newest(run_dir).name
    assert rejected["reason"]


@pytest.mark.parametrize("damage", [flipped_bit, torn_manifest], ids=lambda damage: damage.__name__)
def test_a_damaged_newest_checkpoint_costs_steps_but_not_the_run(run_dir: Path, whole: Path, damage) -> None:
    damage(newest(run_dir))
    ended = mlp(run_dir)
    assert ended.code == 0, ended.output
    restored = event(run_dir, "restored")
    assert restored["step"] == 4
    assert restored["rejected"]
    assert "is not whole" in ended.output
    assert_as_undisturbed(run_dir, whole)


def test_where_no_checkpoint_is_whole_the_run_starts_again_from_its_seed(run_dir: Path, whole: Path) -> None:
    names = list_checkpoints(RunPaths(run_dir))
    assert [name.step for name in names] == [8, 4]
    for name in names:
        flipped_bit(RunPaths(run_dir).checkpoint(name))
    assert mlp(run_dir).code == 0
    assert event(run_dir, "restored")["step"] == 0
    rejected = event(run_dir, "restored")["rejected"]
    assert [one["checkpoint"] for one in rejected] == [str(name) for name in names]  # type: ignore[attr-defined]
    assert_as_undisturbed(run_dir, whole)


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_this_point_of_a_save_tears_nothing(tmp_path: Path, whole: Path, point: str) -> None:
    run_dir = tmp_path / "run"
    killed = mlp(run_dir, "--fault", f"save:{point}@2")
    assert killed.code != 0, killed.output
    assert "Traceback" not in killed.output
    paths = RunPaths(run_dir)
    committed = [name.step for name in list_checkpoints(paths) if (paths.checkpoint(name) / MANIFEST).exists()]
    assert [name.step for name in list_checkpoints(paths)] == [8, 4]
    ended = mlp(run_dir)
    assert ended.code == 0, ended.output
    assert event(run_dir, "restored")["step"] == (8 if point == "manifest-written" else 4), committed
    assert_as_undisturbed(run_dir, whole)


def test_the_newest_checkpoint_may_be_an_older_attempts(run_dir: Path, whole: Path) -> None:
    paths = RunPaths(run_dir)
    old = list_checkpoints(paths)[1]
    later = CheckpointName(4, type(old.attempt)(7, "abcdef"), 1)
    shutil.copytree(paths.checkpoint(old), paths.checkpoint(later))
    assert mlp(run_dir).code == 0
    assert event(run_dir, "restored")["step"] == 8
    assert list_attempts(paths)[-1].number == 8, "a number that stands in a checkpoint's name is taken"
    assert_as_undisturbed(run_dir, whole)


def test_two_attempts_at_once_do_not_harm_each_other_and_the_older_one_stops(tmp_path: Path, whole: Path) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "trainer.launch", "--processes", "1", str(PROGRAMS / "faulty.py")]
    old = warm.Popen(
        [*command, "--dir", str(run_dir), "--fault", "freeze@6"],
        env=clean_env(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, text=True,
    )  # fmt: skip
    frozen = wait_until_stopped(old.pid)
    assert mlp(run_dir).code == 0
    os.kill(frozen, signal.SIGCONT)
    output, _ = old.communicate(timeout=60)
    assert old.returncode == 76, output
    assert event(run_dir, "end", attempt=0)["cause"] == "superseded"
    assert "newer attempt" in output
    assert_as_undisturbed(run_dir, whole)
    assert mlp(run_dir).code == 0


def wait_until_stopped(launcher: int) -> int:
    """The pid of the launcher's rank, once it is stopped."""
    import time

    import psutil

    end = time.monotonic() + 60
    while time.monotonic() < end:
        for child in psutil.Process(launcher).children():
            if child.status() == psutil.STATUS_STOPPED:
                return int(child.pid)
        time.sleep(0.02)
    raise AssertionError("no rank stopped itself")


def test_a_finished_run_that_is_started_again_is_done_at_once(whole: Path, tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(whole, tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in (run_dir / "final").iterdir()}
    ended = mlp(run_dir)
    assert ended.code == 0
    assert "already finished" in ended.output
    assert event(run_dir, "end")["cause"] == "already-finished"
    assert {path: path.stat().st_mtime_ns for path in (run_dir / "final").iterdir()} == before
    assert mlp(run_dir, processes=2).code == 0


@pytest.mark.parametrize("damage", [os.truncate, "manifest"], ids=["torn-file", "missing-manifest"])
def test_a_torn_export_is_made_again(whole: Path, tmp_path: Path, damage) -> None:
    run_dir = Path(shutil.copytree(whole, tmp_path / "run"))
    if damage == "manifest":
        (run_dir / "final" / MANIFEST).unlink()
    else:
        os.truncate(run_dir / "final" / "model.safetensors", 1000)
    ended = mlp(run_dir)
    assert ended.code == 0, ended.output
    assert "already finished" not in ended.output
    assert_as_undisturbed(run_dir, whole)


def test_where_no_bucket_is_mounted_nothing_is_written(tmp_path: Path) -> None:
    # A mount point that nothing is mounted on: a folder on the device of the root folder.
    code = (
        "import os, sys, tempfile\n"
        "folder = next(p for p in ('/var/tmp', '/opt', '/srv') if os.stat(p).st_dev == os.stat('/').st_dev)\n"
        "print(tempfile.mkdtemp(dir=folder))\n"
    )
    mount = Path(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    )
    try:
        ended = mlp(mount / "run", env=clean_env(SKYSPOT_MOUNT=str(mount)))
        assert ended.code == 1
        assert "no bucket is mounted there" in ended.output
        assert "Traceback" not in ended.output
        assert list(mount.iterdir()) == []
    finally:
        shutil.rmtree(mount)


def test_the_folder_that_holds_the_run_is_never_made(tmp_path: Path) -> None:
    ended = mlp(tmp_path / "not-mounted" / "run")
    assert ended.code == 1
    assert "no such folder" in ended.output
    assert not (tmp_path / "not-mounted").exists()


def test_a_full_bucket_ends_the_attempt_and_keeps_what_was_committed(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip(needs_root("a full bucket"))
    kept, program = tmp_path / "kept", PROGRAMS / "faulty.py"
    # About 1.6 MB a checkpoint: the first fits, the second does not.
    script = (
        f"mkdir {tmp_path}/disk && mount -t tmpfs -o size=2500k tmpfs {tmp_path}/disk\n"
        f"{sys.executable} -m trainer.launch --processes 1 {program} --dir {tmp_path}/disk/run --hidden 256\n"
        f"code=$?; cp -r {tmp_path}/disk/run {kept}; exit $code\n"
    )
    ended = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, env=clean_env(), timeout=120, cwd=REPO
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "No space left" in ended.stderr
    assert "Traceback" not in ended.stderr
    paths = RunPaths(kept)
    assert 4 in [name.step for name in list_checkpoints(paths) if (paths.checkpoint(name) / MANIFEST).exists()]


def test_a_pickle_in_the_bucket_is_never_opened(run_dir: Path, whole: Path, tmp_path: Path) -> None:
    burnt = tmp_path / "burnt"

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(burnt),))

    bomb = pickle.dumps(Bomb())
    folder = newest(run_dir)
    for name in ("state.pkl", "model.pt", ".metadata"):
        (folder / name).write_bytes(bomb)
    # As good as it gets: a bomb in a share's place, with a manifest that lists its true size and hash.
    share_of(folder).write_bytes(bomb)
    document = json.loads((folder / MANIFEST).read_bytes())
    document["files"][share_of(folder).name] = {"bytes": len(bomb), "hash": hash_file(share_of(folder))}
    document["files"]["state.pkl"] = {"bytes": len(bomb), "hash": hash_file(folder / "state.pkl")}
    (folder / MANIFEST).write_bytes(sealed(document))
    ended = mlp(run_dir)
    assert ended.code == 0, ended.output
    assert not burnt.exists()
    assert_as_undisturbed(run_dir, whole)
    pickle.loads(bomb)
    assert burnt.exists(), "the bomb itself works"


def test_a_checkpoint_of_a_newer_layout_is_refused_in_a_line(run_dir: Path) -> None:
    manifest = newest(run_dir) / MANIFEST
    document = json.loads(manifest.read_bytes())
    manifest.write_bytes(sealed({**document, "layout_version": 99}))
    before = sorted(str(path) for path in (run_dir / "checkpoints").rglob("*"))
    ended = mlp(run_dir)
    assert ended.code == 1
    assert "Upgrade skyspot" in ended.output
    assert "Traceback" not in ended.output
    assert sorted(str(path) for path in (run_dir / "checkpoints").rglob("*")) == before


def test_old_checkpoints_are_pruned_behind_newer_ones_that_were_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_rank.pruned_before_the_next_save(monkeypatch)
    run_dir = tmp_path / "run"
    assert one_rank.train(run_dir, max_steps=12, keep_latest=2).code == 0
    paths = RunPaths(run_dir)
    assert [name.step for name in list_checkpoints(paths)] == [12, 10]
    assert list(losses(run_dir)) == list(range(1, 13)), "the history outlives the checkpoints"
    assert read_manifest(paths.checkpoint(list_checkpoints(paths)[0])).step == 12


def test_what_a_preemption_left_half_written_goes_with_the_pruning(run_dir: Path) -> None:
    paths = RunPaths(run_dir)
    missing_manifest(paths.checkpoint(list_checkpoints(paths)[1]))
    assert mlp(run_dir, "--save-every", 1, "--keep-latest", 2).code == 0
    assert 4 not in [name.step for name in list_checkpoints(paths)]


@pytest.mark.slow  # Time-outs that a busy machine keeps.
def left_after_s(run_dir: Path, output: str) -> float:
    """Seconds from the strike to the end event, by the times that were recorded."""
    struck = re.search(r"struck at ([\d.]+)", output)
    assert struck, output
    return float(str(event(run_dir, "end")["time"])) - float(struck.group(1))


@pytest.mark.slow
def test_a_rank_that_is_frozen_costs_the_attempt_and_not_the_run(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    frozen = mlp(run_dir, "--fault", "freeze@6", "--fault-rank", "1", "--peer-timeout", "4", processes=2, grace=1)
    assert frozen.code == 75, frozen.output
    assert event(run_dir, "end")["cause"] == "peer-gone"
    assert 2 < left_after_s(run_dir, frozen.output) < 4 + 10, "at the time-out"
    assert mlp(run_dir, processes=2).code == 0


def test_a_rank_that_dies_costs_the_attempt_and_a_bug_ends_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    died = mlp(run_dir, "--fault", "die@6", "--fault-rank", "1", processes=2)
    assert died.code == 75, died.output
    assert event(run_dir, "end")["cause"] == "peer-gone"
    assert left_after_s(run_dir, died.output) < 10
    failed = mlp(run_dir, "--fault", "raise@9", "--fault-rank", "1", processes=2)
    assert failed.code == 1
    assert "a bug of the program's own" in failed.output
    assert "The last committed checkpoint is" in failed.output
    assert mlp(run_dir, processes=2).code == 0
