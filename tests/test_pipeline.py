"""Pipelines: several tasks in one file, rendered, linted, shown and launched task by task."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from click.testing import CliRunner, Result
from support_sky import CATALOGS, run_sky

from skyspot.cli import main
from skyspot.errors import UsageError
from skyspot.jobs import client, stop, training
from skyspot.lint import linter
from skyspot.migrate.source import task_yaml
from skyspot.rehearsal.task import RehearsalTask
from skyspot.runs import find
from skyspot.task import document, pipeline
from skyspot.task.options import Options
from skyspot.task.sheet import difference
from trainer.layout.documents import to_json

PIPELINE = """\
# Two tasks, one after the other.
name: pipe
---
# First: get it ready.
name: prepare
resources:
  cpus: 4
run: |
  echo prepare
  # not a comment of YAML's
  ---
---
name: train
resources:
  accelerators: A100:8
  use_spot: true
  spot_recovery: FAILOVER  # old
envs:
  SKYSPOT_CHECKPOINT_DIR: /c/run-7
file_mounts:
  /c: {source: "s3://mine", mode: MOUNT}
run: |
  python train.py
# The end.
"""
OTHER = PIPELINE.partition("---\n")[2]
"""The same without a header."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pipe.yaml").write_text(PIPELINE)
    return tmp_path


def skyspot(*words: str) -> Result:
    return CliRunner().invoke(main.cli, words)


def rendered(text: str, folder: Path, **options: object) -> tuple[str, tuple[str, ...]]:
    path = folder / "p.yaml"
    path.write_bytes(text.encode())
    found = task_yaml(Options(task=str(path), **options))  # type: ignore[arg-type]
    return found.text, found.notes


def documents(text: str) -> list[dict]:
    return list(yaml.safe_load_all(text))


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "tasks"),
    [
        (PIPELINE, "pipe", ["prepare", "train"]),
        (OTHER, None, ["prepare", "train"]),
        ("name: a\nrun: x\n", "a", ["a"]),
        ("name: a\nrun: x\n---\n", "a", ["a"]),
        ("---\nname: a\nrun: x\n", "a", ["a"]),
        ("---\n# nothing\n---\nname: a\nrun: x\n", "a", ["a"]),
        ("name: only\n", "only", ["only"]),
        ("name: h\nexecution: serial\n---\nrun: x\n---\nname: b\nrun: y\n", "h", [None, "b"]),
        ("%YAML 1.1\n---\nname: h\n...\n%YAML 1.1\n---\nname: a\nrun: x\n---\nname: b\nrun: y", "h", ["a", "b"]),
        ("name: a\r\nrun: x\r\n---\r\nname: b\r\nrun: y\r\n", None, ["a", "b"]),
    ],
)
def test_a_file_is_its_documents(text: str, name: str | None, tasks: list[str | None]) -> None:
    found = pipeline.split(text)
    assert (found.text, found.document.name) == (text, name)
    assert [yaml.safe_load(one).get("name") for one in found.task_texts] == tasks
    assert [one.name for one in document.tasks(text)] == tasks


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("name: h\n---\n", "no task"),
        ("name: a\nrun: x\n---\n- y\n", "mapping"),
        ("name: a\nrun: x\n---\nname: b\nrun: [1\n", "not readable"),
        ("name: a\nrun: x\n---\nname: b\nenvs: 1\nenvs: 2\n", "line 6: duplicate key 'envs'"),
        ("name: h\n---\nname: a\nrun: x\n---\nname: a\nrun: y\n", "two tasks are named 'a'"),
        ("name: a\n---\nrun: !!int x\n", "not readable"),
    ],
)
def test_a_pipeline_that_skypilot_cannot_take_is_refused_with_its_line(text: str, why: str, here: Path) -> None:
    with pytest.raises(UsageError, match=why):
        rendered(text, here)


# -- render ------------------------------------------------------------------------------------------------------------


def test_old_spellings_are_changed_in_each_task_and_said_by_line(here: Path) -> None:
    text, notes = rendered(PIPELINE.replace("cpus: 4", "max_price: 2"), here)
    changed = [line for line in difference(PIPELINE, text, "x").splitlines()[2:] if line[0] in "+-"]
    assert changed == [
        "-  cpus: 4", "+  max_hourly_cost: 2",
        "-  spot_recovery: FAILOVER  # old", "+  job_recovery: FAILOVER  # old",
    ]  # fmt: skip
    assert [note.split(": ")[0].partition(", ")[2] for note in notes] == ["line 7", "line 17"]
    assert rendered(PIPELINE.replace("spot_r", "job_r"), here) == (PIPELINE.replace("spot_r", "job_r"), ())


def test_an_old_spelling_that_cannot_be_changed_is_refused_at_its_line(here: Path) -> None:
    with pytest.raises(
        UsageError,
        match=r"p\.yaml, line 17: spot_recovery is called job_recovery today, which has another value on line 18",
    ):
        rendered(PIPELINE.replace("  # old", "\n  job_recovery: EAGER_NEXT_REGION"), here)


def test_options_edit_each_task(here: Path) -> None:
    text, notes = rendered(
        PIPELINE, here, gpus="L4:4,A10G:4", infra="aws", env={"X": "1"}, secret={"KEY": None}, max_hourly_cost=9.0,
        strategy="failover",
    )  # fmt: skip
    header, prepare, train = documents(text)
    assert header == {"name": "pipe"}
    assert [task["envs"]["X"] for task in (prepare, train)] == ["1", "1"]
    assert [task["secrets"] for task in (prepare, train)] == [{"KEY": None}] * 2
    assert [task["resources"]["max_hourly_cost"] for task in (prepare, train)] == [9.0, 9.0]
    assert prepare["resources"]["infra"] == "aws"
    assert "accelerators" not in prepare["resources"]
    assert [rung["accelerators"] for rung in train["resources"]["ordered"]] == ["L4:4", "A10G:4"]
    assert text.startswith("# Two tasks, one after the other.\n")
    assert "# First: get it ready.\n" in text
    assert "# The end.\n" in text
    assert any("--gpus leaves prepare unchanged" in note for note in notes)
    assert notes[0].endswith("p.yaml, line 17: spot_recovery -> job_recovery."), "as the file was"


def test_what_is_added_to_a_task_stands_with_it(here: Path) -> None:
    text = "name: a\nrun: x\n\n---\n\nname: b\nrun: |+\n  y\n\n\n---\nname: c\nrun: z"
    added = rendered(text, here, env={"X": "1"})[0]
    envs = '\nenvs:\n  X: "1"\n'
    assert added.startswith(f"name: a\nrun: x\n{envs}\n---\n\nname: b\n")
    assert added.endswith(f"name: c\nrun: z\n{envs}")
    assert [{**one, "envs": 0} for one in documents(added)] == [{**one, "envs": 0} for one in documents(text)]


@pytest.mark.parametrize(
    ("text", "options", "why"),
    [
        (PIPELINE, {"num_nodes": 2}, "--num-nodes"),
        ("run: x\n---\nrun: y\n", {"gpus": "A100:8"}, "--gpus: no task of this pipeline"),
        (PIPELINE, {"data": "stdlib"}, "--data"),
    ],
)
def test_an_option_that_means_nothing_for_several_tasks_is_refused(
    text: str, options: dict, why: str, here: Path
) -> None:
    with pytest.raises(UsageError, match=why):
        rendered(text, here, **options)


@pytest.mark.parametrize("text", [PIPELINE, OTHER, f"# c\n---\n{OTHER}", f"%YAML 1.1\n---\n{OTHER}"])
def test_a_name_is_the_jobs_and_the_tasks_keep_theirs(text: str, here: Path) -> None:
    header, *tasks = documents(rendered(text, here, name="new")[0])
    assert header == {"name": "new"}
    assert [task["name"] for task in tasks] == ["prepare", "train"]
    assert rendered(text, here, name="new")[0].endswith("# The end.\n")


def test_a_pipeline_without_a_name_is_called_as_its_file(here: Path) -> None:
    (here / "two.yaml").write_text(OTHER)
    assert task_yaml(Options(task="two.yaml")).name == "two"
    assert task_yaml(Options(task="pipe.yaml")).name == "pipe"


def test_render_writes_a_pipeline_that_renders_to_itself(here: Path) -> None:
    done = skyspot("render", "pipe.yaml", "-o", ".")
    assert done.exit_code == 0, done.output
    written = (here / ".skyspot" / "pipe.yaml").read_text()
    assert written.startswith("# Rendered by skyspot")
    assert task_yaml(Options(task=".skyspot/pipe.yaml")).text == written
    shown = skyspot("render", "pipe.yaml", "--json")
    assert json.loads(shown.stdout)["name"] == "pipe"


# -- lint, plan, launch ------------------------------------------------------------------------------------------------


@pytest.fixture
def sky(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """No SkyPilot: no job is alive, and what is submitted is remembered."""
    submitted: list[tuple[str, str]] = []
    monkeypatch.setattr(client, "queue", lambda *args, **more: [])
    monkeypatch.setattr(client, "check", lambda *args: [])
    monkeypatch.setattr(client, "submit", lambda text, name, secrets, quiet=False: submitted.append((name, text)) or 7)
    return submitted


def test_a_finding_names_its_task_and_its_line(here: Path) -> None:
    (here / "p.yaml").write_text(PIPELINE.replace("mode: MOUNT", "mode: MOUNTED").replace("s3://mine", "s3://mine/x"))
    found = [one for one in linter.findings((here / "p.yaml").read_text()) if one.line == 21]
    assert found
    assert {one.task for one in found} == {"train"}
    said = skyspot("lint", "p.yaml")
    assert "p.yaml:21: error: task train: " in said.output
    assert {one.task for one in linter.findings(OTHER.partition("---\n---\n")[2])} == {""}


def test_the_plan_has_a_ladder_for_each_task(here: Path, sky: list[tuple[str, str]]) -> None:
    (here / "pipe.yaml").write_text(PIPELINE.replace("python train.py", "true"))
    done = skyspot("launch", "pipe.yaml", "--dryrun", "--env", "MORE=1")
    assert done.exit_code == 0, done.output
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert "Job pipe: 2 tasks, one after another." in lines
    first, second = (
        lines.index("Task 1, prepare. SkyPilot will look for:"),
        lines.index("Task 2, train. SkyPilot will look for:"),
    )
    assert "CPU" in " ".join(lines[first:second])
    assert "A100:8" not in " ".join(lines[first:second])
    assert "A100:8" in " ".join(lines[second:])
    assert "Checkpoints: s3://mine/run-7" in lines[second:]
    plan = json.loads(skyspot("launch", "pipe.yaml", "--dryrun", "--json").stdout)
    assert [task["name"] for task in plan["tasks"]] == ["prepare", "train"]
    assert [task["checkpoints"] for task in plan["tasks"]] == [None, "s3://mine/run-7"]
    assert sky == []


def test_a_pipeline_is_written_and_submitted_whole(here: Path, sky: list[tuple[str, str]]) -> None:
    (here / "pipe.yaml").write_text(PIPELINE.replace("python train.py", "true"))
    done = skyspot("launch", "pipe.yaml", "-n", "night", "-y", "-d")
    assert done.exit_code == 0, done.output
    ((name, text),) = sky
    assert name == "night"
    assert [one.get("name") for one in documents(text)] == ["night", "prepare", "train"]
    assert (here / ".skyspot" / "night.yaml").read_text() == text
    # The run's name alone goes on with it.
    assert skyspot("launch", "-n", "night", "-y", "-d").exit_code == 0
    assert sky[1] == sky[0]


def test_the_trainers_of_all_tasks_lie_beside_a_pipeline(here: Path, sky: list[tuple[str, str]]) -> None:
    for run in ("one", "two"):
        assert skyspot("render", "--gpus", "A100:8", "-n", run, "--bucket", "s3://mine", "-o", "w").exit_code == 0
    (here / "both.yaml").write_text(
        (here / "w/.skyspot/one.yaml").read_text() + "---\n" + (here / "w/.skyspot/two.yaml").read_text()
    )
    done = skyspot("launch", "both.yaml", "-y", "-d")
    assert done.exit_code == 0, done.output
    for run in ("one", "two"):
        assert (here / ".skyspot" / run / "trainer" / "setup.sh").exists()


def test_what_each_tasks_run_was_begun_with_is_compared(here: Path, sky: list[tuple[str, str]]) -> None:
    attempt = here / "runs" / "r" / "attempts" / "a0001-abcdef"
    attempt.mkdir(parents=True)
    start = {"time": 1e9, "binding": {"seed": 7}, "launch": "x"}
    (attempt / "0001-start.json").write_bytes(to_json(start))
    task = f"name: {{}}\nenvs: {{{{SKYSPOT_CHECKPOINT_DIR: {here}/runs/{{}}, SKYSPOT_SEED: '{{}}'}}}}\nrun: 'true'\n"
    for seed, code in (("8", 1), ("7", 0)):
        (here / "p.yaml").write_text(task.format("a", "new", seed) + "---\n" + task.format("b", "r", seed))
        done = skyspot("launch", "p.yaml", "--dryrun")
        said = done.output + str(done.exception or "")
        assert done.exit_code == code, said
        assert ("seed is 7 in the run and '8' here. Give task b another folder" in said) == (code == 1)
    assert "Resumes:     b from its start, after 1 attempt" in said


def test_a_secret_of_any_task_needs_its_value(here: Path, sky: list[tuple[str, str]]) -> None:
    text = "name: a\nrun: 'true'\n---\nname: b\nsecrets: {TOKEN: null}\nrun: 'true'\n"
    (here / "p.yaml").write_text(text)
    done = skyspot("launch", "p.yaml", "--dryrun")
    assert "secret TOKEN has no value" in str(done.exception)
    assert skyspot("launch", "p.yaml", "--dryrun", "--secret", "TOKEN=x").exit_code == 0


# -- the job -----------------------------------------------------------------------------------------------------------


def record(task_id: int, status: str, **fields: object) -> SimpleNamespace:
    """What SkyPilot says of one task of a managed job."""
    given = {
        "job_id": 4, "task_id": task_id, "job_name": "pipe", "task_name": ["prepare", "train", "test"][task_id],
        "status": SimpleNamespace(value=status), "resources": f"r{task_id}", "infra": "-", "recovery_count": task_id,
        "submitted_at": 1e9, "job_duration": 60.0, "details": None, "failure_reason": None, "user_yaml": None,
    }  # fmt: skip
    return SimpleNamespace(**{**given, **fields})


@pytest.mark.parametrize(
    ("states", "part", "status", "living"),
    [
        (["RUNNING", "PENDING", "PENDING"], 0, "RUNNING", True),
        (["SUCCEEDED", "RECOVERING", "PENDING"], 1, "RECOVERING", True),
        (["SUCCEEDED", "SUCCEEDED", "PENDING"], 2, "PENDING", True),
        (["SUCCEEDED", "SUCCEEDED", "SUCCEEDED"], 2, "SUCCEEDED", False),
        (["SUCCEEDED", "FAILED", "CANCELLED"], 1, "FAILED", False),
        (["SUCCEEDED", "CANCELLED", "CANCELLED"], 1, "CANCELLED", False),
        (["SUCCEEDED", "FAILED", "RUNNING"], 2, "RUNNING", True),  # Side by side.
    ],
)
def test_a_jobs_row_is_about_the_task_that_is_on(states: list[str], part: int, status: str, living: bool) -> None:
    found = client.job_of([record(number, state) for number, state in enumerate(states)])
    assert (found.part, found.parts, found.status, found.living) == (part, 3, status, living)
    assert found.part_name == ["prepare", "train", "test"][part]
    assert (found.resources, found.recoveries) == (f"r{part}", part)


def test_a_job_of_one_task_is_as_it_was() -> None:
    found = client.job_of([record(0, "RUNNING", user_yaml="name: x")])
    assert (found.part, found.parts, found.part_name, found.task) == (0, 1, "", "name: x")


def test_the_queue_shows_the_training_of_the_task_that_is_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = here / "runs" / "r" / "attempts" / "a0001-abcdef"
    attempt.mkdir(parents=True)
    (attempt / "0001-start.json").write_bytes(to_json({"time": 1e9, "launch": "sky-managed-1_pipe_4-1"}))
    (attempt / "progress.json").write_bytes(to_json({"step": 3, "max_steps": 9, "loss": 0.5}))
    task = f"name: {{}}\nenvs: {{{{SKYSPOT_CHECKPOINT_DIR: {here}/runs/{{}}}}}}\nrun: x\n"
    text = "name: pipe\n---\n" + task.format("prepare", "none") + "---\n" + task.format("train", "r")
    job = client.job_of([record(0, "SUCCEEDED", user_yaml=text), record(1, "RUNNING", user_yaml=text)])
    monkeypatch.setattr(client, "queue", lambda *args, **more: [job])
    rows = skyspot("queue").stdout.splitlines()
    assert "pipe 2/2 train" in rows[1]
    assert "3/9" in rows[1]
    (row,) = json.loads(skyspot("queue", "--json").stdout)
    assert (row["name"], row["task"], row["task_number"], row["tasks"], row["step"]) == ("pipe", "train", 2, 2, 3)
    # Where SkyPilot does not say what was submitted, what was written for it does.
    (here / ".skyspot").mkdir()
    (here / ".skyspot" / "pipe.yaml").write_text(text)
    unsaid = dataclasses.replace(job, task="")
    assert training.open_job(unsaid).root == training.open_job(job).root == here / "runs" / "r"


def test_cancel_asks_the_attempt_of_the_task_that_is_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "WATCH_S", 0.1)
    monkeypatch.setattr(stop, "POLL_S", 0.01)
    attempt = here / "r" / "attempts" / "a0001-abcdef"
    attempt.mkdir(parents=True)
    (attempt / "0001-start.json").write_bytes(to_json({"time": 1e9, "launch": "sky-managed-1_pipe_4-1"}))
    text = f"name: pipe\n---\nname: a\nrun: x\n---\nname: b\nenvs: {{SKYSPOT_CHECKPOINT_DIR: {here}/r}}\nrun: y\n"
    job = client.job_of([record(0, "SUCCEEDED", user_yaml=text), record(1, "RUNNING", user_yaml=text)])
    said: list[str] = []
    assert not stop.request_save(job, 1.0, said.append)
    assert said[0] == "Asking a0001-abcdef to save and stop"


def test_cancel_asks_every_task_of_a_job_group_that_runs(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "WATCH_S", 0.1)
    monkeypatch.setattr(stop, "POLL_S", 0.01)
    text = "name: group\nexecution: parallel\n"
    for number in range(3):
        attempt = here / f"r{number}" / "attempts" / f"a0001-abcde{number}"
        attempt.mkdir(parents=True)
        (attempt / "0001-start.json").write_bytes(to_json({"time": 1e9, "launch": f"sky-managed-1_group_4-{number}"}))
        text += f"---\nname: t{number}\nenvs: {{SKYSPOT_CHECKPOINT_DIR: {here}/r{number}}}\nrun: x\n"
    for states in (["RUNNING", "STARTING", "RUNNING"], ["STARTING", "RUNNING", "RUNNING"]):
        said: list[str] = []
        job = client.job_of([record(number, state, user_yaml=text) for number, state in enumerate(states)])
        assert not stop.request_save(job, 1.0, said.append)
        running = [number for number, state in enumerate(states) if state == "RUNNING"]
        asked = sorted(line for line in said if line.startswith("Asking"))
        assert asked == [f"Asking a0001-abcde{number} to save and stop" for number in running]


def test_a_job_group_has_saved_when_every_task_has(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {0: True, 2: True}
    monkeypatch.setattr(stop, "_request_save", lambda job, grace_s, log: answers[job.part])
    job = client.job_of([record(0, "RUNNING"), record(1, "SUCCEEDED"), record(2, "RUNNING")])
    assert stop.request_save(job, 1.0, print)
    answers[2] = False
    assert not stop.request_save(job, 1.0, print)


# -- SkyPilot's own loader ---------------------------------------------------------------------------------------------

LOADED = """
import json, sys
import sky, sky.jobs
from skyspot.jobs import client as managed_jobs
seen = []
def launch(dag, name):
    dag.name = name
    seen.append({
        "name": dag.name, "tasks": [task.name for task in dag.tasks], "envs": [task.envs for task in dag.tasks],
        "secrets": [sorted(task.secrets) for task in dag.tasks], "group": dag.is_job_group(),
    })
sky.jobs.launch, sky.get = launch, lambda request: ([5], None)
for name, text in json.loads(sys.stdin.read()):
    assert managed_jobs.check(text, {"TOKEN": "x"}) == []
    assert managed_jobs.submit(text, name, {"TOKEN": "x"}, quiet=True) == 5
print(json.dumps(seen))
"""


@pytest.mark.slow  # SkyPilot's import and its catalogs.
def test_skypilot_loads_what_is_rendered(here: Path) -> None:
    """With its own code, as `launch` hands it over."""
    plain = "name: a\nrun: 'true'\n---\nname: b\nrun: 'true'\n"
    given = {"env": {"X": "1"}, "secret": {"TOKEN": None}}
    texts = [
        ["one", rendered(plain, here, **given)[0]],
        ["two", rendered(plain, here, name="two", **given)[0]],
        ["three", rendered(f"name: h\n---\n{plain}", here, name="three", **given)[0]],
        ["four", rendered(f"---\nname: h\nexecution: parallel\n---\n{plain}---\n", here, name="four", **given)[0]],
    ]
    home = here / "home"
    home.mkdir()
    found = json.loads(run_sky(CATALOGS + LOADED, home, texts).splitlines()[-1])
    assert [one["name"] for one in found] == ["one", "two", "three", "four"]
    for one in found:
        assert one["tasks"] == ["a", "b"]
        assert [envs["X"] for envs in one["envs"]] == ["1", "1"]
        assert one["secrets"] == [["TOKEN"], ["TOKEN"]]
    assert [one["group"] for one in found] == [False, False, False, True]


# -- one task of it ----------------------------------------------------------------------------------------------------


def test_checkpoints_of_a_pipeline_of_one_run_are_found_by_its_name(here: Path) -> None:
    task = f"envs: {{{{SKYSPOT_CHECKPOINT_DIR: {here}/{{}}}}}}\nrun: x\n"
    (here / "r" / "checkpoints").mkdir(parents=True)
    (here / ".skyspot").mkdir()
    (here / ".skyspot" / "pipe.yaml").write_text("name: pipe\n---\nrun: x\n---\n" + task.format("r"))
    assert find.open_existing("pipe").root == here / "r"
    (here / ".skyspot" / "pipe.yaml").write_text(task.format("r") + "---\n" + task.format("s"))
    with pytest.raises(UsageError, match=f"a pipeline of 2 runs; give the folder or URL of one: {here}/r, {here}/s"):
        find.open_existing("pipe")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "a rehearsal runs one task of a pipeline; add --task with one of prepare, train"),
        (["--task", "prepair"], "no task is named 'prepair'; the tasks are prepare, train. Did you mean 'prepare'?"),
    ],
)
def test_a_pipeline_is_rehearsed_task_by_task(here: Path, words: list[str], says: str) -> None:
    done = skyspot("rehearse", "pipe.yaml", *words)
    assert isinstance(done.exception, UsageError)
    assert says in str(done.exception)


def test_the_named_task_is_the_one_that_is_rehearsed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[RehearsalTask] = []

    def rehearse(task: RehearsalTask, *more: object) -> None:
        seen.append(task)
        raise UsageError("enough")

    monkeypatch.setattr("skyspot.rehearsal.engine.rehearse", rehearse)
    monkeypatch.setattr("signal.signal", lambda *args: None)
    assert "enough" in str(skyspot("rehearse", "pipe.yaml", "--task", "prepare").exception)
    assert (seen[0].name, seen[0].run.splitlines()[0]) == ("prepare", "echo prepare")
