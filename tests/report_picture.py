"""Draws the picture of a report's page in README: docs/images/report.png, of a run whose records are made up.

.venv/bin/python tests/report_picture.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import chromium
from chromium import Browser
from crafted import NOON
from crafted_training import training

from skyspot.money.report import Given, report_of
from skyspot.page.page import page
from skyspot.runs.records import read_records
from trainer.layout.names import RunPaths

HEIGHT = 845
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "report.png"


def draw(browser: Browser, path: Path) -> Path:
    """Write the picture."""
    with tempfile.TemporaryDirectory() as folder:
        root = training(Path(folder) / "run-001")
        now = NOON + 1e6
        records = read_records(RunPaths(root))
        file = Path(folder) / "report.html"
        file.write_text(
            page(report_of(records, Given(now, {}, {})), records, now).replace(folder, "s3://my-checkpoints")
        )
        path.write_bytes(browser.open(file.as_uri(), chromium.SCREEN).picture(HEIGHT))
    return path


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    with chromium.browser() as found:
        print(f"{draw(found, PICTURE)}: {PICTURE.stat().st_size / 1000:.0f} kB")
