"""The verdict compares a preempted run with an undisturbed one, step by step and weight by weight."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skyspot.rehearsal import remedies
from skyspot.rehearsal.logs import CLOCK
from skyspot.rehearsal.loop_cause import Runs, cause
from skyspot.rehearsal.loop_record import LoopRecord, read_loop_record
from trainer.layout.documents import LayoutError
from trainer.layout.events import read_metrics
from trainer.layout.manifest import Manifest, read_manifest
from trainer.layout.names import RunPaths, is_safe_name, list_checkpoints

FALL = 0.2
DRIFT = 1e-5
DRIFT_STEPS = 50
SAME_BATCHES = (
    "all processes trained on the same batch in step 1, so each does the work of one: share the samples out "
    "(run.sampler, or torch's DistributedSampler) and wrap the model in DistributedDataParallel"
)
_COMPARED = ("loss", "lr", "order", "rng", "grad_norm")
"""Metrics in which a step must agree."""
_OURS = frozenset(
    {*_COMPARED, "step", "world_size", "step_s", "save_s", "data_s", "monotonic", "batch", "streams", "rates"}
    | {"samples", "tokens", "skipped"}
)
"""Metrics that are not the user's own."""


@dataclass(frozen=True)
class History:
    """The metrics and weights of a finished run."""

    lines: dict[int, dict[str, Any]]
    """The metrics of each step of the final history."""
    weights: dict[str, bytes]
    """The exported tensors."""
    machine: dict[str, Any]
    """The machine as recorded in its last checkpoint."""
    precision: str = "fp32"
    model: str | None = None
    """The bundled trainer's model: `tiny`, a folder or a hub ID; None for the user's own program."""
    dropout: bool = True
    """True if the exported model uses dropout; True if its config does not tell."""
    loop: LoopRecord | None = None
    """What is known of a loop of the user's own; None for the bundled trainer."""

    @property
    def steps(self) -> int:
        """The last step."""
        return max(self.lines, default=0)

    @property
    def losses(self) -> tuple[float, float] | None:
        """(the loss of the first step, that of the last); None if one is unknown."""
        first, last = (self.lines.get(step, {}).get("loss") for step in (1, self.steps))
        return (first, last) if isinstance(first, float) and isinstance(last, float) else None


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison."""

    exact: bool
    checked: bool
    text: str
    cause: str | None = None
    first_step: int | None = None
    """The first step that differs."""
    notes: tuple[str, ...] = ()
    remedy: str = ""
    """What to do about it; empty: nothing is known."""


def read_history(paths: RunPaths) -> History | None:
    """Read a finished run's history and weights; None if it has no whole `final/`."""
    try:
        final = read_manifest(paths.final)
    except (LayoutError, OSError):
        return None
    lines: dict[int, dict[str, Any]] = {}
    for part in final.facts.get("metrics") or []:
        try:
            name = str(part["path"])
            data = (paths.root / name).read_bytes() if is_safe_name(name) else b""
        except (OSError, TypeError, KeyError):
            continue
        for line in read_metrics(data):
            if "loss" in line:
                lines[line["step"]] = line
    weights: dict[str, bytes] = {}
    for path in sorted(paths.final.rglob("*.safetensors")):
        for name, data in read_tensors(path).items():
            # Two modules of a loop of one's own may have tensors of one name.
            weights[f"{path.stem}.{name}" if name in weights else name] = data
    config = final.facts.get("config")
    config = config if isinstance(config, dict) else {}
    model = config.get("model")
    return History(
        lines,
        weights,
        _machine(paths),
        str(config.get("precision", "fp32")),
        str(model) if model is not None else None,
        _dropout(paths),
        read_loop_record(paths),
    )


def _dropout(paths: RunPaths) -> bool:
    """True if the exported model uses dropout; True if its config does not tell."""
    try:
        config = json.loads((paths.final / "config.json").read_bytes())
        rates = [value for key, value in config.items() if "dropout" in key and isinstance(value, (int, float))]
    except (OSError, ValueError, AttributeError):
        return True
    return not rates or any(rate > 0 for rate in rates)


def no_proof(reference: History) -> str | None:
    """Explain why an exact rehearsal of the demo model would still prove nothing; None if it proves something.

    A run whose loss hardly falls could lose steps unnoticed, and a run without dropout draws no random numbers.
    """
    if reference.model != "tiny" or reference.losses is None:
        return None
    return next(iter(_weaknesses(reference)), None)


def _machine(paths: RunPaths) -> dict[str, Any]:
    for name in list_checkpoints(paths):
        try:
            manifest: Manifest = read_manifest(paths.checkpoint(name))
        except (LayoutError, OSError):
            continue
        return dict(manifest.facts.get("machine") or {})
    return {}


def read_tensors(path: Path) -> dict[str, bytes]:
    """Read the tensors of a safetensors file by name, as bytes preceded by dtype and shape."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header: Mapping[str, Any] = json.loads(data[8 : 8 + length])
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            found[name] = f"{entry['dtype']}{entry['shape']}".encode() + data[8 + length + start : 8 + length + end]
    return found


def compare(reference: History, other: History, ignored: Collection[str] = ()) -> Verdict:
    """Compare a preempted run with the undisturbed one bit by bit; name the first difference and its likely cause.

    Metrics that a loop of the user's own logs must agree too, but for those of the clock and the ignored ones.
    """
    logged = sorted(_logged(reference).difference(ignored))
    notes = _notes(reference, other)
    steps = sorted(reference.lines.keys() | other.lines.keys())
    same = [step for step in steps if _same(reference, other, step, ("loss",))]
    equal = [name for name in reference.weights if reference.weights[name] == other.weights.get(name)]
    counts = f"{len(same)} of {len(steps)} losses, {len(equal)} of {len(reference.weights)} weights"
    differs = next((step for step in steps if not _same(reference, other, step, (*_COMPARED, *logged))), None)
    whole = len(equal) == len(reference.weights) == len(other.weights) and reference.weights
    if differs is None and whole and steps:
        return Verdict(True, True, f"bit-identical: {counts}", notes=tuple(notes))
    if not steps or not reference.weights:
        return Verdict(
            False, False, "not checked: the undisturbed run recorded no losses or no weights", notes=tuple(notes)
        )
    kind = _cause(reference, other, differs) if differs is not None else "weights"
    where = f"first at step {differs}" if differs is not None else "only in the exported weights"
    why, remedy = _CAUSES[kind], ""
    if other.loop:
        names = sorted((reference.weights.keys() | other.weights.keys()).difference(equal))
        found = cause(Runs(reference.lines, other.lines, other.loop), differs, names, logged)
        why, remedy = (found.text, found.finding.remedy) if found else (why, remedies.NO_CAUSE.remedy)
    text = f"NOT exact: {counts} are equal; the run differs {where}. Likely cause: {why}"
    return Verdict(False, True, text, kind, differs, tuple(notes), remedy)


def _logged(history: History) -> set[str]:
    """Names of the metrics that a loop of the user's own logs; not those of the clock."""
    if history.loop is None:
        return set()
    names = {name for line in history.lines.values() for name in line}
    return {name for name in names - _OURS if not CLOCK.search(name)}


_CAUSES = {
    "order": "the data order (different samples in that step)",
    "lr": "the learning rate (not a function of the global step)",
    "rng": "the random numbers (dropout drew different ones)",
    "weights": "the weights or the optimizer's state (same samples, learning rate and random numbers)",
    "steps": "a missing step",
}


def _same(one: History, other: History, step: int, keys: tuple[str, ...]) -> bool:
    left, right = one.lines.get(step), other.lines.get(step)
    return left is not None and right is not None and all(left.get(key) == right.get(key) for key in keys)


def _cause(reference: History, other: History, step: int) -> str:
    if step not in reference.lines or step not in other.lines:
        return "steps"
    for key in ("order", "lr", "rng"):
        if not _same(reference, other, step, (key,)):
            return key
    return "weights"


def _notes(reference: History, other: History) -> list[str]:
    notes = []
    for key, what in (
        ("threads", "CPU threads"),
        ("torch", "torch"),
        ("instruction_set", "instruction set"),
        ("device", "device"),
    ):
        if reference.machine.get(key) != other.machine.get(key):
            notes.append(f"{what} changed from {reference.machine.get(key)} to {other.machine.get(key)}")
    if reference.loop and reference.loop.same_batches:
        notes.append(SAME_BATCHES)
    return [*notes, *_weaknesses(reference)]


def _weaknesses(reference: History) -> list[str]:
    """What an exact rehearsal of this run could not show."""
    found = []
    if reference.losses and _hardly_fell(*reference.losses):
        found.append("the loss fell by less than 20 %; train longer for a meaningful check")
    if not reference.dropout:
        found.append("the model has no dropout, so wrong random numbers would go unnoticed")
    return found


def _hardly_fell(first: float, last: float) -> bool:
    """True if a loss fell by less than 20 %, or is not a number."""
    return not (last < first and first - last >= FALL * abs(first))


def fall(history: History) -> str | None:
    """Describe how far the loss fell."""
    if history.losses is None:
        return None
    first, last = history.losses
    if first <= 0:  # A percentage of it makes no sense.
        return f"the loss went from {first:.3f} to {last:.3f}"
    verb = "rose" if last > first else "fell"
    return f"the loss {verb} from {first:.3f} to {last:.3f} ({abs(1 - last / first):.0%})"


def compare_across_world_sizes(reference: History, other: History) -> Verdict:
    """Compare a run that changed its number of processes: it must use the same samples and learning rates.

    Another number of processes adds in another order, so losses agree only within float tolerance. They are judged for
    the first 50 steps after the change (relative 1e-5); later differences are only printed.
    """
    steps = sorted(reference.lines.keys() | other.lines.keys())
    differs = next((step for step in steps if not _same(reference, other, step, ("order", "lr"))), None)
    if not steps:
        return Verdict(False, False, "not checked: no losses to compare")
    if differs is not None:
        cause = _cause(reference, other, differs)
        return Verdict(False, True, f"NOT the same from step {differs} on: {_CAUSES[cause]}", cause, differs)
    changed = next(
        (s for s in steps if reference.lines[s].get("world_size") != other.lines[s].get("world_size")), steps[-1] + 1
    )
    near = _drift(reference, other, [step for step in steps if step < changed + DRIFT_STEPS])
    worst = _drift(reference, other, steps)
    recorded = all("order" in lines[step] for lines in (reference.lines, other.lines) for step in steps)
    same = "same samples and same LR" if recorded else "samples not recorded, same LR"
    counts = f"{same} in {len(steps)} of {len(steps)} steps"
    if near > DRIFT and reference.precision == "fp32":
        return Verdict(
            False,
            True,
            f"{counts}, but the loss differs by {near:.1e} (relative) soon after the change",
            "weights",
            changed,
        )
    near_or_equal = f"loss within {worst:.1e} (relative)" if worst else "identical losses"
    return Verdict(True, True, f"{counts}; {near_or_equal}")


def _drift(reference: History, other: History, steps: list[int]) -> float:
    worst = 0.0
    for step in steps:
        left, right = reference.lines[step].get("loss"), other.lines[step].get("loss")
        if left is None or right is None:
            worst = max(worst, 0.0 if left == right else float("inf"))
        else:
            worst = max(worst, abs(left - right) / max(abs(left), 1e-12))
    return worst
