"""The errors that are said in a line: which they are, and the exit codes that they lead to."""

import ast
import subprocess
import sys

import pytest
from support import REPO, clean_env

from trainer.bucket.retry import MOUNT_GONE
from trainer.checkpoint.errors import SaveError
from trainer.errors import AttemptError, TrainerError
from trainer.layout.documents import LayoutVersionError
from trainer.layout.exit_codes import EXIT_FAILED, EXIT_PREEMPTED, EXIT_SUPERSEDED
from trainer.machine.scratch import ScratchError
from trainer.training.config import ConfigError
from trainer.training.unwinding import exit_code

NOT_SAID = {"peers.PeerGoneError", "damage.DamagedError", "service.ServiceError"}
"""What is always caught: a lost peer is no fault, a damaged checkpoint is passed by, a silent service asked again."""


def test_every_error_of_the_trainers_is_said_in_a_line() -> None:
    bare = set()
    for path in (REPO / "trainer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and {"Exception", "RuntimeError", "ValueError", "OSError"} & {
                base.id for base in node.bases if isinstance(base, ast.Name)
            }:
                bare.add(f"{path.stem}.{node.name}")
    assert bare == {"errors.TrainerError", *NOT_SAID}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TrainerError("any"), EXIT_FAILED),
        (ConfigError("a mistake"), EXIT_FAILED),
        (LayoutVersionError("a newer release's"), EXIT_FAILED),
        (AttemptError("no bucket"), EXIT_FAILED),
        (AttemptError("its mount is gone", EXIT_PREEMPTED), EXIT_PREEMPTED),
        (ScratchError("full"), EXIT_PREEMPTED),
        (SaveError("a newer attempt's", EXIT_SUPERSEDED), EXIT_SUPERSEDED),
        *((OSError(number, "not connected"), EXIT_PREEMPTED) for number in sorted(MOUNT_GONE)),
        (OSError(5, "of the user's own"), EXIT_FAILED),
        (type("HTTPError", (Exception,), {"code": 75})("of a library's"), EXIT_FAILED),
    ],
)
def test_an_error_leads_to_its_exit_code(error: Exception, code: int) -> None:
    assert exit_code(error) == code


@pytest.mark.parametrize(("code", "stderr"), [
    ("RunConfig(checkpoint_dir='run', max_steps=-1)", "Error: --max-steps: -1 is not above 0\n"),
    ("RunConfig, 1 / 0", "Traceback"),
])  # fmt: skip
def test_a_mistake_in_a_scripts_settings_is_said_in_a_line(code: str, stderr: str) -> None:
    command = [sys.executable, "-c", f"from trainer import RunConfig; {code}"]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_env())
    assert done.returncode == 1
    assert done.stderr.startswith(stderr)
    assert ("Traceback" in done.stderr) == (stderr == "Traceback")
