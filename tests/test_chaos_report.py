"""What a whole campaign of faults writes: docs/chaos-results.md."""

import json
import sys
from pathlib import Path
from typing import Any

import warm
from support import REPO, clean_env

sys.path.append(str(REPO / "tests" / "chaos"))

import campaign
import report
from stores import NAMES, missing
from tally import Tally, keep

RAN = {"seconds": 1848.0, "workers": 4, "cores": 2, "date": "2026-11-26", "commit": "abc1234"}


def finished(**changes: Any) -> Tally:
    """A whole campaign, with a kind of fault for each store."""
    struck = {f"{store}/torn": count for store, count in campaign.WHOLE.items()} | {"local/EIO": 3}
    tally = Tally(what={"seed": 0, "faults": campaign.WHOLE, "kinds": []}, ran=RAN)
    tally.struck.update(struck)
    tally.hit.update({key: count - 1 for key, count in struck.items()})
    tally.done = {(job.store, job.episode) for job in campaign.jobs_for(campaign.WHOLE, 0, ())}
    for name, value in changes.items():
        setattr(tally, name, value)
    return tally


def test_the_results_of_a_whole_campaign_are_written_by_store_and_by_fault(tmp_path: Path) -> None:
    report.write(tmp_path / "results.md", finished())
    text = (tmp_path / "results.md").read_text()
    assert "Seed 0, 2026-11-26, commit abc1234, 4 workers on 2 cores: **22,103 faults in 30 min 48 s" in text
    assert "22,096 of them hit, 0 not survived**" in text
    assert "| local | 10,003 | 10,001 | 0 |" in text
    assert "| rclone, no cache | 300 | 299 | 0 |" in text
    assert f"| fault | {' | '.join(NAMES)} |" in text
    assert "| EIO | 3 / 2 |  |  |  |  |  |" in text
    assert text.index("| EIO |") < text.index("| torn | 10000 / 9999 | 10000 / 9999 | 600 / 599 |")


def test_only_a_whole_campaign_without_a_wrong_fault_has_results() -> None:
    assert campaign.is_whole(finished())
    assert not campaign.is_whole(finished(done={("local", 0)}))
    assert not campaign.is_whole(finished(wrong=[{"store": "local", "kind": "torn", "wrong": "it is gone"}]))
    assert not campaign.is_whole(finished(what={"seed": 0, "faults": {"local": 100}, "kinds": []}))
    assert not campaign.is_whole(finished(what={"seed": 0, "faults": campaign.WHOLE, "kinds": ["torn"]}))


def reported(state: Path, path: Path, *more: str) -> str:
    command = [sys.executable, REPO / "tests" / "chaos" / "run.py", "--state", state, "--report", path, *more]
    done = warm.run(command, env=clean_env(TMPDIR=str(state.parent)), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def test_a_finished_campaign_is_reported_from_its_state_without_striking_anything(tmp_path: Path) -> None:
    counts = {store: count for store, count in campaign.WHOLE.items() if not missing(store)}
    keep(finished(what={"seed": 0, "faults": counts, "kinds": []}), tmp_path / "state.json")
    before = json.loads((tmp_path / "state.json").read_text())
    output = reported(tmp_path / "state.json", tmp_path / "results.md")
    assert json.loads((tmp_path / "state.json").read_text()) == before
    if counts == campaign.WHOLE:
        assert (tmp_path / "results.md").read_text() == report.text(finished())
    else:
        assert "results.md: not written" in output


def test_a_part_of_the_campaign_leaves_the_results_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "results.md").write_text("those of the whole\n")
    output = reported(tmp_path / "state.json", tmp_path / "results.md", "--faults", "1", "--stores", "local")
    assert "results.md: not written" in output
    assert (tmp_path / "results.md").read_text() == "those of the whole\n"
    ran = json.loads((tmp_path / "state.json").read_text())["ran"]
    assert ran["seconds"] > 0
    assert ran.keys() == {"seconds", "workers", "cores", "date", "commit"}
