"""The faults of each store by name; each strikes a scene and returns whether it hit."""

from __future__ import annotations

import errno
import os
import time

import truth
from damage import (
    another_runs,
    another_runs_checkpoint,
    copied_over,
    damaged,
    emptied,
    exchanged,
    flipped,
    grown,
    removed,
    torn,
    under_anothers_name,
)
from scene import STEPS, Scene, Strike, let_go, until_restored
from store_faults import FOR_GOOD, failing, frozen, gone, hanging, newest_unreadable, silently_torn, stale

from trainer.checkpoint.writing import POINTS

# -- the machine is taken ----------------------------------------------------------------------------------------------


def kill_at_random(scene: Scene) -> bool:
    child = scene.begin()
    until_restored(child)
    let_go(child, scene.draw.random() * scene.later_s)
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
    let_go(child, scene.draw.random() * 0.02)
    child.kill(scene.rank_of(child))
    child.wait()
    return child.was_killed


# -- others, and the clock ---------------------------------------------------------------------------------------------


def two_attempts(scene: Scene) -> bool:
    """An old attempt is still alive when its successor starts."""
    one = scene.begin(step_s=0.003, steps=2 * STEPS)
    scene.at_once = scene.draw.random() < 0.5
    if not scene.at_once:
        until_restored(one)
        let_go(one, scene.draw.random() * scene.later_s)
    two = scene.begin(step_s=0.003)
    both = one.lives  # Checked now: it leaves soon after it sees the newer attempt.
    both = until_restored(two) and both
    if not scene.at_once:  # Started together, they may take the same number, or numbers in either order.
        two.must_end_with = {0}
        one.read_all()
        # The save under way may have looked for a newer attempt too early; the next save finds it.
        if one.lives and one.unsaved > 1:
            one.must_end_with = {76}
    if scene.draw.random() < 0.5:
        let_go(two, scene.draw.random() * scene.later_s)
        scene.draw.choice([one, two]).kill()
    one.wait()
    two.wait()
    return both


def clock_jumps(scene: Scene) -> bool:
    """This machine's clock and all timestamps in the store are wrong by years."""
    off = scene.draw.choice([-1, 1]) * scene.draw.randrange(1, 10**9)
    for path in [scene.behind.parent, *scene.behind.rglob("*")]:
        when = time.time() + scene.draw.randrange(-(10**9), 10**9)
        os.utime(path, (when, when))
    child = scene.begin(clock_s=off, kill_at=(scene.draw.choice(POINTS), scene.draw.randint(1, STEPS)))
    child.wait()
    return bool(scene.before)


def machine_lost_before_the_upload(scene: Scene) -> bool:
    """The mount dies with the machine: files that it had not uploaded are lost."""
    assert scene.place.mount
    child = scene.begin(step_s=0.03)
    until_restored(child)
    let_go(child, scene.draw.random() * 1.0)
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
"""Here an attempt cannot know the newest whole checkpoint: it may restore any whole one of this run, or none."""

MAY_END_WITH = {
    "hung write": {75}, "hung close": {75}, "hung read at the restore": {75},
    "hung close at the restore": {75}, "frozen daemon": {75},
    "two attempts alive": {76}, "stale listing": {76},
}  # fmt: skip
"""Exit codes allowed besides 0, if it is unknown what the fault hit: a call may just be slow, or two attempts may begin
together.

If it is known, the strike sets the only allowed codes (`Child.must_end_with`).
"""

LIES = {"silently torn"}
"""Here a committed checkpoint may be damaged: the store reported success for data that it lost."""
