"""What lies beside a written task YAML: a copy of the trainer, so that a resume never changes code."""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

from skyspot.errors import SkyspotError
from skyspot.render import Rendered, edited_by_hand


def trainer_folder() -> Path:
    """The trainer of this installation, beside this package; not imported, so that no `trainer.py` gets in the way."""
    return Path(__file__).resolve().parent.parent / "trainer"


def copy_trainer(target: Path) -> None:
    """Copy the trainer into a folder, as it is shipped to a node."""
    shutil.copytree(trainer_folder(), target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


def write(rendered: Rendered, folder: Path) -> Path:
    """Write `.skyspot/<run>.yaml` and its payload into a folder; returns the YAML's path.

    A payload that is there stays: a resume must not change code.

    Raises:
        SkyspotError: the file is there and was edited by hand (with the diff), or cannot be written.
    """
    path = folder / ".skyspot" / f"{rendered.name}.yaml"
    try:
        if path.exists():
            known = path.read_text(encoding="utf-8", errors="replace")
            if known != rendered.text and edited_by_hand(known):
                diff = difflib.unified_diff(
                    known.splitlines(), rendered.text.splitlines(), str(path), "rendered now", lineterm="", n=1
                )
                raise SkyspotError(
                    f"{path} was edited by hand; it is not overwritten. Use it as it is, or take it away first.\n"
                    + "\n".join(diff)
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.parent / rendered.name / "trainer"
        if rendered.trainer and not beside.exists():
            copy_trainer(beside)
        path.write_text(rendered.text, encoding="utf-8")
    except OSError as error:
        raise SkyspotError(f"{error.filename or path}: {error.strerror}") from None
    return path
