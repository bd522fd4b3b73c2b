"""skyspot render: from options to a task YAML that a person likes to read."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from support import REPO, clean_env
from support_sky import CATALOGS, run_sky

from skyspot.cli import main
from skyspot.errors import UsageError
from skyspot.lint import linter
from skyspot.task import buckets, gpus, ladder, render, started
from skyspot.task.options import Options
from trainer.layout.exit_codes import EXIT_PREEMPTED
from trainer.training import config

EXAMPLE = [
    "render", "finetune", "--gpus", "A100:8,A10G:8", "--prefer", "aws/us-east-1", "--on-demand-last",
    "--max-hourly-cost", "40", "--num-nodes", "2", "-n", "run-001", "--bucket", "s3://my-checkpoints",
    "--data", "s3://my-data", "--set", "model=Qwen/Qwen3-0.6B",
]  # fmt: skip


def skyspot(*args: str, cwd: Path, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The real program, in a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(REPO), "HOME": str(home or cwd)}
    return subprocess.run(
        [sys.executable, "-m", "skyspot", *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=60
    )


def rendered(folder: Path, *args: str) -> dict:
    done = skyspot("render", "-n", "run-001", *args, cwd=folder)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


def test_the_example_comes_out_as_its_golden_file(tmp_path: Path) -> None:
    done = skyspot(*EXAMPLE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    golden = (REPO / "tests" / "golden" / "finetune.yaml").read_text()
    assert done.stdout == golden
    lines = golden.splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 120


def test_the_ladder_goes_from_preferred_places_to_on_demand(tmp_path: Path) -> None:
    task = rendered(
        tmp_path, "--gpus", "A100:8,L4:8", "--prefer", "gcp/us-central1", "--prefer", "aws", "--on-demand-last"
    )
    assert task["resources"]["ordered"] == [
        {"accelerators": "A100:8", "use_spot": True, "infra": "gcp/us-central1"},
        {"accelerators": "A100:8", "use_spot": True, "infra": "aws"},
        {"accelerators": "A100:8", "use_spot": True},
        {"accelerators": "L4:8", "use_spot": True},
        {"accelerators": "A100:8", "use_spot": False},
    ]
    assert task["resources"]["job_recovery"] == {"strategy": "FAILOVER", "recover_on_exit_codes": [75]}


def test_one_rung_needs_no_ladder(tmp_path: Path) -> None:
    resources = rendered(tmp_path, "--gpus", "A100:8")["resources"]
    assert resources["accelerators"] == "A100:8"
    assert resources["use_spot"] is True
    assert "ordered" not in resources


def test_every_a100_is_two_rungs_and_one_is_hinted_at(tmp_path: Path) -> None:
    both = rendered(tmp_path, "--gpus", "A100*:8")["resources"]["ordered"]
    assert [rung["accelerators"] for rung in both] == ["A100:8", "A100-80GB:8", "A100-80GB-SXM:8"][: len(both)]
    assert len(both) >= 2
    hint = skyspot("render", "--gpus", "A100:8", cwd=tmp_path).stderr
    assert "A100-80GB" in hint
    assert "'A100*:8'" in hint


def test_slurm_knows_no_spot(tmp_path: Path) -> None:
    resources = rendered(tmp_path, "--infra", "slurm/lab/gpu")["resources"]
    assert "use_spot" not in resources
    assert resources["infra"] == "slurm/lab/gpu"


BUCKETS = [
    ("s3://b-1", "/checkpoints/run-001", {"source": "s3://b-1", "mode": "MOUNT"}),
    ("s3://b-1/team/x/", "/checkpoints/team/x/run-001", {"source": "s3://b-1", "mode": "MOUNT"}),
    ("gs://b-1/team", "/checkpoints/team/run-001", {"source": "gs://b-1", "mode": "MOUNT"}),
    ("r2://b-1", "/checkpoints/run-001", {"source": "r2://b-1", "mode": "MOUNT"}),
    (
        "https://account1.blob.core.windows.net/box/team",
        "/checkpoints/team/run-001",
        {"source": "https://account1.blob.core.windows.net/box", "mode": "MOUNT"},
    ),
]


@pytest.mark.parametrize(("bucket", "folder", "mount"), BUCKETS)
def test_a_bucket_is_mounted_at_its_root_and_a_prefix_becomes_a_folder(tmp_path: Path, bucket, folder, mount) -> None:
    task = rendered(tmp_path, "--bucket", bucket)
    assert task["file_mounts"]["/checkpoints"] == mount
    assert task["envs"]["SKYSPOT_CHECKPOINT_DIR"] == folder
    assert task["envs"]["SKYSPOT_MOUNT"] == "/checkpoints"


def test_a_bucket_that_is_a_path_mounts_nothing(tmp_path: Path) -> None:
    task = rendered(tmp_path, "--bucket", "/mnt/efs/")
    assert list(task["file_mounts"]) == ["~/skyspot/trainer"]
    assert task["envs"]["SKYSPOT_CHECKPOINT_DIR"] == "/mnt/efs/run-001"
    assert "SKYSPOT_MOUNT" not in task["envs"]


def test_without_a_bucket_skypilot_makes_one_with_the_same_name_each_time(tmp_path: Path) -> None:
    first, second = rendered(tmp_path), rendered(tmp_path)
    assert first["file_mounts"]["/checkpoints"]["name"].startswith("skyspot-")
    assert first["file_mounts"]["/checkpoints"] == second["file_mounts"]["/checkpoints"]
    assert "source" not in first["file_mounts"]["/checkpoints"]


def test_the_bucket_that_skypilot_makes_is_the_users_whatever_the_host_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGNAME", "Ada L.")
    monkeypatch.setenv("HOME", str(tmp_path / "ada"))
    name = buckets.default_bucket_name()
    assert re.fullmatch(r"skyspot-ada-l-[0-9a-f]{8}", name)
    renamed = os.uname_result(("Linux", "another-host", "6", "1", "x86_64"))
    monkeypatch.setattr(os, "uname", lambda: renamed)
    assert buckets.default_bucket_name() == name
    monkeypatch.setenv("HOME", str(tmp_path / "somebody-else"))
    assert buckets.default_bucket_name() != name
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    homeless = buckets.default_bucket_name()
    assert re.fullmatch(r"skyspot-ada-l-[0-9a-f]{8}", homeless)
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "a-third-host", "6", "1", "x86_64")))
    assert buckets.default_bucket_name() == homeless
    monkeypatch.setenv("LOGNAME", "ada-l")
    assert buckets.default_bucket_name() != homeless, "another user's, though it is spelled the same"


def test_data_in_a_bucket_is_mounted_read_only(tmp_path: Path) -> None:
    task = rendered(tmp_path, "--data", "s3://corpus/books")
    assert task["file_mounts"]["/data"]["config"] == {"mount": {"read_only": True}}
    assert task["envs"]["SKYSPOT_DATA"] == "/data/books"


def test_a_name_is_made_up_and_printed(tmp_path: Path) -> None:
    one, two = (skyspot("render", cwd=tmp_path) for _ in range(2))
    assert "Run name: " in one.stderr
    assert one.stdout != two.stdout


def test_flags_beat_skyspot_yaml_which_beats_the_template(tmp_path: Path) -> None:
    (tmp_path / "skyspot.yaml").write_text(
        "bucket: s3://from-file\ngpus: L4:1\nset: {max_steps: 7, lr: 1e-4}\nenv: {A: 1, B: two}\nprefer: [aws]\n"
    )
    task = rendered(tmp_path, "--gpus", "A10G:2", "--set", "max_steps=9", "--env", "B=three")
    assert task["file_mounts"]["/checkpoints"]["source"] == "s3://from-file"
    assert task["resources"]["ordered"][0] == {"accelerators": "A10G:2", "use_spot": True, "infra": "aws"}
    assert (task["envs"]["SKYSPOT_MAX_STEPS"], task["envs"]["SKYSPOT_LR"]) == ("9", "0.0001")
    assert (task["envs"]["A"], task["envs"]["B"]) == ("1", "three")
    assert task["envs"]["SKYSPOT_GLOBAL_BATCH_SIZE"] == "8"


def test_env_files_and_the_environment_give_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vars.env").write_text("ONE=1\nTWO='a b'\n")
    monkeypatch.setenv("FROM_HERE", "x y")
    envs = rendered(tmp_path, "--env-file", "vars.env", "--env", "TWO=2", "--env", "FROM_HERE")["envs"]
    assert (envs["ONE"], envs["TWO"], envs["FROM_HERE"]) == ("1", "2", "x y")


def test_a_secret_is_written_by_name_alone(tmp_path: Path) -> None:
    done = skyspot("render", "-n", "r", "--secret", "HF_TOKEN=hunter2", "-o", ".", cwd=tmp_path)
    assert done.returncode == 0
    text = (tmp_path / ".skyspot" / "r.yaml").read_text()
    assert yaml.safe_load(text)["secrets"] == {"HF_TOKEN": None}
    assert "hunter2" not in text + done.stdout + done.stderr


def test_the_command_template_runs_any_command_and_does_not_recover_on_75(tmp_path: Path) -> None:
    task = rendered(tmp_path, "command", "--set", 'command=python train.py --out "$SKYSPOT_CHECKPOINT_DIR"')
    assert task["resources"]["job_recovery"] == {"strategy": "FAILOVER"}
    assert task["envs"]["SKYSPOT_COMMAND"] == 'python train.py --out "$SKYSPOT_CHECKPOINT_DIR"'
    assert "train.py" not in task["run"]
    missing = skyspot("render", "command", cwd=tmp_path)
    assert missing.returncode == 2
    assert "--set command=" in missing.stderr


def test_a_script_is_started_by_skyspots_launcher_in_so_many_processes(tmp_path: Path) -> None:
    for command in ("train.py --lr '1 2'", "python train.py --lr '1 2'"):
        given = ("command", "--set", f"command={command}", "--set", "processes=8")
        task = rendered(tmp_path, *given)
        assert task["envs"]["SKYSPOT_COMMAND"] == "python -m trainer.launch --processes 8 train.py --lr '1 2'"
        assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
        assert task["file_mounts"]["~/skyspot/trainer"] == ".skyspot/run-001/trainer"
        assert "SKYSPOT_PROCESSES" not in task["envs"], "a rehearsal sets it"
    assert skyspot("render", *given, "-n", "run-001", "-o", ".", cwd=tmp_path).returncode == 0
    assert (tmp_path / ".skyspot" / "run-001" / "trainer" / "launch" / "__main__.py").exists()
    everywhere = rendered(tmp_path, *given[:3], "--set", "processes=auto")
    assert everywhere["envs"]["SKYSPOT_COMMAND"] == "python -m trainer.launch train.py --lr '1 2'"
    own = rendered(tmp_path, "command", "--set", "command=python -m trainer.launch train.py")
    assert own["file_mounts"].keys() == task["file_mounts"].keys(), "the command itself asks for the launcher"


@pytest.mark.parametrize(
    ("command", "text", "beside", "is_shipped"),
    [
        ("python src/train.py --lr 1", "import os\nfrom trainer import SpotRun\n", "", True),
        ("python src/train.py", "from trainer.hf import SpotCallback\n", "", True),
        ("python src/train.py", "from trainers import x\n", "", False),
        ("python src/train.py", "from trainer import Trainer\n", "trainer.py", False),
        ("python src/other.py", "from trainer import SpotRun\n", "", False),
    ],
)
def test_a_command_gets_the_trainer_that_its_script_imports(
    tmp_path: Path, command: str, text: str, beside: str, is_shipped: bool
) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "train.py").write_text(text)
    if beside:
        (tmp_path / "src" / beside).touch()
    made = render.from_template(Options(task="command", parameters={"workdir": str(tmp_path), "command": command}))
    assert made.trainer == is_shipped
    assert ("recover_on_exit_codes: [75]" in made.text) == is_shipped


def test_the_command_imports_the_trainer_that_was_shipped(tmp_path: Path) -> None:
    given = ("render", "command", "--set", "command=train.py", "--set", "processes=2", "-n", "run-001", "-o", ".")
    assert skyspot(*given, cwd=tmp_path).returncode == 0
    task = yaml.safe_load((tmp_path / ".skyspot" / "run-001.yaml").read_text())
    (tmp_path / "skyspot").mkdir()
    (tmp_path / task["file_mounts"]["~/skyspot/trainer"]).rename(tmp_path / "skyspot" / "trainer")
    (tmp_path / "train.py").write_text("import os, trainer\nprint(os.environ['RANK'], trainer.__file__)\n")
    env = {name: text for name, text in clean_env().items() if name != "PYTHONPATH"}
    env |= {"HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
    env |= {"SKYSPOT_COMMAND": task["envs"]["SKYSPOT_COMMAND"], "SKYSPOT_CHECKPOINT_DIR": str(tmp_path / "run")}
    done = subprocess.run(["bash", "-c", task["run"]], cwd=tmp_path, env=env, capture_output=True, text=True)
    shipped = tmp_path / "skyspot" / "trainer" / "__init__.py"
    assert sorted(done.stdout.splitlines()) == [f"0 {shipped}", f"1 {shipped}"], done.stderr


@pytest.mark.parametrize(
    ("command", "processes", "message"),
    [
        ("train.py", "0", "'0' is neither a number of processes nor `auto`"),
        ("train.py", "many", "'many' is neither a number of processes nor `auto`"),
        (
            "torchrun train.py",
            "2",
            "must be that script and its arguments (train.py --lr 0.1), not 'torchrun train.py'",
        ),
        ("python -m train", "2", "must be that script and its arguments"),
    ],
)
def test_only_a_script_is_started_in_several_processes(command: str, processes: str, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        started.launched(command, processes)
    assert message in str(refused.value)


def test_the_length_of_samples_is_passed_on_only_if_it_is_given(tmp_path: Path) -> None:
    assert rendered(tmp_path)["envs"]["SKYSPOT_SEQ_LEN"] == ""
    run = rendered(tmp_path, "--set", "seq_len=64")["run"].replace("~/skyspot/python -m trainer", "printf '%s '")
    script = run.replace("cd ~/skyspot", "true").replace("exec ", "")
    for value, passed in (("64", True), ("", False)):
        env = {**os.environ, "SKYSPOT_SEQ_LEN": value}
        printed = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env).stdout
        assert ("--seq-len 64 --lr" in printed) == passed, printed
        assert ("--seq-len" in printed) == passed
    for wrong in ("0", "-1", "many", "1.5"):
        with pytest.raises(UsageError, match="--set seq_len"):
            render.from_template(Options(name="run-001", bucket="s3://mine", parameters={"seq_len": wrong}))


def test_trackers_are_passed_on_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    task = rendered(tmp_path, "--set", "report_to=tensorboard")
    assert task["envs"]["SKYSPOT_REPORT_TO"] == "tensorboard"
    script = task["run"].replace("~/skyspot/python -m trainer", "printf '%s '")
    script = script.replace("cd ~/skyspot", "true").replace("exec ", "")
    for value, passed in (("tensorboard", "--report-to tensorboard "), ("", "")):
        env = {**os.environ, "SKYSPOT_REPORT_TO": value}
        printed = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env).stdout
        assert printed.partition("--save-every ")[2].lstrip() == passed, printed
    assert render.TRACKERS == config.TRACKERS
    with pytest.raises(UsageError, match="--set report_to: 'board' is none of tensorboard"):
        render.from_template(Options(name="r", bucket="s3://mine", parameters={"report_to": "tensorboard, board"}))


def test_setup_and_run_are_the_same_whatever_is_asked_for(tmp_path: Path) -> None:
    plain, other = rendered(tmp_path), rendered(tmp_path, "--set", "model=x", "--data", "/d", "--env", "A=$(id)")
    assert (plain["run"], plain["setup"]) == (other["run"], other["setup"])


# -- writing ---------------------------------------------------------------------------------------------------------


def test_o_writes_the_yaml_and_the_trainer_beside_it(tmp_path: Path) -> None:
    done = skyspot("render", "-n", "r", "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    task = yaml.safe_load((tmp_path / "out" / ".skyspot" / "r.yaml").read_text())
    payload = tmp_path / "out" / task["file_mounts"]["~/skyspot/trainer"]
    assert {"setup.sh", "requirements.lock", ".skyignore", "__main__.py"} <= {path.name for path in payload.iterdir()}
    assert not list(payload.rglob("__pycache__"))
    assert "sky jobs launch" in done.stderr


def test_a_file_that_was_edited_by_hand_is_never_overwritten(tmp_path: Path) -> None:
    assert skyspot("render", "-n", "r", "-o", ".", cwd=tmp_path).returncode == 0
    path = tmp_path / ".skyspot" / "r.yaml"
    assert skyspot("render", "-n", "r", "-o", ".", "--gpus", "L4:1", cwd=tmp_path).returncode == 0
    assert "L4:1" in path.read_text(), "what nobody touched is written anew"
    path.write_text(path.read_text().replace("L4:1", "L4:2"))
    refused = skyspot("render", "-n", "r", "-o", ".", cwd=tmp_path)
    assert refused.returncode == 1
    assert "edited by hand" in refused.stderr
    assert "L4:2" in refused.stderr, "the diff"
    assert "L4:2" in path.read_text()


def test_the_payload_stays_as_it_was_for_a_resume(tmp_path: Path) -> None:
    assert skyspot("render", "-n", "r", "-o", ".", cwd=tmp_path).returncode == 0
    kept = tmp_path / ".skyspot" / "r" / "trainer" / "training" / "order.py"
    kept.write_text("# mine\n")
    assert skyspot("render", "-n", "r", "-o", ".", "--gpus", "L4:1", cwd=tmp_path).returncode == 0
    assert kept.read_text() == "# mine\n"


def test_json_says_name_notes_and_yaml(tmp_path: Path) -> None:
    done = skyspot("render", "-n", "r", "--json", cwd=tmp_path)
    document = json.loads(done.stdout)
    assert document["name"] == "r"
    assert yaml.safe_load(document["yaml"])["name"] == "r"


# -- a YAML of the user's own ----------------------------------------------------------------------------------------

OWN = """\
# my task
name: mine   # a name
resources:
  accelerators: V100:1   # old
  disk_size: 100

envs:
  A: "1"  # first

run: |
  echo $A
"""


def test_a_plain_yaml_is_printed_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(OWN)
    assert skyspot("render", "task.yaml", cwd=tmp_path).stdout == OWN


def test_in_a_plain_yaml_only_what_was_asked_for_changes(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(OWN)
    done = skyspot(
        "render", "task.yaml", "--env", "A=2", "--env", "B=x: y", "-n", "other", "--gpus", "A100:8,L4:8",
        "--secret", "T", "--strategy", "eager_next_region", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    task = yaml.safe_load(done.stdout)
    assert task["name"] == "other"
    assert task["envs"] == {"A": "2", "B": "x: y"}
    assert task["secrets"] == {"T": None}
    assert task["resources"]["disk_size"] == 100
    assert "accelerators" not in task["resources"]
    assert [rung["accelerators"] for rung in task["resources"]["ordered"]] == ["A100:8", "L4:8"]
    assert task["resources"]["job_recovery"] == {"strategy": "EAGER_NEXT_REGION"}
    assert "# my task" in done.stdout
    assert "# a name" in done.stdout
    assert "# first" in done.stdout


def test_in_a_plain_yaml_other_options_are_refused(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(OWN)
    for option in (["--bucket", "s3://bbb"], ["--set", "lr=1"], ["--data", "x"], ["--save-every", "5"]):
        done = skyspot("render", "task.yaml", *option, cwd=tmp_path)
        assert done.returncode == 2, option
        assert option[0] in done.stderr
        assert len(done.stderr.splitlines()) <= 2


# -- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = [
    (["rendr"], "render"),
    (["render", "--gpu", "A100:8"], "--gpus"),
    (["render", "finetun"], "finetune"),
    (["render", "--set", "max_step=3"], "max_steps"),
    (["render", "--set", "max_steps=many"], "whole number"),
    (["render", "--set", "lr=nan"], "number"),
    (["render", "--set", "lr"], "KEY=VALUE"),
    (["render", "--gpus", "A1000:8"], "A100"),
    (["render", "--gpus", "H10:8"], "H100"),
    (["render", "--gpus", "A100:0"], "NAME:COUNT"),
    (["render", "--gpus", ""], "NAME:COUNT"),
    (["render", "--bucket", "s3://UPPER"], "neither a bucket"),
    (["render", "--bucket", "relative/path"], "absolute"),
    (["render", "--bucket", "s3://bbb/../x"], "cannot contain"),
    (["render", "--bucket", "s3://bbb/$HOME"], "neither a bucket"),
    (["render", "-n", "../x"], "--name"),
    (["render", "--infra", "aws us"], "--infra"),
    (["render", "--prefer", "awss/us-east-1"], "Did you mean 'aws'?"),
    (["render", "--bucket", "my_bucket"], "nor a bucket's name"),
    (["render", "--set", "nope=1"], "`skyspot templates show finetune` lists"),
    (["render", "--max-spend", "much"], "--max-spend: 'much' is neither an amount in USD (25) nor `none`"),
    (["render", "--deadline", "soon"], "'soon' is neither a time (2026-12-01T08:00), a duration (12h, 2d), nor `none`"),
    (["render", "--save-every", "often"], "nor `auto`"),
    (["render", "--save-every", "0"], "nor `auto`"),
    (["render", "--env", "1X=3"], "--env"),
    (["render", "--env", "SKYPILOT_X=3"], "reserved for SkyPilot"),
    (["render", "--env", "NOT_SET_ANYWHERE_HERE"], "KEY=VALUE"),
    (["render", "--env-file", "missing.env"], "no such file"),
    (["render", "missing.yaml"], "No such file"),
    (["render", "missing.yaml.j2"], "No such file"),
    (["render", "--on-demand-last", "--no-use-spot"], "--on-demand-last"),
    (["render", "--max-hourly-cost", "-3"], "--max-hourly-cost"),
    (["templates", "show", "finetun"], "finetune"),
    (["templates", "lst"], "list"),
]


@pytest.mark.parametrize(
    ("args", "remedy"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_is_said_in_a_line_with_its_remedy(tmp_path: Path, args: list[str], remedy: str, monkeypatch) -> None:
    code, output = in_process(args, tmp_path, monkeypatch)
    assert code == 2, output
    assert remedy in output
    assert output.startswith("Error: ")
    assert len(output.strip().splitlines()) <= 2
    assert "Traceback" not in output


def in_process(args: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """`skyspot ARGS` through its main(), in a folder; (exit status, what it wrote to stderr)."""
    import io

    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setattr(sys, "argv", ["skyspot", *args])
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    try:
        main.main()
    except SystemExit as leaving:
        return int(leaving.code or 0), errors.getvalue()
    return 0, errors.getvalue()


BROKEN_YAML = [
    ("a: 1\na: 2\nrun: x\n", "duplicate key"),
    ("- a\n- b\n", "mapping"),
    ("a: [1\n", "not readable"),
    ("a: 1\n---\n- b\n", "mapping"),
    ("name: x\n---\n", "no task"),
]


@pytest.mark.parametrize(("text", "remedy"), BROKEN_YAML)
def test_a_broken_yaml_is_refused_with_its_place(tmp_path: Path, text: str, remedy: str, monkeypatch) -> None:
    (tmp_path / "task.yaml").write_text(text)
    code, output = in_process(["render", "task.yaml"], tmp_path, monkeypatch)
    assert code == 2
    assert "task.yaml" in output
    assert remedy in output


BROKEN_SETTINGS = [
    ("bukcet: s3://bbb\n", "bucket"),
    ("gpus: [1, 2]\n", "gpus"),
    ("max_spent: 3\n", "unknown key 'max_spent'. Did you mean 'max_spend'?"),
    ("gpus: A100:1\nname: a\ngpus: L4:1\n", "line 3: duplicate key 'gpus' (first on line 1)"),
    ("- x\n", "by name"),
    ("secret: {A: b}\n", "must not contain secret values"),
    ("num_nodes: two\n", "num_nodes"),
]


@pytest.mark.parametrize(("text", "remedy"), BROKEN_SETTINGS)
def test_a_mistake_in_skyspot_yaml_is_refused(tmp_path: Path, text: str, remedy: str, monkeypatch) -> None:
    (tmp_path / "skyspot.yaml").write_text(text)
    code, output = in_process(["render"], tmp_path, monkeypatch)
    assert code == 2, output
    assert "skyspot.yaml" in output
    assert remedy in output


def test_the_code_to_recover_on_is_the_trainers() -> None:
    assert ladder.RECOVER == EXIT_PREEMPTED


def test_a_trainer_py_of_the_users_own_is_never_run_or_shipped(tmp_path: Path) -> None:
    (tmp_path / "trainer.py").write_text("raise SystemExit('mine ran')\n")
    done = skyspot("render", "-n", "r", "-o", ".", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ".skyspot" / "r" / "trainer" / "layout" / "names.py").exists()
    (tmp_path / "trainer.py").write_text("")
    refused = skyspot("rehearse", cwd=tmp_path)
    assert refused.returncode == 2
    assert "hides skyspot's package" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


# -- templates -------------------------------------------------------------------------------------------------------


def run_cli(*args: str) -> Result:
    return CliRunner().invoke(main.cli, list(args))


def test_templates_are_listed_and_shown_with_their_parameters() -> None:
    listed = run_cli("templates", "list").output
    assert "finetune" in listed
    assert "command" in listed
    shown = run_cli("templates", "show", "finetune").output
    assert "max_steps" in shown
    assert "total optimizer steps" in shown


def test_an_ejected_template_is_found_first_and_says_where_it_came_from(tmp_path: Path) -> None:
    assert skyspot("templates", "eject", "finetune", cwd=tmp_path).returncode == 0
    mine = tmp_path / "templates" / "finetune.yaml.j2"
    assert "ejected from skyspot 0.1.0" in mine.read_text().splitlines()[0]
    mine.write_text(mine.read_text().replace("cd ~/skyspot", "cd ~/skyspot  # mine"))
    assert "# mine" in rendered(tmp_path)["run"]
    again = skyspot("templates", "eject", "finetune", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists already" in again.stderr


def test_a_template_that_uses_an_undeclared_name_is_refused(tmp_path: Path) -> None:
    head = "{#- parameters\nabout: x\ntrainer: false\n-#}\n"
    (tmp_path / "x.yaml.j2").write_text(f"{head}name: {{{{ nmae }}}}\n")
    done = skyspot("render", "x.yaml.j2", cwd=tmp_path)
    assert done.returncode == 2
    assert "nmae" in done.stderr
    (tmp_path / "y.yaml.j2").write_text("name: x\n")
    assert "declares its parameters" in skyspot("render", "y.yaml.j2", cwd=tmp_path).stderr


def test_names_of_accelerators_are_matched_whatever_their_case() -> None:
    assert str(gpus.parse("a100-80gb:4")[0][0]) == "A100-80GB:4"


def test_a_rendered_text_knows_whether_it_was_edited() -> None:
    text = render.from_template(Options(name="r")).text
    assert not render.edited_by_hand(text)
    assert render.edited_by_hand(text.replace("tiny", "huge"))


# -- what SkyPilot says ------------------------------------------------------------------------------------------------

LADDERS = [
    [*kinds, *prefer, *infra, *spot, *cost, *strategy]
    for kinds, prefer, infra, spot, cost, strategy in itertools.product(
        [[], ["--gpus", "A100:8"], ["--gpus", "A100:8,A10G:8"], ["--gpus", "A100*:8"]],
        [[], ["--prefer", "aws/us-east-1"], ["--prefer", "aws/us-east-1", "--prefer", "gcp/us-central1"]],
        [[], ["--infra", "aws"], ["--infra", "gcp/us-central1"]],
        [[], ["--no-use-spot"], ["--on-demand-last"]],
        [[], ["--max-hourly-cost", "40"]],
        [[], ["--strategy", "eager_next_region"]],
    )
]
SKY = (
    CATALOGS
    + """
import sys
from click.testing import CliRunner
import json
from sky.utils import dag_utils
from skyspot.cli import main as cli
os.chdir(home)
count = 0
for args in json.loads(sys.stdin.read()):
    name = f"run-{count:04d}"
    done = CliRunner().invoke(cli.cli, ["render", *args, "-n", name, "-o", "."], catch_exceptions=False)
    assert done.exit_code == 0, (args, done.output)
    text = (home / ".skyspot" / f"{name}.yaml").read_text()
    dag = dag_utils.load_dag_from_yaml_str(text, secrets_overrides=[("TOKEN", "x")] if "--secret" in args else None)
    for task in dag.tasks:
        task.validate()
    count += 1
print("validated", count)
"""
)


@pytest.mark.parametrize(
    "nth", [pytest.param(1, marks=pytest.mark.slow(40)), 25], ids=["every combination", "one in twenty-five"]
)
def test_skypilot_takes_every_template_under_every_combination_of_ladder_options(tmp_path: Path, nth: int) -> None:
    combinations = []
    for args in LADDERS:
        if "--infra" in args and "--prefer" in args and ("gcp/us-central1" in args or args.count("--prefer") == 2):
            continue  # A preferred place outside of --infra is refused.
        combinations.append(["finetune", *args])
        combinations.append(["command", "--set", "command=true", *args])
    command = ["command", "--set", "command=true"]
    for bucket in [*(bucket for bucket, _, _ in BUCKETS), "/mnt/efs", "by-its-name"]:
        combinations += [["finetune", "--bucket", bucket], [*command, "--bucket", bucket]]
    for place in ("lambda", "k8s", "slurm", "aws/us-east-1/us-east-1a"):
        combinations += [["finetune", "--gpus", "A100:8", "--infra", place], [*command, "--prefer", place]]
    combinations += [
        ["finetune", "--data", "s3://corpus/x"],
        ["finetune", "--secret", "TOKEN"],
        ["finetune", "--num-nodes", "2"],
    ]
    combinations += [["finetune", "--env", "NO=1", "--env", "null=2"], ["finetune", "--max-hourly-cost", "0.0000001"]]
    combinations = combinations[::nth]
    printed = run_sky(SKY, tmp_path, combinations)
    assert printed.strip().endswith(f"validated {len(combinations)}")


def test_skypilot_refuses_what_we_would_never_write(tmp_path: Path) -> None:
    """The check above can fail: an old spelling does not pass it."""
    old = "resources: {spot_recovery: failover}"
    code = f"from sky.utils import dag_utils\ndag_utils.load_dag_from_yaml_str({old!r})"
    env = {**os.environ, "HOME": str(tmp_path), "SKY_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "spot_recovery" in done.stderr


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("A1OO", "A100"), ("a1oo", "A100"), ("AlOO", "A100"), ("H1O0", "H100"), ("HI00", "H100"), ("A1000", "A100"),
        ("A-100", "A100"), ("A100_80GB", "A100-80GB"), ("A10080GB", "A100-80GB"), ("L4O", "L40"), ("L4OS", "L40S"),
        ("VI00", "V100"), ("T04", "T4"), ("RTX409O", "RTX4090"), ("RTX-4090", "RTX4090"), ("tpu-v5p-l6", "tpu-v5p-8"),
        ("H2OO", "H200"), ("AlOG", "A10G"), ("MI30OX", "MI300X"),
        ("A100-40GB", "A100"), ("A100-40G", "A100"), ("V100-16GB", "V100"),
    ],
)  # fmt: skip
def test_the_nearest_accelerator_is_the_one_that_looks_like_it(written: str, meant: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"Did you mean '{meant}'?")):
        gpus.parse(f"{written}:8")
    # SkyPilot looks no TPU up: lint leaves them alone.
    expected = [] if written.startswith("tpu-") else [f"Did you mean '{meant}'?"]
    found = linter.findings(f"resources: {{accelerators: '{written}:8', infra: aws}}\n")
    assert [finding.remedy for finding in found] == expected


@pytest.mark.parametrize("written", ["quantum", "MYGPU", "XYZ", "nvidia"])
def test_what_is_near_to_no_accelerator_gets_no_guess(written: str) -> None:
    with pytest.raises(UsageError) as refused:
        gpus.parse(f"{written}:8")
    assert "Did you mean" not in str(refused.value)


def test_a_name_longer_than_any_accelerators_is_compared_with_none() -> None:
    with pytest.raises(UsageError, match="unknown accelerator") as refused:
        gpus.parse("A1" * 50_000)
    assert "Did you mean" not in str(refused.value)
