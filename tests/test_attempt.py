"""Attempts: numbers, identity, what binds a run, and when a launch gets nowhere."""

import errno
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from trainer.attempt.binding import binding_problem
from trainer.attempt.history import ignored_notices, no_progress
from trainer.attempt.identity import identity, new_run_id, newest_readable
from trainer.attempt.record import Attempt, adopt, newer_attempt, open_attempt, record
from trainer.bucket.retry import retry
from trainer.errors import AttemptError
from trainer.layout import events
from trainer.layout.documents import LayoutError, LayoutVersionError, from_json, write_once
from trainer.layout.events import read_events, read_metrics, read_progress
from trainer.layout.exit_codes import EXIT_PREEMPTED
from trainer.layout.identity import newest_committed
from trainer.layout.manifest import FileRecord, Manifest, read_manifest
from trainer.layout.names import AttemptName, RunPaths, is_safe_name, list_attempts


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return RunPaths(tmp_path / "run")


def begin(paths: RunPaths, launch: str = "l", **binding: object) -> Attempt:
    return open_attempt(paths, launch=launch, config={}, binding=binding, newest_step=0)


def end(one: Attempt, code: int = EXIT_PREEMPTED, cause: str = "peer-gone", **fields: object) -> None:
    record(one, "end", code=code, cause=cause, **fields)


def test_numbers_grow_and_the_random_part_keeps_equal_ones_apart(paths: RunPaths) -> None:
    first, second = begin(paths), begin(paths)
    assert (first.name.number, second.name.number) == (1, 2)
    assert newer_attempt(first) == second.name
    assert newer_attempt(second) is None
    twin = AttemptName(2, "ffffff")
    paths.attempt(twin).mkdir()
    assert newer_attempt(second) is None, "an equal number is no newer one"
    assert begin(paths).name.number == 3


def test_two_first_attempts_give_the_run_one_identity(paths: RunPaths, tmp_path: Path) -> None:
    begin(paths, seed=1)
    other = RunPaths(tmp_path / "other")
    begin(other, seed=1)
    assert paths.run_json.read_bytes() == other.run_json.read_bytes()
    different = RunPaths(tmp_path / "different")
    begin(different, seed=2)
    assert paths.run_json.read_bytes() != different.run_json.read_bytes()


def commit(paths: RunPaths, step: int, **facts: object) -> None:
    folder = paths.checkpoints / f"{step:010d}-a0001-aaaaaa-1"
    folder.mkdir(parents=True)
    write_once(folder / "MANIFEST.json", Manifest("checkpoint", {}, {"step": step, **facts}).to_json())


def test_a_torn_run_json_is_written_again_from_the_newest_manifest(paths: RunPaths) -> None:
    begin(paths)
    commit(paths, 4, run_id="the-true-one")
    paths.run_json.write_text('{"layout')
    begin(paths)
    assert json.loads(paths.run_json.read_text())["run_id"] == "the-true-one"
    paths.run_json.write_text('{"layout_version": 1, "run_id": "another"}')
    begin(paths)
    assert json.loads(paths.run_json.read_text())["run_id"] == "the-true-one"


def test_a_checkpoint_or_a_manifest_of_another_run_does_not_make_this_run_that_one(paths: RunPaths) -> None:
    begin(paths)
    own = json.loads(paths.run_json.read_text())["run_id"]
    commit(paths, 2, run_id=own)
    commit(paths, 4, run_id="another")
    begin(paths)
    assert json.loads(paths.run_json.read_text())["run_id"] == identity(paths, {}) == own
    found = newest_committed(paths, own)
    assert found
    assert found[1].step == 2
    commit(paths, 6, run_id=own)
    paths.run_json.unlink()
    begin(paths)
    assert json.loads(paths.run_json.read_text())["run_id"] == own


def test_a_manifest_in_the_place_of_another_attempts_is_no_witness_for_a_torn_run_json(paths: RunPaths) -> None:
    begin(paths)
    own = json.loads(paths.run_json.read_text())["run_id"]
    commit(paths, 2, run_id=own, attempt="a0001-aaaaaa")
    commit(paths, 4, run_id="another", attempt="a0007-bbbbbb")
    commit(paths, 6, run_id="another", attempt="a0007-bbbbbb")
    paths.run_json.write_text('{"layout')
    begin(paths)
    assert json.loads(paths.run_json.read_text())["run_id"] == own


def test_another_binding_is_refused_by_name_and_may_be_allowed(paths: RunPaths) -> None:
    begin(paths, seed=1, lr=0.1)
    second = begin(paths, seed=2, lr=0.1)
    said = binding_problem(paths, second, {"seed": 2, "lr": 0.1}, (), None)
    assert said
    assert "seed=1" in said
    assert "--allow-config-change seed" in said
    assert binding_problem(paths, second, {"seed": 2, "lr": 0.1}, ("seed",), None) is None
    assert binding_problem(paths, second, {"seed": 1, "lr": 0.1}, (), None) is None


def test_a_refused_attempt_does_not_bind_the_next_one(paths: RunPaths) -> None:
    first = begin(paths, seed=9)
    end(first, 1, "refused")
    second = begin(paths, seed=1)
    assert binding_problem(paths, second, {"seed": 1}, (), None) is None


def test_the_newest_manifest_binds_before_any_start(paths: RunPaths) -> None:
    begin(paths, seed=1)
    second = begin(paths, seed=1)
    newest = Manifest("checkpoint", {}, {"step": 4, "binding": {"seed": 5}})
    assert "seed=5" in str(binding_problem(paths, second, {"seed": 1}, (), newest))


def test_three_attempts_by_their_own_doing_without_progress_are_enough(paths: RunPaths) -> None:
    for number in range(3):
        one = begin(paths)
        assert no_progress(one, 0) is None, number
        end(one, error=f"reason {number}")
    said = no_progress(begin(paths), 0)
    assert said
    rows = [line.split() for line in said.splitlines()[-4:]]
    assert rows[0] == ["attempt", "ended", "by", "code", "last", "error"]
    assert [row[1:] for row in rows[1:]] == [["peer-gone", "75", "reason", str(number)] for number in range(3)]
    columns = {line.index("reason") for line in said.splitlines()[-3:]}
    assert columns == {said.splitlines()[-4].index("last error")}, "columns are aligned"
    assert no_progress(begin(paths, launch="other"), 0) is None, "a new launch starts from zero"


def test_three_hangs_at_one_step_end_the_launch(paths: RunPaths) -> None:
    for _ in range(3):
        one = begin(paths)
        assert no_progress(one, 0) is None
        end(one, cause="hang", error="training has stood still for 600 s")
    assert "stood still" in (no_progress(begin(paths), 0) or "")


def test_a_notice_or_a_signal_from_outside_is_not_an_attempts_own_doing(paths: RunPaths) -> None:
    for cause in ("peer-gone", "signal", "notice", "peer-gone", "signal"):
        end(begin(paths), cause=cause)
    assert no_progress(begin(paths), 0) is None
    for _ in range(3):
        end(begin(paths), cause="signal")
    assert no_progress(begin(paths), 0) is None
    end(begin(paths), cause="signal")
    assert "10 attempts in a row" in str(no_progress(begin(paths), 0))


def test_a_micro_batch_that_was_too_large_is_not_an_attempts_own_doing(paths: RunPaths) -> None:
    """The next attempt begins with a smaller one."""
    for _ in range(4):
        end(begin(paths), cause="error", micro_batch_too_large=8)
    assert no_progress(begin(paths), 0) is None


def test_an_end_without_a_word_counts_on_the_same_machine_alone(paths: RunPaths, tmp_path: Path, monkeypatch) -> None:
    for _ in range(3):
        begin(paths)
    assert no_progress(begin(paths), 0)
    other = RunPaths(tmp_path / "other")
    for number in range(3):
        monkeypatch.setenv("HOME", str(tmp_path / f"home{number}"))  # Another machine each time.
        begin(other)
    assert no_progress(begin(other), 0) is None


def test_a_new_checkpoint_or_newly_prepared_data_is_progress(paths: RunPaths) -> None:
    for _ in range(3):
        one = begin(paths)
        record(one, "restored", step=4)
        end(one)
    assert no_progress(begin(paths), 4)
    assert no_progress(begin(paths), 8) is None
    last = begin(paths)
    for name, whole, is_progress in (("a0000-000000", True, False), (one.name, False, False), (one.name, True, True)):
        folder = paths.tokens / f"0123-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        if whole:
            write_once(folder / "MANIFEST.json", Manifest("tokens", {}).to_json())
        assert (no_progress(last, 4) is None) == is_progress, (name, whole)


def test_a_notice_that_ended_an_attempt_on_this_machine_is_ignored_later(paths: RunPaths) -> None:
    one = begin(paths)
    end(one, cause="notice", notice={"kind": "aws-notice", "id": "aws/2026-01-01T00:00:00Z"})
    now = begin(paths)
    assert ignored_notices(paths, now.name, now.machine) == {"aws/2026-01-01T00:00:00Z"}


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AttemptError, match="nothing was trained"):
        begin(RunPaths(tmp_path / "file" / "run"))


# -- the contract ----------------------------------------------------------------------------------------------------


def test_a_torn_event_is_left_out_and_its_number_is_not_used_again(paths: RunPaths) -> None:
    one = begin(paths)
    (paths.attempt(one.name) / "0002-saved.json").write_text('{"st')
    record(one, "end", code=0)
    assert [(event.number, event.name) for event in read_events(paths, one.name)] == [(1, "start"), (3, "end")]


def test_a_record_does_not_need_a_listing_that_shows_the_one_before(paths: RunPaths, monkeypatch) -> None:
    one = begin(paths)
    record(one, "saved", step=1)
    monkeypatch.setattr("trainer.attempt.record.last_event_number", lambda paths, name: 1)
    record(one, "saved", step=2)
    record(one, "saved", step=3)
    assert [(event.number, event.fields.get("step")) for event in read_events(paths, one.name)] == [
        (1, None), (2, 1), (3, 2), (4, 3),
    ]  # fmt: skip


def test_a_file_that_cannot_be_looked_at_is_not_missing(paths: RunPaths, monkeypatch) -> None:
    folder = paths.checkpoints / f"0000000004-{begin(paths).name}-1"
    folder.mkdir(parents=True)
    write_once(folder / "MANIFEST.json", Manifest("checkpoint", {"a": FileRecord(1, "0" * 32)}, {"step": 4}).to_json())
    (folder / "a").write_bytes(b"a")
    found = newest_committed(paths)
    assert found
    assert found[1].step == 4
    real = Path.stat

    def stat(path: Path, **more: bool) -> os.stat_result:
        if path.name == "a":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, **more)

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(OSError, match="Input/output error"):
        newest_committed(paths)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_newest_checkpoint_that_cannot_be_looked_at_for_good_does_not_keep_the_run(
    paths: RunPaths, monkeypatch, number: int
) -> None:
    monkeypatch.setattr("trainer.attempt.identity.UNREADABLE_S", 0.3)
    monkeypatch.setattr("trainer.bucket.retry.START_RETRY_S", 2.0)
    name = begin(paths).name
    for step in (4, 8):
        folder = paths.checkpoints / f"{step:010d}-{name}-1"
        folder.mkdir(parents=True)
        found = Manifest("checkpoint", {"a": FileRecord(1, "0" * 32)}, {"step": step})
        write_once(folder / "MANIFEST.json", found.to_json())
        (folder / "a").write_bytes(b"a")
    real, refused = Path.stat, {8}

    def stat(path: Path, **more: bool) -> os.stat_result:
        if path.name == "a" and int(path.parent.name[:10]) in refused:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, **more)

    monkeypatch.setattr(Path, "stat", stat)
    older = newest_readable(paths, None)
    assert older
    assert older[0].step == 4
    refused.add(4)
    with pytest.raises(AttemptError, match=f"-1/a: {os.strerror(number)}. "):
        newest_readable(paths, None)


def test_what_tells_why_attempts_ended_is_read_and_not_each_of_their_saves(paths: RunPaths, monkeypatch) -> None:
    one = begin(paths)
    for step in range(20):
        record(one, "saved", step=step)
    end(one)
    now, read = begin(paths), []
    real = events.read_json
    monkeypatch.setattr(events, "read_json", lambda path, **how: read.append(path.name) or real(path, **how))
    no_progress(now, 0)
    ignored_notices(paths, now.name, now.machine)
    binding_problem(paths, now, {}, (), None)
    assert read
    assert not [name for name in read if "saved" in name]


def test_a_checkpoints_folder_that_was_copied_is_not_the_newest(paths: RunPaths) -> None:
    name = begin(paths).name
    folder = paths.checkpoints / f"0000000004-{name}-1"
    folder.mkdir(parents=True)
    write_once(folder / "MANIFEST.json", Manifest("checkpoint", {}, {"step": 4, "attempt": str(name)}).to_json())
    shutil.copytree(folder, paths.checkpoints / f"0000000008-{name}-2")
    found = newest_committed(paths)
    assert found
    assert found[0].step == 4


def test_who_opens_an_attempt_without_knowing_the_run_leaves_its_identity_to_who_does(paths: RunPaths) -> None:
    opened = open_attempt(paths, launch="l", config={}, binding=None)
    assert not paths.run_json.exists()
    adopt(paths, opened.name, "l", binding={"seed": 1})
    assert json.loads(paths.run_json.read_bytes())["run_id"] == new_run_id({"seed": 1})


def test_a_mount_that_is_gone_once_the_attempt_is_recorded_is_a_matter_for_a_new_machine(paths: RunPaths) -> None:
    def gone() -> None:
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    with pytest.raises(AttemptError, match="not connected") as error:
        retry(paths, gone, begun=True)
    assert error.value.code == 75
    failures = [OSError(errno.EIO, "x")] * 2

    def fails_for_a_moment() -> str:
        if failures:
            raise failures.pop()
        return "done"

    assert retry(paths, fails_for_a_moment, begun=True) == "done"


BAD_MANIFESTS = [
    b"", b"{", b"[]", b"null", b'{"layout_version": 1}', b'{"layout_version": true, "kind": "x", "files": {}}',
    b'{"layout_version": 1, "kind": "x", "files": {"../x": {"bytes": 1, "hash": "00000000000000000000000000000000"}}}',
    b'{"layout_version": 1, "kind": "x", "files": {"/x": {"bytes": 1, "hash": "00000000000000000000000000000000"}}}',
    b'{"layout_version": 1, "kind": "x", "files": {"x": {"bytes": -1, "hash": "00000000000000000000000000000000"}}}',
    b'{"layout_version": 1, "kind": "x", "files": {"x": {"bytes": 1000000000000000000, "hash": "0"}}}',
    b'{"layout_version": 1, "kind": "x", "files": {"x": {"bytes": 1, "hash": "zz"}}}',
    b'{"layout_version": 1, "kind": "x", "step": NaN, "files": {}}',
    b'{"layout_version": 1, "kind": "x", "kind": "y", "files": {}}', b"[" * 100_000, b"\xff\xfe",
]  # fmt: skip


@pytest.mark.parametrize("data", BAD_MANIFESTS, ids=lambda data: repr(data[:40]))
def test_a_manifest_that_cannot_be_one_is_not_believed(data: bytes) -> None:
    with pytest.raises(LayoutError):
        Manifest.parse(data)


def test_a_newer_layout_is_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "MANIFEST.json").write_bytes(b'{"layout_version": 2, "kind": "x", "files": {}}')
    with pytest.raises(LayoutVersionError, match="Upgrade skyspot"):
        read_manifest(tmp_path)


def test_a_manifest_is_read_as_it_was_written() -> None:
    one = Manifest("checkpoint", {"share": FileRecord(3, "0" * 32)}, {"step": 4, "text": "\u0085 😀"})
    assert Manifest.parse(one.to_json()) == one
    assert [is_safe_name(name) for name in ("a", "a/b", "a/../b", "", "a\nb", "MANIFEST.json", "a//b", ".")] == [
        True, True, False, False, False, False, False, False,
    ]  # fmt: skip


def test_nan_in_a_record_is_read_as_none(paths: RunPaths) -> None:
    """Another program than the trainer may have written it: the record is whole."""
    lines = b'{"step": 1, "loss": NaN}\n{"step": 2, "loss": -Infinity, "lr": 0.5}\n'
    assert [*read_metrics(lines)] == [{"step": 1, "loss": None}, {"step": 2, "loss": None, "lr": 0.5}]
    one = begin(paths)
    (paths.attempt(one.name) / "0002-end.json").write_text('{"code": 0, "loss": NaN}')
    paths.progress(one.name).write_text('{"step": 3, "loss": Infinity}')
    assert read_events(paths, one.name, ("end",))[0].fields == {"code": 0, "loss": None}
    assert read_progress(paths, one.name) == {"step": 3, "loss": None}


def test_metrics_end_at_the_first_torn_line() -> None:
    assert [line["step"] for line in read_metrics(b'{"step": 1}\n{"step": 2}\n{"st')] == [1, 2]
    with pytest.raises(LayoutError):
        from_json(b"Infinity")


def test_nothing_is_written_over(tmp_path: Path) -> None:
    write_once(tmp_path / "x", b"1")
    with pytest.raises(FileExistsError):
        write_once(tmp_path / "x", b"2")
    assert list_attempts(RunPaths(tmp_path / "nowhere")) == []


def test_honest_preemptions_of_a_script_whose_checkpoints_are_not_seen_are_no_standstill(paths: RunPaths) -> None:
    for _ in range(10):
        end(begin(paths), cause="signal")
    last = begin(paths)
    assert no_progress(last, 0)
    assert no_progress(last, 0, sees_progress=False) is None
    for _ in range(3):
        end(begin(paths), cause="died")
    assert no_progress(begin(paths), 0, sees_progress=False), "its own doing counts all the same"


def test_steps_are_lost_over_attempts_that_came_to_nothing_too(paths: RunPaths) -> None:
    from trainer.training.restoring import last_step_done

    first = begin(paths)
    record(first, "restored", step=0)
    end(first, step=9)
    end(begin(paths), cause="signal", step=0)  # Taken before it had restored anything.
    begin(paths)
    assert last_step_done(begin(paths)) == 9
    later = begin(paths)
    record(later, "restored", step=4)
    end(later, step=6)
    assert last_step_done(begin(paths)) == 6, "what was done before that restore was counted then"


@pytest.mark.parametrize("place", range(0, 300, 7))
def test_a_flipped_bit_of_a_manifest_is_found(place: int) -> None:
    manifest = Manifest(
        "checkpoint", {"a": FileRecord(1, "0" * 32)}, {"step": 12, "config": {"lr": 0.1, "who": "\u00e9"}}
    )
    data = bytearray(manifest.to_json())
    data[place % len(data)] ^= 1 << place % 7
    with suppress(LayoutError):
        found = Manifest.parse(bytes(data))  # White space was hit, or the name of the seal itself.
        assert found.files == manifest.files
        assert {key: found.facts[key] for key in manifest.facts} == manifest.facts
