"""Faults of the store: calls that fail or hang, and a store that lies."""

from __future__ import annotations

import errno

import faultfs
from attempt import FAILURES
from child import Child
from scene import FILES, FILES_OF_SEVERAL, SECOND_SHARE, STEPS, Scene, Strike, folder_of, hangs, let_go, until_restored

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
            until_restored(child)
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
    until_restored(child)
    let_go(child, scene.draw.random() * scene.later_s)
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
            until_restored(child)
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
    until_restored(child)
    let_go(child, scene.draw.random() * scene.later_s)
    scene.place.freeze()
    try:
        hit = hangs(child)
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
