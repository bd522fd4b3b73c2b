"""A part of the fault campaign (make chaos), and planted mistakes that it must find."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import bucket_lab
import pytest
import warm
from support import REPO, clean_env

RUN = REPO / "tests" / "chaos" / "run.py"


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short name: the address of a socket in it is 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        yield Path(folder)


def campaign(*args: str, folder: Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return warm.run(
        [sys.executable, RUN, *args], env=clean_env(TMPDIR=str(folder)), capture_output=True, text=True, timeout=timeout
    )


def struck(done: subprocess.CompletedProcess[str]) -> tuple[int, int, int]:
    found = re.search(r"(\d+) faults struck, (\d+) hit, (\d+) not survived", done.stdout)
    assert found, done.stdout + done.stderr
    return int(found[1]), int(found[2]), int(found[3])


@pytest.mark.parametrize("counts", [
    {"local": 24, "local-ranks": 6, "sequential": 6},
    pytest.param({"local": 96, "local-ranks": 24, "sequential": 84, "sequential-ranks": 24, "rclone": 12,
                  "rclone-cached": 8}, marks=pytest.mark.slow(70)),
], ids=["some", "two hundred and forty-eight"])  # fmt: skip
def test_faults_of_every_kind_are_survived(short: Path, counts: dict[str, int]) -> None:
    if bucket_lab.missing():
        counts = {store: count for store, count in counts.items() if store.startswith("local")}
    done = [campaign("--stores", store, "--faults", str(count), folder=short) for store, count in counts.items()]
    totals = [struck(one) for one in done]
    assert [total[0] for total in totals] == list(counts.values())
    # The others came too late, or found nothing.
    at_least = 0.75 if sum(counts.values()) > 200 else 0.5
    assert sum(total[1] for total in totals) > at_least * sum(counts.values())
    assert [total[2] for total in totals] == [0] * len(totals), "".join(one.stdout for one in done)
    assert not any(short.iterdir())


@pytest.mark.parametrize("plant", ["hash not checked", "buffer copied late"])
def test_a_mistake_in_the_code_is_found(short: Path, plant: str) -> None:
    done = campaign("--plants", plant, folder=short)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"{plant}: found after \d+ faults", done.stdout), done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plant", "kind", "seen"),
    [
        ("name not compared", "under another's name", "restored"),
        ("full bucket ridden out", "ENOSPC for good", "ended with 0, not 1"),
        ("newer attempt not noticed", "two attempts alive", "ended with 0, not 76"),
        ("old ones deleted first", "torn", "for a moment no whole checkpoint was in the store"),
        ("another rank's share not waited for", "kill at random", r"step \d+ was committed, but the newest whole"),
    ],
)
def test_a_mistake_is_found_by_the_fault_that_is_meant_for_it(short: Path, plant: str, kind: str, seen: str) -> None:
    done = campaign("--plants", plant, "--kinds", kind, folder=short)
    if "not tried, " in done.stdout:
        pytest.skip(done.stdout.partition("not tried, ")[2].strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"{plant}: found after \d+ faults \(.*, {kind}: .*{seen}", done.stdout), done.stdout
