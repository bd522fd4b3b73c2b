"""What a rehearsal concludes from evidence: the verdict of a leg, its cause, the table by kind, and where strikes fall.

All data are made by hand. How a trace is read is in test_saves.py.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from traced import Fs

from skyspot.rehearsal import by_kind, evidence, failure, faults, logs, remedies
from skyspot.rehearsal.boundaries import describe
from skyspot.rehearsal.bucketfs.strike import Strike
from skyspot.rehearsal.engine import _Engine
from skyspot.rehearsal.evidence import LOST, READ_AND_DROPPED, Evidence, Place
from skyspot.rehearsal.faults import Preemption
from skyspot.rehearsal.lives import Life
from skyspot.rehearsal.remedies import Cause
from skyspot.rehearsal.replay import Attempt, Bucket, Written
from skyspot.rehearsal.result import Leg, Row
from skyspot.rehearsal.resumes import FIRST, LOST_WORK, NOTHING_THERE, RESUMED, FileRead, Resume
from skyspot.rehearsal.saves import Learnt, Save, SavedFile, State, study
from skyspot.rehearsal.verdict import Verdict

NOTHING = State((), (), (), None)


def saved(index: int, *paths: str, missing: tuple[str, ...] = ()) -> Save:
    files = tuple(
        SavedFile(path, index * 10, index * 10 + 9, float(index), index + 0.5, 1000 - order, False, index * 10 + order)
        for order, path in enumerate(paths or ("state.pt",))
    )
    return Save(index, (), f"save {index}", None, 1, files, missing, index * 10 + 9)


def resume(outcome: str = RESUMED, used: Save | None = None, **more: object) -> Resume:
    plain = Resume(outcome, "it did so", used, used, (), (), (), 0)
    return replace(plain, **more)  # type: ignore[arg-type]


def life(number: int, start: Resume, at_notice: Save | None = None) -> Life:
    return Life(number, NOTHING, start, (), NOTHING, None, (), 0.0, at_notice)


FIRST_LIFE = life(1, resume(FIRST))


def trains(fs: Fs, steps: int = 40, every: int = 10, start: int = 0) -> None:
    for step in range(start + 1, steps + 1):
        fs.tick()
        if step % every == 0:
            fs.write("state.tmp", step)
            fs.rename("state.tmp", "state.pt")
    fs.write("result.json", steps)


def known(steps: int = 40) -> Learnt:
    return study(Fs().attempt(lambda fs: trains(fs, steps)), results=("result.json",))


# -- the verdict of a leg


def test_a_leg_that_resumed_with_the_same_result_has_no_fault() -> None:
    lives = (FIRST_LIFE, life(2, resume(used=saved(2))))
    assert evidence.judge(known(), lives, same=True) is None


@pytest.mark.parametrize(
    ("dropped", "cause", "same"), [(None, LOST, True), (None, LOST, False), (saved(2), READ_AND_DROPPED, True)]
)
def test_work_that_is_lost_fails_though_the_result_is_the_same(dropped, cause, same) -> None:
    lives = (FIRST_LIFE, life(2, resume(LOST_WORK, dropped=dropped)), life(3, resume(used=saved(2))))
    found = evidence.judge(known(), lives, same=same)
    remedy = remedies.DESTROYED.remedy  # No complete checkpoint was left.
    assert found == Verdict(False, True, "LOST WORK: in attempt 2, it did so", cause, remedy=remedy)


@pytest.mark.parametrize(
    ("start", "finding"),
    [
        (resume(LOST_WORK, newest=saved(2)), remedies.NOT_USED),
        (resume(LOST_WORK, newest=saved(2), dropped=saved(2)), remedies.NOT_USED),
        (resume(LOST_WORK, saved(1), newest=saved(2)), remedies.OLDER_USED),
        (resume(LOST_WORK, newest=None), remedies.DESTROYED),
        (
            resume(LOST_WORK, newest=saved(2), read=(FileRead("a.pt", 5, 5, False, True, "save 3"),)),
            remedies.HALF_WRITTEN,
        ),
    ],
)
def test_each_way_to_lose_work_has_its_remedy(start, finding) -> None:
    found = evidence.judge(known(), (FIRST_LIFE, life(2, start)), same=True)
    assert found
    assert found.remedy == finding.remedy


def test_one_that_read_its_checkpoint_and_ends_elsewhere_is_left_to_the_cause() -> None:
    lives = (FIRST_LIFE, life(2, resume(LOST_WORK, dropped=saved(2))))
    assert evidence.judge(known(), lives, same=False) is None
    found = evidence.cause(known(), lives)
    assert found
    assert found.finding is remedies.MORE_STEPS
    more = "it trains more steps than asked: after reading state.pt it made as many saves as a whole"
    assert found.text.startswith(more)


@pytest.mark.parametrize(
    ("start", "why"),
    [
        (resume(NOTHING_THERE), "every strike came before its first checkpoint was complete"),
        (resume(used=saved(1), doubt="only one save was there"), "only one save was there"),
        (resume("not seen"), "no attempt began with a checkpoint that it could resume from"),
    ],
)
def test_without_a_resume_that_is_proof_nothing_is_exact(start, why) -> None:
    found = evidence.judge(known(), (FIRST_LIFE, life(2, start)), same=True)
    assert found
    assert (found.exact, found.checked) == (False, False)
    assert found.text.startswith(f"not checked: {why}")


def test_a_task_that_saves_at_its_end_alone_is_told_so() -> None:
    found = evidence.judge(known(5), (FIRST_LIFE, life(2, resume(NOTHING_THERE))), same=True)
    assert found
    assert "saves nothing before its end" in found.text
    assert found.remedy == remedies.NEVER_SAVES.remedy


# -- causes

THE_LR = Cause("the LR: x", remedies.LEARNING_RATE)


def read(path: str, of: str, cut: bool = False) -> FileRead:
    return FileRead(path, 10, 10, not cut, cut, of)


@pytest.mark.parametrize(
    ("start", "text", "finding"),
    [
        (
            resume(used=saved(2), mixed=(read("a.pt", "save 2"), read("b.pt", "save 1"))),
            "a mixed pair of files of two saves: a.pt of save 2 and b.pt of save 1",
            remedies.MIXED,
        ),
        (
            resume(used=saved(2), read=(read("rng.pt", "save 2", cut=True),)),
            "rng.pt was half written, and was read",
            remedies.HALF_WRITTEN,
        ),
        (
            resume(used=saved(2), more=3),
            "it trains more steps than asked: 3 saves beyond the undisturbed run's last",
            remedies.MORE_STEPS,
        ),
        (
            resume(used=saved(2, missing=("rng.pt",))),
            "rng.pt of save 2 was missing, and it went on without",
            remedies.NOT_READ,
        ),
        (resume(used=saved(2), unread=("a", "b", "c")), "a and b and 1 more were not read", remedies.NOT_READ),
    ],
)
def test_the_cause_is_named_from_what_was_read_and_saved(start, text, finding) -> None:
    found = evidence.cause(known(), (FIRST_LIFE, life(2, start)), logs=THE_LR)
    assert found
    assert found.text.startswith(text)
    assert found.finding is finding


def test_an_attempt_that_failed_has_its_cause_only_in_what_it_read() -> None:
    cut = life(2, resume("not seen", read=(read("a.pt", "save 2", cut=True),)))
    found = evidence.cause_of_failure(known(), (FIRST_LIFE, cut))
    assert found == Cause("a.pt was half written, and was read all the same", remedies.HALF_WRITTEN)
    assert evidence.cause_of_failure(known(), (FIRST_LIFE, life(2, resume(used=saved(2), unread=("a",))))) is None
    assert evidence.cause_of_failure(known(), ()) is None


@pytest.mark.parametrize("cut_off", [True, False])
def test_a_save_at_the_signal_that_was_not_over_in_time_is_the_cause(cut_off: bool) -> None:
    lives = (
        replace(FIRST_LIFE, cut_off=cut_off),
        life(2, resume("not seen", read=(read("a.pt", "save 2", cut=True),))),
    )
    text, finding = "a.pt was half written, and was read all the same", remedies.HALF_WRITTEN
    if cut_off:
        text += "; its save began at SIGTERM or a notice, and was not over when the machine was taken"
        finding = remedies.NOT_IN_TIME
    assert evidence.cause_of_failure(known(), lives) == evidence.cause(known(), lives) == Cause(text, finding)
    unread = (replace(FIRST_LIFE, cut_off=cut_off), life(2, resume(used=saved(2), unread=("a",))))
    assert evidence.cause(known(), unread) == Cause("a was not read", remedies.NOT_READ), "however it was saved"


def test_a_save_at_the_signal_that_was_resumed_from_is_the_cause() -> None:
    save = saved(3)
    lives = (life(1, resume(FIRST), at_notice=save), life(2, resume(used=save)))
    text = "a resume from state.pt (save 3), which was saved at SIGTERM or a notice"
    assert evidence.cause(known(), lives) == Cause(text, remedies.AT_NOTICE)
    assert evidence.cause(known(), lives, THE_LR) == Cause(f"the LR: x, after {text}", remedies.AT_NOTICE)
    other = (life(1, resume(FIRST), at_notice=save), life(2, resume(used=saved(2))))
    assert evidence.cause(known(), other) is None


def test_else_the_logs_tell_it() -> None:
    lives = (FIRST_LIFE, life(2, resume(used=saved(2))))
    after = Cause("the LR: x, after a resume from state.pt", remedies.LEARNING_RATE)
    assert evidence.cause(known(), lives, THE_LR) == after
    assert evidence.cause(known(), (FIRST_LIFE,), THE_LR) == THE_LR
    assert evidence.cause(known(), lives) is None


# -- logs


def log(bucket: Path, name: str, lines: list[dict[str, object]]) -> None:
    bucket.mkdir(exist_ok=True)
    (bucket / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.utime(bucket / name, ns=(0, len(list(bucket.iterdir()))))


def steps(first: int, last: int, shift: int = 0, rate: int = 0) -> list[dict[str, object]]:
    return [
        {"step": n, "loss": 1.0 / (n - shift + 1), "sample": (n - shift) * 7 % 11, "lr": 0.1 / (n - rate), "time_s": n}
        for n in range(first, last + 1)
    ]


def test_a_log_that_begins_again_is_the_data_order(tmp_path: Path) -> None:
    log(tmp_path / "a", "metrics-0.jsonl", steps(1, 9))
    log(tmp_path / "b", "metrics-0.jsonl", steps(1, 6))
    log(tmp_path / "b", "metrics-1.jsonl", [{**line, "loss": 0.5} for line in steps(5, 9, shift=4)])
    assert logs.cause(tmp_path / "a", tmp_path / "b") == Cause(
        "the data order: from step 5 on, sample in metrics-1.jsonl is what it was from step 1 on", remedies.DATA_ORDER
    )


def test_a_learning_rate_that_differs_is_named(tmp_path: Path) -> None:
    log(tmp_path / "a", "metrics-0.jsonl", steps(1, 9))
    log(tmp_path / "b", "metrics-0.jsonl", [*steps(1, 4), *steps(5, 9, rate=3)])
    text = "the LR: from step 5 on, lr in metrics-0.jsonl differs (0.02 undisturbed, 0.05 preempted)"
    assert logs.cause(tmp_path / "a", tmp_path / "b") == Cause(text, remedies.LEARNING_RATE)


@pytest.mark.parametrize(
    ("printed", "place"),
    [
        ("loading\nresumed from step 30\nstep 31 loss 0.5\n", "step 30"),
        ("10:31:05 torch 2.1\nepoch 3 step=40: loss 0.25\n", "epoch 3, step 40"),
        ('{"iteration": 7, "loss": 1}\n', "step 7"),
        ("Epoch: 4\n", "epoch 4"),
        ("step nan\n3 of 9 done\n\0\xff", ""),
        ("", ""),
    ],
)
def test_the_first_step_that_an_attempt_prints_tells_where_it_went_on(printed: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(printed)
    assert logs.first_place(tmp_path / "log") == place


def test_lines_of_text_are_logs_too(tmp_path: Path) -> None:
    for name, shift in (("a", 0), ("b", 4)):
        (tmp_path / name).mkdir()
        lines = [f"2026-01-02 03:04:0{shift},123 step {n} value {n - (shift if n > 4 else 0)}.5" for n in range(1, 9)]
        (tmp_path / name / "train.log").write_text("\n".join(["config: {'steps': 8}", *lines, "saved step 8", ""]))
    assert logs.cause(tmp_path / "a", tmp_path / "b") == Cause(
        "the data order: from step 5 on, value in train.log is what it was from step 1 on", remedies.DATA_ORDER
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("iter {n}: loss {loss}, time 21.50ms", "step 5 on, loss"),
        ("[12:30:0{n}] step {n} | loss: {loss} | 11.8 it/s", "step 5 on, loss"),
        ("Epoch {n}/9 - val_loss: {loss}", "epoch 5 on, val_loss"),
        ("{{'loss': {loss}, 'epoch': {n}.0}}", "epoch 5 on, loss"),
        ("Epoch [{n}/9], Step [1/2], Loss: 1\nEpoch [{n}/9], Step [2/2], Loss: {loss}", "epoch 5, step 2 on, Loss"),
    ],
)  # fmt: skip
def test_the_usual_lines_of_training_loops_are_read(line, said, tmp_path: Path) -> None:
    for name, wrong in (("a", 0), ("b", 9)):
        (tmp_path / name).mkdir()
        lines = [line.format(n=n, loss=1 / n + (wrong if n == 5 else 0)) for n in range(1, 9)]
        (tmp_path / name / "log.txt").write_text("\n".join(["starting", *lines]))
    text = f"from {said} in log.txt differs (0.2 undisturbed, 9.2 preempted)"
    assert logs.cause(tmp_path / "a", tmp_path / "b") == Cause(text, remedies.NO_CAUSE)


@pytest.mark.parametrize(("counter", "separator", "suffix"), [("step", ",", "csv"), ("epoch", "\t", "tsv")])
def test_a_table_with_a_header_is_a_log(counter, separator, suffix, tmp_path: Path) -> None:
    for name, rate in (("a", 0), ("b", 3)):
        (tmp_path / name).mkdir()
        rows = [[counter, "val_loss", "lr", "seconds"]]
        for n in range(1, 9):
            rows.append([str(n), "", str(0.1 / (n - rate if n > 4 else n)), str(n + rate)])
            rows.append([str(n), "0.5", "", ""])
        text = "".join(separator.join(row) + "\n" for row in rows)
        (tmp_path / name / f"metrics.{suffix}").write_text(text + "9" + separator)
    text = f"the LR: from {counter} 5 on, lr in metrics.{suffix} differs (0.02 undisturbed, 0.05 preempted)"
    assert logs.cause(tmp_path / "a", tmp_path / "b") == Cause(text, remedies.LEARNING_RATE)


def test_tables_without_a_header_and_with_too_long_cells_tell_nothing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.csv").write_text("0.5,0.25\n1,2\n" + name * 200_000)
        (tmp_path / name / "y.csv").write_bytes(b"\0\xff\n" + b'"' * 5)
    assert logs.cause(tmp_path / "a", tmp_path / "b") is None


def test_of_what_differs_at_once_a_score_is_named_last(tmp_path: Path) -> None:
    for name, scale in (("a", 8), ("b", 1)):
        lines = [{"step": n, "loss": n * scale * (n > 4), "grad_norm": scale * (n > 4), "scale": scale * (n > 4)}
                 for n in range(1, 9)]  # fmt: skip
        log(tmp_path / name, "metrics.jsonl", lines)
    found = logs.cause(tmp_path / "a", tmp_path / "b")
    assert found is not None
    assert found.text == "from step 5 on, scale in metrics.jsonl differs (8.0 undisturbed, 1.0 preempted)"


def test_a_loss_that_begins_again_tells_that_nothing_was_loaded(tmp_path: Path) -> None:
    log(tmp_path / "a", "metrics.jsonl", [{"step": n, "loss": 1 / n} for n in range(1, 9)])
    log(tmp_path / "b", "metrics.jsonl", [{"step": n, "loss": 1 / (n if n < 5 else n - 4)} for n in range(1, 9)])
    text = "what it read was not used: from step 5 on, loss in metrics.jsonl is what it was from step 1 on"
    assert logs.cause(tmp_path / "a", tmp_path / "b") == Cause(text, remedies.NOT_USED)


def test_logs_that_tell_nothing_name_nothing(tmp_path: Path) -> None:
    log(tmp_path / "a", "metrics.jsonl", steps(1, 9))
    log(tmp_path / "b", "metrics.jsonl", [{**line, "time_s": 99} for line in steps(1, 9)])
    assert logs.cause(tmp_path / "a", tmp_path / "b") is None
    log(tmp_path / "b", "metrics.jsonl", [{**line, "loss": 99} for line in steps(1, 9)])
    assert logs.cause(tmp_path / "a", tmp_path / "b") is None, "it differs from its first step on"
    odd = f'{{"step": 1e999, "x": 1}}\n{{"step"\n[1]\n{{"step": "a", "y": 2}}\n{{"step": 1{"0" * 400}}}\n{{\'a\'\n'
    (tmp_path / "b" / "metrics.jsonl").write_text(odd)
    assert logs.cause(tmp_path / "a", tmp_path / "b") is None


def test_workers_that_die_of_the_signal_are_seen_in_the_output(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a\nRuntimeError: DataLoader worker (pid 7) is killed by signal: Terminated. \nb\n")
    assert failure.at_sigterm(tmp_path / "log") == (
        "its loader workers died of SIGTERM, and then its main process failed: "
        "RuntimeError: DataLoader worker (pid 7) is killed by signal: Terminated"
    )
    (tmp_path / "log").write_text("saved\n")
    assert failure.at_sigterm(tmp_path / "log") == ""


LOST_WORKER = """\
Traceback (most recent call last):
  File "/root/train.py", line 41, in main
    for batch in loader:
  File "/venv/lib/python3.11/site-packages/torch/utils/data/dataloader.py", line 1310, in _try_get_data
    data = self._data_queue.get(timeout=timeout)
  File "/usr/lib/python3.11/multiprocessing/connection.py", line 395, in _recv
    chunk = read(handle, remaining)
"""


@pytest.mark.parametrize(
    ("error", "found"),
    [
        ("ConnectionResetError: [Errno 104] Connection reset by peer", True),
        ("EOFError", True),
        ("FileNotFoundError: [Errno 2] No such file or directory", True),
        ("BrokenPipeError: [Errno 32] Broken pipe", True),
        ("KeyError: 'FileNotFoundError'", False),
    ],
)
@pytest.mark.parametrize("rank", ["", "[rank1]: "])
def test_workers_that_die_of_the_signal_are_seen_where_the_main_process_meets_the_closed_connection(
    tmp_path: Path, error: str, found: bool, rank: str
) -> None:
    (tmp_path / "log").write_text("".join(f"{rank}{line}\n" for line in f"{LOST_WORKER}{error}\nend".splitlines()))
    said = failure.at_sigterm(tmp_path / "log")
    assert said.startswith("its loader workers died of SIGTERM") == found
    assert (error in said) == found
    elsewhere = LOST_WORKER.replace("torch/utils/data/dataloader.py", "mine.py")
    (tmp_path / "log").write_text(f"{LOST_WORKER}KeyError: 1\n{elsewhere}{error}\n")
    assert failure.at_sigterm(tmp_path / "log") == "", "not in the loader"


# -- the table by kind

EXACT = Verdict(True, True, "byte-identical")
WRONG = Verdict(False, True, "NOT exact")


def leg(*kinds: str, verdict: Verdict | None = EXACT, finished: bool = True, lost: int = 0) -> Leg:
    """A leg struck in these ways; attempt `lost` lost work."""
    ends = [*kinds, "finished" if finished else "failed"]
    rows = [Row(number, kind, kind, lost_work=number == lost) for number, kind in enumerate(ends, start=1)]
    return Leg("preempted", "Preempted", len(kinds), rows=rows, finished=finished, verdict=verdict)


def outcomes(*legs: Leg) -> dict[str, str]:
    kinds = [kind for one in legs for kind in (row.kind for row in one.rows) if kind not in ("finished", "failed")]
    return {one.kind: one.outcome for one in by_kind.table(legs, list(dict.fromkeys(kinds)), {})}


def test_each_kind_has_what_came_of_its_strike() -> None:
    assert outcomes(leg("kill", "torn")) == {"kill": "exact", "torn": "exact"}
    lost = Verdict(False, True, "LOST WORK", LOST)
    assert outcomes(leg("kill", "torn", verdict=lost, lost=3)) == {"kill": "exact", "torn": "LOST WORK"}
    down = leg("kill", "torn", verdict=WRONG, finished=False)
    assert outcomes(down) == {"kill": "not checked", "torn": "stays down"}


@pytest.mark.parametrize("why", ["nothing was left to do", "no checkpoint was complete"])
def test_a_strike_after_which_the_next_attempt_shows_nothing_was_not_tried(why: str) -> None:
    one = leg("kill", "sigterm", "kill")
    one.rows[2].unproven = why
    found = by_kind.table([one], ["kill", "sigterm"], {})
    assert [(row.outcome, row.why) for row in found] == [
        ("exact", "2 times; kill"), ("not tried", f"sigterm, when {why}"),
    ]  # fmt: skip
    assert by_kind.untried([one]) == [("sigterm", None)], "a leg of it alone may show it"
    assert by_kind.untried([one, leg("sigterm")]) == []
    assert by_kind.suspects([one]) == []
    wrong = leg("kill", "sigterm", verdict=WRONG)
    wrong.rows[2].unproven = why
    assert outcomes(wrong) == {"kill": "NOT exact", "sigterm": "NOT exact"}


def test_where_a_checkpoint_was_read_and_dropped_no_other_strike_of_the_leg_is_called_exact() -> None:
    dropped = Verdict(False, True, "LOST WORK", READ_AND_DROPPED)
    assert outcomes(leg("kill", "torn", verdict=dropped, lost=3)) == {"kill": "not checked", "torn": "LOST WORK"}
    assert by_kind.suspects([leg("kill", "torn", verdict=dropped, lost=3)]) == [("kill", None)]


def test_one_that_failed_at_the_signal_stays_down_though_the_result_is_right() -> None:
    one = leg("kill", "sigterm")
    one.rows[1].stays_down = "its loader workers died of SIGTERM"
    assert outcomes(one) == {"kill": "exact", "sigterm": "stays down"}


def test_a_leg_of_one_kind_tells_more_than_one_of_several() -> None:
    both = leg("kill", "torn", verdict=WRONG)
    assert set(outcomes(both).values()) == {"NOT exact"}
    assert by_kind.table([both], ["kill"], {})[0].why == "kill; or another kind of the same run"
    assert by_kind.suspects([both]) == [("kill", None), ("torn", None)]
    alone = leg("kill")
    assert outcomes(both, alone) == {"kill": "exact", "torn": "NOT exact"}


def at_write(*places: str, verdict: Verdict = EXACT, finished: bool = True) -> Leg:
    """A leg struck at these places of a save."""
    found = leg(*["kill-at-write"] * len(places), verdict=verdict, finished=finished)
    for row, name in zip(found.rows, places, strict=False):
        row.place = name
    return found


def test_each_place_in_a_save_has_a_row_of_its_own() -> None:
    def rows(*legs: Leg) -> list[tuple[str | None, str]]:
        return [(one.place, one.outcome) for one in by_kind.table(legs, ["kill-at-write"], {})]

    assert rows(at_write("a", "b")) == [("a", "exact"), ("b", "exact")]
    down = at_write("a", "b", finished=False, verdict=WRONG)
    assert rows(down, at_write("c")) == [("a", "not checked"), ("b", "stays down"), ("c", "exact")]
    wrong = at_write("a", "b", verdict=WRONG)
    assert rows(wrong) == [("a", "NOT exact"), ("b", "NOT exact")]
    assert rows(wrong, at_write("a"), at_write("b", verdict=WRONG)) == [("a", "exact"), ("b", "NOT exact")]
    told = by_kind.table([wrong], ["kill-at-write"], {})[0].why
    assert told == "kill-at-write; or another place of the same run"


def test_a_place_whose_outcome_is_not_sure_is_struck_alone() -> None:
    assert by_kind.suspects([at_write("a", "b")]) == []
    down = at_write("a", "b", finished=False, verdict=WRONG)
    assert by_kind.suspects([down]) == [("kill-at-write", "a")]
    wrong = at_write("a", "b", verdict=WRONG)
    assert by_kind.suspects([wrong]) == [("kill-at-write", "a"), ("kill-at-write", "b")]


def apart(one: Leg) -> Leg:
    """The leg, run to tell kinds apart."""
    one.apart = True
    return one


def test_the_strikes_before_the_last_one_are_cleared_together_and_the_last_one_is_at_fault() -> None:
    main = leg("kill", "sigterm", "kill-in-save", verdict=WRONG)
    assert by_kind.before_the_last([main]) == [("kill", None), ("sigterm", None)]
    legs = [main, apart(leg("kill", "sigterm"))]
    assert by_kind.suspects(legs) == []
    assert outcomes(*legs) == {"kill": "exact", "sigterm": "exact", "kill-in-save": "NOT exact"}
    assert by_kind.table(legs, ["kill-in-save"], {})[0].why == "kill-in-save"
    down = leg("kill", "sigterm", "torn", verdict=WRONG, finished=False)
    assert by_kind.before_the_last([down]) == [("kill", None), ("sigterm", None)]
    assert by_kind.suspects([down, apart(leg("kill", "sigterm"))]) == []


def test_strikes_that_are_not_cleared_together_are_tried_alone() -> None:
    main, together = leg("kill", "sigterm", "torn", verdict=WRONG), apart(leg("kill", "sigterm", verdict=WRONG))
    assert by_kind.suspects([main, together]) == [("kill", None), ("sigterm", None), ("torn", None)]
    legs = [main, together, apart(leg("kill")), apart(leg("sigterm", verdict=WRONG)), apart(leg("torn"))]
    assert by_kind.suspects(legs) == []
    assert outcomes(*legs) == {"kill": "exact", "sigterm": "NOT exact", "torn": "exact"}


def test_the_first_leg_that_tells_kinds_apart_runs_however_slow_the_machine_is() -> None:
    legs = [leg("kill", "torn", verdict=WRONG)]
    engine = SimpleNamespace(
        started=time.monotonic() - 1e6, settings=SimpleNamespace(every_write=False),
        legs=SimpleNamespace(all=legs, reference_s=1.0, start=lambda: "complete checkpoints"),
        _leg=lambda name, title, plan, start, apart: legs.append(Leg(name, title, apart=apart)),
    )  # fmt: skip
    plan = [Preemption("kill"), Preemption("torn")]
    for kind in ("kill", "torn"):
        _Engine._tell_apart(engine, plan, [(kind, None)])  # type: ignore[arg-type]
    assert [one.title for one in legs[1:]] == ["Only kill"], "patience decides about the others"
    engine.started = time.monotonic()
    _Engine._tell_apart(engine, plan, [("torn", None)])  # type: ignore[arg-type]
    assert [one.title for one in legs[1:]] == ["Only kill", "Only torn"]


def test_of_two_legs_that_are_not_exact_the_one_with_fewer_other_suspects_tells_of_a_place() -> None:
    legs = [leg(*["kill-at-write"] * count, verdict=verdict) for count, verdict in ((3, WRONG), (2, WRONG), (1, EXACT))]
    for one in legs:
        for row, place in zip(one.rows, "abc", strict=False):
            row.place = place
    apart(legs[1]), apart(legs[2])
    found = {one.place: one for one in by_kind.table(legs, ["kill-at-write"], {})}
    assert (found["a"].outcome, found["b"].outcome) == ("exact", "NOT exact")
    assert "or another" not in found["b"].why
    assert "or another place" in found["c"].why


def test_a_leg_that_was_not_run_to_tell_kinds_apart_clears_none() -> None:
    assert by_kind.suspects([leg("kill"), leg("kill", "torn", verdict=WRONG)]) == [("kill", None), ("torn", None)]


def test_a_kind_without_a_strike_says_why() -> None:
    found = by_kind.table([leg("kill")], ["kill", "torn", "sigterm"], {"torn": "it appears whole"})
    assert [(one.outcome, one.why) for one in found[1:]] == [
        ("not tried", "it appears whole"), ("not tried", "the run was over before"),
    ]  # fmt: skip
    late = leg("kill-in-save")
    late.rows[0].hit, late.rows[0].place, late.rows[0].ended = False, "before the upload of a", "a newer was complete"
    assert outcomes(late) == {"kill-in-save": "not tried"}
    assert by_kind.table([late], ["kill-in-save"], {})[0].why == "a newer was complete"
    both = leg("kill", "kill-in-save", verdict=WRONG)
    both.rows[1].hit = False
    assert by_kind.suspects([both]) == [], "one alone has hit"
    down = by_kind.table([leg("kill", finished=False)], ["kill", "torn"], {})
    assert down[1].why == "an attempt before its turn failed"


def test_a_kind_that_has_no_turn_says_how_many_preemptions_were_asked_for() -> None:
    assert by_kind.without_a_turn(["torn", "kill", "sigterm"], 1) == dict.fromkeys(
        ["sigterm", "torn"], "1 preemption was asked for"
    )
    assert by_kind.without_a_turn(["torn", "kill", "sigterm"], 2) == {"torn": "2 preemptions were asked for"}
    assert by_kind.without_a_turn(faults.DEFAULT_KINDS, 5) == {}


# -- where strikes fall


@pytest.mark.parametrize("attempts", [6, 30])
def test_an_attempt_is_not_replayed_again_with_every_later_one(attempts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    replayed = []
    replay = Bucket.replay

    def counted(self: Bucket, attempt: Attempt) -> Written:
        replayed.append(attempt)
        return replay(self, attempt)

    monkeypatch.setattr(Bucket, "replay", counted)
    found, fs, taken = Evidence(("result.json",)), Fs(), Strike(4, "before", only=("^state",))
    found.add("reference", Fs().attempt(trains))
    for number in range(1, attempts + 1):
        found.add("preempted", fs.attempt(lambda fs: trains(fs, start=fs.read("state.pt") or 0), taken))
        assert len(found.lives("preempted")) == number
        taken = Strike(0, "before", only=("^state",))
    # To learn from, to judge, and once more each before the first restart has shown which file is read.
    assert len(replayed) <= 2 * attempts + 4
    found.go_on("again", "preempted")
    assert [life.number for life in found.lives("again")] == [1]
    assert found.lives("again")[0].end == found.lives("preempted")[0].end


def described(phase: str, what: str) -> str:
    return f"{'in the middle of' if phase == 'middle' else phase} the {what}"


def place(number: int, phase: str, what: str) -> Place:
    strike = Strike(number, phase, ("^state",))
    return Place(strike, strike, described(phase, what))


PLACES = [
    place(0, "before", "create of a.tmp"), place(1, "before", "write to a.tmp at 0"),
    place(1, "middle", "write to a.tmp at 0"), place(2, "before", "rename of a.tmp to a.pt"),
    place(3, "before", "rename of b.tmp to b.pt"), place(3, "after", "rename of b.tmp to b.pt"),
]  # fmt: skip


def at_calls(*kinds: str, tears: bool = True, every: bool = False, places: list[Place] = PLACES) -> list[Preemption]:
    plan = [Preemption(kind, at_fraction=0.1) for kind in kinds]
    return faults.at_calls(plan, places, 0, tears=tears, every=every)


def test_strikes_in_a_save_fall_on_its_calls_the_hardest_first() -> None:
    found = at_calls("kill", "kill-in-save", "torn", "kill-in-save")
    assert [one.kind for one in found] == ["kill", "kill-in-save", "torn", "kill-in-save"]
    assert found[0] == Preemption("kill", at_fraction=0.1)
    assert found[1].place is PLACES[4], "when all files but one are new"
    assert found[2].place is PLACES[2]
    assert found[3].place not in (None, PLACES[4])
    assert all(one.at_fraction is None for one in found[1:])


def numbered(fs: Fs) -> None:
    """One new file for each save, under its own name from the start, in a folder of its own."""
    for step in range(1, 7):
        fs.tick()
        fs.mkdir(f"save-{step}")
        fs.write(f"save-{step}/state.pt", step)


@pytest.mark.parametrize("number", [1, 4, 99])
def test_a_kill_in_a_save_falls_where_a_file_is_open_or_missing(number: int) -> None:
    found = Evidence()
    found.add("reference", Fs().attempt(numbered))
    places = found.places()
    outside = [places[0], places[1], places[-1]]
    assert [one.description for one in outside] == [
        "before the mkdir of save-3", "before the create of save-3/state.pt", "after the close of save-3/state.pt",
    ]  # fmt: skip
    chosen = [one.place for one in at_calls(*["kill-in-save"] * number, places=places)]
    assert chosen
    assert not [one for one in chosen if one in outside]
    both = [one.place for one in at_calls(*["kill-in-save", "kill-at-write"] * 99, places=places)]
    assert sorted(both, key=places.index) == places, "each has its own"


def test_a_kill_in_a_save_comes_before_the_save_is_complete_and_after_older_ones_went() -> None:
    found = Evidence()
    found.add("reference", Fs().attempt(keeps_three))
    chosen = [one.place for one in at_calls(*["kill-in-save"] * 99, places=found.places())]
    described = [one.description for one in chosen if one]
    assert described[0] == "after the unlink of 1.pt"
    assert {"before the create of 4.pt", "before the close of 4.pt"} < set(described)
    assert "after the close of 4.pt" not in described


def test_the_hardest_place_is_after_older_files_went_if_the_new_one_is_not_there_yet() -> None:
    gone, put = place(0, "after", "unlink of 1.pt"), place(1, "before", "rename of tmp to 4.pt")
    own = replace(place(0, "after", "unlink of tmp"), temporary=True)
    both = at_calls("kill-at-write", "kill-in-save", places=[gone, put])
    assert [one.place for one in both] == [gone, put]
    for places in ([put, gone], [own, put]):
        assert at_calls("kill-at-write", places=places)[0].place is put, "it is there before, or nothing else went"


def test_where_a_file_appears_whole_nothing_is_torn() -> None:
    assert [one.kind for one in at_calls("kill", "torn", tears=False)] == ["kill"]


def test_a_file_that_is_torn_is_one_under_its_own_name_if_there_is_one() -> None:
    own, moved = place(0, "middle", "write to a.pt at 0"), place(1, "middle", "write to b.tmp at 0")
    moved = replace(moved, temporary=True)
    assert [one.place for one in at_calls("torn", "torn", places=[own, moved])] == [own, moved]


def test_without_a_save_there_is_nothing_to_strike_in_it() -> None:
    assert [one.kind for one in at_calls("kill", "kill-in-save", "torn", "kill-at-write", places=[])] == ["kill"]


def test_every_write_is_every_place_once() -> None:
    found = at_calls("kill", "kill-at-write", every=True)
    assert [one.place for one in found] == [None, *PLACES]
    assert {one.kind for one in found[1:]} == {"kill-at-write"}


# -- what the evidence of a run says of strikes


def saves_a_folder(fs: Fs) -> None:
    """A folder for each save, with a file of each of two ranks; what an earlier attempt left of it is written over."""
    done = [int(path[-1]) for path in fs.files if path.startswith("done-")]
    for step in range(max(done, default=0) + 1, 6):
        fs.tick()
        if not fs.list(f"save-{step}/"):
            fs.mkdir(f"save-{step}")
        for rank in (0, 1):
            fs.write(f"save-{step}/rank-{rank}.pt", step)
        fs.write(f"done-{step}", step, size=2)


def test_a_strike_falls_on_the_call_that_it_names_whatever_an_earlier_attempt_left() -> None:
    found = Evidence()
    found.add("reference", Fs().attempt(saves_a_folder))
    assert {"before the create of save-3/rank-1.pt", "before the mkdir of save-3"} < {
        one.description for one in found.places()
    }

    def struck(fs: Fs, strike: Strike) -> str:
        call = fs.attempt(saves_a_folder, strike).calls[-1]
        return described(call.struck, describe(call))

    for place in found.places():
        assert struck(Fs(), place.at_first) == place.description
        fs = Fs()
        fs.attempt(saves_a_folder, found.places()[3].at_first)  # The folder is there, and half of a file.
        if "mkdir" in place.description:
            assert struck(fs, place.later) == place.description.replace("save-3", "save-4"), "the next one to be made"
        else:
            assert struck(fs, place.later) == place.description.replace(
                "create of save-3/rank-0", "emptying of save-3/rank-0"
            )
        fs = Fs()
        fs.attempt(saves_a_folder, found.places()[3].at_first)
        one_later = "-5" if "mkdir" in place.description else "-4"
        assert place.second
        assert struck(fs, place.second) == place.description.replace("-3", one_later)


def test_evidence_counts_the_changes_of_two_saves_and_lists_the_places_of_one() -> None:
    found = Evidence(("result.json",))
    assert found.learnt is None
    assert found.places() == []
    found.add("reference", Fs().attempt(trains))
    assert found.paths
    described = [one.description for one in found.places()]
    assert described[-1].startswith("after the rename of state.tmp to state.pt")
    assert any(one.startswith("in the middle of the write to state.tmp") for one in described)
    assert all(one.temporary for one in found.places()), "it is renamed later"
    assert all(one.at_first.number > one.later.number for one in found.places()), "a complete save lies there"
    once = found.changes_until_saved()
    assert once > 0
    few = Evidence(("result.json",))
    few.add("reference", Fs().attempt(lambda fs: trains(fs, 20)))
    assert few.changes_until_saved() < once, "of two saves it waits for one"


def keeps_three(fs: Fs) -> None:
    """From the fourth save on, the oldest file is deleted first."""
    done = [int(path[:-3]) for path in fs.files]
    for step in range(max(done, default=0) + 1, 9):
        fs.tick()
        for path in fs.list(r"\d\.pt")[: -2 if step > 3 else None][: 1 if step > 3 else 0]:
            fs.unlink(path)
        fs.write(f"{step}.pt", step)


def test_the_save_that_is_struck_deletes_older_ones_if_any_does() -> None:
    found = Evidence()
    found.add("reference", Fs().attempt(keeps_three))
    places = {one.description: one for one in found.places()}
    assert {"before the unlink of 1.pt", "after the unlink of 1.pt", "before the create of 4.pt"} < set(places)
    assert found.places(early=True)[0].description == "before the create of 3.pt"
    fs, after = Fs(), places["after the unlink of 1.pt"]
    for strike, gone in ((after.at_first, 1), (after.later, 2)):
        call = fs.attempt(keeps_three, strike).calls[-1]
        assert (call.struck, call.name, call.path) == ("after", "unlink", f"{gone}.pt"), "in any attempt"


@pytest.mark.parametrize(
    ("exact", "checked", "word"),
    [(True, True, "exact"), (False, True, "NOT exact"), (False, False, "not checked")],
)
def test_a_run_that_was_not_checked_has_no_row_of_a_wrong_one(exact: bool, checked: bool, word: str) -> None:
    assert by_kind.in_a_word(Verdict(exact, checked, "")) == word
    assert by_kind.in_a_word(Verdict(False, True, "", by_kind.STAYS_DOWN)) == "stays down"
