"""Each strike of a rehearsal gets a verdict of its own: no other strike hides it, and something is left to show it."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faultfs
import pytest
from programs.scripts.truth import HERE
from support import PROGRAMS
from support_rehearse import leftovers, rehearse

from skyspot.rehearsal import scratch
from skyspot.rehearsal.faults import Preemption
from skyspot.rehearsal.legs import Legs
from skyspot.rehearsal.machine import bucketfs_missing
from skyspot.rehearsal.replay import Attempt
from skyspot.rehearsal.result import Leg, Row, Settings
from skyspot.rehearsal.task import read_task
from skyspot.rehearsal.view import View
from trainer.layout.exit_codes import EXIT_NO_PROGRESS

pytestmark = pytest.mark.skipif(bucketfs_missing() is not None, reason=str(faultfs.missing() or bucketfs_missing()))

TASK = """\
envs: {{OUT: /checkpoints/own}}
file_mounts:
  /checkpoints: {{name: somebodys-bucket, mode: MOUNT}}
  ~/train.py: {script}
run: python ~/train.py
"""
TWO_FILES = """\
import json, os, time
from pathlib import Path

out = Path(os.environ["OUT"])
out.mkdir(exist_ok=True)
weights, momenta = out / "weights.json", out / "momenta.json"
step, weight, momentum = 0, 0.0, 0.0
if weights.exists() and momenta.exists():
    (step, weight), momentum = json.loads(weights.read_text()), json.loads(momenta.read_text())


def save(path, value):
    path.with_suffix(".tmp").write_text(json.dumps(value))
    path.with_suffix(".tmp").replace(path)


while step < 40:
    momentum = 0.9 * momentum + 1 / (1 + step)
    step, weight = step + 1, weight + momentum
    time.sleep(0.05)
    if step in (SAVES):
        save(weights, [step, weight])
        save(momenta, momentum)
(out / "result.json").write_text(json.dumps(weight))
"""


def rehearsed(script: Path, *args: object) -> tuple[subprocess.CompletedProcess[str], dict]:
    folder = script.parent if script.parent != HERE else Path()
    (folder / "task.yaml").write_text(TASK.format(script=script))
    usual = () if "--mount-like" in args else ("--compare", "own/result.json", "--mount-like", "local")
    done = rehearse("task.yaml", *usual, "--json", *args, cwd=folder.absolute())
    assert not done.stderr, done.stderr
    return done, json.loads(done.stdout)


def outcomes(result: dict) -> dict[str, str]:
    return {one["kind"]: one["outcome"] for one in result["kinds"]}


@pytest.mark.slow
def test_a_first_strike_that_leaves_the_task_down_hides_no_other(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done, result = rehearsed(HERE / "newest_by_number.py", "--kinds", "torn,kill-at-write", "--preemptions", 2)
    assert done.returncode == 1
    down, other = [leg for leg in result["legs"] if leg["name"].startswith("preempted")]
    assert [row["kind"] for row in down["rows"]] == ["torn", "failed"]
    assert [row["kind"] for row in other["rows"]] == ["kill-at-write", "finished"]
    assert outcomes(result) == {"torn": "stays down", "kill-at-write": "exact", "other processes": "not tried"}
    assert not [path for path in leftovers(tmp_path) if "rehearsal-log" not in path]


@pytest.mark.slow
def test_where_files_arrive_in_any_order_a_marker_that_is_there_first_is_found(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = HERE / "done_marker.py"
    args = ("--kinds", "kill-in-save", "--preemptions", 1, "--compare", "own/final.npy", "--mount-like", "cached")
    done, result = rehearsed(script, *args)
    assert done.returncode == 1, done.stdout
    [leg] = [leg for leg in result["legs"] if leg["name"] == "preempted"]
    assert re.fullmatch(r"killed before the upload of own/step_\d+/left.npy", leg["rows"][0]["ended"])
    assert outcomes(result)["kill-in-save"] == "stays down"


def two_files(folder: Path, saves: str) -> Path:
    script = folder / "train.py"
    script.write_text(TWO_FILES.replace("SAVES", saves))
    return script


@pytest.mark.slow
def test_a_strike_does_not_fall_in_the_last_save_because_nothing_would_go_on_from_it(tmp_path: Path) -> None:
    # Three saves lie there at the first strike. Between the two files of the fourth, all steps are done.
    script = two_files(tmp_path, "1, 2, 3, 40")
    done, result = rehearsed(script, "--kinds", "kill,kill-in-save", "--preemptions", 2)
    assert done.returncode == 1, done.stdout
    assert outcomes(result)["kill"] == "exact"
    assert outcomes(result)["kill-in-save"] == "NOT exact"
    texts = [leg["verdict"]["text"] for leg in result["legs"] if leg["verdict"]]
    assert any("mixed pair of files of two saves: own/weights.json of save 3" in text for text in texts), texts


@pytest.mark.slow
def test_parts_of_a_last_save_from_which_nothing_goes_on_are_no_proof(tmp_path: Path) -> None:
    # Of two saves, only the last can be struck: nothing is left to train after it.
    script = two_files(tmp_path, "20, 40")
    done, result = rehearsed(script, "--kinds", "kill,kill-in-save", "--preemptions", 2)
    assert done.returncode == 1, done.stdout
    assert outcomes(result)["kill-in-save"] == "not checked"
    texts = [leg["verdict"]["text"] for leg in result["legs"] if leg["verdict"]]
    assert any("found an incomplete save (own/weights.json, own/momenta.json)" in text for text in texts), texts


@pytest.mark.slow
def test_what_a_strike_in_a_save_left_is_read_by_an_attempt_that_is_not_struck(tmp_path: Path) -> None:
    script = two_files(tmp_path, "5, 10, 15, 20, 25, 30, 35")
    done, result = rehearsed(script, "--kinds", "kill,kill-in-save,torn", "--preemptions", 3)
    assert done.returncode == 1, done.stdout
    legs = [[row["kind"] for row in leg["rows"]] for leg in result["legs"] if leg["name"].startswith("preempted")]
    assert legs == [["kill", "kill-in-save", "finished"], ["torn", "finished"]]
    # Both leave a pair of files of two saves, and each is told by a run of its own.
    assert outcomes(result) == {
        "kill": "exact", "kill-in-save": "NOT exact", "torn": "NOT exact", "other processes": "not tried",
    }  # fmt: skip
    assert not [one["why"] for one in result["kinds"] if "or another kind" in one["why"]]


# -- the run of a leg; attempts end as they are told


class Told(Legs):
    """Legs of a task whose attempts end in a given way, and write their number to the bucket."""

    def __init__(self, folder: Path, *ends: tuple[str, bool, int | None]) -> None:
        restart = f"[75, {EXIT_NO_PROGRESS}]"
        text = f"resources: {{use_spot: true, job_recovery: {{recover_on_exit_codes: {restart}}}}}\n"
        text += "file_mounts: {/checkpoints: {name: b, mode: MOUNT}}\nrun: x\n"
        super().__init__(read_task(text, folder, {}, None), Settings(mount_like="local"), View(quiet=True), folder, {})
        assert self.tracing.evidence
        self.evidence = self.tracing.evidence
        self.evidence.add("reference", Attempt([]))
        self.ends = list(ends)
        """Of each attempt: the kind of its row, whether the strike hit, its exit status."""
        self.struck: list[str | None] = []
        """The kind of strike that was planned for each attempt."""

    def _on_a_machine(
        self, leg: Leg, number: int, planned: Preemption | None, buckets: dict[str, Path], *_: object
    ) -> tuple[Row, int | None, Any]:
        self.struck.append(planned.kind if planned else None)
        kind, hit, code = self.ends.pop(0) if self.ends else ("finished", True, 0)
        (buckets["/checkpoints"] / str(number)).touch()
        self.evidence.add(leg.name, Attempt([]))
        log = self.folder / leg.name / f"machine-{number:02d}.log"
        log.touch()
        return Row(number, kind, kind, hit=hit), code, SimpleNamespace(log=log, folder=log.parent, watchers=[])

    def run_main(self, *kinds: str, **more: Any) -> Leg:
        return self.run("preempted", "Preempted", [Preemption(kind) for kind in kinds], [1], **more)

    def names(self, leg: str) -> list[str]:
        return sorted(path.name for path in self.bucket(leg).iterdir())


@pytest.mark.parametrize(("code", "restarts"), [(75, True), (1, False), (None, False), (EXIT_NO_PROGRESS, False)])
def test_an_attempt_that_failed_is_restarted_only_if_skypilot_would(
    tmp_path: Path, code: int | None, restarts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the code of an attempt that makes no progress, it would be restarted for ever."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    legs = Told(tmp_path, ("failed", True, code))
    leg = legs.run_main("kill")
    scratch.remove_all()  # The log of an attempt that failed is kept.
    assert legs.struck == ["kill"] * (1 + restarts)
    assert leg.finished == restarts
    assert [row.kind for row in leg.rows] == ["failed", "finished"][: 1 + restarts]


def test_a_strike_that_missed_is_tried_again_three_times(tmp_path: Path) -> None:
    legs = Told(tmp_path, *[("kill-in-save", False, None)] * 4, ("sigterm", True, None))
    leg = legs.run_main("kill-in-save", "sigterm")
    assert legs.struck == [*["kill-in-save"] * 4, "sigterm", None]
    assert (leg.finished, leg.pending, leg.preempted) == (True, (), 1)
    over = Told(tmp_path / "over", ("finished", True, 0)).run_main("kill", "torn")
    assert [one.kind for one in over.pending] == ["kill", "torn"]


def test_a_task_that_has_ended_is_not_struck_while_its_processes_leave(tmp_path: Path) -> None:
    statuses = iter([None, None, 0])
    machine = SimpleNamespace(
        start=lambda *_: None, poll=lambda: next(statuses), started=time.monotonic(), left_at=time.monotonic()
    )
    watch = SimpleNamespace(look=lambda: None, alive_s=lambda: 0.0, alive_since=None)
    injector = SimpleNamespace(machine=machine, watch=watch, planned=None, due=lambda step: True)
    row, code = Told(tmp_path)._attempt(injector, "preempted", 1, 1, None)  # type: ignore[arg-type]
    assert (row.kind, code) == ("finished", 0)


@pytest.mark.parametrize(
    ("kind", "sound", "kept"), [("kill", True, True), ("kill", False, False), ("sigterm", True, False)]
)
def test_a_later_leg_begins_with_what_the_first_strike_left_if_that_was_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, sound: bool, kept: bool
) -> None:
    """What is saved at a warning may be at fault."""
    legs = Told(tmp_path, (kind, True, None))
    monkeypatch.setattr(legs.tracing, "is_sound", lambda leg: sound)
    legs.run_main(kind)
    assert legs.names("preempted") == ["1", "2"]
    start = legs.start()
    assert (start is not None) == kept
    if start:
        again = legs.run("again", "Preempted again", [], [1], start=start)
        assert [row.number for row in again.rows] == [2]
        assert legs.names("again") == ["1", "2"], "what the first strike left, and its own"
        assert [path.name for path in start.buckets["/checkpoints"].iterdir()] == ["1"], "for other legs"


RANKS = """\
import json, os, subprocess, sys, threading, time
from pathlib import Path

rank, out = int(os.environ["RANK"]), Path(os.environ["OUT"])
out.mkdir(parents=True, exist_ok=True)
NAMES = ("rank-0", "rank-1", "thread", "child")


def put(path, value):
    path.with_suffix(".tmp").write_text(json.dumps(value))
    path.with_suffix(".tmp").replace(path)


steps = [int(folder.name[5:]) for folder in out.glob("step-*") if all((folder / f"{n}.json").exists() for n in NAMES)]
step, weight = 0, 0.0
if steps:
    folder = out / f"step-{max(steps)}"
    step, weight = json.loads((folder / f"rank-{rank}.json").read_text())
    assert all(json.loads((folder / f"{name}.json").read_text()) == step for name in ("thread", "child"))
while step < 30:
    weight, step = 0.9 * weight + rank + step, step + 1
    time.sleep(0.05)
    if step % 5 == 0:
        folder = out / f"step-{step}"
        folder.mkdir(exist_ok=True)
        if rank == 0:
            thread = threading.Thread(target=put, args=(folder / "thread.json", step))
            thread.start()
            thread.join()
        else:
            writes = f"from pathlib import Path; Path('{folder}/child.tmp').write_text('{step}')"
            moves = f"Path('{folder}/child.tmp').replace('{folder}/child.json')"
            subprocess.run([sys.executable, "-c", f"{writes}; {moves}"], check=True)
        put(folder / f"rank-{rank}.json", [step, weight])
(out / f"result-{rank}.json").write_text(json.dumps(weight))
"""


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["rank-0", "rank-1", "thread", "child"])
def test_what_any_rank_thread_or_child_writes_can_be_struck(tmp_path: Path, writer: str) -> None:
    script = tmp_path / "train.py"
    script.write_text(RANKS)
    ranks = "(RANK=0 python ~/train.py & RANK=1 python ~/train.py & wait -n && wait -n)"
    at = f"before the rename of own/step-15/{writer}.tmp to own/step-15/{writer}.json"
    (tmp_path / "task.yaml").write_text(TASK.format(script=script).replace("python ~/train.py", ranks))
    done = rehearse(
        "task.yaml", "--compare", "own/result-*.json", "--mount-like", "local", "--json", "--processes", 1,
        "--kinds", "kill-at-write", "--at", at, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    [_, leg] = json.loads(done.stdout)["legs"]
    assert [row["ended"] for row in leg["rows"]] == [f"killed {at}", "finished"]
    assert leg["rows"][1]["resumed"] in ("step 5", "step 10"), "one rank may be ahead of the other"


@pytest.mark.slow
def test_steps_that_have_not_arrived_in_the_bucket_are_seen_and_struck_in_time(tmp_path: Path) -> None:
    # On s3 the file with the steps arrives at its close: read from the bucket, a strike would come too late or never.
    (tmp_path / "task.yaml").write_text(TASK.format(script=PROGRAMS / "recorded.py"))
    done = rehearse(
        "task.yaml", "--kinds", "kill,sigterm", "--preemptions", 3, "--processes", 1, "--mount-like", "s3", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(done.stdout)["legs"][1]["rows"]
    assert [row["kind"] for row in rows] == ["kill", "sigterm", "kill", "finished"]
    assert rows[0]["last_step"] < 5, "before the first checkpoint"


@pytest.mark.slow(40)
def test_our_own_trainer_resumes_exactly_on_s3(tmp_path: Path) -> None:
    done = rehearse(
        "--set", "max_steps=12", "--set", "save_every=4", "--kinds", "kill", "--preemptions", 1, "--processes", 1,
        "--env", "OMP_NUM_THREADS=1", "--mount-like", "s3", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    [_, leg] = json.loads(done.stdout)["legs"]
    assert [row["kind"] for row in leg["rows"]] == ["kill", "finished"]
    assert leg["verdict"]["text"].startswith("bit-identical: 12 of 12 losses")
