"""A campaign of faults: its episodes, the workers that run them, and the search for planted mistakes."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import selectors
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

import bucket_lab  # noqa: E402
import truth  # noqa: E402
from attempt import Plan  # noqa: E402
from child import start  # noqa: E402
from faults import BY_STORE, LIES, MAY_END_WITH, NOT_THE_NEWEST  # noqa: E402
from plants import PLANTS  # noqa: E402
from scene import OTHER, STEPS, Scene  # noqa: E402
from stores import NAMES, Place, missing, place  # noqa: E402
from tally import Tally, keep  # noqa: E402
from watch import Watch  # noqa: E402

EPISODE = 12
"""Number of faults that strike one run, one after another."""
WHOLE = {
    "local": 10_000, "sequential": 10_000, "local-ranks": 600, "sequential-ranks": 900, "rclone": 300,
    "rclone-cached": 300,
}  # fmt: skip
PLANT_FAULTS = 2000


@dataclass(frozen=True)
class Job:
    """One run on one store, and the faults that strike it."""

    store: str
    episode: int
    seed: int
    faults: int
    plant: str = ""
    kinds: tuple[str, ...] = ()
    """The kinds of faults to draw from; empty: all of the store's."""


def judge(scene: Scene, kind: str, after: list[truth.Whole]) -> str | None:
    """Judge how a run survived a fault: the problem, or None."""
    for number, child in enumerate(scene.children):
        if child.crash:
            return f"attempt {number} crashed: {child.crash}"
        if trouble := child.end(child.must_end_with or {0, *MAY_END_WITH.get(kind, ())}):
            return f"attempt {number} {trouble}"
        restore = child.restored
        if restore is None:
            continue
        step = restore["restored"]
        if any(other.get("checkpoint") != restore.get("checkpoint") for other in child.restores):
            return f"attempt {number}: its ranks restored {[other.get('checkpoint') for other in child.restores]}"
        if step is None:
            if scene.before and kind not in NOT_THE_NEWEST:
                return f"attempt {number} found nothing, but {scene.before[0]} was whole"
            continue
        found = truth.named(restore["checkpoint"])
        assert found
        for restore in child.restores:
            mine = truth.cut(truth.state(scene.plan.run, step), restore["rank"], child.plan.ranks)
            if restore["digest"] != truth.digest(mine) or found.step != step:
                return f"attempt {number} restored a state that differs from {found}"
            if restore["run"] != scene.plan.run:
                return f"attempt {number} restored run {restore['run']}'s counters"
        if kind in NOT_THE_NEWEST:
            continue
        newest = scene.before[0] if scene.before else None
        later = number > 0 or scene.at_once  # It may have restored what another attempt saved meanwhile.
        if found != newest and not (later and (newest is None or found > newest)):
            return f"attempt {number} restored {found}, but the newest whole one was {newest}"
    if scene.before and not after:
        return f"no whole checkpoint is left; {scene.before[0]} was whole before"
    if scene.before and after[0] < scene.before[0]:
        return f"the newest whole checkpoint is now {after[0]}; before, it was {scene.before[0]}"
    committed = max((child.committed for child in scene.children), default=0)
    if kind not in LIES and not scene.place.uploads_later and committed > (after[0].step if after else 0):
        return f"step {committed} was committed, but the newest whole checkpoint is {after[0] if after else None}"
    return None


def episode(job: Job, where: Place, remount: Callable[[], Place]) -> Iterator[dict[str, Any]]:
    """Strike one run with faults; yields the outcome of each. `remount` mounts the store again."""
    draw = random.Random(f"{job.seed}/{job.store}/{job.episode}")
    run = job.episode % 50
    homes = where.behind.parent / f"homes-{job.store}-{job.episode}"
    name, neighbour = f"{job.store}-{job.episode}", f"other-{job.store}-{job.episode}"
    plant = PLANTS[job.plant][1] if job.plant else (lambda: None)
    plan = Plan(where.root / name, run, STEPS, plant=plant)
    start(Plan(where.root / neighbour, run + OTHER, 3, ranks=where.ranks, begin_at=1000, home=homes / "0")).wait()
    kinds = BY_STORE[job.store]
    later_s = 0.05
    for number in range(job.faults):
        if where.uploads_later and number:
            where = remount()
        kind = draw.choice([kind for kind in sorted(kinds) if not job.kinds or kind in job.kinds])
        behind = where.behind / name
        # A new mount for each fault means a new machine; elsewhere, one fault in five gets a new machine.
        home = homes / str(number) if where.uploads_later or draw.random() < 0.2 else homes / "0"
        plan = replace(plan, home=home)
        with Watch(behind, run) as watch:
            scene = Scene(
                where, plan.run_dir, behind, where.behind / neighbour, plan, random.Random(draw.random()),
                truth.whole(behind, run), [], later_s, watch,
            )  # fmt: skip
            hit = kinds[kind](scene)
        after = truth.whole(behind, run)
        for child in scene.children:
            if child.trained_s and (not child.was_killed or child.trained_s > later_s):
                later_s = 0.7 * later_s + 0.3 * min(1.0, child.trained_s)
        first = next((child.restored for child in scene.children if child.restored), None)
        wrong = judge(scene, kind, after) or watch.wrong
        if not wrong and number == job.faults - 1 and not where.uploads_later:  # Judge what the last fault left.
            with Watch(behind, run) as watch:
                last = replace(scene, before=after, children=[], watch=watch, at_once=False)
                last.begin().wait()
            wrong = judge(last, "", truth.whole(behind, run)) or watch.wrong
        yield {
            "store": job.store, "kind": kind, "number": job.episode * EPISODE + number, "hit": int(hit),
            "restored": (first or {}).get("restored"), "wrong": wrong,
        }  # fmt: skip
        if wrong:
            return
    for path in (where.behind / name, where.behind / neighbour, homes):
        shutil.rmtree(path, ignore_errors=True)


def work(jobs: list[Job], folder: Path, pipe: int) -> None:
    """Run a worker's jobs, one after another; writes a line for each fault to the pipe."""
    folder.mkdir()
    if any(job.store.endswith("-ranks") for job in jobs):
        import torch._dynamo  # Takes a second; otherwise each process imports it with its first DTensor.  # noqa: F401
    gc.freeze()  # Attempts are forks of this process; what the collector does not touch, they need not copy.
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as mount:
        store = None
        if any(job.store.startswith("rclone") for job in jobs):
            store = stack.enter_context(bucket_lab.store(folder / "s3"))
        before, where = "", Place("", folder, folder)
        for job in jobs:
            mounted = folder / job.store
            mounted.mkdir(exist_ok=True)

            def remount(name: str = job.store, mounted: Path = mounted) -> Place:
                mount.close()
                return mount.enter_context(place(name, mounted, store))

            where = where if job.store == before and not where.uploads_later else remount()
            before = job.store
            for line in episode(job, where, remount):
                os.write(pipe, json.dumps(line).encode() + b"\n")
                if line["wrong"]:
                    return
            os.write(pipe, json.dumps({"store": job.store, "done": job.episode}).encode() + b"\n")


def campaign(jobs: list[Job], workers: int, tally: Tally, state: Path | None, folder: Path) -> Tally:
    """Run the jobs in worker processes; stops at the first fault that is not survived."""
    todo = [job for job in jobs if (job.store, job.episode) not in tally.done]
    before_s = tally.ran.get("seconds", None if tally.struck else 0.0)
    if todo:
        tally.ran = {"workers": workers, "cores": os.cpu_count(), "commit": commit()}
    pids, rests = {}, {}
    with selectors.DefaultSelector() as selector:
        for number in range(min(workers, len(todo))):
            ours, theirs = os.pipe()
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    os.close(ours)
                    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
                    work(todo[number::workers], folder / f"worker-{number}", theirs)
                    code = 0
                except SystemExit:
                    pass
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            os.close(theirs)
            pids[ours], rests[ours] = pid, b""
            selector.register(ours, selectors.EVENT_READ)
        total, begun, shown_at, failed = sum(job.faults for job in todo), time.monotonic(), 0.0, False
        try:
            while pids and not tally.wrong:
                for key, _ in selector.select():
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        selector.unregister(key.fd)
                        os.close(key.fd)
                        failed = os.waitpid(pids.pop(key.fd), 0)[1] != 0 or failed
                        continue
                    *lines, rests[key.fd] = (rests[key.fd] + data).split(b"\n")
                    for line in lines:
                        tally.add(json.loads(line))
                now = time.monotonic()
                if now - shown_at > (1 if sys.stdout.isatty() else 30):
                    shown_at = now
                    count, hits = sum(tally.struck.values()), sum(tally.hit.values())
                    show(f"{count} of {total} faults struck, {hits} hit, {len(tally.wrong)} wrong, {now - begun:.0f} s")
                    clock(tally, before_s, begun)
                    keep(tally, state)
        finally:
            for ours, pid in pids.items():
                os.close(ours)  # A worker that lost its SIGTERM (possible within a callback) now fails to write.
                os.kill(pid, signal.SIGTERM)
                os.waitpid(pid, 0)
        if todo:
            clock(tally, before_s, begun)
        keep(tally, state)
        if failed:
            raise SystemExit("a worker failed, so the campaign has no result")
    return tally


def clock(tally: Tally, before_s: float | None, begun: float) -> None:
    """Record the date, and the campaign's seconds including its earlier parts, if those are known."""
    tally.ran["date"] = time.strftime("%Y-%m-%d", time.gmtime())
    if before_s is not None:
        tally.ran["seconds"] = round(before_s + time.monotonic() - begun, 1)


def commit() -> str:
    """The commit of the code under test; "unknown" outside a repository."""
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return asked.stdout.strip() or "unknown"


def show(text: str) -> None:
    print(f"\r{text}" if sys.stdout.isatty() else text, end="" if sys.stdout.isatty() else "\n", flush=True)


def jobs_for(faults: dict[str, int], seed: int, kinds: tuple[str, ...]) -> list[Job]:
    """List the episodes of a campaign, those of slow stores first."""
    found = []
    for store in reversed(NAMES):
        count = faults.get(store, 0)
        for number in range(-(-count // EPISODE)):
            found.append(Job(store, number, seed, min(EPISODE, count - number * EPISODE), "", kinds))
    return found


def is_whole(tally: Tally) -> bool:
    """Whether the whole campaign is over, and every fault was survived."""
    over = {(job.store, job.episode) for job in jobs_for(WHOLE, 0, ())}
    return tally.what.get("faults") == WHOLE and not tally.what["kinds"] and tally.done == over and not tally.wrong


def planted(name: str, seed: int, kinds: tuple[str, ...], workers: int, folder: Path) -> str | None:
    """Search for a planted mistake: a line that says how many faults it took, or None if it was not found."""
    store = PLANTS[name][0]
    if missing(store):
        return f"{name}: not tried, {missing(store)}"
    jobs = [Job(store, number, seed, EPISODE, name, kinds) for number in range(PLANT_FAULTS // EPISODE)]
    folder.mkdir()
    tally = campaign(jobs, workers, Tally(), None, folder)
    if not tally.wrong:
        return None
    line = tally.wrong[0]
    count, why = sum(tally.struck.values()), line["wrong"].splitlines()[0]
    return f"{name}: found after {count} faults ({store}, {line['kind']}: {why})"
