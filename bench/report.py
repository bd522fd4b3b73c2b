"""The bench's figures as docs/performance.md."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.sizes import shown, tensor_count

OURS, TORCH, DCP = "skyspot", "torch.save + fsync", "DCP load"
MEANT_BYTES = 1e9
"""The bounds are meant for a state of that size, or more."""
STALL_S = 0.060
ONE_COPY = 1.1
"""What counts as one copy: the state, and a tenth for all else that a save needs."""


@dataclass
class Figures:
    """What was measured, in seconds and bytes; a list has a value for each round."""

    command: str
    date: str
    machine: dict[str, str]
    load: tuple[float, float]
    """Before and after."""
    state_bytes: int
    rounds: int
    threads: int
    """That training computes on."""
    asked_s: float
    """How long forward and backward shall take at least."""
    forward_backward: list[float] = field(default_factory=list)
    """The shortest of each process."""
    step_s: list[float] = field(default_factory=list)
    steps: int = 0
    """Beside each save."""
    first_stall: dict[str, float] = field(default_factory=dict)
    saves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """By way, for each round: stall, lost, cpu, commit."""
    extra_bytes: dict[str, int | None] = field(default_factory=dict)
    loads: dict[str, list[float]] = field(default_factory=dict)
    load_alone: list[float] = field(default_factory=list)
    """DCP's, without what comes before and after it."""
    ranks: list[Ranks] = field(default_factory=list)
    short: Short | None = None

    def median(self, way: str, what: str) -> float:
        return statistics.median(found[what] for found in self.saves[way])


@dataclass(frozen=True)
class Ranks:
    """Some ranks that save one state together, each rank's figures by name."""

    state_bytes: int
    each: list[dict[str, float]]


@dataclass
class Short:
    """A save where memory for a copy is short."""

    limited_by: str
    spare_bytes: int
    said: list[str] = field(default_factory=list)
    stall_s: float = 0.0
    extra_bytes: int | None = None
    trouble: str = ""
    """Why there was no save."""


def written(figures: Figures) -> str:
    """The whole report."""
    parts = [_head(figures), _bounds(figures), _saves(figures), _loads(figures), _ranks(figures), _short(figures)]
    return "\n\n".join(parts) + "\n"


def _head(figures: Figures) -> str:
    low, high = min(figures.step_s), max(figures.step_s)
    tensors = tensor_count(figures.state_bytes)
    fastest = min(figures.forward_backward)
    asked = (
        "" if fastest >= figures.asked_s else f", less than the {figures.asked_s:g} s asked for: the machine got faster"
    )
    machine = "\n".join(f"- {what}: {value}" for what, value in figures.machine.items())
    return f"""# Performance

Written by `make bench`: what one run found, bounds that did not hold included.

- Command: `{figures.command}`, {figures.date}
{machine}
- Load (processes that want a core): {figures.load[0]:.1f} before, {figures.load[1]:.1f} after (the bench is one).
- A step without a save took {low:.2f} to {high:.2f} s in the different rounds: so noisy the machine was.
- State: {shown(figures.state_bytes)} of parameters and AdamW state in fp32, {tensors} tensors, on the CPU.
- Training computes on {figures.threads} of the cores, as beside a GPU; malloc keeps what is freed, as a GPU's allocator
  does. Forward and backward, between the save and the optimizer's step, take at least {fastest:.2f} s{asked}.

Each way to save has a process of its own. They take turns: one round that is shown apart, or not at all, and
{figures.rounds} that count; medians. Every checkpoint that was loaded was compared, bit by bit, with what was saved."""


def broken(figures: Figures) -> list[str]:
    """The bounds that did not hold, in a line each; they are meant for 1 GB: below that, none."""
    if figures.state_bytes < MEANT_BYTES:
        return []
    return [f"{what}: {found}, bound {bound}" for what, found, bound, holds in _checked(figures) if not holds]


def _checked(figures: Figures) -> list[tuple[str, str, str, bool]]:
    """What, found, bound, and whether it holds."""
    torch_s = {what: figures.median(TORCH, what) for what in ("stall", "lost", "commit")}
    ours_s = {what: figures.median(OURS, what) for what in ("stall", "lost", "commit")}
    load_s, dcp_s = statistics.median(figures.loads[OURS]), statistics.median(figures.loads[DCP])
    return [
        ("training thread blocked", _ms(ours_s["stall"]), f"{STALL_S * 1000:.0f} ms", ours_s["stall"] <= STALL_S),
        _ratio("training thread blocked, of torch.save + fsync", ours_s["stall"], torch_s["stall"], 0.1),
        _ratio("training seconds lost per save, of torch.save + fsync", ours_s["lost"], torch_s["lost"], 0.5),
        _ratio("commit with training idle, of torch.save + fsync", ours_s["commit"], torch_s["commit"], 1.3),
        *_memory(figures),
        _ratio("restore with verification, of DCP's load without", load_s, dcp_s, 1.5),
    ]


def _bounds(figures: Figures) -> str:
    table = _table(
        ["What", "Found", "Bound", "Holds"],
        [[what, found, bound, "yes" if holds else "**no**"] for what, found, bound, holds in _checked(figures)],
    )
    note = "" if figures.state_bytes >= MEANT_BYTES else "\n\nThe bounds are meant for 1 GB; this state is smaller."
    return f"## The bounds\n\n{table}{note}"


def _ratio(what: str, ours: float, theirs: float, bound: float) -> tuple[str, str, str, bool]:
    return what, f"{ours / theirs:.2f}x", f"{bound:g}x", ours <= bound * theirs


def _memory(figures: Figures) -> list[tuple[str, str, str, bool]]:
    rows = []
    extra = figures.extra_bytes[OURS]
    if extra is not None:
        ratio = extra / figures.state_bytes
        rows.append(("extra memory, one rank", f"{ratio:.2f} copies", f"1 copy (<= {ONE_COPY:g})", ratio <= ONE_COPY))
    for run in figures.ranks:
        if run.state_bytes == figures.state_bytes and len(run.each) > 1:
            ratio = sum(rank["extra"] for rank in run.each) / run.state_bytes
            what = f"extra memory, all {len(run.each)} ranks of a node"
            rows.append((what, f"{ratio:.2f} copies", f"1 copy (<= {ONE_COPY:g})", ratio <= ONE_COPY))
    return rows


def _saves(figures: Figures) -> str:
    rows = []
    for way in figures.saves:
        values = {what: figures.median(way, what) for what in ("stall", "lost", "cpu", "commit")}
        extra = figures.extra_bytes[way]
        rows.append(
            [
                way,
                _ms(values["stall"]),
                _ms(figures.first_stall[way]),
                _of(values["stall"], figures.median(TORCH, "stall")),
                f"{values['lost']:.2f} s",
                _of(values["lost"], figures.median(TORCH, "lost")),
                f"{values['cpu']:.2f} s",
                f"{values['commit']:.2f} s",
                _of(values["commit"], figures.median(TORCH, "commit")),
                "-" if extra is None else f"{shown(extra)}, {extra / figures.state_bytes:.2f}x",
            ]
        )
    header = ["", "Stall", "first", "ratio", "Lost per save", "ratio", "CPU", "Commit, idle", "ratio", "Extra memory"]
    spread = _table(
        ["", "Stall", "Lost per save", "Commit, idle"],
        [[way, *(_spread(figures, way, what) for what in ("stall", "lost", "commit"))] for way in figures.saves],
    )
    return f"""## Saving

{_table(header, rows)}

- Stall: seconds that the training thread is blocked, by the call and by waiting for it before the optimizer's step.
- Lost per save: {figures.steps} steps with a save, and all that follows it in the background, less as many without.
- CPU: the same difference in CPU seconds.
- Commit: from the call until all is on disk, with nothing else to do. accelerate leaves that to the system: here it is
  called, and then fsync for each of its files.
- Extra memory: the process' peak (VmHWM) since its first save, less its peak of training without one. Files in the
  system's cache do not count.
- DCP async_save as it comes copies on the training thread, to memory that it asks for anew each time; with a stager of
  one's own it keeps the memory and copies on another thread.
- skyspot's commit beside the training includes the hash of all that is written; after it, its checkpoint is read back
  and hashed, and an older one deleted: that is in what is lost.

The least and the most of {figures.rounds} rounds:

{spread}"""


def _spread(figures: Figures, way: str, what: str) -> str:
    values = [found[what] for found in figures.saves[way]]
    return f"{min(values):.3f} .. {max(values):.3f} s"


def _loads(figures: Figures) -> str:
    base = statistics.median(figures.loads[DCP])
    rows = [
        [
            way,
            f"{statistics.median(took):.2f} s",
            _of(statistics.median(took), base),
            f"{min(took):.2f} .. {max(took):.2f} s",
        ]
        for way, took in figures.loads.items()
    ]
    alone_s = statistics.median(figures.load_alone)
    return f"""## Restoring

{_table(["", "Restore", "of DCP", "least and most"], rows)}

- Into a model just built, in a process just started, until it could train on; the files are in the system's cache, for
  all alike. skyspot's hashes every byte and compares with the manifest; the others verify nothing.
- DCP: get_state_dict, load, set_state_dict. `dcp.load` alone, into tensors made before: {alone_s:.2f} s.
- torch.load with mmap leaves the optimizer's state in the file until it is used: that reading is not in its time."""


def _ranks(figures: Figures) -> str:
    rows = []
    for run in figures.ranks:
        extra = sum(rank["extra"] for rank in run.each)
        rows.append(
            [
                shown(run.state_bytes),
                str(len(run.each)),
                " + ".join(shown(rank["staged"]) for rank in run.each),
                _ms(max(rank["stall"] for rank in run.each)),
                _ms(max(rank["first_stall"] for rank in run.each)),
                f"{max(rank['commit'] for rank in run.each):.2f} s",
                " + ".join(shown(rank["extra"]) for rank in run.each),
                f"{extra / run.state_bytes:.2f}x",
                f"{min(rank['forward_backward'] for rank in run.each):.2f} s",
            ]
        )
    header = [
        "State",
        "Ranks",
        "Staged",
        "Stall",
        "first",
        "Commit, training",
        "Extra memory",
        "of state",
        "Forward/backward",
    ]
    return f"""## By size and by number of ranks

skyspot alone; every rank holds all of the state. All ranks share this machine's cores.

{_table(header, rows)}"""


def _short(figures: Figures) -> str:
    short = figures.short
    if short is None:
        return """## Where memory is short

Not shown by this run: no control group could be made here (that takes root)."""
    told = f"A process limited by {short.limited_by} to {shown(short.spare_bytes)} more than it trains with"
    if short.trouble:
        told = f"{told}, and then was to save, **failed**: {short.trouble.splitlines()[-1]}"
        return f"## Where memory is short\n\n{textwrap.fill(told, 120)}"
    extra = "not measured" if short.extra_bytes is None else shown(short.extra_bytes)
    told = (
        f"{told}. The checkpoint was committed, and the process went on; the training thread was blocked for "
        f"{short.stall_s:.2f} s, extra memory: {extra}. It said:"
    )
    said = "\n".join(f"    {line}" for line in short.said) or "    (nothing)"
    return f"## Where memory is short\n\n{textwrap.fill(told, 120)}\n\n{said}"


def _of(value: float, base: float) -> str:
    return f"{value / base:.2f}x" if base > 0 else "-"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [header, ["-" * width for width in widths], *rows]
    ]
    return "\n".join(lines)
