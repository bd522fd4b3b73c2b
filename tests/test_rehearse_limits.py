"""A rehearsal with prices: its run stops at the spend limit, which it passes by no more than one save and the grace."""

import json
from pathlib import Path

import pytest
from support import REPO
from support_rehearse import rehearse

GRACE_S, USD_PER_S, LIMIT_USD = 3, 0.1, 50.0
ALLOWANCE_S = 75
"""The minute that counts after a kill, and the start of the attempt that finds the limit reached."""


def records(folder: Path) -> list[dict[str, object]]:
    found = []
    for path in folder.glob("*.json"):
        try:
            found.append({"name": path.stem.partition("-")[2] or path.stem, **json.loads(path.read_text())})
        except ValueError:  # The machine was taken while it was written.
            continue
    return found


@pytest.mark.slow
def test_a_rehearsed_run_with_kills_stops_at_its_spend_limit(tmp_path: Path) -> None:
    (tmp_path / "templates").mkdir()
    template = (REPO / "templates" / "finetune.yaml.j2").read_text()
    template = template.replace("-m trainer --", f"-m trainer --grace {GRACE_S} --")
    (tmp_path / "templates" / "finetune.yaml.j2").write_text(template)
    (tmp_path / "skyspot.yaml").write_text(f"prices: [{{spot: {USD_PER_S * 3600:g}, on_demand: 7200}}]\n")
    done = rehearse("--preemptions", 10, "--kinds", "kill,sigterm", "--processes", "1", "--max-spend", LIMIT_USD,
                    "--spend-allowance", ALLOWANCE_S, "--keep", tmp_path / "kept", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "stopped at its limit (max-spend), exit 79" in done.stdout
    [attempts] = (tmp_path / "kept" / "preempted").glob("bucket/**/attempts")
    usd, save_s, kills = 0.0, 0.0, 0
    for folder in sorted(attempts.iterdir()):
        found = records(folder)
        [start] = [one for one in found if one["name"] == "start"]
        assert start["place"]["usd_per_hour"] == pytest.approx(USD_PER_S * 3600)  # type: ignore[index]
        has_end = any(one["name"] == "end" for one in found)
        kills += not has_end
        lived = max(float(str(one["monotonic"])) for one in found) - float(str(start["monotonic"]))
        usd += (float(str(start["launched_s"])) + lived + 60 * (not has_end)) * USD_PER_S
        save_s = max([save_s, *(float(str(one["commit_s"])) for one in found if one["name"] == "saved")])
    last = {str(one["name"]): one for one in records(max(attempts.iterdir()))}
    assert (last["end"]["code"], last["end"]["cause"]) == (79, "max-spend")
    assert last["limit"]["max_spend_usd"] == LIMIT_USD
    assert kills >= 1
    assert usd <= LIMIT_USD + (save_s + GRACE_S) * USD_PER_S
    reckoned = usd + ALLOWANCE_S * USD_PER_S * len(list(attempts.iterdir()))
    assert reckoned > LIMIT_USD - 20 * USD_PER_S, "nor does it stop long before"
