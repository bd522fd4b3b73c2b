"""skyspot rehearse: machines that are really taken, and verdicts that can be bad."""

import dataclasses
import json
import re
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import faultfs
import psutil
import pytest
from click.testing import CliRunner
from needs import needs_root
from raw_records import by_hand
from support import REPO, clean_env
from support_rehearse import is_exact, leftovers, own, rehearse, trains

from skyspot.cli.comparing import located
from skyspot.cli.report import report
from skyspot.errors import UsageError
from skyspot.migrate.source import task_yaml
from skyspot.rehearsal import faults, machine, remedies, upload, verdict
from skyspot.rehearsal.bucketfs.watcher import events_missing
from skyspot.rehearsal.compare.rules import Comparison, Pattern
from skyspot.rehearsal.engine import _folder
from skyspot.rehearsal.engine import rehearse as rehearse_task
from skyspot.rehearsal.legs import MORE_ATTEMPTS
from skyspot.rehearsal.result import Kind, Leg, Result, Row, Settings, heading
from skyspot.rehearsal.task import read_task
from skyspot.rehearsal.view import View, table
from skyspot.task.options import Options
from trainer.layout.names import RunPaths, list_checkpoints


def test_a_script_that_resumes_right_is_called_exact(tmp_path: Path) -> None:
    if missing := machine.bucketfs_missing():
        pytest.skip(f"rehearsals that see the bucket: {missing}" if faultfs.missing() is None else faultfs.missing())
    done = rehearse(own(tmp_path), "--compare", "own/result.json", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert {one["kind"]: one["outcome"] for one in result["kinds"]} == {
        **dict.fromkeys(("kill", "aws-notice", "sigterm", "kill-in-save"), "exact"),
        "torn": "not tried", "other processes": "not tried",
    }  # fmt: skip
    assert result["kinds"][3]["why"].startswith("killed before the rename of own/state.")
    assert all("byte-identical: 1 of 1 files" in leg["verdict"]["text"] for leg in result["legs"][1:])
    rows = [row for leg in result["legs"][1:] for row in leg["rows"]]
    assert rows[0]["resumed"] == "nothing"
    assert all(re.fullmatch(r"save \d+(, then step \d+)?", row["resumed"]) for row in rows[1:])
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_a_script_that_starts_its_data_from_the_front_is_not(tmp_path: Path) -> None:
    task = own(tmp_path, "forgetful.py")
    done = rehearse(task, "--compare", "own/result.json", "--kinds", "kill", "--preemptions", 2, cwd=tmp_path)
    assert done.returncode == 1
    assert "NOT exact: own/result.json differs" in done.stdout
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_a_machine_that_starts_slower_than_the_undisturbed_one_is_not_taken_before_it_did_anything(
    tmp_path: Path,
) -> None:
    (tmp_path / "task.yaml").write_text(
        "file_mounts: {/checkpoints: {name: bbb, mode: MOUNT}}\n"
        'run: |\n  case "$SKYPILOT_TASK_ID" in *rehearsal-preempted*) sleep 1.5;; esac\n'
        f"  mkdir /checkpoints/life-$(date +%N)\n{trains()}"
        "  ls -d /checkpoints/life-* | wc -l > /checkpoints/result\n"
    )
    done = rehearse("task.yaml", "--kinds", "kill", "--preemptions", 1, "--compare", "result", cwd=tmp_path)
    assert done.returncode == 1
    assert "NOT exact: result differs" in done.stdout


@pytest.mark.slow
def test_without_records_and_without_compare_nothing_is_claimed(tmp_path: Path) -> None:
    done = rehearse(own(tmp_path), "--kinds", "kill", "--preemptions", 1, cwd=tmp_path)
    assert done.returncode == 1
    assert "not checked" in done.stdout
    assert "--compare" in done.stdout
    assert "If the task uses SpotRun, give it $SKYSPOT_CHECKPOINT_DIR" in done.stdout


@pytest.mark.slow
def test_a_glob_that_matches_nothing_is_a_failure(tmp_path: Path) -> None:
    done = rehearse(own(tmp_path), "--kinds", "kill", "--preemptions", 1, "--compare", "*.bin", cwd=tmp_path)
    assert done.returncode == 1
    assert "no file in the bucket matches '*.bin'" in done.stdout


def test_where_there_is_no_namespace_the_paths_are_rewritten_and_it_says_so(tmp_path: Path) -> None:
    done = rehearse(
        own(tmp_path), "--kinds", "kill,sigterm", "--preemptions", 2, "--compare", "own/result.json", "--json",
        cwd=tmp_path, env={"SKYSPOT_REHEARSE_WITHOUT_NAMESPACE": "1"},
    )  # fmt: skip
    assert (done.returncode == 0) == (events_missing() is None), done.stdout + done.stderr
    document = json.loads(done.stdout)
    assert any(
        note.startswith(
            "SKYSPOT_REHEARSE_WITHOUT_NAMESPACE is set, so mount namespaces are off: the task's paths were "
        )
        for note in document["notes"]
    )
    assert not Path("/checkpoints").exists()


@pytest.mark.slow
def test_a_namespace_leaves_the_root_folder_alone(tmp_path: Path) -> None:
    if machine.namespace_command() is None:
        pytest.skip(needs_root("rehearsals in a namespace"))
    root_before = sorted(Path("/").iterdir())
    args = [own(tmp_path), "--kinds", "kill,", "--preemptions", 1, "--compare", "own/result.json"]
    done = rehearse(*args, cwd=tmp_path, env={"TMPDIR": "/nonexist"})
    assert is_exact(done), done.stdout
    assert "no mount namespace" not in done.stdout
    assert sorted(Path("/").iterdir()) == root_before


def test_a_task_that_fails_undisturbed_is_said_with_its_last_lines(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("run: |\n  echo the last word\n  exit 3\n")
    done = rehearse("task.yaml", cwd=tmp_path)
    assert done.returncode == 1
    assert "the task failed without a preemption" in done.stdout
    assert "the last word" in done.stdout


def test_interrupting_a_rehearsal_leaves_nothing_behind(tmp_path: Path) -> None:
    own(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "skyspot", "rehearse", "task.yaml", "--compare", "own/result.json"],
        cwd=tmp_path, env=clean_env(TMPDIR=str(tmp_path)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell that starts the tests in the background has them ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    end = time.monotonic() + 600
    while not list(tmp_path.glob("skyspot-rehearsal-*/*/machine-*.log")):
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130, errors
    assert "Interrupted" in errors
    assert leftovers(tmp_path) == []


@pytest.mark.slow
def test_copies_are_made_anew_for_each_machine_and_a_bucket_survives(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.txt").write_text("as it was")
    (tmp_path / "task.yaml").write_text(
        "name: copies\n"
        "file_mounts:\n  /data: {source: s3://corpus, mode: COPY}\n  /checkpoints: {name: bbb, mode: MOUNT}\n"
        "run: |\n"
        '  [ "$(cat /data/x.txt)" = "as it was" ] || exit 9\n'
        "  echo changed > /data/x.txt\n"
        "  mkdir /checkpoints/life-$(date +%N)\n"
        f"{trains()}"
        "  echo done > /checkpoints/result\n"
    )
    refused = rehearse("task.yaml", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--mount /data=FOLDER" in refused.stderr
    done = rehearse(
        "task.yaml", "--mount", "/data=data", "--kinds", "kill", "--preemptions", 2, "--compare", "result",
        "--keep", "kept", cwd=tmp_path,
    )  # fmt: skip
    assert is_exact(done), done.stdout + done.stderr
    assert len(list((tmp_path / "kept" / "preempted" / "bucket").glob("life-*"))) == 3
    assert (tmp_path / "data" / "x.txt").read_text() == "as it was"


@pytest.mark.slow
def test_setup_runs_on_each_machine_where_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(
        "file_mounts: {/checkpoints: {name: bbb, mode: MOUNT}}\n"
        "setup: mkdir /checkpoints/setup-$(date +%N); touch ~/ready\n"
        f"run: |\n  [ -f ~/ready ] || exit 9\n{trains()}  echo x > /checkpoints/result\n"
    )
    args = ["task.yaml", "--kinds", "kill", "--preemptions", 1, "--compare", "result"]
    assert rehearse(*args, cwd=tmp_path).returncode == 1
    done = rehearse(*args, "--setup", "--keep", "kept", cwd=tmp_path)
    assert is_exact(done), done.stdout
    assert len(list((tmp_path / "kept" / "preempted" / "bucket").glob("setup-*"))) == 2


@pytest.mark.parametrize(
    ("args", "remedy"),
    [
        (["--kinds", "kil"], "kill"),
        (["--processes", "one"], "1,2"),
        (["--mount", "/data"], "DEST=FOLDER"),
        (["--preemptions", "0"], "--preemptions"),
        (["--keep", "."], "not empty"),
        (["--kinds", ""], "name at least one"),
        (["--compare", "/elsewhere/*"], "none of the task's buckets"),
        (["--compare", "../x"], "of files in the bucket"),
        (["--tolerance", "-1", "--compare", "x"], "--tolerance: must be a number from 0"),
        (["--tolerance", "nan", "--compare", "x"], "--tolerance: must be a number from 0"),
        (["--tolerance", "1e-6"], "--compare 'GLOB'"),
        (["--ignore-key", ",", "--compare", "x"], "name at least one key"),
        (["--compare-with", "not-a-program {}"], "command not found"),
        (["--compare-with", "cmp", "--tolerance", "1e-6", "--compare", "x"], "remove --tolerance"),
        (["--compare", ""], "of files in the bucket"),
        (["--compare", "."], "of files in the bucket"),
        (["--compare", "/checkpoints2/x"], "none of the task's buckets"),
        (["--mount", "/checkpoint=."], "Did you mean '/checkpoints'?"),
        (["--secret", "NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE has no value"),
    ],
)
def test_a_mistake_is_said_in_a_line(tmp_path: Path, args: list[str], remedy: str) -> None:
    done = rehearse(own(tmp_path), *args, cwd=tmp_path)
    assert done.returncode == 2
    assert remedy in done.stderr
    assert len(done.stderr.splitlines()) == 1


STRAYS = """\
file_mounts: {/checkpoints: {name: bbb, mode: MOUNT}}
run: |
  env -i setsid sleep 7777.MARK &
  env -i setsid bash -c 'while sleep 0.02; do date +%N > /checkpoints/heart; done' &
TRAINS  echo x > /checkpoints/result
"""


def strays(folder: Path, steps: int = 20) -> str:
    """Write the task; returns what its sleeper sleeps, which no other test's does."""
    mark = f"7777.{secrets.randbelow(10**9)}"
    text = STRAYS.replace("7777.MARK", mark).replace("TRAINS", trains(steps=steps))
    (folder / "task.yaml").write_text(text)
    return mark


def sleeping(mark: str) -> list[int]:
    return [process.pid for process in psutil.process_iter(["cmdline"]) if mark in (process.info["cmdline"] or [])]


def test_nothing_that_ran_on_a_machine_outlives_it(tmp_path: Path) -> None:
    if machine.namespace_command() is None:
        pytest.skip(needs_root("rehearsals in a namespace"))
    mark = strays(tmp_path)
    args = ["task.yaml", "--kinds", "kill", "--preemptions", 1, "--compare", "result", "--keep", "kept"]
    done = rehearse(*args, cwd=tmp_path)
    assert is_exact(done), done.stdout + done.stderr
    assert sleeping(mark) == []
    heart = tmp_path / "kept" / "preempted" / "bucket" / "heart"
    last = heart.read_text()
    time.sleep(0.2)
    assert heart.read_text() == last


@pytest.mark.parametrize("namespace", [True, False])
def test_when_skyspot_is_killed_its_machines_go_with_it(tmp_path: Path, namespace: bool) -> None:
    if namespace and machine.namespace_command() is None:
        pytest.skip(needs_root("rehearsals in a namespace"))
    mark = strays(tmp_path, steps=12000)
    if not namespace:  # There a process that left the task's group is beyond reach.
        task = tmp_path / "task.yaml"
        task.write_text(task.read_text().replace("env -i setsid ", ""))
    without = {} if namespace else {"SKYSPOT_REHEARSE_WITHOUT_NAMESPACE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "skyspot", "rehearse", "task.yaml", "--compare", "result"],
        cwd=tmp_path, env=clean_env(TMPDIR=str(tmp_path), **without),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + 600
    while not list(tmp_path.glob("skyspot-rehearsal-*/*/bucket/heart")):
        assert time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    process.wait()
    end = time.monotonic() + 30
    while sleeping(mark):
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("namespace", [True, False])
def test_what_the_script_leaves_behind_at_sigterm_has_time_to_save_as_under_skypilot(
    tmp_path: Path, namespace: bool
) -> None:
    """The shell is gone at once at SIGTERM; the program that it waited for is not."""
    if namespace and machine.namespace_command() is None:
        pytest.skip(needs_root("rehearsals in a namespace"))
    (tmp_path / "task.yaml").write_text(
        "file_mounts: {/checkpoints: {name: bbb, mode: MOUNT}}\n"
        "run: |\n"
        "  [ $$ != 1 ] || exit 9\n"
        "  cat > ~/child.sh <<'END'\n"
        "  trap 'trap \"\" TERM; sleep 0.5; echo heard > /checkpoints/child; exit' TERM\n"
        "  until [ -e /checkpoints/result ]; do sleep 0.05; done\n"
        "  END\n"
        "  bash ~/child.sh &\n"
        f"{trains()}"
        "  echo x > /checkpoints/result\n"
        "  wait\n"
    )
    args = ["task.yaml", "--kinds", "sigterm", "--preemptions", 1, "--compare", "result", "--keep", "kept"]
    done = rehearse(*args, cwd=tmp_path, env={} if namespace else {"SKYSPOT_REHEARSE_WITHOUT_NAMESPACE": "1"})
    assert is_exact(done, namespace=namespace), done.stdout
    assert "SIGTERM" in done.stdout, done.stdout
    assert (tmp_path / "kept" / "preempted" / "bucket" / "child").read_text() == "heard\n"
    assert not (tmp_path / "kept" / "reference" / "bucket" / "child").exists()


@pytest.mark.slow
@pytest.mark.parametrize("namespace", [True, False])
def test_what_the_script_leaves_behind_goes_with_the_machine_when_it_does_not_hear(
    tmp_path: Path, namespace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if namespace and machine.namespace_command() is None:
        pytest.skip(needs_root("rehearsals in a namespace"))
    if not namespace:
        monkeypatch.setattr(machine, "namespace_command", lambda: None)
    monkeypatch.setattr(machine, "LEAVE_S", 3.0)
    mark = f"600.{secrets.randbelow(10**9)}"
    run = f"(trap '' TERM; touch ready; exec setsid sleep {mark}) &\nuntil [ -e ready ]; do sleep 0.02; done\nexit 7\n"
    taken = machine.Machine(read_task("run: unused\n", tmp_path, {}, None), tmp_path / "r/leg/m", {}, {})
    taken.start(run)
    while (code := taken.poll()) is None:
        time.sleep(0.02)
    assert code == 7
    assert time.monotonic() - taken.started >= 3, "it was not deaf"
    taken.take()
    assert not sleeping(mark)


@pytest.mark.slow  # It waits for what is left behind, twice.
def test_a_script_that_has_left_is_not_struck_while_what_it_left_behind_leaves(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(
        "file_mounts: {/checkpoints: {name: bbb, mode: MOUNT}}\n"
        "run: |\n"
        "  [ ! -e /checkpoints/result ] || echo > /checkpoints/undisturbed\n"
        "  (trap '' TERM; exec sleep 4) &\n"
        f"{trains()}"
        "  echo x > /checkpoints/result\n"
    )
    args = ["task.yaml", "--kinds", "kill", "--preemptions", 1, "--compare", "result", "--keep", "kept"]
    done = rehearse(*args, cwd=tmp_path)
    assert is_exact(done), done.stdout + done.stderr
    assert not (tmp_path / "kept" / "preempted" / "bucket" / "undisturbed").exists(), "it was over when it was struck"


def test_a_machine_that_has_hardly_begun_is_taken_at_once(tmp_path: Path) -> None:
    task = read_task("run: sleep 600\n", tmp_path, {}, None)
    taken = machine.Machine(task, tmp_path / "rehearsal" / "leg" / "machine", {}, {})
    taken.start(task.run)
    started = time.monotonic()
    taken.take()
    assert time.monotonic() - started < 8


@pytest.mark.slow
def test_a_written_task_is_rehearsed_from_the_folder_that_it_was_written_in(tmp_path: Path) -> None:
    own(tmp_path)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "go.sh").write_text(f"{trains()}cp ~/sky_workdir/go.sh /checkpoints/result\n")
    (tmp_path / "code" / "gone").symlink_to("nowhere")
    (tmp_path / ".skyspot").mkdir()
    text = "name: w\nworkdir: code\nfile_mounts: {/checkpoints: {name: bbb, mode: MOUNT}}\nrun: bash go.sh\n"
    (tmp_path / ".skyspot" / "w.yaml").write_text(text)
    args = [".skyspot/w.yaml", "--kinds", "kill", "--preemptions", 1, "--compare", "/checkpoints/result"]
    done = rehearse(*args, cwd=tmp_path)
    assert is_exact(done), done.stdout + done.stderr


@pytest.mark.slow
def test_a_working_folder_that_holds_what_is_kept_does_not_copy_itself(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("not uploaded")
    (tmp_path / ".skyignore").write_text("# comment\nsecret.*\n")
    (tmp_path / "task.yaml").write_text(
        "workdir: .\nfile_mounts: {/checkpoints: {name: bbb, mode: MOUNT}, /etc/mine.conf: task.yaml}\n"
        "run: |\n  ls ~/sky_workdir > /checkpoints/listed\n  grep -q workdir /etc/mine.conf || exit 9\n"
        f"{trains()}"
    )
    args = ["task.yaml", "--kinds", "kill", "--preemptions", 1, "--compare", "listed", "--keep", "kept"]
    done = rehearse(*args, cwd=tmp_path)
    assert is_exact(done), done.stdout + done.stderr
    assert (tmp_path / "kept" / "preempted" / "bucket" / "listed").read_text() == "task.yaml\n"


def test_nothing_real_is_written_to_where_a_mount_point_is_there_or_a_link(tmp_path: Path) -> None:
    if machine.namespace_command() is None:
        pytest.skip(needs_root("rehearsals in a namespace"))
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "there.conf").write_text("the user's own")
    (tmp_path / "mine.conf").write_text("the task's\n")
    (tmp_path / "task.yaml").write_text(
        "file_mounts:\n"
        "  /checkpoints: {name: bbb, mode: MOUNT}\n"
        f"  {tmp_path}/etc/there.conf: mine.conf\n"
        f"run: |\n{trains()}  cat {tmp_path}/etc/there.conf > /checkpoints/result\n"
    )
    args = ["task.yaml", "--kinds", "kill", "--preemptions", 1, "--compare", "result", "--keep", "kept"]
    done = rehearse(*args, cwd=tmp_path)
    assert is_exact(done), done.stdout + done.stderr
    assert (tmp_path / "kept" / "preempted" / "bucket" / "result").read_text() == "the task's\n"
    assert (tmp_path / "etc" / "there.conf").read_text() == "the user's own"
    # A link to an absolute place would lead from the new root into the real one.
    (tmp_path / "link").symlink_to(tmp_path / "etc")
    binds = {f"{tmp_path}/link/new.conf": tmp_path / "mine.conf"}
    built = machine._namespace_script(Path("/the/root"), binds, (), frozenset())
    assert f": > /the/root{tmp_path}/etc/new.conf; }}\n" in built
    assert f"{tmp_path}/link/new.conf" not in built


def test_a_folder_is_copied_without_what_skypilot_leaves_out(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("build/x", "src/build/x", "src/a.tmp", "src/keep", "kept/deep/x"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("")
    (source / "gone").symlink_to("nowhere")

    def copied(target: str, **options: bool) -> list[str]:
        upload.copy_folder(source, tmp_path / target, source / "kept", **{"uploaded": True, **options})
        files = [path for path in (tmp_path / target).rglob("*") if path.is_file() or path.is_symlink()]
        return sorted(path.relative_to(tmp_path / target).as_posix() for path in files if ".git/" not in str(path))

    subprocess.run(["git", "init", "-q", source], check=True)
    (source / ".gitignore").write_text("build\n")
    assert copied("1") == [".gitignore", "gone", "src/a.tmp", "src/keep"]
    (source / ".skyignore").write_text("# what stays here\n/build/\n*.tmp\n")
    assert copied("2") == [".gitignore", ".skyignore", "gone", "src/build/x", "src/keep"]
    everything = [".gitignore", ".skyignore", "build/x", "gone", "src/a.tmp", "src/build/x", "src/keep"]
    assert copied("3", uploaded=False) == everything


@pytest.mark.slow
def test_a_stand_in_that_git_ignores_and_that_holds_what_is_kept_is_put_there_whole(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("data\n")
    (tmp_path / ".gitignore").write_text("x\n")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "task.yaml").write_text(
        "file_mounts: {/data: {source: s3://xxx, mode: COPY}, /more: {source: s3://yyy, mode: MOUNT}}\n"
        "envs: {SKYSPOT_CHECKPOINT_DIR: /skyspot-run}\n"
        f"run: |\n  mkdir -p /skyspot-run\n{trains('/skyspot-run')}"
        "  cat /data/x /more/x > /skyspot-run/result\n"
    )
    args = ["task.yaml", "--mount", "/data=.", "--mount", "/more=.", "--kinds", "kill", "--preemptions", 1]
    done = rehearse(*args, "--compare", "result", "--keep", "kept", cwd=tmp_path)
    assert is_exact(done), done.stdout + done.stderr
    assert (tmp_path / "kept" / "preempted" / "bucket" / "result").read_text() == "data\n" * 2
    assert not Path("/skyspot-run").exists()


@pytest.mark.parametrize(
    ("envs", "mounts", "bucket"),
    [
        ({}, {"/ds": {"source": "s3://data"}, "/out": {"name": "mine"}}, "/out"),
        ({}, {"/ds": {"source": "s3://data"}, "/other": {"source": "s3://other"}}, "/ds"),
        ({}, {"/out": {"name": "mine"}, "/checkpoints": {"source": "s3://mine"}}, "/checkpoints"),
        ({"SKYSPOT_CHECKPOINT_DIR": "/out/a/r"}, {"/checkpoints": {"name": "x"}, "/out": {"name": "y"}}, "/out"),
        ({"SKYSPOT_CHECKPOINT_DIR": "/out/a/r"}, {"/out": {"name": "y"}, "/out/a": {"name": "x"}}, "/out/a"),
        ({"SKYSPOT_CHECKPOINT_DIR": "/checkpoints2/r"}, {"/checkpoints": {"name": "x"}}, "/checkpoints2"),
    ],
)  # fmt: skip
def test_of_several_buckets_the_runs_is_chosen(tmp_path: Path, envs: dict, mounts: dict, bucket: str) -> None:
    for source in mounts.values():
        source["mode"] = "MOUNT"
    found = read_task(json.dumps({"envs": envs, "file_mounts": mounts, "run": "x"}), tmp_path, {}, None)
    assert found.bucket
    assert found.bucket.path == bucket
    # A comparison elsewhere does not move the watch away from where the task says that its records are.
    other = next(mount for mount in found.lasting if mount.path != bucket) if len(found.lasting) > 1 else None
    if envs and other:
        chosen, comparison = located(found, Comparison((Pattern(f"{other.path}/r/*"),)))
        assert (chosen.bucket, chosen.lasting_at(comparison.patterns[0].mount)) == (found.bucket, other)
        assert comparison.patterns[0].glob == "r/*"
        assert chosen.notes == found.notes
    elif other:
        assert bucket in located(found, Comparison())[0].notes[-1]


@pytest.mark.slow  # Three rehearsals.
def test_a_bucket_of_data_is_not_taken_for_the_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(
        "file_mounts:\n"
        "  /ds: {source: s3://data, mode: MOUNT_CACHED}\n"
        "  /ro: {source: s3://more, mode: MOUNT, config: {mount: {read_only: true}}}\n"
        "  ~/out: {name: ooo, mode: MOUNT}\n"
        "  /checkpoints: {name: bbb, mode: MOUNT}\n"
        f"run: |\n  touch /ro/x && exit 9\n{trains()}"
        "  echo x > /checkpoints/r\n  echo y | tee /ds/r > ~/out/h\n"
    )
    (tmp_path / "more").mkdir()
    args = ["task.yaml", "--mount", "/ro=more", "--kinds", "kill", "--preemptions", 1]
    done = rehearse(*args, "--compare", "r", "--keep", "one", cwd=tmp_path)
    assert is_exact(done), done.stdout + done.stderr
    assert "/ds starts empty" in done.stdout
    assert "--compare looks in /checkpoints" in done.stdout
    for pattern in ("/ds/r", "~/out/h"):
        done = rehearse(*args, "--compare", pattern, cwd=tmp_path)
        assert is_exact(done), done.stdout + done.stderr
    assert not (tmp_path / "more" / "x").exists()


@pytest.mark.slow
def test_a_folder_below_tmp_may_hold_the_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(
        f"envs: {{SKYSPOT_CHECKPOINT_DIR: {tmp_path}/r}}\n"
        'run: |\n  mkdir -p "$SKYSPOT_CHECKPOINT_DIR"\n'
        f"{trains('$SKYSPOT_CHECKPOINT_DIR')}"
        '  echo x > "$SKYSPOT_CHECKPOINT_DIR/result"\n'
    )
    done = rehearse("task.yaml", "--kinds", "kill", "--preemptions", 1, "--compare", "r/result", cwd=tmp_path)
    assert is_exact(done), done.stdout + done.stderr
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_a_secret_is_taken_from_this_environment_or_said_to_be_missing(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(
        "secrets: {IN_YAML: null, GONE: null}\nfile_mounts: {/checkpoints: {name: bbb, mode: MOUNT}}\n"
        f"run: |\n{trains()}"
        '  echo "$BARE $IN_YAML ${GONE-none}" > /checkpoints/result\n'
    )
    args = ["task.yaml", "--secret", "BARE", "--kinds", "kill", "--preemptions", 1, "--compare", "result"]
    done = rehearse(*args, "--keep", "kept", cwd=tmp_path, env={"BARE": "one", "IN_YAML": "two"})
    assert is_exact(done), done.stdout + done.stderr
    assert (tmp_path / "kept" / "preempted" / "bucket" / "result").read_text() == "one two none\n"
    assert "secret GONE is not set in this environment" in done.stdout
    assert "IN_YAML" not in done.stdout


def test_a_folder_that_cannot_be_kept_in_is_said_in_a_line(tmp_path: Path) -> None:
    done = rehearse(own(tmp_path), "--keep", "/proc/kept", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: --keep /proc/kept: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_python_that_cannot_train_is_said_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib import metadata\nreal = metadata.version\n\n\n"
        "def version(name):\n    if name == 'torch':\n        raise metadata.PackageNotFoundError(name)\n"
        "    return real(name)\n\n\nmetadata.version = version\n"
    )
    env = {"PYTHONPATH": f"{tmp_path}:{REPO}"}
    for task in (["finetune"], ["render", "-n", "run-001", "-o", "."], [".skyspot/run-001.yaml"]):
        if task[0] == "render":
            subprocess.run([sys.executable, "-m", "skyspot", *task], cwd=tmp_path, env=clean_env(), check=True)
            continue
        done = rehearse(*task, cwd=tmp_path, env=env)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "torch: not installed" in done.stderr
        assert Path(done.stderr.partition(f"{sys.executable} -m pip install -r ")[2].strip()).is_file()
        assert len(done.stderr.splitlines()) <= 2


def test_signals_do_again_what_they_did_when_the_rehearsals_folder_is_gone() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with _folder(None) as folder:
        (folder / "x").touch()
    assert not folder.exists()
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_column_without_a_value_is_not_shown() -> None:
    rows = [Row(1, "kill", "killed"), Row(2, "finished", "finished", first_step_s=1.5)]
    assert [column.header for column in table(rows).columns] == ["", "how it ended", "startup"]


@pytest.mark.slow
def test_leaving_with_0_at_sigterm_is_told_as_what_skypilot_makes_of_it(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(
        "file_mounts: {/checkpoints: {name: bbb, mode: MOUNT}}\n"
        "run: |\n  trap 'exit 0' TERM\n  echo > /checkpoints/began\n"
        "  for i in $(seq 20); do sleep 0.05; done\n  echo x > /checkpoints/result\n"
    )
    done = rehearse("task.yaml", "--kinds", "sigterm", "--preemptions", 1, "--compare", "result", cwd=tmp_path)
    assert done.returncode == 1
    said = " ".join(done.stdout.split())
    missing = "result is missing after the preempted run. Likely cause: attempt 1 exited with 0 at SIGTERM"
    assert f"{missing}, so that SkyPilot would mark this SUCCEEDED" in said
    assert f" remedy: {remedies.EXITED_WITH_0.remedy}" in said


@pytest.mark.parametrize("text", ["file_mounts: [a]\nrun: x\n", "envs: [a]\nrun: x\n", "resources: x\nrun: x\n"])
def test_a_section_of_another_kind_is_refused_in_a_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "task.yaml").write_text(text)
    done = rehearse("task.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_a_run_that_hardly_learns_is_no_proof() -> None:
    lines = {1: {"step": 1, "loss": 5.0}, 2: {"step": 2, "loss": 4.5}}
    flat = verdict.History(lines, {}, {}, model="tiny")
    assert "less than 20 %" in str(verdict.no_proof(flat))
    assert verdict.no_proof(dataclasses.replace(flat, model="/my/model")) is None
    steep = dataclasses.replace(flat, lines={**lines, 2: {"step": 2, "loss": 3.0}})
    assert verdict.no_proof(steep) is None
    assert "no dropout" in str(verdict.no_proof(dataclasses.replace(steep, dropout=False)))
    nowhere = dataclasses.replace(flat, lines={**lines, 2: {"step": 2, "loss": float("nan")}})
    assert "less than 20 %" in str(verdict.no_proof(nowhere))
    other = dataclasses.replace(history(), model="/my/model", dropout=False)
    assert "no dropout" in " ".join(verdict.compare(other, other).notes)


def test_whether_the_exported_model_has_dropout_is_read_from_its_config(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    assert verdict._dropout(paths), "a program of the user's does not say"
    paths.final.mkdir()
    for rate, on in ((0.1, True), (0.0, False)):
        (paths.final / "config.json").write_text(json.dumps({"attention_dropout": rate, "hidden_size": 8}))
        assert verdict._dropout(paths) is on


# -- the default: our trainer ----------------------------------------------------------------------------------------


@pytest.mark.slow(180)
def test_the_default_task_resumes_exactly_under_every_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And README's demo shows what it prints; the report at its end, also as a page, is what its raw files say."""
    # Beside other tests, several threads would wait for each other.
    done = rehearse("--env", "OMP_NUM_THREADS=1", "--keep", "kept", "--json", "--prices", "9.83,32.77",
                    "--html", "page.html", cwd=tmp_path)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "Page: page.html\n"), done.stdout + done.stderr
    document = json.loads(done.stdout)
    assert document["exact"] is True
    _, main, moved = document["legs"]
    assert main["verdict"]["text"] == "bit-identical: 60 of 60 losses, 48 of 48 weights"
    assert sorted(row["kind"] for row in main["rows"] if row["hit"]) == sorted([*faults.DEFAULT_KINDS, "finished"])
    assert "same samples and same LR in 60 of 60 steps" in moved["verdict"]["text"]
    rows = {row["kind"]: row for row in main["rows"] if row["hit"]}
    assert rows["sigterm"]["lost_steps"] == rows["aws-notice"]["lost_steps"] == 0
    assert rows["sigterm"]["committed_s"] is not None
    assert rows["torn"]["lost_steps"] > 0
    assert rows["kill"]["left_step"] == 20, "after the first checkpoint, so that it proves something"
    assert all(kind["outcome"] == "exact" for kind in document["kinds"])
    assert any("49%" in note or "loss fell" in note for note in document["notes"])
    histories = [
        verdict.read_history(RunPaths(tmp_path / "kept" / leg / "bucket" / "rehearsal"))
        for leg in ("reference", "preempted")
    ]
    assert histories[0]
    assert histories[1]
    assert histories[0].lines[60]["loss"] < 0.8 * histories[0].lines[1]["loss"]
    run = tmp_path / "kept" / "preempted" / "bucket" / "rehearsal"
    reported = CliRunner().invoke(report, [str(run), "--json", "--prices", "9.83,32.77"], catch_exceptions=False)
    figures = by_hand(run, spot=9.83, on_demand=32.77)
    figures.compare(reported.output)
    ending = document["report"]
    figures.compare(json.dumps(ending))
    page = (tmp_path / "page.html").read_text()
    for text in (f"USD {ending['spend']['usd']:.2f}", f"{ending['goodput']:.1%}", f"{figures.lost_steps} of "):
        assert text in page
    for leg in document["legs"]:
        assert all(row["first_step_s"] > 0 for row in leg["rows"]), leg  # What a start may cost: test_trainer.py.
    printed = as_printed(document, capsys)
    before, *demo = README_DEMO.splitlines()
    assert before in task_yaml(Options(name="demo")).notes
    for line in normal("\n".join(demo)):
        assert line in printed, f"README's demo says {line!r}, and a rehearsal prints\n" + "\n".join(printed)


README_DEMO = (REPO / "README.md").read_text().partition("<!-- demo -->\n```\n")[2].partition("\n```\n")[0]


def as_printed(document: dict, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What a person would have seen of a rehearsal, without the numbers."""
    legs = [
        Leg(**{**leg, "rows": [Row(**row) for row in leg["rows"] if row["hit"]],
               "verdict": leg["verdict"] and verdict.Verdict(**leg["verdict"])})
        for leg in ({key: value for key, value in leg.items() if key != "preempted"} for leg in document["legs"])
    ]  # fmt: skip
    kinds = [Kind(**{key: value for key, value in kind.items() if key != "number"}) for kind in document["kinds"]]
    capsys.readouterr()
    with View() as view:
        for leg in legs:
            view.leg(heading(leg.title, leg.preempted))
            view.leg_done(leg)
        view.result(Result(legs, document["notes"], document["seconds"], kinds=kinds))
    return normal(capsys.readouterr().out)


def normal(text: str) -> list[str]:
    """Lines without their numbers, and without how far apart their words are."""
    return [" ".join(re.sub(r"\d+(\.\d+)?", "N", line).replace("N-N", "N").split()) for line in text.splitlines()]


# -- verdicts that have to be bad ------------------------------------------------------------------------------------


def history(**changes: object) -> verdict.History:
    lines = {
        step: {"step": step, "loss": 5.0 / step, "lr": 0.1, "order": f"o{step}", "rng": f"r{step}", "grad_norm": 1.0,
               "world_size": 1}
        for step in range(1, 11)
    }  # fmt: skip
    for key, value in changes.items():
        if key in lines[1]:
            for step in range(6, 11):
                lines[step][key] = value
    weights = {"a": b"1", "b": b"2"}
    return verdict.History(lines, {**weights, **dict(changes.get("weights", {}))}, {"threads": 2})  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("changes", "cause", "step"),
    [
        ({"order": "x", "loss": 9.0}, "order", 6),
        ({"lr": 0.5, "loss": 9.0}, "lr", 6),
        ({"rng": "x", "loss": 9.0}, "rng", 6),
        ({"loss": 9.0}, "weights", 6),
        ({"weights": {"b": b"3"}}, "weights", None),
    ],
)
def test_the_verdict_names_the_step_and_the_likely_cause(changes: dict, cause: str, step: int | None) -> None:
    found = verdict.compare(history(), history(**changes))
    assert not found.exact
    assert found.checked
    assert (found.cause, found.first_step) == (cause, step)


def test_the_same_history_is_exact_and_a_missing_step_is_not() -> None:
    assert verdict.compare(history(), history()).exact
    short = history()
    del short.lines[10]
    assert verdict.compare(history(), short).cause == "steps"
    assert not verdict.compare(verdict.History({}, {}, {}), verdict.History({}, {}, {})).exact


def test_across_world_sizes_samples_and_lr_are_judged_bit_by_bit_and_losses_by_tolerance() -> None:
    near = history(world_size=2)
    near.lines[7]["loss"] *= 1 + 1e-7
    assert verdict.compare_across_world_sizes(history(), near).exact
    assert verdict.compare_across_world_sizes(history(), history(world_size=2, order="x")).cause == "order"
    assert verdict.compare_across_world_sizes(history(), history(world_size=2, lr=0.3)).cause == "lr"
    far = history(world_size=2)
    far.lines[7]["loss"] *= 1.001
    assert not verdict.compare_across_world_sizes(history(), far).exact
    loop_of_ones_own = history(), history(world_size=2)
    for line in (line for one in loop_of_ones_own for line in one.lines.values()):
        del line["order"]
    assert "samples not recorded, same LR in" in verdict.compare_across_world_sizes(*loop_of_ones_own).text


def test_a_schedule_strikes_before_the_first_checkpoint_and_soon_after_a_resume() -> None:
    for seed in range(20):
        plan = faults.schedule(list(faults.DEFAULT_KINDS), 6, seed, steps=60, first_save=20)
        assert [strike.kind for strike in plan] == [*faults.DEFAULT_KINDS, "kill"]
        assert 1 <= (plan[0].at_step or 0) < 20
        assert any(1 <= (strike.after_resume or 0) <= 3 for strike in plan)
    assert faults.schedule(["kill"], 3, 1, steps=60, first_save=20) == faults.schedule(
        ["kill"], 3, 1, steps=60, first_save=20
    )


def test_a_torn_checkpoint_is_the_newest_committed_one(tmp_path: Path) -> None:
    from support import mlp

    assert mlp(tmp_path / "run", "--steps", 8).code == 0
    paths = RunPaths(tmp_path / "run")
    torn = faults.tear(tmp_path, "run")
    assert torn
    assert str(list_checkpoints(paths)[0]) in torn


def test_several_nodes_are_rehearsed_as_one_and_said(tmp_path: Path) -> None:
    found = read_task("num_nodes: 4\nrun: x\n", tmp_path, {}, None)
    assert found.notes == ("The task's 4 nodes are rehearsed as one.",)
    with pytest.raises(UsageError, match="no `run`"):
        read_task("name: x\n", tmp_path, {}, None)


def test_file_mounts_take_the_tasks_variables_and_local_folders_become_buckets(tmp_path: Path) -> None:
    (tmp_path / "seed").mkdir()
    text = (
        "envs: {WHERE: /ckpt}\nsecrets: {TOKEN: x, LATER: null}\n"
        "file_mounts:\n  $WHERE: {source: ./seed, mode: MOUNT}\n  ${WHERE}2: {name: bbb, mode: MOUNT_CACHED}\nrun: x\n"
    )
    found = read_task(text, tmp_path, {}, None)
    assert [(mount.path, mount.survives) for mount in found.mounts] == [("/ckpt", True), ("/ckpt2", True)]
    assert found.mounts[0].folder == tmp_path / "seed"
    assert found.envs == {"WHERE": "/ckpt", "TOKEN": "x"}


@pytest.mark.slow(40)
def test_our_own_trainer_resumes_exactly_under_rewritten_paths(tmp_path: Path) -> None:
    """In a namespace: the default task, above."""
    done = rehearse(
        "--set", "max_steps=12", "--set", "save_every=4", "--kinds", "kill", "--preemptions", 1, "--processes", "1",
        "--env", "OMP_NUM_THREADS=1", "--json", cwd=tmp_path, env={"SKYSPOT_REHEARSE_WITHOUT_NAMESPACE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["legs"][1]["verdict"]["text"].startswith("bit-identical: 12 of 12 losses")


def test_a_workdir_is_filled_in_from_the_tasks_envs(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    found = read_task("envs: {WHERE: here}\nworkdir: ./${WHERE}\nrun: x\n", tmp_path, {}, None)
    assert found.workdir == tmp_path / "here"


@pytest.mark.parametrize(
    ("first", "last", "said"),
    [
        (5.0, 2.5, "the loss fell from 5.000 to 2.500 (50%)"),
        (0.5, 0.6, "the loss rose from 0.500 to 0.600 (20%)"),
        (0.0, 0.0, "the loss went from 0.000 to 0.000"),
        (0.0, -3.0, "the loss went from 0.000 to -3.000"),
        (-1.0, -2.0, "the loss went from -1.000 to -2.000"),
    ],
)
def test_a_loss_that_begins_at_0_is_said_and_ends_no_rehearsal(first: float, last: float, said: str) -> None:
    found = dataclasses.replace(history(), lines={1: {"step": 1, "loss": first}, 2: {"step": 2, "loss": last}})
    assert verdict.fall(found) == said
    assert verdict.compare(found, found).exact
    trial = dataclasses.replace(found, model="tiny")
    assert ("less than 20 %" in str(verdict.no_proof(trial))) == (first <= last)


def test_attempts_that_run_out_give_a_reason(tmp_path: Path) -> None:
    task = read_task("resources: {job_recovery: {recover_on_exit_codes: [75]}}\nrun: exit 75\n", tmp_path, {}, None)
    with View(quiet=True) as view:
        result = rehearse_task(task, Settings(preemptions=1), view)
    assert result.legs[0].verdict
    said = result.legs[0].verdict.text
    assert f"{MORE_ATTEMPTS} attempts did not finish it. The last one: exit 75" in said
    assert "last lines" not in said, "it printed none"
