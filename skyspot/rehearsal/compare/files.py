"""Comparing the result files of two runs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from skyspot.rehearsal import naming
from skyspot.rehearsal.compare import bytewise, command
from skyspot.rehearsal.compare.difference import Difference, Sides
from skyspot.rehearsal.compare.documents import compare_json, compare_json_lines
from skyspot.rehearsal.compare.repeated import REPEATED, repeated_lines
from skyspot.rehearsal.compare.rules import Comparison, Findings, FormatError, Pattern, short
from skyspot.rehearsal.compare.tables import compare_tables
from skyspot.rehearsal.compare.tensor_files import read_npy, read_npz, read_safetensors
from skyspot.rehearsal.compare.tensors import Entry, compare_entries
from skyspot.rehearsal.compare.torch_files import torch_entries
from skyspot.rehearsal.verdict import Verdict

_READERS = {".safetensors": read_safetensors, ".npz": read_npz, ".npy": read_npy}
_DOCUMENTS = {
    ".json": compare_json, ".jsonl": compare_json_lines, ".ndjson": compare_json_lines,
    ".csv": compare_tables, ".tsv": compare_tables,
}  # fmt: skip
_TORCH = (".pt", ".pth", ".bin")

MOST_KINDS = 4
"""So many kinds of missing files are named."""
Buckets = Mapping[str | None, Path]
"""The folders of a run's buckets by mount point; None: the bucket of the run."""


def compare_files(rules: Comparison, left: Buckets, right: Buckets, sides: Sides) -> Verdict:
    """Compare the result files of two runs; `left` is the undisturbed one."""
    found: dict[str, tuple[Path, Path]] = {}
    for pattern in rules.patterns or (Pattern("."),):
        names = _matches(pattern.glob, (left[pattern.mount], right[pattern.mount]), folders=rules.command is not None)
        if not names:
            return Verdict(False, False, f"not checked: no file in the bucket matches {pattern.glob!r}")
        for name in names:
            shown = name if pattern.mount is None else f"{pattern.mount.rstrip('/')}/{name}"
            found[shown] = left[pattern.mount] / name, right[pattern.mount] / name
    for side, number in ((sides.right, 1), (sides.left, 0)):
        missing = sorted(name for name, pair in found.items() if not pair[number].exists())
        if missing:
            return Verdict(False, True, f"NOT exact: {_named(missing)} missing after the {side} run", "files")
    findings, equal_bytes = Findings(), 0
    for name, (one, two) in sorted(found.items()):
        try:
            if rules.command is not None:
                failed = command.compare(rules.command, one, two, name, sides, findings)
                if failed:
                    return failed
                continue
            spot = bytewise.first_difference(one, two)
            equal_bytes += spot is None
            difference = _compare_pair(name, one, two, spot, rules, findings) if spot else None
        except OSError as error:
            return Verdict(False, False, f"not checked: {name}: {error.strerror or error}")
        if difference:
            again = repeated_lines(one, two)
            difference = replace(difference, more=again or difference.more)
            text = f"NOT exact: {name} differs in {difference.text(sides)}"
            return Verdict(False, True, text, REPEATED if again else "files", notes=tuple(findings.notes))
    text = _equal(rules, findings, len(found), equal_bytes)
    return Verdict(True, True, text, notes=tuple(findings.notes))


def _named(missing: list[str]) -> str:
    """Name missing files, one of each kind: `a.json is`; `ckpt-1.pt (and 2 more like ckpt-#.pt) and a.json are`."""
    kinds: dict[str, list[str]] = {}
    for name in missing:
        kinds.setdefault(naming.parse(name).kind, []).append(name)
    words = [
        f"{names[0]} (and {len(names) - 1} more like {kind})" if len(names) > 1 else names[0]
        for kind, names in kinds.items()
    ]
    if len(words) > MOST_KINDS:
        words = [*words[: MOST_KINDS - 1], f"{len(words) - MOST_KINDS + 1} more kinds of files"]
    text = " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
    return f"{text} {'is' if len(missing) == 1 else 'are'}"


def _matches(glob: str, buckets: tuple[Path, Path], folders: bool) -> list[str]:
    """The names that match in either bucket: files, or with `folders` folders too, but nothing within these."""
    if glob == ".":
        return ["."]
    names = {
        path.relative_to(bucket).as_posix()
        for bucket in buckets
        for path in bucket.glob(glob)
        if path.is_file() or (folders and path.is_dir())
    }
    inside = {name for name in names if any(parent.as_posix() in names for parent in Path(name).parents)}
    return sorted(names - inside if folders else names)


def _compare_pair(
    name: str, left: Path, right: Path, spot: bytewise.Spot, rules: Comparison, findings: Findings
) -> Difference | None:
    """Find the first difference between two files that differ in a byte; None if their values are equal by the rules.

    Without rules a byte is enough; the values are compared to show the difference.
    """
    try:
        difference = _by_value(name, left, right, rules, findings)
    except FormatError as error:
        if rules.by_value or (str(error) != "no torch file" and Path(name).suffix in _TORCH):
            findings.notes.append(f"{name} was compared byte for byte: {error}.")
    except RecursionError:
        findings.notes.append(f"{name} was compared byte for byte: its values are nested too deeply.")
    else:
        if difference or rules.by_value:
            return difference
        findings.notes.append(f"the values in {name} are equal; --tolerance 0 compares values only.")
    return bytewise.describe(left, right, spot)


def _by_value(name: str, left: Path, right: Path, rules: Comparison, findings: Findings) -> Difference | None:
    """Compare two files by the values in them.

    Raises:
        FormatError: their format is not known, or a file does not keep to it.
    """
    suffix = Path(name).suffix.lower()
    if suffix in _DOCUMENTS:
        return _DOCUMENTS[suffix](left, right, rules, findings)
    if suffix in _READERS:
        entries: list[list[Entry]] = [_READERS[suffix](path) for path in (left, right)]
        return compare_entries(entries[0], entries[1], rules, findings)
    if suffix in _TORCH:
        with ExitStack() as stack:
            one, two = (stack.enter_context(torch_entries(path, rules.python)) for path in (left, right))
            return compare_entries(one, two, rules, findings)
    raise FormatError("its name is none of a JSON, CSV or tensor file")


def _equal(rules: Comparison, findings: Findings, count: int, equal_bytes: int) -> str:
    """Say how the files are equal."""
    files = f"{count} of {count} files ({rules.globs})"
    if rules.command is not None:
        return f"equal by --compare-with: {files if rules.patterns else 'the bucket'}"
    if equal_bytes == count:
        return f"byte-identical: {files}"
    text = "equal"
    if rules.tolerance is not None:
        text = f"equal within {short(rules.tolerance)}"
        largest = f"{short(findings.largest, 2)} in {findings.largest_in}" if findings.largest else "0"
        text += f" (largest difference {largest})"
    text += f": {files}"
    if findings.ignored:
        text += f"; ignored: {', '.join(sorted(findings.ignored))}"
    unknown = sorted(set(rules.ignored_keys) - findings.ignored)
    return f"{text}; not found: {', '.join(unknown)}" if unknown else text
