"""Renders the bench's figures as docs/performance.md."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.sizes import shown, tensor_count

OURS, TORCH, DCP = "skyspot", "torch.save + fsync", "DCP load"
MEANT_BYTES = 1e9
"""The bounds apply to a state of this size or more."""
STALL_S = 0.060
ONE_COPY = 1.1
"""The bound that stands for one copy: the state, and a tenth of it for everything else that a save needs."""


@dataclass
class Figures:
    """What was measured, in seconds and bytes; a list has one value per round."""

    command: str
    date: str
    machine: dict[str, str]
    load: tuple[float, float]
    """Load average before and after."""
    state_bytes: int
    rounds: int
    threads: int
    """Number of threads that training computes on."""
    asked_s: float
    """Requested minimum duration of forward and backward."""
    forward_backward: list[float] = field(default_factory=list)
    """The shortest one of each process."""
    step_s: list[float] = field(default_factory=list)
    steps: int = 0
    """Number of steps that are trained beside each save."""
    first_stall: dict[str, float] = field(default_factory=dict)
    saves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """By way to save, for each round: stall, lost, cpu, commit."""
    extra_bytes: dict[str, int | None] = field(default_factory=dict)
    loads: dict[str, list[float]] = field(default_factory=dict)
    load_alone: list[float] = field(default_factory=list)
    """Durations of `dcp.load` alone."""
    ranks: list[Ranks] = field(default_factory=list)
    short: Short | None = None

    def median(self, way: str, what: str) -> float:
        return statistics.median(found[what] for found in self.saves[way])


@dataclass(frozen=True)
class Ranks:
    """Several ranks that save one state together; each rank's figures by name."""

    state_bytes: int
    each: list[dict[str, float]]


@dataclass
class Short:
    """A save with too little memory for a copy of the state."""

    limited_by: str
    spare_bytes: int
    printed: list[str] = field(default_factory=list)
    stall_s: float = 0.0
    extra_bytes: int | None = None
    trouble: str = ""
    """The error, if the save failed."""


def written(figures: Figures) -> str:
    """Render the report as Markdown."""
    parts = [_head(figures), _bounds(figures), _saves(figures), _loads(figures), _ranks(figures), _short(figures)]
    return "\n\n".join(parts) + "\n"


def _head(figures: Figures) -> str:
    low, high = min(figures.step_s), max(figures.step_s)
    tensors = tensor_count(figures.state_bytes)
    fastest = min(figures.forward_backward)
    asked = (
        "" if fastest >= figures.asked_s else f", less than the requested {figures.asked_s:g} s: the machine got faster"
    )
    machine = "\n".join(f"- {what}: {value}" for what, value in figures.machine.items())
    return f"""# Performance

`make bench` writes this file, and `make peers` its last two sections: the results of one run of each, including any
bounds that did not hold.

- Command: `{figures.command}`, {figures.date}
{machine}
- Load average: {figures.load[0]:.1f} before, {figures.load[1]:.1f} after, including the bench itself.
- A step without a save took {low:.2f} to {high:.2f} s, depending on the round: a measure of the machine's noise.
- State: {shown(figures.state_bytes)} of parameters and AdamW state in fp32, {tensors} tensors, on the CPU.
- Training computes on {figures.threads} of the cores, because a GPU would leave most of the CPU idle. malloc keeps
  freed memory, as a GPU's allocator does. Forward and backward, which run between the save and the optimizer's step,
  take at least {fastest:.2f} s{asked}.

Each way to save has its own process, and the processes take turns. The first round is shown separately or not at all;
the tables show medians of {figures.rounds} further rounds. Every loaded checkpoint was compared with the saved state,
bit by bit."""


def broken(figures: Figures) -> list[str]:
    """List the bounds that did not hold, in a line each; none for a state below MEANT_BYTES."""
    if figures.state_bytes < MEANT_BYTES:
        return []
    return [f"{what}: {found}, bound {bound}" for what, found, bound, holds in _checked(figures) if not holds]


def _checked(figures: Figures) -> list[tuple[str, str, str, bool]]:
    """List each bound as (what, found, bound, whether it holds)."""
    torch_s = {what: figures.median(TORCH, what) for what in ("stall", "lost", "commit")}
    ours_s = {what: figures.median(OURS, what) for what in ("stall", "lost", "commit")}
    load_s, dcp_s = statistics.median(figures.loads[OURS]), statistics.median(figures.loads[DCP])
    return [
        ("training thread blocked", _ms(ours_s["stall"]), f"{STALL_S * 1000:.0f} ms", ours_s["stall"] <= STALL_S),
        _ratio("training thread blocked, vs. torch.save + fsync", ours_s["stall"], torch_s["stall"], 0.1),
        _ratio("training seconds lost per save, vs. torch.save + fsync", ours_s["lost"], torch_s["lost"], 0.5),
        _ratio("commit with training idle, vs. torch.save + fsync", ours_s["commit"], torch_s["commit"], 1.3),
        *_memory(figures),
        _ratio("restore with verification, vs. DCP's load without", load_s, dcp_s, 1.5),
    ]


def _bounds(figures: Figures) -> str:
    bounds = table(
        ["What", "Found", "Bound", "Holds"],
        [[what, found, bound, "yes" if holds else "**no**"] for what, found, bound, holds in _checked(figures)],
    )
    smaller = figures.state_bytes < MEANT_BYTES
    note = "\n\nThe bounds apply to a state of 1 GB or more; this one is smaller." if smaller else ""
    return f"## The bounds\n\n{bounds}{note}"


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
    spread = table(
        ["", "Stall", "Lost per save", "Commit, idle"],
        [[way, *(_spread(figures, way, what) for what in ("stall", "lost", "commit"))] for way in figures.saves],
    )
    return f"""## Saving

{table(header, rows)}

- Stall: how long the training thread is blocked: in the call, and while it waits before the optimizer's step.
- Lost per save: {figures.steps} steps with a save and its background work, minus {figures.steps} steps without.
- CPU: the same difference in CPU seconds.
- Commit, idle: from the call until everything is on disk, with training idle. accelerate never calls fsync; the bench
  does so for each of its files.
- Extra memory: the process's peak (VmHWM) since its first save, minus its peak while training without saves. The page
  cache does not count.
- By default, DCP async_save copies on the training thread, into memory that it allocates for each save. With a stager
  passed in (`own stager`), it keeps the memory and copies on another thread.
- skyspot's commit includes hashing everything that it writes. After the commit it reads the checkpoint back, hashes it
  and deletes an older one; that is part of `Lost per save`.

Minimum and maximum of {figures.rounds} rounds:

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

{table(["", "Restore", "vs. DCP", "min .. max"], rows)}

- Restore: in a new process, from a new model until it could train. For all ways alike, the files are in the page cache.
  skyspot hashes every byte and compares the hashes with the manifest; the others verify nothing.
- DCP load: get_state_dict, dcp.load, set_state_dict. `dcp.load` alone, into existing tensors, takes {alone_s:.2f} s.
- torch.load with mmap leaves the optimizer's state in the file until it is used; its time does not include that."""


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
        "vs. state",
        "Forward/backward",
    ]
    return f"""## By size and by number of ranks

skyspot only. Every rank holds the whole state, and all ranks share this machine's cores.

{table(header, rows)}"""


def _short(figures: Figures) -> str:
    short = figures.short
    if short is None:
        return """## With too little memory

Not measured in this run: no control group could be made (that takes root)."""
    limit = f"The process was limited by {short.limited_by} to {shown(short.spare_bytes)} more than training needs."
    if short.trouble:
        text = f"{limit} Its save **failed**: {short.trouble.splitlines()[-1]}"
        return f"## With too little memory\n\n{textwrap.fill(text, 120)}"
    extra = "not measured" if short.extra_bytes is None else shown(short.extra_bytes)
    text = (
        f"{limit} The checkpoint was committed, and the process continued. The training thread was blocked for "
        f"{short.stall_s:.2f} s; extra memory: {extra}. The process printed:"
    )
    printed = "\n".join(f"    {line}" for line in short.printed) or "    (nothing)"
    return f"## With too little memory\n\n{textwrap.fill(text, 120)}\n\n{printed}"


def _of(value: float, base: float) -> str:
    return f"{value / base:.2f}x" if base > 0 else "-"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Render a table as Markdown."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [header, ["-" * width for width in widths], *rows]
    ]
    return "\n".join(lines)
