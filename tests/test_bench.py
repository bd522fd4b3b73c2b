"""The benches work and write complete reports; what they find is not asserted here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import in_process
import one_rank
import pytest
import torch
from support import REPO, clean_env, event

from bench import bucketfs, ckpt_chaos, ckpt_chaos_loops, loop, report, sections, stops, watchers
from trainer.layout.names import RunPaths

WAYS = ["skyspot", "torch.save + fsync", "accelerate.save_state", "DCP save", "DCP async_save"]
BOUNDS = [
    "training thread blocked",
    "training thread blocked, vs. torch.save + fsync",
    "training seconds lost per save, vs. torch.save + fsync",
    "commit with training idle, vs. torch.save + fsync",
    "extra memory, one rank",
    "extra memory, all 2 ranks of a node",
    "restore with verification, vs. DCP's load without",
]


@pytest.mark.slow
def test_the_bench_writes_a_report_with_every_way_to_save_and_every_bound(tmp_path: Path) -> None:
    path, figures = tmp_path / "performance.md", tmp_path / "figures.json"
    command = [
        sys.executable, "-m", "bench.checkpoint", "--size", "8MB", "--rounds", "1", "--forward-backward", "0.02",
        "--scales", "1", "--ranks", "2", "--folder", str(tmp_path), "--report", str(path), "--json", str(figures),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=REPO, env=clean_env(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    report = path.read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("| ")]
    for name in (*WAYS, *BOUNDS):
        assert any(row[0] == name and all(row[1:]) for row in rows), f"no whole row {name!r} in\n{report}"
    for what in ("CPU", "Memory", "System", "Disk", "Python", "torch", "accelerate", "safetensors", "xxhash"):
        assert re.search(rf"{what}:? \S", report), f"{what} is not in\n{report}"
    assert "Not enough memory to stage 0.0 GB" in report or "no control group could be made" in report
    found = json.loads(figures.read_text())
    assert {way for way, rounds in found["saves"].items() if rounds} >= set(WAYS)
    assert found["loads"]
    assert all(rounds and min(rounds) > 0 for rounds in found["loads"].values())
    staged = [rank["staged"] for rank in found["ranks"][0]["each"]]
    assert sum(staged) == pytest.approx(found["state_bytes"], rel=0.05), "two ranks staged more than one state"
    assert max(staged) < 0.6 * sum(staged), "the ranks' shares are not halves"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json", "performance.md"], "it left files"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"stall": 0.2}, "training thread blocked"),
        ({"lost": 1.6}, "seconds lost per save"),
        ({"commit": 4.0}, "commit with training idle"),
        ({"load": 1.6}, "restore with verification"),
        ({"extra": 1.5}, "extra memory, one rank"),
        ({"ranks": 1.2}, "all 2 ranks"),
        ({"load": 1.6, "state_bytes": 8_000_000}, ""),
    ],
)
def test_a_bound_that_does_not_hold_is_reported(change: dict[str, float], said: str) -> None:
    found = {"stall": 0.007, "lost": 0.4, "commit": 1.5, "load": 0.8, "extra": 1.01, "ranks": 0.5, "state_bytes": 1e9}
    found |= change
    size = int(found["state_bytes"])
    save = {"stall": found["stall"], "lost": found["lost"], "commit": found["commit"]}
    figures = report.Figures("", "", {}, (0, 0), size, 1, 1, 0.5)
    figures.saves = {report.OURS: [save], report.TORCH: [{"stall": 3.0, "lost": 3.0, "commit": 3.0}]}
    figures.loads = {report.OURS: [found["load"]], report.DCP: [1.0]}
    figures.extra_bytes = {report.OURS: int(found["extra"] * size)}
    figures.ranks = [report.Ranks(size, [{"extra": found["ranks"] * size}] * 2)]
    broken = report.broken(figures)
    assert len(broken) == bool(said), broken
    assert said in "".join(broken)


def test_a_value_that_is_not_a_size_is_refused_in_a_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.checkpoint", "--size", "8XB"],
        cwd=REPO, env=clean_env(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "'8XB' is not a size; write 1GB or 250MB" in done.stderr
    assert "Traceback" not in done.stderr


def test_each_bench_writes_its_own_part_of_the_report_and_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "performance.md"
    path.write_text("# Performance\n\nfirst\n\n## Saving\n\nms\n")
    sections.put(path, sections.CKPT_CHAOS, "none missed")
    sections.put(path, sections.REHEARSAL, "7x\n")
    sections.put(path, sections.REHEARSAL, "5x\n\n| a | b |")
    parts = f"## {sections.REHEARSAL}\n\n5x\n\n| a | b |\n\n## {sections.CKPT_CHAOS}\n\nnone missed\n"
    assert path.read_text() == f"# Performance\n\nfirst\n\n## Saving\n\nms\n\n{parts}"
    assert sections.joined("# Performance\n\nnew\n", sections.later(path)) == f"# Performance\n\nnew\n\n{parts}"
    assert sections.later(tmp_path / "none") == {}


def test_a_bucket_through_fuse_is_compared_with_one_that_is_bound() -> None:
    pairs = [(bucketfs.Cost(2.0, 1.5, 0.0), bucketfs.Cost(wall, 1.6, 0.9)) for wall in (2.5, 2.1, 2.0)]
    assert bucketfs.median_ratio(pairs) == pytest.approx(1.05)
    lines = bucketfs.described(pairs, [["2.2", "20", "10", "1"], ["30", "1000", "70", "9"]]).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert ["bound", "2.00 s", "0.81 GB/s", "0.93 s", "0.00 s"] in rows
    assert ["served through FUSE", "2.10 s", "0.77 GB/s", "0.99 s", "0.56 s"] in rows
    assert ["a small file, renamed over another", "20 us", "1000 us"] in rows


@pytest.mark.parametrize(
    ("event", "name", "mode", "description"),
    [
        ("os.rename", "optimizer.pt.tmp", "before", "before the rename of own/optimizer.pt.tmp to own/optimizer.pt"),
        ("torch.save", "model.pt.tmp", "before", "before the create of own/model.pt.tmp"),
        ("open", "weights.npy", "before", "before the emptying of own/state/weights.npy"),
        ("open", "checkpoint-100.pkl", "torn", "in the middle of the write to own/checkpoint-30.pkl at 0"),
        ("os.remove", "checkpoint-10.pkl", "before", "before the unlink of own/checkpoint-20.pkl"),
        ("os.mkdir", "checkpoint-10", "before", "before the mkdir of own/checkpoint-30 (2)"),
    ],
)
def test_a_place_is_the_same_for_both_tools(event: str, name: str, mode: str, description: str) -> None:
    assert ckpt_chaos.their_place(event, name, mode) == ckpt_chaos.our_place(description)


def test_a_place_that_only_the_other_tool_finds_is_missed() -> None:
    same, other = ckpt_chaos.their_place("open", "a", "torn"), ckpt_chaos.their_place("open", "a", "before")
    assert ckpt_chaos.missed([same, other], [ckpt_chaos.our_place("before the write to own/a at 0")]) == [other]


def struck(mode: str, crashed: bool = True, diff: float | None = 0.0) -> dict[str, object]:
    outcome = {"raised": None if diff is not None else "ExitCode1", "weights_diff": diff}
    return {"point": [7, mode], "crashed": crashed, "outcome": outcome}


CONTROL = {"crashed": False, "outcome": {"raised": None, "weights_diff": 0.0}}


def test_a_strike_counts_if_the_kill_came_and_a_script_that_was_not_struck_does_not_hold() -> None:
    missed = struck("before", crashed=False)
    one = ckpt_chaos_loops.judged([CONTROL, struck("torn"), struck("term", crashed=False), missed], 9.0)
    assert one.by_mode == {"torn": (1, 1), "term": (1, 1)}
    assert one.holds
    for results in (
        [CONTROL],
        [CONTROL, missed],
        [struck("torn")],
        [CONTROL, struck("torn"), struck("before", diff=1.0)],
        [CONTROL, struck("torn"), struck("before", diff=None)],
        [{**CONTROL, "outcome": {"raised": None, "weights_diff": 1.0}}, struck("torn")],
    ):
        assert not ckpt_chaos_loops.judged(results, 9.0).holds, results
    table = ckpt_chaos_loops.described({("hf_trainer", 2, True): one})
    assert re.search(r"`hf_trainer.py` +\| 2 +\| with skyspot \| 0 of 0 \| 1 of 1 \| 1 of 1 \| 2 of 2 \| 9 s", table), (
        table
    )


def test_what_ckpt_chaos_found_in_one_mode_is_kept_and_not_done_again(tmp_path: Path) -> None:
    file = tmp_path / "state"
    found = {
        mode: ckpt_chaos_loops.judged([CONTROL, struck(mode, diff=float(mode == "torn"))], 9.0)
        for mode in ckpt_chaos_loops.MODES
    }
    kept = ckpt_chaos_loops.Kept(file)
    for mode, one in found.items():
        kept.put(f"hf_trainer, 2, with, {mode}, all", one)
    again = ckpt_chaos_loops.Kept(file)
    absent = ckpt_chaos_loops.Tool(tmp_path / "no tool", ["python"])  # It would fail if it were started.
    one = ckpt_chaos_loops.in_each_mode(absent, "hf_trainer", 2, True, "all", again)
    assert one == ckpt_chaos_loops.together(list(found.values()))
    assert (one.in_all, one.took_s, one.holds) == ((2, 3), 27.0, False)
    assert sum(ckpt_chaos_loops.spread(7).values()) == 7
    with pytest.raises(FileNotFoundError):
        ckpt_chaos_loops.in_each_mode(absent, "hf_trainer", 2, False, "all", again)


def test_the_scripts_without_skyspot_save_and_resume() -> None:
    for name, resumes in (("hf_trainer", "get_last_checkpoint("), ("lightning_module", 'ckpt_path="last"')):
        text = ckpt_chaos_loops.unsafe(name)
        compile(text, name, "exec")
        assert resumes in text
        assert "SpotRun" not in text


LOOP_CHILD = """\
#!{python}
import sys
from multiprocessing.connection import Client

if "dies" in sys.argv:
    sys.exit(3)
Client(sys.argv[sys.argv.index("--address") + 1]).recv()
"""
"""Connects and waits, or dies before."""


def test_a_loop_that_dies_before_it_connects_ends_the_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = tmp_path / "child"
    child.write_text(LOOP_CHILD.format(python=sys.executable))
    child.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(child))
    case = loop.Case("1MB", 1, {loop.BARE: "waits", loop.OURS: "dies"})
    with pytest.raises(SystemExit, match=r"dies: loop_child\.py ended with 3 before its first step"):
        loop.measured(tmp_path / "made", case, 1, 1.0)


@pytest.mark.parametrize(
    ("ours_s", "ours_bytes", "lines"), [(1.0, 2010, 0), (1.03, 2010, 1), (1.0, 2100, 1), (1.5, 9000, 2)]
)
def test_a_loop_that_loses_throughput_or_takes_memory_breaks_its_bounds(
    ours_s: float, ours_bytes: int, lines: int
) -> None:
    def case(seconds: list[float], peak_bytes: int, has_bounds: bool) -> loop.Figures:
        took = {loop.BARE: [1.0, 1.0, 9.0], loop.OURS: seconds}
        peaks = {loop.BARE: 1_000_000, loop.OURS: peak_bytes}
        return loop.Figures(loop.Case("1MB", 1, {}, has_bounds), 10, took, peaks)

    found = {"short": case([9.0] * 3, 9_000_000, False), "long": case([ours_s] * 3, ours_bytes * 1000, True)}
    assert len(loop.broken(found)) == lines
    assert "| short" in loop.described(found)


@pytest.mark.parametrize(
    ("by_round", "holds"),
    [([1.0, 1.01, 0.99, 1.05, 1.0], True), ([1.05, 1.06, 1.01, 1.07, 1.05], True), ([1.05, 1.06, 1.03, 1.07], False)],
)
def test_watchers_break_their_bound_where_the_whole_interval_lies_over_it(by_round: list[float], holds: bool) -> None:
    figures = watchers.Figures(1000, [2.0] * len(by_round), [2 * ratio for ratio in by_round])
    low, high = watchers.interval(figures.ratios())
    assert min(by_round) <= round(low, 9) <= round(high, 9) <= max(by_round)
    assert (low <= watchers.BOUND) == holds
    assert len(watchers.broken(figures)) == (not holds)
    assert f"{low:.3f}x to {high:.3f}x" in watchers.described(figures)
    assert "| 2.000 ms" in watchers.described(figures)


@pytest.mark.parametrize(("slow_s", "lines"), [(0.9, 0), (1.15, 0), (1.3, 1)])
def test_stops_break_their_bound_where_the_median_beyond_a_micro_step_lies_over_it(slow_s: float, lines: int) -> None:
    found = {
        stops.SIGTERM: [stops.Took(seconds, 0.2) for seconds in (0.5, 0.4, 9.0)],
        stops.NOTICE: [stops.Took(seconds, 0.2) for seconds in (0.1, slow_s, 9.0)],
    }
    assert [line.partition(":")[0] for line in stops.broken(found)] == [stops.NOTICE] * lines
    text = stops.described(found)
    assert re.search(r"SIGTERM +\| 3 +\| 200 ms +\| 0.50 s, at most 9.00 s \| 0.30 s, at most 8.80 s", text), text
    assert stops.Took(0.1, 0.2).beyond_s == 0


def test_what_a_stop_took_is_read_from_the_attempts_records(tmp_path: Path) -> None:
    runs: list[one_rank.InProcess] = []

    def loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if runs[0].steps_done == 2 and not runs[0].notices.received.is_set():
            in_process.stop()
        return one_rank.squares(model, batch)

    assert one_rank.train(tmp_path / "run", loss=loss, before=runs.append, save_interval_steps=100).code == 75
    took, end = stops.took(RunPaths(tmp_path / "run")), event(tmp_path / "run", "end")
    assert took.commit_s == end["committed_s"] > 0  # type: ignore[operator]
    assert took.micro_step_s > 0
    [record] = tmp_path.glob("run/attempts/*/*-end.json")
    record.write_text(json.dumps({**end, "committed_step": 2}))
    with pytest.raises(SystemExit, match="step 3 was not committed before the deadline"):
        stops.took(RunPaths(tmp_path / "run"))
