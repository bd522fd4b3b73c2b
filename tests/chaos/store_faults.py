"""Faults of the store: calls that fail or hang, and a store that lies."""

from __future__ import annotations

import errno

import faultfs
from attempt import FAILURES
from child import Child
from scene import FILES, FILES_OF_SEVERAL, SECOND_SHARE, STEPS, Scene, Strike, folder_of, hangs, let_go, until_restored

RECORDS = (".jsonl", "-saved.json")
"""Path endings of records. The first must be written before a manifest; the second is optional."""

ANY = ("",)

FOR_GOOD = 10**6

ENDS = {errno.ENOSPC: 1, errno.EROFS: 1, errno.ENOTCONN: 75}
"""The exit codes for a store that is full, read-only or gone. Other errors are retried."""


def failing(call: str, number: int, times: int = 1, restoring: bool = False) -> Strike:
    """Make a fault in which a call fails, once or for good: during saves, or during the restore."""

    def strike(scene: Scene) -> bool:
        faults = scene.place.faults
        assert faults
        after, suffix = scene.draw.randrange(4), scene.draw.choice(_files_of(scene, call, restoring))
        # A permanent failure gets more steps, so that enough saves fail in a row even if the first ones succeed.
        steps = STEPS + FAILURES if times > 1 and not restoring else STEPS
        readable_still = scene.before
        if restoring and suffix == SECOND_SHARE and times > 1:
            # An attempt of one process writes no such file, so its checkpoints stay readable.
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
    """Path endings on which a call may fail."""
    if restoring:
        return scene.files
    return scene.files + RECORDS + ANY if call in ("write", "create") else scene.files + ANY


def _ends_reading(child: Child, number: int, times: int) -> set[int]:
    """Allowed exit codes of an attempt whose reads failed, once or for good.

    If it restored nevertheless, the failed reads belonged to a read-back, which never ends an attempt.
    """
    return {0} if times == 1 or child.restored else {ENDS.get(number, 1)}


def _ends_saving(child: Child, call: str, number: int, times: int, suffix: str) -> set[int]:
    """Allowed exit codes of an attempt whose saves failed, once or for good."""
    code = ENDS.get(number)
    if times == 1 and code:
        # A record is written again, or is optional. With ANY, it is unknown which file the failure hit.
        return {code} if suffix in FILES_OF_SEVERAL else {0} if suffix in RECORDS else {0, code}
    if times == 1 or call == "read":  # Retried; and a checkpoint that fails its read-back only does not count.
        return {0}
    if code:
        return {code} if child.unsaved else {0}  # Everything was saved: what failed was optional.
    return {1} if child.unsaved >= FAILURES else {0}


def newest_unreadable(scene: Scene) -> bool:
    """A file of the newest checkpoint stays unreadable: the attempt must restore an older one, never start over."""
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
    """The mount is gone: every call into it fails."""
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
    """Make a fault in which a call does not return: the attempt must end by itself."""

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
        left_for_it = _left_for_a_hang(child)  # Before `clear`, which would let an attempt that waits go on.
        hits = faults.clear()
        child.wait()
        child.must_end_with = left_for_it if hits else None
        return hits > 0

    return strike


def _left_for_a_hang(child: Child) -> set[int]:
    """Allowed exit codes of an attempt that hangs. With everything saved, it may end before the limit is reached."""
    return {75} if child.unsaved else {0, 75}


def frozen(scene: Scene) -> bool:
    """The mount's daemon freezes; while the attempt hangs, its machine is taken or it ends by itself."""
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
    """The store reports success, but loses the end of a file."""
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
    faults.stale(10 ** scene.draw.uniform(-1, 1))  # Listings show some of the last attempt's files, or none.
    scene.begin().wait()
    return faults.clear() > 0
