"""What importing costs, and in which direction it goes: `make lint` holds the directions, here faults are planted."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPO, clean_env

HEAVY = {"torch", "sky", "transformers", "accelerate", "numpy", "rich", "psutil", "jinja2", "yaml", "matplotlib"}


HELP = """
from skyspot.cli.main import cli
cli(["--help"], standalone_mode=False)"""


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean_env(), check=True)
    return set(done.stdout.split())


def test_the_command_line_loads_nothing_heavy() -> None:
    for statement in ("import skyspot.cli.main", HELP):
        loaded = loaded_by(statement)
        assert "click" in loaded
        assert not loaded & HEAVY


def test_rendering_and_rehearsing_load_neither_torch_nor_sky() -> None:
    loaded = loaded_by("import skyspot.task.render, skyspot.task.payload, skyspot.cli.rehearse")
    assert not loaded & {"torch", "sky", "transformers", "accelerate", "numpy"}


def test_checkpoints_are_verified_without_torch_and_without_sky() -> None:
    loaded = loaded_by("import skyspot.cli.checkpoints, trainer.bucket.verify")
    assert {"rich", "xxhash"} <= loaded
    assert not loaded & {"torch", "sky", "transformers", "accelerate", "numpy", "yaml", "upath", "fsspec"}


def test_a_template_is_rendered_without_what_a_plain_yaml_needs() -> None:
    code = (
        "from skyspot.cli.main import main\n"
        "import sys\n"
        "sys.argv = ['skyspot', 'render', '--gpus', 'A100:8', '-n', 'run-001']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(*sorted(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean_env(), check=True)
    loaded = set(done.stderr.split())
    assert "jinja2" in loaded
    assert not loaded & {
        "skyspot.migrate.migration",
        "skyspot.migrate.rungs",
        "skyspot.task.edits",
        "skyspot.task.shell",
        "skyspot.lint.linter",
    }


STANDARD_LIBRARY_ALONE = (
    "layout.accelerators",
    "layout.documents",
    "layout.events",
    "layout.exit_codes",
    "layout.identity",
    "layout.lifetime",
    "launch.exits",
    "launch.process_count",
    "launch.supervisor",
    "launch.link",
    "launch.sidecar",
    "launch.sidecar_client",
    "attempt.binding",
    "attempt.history",
    "attempt.identity",
    "notices.received",
    "attempt.record",
    "bucket.deadlines",
    "bucket.mounts",
    "bucket.presence",
    "bucket.retry",
    "machine.home",
    "machine.scratch",
)


@pytest.mark.parametrize("module", STANDARD_LIBRARY_ALONE)
def test_what_runs_before_torch_is_loaded_needs_the_standard_library_alone(module: str) -> None:
    more = loaded_by(f"import trainer.{module}") - set(sys.stdlib_module_names) - {"trainer", "__main__"}
    assert {name for name in more if not name.startswith(("_", "sitecustomize", "usercustomize"))} == set()


def test_the_trainers_public_names_load_at_their_first_use() -> None:
    assert "torch" not in loaded_by(
        "import trainer; assert set(trainer.__all__) == {'CheckpointManager', 'RunConfig', 'SpotRun'}"
    )
    assert "yaml" not in loaded_by("import trainer.layout")
    assert not {"torch", "yaml"} & loaded_by("from trainer import CheckpointManager, RunConfig, SpotRun")
    names = "from trainer.training.config import RunConfig as one\nfrom trainer import RunConfig as other\n"
    loaded_by(f"{names}assert one is other\nimport trainer\nassert not hasattr(trainer, 'Run')")


TRAINER_WINGS = "The trainer's wings: each imports only what stands below it"
SKYSPOT_WINGS = "skyspot's wings: each imports only what stands below it"
OF_THE_TRAINER = "Of the trainer, skyspot imports the contract and verify"
RENDERING = "Rendering imports nothing of the trainer"
STAYS_SMALL = "What skyspot imports of the trainer stays small"
NO_SKYSPOT = "The trainer never imports skyspot"
ONE_SKY = "One module imports sky"
NO_CIRCLE = "No module imports itself by way of others"
FOUR_YAML = "YAML is read in four modules"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "statement", "contract"),
    [
        ("trainer/layout/names.py", "from trainer.bucket import hashing", TRAINER_WINGS),
        ("trainer/checkpoint/saving.py", "def late():\n    from trainer.training import loop", TRAINER_WINGS),
        ("trainer/bucket/verify.py", "import trainer.attempt", TRAINER_WINGS),
        ("trainer/ranks/heartbeat.py", "from skyspot import errors", NO_SKYSPOT),
        ("skyspot/task/gpus.py", "from skyspot.lint import rules", SKYSPOT_WINGS),
        ("skyspot/runs/location.py", "from trainer.training.run import SpotRun", OF_THE_TRAINER),
        ("skyspot/runs/location.py", "from trainer.machine import home", OF_THE_TRAINER),
        ("skyspot/runs/location.py", "def late():\n    import trainer", OF_THE_TRAINER),
        ("skyspot/task/ladder.py", "from trainer.layout import exit_codes", RENDERING),
        ("trainer/bucket/verify.py", "from trainer.bucket import retry", STAYS_SMALL),
        ("trainer/extra.py", "", TRAINER_WINGS),
        ("skyspot/extra.py", "", SKYSPOT_WINGS),
        ("skyspot/runs/location.py", "def late():\n    import sky", ONE_SKY),
        ("skyspot/task/gpus.py", "def late():\n    from skyspot.task import ladder", NO_CIRCLE),  # It imports gpus.
        ("trainer/layout/names.py", "from trainer.layout import manifest", NO_CIRCLE),  # It imports names.
        ("skyspot/task/payload.py", "import yaml", FOUR_YAML),
        ("skyspot/runs/location.py", "def late():\n    from yaml import safe_load", FOUR_YAML),
    ],
)
def test_an_import_in_the_wrong_direction_or_a_wing_without_a_place_fails_lint(
    tmp_path: Path, module: str, statement: str, contract: str
) -> None:
    for name in ("skyspot", "trainer"):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPO / name, tmp_path / name, ignore=skip, copy_function=os.symlink)
    shutil.copy(REPO / "pyproject.toml", tmp_path)
    before = (REPO / module).read_text() if (REPO / module).exists() else ""
    (tmp_path / module).unlink(missing_ok=True)
    (tmp_path / module).write_text(f"{before}\n\n{statement}\n")
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    env = {**clean_env(), "PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{contract} BROKEN" in done.stdout
    path = ".".join(Path(module).with_suffix("").parts)
    # Of a circle, the package is named, and the modules within it.
    assert (f".{Path(module).stem}" if contract == NO_CIRCLE else path) in done.stdout
