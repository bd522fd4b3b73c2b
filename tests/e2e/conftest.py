"""The lab as a fixture. `make test` does not collect this folder: `make e2e` does."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
MISSING = os.environ.get("SKYSPOT_E2E_MISSING")
"""Why this machine cannot have the lab, as in needs.py."""
if os.environ.get("SKYSPOT_E2E") != "1":
    collect_ignore_glob = ["*"]
else:
    sys.path.insert(0, str(HERE))
    import scenarios
    from lab import NOTES, Lab

    def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
        for item in items:
            item.add_marker(pytest.mark.slow)
            if MISSING:
                item.add_marker(pytest.mark.skip(reason=f"SkyPilot on Slurm: {MISSING}"))

    @pytest.fixture(scope="session")
    def lab() -> Iterator[Lab]:
        """The running lab."""
        lab = Lab()
        NOTES.unlink(missing_ok=True)
        yield lab
        lab.close()

    @pytest.fixture(scope="session")
    def side_by_side(lab: Lab, request: pytest.FixtureRequest) -> dict[str, Future[Any]]:
        """The scenarios of all tests that were selected, running."""
        return scenarios.start(lab, (name for item in request.session.items for name in item.fixturenames))

    def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
        if not MISSING and NOTES.exists():
            terminalreporter.section("what happened when")
            terminalreporter.write(NOTES.read_text())
