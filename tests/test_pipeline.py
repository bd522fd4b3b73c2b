"""Pipelines: several tasks in one file, rendered, linted, shown and launched task by task."""

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from skyspot import cli, pipeline
from skyspot.errors import UsageError
from skyspot.options import Options
from skyspot.render import task_yaml
from skyspot.yamledit import difference

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
    return CliRunner().invoke(cli.cli, words)


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
    assert (found.text, found.name) == (text, name)
    assert [yaml.safe_load(one).get("name") for one in found.task_texts] == tasks
    assert [one.get("name") for one in pipeline.tasks_in(text)] == tasks


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("name: h\n---\n", "no task"),
        ("name: a\nrun: x\n---\n- y\n", "mapping"),
        ("name: a\nrun: x\n---\nname: b\nrun: [1\n", "not readable"),
        ("name: a\nrun: x\n---\nname: b\nenvs: 1\nenvs: 2\n", "line 6: 'envs'"),
        ("name: h\n---\nname: a\nrun: x\n---\nname: a\nrun: y\n", "two tasks are called 'a'"),
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
    with pytest.raises(UsageError, match=r"p\.yaml, line 17: spot_recovery is job_recovery today, and line 18"):
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
    assert any("--gpus: not for prepare" in note for note in notes)


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
