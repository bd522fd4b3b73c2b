"""Faults that damage files behind the mount, or add a checkpoint there that does not belong."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import truth
from scene import OTHER, STEPS, Scene, Strike, folder_of

from trainer.layout.names import RunPaths


def damaged(damage: Callable[[Path, random.Random, Scene], bool], *names: str) -> Strike:
    """Make a fault that damages a checkpoint's file behind the mount before the next attempt starts."""

    def strike(scene: Scene) -> bool:
        if not scene.before:
            scene.begin().wait()
            return False
        victim = scene.before[0 if scene.draw.random() < 0.8 else -1]
        folder = folder_of(scene.behind, victim)
        file = folder / scene.draw.choice(names or sorted(path.name for path in folder.iterdir()))
        hit = damage(file, scene.draw, scene)
        scene.before = truth.whole(scene.behind, scene.plan.run)
        scene.begin().wait()
        return hit

    return strike


def torn(file: Path, draw: random.Random, scene: Scene) -> bool:
    size = file.stat().st_size
    os.truncate(file, draw.randrange(size))
    return True


def flipped(file: Path, draw: random.Random, scene: Scene) -> bool:
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return True


def emptied(file: Path, draw: random.Random, scene: Scene) -> bool:
    os.truncate(file, 0)
    return True


def removed(file: Path, draw: random.Random, scene: Scene) -> bool:
    file.unlink()
    return True


def _others(file: Path, scene: Scene) -> list[Path]:
    """List the folders of other checkpoints that have a file of this name; a single rank writes fewer files."""
    folders = [folder_of(scene.behind, whole) for whole in scene.before]
    return [folder for folder in folders if folder != file.parent and (folder / file.name).exists()]


def copied_over(file: Path, draw: random.Random, scene: Scene) -> bool:
    """Overwrite a file with another checkpoint's."""
    others = _others(file, scene)
    if not others:
        return False
    return _put(file, (draw.choice(others) / file.name).read_bytes())


def _put(file: Path, data: bytes) -> bool:
    """Replace the content of a file; False if it stays the same."""
    same = file.read_bytes() == data
    file.write_bytes(data)
    return not same


def exchanged(file: Path, draw: random.Random, scene: Scene) -> bool:
    """Swap the same file of two checkpoints."""
    others = _others(file, scene)
    if not others:
        return False
    other = draw.choice(others) / file.name
    mine, theirs = file.read_bytes(), other.read_bytes()
    other.write_bytes(mine)
    return _put(file, theirs)


def another_runs(file: Path, draw: random.Random, scene: Scene) -> bool:
    """Overwrite a file with another run's, whose tensors have the same shapes."""
    theirs = truth.whole(scene.other, scene.plan.run + OTHER)
    return _put(file, (folder_of(scene.other, draw.choice(theirs)) / file.name).read_bytes())


def another_runs_checkpoint(scene: Scene) -> bool:
    """Copy a whole checkpoint of another run into this run's folder; it is newer than all checkpoints there.

    Nothing is copied while the folder has no run.json: it belongs to no run yet, and the checkpoint would make it the
    other run's. The trainer then refuses a run with another binding; this campaign's attempts do not check that.
    """
    theirs = folder_of(scene.other, scene.draw.choice(truth.whole(scene.other, scene.plan.run + OTHER)))
    here = scene.behind / "checkpoints" / theirs.name
    fresh = RunPaths(scene.behind).run_json.exists() and not here.exists()
    if fresh:
        shutil.copytree(theirs, here)
    scene.begin().wait()
    return fresh


def under_anothers_name(scene: Scene) -> bool:
    """Copy a whole checkpoint's folder to the name of a newer one: of a later step or a later attempt."""
    if not scene.before:
        scene.begin().wait()
        return False
    newest, copied = scene.before[0], scene.draw.choice(scene.before)
    if scene.draw.random() < 0.5:
        name = replace(copied, step=newest.step + scene.draw.randint(1, STEPS))
    else:
        name = replace(copied, step=newest.step, attempt=newest.attempt + 1)
    fresh = not folder_of(scene.behind, name).exists()
    if fresh:
        shutil.copytree(folder_of(scene.behind, copied), folder_of(scene.behind, name))
    scene.begin().wait()
    return fresh


def grown(file: Path, draw: random.Random, scene: Scene) -> bool:
    with file.open("ab") as more:
        more.write(draw.randbytes(draw.randint(1, 5000)))
    return True
