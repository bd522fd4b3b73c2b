"""`skyspot checkpoints`: on real run folders, whole and with every damage planted, local and in a real S3 server."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import clean_env

from skyspot.errors import SkyspotError, UsageError
from skyspot.runs import checkpoints, find
from skyspot.runs.verification import verify
from trainer.bucket.hashing import hash_bytes
from trainer.layout.documents import to_json
from trainer.layout.manifest import FileRecord, Manifest, read_manifest
from trainer.layout.names import MANIFEST, RunPaths, list_attempts, list_checkpoints

SHARE = "share-00000.safetensors"


def skyspot(*args: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, with this process' credentials for a bucket."""
    keys = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    command = [sys.executable, "-m", "skyspot", "checkpoints", *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**clean_env(), **keys, **env}, timeout=60
    )


def verified(run: object, code: int = 0, **env: str) -> dict[str, dict[str, object]]:
    """What `verify --json` says, by checkpoint."""
    done = skyspot("verify", run, "--json", **env)
    assert (done.returncode, done.stderr) == (code, ""), done.stdout
    return {one["checkpoint"]: one for one in json.loads(done.stdout)}


def newest(run_dir: Path) -> Path:
    paths = RunPaths(run_dir)
    return paths.checkpoint(list_checkpoints(paths)[0])


def oldest(run_dir: Path) -> Path:
    paths = RunPaths(run_dir)
    return paths.checkpoint(list_checkpoints(paths)[-1])


def forget(run_dir: Path) -> None:
    """Leave no record of a save: the machine was taken before it could be written."""
    for record in run_dir.glob("attempts/*/*-saved.json"):
        record.unlink()


def record(run_dir: Path, number: int = 90, **fields: object) -> None:
    paths = RunPaths(run_dir)
    paths.event(list_attempts(paths)[0], number, "saved").write_bytes(to_json(fields))


def export(run_dir: Path, weights: bytes = b"the model") -> Path:
    """A `final/` as the trainer leaves it."""
    final = run_dir / "final"
    final.mkdir()
    (final / "model.safetensors").write_bytes(weights)
    files = {"model.safetensors": FileRecord(len(weights), hash_bytes(weights))}
    (final / MANIFEST).write_bytes(Manifest("final", files, {"step": 12, "max_steps": 12}).to_json())
    return final


def edit(folder: Path, **changes: object) -> None:
    document = json.loads((folder / MANIFEST).read_bytes())
    document.pop("seal", None)
    (folder / MANIFEST).write_bytes(to_json({**document, **changes}))


def list_file(folder: Path, name: str, size: int, digest: str = "0" * 32) -> None:
    files = json.loads((folder / MANIFEST).read_bytes())["files"]
    edit(folder, files={**files, name: {"bytes": size, "hash": digest}})


# -- damage ------------------------------------------------------------------------------------------------------------


def flipped_bit(folder: Path) -> None:
    data = bytearray((folder / SHARE).read_bytes())
    data[-100] ^= 1
    (folder / SHARE).write_bytes(data)


def truncated(folder: Path) -> None:
    os.truncate(folder / SHARE, 12)


def missing(folder: Path) -> None:
    (folder / SHARE).unlink()


def torn_manifest(folder: Path) -> None:
    os.truncate(folder / MANIFEST, (folder / MANIFEST).stat().st_size // 2)


def no_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def newer_layout(folder: Path) -> None:
    edit(folder, layout_version=99)


def file_outside(folder: Path) -> None:
    list_file(folder, "../../run.json", 55)


def no_state(folder: Path) -> None:
    edit(folder, files={SHARE: json.loads((folder / MANIFEST).read_bytes())["files"][SHARE]})


def manifest_of_another(folder: Path) -> None:
    shutil.copy(oldest(folder.parent.parent) / MANIFEST, folder / MANIFEST)


def folder_of_another(folder: Path) -> None:
    """Whole, hash by hash, and a resume passes it by."""
    shutil.rmtree(folder)
    shutil.copytree(oldest(folder.parent.parent), folder)


def a_pipe(folder: Path) -> None:
    missing(folder)
    os.mkfifo(folder / SHARE)
    list_file(folder, SHARE, 0)


def a_loop(folder: Path) -> None:
    missing(folder)
    (folder / SHARE).symlink_to(SHARE)


def unreadable(folder: Path) -> None:
    """A file that exists and gives EIO."""
    missing(folder)
    (folder / SHARE).symlink_to("/proc/self/mem")
    list_file(folder, SHARE, 0)


NOT_COMMITTED = "not committed: it has no MANIFEST.json"


@pytest.mark.parametrize(
    ("damage", "listed", "said", "whole"),
    [
        (flipped_bit, "sizes agree", f"{SHARE} does not match the hash in its manifest", False),
        (truncated, f"{SHARE} has 12 bytes, its manifest says ", f"{SHARE} has 12 bytes, its manifest says ", False),
        (missing, f"{SHARE}: No such file or directory", f"{SHARE} is missing", False),
        (torn_manifest, "not readable as JSON", "its attempt recorded this checkpoint as committed", False),
        (no_manifest, "MANIFEST.json is missing; its attempt", "recorded this checkpoint as committed", False),
        (newer_layout, "layout version 99; this release reads up to 1. Upgrade", "Upgrade skyspot", None),
        (file_outside, "it lists a file outside its folder", "it lists a file outside its folder", False),
        (no_state, "its manifest lists no state.json", "its manifest lists no state.json", False),
        (
            manifest_of_another,
            "its manifest is another checkpoint's",
            "its manifest is another checkpoint's",
            False,
        ),
        (
            folder_of_another,
            "its manifest is another checkpoint's",
            "its manifest is another checkpoint's",
            False,
        ),
        (a_pipe, "sizes agree", f"{SHARE} is not a file", False),
        (a_loop, f"{SHARE}: Too many levels of symbolic links", f"{SHARE} is missing", False),
        (unreadable, "sizes agree", f"{SHARE} cannot be read: Input/output error", None),
    ],
    ids=lambda value: getattr(value, "__name__", " "),
)
def test_a_damaged_checkpoint_is_listed_as_it_is_and_fails_to_verify(
    run_dir: Path, damage, listed: str, said: str, whole: bool | None
) -> None:
    record(run_dir, checkpoint=newest(run_dir).name, time=time.time())
    damage(newest(run_dir))
    done = skyspot("list", run_dir)
    assert (done.returncode, done.stderr) == (0, "")
    assert listed in done.stdout.splitlines()[1]
    found = verified(run_dir, code=1)
    one = found[newest(run_dir).name]
    assert (one["committed"], one["whole"]) == (True, whole)
    assert said in str(one["problem"])
    assert found[oldest(run_dir).name]["whole"] is True, "damage to one says nothing of the other"


@pytest.mark.parametrize("left", [no_manifest, torn_manifest], ids=lambda left: left.__name__)
def test_what_a_preemption_left_of_a_save_is_shown_and_is_no_error(run_dir: Path, left) -> None:
    forget(run_dir)
    left(newest(run_dir))
    done = skyspot("verify", run_dir)
    assert done.returncode == 0, done.stdout
    first, second, summary = done.stdout.splitlines()
    assert first.startswith(f"{newest(run_dir).name}  not committed: ")
    assert second.startswith(f"{oldest(run_dir).name}  whole, ")
    assert summary == "1 checkpoint committed: 1 whole. A resume would start from step 4."
    listed = skyspot("list", run_dir).stdout
    assert "not committed: " in listed
    assert "Not committed: an interrupted save; harmless, a resume skips it." in listed


def test_what_pruning_took_is_no_error_and_a_manifest_that_is_lost_is(run_dir: Path) -> None:
    attempt = newest(run_dir).name[11:-2]
    gone = oldest(run_dir)
    no_manifest(gone)
    record(run_dir, checkpoint=gone.name, time=time.time())
    assert verified(run_dir, code=1)[gone.name]["committed"] is True, "only one newer one is committed"
    edit(shutil.copytree(newest(run_dir), run_dir / "checkpoints" / f"0000000012-{attempt}-3"), step=12)
    one = verified(run_dir)[gone.name]
    assert (one["committed"], one["problem"]) == (False, NOT_COMMITTED)


@pytest.mark.parametrize(("on_nan", "step"), [("stop", 4), ("ignore", 8)])
def test_a_checkpoint_that_is_not_finite_is_said_and_a_resume_passes_it_by(
    run_dir: Path, on_nan: str, step: int
) -> None:
    last = newest(run_dir)
    manifest = read_manifest(last)
    config = {**manifest.facts["config"], "on_nan": on_nan}
    facts = {**manifest.facts, "finite": False, "config": config}
    (last / MANIFEST).write_bytes(Manifest("checkpoint", manifest.files, facts).to_json())
    listed = skyspot("list", run_dir).stdout
    assert listed.count("sizes agree, not finite") == 1
    assert "except with --on-nan ignore" in listed
    done = skyspot("verify", run_dir)
    assert done.returncode == 0, "it is as it was written"
    said = done.stdout
    assert f"A resume would start from step {step}." in said
    assert said.count(", not finite") == 1
    assert [one["finite"] for one in json.loads(skyspot("list", run_dir, "--json").stdout)] == [False, True]


def test_a_damaged_checkpoint_behind_a_whole_one_fails_too_and_the_summary_says_where_a_resume_goes_on(
    run_dir: Path,
) -> None:
    flipped_bit(oldest(run_dir))
    done = skyspot("verify", run_dir)
    assert done.returncode == 1
    first, second, summary = done.stdout.splitlines()
    assert first.startswith(f"{newest(run_dir).name}  whole, ")
    assert second == f"{oldest(run_dir).name}  DAMAGED: {SHARE} does not match the hash in its manifest"
    assert summary == "2 checkpoints committed: 1 whole, 1 damaged. A resume would start from step 8."
    flipped_bit(newest(run_dir))
    assert skyspot("verify", run_dir).stdout.splitlines()[2].endswith("A resume would start from step 0.")


def test_another_runs_checkpoint_is_said_and_a_resume_goes_on_behind_it(run_dir: Path) -> None:
    paths = RunPaths(run_dir)
    name = list_checkpoints(paths)[0]
    theirs = paths.checkpoints / f"{name.step + 900:010d}-{name.attempt}-{name.save}"
    shutil.copytree(paths.checkpoint(name), theirs)
    manifest = read_manifest(theirs)
    facts = {**manifest.facts, "step": name.step + 900, "run_id": "another"}
    (theirs / MANIFEST).write_bytes(Manifest(manifest.kind, manifest.files, facts).to_json())
    done = skyspot("verify", run_dir)
    assert done.returncode == 1
    assert "another run's checkpoint (another)" in done.stdout
    assert f"A resume would start from step {name.step}." in done.stdout


def test_every_damaged_file_is_named_and_many_are_counted(run_dir: Path) -> None:
    for number in range(5):
        list_file(newest(run_dir), f"share-{number + 1:05d}.safetensors", 4096)
    problem = str(verified(run_dir, code=1)[newest(run_dir).name]["problem"])
    assert problem.count("is missing") == 3
    assert problem.endswith("; and 2 files more")


def test_without_a_committed_checkpoint_there_is_nothing_to_go_on_from(run_dir: Path) -> None:
    forget(run_dir)
    for folder in (run_dir / "checkpoints").iterdir():
        no_manifest(folder)
    done = skyspot("verify", run_dir)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "No checkpoint is committed; a resume would start from step 0."
    shutil.rmtree(run_dir / "checkpoints")
    assert skyspot("verify", run_dir).returncode == 1
    done = skyspot("list", run_dir)
    assert (done.returncode, done.stdout) == (0, f"{run_dir}: no checkpoint yet\n")


def test_the_exported_model_is_verified_with_the_checkpoints(run_dir: Path) -> None:
    final = export(run_dir)
    assert skyspot("list", run_dir).stdout.splitlines()[3].startswith("final  ~")
    assert verified(run_dir)["final"]["whole"] is True
    (final / "model.safetensors").write_bytes(b"the m0del")
    one = verified(run_dir, code=1)["final"]
    assert (one["step"], one["attempt"], one["whole"]) == (12, None, False)
    assert one["problem"] == "model.safetensors does not match the hash in its manifest"


# -- what is listed ----------------------------------------------------------------------------------------------------


def test_checkpoints_are_listed_newest_first_with_step_age_size_attempt_and_state(run_dir: Path) -> None:
    now = time.time()
    forget(run_dir)
    record(run_dir, 90, checkpoint=newest(run_dir).name, time=now - 7300)
    record(run_dir, 91, checkpoint=[newest(run_dir).name], time="yesterday")
    os.utime(newest(run_dir) / MANIFEST, (now, now - 9e5))
    os.utime(oldest(run_dir) / MANIFEST, (now, now - 3 * 86400 - 60))
    shutil.copytree(oldest(run_dir), oldest(run_dir).with_name("0000000002-a0001-abcdef-1"))
    no_manifest(oldest(run_dir))
    done = skyspot("list", run_dir)
    assert (done.returncode, done.stderr) == (0, "")
    head, *rows = [line.split() for line in done.stdout.splitlines()]
    attempt = newest(run_dir).name[11:-2]
    assert head == ["step", "saved", "bytes", "attempt", "state"]
    assert rows[0][:3] == ["8", "2h", "ago"], "by the record of its attempt"
    assert rows[0][4:] == ["kB", attempt, "sizes", "agree"]
    assert 50 < float(rows[0][3]) < 70
    assert rows[1][:3] == ["4", "~3d", "ago"], "without a record: by the manifest's own time, and it says so"
    assert rows[2][:2] == ["2", "-"]
    assert "~ is the modification time of MANIFEST.json" in done.stdout
    assert "nothing was hashed" in done.stdout


def test_programs_get_the_same_fields_from_both_commands(run_dir: Path) -> None:
    forget(run_dir)
    record(run_dir, checkpoint=newest(run_dir).name, time=1.7e9)
    rows = json.loads(skyspot("list", run_dir, "--json").stdout)
    assert rows[0] == {
        "checkpoint": newest(run_dir).name, "step": 8, "attempt": newest(run_dir).name[11:-2],
        "bytes": sum(file.stat().st_size for file in newest(run_dir).iterdir() if file.name != MANIFEST),
        "committed": True, "whole": None, "problem": None, "finite": True, "saved_at": 1.7e9, "saved_by": "event",
    }  # fmt: skip
    assert rows[1]["saved_by"] == "mtime"
    assert [{**one, "whole": True} for one in rows] == list(verified(run_dir).values())


def test_names_in_a_manifest_are_printed_as_they_are(run_dir: Path) -> None:
    list_file(newest(run_dir), "[bold red]x[/]", 1)
    assert "[bold red]x[/]: No such file" in skyspot("list", run_dir).stdout
    assert "[bold red]x[/] is missing" in skyspot("verify", run_dir).stdout


# -- which run ---------------------------------------------------------------------------------------------------------


def test_a_run_is_found_by_its_name_in_the_projects_folder(run_dir: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / ".skyspot").mkdir(parents=True)
    (project / ".skyspot" / "mine.yaml").write_text(f"envs: {{SKYSPOT_CHECKPOINT_DIR: {run_dir}}}\nrun: x\n")
    assert find.open_existing("mine", project).root == run_dir
    (project / "skyspot.yaml").write_text(f"bucket: {tmp_path}\n")
    assert find.open_existing("run", project).root == run_dir
    assert "sizes agree" in skyspot("list", "mine", cwd=project).stdout
    assert "sizes agree" in skyspot("list", "run", cwd=tmp_path).stdout, "a folder here"
    assert skyspot("verify", f"file://{run_dir}").returncode == 0


@pytest.mark.parametrize(
    ("run", "kind", "says"),
    [
        ("mien", UsageError, r"no run 'mien' here.* Did you mean 'mine'\?"),
        ("other", UsageError, r"no folder of that name, no \.skyspot/other\.yaml, and no bucket in skyspot\.yaml"),
        ("./other", UsageError, "no such folder"),
        ("torn", UsageError, "torn.yaml is not readable as YAML"),
        ("own", UsageError, "own.yaml sets no SKYSPOT_CHECKPOINT_DIR"),
        ("mine", SkyspotError, "is empty or missing"),
        ("empty", SkyspotError, "is empty or missing"),
        ("photos", SkyspotError, "photos is not a run's folder: .* only '1', '2', '3', '4', '5', ..."),
        ("run/checkpoints", SkyspotError, "is inside a run's folder"),
        ("foo://x/run", SkyspotError, "foo://x/run cannot be read from this machine"),
        ("oci://x/run", SkyspotError, "oci:// cannot be read from this machine: Install ocifs"),
    ],
)
def test_what_is_no_run_is_said_in_a_line(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str, kind: type[Exception], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "photos", ".skyspot"):
        Path(name).mkdir()
    for name in "123456":
        Path("photos", name).touch()
    Path(".skyspot/mine.yaml").write_text(f"envs: {{SKYSPOT_CHECKPOINT_DIR: {tmp_path}/not-begun}}\nrun: x\n")
    Path(".skyspot/torn.yaml").write_text("envs: {")
    Path(".skyspot/own.yaml").write_text("run: x\n")
    with pytest.raises(kind, match=says) as said:
        find.open_existing(run)
    assert "\n" not in str(said.value)


def test_a_store_whose_library_is_missing_is_one_line_with_the_extra() -> None:
    for url, library, extra in (("gs://b/r", "gcsfs", "gcp"), ("az://b/r", "adlfs", "azure")):
        code = f"import sys; sys.modules[{library!r}] = None; from skyspot.cli.main import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, "checkpoints", "list", url], capture_output=True, text=True, env=clean_env()
        )
        assert done.returncode == 1
        assert done.stderr == f"Error: {url} cannot be read without pip install 'skyspot[{extra}]'\n"


# -- buckets -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_in_a_bucket_is_listed_and_verified_there(run_dir: Path, bucket: Path, tmp_path: Path) -> None:
    record(run_dir, 90, checkpoint=newest(run_dir).name, time=time.time())
    record(run_dir, 91, checkpoint=oldest(run_dir).name, time=time.time())
    export(run_dir)
    shutil.copytree(run_dir, bucket / "team" / "run-001")
    (tmp_path / "skyspot.yaml").write_text("bucket: s3://mine/team\n")
    for run in ("s3://mine/team/run-001/", "run-001"):
        done = skyspot("list", run, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        rows = done.stdout.splitlines()[1:4]
        assert [row.split()[0] for row in rows] == ["8", "4", "final"]
        assert all("sizes agree" in row for row in rows)
    assert {one["whole"] for one in verified("s3://mine/team/run-001").values()} == {True}


@pytest.mark.slow
def test_damage_in_a_bucket_is_found_there(half: Path, bucket: Path) -> None:
    damages = {one.__name__: one for one in (flipped_bit, truncated, missing, torn_manifest, no_manifest, newer_layout)}
    for name, damage in damages.items():
        run_dir = Path(shutil.copytree(half, bucket / name))
        record(run_dir, checkpoint=newest(run_dir).name, time=time.time())
        damage(newest(run_dir))
        paths = find.open_existing(f"s3://mine/{name}")
        one, other = verify(paths, checkpoints.list_all(paths))
        local = RunPaths(run_dir)
        same, _ = verify(local, checkpoints.list_all(local))
        assert (one.committed, one.whole, one.problem) == (same.committed, same.whole, same.problem)
        assert one.problem
        assert other.whole


@pytest.mark.slow
def test_a_bucket_that_cannot_be_read_is_one_line(bucket: Path, tmp_path: Path) -> None:
    bucket.joinpath("run").mkdir()
    nobody = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"}
    for env, says in (
        ({**nobody, "HOME": str(tmp_path)}, "Credentials come from `aws configure`"),
        ({"AWS_ACCESS_KEY_ID": "another"}, "Credentials come from `aws configure`"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_MAX_ATTEMPTS": "1"}, "Could not connect"),
    ):
        done = skyspot("verify", "s3://mine/run", **env)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
        assert done.stderr.startswith("Error: s3://mine/run cannot be read from this machine: ")
        assert says in done.stderr
    with pytest.raises(SkyspotError, match="s3://none/run is empty or missing"):
        find.open_existing("s3://none/run")


def test_whatever_fsspec_reads_is_read(run_dir: Path) -> None:
    from upath import UPath

    for path in run_dir.rglob("*"):
        if path.is_file():
            target = UPath(f"memory://store/run/{path.relative_to(run_dir).as_posix()}")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    paths = find.open_existing("memory://store/run")
    assert [one.whole for one in verify(paths, checkpoints.list_all(paths))] == [True, True]


# -- while it runs -----------------------------------------------------------------------------------------------------


def test_what_a_run_prunes_or_exports_again_while_it_is_read_is_no_damage(run_dir: Path) -> None:
    paths = RunPaths(run_dir)
    export(run_dir)
    looked = checkpoints.list_all(paths)
    shutil.rmtree(oldest(run_dir))
    shutil.rmtree(paths.final)
    export(run_dir, b"another one")
    first, pruned, final = verify(paths, looked)
    assert first.whole
    assert (pruned.committed, pruned.whole) == (False, None)
    assert str(pruned.problem).startswith("pruned")
    assert (final.committed, final.problem) == (False, "rewritten while it was read")


def in_a_terminal(*args: object) -> tuple[str, str]:
    """(what a terminal shows of stderr, what a pipe gets of stdout)."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "skyspot", "checkpoints", *map(str, args)]
    env = clean_env(TERM="xterm", COLUMNS="120")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=env) as process:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 65536):
                shown += piece
        except OSError:  # The other end is closed.
            pass
        os.close(ours)
        output, _ = process.communicate(timeout=60)
    return shown.decode(), output.decode()


def test_a_terminal_gets_a_bar_and_a_pipe_plain_lines(run_dir: Path) -> None:
    shown, output = in_a_terminal("verify", run_dir)
    assert re.search(r"(\d+\.\d)/\1 kB", shown), "all bytes of all"
    assert shown.endswith("\x1b[?25h\r\x1b[1A\x1b[2K"), "the bar is gone and the cursor back"
    assert output == skyspot("verify", run_dir).stdout
    assert "\x1b" not in output
    shown, output = in_a_terminal("verify", run_dir, "--json")
    assert "kB" in shown
    assert len(json.loads(output)) == 2


def test_a_file_is_hashed_in_pieces_and_never_held_whole(run_dir: Path) -> None:
    huge = newest(run_dir) / "share-00001.safetensors"
    huge.touch()
    os.truncate(huge, 400 << 20)
    list_file(newest(run_dir), huge.name, 400 << 20)
    code = (
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'skyspot', 'checkpoints', 'verify', sys.argv[1]])\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_dir)], capture_output=True, text=True, env=clean_env(), check=True
    )
    assert f"DAMAGED: {huge.name} does not match the hash" in done.stdout, "the hash in its manifest is not its own"
    assert int(done.stdout.split()[-1]) * (1 if sys.platform != "darwin" else 1 / 1024) < 200 << 10


def test_ctrl_c_does_not_wait_for_a_bucket_that_hangs() -> None:
    code = (
        "import signal, threading\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # A job in the background ignores it.
        "from skyspot.runs.workers import in_order\n"
        "for one in in_order([int, threading.Event().wait, threading.Event().wait], 2): print(one, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=clean_env(), stdout=-1, stderr=-1, text=True)
    assert process.stdout
    assert process.stdout.readline() == "0\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert errors.endswith("KeyboardInterrupt\n")
