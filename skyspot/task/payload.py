"""The payload beside a written task YAML: a copy of the trainer, so that a resume never changes code."""

from __future__ import annotations

import difflib
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from skyspot.errors import SkyspotError
from skyspot.task import document
from skyspot.task.options import NAME, WRITTEN, written_task
from skyspot.task.render import Rendered, edited_by_hand, rendered_from

_PLACE = re.compile(rf"(?:\./)?{re.escape(WRITTEN)}/([^/]+)/trainer/?")


def trainer_folder() -> Path:
    """The trainer of this installation, found without an import, which a `trainer.py` could divert."""
    return Path(__file__).resolve().parents[2] / "trainer"


def copy_trainer(target: Path) -> None:
    """Copy the trainer into a folder as shipped to a node; the folder appears whole or not at all.

    Raises:
        OSError: the copy cannot be written.
    """
    partial = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(trainer_folder(), partial, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        partial.rename(target)
    except shutil.Error as error:
        _, where, reason = error.args[0][0]
        raise OSError(0, str(reason).rpartition("] ")[2].partition(":")[0], str(where)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def trainers(text: str) -> tuple[str, ...]:
    """List the runs whose copies of the trainer a task YAML ships; the copies are beside it."""
    mounts = [mount for task in document.tasks(text) for mount in task.mounts if not mount.is_bucket]
    places = [_PLACE.fullmatch(mount.source) for mount in mounts]
    return tuple(dict.fromkeys(place[1] for place in places if place and NAME.fullmatch(place[1])))


def chosen(rendered: Rendered, path: Path, source: Path) -> tuple[str, tuple[str, ...]]:
    """Choose the text to submit for a run, the rendered one or the file edited by hand; also return notes.

    The header of a written file keeps the hash of the rendered text. If the same text would be rendered now, only the
    edit differs, and the author wants it. Otherwise one of the two changes would be lost.

    Args:
        rendered: The task as rendered now.
        path: .skyspot/<run>.yaml.
        source: The file it was rendered from; if it is the written file itself, that is used unchanged.

    Raises:
        SkyspotError: both the file and the newly rendered text differ from the old one; shows the diff.
    """
    if not path.exists() or (source.exists() and source.samefile(path)):
        return rendered.text, ()
    known = _read(path)
    if known == rendered.text or not edited_by_hand(known):
        return rendered.text, ()
    if rendered_from(known) is not None and rendered_from(known) == rendered_from(rendered.text):
        return known, (f"Using {path} with your edits",)
    raise _edited(path, known, rendered.text)


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            return file.read()
    except OSError as error:
        raise SkyspotError(f"{path}: {error.strerror}") from None


def _edited(path: Path, known: str, new: str) -> SkyspotError:
    diff = difflib.unified_diff(known.splitlines(), new.splitlines(), str(path), "newly rendered", lineterm="", n=1)
    return SkyspotError(
        f"{path} was edited by hand and is not overwritten. "
        f"Submit it unchanged (`skyspot launch -n {path.stem}`), or delete it first.\n" + "\n".join(diff)
    )


def write(rendered: Rendered, folder: Path) -> Path:
    """Write `.skyspot/<run>.yaml` and its payload into a folder; return the YAML's path.

    An existing payload stays: a resume must not change code.

    Raises:
        SkyspotError: the file was edited by hand (shows the diff), or cannot be written.
    """
    path = written_task(rendered.name, folder)
    if path.exists():
        known = _read(path)
        if known != rendered.text and edited_by_hand(known):
            raise _edited(path, known, rendered.text)
    place(path, rendered.text, trainers(rendered.text))
    return path


def place(path: Path, text: str, trainers_of: Sequence[str], update_trainer: bool = False) -> None:
    """Write a task YAML, and the trainer beside it.

    Args:
        path: The path of the YAML.
        text: The YAML.
        trainers_of: The runs that need a copy of the trainer.
        update_trainer: Whether to replace existing copies by the trainer of this installation.

    Raises:
        SkyspotError: a file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for trainer_of in trainers_of:
            beside = path.parent / trainer_of / "trainer"
            if update_trainer and beside.exists():
                shutil.rmtree(beside)
            if not beside.exists():
                copy_trainer(beside)
        if not path.exists() or _read(path) != text:
            partial = path.with_name(f".{path.name}-{os.getpid()}")
            try:
                partial.write_text(text, encoding="utf-8", newline="")
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise SkyspotError(f"{error.filename or path}: {error.strerror}") from None
