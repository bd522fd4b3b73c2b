"""What `skyspot launch` does before it talks to SkyPilot: which text is used, and what is found in it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import clean_env

from skyspot.cli import tables
from skyspot.errors import SkyspotError, UsageError
from skyspot.jobs import launch
from skyspot.jobs.client import Job
from skyspot.jobs.launch import Existing
from skyspot.jobs.training import TrackedJob
from skyspot.task import payload
from skyspot.task.options import Options
from skyspot.task.render import edited_by_hand, with_header

NEW = Existing(None, None, "", None)


def prepare(folder: Path, **options: object) -> launch.Launch:
    given = Options(name="run-001", **options)  # type: ignore[arg-type]
    return launch.prepare(given, folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_launch_writes_the_task_and_its_trainer(here: Path) -> None:
    found = prepare(here, gpus="A100:8", bucket="s3://mine/team")
    assert str(found.where) == "s3://mine/team/run-001"
    assert [finding for finding in found.findings if finding.level == "error"] == []
    launch.write(found, update_trainer=False)
    assert (here / ".skyspot" / "run-001.yaml").read_text() == found.text
    assert (here / ".skyspot" / "run-001" / "trainer" / "setup.sh").exists()


def test_the_same_launch_again_uses_what_was_edited_by_hand(here: Path) -> None:
    launch.write(prepare(here, gpus="A100:8"), update_trainer=False)
    path = here / ".skyspot" / "run-001.yaml"
    edited = path.read_text().replace("A100:8", "H100:8")
    path.write_text(edited)
    again = prepare(here, gpus="A100:8")
    assert again.text == edited
    assert any("with your edits" in note for note in again.notes)
    launch.write(again, update_trainer=False)
    assert path.read_text() == edited


def test_an_edit_beside_other_options_is_refused_with_the_diff(here: Path) -> None:
    launch.write(prepare(here, gpus="A100:8"), update_trainer=False)
    path = here / ".skyspot" / "run-001.yaml"
    path.write_text(path.read_text().replace("FAILOVER", "EAGER_NEXT_REGION"))
    with pytest.raises(SkyspotError, match="was edited by hand and is not overwritten") as refused:
        prepare(here, gpus="L4:8")
    assert "-  job_recovery: {strategy: EAGER_NEXT_REGION" in str(refused.value)


def test_the_runs_name_alone_goes_on_with_what_was_written(here: Path) -> None:
    launch.write(prepare(here, gpus="L4:8", bucket="s3://mine"), update_trainer=False)
    written = (here / ".skyspot" / "run-001.yaml").read_text()
    again = launch.prepare(Options(name="run-001", flags=frozenset({"name"})), here)
    assert again.text == written
    assert str(again.where) == "s3://mine/run-001"


def test_a_rule_may_be_overruled_where_the_runs_name_is_enough(here: Path) -> None:
    (here / "mine.yaml").write_text("resources: {use_spot: false}\nrun: python train.py\n")
    launch.write(prepare(here, task="mine.yaml", ignore=("script-not-there",)), update_trainer=False)
    written = (here / ".skyspot" / "run-001.yaml").read_text()
    given = Options(name="run-001", ignore=("script-not-there",), flags=frozenset({"name", "ignore"}))
    again = launch.prepare(given, here)
    assert again.text == written
    assert [(finding.name, finding.level) for finding in again.findings] == [("script-not-there", "note")]


def test_a_plain_yaml_that_changes_is_written_again(here: Path) -> None:
    task = here / "mine.yaml"
    task.write_text("resources: {use_spot: false}\nrun: echo one\n")
    launch.write(prepare(here, task="mine.yaml"), update_trainer=False)
    task.write_text("resources: {use_spot: false}\nrun: echo two\n")
    again = prepare(here, task="mine.yaml")
    assert "echo two" in again.text
    assert again.text.startswith("# Rendered by skyspot")


@pytest.mark.parametrize(
    "source",
    ["my task.yaml", "a (copy).yaml", "l\u00e4uft.yml", "two\nlines.yaml", ".skyspot/other.yaml", "copied.yaml"],
)
def test_a_plain_yaml_that_changes_is_submitted_anew_whatever_it_is_called(here: Path, source: str) -> None:
    task = here / source
    task.parent.mkdir(exist_ok=True)
    # The last two: what was written for another run, or a copy of it.
    head = with_header("", "other", "templates/x.yaml.j2") if source.startswith((".skyspot", "copied")) else ""
    for word in ("one", "two", "three"):
        task.write_text(f"{head}resources: {{use_spot: false}}\nrun: echo {word}\n")
        found = prepare(here, task=source)
        assert yaml.safe_load(found.text)["run"] == f"echo {word}"
        assert not edited_by_hand(found.text)
        launch.write(found, update_trainer=False)


@pytest.mark.parametrize("source", ["my task.yaml", "my (facade).yaml"])  # The second looks like a hash, and is none.
def test_what_an_older_release_wrote_of_a_name_with_a_blank_is_not_taken_for_edited(here: Path, source: str) -> None:
    (here / source).write_text("run: echo new\n")
    (here / ".skyspot").mkdir()
    (here / ".skyspot" / "run-001.yaml").write_text(
        with_header("run: echo old\n", "run-001", "X").replace("from X", f"from {source}")
    )
    assert "echo new" in prepare(here, task=source).text


def test_a_copy_of_the_trainer_stays_unless_it_is_asked_to_change(here: Path) -> None:
    found = prepare(here)
    launch.write(found, update_trainer=False)
    mark = here / ".skyspot" / "run-001" / "trainer" / "training" / "run.py"
    mark.write_text("# an older release\n")
    launch.write(found, update_trainer=False)
    assert mark.read_text() == "# an older release\n"
    launch.write(found, update_trainer=True)
    assert mark.read_text() == (payload.trainer_folder() / "training" / "run.py").read_text()


def test_a_copy_of_the_trainer_is_whole_or_not_there(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up, or a Ctrl-C, in the middle of the copy."""
    real = payload.shutil.copytree

    def full(source: Path, target: Path, *more: object, **how: object) -> None:
        real(source, target, *more, **how)
        if source != payload.trainer_folder():
            return  # A folder below it.
        (target / "training" / "run.py").write_text("")
        raise payload.shutil.Error(
            [(str(source / "check.py"), str(target / "check.py"), "[Errno 28] No space left on device")]
        )

    monkeypatch.setattr(payload.shutil, "copytree", full)
    found = prepare(here)
    with pytest.raises(SkyspotError, match="No space left on device"):
        launch.write(found, update_trainer=False)
    monkeypatch.undo()
    assert not list((here / ".skyspot" / "run-001").iterdir())
    launch.write(found, update_trainer=False)
    assert (here / ".skyspot" / "run-001" / "trainer" / "training" / "run.py").stat().st_size > 0


def test_a_secrets_value_is_in_no_file_and_in_nothing_that_is_shown(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "from-the-environment")
    secret = {"HF_TOKEN": "hf-very-secret", "WANDB_API_KEY": None}
    found = prepare(here, secret=secret, env={"MINE": "env-value"}, gpus="A100:8")
    launch.write(found, update_trainer=False)
    tables.show_plan(found, NEW)
    shown = capsys.readouterr().out + json.dumps(tables.plan_json(found, NEW, 1, "new"))
    written = "".join(path.read_text() for path in here.rglob("*.yaml"))
    for value in ("hf-very-secret", "from-the-environment"):
        assert value not in shown + written
    assert found.secrets == {"HF_TOKEN": "hf-very-secret", "WANDB_API_KEY": "from-the-environment"}
    assert "HF_TOKEN=***" in shown
    assert "Environment: MINE" in shown
    assert "env-value" not in shown
    assert "A100:8" in shown


def test_a_secret_without_a_value_is_refused(here: Path) -> None:
    with pytest.raises(UsageError, match="secret NOT_SET_ANYWHERE has no value"):
        prepare(here, secret={"NOT_SET_ANYWHERE": None})


def test_what_lint_finds_stops_a_launch(here: Path) -> None:
    (here / "mine.yaml").write_text(
        "resources: {accelerators: A100:8, use_spot: true}\n"
        "file_mounts: {/checkpoints: {source: s3://b/prefix, mode: MOUNT}}\nrun: python train.py --out /checkpoints\n"
    )
    with pytest.raises(SkyspotError, match=r"mine\.yaml:3: error: "):
        launch.refuse_errors(prepare(here, task="mine.yaml"))


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["launch", "--json"], 2, "add -y or --dryrun"),
        (["launch", "--max-spent", "3"], 2, "No such option: --max-spent"),
        (["launch", "--max-spend", "much"], 2, "--max-spend: 'much' is neither an amount in USD"),
        (["launch", "--gpus", "A1000:8"], 2, "unknown accelerator"),
        (["cancel"], 2, "NAME|ID"),
    ],
)
def test_a_mistake_is_said_before_skypilot_is_asked(tmp_path: Path, args: list[str], code: int, says: str) -> None:
    command = [sys.executable, "-m", "skyspot", *args]
    done = subprocess.run(command, cwd=tmp_path, env=clean_env(), capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


# -- what is shown -----------------------------------------------------------------------------------------------------


def shown(here: Path, text: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    (here / "mine.yaml").write_text(text)
    tables.show_plan(prepare(here, task="mine.yaml"), NEW)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("{A100:1}", "A100:1 "), ("{A100: 8}", "A100:8 "), ("{A100: 0.5}", "A100:0.5 "), ("{A100: 8.0}", "A100:8 "),
        ("{A100:1, V100: 2}", "A100:1 or V100:2 "), ("[A100:8, L4:8]", "A100:8 or L4:8 "), ("A100:8", "A100:8 "),
    ],
)  # fmt: skip
def test_accelerators_are_shown_as_they_are_meant(here: Path, asked: str, said: str, monkeypatch, capsys) -> None:
    out = shown(here, f"resources: {{accelerators: {asked}}}\nrun: nvidia-smi\n", 80, monkeypatch, capsys)
    assert said in out
    assert "None" not in out


LADDER = """\
resources:
  max_hourly_cost: 12.5
  ordered:
    - {accelerators: A100-80GB-SXM:8, infra: slurm/runpod-cluster}
    - {accelerators: A100-80GB:8, use_spot: true, infra: k8s/arn:aws:eks:us-east-1:123456789012:cluster/my-training-eks}
    - {accelerators: [A100-80GB-SXM:8, A100-80GB:8, H100-SXM:8], use_spot: true}
run: nvidia-smi
"""


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_the_plan_breaks_no_word(here: Path, columns: int, monkeypatch, capsys) -> None:
    out = shown(here, LADDER, columns, monkeypatch, capsys)
    assert max(map(len, out.splitlines())) <= columns
    words = "slurm/runpod-cluster A100-80GB-SXM:8 H100-SXM:8 my-training-eks 12.5 own machines"
    for word in (*words.split(), "max USD/h"):
        assert word in out, f"{word} is broken in\n{out}"


@pytest.mark.parametrize("columns", [30, 60])
def test_in_a_narrow_terminal_the_plan_and_the_queue_lose_nothing(
    here: Path, columns: int, monkeypatch, capsys
) -> None:
    """The terminal wraps lines that are too long for it; a price that is cut would be another price."""
    out = shown(here, LADDER.replace("12.5", "12.345"), columns, monkeypatch, capsys)
    for word in ("slurm/", "runpod-cluster", "A100-80GB-SXM:8", "my-training-eks", " 12.345", "own machines"):
        assert word in out, f"{word} is cut in\n{out}"
    name, resources = "finetune-with-a-name-that-says-all-of-it", "1x[A100-80GB:8]"
    tables.show_queue([TrackedJob(Job(1234, name, "RECOVERING", resources, "aws", 0, 0.0, 90000.0, "", ""), None, "")])
    out = capsys.readouterr().out
    for word in ("1234", name, "RECOVERING", resources):
        assert word in out, f"{word} is cut in\n{out}"


@pytest.mark.parametrize(
    ("file", "run"), [("my task.yaml", "my-task"), ("a (copy).yaml", "a-copy"), (".hidden.yml", "hidden")]
)
def test_a_run_that_only_its_file_names_gets_a_name_that_can_be_one(here: Path, file: str, run: str) -> None:
    (here / file).write_text("run: echo one\n")
    first = launch.prepare(Options(task=file), here)
    launch.write(first, update_trainer=False)
    (here / file).write_text("run: echo two\n")
    again = launch.prepare(Options(task=file), here)
    assert (first.name, again.name) == (run, run)
    assert "echo two" in again.text


def test_the_plan_names_a_few_variables_and_counts_the_rest(here: Path, monkeypatch, capsys) -> None:
    envs = ", ".join(f"VARIABLE_{at}: x" for at in range(30))
    out = shown(here, f"envs: {{{envs}, SKYSPOT_X: y}}\nrun: nvidia-smi\n", 80, monkeypatch, capsys)
    assert "Environment: VARIABLE_0, VARIABLE_1, VARIABLE_2 and 27 more\n" in out
    few = shown(here, "envs: {A: x, B: y}\nrun: nvidia-smi\n", 80, monkeypatch, capsys)
    assert "Environment: A, B\n" in few
