"""What was newer than the save that an attempt went on from, and what it passed over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from traced import Fs

from skyspot.rehearsal import evidence, journal, naming, remedies, saves, times
from skyspot.rehearsal.bucketfs.strike import Strike
from skyspot.rehearsal.lives import Life, follow
from skyspot.rehearsal.result import Row
from skyspot.rehearsal.resumes import LOST_WORK, NOTHING_THERE, RESUMED
from skyspot.rehearsal.saves import Learnt

EPOCHS = 10
Script = Callable[[Fs], None]


def leg(run: Script, *strikes: Strike, results: tuple[str, ...] = ("result.json",)) -> tuple[Learnt, tuple[Life, ...]]:
    """The undisturbed run, then a leg: each strike hits one attempt, and the last one goes on to its end."""
    found, fs = evidence.Evidence(results), Fs()
    found.add("reference", Fs().attempt(run))
    for strike in (*strikes, None):
        found.add("leg", fs.attempt(run, strike))
    assert found.learnt is not None
    return found.learnt, found.lives("leg")


def put(fs: Fs, path: str, what: object, size: int = 300_000) -> None:
    fs.write(f"{path}.tmp", what, size)
    fs.rename(f"{path}.tmp", path)


def before(path: str, times: int) -> Strike:
    """Before the rename in the save after so many."""
    return Strike(times, "before", (rf"^{path}$",), does="rename")


def epochs(load: str, best_until: int, first_best: bool = False, size: int = 300_000, last: str = "last.pt") -> Script:
    """A loop that saves the last epoch, and the best one as long as it gets better."""

    def run(fs: Fs) -> None:
        done = fs.read(load) or 0
        assert isinstance(done, int)
        for epoch in range(done + 1, EPOCHS + 1):
            fs.tick()
            files = [last, *(["best.pt"] if epoch <= best_until else [])]
            for path in reversed(files) if first_best else files:
                put(fs, path, epoch, size if path == last else 300_000)
        fs.write("result.json", 1, 30)

    return run


@pytest.mark.parametrize("first_best", [False, True])
def test_one_that_goes_on_from_its_best_epoch_has_lost_the_last_ones(first_best: bool) -> None:
    _, lives = leg(epochs("best.pt", 3, first_best), before(r"last\.pt\.tmp", 7))
    resume = lives[1].resume
    assert resume.outcome == LOST_WORK
    assert resume.why == "it went on from best.pt (save 3) though last.pt, which is newer, was complete"
    assert resume.used is not None
    assert resume.used.index == 3


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (epochs("last.pt", 3), "it reads the last one"),
        (epochs("best.pt", 3, last="other.txt"), "the other is not named as a checkpoint"),
        (epochs("best.pt", 3, size=100_000), "the other has not the size of a checkpoint"),
    ],
)
def test_what_is_no_newer_checkpoint_is_not_taken_for_one(run: Script, why: str) -> None:
    _, lives = leg(run, before(r"(last\.pt|other\.txt)\.tmp", 7))
    assert lives[1].resume.outcome == RESUMED, why


@pytest.mark.parametrize("first_best", [False, True])
def test_the_best_epoch_is_as_new_as_the_last_one_until_that_is_another(first_best: bool) -> None:
    _, lives = leg(epochs("best.pt", 6, first_best), before(r"last\.pt\.tmp", 6))
    assert lives[1].resume.outcome == RESUMED


def worse_best(fs: Fs) -> None:
    """Its best score is not in the checkpoint."""
    done = fs.read("last.pt") or 0
    assert isinstance(done, int)
    for epoch in range(done + 1, EPOCHS + 1):
        fs.tick()
        put(fs, "last.pt", epoch)
        if epoch in (1, 2, done + 1):
            put(fs, "model_best.pt", epoch)


def test_a_best_score_that_was_lost_is_named() -> None:
    learnt, lives = leg(worse_best, before(r"last\.pt\.tmp", 6), results=("model_best.pt",))
    assert lives[1].resume.outcome == RESUMED
    found = evidence.cause(learnt, lives)
    assert found is not None
    assert found.finding is remedies.BEST_LOST
    assert found.text == (
        "model_best.pt was written at the first save after last.pt (save 6), unlike in the undisturbed run"
    )
    learnt, lives = leg(epochs("last.pt", 9), before(r"last\.pt\.tmp", 6))
    assert evidence.cause(learnt, lives) is None, "the undisturbed run wrote it there too"


def test_the_best_and_the_last_checkpoint_are_two_though_they_are_written_in_turns() -> None:
    learnt, lives = leg(epochs("last.pt", EPOCHS - 1), before(r"last\.pt\.tmp", 6))
    assert learnt.files.family is not None
    assert learnt.files.family.kinds == ("last.pt",)
    assert lives[1].resume.unread == ()


def pieces(path: str, skips: bool = True) -> Script:
    def run(fs: Fs) -> None:
        for number in range(8):
            name = path.format(number)
            if not skips or name not in fs.files:
                fs.tick(2.0)
                put(fs, name, number)

    return run


PATHS = ("out/shard_{:04d}.jsonl", "out/part-{}.json", "out/embeddings_{:03d}.npy", "predictions/{}.csv")


@pytest.mark.parametrize("path", PATHS)
def test_one_that_skips_the_pieces_that_are_there_resumes(path: str) -> None:
    learnt, lives = leg(pieces(path), before(r"out/.*|predictions/.*", 4), results=("out/*",))
    assert len(learnt.saves) == 8
    resume = lives[1].resume
    assert resume.outcome == RESUMED
    assert resume.proof
    assert resume.why == f"it left {path.format(3)} ({lives[0].saves[3].label}) as it was and went on with " + (
        lives[1].saves[0].label
    )
    assert evidence.judge(learnt, lives, same=True) is None
    found = evidence.cause(learnt, lives)
    assert found is not None
    assert found.text.startswith(f"it read nothing of {path.format(3)}")


@pytest.mark.parametrize("path", PATHS)
def test_one_that_writes_all_pieces_again_does_not(path: str) -> None:
    learnt, lives = leg(pieces(path, skips=False), before(r"out/.*|predictions/.*", 4), results=("out/*",))
    assert lives[1].resume.outcome in (LOST_WORK, NOTHING_THERE)
    assert evidence.judge(learnt, lives, same=True) is not None


@pytest.mark.parametrize(("seconds", "proof"), [(2.0, False), (1.0, True)])
@pytest.mark.parametrize("path", PATHS)
def test_one_that_computes_all_pieces_again_and_leaves_out_the_writing_is_told_by_its_time(
    path: str, seconds: float, proof: bool
) -> None:
    """Unless what lay there takes less time than a machine's start may vary."""

    def run(fs: Fs) -> None:
        for number in range(8):
            fs.tick(seconds)
            if path.format(number) not in fs.files:
                put(fs, path.format(number), number)

    learnt, lives = leg(run, before(r"out/.*|predictions/.*", 4), results=("out/*",))
    assert lives[1].resume.proof == proof
    found = evidence.judge(learnt, lives, same=True)
    assert (found is None) == proof
    if found:
        label = lives[1].saves[0].label
        assert found.text == (
            f"not checked: it went on with {label} as late as a run from nothing; "
            "a start from nothing would look the same"
        )


def test_a_strike_falls_on_whichever_piece_comes_next() -> None:
    run = pieces(PATHS[0])
    found = evidence.Evidence()
    found.add("reference", Fs().attempt(run))
    places = [place for place in found.places() if place.description.startswith("before the rename")]
    assert len(places) == 1
    fs = Fs()
    fs.attempt(run, before(r"out/.*", 4))
    assert not fs.attempt(run, places[0].later).finished


def test_the_parts_of_one_save_are_no_pieces() -> None:
    names = [naming.parse(f"model-{number}-of-4.safetensors") for number in range(1, 5)]
    assert naming.label_places(names) == (), "they have a total"
    few = [naming.parse(f"part-{number}.bin") for number in range(3)]
    assert naming.label_places(few) == ()
    again = [naming.parse(f"part-{number}.bin") for number in (0, 1, 2, 3, 0, 1, 2, 3)]
    assert naming.label_places(again) == ()


@pytest.mark.parametrize(
    ("paths", "places"),
    [
        ([f"ckpt_2026-11-30_01-4{at // 60}-{at % 60:02d}.pt" for at in range(25, 170, 9)], (4, 5)),
        ([f"ckpt-20261130-0142{at:02d}-{at * 373 % 1000:03d}.pt" for at in (1, 2, 3, 4)], (1,)),
        ([f"ckpt-20261130-01423{at // 4}-{at % 4 * 250 + at:03d}.pt" for at in range(12)], (1, 2)),
        ([f"{step}/{part}.pt" for step in range(5) for part in range(3)], (0,)),
        ([f"{step}/{part}.pt" for step in (1, 2) for part in (7, 8)], (0,)),
    ],
)
def test_a_time_of_day_tells_a_save_to_the_second(paths: list[str], places: tuple[int, ...]) -> None:
    assert naming.label_places([naming.parse(path) for path in paths]) == places


def off_by_one(numbered: bool) -> Script:
    def run(fs: Fs) -> None:
        done = fs.read("last.pt") if not numbered else max((fs.read(path) for path in fs.list("ckpt_")), default=None)
        for epoch in range(1 if done is None else int(str(done)) + 2, EPOCHS + 1):
            fs.tick()
            put(fs, f"ckpt_{epoch}.pt" if numbered else "last.pt", epoch)

    return run


@pytest.mark.parametrize("numbered", [False, True])
def test_an_epoch_that_is_skipped_is_named(numbered: bool) -> None:
    learnt, lives = leg(off_by_one(numbered), before(r".*\.pt\.tmp", 3), before(r".*\.pt\.tmp", 1))
    assert lives[-1].resume.skipped == (1 if numbered else 2)
    found = evidence.cause(learnt, lives)
    assert found is not None
    saves = "1 save" if numbered else "2 saves"
    assert found.text == f"it trains fewer steps than asked: {saves} fewer than the undisturbed run"
    assert found.finding is remedies.FEWER_STEPS


def test_one_save_less_may_be_the_clocks() -> None:
    """It saves every three seconds, and the clock begins anew in each attempt."""

    def run(fs: Fs) -> None:
        done = int(str(fs.read("last.pt") or 0))
        since = 0
        for step in range(done + 1, 20):
            fs.tick()
            since += 1
            if since == 3:
                since = 0
                put(fs, "last.pt", step)

    learnt, lives = leg(run, before(r"last\.pt\.tmp", 2))
    assert lives[1].resume.outcome == RESUMED
    assert evidence.cause(learnt, lives) is None


def with_csv(fs: Fs) -> None:
    """The epoch is read from a log, whose row is written before the weights."""
    fs.read("weights.h5")
    done = fs.read("log.csv") and fs.files["log.csv"][2] // 90
    for _ in range(int(done or 0), EPOCHS):
        fs.tick()
        fs.append("log.csv")
        put(fs, "weights.h5", 1)


def test_a_file_that_was_written_after_the_checkpoint_and_read_with_it_is_named() -> None:
    learnt, lives = leg(with_csv, before(r"weights\.h5\.tmp", 5))
    found = evidence.cause(learnt, lives)
    assert found is not None
    assert found.finding in (remedies.MIXED, remedies.FEWER_STEPS)
    assert lives[1].resume.beside == "log.csv"
    _, lives = leg(with_csv, Strike(5, "before", (r"^log\.csv$",), does="open"))
    assert lives[1].resume.outcome == RESUMED
    assert lives[1].resume.beside == "", "the checkpoint is newer"


def folds(fs: Fs) -> None:
    """A score for each fold, whose checkpoint is not looked at any more."""
    for fold in range(4):
        if f"fold_{fold}/score.json" in fs.files:
            fs.read(f"fold_{fold}/score.json")
            continue
        for step in range(int(str(fs.read(f"fold_{fold}/ckpt.pt") or 0)) + 1, 5):
            fs.tick()
            put(fs, f"fold_{fold}/ckpt.pt", step)
        put(fs, f"fold_{fold}/score.json", fold, 20)


def test_one_that_begins_with_the_next_fold_has_lost_nothing() -> None:
    _, lives = leg(folds, Strike(0, "before", (r"^fold_2/ckpt\.pt\.tmp$",)))
    assert [one.path for one in lives[1].resume.read] == ["fold_0/score.json", "fold_1/score.json"]
    assert lives[1].resume.outcome == RESUMED
    assert lives[1].again == (), "a fold has several saves"


def test_what_is_done_again_of_a_fold_is_told_by_its_place() -> None:
    def forgets(fs: Fs) -> None:
        for fold in range(2):
            for step in range(4):
                fs.tick()
                put(fs, f"fold_{fold}/ckpt.pt", step)

    _, lives = leg(forgets, Strike(3, "before", (r"^fold_0/ckpt\.pt\.tmp$",), does="rename"))
    assert len(lives[1].again) == 3


# -- which files are struck


def agent(fs: Fs) -> None:
    """The agent is numbered and read; its scores are written more often, and never read."""
    step = max((int(str(fs.read(path))) for path in fs.list("agent_")), default=0)
    for now in range(step + 1, 13):
        fs.tick()
        fs.write("scores.npz", now, 900)
        if now % 2 == 0:
            put(fs, f"agent_{now}_steps.bin", now)


def test_what_is_struck_is_the_checkpoint_once_a_restart_has_read_it() -> None:
    found = evidence.Evidence()
    found.add("reference", Fs().attempt(agent))
    assert found.paths
    assert "scores" in found.paths, "they are written more often: a guess"
    fs = Fs()
    found.add("leg", fs.attempt(agent, before(r"agent_\d+_steps\.bin\.part|agent.*\.tmp", 3)))
    found.add("leg", fs.attempt(agent))
    assert "scores" not in found.paths
    assert all("agent" in place.description for place in found.places())


def test_a_name_that_says_checkpoint_counts_more_than_a_suffix() -> None:
    def run(fs: Fs) -> None:
        for step in range(1, 11):
            fs.tick()
            fs.write("evaluations.npz", step, 900)
            if step % 2 == 0:
                fs.write(f"rl_model_{step}_steps.zip", step)

    assert saves.study(Fs().attempt(run)).saves[0].largest == "rl_model_2_steps.zip"


def test_what_no_restart_reads_is_not_torn() -> None:
    def run(fs: Fs) -> None:
        for step in range(int(str(fs.read("state.json") or 0)) + 1, 10):
            fs.tick()
            put(fs, "state.json", step, 500)
            fs.write("history.json", step, 500)

    found, fs = evidence.Evidence(), Fs()
    found.add("reference", Fs().attempt(run))
    torn = [place.description for place in found.places() if place.later.phase == "middle"]
    assert len(torn) == 2
    for strike in (before(r"state\.json\.tmp", 4), None):
        found.add("leg", fs.attempt(run, strike))
    torn = [place.description for place in found.places() if place.later.phase == "middle"]
    assert torn == ["in the middle of the write to state.json.tmp at 0"]


# -- a journal


def answers(reads: bool = True, skips: bool = True, steps: int = 20, cuts: bool = False) -> Script:
    """One line for each prompt; a restart reads the lines that are there and does the rest."""

    def run(fs: Fs) -> None:
        there = fs.files.get("answers.jsonl", (None, 0, 0))[2]
        if reads and there:
            fs.read("answers.jsonl")
            if cuts:
                fs.write("answers.jsonl", "log", there - there % 90)
        for _ in range(there // 90 if skips else 0, steps):
            fs.tick()
            fs.append("answers.jsonl")
        fs.write("result.json", 1, 30)

    return run


def middle(times: int) -> Strike:
    return Strike(times, "middle", (r"^answers\.jsonl$",), does="write")


@pytest.mark.parametrize("cuts", [False, True])
def test_one_that_appends_its_work_and_reads_it_resumes(cuts: bool) -> None:
    learnt, lives = leg(answers(cuts=cuts), middle(5), middle(3))
    assert learnt.journal == "answers.jsonl"
    assert [life.resume.outcome for life in lives[1:]] == [RESUMED, RESUMED]
    assert [life.resume.proof for life in lives[1:]] == [False, True], "only one that came to its end is proof"
    assert lives[1].resume.used is not None
    assert lives[1].resume.used.label == "495 bytes of answers.jsonl"
    assert lives[0].end.partly
    times = [life.end.newest.complete_s for life in lives if life.end.newest and life.end.newest.complete_s]
    assert len(times) == 3
    assert Fs().time < times[0] < times[1] < times[2]
    assert evidence.judge(learnt, lives, same=True) is None


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (answers(skips=False), "it read answers.jsonl but appended as much as a run from nothing (1800 bytes)"),
        (answers(reads=False, skips=False), "the task saves nothing before its end"),
    ],
)
def test_one_that_appends_all_again_does_not_resume(run: Script, why: str) -> None:
    learnt, lives = leg(run, middle(5))
    found = evidence.judge(learnt, lives, same=True)
    assert found is not None
    assert not found.exact
    assert why in found.text


def csv_logger(fs: Fs) -> None:
    """It saves nothing. Its logger looks for a header, and writes one if there is none."""
    if fs.read("log.csv") is None:
        fs.append("log.csv", 40)
    for _ in range(20):
        fs.tick()
        fs.append("log.csv")
    fs.write("result.json", 1, 30)


@pytest.mark.parametrize("times", [1, 6])
def test_a_log_whose_header_is_looked_for_is_no_resume(times: int) -> None:
    learnt, lives = leg(csv_logger, Strike(times, "middle", (r"^log\.csv$",), does="write"))
    found = evidence.judge(learnt, lives, same=True)
    assert found is not None
    why = "it read log.csv but appended as much as a run from nothing (1840 bytes)"
    assert found.text == f"LOST WORK: in attempt 2, {why}"


def test_a_resume_from_hardly_anything_is_no_proof() -> None:
    learnt, lives = leg(answers(), middle(1))
    found = evidence.judge(learnt, lives, same=True)
    assert found is not None
    assert found.text == "not checked: only 135 bytes of answers.jsonl were there to go on from; train longer"


def test_one_that_reads_its_journal_once_and_not_the_next_time_has_lost_work() -> None:
    fs, run = Fs(), answers()
    attempts = [fs.attempt(run, middle(5)), fs.attempt(run, middle(3)), fs.attempt(answers(reads=False), None)]
    learnt = saves.study(Fs().attempt(run), [attempts[:2]])
    lives = journal.follow(learnt, attempts)
    assert lives[2].resume.outcome == LOST_WORK
    assert lives[2].resume.why == "it did not read answers.jsonl, to which 810 bytes had been appended"


def test_a_run_with_checkpoints_has_no_journal_and_a_log_is_none() -> None:
    learnt, _ = leg(with_csv, before(r"weights\.h5\.tmp", 5))
    assert learnt.journal == ""

    def logs(fs: Fs) -> None:
        for _ in range(20):
            fs.tick()
            fs.append("train.log")

    assert saves.study(Fs().attempt(logs)).journal == ""


def test_strikes_fall_on_the_writes_to_a_journal() -> None:
    found = evidence.Evidence()
    found.add("reference", Fs().attempt(answers()))
    assert found.paths == r"^answers\.jsonl$"
    assert found.changes_until_saved() == 4
    assert [place.description for place in found.places()] == [
        "before the write to answers.jsonl at 540", "in the middle of the write to answers.jsonl at 540",
    ]  # fmt: skip
    fs = Fs()
    attempts = [fs.attempt(answers(), strike) for strike in (found.places()[1].at_first, found.places()[1].later)]
    assert [attempt.finished for attempt in attempts] == [False, False]
    assert [attempt.calls[-1].offset for attempt in attempts] == [540, 585 + 90]


# -- read and dropped


def by_the_clock(resumes: bool, name: str = "last.pkl", speeds: tuple[float, ...] = (1.0, 1.0, 0.9, 0.8)) -> Script:
    """It saves each time that some seconds are over, and reads the newest; `{}` in the name is the time, or the step.

    Of each attempt, the undisturbed run first: how many steps it makes in a second.
    """
    starts = iter(speeds)

    def run(fs: Fs) -> None:
        newest = fs.list(r"(ckpt|step)-\d+\.pkl$")[-1:] if "{}" in name else [name]
        found = fs.read(newest[0]) if newest else None
        step, slow = int(str(found or 0)) if resumes else 0, next(starts)
        saved = fs.time
        while step < 40:
            fs.tick(1 / slow)
            step += 1
            if fs.time - saved > 3.5:
                saved = fs.time
                put(fs, name.format(step if "step" in name else int(fs.time * 1000)), step)
        fs.write("result.json", 1, 30)

    return run


def every(count: int, resumes: bool, name: str = "ckpt-{}.pkl") -> Script:
    """It saves every few steps under the time of day, and reads the newest."""

    def run(fs: Fs) -> None:
        newest = fs.list(r"ckpt-\d+\.pkl$")[-1:]
        found = fs.read(newest[0]) if newest else None
        for step in range(int(str(found or 0)) if resumes else 0, 40):
            fs.tick()
            if (step + 1) % count == 0:
                put(fs, name.format(int(fs.time * 1000)), step + 1)
        fs.write("result.json", 1, 30)

    return run


AT_RENAMES = [Strike(times, "before", (r"\.tmp$",), does="rename") for times in (5, 2)]


@pytest.mark.parametrize("name", ["last.pkl", "ckpt-{}.pkl"])
def test_saves_by_the_clock_that_are_as_many_as_from_nothing_are_no_proof(name: str) -> None:
    learnt, lives = leg(by_the_clock(resumes=False, name=name), *AT_RENAMES)
    made = len(lives[-1].saves)
    assert made not in (len(learnt.saves), 0)
    found = evidence.judge(learnt, lives, same=True)
    assert found is not None
    assert found.text == (
        f"not checked: it made {made} saves, where the undisturbed run made {len(learnt.saves)}; "
        "a start from nothing would look the same"
    )
    learnt, lives = leg(by_the_clock(resumes=True, name=name), *AT_RENAMES)
    assert evidence.judge(learnt, lives, same=True) is None


def test_steps_that_are_saved_by_the_clock_need_not_be_those_of_the_undisturbed_run() -> None:
    speeds, name = (1.0, 1.0, 1.2, 1.2), "step-{}.pkl"
    learnt, lives = leg(by_the_clock(resumes=False, name=name, speeds=speeds), *AT_RENAMES)
    assert (learnt.saves[0].label, lives[1].saves[0].label) == ("step 4", "step 5")
    found = evidence.judge(learnt, lives, same=True)
    assert found is not None
    assert found.text == "LOST WORK: in attempt 2, it read step-20.pkl (step 20) but wrote step 5 as its first save"
    learnt, lives = leg(by_the_clock(resumes=True, name=name, speeds=speeds), *AT_RENAMES)
    assert evidence.judge(learnt, lives, same=True) is None


def test_one_that_names_its_saves_by_the_time_and_drops_what_it_reads_has_lost_work() -> None:
    learnt, lives = leg(every(4, resumes=False), *AT_RENAMES)
    found = evidence.judge(learnt, lives, same=True)
    assert found is not None
    assert found.text.startswith("LOST WORK: in attempt 3, it read ckpt-")
    assert found.text.endswith("but made 10 saves, as many as the undisturbed run")
    learnt, lives = leg(every(4, resumes=True), *AT_RENAMES)
    assert evidence.judge(learnt, lives, same=True) is None
    assert [life.resume.more for life in lives] == [0, 0, 0]
    assert [save.index for life in lives for save in life.saves if save.complete is not None] == list(range(1, 11))


def test_a_log_by_the_clock_of_a_faster_attempt_does_not_tell_that_it_resumed() -> None:
    speeds = iter((0.7, 0.7, 1.0))

    def run(fs: Fs) -> None:
        slow, logged = next(speeds), fs.time
        fs.read("last.pkl")
        for step in range(1, 41):
            fs.tick(1 / slow)
            while fs.time >= logged:
                logged += 2.0
                fs.append("train.log")
            if step % 4 == 0:
                put(fs, "last.pkl", step)
        fs.write("result.json", 1, 30)

    learnt, lives = leg(run, AT_RENAMES[0])
    found = evidence.judge(learnt, lives, same=True)
    assert found is not None
    assert found.text.endswith("it read last.pkl (save 5) but made 10 saves, as many as the undisturbed run")


# -- a save at a signal


@pytest.mark.parametrize(("since", "cut_off", "saved"), [(3, True, None), (2, False, 1), (None, False, None)])
def test_a_save_that_began_at_the_signal_and_was_cut_off_is_known(
    since: int | None, cut_off: bool, saved: int | None
) -> None:
    """One that trains on saves at its usual times: it has made another since."""

    def run(fs: Fs) -> None:
        for number in range(6):
            fs.tick()
            fs.write("state.pt", number)

    attempt = Fs().attempt(run, Strike(7, "middle", (r"^state\.pt$",), does="write"))
    begun = [call.time for call in attempt.calls if call.name in ("create", "open")]
    assert len(begun) == 3
    noticed_s = begun[since - 1] - 0.5 if since else None
    attempt = replace(attempt, noticed_s=noticed_s)
    learnt = saves.study(Fs().attempt(run), [[attempt]])
    [life] = follow(learnt, [attempt])
    assert life.writing is not None
    assert life.cut_off == cut_off
    row = Row(1, "sigterm", "SIGTERM")
    times.fill_from_trace(row, attempt, life)
    assert row.saved_since == saved, "of one that was cut off, nobody says that it ignored its signal"
