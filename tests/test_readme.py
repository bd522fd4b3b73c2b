"""Every command in README runs, and its demo is what the program prints."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import PROGRAMS, REPO, clean_env

README = (REPO / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0][:60])
def test_a_block_of_commands_runs_as_it_stands(tmp_path: Path, block: str) -> None:
    (tmp_path / "my-task.yaml").write_text(
        "name: own\nenvs: {OUT: /checkpoints/own, STEPS: '40'}\n"
        f"file_mounts:\n  /checkpoints: {{name: mine, mode: MOUNT}}\n  ~/code/counter.py: {PROGRAMS}/counter.py\n"
        "run: python ~/code/counter.py\n"
    )
    scripts = str(Path(sys.executable).parent)
    env = clean_env(PATH=f"{scripts}:{os.environ['PATH']}", HOME=str(tmp_path / "home"))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("line", "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)).splitlines())
def test_a_command_that_talks_to_skypilot_is_one_that_we_have(line: str) -> None:
    """Here it is only parsed; `make e2e` runs them against a real SkyPilot."""
    from skyspot.cli import cli

    program, *words = shlex.split(line)
    assert program == "skyspot"
    with cli.make_context("skyspot", words) as above:
        name, command, rest = cli.resolve_command(above, [*above.protected_args, *above.args])
        assert command.make_context(name, rest, parent=above)


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


def test_the_demo_shows_what_the_program_prints() -> None:
    """The words of the demo's output are the program's own: none of them went stale."""
    demo = re.search(r"<!-- demo -->\n```\n(.*?)```", README, re.DOTALL)
    assert demo
    code = "".join(path.read_text() for path in (REPO / "skyspot").glob("*.py"))
    for words in (
        "how it ended",
        "steps",
        "word to",
        "; goodput ",
        "bit-identical: ",
        "same samples and same LR",
        "the loss fell from",
    ):
        assert words in demo[1]
        assert words in code
    assert demo[1].count("killed") >= 3
    makefile = (REPO / "Makefile").read_text()
    assert "skyspot rehearse" in makefile


def test_every_target_that_readme_names_is_in_the_makefile() -> None:
    targets = set(re.findall(r"`make (\w+)`", README)) | {"demo"}
    makefile = (REPO / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_every_command_that_readme_names_exists() -> None:
    from skyspot.cli import cli

    for command in re.findall(r"^skyspot (\w+)", "\n".join(BLOCKS), re.MULTILINE):
        assert command in cli.commands
    assert shutil.which("bash")
