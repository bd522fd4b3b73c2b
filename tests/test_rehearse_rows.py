"""What a rehearsal tells of each attempt, and the causes and remedies beside its verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import faultfs
import pytest
from support_rehearse import rehearse, trains

from skyspot.rehearsal import advice, machine, remedies
from skyspot.rehearsal.bucketfs import manners
from skyspot.rehearsal.bucketfs.manners import MANNERS, REMEDIES
from skyspot.rehearsal.bucketfs.trace import Call
from skyspot.rehearsal.refusals import Refusal, refusals
from skyspot.rehearsal.remedies import Cause
from skyspot.rehearsal.result import Row
from skyspot.rehearsal.verdict import Verdict

needs_fuse = pytest.mark.skipif(
    machine.bucketfs_missing() is not None, reason=str(faultfs.missing() or machine.bucketfs_missing())
)
TASK = "file_mounts: {/checkpoints: {name: bbb, mode: MOUNT}}\nrun: |\n"


def result(run: str, folder: Path, *options: object) -> dict[str, Any]:
    """Rehearse a script whose result is the file `result`; the rehearsal as JSON."""
    (folder / "task.yaml").write_text(TASK + run)
    done = rehearse("task.yaml", "--compare", "result", "--processes", 1, "--json", *options, cwd=folder)
    assert not done.stderr, done.stderr
    return json.loads(done.stdout)


# -- what a mount refused

DOWN = Verdict(False, True, "stays down: it failed.\nexit 1")
SEEK = Refusal(manners.SEEK, "a.pt", "s3", 1)


@pytest.mark.parametrize("what", REMEDIES)
def test_every_refusal_has_its_words_and_its_remedy(what: str) -> None:
    for name, kind in MANNERS.items():
        if what in kind.refuses:
            call = Call(0, 0.0, "open", "own/a", error=kind.refuses[what], refused=what)
            [found] = refusals([call, Call(1, 0.0, "open", "own/b")], name, "/other/")
            assert found.text.startswith(f"a mount like {name} refused an operation ({what}) on /other/own/a: ")
            assert found.cause.finding.remedy == REMEDIES[what]


def test_a_failure_is_put_down_to_a_refusal_before_what_was_read_before_the_strike() -> None:
    seen, struck = Cause("a.pt was half written", remedies.HALF_WRITTEN), Row(1, "torn", "torn")
    refused = advice.after_failure(DOWN, [SEEK], seen, struck)
    assert refused.text == (
        "stays down: it failed. Likely cause: a mount like s3 refused an operation (seek back) on a.pt: Operation not "
        "permitted\nexit 1"
    )
    assert refused.remedy == REMEDIES[manners.SEEK]
    read = advice.after_failure(DOWN, [], seen, struck)
    assert (read.text, read.remedy) == (
        "stays down: it failed. Likely cause: a.pt was half written\nexit 1", remedies.HALF_WRITTEN.remedy
    )  # fmt: skip
    assert advice.after_failure(DOWN, [], None, struck).remedy == remedies.HALF_WRITTEN.remedy
    assert advice.after_failure(DOWN, [], None, Row(1, "kill", "killed")) == DOWN
    assert advice.after_failure(DOWN, [], None, None) == DOWN


def test_a_refusal_that_a_task_survived_is_noted_once_beside_a_verdict_that_is_not_exact() -> None:
    found = advice.with_refusals(DOWN, [SEEK, SEEK])
    assert found.notes == (f"{SEEK.text}. Remedy: {REMEDIES[manners.SEEK]}.",)
    exact = Verdict(True, True, "byte-identical")
    assert advice.with_refusals(exact, [SEEK]) == exact


@needs_fuse
def test_a_refusal_of_the_undisturbed_run_is_its_cause(tmp_path: Path) -> None:
    code = "f = open('/checkpoints/a', 'wb'); f.write(b'aa'); f.flush(); f.seek(0); f.write(b'b'); f.close()"
    found = result(f'  python -c "{code}"\n', tmp_path, "--mount-like", "s3")
    verdict = found["legs"][0]["verdict"]
    assert verdict["text"].startswith(
        "not checked: the task failed without a preemption. Likely cause: a mount like s3 refused an operation (seek "
        "back) on a: Operation not permitted\nexit 1\n  PermissionError: "
    )
    assert verdict["remedy"] == REMEDIES[manners.SEEK]


@needs_fuse
def test_a_refusal_after_a_preemption_is_its_cause(tmp_path: Path) -> None:
    """A log is appended to: the second attempt fails, as the file is in the bucket then."""
    run = f"  set -e\n  echo begun >> /checkpoints/log\n{trains()}  cp /checkpoints/n /checkpoints/result\n"
    found = result(run, tmp_path, "--mount-like", "s3", "--kinds", "kill", "--preemptions", 1)
    verdict = found["legs"][1]["verdict"]
    assert verdict["text"].startswith("stays down: ")
    assert (
        "Likely cause: a mount like s3 refused an operation (append) on log: Operation not permitted\n"
        in (verdict["text"])
    )
    assert verdict["remedy"] == REMEDIES[manners.APPEND]


@needs_fuse
def test_a_refusal_that_was_swallowed_is_noted(tmp_path: Path) -> None:
    run = "  for i in $(seq 9); do sleep 0.1; ln -sf n /checkpoints/latest; done\n  echo > /checkpoints/result\n"
    found = result(run, tmp_path, "--mount-like", "s3", "--kinds", "kill", "--preemptions", 1)
    verdict = found["legs"][1]["verdict"]
    assert verdict["text"].startswith("not checked: the task saves nothing before its end")
    assert verdict["remedy"] == remedies.NEVER_SAVES.remedy
    [note] = [note for note in verdict["notes"] if "refused" in note]
    assert note.startswith("a mount like s3 refused an operation (symbolic link) on latest: Operation not permitted. ")
    assert REMEDIES[manners.SYMLINK] in note
