"""The examples: each is its unsafe form and a few lines, as docs/your-own-script.md shows, and resumes exactly."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import example_campaign
import pytest
import torch
import warm
from curves import recorded, shown
from example_campaign import Done, Job, all_jobs, judged, report
from example_table import BROKEN, EXAMPLES, FOLDER, KINDS, WHY_NOT, Broken, Example, edited_task, entry, rehearse
from support import REPO, Ended, clean_env, event, launch, losses
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from skyspot.rehearsal.faults import DEFAULT_KINDS

SAFE = sorted(FOLDER.glob("*.py"))
PAGE = (REPO / "docs" / "your-own-script.md").read_text()
MAX_ADDED, MAX_LINES = 8, 80


def as_case(safe: Path) -> object:
    return pytest.param(safe, marks=[pytest.mark.slow] if entry(safe).slow else [], id=safe.stem)


def needs(safe: Path) -> None:
    for module in entry(safe).needs:
        if importlib.util.find_spec(module) is None:  # An import would take seconds.
            pytest.skip(f"{safe.stem}.py resumes exactly: pip install {module}")


def stopped_by_sigterm(script: Path, run_dir: Path, env: dict[str, str]) -> Ended:
    """Run a script under the launcher, and stop it once it has recorded a step."""
    command = [sys.executable, "-m", "trainer.launch", "--processes", "1", "--grace", "25", str(script)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = warm.Popen(command, env=env, start_new_session=True, **pipes)
    end = time.monotonic() + 120
    while not any(path.stat().st_size for path in run_dir.glob("attempts/*/metrics-*.jsonl")):
        assert time.monotonic() < end, "no step was recorded"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    return Ended(process.returncode, output)


def diff(safe: Path) -> list[str]:
    before = FOLDER / "before" / safe.name
    texts = [path.read_text().splitlines() for path in (before, safe)]
    return list(difflib.unified_diff(*texts, "before", "after", lineterm="", n=1))


@pytest.mark.parametrize("safe", SAFE, ids=lambda path: path.stem)
def test_an_example_is_short_and_adds_few_lines(safe: Path) -> None:
    assert len(safe.read_text().splitlines()) < MAX_LINES
    changes = diff(safe)[2:]
    removed = {line[1:].strip() for line in changes if line.startswith("-")}
    added = [line[1:] for line in changes if line.startswith("+") and line[1:].strip()]
    # A line that is only indented differently is not added.
    assert len([line for line in added if line.strip() not in removed]) <= MAX_ADDED
    assert "\n".join(diff(safe)) in PAGE
    assert safe.with_suffix(".yaml").exists()


def test_an_example_that_adds_more_lines_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_examples.FOLDER", tmp_path)
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "plain.py").write_text("pass\n")
    safe = tmp_path / "plain.py"
    safe.write_text("".join(f"line = {number}\n" for number in range(MAX_ADDED + 1)))
    with pytest.raises(AssertionError):
        test_an_example_is_short_and_adds_few_lines(safe)


def test_the_page_shows_no_other_diff() -> None:
    assert len(re.findall(r"^```diff$", PAGE, flags=re.M)) == len(SAFE)


class OneDevice(TorchDispatchMode):
    """Fails where an operation has tensors of two devices, as on a GPU. A single number may be anywhere."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor) and one.dim()]
        devices = {one.device.type for one in tensors}
        assert len(devices) < 2 or func is torch.ops.aten.copy_.default, f"{func} of tensors on {devices}"
        return func(*args, **(kwargs or {}))


OF_A_FRAMEWORK = re.compile(r"^(import|from) (accelerate|lightning|transformers|trl)\b", re.M)
"""The others move modules and batches themselves."""


@pytest.mark.parametrize("name", [safe.stem for safe in SAFE if not OF_A_FRAMEWORK.search(safe.read_text())])
def test_model_and_batches_are_on_the_gpu_where_there_is_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's device "meta", whose tensors have no values, stands for the GPU."""
    text, safe = ((FOLDER / part / f"{name}.py").read_text() for part in ("before", ""))
    on_device = [[line.strip() for line in one.splitlines() if "device" in line] for one in (text, safe)]
    assert on_device[0] == on_device[1]
    chosen = re.compile(r"^device = .* if torch\.cuda\.is_available\(\) else .*$", re.M)
    text, count = chosen.subn("device = torch.device('meta')", text)
    assert count == 1
    monkeypatch.chdir(tmp_path)
    for variable in set(os.environ) - set(clean_env()):
        monkeypatch.delenv(variable)
    monkeypatch.setenv("STEPS", "2")
    item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda one: 0.0 if one.is_meta else item(one))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    names: dict[str, Any] = {"__name__": name}
    with OneDevice():
        exec(text.replace("num_workers=2", "num_workers=0"), names)
    modules = [one for one in names.values() if isinstance(one, nn.Module)]
    assert {one.device.type for module in modules for one in module.parameters()} == {"meta"}
    assert names["loss"].is_meta


@pytest.mark.parametrize("safe", [*map(as_case, SAFE)])
def test_an_example_trains_and_stops_and_goes_on(safe: Path, tmp_path: Path) -> None:
    needs(safe)
    run_dir = tmp_path / "run"
    env = clean_env(SKYSPOT_CHECKPOINT_DIR=str(run_dir), OMP_NUM_THREADS="1")
    stopped = stopped_by_sigterm(safe, run_dir, {**env, "STEPS": "100000"})
    assert stopped.code == 75, stopped.output
    end = event(run_dir, "end")
    step = int(str(end["committed_step"]))
    assert (end["cause"], end["step"]) == ("signal", step), "a notice loses no step"
    done = launch(safe, env={**env, "STEPS": str(step + 2)})
    assert done.code == 0, done.output
    assert event(run_dir, "restored")["step"] == step
    assert sorted(losses(run_dir)) == list(range(1, step + 3))
    assert (run_dir / "final" / "MANIFEST.json").exists()


@pytest.mark.slow(60)
@pytest.mark.parametrize("safe", SAFE, ids=lambda path: path.stem)
def test_an_example_is_rehearsed(safe: Path, tmp_path: Path) -> None:
    """On one process, with few strikes; `make examples` has all kinds, on more processes too."""
    needs(safe)
    example, kept = entry(safe), tmp_path / "kept"
    strikes = example.strikes.split(",")
    options = ("--processes", 1, "--preemptions", len(strikes), "--kinds", example.strikes, "--keep", kept)
    task = safe.with_suffix(".yaml")
    if example.report_to:
        edit = (") as run:", f", report_to={example.report_to!r}) as run:")
        task = edited_task(safe.stem, (edit,), tmp_path)
    done = rehearse(task, example.steps, tmp_path, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Preempted: {example.says}: {example.steps} of {example.steps} losses" in done.stdout
    assert "tensorboard" not in done.stdout, "its files are no checkpoints"
    reports = list(kept.glob("preempted/bucket/*/tensorboard"))
    assert len(reports) == bool(example.report_to)
    for folder in reports:
        assert shown(folder.parent)["loss"] == recorded(folder.parent, "loss")


def test_each_broken_form_is_an_edit_of_an_example() -> None:
    assert len({broken.name for broken in BROKEN}) == len(BROKEN)
    for broken in BROKEN:
        ast.parse(broken.text())


def test_the_campaign_has_every_example_whole_and_broken_on_one_process_and_on_two() -> None:
    inexact = {(job.example, job.processes) for job in all_jobs() if job.broken and job.broken.verdict == "NOT exact"}
    whole = {(job.example, job.processes) for job in all_jobs() if job.broken is None}
    for processes in ("1", "2"):
        assert {name for name, count in whole if count == processes} == {safe.stem for safe in SAFE}
        assert {name for name, count in inexact if count == processes} == {safe.stem for safe in SAFE}
    forms = {(broken.example, broken.kind) for broken in BROKEN if broken.kind}
    assert forms.isdisjoint(WHY_NOT)
    assert forms | WHY_NOT.keys() == {(safe.stem, kind) for safe in SAFE for kind in KINDS}


@pytest.mark.slow
@pytest.mark.parametrize("broken", [one for one in BROKEN if one.in_ci], ids=lambda broken: broken.name)
def test_a_broken_rule_is_found_and_named(broken: Broken, tmp_path: Path) -> None:
    """One strike; `make examples` has every form."""
    steps, strike = EXAMPLES.get(broken.example, Example()).steps, ("--preemptions", 1, "--kinds", "sigterm")
    done = rehearse(broken.task(tmp_path), steps, tmp_path, "--processes", 1, "--assume-reproducible", *strike)
    assert done.returncode == 1, done.stdout + done.stderr
    assert broken.verdict in done.stdout
    assert broken.says in done.stdout, done.stdout


def outcome(wrong: str = "") -> Done:
    return Done("1", 5, "bit-identical: 80 of 80 losses", 9.0, wrong)


def test_the_campaign_goes_on_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, asked, commit = all_jobs(), list[str](), example_campaign.commit()
    monkeypatch.setattr(example_campaign, "commit", lambda: commit)  # Two processes for each job.

    def work(job: Job) -> Done:
        asked.append(job.name)
        if asked.count(job.name) == 1 and job is jobs[1]:
            raise KeyboardInterrupt
        return outcome("a bug" if asked.count(job.name) == 1 and job is jobs[0] else "")

    state = tmp_path / "state.json"
    with pytest.raises(KeyboardInterrupt):
        example_campaign.campaign(jobs, state, work)
    done = example_campaign.campaign(jobs, state, work)
    assert list(done) == [job.name for job in jobs]
    assert asked[:4] == [jobs[0].name, jobs[1].name, jobs[0].name, jobs[1].name], "what was wrong is done again"
    example_campaign.campaign(jobs, state, lambda job: pytest.fail("all is done"))
    text = report(jobs, done, "today")
    assert f"| `plain.py` | 1 | 5 | bit-identical: 80 of 80 losses | 9 | {commit} |" in text
    for broken in BROKEN:
        for processes in broken.processes:
            assert f"| {broken.rule} | `{broken.example}.py` | {processes} |" in text
    assert "| `gan.py` | not rehearsed: it has none | NOT exact (1 and 2) | not rehearsed: it has none |" in text


def test_the_results_have_a_row_for_each_rehearsal_of_the_campaign_and_the_pages_tell_its_kinds() -> None:
    rows, _, last = (REPO / "docs" / "examples-results.md").read_text().partition("\nWhat is not saved")
    rows = [line for line in rows.splitlines() if re.match(r"\| (?!example |rule that )", line)]
    for row, job in zip(rows, jobs := all_jobs(), strict=True):
        assert row.startswith(f"{example_campaign.first_cells(job)} ")
    assert f"\nWhat is not saved{last}".strip() == "\n".join(example_campaign.matrix(jobs))
    kinds = ", ".join(f"`{kind}`" for kind in DEFAULT_KINDS)
    assert f"under the five default kinds of preemption ({kinds})" in " ".join(PAGE.split())
    assert "](examples-results.md)" in PAGE


@pytest.mark.parametrize("broken", [None, BROKEN[0]])
def test_the_campaign_compares_the_verdict_with_the_table(broken: Broken | None) -> None:
    job = Job("x", "plain", broken=broken)
    says = f"{broken.verdict} {broken.says}" if broken else "bit-identical"

    def wrong(text: str, exact: bool) -> str:
        legs = [{"verdict": None}, {"verdict": {"text": text}, "preempted": 1}]
        return judged(job, {"legs": legs, "exact": exact, "seconds": 1.0}).wrong

    assert wrong(says, broken is None) == ""
    assert wrong(says, broken is not None)
    assert wrong("something else", broken is None)
