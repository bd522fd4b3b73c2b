"""The files with a rehearsal's result, for continuous integration."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from skyspot.errors import SkyspotError, UsageError
from skyspot.money.prices import Price
from skyspot.rehearsal.junit import junit, unfinished
from skyspot.rehearsal.repro import Repro, reproduced
from skyspot.rehearsal.result import Result
from skyspot.rehearsal.summary import summary


@dataclass(frozen=True)
class Reports:
    """The files to write; None: not asked for."""

    junit: Path | None = None
    summary: Path | None = None
    repro: Repro | None = None
    html: Path | None = None
    """The page with the report of the preempted run."""
    prices: Price | None = None
    """The stated price of a node, for that report."""

    def begin(self, name: str) -> None:
        """Check that the files can be written, before anything runs.

        The JUnit file says from now on that the rehearsal has not ended, so that no older one is taken for its result.

        Args:
            name: The task's name.

        Raises:
            UsageError: a file cannot be written, or is named twice.
        """
        files = {"--junit": self.junit, "--summary": self.summary, "--html": self.html}
        for (option, one), (other, two) in combinations(files.items(), 2):
            if one and two and _same(one, two):
                raise UsageError(f"{option} and {other} are both {one}; name two files")
        try:
            if self.junit:
                self.junit.write_bytes(unfinished(name))
        except OSError as error:
            raise UsageError(f"--junit {self.junit}: {error.strerror}") from None
        try:
            if self.summary:
                self.summary.open("ab").close()
        except OSError as error:
            raise UsageError(f"--summary {self.summary}: {error.strerror}") from None
        if self.repro and not os.access(self.repro.path.parent, os.W_OK):
            raise UsageError(f"--repro {self.repro.number}: {self.repro.path.parent} cannot be written")

    def write(self, name: str, result: Result) -> str | None:
        """Write the result: JUnit XML instead of what is there, the summary after what is there.

        Returns: a line about the script that repeats a failure; None if it was not asked for.

        Args:
            name: The task's name.
            result: The result.

        Raises:
            SkyspotError: a file cannot be written.
        """
        try:
            if self.junit:
                self.junit.write_bytes(junit(name, result))
            if self.summary:
                with self.summary.open("ab") as file:
                    # A line that another step left unfinished must not become part of the heading.
                    file.write(("\n\n" if file.tell() else "").encode() + summary(name, result).encode())
            return reproduced(self.repro, result) if self.repro else None
        except OSError as error:
            raise SkyspotError(f"{error.filename}: {error.strerror}") from None


def _same(one: Path, two: Path) -> bool:
    return one.resolve() == two.resolve() or (one.exists() and two.exists() and one.samefile(two))
