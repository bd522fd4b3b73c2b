"""What the trace of a bucket tells: the checkpoints, the saves, and whether a restart resumed."""

import itertools
import json
import os
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
from traced import Fs

from skyspot.rehearsal import boundaries, files, naming, saves
from skyspot.rehearsal.boundaries import counted
from skyspot.rehearsal.bucketfs.strike import Strike
from skyspot.rehearsal.bucketfs.trace import read_trace
from skyspot.rehearsal.evidence import Evidence
from skyspot.rehearsal.lives import Life, follow
from skyspot.rehearsal.result import Result, Settings
from skyspot.rehearsal.resumes import (
    ALL_DONE,
    FIRST,
    LOST_WORK,
    NOT_SEEN,
    NOTHING_THERE,
    RESUMED,
)
from skyspot.rehearsal.saves import Learnt
from skyspot.rehearsal.task import read_task
from skyspot.rehearsal.tracing import Tracing

STEPS, EVERY = 10, 2
Save = Callable[[Fs, int], None]
Load = Callable[[Fs], int | None]


@dataclass(frozen=True)
class Saver:
    """How a script saves, and how it finds what to go on from: the step, or None."""

    save: Save
    load: Load
    numbered: bool = False
    in_place: bool = False
    """It writes over its only checkpoint: a kill in the middle leaves none."""


def test_the_kinds_of_files_are_told_apart_for_the_user() -> None:
    def run(fs: Fs) -> None:
        fs.write("config.json", 1)
        for step in range(1, 5):
            fs.tick()
            fs.write(f"step-{step}/model.pt", step)
            fs.append("log.txt", step)
        fs.write("result.json", 4)

    found = Evidence(("result.json",))
    found.add("reference", Fs().attempt(run))
    said = "checkpoints: step-#/model.pt; not struck: result.json (result), log.txt (log), config.json (settings)"
    assert files.told(found.kinds()) == said
    many = [replace(found.kinds()[0], pattern=f"{number}.pt") for number in range(9)]
    assert files.told(many) == "checkpoints: 0.pt, 1.pt, 2.pt, 3.pt, 4.pt, 5.pt and 3 more"
    assert files.told([]) == "checkpoints: none"
    kind = {"pattern": "log.txt", "role": "log", "why": "it is appended to"}
    assert kind in Result([], [], 1.0, files=found.kinds()).to_json()["files"]


# -- savers ----------------------------------------------------------------------------------------------------------


def in_place() -> Saver:
    return Saver(lambda fs, step: fs.write("ckpt.pt", step), lambda fs: fs.read("ckpt.pt"), in_place=True)


def read_write() -> Saver:
    """A fixed-size file, opened with r+b."""
    return Saver(lambda fs, step: fs.write("state.dat", step, flags=0), lambda fs: fs.read("state.dat"), in_place=True)


def renamed() -> Saver:
    def save(fs: Fs, step: int) -> None:
        fs.write("out/state.pt.tmp", step)
        fs.rename("out/state.pt.tmp", "out/state.pt")

    return Saver(save, lambda fs: fs.read("out/state.pt"))


def renamed_from_random() -> Saver:
    names = random.Random(5)

    def save(fs: Fs, step: int) -> None:
        name = "tmp" + "".join(names.choice("abcdefghij0123456789_") for _ in range(8))
        fs.write(name, step)
        fs.rename(name, "model.ckpt")

    return Saver(save, lambda fs: fs.read("model.ckpt"))


def newest_whole(fs: Fs, pattern: str) -> int | None:
    for path in reversed(fs.list(pattern)):
        found = fs.read(path)
        if isinstance(found, int):
            return found
    return None


def numbered() -> Saver:
    return Saver(
        lambda fs, step: fs.write(f"step_{step:04d}.pt", step), lambda fs: newest_whole(fs, r"step_\d+"), numbered=True
    )


def numbered_keep_2() -> Saver:
    def save(fs: Fs, step: int) -> None:
        fs.write(f"ckpt/epoch-{step}.pt", step)
        for path in fs.list("ckpt/epoch-")[:-2]:
            fs.unlink(path)

    return Saver(save, lambda fs: newest_whole(fs, "ckpt/epoch-"), numbered=True)


FOLDER = ("model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors",
          "model.safetensors.index.json", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "config.json")  # fmt: skip


def read_folder(fs: Fs, folder: str, last: str) -> int | None:
    """Its step, if all of it is there."""
    if f"{folder}/{last}" not in fs.files or not isinstance(fs.read(f"{folder}/{last}"), int):
        return None
    steps = {fs.read(f"{folder}/{name}") for name in FOLDER if name != "config.json"}
    return steps.pop() if len(steps) == 1 and None not in steps else None


def folders() -> Saver:
    """As transformers' Trainer: many files, trainer_state.json last, keep 2."""

    def save(fs: Fs, step: int) -> None:
        folder = f"out/checkpoint-{step}"
        fs.mkdir(folder)
        for name in FOLDER:
            fs.write(f"{folder}/{name}", step, 200 if name.endswith(("json", "pth")) else 150_000)
        fs.write(f"{folder}/trainer_state.json", step, 900)
        for old in sorted({path.split("/")[1] for path in fs.files if path.startswith("out/")}, key=number_in)[:-2]:
            fs.rmtree(f"out/{old}")

    def load(fs: Fs) -> int | None:
        for folder in sorted({path.split("/")[1] for path in fs.files if "/" in path}, key=number_in, reverse=True):
            if (step := read_folder(fs, f"out/{folder}", "trainer_state.json")) is not None:
                return step
        return None

    return Saver(save, load, numbered=True)


def renamed_folders() -> Saver:
    """Written beside, and put in place as a folder."""

    def save(fs: Fs, step: int) -> None:
        fs.mkdir(f"tmp-checkpoint-{step}")
        for name in ("model.bin", "optimizer.bin"):
            fs.write(f"tmp-checkpoint-{step}/{name}", step)
        fs.rename(f"tmp-checkpoint-{step}", f"checkpoint-{step}")

    def load(fs: Fs) -> int | None:
        found = fs.list(r"checkpoint-\d+/model")
        if not found:
            return None
        fs.read(found[-1].replace("model", "optimizer"))
        return fs.read(found[-1])

    return Saver(save, load, numbered=True)


def sharded() -> Saver:
    """Two ranks, a file each."""

    def save(fs: Fs, step: int) -> None:
        for rank in range(2):
            fs.process = f"rank {rank}"
            fs.write(f"step-{step}-rank-{rank}.pt", step)

    def load(fs: Fs) -> int | None:
        for path in reversed(fs.list(r"step-\d+-rank-0")):
            both = fs.read(path), fs.read(path.replace("rank-0", "rank-1"))
            if both[0] == both[1] and both[0] is not None:
                return both[0]
        return None

    return Saver(save, load, numbered=True)


def with_latest() -> Saver:
    """Each save, then a file that names it; the next start believes that file."""

    def save(fs: Fs, step: int) -> None:
        fs.write(f"ckpt_{step}.pt", step)
        fs.write("latest.tmp", step, 8)
        fs.rename("latest.tmp", "latest")

    def load(fs: Fs) -> int | None:
        step = fs.read("latest")
        return None if step is None else fs.read(f"ckpt_{step}.pt")

    return Saver(save, load, numbered=True)


def with_done() -> Saver:
    """Two files and an empty marker, which is only looked for."""

    def save(fs: Fs, step: int) -> None:
        folder = f"ckpt-{step:08d}"
        fs.mkdir(folder)
        fs.write(f"{folder}/model.pt", step)
        fs.write(f"{folder}/opt.pt", step)
        fs.write(f"{folder}/DONE", step, 0)

    def load(fs: Fs) -> int | None:
        for path in reversed(fs.list(r"ckpt-\d+/DONE")):
            fs.read(path.replace("DONE", "opt.pt"))
            return fs.read(path.replace("DONE", "model.pt"))
        return None

    return Saver(save, load, numbered=True)


def rotated() -> Saver:
    """The last one is kept under another name, and read if the newest is not there or not whole."""

    def save(fs: Fs, step: int) -> None:
        if "state.json" in fs.files:
            fs.rename("state.json", "state.before.json")
        fs.write("state.tmp", step, 120)
        fs.rename("state.tmp", "state.json")

    def load(fs: Fs) -> int | None:
        found = fs.read("state.json")
        return found if found is not None else fs.read("state.before.json")

    return Saver(save, load)


def copied() -> Saver:
    """A copy of the last one is made before the next is written over it."""

    def save(fs: Fs, step: int) -> None:
        before = fs.read("model.pt")
        if before is not None:
            fs.write("model.prev.pt", before)
        fs.write("model.pt", step)

    def load(fs: Fs) -> int | None:
        found = fs.read("model.pt")
        return found if found is not None else fs.read("model.prev.pt")

    return Saver(save, load)


def spot_trainer() -> Saver:
    """Our own trainer's layout."""
    attempts = itertools.count(1)

    def name_of(fs: Fs) -> str:
        return f"a{len({path.split('/')[1] for path in fs.files if path.startswith('attempts/')}):04d}-{token[0]}"

    token = ["3f9c2a"]

    def save(fs: Fs, step: int) -> None:
        folder = f"checkpoints/{step:010d}-{name_of(fs)}-{step // EVERY}"
        fs.mkdir(folder)
        for rank in range(2):
            fs.write(f"{folder}/share-{rank:05d}.safetensors", step, 400_000)
        fs.write(f"{folder}/state.json", step, 900)
        fs.write(f"{folder}/MANIFEST.json", step, 700)

    def load(fs: Fs) -> int | None:
        token[0] = f"{next(attempts):x}b4e0d"
        name = f"a{1 + len({p.split('/')[1] for p in fs.files if p.startswith('attempts/')}):04d}-{token[0]}"
        if "run.json" not in fs.files:
            fs.write("run.json", "run", 300)
        fs.read("run.json")
        fs.write(f"attempts/{name}/0001-start.json", "start", 500)
        for path in reversed(fs.list(r"checkpoints/\d+-a\d+-\w+-\d+/MANIFEST")):
            if fs.read(path) is not None:
                for rest in ("state.json", "share-00000.safetensors", "share-00001.safetensors"):
                    found = fs.read(path.replace("MANIFEST.json", rest))
                return found
        return None

    return Saver(save, load, numbered=True)


def in_turns() -> Saver:
    """Two files by turns, each renamed into its place; the newer one is read, and that alone."""

    def save(fs: Fs, step: int) -> None:
        fs.write("state.tmp", step)
        fs.rename("state.tmp", "a.pt" if step // EVERY % 2 else "b.pt")

    def load(fs: Fs) -> int | None:
        newest = max(fs.list(r"[ab]\.pt"), key=lambda path: fs.files[path][0], default=None)
        return fs.read(newest) if newest else None

    return Saver(save, load)


def folders_in_turns() -> Saver:
    """Two folders by turns, of two files in place; the newer one that is whole is read."""

    def save(fs: Fs, step: int) -> None:
        for name in ("model.pt", "optimizer.pt"):
            fs.write(f"slot_{step // EVERY % 2}/{name}", step)

    def load(fs: Fs) -> int | None:
        found = [[fs.read(f"slot_{slot}/{name}") for name in ("model.pt", "optimizer.pt")] for slot in (0, 1)]
        return max((one[0] for one in found if one[0] == one[1] and one[0] is not None), default=None)

    return Saver(save, load)


SAVERS = (in_place, read_write, renamed, renamed_from_random, numbered, numbered_keep_2, folders, renamed_folders,
          sharded, with_latest, with_done, rotated, copied, spot_trainer, in_turns,
          folders_in_turns)  # fmt: skip


def number_in(text: str) -> int:
    return int("".join(filter(str.isdigit, text)) or 0)


# -- scripts ---------------------------------------------------------------------------------------------------------


def script(saver: Saver, steps: int = STEPS, every: int = EVERY, started: list[int] | None = None):
    """A whole training script, with the files that scripts write beside their checkpoints."""

    def run(fs: Fs) -> None:
        fs.process = "python train.py"
        if "config.json" not in fs.files:
            fs.write("config.json", "config", 300)
        fs.read("config.json")
        first = saver.load(fs) or 0
        if started is not None:
            started.append(first)
        for step in range(first + 1, steps + 1):
            fs.tick()
            fs.append("metrics.jsonl")
            fs.write("progress.json", step, 40)
            if step % every == 0:
                saver.save(fs, step)
        fs.write("result.json", "result", 50)

    return run


def undisturbed(run) -> Learnt:
    return saves.study(Fs().attempt(run), results=("result.json",))


def preempted(run, again, strikes: list[Strike]) -> tuple[Learnt, tuple[Life, ...]]:
    """The undisturbed run, then a leg: each strike hits one attempt, and the last one goes on to its end."""
    reference = Fs().attempt(run)
    fs = Fs()
    leg = [fs.attempt(again if number else run, strike) for number, strike in enumerate([*strikes, None])]
    learnt = saves.study(reference, [leg], results=("result.json",))
    return learnt, follow(learnt, leg)


def places_of(saver: Callable[[], Saver], index: int = 2):
    """Every place of one save of a script that is not disturbed."""
    reference = Fs().attempt(script(saver()))
    learnt = saves.study(reference, results=("result.json",))
    found = boundaries.boundaries(learnt.files, reference.calls, learnt.saves, learnt.saves[index - 1])
    return counted(learnt.files), found


@pytest.mark.parametrize("saver", SAVERS)
def test_an_undisturbed_run_tells_its_saves(saver) -> None:
    learnt = undisturbed(script(saver()))
    assert len(learnt.saves) == STEPS // EVERY
    assert [save.index for save in learnt.saves] == [1, 2, 3, 4, 5]
    assert all(save.complete is not None for save in learnt.saves)
    if saver().numbered:
        assert [save.numbers[0] for save in learnt.saves] == [2, 4, 6, 8, 10]
    assert learnt.files.role("metrics.jsonl") == "log"
    assert learnt.files.role("result.json") == "result"
    assert learnt.files.role("config.json") == "settings"
    assert learnt.files.role("progress.json") == "other"
    assert not learnt.only_at_the_end
    assert not learnt.irregular


@pytest.mark.parametrize("saver", SAVERS)
def test_struck_anywhere_in_a_save_a_right_script_is_not_called_wrong(saver) -> None:
    """And it is said to have resumed from what it did resume from; with one file alone, that may be destroyed."""
    only, places = places_of(saver)
    assert len(places) >= 4
    for place in places:
        started: list[int] = []
        run = script(saver(), started=started)
        _, lives = preempted(run, run, [Strike(place.number, place.phase, (only,))])
        resume = lives[1].resume
        truth = started[-1]
        assert lives[0].resume.outcome == FIRST
        if truth:
            assert resume.outcome == RESUMED, (place, resume)
            assert resume.used is not None
            assert resume.used.index == truth // EVERY, (place, resume)
            assert not resume.more
        elif saver().in_place:
            assert resume.outcome == LOST_WORK, (place, resume)
            assert "destroyed" in resume.why
        else:
            raise AssertionError(place)
        assert lives[1].saves[-1].index == 5
        assert not lives[1].again or truth == 2


@pytest.mark.slow
@pytest.mark.parametrize("saver", SAVERS)
def test_struck_anywhere_in_a_save_a_script_that_starts_over_has_lost_work(saver) -> None:
    only, places = places_of(saver)
    for place in places:
        forgetful = script(replace(saver(), load=lambda fs: None))
        _, lives = preempted(script(saver()), forgetful, [Strike(place.number, place.phase, (only,))])
        resume = lives[1].resume
        assert resume.outcome == LOST_WORK, (place, resume)
        assert resume.newest is None or resume.newest.index in (1, 2)
        assert not resume.proof


# -- resumes that are wrong ------------------------------------------------------------------------------------------


def leg(run, *strikes: Strike | None, again=None) -> tuple[Learnt, tuple[Life, ...]]:
    return preempted(run, again or run, list(strikes))


def progress_strike(step: int, phase: str = "before") -> Strike:
    """At the write of progress.json at this step: create or open, write, close are three calls each."""
    return Strike(3 * (step - 1), phase, (r"^progress\.json$",))


@pytest.mark.parametrize("saver", SAVERS)
def test_three_strikes_between_saves_are_three_resumes(saver) -> None:
    started: list[int] = []
    run = script(saver(), started=started)
    # Each attempt counts its own calls: 5 steps, then 2 more from step 4, then 3 more.
    _, lives = leg(run, *(progress_strike(count) for count in (6, 2, 4)))
    assert [life.resume.outcome for life in lives] == [FIRST, RESUMED, RESUMED, RESUMED]
    assert [life.resume.used and life.resume.used.index for life in lives[1:]] == [
        step // EVERY for step in started[-3:]
    ]
    assert not any(life.again for life in lives)
    assert all(life.resume.proof for life in lives[1:])


def test_what_is_read_is_told() -> None:
    """An optimizer's file that is not read is named."""
    saver = with_done()

    def load(fs: Fs) -> int | None:
        found = fs.list(r"ckpt-\d+/DONE")
        return fs.read(found[-1].replace("DONE", "model.pt")) if found else None

    _, lives = leg(script(replace(saver, load=load)), progress_strike(6))
    resume = lives[1].resume
    assert resume.outcome == RESUMED
    assert resume.used is not None
    assert (resume.used.label, resume.used.step, resume.used.index) == ("ckpt 4", 4, 2)
    assert resume.unread == ("ckpt-00000004/opt.pt",)
    assert [(one.path, one.whole, one.save) for one in resume.read] == [("ckpt-00000004/model.pt", True, "ckpt 4")]


def test_each_of_the_files_that_saves_take_turns_to_write_is_a_save() -> None:
    learnt = undisturbed(script(folders_in_turns()))
    assert learnt.files.family
    assert learnt.files.family.slots == (
        ("slot_1/model.pt", "slot_1/optimizer.pt"), ("slot_0/model.pt", "slot_0/optimizer.pt"),
    )  # fmt: skip
    assert [save.files[0].path[5] for save in learnt.saves] == ["1", "0", "1", "0", "1"]
    assert [len(save.files) for save in learnt.saves] == [2] * 5


def test_what_is_written_between_two_saves_and_never_read_takes_no_turn_with_them() -> None:
    def run(fs: Fs) -> None:
        first = fs.read("model.pt") or 0
        for step in range(first + 1, 11):
            fs.tick()
            fs.write("model.pt" if step % 2 else "predictions.npz", step)

    learnt = undisturbed(run)
    assert learnt.files.family
    assert learnt.files.family.slots == (("model.pt",), ("predictions.npz",)), "nothing tells yet"
    learnt, lives = leg(run, Strike(4 * 5, "before", (r"^(model|predictions)",)))
    assert learnt.files.family
    assert learnt.files.family.slots == ()
    assert lives[1].resume.outcome == RESUMED


def test_reading_a_checkpoint_and_starting_over_is_lost_work_by_its_numbers() -> None:
    def load(fs: Fs) -> int | None:
        newest_whole(fs, r"step_\d+")  # "Resuming from ..."
        return None

    _, lives = leg(script(replace(numbered(), load=load)), progress_strike(8))
    resume = lives[1].resume
    assert resume.outcome == LOST_WORK
    assert resume.why == "it read step_0006.pt (step 6) but wrote step 2 again as its first save"
    assert [save.label for save in lives[1].again] == ["step 2", "step 4", "step 6"]
    assert lives[1].again_s == pytest.approx(8.0, abs=0.1)  # It starts for two seconds, and each step takes one.


@pytest.mark.parametrize("saver", [renamed, rotated, in_place])
def test_reading_a_checkpoint_and_starting_over_is_lost_work_by_the_number_of_saves(saver) -> None:
    def load(fs: Fs) -> int | None:
        saver().load(fs)
        return None

    _, lives = leg(script(replace(saver(), load=load)), progress_strike(8))
    assert lives[1].resume.outcome == LOST_WORK
    assert lives[1].resume.why.endswith("made 5 saves, as many as the undisturbed run")
    assert lives[1].resume.dropped is not None
    assert lives[1].resume.dropped.index == 3


@pytest.mark.parametrize("saver", [renamed, rotated])
def test_strikes_before_anything_is_saved_do_not_hide_that_it_starts_over(saver) -> None:
    """They add no save, so that the number of saves of the last attempt tells as much as after one strike."""

    def dropped(fs: Fs) -> None:
        saver().load(fs)
        script(replace(saver(), load=lambda fs: None))(fs)

    _, lives = leg(script(saver()), progress_strike(6), *[progress_strike(2)] * 4, again=dropped)
    assert [life.resume.outcome for life in lives[1:-1]] == [RESUMED] * 4, "they are taken before they could tell"
    assert lives[-1].resume.outcome == LOST_WORK


def test_an_older_checkpoint_than_the_newest_is_lost_work() -> None:
    def load(fs: Fs) -> int | None:
        found = fs.list(r"step_\d+")
        return fs.read(found[0]) if found else None

    _, lives = leg(script(replace(numbered(), load=load)), progress_strike(8))
    resume = lives[1].resume
    assert resume.outcome == LOST_WORK
    assert resume.why == "it went on from step_0002.pt (step 2) though step_0006.pt (step 6) was complete"
    assert [save.label for save in lives[1].again] == ["step 4", "step 6"]


def test_names_sorted_as_text_are_an_older_checkpoint() -> None:
    """9 comes after 10. All of them are read, and what is saved next tells which one it went on from."""
    saver = numbered_keep_2()

    def load(fs: Fs) -> int | None:
        found = sorted(fs.list("ckpt/epoch-"))
        for path in fs.list("ckpt/epoch-"):
            fs.read(path)
        return fs.read(found[-1]) if found else None

    _, lives = leg(script(replace(saver, load=load), steps=14), progress_strike(12))
    assert lives[1].resume.outcome == LOST_WORK
    assert "ckpt/epoch-8.pt" in lives[1].resume.why
    assert "ckpt/epoch-10.pt" in lives[1].resume.why


def test_only_the_pointer_is_read() -> None:
    def load(fs: Fs) -> int | None:
        fs.read("latest")
        return None

    _, lives = leg(script(replace(with_latest(), load=load)), progress_strike(6))
    assert lives[1].resume.outcome == LOST_WORK
    assert lives[1].resume.why == "it read only latest though ckpt_4.pt (ckpt 4) was complete"


def test_n_more_steps_instead_of_n_in_all() -> None:
    def again(fs: Fs) -> None:
        first = numbered().load(fs) or 0
        script(numbered(), steps=first + STEPS)(fs)

    _, lives = leg(script(numbered()), progress_strike(8), again=again)
    assert lives[1].resume.outcome == RESUMED
    assert lives[1].resume.more == 3


def test_a_cut_file_that_is_used_though_an_older_one_was_whole() -> None:
    def load(fs: Fs) -> int | None:
        found = fs.list(r"step_\d+")
        if not found:
            return None
        fs.read(found[-1])
        return number_in(found[-1])

    run = script(replace(numbered(), load=load))
    only, places = places_of(numbered)
    [place] = [place for place in places if place.phase == "middle"][:1]
    _, lives = leg(run, Strike(place.number, "middle", (only,)))
    assert lives[1].resume.outcome == LOST_WORK
    assert lives[1].resume.why == (
        "it read step_0004.pt, which was cut, and not step_0002.pt (step 2), which was complete"
    )


@pytest.mark.parametrize("phase", ["before", "middle"])
def test_a_cut_file_that_ends_the_next_attempt_is_named(phase) -> None:
    """Even if nothing of it is there."""

    def again(fs: Fs) -> None:
        if fs.read(fs.list(r"step_\d+")[-1]) is None:
            fs.take()

    _, lives = leg(script(numbered()), Strike(1, phase, (r"^step_0006\.pt$",)), again=again)
    assert lives[1].resume.outcome == NOT_SEEN
    assert lives[1].resume.why == "it read step_0006.pt, which was cut, and saved nothing"


@pytest.mark.parametrize("size", [1000, 200_000])
def test_a_pair_of_files_of_two_saves_is_told(size) -> None:
    """Whichever of the two is the larger."""

    def save(fs: Fs, step: int) -> None:
        fs.write("model.pt", step, 100_000)
        fs.write("optim.pt", step, size)

    def load(fs: Fs) -> int | None:
        model, optim = fs.read("model.pt"), fs.read("optim.pt")
        return model if optim is not None else None

    run = script(Saver(save, load))
    learnt = undisturbed(run)
    assert [len(one.files) for one in learnt.saves] == [2] * 5
    # The third write to optim.pt: the calls are open, a write for each page, and close.
    _, lives = leg(run, Strike(2 * (3 if size == 1000 else 4), "before", (r"^optim\.pt$",)))
    assert [(one.path, one.save) for one in lives[1].resume.mixed] == [("model.pt", "save 3"), ("optim.pt", "save 2")]
    assert lives[0].writing is not None
    assert lives[0].writing.label == "save 3"
    assert lives[0].writing.missing == ("optim.pt",)
    assert lives[0].end.destroyed is not None
    assert lives[0].end.destroyed.label == "save 2"
    assert not lives[1].resume.proof


# -- right scripts that look odd -------------------------------------------------------------------------------------


def test_a_script_that_verifies_all_its_checkpoints_resumes_from_the_newest() -> None:
    def load(fs: Fs) -> int | None:
        found = [fs.read(path) for path in reversed(fs.list(r"step_\d+"))]
        return next((step for step in found if step is not None), None)

    _, lives = leg(script(replace(numbered(), load=load)), progress_strike(8))
    assert lives[1].resume.outcome == RESUMED
    assert lives[1].resume.used is not None
    assert lives[1].resume.used.label == "step 6"


def test_a_script_that_saves_again_what_it_resumed_from_is_right() -> None:
    def run(fs: Fs) -> None:
        step = newest_whole(fs, r"step_\d+") or 0
        while step < STEPS:
            if step % EVERY == 0:
                fs.write(f"step_{step:04d}.pt", step)
            fs.tick()
            step += 1

    only = r"^step_0008\.pt$"
    _, lives = leg(run, Strike(2, "middle", (only,)))
    assert lives[1].resume.outcome == RESUMED
    assert lives[1].resume.used is not None
    assert lives[1].resume.used.step == 6
    assert [save.step for save in lives[1].again] == [6]


def test_an_attempt_after_the_last_save_has_nothing_to_do() -> None:
    def run(fs: Fs) -> None:
        done = fs.list(r"step_\d+")
        if done and number_in(done[-1]) == STEPS:
            return
        script(numbered())(fs)

    _, lives = leg(run, Strike(0, "before", (r"^result\.json$",)))
    assert lives[1].resume.outcome == ALL_DONE


def test_an_attempt_that_is_taken_before_it_read_anything_proves_nothing() -> None:
    def gone(fs: Fs) -> None:
        fs.append("metrics.jsonl")
        fs.take()

    reference, fs = Fs().attempt(script(numbered())), Fs()
    attempts = [fs.attempt(script(numbered()), progress_strike(6)), fs.attempt(gone), fs.attempt(script(numbered()))]
    lives = follow(saves.study(reference, [attempts], results=("result.json",)), attempts)
    assert [life.resume.outcome for life in lives] == [FIRST, NOT_SEEN, RESUMED]


def test_a_strike_before_the_first_save_is_no_proof() -> None:
    _, lives = leg(script(numbered()), progress_strike(2))
    assert lives[1].resume.outcome == NOTHING_THERE
    assert not lives[1].resume.proof


def test_saves_by_the_clock_are_not_mistaken_for_a_start_from_nothing() -> None:
    """The restarted machine was slower and saved as often as the undisturbed run; its log is shorter all the same."""

    def slow(fs: Fs) -> None:
        first = renamed().load(fs) or 0
        for step in range(first + 1, STEPS + 1):
            fs.append("metrics.jsonl")
            renamed().save(fs, step)
        for _ in range(5 - (STEPS - first)):
            renamed().save(fs, STEPS)

    run = script(renamed())
    _, lives = leg(run, progress_strike(8), again=slow)
    assert len(lives[1].saves) == 5
    assert lives[1].resume.outcome == RESUMED


def test_a_file_that_the_strike_tore_is_not_complete() -> None:
    run = script(numbered())
    fs = Fs()
    first = fs.attempt(run, progress_strike(8))
    what, total, _ = fs.files["step_0006.pt"]
    fs.files["step_0006.pt"] = (what, total, total // 2)
    listing = {path: there for path, (_, _, there) in fs.files.items()}
    second = replace(fs.attempt(run), listing=listing)
    learnt = saves.study(Fs().attempt(run), [[first, second]])
    lives = follow(learnt, [first, second])
    assert lives[1].resume.outcome == RESUMED
    assert lives[1].resume.used is not None
    assert lives[1].resume.used.step == 4
    assert [(one.path, one.cut) for one in lives[1].resume.read] == [("step_0006.pt", True), ("step_0004.pt", False)]


def test_a_file_that_a_mount_lost_is_not_complete() -> None:
    run = script(numbered())
    fs = Fs()
    first = fs.attempt(run, progress_strike(8))
    del fs.files["step_0006.pt"]
    listing = {path: there for path, (_, _, there) in fs.files.items()}
    second = replace(fs.attempt(run), listing=listing)
    lives = follow(saves.study(Fs().attempt(run), [[first, second]]), [first, second])
    assert lives[1].resume.newest is not None
    assert lives[1].resume.newest.step == 4
    assert lives[1].resume.outcome == RESUMED


# -- other files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arrived", [0, 2, 4])
def test_a_save_that_had_not_arrived_when_the_machine_went_is_not_there_and_the_one_before_is(arrived: int) -> None:
    """Files arrive later: the third save had replaced an older one on the machine alone."""

    def first(fs: Fs) -> None:
        for step in (2, 4, 6):
            renamed().save(fs, step)
            if step == arrived:
                fs.call("upload", "out/state.pt", size=300_000)
        fs.take()

    fs, run = Fs(), script(renamed())
    taken, lies_there = fs.attempt(first), {"out/state.pt": 300_000} if arrived else {}
    fs.files = dict.fromkeys(lies_there, (arrived, 300000, 300000))
    attempts = [replace(taken, remains=lies_there, arrives_later=True), replace(fs.attempt(run), listing=lies_there)]
    lives = follow(saves.study(Fs().attempt(run), [attempts], results=("result.json",)), attempts)
    resume = lives[1].resume
    if arrived:
        assert resume.outcome == RESUMED
        assert resume.used is not None
        assert resume.used.index == arrived // 2
    else:
        assert resume.outcome == NOTHING_THERE, resume.why
    assert lives[0].end.newest == resume.used


def test_logs_are_told_apart() -> None:
    """Appended to, opened once and written to all along, or named as loggers name them."""

    def run(fs: Fs) -> None:
        tee = fs.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        events = fs.open("runs/events.out.tfevents.17.host.1.0", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for step in range(1, STEPS + 1):
            fs.tick()
            fs.put(tee, "output", "text", 40, 400, 40 * (step - 1))
            fs.put(events, "runs/events.out.tfevents.17.host.1.0", "events", 60, 600, 60 * (step - 1))
            fs.append("wandb/run-20260101_120000-a1b2c3d4/run-a1b2c3d4.wandb")
            fs.append("history.csv")
            if step % EVERY == 0:
                renamed().save(fs, step)
        fs.close(tee, "output", 400)
        fs.close(events, "runs/events.out.tfevents.17.host.1.0", 600)

    learnt = undisturbed(run)
    roles = {kind.example: kind.role for kind in learnt.files.kinds}
    assert roles == {
        "out/state.pt": "checkpoint",
        "out/state.pt.tmp": "scratch",
        "output": "log",
        "runs/events.out.tfevents.17.host.1.0": "log",
        "wandb/run-20260101_120000-a1b2c3d4/run-a1b2c3d4.wandb": "log",
        "history.csv": "log",
    }
    assert learnt.files.trust == "named"


def test_a_log_that_a_resume_reads_to_cut_it_is_no_checkpoint() -> None:
    def load(fs: Fs) -> int | None:
        step = renamed().load(fs)
        if "metrics.jsonl" in fs.files:
            fs.read("metrics.jsonl")
            handle = fs.open("metrics.jsonl", os.O_RDWR)
            size = 90 * (step or 0)
            fs.call(
                "truncate", "metrics.jsonl", lambda: fs.files.update({"metrics.jsonl": ("log", size, size)}),
                handle=handle, size=size,
            )  # fmt: skip
            fs.close(handle, "metrics.jsonl", 0)
        return step

    learnt, lives = leg(script(replace(renamed(), load=load)), progress_strike(8))
    assert learnt.files.role("metrics.jsonl") == "log"
    assert learnt.files.role("config.json") == "settings"
    assert lives[1].resume.outcome == RESUMED
    assert [one.path for one in lives[1].resume.read] == ["out/state.pt"]


def test_a_progress_file_that_is_read_back_does_not_hide_the_checkpoint() -> None:
    def load(fs: Fs) -> int | None:
        fs.read("progress.json")
        return renamed().load(fs)

    learnt, lives = leg(script(replace(renamed(), load=load)), progress_strike(8))
    assert len(learnt.saves) == 5
    assert lives[1].resume.used is not None
    assert lives[1].resume.used.largest == "out/state.pt"


def test_prepared_data_is_no_checkpoint() -> None:
    def load(fs: Fs) -> int | None:
        for part in range(8):
            path = f"tokens/{part:03d}.bin"
            if path not in fs.files:
                fs.write(path, "tokens", 2_000_000)
            fs.read(path)
        return numbered().load(fs)

    learnt, lives = leg(script(replace(numbered(), load=load)), progress_strike(8))
    assert [save.step for save in learnt.saves] == [2, 4, 6, 8, 10]
    assert lives[1].resume.used is not None
    assert lives[1].resume.used.step == 6


def test_the_best_and_the_last_are_two_kinds_of_saves() -> None:
    def save(fs: Fs, step: int) -> None:
        fs.write("last.pt", step)
        if step in (2, 4, 10):
            fs.write("best.pt", step)

    saver = Saver(save, lambda fs: fs.read("last.pt"))
    learnt, lives = leg(script(saver), progress_strike(8))
    assert learnt.files.family is not None
    assert learnt.files.family.kinds == ("last.pt",)
    assert lives[1].resume.outcome == RESUMED


@pytest.mark.parametrize("name", ["best.pt", "model-{step}.pt", "model.pt"])
def test_saves_on_best_only_are_irregular(name) -> None:
    def save(fs: Fs, step: int) -> None:
        if step in (1, 2, 3, 4, 20, 29):
            fs.write(name.format(step=step), step)

    learnt = undisturbed(script(Saver(save, lambda fs: None), steps=30, every=1))
    assert learnt.irregular
    assert len(learnt.saves) == 6


@pytest.mark.parametrize("name", ["model.pt", "final/model-00001-of-00002.safetensors"])
def test_a_save_at_the_end_only_is_told(name) -> None:
    def run(fs: Fs) -> None:
        fs.write("config.json", "config", 200)
        for _ in range(STEPS):
            fs.tick()
            fs.append("train.log")
        fs.write(name, STEPS)
        if "00001" in name:
            fs.write(name.replace("00001", "00002"), STEPS)

    learnt = undisturbed(run)
    assert learnt.only_at_the_end
    assert learnt.files.role("config.json") == "settings"


def test_a_script_that_never_saves_has_no_checkpoints() -> None:
    def run(fs: Fs) -> None:
        for step in range(STEPS):
            fs.tick()
            fs.append("train.log")
            fs.write("progress.json", step, 30)
        fs.write("result.json", "result", 30)

    learnt, lives = leg(run, progress_strike(5))
    assert learnt.files.family is None
    assert not learnt.saves
    assert lives[1].resume.outcome == NOTHING_THERE


def test_a_result_that_is_written_all_along_is_the_checkpoint() -> None:
    run = script(in_place())
    reference, fs = Fs().attempt(run), Fs()
    attempts = [fs.attempt(run, progress_strike(6)), fs.attempt(run)]
    learnt = saves.study(reference, [attempts], results=("ckpt.pt", "result.json"))
    assert learnt.files.role("ckpt.pt") == "checkpoint"
    assert follow(learnt, attempts)[1].resume.outcome == RESUMED


def test_a_file_of_any_name_is_a_checkpoint_once_a_restart_reads_it() -> None:
    """Until then it is a guess, good enough to strike at."""

    def save(fs: Fs, step: int) -> None:
        fs.write("table.tmp", step, 900)
        fs.rename("table.tmp", "table.json")

    run = script(Saver(save, lambda fs: fs.read("table.json")))
    learnt = undisturbed(run)
    assert learnt.files.trust == "guessed"
    assert [one.largest for one in learnt.saves] == ["table.json"] * 5
    learnt, lives = leg(run, progress_strike(6))
    assert learnt.files.trust == "read"
    assert lives[1].resume.outcome == RESUMED


def test_a_glob_of_the_user_names_the_checkpoints(tmp_path: Path) -> None:
    def run(fs: Fs) -> None:
        for step in range(1, STEPS + 1):
            fs.tick()
            fs.write("memory", step, 20)
            fs.write("model.pt", step)

    assert {kind.pattern for kind in undisturbed(run).files.kinds if kind.role == "checkpoint"} == {
        "memory",
        "model.pt",
    }
    learnt = saves.study(Fs().attempt(run), checkpoints=("mem*",))
    assert [kind.pattern for kind in learnt.files.kinds if kind.role == "checkpoint"] == ["memory"]
    assert len(learnt.saves) == STEPS
    assert learnt.files.trust == "told"
    task = "file_mounts: {/checkpoints: {name: b, mode: MOUNT}}\nrun: x\n"
    found = Tracing(read_task(task, tmp_path, {}, None), Settings(checkpoints=("mem*",))).evidence
    assert found
    found.add("reference", Fs().attempt(run))
    assert found.learnt == learnt, "--checkpoint does that"


def test_a_mapped_file_is_saved_when_it_is_synchronised() -> None:
    """Opened once; the kernel writes its pages back, and fsync ends each save."""

    def run(fs: Fs) -> None:
        handle = fs.open("weights.dat", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        fs.call("truncate", "weights.dat", handle=handle, size=400_000)
        for step in range(1, 5):
            fs.tick()
            for offset in (0, 131072, 262144):
                fs.put(handle, "weights.dat", step, 131072, 400_000, offset)
            fs.call("fsync", "weights.dat", handle=handle)
        fs.close(handle, "weights.dat", 1)

    learnt = undisturbed(run)
    assert len(learnt.saves) == 4
    assert all(save.complete is not None for save in learnt.saves)


def test_saves_that_overlap_are_told_apart() -> None:
    """A writer in the background: the file of one save is still open when the next is begun."""

    def run(fs: Fs) -> None:
        handles = {}
        for step in range(1, 6):
            fs.tick()
            path = f"step-{step}.pt"
            handles[step] = fs.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            fs.put(handles[step], path, step, 1000, 2000)
            if step > 1:
                fs.put(handles[step - 1], f"step-{step - 1}.pt", step - 1, 1000, 2000, 1000)
                fs.close(handles[step - 1], f"step-{step - 1}.pt", 2000)
                fs.append("train.log")
        fs.put(handles[5], "step-5.pt", 5, 1000, 2000, 1000)
        fs.close(handles[5], "step-5.pt", 2000)

    learnt = undisturbed(run)
    assert [save.step for save in learnt.saves] == [1, 2, 3, 4, 5]
    assert learnt.saves[0].complete is not None
    assert learnt.saves[1].begun < learnt.saves[0].complete


def test_ranks_that_write_at_once_and_run_ahead_share_their_saves() -> None:
    def run(fs: Fs) -> None:
        for step, rank in [(1, 0), (1, 1), (2, 1), (2, 0), (3, 0), (3, 1), (4, 0), (4, 1)]:
            fs.tick()
            fs.write(f"rank{rank}/state.pt", step)

    learnt = undisturbed(run)
    assert [sorted(file.path for file in save.files) for save in learnt.saves] == [
        ["rank0/state.pt", "rank1/state.pt"]
    ] * 4


def test_a_handle_that_a_child_process_closes_goes_on() -> None:
    def run(fs: Fs) -> None:
        for step in range(1, 4):
            fs.tick()
            handle = fs.open("model.pt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            fs.put(handle, "model.pt", step, 1000, 2000)
            fs.close(handle, "model.pt", 1000)
            fs.put(handle, "model.pt", step, 1000, 2000, 1000)
            fs.close(handle, "model.pt", 1000)

    learnt = undisturbed(run)
    assert [file.size for save in learnt.saves for file in save.files] == [2000] * 3
    assert learnt.files.role("model.pt") == "checkpoint"


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["ckpt-1.pt", "ckpt-2.pt"], ["ckpt 1", "ckpt 2"]),
        (["seed42/ckpt_rank0_step10.pt", "seed42/ckpt_rank1_step10.pt", "seed42/ckpt_rank0_step20.pt"],
         ["step 10", "step 10", "step 20"]),
        (["epoch=0-step=50.ckpt", "epoch=0-step=100.ckpt", "epoch=1-step=150.ckpt"],
         ["epoch 0, step 50", "epoch 0, step 100", "epoch 1, step 150"]),
        (["fold_0/epoch_0.pt", "fold_0/epoch_1.pt", "fold_1/epoch_0.pt"],
         ["fold 0, epoch 0", "fold 0, epoch 1", "fold 1, epoch 0"]),
        (["checkpoint-5/part_0.bin", "checkpoint-5/part_1.bin"], ["checkpoint 5", "checkpoint 5"]),
        (["checkpoint-5/weights_0.bin", "checkpoint-5/weights_1.bin"], ["checkpoint 5", "checkpoint 5"]),
        (["epoch=1-loss=0.31.pt", "epoch=2-loss=0.25.pt"], ["epoch 1", "epoch 2"]),
        (["step-1/__0_0.distcp", "step-1/__1_0.distcp", "step-2/__0_0.distcp"], ["step 1", "step 1", "step 2"]),
        (["weights_0.bin", "weights_1.bin", "weights_0.bin", "weights_1.bin"], ["", "", "", ""]),
    ],
)  # fmt: skip
def test_the_number_in_a_name_tells_the_save(paths, labels) -> None:
    names = [naming.parse(path) for path in paths]
    assert len({name.kind for name in names}) == 1
    places = naming.label_places(names)
    assert [naming.label(name, places) for name in names] == labels


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("tmpk3x_9a2b.pt", "#.pt"),
        ("checkpoints/0000000010-a0001-3f9c2a-1/share-00000.safetensors", "checkpoints/#-a#-#-#/share-#.safetensors"),
        ("runs/550e8400-e29b-41d4-a716-446655440000/e000010.pt", "runs/#/e#.pt"),
        ("decoder/layer.pt", "decoder/layer.pt"),
    ],
)
def test_random_parts_of_a_name_are_passed_over(path, kind) -> None:
    assert naming.parse(path).kind == kind


# -- where strikes fall ----------------------------------------------------------------------------------------------


def test_the_places_of_a_save_are_named() -> None:
    only, places = places_of(rotated)
    assert [place.description for place in places] == [
        "before the rename of state.json to state.before.json",
        "before the create of state.tmp",
        "before the write to state.tmp at 0",
        "in the middle of the write to state.tmp at 0",
        "before the close of state.tmp",
        "before the rename of state.tmp to state.json",
        "after the rename of state.tmp to state.json",
    ]
    assert only == r"^(?:state\.before\.json|state\.json|state\.tmp)$"


def test_the_deletion_of_an_older_save_belongs_to_the_one_before_it() -> None:
    _, places = places_of(numbered_keep_2, index=3)
    assert places[-1].description == "after the unlink of ckpt/epoch-2.pt"
    assert places[0].description == "before the create of ckpt/epoch-6.pt"


def test_a_sample_has_one_of_each_sort_and_is_the_same_for_a_seed() -> None:
    _, places = places_of(folders)
    chosen = boundaries.sample(places, 12, seed=3)
    assert chosen == boundaries.sample(places, 12, seed=3)
    assert chosen != boundaries.sample(places, 12, seed=4)
    assert len(chosen) == len(set(chosen)) == 12
    assert boundaries.sample(places, 1000, seed=1) == places


def test_a_trace_is_read_as_the_daemon_writes_it(tmp_path) -> None:
    """The same calls by way of the file."""
    attempt = Fs().attempt(script(folders()))
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(asdict(call)) + "\n" for call in attempt.calls) + '{"number": 1')
    assert read_trace(trace) == attempt.calls


# -- what shows late, or not at all ----------------------------------------------------------------------------------


def reads_and_starts_over(saver: Saver) -> Saver:
    def load(fs: Fs) -> int | None:
        saver.load(fs)
        return None

    return replace(saver, load=load)


@pytest.mark.parametrize("saver", [renamed, numbered])
def test_with_one_save_there_a_start_from_nothing_is_a_doubt(saver) -> None:
    """A right script that saves again what it resumed from looks the same."""
    run = script(reads_and_starts_over(saver()))

    def quiet(fs: Fs) -> None:
        fs.append, append = (lambda path, size=90: None), fs.append
        run(fs)
        fs.append = append

    _, lives = leg(quiet, progress_strike(4))
    resume = lives[1].resume
    assert resume.outcome == RESUMED
    assert resume.doubt.endswith("only one save was there to go on from")
    assert not resume.proof


def test_saves_at_a_notice_are_allowed_for() -> None:
    """Two attempts saved once more at a notice, so that the last one starts from the fourth save and makes three."""

    def run(fs: Fs) -> None:
        first = renamed().load(fs) or 0
        for step in range(first + 1, STEPS + 1):
            fs.tick()
            if (first, step) in ((0, 3), (2, 5)):
                renamed().save(fs, step - 1)  # At the notice.
                fs.take()
            if step % EVERY == 0:
                renamed().save(fs, step)

    def whole(fs: Fs) -> None:
        for step in range(EVERY, STEPS + 1, EVERY):
            fs.tick(EVERY)
            renamed().save(fs, step)

    fs = Fs()
    attempts = [
        replace(fs.attempt(run), noticed_s=fs.time),
        replace(fs.attempt(run), noticed_s=fs.time),
        fs.attempt(run),
    ]
    lives = follow(saves.study(Fs().attempt(whole), [attempts]), attempts)
    assert [life.resume.outcome for life in lives] == [FIRST, RESUMED, RESUMED]
    assert all(life.resume.proof for life in lives[1:])
    assert not any(life.resume.more for life in lives)


@pytest.mark.parametrize("written", [0, 100_000])
@pytest.mark.parametrize("path", ["step_0006.pt", "step_0006.tmp"])
def test_a_file_that_a_handler_closed_in_the_middle_of_a_save_is_not_complete(path: str, written: int) -> None:
    """The signal comes between open() and write(), or after half: `with` closes the file as the handler exits."""
    saver = numbered()

    def save(fs: Fs, step: int) -> None:
        if fs.process == "signalled" and step == 6:
            handle = fs.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            if written:
                fs.put(handle, path, step, written, 300_000)
            fs.close(handle, path, written)
            fs.take()
        saver.save(fs, step)

    def run(fs: Fs, process: str = "python train.py") -> None:
        for step in range((saver.load(fs) or 0) + 1, STEPS + 1):
            fs.tick()
            fs.process = process
            if step % EVERY == 0:
                save(fs, step)

    fs = Fs()
    first = fs.attempt(lambda fs: run(fs, "signalled"))
    attempts = [replace(first, noticed_s=first.calls[-1].time - 0.001, left=True), fs.attempt(run)]
    lives = follow(saves.study(Fs().attempt(run), [attempts]), attempts)
    assert lives[0].end.newest is not None
    assert lives[0].end.newest.index == 2, "the third is not complete"
    assert lives[1].resume.outcome == RESUMED, lives[1].resume.why
    assert lives[1].resume.used == lives[0].end.newest


def test_an_empty_file_is_complete_where_it_always_is_empty() -> None:
    def save(fs: Fs, step: int) -> None:
        fs.write(f"step_{step}/model.pt", step)
        fs.write(f"step_{step}/DONE", step, 0)

    def load(fs: Fs) -> int | None:
        return max((int(path.split("/")[0][5:]) for path in fs.list("step_.*/DONE")), default=None)

    run = script(Saver(save, load, numbered=True))
    _, lives = leg(run, Strike(0, "before", (r"^step_8/",)))
    assert lives[0].end.newest is not None
    assert lives[0].end.newest.index == 3


@pytest.mark.parametrize("left", [True, False])
def test_a_save_is_one_at_the_notice_if_the_attempt_left_with_it(left: bool) -> None:
    """One that does not hear of the notice saves on, until it is taken."""

    def run(fs: Fs) -> None:
        for step in range(EVERY, STEPS + 1, EVERY):
            fs.tick(EVERY)
            renamed().save(fs, step)

    fs = Fs()
    attempts = [replace(fs.attempt(run), noticed_s=fs.time - 3, finished=False, left=left)]
    lives = follow(saves.study(Fs().attempt(run), [attempts]), attempts)
    assert (lives[0].at_notice is not None) == left


def test_saves_of_what_was_resumed_from_are_allowed_for() -> None:
    """Each restart saves again what it resumed from, as a loop does that saves at its top."""

    def run(fs: Fs, until: int = STEPS) -> None:
        first = renamed().load(fs) or 0
        for step in range(first, until + 1):
            if step and step % EVERY == 0:
                renamed().save(fs, step)
            fs.tick()
        if until < STEPS:
            fs.take()

    fs = Fs()
    attempts = [fs.attempt(lambda fs: run(fs, 5)), fs.attempt(lambda fs: run(fs, 7)), fs.attempt(lambda fs: run(fs, 9))]
    attempts.append(fs.attempt(run))
    lives = follow(saves.study(Fs().attempt(run), [attempts]), attempts)
    assert [life.resume.outcome for life in lives] == [FIRST, RESUMED, RESUMED, RESUMED]
    assert [life.resume.more for life in lives] == [0, 0, 0, 0]


def test_a_file_of_a_checkpoint_that_is_cut_and_passed_over_is_named() -> None:
    """The weights of the newest are whole; its generator's file is not, and nobody notices."""

    def save(fs: Fs, step: int) -> None:
        fs.mkdir(f"checkpoint-{step}")
        fs.write(f"checkpoint-{step}/model.pt", step)
        fs.write(f"checkpoint-{step}/rng.pth", step, 5000)

    def load(fs: Fs) -> int | None:
        found = fs.list(r"checkpoint-\d+/model")
        if not found:
            return None
        if found[-1].replace("model.pt", "rng.pth") in fs.files:
            fs.read(found[-1].replace("model.pt", "rng.pth"))
        return fs.read(found[-1])

    run = script(Saver(save, load, numbered=True))
    _, lives = leg(run, Strike(1, "middle", (r"^checkpoint-6/rng\.pth$",)))
    resume = lives[1].resume
    assert resume.outcome == RESUMED
    assert resume.why == ("it read checkpoint-6/model.pt (checkpoint 6), of which checkpoint-6/rng.pth was cut")
    assert resume.newest is not None
    assert resume.newest.step == 4
    _, lives = leg(run, Strike(0, "before", (r"^checkpoint-6/rng\.pth$",)))
    assert lives[1].resume.used is not None
    assert lives[1].resume.used.missing == ("checkpoint-#/rng.pth",)


def test_the_third_save_is_the_one_to_strike() -> None:
    learnt = undisturbed(script(numbered()))
    save = boundaries.typical(learnt.saves)
    assert save is not None
    assert save.index == 3


def test_what_no_restart_reads_is_not_needed() -> None:
    """The optimizer's file is renamed over first; the last save of the model is there still."""

    def save(fs: Fs, step: int) -> None:
        for name in ("optimizer.pt", "model.pt"):
            fs.write(f"{name}.tmp", step, 500_000 if name == "optimizer.pt" else 300_000)
            fs.rename(f"{name}.tmp", name)

    run = script(Saver(save, lambda fs: fs.read("model.pt")))
    _, lives = leg(run, Strike(2 * 6, "before", (r"^model\.pt\.tmp$",)))
    assert lives[0].end.newest is not None
    assert lives[0].end.newest.index == 2
    assert lives[1].resume.outcome == RESUMED
    assert lives[1].resume.unread == ("optimizer.pt",)
