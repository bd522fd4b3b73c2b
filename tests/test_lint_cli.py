"""`skyspot lint`, and what render and launch make of lint: in-process, through the console script's own main()."""

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import console
import pytest
from console import Skyspot
from support import REPO

from skyspot.errors import SkyspotError
from skyspot.jobs import launch
from skyspot.lint import rules
from skyspot.rehearsal.result import Result
from skyspot.rehearsal.task import RehearsalTask
from skyspot.task.options import Options

BAD_GPU = "resources: {accelerators: A1000:8, infra: aws}\nrun: nvidia-smi\n"
TYPO = "resources: {acelerators: A100:8}\nrun: nvidia-smi\nsetups: x\n"


@pytest.fixture
def skyspot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Skyspot:
    """The program in a new folder: exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    return console.in_process(monkeypatch, capsys)


def test_lint_names_each_file_line_and_rule_and_fails_on_errors(tmp_path: Path, skyspot: Skyspot) -> None:
    (tmp_path / "a.yaml").write_text(BAD_GPU)
    (tmp_path / "b.yaml").write_text("envs: {HF_TOKEN: hf_x}\nrun: nvidia-smi\n")
    code, out, _ = skyspot("lint", "a.yaml", "b.yaml")
    assert code == 1
    assert "a.yaml:1: error: " in out
    assert "[unknown-gpu]\n  Did you mean 'A100'?" in out
    assert "b.yaml:1: warning: " in out
    assert skyspot("lint", "b.yaml")[0] == 0


def test_lint_of_a_task_without_findings_says_so(tmp_path: Path, skyspot: Skyspot) -> None:
    (tmp_path / "a.yaml").write_text("run: nvidia-smi\n")
    assert skyspot("lint", "a.yaml") == (0, "No findings in 1 task.\n", "")
    assert skyspot("lint", "--gpus", "A100:8")[:2] == (0, "No findings in 1 task.\n")
    assert "[gpu-torch-cannot-use]" in skyspot("lint", "--gpus", "V100:8")[1]


def test_lint_goes_on_after_a_file_that_cannot_be_read(tmp_path: Path, skyspot: Skyspot) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff")
    (tmp_path / "b.yaml").write_text(BAD_GPU)
    code, out, err = skyspot("lint", "a.yaml", "b.yaml")
    assert (code, "b.yaml:1" in out, "Error: a.yaml" in err) == (1, True, True)
    assert skyspot("lint", "a.yaml")[0] == 2


def test_lint_names_the_rule_and_the_line_of_a_file_that_is_no_yaml(tmp_path: Path, skyspot: Skyspot) -> None:
    (tmp_path / "a.yaml").write_text("name: x\nrun: [\n")
    (tmp_path / "b.yaml").write_text(BAD_GPU)
    code, out, err = skyspot("lint", "a.yaml", "b.yaml", "--json")
    assert [(row["path"], row["name"]) for row in json.loads(out)] == [
        ("a.yaml", "not-yaml"),
        ("b.yaml", "unknown-gpu"),
    ]
    assert (code, err) == (1, "")
    code, out, err = skyspot("lint", "a.yaml")
    assert (code, err) == (1, "")
    assert out.startswith("a.yaml:2: error: this cannot be parsed as YAML: ")
    assert "[not-yaml]" in out


def test_a_file_whose_name_is_no_runs_is_told_what_it_is(tmp_path: Path, skyspot: Skyspot) -> None:
    (tmp_path / ".sky.yaml").write_text("jobs: {controller: {resources: {cpus: 4+}}}\n")
    for command in (["lint"], ["render"], ["launch", "--dryrun"]):
        code, out, err = skyspot(*command, ".sky.yaml")
        assert code
        assert ".sky.yaml:1: error: this is a file of SkyPilot settings" in out + err, command


def test_lint_takes_a_variable_that_a_launch_has_to_give_for_one_that_nobody_knows(
    tmp_path: Path, skyspot: Skyspot
) -> None:
    """CI has no value for it, and the file is right: `launch` asks for it."""
    (tmp_path / "my train.yaml").write_text(
        "envs:\n  BUCKET:\n  SCRIPT: null\nfile_mounts: {/c: {source: s3://$BUCKET}}\nrun: python $SCRIPT\n"
    )
    assert skyspot("lint", "my train.yaml") == (0, "No findings in 1 task.\n", "")
    (tmp_path / "two.yaml").write_text("envs: {A: }\nrun: echo\n---\nenvs: {B: null}\nrun: python $B\n")
    assert skyspot("lint", "two.yaml") == (0, "No findings in 1 task.\n", "")


def test_lint_as_json_has_the_code_of_each_rule(tmp_path: Path, skyspot: Skyspot) -> None:
    (tmp_path / "a.yaml").write_text(BAD_GPU)
    code, out, _ = skyspot("lint", "a.yaml", "--json")
    (row,) = json.loads(out)
    assert (code, row["path"], row["line"], row["level"], row["name"]) == (1, "a.yaml", 1, "error", "unknown-gpu")


def test_ignore_is_taken_from_the_command_line_and_from_settings(tmp_path: Path, skyspot: Skyspot) -> None:
    (tmp_path / "a.yaml").write_text(BAD_GPU)
    code, out, _ = skyspot("lint", "a.yaml", "--ignore", "unknown-gpu")
    assert code == 0
    assert re.fullmatch(r"a\.yaml:1: note: .* \(ignored\)\. \[unknown-gpu\]\n", out)
    (tmp_path / "skyspot.yaml").write_text("ignore: [unknown-gpu]\n")
    assert skyspot("lint", "a.yaml")[0] == 0
    (tmp_path / "a.yaml").write_text(f"nmae: x\n{BAD_GPU}")
    assert skyspot("lint", "a.yaml")[0] == 1
    assert skyspot("lint", "a.yaml", "--ignore", "unknown-key")[0] == 0, "the two add up"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("ignore: [unknown-gpus]", "ignore: there is no rule 'unknown-gpus'. Did you mean 'unknown-gpu'?"),
        ("strategy: fast", "strategy: 'fast' is not one of failover, eager_next_region"),
        ("num_nodes: 0", "num-nodes: 0 is not a valid number of nodes"),
    ],
)
def test_a_mistake_in_the_settings_is_blamed_on_them(tmp_path: Path, skyspot: Skyspot, setting: str, said: str) -> None:
    (tmp_path / "skyspot.yaml").write_text(f"{setting}\n")
    for beside in ([], ["--ignore", "unknown-key"]):
        assert skyspot("lint", "finetune", *beside) == (2, "", f"Error: skyspot.yaml: {said}\n")


@pytest.mark.parametrize("command", ["lint", "render", "launch"])
def test_an_unknown_code_is_refused_with_the_nearest(tmp_path: Path, skyspot: Skyspot, command: str) -> None:
    (tmp_path / "a.yaml").write_text(BAD_GPU)
    code, _, err = skyspot(command, "a.yaml", "--ignore", "unknown-gpus")
    assert code == 2
    assert err == "Error: --ignore: there is no rule 'unknown-gpus'. Did you mean 'unknown-gpu'?\n"


def test_the_rules_are_listed_from_the_one_registry(skyspot: Skyspot) -> None:
    code, out, _ = skyspot("lint", "--list")
    assert code == 0
    assert [line.partition(" ")[0] for line in out.splitlines()[::2]] == list(rules.CODES)
    assert [rule["code"] for rule in json.loads(skyspot("lint", "--list", "--json")[1])] == list(rules.CODES)


def test_the_table_in_the_docs_is_made_from_the_registry() -> None:
    assert rules.table() in (REPO / "docs" / "lint.md").read_text(), "docs/lint.md: put rules.table() there"


# -- render ------------------------------------------------------------------------------------------------------------


def test_render_refuses_unknown_keys_all_at_once_and_offline(tmp_path: Path, skyspot: Skyspot) -> None:
    (tmp_path / "mine.yaml").write_text(TYPO)
    code, out, err = skyspot("render", "mine.yaml")
    assert (code, out) == (2, "")
    assert "mine.yaml:1: error: unknown key 'acelerators' in resources. [unknown-key]" in err
    assert "Did you mean 'accelerators'?" in err
    assert "mine.yaml:3: error: unknown key 'setups'. [unknown-key]\n  Did you mean 'setup'?" in err


def test_render_of_a_file_that_is_no_task_says_what_it_is(tmp_path: Path, skyspot: Skyspot) -> None:
    (tmp_path / "compose.yaml").write_text("services: {web: {image: nginx}}\n")
    code, out, err = skyspot("render", "compose.yaml")
    assert (code, out) == (2, "")
    assert "compose.yaml:1: error: this is a docker-compose file, not a SkyPilot task" in err


def test_render_lets_pass_what_is_ignored_and_what_a_service_needs(tmp_path: Path, skyspot: Skyspot) -> None:
    (tmp_path / "mine.yaml").write_text(TYPO)
    code, out, err = skyspot("render", "mine.yaml", "--ignore", "unknown-key")
    assert (code, out) == (0, TYPO)
    assert "mine.yaml:1: note: " in err
    served = "service: {readiness_probe: /health}\nrun: vllm serve\n"
    (tmp_path / "serve.yaml").write_text(served)
    code, out, err = skyspot("render", "serve.yaml")
    assert (code, out) == (0, served)
    assert "Start it with `sky serve up`" in err


def test_lines_are_those_of_the_file_before_its_migration(tmp_path: Path, skyspot: Skyspot) -> None:
    old = (
        "resources:\n  ordered:\n    - {gpus: A100:8, spot_recovery: FAILOVER}\n    - {gpus: L4:8}\nrun: x\nsetups: y\n"
    )
    (tmp_path / "old.yaml").write_text(old)
    assert "old.yaml:6: error: unknown key 'setups'" in skyspot("render", "old.yaml")[2]
    assert "old.yaml:6: error: unknown key 'setups'" in skyspot("lint", "old.yaml")[1]


# -- rehearse ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The tasks for which a rehearsal would start machines; it starts none."""
    started: list[str] = []

    def rehearse(task: RehearsalTask, *_: object) -> Result:
        started.append(task.run)
        return Result(legs=[], notes=[], seconds=0.0)

    monkeypatch.setattr("skyspot.rehearsal.engine.rehearse", rehearse)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield started
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TYPO, "mine.yaml:1: error: unknown key 'acelerators' in resources. [unknown-key]"),
        ("run: x\nsetups: y\n", "mine.yaml:2: error: unknown key 'setups'. [unknown-key]\n  Did you mean 'setup'?"),
        ("run: x\nstorage: {/c: {name: n}}\n", "mine.yaml:2: error: unknown key 'storage'. [unknown-key]"),
        ("services: {web: {image: nginx}}\n", "mine.yaml:1: error: this is a docker-compose file, not a"),
        ("jobs: {controller: {resources: {cpus: 4+}}}\n", "mine.yaml:1: error: this is a file of SkyPilot settings"),
        ("name: v\ntype: k8s-pvc\nsize: 10Gi\ninfra: k8s\n", "mine.yaml:1: error: this is a volume, not a"),
        ("run: a\n---\nrun: b\nsetups: y\n", "mine.yaml:4: error: task 2: unknown key 'setups'. [unknown-key]"),
    ],
    ids=["resources", "top level", "storage", "compose", "settings", "volume", "pipeline"],
)  # fmt: skip
def test_rehearse_refuses_a_file_as_render_does_before_a_machine_starts(
    tmp_path: Path, skyspot: Skyspot, machines: list[str], text: str, said: str
) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    code, out, err = skyspot("rehearse", "mine.yaml")
    assert (code, out, machines) == (2, "", [])
    assert said in err
    assert skyspot("render", "mine.yaml") == (code, out, err)


def test_rehearse_lets_pass_what_is_ignored_and_what_a_service_needs(
    tmp_path: Path, skyspot: Skyspot, machines: list[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("run: x\nsetups: y  # skyspot: ignore[unknown-key]\n")
    (tmp_path / "serve.yaml").write_text("service: {readiness_probe: /health}\nrun: vllm serve\n")
    assert "mine.yaml:2: note: " in skyspot("rehearse", "mine.yaml", "--json")[2]
    assert "Start it with `sky serve up`" in skyspot("rehearse", "serve.yaml", "--json")[2]
    assert machines == ["x", "vllm serve"]


# -- launch ------------------------------------------------------------------------------------------------------------


def test_launch_goes_on_where_an_error_is_overruled(tmp_path: Path, skyspot: Skyspot) -> None:
    (tmp_path / "mine.yaml").write_text(BAD_GPU)
    with pytest.raises(SkyspotError, match=r"To submit it anyway: --ignore unknown-gpu$"):
        launch.refuse_errors(launch.prepare(Options(task="mine.yaml", name="x"), tmp_path))
    overruled = launch.prepare(Options(task="mine.yaml", name="x", ignore=("unknown-gpu",)), tmp_path)
    launch.refuse_errors(overruled)
    assert [finding.level for finding in overruled.findings] == ["note"]
    (tmp_path / "mine.yaml").write_text(BAD_GPU.replace("\n", "  # skyspot: ignore[unknown-gpu]\n", 1))
    launch.refuse_errors(launch.prepare(Options(task="mine.yaml", name="x"), tmp_path))


def test_a_file_that_skypilot_cannot_read_is_not_said_to_be_overruled(tmp_path: Path, skyspot: Skyspot) -> None:
    (tmp_path / "mine.yaml").write_text(TYPO)
    with pytest.raises(SkyspotError, match="unknown key 'acelerators'") as refused:
        launch.refuse_errors(launch.prepare(Options(task="mine.yaml", name="x"), tmp_path))
    assert "--ignore" not in str(refused.value)
