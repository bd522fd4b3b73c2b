"""Every command in README runs, and its demo is what the program prints."""

import os
import re
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
