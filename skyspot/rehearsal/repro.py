"""A script that repeats one row of the table by kind of preemption alone, for a bug report."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from skyspot.rehearsal import by_kind
from skyspot.rehearsal.junit import printable
from skyspot.rehearsal.result import OTHER_PROCESSES, Kind, Result


@dataclass(frozen=True)
class Repro:
    """Which row is to be repeated, and how the rehearsal was started."""

    number: int
    """The row's number, from 1."""
    folder: Path
    """The working folder: the rehearsal started there, and the script lies there."""
    arguments: str
    """Task and options, quoted for a shell, without kinds, place and processes."""
    processes: str
    """The numbers of processes, as `--processes` has them."""

    @property
    def path(self) -> Path:
        """The script."""
        return self.folder / f"skyspot-repro-{self.number}.sh"


def reproduced(repro: Repro, result: Result) -> str:
    """Write the script if the row failed.

    Returns: a line that says so, or why there is none.

    Raises:
        OSError: it cannot be written.
    """
    if repro.number > len(result.kinds):
        return f"--repro {repro.number}: no script, because the table has {len(result.kinds)} rows."
    kind = result.kinds[repro.number - 1]
    if kind.outcome in (by_kind.EXACT, by_kind.NOT_TRIED):
        return f"--repro {repro.number}: no script, because row {repro.number} ({kind.kind}) is {kind.outcome}."
    repro.path.write_bytes(os.fsencode(script(repro, kind, records=_has_records(result))))
    repro.path.chmod(0o755)
    return f"{repro.path.name} repeats row {repro.number} ({kind.kind}) alone."


def script(repro: Repro, kind: Kind, *, records: bool) -> str:
    """The text of the script.

    Args:
        repro: What to repeat.
        kind: The row.
        records: True if the task records its steps. Its first preemption comes before the first checkpoint, so that
            two are needed.
    """
    if kind.kind == OTHER_PROCESSES:
        options = ["--kinds=sigterm", "--preemptions=1", f"--processes={repro.processes}"]
    else:
        count = 2 if records else 1
        options = [f"--kinds={kind.kind}", f"--preemptions={count}", f"--processes={repro.processes.partition(',')[0]}"]
    if kind.place is not None:
        options.append(f"--at={kind.place}")
    command = " ".join(part for part in ("skyspot rehearse", repro.arguments, shlex.join(options)) if part)
    return (
        "#!/bin/sh\n"
        f"# Repeats row {repro.number} of a rehearsal alone: {kind.kind}. Its verdict was {kind.outcome}:\n"
        f"# {' '.join(printable(kind.why).split())}\n"
        "# Exits 0 if the run resumes exactly this time. Options may be added, like --keep FOLDER.\n"
        f"cd {shlex.quote(str(repro.folder))} || exit 2\n"
        f'exec {command} "$@"\n'
    )


def _has_records(result: Result) -> bool:
    return any(row.first_step is not None for leg in result.legs for row in leg.rows)
