"""Every command in README runs; what its demo prints is compared in test_rehearse.py."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import faultfs
import pytest
from support import PROGRAMS, REPO, clean_env
from support_sky import CATALOGS, run_commands

from trainer.attempt.ending import ENDINGS, Hold
from trainer.layout.exit_codes import EXIT_DONE, EXIT_PREEMPTED, EXIT_USAGE
from trainer.training.config import RunConfig

README = (REPO / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
SH = "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)).splitlines()


def as_case(block: str) -> object:
    """A block of commands; one that starts the bundled trainer is slow, and test_trainer.py has a quick form of it."""
    marks = [pytest.mark.slow] if "python -m trainer " in block else []
    return pytest.param(block, marks=marks, id=block.splitlines()[0][:60])


@pytest.mark.parametrize("block", [*map(as_case, BLOCKS)])
def test_a_block_of_commands_runs_as_it_stands(tmp_path: Path, block: str) -> None:
    if "skyspot rehearse my-task.yaml" in block and (reason := faultfs.missing()):
        pytest.skip(reason)
    (tmp_path / "my-task.yaml").write_text(
        "name: own\nenvs: {OUT: /checkpoints/own, STEPS: '40'}\n"
        f"file_mounts:\n  /checkpoints: {{name: mine, mode: MOUNT}}\n  ~/code/counter.py: {PROGRAMS}/counter.py\n"
        "run: python ~/code/counter.py\n"
    )
    scripts = str(Path(sys.executable).parent)
    env = clean_env(PATH=f"{scripts}:{os.environ['PATH']}", HOME=str(tmp_path / "home"), OMP_NUM_THREADS="1")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_command_that_talks_to_skypilot_or_a_bucket_runs_as_far_as_it_gets_here(
    tmp_path: Path, half: Path, bucket: Path
) -> None:
    """In a project as README describes it, without a SkyPilot that answers: `make e2e` has one."""
    project, home, mine = tmp_path / "project", tmp_path / "home", bucket.parent / "my-checkpoints"
    for folder in (project, home, mine):
        folder.mkdir()
    (project / "train.py").touch()
    (project / "tutorial.yaml").write_text(
        "name: tutorial\nworkdir: .\nresources: {accelerators: 'A100:8', use_spot: true, spot_recovery: failover}\n"
        "file_mounts:\n  /checkpoints: {name: my-checkpoints, mode: MOUNT}\nrun: python train.py --out /checkpoints\n"
    )
    (project / "my-task.yaml").write_text("name: own\nresources: {accelerators: 'A100:8'}\nrun: python train.py\n")
    render = "render --gpus A100:8,A10G:8 --on-demand-last --bucket s3://my-checkpoints -n run-001 -o ."
    lines = [render, *(line.removeprefix("skyspot ") for line in SH)]
    of_a_run = [line for line in lines if line.startswith(("checkpoints", "report"))]
    others = [line for line in lines if line not in of_a_run]
    given = [[*shlex.split(line), *(["--dryrun"] if line.startswith("launch") else [])] for line in others]
    found = run_commands(given, home, project, CATALOGS)
    shutil.copytree(half, mine / "run-001")
    found += run_commands([*map(shlex.split, of_a_run)], home, project)
    for line, (code, output) in zip([*others, *of_a_run], found, strict=True):
        if line.split()[0] in ("queue", "logs", "cancel"):
            assert (code, "http://127.0.0.1:1" in output) == (1, True), f"{line}\n{output}"
            assert len(output.splitlines()) == 1, output
        elif line == "lint my-task.yaml":
            assert (code, "[script-not-there]" in output) == (1, True), "what the next line overrules"
        else:
            assert code == 0, f"{line}\n{output}"


def test_every_command_of_skypilots_is_run_by_e2e() -> None:
    """As calls of the lab's, not as words that stand anywhere."""
    called = set()
    for path in (REPO / "tests" / "e2e").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):  # skyspot(WORD, ...), or submit(skyspot, WORD, ...) on a thread.
                words = [word.attr if isinstance(word, ast.Attribute) else "" for word in (node.func, *node.args)]
                after = node.args[words.index("skyspot") :][:1] if "skyspot" in words else []
                called |= {word.value for word in after if isinstance(word, ast.Constant)}
    assert {"launch", "queue", "logs", "cancel"} <= called


INDENTED = {
    "make demo": ("tests/test_rehearse.py", "\ndef test_the_default_task_resumes_exactly_under_every_kind("),
    "python -m venv .venv && . .venv/bin/activate": ("Makefile", "-m venv $(VENV)\n"),
    'pip install -e ".[trainer,test]" -c constraints.txt': ("Makefile", '-e ".[trainer,test]" -c constraints.txt\n'),
    "sky jobs launch .skyspot/run-001.yaml -n run-001": (
        "tests/test_render.py",
        "\ndef test_skypilot_takes_every_template_under_every_combination_of_ladder_options(",
    ),
    'eval "$(_SKYSPOT_COMPLETE=bash_source skyspot)"': (
        "tests/test_readme.py",
        "\ndef test_the_line_that_completes_commands_runs_in_a_shell(",
    ),
}
"""The commands of README that stand alone: the file that runs each, and where in it.

`sky jobs launch` itself is run by nobody: SkyPilot validates what it would submit.
"""


def test_every_command_of_readme_is_run_by_a_test() -> None:
    fences = re.findall(r"```(\w*)\n", README)
    assert set(fences) <= {"", "bash", "sh", "python"}, "what is in another block is run by nobody"
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    indented = [line.partition("  #")[0].strip() for line in re.findall(r"^ {4}(\S.*)$", prose, re.MULTILINE)]
    assert indented == list(INDENTED)
    for path, text in INDENTED.values():
        assert text in (REPO / path).read_text(), f"{path} runs a command of README: {text}"
    assert all(line.startswith("skyspot ") for line in SH), SH
    assert len(SH) >= 8


def test_the_line_that_completes_commands_runs_in_a_shell(tmp_path: Path) -> None:
    env = clean_env(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", HOME=str(tmp_path))
    [line] = [line for line in INDENTED if line.startswith("eval")]
    done = subprocess.run(
        ["bash", "-euc", f"{line}\ncomplete -p skyspot"], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "skyspot" in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_are_completed_in_every_shell(tmp_path: Path, shell: str) -> None:
    scripts = str(Path(sys.executable).parent)
    env = clean_env(PATH=f"{scripts}:{os.environ['PATH']}", HOME=str(tmp_path))

    def complete(words: str) -> str:
        asked = {"_SKYSPOT_COMPLETE": f"{shell}_complete", "COMP_WORDS": f"skyspot {words}",
                 "COMP_CWORD": words.split()[-1] if shell == "fish" else str(len(words.split()))}  # fmt: skip
        done = subprocess.run(
            ["skyspot"], env={**env, **asked}, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        return done.stdout

    source = subprocess.run(
        ["skyspot"], env={**env, "_SKYSPOT_COMPLETE": f"{shell}_source"}, capture_output=True, text=True, timeout=60
    )
    assert "_SKYSPOT_COMPLETE" in source.stdout
    (tmp_path / ".skyspot").mkdir()
    (tmp_path / ".skyspot" / "run-001.yaml").touch()
    assert "launch" in complete("lau")
    assert "finetune" in complete("render fine")
    assert "A100-80GB" in complete("render --gpus A100-")
    assert "run-001" in complete("logs run")


def test_the_exit_codes_are_those_of_the_trainers_table() -> None:
    table = README.partition("| code | cause |")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    found = [(int(code), cause.strip("`"), before, after) for code, cause, _, before, after in rows]
    skypilot = {EXIT_DONE: "done", EXIT_PREEMPTED: "restarts it"}
    expected = []
    for ending in ENDINGS.values():
        before = ["saves"] * ending.saves
        before += [f"waits until {ending.hold.value}"] * (ending.hold is not Hold.NOTHING)
        expected.append((ending.code, ending.cause, ", ".join(before), skypilot.get(ending.code, "leaves it stopped")))
    assert found == [*expected, (EXIT_USAGE, "", "", "leaves it stopped")]


def test_readme_names_the_default_of_keep_latest() -> None:
    """`prune` deletes nothing before so many newer checkpoints are known to be in the store."""
    [named] = re.findall(r"only\s+when\s+the\s+`--keep-latest`\s+\((\d+)\)\s+newest", README)
    assert int(named) == RunConfig(checkpoint_dir=Path("x")).keep_latest


def test_every_target_that_readme_names_is_in_the_makefile() -> None:
    targets = set(re.findall(r"(?:`|^ {4})make (?:PYTHON=\S+ )?([\w-]+)", README, re.MULTILINE))
    assert targets >= {"demo", "test", "lint", "e2e"}
    for target in targets:
        done = subprocess.run(
            ["make", "--no-print-directory", "-n", target], cwd=REPO, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
    demo = subprocess.run(
        ["make", "--no-print-directory", "-n", "demo"], cwd=REPO, capture_output=True, text=True, timeout=60
    )
    assert demo.stdout.splitlines()[-1].endswith("/skyspot rehearse")


def test_the_program_that_readme_shows_is_short() -> None:
    assert "`tests/programs/mlp.py`" in README
    assert len((PROGRAMS / "mlp.py").read_text().splitlines()) <= 60
