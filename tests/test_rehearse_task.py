"""What a rehearsal gives a task, and what it says of one that fails."""

import json
from pathlib import Path

from support_rehearse import leftovers, rehearse

FAILS = """\
file_mounts: {/checkpoints: {name: bbb, mode: MOUNT}}
workdir: code
run: |
  echo '{"step": 1}' > /checkpoints/state.json
  python train.py
"""
TRAIN = """\
import json
import sys
import time
from pathlib import Path

print("starting")


def resume():
    return json.loads(Path("/checkpoints/result.json").read_text())["steps"]


if Path("/checkpoints/began").exists():
    print(f"resuming from step {resume()}")
Path("/checkpoints/began").touch()
time.sleep(1)
Path("/checkpoints/result.json").write_text('{"step": 2}')
if len(sys.argv) > 1:
    sys.exit("Error: no data")
"""


def failing(folder: Path, *args: str) -> None:
    (folder / "code").mkdir()
    (folder / "code" / "train.py").write_text(TRAIN)
    (folder / "task.yaml").write_text(FAILS.replace("train.py", " ".join(["train.py", *args])))


def test_a_resume_that_fails_is_shown_with_its_error_and_the_users_line_and_its_output_is_kept(tmp_path: Path) -> None:
    failing(tmp_path)
    args = ["task.yaml", "--kinds", "kill", "--preemptions", 1, "--compare", "result.json", "--json"]
    done = rehearse(*args, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    leg = json.loads(done.stdout)["legs"][1]
    log = Path(leg["log"])
    _, code, error, place, kept = leg["verdict"]["text"].splitlines()
    assert code == "exit 1"
    assert error.startswith("  FileNotFoundError: ")
    assert place == (
        '    train.py, line 10, in resume: return json.loads(Path("/checkpoints/result.json").read_text())["steps"]'
    )
    assert kept == f"  its whole output: {log}"
    assert log.read_text().startswith("starting\nTraceback")
    assert log.parent.name.startswith("skyspot-rehearsal-log-")
    assert leftovers(tmp_path) == [str(log.parent)]


def test_where_everything_is_kept_the_output_is_there(tmp_path: Path) -> None:
    failing(tmp_path, "fail")
    done = rehearse("task.yaml", "--keep", "kept", cwd=tmp_path)
    assert done.returncode == 1
    log = tmp_path / "kept" / "reference" / "machine-01.log"
    assert log.read_text() == "starting\nError: no data\n"
    assert "\nexit 1\n  Error: no data\n" in done.stdout
    assert f"its whole output: {log}" in done.stdout
    assert leftovers(tmp_path) == []


def test_an_error_of_the_script_itself_has_its_line_in_run(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("run: |\n  set -e\n  trainn --lr 1\n")
    done = rehearse("task.yaml", cwd=tmp_path)
    assert "\nexit 127\n  run: line 2: trainn: command not found\n" in done.stdout
