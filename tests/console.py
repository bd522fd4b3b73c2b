"""The console script's own main(), called in pytest's process."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from skyspot.cli import main

Skyspot = Callable[..., tuple[int, str, str]]
"""The program: takes its arguments; returns its exit status, stdout and stderr."""


def in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Skyspot:
    """The program, in the working directory and environment of the test."""

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["skyspot", *args])
        try:
            main.main()
            code = 0
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        return (code, *capsys.readouterr())

    return run
