"""Lists the guarantees that a run of the tests skipped, each with its remedy; in CI a skip with a remedy is a failure.

Reasons have the form that needs.py describes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator

import pytest
from needs import NOT_HERE


def reason_of(report: pytest.TestReport) -> str:
    """The reason why a test was skipped."""
    text = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    return text.removeprefix("Skipped: ")


def is_expected(reason: str) -> bool:
    """Whether the machine leaves no remedy for a skip."""
    return f": {NOT_HERE}: " in reason


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    if in_ci and report.skipped and not hasattr(report, "wasxfail") and not is_expected(reason := reason_of(report)):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} would be skipped, and in CI every guarantee is tested: {reason}"
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None, None, None]:
    """Print the skipped guarantees at the end, before pytest's last line."""
    yield
    skipped = Counter(map(reason_of, terminalreporter.stats.get("skipped", [])))
    if skipped:
        terminalreporter.section("not tested")
        for reason, count in sorted(skipped.items()):
            terminalreporter.line(f"{reason} ({count} {'test' if count == 1 else 'tests'})")
