"""What befalls a run: each fault is struck, and says whether it really hit."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import faultfs
import truth
from child import FAILURES, STANDS_STILL_S, Child, Plan, start
from stores import Place
from wait import readable
from watch import Watch

from trainer.checkpoint.writing import POINTS
from trainer.layout.names import RunPaths

STEPS = 4
OF_EACH_RANK = ("folder-made", "share-half", "share-written")
"""The points of the protocol that every rank comes to."""
OTHER = 50
"""How the other run is numbered, above this one."""
Strike = Callable[["Scene"], bool]


@dataclass
class Scene:
    """One run on one store, and what is to befall it now."""

    place: Place
    run_dir: Path
    behind: Path
    other: Path
    """Another run's folder, behind the mount; whole checkpoints of it are there."""
    plan: Plan
    draw: random.Random
    before: list[truth.Whole]
    """What was whole in the store before the attempt began."""
    children: list[Child]
    """Attempts that were alive; the first is the one that restores what the fault has left."""
    later_s: float
    """How long an attempt goes on after its restore, about."""
    watch: Watch
    """Looks behind the mount while attempts live."""
    at_once: bool = False
    """Two attempts began together: the first may restore what the second has saved."""

    def begin(self, **changes: object) -> Child:
        """Start an attempt."""
        self.watch.begin()
        if self.place.ranks > 1:
            ranks = self.draw.randint(1, self.place.ranks)
            point, _ = changes.get("kill_at") or ("", 0)  # type: ignore[misc]
            changes |= {"ranks": ranks, "kill_rank": self.draw.randrange(ranks) if point in OF_EACH_RANK else 0}
        child = start(replace(self.plan, **changes))  # type: ignore[arg-type]
        self.children.append(child)
        return child

    def rank_of(self, child: Child) -> int | None:
        """A rank of an attempt; None: all of them."""
        if child.plan.ranks == 1 or self.draw.random() < 0.3:
            return None
        return self.draw.randrange(child.plan.ranks)

    @property
    def files(self) -> tuple[str, ...]:
        """A checkpoint's, as far as faults are meant for them by name."""
        return FILES if self.place.ranks == 1 else FILES_OF_SEVERAL


def _until_restored(child: Child) -> bool:
    """Wait until it has said what it restored; False where it is over before."""
    while not child.all_restored and readable(child.pipe, STANDS_STILL_S):
        if not child.listen():
            return False
    return child.all_restored


def _let_go(child: Child, seconds: float) -> None:
    """Wait so long, or until it is over."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and readable(child.pipe, left):
        if not child.listen():
            return


def _hangs(child: Child) -> bool:
    """Wait until a thread of it waits for a mount's answer; False where it is over, or does so not within a second."""
    end = time.monotonic() + 1
    while child.lives and not child.left and time.monotonic() < end:
        for task in (task for pid in child.pids for task in Path(f"/proc/{pid}/task").glob("*/wchan")):
            with contextlib.suppress(OSError):
                if task.read_text() in ("request_wait_answer", "__fuse_simple_request", "fuse_simple_request"):
                    return True
        _let_go(child, 0.005)
    return False


# -- the machine is taken ----------------------------------------------------------------------------------------------


def kill_at_random(scene: Scene) -> bool:
    child = scene.begin()
    _until_restored(child)
    _let_go(child, scene.draw.random() * scene.later_s)
    child.kill(scene.rank_of(child))
    child.wait()
    return child.was_killed


def kill_at(point: str) -> Strike:
    def strike(scene: Scene) -> bool:
        child = scene.begin(kill_at=(point, scene.draw.randint(1, STEPS)))
        child.wait()
        return child.was_killed

    return strike


def kill_at_the_start(scene: Scene) -> bool:
    child = scene.begin()
    _let_go(child, scene.draw.random() * 0.02)
    child.kill(scene.rank_of(child))
    child.wait()
    return child.was_killed


# -- files are not what they were --------------------------------------------------------------------------------------


def damaged(damage: Callable[[Path, random.Random, Scene], bool], *names: str) -> Strike:
    """Damage a file behind the mount, then look what the next attempt makes of it."""

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


def folder_of(run_dir: Path, whole: truth.Whole) -> Path:
    return run_dir / "checkpoints" / str(whole)


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
    """Other checkpoints with a file of that name: one rank alone writes fewer."""
    folders = [folder_of(scene.behind, whole) for whole in scene.before]
    return [folder for folder in folders if folder != file.parent and (folder / file.name).exists()]


def copied_over(file: Path, draw: random.Random, scene: Scene) -> bool:
    """Another checkpoint's file, twice now."""
    others = _others(file, scene)
    if not others:
        return False
    return _put(file, (draw.choice(others) / file.name).read_bytes())


def _put(file: Path, data: bytes) -> bool:
    """Put something else into a file; False where it is the same."""
    same = file.read_bytes() == data
    file.write_bytes(data)
    return not same


def exchanged(file: Path, draw: random.Random, scene: Scene) -> bool:
    """Two checkpoints' files, each in the place of the other."""
    others = _others(file, scene)
    if not others:
        return False
    other = draw.choice(others) / file.name
    mine, theirs = file.read_bytes(), other.read_bytes()
    other.write_bytes(mine)
    return _put(file, theirs)


def another_runs(file: Path, draw: random.Random, scene: Scene) -> bool:
    """A file of another run's checkpoint of the same form."""
    theirs = truth.whole(scene.other, scene.plan.run + OTHER)
    return _put(file, (folder_of(scene.other, draw.choice(theirs)) / file.name).read_bytes())


def another_runs_checkpoint(scene: Scene) -> bool:
    """A whole checkpoint of another run among this run's; it is newer than all of them.

    It counts once this run has begun, which its run.json tells: into a folder that is of no run yet, a checkpoint makes
    it a folder of its own run. There the trainer refuses what does not bind as it does; this campaign's children do
    not.
    """
    theirs = folder_of(scene.other, scene.draw.choice(truth.whole(scene.other, scene.plan.run + OTHER)))
    here = scene.behind / "checkpoints" / theirs.name
    fresh = RunPaths(scene.behind).run_json.exists() and not here.exists()
    if fresh:
        shutil.copytree(theirs, here)
    scene.begin().wait()
    return fresh


def under_anothers_name(scene: Scene) -> bool:
    """A whole checkpoint's folder, once more: where a newer one would lie, of a later step or a later attempt."""
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


# -- the store fails ---------------------------------------------------------------------------------------------------

FILES = ("share-00000.safetensors", "state.json", "MANIFEST.json")
SECOND_SHARE = "share-00001.safetensors"
FILES_OF_SEVERAL = (*FILES, SECOND_SHARE)
RECORDS = (".jsonl", "-saved.json")
"""Of these the first has to be there before a manifest is written; the second can be done without."""
ANY = ("",)
FOR_GOOD = 10**6
ENDS = {errno.ENOSPC: 1, errno.EROFS: 1, errno.ENOTCONN: 75}
"""What the stop table says of a store that is full, read-only or gone. Anything else is tried again."""


def failing(call: str, number: int, times: int = 1, restoring: bool = False) -> Strike:
    """A call fails, once or for good: during the saves, or while the state is restored."""

    def strike(scene: Scene) -> bool:
        faults = scene.place.faults
        assert faults
        after, suffix = scene.draw.randrange(4), scene.draw.choice(_files_of(scene, call, restoring))
        # For good: with more steps, so that enough saves fail in a row even where the first ones go well.
        steps = STEPS + FAILURES if times > 1 and not restoring else STEPS
        readable_still = scene.before
        if restoring and suffix == SECOND_SHARE and times > 1:
            # An attempt of one process writes none: its checkpoints can be read all the same.
            after = 0
            readable_still = [whole for whole in scene.before if not (folder_of(scene.behind, whole) / suffix).exists()]
        if restoring:
            faults.fail(call, number, after=after, times=times, suffix=suffix)
        child = scene.begin(step_s=0.002, steps=steps)
        if not restoring:
            _until_restored(child)
            faults.fail(call, number, after=after, times=times, suffix=suffix)
        child.wait()
        hits = faults.clear()
        if hits and restoring:
            child.must_end_with = _ends_reading(child, number, times)
            scene.before = readable_still
        elif hits:
            child.must_end_with = _ends_saving(child, call, number, times, suffix)
        return hits > 0

    return strike


def _files_of(scene: Scene, call: str, restoring: bool) -> tuple[str, ...]:
    """What a call may fail on, as the ends of paths."""
    if restoring:
        return scene.files
    return scene.files + RECORDS + ANY if call in ("write", "create") else scene.files + ANY


def _ends_reading(child: Child, number: int, times: int) -> set[int]:
    """With what an attempt ends that could not read, once or for good.

    Where it has restored all the same, the calls that failed were those of a read-back, which costs nothing.
    """
    return {0} if times == 1 or child.restored else {ENDS.get(number, 1)}


def _ends_saving(child: Child, call: str, number: int, times: int, suffix: str) -> set[int]:
    """With what an attempt ends that could not save, once or for good."""
    code = ENDS.get(number)
    if times == 1 and code:
        # A record's only failed write is made good, or done without; of any file it is not known which it was.
        return {code} if suffix in FILES_OF_SEVERAL else {0} if suffix in RECORDS else {0, code}
    if times == 1 or call == "read":  # Tried again; and what does not read back does not count, no more.
        return {0}
    if code:
        return {code} if child.unsaved else {0}  # All saved: what failed was done without.
    return {1} if child.unsaved >= FAILURES else {0}


def newest_unreadable(scene: Scene) -> bool:
    """A file of the newest checkpoint cannot be read for good: an older one is taken, but nothing is begun anew."""
    faults = scene.place.faults
    assert faults
    if scene.before:
        suffix = f"{scene.before[0]}/{scene.draw.choice(scene.files)}"
        faults.fail("read", errno.EIO, times=FOR_GOOD, suffix=suffix)
    child = scene.begin()
    child.wait()
    hits = faults.clear()
    if hits:
        scene.before = scene.before[1:]
        child.must_end_with = {0} if scene.before else {1}
    return hits > 0


def gone(scene: Scene) -> bool:
    """The mount is gone: whatever is asked of it fails."""
    faults = scene.place.faults
    assert faults
    child = scene.begin(step_s=0.002, steps=STEPS + FAILURES)
    _until_restored(child)
    _let_go(child, scene.draw.random() * scene.later_s)
    for call in faultfs.CALLS:
        faults.fail(call, errno.ENOTCONN, times=FOR_GOOD)
    child.wait()
    hits = faults.clear()
    if hits:
        child.must_end_with = {75} if child.unsaved else {0}
    return hits > 0


def hanging(call: str, restoring: bool = False) -> Strike:
    """A call does not return: the attempt ends by itself."""

    def strike(scene: Scene) -> bool:
        faults = scene.place.faults
        assert faults
        after, suffix = scene.draw.randrange(4), scene.draw.choice(scene.files)
        if restoring:
            faults.hang(call, after=after, suffix=suffix)
        child = scene.begin(limit_s=0.1, step_s=0.002)
        if not restoring:
            _until_restored(child)
            faults.hang(call, after=after, suffix=suffix)
        child.wait_until_it_leaves()
        left_for_it = _left_for_a_hang(child)  # Before it is let go: an attempt that waited on would go on now.
        hits = faults.clear()
        child.wait()
        child.must_end_with = left_for_it if hits else None
        return hits > 0

    return strike


def _left_for_a_hang(child: Child) -> set[int]:
    """With what an attempt has to leave that hangs; with all saved it may be over before that takes too long."""
    return {75} if child.unsaved else {0, 75}


def frozen(scene: Scene) -> bool:
    """The mount's daemon stops; the machine is taken while the attempt hangs, or the attempt ends by itself."""
    taken = scene.draw.random() < 0.5
    child = scene.begin(step_s=0.002, limit_s=120.0 if taken else 0.3)
    _until_restored(child)
    _let_go(child, scene.draw.random() * scene.later_s)
    scene.place.freeze()
    try:
        hit = _hangs(child)
        if taken:
            child.kill()
        else:
            child.wait_until_it_leaves()
            child.must_end_with = _left_for_a_hang(child) if hit else None
    finally:
        scene.place.thaw()
    child.wait()
    return hit


def silently_torn(scene: Scene) -> bool:
    """A store that says that all is well, and loses the end of what it was given."""
    faults = scene.place.faults
    assert faults
    for _ in range(STEPS):
        faults.tear(scene.draw.random(), suffix=FILES[0])
    child = scene.begin()
    child.wait()
    return faults.clear() > 0


def stale(scene: Scene) -> bool:
    faults = scene.place.faults
    assert faults
    faults.stale(10 ** scene.draw.uniform(-1, 1))  # Of the last attempt's files some are seen, or none.
    scene.begin().wait()
    return faults.clear() > 0


# -- others, and the clock ---------------------------------------------------------------------------------------------


def two_attempts(scene: Scene) -> bool:
    """An old machine that is not dead yet, and its successor."""
    one = scene.begin(step_s=0.003, steps=2 * STEPS)
    scene.at_once = scene.draw.random() < 0.5
    if not scene.at_once:
        _until_restored(one)
        _let_go(one, scene.draw.random() * scene.later_s)
    two = scene.begin(step_s=0.003)
    both = one.lives  # It soon sees that it is outnumbered, and leaves.
    both = _until_restored(two) and both
    if not scene.at_once:  # Else they may have taken the same number, or each other's.
        two.must_end_with = {0}
        one.hear()
        # The save under way may have looked for a newer attempt before there was one; the next one has not.
        if one.lives and one.unsaved > 1:
            one.must_end_with = {76}
    if scene.draw.random() < 0.5:
        _let_go(two, scene.draw.random() * scene.later_s)
        scene.draw.choice([one, two]).kill()
    one.wait()
    two.wait()
    return both


def clock_jumps(scene: Scene) -> bool:
    """This machine's clock, and all that the store says of times, are off by years."""
    off = scene.draw.choice([-1, 1]) * scene.draw.randrange(1, 10**9)
    for path in [scene.behind.parent, *scene.behind.rglob("*")]:
        when = time.time() + scene.draw.randrange(-(10**9), 10**9)
        os.utime(path, (when, when))
    child = scene.begin(clock_s=off, kill_at=(scene.draw.choice(POINTS), scene.draw.randint(1, STEPS)))
    child.wait()
    return bool(scene.before)


def machine_lost_before_the_upload(scene: Scene) -> bool:
    """The mount dies with the machine: what it had not uploaded is gone."""
    assert scene.place.mount
    child = scene.begin(step_s=0.03)
    _until_restored(child)
    _let_go(child, scene.draw.random() * 1.0)
    child.kill()
    scene.place.mount.kill()
    child.wait()
    there = truth.whole(scene.behind, scene.plan.run)
    return child.committed > (there[0].step if there else 0)


MANIFEST, STATE, SHARE = "MANIFEST.json", "state.json", "share-00000.safetensors"
EVERYWHERE: dict[str, Strike] = {
    "kill at random": kill_at_random,
    "kill at the start": kill_at_the_start,
    **{f"kill at {point}": kill_at(point) for point in POINTS},
    "torn": damaged(torn),
    "torn manifest": damaged(torn, MANIFEST),
    "flipped bit": damaged(flipped),
    "flipped bit in the manifest": damaged(flipped, MANIFEST),
    "flipped bit in state.json": damaged(flipped, STATE),
    "emptied": damaged(emptied),
    "grown": damaged(grown),
    "missing": damaged(removed),
    "manifest before its share": damaged(removed, SHARE),
    "duplicated": damaged(copied_over),
    "swapped": damaged(exchanged),
    "swapped manifests": damaged(exchanged, MANIFEST),
    "another run's file": damaged(another_runs),
    "another run's checkpoint": another_runs_checkpoint,
    "under another's name": under_anothers_name,
    "two attempts alive": two_attempts,
    "clock jumps": clock_jumps,
}
WHERE_CALLS_FAIL: dict[str, Strike] = {
    "close() fails": failing("close", errno.EIO),
    "ENOSPC": failing("write", errno.ENOSPC),
    "ENOSPC for good": failing("write", errno.ENOSPC, times=FOR_GOOD),
    "EIO": failing("write", errno.EIO),
    "EIO for good": failing("write", errno.EIO, times=FOR_GOOD),
    "EIO at a read": failing("read", errno.EIO),
    "EIO at the restore": failing("read", errno.EIO, restoring=True),
    "EIO at the restore for good": failing("read", errno.EIO, times=FOR_GOOD, restoring=True),
    "newest unreadable": newest_unreadable,
    "fsync fails": failing("fsync", errno.EIO),
    "mount gone": gone,
    "mount gone at the restore": failing("read", errno.ENOTCONN, times=FOR_GOOD, restoring=True),
    "read-only": failing("create", errno.EROFS, times=FOR_GOOD),
    "hung write": hanging("write"),
    "hung close": hanging("close"),
    "hung read at the restore": hanging("read", restoring=True),
    "hung close at the restore": hanging("close", restoring=True),
    "frozen daemon": frozen,
    "silently torn": silently_torn,
    "stale listing": stale,
}
BY_STORE: dict[str, dict[str, Strike]] = {
    "local": EVERYWHERE,
    "sequential": {**EVERYWHERE, **WHERE_CALLS_FAIL},
    "local-ranks": EVERYWHERE,
    "sequential-ranks": {**EVERYWHERE, **WHERE_CALLS_FAIL},
    "rclone": {
        **{name: EVERYWHERE[name] for name in EVERYWHERE if name.startswith("kill") or name == "two attempts alive"},
        "frozen daemon": frozen,
    },
    "rclone-cached": {"machine lost before the upload": machine_lost_before_the_upload},
}
NOT_THE_NEWEST = {"stale listing"}
"""Here the newest whole checkpoint cannot be known; any whole one of this run will do, or none."""
MAY_END_WITH = {
    "hung write": {75}, "hung close": {75}, "hung read at the restore": {75},
    "hung close at the restore": {75}, "frozen daemon": {75},
    "two attempts alive": {76}, "stale listing": {76},
}  # fmt: skip
"""Besides 0, where it is not known what the fault hit: a call may be slow by itself, or two attempts begin at once.

Where it is known, the strike says with what the attempt must end (`Child.must_end_with`).
"""
LIES = {"silently torn"}
"""Here what was committed need not be there: the store said it was."""
