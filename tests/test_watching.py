"""A rehearsal where a bucket cannot be served through FUSE: its file events are watched, or its files looked at."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from programs.scripts.truth import TRUTHS
from support import REPO, clean_env
from support_rehearse import leftovers, trains
from traced import Fs

from skyspot.errors import UsageError
from skyspot.rehearsal import sight
from skyspot.rehearsal.bucketfs.calls import Calls
from skyspot.rehearsal.bucketfs.polling import Poller
from skyspot.rehearsal.bucketfs.trace import CALLS, EVENTS, MAPPED, POLLS, Call, read_trace
from skyspot.rehearsal.bucketfs.watcher import Watcher, events_missing
from skyspot.rehearsal.faults import Preemption
from skyspot.rehearsal.lives import follow
from skyspot.rehearsal.replay import Attempt
from skyspot.rehearsal.saves import study
from skyspot.rehearsal.verdict import Verdict

needs_events = pytest.mark.skipif(events_missing() is not None, reason=f"file events: {events_missing()}")
QUEUE = Path("/proc/sys/fs/inotify/max_queued_events")


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    (tmp_path / "bucket").mkdir()
    return tmp_path / "bucket"


def watched(bucket: Path, program: str) -> list[Call]:
    """What a watcher tells of a program that works in the bucket."""
    watcher = Watcher(EVENTS, bucket, bucket.parent / "trace")
    try:
        subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=bucket, check=True)
    finally:
        watcher.stop()
    assert read_trace(bucket.parent / "trace") == watcher.calls.all
    assert [call.number for call in watcher.calls.all] == list(range(len(watcher.calls.all)))
    return watcher.calls.all


def told(calls: Sequence[Call]) -> list[tuple[str, str, int]]:
    """(name, path, bytes) of the calls that are known; of a rename, both paths."""
    return [
        (call.name, f"{call.path} {call.to}".strip(), call.offset + call.size)
        for call in calls
        if call.name != "close" and (call.name != "read" or call.size)
    ]


# -- file events -----------------------------------------------------------------------------------------------------


@needs_events
def test_a_save_and_what_was_read_are_told(bucket: Path) -> None:
    (bucket / "old.pt").write_bytes(bytes(1000))
    calls = watched(
        bucket,
        """
        import os
        open("old.pt", "rb").read()
        open("new.tmp", "wb").write(bytes(5000))
        os.replace("new.tmp", "new.pt")
        os.unlink("old.pt")
        """,
    )
    assert told(calls) == [
        ("open", "old.pt", 0), ("read", "old.pt", 1000),
        ("create", "new.tmp", 0), ("write", "new.tmp", 5000), ("rename", "new.tmp new.pt", 0), ("unlink", "old.pt", 0),
    ]  # fmt: skip
    closed = next(call for call in calls if call.name == "close")
    assert closed.handle == next(call.handle for call in calls if call.name == "write")


@needs_events
def test_a_file_that_is_opened_and_not_read_may_have_been_mapped(bucket: Path) -> None:
    (bucket / "a.pt").write_bytes(bytes(1000))
    calls = watched(
        bucket,
        """
        import mmap
        with open("a.pt", "rb") as file:
            assert mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)[5] == 0
        """,
    )
    assert told(calls) == [("open", "a.pt", 0), (MAPPED, "a.pt", 1000)]


@needs_events
@pytest.mark.parametrize(("path", "emptied"), [("log.txt", False), ("state.pkl", True)])
def test_a_file_that_only_grows_was_appended_to_unless_it_is_named_like_a_checkpoint(
    bucket: Path, path: str, emptied: bool
) -> None:
    (bucket / path).write_bytes(bytes(100))
    calls = watched(bucket, f"open('{path}', {'wb' if emptied else 'ab'!r}).write(bytes({150 if emptied else 50}))")
    found = next(call for call in calls if call.name == "write")
    assert (found.offset, found.size) == ((0, 150) if emptied else (100, 50))
    assert bool(calls[0].flags & os.O_TRUNC) == emptied


@needs_events
@pytest.mark.parametrize("size", [40, 100])
def test_a_file_that_has_not_grown_was_written_anew(bucket: Path, size: int) -> None:
    (bucket / "numbers").write_bytes(bytes(100))
    calls = watched(bucket, f"open('numbers', 'wb').write(bytes({size}))")
    assert calls[0].flags & os.O_TRUNC
    assert [call.offset + call.size for call in calls if call.name == "write"] == [size]


@needs_events
def test_links_are_told(bucket: Path) -> None:
    (bucket / "a").write_text("a")
    calls = watched(bucket, "import os; os.link('a', 'b'); os.symlink('a', 'c'); os.rename('c', 'd')")
    assert told(calls) == [("link", "a b", 0), ("symlink", "c", 0), ("rename", "c d", 0)]


@needs_events
def test_a_file_that_is_moved_in_takes_the_place_of_the_one_that_was_there(bucket: Path) -> None:
    for name, size in (("bucket/a.pt", 10), ("one", 20), ("two", 30)):
        (bucket.parent / name).write_bytes(bytes(size))
    calls = watched(bucket, "import os; os.replace('../one', 'a.pt'); open('b', 'w'); os.replace('../two', 'a.pt')")
    assert [call.size for call in calls if call.name == "write" and call.path == "a.pt"][-1] == 30
    assert [call.name for call in calls if call.path == "a.pt"].count("create") >= 1


@needs_events
def test_no_file_in_a_new_folder_is_missed(bucket: Path) -> None:
    """Folders are made and renamed faster than they can be watched."""
    calls = watched(
        bucket,
        """
        import os
        for number in range(200):
            os.makedirs(f"tmp-{number}/a/b")
            for name in ("1", "a/2", "a/b/3"):
                open(f"tmp-{number}/{name}", "w").write("x" * 10)
            os.rename(f"tmp-{number}", f"step-{number}")
        """,
    )
    there: dict[str, int] = {}
    for call in calls:
        if call.name == "create":
            assert call.path not in there, call
            there[call.path] = 0
        elif call.name == "write":
            there[call.path] = call.offset + call.size
        elif call.name == "rename":
            there = {path.replace(f"{call.path}/", f"{call.to}/"): size for path, size in there.items()}
    assert there == {path.relative_to(bucket).as_posix(): 10 for path in bucket.rglob("*") if path.is_file()}
    open_now = {call.handle for call in calls if call.name == "create"}
    assert open_now == {call.handle for call in calls if call.name == "close"}


@needs_events
def test_a_file_that_was_open_at_the_kill_is_not_closed_by_it(bucket: Path) -> None:
    watcher = Watcher(EVENTS, bucket, bucket.parent / "trace")
    program = "import time; f = open('a.pt', 'wb', 0); f.write(bytes(9)); print(flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=bucket, stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    watcher.kill_comes()
    process.kill()
    process.wait()
    process.stdout.close()
    watcher.stop()
    assert [call.name for call in watcher.calls.all] == ["create", "write"]


@needs_events
def test_events_that_were_lost_are_said(bucket: Path) -> None:
    from skyspot.rehearsal.bucketfs.inotify import OVERFLOW, Inotify

    if int(QUEUE.read_text()) > 100_000:
        pytest.skip(f"an overflow takes {QUEUE.read_text().strip()} file events here")
    calls = Calls(bucket.parent / "trace")
    source = Inotify(bucket, calls)
    for number in range(int(QUEUE.read_text())):
        (bucket / str(number % 2)).open("w").close()
    source.finish()
    calls.save()
    assert sight.gap(read_trace(bucket.parent / "trace")) == OVERFLOW


@needs_events
def test_a_folder_that_cannot_be_watched_is_said(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import inotify_simple

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    watcher = Watcher(EVENTS, bucket, bucket.parent / "trace")
    monkeypatch.setattr(inotify_simple.INotify, "add_watch", full)
    (bucket / "new").mkdir()
    watcher.stop()
    assert sight.gap(watcher.calls.all) == "new could not be watched: No space left on device"
    second = Watcher(EVENTS, bucket, bucket.parent / "trace")
    second.stop()
    assert sight.gap(second.calls.all) == "the bucket could not be watched: No space left on device"


# -- looks at the files ----------------------------------------------------------------------------------------------


def test_looks_at_the_files_tell_what_changed(bucket: Path, tmp_path: Path) -> None:
    (bucket / "log").write_text("before")
    calls = Calls(tmp_path / "trace")
    poller = Poller(bucket, calls)
    poller.look()
    assert calls.all == []
    (bucket / "save.tmp").write_bytes(bytes(100))
    with (bucket / "log").open("a") as log:
        log.write(" after")
    poller.look()
    (bucket / "save.tmp").rename(bucket / "save")
    poller.look()
    (bucket / "new").write_bytes(b"")
    (bucket / "new").replace(bucket / "save")
    os.truncate(bucket / "log", 3)
    poller.look()
    (bucket / "log").unlink()
    poller.finish()
    calls.save()
    assert [(call.name, call.path, call.to, call.offset, call.size) for call in read_trace(tmp_path / "trace")] == [
        ("create", "save.tmp", "", 0, 0),
        ("write", "save.tmp", "", 0, 100),
        ("write", "log", "", 6, 6),
        ("close", "save.tmp", "", 0, 100),
        ("rename", "save.tmp", "save", 0, 0),
        ("truncate", "log", "", 0, 3),
        ("create", "save", "", 0, 0),
        ("unlink", "log", "", 0, 0),
        ("close", "save", "", 0, 0),
    ]


def test_a_look_before_the_kill_leaves_open_what_changed_just_now(bucket: Path, tmp_path: Path) -> None:
    calls = Calls(tmp_path / "trace")
    poller = Poller(bucket, calls)
    (bucket / "a").write_text("half")
    poller.kill_comes()
    poller.finish()
    calls.save()
    assert [call.name for call in calls.all] == ["create", "write"]


# -- what it proves --------------------------------------------------------------------------------------------------


def trains_in(fs: Fs, starts_over: bool = False, reads: bool = True, until: int = 60) -> None:
    """A script with a numbered save each 10 steps."""
    names = [name for name in fs.files if name.startswith("step-")]
    newest = max(names, key=lambda name: int(name[5:-3]), default=None)
    first = 0
    if newest and not starts_over:
        first = int(newest[5:-3])
        if reads:
            fs.read(newest)
    for step in range(first + 1, 61):
        fs.tick()
        if step > until:
            fs.take()
        if step % 10 == 0:
            fs.write(f"step-{step}.pt", step)


def judged(how: str, mapped: bool = False, missed: str = "", **second: bool) -> Verdict | None:
    fs = Fs()
    reference = fs.attempt(trains_in)
    fs.files.clear()
    attempts = [fs.attempt(lambda fs: trains_in(fs, until=25)), fs.attempt(lambda fs: trains_in(fs, **second))]
    if mapped:
        calls = [replace(call, name=MAPPED if call.name == "read" else call.name) for call in attempts[1].calls]
        attempts[1] = replace(attempts[1], calls=calls)
    attempts = [as_seen(one, how) for one in attempts]
    learnt = study(reference, [attempts])
    return sight.judge(how, learnt, follow(learnt, attempts), same=True, missing="it is macOS", missed=missed)


def as_seen(attempt: Attempt, how: str) -> Attempt:
    if how != POLLS:
        return attempt
    return replace(attempt, calls=[call for call in attempt.calls if call.name != "read"], reads_seen=False)


def test_with_events_a_checkpoint_that_was_seen_to_be_read_is_enough() -> None:
    assert judged(EVENTS) is None


@pytest.mark.parametrize(
    ("how", "second", "text"),
    [
        (EVENTS, {"starts_over": True}, "LOST WORK: in attempt 2, it read no checkpoint though step-20.pt (step 20) w"),
        (EVENTS, {"reads": False}, "not checked: attempt 2 was not seen to read step-20.pt (step 20), which was comp"),
        (EVENTS, {"mapped": True}, "not checked: attempt 2 opened step-20.pt (step 20) and was not seen to read it; a"),
        (EVENTS, {"missed": "too many"}, "not checked: some of what the task did on its bucket was missed: too many"),
        (POLLS, {}, "not checked: whether it resumed cannot be seen here, because it is macOS"),
        (POLLS, {"starts_over": True}, "LOST WORK: in attempt 2, it wrote step 10 again as its first save though step"),
    ],
)
def test_less_than_that_is_no_proof(how: str, second: dict[str, Any], text: str) -> None:
    found = judged(how, **second)
    assert found
    assert found.text.startswith(text)
    assert not found.exact


def test_an_attempt_that_was_not_seen_to_read_makes_the_leg_unsure() -> None:
    """With each call in the trace, one attempt that resumed is enough; with events, each must be seen to."""
    fs = Fs()
    reference = fs.attempt(trains_in)
    fs.files.clear()
    attempts = [
        fs.attempt(lambda fs: trains_in(fs, until=25)),
        fs.attempt(lambda fs: fs.take()),
        fs.attempt(trains_in),
    ]
    learnt = study(reference, [attempts])
    lives = follow(learnt, attempts)
    assert sight.judge(CALLS, learnt, lives, same=True) is None
    found = sight.judge(EVENTS, learnt, lives, same=True)
    assert found
    assert found.text == "not checked: attempt 2 was not seen to read step-20.pt (step 20), which was complete"
    fs.files.clear()
    attempts = [
        fs.attempt(lambda fs: trains_in(fs, until=25)),
        fs.attempt(lambda fs: trains_in(fs, until=45)),
        fs.attempt(lambda fs: trains_in(fs, reads=False)),
    ]
    learnt = study(reference, [attempts])
    found = sight.judge(EVENTS, learnt, follow(learnt, attempts), same=True)
    assert found
    assert found.text == "not checked: attempt 3 was not seen to read step-40.pt (step 40), which was complete"


def saves_to(path: str, temporary: str = "") -> Callable[[Fs], None]:
    """A script that saves four times, to a temporary name first if there is one."""

    def run(fs: Fs) -> None:
        for step in range(1, 5):
            fs.tick()
            fs.write(temporary or path.replace("#", str(step)), step, size=1000)
            if temporary:
                fs.rename(temporary, path)

    return run


@pytest.mark.parametrize(
    ("script", "last", "size", "incomplete"),
    [
        (saves_to("step-#.pt"), "write", 400, True),
        (saves_to("step-#.pt"), "write", 1000, False),
        (saves_to("step-#.pt"), "close", 1000, False),
        (saves_to("state.pt", "state.tmp"), "write", 1000, True),
        (saves_to("state.pt", "state.tmp"), "close", 1000, True),
        (saves_to("state.pt", "state.tmp"), "rename", 1000, False),
    ],
)
def test_a_kill_in_a_save_is_claimed_only_of_a_file_that_is_short_or_not_in_its_place(
    script: Callable[[Fs], None], last: str, size: int, incomplete: bool
) -> None:
    """The kill closes every file, so a file of full size may be whole."""
    fs = Fs()
    reference = fs.attempt(script)
    fs.files.clear()
    calls = list(fs.attempt(script).calls)
    while calls[-1].name != last:
        calls.pop()
    calls = [replace(call, size=size) if call is calls[-1] and last == "write" else call for call in calls]
    attempt = Attempt(calls)
    learnt = study(reference, [[attempt]])
    assert sight.is_incomplete(learnt, follow(learnt, [attempt])[-1]) == incomplete


def test_of_a_save_a_file_that_was_not_begun_is_missing_and_one_that_was_finished_is_whole() -> None:
    def calls(first: int) -> list[Call]:
        """Of four saves of two files, up to the last close; the first file has that size."""

        def run(fs: Fs) -> None:
            for step in range(1, 5):
                fs.tick()
                fs.write(f"a-{step}.pt", step, size=first)
                fs.write(f"b-{step}.pt", step, size=1000)

        return list(Fs().attempt(run).calls)

    def is_incomplete(seen: list[Call]) -> bool:
        learnt = study(Attempt(calls(1000), finished=True), [[Attempt(seen)]])
        return sight.is_incomplete(learnt, follow(learnt, [Attempt(seen)])[-1])

    assert is_incomplete([call for call in calls(1000) if call.path != "b-4.pt"])
    assert not is_incomplete(calls(900)[:-1]), "the other one may be whole"


# -- rehearsals ------------------------------------------------------------------------------------------------------


def rehearse(
    folder: Path, task: str, *args: str, before: str = "", namespace: bool = False
) -> tuple[int, dict[str, Any]]:
    """Rehearse where there is no FUSE; return the exit status and the result.

    Args:
        folder: Where the task lies.
        task: Its text.
        args: More options.
        before: Python that is run in skyspot before the rehearsal.
        namespace: Have mount namespaces all the same.
    """
    (folder / "task.yaml").write_text(task)
    program = f"""
import runpy, sys
from skyspot.rehearsal import tracing
tracing.bucketfs_missing = lambda: "there is no FUSE here"
{textwrap.dedent(before)}
sys.argv = ["skyspot", "rehearse", "task.yaml", "--json", "--processes", "1", *{list(args)!r}]
runpy.run_module("skyspot", run_name="__main__")
"""
    more = {} if namespace else {"SKYSPOT_REHEARSE_WITHOUT_NAMESPACE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=clean_env(TMPDIR=str(folder), **more),
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    assert not [path for path in leftovers(folder) if "rehearsal-log" not in path]
    return done.returncode, json.loads(done.stdout)


SCRIPT = """\
envs: {{OUT: /checkpoints/own, OMP_NUM_THREADS: "1"}}
file_mounts:
  /checkpoints: {{name: bbb, mode: MOUNT}}
  ~/code/script.py: {path}
run: python ~/code/script.py
"""


def script(name: str) -> str:
    return SCRIPT.format(path=next(one.path for one in TRUTHS if one.script == name))


def text_of(result: dict[str, Any], leg: int = 1) -> str:
    return str(result["legs"][leg]["verdict"]["text"])


@pytest.mark.slow
@needs_events
@pytest.mark.parametrize("namespace", [True, False])
def test_a_right_script_is_exact_and_what_was_not_seen_is_said(tmp_path: Path, namespace: bool) -> None:
    if namespace and machine_namespaces_missing():
        pytest.skip("this system allows no mount namespace")
    options = ["--compare", "own/result.json", "--kinds", "kill,sigterm,torn", "--preemptions", "3"]
    code, result = rehearse(tmp_path, script("renamed_over"), *options, namespace=namespace)
    assert code == 0, result
    kinds = {row["kind"]: (row["outcome"], row["why"]) for row in result["kinds"]}
    assert (kinds["kill"][0], kinds["sigterm"][0]) == ("exact", "exact")
    assert kinds["torn"] == ("not tried", "it needs FUSE: there is no FUSE here")
    assert [row["resumed"][:5] for row in result["legs"][1]["rows"][1:]] == ["save ", "save "]
    note = "/checkpoints was not served through FUSE (there is no FUSE here): its file events were watched. Not seen: "
    assert any(one.startswith(note) for one in result["notes"]), result["notes"]


@needs_events
def test_a_script_that_starts_from_nothing_loses_work(tmp_path: Path) -> None:
    task = (
        "file_mounts: {/checkpoints: {name: bbb, mode: MOUNT}}\nrun: |\n"
        "  n=0\n"
        "  while [ $n -lt 40 ]; do\n"
        "    n=$((n + 1)); sleep 0.05; echo $n > /checkpoints/state.new; mv /checkpoints/state.new /checkpoints/state\n"
        "  done\n"
        "  echo $n > /checkpoints/result\n"
    )
    options = ["--compare", "result", "--kinds", "kill", "--preemptions", "1"]
    code, result = rehearse(tmp_path, task, *options)
    assert code == 1
    assert text_of(result).startswith("LOST WORK: in attempt 2, it read no checkpoint though state (save ")
    assert result["kinds"][0]["outcome"] == "LOST WORK"


HALF = """\
file_mounts: {/checkpoints: {name: bbb, mode: MOUNT}}
run: |
  cd /checkpoints
  n=$(ls | sed -n 's/^state-//p' | sort -n | tail -n 1)
  n=${n:-0}
  [ $n = 0 ] || [ "$(tail -n 1 state-$n)" = whole ] || { echo "Error: state-$n is torn"; exit 9; }
  while [ $n -lt 12 ]; do
    n=$((n + 1)); { echo begin; sleep 0.3; echo whole; } > state-$n
  done
  echo $n > result
"""
"""Each save takes its time, and the newest file is loaded whatever it holds."""


@pytest.mark.slow
@needs_events
def test_a_half_written_newest_checkpoint_is_found(tmp_path: Path) -> None:
    options = ["--compare", "result", "--kinds", "kill-in-save", "--preemptions", "1"]
    code, result = rehearse(tmp_path, HALF, *options)
    assert code == 1
    assert result["legs"][1]["rows"][0]["ended"] == "killed while saving"
    assert (result["kinds"][0]["kind"], result["kinds"][0]["outcome"]) == ("kill-in-save", "stays down")
    assert "is torn" in text_of(result)


@needs_events
def test_a_kill_after_a_save_is_none_in_a_save(tmp_path: Path) -> None:
    """A save is over before the machine is gone: so it is said, and no row claims it."""
    late = """
        import time
        from skyspot.rehearsal.machine import Machine
        kill = Machine.kill
        Machine.kill = lambda self: (time.sleep(0.02), kill(self))[1]
        """
    task = "file_mounts: {/checkpoints: {name: bbb, mode: MOUNT}}\nrun: |\n" + trains(steps=40)
    task += "  cp /checkpoints/n /checkpoints/result\n"
    options = ["--compare", "result", "--kinds", "kill,kill-in-save", "--preemptions", "2"]
    code, result = rehearse(tmp_path, task, *options, before=late)
    kinds = {row["kind"]: (row["outcome"], row["why"]) for row in result["kinds"]}
    assert kinds["kill-in-save"] == ("not tried", "the save had finished before the kill"), result
    assert (code, kinds["kill"][0]) == (0, "exact"), result


def test_without_file_events_nothing_is_proved(tmp_path: Path) -> None:
    without = "sys.modules['inotify_simple'] = None"
    options = ["--compare", "own/result.json", "--kinds", "kill,kill-in-save", "--preemptions", "2"]
    code, result = rehearse(tmp_path, script("renamed_over"), *options, before=without)
    assert code == 1
    why = "not checked: whether it resumed cannot be seen here, because there is no FUSE here, and inotify_simple is"
    assert text_of(result).startswith(why)
    assert [(row["kind"], row["outcome"]) for row in result["kinds"]] == [
        ("kill", "not checked"), ("kill-in-save", "not tried"),
    ]  # fmt: skip
    assert any("its files were looked at again and again" in one for one in result["notes"])


def test_kinds_of_which_none_can_be_tried_are_refused() -> None:
    plan = [Preemption("torn"), Preemption("kill-in-save"), Preemption("kill")]
    assert [one.kind for one in sight.tried(POLLS, plan, "")] == ["kill"]
    assert [one.kind for one in sight.tried(EVENTS, plan, "")] == ["kill-in-save", "kill"]
    with pytest.raises(UsageError, match=r"--kinds torn: it needs FUSE \(it is macOS\)\. Add a kind that does not"):
        sight.tried(POLLS, plan[:2], "it is macOS")


@pytest.mark.slow
@needs_events
def test_a_script_that_never_saves_is_told_so(tmp_path: Path) -> None:
    code, result = rehearse(tmp_path, script("never_saves"), "--compare", "own/centres.csv")
    assert code == 1
    text = "not checked: the task saves nothing before its end, so a preemption loses all of its work"
    assert text_of(result).startswith(text)
    kinds = {row["kind"]: (row["outcome"], row["why"]) for row in result["kinds"]}
    assert kinds["kill-in-save"] == kinds["torn"] == ("not tried", "the task saves nothing before its end")


@needs_events
def test_an_overflow_in_one_attempt_leaves_the_leg_unchecked(tmp_path: Path) -> None:
    lost = """
        from skyspot.rehearsal.bucketfs.watcher import Watcher
        stop = Watcher.stop
        def stop_with_a_gap(self):
            if "preempted" in str(self.trace):
                self.calls.gap("the queue overflowed")
            stop(self)
        Watcher.stop = stop_with_a_gap
        """
    options = ["--compare", "own/result.json", "--kinds", "kill", "--preemptions", "1"]
    code, result = rehearse(tmp_path, script("renamed_over"), *options, before=lost)
    assert code == 1
    assert text_of(result) == "not checked: some of what the task did on its bucket was missed: the queue overflowed"


def machine_namespaces_missing() -> bool:
    from skyspot.rehearsal.machine import namespace_command

    return namespace_command() is None


MOVED = """\
file_mounts: {/checkpoints: {name: bbb, mode: MOUNT}}
run: |
  n=$(cat /checkpoints/state 2> /dev/null || echo 0)
  while [ $n -lt 20 ]; do
    n=$((n + 1)); sleep 0.2; echo $n > ~/state; mv ~/state /checkpoints/state
  done
  echo $n > /checkpoints/result
"""
"""A save is one event, and is complete when that is seen: each kill in a save comes after it."""


@pytest.mark.slow
@needs_events
def test_a_kill_that_comes_too_late_whenever_it_is_tried_is_inconclusive(tmp_path: Path) -> None:
    options = ["--compare", "result", "--kinds", "kill-in-save", "--preemptions", "1"]
    code, result = rehearse(tmp_path, MOVED, *options, namespace=False)
    assert text_of(result) == "inconclusive: the kill came after the save had finished"
    assert code == 1, "it resumed, with the same result, and that is no proof"
    assert [row["ended"] for row in result["legs"][1]["rows"]] == ["killed, when the save had finished", "finished"]
    assert (result["kinds"][0]["outcome"], result["exact"]) == ("not tried", False)
    assert f"\nPreempted: {text_of(result)}\n" in (REPO / "docs" / "rehearse.md").read_text()
