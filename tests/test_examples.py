"""The examples: each is its unsafe form and a few lines, as docs/your-own-script.md shows, and resumes exactly."""

from __future__ import annotations

import difflib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPO, clean_env, event, launch, losses, weights

EXAMPLES = REPO / "examples"
SAFE = sorted(EXAMPLES.glob("*.py"))
PAGE = (REPO / "docs" / "your-own-script.md").read_text()
MAX_ADDED, MAX_LINES = 8, 80


def diff(safe: Path) -> list[str]:
    before = EXAMPLES / "before" / safe.name
    texts = [path.read_text().splitlines() for path in (before, safe)]
    return list(difflib.unified_diff(*texts, "before", "after", lineterm="", n=1))


@pytest.mark.parametrize("safe", SAFE, ids=lambda path: path.stem)
def test_an_example_is_short_and_adds_few_lines(safe: Path) -> None:
    assert len(safe.read_text().splitlines()) < MAX_LINES
    changes = diff(safe)[2:]
    removed = {line[1:].strip() for line in changes if line.startswith("-")}
    added = [line[1:] for line in changes if line.startswith("+") and line[1:].strip()]
    # A line that is only indented differently is not added.
    assert len([line for line in added if line.strip() not in removed]) <= MAX_ADDED
    assert "\n".join(diff(safe)) in PAGE
    assert safe.with_suffix(".yaml").exists()


def test_an_example_that_adds_more_lines_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_examples.EXAMPLES", tmp_path)
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "plain.py").write_text("pass\n")
    safe = tmp_path / "plain.py"
    safe.write_text("".join(f"line = {number}\n" for number in range(MAX_ADDED + 1)))
    with pytest.raises(AssertionError):
        test_an_example_is_short_and_adds_few_lines(safe)


def test_the_page_shows_no_other_diff() -> None:
    assert len(re.findall(r"^```diff$", PAGE, flags=re.M)) == len(SAFE)


@pytest.mark.parametrize("safe", SAFE, ids=lambda path: path.stem)
def test_an_example_trains_and_stops_and_goes_on(safe: Path, tmp_path: Path) -> None:
    env = clean_env(SKYSPOT_CHECKPOINT_DIR=str(tmp_path / "run"), STEPS="12", OMP_NUM_THREADS="1")
    done = launch(safe, env=env)
    assert done.code == 0, done.output
    assert sorted(losses(tmp_path / "run")) == list(range(1, 13))
    assert weights(tmp_path / "run")
    more = launch(safe, env={**env, "STEPS": "14"})
    assert more.code == 0, more.output
    assert event(tmp_path / "run", "restored")["step"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("safe", SAFE, ids=lambda path: path.stem)
def test_an_example_is_rehearsed(safe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "skyspot", "rehearse", safe.with_suffix(".yaml").relative_to(REPO)]
    command += ["--processes", "1", "--env", "STEPS=80", "--env", "OMP_NUM_THREADS=1"]
    env = clean_env(HOME=str(tmp_path))
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bit-identical: 80 of 80 losses" in done.stdout
