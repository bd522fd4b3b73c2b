"""The one reader of a task YAML: what each part means to all who ask, as SkyPilot has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from skyspot.errors import NotYamlError
from skyspot.lint import linter
from skyspot.rehearsal.task import read_task
from skyspot.runs import location
from skyspot.runs.location import Location
from skyspot.task import document, edits, payload, pipeline
from skyspot.task.document import Task


def only(text: str) -> Task:
    (found,) = document.read(text).tasks
    return found


@pytest.mark.parametrize(
    ("text", "name", "tasks"),
    [
        ("name: pipe\n---\nrun: x\n", "pipe", ["pipe-0"]),
        ("name: pipe\nexecution: serial\n---\nname: a\nrun: x\n---\nrun: y\n", "pipe", ["a", "pipe-1"]),
        ("execution: serial\n---\nname: a\nrun: x\n", None, ["pipe-0", "a"]),
        ("---\n---\nname: pipe\n---\nname: a\nrun: x\n", None, ["pipe", "a"]),
        ("name: alone\n", "alone", ["alone"]),
    ],
    ids=["header", "header with execution", "header without a name is a task", "an empty document is no header", "one"],
)
def test_a_first_document_is_a_header_where_skypilot_takes_it_for_one(
    text: str, name: str | None, tasks: list[str]
) -> None:
    found = document.read(text)
    names = found.names(name or "pipe") if len(found.tasks) > 1 else [found.tasks[0].name or "pipe-0"]
    assert (found.name, names) == (name, tasks)
    split = pipeline.split(text)
    assert (len(split.tasks), split.header is not None) == (len(found.tasks), found.header is not None)


def test_lint_takes_for_a_header_what_the_others_take_for_one() -> None:
    text = "execution: serial\n---\nname: a\nrun: echo\n"
    assert [(one.name, one.task) for one in linter.findings(text)] == [("unknown-key", "1")]


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("1", "1"), ("0x10", "16"), ("1_000", "1000"), ("true", "True"), ("yes", "True"), ("'yes'", "yes"),
        ("1.50", "1.5"), ("2026-01-02", "2026-01-02"), ('"007"', "007"),
    ],
)  # fmt: skip
def test_a_variable_is_the_text_that_skypilot_makes_of_it(tmp_path: Path, written: str, text: str) -> None:
    yaml = f"envs: {{A: {written}}}\nfile_mounts: {{/x$A: {{name: b-$A, mode: MOUNT}}}}\nrun: echo $A\n"
    found = only(yaml)
    assert found.envs == {"A": text}
    assert [(mount.path, mount.name) for mount in found.mounts] == [(f"/x{text}", f"b-{text}")]
    assert [word.text for word in found.run.commands[0].words] == ["echo", text]
    assert read_task(yaml, tmp_path, {}, None).envs == {"A": text}


@pytest.mark.parametrize(
    ("asked", "accelerators"),
    [
        ("A100:8", ["A100:8"]),
        ("{A100: 8, L4: 8.0}", ["A100:8", "L4:8"]),
        ("{A100:8, L4:8}", ["A100:8", "L4:8"]),
        ("[A100:8, L4]", ["A100:8", "L4"]),
        ("null", []),
    ],
)
def test_accelerators_are_the_same_to_all_however_they_are_written(asked: str, accelerators: list[str]) -> None:
    found = only(f"resources: {{accelerators: {asked}}}\nrun: x\n")
    assert [text for text, _ in found.rungs[0].accelerators] == accelerators
    groups = [str(one) for group in edits.accelerators(found) for one in group]
    assert groups == [one if ":" in one else f"{one}:1" for one in accelerators]


def test_an_empty_list_of_rungs_hides_no_other() -> None:
    found = only("resources:\n  use_spot: true\n  ordered: []\n  any_of: [{infra: aws}, {infra: gcp}]\nrun: x\n")
    assert [(rung.place, rung.use_spot, rung.line) for rung in found.rungs] == [("aws", True, 4), ("gcp", True, 4)]
    assert not found.ordered


def test_a_rehearsal_brings_back_what_a_rung_recovers_on(tmp_path: Path) -> None:
    recovery = "job_recovery: {strategy: FAILOVER, recover_on_exit_codes: [42, 43]}"
    text = f"resources: {{any_of: [{{infra: aws, {recovery}}}, {{infra: gcp, {recovery}}}]}}\nrun: x\n"
    assert read_task(text, tmp_path, {}, None).recover_on == {42, 43}
    assert read_task(text.replace("FAILOVER", "none"), tmp_path, {}, None).recover_on == set()


def test_a_cached_mount_is_read_only_to_a_rehearsal_too(tmp_path: Path) -> None:
    text = (
        "file_mounts:\n  /a: {name: aaa, mode: MOUNT_CACHED, config: {mount_cached: {read_only: true}}}\n"
        "  relative/b: {name: bbb, mode: MOUNT}\nrun: x\n"
    )
    assert [(mount.path, mount.read_only) for mount in only(text).mounts] == [
        ("/a", True),
        ("~/sky_workdir/relative/b", False),
    ]
    (tmp_path / "seed").mkdir()
    found = read_task(text, tmp_path, {"/a": tmp_path / "seed"}, None)
    assert [(mount.path, mount.read_only) for mount in found.mounts] == [
        ("/a", True),
        ("~/sky_workdir/relative/b", False),
    ]


def test_a_payload_is_known_whatever_variable_names_its_run() -> None:
    text = "envs: {RUN: run-001}\nfile_mounts: {~/skyspot/trainer: .skyspot/$RUN/trainer}\nrun: x\n"
    assert payload.trainers(text) == ("run-001",)


def test_a_tag_that_nobody_knows_hides_nothing_else() -> None:
    text = "envs: {SKYSPOT_CHECKPOINT_DIR: /c/r}\nfile_mounts: {/c: {source: s3://b}}\nconfig: !mine {a: 1}\nrun: x\n"
    assert location.of_task(only(text)) == Location("r", "s3://b")


def test_what_is_no_yaml_is_said_by_its_line_or_is_no_task() -> None:
    with pytest.raises(NotYamlError, match="not readable as YAML") as found:
        document.read("run: x\nenvs: {\n")
    assert found.value.line == 2
    assert document.tasks("envs: {") == ()
